"""`audio:PATH.wav`: what was heard, as a WAV file whose first sample is second 0 of all notes.

The samples are those that the engine got, in 32-bit floating point. The header is true once a second, so a program that
is killed leaves a file that can be opened and lacks the last second at most.
"""

import logging
import os
import struct
import time
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..source import Block
from .base import NoteSink

HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
FLOAT, BYTES = 3, 4  # WAVE_FORMAT_IEEE_FLOAT, a sample
LARGEST = 0xFFFFFFFF - HEADER.size  # bytes of sound; more than six hours at 48 kHz
SAVE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class AudioFileSink(NoteSink):
    """samplerate : of the sound, Hz. Lost samples become silence, so that the file keeps time with the notes.

    UserError if `path` cannot be written or is there already. A full disk, or a device that goes on at another rate,
    ends the recording with a warning; what is there is kept.
    """

    def __init__(self, path: str | Path, samplerate: int) -> None:
        if not str(path):
            raise UserError("the recording needs a file name, such as audio:take.wav")
        self.path = Path(path).expanduser()
        self._samplerate = samplerate
        self._bytes = 0
        try:
            self._file = open(self.path, "xb")
            self._file.write(self._header())
        except FileExistsError as e:
            raise UserError(f"{str(self.path)!r} is there already: move that take away, or choose another name") from e
        except OSError as e:
            raise UserError(f"cannot record to {str(self.path)!r}: {e.strerror or e}; choose another place") from e
        self._next_save = time.monotonic() + SAVE_SECONDS
        self.closed = False
        self.saved = False  # True once all of it is there

    def sound(self, block: Block, samplerate: int) -> None:
        """The next block; ``samplerate`` is the source's now."""
        if self.closed:
            return
        try:
            if samplerate != self._samplerate:
                self._give_up(f"the device goes on at {samplerate} Hz")
                return
            if self._bytes + BYTES * (block.lost + len(block.samples)) > LARGEST:
                self._give_up("the file is as long as a WAV can be")
                return
            if block.lost:  # hours, it may be: what is skipped reads as silence
                self._file.seek(BYTES * block.lost, os.SEEK_CUR)
                self._bytes += BYTES * block.lost
            self._write(block.samples.astype("<f4", copy=False))
            if time.monotonic() >= self._next_save:
                self._save()
        except OSError as e:
            self._give_up(e.strerror or str(e))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            self._save()
            os.fsync(self._file.fileno())
            self._file.close()
            self.saved = True
        except OSError as e:
            raise UserError(f"the end of {str(self.path)!r} could not be saved: {e.strerror or e}") from e

    def discard(self) -> None:
        """Close and leave no file: there was no performance."""
        self.closed = True
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, samples: np.ndarray) -> None:
        self._file.write(samples.tobytes())
        self._bytes += BYTES * len(samples)

    def _save(self) -> None:
        """Bring the header up to date with what is there."""
        self._file.truncate(HEADER.size + self._bytes)
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        self._file.seek(0, os.SEEK_END)
        self._next_save = time.monotonic() + SAVE_SECONDS

    def _header(self) -> bytes:
        rate, size = self._samplerate, self._bytes
        riff = b"RIFF", HEADER.size - 8 + size, b"WAVE"
        form = b"fmt ", 16, FLOAT, 1, rate, rate * BYTES, BYTES, 8 * BYTES
        return HEADER.pack(*riff, *form, b"data", size)

    def _give_up(self, reason: str) -> None:
        _log.warning("the recording %s ends here: %s", self.path, reason)
        try:
            self.close()
        except UserError:
            pass  # the warning has said it
