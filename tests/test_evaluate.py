"""The figures: do they say what their specification says, and does a folder become a table or one line of advice?"""

import argparse
import json
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import soundfile

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES, SAMPLERATE
from realtime_mpe.errors import UserError
from realtime_mpe.host import Settings
from realtime_mpe.training import evaluate, metrics

T = 200  # frames of most cases here, 6.4 s


def line(midi, count=8, seconds=0.5, start=0.0, gap=0.0):
    """Notes of one pitch or of a row of pitches, one after another, (count, 3)."""
    onsets = start + seconds * np.arange(count)
    return np.column_stack([onsets, onsets + seconds - gap, np.broadcast_to(midi, count)]).astype(float)


def emitted(*voices, delay=0.08):
    """Voices, (n, 3) each -> (N, 5) as the engine would send them, by onset."""
    rows = [np.column_stack([v, np.full(len(v), k), v[:, 0] + delay]) for k, v in enumerate(voices)]
    notes = np.concatenate(rows) if rows else np.zeros((0, 5))
    return notes[np.argsort(notes[:, 0], kind="stable")]


def figures_of(stems, notes, mix=None, n_frames=T):
    if mix is None:
        mix = metrics.notes_to_roll(notes, n_frames).astype(np.float32)
    return metrics.figures([metrics.score_file(stems, mix, notes)])


QUARTET = [line(72 + np.arange(8) % 3), line(65), line(57 - np.arange(8) % 2), line(40)]


# The grid


@pytest.mark.parametrize(
    "onset, offset, frames",
    [
        (2 * FRAME_SECONDS, 5 * FRAME_SECONDS, [2, 3, 4]),  # a centre on the onset counts, one on the offset does not
        (2.01 * FRAME_SECONDS, 5.01 * FRAME_SECONDS, [3, 4, 5]),
        (2.1 * FRAME_SECONDS, 2.9 * FRAME_SECONDS, [2]),  # holds no centre: the nearest
        (2.6 * FRAME_SECONDS, 2.9 * FRAME_SECONDS, [3]),
        (-1.0, 1.5 * FRAME_SECONDS, [0, 1]),
        (8.5 * FRAME_SECONDS, 99.0, [9]),
        (99.0, 100.0, []),
        (-2.0, -1.0, []),
    ],
)
def test_frames_of_a_note(onset, offset, frames):
    roll = metrics.notes_to_roll([(onset, offset, 60)], 10)
    assert np.argwhere(roll).tolist() == [[60 - FIRST_MIDI, frame] for frame in frames]


def test_notes_outside_the_range_are_left_out_and_do_not_wrap_around():
    notes = [(0, 1, FIRST_MIDI - 1), (0, 1, FIRST_MIDI + N_PITCHES), (0, 0.03, FIRST_MIDI), (0, 0.03, 94)]
    assert np.argwhere(metrics.notes_to_roll(notes, 10)).tolist() == [[0, 0], [71, 0]]


# What sounds


def test_a_perfect_prediction_scores_full_marks_everywhere():
    result = figures_of(QUARTET, emitted(*QUARTET, delay=0.0))
    for name in ("mix_AP", "mix_F1", "mix_P", "mix_R", "note_F1", "event_F1", "stem_F1_strict"):
        assert result[name] == 100, name
    assert result["home"] == result["count_exact"] == result["count_near"] == 1
    assert result["switch"] == result["lat_med"] == result["lat_p90"] == 0
    assert result["splits"]["ceiling"] == {"stem_F1_strict": 100, "home": 1, "switch": 0}


def test_nothing_emitted_scores_nothing():
    result = figures_of(QUARTET, np.zeros((0, 5)), mix=np.zeros((N_PITCHES, T)))
    for name in ("mix_AP", "mix_F1", "mix_P", "mix_R", "note_F1", "event_F1", "stem_F1_strict", "home", "count_near"):
        assert result[name] == 0, name
    assert result["lat_med"] is result["lat_p90"] is result["lat_bass"] is None
    json.dumps(result, allow_nan=False)


def test_one_missed_note_of_two():
    stem = line(60, count=2, seconds=1.0)
    result = figures_of([stem], emitted(stem[:1]))
    assert result["mix_P"] == 100
    assert result["mix_R"] == pytest.approx(100 * 32 / 63)  # 1 s holds the centres 0..31, 2 s those up to 62
    assert result["note_F1"] == pytest.approx(200 / 3)
    assert result["event_F1"] == pytest.approx(200 / 3)


def test_notes_match_within_50_ms_once_and_only_at_their_pitch():
    ref = np.array([(1.0, 2.0, 60), (3.0, 4.0, 60), (5.0, 6.0, 60)])
    est = np.array([(1.05, 1.1, 60), (1.0, 2.0, 60), (3.051, 4.0, 60), (5.0, 6.0, 61)])
    assert metrics.note_counts(ref, est) == metrics.Counts(right=1, surplus=3, missed=2)


def test_files_are_pooled_before_anything_is_divided():
    small, large = line(60, count=1), line(60, count=9)
    assert metrics.note_f1([small, large], [small, large[:0]]) == pytest.approx(2 / (2 + 9))
    rolls = [metrics.notes_to_roll(notes, T) for notes in (small, large)]
    assert metrics.frame_f1(rolls, [rolls[0], np.zeros_like(rolls[1])]) == pytest.approx(32 / (32 + 141))


def test_average_precision_of_a_ranking_with_ties():
    scores = np.array([[0.9, 0.8], [0.8, 0.3], [0.0, 0.0]])
    truth = np.array([[1, 0], [1, 1], [1, 0]], bool)
    # after 0.9: 1 of 1; after 0.8: 2 of 3; after 0.3: 3 of 4; what is left at 0 was not predicted
    assert metrics.average_precision(scores, truth) == pytest.approx((1 + 2 / 3 + 3 / 4) / 4)
    assert metrics.average_precision(scores, np.zeros_like(truth)) == 0
    assert metrics.average_precision(np.zeros((0, 3)), np.zeros((0, 3), bool)) == 0


# When it is known


def test_latency_is_from_true_onset_to_emission():
    stem = np.concatenate([line(60, count=4, seconds=1.0), line(40, count=1, start=5.0)])
    notes = emitted(stem)
    notes[:, 4] = stem[:, 0] + [0.06, 0.19, 0.21, -0.06, 0.1]  # the third comes too late, the fourth before its sound
    result = figures_of([stem], notes)
    assert result["event_F1"] == pytest.approx(60)
    assert result["lat_med"] == pytest.approx(100)
    assert result["lat_p90"] == pytest.approx(172)
    assert result["lat_bass"] == pytest.approx(100)
    assert result["note_F1"] == 100  # the onset that the note claims is another matter


def test_each_emission_takes_the_nearest_true_onset_still_free():
    ref = np.array([(1.0, 1.1, 60), (1.15, 1.3, 60), (1.0, 1.3, 62)])
    est = np.array([(1.0, 1.1, 60, 0, 1.1), (1.0, 1.1, 60, 0, 1.12), (1.0, 1.1, 60, 0, 1.13)])
    assert metrics.event_latencies(ref, est) == pytest.approx(np.array([(60, -0.05), (60, 0.12)]))


# Who plays


def test_voice_numbers_mean_nothing():
    notes = emitted(*QUARTET)
    renumbered = notes.copy()
    renumbered[:, 3] = np.array([7, 0, 12, 3])[notes[:, 3].astype(int)]
    assert figures_of(QUARTET, renumbered) == figures_of(QUARTET, notes)


def test_voices_that_change_players_half_way_lose_half():
    high, low = line(72), line(48)
    notes = emitted(np.concatenate([high[:4], low[4:]]), np.concatenate([low[:4], high[4:]]))
    result = figures_of([high, low], notes)
    assert result["mix_F1"] == result["note_F1"] == 100
    # 4 s hold the centres 0..124, of which the first half holds 0..62
    assert result["stem_F1_strict"] == pytest.approx(100 * 63 / 125)
    assert result["home"] == 0.5
    assert result["switch"] == pytest.approx(2 / 14)


def test_what_a_leftover_voice_plays_is_wrong_though_its_notes_are_right():
    stem = line(60, seconds=0.64)
    result = figures_of([stem], emitted(stem[:6], stem[6:]))
    assert result["mix_F1"] == 100
    assert result["stem_F1_strict"] == pytest.approx(75)  # 6 of 8 right, 2 surplus, and the same 2 missed
    assert (result["count_exact"], result["count_near"]) == (0, 1)


def test_a_leftover_stem_is_missed():
    high, low = line(72), line(48)
    result = figures_of([high, low], emitted(high))
    assert result["stem_F1_strict"] == pytest.approx(200 / 3)


def test_switches_are_counted_along_each_stem_over_the_notes_that_were_found():
    stem = line(60, count=6)
    notes = emitted(stem)
    notes[:, 3] = [0, 0, 1, 9, 1, 0]
    notes[3, 2] = 61  # not found: the line goes on from the note before it
    result = figures_of([stem, line(40)], notes)
    assert result["switch"] == pytest.approx(2 / 4)
    assert result["home"] == pytest.approx(3 / 5)


def test_a_voice_of_a_few_slips_is_no_player():
    stems = [line(70, count=60, seconds=0.1), line(50, count=60, seconds=0.1)]
    notes = emitted(*stems)
    notes[:5, 3] = 2  # 5 of 120
    assert figures_of(stems, notes)["count_exact"] == 1
    notes[:6, 3] = 2
    assert figures_of(stems, notes)["count_exact"] == 0


def test_a_stem_outside_the_range_is_still_a_player():
    result = figures_of([line(60), line(100)], emitted(line(60)))
    assert result["note_F1"] == 100
    assert (result["count_exact"], result["count_near"]) == (0, 1)


def test_notes_after_the_last_frame_could_not_be_found():
    result = figures_of([line(60, count=30)], emitted(line(60, count=13)))  # 200 frames end within the 13th note
    assert result["note_F1"] == result["event_F1"] == 100


# The splits beside it


def test_one_voice_is_worth_its_best_stem():
    splits = figures_of(QUARTET, emitted(*QUARTET))["splits"]
    # one of four equal stems is right, the other three are surplus and missed
    assert splits["one voice"] == {"stem_F1_strict": pytest.approx(25), "home": 1, "switch": 0}


def test_rank_and_bands_part_registers_but_not_crossing_players():
    apart = figures_of(QUARTET, emitted(*QUARTET))["splits"]
    assert apart["pitch rank"]["stem_F1_strict"] == apart["pitch bands"]["stem_F1_strict"] == 100
    crossing = [line([72, 71, 60, 61] * 2), line([60, 61, 72, 71] * 2)]
    splits = figures_of(crossing, emitted(*crossing))["splits"]
    for name in ("pitch rank", "pitch bands"):
        assert splits[name]["stem_F1_strict"] == pytest.approx(50, abs=1), name
        assert splits[name]["home"] == 0.5
    assert splits["ceiling"]["stem_F1_strict"] == 100


def test_rank_knows_no_later_than_two_frames_and_no_more_voices_than_players():
    rolls = [np.zeros((N_PITCHES, T), bool)] * 2
    ragged = emitted(np.array([(1.0, 2.0, 60)]), np.array([(1.05, 2.0, 70)]), np.array([(1.2, 2.0, 80)]))
    assert metrics.pitch_rank(ragged, rolls).tolist() == [1, 0, 0]
    chord = emitted(*(np.array([(1.0, 2.0, midi)]) for midi in (80, 70, 60)))
    assert metrics.pitch_rank(chord, rolls).tolist() == [0, 1, 1]


def test_random_is_chance_and_the_same_every_time():
    stems = [line(72, count=250, seconds=0.064), line(48, count=250, seconds=0.064)]
    first, second = (figures_of(stems, emitted(*stems), n_frames=500)["splits"]["random"] for _ in range(2))
    assert first == second
    assert 48 <= first["stem_F1_strict"] < 58
    assert 0.4 < first["switch"] < 0.6


def test_the_ceiling_forgives_who_but_not_what():
    notes = emitted(*QUARTET)
    notes[:, 3] = 0
    notes = notes[notes[:, 2] != 65]  # one player is not heard at all
    result = figures_of(QUARTET, notes)
    assert result["splits"]["ceiling"]["stem_F1_strict"] == pytest.approx(result["mix_F1"])
    assert result["mix_F1"] == pytest.approx(100 * 6 / 7)


@pytest.mark.parametrize("split", metrics.SPLITS.values(), ids=metrics.SPLITS)
def test_splits_of_no_notes(split):
    assert split(np.zeros((0, 5)), [np.zeros((N_PITCHES, 0), bool)]).shape == (0,)


@pytest.mark.parametrize("bins, midi", [(216, 60), (N_PITCHES, 95)])
def test_arrays_of_another_model_are_refused(bins, midi):
    with pytest.raises(ValueError):
        metrics.score_file([line(60)], np.zeros((bins, T)), emitted(line(midi)))


# The truth, from MIDI


def note_messages(midi, on, off, channel=0):
    return [
        (on, mido.Message("note_on", note=midi, velocity=80, channel=channel)),
        (off, mido.Message("note_on", note=midi, velocity=0, channel=channel)),
    ]


def write_midi(path, *tracks):
    """Tracks of (tick, message) at 480 ticks a beat, which is 0.5 s unless a tempo says otherwise."""
    file = mido.MidiFile(ticks_per_beat=480)
    for events in tracks:
        track, now = mido.MidiTrack(), 0
        for tick, message in sorted(events, key=lambda event: event[0]):
            track.append(message.copy(time=tick - now))
            now = tick
        file.tracks.append(track)
    file.save(path)
    return path


def test_tempo_changes_hold_for_all_tracks_and_drums_are_left_out(tmp_path):
    path = write_midi(
        tmp_path / "a.mid",
        [(480, mido.MetaMessage("set_tempo", tempo=1_000_000))],
        note_messages(60, 0, 960),
        note_messages(36, 0, 480, channel=9),
        [*note_messages(72, 480, 720, channel=2), (960, mido.MetaMessage("set_tempo", tempo=250_000))],
        note_messages(48, 960, 1440),
    )
    stems = evaluate.read_stems(path)
    assert [stem.tolist() for stem in stems] == [[[0.0, 1.5, 60]], [[0.5, 1.0, 72]], [[1.5, 1.75, 48]]]


def test_repeated_and_hanging_notes(tmp_path):
    repeated = [*note_messages(60, 0, 480), (480, mido.Message("note_on", note=60, velocity=80))]  # off, on in one tick
    overtaken = [
        (0, mido.Message("note_on", note=50, velocity=80)),
        (480, mido.Message("note_on", note=50, velocity=80)),  # on, off in one tick: the off is the older note's
        (480, mido.Message("note_off", note=50)),
        (960, mido.Message("note_off", note=50)),
    ]
    stems = evaluate.read_stems(write_midi(tmp_path / "a.mid", repeated, overtaken))
    assert stems[0].tolist() == [[0.0, 0.5, 60], [0.5, 1.0, 60]]  # the hanging note ends with the file
    assert stems[1].tolist() == [[0.0, 0.5, 50], [0.5, 1.0, 50]]


# A folder


@pytest.fixture
def folder(tmp_path):
    """Two recordings: a duo whose second player is not heard by the engine below, and a solo."""
    path = tmp_path / "set"
    path.mkdir()
    for name, suffix, pitches in (("duo", "wav", (72, 48)), ("solo", "flac", (60,))):
        soundfile.write(path / f"{name}.{suffix}", np.zeros(3 * SAMPLERATE), SAMPLERATE)
        write_midi(path / f"{name}.mid", *(note_messages(midi, 0, 960) for midi in pitches))
    return path


@pytest.fixture
def engine(monkeypatch):
    """Stands in for the live engine: it finds all that the first player of a file plays, and nothing else."""
    heard = []

    def transcribe_file(path, model, settings):
        heard.append((path.name, model, settings))
        notes = emitted(evaluate.read_stems(path.with_suffix(".mid"))[0], delay=0.1)
        mix = metrics.notes_to_roll(notes, 94).astype(np.float32)
        return SimpleNamespace(mix=mix, slots=mix[None], notes=notes)

    monkeypatch.setattr(evaluate, "transcribe_file", transcribe_file)
    return heard


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_folder_becomes_a_table(folder, engine, capsys):
    assert run(folder, "--model", "mine.onnx", "--lookahead", 2, "--sensitivity", 0.7) == 0
    assert engine == [(name, "mine.onnx", Settings(2, 0.7)) for name in ("duo.wav", "solo.flac")]
    out, err = capsys.readouterr()
    table = {row[:20].strip(): row[20:].split() for row in out.splitlines()}
    assert table["frames of 32 ms"] == ["80.0", "100.0", "66.7", "66.7"]
    assert table["the model's voices"] == ["80.0", "1.00", "0.00"]
    assert list(metrics.SPLITS) == [name for name in table if name in metrics.SPLITS]
    assert "median 100 ms" in out and "below MIDI 48 - ms" in out and "RTF" in out
    assert [row.split()[:2] for row in err.splitlines()] == [["[1/2]", "duo:"], ["[2/2]", "solo:"]]


def test_json_on_standard_output_is_json_alone(folder, engine, capsys):
    assert run(folder, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 2 and report["seconds"] == 6 and list(report["each"]) == ["duo", "solo"]
    assert report["mix_R"] == pytest.approx(200 / 3)
    assert report["each"]["solo"]["stem_F1_strict"] == 100
    assert report["count_exact"] == 0.5 and report["count_near"] == 1


def test_json_and_predictions_are_kept_in_files(folder, engine, tmp_path):
    assert run(folder, "--json", tmp_path / "a.json", "--predictions", tmp_path / "new" / "npz") == 0
    assert json.loads((tmp_path / "a.json").read_text())["event_F1"] == pytest.approx(80)
    kept = np.load(tmp_path / "new" / "npz" / "duo.npz")
    assert kept["mix"].shape == (72, 94) and kept["slots"].shape == (1, 72, 94) and kept["notes"].shape == (1, 5)
    assert int(kept["first_midi"]) == 23 and float(kept["hop"]) == 0.032


def test_files_without_a_partner_are_named_and_left_out(folder, engine, capsys):
    soundfile.write(folder / "encore.wav", np.zeros(100), SAMPLERATE)
    assert run(folder) == 0
    out, err = capsys.readouterr()
    assert "encore.wav" in err and "2 files" in out


def test_ctrl_c_ends_without_a_traceback_or_a_table(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "transcribe_file", interrupted)
    assert run(folder) == 130
    out, err = capsys.readouterr()
    assert not out and "interrupted" in err and len(err.splitlines()) == 1


def remove_truth(folder):
    for path in folder.glob("*.mid"):
        path.unlink()


BROKEN_FOLDERS = {
    "is empty": (lambda f: [path.unlink() for path in f.iterdir()], "no recordings"),
    "has no truth": (remove_truth, "duo.wav"),
    "holds text for MIDI": (lambda f: (f / "duo.mid").write_text("do re mi"), "duo.mid"),
    "holds a cut MIDI file": (lambda f: (f / "duo.mid").write_bytes((f / "duo.mid").read_bytes()[:30]), "duo.mid"),
    "holds several songs": (lambda f: (f / "duo.mid").write_bytes(b"MThd\0\0\0\6\0\2\0\0\1\xe0"), "type 2"),
    "holds MIDI of drums": (lambda f: write_midi(f / "duo.mid", note_messages(36, 0, 480, channel=9)), "duo.mid"),
    "holds MIDI of nothing": (lambda f: write_midi(f / "duo.mid", []), "duo.mid"),
    "holds text for audio": (lambda f: (f / "duo.wav").write_text("la la la"), "duo.wav"),
    "holds audio of nothing": (lambda f: soundfile.write(f / "duo.wav", np.zeros(0), SAMPLERATE), "duo.wav"),
}


@pytest.mark.parametrize("breakage, named", BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_before_the_work_begins(folder, engine, breakage, named):
    breakage(folder)
    with pytest.raises(UserError, match=named) as error:
        run(folder)
    assert "\n" not in str(error.value) and ";" in str(error.value)  # the trouble; the way out
    assert not engine


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--jobs", 0], "--jobs 0"),
        (["--lookahead", 9], "look-ahead 9"),
        (["--sensitivity", 2], "sensitivity 2"),
        (["--predictions", "{folder}/duo.wav"], "duo.wav"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_the_work_begins(folder, engine, arguments, named):
    with pytest.raises(UserError, match=named):
        run(folder, *(str(a).format(folder=folder) for a in arguments))
    assert not engine


@pytest.mark.parametrize("name", ["nowhere", "set/duo.wav"])
def test_what_is_no_folder_is_refused(folder, name):
    with pytest.raises(UserError, match=name):
        run(folder.parent / name)


def test_an_error_in_another_process_arrives_as_it_is(folder):
    with pytest.raises(UserError, match="no-such-model"):
        run(folder, "--jobs", 2, "--model", "no-such-model")
