"""Risks: a take that does not line up with its sound, a killed program that takes the music along."""

import os
import signal
import subprocess
import sys
import time

import mido
import numpy as np
import pytest
import soundfile


def onsets(path):
    now, found = 0.0, []
    for message in mido.MidiFile(path):
        now += message.time
        if message.type == "note_on" and message.velocity:
            found.append((round(now, 3), message.note))
    return found


def test_sound_and_notes_of_a_take_begin_at_the_same_sample(rt_mpe, tiny_model, tune_wav, tmp_path):
    ended = rt_mpe("listen", "--source", f"file:{tune_wav}", "--model", tiny_model, "--record", tmp_path / "take")
    assert ended.code == 0 and sorted(os.listdir(tmp_path)) == ["take.mid", "take.wav"]
    played, rate = soundfile.read(tune_wav, dtype="float32", always_2d=True)
    recorded, recorded_rate = soundfile.read(tmp_path / "take.wav", dtype="float32")
    assert rate == recorded_rate
    np.testing.assert_array_equal(recorded, played.mean(1, dtype=np.float32))
    rt_mpe("transcribe", tmp_path / "take.wav", "-o", tmp_path / "again.mid", "--model", tiny_model)
    assert onsets(tmp_path / "again.mid") == onsets(tmp_path / "take.mid") != []


def test_a_suffix_asks_for_one_of_the_two_and_an_offset_moves_the_notes(rt_mpe, tiny_model, tune_wav, tmp_path):
    base = ["listen", "--source", f"file:{tune_wav}", "--model", tiny_model, "--quiet", "--record"]
    assert rt_mpe(*base, tmp_path / "a.mid").code == 0
    assert rt_mpe(*base, tmp_path / "b.wav").code == 0
    assert rt_mpe(*base, tmp_path / "c.mid", "--record-offset", "250").code == 0
    assert sorted(os.listdir(tmp_path)) == ["a.mid", "b.wav", "c.mid"]
    moved = [(pytest.approx(second + 0.25, abs=2e-3), midi) for second, midi in onsets(tmp_path / "a.mid")]
    assert onsets(tmp_path / "c.mid") == moved


def test_an_earlier_take_in_the_way_leaves_nothing_behind(rt_mpe, tiny_model, tune_wav, tmp_path):
    (tmp_path / "take.wav").write_bytes(b"precious")
    ended = rt_mpe("listen", "--source", f"file:{tune_wav}", "--model", tiny_model, "--record", tmp_path / "take")
    assert ended.code == 2 and "take.wav" in ended.err[0]
    assert os.listdir(tmp_path) == ["take.wav"] and (tmp_path / "take.wav").read_bytes() == b"precious"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing is killed like that here")
def test_a_take_survives_being_killed(tiny_model, tmp_path, tune):
    soundfile.write(tmp_path / "long.wav", np.tile(tune(), 10), 16_000)
    command = [sys.executable, "-m", "realtime_mpe.cli", "listen", "--source", f"file:{tmp_path / 'long.wav'}"]
    command += ["--model", str(tiny_model), "--record", str(tmp_path / "take"), "--sink", "json:-", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()  # the first note
        begun = time.monotonic()
        time.sleep(5.0)
        process.kill()
        heard = time.monotonic() - begun
        sent = [line for line in process.stdout if '"note_on"' in line]
    samples, rate = soundfile.read(tmp_path / "take.wav")
    assert heard - 1.5 < len(samples) / rate < heard + 3.0
    kept = onsets(tmp_path / "take.mid")
    seconds = [float(line.partition('"emitted": ')[2].partition(",")[0].rstrip("}\n")) for line in sent]
    early = sum(second < max(seconds) - 1.5 for second in seconds)
    assert 0 < early <= len(kept) <= len(sent) + 1
