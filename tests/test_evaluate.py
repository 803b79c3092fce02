"""The figures: do they say what their specification says, and does a folder become a table or one line of advice?"""

import argparse
import dataclasses
import json
import sys
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import soundfile

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES, PAPER, SAMPLERATE
from realtime_mpe.errors import UserError
from realtime_mpe.notes import Thresholds
from realtime_mpe.settings import Settings
from realtime_mpe.training import evaluate, metrics, predict
from realtime_mpe.training.data.midi import read_stems
from realtime_mpe.window_model import WindowInfo

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
    assert metrics.event_latencies(ref[:, [0, 2]], est[:, [4, 2]]) == pytest.approx(np.array([(60, -0.05), (60, 0.12)]))


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
    stems = read_stems(path)
    assert [stem.tolist() for stem in stems] == [[[0.0, 1.5, 60]], [[0.5, 1.0, 72]], [[1.5, 1.75, 48]]]


def test_repeated_and_hanging_notes(tmp_path):
    repeated = [*note_messages(60, 0, 480), (480, mido.Message("note_on", note=60, velocity=80))]  # off, on in one tick
    overtaken = [
        (0, mido.Message("note_on", note=50, velocity=80)),
        (480, mido.Message("note_on", note=50, velocity=80)),  # on, off in one tick: the off is the older note's
        (480, mido.Message("note_off", note=50)),
        (960, mido.Message("note_off", note=50)),
    ]
    stems = read_stems(write_midi(tmp_path / "a.mid", repeated, overtaken))
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
        notes = emitted(read_stems(path.with_suffix(".mid"))[0], delay=0.1)
        mix = metrics.notes_to_roll(notes, 94).astype(np.float32)
        return SimpleNamespace(mix=mix, slots=mix[None], notes=notes)

    monkeypatch.setattr(predict, "transcribe_file", transcribe_file)
    monkeypatch.setattr(evaluate, "check_model", lambda model, live: "rt-mpe live 3")
    monkeypatch.setattr(evaluate, "frame_thresholds", lambda model: None)
    return heard


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


def rows_of(table):
    """Numbers of each row by its label, of the first row of that label."""
    rows = {}
    for row in table.splitlines():
        rows.setdefault(row[:19].strip(), row[19:].split())
    return rows


def test_a_folder_becomes_a_table(folder, engine, capsys):
    assert run("mine.onnx", folder, "--lookahead", 2, "--sensitivity", 0.7) == 0
    assert engine == [(name, "mine.onnx", Settings(2, 0.7)) for name in ("duo.wav", "solo.flac")]
    out, err = capsys.readouterr()
    rows = rows_of(out)
    assert rows["frames of 32 ms"] == ["66.7", "80.0", "100.0", "66.7", "83.0"]  # wrong in the duo's 32 frames of 188
    assert rows["the model's slots"][:6] == ["*", "66.7", "80.0", "100.0", "66.7", "80.0"]
    assert out.count("pitch bands") == 3 and "ORACLE THRESHOLD" in out and "* does not beat pitch rank" in out
    assert "median 100 ms" in out and "below MIDI 48 - ms" in out and "RTF" in out
    assert [row.split()[:2] for row in err.splitlines()] == [["[1/2]", "duo:"], ["[2/2]", "solo:"]]


def test_json_on_standard_output_is_json_alone(folder, engine, capsys):
    assert run("mine.onnx", folder, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 2 and report["seconds"] == 6 and list(report["each"]) == ["duo", "solo"]
    assert report["thresholds"] == "oracle threshold" and report["format"] == "rt-mpe live 3"
    assert report["mix_R"] == report["live_mix_R"] == pytest.approx(200 / 3)
    assert report["stem_sources"] == 1.5 and report["stem_beats_rank"] is False
    assert report["each"]["solo"]["stem_strict_F1"] == 100
    assert report["live_count_exact"] == 0.5 and report["live_count_near"] == 1
    nested = [name for name, value in report.items() if isinstance(value, dict)]
    assert nested == ["each"]


def test_json_and_predictions_are_kept_in_files(folder, engine, tmp_path):
    assert run("mine.onnx", folder, "--json", tmp_path / "a.json", "--predictions", tmp_path / "new" / "npz") == 0
    assert json.loads((tmp_path / "a.json").read_text())["live_event_F1"] == pytest.approx(80)
    kept = np.load(tmp_path / "new" / "npz" / "duo.npz")
    assert kept["mix"].shape == (72, 94) and kept["slots"].shape == (1, 72, 94) and kept["notes"].shape == (1, 5)
    assert int(kept["first_midi"]) == 23 and float(kept["hop"]) == 0.032
    assert sorted(path.name for path in (tmp_path / "new" / "npz").iterdir()) == ["duo.npz", "solo.npz"]


def test_one_level_alone(folder, engine, capsys):
    assert run("mine.onnx", folder, "--level", "family", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert "stem_F1" not in report and report["family_sources"] == 1


def test_thresholds_of_validation_files_are_fixed(folder, engine, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("duo.wav", "duo.mid"):
        (other / name).write_bytes((folder / name).read_bytes())
    assert run("mine.onnx", folder, "--validation", other, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["thresholds"] == "validation" and report["files"] == 2
    assert [name for name, *_ in engine] == ["duo.wav", "solo.flac", "duo.wav"]


def test_thresholds_of_the_model_file_come_before_an_oracle(folder, engine, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "frame_thresholds", lambda model: {"mix": 0.4, "slots": 0.25})
    assert run("mine.onnx", folder, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["thresholds"] == "model file"
    assert [report[f"{name}_threshold"] for name in ("mix", "stem", "stem_rank")] == [0.4, 0.25, 0.4]


def test_pictures_of_every_piece_and_of_the_set(folder, engine, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("mine.onnx", folder, "--plot", tmp_path / "new") == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["duo.png", "pr.png", "solo.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "new").iterdir())


def test_pictures_without_matplotlib_are_one_line_of_advice(folder, engine, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "realtime_mpe.training.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib: pip install \"realtime-mpe\[train\]\""):
        run("mine.onnx", folder, "--plot", tmp_path / "new")
    assert not engine and not (tmp_path / "new").exists()


def test_files_without_a_partner_are_named_and_left_out(folder, engine, capsys):
    soundfile.write(folder / "encore.wav", np.zeros(100), SAMPLERATE)
    assert run("mine.onnx", folder) == 0
    out, err = capsys.readouterr()
    assert "encore.wav" in err and "2 files" in out


def test_a_piece_that_breaks_is_named_and_costs_no_other(folder, engine, monkeypatch, capsys):
    heard = predict.transcribe_file

    def damaged(path, *rest):
        if path.name == "duo.wav":
            raise UserError("duo.wav is damaged; get it again")
        return heard(path, *rest)

    monkeypatch.setattr(predict, "transcribe_file", damaged)
    assert run("mine.onnx", folder, "--json", "-") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["files"] == 1 and report["problems"] == ["duo: duo.wav is damaged; get it again"]
    assert "duo.wav is damaged" in err
    (folder / "solo.flac").unlink()
    with pytest.raises(UserError, match="duo.wav is damaged"):
        run("mine.onnx", folder)


def test_pieces_of_one_name_are_kept_apart(folder, engine, tmp_path, monkeypatch):
    """As the tracks of one number that a data set has in several of its folders."""
    data = evaluate.open_dataset(folder)
    twins = tuple(dataclasses.replace(piece, name="twin") for piece in data.pieces)
    monkeypatch.setattr(evaluate, "open_dataset", lambda folder: dataclasses.replace(data, pieces=twins))
    report = evaluate.evaluate("mine.onnx", folder, predictions=tmp_path / "npz")
    assert [row["mix_R"] for row in report["each"].values()] == [pytest.approx(50), 100]
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == ["twin (2).npz", "twin.npz"]


def test_ctrl_c_ends_without_a_traceback_or_a_table(folder, engine, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "transcribe_file", interrupted)
    assert run("mine.onnx", folder) == 130
    out, err = capsys.readouterr()
    assert not out and "interrupted" in err and len(err.splitlines()) == 1


def remove_truth(folder):
    for path in folder.glob("*.mid"):
        path.unlink()


BROKEN_FILES = {
    "holds text for MIDI": (lambda f: (f / "duo.mid").write_text("do re mi"), "duo.mid"),
    "holds a cut MIDI file": (lambda f: (f / "duo.mid").write_bytes((f / "duo.mid").read_bytes()[:30]), "duo.mid"),
    "holds several songs": (lambda f: (f / "duo.mid").write_bytes(b"MThd\0\0\0\6\0\2\0\0\1\xe0"), "type 2"),
    "holds MIDI of drums": (lambda f: write_midi(f / "duo.mid", note_messages(36, 0, 480, channel=9)), "duo.mid"),
    "holds MIDI of nothing": (lambda f: write_midi(f / "duo.mid", []), "duo.mid"),
    "holds text for audio": (lambda f: (f / "duo.wav").write_text("la la la"), "duo.wav"),
    "holds audio of nothing": (lambda f: soundfile.write(f / "duo.wav", np.zeros(0), SAMPLERATE), "duo.wav"),
}


@pytest.mark.parametrize("breakage, named", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_named_and_left_out_and_alone_it_is_refused(folder, engine, capsys, breakage, named):
    breakage(folder)
    assert run("mine.onnx", folder) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 file,") and named in err and "\n\n" not in err
    for alone in folder.glob("solo.*"):
        alone.unlink()
    engine.clear()
    with pytest.raises(UserError, match=named) as error:
        run("mine.onnx", folder)
    assert "\n" not in str(error.value) and ";" in str(error.value)  # the trouble; the way out
    assert not engine


@pytest.mark.parametrize("breakage", [remove_truth, lambda f: [path.unlink() for path in f.iterdir()]])
def test_a_folder_of_nothing_is_refused_before_the_work_begins(folder, engine, breakage):
    breakage(folder)
    with pytest.raises(UserError, match=str(folder)):
        run("mine.onnx", folder)
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
        run("mine.onnx", folder, *(str(a).format(folder=folder) for a in arguments))
    assert not engine


@pytest.mark.parametrize("name", ["nowhere", "set/duo.wav"])
def test_what_is_no_folder_is_refused(folder, engine, name):
    with pytest.raises(UserError, match=name):
        run("mine.onnx", folder.parent / name)


def test_an_error_in_another_process_arrives_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "check_model", lambda model, live: "rt-mpe live 3")
    with pytest.raises(UserError, match="no-such-model"):
        run("no-such-model", folder, "--jobs", 2)


def test_a_model_that_is_not_there_is_refused_before_the_work_begins(folder):
    with pytest.raises(UserError, match="no-such-model"):
        run("no-such-model", folder)


# A window network over whole files


WINDOW, TEACHER_VIEW = 23, 46


@pytest.fixture(scope="module")
def window_model(tmp_path_factory):
    """Path of a window network set by hand: a pitch sounds where its own bin is loud; high and low are two slots."""
    return write_window_model(tmp_path_factory.mktemp("models") / "window.onnx")


def write_window_model(path, **metadata):
    pytest.importorskip("onnx")
    from onnx import helper

    high = np.zeros((3, N_PITCHES, 1), np.float32)  # slots: from MIDI 60 up, below it, nothing
    high[0, 60 - FIRST_MIDI :] = high[1, : 60 - FIRST_MIDI] = 1
    own_bins = np.arange(1, 3 * N_PITCHES, 3)
    constants = {
        "bins": own_bins,
        "first": np.array(0),
        "steep": np.array(40, np.float32),
        "loud": np.array(30, np.float32),
        "high": high,
        "count": np.eye(8, dtype=np.float32)[np.full(WINDOW, 2)],
        "direction": np.eye(3, 128, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["window", "first"], ["frames"], axis=0),
        helper.make_node("Gather", ["frames", "bins"], ["own"], axis=1),
        helper.make_node("Transpose", ["own"], ["levels"], perm=[1, 0]),
        helper.make_node("Mul", ["levels", "steep"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "loud"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["mix"]),
        helper.make_node("Mul", ["mix", "high"], ["slots"]),
        helper.make_node("Identity", ["count"], ["polyphony"]),
        helper.make_node("Identity", ["direction"], ["timbre"]),
    ]
    info = WindowInfo("hand", PAPER, 2, 3, (Thresholds(),) * 5, 0, {}, "hand", WINDOW)
    shapes = {"mix": (72, WINDOW), "slots": (3, 72, WINDOW), "polyphony": (WINDOW, 8), "timbre": (3, 128)}
    return write_onnx(path, nodes, constants, ("window", (1, WINDOW, 216)), shapes, info.to_metadata() | metadata)


def write_onnx(path, nodes, constants, given, outputs, metadata):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def info(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [info(*given)], [info(*item) for item in outputs.items()], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Path of a timbre teacher that says the same of every stem: the direction of the first slot."""
    pytest.importorskip("onnx")
    from onnx import helper

    constants = {"said": np.eye(1, 128, dtype=np.float32)[0]}
    nodes = [
        helper.make_node("ReduceMax", ["view"], ["loudest"], keepdims=0),
        helper.make_node("Abs", ["loudest"], ["positive"]),
        helper.make_node("Mul", ["said", "positive"], ["embedding"]),
    ]
    path = tmp_path_factory.mktemp("models") / "teacher.onnx"
    return write_onnx(
        path, nodes, constants, ("view", (1, TEACHER_VIEW, 216)), {"embedding": (128,)}, {"format": "rt-mpe timbre 1"}
    )


@pytest.fixture
def tones(tmp_path):
    """A folder of one recording that can be heard: a high and a low player, whose notes change now and then."""
    path = tmp_path / "tones"
    path.mkdir()
    write_tones(path, "duo", ((72, 76, 72), (48, 43, 48)))
    return path


def write_tones(folder, name, players, seconds=1.0):
    audio, tracks = 0.0, []
    for player in players:
        t = np.arange(int(seconds * SAMPLERATE)) / SAMPLERATE
        notes = [
            0.2 * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t) * np.hanning(len(t)) ** 0.2 for midi in player
        ]
        audio = audio + np.concatenate(notes)
        ticks = int(960 * seconds)
        tracks.append([m for k, midi in enumerate(player) for m in note_messages(midi, k * ticks, (k + 1) * ticks)])
    soundfile.write(folder / f"{name}.wav", audio, SAMPLERATE)
    write_midi(folder / f"{name}.mid", *tracks)


def test_a_window_network_reads_whole_files(tones, window_model, tmp_path):
    report = evaluate.evaluate(window_model, tones, predictions=tmp_path)
    assert report["format"] == "rt-mpe window 1" and not report["live"] and report["lookahead"] is None
    assert report["mix_F1"] > 70
    assert report["stem_F1"] == pytest.approx(report["mix_F1"], abs=3)
    assert report["head_polyphony"] > 95
    assert not any(name.startswith("live_") for name in report)
    kept = np.load(tmp_path / "duo.npz")
    n_frames = -(-3 * SAMPLERATE // 512)
    assert kept["mix"].shape == (72, n_frames) and kept["slots"].shape == (3, 72, n_frames)
    assert kept["polyphony"].shape == (n_frames, 8) and kept["timbre"].shape == (-(-n_frames // WINDOW), 3, 128)


def test_a_window_network_through_the_engine_has_live_figures_too(tones, window_model):
    report = evaluate.evaluate(window_model, tones, live=True)
    assert report["live"] and report["live_mix_F1"] > 70
    assert report["head_polyphony"] is None


def test_frames_of_a_file_are_those_of_training():
    torch = pytest.importorskip("torch")
    from realtime_mpe.training.frontend import FrontEnd

    samples = np.random.default_rng(0).normal(0, 0.1, 20_000).astype(np.float32)
    wanted = FrontEnd(PAPER)(torch.from_numpy(samples)[None])[0].numpy()  # row i is centred on sample 512 i
    assert predict.levels(samples) == pytest.approx(wanted[: -(-len(samples) // 512)], abs=1e-3)


def test_windows_do_not_overlap_and_the_last_is_filled_with_silence(window_model):
    network = predict.WindowNetwork(window_model)
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.1, SAMPLERATE * 2).astype(np.float32)
    frames = predict.levels(samples)
    assert len(frames) == -(-len(samples) // 512)
    found = network.predict(samples)
    own = frames[:, 1::3].T
    assert found.mix == pytest.approx(1 / (1 + np.exp(-(40 * own - 30))), abs=1e-5)


def test_files_side_by_side_give_the_same_figures(tones, window_model):
    write_tones(tones, "trio", ((72, 71), (60, 64), (40, 45)))
    alone, together = (evaluate.evaluate(window_model, tones, jobs=jobs) for jobs in (1, 2))
    for report in (alone, together):
        del report["rtf"]
        for row in report["each"].values():
            del row["rtf"]
    assert alone == together


def test_thresholds_travel_in_the_model_file(tones, tmp_path):
    thresholds = json.dumps({"mix": 0.35, "slots": 0.6})
    model = write_window_model(tmp_path / "m.onnx", frame_thresholds=thresholds)
    report = evaluate.evaluate(model, tones)
    assert (report["thresholds"], report["mix_threshold"], report["stem_threshold"]) == ("model file", 0.35, 0.6)
    with pytest.raises(UserError, match="frame_thresholds"):
        evaluate.evaluate(write_window_model(tmp_path / "m.onnx", frame_thresholds="[0.5]"), tones)


def test_the_slots_timbre_is_held_against_the_teachers(window_model, teacher, tmp_path):
    """The teacher says of both stems what the network says of its first slot, and hears nothing of a third one."""
    t = np.arange(3 * SAMPLERATE) / SAMPLERATE
    tones = [0.3 * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t).astype(np.float32) for midi in (72, 48)]
    stems = [SimpleNamespace(name=str(m), family="other", notes=line(m, count=1, seconds=3.0)) for m in (72, 48)]
    short = SimpleNamespace(name="short", family="other", notes=line(90, count=1, seconds=0.1))

    unheard = SimpleNamespace(name="no recording", family="other", notes=line(80, count=1, seconds=3.0))
    piece = SimpleNamespace(name="duo", seconds=3.0, mixture=None, stems=(*stems, short, unheard))
    piece.read = lambda: SimpleNamespace(mixture=sum(tones), stems=[*tones, tones[0], None])
    listening = evaluate.Listening(str(window_model), False, Settings(), teacher)
    heard = evaluate.listen(piece, listening, tmp_path / "a.npz")
    judged = evaluate.judge(piece, heard.path, 0.5, ("stem", "family"))
    stem, family = judged.slots["stem", "model"], judged.slots["family", "model"]
    assert (stem.cosine, stem.cosines) == (pytest.approx(1), 2)  # one right, one wrong
    assert family.cosines == 1


def test_a_file_of_another_kind_is_no_teacher(tones, window_model):
    with pytest.raises(UserError, match="no timbre teacher"):
        evaluate.evaluate(window_model, tones, timbre=window_model)
