"""The voice memory on made-up timbres: identities that last, no look into the future, room for newcomers."""

import numpy as np
from made_up import TIMBRES, embedding, play

from realtime_mpe.affinity import LAYERS
from realtime_mpe.notes import NoteEvent
from realtime_mpe.voices import MEMORY, NEW_FEATURES, PATIENCE, VOICE_FEATURES, Pointer, VoiceMemory


def test_two_players_keep_their_voices_while_their_lines_cross():
    notes = [(4 * k, 4 * k + 3, 30 + 2 * k, 0) for k in range(10)]
    notes += [(4 * k + 1, 4 * k + 4, 49 - 2 * k, 1) for k in range(10)]
    voices, memory = play(notes, 60)
    timbre = {(p, start): t for start, _, p, t in notes}
    ordered = sorted(notes)
    owner = {}
    for (pitch, voice), (start, _, p, _) in zip(voices, ordered, strict=True):
        assert pitch == p
        owner.setdefault(timbre[p, start], set()).add(voice)
    assert owner == {0: {0}, 1: {1}}
    assert memory.count == 2


def test_the_surest_note_of_a_chord_is_given_out_first():
    def scorer(features, new):
        return np.concatenate([10 * features[:, 0], [1.0]])

    # Voice 0 knows timbre 0; the second note of the chord has it exactly, the first only resembles it.
    memory = VoiceMemory(scorer, 8)
    first = embedding({10: 0})
    memory.process([NoteEvent(True, 10, 0)], [first], 0)
    memory.hear(first)
    memory.process([NoteEvent(False, 10, 1)], [first], 1)
    now = embedding({20: 1, 30: 0})
    now[20] = TIMBRES[0] * 0.3 + TIMBRES[1]
    chord = [NoteEvent(True, 20, 2), NoteEvent(True, 30, 2)]
    assert memory.process(chord, [now], 2)[0] == (chord[1], 0)


def test_the_pointer_sees_who_would_have_to_cross_whom():
    seen = []

    def scorer(features, new):
        seen.append((features, new))
        return np.concatenate([10 * features[:, 0], [5.0]])

    # Two lines, the second below; then a note above both, while the lower one still sounds.
    memory, ended = VoiceMemory(scorer, 8), []
    for k, (pitch, timbre) in enumerate(((40, 0), (30, 1), (41, 0), (31, 1))):
        now = embedding({pitch: timbre})
        memory.process([*ended, NoteEvent(True, pitch, k)], [now], k)
        memory.hear(now)
        ended = [NoteEvent(False, pitch, k + 1)] if k != 3 else []
    memory.process([NoteEvent(True, 50, 4)], [embedding({50: 0})], 4)
    (upper, lower), new = seen[-1]
    assert (upper[-1], lower[-1]) == (0.0, 0.25)
    assert new[-2:].tolist() == [0.0, 0.25]  # above it nothing sounds, below it one


def test_a_note_in_doubt_waits_until_it_is_known_or_ends_but_not_for_ever():
    def scorer(features, new):  # of one voice: sure of what is much like it or not at all
        return np.concatenate([20 * features[:, 0] - 10, [0.0]])

    def second(length, clear_from, max_voices=8):
        """When the second note, which is clear from then on, is given out, and what with it."""
        memory = VoiceMemory(scorer, max_voices)
        doubtful, clear = embedding({20: 0}), embedding({20: 0})
        doubtful[20] = TIMBRES[0] + np.sqrt(3.0) * TIMBRES[1]  # a cosine of a half with the first
        memory.process([NoteEvent(True, 10, 0)], [embedding({10: 0})], 0)
        for hop in range(10, 10 + length + 1):
            events = [NoteEvent(hop < 10 + length, 20, hop)] if hop in (10, 10 + length) else []
            history = [clear if k >= 10 + clear_from else doubtful for k in range(10, hop + 1)]
            if played := memory.process(events, history, hop):
                return hop - 10, [event.on for event, _ in played]

    assert second(8, clear_from=0) == (0, [True])
    assert second(8, clear_from=1) == (1, [True])
    assert second(8, clear_from=9) == (PATIENCE, [True])
    assert second(1, clear_from=9) == (1, [True, False])
    assert second(8, clear_from=9, max_voices=1) == (0, [True])  # it has nowhere else to go


def test_what_comes_later_changes_no_earlier_choice():
    rng = np.random.default_rng(2)
    notes, busy = [], {}
    for start in range(0, 120, 2):
        pitch = int(rng.integers(10, 60))
        if busy.get(pitch, -1) >= start:
            continue
        end = start + int(rng.integers(2, 9))
        busy[pitch] = end
        notes.append((start, end, pitch, int(rng.integers(0, 4))))
    weights = random_pointer(7)
    whole, _ = play(notes, 130, weights)
    for cut in (40, 77):
        early = [(s, min(e, 1000) if e < cut else 1000, p, t) for s, e, p, t in notes if s < cut]
        given, _ = play(early, cut, weights)
        assert given == whole[: len(given)] and len(given) >= len(early) - 2  # the last may wait


def test_a_full_memory_makes_room_by_forgetting_the_voice_that_rested_longest():
    notes = [(0, 2, 10, 0), (5, 7, 20, 1), (10, 12, 30, 2), (15, 17, 40, 0)]
    voices, memory = play(notes, 20, max_voices=2)
    assert [v for _, v in voices] == [0, 1, 0, 1]
    assert memory.count == 2


def test_no_voice_is_taken_from_a_note_that_still_sounds():
    def always_new(features, new):
        return np.concatenate([np.zeros(len(features)), [50.0]])

    notes = [(0, 50, 10, 0), (1, 50, 20, 1), (2, 50, 30, 2), (3, 50, 40, 3)]
    voices, memory = play(notes, 30, always_new, max_voices=3)
    ends = memory.process([NoteEvent(False, p, 30) for _, _, p, _ in notes], [embedding({})], 30)
    sounding = {event.pitch: voice for event, voice in ends}
    assert sounding == dict(voices)
    assert len({sounding[p] for p in (10, 20, 30)}) == 3


def test_memory_is_bounded_and_keeps_those_who_rest():
    notes = [(0, 1, 60, 1), *((2 * k, 2 * k + 1, 10 + k % 40, 0) for k in range(1, 300))]
    _, memory = play(notes, 610)
    assert memory.count == 2 and len(memory.notes().pitch) == MEMORY
    assert memory.voices() == [0, 1]  # the one note of the second player is still known
    assert memory.notes().start[1:].tolist() == [2 * k for k in range(301 - MEMORY, 300)]


def random_pointer(seed: int) -> Pointer:
    rng = np.random.default_rng(seed)
    weights = {}
    for part, n_in in (("voice", 3 * VOICE_FEATURES + NEW_FEATURES), ("new", 2 * VOICE_FEATURES + NEW_FEATURES)):
        for layer, n_out in zip(LAYERS, (16, 16, 1), strict=True):
            weights[f"{part}.{layer}.weight"] = rng.normal(0, n_in**-0.5, (n_out, n_in))
            weights[f"{part}.{layer}.bias"] = rng.normal(0, 0.1, n_out)
            n_in = n_out
    return Pointer([weights])
