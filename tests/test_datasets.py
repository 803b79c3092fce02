import argparse
import json
import pickle
import sys
import types

import mido
import numpy as np
import pytest
import soundfile
from scipy.io import savemat

from realtime_mpe.analysis import SAMPLERATE
from realtime_mpe.errors import UserError
from realtime_mpe.training.data.check import add_check, run_check
from realtime_mpe.training.data.datasets import DataSet, Piece, family_of, open_dataset
from realtime_mpe.training.data.splits import load_split, missing_pieces


def write_audio(path, seconds=2.0, rate=SAMPLERATE, level=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, level * np.ones(int(seconds * rate)), rate, subtype="PCM_16")
    return path


def write_midi(path, tracks):
    """tracks : name -> (onset s, offset s, MIDI) each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    midi = mido.MidiFile(ticks_per_beat=500)  # at 120 beats a minute a tick is a millisecond
    for name, notes in tracks.items():
        events = sorted(
            (round(1000 * time), kind, pitch)
            for onset, offset, pitch in notes
            for time, kind, pitch in ((onset, "note_on", pitch), (offset, "note_off", pitch))
        )
        track = mido.MidiTrack([mido.MetaMessage("track_name", name=name)])
        before = 0
        for tick, kind, pitch in events:
            track.append(mido.Message(kind, note=pitch, velocity=80, time=tick - before))
            before = tick
        midi.tracks.append(track)
    midi.save(path)


def urmp_piece(root, folder="01_Jupiter_vn_vc", mixture=True, audio=True):
    number, title, *codes = folder.split("_")
    piece = root / folder
    piece.mkdir(parents=True)
    if mixture:
        write_audio(piece / f"AuMix_{folder}.wav", level=0.1 * len(codes))
    for k, code in enumerate(codes, 1):
        (piece / f"Notes_{k}_{code}_{number}_{title}.txt").write_text("0.5\t\t445.0\t\t0.25\n1 220.5  0.5\n\n")
        if audio:
            write_audio(piece / f"AuSep_{k}_{code}_{number}_{title}.wav")
    return piece


def mshoxx_piece(root, title="Waltz", midis=None):
    """midis : file name -> tracks."""
    piece = root / f"{title}_v1"
    for name in ("", "_violin1", "_englishhorn", "_drumset"):
        write_audio(piece / f"{title}_v1{name}.flac", rate=44_100)
    one = {"violin1": [(0.5, 1.0, 69)], "englishhorn": [(0.25, 1.5, 60)]}
    for name, tracks in (midis or {f"{title}_v1_{k}.mid": {"x": notes} for k, notes in one.items()}).items():
        write_midi(piece / name, tracks)
    return piece


def slakh_track(root, name="Track00001", suffix=".flac"):
    stems = {
        "S00": dict(midi_program_name="Violin", program_num=40, is_drum=False, audio_rendered=True),
        "S01": dict(midi_program_name="Drums", program_num=128, is_drum=True, audio_rendered=True),
        "S02": dict(midi_program_name="Tuba", program_num=58, is_drum=False, audio_rendered=False),
    }
    track = root / name
    write_audio(track / f"mix{suffix}")
    for stem in ("S00", "S01"):
        write_audio(track / "stems" / f"{stem}{suffix}")
        write_midi(track / "MIDI" / f"{stem}.mid", {"": [(0.5, 1.0, 69)]})
    (track / "metadata.yaml").write_text(json.dumps({"stems": stems}))  # which is YAML too
    return track


def bach10_piece(root, name="01-AchGott"):
    piece = root / name
    notes = np.empty((4, 1), object)
    for part, file_name in enumerate(("violin", "clarinet", "saxphone", "bassoon")):
        write_audio(piece / f"{name}-{file_name}.wav")
        notes[part, 0] = np.empty((1, 1), object)
        notes[part, 0][0, 0] = np.array([[11, 12, 13, 14], [69.2, 69.4, 68.9, 69.3]]) + [[0], [part]]
    savemat(piece / f"{name}-GTNotes.mat", {"GTNotes": notes})
    return piece


def musicnet_piece(root, name="1759", side="train", header="start_time,end_time,instrument,note"):
    write_audio(root / f"{side}_data" / f"{name}.wav", rate=44_100)
    labels = root / f"{side}_labels" / f"{name}.csv"
    labels.parent.mkdir(exist_ok=True)
    labels.write_text(f"{header},x\n44100,66150,41,69,Quarter\n22050,44100,74,72,Quarter\n")
    return labels


def excerpt(root, name="T01"):
    folder = root / name
    write_audio(folder / "mix.flac")
    for stem in ("01_double-bass", "02_lead-horn", "03_drums"):
        write_audio(folder / "stems" / f"{stem}.flac")
    write_midi(folder / "notes.mid", {"01_double-bass": [(0.5, 1.0, 40)], "02_lead-horn": [(0.5, 1.0, 70)]})
    stems = [
        dict(name="01_double-bass", program=43, source="phil", drum=False),
        dict(name="02_lead-horn", program="60", source="am", drum=False),
        dict(name="03_drums", program=0, source="drums", drum=True),
    ]
    (folder / "meta.json").write_text(json.dumps({"stems": stems}))
    return folder


def rendered_segment(root, index=0):
    root.mkdir(exist_ok=True)
    names = ["philharmonia:violin", "synth:bowed-3", "fluidr3_gm:73", "drums:kit"]
    np.savez(
        root / f"{index:05d}.npz",
        audio=np.outer([1, 2, 4, 8], np.ones(SAMPLERATE)).astype(np.int16) * 1000,
        notes=np.array([[0, 0.25, 0.5, 69, 90], [1, 0.25, 0.5, 69, 90], [2, 0.0, 0.75, 72, 64]], np.float32),
        part=np.array([0, 0, 1, -1], np.int16),  # two takes of part 0
        instrument=np.array(names),
        score=np.array("a.mid"),
    )


def check(folder, *options):
    parser = argparse.ArgumentParser()
    add_check(parser.add_subparsers())
    return run_check(parser.parse_args(["check", str(folder), *options]))


def described(piece):
    return [(stem.instrument, stem.family) for stem in piece.stems]


# Families


@pytest.mark.parametrize(
    "name, program, family",
    [
        *[(code, None, "strings") for code in ("vn", "va", "vc", "db")],
        *[(code, None, "woodwinds") for code in ("fl", "ob", "cl", "sax", "bn")],
        *[(code, None, "brass") for code in ("tpt", "hn", "tbn", "tba")],
        *[("", program, "strings") for program in (40, 46, 48, 51)],
        *[("", program, "brass") for program in (56, 63)],
        *[("", program, "woodwinds") for program in (64, 79)],
        *[("violin", program, "other") for program in (0, 33, 39, 47, 52, 55, 80, 128)],
        *[(name, None, "strings") for name in ("Violin 2", "double-bass", "Contrabass", "violas")],
        *[
            (name, None, "woodwinds")
            for name in ("english-horn", "englishhorn", "cor anglais", "bass clarinet", "contrabassoon")
        ],
        *[(name, None, "brass") for name in ("french-horn", "Horn", "bass trombone")],
        *[(name, None, "other") for name in ("bass guitar", "bass", "synth bass", "synth brass", "piano", "")],
    ],
)
def test_families(name, program, family):
    assert family_of(name, program) == family


# Layouts


def test_urmp_rows_are_onset_frequency_duration(tmp_path):
    urmp_piece(tmp_path)
    dataset = open_dataset(tmp_path)
    (piece,) = dataset.pieces
    assert (dataset.name, dataset.problems, piece.seconds) == ("URMP", (), 2.0)
    assert described(piece) == [("violin", "strings"), ("cello", "strings")]
    np.testing.assert_array_equal(piece.stems[0].notes, [[0.5, 0.75, 69], [1.0, 1.5, 57]])
    recording = piece.read()
    assert [len(stem) for stem in recording.stems] == [2 * SAMPLERATE] * 2
    np.testing.assert_allclose(recording.mixture, 0.2, atol=1e-4)


def test_urmp_pieces_that_share_recordings_are_one_group(tmp_path):
    for number in (1, 24, 25, 28, 29, 30):
        urmp_piece(tmp_path, f"{number:02d}_Name_fl")
    groups = [piece.group for piece in open_dataset(tmp_path).pieces]
    assert groups[1] == groups[2] and groups[3] == groups[4] == groups[5] and len(set(groups)) == 3


def test_mixture_without_a_file_is_the_sum_and_stems_may_lack_audio(tmp_path):
    urmp_piece(tmp_path, "01_A_vn_vc", mixture=False)
    urmp_piece(tmp_path, "02_B_vn_vc", audio=False)
    urmp_piece(tmp_path, "03_C_vn_vc", mixture=False, audio=False)
    dataset = open_dataset(tmp_path)
    summed, alone = dataset.pieces
    assert summed.mixture is None
    np.testing.assert_allclose(summed.read().mixture, 0.2, atol=1e-4)
    assert [stem.audio for stem in alone.stems] == alone.read().stems == [None, None]
    (problem,) = dataset.problems
    assert "03_C_vn_vc" in problem and "mixture" in problem


@pytest.mark.parametrize(
    "midis",
    [
        None,
        {"all.mid": {"Violin 1": [(0.5, 1.0, 69)], "English Horn": [(0.25, 1.5, 60)], "Horn": [(0, 1, 40)]}},
        {"midi/01-violin1.mid": {"x": [(0.5, 1.0, 69)]}, "midi/02-englishhorn.mid": {"y": [(0.25, 1.5, 60)]}},
    ],
)
def test_mshoxxdb_finds_notes_by_file_or_track(tmp_path, midis):
    mshoxx_piece(tmp_path, midis=midis)
    dataset = open_dataset(tmp_path)
    (piece,) = dataset.pieces
    assert (dataset.name, dataset.problems) == ("mshoxxDB", ())
    assert described(piece) == [("englishhorn", "woodwinds"), ("violin", "strings")]
    np.testing.assert_allclose(piece.stems[0].notes, [[0.25, 1.5, 60]])
    np.testing.assert_allclose(piece.stems[1].notes, [[0.5, 1.0, 69]])
    assert [path.name for path in piece.distractors] == ["Waltz_v1_drumset.flac"]
    np.testing.assert_allclose(piece.read().mixture[100:-100], 0.1, atol=1e-3)  # not the sum of its stems
    assert len(piece.read().mixture) == 2 * SAMPLERATE


@pytest.mark.parametrize(
    "header", ["start_time,end_time,instrument,note", "start_sample,end_sample,instrument_id,midi_note"]
)
def test_musicnet_times_are_samples_and_programs_count_from_one(tmp_path, header):
    musicnet_piece(tmp_path, header=header)
    (piece,) = open_dataset(tmp_path).pieces
    assert (piece.name, piece.seconds) == ("1759", 2.0)
    assert described(piece) == [("violin", "strings"), ("flute", "woodwinds")]
    np.testing.assert_array_equal(piece.stems[0].notes, [[1.0, 1.5, 69]])
    assert piece.read().stems == [None, None]


@pytest.fixture
def musicnet_npz(tmp_path, monkeypatch):
    """The archive as intervaltree would have pickled it; the package itself is not there when it is read."""
    package, module = types.ModuleType("intervaltree"), types.ModuleType("intervaltree.intervaltree")

    class IntervalTree:
        def __init__(self, intervals):
            self.intervals = intervals

        def __reduce__(self):
            return IntervalTree, (self.intervals,)

    class Interval:
        def __init__(self, *fields):
            self.fields = fields

        def __reduce__(self):
            return Interval, self.fields

    for kind in (IntervalTree, Interval):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, module.__name__, module)
        recording = np.empty(2, object)
        recording[:] = (
            np.full(88_200, 0.1, np.float32),
            IntervalTree([Interval(44_100, 66_150, (41, 69, 0, 0.0, "Half"))]),
        )
        np.savez(tmp_path / "musicnet.npz", **{"2303": recording})
    return tmp_path / "musicnet.npz"


def test_musicnet_archive_reads_like_its_tables(musicnet_npz):
    (piece,) = open_dataset(musicnet_npz.parent).pieces
    assert (piece.name, piece.seconds, described(piece)) == ("2303", 2.0, [("violin", "strings")])
    np.testing.assert_array_equal(piece.stems[0].notes, [[1.0, 1.5, 69]])
    assert len(piece.read().mixture) == 2 * SAMPLERATE


class Intruder:
    def __reduce__(self):
        return exec, ("import sys; sys.intruded = True",)


def test_musicnet_archive_cannot_run_code(tmp_path):
    recording = np.empty(2, object)
    recording[:] = np.zeros(10, np.float32), Intruder()
    np.savez(tmp_path / "musicnet.npz", **{"2303": recording})
    dataset = open_dataset(tmp_path)
    assert not dataset.pieces and "exec is not allowed" in dataset.problems[0]
    assert not hasattr(sys, "intruded")


@pytest.mark.parametrize("below", ["train", "slakh2100_flac_redux/test", "."])
def test_slakh_keeps_what_was_rendered(tmp_path, below):
    slakh_track(tmp_path / below, suffix=".wav" if below == "." else ".flac")
    dataset = open_dataset(tmp_path)
    (piece,) = dataset.pieces
    assert (dataset.name, dataset.problems, described(piece)) == ("Slakh", (), [("Violin", "strings")])
    np.testing.assert_allclose(piece.stems[0].notes, [[0.5, 1.0, 69]])
    assert [path.stem for path in piece.distractors] == ["S01"]


def test_slakh_leaves_the_omitted_duplicates_out(tmp_path):
    slakh_track(tmp_path / "train")
    slakh_track(tmp_path / "omitted", "Track00002")
    assert [piece.name for piece in open_dataset(tmp_path).pieces] == ["Track00001"]


def test_slakh_notes_are_read_when_asked_for_also_in_another_process(tmp_path):
    track = slakh_track(tmp_path)
    (track / "MIDI" / "S00.mid").write_bytes(b"no MIDI")
    (piece,) = open_dataset(tmp_path).pieces
    with pytest.raises(UserError, match="S00.mid cannot be read as MIDI"):
        _ = piece.stems[0].notes
    write_midi(track / "MIDI" / "S00.mid", {"": [(0.5, 1.0, 69)]})
    np.testing.assert_allclose(pickle.loads(pickle.dumps(piece)).stems[0].notes, [[0.5, 1.0, 69]])


def test_bach10_notes_last_from_edge_to_edge_of_their_frames(tmp_path):
    bach10_piece(tmp_path)
    dataset = open_dataset(tmp_path)
    (piece,) = dataset.pieces
    assert (dataset.name, dataset.problems) == ("Bach10", ())
    assert described(piece) == [
        ("violin", "strings"),
        *[(name, "woodwinds") for name in ("clarinet", "saxophone", "bassoon")],
    ]
    for part, stem in enumerate(piece.stems):
        np.testing.assert_allclose(stem.notes, [[0.018 + 0.10, 0.028 + 0.13, 69 + part]])
    np.testing.assert_allclose(piece.read().mixture, 0.4, atol=1e-3)


def test_rendered_stems_are_the_first_takes(tmp_path):
    rendered_segment(tmp_path)
    (piece,) = open_dataset(tmp_path).pieces
    assert described(piece) == [("philharmonia:violin", "strings"), ("fluidr3_gm:73", "woodwinds")]
    np.testing.assert_allclose(piece.stems[0].notes, [[0.25, 0.5, 69]])
    recording = piece.read()
    np.testing.assert_allclose(recording.mixture, 5000 / 32767, atol=1e-6)
    assert piece.seconds == len(recording.stems[1]) / SAMPLERATE == 1.0


def test_excerpts_have_a_track_a_stem(tmp_path):
    excerpt(tmp_path)
    (piece,) = open_dataset(tmp_path).pieces
    assert described(piece) == [("double-bass", "strings"), ("lead-horn", "other")]
    np.testing.assert_allclose(piece.stems[0].notes, [[0.5, 1.0, 40]])
    assert [path.stem for path in piece.distractors] == ["03_drums"]


def test_flat_folders_pair_files_by_name(tmp_path):
    write_audio(tmp_path / "a.wav")
    write_audio(tmp_path / "alone.wav")
    write_midi(tmp_path / "a.mid", {"Oboe": [(0.5, 1.0, 69)], "Piano": [(0.5, 1.0, 60)]})
    (tmp_path / "all.txt").write_text("a\n")
    dataset = open_dataset(tmp_path)
    (piece,) = dataset.pieces
    assert described(piece) == [("Oboe", "woodwinds"), ("Piano", "other")]
    assert len(dataset.problems) == 1 and "alone.wav" in dataset.problems[0]


def test_an_unknown_layout_is_told_what_was_seen(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"URMP, Bach10, MusicNet, mshoxxDB, Slakh.*it holds holiday\.jpg"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="layout 'urmpp' is unknown; known are URMP"):
        open_dataset(tmp_path, "urmpp")
    with pytest.raises(UserError, match="no folder"):
        open_dataset(tmp_path / "nowhere")


# What is broken


BREAK = {  # a way to break the second of two pieces, and what is said of it
    "URMP, no label": (urmp_piece, "02_B_vn_vc", lambda p: (p / "Notes_2_vc_02_B.txt").unlink(), "AuSep_2_vc_02_B.wav"),
    "URMP, label": (urmp_piece, "02_B_vn_vc", lambda p: (p / "Notes_2_vc_02_B.txt").write_text("x y z"), "Notes_2_vc"),
    "URMP, audio": (urmp_piece, "02_B_vn_vc", lambda p: (p / "AuSep_2_vc_02_B.wav").write_bytes(b"x"), "AuSep_2_vc"),
    "mshoxxDB": (mshoxx_piece, "Polka", lambda p: (p / "Polka_v1_violin1.mid").unlink(), "'violin1'"),
    "Slakh, no label": (slakh_track, "Track00002", lambda p: (p / "MIDI/S00.mid").unlink(), "S00.mid"),
    "Slakh, mixture": (slakh_track, "Track00002", lambda p: (p / "mix.flac").write_bytes(b"x"), "mix.flac"),
    "Slakh, metadata": (slakh_track, "Track00002", lambda p: (p / "metadata.yaml").write_text("[:"), "metadata.yaml"),
    "Bach10": (bach10_piece, "02-Name", lambda p: (p / "02-Name-GTNotes.mat").write_bytes(b"x" * 200), "GTNotes"),
    "Bach10, cut": (bach10_piece, "02-Name", lambda p: (p / "02-Name-GTNotes.mat").write_bytes(b"x"), "GTNotes"),
    "MusicNet, label": (musicnet_piece, "9", lambda p: p.write_text("no,table\n1,2"), "start_sample"),
    "MusicNet, no label": (musicnet_piece, "9", lambda p: p.unlink(), "9.wav"),
    "excerpts": (excerpt, "T02", lambda p: (p / "notes.mid").write_bytes(b"x"), "notes.mid"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAK)
def test_a_broken_piece_is_named_and_left_out(tmp_path, capsys, case):
    make, name, spoil, said = BREAK[case]
    make(tmp_path)
    spoil(make(tmp_path, name))
    dataset = open_dataset(tmp_path)
    assert len(dataset.pieces) == 1
    (problem,) = dataset.problems
    assert said in problem and "\n" not in problem
    assert check(tmp_path) == 1
    assert said in capsys.readouterr().out


def test_a_missing_recording_costs_the_isolated_stem_alone(tmp_path):
    piece = urmp_piece(tmp_path)
    (piece / "AuSep_2_vc_01_Jupiter.wav").unlink()
    dataset = open_dataset(tmp_path)
    assert [stem.audio is None for stem in dataset.pieces[0].stems] == [False, True]
    assert "AuSep_2_vc" in dataset.problems[0]


# Splits


def forty_four():
    shared = ((24, 25), (26, 27), (28, 29, 30), (38, 39), (40, 41))
    group = {number: str(numbers) for numbers in shared for number in numbers}
    pieces = [Piece(f"{k:02d}_X_vn", group.get(k, str(k)), None, (), (), 1.0) for k in range(1, 45)]
    return DataSet("URMP", "urmp", tuple(pieces), ())


def test_urmp_split_shares_no_recording_and_keeps_the_held_out_pieces():
    sides = load_split("urmp", forty_four())
    assert {side: len(pieces) for side, pieces in sides.items()} == {"train": 30, "validation": 7, "test": 7}
    groups = [{piece.group for piece in pieces} for pieces in sides.values()]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 38
    assert {12, 26, 27, 38, 39} <= {int(piece.name[:2]) for piece in sides["test"]}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"tset": [1]}, "'tset' is unknown"),
        ({"train": [1, 45]}, "'45' is no piece of URMP; give 1 to 44"),
        ({"train": [1, 2, 1]}, "1 is listed twice"),
        ({"train": [1, 12]}, "12 is listed twice"),
        ({"train": [1, 26]}, "27_X_vn on the test side shares recordings"),
        ({"dataset": "Bach10"}, "is of Bach10, not of URMP"),
        ({"by": "colour"}, "by 'colour'"),
        ({"train": "some"}, "must be a list, not 'some'"),
        ({"validation": "rest"}, "only train may be"),
    ],
)
def test_splits_refuse_what_cannot_be_meant(tmp_path, change, said):
    split = {"dataset": "URMP", "by": "number", "train": [1, 2], "validation": [], "test": [12, 27]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(split))
    assert [len(pieces) for pieces in load_split(path, forty_four()).values()] == [2, 0, 2]
    path.write_text(json.dumps(split | change))
    with pytest.raises(UserError, match=said):
        load_split(path, forty_four())


def test_splits_find_slips_in_names(tmp_path):
    urmp_piece(tmp_path / "urmp")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"dataset": "URMP", "by": "id", "test": ["01_Jupitre_vn_vc"]}))
    with pytest.raises(UserError, match="is '01_Jupiter_vn_vc' meant"):
        load_split(str(path), open_dataset(tmp_path / "urmp"))
    with pytest.raises(UserError, match="'urpm' is unknown; give one of ms12, mun10, slakh, urmp"):
        load_split("urpm", open_dataset(tmp_path / "urmp"))


def test_a_folder_with_a_part_of_a_split_is_no_error(tmp_path):
    urmp_piece(tmp_path / "some", "12_Spring_vn_vn_vc")
    dataset = open_dataset(tmp_path / "some")
    assert [piece.name for piece in load_split("urmp", dataset)["test"]] == ["12_Spring_vn_vn_vc"]
    assert len(missing_pieces("urmp", dataset)) == 43
    none = DataSet("URMP", tmp_path, (), ())
    with pytest.raises(UserError, match="none of its pieces"):
        load_split("urmp", none)


def test_mshoxxdb_comes_with_its_own_lists(tmp_path):
    for title in ("Waltz", "Polka", "March"):
        mshoxx_piece(tmp_path, title)
    dataset = open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"no \*ms12\*\.json"):
        load_split("ms12", dataset)
    lists = {"train": ["Waltz"], "val": ["Polka_v1"], "test": [{"piece_id": "March"}, "Absent"]}
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "split_ms12.json").write_text(json.dumps(lists))
    sides = load_split("ms12", dataset)
    assert [p.name for side in sides.values() for p in side] == ["Waltz_v1", "Polka_v1", "March_v1"]
    assert missing_pieces("ms12", dataset) == ["Absent"]


@pytest.mark.parametrize("row", ["ms07,The Waltz,Waltz_v1.flac", "ms07,Waltz,x", "ms07,Polka No 1,WALTZ"])
def test_mshoxxdb_lists_name_pieces_as_its_metadata_do(tmp_path, row):
    mshoxx_piece(tmp_path)
    (tmp_path / "metadata.csv").write_text(f"piece_id,title,file\nms06,Polka,Polka_v1.flac\n{row}\n")
    (tmp_path / "ms12.json").write_text(json.dumps({"train": ["ms06"], "test": ["ms07"]}))
    dataset = open_dataset(tmp_path)
    assert [piece.name for piece in load_split("ms12", dataset)["test"]] == ["Waltz_v1"]
    assert missing_pieces("ms12", dataset) == ["ms06"]


def test_slakh_split_is_that_of_its_folders(tmp_path):
    for side, track in (("train", "Track00001"), ("train", "Track00002"), ("validation", "Track01501")):
        slakh_track(tmp_path / side, track)
    sides = load_split("slakh", open_dataset(tmp_path))
    assert {side: [p.name for p in pieces] for side, pieces in sides.items()} == {
        "train": ["Track00001", "Track00002"],
        "validation": ["Track01501"],
        "test": [],
    }
    slakh_track(tmp_path / "babyslakh")
    with pytest.raises(UserError, match="none of its pieces"):
        load_split("slakh", open_dataset(tmp_path / "babyslakh"))


def test_musicnet_split_is_the_published_one(tmp_path):
    musicnet_piece(tmp_path, "1759", "test")
    for name in ("1727", "1728", "1729"):
        musicnet_piece(tmp_path, name)
    sides = load_split("mun10", open_dataset(tmp_path))
    assert {side: [p.name for p in pieces] for side, pieces in sides.items()} == {
        "train": ["1727", "1728"],
        "validation": ["1729"],
        "test": ["1759"],
    }


# Check


def test_check_counts(tmp_path, capsys):
    urmp_piece(tmp_path, "12_Spring_vn_vn_vc")
    assert check(tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["minutes"] == pytest.approx(2 / 60)
    expected = dict(dataset="URMP", pieces=1, groups=1, stems=3, isolated=3, notes=6, problems=[])
    assert {key: report[key] for key in expected} == expected
    assert report["instruments"] == {"violin": 2, "cello": 1}
    assert report["families"] == {"strings": 3, "woodwinds": 0, "brass": 0, "other": 0}
    assert report["splits"] == {"urmp": {"train": 0, "validation": 0, "test": 1, "missing": 43}}
    assert check(tmp_path) == 0
    assert "broken       nothing" in capsys.readouterr().out


def test_check_lists_what_opening_does_not_see(tmp_path, capsys):
    track = slakh_track(tmp_path)
    write_audio(track / "stems" / "S00.flac", 1.85)
    (track / "stems" / "S01.flac").write_bytes(b"x")
    write_midi(track / "MIDI" / "S00.mid", {"": [(0.5, 2.05, 69), (1.0, 2.2, 71)]})
    assert not open_dataset(tmp_path).problems
    assert check(tmp_path, "--json") == 1
    length, notes, drums = json.loads(capsys.readouterr().out)["problems"]
    assert "S00.flac: lasts 1.85 s, its mixture 2.00 s" in length
    assert "1 notes of stem S00" in notes
    assert "S01.flac cannot be read as audio" in drums
