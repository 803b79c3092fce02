"""What every sink promises. To write one, inherit from NoteSink and override what you need."""

import numpy as np

from ..events import Bend, Note, Program, Status
from ..source import Block


class NoteSink:
    """Where notes go. All methods do nothing here.

    The constructor opens the thing and raises UserError if it cannot: before the first sound, not in the middle of it.
    All calls come from one thread, in the order of input time, and must return within a few milliseconds, for the next
    hop waits. A sink that stops working says so once, with UserError, and does nothing from then on; one whose reader
    has merely gone away (a closed pipe) falls silent without an error.
    """

    def note_on(self, note: Note) -> None:
        """A note begins; ``note.offset`` is None."""

    def note_off(self, note: Note) -> None:
        """The same note ends; ``note.offset`` is set. Every note_on is followed by its note_off, also at the end."""

    def bend(self, bend: Bend) -> None:
        """The pitch of a sounding note has moved."""

    def program(self, program: Program) -> None:
        """A voice shall sound differently."""

    def panic(self) -> None:
        """Silence whatever may still sound out there. The notes that sound have been ended before."""

    def interrupted(self, hostapi: str) -> None:
        """The device has gone, and with it perhaps the whole sound system of this name, as PortAudio calls it."""

    def sound(self, block: Block, samplerate: int) -> None:
        """What the engine hears next, at the rate of the source, Hz."""

    def frame(self, mix: np.ndarray) -> None:
        """The next label frame's mixture probabilities, (n_pitches,) float32, from label frame 0 on."""

    def status(self, status: Status) -> None:
        """The engine as it is now, about 10 times a second."""

    def close(self) -> None:
        """Let go of everything; calling it again does nothing. UserError if what was heard could not be kept."""
