"""Notes of a MIDI file as the truth: nothing is dropped, cut or joined."""

from pathlib import Path

import mido
import numpy as np

from realtime_mpe.errors import UserError

from ..scores import in_time

DRUM_CHANNEL = 9  # 0-based: what people call channel 10


def read_players(path: Path) -> list[tuple[str, np.ndarray]]:
    """Track name and notes, (n, 3) onset s, offset s and MIDI number by onset, of every player that has notes.

    A player is what one track plays on one channel; the drum channel is left out. A note-off ends every note of its key
    that began at an earlier tick; a note without one lasts to the end of the file. UserError if it cannot be read.
    """
    try:
        midi = mido.MidiFile(path, clip=True)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            mido.KeySignatureError) as error:  # fmt: skip  # mido lets the bare errors of its parser through
        raise UserError(f"{path} cannot be read as MIDI ({error or type(error).__name__}); export it again") from error
    if midi.type == 2 or midi.ticks_per_beat <= 0:
        raise UserError(f"{path} is a type 2 file or counts in SMPTE frames; export it as type 1 with ticks per beat")
    players: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    sounding: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    seconds = 0.0
    for tick, seconds, track, message in in_time(midi):
        if message.type not in ("note_on", "note_off") or message.channel == DRUM_CHANNEL:
            continue
        begun = sounding.setdefault((track, message.channel, message.note), [])
        if message.type == "note_on" and message.velocity > 0:
            begun.append((tick, seconds))
            continue
        ended = [onset for since, onset in begun if since < tick]
        begun[:] = [(since, onset) for since, onset in begun if since == tick]
        players.setdefault((track, message.channel), []).extend((onset, seconds, message.note) for onset in ended)
    for (track, channel, note), begun in sounding.items():
        players.setdefault((track, channel), []).extend((onset, seconds, note) for _, onset in begun)
    return [
        (midi.tracks[track].name.strip(), np.array(sorted(notes), float))
        for (track, _), notes in sorted(players.items())
        if notes
    ]


def read_stems(path: Path) -> list[np.ndarray]:
    """The notes alone; UserError if there are none."""
    stems = [notes for _, notes in read_players(path)]
    if not stems:
        raise UserError(f"{path} has no notes outside the drum channel; give a MIDI file of what is played")
    return stems
