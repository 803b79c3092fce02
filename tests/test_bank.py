"""Batches made where training happens: what is heard is what the plan and the labels say."""

import dataclasses

import numpy as np
import pytest
import torch

from realtime_mpe.analysis import HOP, SAMPLERATE, AnalysisConfig
from realtime_mpe.errors import UserError
from realtime_mpe.training import bank
from realtime_mpe.training.bank import Plan, StemBank, background, coloured, convolved, set_level
from realtime_mpe.training.effects import COLOUR_DB, EXPRESSION_STEP
from realtime_mpe.training.fit import FitConfig
from realtime_mpe.training.frontend import FrontEnd
from realtime_mpe.training.stems import StemCache, render
from realtime_mpe.training.synth import SynthInstrument

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stems(tmp_path_factory) -> StemBank:
    folder = tmp_path_factory.mktemp("stems")
    render(folder, None, [SynthInstrument(k) for k in range(8)], 3, seconds=10.0, seed=1)
    return StemBank(StemCache(folder), CPU)


def plan(row: int, start: float = 0.0, ratio: float = 1.0, vibrato=(0.0, 1.0, 0.0)) -> Plan:
    one, nowhere = np.ones(1), np.array([-1])
    even = np.ones((1, 2), np.float32)
    columns = np.array([row]), np.array([0]), start * one, ratio * one, even, one < 0, np.array([vibrato]), nowhere
    return Plan(1, *columns, np.zeros((0, 5)))


def play(stems: StemBank, some: Plan, n: int) -> np.ndarray:
    columns = (some.row, some.start, some.ratio, some.vibrato)
    return stems._play(*(torch.from_numpy(c) for c in columns), n)[0].numpy()


def test_all_stems_of_the_cache_are_there(stems):
    assert (
        len(stems.audio)
        == len(stems.notes)
        == sum(sum(map(len, parts)) + len(drums) for parts, drums in stems.segments)
    )
    assert all(len(stems.notes[row]) for row in stems.players)


def test_a_stem_at_its_own_speed_is_itself_and_at_another_is_moved(stems):
    row, n = stems.players[0], 4096
    wave = stems.audio[row].numpy().astype(np.float32) / 32767
    np.testing.assert_allclose(play(stems, plan(row, 1000), n), wave[1000 : 1000 + n], atol=1e-6)
    np.testing.assert_allclose(play(stems, plan(row, 1000, 2.0), n), wave[1000 : 1000 + 2 * n : 2], atol=1e-6)
    past = play(stems, plan(row, stems.length - 100), 400)
    assert not past[100:].any()  # silence, and no echo of the last sample


def test_vibrato_swings_the_pitch_by_what_was_asked():
    class Sine(StemBank):
        def __init__(self):
            self.length = 4 * SAMPLERATE
            time = torch.arange(self.length) / SAMPLERATE
            self.audio = (20000 * torch.sin(2 * torch.pi * 500 * time)).to(torch.int16)[None]

    cents, rate = 30.0, 5.0
    swing = (2 ** (cents / 1200) - 1) * SAMPLERATE / (2 * np.pi * rate)
    wave = play(Sine(), plan(0, 1000, vibrato=(swing, rate, 0.0)), 2 * SAMPLERATE)
    crossings = np.flatnonzero((wave[:-1] < 0) & (wave[1:] >= 0))
    exact = crossings + wave[crossings] / (wave[crossings] - wave[crossings + 1])
    heard = 1200 * np.log2(SAMPLERATE / np.diff(exact) / 500)
    assert heard.max() == pytest.approx(cents, abs=2) and heard.min() == pytest.approx(-cents, abs=2)


def test_a_stem_is_as_loud_as_its_gains_say(stems, monkeypatch):
    monkeypatch.setattr(bank, "MIXTURE_COLOUR_PROBABILITY", 0.0)
    monkeypatch.setattr(bank, "set_level", lambda audio: audio)
    n_frames, some = 30, plan(stems.players[0], 1000)
    n = n_frames * HOP
    gain = np.random.default_rng(0).random(n // EXPRESSION_STEP + 1).astype(np.float32)
    heard = stems.make(dataclasses.replace(some, gain=gain[None]), n_frames).audio[0].numpy()
    expected = np.interp(np.arange(n), np.arange(len(gain)) * EXPRESSION_STEP, gain)
    np.testing.assert_allclose(heard, play(stems, some, n) * expected, atol=1e-5)


def test_a_batch_sounds_where_its_labels_say(stems, monkeypatch):
    monkeypatch.setattr(bank, "TRANSPOSE_PROBABILITY", 1.0)
    batch = stems.draw(6, 192, np.random.default_rng(0))
    assert batch.audio.shape == (6, 192 * HOP) and batch.audio.abs().max() <= 1
    frames = FrontEnd(AnalysisConfig())(batch.audio)[..., : 3 * 72].unflatten(2, (72, 3)).amax(3)
    labels = batch.mix[:, 1:].bool()
    assert labels.any(2).any(1).sum() >= 4
    assert frames[labels].mean() > frames[~labels].mean() + 0.2
    assert len(batch.notes) and set(batch.notes[:, 0].tolist()) <= set(range(6))


def test_the_same_seeds_give_the_same_batch(stems):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return stems.draw(2, 64, np.random.default_rng(seed)).audio

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_nobody_plays_in_some_examples(stems, monkeypatch):
    monkeypatch.setattr(bank, "EMPTY_PROBABILITY", 1.0)
    monkeypatch.setattr(bank, "DISTRACTOR_PROBABILITY", 0.0)
    batch = stems.draw(4, 64, np.random.default_rng(0))
    assert not batch.mix.any() and not len(batch.notes) and torch.isfinite(batch.audio).all()


def test_colour_changes_the_spectrum_but_neither_level_nor_onset():
    torch.manual_seed(0)
    click = torch.zeros(200, 8192)
    click[:, 4000] = 1.0
    which = torch.arange(200) % 2 == 0
    wet = coloured(click, which)
    torch.testing.assert_close(wet[~which], click[~which], atol=1e-5, rtol=0)
    torch.testing.assert_close(wet.square().sum(1), torch.ones(200))
    assert wet[:, 3000:3998].abs().max() < 0.02  # minimum phase: nothing before the sound
    gain_db = 20 * torch.log10(torch.fft.rfft(wet[which]).abs())[:, 60:4000]
    assert gain_db.std(1).mean() == pytest.approx(COLOUR_DB, rel=0.3)


def test_a_hall_adds_what_comes_after_and_leaves_the_direct_sound(stems):
    audio = torch.zeros(2, 4000)
    audio[:, 100] = 1.0
    wet = convolved(audio, stems.halls[:2])
    np.testing.assert_allclose(wet[:, 100:], stems.halls[:2, :3900], atol=1e-5)
    assert wet[:, :100].abs().max() < 1e-5
    dry = dataclasses.replace(stems.plan(3, 60, np.random.default_rng(4)), hall=np.array([-1, -1, -1]))
    torch.manual_seed(0)
    plain = stems.make(dry, 60).audio
    torch.manual_seed(0)
    inside = stems.make(dataclasses.replace(dry, hall=np.array([-1, 5, -1])), 60).audio
    np.testing.assert_array_equal(plain[0], inside[0])
    assert not torch.allclose(plain[1], inside[1], atol=1e-3)


def test_noise_and_levels_stay_in_their_ranges():
    torch.manual_seed(0)
    noise = background(64, 16384, CPU)
    assert noise.square().mean(1).sqrt().min() > 0.7 and noise.square().mean(1).sqrt().max() < 1.4
    tone = torch.sin(torch.arange(16384) * 0.3).expand(64, -1)
    level_db = 20 * torch.log10(set_level(tone).square().mean(1).sqrt())
    assert level_db.min() > -38.5 and level_db.max() < -13.5 and level_db.std() > 4


def test_stems_that_do_not_fit_are_one_line(stems, tmp_path, monkeypatch):
    render(tmp_path, None, [SynthInstrument(k) for k in range(4)], 1, seconds=9.0)

    def full(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UserError, match="--segments"):
        StemBank(StemCache(tmp_path), CPU)


def test_a_gpu_gets_larger_batches():
    config = FitConfig(hours=3.0, seed=5)
    assert config.for_device(CPU) == config
    wide = config.for_device(torch.device("cuda"))
    assert wide.batch_size > config.batch_size and (wide.hours, wide.seed) == (3.0, 5)
