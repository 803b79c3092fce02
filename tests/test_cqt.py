"""The front ends: pitches where they belong, the declared look-ahead, and streaming that equals one call."""

import numpy as np
import pytest

from realtime_mpe.analysis import PAPER, AnalysisConfig
from realtime_mpe.cqt import (
    FLOOR_DB,
    RANGE_DB,
    SILENCE,
    SMOOTHING,
    THIN,
    StreamingCqt,
    audible,
    bin_frequencies,
    kernels,
    level,
)

CONFIG = AnalysisConfig()
BOTH = pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["live", "paper"])


def sine(midi: float, seconds: float = 0.4, level: float = 0.3) -> np.ndarray:
    t = np.arange(int(seconds * CONFIG.samplerate)) / CONFIG.samplerate
    return (level * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t)).astype(np.float32)


@pytest.mark.parametrize("cents", [-45, 0, 45])
def test_every_pitch_peaks_in_its_own_group_of_bins_even_when_detuned(cents):
    for midi in range(CONFIG.first_midi, CONFIG.first_midi + CONFIG.n_pitches):
        last = StreamingCqt(CONFIG).process(sine(midi + cents / 100))[-1]
        assert int(last.argmax()) // CONFIG.bins_per_pitch == midi - CONFIG.first_midi, midi


def test_a_pitch_is_the_middle_of_its_bins():
    middle = bin_frequencies(CONFIG)[1 : 3 * CONFIG.n_pitches : CONFIG.bins_per_pitch]
    expected = 440 * 2 ** ((np.arange(23, 95) - 69) / 12)
    np.testing.assert_allclose(middle, expected, rtol=1e-12)


@BOTH
def test_any_chopping_gives_the_same_frames_to_the_bit(config):
    rng = np.random.default_rng(1)
    signal = rng.normal(0, 0.1, 12_345).astype(np.float32)
    whole = StreamingCqt(config)
    expected = np.concatenate([whole.process(signal), whole.flush()])
    cuts = np.sort(rng.integers(0, len(signal), 40))
    chopped = StreamingCqt(config)
    parts = [chopped.process(part) for part in np.split(signal, cuts)]
    np.testing.assert_array_equal(np.concatenate([*parts, chopped.flush()]), expected)
    assert len(expected) == -(-len(signal) // config.hop) + whole.latency // config.hop


def test_a_sound_is_seen_by_the_hop_that_holds_it_and_by_none_before():
    onset = 10 * CONFIG.hop + 100
    signal = np.zeros(14 * CONFIG.hop, np.float32)
    signal[onset:] = sine(90)[: len(signal) - onset]
    frames = StreamingCqt(CONFIG).process(signal)
    assert frames[:10] == pytest.approx(SILENCE)
    assert frames[10].max() > 0.5


@pytest.mark.parametrize("midi", [23, 60, 94])
def test_a_centred_frame_is_late_by_the_declared_latency(midi):
    """A short tone is loudest in the frame that its middle lies in, whatever the length of the pitch's kernel."""
    label_frame, length = 40, 2 * PAPER.hop
    signal = np.zeros(80 * PAPER.hop, np.float32)
    middle = label_frame * PAPER.hop
    tone = sine(midi, length / PAPER.samplerate) * np.hanning(length)
    signal[middle - length // 2 : middle + length // 2] = tone
    cqt = StreamingCqt(PAPER)
    assert cqt.latency == 27 * PAPER.hop  # 864 ms, beyond half of the longest kernel, 833 ms
    own = cqt.process(signal)[:, 3 * (midi - PAPER.first_midi) + 1]
    n = np.arange(len(own))
    sound = own > own.max() - 1 / RANGE_DB  # a decibel: kernels that are far longer than the tone have a flat top
    assert n[sound].mean() + 1 - cqt.latency / PAPER.hop == pytest.approx(label_frame, abs=0.5)


def test_nothing_is_heard_before_the_kernel_of_its_pitch_can_reach_it():
    onset = 60 * PAPER.hop
    signal = np.zeros(100 * PAPER.hop, np.float32)
    signal[onset:] = sine(94, 3)[: len(signal) - onset]
    cqt = StreamingCqt(PAPER)
    top = cqt.process(signal)[cqt.latency // PAPER.hop - 1 :, 3 * 71 + 1]  # by label frame
    assert top[:59] == pytest.approx(SILENCE) and top[61:].min() > 0.5  # a kernel of 28 ms: half a hop to either side


@BOTH
def test_reset_equals_a_new_object(config):
    used, signal = StreamingCqt(config), sine(60)
    used.process(np.random.default_rng(0).normal(0, 1, 3000).astype(np.float32))
    used.reset()
    np.testing.assert_array_equal(used.process(signal), StreamingCqt(config).process(signal))


def test_detuning_is_heard_by_the_outer_bins_of_a_pitch():
    """A pitch in tune peaks in the middle of its three bins; a third of a semitone lower or higher, in an outer one."""
    for midi in (PAPER.first_midi, 58, PAPER.first_midi + PAPER.n_pitches - 1):
        for thirds in (-1, 0, 1):
            cqt = StreamingCqt(PAPER)
            frame = cqt.process(sine(midi + thirds / 3, seconds=2.0))[-1]
            assert int(frame.argmax()) == 3 * (midi - PAPER.first_midi) + 1 + thirds, midi


def test_level_is_absolute_and_loudness_moves_it_by_the_decibel():
    quiet = StreamingCqt(CONFIG).process(sine(60, level=0.01))[-1].max()
    loud = StreamingCqt(CONFIG).process(sine(60, level=0.1))[-1].max()
    assert (loud - quiet) * 70 == pytest.approx(20, abs=0.1)


def test_overtones_above_the_highest_pitch_are_heard():
    assert CONFIG.n_bins == 3 * 72 + 72
    assert bin_frequencies(CONFIG)[-1] < CONFIG.samplerate / 2 < bin_frequencies(CONFIG)[-1] * 2 ** (1 / 12)
    reach = {1: 0, THIN: len(SMOOTHING) // 2}  # of a smoothed sample, beyond the next
    lengths = np.concatenate(
        [
            np.count_nonzero(b.kernels[:, : b.kernels.shape[1] // 2], axis=0) * b.thin + reach[b.thin]
            for b in kernels(CONFIG)
        ]
    )
    assert (np.diff(lengths[: 3 * 72]) <= 0).all() and (lengths[3 * 72 :] >= lengths[3 * 72 - 1] - 2).all()
    for midi in (100, 110, 117.6):
        last = StreamingCqt(CONFIG).process(sine(midi))[-1]
        assert abs(int(last.argmax()) - 3 * (midi - 23) - 1) <= 1


def test_thin_kernels_hear_what_whole_ones_do(monkeypatch):
    signal = np.random.default_rng(2).normal(0, 0.1, 20 * CONFIG.hop).astype(np.float32)
    signal[12 * CONFIG.hop :] = 0.0
    assert {bank.thin for bank in kernels(CONFIG)} == {1, THIN}
    thin = StreamingCqt(CONFIG, 2).process(signal)
    monkeypatch.setattr("realtime_mpe.cqt.THINNED_BELOW", 0.0)
    assert {bank.thin for bank in kernels(CONFIG)} == {1}
    whole = StreamingCqt(CONFIG, 2).process(signal)
    loud = whole > 0.3
    assert 0.3 < loud.mean() < 0.7
    np.testing.assert_allclose(thin[loud], whole[loud], atol=5e-3)
    np.testing.assert_allclose(audible(thin), audible(whole), atol=2e-2)


@pytest.mark.parametrize("frequency", [3500.0, 4000.0, 4300.0, 7600.0])
def test_nothing_high_is_heard_low_by_thin_kernels(frequency):
    t = np.arange(CONFIG.samplerate) / CONFIG.samplerate
    levels = StreamingCqt(CONFIG).process(np.sin(2 * np.pi * frequency * t).astype(np.float32))[-1]
    assert levels.max() > 0.7 and (audible(levels[:144]) == 0).all()


def test_steady_sounds_read_as_in_nnaudio():
    # nnAudio centres its kernels; on a steady sound only the alignment differs, so the levels must be the same.
    nnaudio = pytest.importorskip("nnAudio.utils")
    n_bins, bins_per_octave = CONFIG.n_bins, 12 * CONFIG.bins_per_pitch
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


def test_the_centred_front_end_reads_as_nnaudio_on_any_sound():
    features = pytest.importorskip("nnAudio.features.cqt")
    torch = pytest.importorskip("torch")
    n_bins, bins_per_octave = PAPER.n_bins, 12 * PAPER.bins_per_pitch
    transform = features.CQT1992v2(
        sr=PAPER.samplerate,
        hop_length=PAPER.hop,
        fmin=bin_frequencies(PAPER)[0],
        n_bins=n_bins,
        bins_per_octave=bins_per_octave,
        pad_mode="constant",
        verbose=False,
    )
    rng = np.random.default_rng(0)
    signal = rng.normal(0, 0.05, 3 * PAPER.samplerate).astype(np.float32)
    for onset, midi in enumerate((30.2, 55.0, 71.4, 88.9)):
        signal[onset * 9_000 :][:16_000] += sine(midi, 1.0)
    cqt = StreamingCqt(PAPER)
    own = np.concatenate([cqt.process(signal), cqt.flush()])[cqt.latency // PAPER.hop - 1 :]
    products = transform(torch.from_numpy(signal)[None], normalization_type="convolutional")[0].numpy().T
    own, other = own[: len(products)], (20 * np.log10(products + 1e-5) - FLOOR_DB) / RANGE_DB
    heard = own > 0.2
    assert heard.mean() > 0.9
    np.testing.assert_allclose(own[heard], other[: len(own)][heard], atol=1 / RANGE_DB)  # one decibel
