"""Lines: what is known of players by what is played alone, learnt from scores as a tracker would hear them."""

import numpy as np
import pytest
import torch

from realtime_mpe.analysis import N_PITCHES
from realtime_mpe.lines import NOTE_INPUTS, PAIR_INPUTS, Lines, line_inputs, unknown
from realtime_mpe.training import lines as training
from realtime_mpe.training.lines import (
    LineNetwork,
    as_lines,
    detected,
    draw_ensemble,
    draw_excerpt,
    draw_moment,
    fit_lines,
    one_at_a_time,
    pair_loss,
)


def duo(n: int = 12) -> np.ndarray:
    """(2 n, 4) as of `draw_ensemble`: a high and a low line in steps, one after the other."""
    step = np.arange(n)
    high, low = (
        np.column_stack([np.full(n, p), 10 * step, 10 * step + 9, row + step % 3]) for p, row in enumerate((50, 30))
    )
    return np.concatenate([high, low])[np.argsort(np.tile(step, 2), kind="stable")].astype(float)


def test_inputs_are_of_order_one_and_depend_on_nothing_after_now():
    _, start, end, pitch = duo(7).T
    notes, pairs = line_inputs(pitch, start, np.where(end > 60, np.inf, end), 60)
    assert notes.shape == (14, NOTE_INPUTS) and pairs.shape == (PAIR_INPUTS, 14, 14)
    assert notes.dtype == pairs.dtype == np.float32
    assert max(np.abs(notes).max(), np.abs(pairs).max()) < 4
    later = line_inputs(pitch, start, np.where(end > 60, end + 100, end), 60)
    np.testing.assert_array_equal(pairs, later[1])
    np.testing.assert_array_equal(notes, later[0])


def test_a_note_may_begin_a_little_after_now():
    """As those do that look-ahead finds early."""
    lines = as_lines(LineNetwork())
    assert np.isfinite(lines(np.array([30.0, 40, 50]), np.array([5.0, 11, 12.5]), np.full(3, np.inf), 10.0)).all()


def test_odds_are_symmetric_and_do_not_depend_on_the_order_of_the_notes():
    torch.manual_seed(0)
    lines = as_lines(LineNetwork())
    _, start, end, pitch = duo().T
    odds = lines(pitch, start, end, 130.0)
    np.testing.assert_array_equal(odds, odds.T)
    order = np.random.default_rng(0).permutation(len(pitch))
    np.testing.assert_allclose(lines(pitch[order], start[order], end[order], 130.0), odds[order][:, order], atol=1e-5)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    network = LineNetwork().eval()
    moments = [(duo(n), 200.0) for n in (3, 12)]
    with torch.no_grad():
        apart = sum(pair_loss(network, [moment]) for moment in moments) / 2
        torch.testing.assert_close(pair_loss(network, moments), apart)


def test_a_weight_that_is_missing_is_named():
    weights = LineNetwork().weights()
    del weights["heed.bias"]
    with pytest.raises(ValueError, match="heed.bias missing"):
        Lines(weights)


def test_lines_are_learnt_from_composed_scores():
    said = []
    lines = as_lines(fit_lines(None, 60, say=said.append))
    assert said[-1].startswith("lines: step 56 of 60")
    player, start, end, pitch = duo().T
    odds = lines(pitch, start, end, 130.0)
    same, apart = player[:, None] == player, ~np.eye(len(player), dtype=bool)
    assert odds[same & apart].mean() > odds[~same].mean() + 1.0


def test_ensembles_are_of_pieces_as_they_are_played():
    rng = np.random.default_rng(0)
    excerpts = [draw_excerpt([], rng) for _ in range(8)]
    assert {excerpt.chamber for excerpt in excerpts} == {True, False}
    sizes = set()
    for _ in range(40):
        notes = draw_ensemble(excerpts, rng)
        assert (notes[:, 2] > notes[:, 1]).all()
        assert ((notes[:, 3] >= 0) & (notes[:, 3] < N_PITCHES)).all()
        sizes.add(len(np.unique(notes[:, 0])))
    assert len(sizes) > 3


def test_a_moment_knows_what_sounds_and_nothing_later():
    rng = np.random.default_rng(1)
    excerpts = [draw_excerpt([], rng) for _ in range(4)]
    for _ in range(40):
        notes, now = draw_moment(excerpts, rng)
        assert 3 <= len(notes) <= training.NOTES
        assert (notes[:, 1] <= now).all() and ((notes[:, 2] <= now) | np.isinf(notes[:, 2])).all()


def test_a_tracker_misses_breaks_and_invents_notes(monkeypatch):
    rng = np.random.default_rng(0)
    long = np.column_stack([np.zeros(400), np.arange(400) * 40.0, np.arange(400) * 40.0 + 30, np.full(400, 30.0)])
    heard = np.concatenate([detected(long, rng) for _ in range(20)])
    share = (heard[:, 0] < 0).mean()
    assert 0.01 < share < 2 * training.NOBODYS
    assert 0.8 * 8000 < len(heard) < 1.2 * 8000
    for name in ("MISSED", "FOUND_TWICE", "CUT_SHORT", "NOBODYS"):
        monkeypatch.setattr(training, name, 0.0)
    assert len(detected(long, rng)) == 400


def test_a_pitch_sounds_once():
    notes = np.array([[0, 0, 20, 40], [1, 1, 30, 40], [0, 12, 18, 40], [1, 14, 40, 41.0]])
    np.testing.assert_array_equal(one_at_a_time(notes), [[0, 0, 12, 40], [0, 12, 18, 40], [1, 14, 40, 41]])


def test_without_lines_nothing_is_known():
    assert not unknown(np.ones(3), np.ones(3), np.ones(3), 2.0).any()
