"""`audio:PATH.wav`: what was heard, as a WAV file whose first sample is second 0 of all notes.

The samples are those that the engine got, in 32-bit floating point; only what a device sends after it came back at
another rate is brought to the rate of the file. The header is true once a second, so a program that
is killed leaves a file that can be opened and lacks the last second at most.
"""

import logging
import os
import struct
import time
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..resample import Resampler
from ..source import Block
from .base import NoteSink

HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
FLOAT, BYTES = 3, 4  # WAVE_FORMAT_IEEE_FLOAT, a sample
LARGEST = 0xFFFFFFFF - HEADER.size  # bytes of sound; more than six hours at 48 kHz
SAVE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class AudioFileSink(NoteSink):
    """samplerate : of the sound, Hz. Lost samples become silence, so that the file keeps time with the notes.

    UserError if `path` cannot be written or is there already. A full disk ends the recording with a warning; what is
    there is kept.
    """

    def __init__(self, path: str | Path, samplerate: int) -> None:
        if not str(path):
            raise UserError("the recording needs a file name, such as audio:take.wav")
        self.path = Path(os.path.expanduser(path))
        self._samplerate = samplerate
        self._coming = samplerate
        self._resampler: Resampler | None = None
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
            if block.lost or samplerate != self._coming:
                self._write_rest()
            if samplerate != self._coming:
                self._coming = samplerate
                self._resampler = None if samplerate == self._samplerate else Resampler(samplerate, self._samplerate)
            lost = round(block.lost * self._samplerate / samplerate)
            samples = block.samples if self._resampler is None else self._resampler.process(block.samples)
            if self._bytes + BYTES * (lost + len(samples)) > LARGEST:
                self._give_up("the file is as long as a WAV can be")
                return
            if lost:  # hours, it may be: what is skipped reads as silence
                self._file.seek(BYTES * lost, os.SEEK_CUR)
                self._bytes += BYTES * lost
            self._write(samples)
            if time.monotonic() >= self._next_save:
                self._save()
        except OSError as e:
            self._give_up(e.strerror or str(e))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            self._write_rest()
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

    def _write_rest(self) -> None:
        """What a resampler still holds."""
        if self._resampler is not None:
            self._write(self._resampler.flush())

    def _write(self, samples: np.ndarray) -> None:
        self._file.write(samples.astype("<f4", copy=False).tobytes())
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
        self._resampler = None  # there is no room for what it holds
        try:
            self.close()
        except UserError:
            pass  # the warning has said it
