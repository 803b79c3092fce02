"""`record:PATH.mid`: the take as a type-1 MIDI file, a track a voice.

The file is written while the music plays and no note leaves meanwhile. What can no longer change is encoded once, so
that a take of hours is saved as quickly as one of a minute.
"""

import logging
import math
import os
import struct
import tempfile
import time
from pathlib import Path

from mido import MetaMessage

from ..errors import UserError
from ..events import Note, Status
from .base import NoteSink

TICKS_PER_BEAT = 960
TEMPO = 500_000  # microseconds a beat: 120 bpm, so that a beat on the grid of a DAW is half a second
TICKS_PER_SECOND = TICKS_PER_BEAT * 1_000_000 // TEMPO
RELEASE_VELOCITY = 64  # what MIDI asks of senders that do not measure it
CHECKPOINT_SECONDS = 1.0  # how much playing a crash may cost
SAVING_SHARE = 0.01  # of the time at most is spent on saving
SETTLED_SECONDS = 2.0  # after which nothing begins or ends any more: four times the longest way to a decision

_log = logging.getLogger(__name__)


class MidiFileSink(NoteSink):
    """Collects the notes and writes them to `path` every second or more and at the end, always as a whole.

    offset : milliseconds by which all notes are moved, to line up with a recording that was made elsewhere.

    UserError if `path` cannot be written, or if it exists and `overwrite` is not set; nothing is touched before the
    first save. A full disk does not stop the music: the last good save stays, and at the end the take goes to the
    temporary folder if it still cannot go where it should.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, offset: float = 0.0) -> None:
        self.path = Path(os.path.expanduser(path))
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
            with tempfile.TemporaryFile(dir=self._target.parent):  # can be written; leaves nothing if it ends here
                pass
        except OSError as e:
            raise UserError(f"cannot record to {str(self.path)!r}: {_reason(e)}; choose another place") from e
        if not math.isfinite(offset):
            raise UserError(f"notes cannot be moved by {offset} ms; give a number")
        self._take = Take(offset / 1000.0)
        self._unsaved = False
        self._next_save = time.monotonic() + CHECKPOINT_SECONDS
        self._warned = False
        self._closed = False
        self.saved = False  # True once the whole take is where it should be

    def note_on(self, note: Note) -> None:
        self._take.note_on(note)
        self._unsaved = True

    def note_off(self, note: Note) -> None:
        self._take.note_off(note)
        self._unsaved = True

    def status(self, status: Status) -> None:
        self._take.passed(status.seconds)
        begun = time.monotonic()
        if self._closed or not self._unsaved or begun < self._next_save:
            return
        try:
            self._save(self._temporary, self._target)
            self._unsaved = False
        except OSError as e:
            if not self._warned:
                _log.warning("cannot save %s yet (%s); the take is kept in memory", self.path, _reason(e))
            self._warned = True
        ended = time.monotonic()
        self._next_save = ended + max(CHECKPOINT_SECONDS, (ended - begun) / SAVING_SHARE)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._save(self._temporary, self._target, durable=True)
            self.saved = True
        except OSError as e:
            raise UserError(f"cannot save {str(self.path)!r}: {_reason(e)}; {self._rescue()}") from e

    def discard(self) -> None:
        """Close without saving: there was no performance."""
        self._closed = True

    def _save(self, temporary: Path, target: Path, durable: bool = False) -> None:
        try:
            _write(temporary, self._take.encode(), durable)
            os.replace(temporary, target)
        except BaseException:  # an interrupt too
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


class Take:
    """Notes as they are played, and the MIDI file that they make so far.

    offset : seconds by which all are moved; what would begin before 0 begins there.
    """

    def __init__(self, offset: float = 0.0):
        self._offset = offset
        self._tracks: dict[int, _Track] = {}  # by voice
        self._now = 0.0  # s of input, the latest that is known

    def passed(self, seconds: float) -> None:
        """So much input has been heard."""
        self._now = max(self._now, seconds)

    def note_on(self, note: Note) -> None:
        self.passed(max(note.onset, note.emitted))
        self._track(note.voice).note_on(note, self._tick(note.onset))

    def note_off(self, note: Note) -> None:
        self.passed(note.offset)
        track = self._track(note.voice)
        if note.midi not in track.sounding:
            track.note_on(note, self._tick(note.onset))
        track.note_off(note.midi, self._tick(note.offset))

    def encode(self) -> bytes:
        """A type-1 MIDI file: a tempo track, then a track a voice; what still sounds ends now."""
        self.settle()
        return _file([track.encode(self._tick(self._now)) for _, track in sorted(self._tracks.items())])

    def settle(self) -> None:
        """Encode what can no longer change; now and then, so that no later call has much to do."""
        for track in self._tracks.values():
            track.settle(self._tick(self._now - SETTLED_SECONDS))

    def _track(self, voice: int) -> "_Track":
        return self._tracks.setdefault(voice, _Track(voice))

    def _tick(self, seconds: float) -> int:
        return max(0, round((seconds + self._offset) * TICKS_PER_SECOND))


class _Track:
    """The messages of one voice, which last at least one tick each and never overlap on one pitch."""

    def __init__(self, voice: int):
        self.sounding: dict[int, tuple[Note, int]] = {}  # midi -> note, tick
        self._settled = bytearray(_encode(0, MetaMessage("track_name", name=f"voice {voice + 1}").bytes()))
        self._until = 0  # tick of the last settled message
        self._events: list[tuple[int, int, bytes]] = []  # tick, 0 for off and 1 for on: off goes first; message
        self._offs: dict[int, tuple[int, bytes]] = {}  # midi -> tick of its last note_off, and that message

    def note_on(self, note: Note, tick: int) -> None:
        tick = max(tick, self._until)
        if note.midi in self.sounding:
            self.note_off(note.midi, tick)
        off, message = self._offs.get(note.midi, (tick, b""))
        if off > tick and (off, 0, message) in self._events:  # the label ended a little after this one begins
            self._events.remove((off, 0, message))
            self._events.append((tick, 0, message))
        self.sounding[note.midi] = note, tick
        self._events.append((tick, 1, bytes((0x90 | note.channel - 1, note.midi, note.velocity))))

    def note_off(self, midi: int, tick: int) -> None:
        note, begun = self.sounding.pop(midi)
        message = _note_off(note)
        self._offs[midi] = max(tick, begun + 1, self._until), message
        self._events.append((self._offs[midi][0], 0, message))

    def settle(self, settled: int) -> None:
        """Encode what lies before a tick for good: nothing can begin or end there any more."""
        self._events.sort()
        done = sum(tick <= settled for tick, *_ in self._events)
        for tick, _, message in self._events[:done]:
            self._settled += _encode(tick - self._until, message)
            self._until = tick
        del self._events[:done]

    def encode(self, now: int) -> bytes:
        """The track as it is, what still sounds ended now."""
        ends = [(max(now, begun + 1), 0, _note_off(note)) for note, begun in self.sounding.values()]
        track, before = bytearray(self._settled), self._until
        for tick, _, message in sorted(self._events + ends):
            track += _encode(tick - before, message)
            before = tick
        return bytes(track)


def _note_off(note: Note) -> bytes:
    return bytes((0x80 | note.channel - 1, note.midi, RELEASE_VELOCITY))


def _encode(delta: int, message: bytes | list[int]) -> bytes:
    """A message with its distance in ticks, seven bits a byte and the highest first."""
    digits = [delta & 0x7F]
    while delta := delta >> 7:
        digits.append(delta & 0x7F | 0x80)
    return bytes(digits[::-1]) + bytes(message)


def _file(tracks: list[bytes]) -> bytes:
    """A type-1 MIDI file: a tempo track, then these."""
    tempo = b"".join(
        _encode(0, meta.bytes()) for meta in (MetaMessage("set_tempo", tempo=TEMPO), MetaMessage("time_signature"))
    )
    end = _encode(0, MetaMessage("end_of_track").bytes())
    head = struct.pack(">4sIHHH", b"MThd", 6, 1, 1 + len(tracks), TICKS_PER_BEAT)
    chunks = [track + end for track in (tempo, *tracks)]
    return head + b"".join(struct.pack(">4sI", b"MTrk", len(chunk)) + chunk for chunk in chunks)


def _write(path: Path, data: bytes, durable: bool = False) -> None:
    with open(path, "wb") as file:
        file.write(data)
        if durable:  # waits for the disk, which may take longer than a hop: only when the music is over
            file.flush()
            os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
