"""Note tracking on made-up posteriors: nothing begins twice, nothing hangs, repeated notes are split."""

import numpy as np
import pytest

from realtime_mpe.analysis import MAX_LOOKAHEAD
from realtime_mpe.notes import NoteTracker, Thresholds

LIMITS = Thresholds(on=0.6, off=0.4, onset=0.7, repeat=0.7)


def run(mix_frames, onset_frames, lookahead=1, limits=LIMITS, n_pitches=1):
    """Posteriors by label frame, (T, n_pitches), as a model that is always right would give them hop by hop."""
    tracker = NoteTracker(n_pitches, limits, lookahead)
    events = []
    for hop in range(len(mix_frames)):
        rows = [hop + 1 - k for k in range(MAX_LOOKAHEAD + 1)]
        mix = np.array([mix_frames[r] if 0 <= r < len(mix_frames) else np.zeros(n_pitches) for r in rows])
        onset = np.array([onset_frames[r] if 0 <= r < len(onset_frames) else np.zeros(n_pitches) for r in rows])
        events += [(hop, *event[:3]) for event in tracker.process(mix, onset)]
    return events, tracker


def roll(*pairs, length=30):
    out = np.zeros((length, 1))
    for start, end in pairs:
        out[start:end] = 0.9
    return out


@pytest.mark.parametrize("lookahead", range(MAX_LOOKAHEAD + 1))
def test_a_note_is_decided_exactly_the_look_ahead_after_its_frame(lookahead):
    events, tracker = run(roll((10, 20)), roll((10, 12)), lookahead)
    assert tracker.latency == lookahead
    begun = [e for e in events if e[1]]
    assert begun == [(10 - 1 + lookahead, True, 0, 10)]
    assert [e[3] for e in events if not e[1]] == [20]


def test_at_two_steps_a_frame_all_times_are_twice_as_fine():
    tracker, events = NoteTracker(1, LIMITS, 1, steps=2), []
    sounding = {step: 20 <= step < 37 for step in range(-20, 60)}  # by label step: 10 frames on, 8.5 long
    for step in range(50):
        rows = [step + 1 - 2 * k for k in range(MAX_LOOKAHEAD + 1)]
        mix = np.array([[0.9 * sounding[r]] for r in rows])
        onset = np.array([[0.9 * (20 <= r < 24)] for r in rows])
        events += [(step, *event) for event in tracker.process(mix, onset)]
    assert events == [(20 - 1 + 2, True, 0, 20), (37 - 1 + 4, False, 0, 37)]


def test_a_note_without_an_onset_still_begins_when_the_mixture_is_sure():
    events, _ = run(roll((10, 20)), np.zeros((30, 1)))
    assert [e[1:] for e in events] == [(True, 0, 10), (False, 0, 20)]


def test_a_weak_note_begins_with_its_onset():
    weak = roll((10, 20)) * 0.55  # 0.495: between off and on
    assert run(weak, np.zeros((30, 1)))[0] == []
    assert [e[1:] for e in run(weak, roll((10, 12)))[0]] == [(True, 0, 10), (False, 0, 20)]


def test_wavering_between_the_thresholds_does_not_retrigger():
    mix = roll((5, 25))
    mix[10:20:2] = 0.45
    events, _ = run(mix, roll((5, 7)))
    assert [e[1] for e in events] == [True, False]


@pytest.mark.parametrize(
    "probability, length, distance, late", [(0.8, 1, 1, None), (0.8, 8, 1, 1), (0.95, 1, 1, 0), (0.8, 1, 2, 0)]
)
def test_a_splash_over_the_pitch_beside_is_no_note_and_a_step_waits_a_frame(probability, length, distance, late):
    mix = np.zeros((40, 4))
    mix[5:15, 1] = 0.9
    mix[15 : 15 + length, 1 + distance] = probability
    events, _ = run(mix, np.zeros((40, 4)), n_pitches=4)
    begun = [hop for hop, on, pitch, _ in events if on and pitch == 1 + distance]
    assert begun == ([] if late is None else [15 + late])


def test_a_step_to_the_pitch_beside_waits_no_longer_once_the_other_is_past():
    mix = np.zeros((40, 2))
    mix[5:15, 0] = 0.9
    mix[19:30, 1] = 0.8  # four frames after: the end was told two hops after the last frame, and two more have passed
    events, _ = run(mix, np.zeros((40, 2)), n_pitches=2)
    assert [hop for hop, on, pitch, _ in events if on and pitch == 1] == [19]


def test_a_repeated_note_is_split_and_the_end_comes_before_the_beginning():
    events, _ = run(roll((5, 25)), roll((5, 7), (15, 17)))
    assert [e[1:] for e in events] == [(True, 0, 5), (False, 0, 15), (True, 0, 15), (False, 0, 25)]


def test_one_onset_of_several_frames_splits_once():
    events, _ = run(roll((5, 28)), roll((5, 7), (12, 20)))
    assert sum(e[1] for e in events) == 2


def test_a_late_detection_dates_the_note_back_to_its_onset():
    mix = roll((10, 20)) * 0.5  # neither threshold at first
    mix[12:20] = 0.9
    events, _ = run(mix, roll((10, 12)) * 0.6, lookahead=1)
    hop, _, _, frame = next(e for e in events if e[1])
    assert hop >= 12 and frame in (10, 11)


def test_flush_ends_whatever_sounds():
    events, tracker = run(roll((20, 30)), roll((20, 22)))
    assert [e[1] for e in events] == [True]
    assert [e.on for e in tracker.flush()] == [False]
    assert tracker.flush() == []


@pytest.mark.parametrize("lookahead", (0, 1, 4))
def test_random_posteriors_never_begin_a_sounding_note_or_end_a_silent_one(lookahead):
    rng = np.random.default_rng(3)
    tracker = NoteTracker(8, LIMITS, lookahead, steps=2)
    sounding, last = {}, {}
    for _ in range(2000):
        mix, onset = rng.random((2, MAX_LOOKAHEAD + 1, 8))
        for on, pitch, step in tracker.process(mix, onset):
            assert (pitch in sounding) != on
            if on:
                assert step >= last.get(pitch, 0), "begins within the note before"
                sounding[pitch] = step
            else:
                assert step > sounding.pop(pitch)
                last[pitch] = step
        assert set(sounding) == set(np.flatnonzero(tracker.sounding))


def test_sensitivity_moves_all_thresholds_one_way_and_half_moves_none():
    low, neutral, high = (vars(LIMITS.shifted(s)) for s in (0.2, 0.5, 0.8))
    assert neutral == pytest.approx(vars(LIMITS))
    assert all(low[k] > neutral[k] > high[k] for k in neutral)


def test_reset_equals_a_new_tracker():
    rng = np.random.default_rng(5)
    posteriors = rng.random((50, 2, MAX_LOOKAHEAD + 1, 4))
    used, fresh = NoteTracker(4, LIMITS, 2), NoteTracker(4, LIMITS, 2)
    for mix, onset in posteriors[:20]:
        used.process(mix, onset)
    used.reset()
    for mix, onset in posteriors[20:]:
        assert used.process(mix, onset) == fresh.process(mix, onset)
