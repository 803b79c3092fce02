"""`terminal`: what is heard, as text: a block redrawn in place on a terminal, log lines anywhere else."""

import math
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TextIO

from ..desk import Desk
from ..errors import UserError, drawn_in_place
from ..events import Note, Status
from .base import NoteSink

REDRAW_SECONDS = 0.09  # status comes 10 times a second when live, far more often when a file is read at full speed
METER_DB = -60.0  # the left end of the level meter, dB re full scale
METER_CELLS = 20
TRAIL = 9  # recent notes shown a voice
COLUMNS, ROWS = 80, 24  # the least terminal; a larger one is used in height only
HEADER_LINES = 3

_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_UP, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[{}F", "\x1b[K", "\x1b[J"
_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def note_name(midi: int) -> str:
    """The name of a MIDI number, sharps only, 60 being C4: 69 -> "A4", 54 -> "F#3"."""
    return f"{_NAMES[midi % 12]}{midi // 12 - 1}"


@dataclass
class _Voice:
    channel: int = 0
    notes: int = 0
    heard: float = 0.0  # s of input, its last note
    sounding: Counter[int] = field(default_factory=Counter)  # midi -> how many
    trail: deque[str] = field(default_factory=lambda: deque(maxlen=TRAIL))


class TerminalSink(NoteSink):
    """Shows level, latency, trouble and every voice's notes on `stream` (default: standard output at that moment).

    desk : by which muted voices are marked.  hint : a line that says which keys there are.
    """

    def __init__(self, stream: TextIO | None = None, desk: Desk | None = None, hint: str = "") -> None:
        if isinstance(stream, str):
            raise UserError(f"the terminal sink takes no argument, not {stream!r}: write just terminal")
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if self._live and os.name == "nt":
            os.system("")  # makes an old Windows console understand escape codes
        self._desk, self._hint = desk, hint
        self._voices: dict[int, _Voice] = {}
        self._status: Status | None = None
        self._drawn_lines = 0
        self._drawn_at = -math.inf
        self._logged_second = -1  # of input
        self.closed = False
        if self._live:
            drawn_in_place.append(self._clear)

    def note_on(self, note: Note) -> None:
        voice = self._voices.setdefault(note.voice, _Voice())
        voice.channel = note.channel
        voice.notes += 1
        voice.heard = note.onset
        voice.sounding[note.midi] += 1
        voice.trail.append(note_name(note.midi))
        if not self._live:
            self._log(note.onset, f"{_who(note)}note_on   {note_name(note.midi):<4} vel {note.velocity}")

    def note_off(self, note: Note) -> None:
        self._voices[note.voice].sounding[note.midi] -= 1
        if not self._live:
            length = note.offset - note.onset
            self._log(note.offset, f"{_who(note)}note_off  {note_name(note.midi):<4} after {length:.2f} s")

    def status(self, status: Status) -> None:
        self._status = status
        if not self._live:
            if int(status.seconds) > self._logged_second:  # a second without a note: say that we live
                self._log(status.seconds, f"level {_level(status)} dB  {_trouble(status)}")
        elif time.monotonic() - self._drawn_at >= REDRAW_SECONDS:
            self._draw()

    def close(self) -> None:
        if self.closed:
            return
        if self._live:
            drawn_in_place.remove(self._clear)
            if self._status is not None:
                self._draw()
                self._write(_SHOW_CURSOR)
        self.closed = True

    def _log(self, seconds: float, text: str) -> None:
        self._logged_second = max(self._logged_second, int(seconds))
        self._write(f"{seconds:8.2f} s  {text}\n")

    def _clear(self) -> None:
        """Make room for a line of somebody else's, which is to stay."""
        if self._drawn_lines:
            self._write(_UP.format(self._up(self._size()[1])) + _CLEAR_BELOW)
            self._drawn_lines = 0

    def _up(self, rows: int) -> int:
        """Lines from the cursor to the top of the block."""
        return min(self._drawn_lines, rows - 1)  # the window may have become smaller

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        columns, rows = self._size()
        muted = {voice for voice in self._voices if self._desk and not self._desk.audible(voice)}
        lines = _block(self._status, self._voices, muted, self._hint, rows - 1)  # the cursor rests on the line below
        up = self._up(rows)
        out = [_UP.format(up) if up else _HIDE_CURSOR]
        out += [line[: columns - 1].rstrip() + _CLEAR_LINE + "\n" for line in lines]
        self._drawn_lines = len(lines)
        self._write("".join(out))

    def _size(self) -> tuple[int, int]:
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError, AttributeError):
            return COLUMNS, ROWS
        return columns or COLUMNS, rows or ROWS  # a serial console may answer 0 x 0

    def _write(self, text: str) -> None:
        if self.closed:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self.closed = True  # nobody looks any more: no reason to stop the music


def _block(status: Status, voices: dict[int, _Voice], muted: set[int], hint: str, height: int) -> list[str]:
    """The lines on the screen, at most `height` and each under 80 characters."""
    filled = 0
    if math.isfinite(status.level_db):
        filled = min(METER_CELLS, max(0, round((1 - status.level_db / METER_DB) * METER_CELLS)))
    minutes, seconds = divmod(int(status.seconds), 60)
    lines = [
        f"rt-mpe {minutes:>3}:{seconds:02}  [{'#' * filled:.<{METER_CELLS}}] {_level(status)} dB"
        f"  latency {status.latency_ms:.0f} ms  voices {status.voices}",
        _trouble(status),
        f"{'voice':>6} {'ch':>2} {'notes':>6}  {'sounding':<22}  recent",
    ]
    room = max(0, height - HEADER_LINES - bool(hint))
    shown = list(voices)
    if len(voices) > room:
        shown = sorted(voices, key=lambda number: voices[number].heard)[len(voices) - room + 1 :]
    for number in sorted(shown):
        voice = voices[number]
        sounding = " ".join(note_name(midi) for midi in sorted(+voice.sounding))
        trail = " ".join(voice.trail)
        who = f"mute {number + 1}" if number in muted else number + 1
        lines.append(f"{who:>6} {voice.channel:>2} {voice.notes:>6}  {_fit(sounding, 22)}  {_fit(trail, 37)}")
    if len(shown) < len(voices):
        lines.append(f"  and {len(voices) - len(shown)} voices heard longer ago")
    return [*lines, hint][:height] if hint else lines[:height]


def _level(status: Status) -> str:
    return f"{status.level_db:4.0f}" if math.isfinite(status.level_db) else "   -"


def _trouble(status: Status) -> str:
    return (
        f"lost {status.lost_samples} samples  overflows {status.overflows}"
        f"  clipped {status.clipped}  invalid {status.invalid}"
    )


def _who(note: Note) -> str:
    return f"voice {note.voice + 1:<2} ch {note.channel:<2} "


def _fit(text: str, width: int) -> str:
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "+"
