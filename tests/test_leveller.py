import numpy as np
import pytest

from realtime_mpe.analysis import AnalysisConfig
from realtime_mpe.cqt import MAX_LEVEL, RANGE_DB, SILENCE, StreamingCqt, audible
from realtime_mpe.leveller import FAINT_DB, MOST_DB, SLACK_DB, Leveller

STEP = 0.016
SECOND = 62  # steps


def tune(level: float, seconds: float = 2.0) -> np.ndarray:
    """A note that swells and fades beside a steady one, its RMS at ``level`` dB re full scale."""
    t = np.arange(int(seconds * 16_000)) / 16_000
    sound = np.sin(2 * np.pi * 220 * t) * (1.2 + np.sin(9 * t)) + 0.3 * np.sin(2 * np.pi * 659 * t)
    return (sound / np.sqrt(np.mean(sound**2)) * 10 ** (level / 20)).astype(np.float32)


def frames(sound: np.ndarray) -> np.ndarray:
    return StreamingCqt(AnalysisConfig(), 2).process(sound)


def levelled(sound: np.ndarray, leveller: Leveller | None = None) -> np.ndarray:
    leveller = leveller or Leveller(STEP)
    return np.stack([leveller.process(frame) for frame in frames(sound)])


def gains(sound: np.ndarray) -> np.ndarray:
    """(T,) dB; each frame must have been moved by one."""
    found = []
    for before, after in zip(frames(sound), levelled(sound), strict=True):
        moved = (after - before)[(after > 0.0) & (after < MAX_LEVEL)] * RANGE_DB
        assert np.ptp(moved) < 1e-3
        found.append(moved.mean())
    return np.array(found)


@pytest.mark.parametrize("level", [-48.0, -42.0])
def test_what_is_faint_comes_up_within_seconds_and_not_too_far(level):
    found, wanted = gains(tune(level, 8.0)), FAINT_DB - level
    assert found[-1] == pytest.approx(wanted - SLACK_DB, abs=4.0)
    assert found[SECOND] > 0.6 * found[-1] and found.max() < wanted


@pytest.mark.parametrize("level", [-28.0, -20.0, -3.0])
def test_what_is_loud_enough_is_left_alone(level):
    np.testing.assert_array_equal(levelled(tune(level)), audible(frames(tune(level))))


def test_what_lies_below_the_floor_comes_up_with_the_rest():
    sound = tune(-48.0)
    lost = (audible(frames(sound)) == 0.0) & (levelled(sound) > 0.0)
    assert lost.sum() > 200


def test_the_gain_stands_still_once_it_is_found():
    assert np.ptp(gains(tune(-42.0, 8.0))[3 * SECOND :]) < 1.0


def test_rests_leave_the_gain_where_it_was():
    leveller = Leveller(STEP)
    levelled(tune(-45.0), leveller)
    note = np.full(288, SILENCE, np.float32)
    note[200] = 0.3
    before = leveller.process(note)[200]
    for _ in range(60 * SECOND):
        assert not leveller.process(np.full(288, SILENCE, np.float32)).any()
    assert leveller.process(note)[200] == before


def test_nothing_is_brought_up_by_more_than_the_most():
    leveller, note = Leveller(STEP), np.full(288, SILENCE, np.float32)
    note[200] = 0.37  # -59 dB
    for _ in range(60 * SECOND):
        found = leveller.process(note)
    assert MOST_DB - SLACK_DB - 1e-3 <= (found[200] - note[200]) * RANGE_DB <= MOST_DB + 1e-3


def test_reset_equals_a_new_one():
    used = Leveller(STEP)
    levelled(tune(-50.0), used)
    used.reset()
    np.testing.assert_array_equal(levelled(tune(-40.0), used), levelled(tune(-40.0)))
