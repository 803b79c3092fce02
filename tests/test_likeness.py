"""Performances by players who are more alike than rendered ones."""

import numpy as np
import pytest
from made_up import performance

from realtime_mpe.training import likeness
from realtime_mpe.training.likeness import crossing, liken, notes_of


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(likeness, "FAMILY_PROBABILITY", 1.0)
    monkeypatch.setattr(likeness, "MOST_CROSSED", 1.0)


def timbres(some):
    """(players, D) mean embedding of each player's notes, and (D,) that of the notes that nobody plays."""
    spans, owner = notes_of(some)
    dense = some.embeddings()
    mean = np.array([dense[begun:end, pitch].mean(0) for begun, end, pitch in spans])
    return np.array([mean[owner == player].mean(0) for player in range(owner.max() + 1)]), mean[owner < 0].mean(0)


def test_players_come_nearer_to_each_other_and_ghosts_stay(always):
    before = performance(3, 3, ghosts=20)
    after = liken(before, np.random.default_rng(1))
    (was, ghosts_were), (now, ghosts_are) = timbres(before), timbres(after)
    ratios = [
        np.linalg.norm(now[one] - now[other]) / np.linalg.norm(was[one] - was[other])
        for one, other in ((0, 1), (0, 2), (1, 2))
    ]
    assert max(ratios) < 0.95 and np.ptp(ratios) < 0.05
    np.testing.assert_allclose(now.mean(0), was.mean(0), atol=0.02)
    np.testing.assert_array_equal(ghosts_were, ghosts_are)
    assert after.events is before.events and after.players is before.players


def test_players_whose_lines_cross_are_left_alone(always, monkeypatch):
    some = performance(4, 3)
    assert liken(some, np.random.default_rng(0)) is not some
    monkeypatch.setattr(likeness, "MOST_CROSSED", 0.0)
    assert liken(some, np.random.default_rng(0)) is some  # notes anywhere: all cross


def test_crossing_is_the_share_of_the_rarer_side():
    spans = np.array([[0, 10, 40], [0, 6, 30], [6, 8, 50], [20, 30, 10]])
    owner = np.array([0, 1, 1, 2])
    crossed = crossing(spans, owner)
    assert crossed[0, 1] == crossed[1, 0] == 0.25
    assert crossed[2].max() == 0.0
