"""`record:PATH.mid`: the take as a type-1 MIDI file, a track a voice.

The bytes are put together here rather than by a library, because the file is written while the music plays and no note
leaves meanwhile: an hour of busy playing (20,000 notes) takes this module 50 ms, mido 250.
"""

import logging
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..events import Note, Status
from .base import NoteSink

TICKS_PER_BEAT = 960
TEMPO = 500_000  # microseconds a beat: 120 bpm, so that a beat on the grid of a DAW is half a second
TICKS_PER_SECOND = TICKS_PER_BEAT * 1_000_000 // TEMPO
RELEASE_VELOCITY = 64  # what MIDI asks of senders that do not measure it
CHECKPOINT_SECONDS = 10.0  # how much playing a crash may cost

_log = logging.getLogger(__name__)


class MidiFileSink(NoteSink):
    """Collects the notes and writes them to `path` every 10 seconds and at the end, always as a whole.

    UserError if `path` cannot be written, or if it exists and `overwrite` is not set; nothing is touched before the
    first save. A full disk does not stop the music: the last good save stays, and at the end the take goes to the
    temporary folder if it still cannot go where it should.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser()
        if not str(path):
            raise UserError("the recording needs a file name, such as record:take.mid")
        try:
            if self.path.exists():
                if not self.path.is_file():
                    raise UserError(f"cannot record to {str(self.path)!r}, which is not a file: write record:take.mid")
                if not overwrite:
                    raise UserError(f"{str(self.path)!r} is there already: move that take away, or choose another name")
            self._target = Path(os.path.realpath(self.path))  # a link stays a link
            self._temporary = self._target.with_name(f".rt-mpe-{os.getpid()}-{id(self):x}.tmp")
            _write(self._temporary, b"")
            self._temporary.unlink()
        except OSError as e:
            raise UserError(f"cannot record to {str(self.path)!r}: {_reason(e)}; choose another place") from e
        self._notes: list[Note] = []
        self._sounding: dict[tuple[int, int], Note] = {}  # (voice, midi)
        self._now = 0.0  # s of input, the latest that is known
        self._unsaved = False
        self._saved_at = time.monotonic()
        self._warned = False
        self._closed = False

    def note_on(self, note: Note) -> None:
        self._now = max(self._now, note.onset, note.emitted)
        cut_off = self._sounding.pop((note.voice, note.midi), None)
        if cut_off is not None:
            self._notes.append(replace(cut_off, offset=note.onset))
        self._sounding[note.voice, note.midi] = note
        self._unsaved = True

    def note_off(self, note: Note) -> None:
        self._now = max(self._now, note.offset)
        self._sounding.pop((note.voice, note.midi), None)
        self._notes.append(note)
        self._unsaved = True

    def status(self, status: Status) -> None:
        self._now = max(self._now, status.seconds)
        if self._closed or not self._unsaved or time.monotonic() - self._saved_at < CHECKPOINT_SECONDS:
            return
        self._saved_at = time.monotonic()
        try:
            self._save(self._temporary, self._target)
            self._unsaved = False
        except OSError as e:
            if not self._warned:
                _log.warning("cannot save %s yet (%s); the take is kept in memory", self.path, _reason(e))
            self._warned = True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._save(self._temporary, self._target, durable=True)
        except OSError as e:
            raise UserError(f"cannot save {str(self.path)!r}: {_reason(e)}; {self._rescue()}") from e

    def _save(self, temporary: Path, target: Path, durable: bool = False) -> None:
        still_sounding = [replace(note, offset=self._now) for note in self._sounding.values()]
        try:
            _write(temporary, encode(self._notes + still_sounding), durable)
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _rescue(self) -> str:
        """Save in the temporary folder; says in words where the take is now."""
        try:
            refuge = Path(tempfile.mkdtemp(prefix="rt-mpe-")) / self._target.name
            self._save(refuge.with_suffix(".tmp"), refuge, durable=True)
            return f"the take is in {str(refuge)!r}"
        except OSError as e:
            kept = "only what was saved last is there" if self._target.exists() else "the take is lost"
            return f"the temporary folder failed too ({_reason(e)}): {kept}"


def encode(notes: list[Note]) -> bytes:
    """The bytes of a type-1 MIDI file: a tempo track, then a track a voice. Every note must have its offset.

    A note lasts at least one tick, and ends at the latest where the same voice strikes the same pitch again.
    """
    voices: dict[int, list[Note]] = defaultdict(list)
    for note in notes:
        voices[note.voice].append(note)
    tracks = [_track([(0, _meta(0x51, TEMPO.to_bytes(3, "big"))), (0, _meta(0x58, bytes([4, 2, 24, 8])))])]
    for voice, played in sorted(voices.items()):
        tracks.append(_track([(0, _meta(0x03, f"voice {voice + 1}".encode())), *_messages(played)]))
    header = b"".join(value.to_bytes(2, "big") for value in (1, len(tracks), TICKS_PER_BEAT))
    return b"MThd" + len(header).to_bytes(4, "big") + header + b"".join(tracks)


def _messages(notes: list[Note]) -> list[tuple[int, bytes]]:
    """(tick, message) of one voice, in playing order."""
    struck_again: dict[int, int] = {}  # midi -> tick of the next note_on, for we go backwards
    timed = []
    for note in sorted(notes, key=lambda note: note.onset, reverse=True):
        on = _tick(note.onset)
        off = max(_tick(note.offset), on + 1)
        if struck_again.get(note.midi, on) > on:
            off = min(off, struck_again[note.midi])
        struck_again[note.midi] = on
        channel = note.channel - 1
        timed.append((on, 1, bytes([0x90 | channel, note.midi, note.velocity])))
        timed.append((off, 0, bytes([0x80 | channel, note.midi, RELEASE_VELOCITY])))  # 0: off before on at one tick
    return [(tick, message) for tick, _, message in sorted(timed)]


def _track(events: list[tuple[int, bytes]]) -> bytes:
    parts, now = [], 0
    for tick, message in events:
        parts += _variable_length(tick - now), message
        now = tick
    body = b"".join(parts) + b"\x00" + _meta(0x2F, b"")
    return b"MTrk" + len(body).to_bytes(4, "big") + body


def _meta(kind: int, data: bytes) -> bytes:
    return bytes([0xFF, kind]) + _variable_length(len(data)) + data


def _variable_length(value: int) -> bytes:
    """Seven bits a byte, the highest first; every byte but the last has its top bit set."""
    out = bytes([value & 0x7F])
    while value := value >> 7:
        out = bytes([0x80 | value & 0x7F]) + out
    return out


def _tick(seconds: float) -> int:
    return max(0, round(seconds * TICKS_PER_SECOND))


def _write(path: Path, data: bytes, durable: bool = False) -> None:
    with open(path, "wb") as file:
        file.write(data)
        if durable:  # waits for the disk, which may take longer than a hop: only when the music is over
            file.flush()
            os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
