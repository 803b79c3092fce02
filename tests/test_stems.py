import csv
import sys

import numpy as np
import pytest
import soundfile

from realtime_mpe.analysis import SAMPLERATE
from realtime_mpe.errors import UserError
from realtime_mpe.training import casting, samples, scores, soundfont, stems
from realtime_mpe.training.scores import Part, Score
from realtime_mpe.training.synth import SynthInstrument

RECORDED = {"reed": (range(48, 73, 2), (1.0, 0.1, 0.6, 0.1, 0.4)), "horn": (range(40, 65, 2), (1.0, 0.8, 0.5, 0.2))}


def tone(midi, seconds, partials, rate=SAMPLERATE):
    time = np.arange(int(seconds * rate)) / rate
    frequency = 440 * 2 ** ((midi - 69) / 12)
    wave = sum(a * np.sin(2 * np.pi * frequency * (k + 1) * time + k) for k, a in enumerate(partials))
    rise = np.minimum(1, time / 0.02) * np.minimum(1, (seconds - time) / 0.05)
    return 0.3 * wave * rise


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Half-second notes, silence before them, mistuned by amounts that the index only knows roughly."""
    folder = tmp_path_factory.mktemp("library")
    rng = np.random.default_rng(0)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "instrument", "midi", "dynamic", "deviation_semitones", "seconds", "source_peak"])
        for name, (pitches, partials) in RECORDED.items():
            for midi in pitches:
                for dynamic, rate in (("piano", 16_000), ("fortissimo", 22_050)):
                    off = rng.uniform(-0.4, 0.4)
                    silence = np.zeros(int(rng.uniform(0.0, 0.1) * rate))
                    wave = np.concatenate([silence, tone(midi + off, 0.5, partials, rate), silence])
                    path = f"{name}-{midi}-{dynamic}.wav"
                    soundfile.write(folder / path, wave, rate)
                    writer.writerow([path, name, midi, dynamic, round(off, 1), 0.5, 0.3])
        writer.writerow(["missing.wav", "reed", 60, "crescendo", 0, 1, 1])  # not used, so never opened
    return folder


@pytest.fixture(scope="module")
def band(recordings):
    return [*samples.load_samples(recordings), *(SynthInstrument(k) for k in range(3))]


def cents_off(wave, midi):
    """How far the autocorrelation's peak near `midi` is from it, over several periods."""
    found = samples.measure_pitch(wave, midi)
    return 1e9 if found is None else 100 * (found - midi)


def level_db(wave):
    return 10 * np.log10(np.mean(np.square(wave, dtype=np.float64)) + 1e-12)


def line(pitches, step=0.6, length=0.45, velocity=80):
    return scores.as_notes([(0.2 + step * k, 0.2 + step * k + length, m, velocity) for k, m in enumerate(pitches)])


def piece(n_parts=3, seconds=12.0, name="piece"):
    rng = np.random.default_rng(n_parts)
    parts = []
    for number in range(n_parts):
        rows = [(t, t + 0.45, 52 + int(rng.integers(12)), 80) for t in np.arange(0.1, seconds - 0.5, 0.5)]
        parts.append(Part(f"p{number}", 0, scores.as_notes(rows)))
    return Score(name, parts)


# --- recorded notes -------------------------------------------------------------------------------------------------


def test_every_recorded_note_sounds_at_the_pitch_of_its_label(recordings):
    for instrument in samples.load_samples(recordings):
        notes = line(range(instrument.low, instrument.high + 1))
        n = int((notes[-1, 1] + 1) * SAMPLERATE)
        audio, sounded = instrument.render(notes, n, np.random.default_rng(1))
        assert audio.dtype == np.float32 and audio.shape == (n,)
        np.testing.assert_array_equal(sounded[:, 2], notes[:, 2])
        for onset, offset, midi, _ in sounded:
            core = audio[int((onset + 0.08) * SAMPLERATE) : int((offset - 0.02) * SAMPLERATE)]
            assert abs(cents_off(core, midi)) < 20, f"{instrument.name} {midi}"


def test_recorded_notes_begin_and_end_on_their_labels(recordings):
    instrument = samples.load_samples(recordings)[0]
    notes = line([50, 55, 52, 57, 60, 41, 64], step=0.8, length=0.5)
    audio, sounded = instrument.render(notes, 6 * SAMPLERATE, np.random.default_rng(2))
    for onset, offset, *_ in sounded:
        peak = samples.envelope(audio[int(onset * SAMPLERATE) : int(offset * SAMPLERATE)]).max()
        around = samples.envelope(audio[int((onset - 0.1) * SAMPLERATE) :]) * 10
        heard = np.argmax(around >= peak) * samples.ENVELOPE_HOP / SAMPLERATE - 0.1
        assert -0.006 <= heard <= 0.012
        tail = audio[int((offset + 0.1) * SAMPLERATE) : int((offset + 0.2) * SAMPLERATE)]
        assert level_db(tail) < 20 * np.log10(peak) - 50
        assert level_db(audio[int((offset - 0.05) * SAMPLERATE) : int(offset * SAMPLERATE)]) > 20 * np.log10(peak) - 15


def test_a_held_note_outlasts_its_recording(recordings):
    instrument = samples.load_samples(recordings)[1]
    notes = scores.as_notes([(0.0, 4.0, 53, 80)])
    audio, sounded = instrument.render(notes, 5 * SAMPLERATE, np.random.default_rng(0))
    assert sounded[0, 1] == 4.0
    levels = [level_db(part) for part in audio[SAMPLERATE // 5 : int(3.9 * SAMPLERATE)].reshape(-1, 800)]
    assert np.ptp(levels) < 6.0
    assert abs(cents_off(audio[3 * SAMPLERATE : int(3.5 * SAMPLERATE)], 53)) < 20


def test_a_recording_without_a_steady_part_ends_the_label(tmp_path):
    pluck = tone(60, 1.5, (1.0, 0.5)) * np.exp(-np.arange(int(1.5 * SAMPLERATE)) / (0.1 * SAMPLERATE))
    soundfile.write(tmp_path / "pluck.wav", pluck, SAMPLERATE)
    take = samples.Take(tmp_path / "pluck.wav", 60, 3, 0.0)
    notes = scores.as_notes([(0.0, 1.4, 60, 80)])
    audio, sounded = samples.SampleInstrument("x:pluck", [take]).render(notes, 2 * SAMPLERATE, np.random.default_rng(0))
    assert 0.3 < sounded[0, 1] < 0.55  # 35 dB are 0.40 s at this decay
    assert level_db(audio[int((sounded[0, 1] + 0.1) * SAMPLERATE) :]) < -70


def test_what_cannot_be_played_is_neither_heard_nor_labelled(recordings):
    instrument = samples.load_samples(recordings)[1]
    notes = line([20, 30, 90, 100])
    audio, sounded = instrument.render(notes, 3 * SAMPLERATE, np.random.default_rng(0))
    assert not audio.any() and sounded.shape == (0, 4)


def test_louder_velocity_is_louder_and_the_whole_has_its_level(recordings):
    instrument = samples.load_samples(recordings)[1]
    notes = line([52, 52, 52, 52], velocity=60)
    notes[2:, 3] = 110
    audio, sounded = instrument.render(notes, 3 * SAMPLERATE, np.random.default_rng(0))
    parts = [audio[int(a * SAMPLERATE) : int(b * SAMPLERATE)] for a, b in sounded[:, :2]]
    assert level_db(parts[3]) > level_db(parts[0]) + 5
    assert abs(level_db(np.concatenate(parts)) - stems.LEVEL_DB) < 1.0


def test_pitch_is_measured_and_noise_has_none():
    for midi in (28.3, 44.71, 60.05, 81.4, 93.62):
        found = samples.measure_pitch(tone(midi, 0.6, (0.2, 1.0, 0.7, 0.3)), round(midi))
        assert abs(found - midi) < 0.03
    assert samples.measure_pitch(np.random.default_rng(0).standard_normal(8000), 60) is None


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "no index.csv"),
        ("path,instrument,midi\n", "dynamic"),
        ("path,instrument,midi,dynamic,deviation_semitones\na.wav,x,C4,piano,0\n", "line 2"),
        ("path,instrument,midi,dynamic,deviation_semitones\na.wav,x,60,loud,0\n", "no usable"),
    ],
)
def test_a_broken_index_is_the_users_error(tmp_path, index, message):
    if index is not None:
        (tmp_path / "index.csv").write_text(index)
    with pytest.raises(UserError, match=message):
        samples.load_samples(tmp_path)


def test_a_missing_recording_is_named(tmp_path):
    header = "path,instrument,midi,dynamic,deviation_semitones\n"
    (tmp_path / "index.csv").write_text(header + "gone.wav,x,60,piano,0\n")
    with pytest.raises(UserError, match="gone.wav"):
        samples.load_samples(tmp_path)[0].render(line([60]), SAMPLERATE, np.random.default_rng(0))


# --- SoundFonts: what can go wrong before there is one --------------------------------------------------------------


def test_a_soundfont_that_is_not_there_is_the_users_error(tmp_path):
    for make in (
        soundfont.SoundFontDrums,
        soundfont.soundfont_instruments,
        lambda p: soundfont.SoundFontInstrument(p, 0),
    ):
        with pytest.raises(UserError, match="SoundFont"):
            make(tmp_path / "none.sf2")


def test_missing_fluidsynth_names_the_remedy(tmp_path, monkeypatch):
    font = tmp_path / "a.sf2"
    font.touch()
    monkeypatch.setitem(sys.modules, "fluidsynth", None)
    with pytest.raises(UserError, match="pip install pyfluidsynth"):
        soundfont.SoundFontInstrument(font, 0)
    monkeypatch.delitem(sys.modules, "fluidsynth")
    (tmp_path / "fluidsynth.py").write_text("raise ImportError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="libfluidsynth3.*brew"):
        soundfont.SoundFontInstrument(font, 0)


def test_general_midi_ranges_lie_within_the_pitches():
    assert len(soundfont.RANGES) > 80
    assert all(23 <= low < high <= 94 for low, high in soundfont.RANGES.values())
    assert not {47, 55, *range(96, 104), *range(112, 128)} & set(soundfont.RANGES)
    assert set(soundfont.RANGES) >= soundfont.MONOPHONIC


# --- the cache ------------------------------------------------------------------------------------------------------


def read(folder):
    return {p.name: dict(np.load(p)) for p in sorted(folder.glob("*.npz"))}


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[name][key], other[name][key]) for name in one for key in one[name]
    )


def test_files_have_the_stated_arrays_and_labels_stay_in_range(tmp_path, band):
    wide = Score("wide", [Part("low", 0, line(range(0, 20))), Part("high", 0, line(range(108, 127)))])
    assert stems.render(tmp_path, [wide, piece(4)], band, 5, seconds=8.0, takes=2, seed=3) == 5
    for name, data in read(tmp_path).items():
        n_stems = len(data["part"])
        assert data["audio"].dtype == np.int16 and data["audio"].shape == (n_stems, 8 * SAMPLERATE), name
        assert data["notes"].dtype == np.float32 and data["notes"].shape[1] == 5
        assert data["part"].dtype == np.int16 and data["instrument"].shape == (n_stems,)
        stem, onset, offset, midi, velocity = data["notes"].T
        assert set(stem) == set(range(n_stems))
        assert (midi >= 23).all() and (midi <= 94).all() and (midi % 1 == 0).all()
        assert (onset >= 0).all() and (offset > onset).all() and (offset <= 8).all()
        assert (velocity >= 1).all() and (velocity <= 127).all()
        for part in np.unique(data["part"]):
            takes = data["instrument"][data["part"] == part]
            assert 1 <= len(takes) <= 2 and len(set(takes)) == len(takes)
        for k, wave in enumerate(data["audio"] / 32767):
            sounding = np.concatenate([wave[int(a * SAMPLERATE) : int(b * SAMPLERATE)] for a, b in zip(
                onset[stem == k], offset[stem == k], strict=True)])  # fmt: skip
            assert -35 < level_db(sounding) < -20, f"{name} stem {k}"


def test_rendered_stems_sound_at_their_labels(tmp_path, recordings):
    """The whole way: part, transposition, humanising, rendering, effects and room, labels."""
    stems.render(tmp_path, [piece(3)], samples.load_samples(recordings), 3, seconds=8.0, seed=1)
    errors, contrast = [], []
    for data in read(tmp_path).values():
        for k, wave in enumerate(data["audio"] / 32767):
            notes = data["notes"][data["notes"][:, 0] == k]
            for _, onset, offset, midi, _ in notes:
                core = wave[int((onset + 0.06) * SAMPLERATE) : int(offset * SAMPLERATE)]
                if len(core) > 0.15 * SAMPLERATE:
                    errors.append(abs(cents_off(core, midi)))
                before = wave[max(int((onset - 0.03) * SAMPLERATE), 0) : int(onset * SAMPLERATE)]
                if onset > 0.5 and not np.any((notes[:, 1] < onset) & (notes[:, 2] > onset - 0.3)):
                    contrast.append(level_db(core) - level_db(before))
    assert len(errors) > 100
    assert np.mean(np.array(errors) < 40) > 0.95
    assert not contrast or np.median(contrast) > 6


def test_the_same_seed_makes_the_same_files_and_another_makes_others(tmp_path, band):
    job = dict(seconds=6.0, takes=2)
    stems.render(tmp_path / "a", [piece(3)], band, 3, seed=5, **job)
    stems.render(tmp_path / "b", [piece(3)], band, 3, seed=5, **job)
    stems.render(tmp_path / "c", [piece(3)], band, 3, seed=6, **job)
    a, b, c = (read(tmp_path / k) for k in "abc")
    assert same(a, b)
    assert not np.array_equal(a["00000.npz"]["notes"], c["00000.npz"]["notes"])
    assert not np.array_equal(a["00000.npz"]["notes"], a["00001.npz"]["notes"])


def test_twins_are_two_parts_on_one_instrument_in_every_take(tmp_path, band):
    stems.render(tmp_path, [piece(4)], band, 4, seconds=8.0, takes=2, seed=1, twins=1.0)
    for path in sorted(tmp_path.glob("*.npz")):
        arrays = np.load(path)
        by_part = [set(arrays["instrument"][arrays["part"] == part].tolist()) for part in np.unique(arrays["part"])]
        shared = [a & b for k, a in enumerate(by_part) for b in by_part[k + 1 :]]
        assert any(shared), by_part


class Player:
    """A synthesizer that takes itself for an instrument of the orchestra."""

    def __init__(self, name, seed, low=40, high=80):
        self.synth = SynthInstrument(seed)
        self.name, self.low, self.high, self.polyphonic = name, low, high, True

    def render(self, notes, n_samples, rng):
        return self.synth.render(notes, n_samples, rng)


def test_chamber_music_is_lines_on_instruments_of_one_family(tmp_path, monkeypatch):
    monkeypatch.setattr(stems, "COMPOSED_SHARE", 0.0)
    monkeypatch.setattr(casting, "CHAMBER_SHARES", {"strings": 0.5, "brass": 0.5})
    names = ["a:violin", "b:40", "a:cello", "a:trumpet", "b:57", "b:0", "a:guitar"]
    chords = piece(3)
    for part in chords.parts:
        above = part.notes.copy()
        above[:, 2] += 4
        part.notes = scores.as_notes([tuple(n) for n in np.concatenate([part.notes, above])])
    stems.render(tmp_path, [chords], [Player(n, k) for k, n in enumerate(names)], 8, seconds=8.0, chamber=True)
    seen = set()
    for data in read(tmp_path).values():
        cast = set(data["instrument"].tolist())
        seen |= cast
        assert cast <= {"a:violin", "b:40", "a:cello"} or cast <= {"a:trumpet", "b:57"}
        for stem in range(len(data["instrument"])):
            assert not scores.is_polyphonic(data["notes"][data["notes"][:, 0] == stem][:, 1:])
    assert seen == {"a:violin", "b:40", "a:cello", "a:trumpet", "b:57"}


def test_chamber_music_needs_an_orchestra(tmp_path, band):
    with pytest.raises(UserError, match="instruments"):
        stems.render(tmp_path, [piece(2)], band, 1, seconds=4.0, chamber=True)


def test_workers_make_the_same_files_as_one_process(tmp_path, band):
    stems.render(tmp_path / "one", None, band, 2, seconds=4.0, seed=2)
    seen = []
    stems.render(tmp_path / "two", None, band, 2, seconds=4.0, seed=2, workers=2, progress=lambda *a: seen.append(a))
    assert same(read(tmp_path / "one"), read(tmp_path / "two"))
    assert seen == [(1, 2), (2, 2)]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, band):
    def stop_after_two(done, total):
        if done == 2:
            raise KeyboardInterrupt

    job = dict(seconds=5.0, seed=4)
    with pytest.raises(KeyboardInterrupt):
        stems.render(tmp_path / "a", [piece(2)], band, 4, progress=stop_after_two, **job)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == ["00000.npz", "00001.npz"]
    kept = (tmp_path / "a" / "00001.npz").stat().st_mtime_ns
    (tmp_path / "a" / "00000.npz").unlink()
    assert stems.render(tmp_path / "a", [piece(2)], band, 4, **job) == 3
    assert stems.render(tmp_path / "a", [piece(2)], band, 4, **job) == 0
    assert (tmp_path / "a" / "00001.npz").stat().st_mtime_ns == kept
    stems.render(tmp_path / "b", [piece(2)], band, 4, **job)
    assert same(read(tmp_path / "a"), read(tmp_path / "b"))


class Broken:
    name, low, high, polyphonic = "broken:one", 23, 94, False

    def render(self, notes, n_samples, rng):
        raise RuntimeError("broken")


def test_a_failing_instrument_leaves_no_file_behind(tmp_path):
    with pytest.raises(RuntimeError):
        stems.render(tmp_path, [piece(2)], [Broken()], 1, seconds=5.0)
    assert not list(tmp_path.iterdir())


class Careless:
    """Labels what it was not asked for, and past the end."""

    name, low, high, polyphonic = "careless:one", 0, 127, True

    def render(self, notes, n_samples, rng):
        assert (notes[:, 2] >= 23).all() and (notes[:, 2] <= 94).all()
        extra = [[1.0, 2.0, 20, 80], [1.0, 2.0, 100, 80], [3.0, 900.0, 60, 80]]
        return rng.normal(0, 0.1, n_samples).astype(np.float32), scores.as_notes(
            [*map(tuple, notes), *map(tuple, extra)]
        )


def test_a_careless_instrument_cannot_spoil_the_labels(tmp_path):
    stems.render(tmp_path, [piece(2)], [Careless()], 2, seconds=5.0)
    for data in read(tmp_path).values():
        assert data["notes"][:, 3].min() >= 23 and data["notes"][:, 3].max() <= 94
        assert data["notes"][:, 2].max() <= 5.0


class Silent:
    name, low, high, polyphonic = "silent:one", 23, 94, True

    def render(self, notes, n_samples, rng):
        return np.zeros(n_samples, np.float32), np.zeros((0, 4))


def test_instruments_that_never_sound_do_not_hang_the_run(tmp_path):
    with pytest.raises(UserError, match="instruments"):
        stems.render(tmp_path, [piece(2)], [Silent()], 1, seconds=2.0)


class Noise:
    name = "kit:drums"

    def render(self, parts, n_samples, rng):
        audio = np.zeros(n_samples, np.float32)
        for onset, *_ in parts[0].notes:
            audio[int(onset * SAMPLERATE) :][:400] = 0.1
        return audio


def test_percussion_is_a_stem_without_notes(tmp_path, band, monkeypatch):
    monkeypatch.setattr(stems, "COMPOSED_SHARE", 0.0)  # composed scores have no drums
    score = piece(2)
    score.drums = [Part("kit", 0, line([36, 38, 42]))]
    stems.render(tmp_path, [score], band, 1, seconds=10.0, drums=Noise())
    data = read(tmp_path)["00000.npz"]
    assert data["part"].tolist().count(-1) == 1 and data["part"][-1] == -1
    assert data["instrument"][-1] == "kit:drums" and data["audio"][-1].any()
    assert len(data["part"]) - 1 not in data["notes"][:, 0]


def test_instruments_are_drawn_by_weight(tmp_path, band, monkeypatch):
    monkeypatch.setattr(stems, "COMPOSED_SHARE", 0.0)  # composed chords look for instruments that play chords
    weights = [1.0, 1.0, 1e-12, 1e-12, 1e-12]
    stems.render(tmp_path, [piece(2)], band, 4, seconds=3.0, takes=1, weights=weights)
    names = {str(n) for data in read(tmp_path).values() for n in data["instrument"]}
    assert names and names <= {band[0].name, band[1].name}
    for wrong in ([1.0], [1.0, 1.0, 1.0, 1.0, 0.0]):
        with pytest.raises(ValueError, match="weights"):
            stems.render(tmp_path, [piece(2)], band, 1, weights=wrong)


def test_parts_move_by_octaves_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(stems, "COMPOSED_SHARE", 0.0)
    monkeypatch.setattr(stems, "SHIFT_PROBABILITY", 1.0)
    monkeypatch.setattr(stems, "ENSEMBLE_PROBABILITY", 0.0)  # whose parts stay where they are
    synths = [SynthInstrument(k) for k in range(40)]
    wide = [s for s in synths if s.low <= 36 and s.high >= 84][:6]
    assert len(wide) >= 2
    stems.render(tmp_path / "moved", [piece(2)], wide, 2, seconds=6.0)
    stems.render(tmp_path / "still", [piece(2)], wide, 2, seconds=6.0, register_shift=False)
    for data in read(tmp_path / "still").values():
        assert set(data["notes"][:, 3]) <= set(range(52, 64))
    for data in read(tmp_path / "moved").values():
        assert not set(data["notes"][:, 3]) & set(range(52, 64))


def test_render_refuses_what_it_cannot_use(tmp_path, band):
    with pytest.raises(UserError, match="no instruments"):
        stems.render(tmp_path, None, [], 1)
    with pytest.raises(UserError, match="two parts"):
        stems.render(tmp_path, [piece(1)], band, 1)
    with pytest.raises(ValueError, match="same name"):
        stems.render(tmp_path, None, [band[0], band[0]], 1)


def test_the_cache_sees_whole_segments_only(tmp_path, band):
    stems.render(tmp_path, [piece(2)], band, 2, seconds=5.0)
    (tmp_path / ".00007.123.tmp").write_bytes(b"half")
    (tmp_path / "notes.npz").write_bytes(b"not a segment")
    raw = dict(np.load(tmp_path / "00001.npz"))
    cache = stems.StemCache(tmp_path)
    assert len(cache) == 2
    segment = cache.load(1)
    assert segment.part.tolist() == raw["part"].tolist() and segment.instrument == raw["instrument"].tolist()
    np.testing.assert_array_equal(segment.notes, raw["notes"])
    np.testing.assert_allclose(segment.stem(0, 100, 50), raw["audio"][0, 100:150] / 32767, atol=1e-6)
    stems.render(tmp_path, [piece(2)], band, 3, seconds=5.0)
    assert len(cache) == 2 and cache.refresh() == 3 and len(cache) == 3
    (tmp_path / "00002.npz").write_bytes(b"broken")
    with pytest.raises(UserError, match="00002.npz is damaged"):
        cache.load(2)
    with pytest.raises(IndexError):
        cache.load(3)
    with pytest.raises(UserError, match="render stems"):
        stems.StemCache(tmp_path / "nowhere")
