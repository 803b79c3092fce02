"""As much of sounddevice as the program uses, for its child processes: devices that come and go as files do.

$FAKE_DEVICES names a folder; a file NAME in it is a device, its content "rate inputs". An open stream sends a tone of
440 Hz in time, and is no longer active once its file has gone, or has another rate. The sound system says nothing for
$FAKE_HANG seconds.
"""

import os
import threading
import time
import types
from pathlib import Path

import numpy as np

BLOCK = 480


class PortAudioError(Exception):
    pass


def _devices():
    return sorted(path for path in Path(os.environ["FAKE_DEVICES"]).iterdir() if not path.name.startswith("."))


def query_devices(device=None, kind=None):
    time.sleep(float(os.environ.get("FAKE_HANG", 0)))
    found = []
    for index, path in enumerate(_devices()):
        rate, inputs = map(int, path.read_text().split())
        found.append(
            {"index": index, "name": path.name, "hostapi": 0, "max_input_channels": inputs, "default_samplerate": rate}
        )
    if kind is None:
        return found
    inputs = [d for d in found if d["max_input_channels"]]
    if not inputs:
        raise PortAudioError("Error querying device -1")
    return inputs[0]


def query_hostapis():
    return [{"name": "Fake"}]


class InputStream:
    latency = 0.01

    def __init__(self, *, device, channels, samplerate, blocksize, dtype, latency, callback):
        self._path, self._channels, self._rate, self._callback = _devices()[device], channels, samplerate, callback
        if int(self._path.read_text().split()[0]) != samplerate:
            raise PortAudioError("Invalid sample rate")
        self._running = False

    @property
    def active(self):
        try:
            return self._running and int(self._path.read_text().split()[0]) == self._rate
        except (OSError, IndexError):
            return False

    def start(self):
        if "FAKE_START_ERROR" in os.environ:
            raise PortAudioError(os.environ["FAKE_START_ERROR"])
        self._running = True
        threading.Thread(target=self._play, daemon=True).start()

    def _play(self):
        sent, begun = 0, time.monotonic()
        while self.active:
            t = np.arange(sent, sent + BLOCK) / self._rate
            tone = (0.1 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
            self._callback(np.repeat(tone[:, None], self._channels, 1), BLOCK, None, types.SimpleNamespace(
                input_overflow=False))  # fmt: skip
            sent += BLOCK
            time.sleep(max(0.0, begun + sent / self._rate - time.monotonic()))

    def abort(self, ignore_errors=True):
        self._running = False

    def close(self, ignore_errors=True):
        self._running = False
