"""Who belongs together: pairs of notes, the groups they make, and a memory that thinks better of its choices."""

import numpy as np
import pytest
import torch
from made_up import by_timbre, embedding, notes, performance, play

from realtime_mpe.affinity import MOST_CERTAIN, PAIR_FEATURES, Affinity, Notes, pair_features, places
from realtime_mpe.grouping import JOIN_ABOVE, JOIN_FEATURES, SURE, Grouping, Groups, linked
from realtime_mpe.notes import NoteEvent
from realtime_mpe.training import grouping as training
from realtime_mpe.training.grouping import (
    GroupingNetwork,
    StandardPerceptron,
    WatchedMemory,
    agreement,
    as_grouping,
    fit_grouping,
    shares,
)
from realtime_mpe.training.pointer import StudiedMemory, home_share, study
from realtime_mpe.voices import BEST, MEMORY, SMALLEST_GROUP, VoiceMemory


def alike(some: Notes, voice: np.ndarray, now: int, at_most: int) -> np.ndarray:
    """A grouping that trusts timbre alone."""
    return linked(12.0 * (some.unit @ some.unit.T) - 6.0, 0.0)


def test_features_are_symmetric_finite_and_of_order_one():
    rng = np.random.default_rng(0)
    for n in (2, 3, MEMORY):
        features = pair_features(notes(rng, n), np.full((n, n), 99.0), 90)  # as sure as no line can be
        assert features.shape == (n, n, PAIR_FEATURES) and features.dtype == np.float32
        np.testing.assert_allclose(features, features.transpose(1, 0, 2), atol=1e-5)
        assert np.isfinite(features).all() and np.abs(features[~np.eye(n, dtype=bool)]).max() < 12


def test_features_depend_on_nothing_after_now():
    early = notes(np.random.default_rng(1))
    sounding = early._replace(end=np.where(early.end > 60, np.inf, early.end))
    later = sounding._replace(end=np.where(np.isinf(sounding.end), 1000.0, sounding.end))
    lines = np.zeros((12, 12))
    np.testing.assert_array_equal(pair_features(sounding, lines, 60), pair_features(later, lines, 60))


def test_a_line_is_carried_on_by_the_nearest_note():
    unit = np.ones((3, 1))
    line = Notes(
        unit, unit, np.array([30.0, 42.0, 31.0]), np.array([0.0, 0.0, 10.0]), np.array([10.0, 10.0, np.inf]), np.ones(3)
    )
    carries = pair_features(line, np.zeros((3, 3)), 12)[..., 16]
    assert carries[0, 2] == 1 and carries[1, 2] == 0


def test_a_place_is_how_much_sounds_above_and_below_up_to_now():
    start, end = np.array([0.0, 0.0, 10.0, 30.0]), np.array([20.0, np.inf, 20.0, 40.0])
    above, below = places(Notes(*np.ones((2, 4, 1)), np.array([50.0, 30.0, 40.0, 60.0]), start, end, np.ones(4)), 39)
    np.testing.assert_allclose(above, [0.0, (20 + 10 + 10) / 40, 1.0, 0.0])
    np.testing.assert_allclose(below, [1.0 + 0.5, 0.0, 1.0, 1.0])


def test_sure_groups_link_by_their_mean():
    player = np.array([0, 1, 0, 2, 1, 0, 2])
    odds = np.where(player[:, None] == player, 3.0, -3.0)
    assert linked(odds).tolist() == player.tolist()
    odds[0, 2] = odds[2, 0] = -0.9  # one doubtful pair among others that are sure
    assert linked(odds).tolist() == player.tolist()
    assert linked(np.full((5, 5), SURE - 0.1)).tolist() == [0, 1, 2, 3, 4]
    assert linked(np.full((5, 5), SURE + 0.1)).tolist() == [0] * 5


def partition(seed: int, n: int = 40, k: int = 6) -> tuple[Groups, np.ndarray, np.ndarray]:
    """Groups, and the features and odds they were made of."""
    rng = np.random.default_rng(seed)
    lines = rng.normal(size=(n, n))
    features = pair_features(notes(rng, n), lines + lines.T, 90)
    odds = rng.normal(size=(n, n)).astype(np.float32)
    odds += odds.T
    group = np.unique(np.append(np.arange(k), rng.integers(0, k, n - k)), return_inverse=True)[1]
    return Groups(features, odds, group), features, odds


def test_what_is_known_of_two_groups_is_the_mean_over_their_pairs():
    groups, features, odds = partition(0)
    for a, b, known in zip(*groups.candidates(), strict=True):
        pairs = np.ix_(groups.group == a, groups.group == b)
        np.testing.assert_allclose(known[:PAIR_FEATURES], features[pairs].mean((0, 1)), atol=1e-4)
        np.testing.assert_allclose(known[PAIR_FEATURES], odds[pairs].mean(), atol=1e-4)
        assert np.isfinite(known).all() and len(known) == JOIN_FEATURES


def test_joined_groups_are_as_if_they_had_been_one_from_the_start():
    groups, features, odds = partition(1)
    for a, b in ((1, 4), (0, 1), (2, 3)):
        groups.join(a, b)
        afresh = Groups(features, odds, groups.group)
        for kept, made in zip(groups.candidates(), afresh.candidates(), strict=True):
            np.testing.assert_allclose(kept, made, atol=1e-3)
    groups.join(0, 1)
    groups.join(0, 1)
    assert len(groups) == 1 and not groups.group.any()


def test_there_are_never_more_groups_than_voices():
    network = GroupingNetwork()
    torch.nn.init.zeros_(network.join.layers[4].weight)
    torch.nn.init.constant_(network.join.layers[4].bias, -5.0)  # it would rather join nothing
    grouping = as_grouping([network])
    some, voice = notes(np.random.default_rng(2), 30), np.arange(30)
    assert len(set(grouping(some, voice, 90, 30))) > 3
    assert set(grouping(some, voice, 90, 3)) == {0, 1, 2}


def test_groups_that_were_one_voice_stay_so_where_it_is_open():
    network = GroupingNetwork()
    for part in (network.pair, network.join):
        torch.nn.init.zeros_(part.layers[4].weight)
    torch.nn.init.constant_(network.pair.layers[4].bias, SURE - 0.1)
    torch.nn.init.constant_(network.join.layers[4].bias, JOIN_ABOVE)  # it cannot tell
    some, voice = notes(np.random.default_rng(2), 12), np.repeat([3, 0, 5], 4)
    group = as_grouping([network])(some, voice, 90, 8)
    assert group.tolist() == np.repeat([0, 1, 2], 4).tolist()


def test_several_networks_are_of_their_mean_opinion():
    networks = [GroupingNetwork() for _ in range(2)]
    for network, opinion in zip(networks, (3.0, -1.0), strict=True):
        for part in (network.pair, network.join):
            torch.nn.init.zeros_(part.layers[4].weight)
            torch.nn.init.constant_(part.layers[4].bias, opinion)
    grouping = as_grouping(networks)
    odds = grouping.affinity(pair_features(notes(np.random.default_rng(2), 9), np.zeros((9, 9)), 90))
    np.testing.assert_allclose(odds[np.triu_indices(9, 1)], 1.0)
    np.testing.assert_allclose(grouping.join_odds(np.zeros((3, JOIN_FEATURES), np.float32)), 1.0)
    with pytest.raises(ValueError, match="at least one"):
        Grouping([])


def test_right_joins_are_those_of_notes_of_one_player():
    share = shares([frozenset({5}), frozenset({5, 7}), frozenset(), frozenset({7})])
    right, known = agreement(np.array([0, 0, 1, 2]), share)
    assert known.tolist() == [True, False, True]
    np.testing.assert_allclose(right[0, 2], 0.25)
    np.testing.assert_allclose(right[2, 2], 1.0)


@pytest.mark.parametrize("rows", (1, 30, 300))
def test_a_perceptron_learns_from_few_rows_in_so_many_steps_and_no_more(monkeypatch, rows):
    monkeypatch.setattr("realtime_mpe.training.grouping.FEWEST_STEPS", 10)
    perceptron, steps = StandardPerceptron(3, 4), []
    perceptron.register_forward_hook(lambda *args: steps.append(1))
    features = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    assert np.isfinite(perceptron.fit(features, features[:, 0] > 0, epochs=2, batch=100))
    assert len(steps) == {1: 10, 30: 10, 300: 12}[rows]
    assert all(np.isfinite(weight).all() for weight in perceptron.weights().values())


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
    for grouping in (None, alike):
        calls = []
        memory = VoiceMemory(clumsy, 8, grouping)
        voices, _ = play(played, 125, memory=memory)
        outcomes[grouping] = [voice for _, voice in voices]
    settled = 2 * SMALLEST_GROUP
    assert outcomes[alike][settled:] == [0, 1] * ((12 - settled) // 2)
    assert outcomes[None] == [0] * 12


def test_a_note_ends_on_the_voice_it_was_sent_on_although_the_memory_moved_it():
    memory = VoiceMemory(lambda features, new: np.array([0.0] * len(features) + [-1.0]), 8, alike)
    played = [(8 * k, 90 + 8 * k, 10 + k, int(k >= 4)) for k in range(8)]
    voices, memory = play(played, 80, memory=memory)
    assert len(memory.voices()) == 2  # two timbres are known apart
    ends = memory.process([NoteEvent(False, p, 90) for p, _ in voices], [embedding({})], 90)
    assert [voice for _, voice in ends] == [v for _, v in voices] == [0] * 8


def test_what_was_sent_most_names_the_group():
    played = [(10 * k, 10 * k + 8, 20 + k, k % 2) for k in range(8)]
    voices, memory = play(played, 100, memory=VoiceMemory(by_timbre, 8, alike))
    assert [v for _, v in voices] == [0, 1] * 4
    assert memory.voices() == [0, 1] and memory.count == 2


def test_missing_weights_are_named():
    with pytest.raises(ValueError, match="0.bias"):
        Affinity([{"0.weight": np.zeros((4, PAIR_FEATURES))}])
    with pytest.raises(ValueError, match="join.0.weight"):
        Grouping([{n: w for n, w in GroupingNetwork().weights().items() if not n.startswith("join")}])


def unsure(seed: int):
    """A scorer that trusts timbre and is often mistaken."""
    rng = np.random.default_rng(seed)
    return lambda features, new: by_timbre(features, new) + rng.normal(0.0, 2.0, len(features) + 1)


def test_grouping_learns_players_from_timbre_and_helps_an_unsure_pointer(monkeypatch):
    monkeypatch.setattr(training, "LOOKS", 0.5)
    train = [performance(seed, 2 + seed % 3, ghosts=4) for seed in range(16)]
    grouping = as_grouping([fit_grouping(train, 8, say=lambda line: None)])
    held_out = study(performance(100, 3), WatchedMemory(8, 0, 1))
    player = np.array([next(iter(o)) for o in held_out.owners()])
    odds = grouping.affinity(pair_features(held_out.notes(), np.zeros((len(player), len(player))), 200))
    same, apart = player[:, None] == player, ~np.eye(len(player), dtype=bool)
    assert odds[same & apart].mean() > 1.5 and odds[~same].mean() < -1.5
    assert np.abs(odds).max() <= MOST_CERTAIN
    group = grouping(held_out.notes(), np.zeros(len(player), int), 200, 8)
    assert len({(p, g) for p, g in zip(player, group, strict=True)}) == 3  # each player is one group, and alone in it
    ordered, plain = (
        home_share([study(performance(100 + s, 3), StudiedMemory(unsure(s), 8, g)) for s in range(6)])
        for g in (grouping, None)
    )
    assert ordered > plain + 0.1
