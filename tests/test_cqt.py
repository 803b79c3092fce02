"""The front end: pitches where they belong, no look-ahead, and streaming that equals one call."""

import numpy as np
import pytest

from realtime_mpe.analysis import AnalysisConfig
from realtime_mpe.cqt import StreamingCqt, bin_frequencies, level

CONFIG = AnalysisConfig()


def sine(midi: float, seconds: float = 0.4, level: float = 0.3) -> np.ndarray:
    t = np.arange(int(seconds * CONFIG.samplerate)) / CONFIG.samplerate
    return (level * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t)).astype(np.float32)


@pytest.mark.parametrize("cents", [-45, 0, 45])
def test_every_pitch_peaks_in_its_own_group_of_bins_even_when_detuned(cents):
    for midi in range(CONFIG.first_midi, CONFIG.first_midi + CONFIG.n_pitches):
        last = StreamingCqt(CONFIG).process(sine(midi + cents / 100))[-1]
        assert int(last.argmax()) // CONFIG.bins_per_pitch == midi - CONFIG.first_midi, midi


def test_a_pitch_is_the_middle_of_its_bins():
    middle = bin_frequencies(CONFIG)[1 :: CONFIG.bins_per_pitch]
    expected = 440 * 2 ** ((np.arange(23, 95) - 69) / 12)
    np.testing.assert_allclose(middle, expected, rtol=1e-12)


def test_any_chopping_gives_the_same_frames_to_the_bit():
    rng = np.random.default_rng(1)
    signal = rng.normal(0, 0.1, 12_345).astype(np.float32)
    whole = StreamingCqt(CONFIG)
    expected = np.concatenate([whole.process(signal), whole.flush()])
    cuts = np.sort(rng.integers(0, len(signal), 40))
    chopped = StreamingCqt(CONFIG)
    parts = [chopped.process(part) for part in np.split(signal, cuts)]
    np.testing.assert_array_equal(np.concatenate([*parts, chopped.flush()]), expected)
    assert len(expected) == -(-len(signal) // CONFIG.hop)


def test_a_sound_is_seen_by_the_hop_that_holds_it_and_by_none_before():
    onset = 10 * CONFIG.hop + 100
    signal = np.zeros(14 * CONFIG.hop, np.float32)
    signal[onset:] = sine(90)[: len(signal) - onset]
    frames = StreamingCqt(CONFIG).process(signal)
    assert not frames[:10].any()
    assert frames[10].max() > 0.5


def test_reset_equals_a_new_object():
    used, signal = StreamingCqt(CONFIG), sine(60)
    used.process(np.random.default_rng(0).normal(0, 1, 3000).astype(np.float32))
    used.reset()
    np.testing.assert_array_equal(used.process(signal), StreamingCqt(CONFIG).process(signal))


def test_level_is_absolute_and_loudness_moves_it_by_the_decibel():
    quiet = StreamingCqt(CONFIG).process(sine(60, level=0.01))[-1].max()
    loud = StreamingCqt(CONFIG).process(sine(60, level=0.1))[-1].max()
    assert (loud - quiet) * 70 == pytest.approx(20, abs=0.1)


def test_steady_sounds_read_as_in_nnaudio():
    # nnAudio centres its kernels; on a steady sound only the alignment differs, so the levels must be the same.
    nnaudio = pytest.importorskip("nnAudio.utils")
    n_bins, bins_per_octave = CONFIG.n_pitches * CONFIG.bins_per_pitch, 12 * CONFIG.bins_per_pitch
    q = 1 / (2 ** (1 / bins_per_octave) - 1)
    centred, _, _, centres = nnaudio.create_cqt_kernels(
        q, CONFIG.samplerate, bin_frequencies(CONFIG)[0], n_bins, bins_per_octave, gamma=CONFIG.gamma
    )
    np.testing.assert_allclose(centres, bin_frequencies(CONFIG), rtol=1e-9)
    for midi in (30.2, 55.0, 71.4, 88.9):
        signal = sine(midi, seconds=1.0)
        own = StreamingCqt(CONFIG).process(signal)[-1]
        products = centred @ signal[-centred.shape[1] :]
        other = level(np.concatenate([products.real, products.imag]))
        near = np.abs(bin_frequencies(CONFIG) / (440 * 2 ** ((midi - 69) / 12)) - 1) < 0.05
        np.testing.assert_allclose(own[near], other[near], atol=1 / 70)  # one decibel
