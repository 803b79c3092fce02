"""`rt-mpe train` from nothing but what pip installed: it makes a model that plays, resumes, and repeats itself."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from realtime_mpe.errors import UserError
from realtime_mpe.model import OnnxModel
from realtime_mpe.training import calibrate, casting, company, fit, grouping, players, pointer, rendering, stems, train
from realtime_mpe.training.network import NetworkConfig
from realtime_mpe.training.synth import SynthInstrument

ARGUMENTS = "--hours 0.004 --segments 3 --performances 2 --workers 1 --size test".split()


@pytest.fixture
def small(monkeypatch):
    """Everything as in earnest, only less of it."""
    monkeypatch.setitem(train.SIZES, "test", NetworkConfig(channels=16, embedding_channels=16, embedding_dim=8))
    monkeypatch.setattr(rendering, "SEGMENT_SECONDS", 9.0)
    monkeypatch.setattr(rendering, "FEWEST_SEGMENTS", 3)
    monkeypatch.setattr(train, "CALIBRATION_MIXTURES", 2)
    monkeypatch.setattr(train, "FEWEST_PERFORMANCES", 2)
    monkeypatch.setattr(rendering, "SYNTH_INSTRUMENTS", 16)
    monkeypatch.setattr(fit, "VALIDATION_MIXTURES", 2)
    monkeypatch.setattr(fit, "VALIDATION_FRAMES", 256)
    monkeypatch.setattr(calibrate, "GRIDS", {"on": (0.02, 0.5), "off": (0.01,), "onset": (0.5,), "repeat": (0.5,)})
    monkeypatch.setattr(company, "STEPS", 40)
    monkeypatch.setattr(players, "STEPS_A_PERFORMANCE", 3)
    monkeypatch.setattr(grouping, "FEWEST_STEPS", 50)
    monkeypatch.setattr(pointer, "FOLLOW_TRUTH", (1.0, 0.5))
    monkeypatch.setattr(pointer, "EPOCHS", 2)
    monkeypatch.setattr(pointer, "VOTERS", 2)


def test_training_from_nothing_makes_a_model_that_plays(rt_mpe, small, tmp_path, tune_wav):
    run = tmp_path / "run"
    assert rt_mpe("train", "-o", run, *ARGUMENTS).code == 0
    info = OnnxModel(str(run / "model.onnx")).info
    assert info.training["hours_heard"] >= 0.004
    assert "--segments 3" in info.training["command"]
    assert not (run / "stems" / "chamber").exists()  # no synthesizer plays in an orchestra
    assert rt_mpe("transcribe", tune_wav, "-o", tmp_path / "a.mid", "--model", run / "model.onnx").code == 0

    # A second run with more hours goes on from the checkpoint and renders nothing again.
    before = {p: p.stat().st_mtime_ns for p in run.glob("stems/*/*.npz")}
    steps = json.loads((run / "progress.json").read_text())["step"]
    again = rt_mpe("train", "-o", run, *ARGUMENTS, "--hours", "0.008")
    assert again.code == 0 and any("resuming" in line for line in again.out)
    assert json.loads((run / "progress.json").read_text())["step"] > steps
    assert {p: p.stat().st_mtime_ns for p in run.glob("stems/*/*.npz")} == before

    other_size = rt_mpe("train", "-o", run, *ARGUMENTS[:-1], "small")
    assert other_size.code == 2 and "another size" in other_size.err[-1]

    assert rt_mpe("export", run, "-o", tmp_path / "b.onnx").code == 0
    assert OnnxModel(str(tmp_path / "b.onnx")).info.training == OnnxModel(str(run / "model.onnx")).info.training


def test_a_tiny_network_is_trained_without_a_branch(rt_mpe, small, tmp_path, tune_wav):
    assert rt_mpe("train", "-o", tmp_path, *ARGUMENTS[:-1], "tiny").code == 0
    info = OnnxModel(str(tmp_path / "model.onnx")).info
    assert info.voices == 1
    assert "embedding" not in json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[-1])
    assert rt_mpe("transcribe", tune_wav, "-o", tmp_path / "a.mid", "--model", tmp_path / "model.onnx").code == 0


def test_a_network_that_hears_nothing_yet_is_told_to_hear_more(rt_mpe, small, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "GRIDS", {"on": (0.999,)})
    ended = rt_mpe("train", "-o", tmp_path / "run", *ARGUMENTS)
    assert ended.code == 2 and "--hours" in ended.err[-1]


def test_a_network_that_gets_no_better_ends_early(rt_mpe, small, tmp_path, monkeypatch):
    scores = fit.Scores(0.1, 0.1, 0.1, 0.5)
    monkeypatch.setattr(fit, "validate", lambda *_: scores)
    caches = {"train": None, "validation": None}
    for name in caches:
        folder = tmp_path / name
        stems.render(folder, None, [SynthInstrument(k) for k in range(4)], 2, seconds=9.0)
        caches[name] = stems.StemCache(folder)
    config = fit.FitConfig(hours=100.0, validate_every=1e-6, patience=1, n_frames=64)
    fit.fit(tmp_path, *caches.values(), config, train.SIZES["test"], torch.device("cpu"), say=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [row["stale"] for row in rows] == [0, 1]
    assert {"mix", "onset", "polyphony", "embedding", "same_player_auc"} <= set(rows[-1])


def test_interrupted_training_says_how_to_go_on_and_keeps_its_checkpoint(rt_mpe, small, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "learning_rate", interrupt)
    ended = rt_mpe("train", "-o", tmp_path / "run", *ARGUMENTS)
    assert ended.code == 130
    assert any("goes on" in line for line in ended.err)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--hours", "0"], "--hours 0"),
        (["--scores", "nowhere"], "nowhere"),
        (["--samples", "nowhere"], "nowhere"),
        (["--soundfont", "nowhere.sf2"], "nowhere.sf2"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_arguments_are_one_line(rt_mpe, tmp_path, argv, wanted):
    ended = rt_mpe("train", "-o", tmp_path / "run", *argv)
    assert ended.code == 2
    assert len(ended.err) == 1 and wanted in ended.err[0]


def test_exporting_an_unfinished_run_says_what_is_missing(rt_mpe, tmp_path):
    ended = rt_mpe("export", tmp_path, "-o", tmp_path / "m.onnx")
    assert ended.code == 2 and "run.json" in ended.err[0]


def test_pieces_and_instruments_are_held_out():
    training, held_out = rendering.instruments(rendering.Sounds())
    assert held_out and not {i.name for i in training} & {i.name for i in held_out}
    names = [f"piece {k}" for k in range(400)]
    assert 20 < sum(rendering.is_held_out(n) for n in names) < 90


def test_of_a_few_scores_composed_ones_validate(monkeypatch):
    def given(*names):
        monkeypatch.setattr(
            rendering, "load_scores", lambda folder: [SimpleNamespace(name=n, parts=[0, 0]) for n in names]
        )
        return rendering.scores(rendering.Sounds(scores=(Path("scores"),)))

    held_out = next(name for name in map(str, range(100)) if rendering.is_held_out(name))
    others = [name for name in map(str, range(100)) if not rendering.is_held_out(name)][:3]
    train, validation = given(held_out, *others)
    assert [s.name for s in train] == others and [s.name for s in validation] == [held_out]
    train, validation = given(*others)
    assert [s.name for s in train] == others and validation is None
    with pytest.raises(UserError, match="too few"):
        given(held_out)


def test_an_ensemble_is_of_one_family():
    names = ["philharmonia:viola", "bank:40", "bank:56", "philharmonia:tuba", "synth:pad-3", "bank:0"]
    assert casting.members(names, "strings") == [0, 1]
    assert casting.members(names, "brass") == [2, 3]
    assert casting.members(names, "orchestra") == [0, 1, 2, 3]
    drawn = {tuple(casting.draw_family(names, np.random.default_rng(seed))) for seed in range(40)}
    assert {(0, 1), (2, 3), (0, 1, 2, 3), (5,)} <= drawn
    assert casting.draw_family(["synth:pad-3"], np.random.default_rng(0)) == [0]


@pytest.mark.parametrize("family", ["strings", "orchestra"])
@pytest.mark.parametrize("seed", range(20))
def test_in_chamber_music_every_part_has_an_instrument_that_reaches_it(seed, family, monkeypatch):
    monkeypatch.setattr(casting, "CHAMBER_SHARES", {family: 1.0})
    reaches = {"violin": (55, 94), "viola": (48, 84), "cello": (36, 72), "flute": (60, 94), "tuba": (26, 60)}
    orchestra = [
        SimpleNamespace(name=f"{source}:{kind}", low=low, high=high)
        for source in "ab"
        for kind, (low, high) in reaches.items()
    ]
    rng = np.random.default_rng(seed)
    parts = [np.array([(k, k + 1.0, middle + k, 80) for k in range(5)]) for middle in (80, 62, 40)]
    cast = casting.cast_chamber(orchestra, parts, rng)
    for able in cast:
        assert [p.name[0] for p in able] == ["a", "b"] and len({p.name[2:] for p in able}) == 1
    if family == "strings":
        assert {p[0].name[2:] for p in cast} <= {"violin", "viola", "cello"}
        assert casting.out_of_reach(cast[0][0], parts[0][:, 2]) <= casting.SLACK
    assert casting.cast_chamber([SimpleNamespace(name="a:pad-3", low=30, high=90)], parts, rng) == [[], [], []]


def test_exporting_a_run_of_an_earlier_version_says_how_to_mend_it(rt_mpe, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"size": "live"}))
    torch.save({"average": {}}, tmp_path / "checkpoint.pt")
    torch.save(pointer.PointerNetwork().state_dict(), tmp_path / "players.pt")
    ended = rt_mpe("export", tmp_path, "-o", tmp_path / "m.onnx")
    assert ended.code == 2 and len(ended.err) == 1 and "earlier version" in ended.err[0]
