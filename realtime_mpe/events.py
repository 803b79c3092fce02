"""What the engine tells the world: notes of a voice, and its own state. Plain values, no behaviour."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """One note of one voice, as sinks receive it.

    midi : MIDI number, 23..94 as heard, 0..127 as played on.  velocity : 1..127.
    voice : stable identity of the player, 0-based.  channel : MIDI channel as people count it, 1..16.
    onset, offset : seconds of input at which the sound begins and ends; ``offset`` is None while it sounds.
    emitted : seconds of input that had been consumed when the note_on left the engine.
    """

    midi: int
    velocity: int
    voice: int
    channel: int
    onset: float
    emitted: float
    offset: float | None = None


@dataclass(frozen=True, slots=True)
class Bend:
    """A sounding note's pitch now: ``cents`` off its equal-tempered MIDI pitch (A4 = 440 Hz), about -50..50."""

    note: Note
    cents: float


@dataclass(frozen=True, slots=True)
class Program:
    """A voice plays another sound from now on. channel : 1..16.  number : General MIDI's, 1..128."""

    voice: int
    channel: int
    number: int


@dataclass(frozen=True, slots=True)
class Status:
    """The engine at one moment.

    seconds : of input consumed.  level_db : RMS of the last blocks, dB re full scale.
    sounding : the notes that sound now.  voices : how many players have been heard so far.
    latency_ms : from the newest input sample to the note decision: look-ahead, stages, how long the last block waited
        and the work on it. What the device takes until it hands a block over is not in it, nor the 64 ms at most for
        which a note waits if it is in doubt whose it is.
    lost_samples : dropped because the worker fell behind.  overflows : blocks the device itself reported lost.
    clipped, invalid : samples at full scale, and NaN or infinite samples (taken as silence).
    """

    seconds: float
    level_db: float
    sounding: tuple[Note, ...]
    voices: int
    latency_ms: float
    lost_samples: int = 0
    overflows: int = 0
    clipped: int = 0
    invalid: int = 0
