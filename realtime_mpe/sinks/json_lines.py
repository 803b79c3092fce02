"""`json:PATH` or `json:-`: one JSON object a line, for other programs."""

import errno
import json
import math
import os
import sys
from pathlib import Path

from ..errors import UserError
from ..events import Note, Status
from .base import NoteSink


class JsonLinesSink(NoteSink):
    """Writes ``{"type": "note_on" | "note_off" | "status", ...}`` with the fields of Note and Status, line by line.

    As in Note, voices count from 0 and channels from 1. Times are seconds of input, to a tenth of a millisecond; what
    is not a finite number (the level of silence) is null. `note_off` repeats the whole note with its offset. `status`
    comes once a second, with ``sounding`` as how many notes sound.

    path : a file, a named pipe, or "-" for standard output. UserError if it cannot be opened, if it exists and
    `overwrite` is not set, or if the disk is full. When the reader goes away, ``closed`` turns True without an error.
    """

    def __init__(self, path: str | Path = "-", overwrite: bool = False) -> None:
        self.closed = False
        self._next_status = -math.inf  # s of input
        self._name = str(path)
        if self._name in ("-", ""):
            self._file, self._own = sys.stdout, False
            return
        path = Path(os.path.expanduser(path))
        try:
            if path.is_file() and not overwrite:
                raise UserError(f"{self._name!r} is there already: move it away, or choose another name")
            self._file, self._own = open(path, "w", encoding="utf-8", newline="\n"), True
        except OSError as e:
            raise UserError(f"cannot write {self._name!r}: {e.strerror or e}; choose another place") from e

    def note_on(self, note: Note) -> None:
        self._line(_note("note_on", note))

    def note_off(self, note: Note) -> None:
        self._line(_note("note_off", note) | {"offset": _number(note.offset)})

    def status(self, status: Status) -> None:
        if status.seconds < self._next_status:
            return
        self._next_status = math.floor(status.seconds) + 1
        self._line(
            {
                "type": "status",
                "seconds": _number(status.seconds),
                "level_db": _number(status.level_db, 1),
                "sounding": len(status.sounding),
                "voices": status.voices,
                "latency_ms": _number(status.latency_ms, 1),
                "lost_samples": status.lost_samples,
                "overflows": status.overflows,
                "clipped": status.clipped,
                "invalid": status.invalid,
            }
        )

    def close(self) -> None:
        self.closed = True
        if self._own:
            self._own = False
            try:
                self._file.close()
            except OSError:
                pass  # what could not be written has been reported when it happened

    def _line(self, record: dict) -> None:
        if self.closed:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as e:
            self.closed = True
            if isinstance(e, BrokenPipeError) or e.errno == errno.EINVAL:  # EINVAL: a broken pipe on Windows
                if not self._own:
                    _forget_unwritten_output()
                return
            raise UserError(f"cannot write {self._name!r} any more: {e.strerror or e}; make room") from e


def _note(kind: str, note: Note) -> dict:
    return {
        "type": kind,
        "voice": note.voice,
        "channel": note.channel,
        "midi": note.midi,
        "velocity": note.velocity,
        "onset": _number(note.onset),
        "emitted": _number(note.emitted),
    }


def _number(value: float, digits: int = 4) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None  # JSON has no infinity


def _forget_unwritten_output() -> None:
    """Python flushes standard output once more at exit, and would complain about the broken pipe there."""
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # standard output is not a real file (a test, a notebook)
