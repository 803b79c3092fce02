"""Risks: latency bought with missed notes, a note that is matched twice, a soak that overlooks what it looks for."""

import json
import sys
import textwrap

import mido
import numpy as np
import pytest

from realtime_mpe.errors import UserError
from realtime_mpe.latency import delays, read_onsets, through
from realtime_mpe.soak import drift_ms


def rows(*pairs):
    return np.array(pairs, float).reshape(-1, 2)


def test_delays_by_register_with_what_was_missed_and_made_up():
    true = rows((1.0, 40), (2.0, 60), (3.0, 60), (4.0, 80))
    sent = rows((1.08, 40), (2.04, 60), (3.06, 60), (3.5, 60), (4.5, 80))
    found = delays(true, sent)
    assert (found["all"].matched, found["all"].sent, found["all"].true) == (3, 5, 4)
    assert found["all"].median_ms == pytest.approx(60.0) and found["all"].f1 == pytest.approx(2 * 3 / 9)
    assert found["below C3"].median_ms == pytest.approx(80.0)
    assert found["C3 to B4"].quartiles_ms == pytest.approx((45.0, 55.0))
    assert found["C3 to B4"].precision == pytest.approx(2 / 3) and found["C3 to B4"].recall == 1.0
    assert found["from C5"].median_ms is None and found["from C5"].recall == 0.0


def test_one_note_answers_one_note():
    found = delays(rows((1.0, 60)), rows((1.05, 60), (1.1, 60)))["all"]
    assert (found.matched, found.sent) == (1, 2)
    assert delays(rows((1.0, 60)), rows((0.94, 60), (1.21, 60), (1.05, 61)))["all"].matched == 0


def midi_of(path, notes):
    file = mido.MidiFile(ticks_per_beat=1000)
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=1_000_000)])
    now = 0
    for second, on, midi in sorted((s, k, m) for a, b, m in notes for s, k in ((a, 1), (b, 0))):
        kind = "note_on" if on else "note_off"
        track.append(mido.Message(kind, note=midi, velocity=64, time=round(1000 * second) - now))
        now = round(1000 * second)
    file.tracks.append(track)
    file.save(path)


def test_bench_prints_the_engine_and_a_rig_side_by_side(rt_mpe, tiny_model, tune_wav, tmp_path):
    midi_of(tmp_path / "truth.mid", [(0.5, 0.9, 60), (1.0, 1.4, 64)])
    rig = tmp_path / "rig.py"
    rig.write_text(
        textwrap.dedent("""
            import argparse, json, os
            p = argparse.ArgumentParser()
            for name in ("--wav", "--period", "--out", "--cmd"):
                p.add_argument(name)
            args = p.parse_args()
            assert os.path.exists(args.wav) and "listen --device {device}" in args.cmd and "--lookahead 1" in args.cmd
            json.dump({"notes": [{"on": 0.57, "note": 60}, {"on": 1.09, "note": 64}]}, open(args.out, "w"))
        """)
    )
    words = [
        "bench",
        "--latency",
        tune_wav,
        "--truth",
        tmp_path / "truth.mid",
        "--model",
        tiny_model,
        "--lookahead",
        "1",
    ]
    ended = rt_mpe(*words, "--rig", rig, "--json")
    assert ended.code == 0, ended.err
    report = json.loads("\n".join(ended.out))
    assert list(report) == ["look-ahead 1, engine", "look-ahead 1, rig"]
    assert report["look-ahead 1, rig"]["all"]["median_ms"] == pytest.approx(80.0)
    shown = rt_mpe(*words).out
    assert "look-ahead 1, engine" in shown[0] and len(shown) == 5
    rig.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="gave no result"):
        through(rig, tune_wav, [])


def test_what_bench_cannot_do_is_one_line(rt_mpe, tiny_model, tune_wav, tmp_path):
    (tmp_path / "no.mid").write_bytes(b"MThd nonsense")
    midi_of(tmp_path / "empty.mid", [])
    base = ["bench", "--model", tiny_model]
    for words, wanted in (
        (["--latency", tune_wav], "--truth"),
        (["--truth", "x.mid"], "--latency"),
        (["--latency", tune_wav, "--truth", tmp_path / "no.mid"], "no.mid"),
        (["--latency", tune_wav, "--truth", tmp_path / "empty.mid"], "holds no notes"),
        (["--latency", "nowhere.wav", "--truth", tmp_path / "no.mid"], "no.mid"),
        (["--soak", "0"], "more than 0"),
    ):
        ended = rt_mpe(*base, *words)
        assert ended.code == 2 and len(ended.err) == 1 and wanted in ended.err[0], ended.err


def test_onsets_are_read_as_they_are_played(tmp_path):
    midi_of(tmp_path / "a.mid", [(0.25, 0.5, 60), (1.5, 2.0, 72)])
    np.testing.assert_allclose(read_onsets(tmp_path / "a.mid"), [(0.25, 60), (1.5, 72)], atol=2e-3)


def test_drift_is_seen_where_there_is_some_and_nowhere_else():
    notes = [(0.3, 60), (1.1, 64), (2.7, 60)]
    steady, drifting = [], []
    for repetition in range(40):
        for second, midi in notes:
            steady += [3.0 * repetition + second, midi]
            drifting += [3.0 * repetition + second + 0.001 * repetition, midi]
    assert drift_ms(steady, 3.0) == pytest.approx(0.0, abs=1e-6)
    assert drift_ms(drifting, 3.0) == pytest.approx(36.0, abs=4.0)
    assert drift_ms([], 3.0) == 0.0


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say how much memory is used")
def test_a_short_soak_keeps_every_note(rt_mpe, tiny_model):
    ended = rt_mpe("bench", "--soak", "0.001", "--model", tiny_model, "--json")
    assert ended.code == 0
    found = json.loads("\n".join(ended.out))
    assert found["notes"] == found["taken"] > 0 and found["unended"] == 0 and abs(found["drift_ms"]) < 32
