"""What the player steers while the music plays: a mixing desk between the engine and everything that is played on.

    engine -> Desk (mute, solo, transposition, program a voice; panic) -> MIDI ports, OSC

What is recorded and shown is not touched by it. Changes may come from any thread; what has to be sent for them is sent
by the thread that plays, which calls `apply` between two blocks.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .channels import ChannelMap, MpeZone
from .errors import UserError
from .events import Bend, Note, Program, Status
from .sinks.base import NoteSink
from .sinks.group import SinkGroup

TRANSPOSE = 48  # semitones either way
PROGRAMS = 128
# Sounds that are told apart by ear, for `--gm` without a list: strings, winds, keys, mallets in turn.
GM_PROGRAMS = (41, 72, 43, 57, 1, 74, 12, 69)


@dataclass(frozen=True)
class Strip:
    """One voice on the desk. transpose : semitones.  program : General MIDI's, 1..128, None leaves it alone."""

    mute: bool = False
    solo: bool = False
    transpose: int = 0
    program: int | None = None

    def __post_init__(self) -> None:
        if not -TRANSPOSE <= self.transpose <= TRANSPOSE:
            raise UserError(f"transposition by {self.transpose} is outside -{TRANSPOSE}..{TRANSPOSE} semitones")
        if self.program is not None and not 1 <= self.program <= PROGRAMS:
            raise UserError(f"there is no program {self.program}; choose 1 to {PROGRAMS}")


class Desk(NoteSink):
    """ports : what is played on.  programs : of the voices in turn, from the first on; none: nothing is sent."""

    def __init__(
        self,
        ports: Sequence[NoteSink],
        channels: ChannelMap | MpeZone,
        warn: Callable[[str], None],
        programs: Sequence[int] = (),
    ):
        self.channels = channels
        self.strips: dict[int, Strip] = {voice: Strip(program=number) for voice, number in enumerate(programs)}
        self._ports = SinkGroup(ports, warn)
        self._changes: deque[Callable[[], None]] = deque()
        self._sent: dict[tuple[int, int], Note] = {}  # (voice, pitch as it was heard) -> note as it was sent
        self._programmed: dict[int, tuple[int, int]] = {}  # channel -> voice, program
        self._bent: dict[int, set[int]] = {}  # channels that are not at rest -> voices that have bent them
        self._changing = threading.Lock()
        self._now = 0.0

    @property
    def closed(self) -> bool:
        """Whether nobody reads any of the ports any more."""
        return self._ports.abandoned

    # From any thread

    def strip(self, voice: int) -> Strip:
        return self.strips.get(voice, Strip())

    def change(self, voice: int, **changes: bool | int | None) -> None:
        """Set some of a strip's fields; UserError at once if a value is impossible."""
        with self._changing:
            self.strips[voice] = replace(self.strip(voice), **changes)
        self.later(self._settle)

    def assign(self, voice: int, channel: int) -> None:
        """Give a voice a channel as soon as none of its notes sounds; UserError if there is no such channel."""
        if not isinstance(self.channels, ChannelMap):
            raise UserError("in an MPE zone every note has a channel of its own, and no voice one to choose")
        self.channels.assign(voice, channel)

    def silence(self) -> None:
        """Panic: end all notes out there, whoever left them; what begins from now on sounds."""
        self.later(self._silence)

    def later(self, change: Callable[[], None]) -> None:
        """Have something done between two blocks."""
        self._changes.append(change)

    # From the thread that plays

    def apply(self) -> None:
        """Carry out what was asked for since the last call."""
        while self._changes:
            self._changes.popleft()()

    def audible(self, voice: int) -> bool:
        soloed = any(strip.solo for strip in list(self.strips.values()))  # which may be changed meanwhile
        strip = self.strip(voice)
        return strip.solo if soloed else not strip.mute

    def note_on(self, note: Note) -> None:
        strip = self.strip(note.voice)
        midi = note.midi + strip.transpose
        if not self.audible(note.voice) or not 0 <= midi <= 127:
            return
        wanted = note.voice, strip.program
        if strip.program is not None and self._programmed.get(note.channel) != wanted:
            self._programmed[note.channel] = wanted
            self._ports.tell("program", Program(note.voice, note.channel, strip.program))
        sent = replace(note, midi=midi)
        self._rest(sent)
        self._sent[note.voice, note.midi] = sent
        self._ports.tell("note_on", sent)

    def note_off(self, note: Note) -> None:
        sent = self._sent.pop((note.voice, note.midi), None)
        if sent is not None:
            self._ports.tell("note_off", replace(sent, offset=note.offset))

    def bend(self, bend: Bend) -> None:
        sent = self._sent.get((bend.note.voice, bend.note.midi))
        if sent is None:
            return
        if sum(other.channel == sent.channel for other in self._sent.values()) > 1:
            self._rest(sent)  # a channel bends as a whole: of several notes none may
            return
        self._bent.setdefault(sent.channel, set()).add(sent.voice)
        self._ports.tell("bend", Bend(sent, bend.cents))

    def interrupted(self, hostapi: str) -> None:
        self._ports.tell("interrupted", hostapi)

    def status(self, status: Status) -> None:
        self._now = status.seconds
        self._ports.tell("status", status)

    def close(self) -> None:
        """End what sounds; the ports are closed by whoever opened them."""
        self._end(list(self._sent))

    def _rest(self, note: Note) -> None:
        """Bring the channel of a note back to pitch."""
        for voice in self._bent.pop(note.channel, ()):
            self._ports.tell("bend", Bend(replace(note, voice=voice), 0.0))

    def _settle(self) -> None:
        """End what should not sound any more, or not at this pitch."""
        self._end(
            [
                (voice, midi)
                for (voice, midi), sent in self._sent.items()
                if not self.audible(voice) or sent.midi != midi + self.strip(voice).transpose
            ]
        )

    def _silence(self) -> None:
        self._end(list(self._sent))
        self._programmed.clear()
        self._ports.tell("panic")

    def _end(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            note = self._sent.pop(key)
            self._ports.tell("note_off", replace(note, offset=max(self._now, note.onset)))


def parse_programs(text: str) -> tuple[int, ...]:
    """The text "41,72" -> (41, 72); the built-in choice for an empty one. UserError if one is no program."""
    if not text:
        return GM_PROGRAMS
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or not 1 <= int(word) <= PROGRAMS:
            raise UserError(f"there is no program {word!r}; choose numbers from 1 to {PROGRAMS}, as in 41,72")
    return tuple(map(int, words))
