"""Labels: on the grid of the metric, shifted by the look-ahead, and where the sound really is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, MAX_LOOKAHEAD, SAMPLERATE, AnalysisConfig
from realtime_mpe.cqt import StreamingCqt
from realtime_mpe.training import mixing
from realtime_mpe.training.effects import EXPRESSION_STEP, FALL_DB, SUMMIT
from realtime_mpe.training.losses import embedding_loss, mixture_loss, onset_loss
from realtime_mpe.training.metrics import notes_to_roll
from realtime_mpe.training.mixing import Mixture, all_lookaheads, collate, gains, remix, retune, shifted
from realtime_mpe.training.network import LiveNetwork, NetworkConfig
from realtime_mpe.training.stems import StemCache, render
from realtime_mpe.training.synth import SynthInstrument

FRONT_END = AnalysisConfig()
NOTES = np.array([(0, 0.1, 0.5, 60), (1, 0.3, 0.9, 64), (0, 0.5, 1.0, 60), (1, 0.95, 1.2, 62), (0, 1.0, 1.3, 62)])


def frame(second: float) -> int:
    """The first whose centre is not before it."""
    return int(np.ceil(second / FRAME_SECONDS))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> StemCache:
    folder = tmp_path_factory.mktemp("stems")
    render(folder, None, [SynthInstrument(k) for k in range(6)], 2, seconds=10.0, seed=1)
    return StemCache(folder)


def test_small_ensembles_are_solos_duos_and_trios(cache):
    rng = np.random.default_rng(3)
    players = [len(remix(cache, k % 2, 4.0, rng, few=True).stems) for k in range(60)]
    pitched = [len(set(cache.load(k).part) - {-1}) for k in range(2)]
    assert set(players) >= {1, 2} and max(players) <= min(3, max(pitched)) + 1  # and drums, if the segment has some


def test_chamber_music_has_no_guests_and_no_drums(cache):
    rng = np.random.default_rng(5)
    usual = [remix(cache, k % 2, 4.0, rng) for k in range(60)]
    chamber = [remix(cache, k % 2, 4.0, rng, chamber=True) for k in range(60)]

    def own(mixture, piece):
        return all(segment.score == piece and segment.part[row] >= 0 for segment, row in mixture.stems)

    pieces = [cache.load(k).score for k in range(2)]
    assert pieces[0] != pieces[1]
    assert all(own(mixture, pieces[k % 2]) for k, mixture in enumerate(chamber))
    assert not all(own(mixture, pieces[k % 2]) for k, mixture in enumerate(usual))


def test_labels_lie_on_the_grid_that_the_metric_scores():
    n_frames = 40
    silence = Mixture(np.zeros(n_frames * HOP, np.float32), np.zeros((0, 4)))
    batch = collate([silence, Mixture(silence.audio, NOTES)], n_frames)
    np.testing.assert_array_equal(batch.mix[1, :n_frames].T, notes_to_roll(NOTES[:, 1:], n_frames))
    assert not batch.mix[0].any()
    assert batch.polyphony[1, frame(0.4)] == 2
    row = 64 - FIRST_MIDI
    assert batch.onset[1, :, row].nonzero().flatten().tolist() == [frame(0.3), frame(0.3) + 1]


def test_notes_to_learn_players_from_begin_within_the_example():
    notes = np.array([(0, -0.2, 0.5, 60), (2, 0.32, 0.64, 61), (1, 0.5, 9.0, 62), (1, 1.3, 1.4, 63), (0, 0.1, 0.2, 99)])
    batch = collate([Mixture(np.zeros(40 * HOP, np.float32), notes)], 40)
    assert batch.notes.tolist() == [[0, 2, 10, 20, 61 - FIRST_MIDI], [0, 1, 16, 40, 62 - FIRST_MIDI]]


@pytest.mark.parametrize("lookahead", range(MAX_LOOKAHEAD + 1))
def test_output_frame_n_owes_label_frame_n_plus_one_minus_lookahead(lookahead):
    target = torch.arange(1, 12.0)[None, :, None]  # label frames 0..10 hold 1..11; 0 stands for "before the start"
    owed = shifted(target, lookahead)[0, :, 0].tolist()
    assert owed == [max(n + 1 - lookahead + 1, 0) for n in range(10)]
    assert all_lookaheads(target)[0, :, lookahead, 0].tolist() == owed


def test_labels_follow_the_sound_when_the_mixture_is_retuned():
    audio = np.zeros(SAMPLERATE, np.float32)
    audio[8000] = 1.0
    notes = np.array([(0, 0.5, 0.6, 60)])
    for seed in range(5):
        moved, moved_notes = retune(audio, notes, np.random.default_rng(seed))
        assert abs(int(moved.argmax()) - moved_notes[0, 1] * SAMPLERATE) <= 1


def test_labels_end_with_the_sound_when_the_mixture_is_played_faster():
    notes = np.array([(0, 0.5, 1.5, 60), (0, 1.001, 1.5, 62)])
    fastest = SimpleNamespace(uniform=lambda low, high: high)
    moved, moved_notes = retune(np.ones(SAMPLERATE, np.float32), notes, fastest)
    assert moved_notes[:, 3].tolist() == [60]
    assert abs(moved_notes[0, 2] * SAMPLERATE - np.flatnonzero(moved)[-1]) < 2


def test_the_notes_of_a_line_swell_to_their_summit_and_fall_to_their_end(monkeypatch):
    monkeypatch.setattr(mixing, "EXPRESSION_PROBABILITY", 1.0)
    onset = np.array([-0.5, 0.5, 1.5, 2.5])
    offset = onset + 0.8
    falls = []
    for seed in range(20):
        gain_db = 20 * np.log10(gains(onset, offset, 4 * SAMPLERATE, np.random.default_rng(seed)))
        place = np.arange(len(gain_db)) * EXPRESSION_STEP / SAMPLERATE
        for begin, end in zip(onset[1:], offset[1:], strict=True):
            note = gain_db[(place >= begin) & (place < end)]
            summit = note.argmax()
            assert SUMMIT[0] - 0.01 < summit / len(note) < SUMMIT[1] + 0.01
            assert (np.diff(note[: summit + 1]) >= 0).all() and (np.diff(note[summit:]) <= 0).all()
            ringing = gain_db[(place >= end) & (place < begin + 1.0)]
            assert ringing == pytest.approx(ringing[0])
            falls.append(note[summit] - ringing[0])
    assert 0 <= min(falls) and max(falls) <= FALL_DB and np.mean(falls) == pytest.approx(FALL_DB * 3 / 8, rel=0.4)


def test_chords_are_played_evenly_and_so_is_half_of_the_lines(monkeypatch):
    onset, offset = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.9, 0.9, 1.9, 1.9])
    some = [len(set(gains(onset[::2], offset[::2], SAMPLERATE, np.random.default_rng(seed)))) > 1 for seed in range(40)]
    assert 10 < sum(some) < 30
    monkeypatch.setattr(mixing, "EXPRESSION_PROBABILITY", 1.0)
    assert all(len(set(gains(onset, offset, SAMPLERATE, np.random.default_rng(seed)))) == 1 for seed in range(10))


def test_a_mixture_sounds_where_its_labels_say(cache):
    rng = np.random.default_rng(4)
    for index in range(len(cache)):
        mixture = remix(cache, index, 8.0, rng, augment=False)
        frames = StreamingCqt(FRONT_END).process(mixture.audio)[:, : 3 * 72].reshape(-1, 72, 3).max(2)
        labels = collate([mixture], len(frames)).mix[0, 1:].numpy().astype(bool)
        assert frames[labels].mean() > frames[~labels].mean() + 0.25
        assert len(mixture.audio) == 8 * SAMPLERATE


def test_losses_fall_when_the_outputs_become_right(cache):
    rng = np.random.default_rng(0)
    batch = collate([remix(cache, k, 128 * FRAME_SECONDS, rng, augment=False) for k in range(2)], 128)
    embedding = torch.zeros(2, 128, 72, 8)
    for example, stem, start, stop, pitch in batch.notes.tolist():
        embedding[example, start:stop, pitch, stem] = 1.0
    right = {
        "mix": 20 * all_lookaheads(batch.mix) - 10,
        "onset": 20 * all_lookaheads(batch.onset) - 10,
        "embedding": embedding,
    }
    wrong = {name: -value for name, value in right.items()}
    wrong["embedding"] = torch.rand(right["embedding"].shape)
    generator = torch.Generator().manual_seed(0)
    assert mixture_loss(right, batch) < 1e-3 < mixture_loss(wrong, batch)
    assert onset_loss(right, batch) < 1e-2 < onset_loss(wrong, batch)
    # The least loss is not 0: a note has several right partners and its probability is spread over them.
    assert embedding_loss(right, batch, generator) < embedding_loss(wrong, batch, generator) - 0.5
    with torch.autocast("cpu", torch.bfloat16):  # as training computes
        assert embedding_loss(right, batch, generator).dtype == torch.float32


def test_an_example_without_notes_can_be_learnt_from():
    empty = Mixture(np.zeros(64 * HOP, np.float32), np.zeros((0, 4)))
    batch = collate([empty, empty], 64)
    network = LiveNetwork(NetworkConfig(channels=16, embedding_channels=16, embedding_dim=8))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = network(torch.zeros(2, 64, AnalysisConfig().n_bins))
        players = embedding_loss(outputs, batch, torch.Generator())
        total = mixture_loss(outputs, batch) + players
    total.backward()
    assert torch.isfinite(total) and players.dtype == torch.float32
