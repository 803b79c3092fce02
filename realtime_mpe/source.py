"""Where the sound comes from: a sound device, a file, or the recording that is built in.

A source gives mono blocks at its own rate; `resample` brings them to the rate of the analysis. Time is counted in
samples: a block says how many were lost right before it, so that a gap does not shift what follows.
"""

import atexit
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import resources
from typing import NamedTuple, Protocol

import numpy as np
import soundfile

from .errors import UserError

QUEUE_SECONDS = 2.0  # of live sound that may wait; older sound is worth nothing to somebody who plays along
STALL_SECONDS = 3.0  # without a block: the longest block in use is far below a second, so the device is gone
POLL_SECONDS = 0.2  # how often the end of a stream is looked for; PortAudio announces no loss of the device
CLOSE_SECONDS = 1.0  # that a lost device may take to be closed
MAX_LATENCY = 10.0  # s; JACK's dummy driver reports 89,478
STREAMED_BYTES = 0x7FFFF000  # a size from here on is what programs write that do not know it yet
# Opened of a device when none is chosen: virtual devices claim 32 to 128, and silent ones dilute a mean.
DOWNMIX_CHANNELS = 2

log = logging.getLogger(__name__)


class DeviceLost(UserError):
    """The sound device ended or went silent while it was listened to."""


class Block(NamedTuple):
    """samples : (n,) float32, mono, full scale = 1.  lost : samples lost right before these, at the source's rate.
    came : when the last of them was there, by `time.monotonic`; None if they did not have to be waited for."""

    samples: np.ndarray
    lost: int = 0
    came: float | None = None


class AudioSource(Protocol):
    """What the engine needs of a source. Constructing one opens it and raises UserError if that is impossible.

    samplerate : Hz, integer.  name : for people.  duration : seconds, None if live or unknown.
    overflows : how often the device itself has reported lost samples.  latency : seconds from the air to a block.
    """

    samplerate: int
    name: str
    duration: float | None
    overflows: int
    latency: float

    def blocks(self) -> Iterator[Block]:
        """Blocks until the end or until stop(); to be called once."""
        ...

    def stop(self) -> None:
        """End the iterator soon. May be called from another thread or a signal handler, and twice."""
        ...

    def close(self) -> None:
        """Give the file or device back; may be called twice."""
        ...

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _downmix(samples: np.ndarray, channel: int | None) -> np.ndarray:
    """(n, channels) float32 to a mono copy (n,): one channel, counted from 1, or the mean of all."""
    if channel is not None:
        return samples[:, channel - 1].copy()
    if samples.shape[1] == 1:
        return samples[:, 0].copy()
    with np.errstate(all="ignore"):  # inf - inf is what the source sent, and the engine counts it
        return samples.mean(axis=1, dtype=np.float32)


def _check_channel(channel: int | None, channels: int, name: str) -> None:
    if channel is not None and not 1 <= channel <= channels:
        raise UserError(f"{name} has no channel {channel}; choose 1{f' to {channels}' if channels > 1 else ''}")


class FileSource(AudioSource):
    """An audio file of any format libsndfile reads (WAV, FLAC, Ogg, MP3, AIFF ...), streamed in blocks.

    path : the file.  paced : deliver each block when its last sample would have been heard, instead of at once.
    blocksize : samples a block.  channel : the one to take, counted from 1; None is the mean of all.

    A damaged file is read as far as it goes, with a warning. Raises UserError if it cannot be read at all.
    """

    def __init__(
        self, path: str | os.PathLike, paced: bool = False, blocksize: int = 512, channel: int | None = None
    ) -> None:
        if blocksize < 1:
            raise UserError(f"a block of {blocksize} samples is impossible; give at least 1")
        path = os.path.expanduser(os.fspath(path))
        self._file = _open(path)
        self.name = os.path.basename(path)
        self.samplerate = self._file.samplerate
        frames = self._file.frames  # 2**63 - 1 is "unknown"
        self.duration = frames / self.samplerate if 0 < frames < 1 << 62 else None
        self.damaged = False  # True once the file has ended before its time
        self._expected = _promised_frames(self._file) if self.duration else None
        self.overflows = 0
        self.latency = 0.0
        self._paced = paced
        self._blocksize = blocksize
        self._channel = channel
        # Its lock is re-entrant, so that a signal handler may call stop() while this very thread holds it.
        self._wake = threading.Condition()
        self._stopped = False
        try:
            _check_channel(channel, self._file.channels, self.name)
            self._ahead = self._read()  # now, so that a file without sound is refused before anything else starts
            if not len(self._ahead):
                raise UserError(f"{path!r} holds no sound; give an audio file with at least one sample")
        except soundfile.SoundFileError as e:
            self._file.close()
            raise UserError(f"{path!r} is damaged from its start ({_one_line(e)}); give an intact copy") from e
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> np.ndarray:
        return _downmix(self._file.read(self._blocksize, dtype="float32", always_2d=True), self._channel)

    def blocks(self) -> Iterator[Block]:
        start, delivered = time.monotonic(), 0
        samples, reason = self._ahead, "it is shorter than it says"
        while len(samples) and not self._stopped:
            delivered += len(samples)
            came = start + delivered / self.samplerate if self._paced else None
            if came is not None and not self._sleep_until(came):
                return
            yield Block(samples, came=came)
            if self._stopped:
                return
            try:
                samples = self._read()
            except soundfile.SoundFileError as e:
                samples, reason = np.zeros(0, np.float32), _one_line(e)
        if not self._stopped and self._expected and delivered < self._expected:
            self.damaged = True
            missing = (self._expected - delivered) / self.samplerate
            log.warning("%s is damaged: its last %.1f s cannot be read (%s)", self.name, missing, reason)

    def _sleep_until(self, moment: float) -> bool:
        """Wait for `moment` of the monotonic clock; False if stop() came first."""
        with self._wake:
            while not self._stopped and (left := moment - time.monotonic()) > 0:
                # In slices: a signal handler that runs just before the wait begins wakes nobody.
                self._wake.wait(min(left, POLL_SECONDS))
        return not self._stopped

    def stop(self) -> None:
        self._stopped = True
        with self._wake:
            self._wake.notify_all()

    def close(self) -> None:
        self.stop()
        self._file.close()


def _open(path: str) -> soundfile.SoundFile:
    """Open an audio file; every way in which that fails is one line that says what to do."""
    if os.path.isdir(path):
        raise UserError(f"{path!r} is a folder; give one audio file")
    if not os.path.exists(path):
        raise UserError(f"{path!r} does not exist; check the path")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise UserError(f"{path!r} is empty; give an audio file with at least one sample")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path!r} may not be read; change its permissions")
    try:
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError, ValueError) as e:  # TypeError: headerless .raw
        raise UserError(f"{path!r} cannot be read ({_one_line(e)}); give a WAV, FLAC, Ogg, MP3 or AIFF file") from e


def _promised_frames(file: soundfile.SoundFile) -> int | None:
    """Frames that the file should have by its own header; None if that is not certain.

    libsndfile silently shortens a truncated WAV or AIFF to what is there, but its log keeps what the header says.
    """
    if file.format == "MP3":  # its length can be an estimate, and falling short of it says nothing
        return None
    cut = re.search(r"^(?:data|\s*SSND) : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if cut is None:
        return file.frames
    promised, there = int(cut[1]), int(cut[2])
    if not there < promised < STREAMED_BYTES:
        return None
    return file.frames * promised // max(there, 1)


def _one_line(e: Exception) -> str:
    """What a library said, fit to stand in brackets."""
    text = getattr(e, "error_string", None) or str(e) or type(e).__name__
    return " ".join(text.split()).rstrip(".")


class DemoSource(FileSource):
    """The recording that comes with the program, at the pace of a performance."""

    def __init__(self, *, paced: bool = True, blocksize: int = 512) -> None:
        recording = resources.files(__package__).joinpath("demo.ogg")
        if not recording.is_file():
            raise UserError("the demo recording is missing from this installation; reinstall realtime-mpe")
        self._unpacked = ExitStack()  # the package may be a zip file, the recording a temporary copy
        try:
            super().__init__(self._unpacked.enter_context(resources.as_file(recording)), paced, blocksize)
        except BaseException:
            self._unpacked.close()
            raise
        self.name = "demo"

    def close(self) -> None:
        super().close()
        self._unpacked.close()


class DeviceSource(AudioSource):
    """A sound device, live. Recording begins with the first block that is asked for.

    device : number (also as text), part of a name in either case, or None for the system's default input.
    samplerate : Hz; None is the device's own.  blocksize : samples a block; 0 leaves it to the device.
    channel : the input to take, counted from 1; None is the mean of the first two (of a mono device, the one).

    Two seconds of sound may wait; then the oldest block is dropped and counted in the next `Block.lost`.
    Raises UserError if the device cannot be found or opened, and DeviceLost from `blocks` if it goes away.
    """

    def __init__(
        self,
        device: int | str | None = None,
        samplerate: int | None = None,
        blocksize: int = 0,
        channel: int | None = None,
    ) -> None:
        if blocksize < 0:
            raise UserError(f"a block of {blocksize} samples is impossible; give 0 for the device's own choice")
        sounddevice = _import_sounddevice()
        info = _choose_device(device, _all_devices())
        self.name, self.hostapi, self.label = info["name"], info["hostapi"], _label(info)
        self.samplerate = info["samplerate"] if samplerate is None else samplerate
        self.duration = None
        self.overflows = 0
        _check_channel(channel, info["channels"], f"device {self.name!r}")
        self._channel = channel
        self._wake = threading.Condition()  # re-entrant, as in FileSource
        self._queue: deque[tuple[np.ndarray, float]] = deque()  # samples, and when they came
        self._queued = 0  # samples in the queue
        self._lost = 0  # samples dropped since the last block left the queue; they all stood right before its head
        self._failure: Exception | None = None
        self._started = self._stopped = self._closed = False
        self._portaudio_error = sounddevice.PortAudioError
        try:
            self._stream = sounddevice.InputStream(
                device=info["index"],
                channels=channel or min(info["channels"], DOWNMIX_CHANNELS),
                samplerate=self.samplerate,
                blocksize=blocksize,
                dtype="float32",
                latency="low",
                callback=self._callback,
            )
        except (sounddevice.PortAudioError, ValueError) as e:
            raise UserError(
                f"device {self.name!r} cannot be opened at {self.samplerate} Hz ({_one_line(e)}); "
                f"use its own rate of {info['samplerate']} Hz, or close the program that holds it"
            ) from e
        latency = float(self._stream.latency)
        self.latency = latency if math.isfinite(latency) and 0.0 <= latency <= MAX_LATENCY else 0.0

    def _callback(self, indata: np.ndarray, frames: int, when: object, status: object) -> None:
        # An exception here would end the stream without a word, so it is handed to the thread that reads the blocks.
        came = time.monotonic()
        try:
            samples = _downmix(indata, self._channel)
            with self._wake:
                if status and status.input_overflow:
                    self.overflows += 1
                self._queue.append((samples, came))
                self._queued += len(samples)
                while self._queued > QUEUE_SECONDS * self.samplerate and len(self._queue) > 1:
                    dropped = len(self._queue.popleft()[0])
                    self._queued -= dropped
                    self._lost += dropped
                self._wake.notify_all()
        except Exception as e:
            self._failure = e

    def blocks(self) -> Iterator[Block]:
        try:
            self._stream.start()
            self._started = True
        except self._portaudio_error as e:
            raise UserError(
                f"device {self.name!r} cannot be started ({_one_line(e)}); check that no other program holds it"
            ) from e
        idle = 0.0  # counted in waits and not by the clock, so that a suspended process does not take itself for deaf
        while not self._stopped:
            block = None
            with self._wake:
                if self._queue:
                    samples, came = self._queue.popleft()
                    block = Block(samples, self._lost, came)
                    self._queued -= len(block.samples)
                    self._lost = 0
                elif not self._stopped and not self._wake.wait(POLL_SECONDS):
                    idle += POLL_SECONDS
            if block is not None:
                idle = 0.0
                yield block
            elif not self._queue and not self._stopped:
                self._check_alive(idle)

    def _check_alive(self, idle: float) -> None:
        if self._failure is not None:
            raise DeviceLost(f"device {self.name!r} sent what cannot be used: {self._failure}") from self._failure
        if not self._active():
            raise DeviceLost(f"device {self.name!r} has gone; connect it again and start anew")
        if idle >= STALL_SECONDS:
            raise DeviceLost(f"device {self.name!r} has sent nothing for {idle:.0f} s; connect it again and start anew")

    def _active(self) -> bool:
        try:
            return self._stream.active
        except self._portaudio_error:
            return False

    def stop(self) -> None:
        self._stopped = True
        with self._wake:
            self._wake.notify_all()

    def close(self) -> None:
        self.stop()
        if self._closed:
            return
        self._closed = True
        if not self._started or self._active():
            self._stream.abort(ignore_errors=True)  # some versions of PortAudio hang when a running stream is closed
            self._stream.close(ignore_errors=True)
            return
        # When a JACK server has died, PortAudio waits for it for ever, in close and again when the program exits.
        closing = threading.Thread(target=self._stream.close, args=(True,), daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            atexit.unregister(getattr(_import_sounddevice(), "_exit_handler", None))


def _import_sounddevice():
    # Not at the top: a program that transcribes files must run where no sound library is installed.
    try:
        import sounddevice
    except OSError as e:
        raise UserError("PortAudio is missing: apt install libportaudio2 / brew install portaudio") from e
    except ImportError as e:
        raise UserError("the package sounddevice is missing: pip install sounddevice") from e
    return sounddevice


def list_devices() -> list[dict]:
    """Every device that has inputs: dicts of index, name, hostapi, channels, samplerate (Hz, its own) and default."""
    return [d for d in _all_devices() if d["channels"]]


def _all_devices() -> list[dict]:
    sounddevice = _import_sounddevice()
    try:
        devices, hostapis = sounddevice.query_devices(), sounddevice.query_hostapis()
    except sounddevice.PortAudioError as e:
        raise UserError(f"the sound devices cannot be listed ({_one_line(e)}); check the system's sound set-up") from e
    try:
        default = sounddevice.query_devices(kind="input")["index"]
    except (sounddevice.PortAudioError, ValueError):  # there is none
        default = None
    return [
        {
            "index": d["index"],
            "name": d["name"],
            "hostapi": hostapis[d["hostapi"]]["name"],
            "channels": d["max_input_channels"],
            "samplerate": int(round(d["default_samplerate"])),
            "default": d["index"] == default,
        }
        for d in devices
    ]


def _choose_device(device: int | str | None, devices: list[dict]) -> dict:
    """The input device that a number or a part of a name means; UserError with the candidates if it is not one."""
    inputs = [d for d in devices if d["channels"]]
    others = [d for d in devices if not d["channels"]]
    if not inputs:
        raise UserError("no sound device with inputs was found; connect one, or give a file instead")
    if device is None or device == "":
        chosen = [d for d in inputs if d["default"]]
        if not chosen:
            raise UserError(f"the system has no default input; choose one of {_candidates(inputs)}")
        return chosen[0]
    if isinstance(device, int) or device.strip().isdecimal():
        chosen, outputs = ([d for d in group if d["index"] == int(device)] for group in (inputs, others))
    else:
        chosen, outputs = (_by_name(device, group) for group in (inputs, others))
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise UserError(f"device {device!r} can be any of {_candidates(chosen)}; give its number")
    if outputs:
        raise UserError(f"device {device!r} has outputs only; devices with inputs are {_candidates(inputs)}")
    raise UserError(f"device {device!r} is unknown; devices with inputs are {_candidates(inputs)}")


def _by_name(text: str, devices: list[dict]) -> list[dict]:
    """Devices whose "name, host API" contains the text; one that is called exactly so hides those that only hold it."""
    wanted = text.strip().casefold()
    exact = [d for d in devices if wanted in (d["name"].casefold(), _label(d).casefold())]
    return exact or [d for d in devices if wanted in _label(d).casefold()]


def _label(device: dict) -> str:
    return f"{device['name']}, {device['hostapi']}"


def _candidates(devices: list[dict]) -> str:
    return "; ".join(f"{d['index']}: {_label(d)}" for d in devices)
