"""The resampler: is it the right signal, at the right time, whatever the chopping and however long it runs?"""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from realtime_mpe.errors import UserError
from realtime_mpe.resample import Resampler

RATES = [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000]
AWKWARD_RATES = [4_001, 15_999, 16_001, 44_101, 383_999]  # no common divisor with 16000: 16000 phases


def whole(x, rate):
    resampler = Resampler(rate)
    return np.concatenate((resampler.process(x), resampler.flush()))


def chopped(x, rate, sizes, resampler=None):
    resampler = resampler or Resampler(rate)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(resampler.process(x[start : start + size]))
        start += size
    pieces += [resampler.process(x[start:]), resampler.flush()]
    return np.concatenate(pieces)


def partials(rate, seed=0):
    """Frequencies (Hz), amplitudes and phases of a dense chord inside the band that is kept."""
    rng = np.random.default_rng(seed)
    frequencies = rng.uniform(20, 7 / 16 * min(rate, 16_000), 40)
    return frequencies, rng.uniform(0.2, 1, 40) / 20, rng.uniform(0, 2 * np.pi, 40)


def sound(tones, samples, rate):
    """The chord at the sample numbers `samples`, which may be any integers however large."""
    frequencies, amplitudes, phases = tones
    seconds = np.asarray(samples, np.float64) / rate
    return (np.sin(2 * np.pi * frequencies[:, None] * seconds + phases[:, None]) * amplitudes[:, None]).sum(axis=0)


def error_db(y, reference):
    return 10 * np.log10(np.mean((y - reference) ** 2) / np.mean(reference**2))


@pytest.mark.parametrize("rate", RATES + AWKWARD_RATES)
def test_output_is_the_input_at_the_time_it_is_declared_for(rate):
    tones = partials(rate)
    y = whole(sound(tones, np.arange(rate // 4), rate).astype(np.float32), rate)
    inner = np.arange(200, len(y) - 200)  # the chord starts and ends abruptly
    assert error_db(y[inner], sound(tones, inner, 16_000)) < -70


@pytest.mark.parametrize("rate", RATES)
def test_same_as_scipy_with_a_much_longer_filter(rate):
    x = sound(partials(rate, seed=1), np.arange(rate // 4), rate)
    divisor = np.gcd(rate, 16_000)
    up, down = 16_000 // divisor, rate // divisor
    taps = signal.firwin(2 * 80 * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 10.0))
    reference = signal.resample_poly(x, up, down, window=taps)
    y = whole(x.astype(np.float32), rate)
    assert len(y) == len(reference)
    assert error_db(y[200:-200], reference[200:-200]) < -60


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000, 192_000])
def test_what_is_too_high_does_not_fold_back(rate):
    for frequency in np.linspace(9_050, rate / 2 - 50, 12):
        x = np.sin(2 * np.pi * frequency * np.arange(rate // 5) / rate).astype(np.float32)
        y = whole(x, rate)[100:-100]
        assert 10 * np.log10(np.mean(y**2) / 0.5) < -75, frequency


def test_images_are_removed_when_the_rate_is_raised():
    x = np.sin(2 * np.pi * 1_000 * np.arange(4_000) / 8_000).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(whole(x, 8_000)[1_000:-1_000] * np.hanning(6_000)))
    frequencies = np.fft.rfftfreq(6_000, 1 / 16_000)
    assert spectrum[frequencies > 6_500].max() / spectrum.max() < 10 ** (-75 / 20)


@pytest.mark.parametrize("rate", RATES + AWKWARD_RATES + [16_000])
def test_latency_is_exact_to_the_sample(rate):
    resampler = Resampler(rate)
    rng = np.random.default_rng(3)
    received = produced = 0
    for size in rng.integers(0, 500, 60):
        produced += len(resampler.process(np.zeros(size, np.float32)))
        received += int(size)
        assert produced == max(0, -(-received * 16_000 // rate) - resampler.latency)
    assert produced + len(resampler.flush()) == -(-received * 16_000 // rate)


def test_latency_is_a_millisecond_and_a_quarter_and_more_only_below_sixteen_kilohertz():
    assert {Resampler(rate).latency for rate in (16_001, 22_050, 44_100, 48_000, 384_000)} == {20}
    assert [Resampler(rate).latency for rate in (16_000, 11_025, 8_000, 4_000)] == [0, 30, 40, 80]


@pytest.mark.parametrize("rate", RATES)
def test_an_impulse_stays_where_it_was_and_stays_symmetric(rate):
    step_in = rate // np.gcd(rate, 16_000)
    step_out = 16_000 // np.gcd(rate, 16_000)
    place = -(-300 // step_out)
    x = np.zeros(2 * place * step_in, np.float32)
    x[place * step_in] = 1.0
    y = whole(x, rate)
    middle = place * step_out
    assert np.argmax(np.abs(y)) == middle
    # The row of each phase is scaled by itself, so mirror images agree to the ripple and not to the last bit.
    np.testing.assert_allclose(y[middle + 1 : middle + 200], y[middle - 1 : middle - 200 : -1], atol=2e-5 * y.max())


def test_nothing_is_looked_at_that_has_not_been_heard():
    x = np.random.default_rng(4).standard_normal(4_410).astype(np.float32)
    heard = Resampler(44_100).process(x[:2_000])
    changed = np.concatenate((x[:2_000], -x[2_000:]))
    assert np.array_equal(heard, whole(changed, 44_100)[: len(heard)])
    assert np.array_equal(heard, whole(x, 44_100)[: len(heard)])


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from([*RATES, 16_000, 44_101, 4_001]),
    sizes=st.lists(st.integers(0, 700) | st.integers(0, 2), max_size=40),
    seed=st.integers(0, 9),
)
def test_any_chopping_gives_the_same_bits(rate, sizes, seed):
    x = np.random.default_rng(seed).standard_normal(5_000).astype(np.float32)
    assert np.array_equal(chopped(x, rate, sizes), whole(x, rate))


@pytest.mark.parametrize("rate", [44_100, 48_000, 44_101])
def test_sample_by_sample_gives_the_same_bits(rate):
    x = np.random.default_rng(5).standard_normal(700).astype(np.float32)
    assert np.array_equal(chopped(x, rate, [1] * 700), whole(x, rate))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_reset_and_flush_forget_everything(rate):
    x = np.random.default_rng(6).standard_normal(3_001).astype(np.float32)
    used = Resampler(rate)
    used.process(x * 3)
    used.reset()
    assert np.array_equal(chopped(x, rate, [10, 999], used), whole(x, rate))
    assert np.array_equal(chopped(x, rate, [], used), whole(x, rate)), "flush must leave the object as new"
    assert len(used.flush()) == 0


@pytest.mark.parametrize("length", [0, 1, 2, 5, 50])
@pytest.mark.parametrize("rate", [4_000, 44_100, 384_000])
def test_inputs_shorter_than_the_filter_keep_their_length(rate, length):
    assert len(whole(np.ones(length, np.float32), rate)) == -(-length * 16_000 // rate)


def test_no_drift_over_ten_minutes():
    rate, second = 11_025, 11_025
    tones = partials(rate, seed=7)
    resampler = Resampler(rate)
    silence = np.zeros(10 * second, np.float32)
    produced = sum(len(resampler.process(silence)) for _ in range(60))
    start = 600 * rate
    y = np.concatenate(
        (resampler.process(sound(tones, start + np.arange(second), rate).astype(np.float32)), resampler.flush())
    )
    assert produced + len(y) == 601 * 16_000
    inner = np.arange(produced + 200, produced + len(y) - 200)
    assert error_db(y[200:-200], sound(tones, inner, 16_000)) < -70


def test_sixteen_kilohertz_passes_untouched_and_is_a_copy():
    x = np.random.default_rng(8).standard_normal(100).astype(np.float32)
    y = Resampler(16_000).process(x)
    assert np.array_equal(x, y) and not np.shares_memory(x, y)
    assert Resampler(16_000).latency == 0


def test_a_rate_with_sixteen_thousand_phases_needs_little_memory():
    # All phases of 383,999 Hz together are 61 MB.
    x = np.zeros(400_000, np.float32)
    tracemalloc.start()
    try:
        whole(x, 383_999)
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [0, -1, 3_999, 384_001, 44_100.5, float("nan"), float("inf")])
def test_impossible_rates_are_named(rate):
    with pytest.raises(UserError, match=str(rate)):
        Resampler(rate)


def test_stereo_is_refused():
    with pytest.raises(ValueError, match=r"\(10, 2\)"):
        Resampler(48_000).process(np.zeros((10, 2), np.float32))
