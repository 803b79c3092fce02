"""Who belongs together: pairs of notes, the groups they make, and a memory that thinks better of its choices."""

import numpy as np
import pytest
from made_up import by_timbre, notes, performance, play

from realtime_mpe.affinity import JOIN_ABOVE, MOST_CERTAIN, PAIR_FEATURES, Affinity, Notes, groups, pair_features
from realtime_mpe.training import affinity as affinity_module
from realtime_mpe.training.affinity import WatchedMemory, as_affinity, fit_affinity
from realtime_mpe.training.pointer import StudiedMemory, home_share, study
from realtime_mpe.voices import BEST, MEMORY, SMALLEST_GROUP, VoiceMemory


def alike(some: Notes, now: int) -> np.ndarray:
    """An affinity that trusts timbre alone."""
    return 12.0 * (some.unit @ some.unit.T) - 6.0


def test_features_are_symmetric_finite_and_of_order_one():
    rng = np.random.default_rng(0)
    for n in (2, 3, MEMORY):
        features = pair_features(notes(rng, n), 90)
        assert features.shape == (n, n, PAIR_FEATURES) and features.dtype == np.float32
        np.testing.assert_allclose(features, features.transpose(1, 0, 2), atol=1e-5)
        assert np.isfinite(features).all() and np.abs(features[~np.eye(n, dtype=bool)]).max() < 12


def test_features_depend_on_nothing_after_now():
    early = notes(np.random.default_rng(1))
    sounding = early._replace(end=np.where(early.end > 60, np.inf, early.end))
    later = sounding._replace(end=np.where(np.isinf(sounding.end), 1000.0, sounding.end))
    np.testing.assert_array_equal(pair_features(sounding, 60), pair_features(later, 60))


def test_a_line_is_carried_on_by_the_nearest_note():
    unit = np.ones((3, 1))
    line = Notes(
        unit, np.array([30.0, 42.0, 31.0]), np.array([0.0, 0.0, 10.0]), np.array([10.0, 10.0, np.inf]), np.ones(3)
    )
    carries = pair_features(line, 12)[..., 16]
    assert carries[0, 2] == 1 and carries[1, 2] == 0


def test_groups_join_by_their_mean_and_never_exceed_what_is_allowed():
    player = np.array([0, 1, 0, 2, 1, 0, 2])
    odds = np.where(player[:, None] == player, 3.0, -3.0)
    assert groups(odds, 8).tolist() == player.tolist()
    odds[0, 2] = odds[2, 0] = -2.0  # one doubtful pair among others that are sure
    assert groups(odds, 8).tolist() == player.tolist()
    assert groups(odds, 2).max() == 1
    assert groups(np.full((5, 5), JOIN_ABOVE - 0.1), 8).tolist() == [0, 1, 2, 3, 4]
    assert groups(np.full((5, 5), JOIN_ABOVE + 0.1), 8).tolist() == [0] * 5


def test_a_wrong_choice_costs_a_few_notes_where_the_memory_is_put_in_order():
    """Two players in turn, and a scorer that goes by the likest note and takes the second player for the first once."""

    def clumsy(features, new):
        calls.append(1)
        scores = np.concatenate([10 * features[:, BEST], [7.0]])
        if len(calls) == 2:  # the second player's first note is given to the first player's voice
            scores[0] = 100.0
        return scores

    played = [(10 * k, 10 * k + 8, 20 + k, k % 2) for k in range(12)]
    outcomes = {}
    for affinity in (None, alike):
        calls = []
        memory = VoiceMemory(clumsy, 8, affinity)
        voices, _ = play(played, 125, memory=memory)
        outcomes[affinity] = [voice for _, voice in voices]
    settled = 2 * SMALLEST_GROUP
    assert outcomes[alike][settled:] == [0, 1] * ((12 - settled) // 2)
    assert outcomes[None] == [0] * 12


def test_a_note_ends_on_the_voice_it_was_sent_on_although_the_memory_moved_it():
    memory = VoiceMemory(lambda features, new: np.array([0.0] * len(features) + [-1.0]), 8, alike)
    played = [(8 * k, 90 + 8 * k, 10 + k, int(k >= 4)) for k in range(8)]
    voices, memory = play(played, 80, memory=memory)
    assert len(memory.voices()) == 2  # two timbres are known apart
    assert [memory.note_off(p, 90) for p, _ in voices] == [v for _, v in voices] == [0] * 8


def test_what_was_sent_most_names_the_group():
    played = [(10 * k, 10 * k + 8, 20 + k, k % 2) for k in range(8)]
    voices, memory = play(played, 100, memory=VoiceMemory(by_timbre, 8, alike))
    assert [v for _, v in voices] == [0, 1] * 4
    assert memory.voices() == [0, 1] and memory.count == 2


def test_missing_weights_are_named():
    with pytest.raises(ValueError, match="0.bias"):
        Affinity({"0.weight": np.zeros((4, PAIR_FEATURES))})


def unsure(seed: int):
    """A scorer that trusts timbre and is often mistaken."""
    rng = np.random.default_rng(seed)
    return lambda features, new: by_timbre(features, new) + rng.normal(0.0, 2.0, len(features) + 1)


def test_affinity_learns_players_from_timbre_and_helps_an_unsure_pointer(monkeypatch):
    monkeypatch.setattr(affinity_module, "LOOKS", 0.5)
    monkeypatch.setattr(affinity_module, "EPOCHS", 12)
    train = [performance(seed, 2 + seed % 3, ghosts=4) for seed in range(16)]
    affinity = as_affinity(fit_affinity(train, 8, say=lambda line: None))
    held_out = study(performance(100, 3), WatchedMemory(8, 0))
    player = np.array([next(iter(o)) for o in held_out.owners()])
    odds = affinity(held_out.notes(), 200)
    same, apart = player[:, None] == player, ~np.eye(len(player), dtype=bool)
    assert odds[same & apart].mean() > 1.5 and odds[~same].mean() < -1.5
    assert np.abs(odds).max() <= MOST_CERTAIN
    ordered, plain = (
        home_share([study(performance(100 + s, 3), StudiedMemory(unsure(s), 8, a)) for s in range(6)])
        for a in (affinity, None)
    )
    assert ordered > plain + 0.1
