"""The pointer: the truth it is taught, and that it learns players from timbre where pitch says nothing."""

import numpy as np
import pytest
from made_up import HOPS, first_voice, performance

from realtime_mpe.analysis import N_PITCHES
from realtime_mpe.training import pointer as pointer_module
from realtime_mpe.training.pointer import StudiedMemory, as_pointer, fit_pointer, home_share, study


def test_detected_notes_know_their_players_and_ghosts_have_none():
    clean = [len(p) for hop in performance(0, 3).players for p in hop.values()]
    assert len(clean) > 20 and set(clean) == {1}
    haunted = [len(p) for hop in performance(0, 3, ghosts=20).players for p in hop.values()]
    assert haunted.count(0) > 5
    doubled = [len(p) for hop in performance(0, 3, unison=True).players for p in hop.values()]
    assert set(doubled) == {2}


def test_following_the_truth_puts_every_player_into_one_voice():
    memories = [study(performance(seed, 4), StudiedMemory(first_voice, 8, follow_truth=1.0)) for seed in range(3)]
    assert home_share(memories) == 1.0
    assert all(memory.count == 4 for memory in memories)
    # The first decision of each player is a new voice, and every later one is that player's own.
    right = [answers for _, _, answers in memories[0].decisions]
    assert right[0] == [0] and max(len(r) for r in right) == 1


def test_random_voices_are_not_at_home():
    rng = np.random.default_rng(0)
    memories = [
        study(performance(seed, 4), StudiedMemory(lambda f, n: rng.normal(size=len(f) + 1), 8)) for seed in range(3)
    ]
    assert home_share(memories) < 0.6


def test_the_pointer_learns_players_from_timbre(monkeypatch):
    monkeypatch.setattr(pointer_module, "FOLLOW_TRUTH", (1.0, 0.5))
    monkeypatch.setattr(pointer_module, "EPOCHS", 12)
    monkeypatch.setattr(pointer_module, "BATCH", 64)
    train = [performance(seed, 2 + seed % 3, ghosts=4) for seed in range(20)]
    held_out = [performance(100 + seed, 2 + seed % 3, ghosts=4) for seed in range(6)]
    monkeypatch.setattr(pointer_module, "VOTERS", 2)
    networks = fit_pointer(train, held_out, 8, say=lambda line: None)
    assert len(networks) == 2
    memories = [study(p, StudiedMemory(as_pointer(networks), 8)) for p in held_out]
    assert home_share(memories) > 0.9


def test_silent_hops_need_no_embeddings():
    heard = performance(1, 2)
    dense = heard.embeddings()
    assert dense.shape == (HOPS, N_PITCHES, 16)
    assert len(heard.where) < 0.5 * HOPS * N_PITCHES
    hop = next(h for h, players in enumerate(heard.players) if players)
    pitch = next(iter(heard.players[hop]))
    assert np.abs(dense[hop, pitch]).sum() > 0


@pytest.mark.parametrize("max_voices", [1, 2])
def test_a_memory_smaller_than_the_ensemble_still_plays_on(max_voices):
    memory = study(performance(2, 4), StudiedMemory(lambda f, n: np.arange(len(f) + 1.0), max_voices))
    assert memory.count == max_voices
