"""`record:PATH.mid`: the take as a type-1 MIDI file, a track a voice.

The file is written while the music plays and no note leaves meanwhile, so a take that takes longer to write is saved
less often.
"""

import io
import logging
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from mido import Message, MetaMessage, MidiFile, MidiTrack

from ..errors import UserError
from ..events import Note, Status
from .base import NoteSink

TICKS_PER_BEAT = 960
TEMPO = 500_000  # microseconds a beat: 120 bpm, so that a beat on the grid of a DAW is half a second
TICKS_PER_SECOND = TICKS_PER_BEAT * 1_000_000 // TEMPO
RELEASE_VELOCITY = 64  # what MIDI asks of senders that do not measure it
CHECKPOINT_SECONDS = 10.0  # how much playing a crash may cost
SAVING_SHARE = 0.01  # of the time at most is spent on saving

_log = logging.getLogger(__name__)


class MidiFileSink(NoteSink):
    """Collects the notes and writes them to `path` every 10 seconds or more and at the end, always as a whole.

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
        self._next_save = time.monotonic() + CHECKPOINT_SECONDS
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
    tempo = [MetaMessage("set_tempo", tempo=TEMPO), MetaMessage("time_signature")]
    tracks = [MidiTrack(tempo)]
    for voice, played in sorted(voices.items()):
        tracks.append(MidiTrack([MetaMessage("track_name", name=f"voice {voice + 1}"), *_messages(played)]))
    file = io.BytesIO()
    MidiFile(type=1, ticks_per_beat=TICKS_PER_BEAT, tracks=tracks).save(file=file)
    return file.getvalue()


def _messages(notes: list[Note]) -> list[Message]:
    """The messages of one voice in playing order, each timed from the one before."""
    struck_again: dict[int, int] = {}  # midi -> tick of the next note_on, for we go backwards
    timed = []
    for note in sorted(notes, key=lambda note: note.onset, reverse=True):
        on = _tick(note.onset)
        off = max(_tick(note.offset), on + 1)
        if struck_again.get(note.midi, on) > on:
            off = min(off, struck_again[note.midi])
        struck_again[note.midi] = on
        timed.append((on, 1, note))
        timed.append((off, 0, note))  # 0: off before on at one tick
    messages, now = [], 0
    for tick, is_on, note in sorted(timed, key=lambda event: event[:2]):
        kind, velocity = ("note_on", note.velocity) if is_on else ("note_off", RELEASE_VELOCITY)
        channel = note.channel - 1
        messages.append(Message(kind, channel=channel, note=note.midi, velocity=velocity, time=tick - now))
        now = tick
    return messages


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
