"""A sound device in a process of its own, so that nothing that happens to it can hold up the program.

    child: device -> DeviceSource -> pipe          parent: pipe -> a thread -> Capture -> engine

Sound systems may hang or abort the process when a device or server goes away under them (PortAudio does both when a
JACK server dies), and afterwards do not find what has come back. A child can be killed and started anew. Its pipe takes
a third of a second and its queue two more, so whoever reads too slowly is told what was lost and never falls behind
further than that.
"""

import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from .errors import UserError
from .source import STALL_SECONDS, AudioSource, Block, DeviceLost, DeviceSource

OPEN_SECONDS = 20.0  # that a device may take to open; some sound systems try several servers first
END_SECONDS = 1.5  # that it may take to close
RETRY_SECONDS = 1.0  # between two looks whether a lost device is back
SHORTFALL_SECONDS = 0.5  # of sound missing against the clock, within WATCH_SECONDS, before the user is told
WATCH_SECONDS = 10.0
# Samples that follow, lost right before them, overflows so far, when they came: all processes have one monotonic clock.
RECORD = struct.Struct("<iqqd")
LOST, REFUSED = -1, -2  # in place of the number of samples: a text of as many bytes as the next number says
ENDINGS = {LOST: DeviceLost, REFUSED: UserError}
AHEAD = 8  # blocks that may be read ahead
POLL_SECONDS = 0.2  # without sound, after which the show goes on without
DEAF_SECONDS = 2 * STALL_SECONDS  # without a word from a child that would say so after half of it
HARDWARE = re.compile(r" ?\((hw|plughw):[^)]*\)")  # of an ALSA name: another one after the device was plugged in again

NOTHING = Block(np.zeros(0, np.float32))

log = logging.getLogger(__name__)


class Capture(AudioSource):
    """A device, live; see `DeviceSource` for what is chosen how.

    wait : seconds to wait for a lost device to return, None for ever. When it goes, one empty block says that sound is
    missing, so that no note hangs; while it is gone, empty blocks without loss let the show go on; when it is back, the
    first says how much was lost. It is looked for by its name then, for numbers change, and may have another
    ``samplerate``.

    Raises UserError if the device cannot be opened or started, and DeviceLost from `blocks` when the waiting is over.
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
        self._options = {"samplerate": samplerate, "blocksize": blocksize, "channel": channel}
        self._stopped = False
        self._child: Child | None = None
        self._overflows_before = 0  # of the children that have gone
        self.duration = None
        self._open(device)

    def _open(self, device: int | str | None) -> None:
        """Start a child and wait until it has its device; UserError with what it says if it has not."""
        self._child = Child(self._options | {"device": device})
        found = self._child.opened()
        self.name, self.hostapi, self.label = found["name"], found["hostapi"], found["label"]
        self.samplerate, self.latency = found["samplerate"], found["latency"]

    @property
    def overflows(self) -> int:
        return self._overflows_before + self._child.overflows

    def blocks(self) -> Iterator[Block]:
        gone: float | None = None  # since when the device is
        heard = False
        while not self._stopped:
            try:
                for block in self._child.blocks(self.samplerate, self.name):
                    if self._stopped:
                        return
                    if gone is not None and len(block.samples):
                        away = time.monotonic() - gone
                        log.warning("device %r is back after %.1f s", self.name, away)
                        gone = None
                        block = block._replace(lost=block.lost + round(away * self.samplerate))
                    heard = heard or len(block.samples) > 0
                    yield block
                return  # it was stopped
            except UserError as error:
                if not heard and not isinstance(error, DeviceLost):
                    raise
                reason = error
            if gone is None:
                gone = time.monotonic()
                yield NOTHING._replace(lost=1)
                if self._wait is None or self._wait > 0:
                    log.warning("%s; waiting for it", str(reason).partition(";")[0])
            yield from self._until_back(gone, reason)

    def _until_back(self, gone: float, error: UserError) -> Iterator[Block]:
        """Empty blocks until a child has the device again; DeviceLost when the waiting is over."""
        self._overflows_before += self._child.overflows
        self._child.close()
        while not self._stopped:
            if self._wait is not None and time.monotonic() - gone >= self._wait:
                raise error if isinstance(error, DeviceLost) else DeviceLost(str(error))
            pause = time.monotonic() + RETRY_SECONDS
            while time.monotonic() < pause and not self._stopped:
                time.sleep(POLL_SECONDS)
                yield NOTHING
            for name in dict.fromkeys((self.label, HARDWARE.sub("", self.name))):
                try:
                    self._open(name)
                    return
                except UserError:
                    self._child.close()

    def stop(self) -> None:
        self._stopped = True
        if self._child is not None:
            self._child.stop()

    def close(self) -> None:
        self.stop()
        if self._child is not None:
            self._child.close()


class Child:
    """One process that holds a device, and a thread that reads from it: so that whatever hangs, it is not the show."""

    def __init__(self, options: dict):
        command = [sys.executable, "-m", "realtime_mpe.capture", json.dumps(options)]
        # What the sound libraries print must not stand between the program's own lines.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._wake = threading.Condition()  # re-entrant: a signal handler may stop what this very thread waits for
        self._queue: deque[Block] = deque()
        self._end: UserError | None = None  # why nothing more will come, after what is in the queue
        self._stopped = False
        self.overflows = 0

    def opened(self) -> dict:
        """What the child says of its device; UserError if it could not be opened."""
        timer = threading.Timer(OPEN_SECONDS, self._process.kill)
        timer.start()
        begun = time.monotonic()
        try:
            line = self._process.stdout.readline()
            found = json.loads(line) if line else {}
        except ValueError:
            found = {}
        except BaseException:  # Ctrl-C: it may hang for ever, and nobody else knows of it yet
            self._process.kill()
            raise
        finally:
            timer.cancel()
        if "name" in found:
            return found
        late = time.monotonic() - begun >= OPEN_SECONDS
        silence = f"did not answer in {OPEN_SECONDS:.0f} s" if late else "broke down when the device was opened"
        self.close()
        raise UserError(found.get("error", f"the sound system {silence}; rt-mpe doctor may tell why"))

    def blocks(self, samplerate: int, name: str) -> Iterator[Block]:
        """What it hears, from now on, until it is stopped; DeviceLost when the device or the child has gone, UserError
        if the device cannot be started."""
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError, RuntimeError):
            pass  # it has gone or is being stopped, and its pipe will say so
        threading.Thread(target=self._read, args=(name,), daemon=True).start()
        watch = Shortfall(samplerate)
        idle = 0.0  # counted in waits and not by the clock, so that a suspended process does not take itself for deaf
        while not self._stopped:
            block = None
            with self._wake:
                if self._queue:
                    block = self._queue.popleft()
                    self._wake.notify_all()
                elif self._end is not None:
                    raise self._end
                elif not self._wake.wait(POLL_SECONDS):
                    idle += POLL_SECONDS
            if block is None:
                if idle >= DEAF_SECONDS:
                    raise DeviceLost(f"the sound system of device {name!r} hangs")
                if idle:
                    yield NOTHING
                continue
            idle = 0.0
            if watch.missing(len(block.samples) + block.lost):
                log.warning(
                    "device %r sends less sound than its %d Hz promise: the sound system drops some; choose a larger "
                    "--blocksize or end other programs",
                    name,
                    samplerate,
                )
            yield block

    def _read(self, name: str) -> None:
        """In a thread: from the pipe to the queue, which holds little, for it is the child that drops what is late."""
        pipe = self._process.stdout
        end: UserError = DeviceLost(f"the sound system of device {name!r} has broken down")
        try:
            while len(header := pipe.read(RECORD.size)) == RECORD.size:
                count, lost, self.overflows, came = RECORD.unpack(header)
                if count in ENDINGS:
                    end = ENDINGS[count](pipe.read(lost).decode(errors="replace"))
                    break
                block = Block(np.frombuffer(pipe.read(4 * count), "<f4"), lost, came)
                with self._wake:
                    while len(self._queue) >= AHEAD and not self._stopped:
                        self._wake.wait()
                    self._queue.append(block)
                    self._wake.notify_all()
        except (OSError, ValueError):
            pass  # it is being closed
        with self._wake:
            self._end = end
            self._wake.notify_all()

    def stop(self) -> None:
        """Let it close its device, for some sound systems stumble over a client that just disappears."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        try:
            self._process.stdin.close()
        except (OSError, ValueError, RuntimeError):
            pass  # it has gone, or is just being written to: then `close` will do

    def close(self) -> None:
        self.stop()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Shortfall:
    """Whether a device delivers what its rate promises: some sound systems drop samples and report nothing."""

    def __init__(self, samplerate: int):
        self._samplerate = samplerate
        self._told = False
        self._since: float | None = None  # the first block: a sound server takes its time until then
        self._samples = 0  # that came after it

    def missing(self, samples: int) -> bool:
        """Count so many samples in; True once, when SHORTFALL_SECONDS are missing from WATCH_SECONDS."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            return False
        self._samples += samples
        if self._told or now - self._since < WATCH_SECONDS:
            return False
        self._told = now - self._since - self._samples / self._samplerate > SHORTFALL_SECONDS
        self._since, self._samples = now, 0
        return self._told


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
            out.write(RECORD.pack(len(samples), block.lost, source.overflows, block.came) + samples.tobytes())
            out.flush()
    except UserError as error:
        text = str(error).encode()
        kind = LOST if isinstance(error, DeviceLost) else REFUSED
        out.write(RECORD.pack(kind, len(text), source.overflows, time.monotonic()) + text)
        out.flush()
    except BrokenPipeError:
        pass  # the parent reads no more


if __name__ == "__main__":
    sys.exit(main())
