"""A sound device in a process of its own, so that nothing that happens to it can hold up the program.

    child: device -> DeviceSource -> pipe          parent: pipe -> Capture -> engine

Sound systems may hang or abort the process when a device or server goes away under them (PortAudio does both when a
JACK server dies), and afterwards do not find what has come back. A child can be killed and started anew. Its pipe takes
a third of a second and its queue two more, so whoever reads too slowly is told what was lost and never falls behind
further than that.
"""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from .errors import UserError
from .source import AudioSource, Block, DeviceLost, DeviceSource

OPEN_SECONDS = 20.0  # that a device may take to open; some sound systems try several servers first
END_SECONDS = 1.5  # that it may take to close
RETRY_SECONDS = 1.0  # between two looks whether a lost device is back
SHORTFALL_SECONDS = 0.5  # of sound missing against the clock, within WATCH_SECONDS, before the user is told
WATCH_SECONDS = 10.0
RECORD = struct.Struct("<iqq")  # samples that follow, lost right before them, overflows so far
LOST = -1  # in place of the number of samples: a text of as many bytes as the next number says

log = logging.getLogger(__name__)


class Capture(AudioSource):
    """A device, live; see `DeviceSource` for what is chosen how.

    wait : seconds to wait for a lost device to return, None for ever. While it is gone, one empty block says that
    sound is missing, so that no note hangs; when it is back, the next block says how much. It is looked for by its name
    then, for numbers change, and it may have another ``samplerate``.

    Raises UserError if the device cannot be opened, and DeviceLost from `blocks` when the waiting is over.
    """

    def __init__(
        self,
        device: int | str | None = None,
        samplerate: int | None = None,
        blocksize: int = 0,
        channel: int | None = None,
        wait: float | None = None,
    ) -> None:
        if wait is not None and not wait >= 0:
            raise UserError(f"to wait {wait:g} s for a lost device is impossible; give 0 or more")
        self._wait = wait
        self._options = {"device": device, "samplerate": samplerate, "blocksize": blocksize, "channel": channel}
        self._stopped = threading.Event()
        self._child: subprocess.Popen | None = None
        self.duration = None
        self.overflows = 0
        self._overflows_before = 0  # of the children that have gone
        self._open()
        self._options["device"] = self.label  # numbers change when devices come and go

    def _open(self) -> None:
        """Start a child and wait until it has its device; UserError with what it says if it has not."""
        command = [sys.executable, "-m", "realtime_mpe.capture", json.dumps(self._options)]
        # What the sound libraries print must not stand between the program's own lines.
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        timer = threading.Timer(OPEN_SECONDS, child.kill)
        timer.start()
        try:
            line = child.stdout.readline()
            found = json.loads(line) if line else {"error": f"the sound system did not answer in {OPEN_SECONDS:.0f} s"}
        except BaseException:
            _end(child)
            raise
        finally:
            timer.cancel()
        if "error" in found:
            _end(child)
            raise UserError(found["error"])
        self.name, self.hostapi, self.label = found["name"], found["hostapi"], found["label"]
        self.samplerate, self.latency = found["samplerate"], found["latency"]
        self._child = child

    def blocks(self) -> Iterator[Block]:
        while not self._stopped.is_set():
            try:
                yield from self._blocks_of(self._child)
            except DeviceLost as error:
                gone = time.monotonic()
                _end(self._child)
                yield Block(np.zeros(0, np.float32), 1)
                self._await_return(gone, error)
                if not self._stopped.is_set():
                    away = time.monotonic() - gone
                    log.warning("device %r is back after %.1f s", self.name, away)
                    yield Block(np.zeros(0, np.float32), round(away * self.samplerate))

    def _blocks_of(self, child: subprocess.Popen) -> Iterator[Block]:
        """What one child sends; DeviceLost when it has lost the device, or is gone itself."""
        _begin(child)
        watch = Shortfall(self.samplerate)
        while not self._stopped.is_set():
            header = child.stdout.read(RECORD.size)
            if len(header) < RECORD.size:
                if self._stopped.is_set():
                    return
                raise DeviceLost(f"the sound system of device {self.name!r} has broken down")
            count, lost, overflows = RECORD.unpack(header)
            if count == LOST:
                raise DeviceLost(child.stdout.read(lost).decode(errors="replace"))
            self.overflows = self._overflows_before + overflows
            samples = np.frombuffer(child.stdout.read(4 * count), "<f4")
            if watch.missing(len(samples) + lost):
                log.warning(
                    "device %r sends less sound than its %d Hz promise: the sound system drops some; choose a larger "
                    "--blocksize or end other programs",
                    self.name,
                    self.samplerate,
                )
            yield Block(samples, lost)

    def _await_return(self, gone: float, error: DeviceLost) -> None:
        self._overflows_before = self.overflows
        if self._wait is not None and self._wait <= 0:
            raise error
        log.warning("%s; waiting for it", str(error).partition(";")[0])
        while not self._stopped.wait(RETRY_SECONDS):
            if self._wait is not None and time.monotonic() - gone > self._wait:
                raise error
            try:
                self._open()
                return
            except UserError:
                continue

    def stop(self) -> None:
        self._stopped.set()
        if self._child is not None:
            _ask_to_end(self._child)  # and the read that waits for it ends

    def close(self) -> None:
        self.stop()
        if self._child is not None:
            _end(self._child)


class Shortfall:
    """Whether a device delivers what its rate promises: some sound systems drop samples and report nothing."""

    def __init__(self, samplerate: int):
        self._samplerate = samplerate
        self._told = False
        self._start(time.monotonic())

    def _start(self, now: float) -> None:
        self._since, self._samples = now, 0

    def missing(self, samples: int) -> bool:
        """Count so many samples in; True once, when SHORTFALL_SECONDS are missing from WATCH_SECONDS."""
        self._samples += samples
        now = time.monotonic()
        if self._told or now - self._since < WATCH_SECONDS:
            return False
        self._told = now - self._since - self._samples / self._samplerate > SHORTFALL_SECONDS
        self._start(now)
        return self._told


def _begin(child: subprocess.Popen) -> None:
    """Let the recording begin: not before somebody reads it."""
    try:
        child.stdin.write(b"\n")
        child.stdin.flush()
    except OSError:
        pass  # it is gone, and its pipe will say so


def _ask_to_end(child: subprocess.Popen) -> None:
    try:
        child.stdin.close()
    except OSError:
        pass  # it has gone already


def _end(child: subprocess.Popen) -> None:
    """Let it close its device, for some sound systems stumble over a client that just disappears; but not for ever."""
    _ask_to_end(child)
    child.stdout.close()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# In the child


def main() -> int:
    """Open the device that the argument describes, say what it is, and send its blocks until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent decides what ends
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that no library can print into the pipe
    try:
        source = DeviceSource(**json.loads(sys.argv[1]))
    except UserError as error:
        _say(out, {"error": str(error)})
        return 1
    facts = ("name", "hostapi", "label", "samplerate", "latency")
    _say(out, {name: getattr(source, name) for name in facts})
    if sys.stdin.buffer.read(1):
        threading.Thread(target=_end_with_parent, args=(source,), daemon=True).start()
        _send(source, out)
    source.close()
    return 0  # and sounddevice lets go of PortAudio: JACK stumbles over a client that just disappears


def _end_with_parent(source: AudioSource) -> None:
    sys.stdin.buffer.read()
    source.stop()
    time.sleep(END_SECONDS)
    os._exit(0)  # a sound system that hangs must not keep the process


def _say(out: BinaryIO, facts: dict) -> None:
    out.write(json.dumps(facts).encode() + b"\n")
    out.flush()


def _send(source: AudioSource, out: BinaryIO) -> None:
    try:
        for block in source.blocks():
            samples = block.samples.astype("<f4", copy=False)
            out.write(RECORD.pack(len(samples), block.lost, source.overflows) + samples.tobytes())
            out.flush()
    except UserError as error:
        text = str(error).encode()
        out.write(RECORD.pack(LOST, len(text), source.overflows) + text)
        out.flush()
    except BrokenPipeError:
        pass  # the parent reads no more


if __name__ == "__main__":
    sys.exit(main())
