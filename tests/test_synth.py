"""Risks of synthetic audio: wrong pitch, aliasing, labels that lie about the sound, effects that move onsets."""

import numpy as np
import pytest
from scipy import signal

from realtime_mpe.analysis import SAMPLERATE
from realtime_mpe.training import effects, synth

SEEDS = (0, 1, 2, 3, 4, 5)
ONSET = 0.25


def one_note(family, seed, midi, seconds=1.0, velocity=100.0, total=None):
    instrument = synth.SynthInstrument(seed, family)
    midi = float(np.clip(midi, instrument.low, instrument.high))
    notes = np.array([[ONSET, ONSET + seconds, midi, velocity]])
    n = round((total or ONSET + seconds + 0.5) * SAMPLERATE)
    audio, sounded = instrument.render(notes, n, np.random.default_rng(seed))
    return instrument, midi, audio, sounded


def spectrum(audio):
    """Power spectrum (dB re its peak) of a windowed, zero-padded excerpt, and its frequencies."""
    size = 4 * len(audio)
    power = np.abs(np.fft.rfft(audio * signal.windows.blackmanharris(len(audio)), size)) ** 2
    return np.fft.rfftfreq(size, 1 / SAMPLERATE), 10 * np.log10(power / power.max() + 1e-15)


def comb_error(audio, midi):
    """Cents by which the best-fitting comb of harmonics lies off the MIDI number, searched over 14 semitones."""
    frequencies, level = spectrum(audio)
    amplitude = 10 ** (level / 40)  # compressed: a strong formant is not to outvote the spacing of the harmonics
    cents = np.arange(-1400, 1401, 2.0)
    f0 = 440 * 2 ** ((midi - 69 + cents / 100) / 12)
    score = np.zeros(len(cents))
    for h in range(1, 13):
        score += np.interp(h * f0, frequencies, amplitude, right=0) * 0.9**h
        # A comb an octave low hits the same peaks with its even teeth; what its odd teeth miss counts against it.
        score -= np.interp((h - 0.5) * f0, frequencies, amplitude, right=0) * 0.9**h
    # Vibrato dwells at its two extremes; smoothing over its width finds the centre, which is the pitch that is heard.
    window = np.hanning(41)
    return cents[np.argmax(np.convolve(score, window / window.sum(), mode="same"))]


@pytest.mark.parametrize("family", synth.FAMILIES)
def test_pitch_is_the_label(family):
    for seed in SEEDS:
        for midi in (36, 48, 60, 72, 84, 94):
            _, midi, audio, sounded = one_note(family, seed, midi)
            end = min(sounded[0, 1], ONSET + 1.0)
            excerpt = audio[round((ONSET + 0.03) * SAMPLERATE) : max(round(end * SAMPLERATE), round(0.5 * SAMPLERATE))]
            assert abs(comb_error(excerpt, midi)) <= 30, (family, seed, midi)


def test_pitch_measure_sees_a_quarter_tone_and_an_octave():
    t = np.arange(SAMPLERATE) / SAMPLERATE
    for cents in (-1200, -50, 50, 1200):
        f0 = 440 * 2 ** (cents / 1200)
        tone = sum(np.sin(2 * np.pi * h * f0 * t) / h for h in range(1, 8))
        assert abs(comb_error(tone, 69) - cents) <= 4


@pytest.mark.parametrize("family", synth.FAMILIES)
def test_nothing_sounds_before_the_onset_and_little_after_the_release(family):
    for seed in SEEDS:
        for midi in (40, 60, 80):
            instrument, _, audio, _ = one_note(family, seed, midi)
            start = round(ONSET * SAMPLERATE)
            assert not audio[:start].any()
            if family != "pad":
                peak = np.abs(audio).max()
                assert np.abs(audio[start : start + round(0.015 * SAMPLERATE)]).max() > 0.05 * peak, (seed, midi)
            rings = round((ONSET + 1.0 + 0.3 + 0.025) * SAMPLERATE)  # the longest release and the longest chorus delay
            assert not audio[rings:].any()
            assert 0.02 <= instrument.envelope.release <= 0.3


def test_high_saw_does_not_alias():
    instrument = synth.SynthInstrument(0, "wavetable")
    instrument.voice = synth._Tables(
        np.random.default_rng(0), synth.saw_spectrum(), None, (6.0, 0.5), synth.Vibrato(0.0, 5.0, 0.1)
    )
    frequency = synth.midi_to_hz(90.07)  # off every bin, so that folded harmonics cannot hide under true ones
    audio = instrument.voice(90, frequency, 100.0, SAMPLERATE, np.random.default_rng(0))
    frequencies, level = spectrum(audio)
    off = np.abs(frequencies - frequency * np.maximum(1, np.round(frequencies / frequency)))
    assert level[(off > 20) & (frequencies > 50)].max() < -50
    naive = signal.sawtooth(2 * np.pi * frequency * np.arange(SAMPLERATE) / SAMPLERATE)
    frequencies, level = spectrum(naive)
    assert level[(off > 20) & (frequencies > 50)].max() > -30  # the measure does see a naive saw's aliases


@pytest.mark.parametrize("family", ["chip", "fm", "organ", "pluck", "piano"])
def test_no_inharmonic_lines_at_high_pitch(family):
    for seed in range(6):
        instrument = synth.SynthInstrument(seed, family)
        if hasattr(instrument.voice, "vibrato"):
            instrument.voice.vibrato = synth.Vibrato(0.0, 5.0, 0.1)  # its side bands are wanted, and are not harmonic
        frequency = synth.midi_to_hz(90)
        audio = instrument.voice(90, frequency, 127.0, SAMPLERATE // 2, np.random.default_rng(0))[800:]
        frequencies, level = spectrum(audio)
        off = np.abs(frequencies - frequency * np.maximum(1, np.round(frequencies / frequency)))
        assert level[(off > 0.1 * frequency) & (frequencies > 50)].max() < -50, seed


def test_same_seed_same_audio_and_other_seed_other_audio():
    notes = np.array([[0.1, 0.5, 60, 90.0], [0.5, 0.9, 67, 60.0]])
    for family in synth.FAMILIES:
        a, la = synth.SynthInstrument(7, family).render(notes, SAMPLERATE, np.random.default_rng(3))
        b, lb = synth.SynthInstrument(7, family).render(notes, SAMPLERATE, np.random.default_rng(3))
        c, _ = synth.SynthInstrument(8, family).render(notes, SAMPLERATE, np.random.default_rng(3))
        assert np.array_equal(a, b) and np.array_equal(la, lb)
        assert not np.allclose(a, c)
    assert {synth.SynthInstrument(seed).family for seed in range(80)} == set(synth.FAMILIES)


@pytest.mark.parametrize("family", synth.FAMILIES)
def test_labels_never_outlast_the_key_and_the_note_is_heard_to_its_end(family):
    for seed in SEEDS:
        _, _, audio, sounded = one_note(family, seed, 60, seconds=1.0)
        assert len(sounded) == 1
        assert ONSET < sounded[0, 1] <= ONSET + 1.0
        held = audio[round(ONSET * SAMPLERATE) : round(sounded[0, 1] * SAMPLERATE)]
        frames = held[: len(held) // 512 * 512].reshape(-1, 512)
        level = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
        assert level[-1] > level.max() - 37


def test_decayed_notes_are_cut_and_held_ones_are_not():
    cut = 0
    for seed in SEEDS:
        _, _, audio, sounded = one_note("pluck", seed, 84, seconds=9.0)
        end = sounded[0, 1]
        if end < ONSET + 9.0:
            cut += 1
            level = np.abs(audio[round(end * SAMPLERATE) :]).max()
            assert level < 0.06 * np.abs(audio).max()  # -35 dB in power, some crest above it
        _, _, _, organ = one_note("organ", seed, 60, seconds=9.0)
        _, _, _, pad = one_note("pad", seed, 30, seconds=9.0)
        assert organ[0, 1] == ONSET + 9.0 and pad[0, 1] == ONSET + 9.0
    assert cut >= 4


def test_monophonic_instrument_ends_a_note_at_the_next_and_drops_what_it_cannot_play():
    instrument = synth.SynthInstrument(1, "bowed")
    low = instrument.low
    notes = np.array([[0.1, 0.8, low + 3, 90], [0.5, 1.0, low + 7, 90], [1.2, 1.5, low - 1, 90.0]])
    given = notes.copy()
    audio, sounded = instrument.render(notes, 2 * SAMPLERATE, np.random.default_rng(0))
    assert np.array_equal(notes, given)
    assert sounded.tolist() == [[0.1, 0.5, low + 3, 90], [0.5, 1.0, low + 7, 90]]
    assert not audio[round(1.35 * SAMPLERATE) :].any()
    chord = np.array([[0.1, 0.8, 60, 90], [0.1, 0.8, 64, 90.0]])
    assert len(synth.SynthInstrument(1, "organ").render(chord, SAMPLERATE, np.random.default_rng(0))[1]) == 2
    empty, none = instrument.render(np.zeros((0, 4)), 100, np.random.default_rng(0))
    assert empty.shape == (100,) and none.shape == (0, 4)
    with pytest.raises(ValueError):
        instrument.render(given[::-1], SAMPLERATE, np.random.default_rng(0))


@pytest.mark.parametrize("family", ["wavetable", "organ", "bowed", "piano"])
def test_level_follows_velocity_and_stays_near_the_target(family):
    levels = []
    for velocity in (30, 100):
        _, _, audio, _ = one_note(family, 2, 60, velocity=velocity)
        levels.append(10 * np.log10(np.mean(audio[round(ONSET * SAMPLERATE) :][: round(0.6 * SAMPLERATE)] ** 2)))
    assert -32 < levels[1] < -18
    assert levels[1] - levels[0] == pytest.approx(30 * np.log10(100 / 30), abs=3)


def struck_tone():
    audio = np.zeros(SAMPLERATE, np.float32)
    n = np.arange(SAMPLERATE // 2)
    audio[4000 : 4000 + len(n)] = 0.2 * signal.square(2 * np.pi * 330 * n / SAMPLERATE) * np.exp(-n / 4000)
    return audio


def first_sound(audio, share=0.1):
    return int(np.argmax(np.abs(audio) > share * np.abs(audio).max()))


@pytest.mark.parametrize("name", [*effects.EFFECTS, "colour", "apply_effects", "room"])
def test_effects_keep_length_onset_and_finite(name):
    audio = struck_tone()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        if name == "room":
            out = effects.Room(rng)(audio)
        elif name in ("apply_effects", "colour"):
            out = getattr(effects, name)(audio, rng)
            assert out.dtype == np.float32 and np.abs(out).max() < 1
        else:
            out = effects.EFFECTS[name][1](audio, rng)
        assert out.shape == audio.shape and np.isfinite(out).all()
        assert np.abs(out[:4000]).max() < 1e-6
        assert 0 <= first_sound(out) - 4000 <= 0.002 * SAMPLERATE
        if name != "apply_effects":  # whose chain may be empty
            assert not np.allclose(out, audio, atol=1e-4)
    silent = np.zeros(1000, np.float32)
    quiet = effects.Room(np.random.default_rng(0))(silent), effects.apply_effects(silent, np.random.default_rng(0))
    assert not np.any(quiet)


def test_room_decays_as_it_says_and_direct_sound_is_at_sample_zero():
    for seed in range(20):
        room = effects.Room(np.random.default_rng(seed))
        response = room.impulse_response
        assert response[0] == 1 and not response[1 : round(0.002 * SAMPLERATE)].any()
        ratio = -10 * np.log10(np.sum(response[1:].astype(float) ** 2))
        assert ratio == pytest.approx(room.direct_to_reverberant, abs=0.1)
        energy = np.cumsum(response[:0:-1].astype(float) ** 2)[::-1]  # Schroeder's backward integral
        decay = 10 * np.log10(energy / energy[0])
        points = np.searchsorted(-decay, (8, 28))
        measured = 3 * (points[1] - points[0]) / SAMPLERATE
        assert measured == pytest.approx(room.rt60, rel=0.35)
    same = effects.Room(np.random.default_rng(3)).impulse_response
    assert np.array_equal(same, effects.Room(np.random.default_rng(3)).impulse_response)


def test_shelf_and_peak_gains():
    for kind, frequency, at in (("peak", 1000, 1000), ("low_shelf", 300, 1), ("high_shelf", 2000, 7999)):
        for gain in (-6.0, 6.0):
            b, a = effects.biquad(kind, frequency, gain, 0.7)
            _, response = signal.freqz(b, a, [at], fs=SAMPLERATE)
            assert 20 * np.log10(abs(response[0])) == pytest.approx(gain, abs=0.05)
            elsewhere = {"peak": 10, "low_shelf": 7999, "high_shelf": 1}[kind]
            _, response = signal.freqz(b, a, [elsewhere], fs=SAMPLERATE)
            assert 20 * np.log10(abs(response[0])) == pytest.approx(0, abs=0.05)


def test_background_has_unit_level_and_is_seeded():
    for seed in range(8):
        noise = effects.background(8000, np.random.default_rng(seed))
        assert noise.dtype == np.float32 and noise.shape == (8000,)
        assert np.sqrt(np.mean(noise.astype(float) ** 2)) == pytest.approx(1, abs=1e-3)
        assert np.array_equal(noise, effects.background(8000, np.random.default_rng(seed)))
    assert not np.allclose(noise, effects.background(8000, np.random.default_rng(99)))
