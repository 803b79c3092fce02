"""The commands: do they stay light, mean what they say, and give the same notes however the engine is fed?"""

import json
import os
import subprocess
import sys
import textwrap
import time

import mido
import numpy as np
import pytest
import soundfile

from realtime_mpe import cli, transcribe
from realtime_mpe.errors import UserError
from realtime_mpe.model import OnnxModel
from realtime_mpe.sinks.base import NoteSink
from realtime_mpe.transcribe import Posteriorgrams, transcribe_file

HOP = 0.032


def python(code, *argv):
    """Run code in a fresh interpreter; what it printed, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def notes_of(path):
    """Notes of an .npz as a list of rows."""
    with np.load(path) as data:
        return data["notes"].tolist()


def without_offset(notes):
    return [(onset, midi, voice, emitted) for onset, _, midi, voice, emitted in notes]


# What is imported


def test_only_the_chosen_command_is_imported():
    loaded = python(
        """
        import json, sys
        from realtime_mpe.cli import main
        heavy = {"torch", "onnxruntime", "sounddevice", "mido", "rtmidi", "numpy", "soundfile", "scipy"}
        at_import = sorted(heavy & set(sys.modules))
        main(["--help"]), main(["--version"]), main(["plugins"])
        print(json.dumps([at_import, sorted((heavy - {"numpy"}) & set(sys.modules))]))
        """
    )
    assert loaded == [[], []]


def test_transcribing_needs_neither_training_packages_nor_sound_hardware(tiny_model, tune_wav, tmp_path):
    code = """
        import json, sys
        for name in ("torch", "onnx", "scipy", "sounddevice", "rtmidi"):
            sys.modules[name] = None  # importing it fails from here on
        from realtime_mpe.cli import main
        codes = [main(["transcribe", sys.argv[1], "-o", sys.argv[2], "--model", sys.argv[3]])]
        codes += [main(["listen", "--source", "file:" + sys.argv[1], "--duration", "0.1", "--model", sys.argv[3]])]
        codes += [main(["info", sys.argv[3]])]
        print(json.dumps(codes))
    """
    assert python(code, tune_wav, tmp_path / "a.mid", tiny_model) == [0, 0, 0]


def test_training_without_its_packages_names_the_extra():
    code = """
        import contextlib, io, json, sys
        sys.modules["torch"] = None
        from realtime_mpe.cli import main
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            code = main(["train"])
        print(json.dumps([code, err.getvalue()]))
    """
    assert python(code) == [2, 'rt-mpe: error: rt-mpe train needs torch: pip install "realtime-mpe[train]"\n']


def test_a_missing_module_of_our_own_is_no_package_to_install(rt_mpe, monkeypatch):
    command = cli.Command("a command", "realtime_mpe.training.nonexistent")
    monkeypatch.setitem(cli.COMMANDS, "broken", command)
    ended = rt_mpe("broken")
    assert ended.code == cli.FAULT
    assert "pip install" not in ended.err[0]


def test_one_blas_thread():
    """Two threads on products of this size spend fifteen times the CPU; it must be settled before numpy is loaded."""
    code = """
        import json, os
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.pop(name, None)
        from realtime_mpe.cli import main
        main(["plugins"])
        import numpy
        threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [1]
        print(json.dumps(len(threads)))
    """
    assert python(code) == 1


# Small commands


def test_version_and_help(rt_mpe):
    assert rt_mpe("--version").out[0].startswith("rt-mpe ")
    assert rt_mpe("--help").code == 0
    ended = rt_mpe()
    assert ended.code == 2 and ended.out[0].startswith("usage: ")


@pytest.mark.parametrize("command", ["devices", "listen", "transcribe", "info", "bench", "doctor", "plugins"])
def test_every_command_explains_itself(rt_mpe, command):
    ended = rt_mpe(command, "--help")
    assert ended.code == 0 and ended.out[0].startswith(f"usage: rt-mpe {command}") and not ended.err


def test_info_for_programs(rt_mpe, tiny_model):
    facts = json.loads("".join(rt_mpe("info", tiny_model, "--json").out))
    info = OnnxModel(str(tiny_model)).info
    assert facts.keys() == {"name", "front_end", "lookahead", "voices", "parameters", "thresholds", "training"}
    assert facts["front_end"] == info.analysis.to_dict()
    assert (facts["lookahead"], facts["voices"]) == (1, 8)
    assert facts["parameters"] == info.parameters > 10_000
    assert len(facts["thresholds"]) == 5 and facts["thresholds"][0].keys() == {"on", "off", "onset", "repeat"}
    assert facts["training"] == {"hours": 0}


def test_info_for_people_has_the_same_numbers(rt_mpe, tiny_model):
    text = "\n".join(rt_mpe("info", tiny_model).out)
    assert f"{OnnxModel(str(tiny_model)).info.parameters:,}" in text and "gamma 6.0" in text and "hours: 0" in text


def test_plugins_lists_every_kind(rt_mpe):
    text = "\n".join(rt_mpe("plugins").out)
    for name in ("device", "file", "demo", "midi", "virtual", "record", "json", "terminal", "onnx"):
        assert f"\n  {name} " in text


def test_bench_adds_up(rt_mpe, tiny_model):
    ended = rt_mpe("bench", "--model", tiny_model, "--seconds", "2", "--json")
    assert ended.code == 0
    facts = json.loads("".join(ended.out))
    parts = [facts["stages"][name]["median_ms"] for name in ("resampler", "CQT", "model")]
    whole = facts["stages"]["whole"]
    assert all(part > 0 for part in parts) and sum(parts) < 1.5 * whole["median_ms"]
    assert whole["p99_ms"] >= whole["median_ms"]
    assert 0 < facts["rtf"] < 2 and facts["notes"] > 0
    assert 0 < facts["start_seconds"] < 30 and 20 < facts["peak_mb"] < 1000


def test_doctor_passes_with_a_model_and_fails_without(rt_mpe, tiny_model):
    ended = rt_mpe("doctor", "--model", tiny_model)
    states = {(line[5:15].strip(), line[:5].strip()) for line in ended.out}
    assert ended.code == 0 and not ended.err
    assert {what for what, _ in states} == {"python", "packages", "audio", "MIDI", "model", "speed", "disk"}
    assert ("model", "ok") in states and "FAIL" not in {state for _, state in states}
    ended = rt_mpe("doctor", "--model", "nowhere.onnx")
    assert ended.code == 1
    assert any(line.startswith("FAIL model ") and "'nowhere.onnx'" in line for line in ended.out)


def test_doctor_warns_of_a_full_disk_and_fails_a_slow_machine(rt_mpe, tiny_model, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1e6}))
    monkeypatch.setattr("realtime_mpe.bench.measure", lambda model, seconds: type("Report", (), {"rtf": 1.2}))
    ended = rt_mpe("doctor", "--model", tiny_model)
    assert ended.code == 1
    assert any(line.startswith("warn disk ") and "1 MB free" in line for line in ended.out)
    assert any(line.startswith("FAIL speed ") and "1.20" in line for line in ended.out)


def test_devices_lists_inputs_and_ports(rt_mpe, monkeypatch):
    device = {"index": 3, "name": "Mic", "hostapi": "ALSA", "channels": 2, "samplerate": 48000, "default": True}
    monkeypatch.setattr("realtime_mpe.listen.list_devices", lambda: [device])
    found = [("jack", "Synth:in")], ["alsa: no access"]
    monkeypatch.setattr("realtime_mpe.sinks.midi_port.list_ports", lambda: found)
    expected = [
        "Sound inputs (-d ID|NAME):",
        ">  3 Mic, ALSA (2 in, 48000 Hz)",
        "MIDI ports (--midi-port NAME):",
        "    Synth:in (jack)",
        "    no answer from alsa: no access",
    ]
    for argv in (["devices"], ["devices", "-l"], ["-l"], ["listen", "-l"]):
        ended = rt_mpe(*argv)
        assert (ended.code, ended.out, ended.err) == (0, expected, [])


def test_a_reader_that_has_gone_is_no_error(tiny_model):
    command = [sys.executable, "-m", "realtime_mpe.cli", "info", str(tiny_model), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == cli.BROKEN_PIPE


# Transcribing


@pytest.mark.parametrize("samples", [512 * 40, 512 * 40 + 1, 300])
def test_npz_is_as_specified(rt_mpe, tiny_model, tmp_path, samples, tune):
    soundfile.write(tmp_path / "in.wav", tune(seconds=samples / 16_000), 16_000)
    options = ["--posteriorgrams", tmp_path / "x.npz", "--model", tiny_model]
    assert rt_mpe("transcribe", tmp_path / "in.wav", *options).code == 0
    n_frames = -(-samples // 512)
    with np.load(tmp_path / "x.npz") as data:
        assert sorted(data) == ["first_midi", "hop", "mix", "notes", "slots"]
        mix, slots, notes = data["mix"], data["slots"], data["notes"]
        assert data["first_midi"] == 23 and data["hop"] == HOP
    assert (mix.shape, mix.dtype) == ((72, n_frames), np.float32)
    assert (slots.shape, slots.dtype) == ((8, 72, n_frames), np.float32)
    assert notes.dtype == np.float64 and notes.shape[1:] == (5,)
    assert 0 <= mix.min() <= mix.max() <= 1
    if samples > 512 * 30:
        assert len(notes) > 3
    owner = np.full(mix.shape, -1)
    for onset, offset, midi, voice, _ in notes:
        times = np.arange(n_frames) * HOP
        owner[int(midi) - 23, (times >= onset) & (times < offset)] = voice
    for voice in range(8):
        np.testing.assert_array_equal(slots[voice], np.where(owner == voice, mix, 0))


def test_frames_lie_on_the_grid_for_every_lookahead(tiny_model, tmp_path):
    """The model at hand says the same at every look-ahead, so what it says must be filed one frame earlier each."""
    t = np.arange(32_000) / 16_000
    soundfile.write(tmp_path / "in.wav", np.where(t >= 1.0, 0.3 * np.sin(2 * np.pi * 880 * t), 0.0), 16_000)
    model = OnnxModel(str(tiny_model))
    begins = []
    for lookahead in range(5):
        heard = transcribe_file(tmp_path / "in.wav", model, transcribe.Settings(lookahead))
        assert heard.mix.shape == (72, 63)
        begins.append(int(np.argmax(heard.mix[81 - 23] > 0.5)))
    assert begins == [begins[0] - lookahead for lookahead in range(5)]
    # Frame 31 is centred on 0.992 s. At look-ahead 0 its answer has heard up to there, and a hop or two more is needed.
    assert 32 <= begins[0] <= 34


def test_files_of_any_rate_and_channel_count(rt_mpe, tiny_model, tmp_path, tune):
    formats = {"a.wav": (44_100, 1), "b.flac": (48_000, 2), "c.aiff": (22_050, 3), "d.ogg": (8_000, 1)}
    for name, (rate, channels) in formats.items():
        soundfile.write(tmp_path / name, np.repeat(tune(samplerate=rate)[:, None], channels, 1), rate)
    ended = rt_mpe("transcribe", *(tmp_path / name for name in formats), "-o", tmp_path / "new" / "midi",
                   "--posteriorgrams", tmp_path / "new" / "npz", "--model", tiny_model)  # fmt: skip
    assert (ended.code, len(ended.out), ended.err) == (0, 4, [])
    assert sorted(os.listdir(tmp_path / "new" / "midi")) == ["a.mid", "b.mid", "c.mid", "d.mid"]
    mixes = [np.load(tmp_path / "new" / "npz" / f"{name}.npz")["mix"] for name in "abcd"]
    for mix in mixes[1:]:
        assert mix.shape == mixes[0].shape == (72, 94)
        assert np.abs(mix - mixes[0]).mean() < 0.01 < mixes[0].mean()


def test_told_how_many_play_there_are_no_more_voices(rt_mpe, tiny_model, tune_wav, tmp_path):
    for players in ("1", "2"):
        out = tmp_path / f"{players}.mid"
        assert rt_mpe("transcribe", tune_wav, "-o", out, "--model", tiny_model, "--players", players).code == 0
        assert len(mido.MidiFile(out).tracks) - 1 <= int(players)
    for players, wanted in (("0", "give 1 or more"), ("99", "choose 1 to")):
        ended = rt_mpe("transcribe", tune_wav, "-o", tmp_path / "x.mid", "--model", tiny_model, "--players", players)
        assert ended.code == 2 and wanted in ended.err[0]


def test_midi_file_holds_the_notes(rt_mpe, tiny_model, tune_wav, tmp_path):
    out = tmp_path / "x.mid"
    out.write_bytes(b"an older result")
    rt_mpe("transcribe", tune_wav, "-o", out, "--posteriorgrams", tmp_path / "x.npz", "--model", tiny_model)
    notes = notes_of(tmp_path / "x.npz")
    midi = mido.MidiFile(out)
    assert len(midi.tracks) == 1 + len({voice for _, _, _, voice, _ in notes})
    began = [m.note for track in midi.tracks for m in track if m.type == "note_on" and m.velocity]
    assert sorted(began) == sorted(int(midi_number) for _, _, midi_number, _, _ in notes)
    assert os.listdir(tmp_path) and not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_bad_file_among_good_ones(rt_mpe, tiny_model, tune_wav, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    ended = rt_mpe("transcribe", tmp_path / "bad.wav", tune_wav, "-o", tmp_path / "out", "--model", tiny_model)
    assert ended.code == 2
    assert len(ended.err) == 1 and "bad.wav" in ended.err[0]
    assert os.listdir(tmp_path / "out") == ["tune.mid"]


def test_interrupted_transcription_keeps_what_is_finished(rt_mpe, tiny_model, tmp_path, monkeypatch, tune):
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, tune(1.5), 16_000)

    class Interrupted(transcribe.ProgressBar):
        def __call__(self, done, total):
            if self._name == "b.wav" and done > 1.0:
                raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "ProgressBar", Interrupted)
    files = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    options = ["--posteriorgrams", tmp_path / "npz", "--model", tiny_model]
    ended = rt_mpe("transcribe", *files, "-o", tmp_path / "out", *options)
    assert ended.code == 130 and not any("Traceback" in line for line in ended.err)
    assert os.listdir(tmp_path / "out") == ["a.mid"] and os.listdir(tmp_path / "npz") == ["a.npz"]
    assert len(mido.MidiFile(tmp_path / "out" / "a.mid").tracks) > 1


def test_results_never_overwrite_each_other(tmp_path):
    with pytest.raises(UserError, match="x.mid"):
        transcribe.plan(["a/x.wav", "b/x.flac"], str(tmp_path / "out"), None)
    with pytest.raises(UserError, match="folder"):
        transcribe.plan(["a.wav", "b.wav"], "out.mid", None)
    with pytest.raises(UserError, match="-o"):
        transcribe.plan(["a.wav"], None, None)
    assert transcribe.plan(["a/x.wav"], "y.mid", "z.npz")[0][1:] == (transcribe.Path("y.mid"), transcribe.Path("z.npz"))


def test_progress_is_drawn_on_a_terminal_only(monkeypatch, capsys):
    now = iter(np.arange(0.0, 10.0, 0.5))
    monkeypatch.setattr(transcribe.time, "monotonic", lambda: next(now))
    bar = transcribe.ProgressBar("x.wav")
    bar(1.0, 4.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = transcribe.ProgressBar("x.wav")
    bar(1.0, 4.0)
    bar(2.0, None)
    bar.clear()
    drawn = capsys.readouterr().err
    assert "x.wav" in drawn and "25 %" in drawn and drawn.endswith(" \r") and "\n" not in drawn


# The same notes, however the engine is fed


@pytest.mark.parametrize("lookahead", [0, 1, 4])
def test_notes_before_a_cut_do_not_know_of_it(tiny_model, tmp_path, lookahead, tune):
    model, settings = OnnxModel(str(tiny_model)), transcribe.Settings(lookahead)
    rate = 44_100
    sound = tune(samplerate=rate)
    soundfile.write(tmp_path / "whole.wav", sound, rate)
    whole = transcribe_file(tmp_path / "whole.wav", model, settings)
    for cut in (0.7, 1.123, 1.5, 2.75):
        soundfile.write(tmp_path / "cut.wav", sound[: round(cut * rate)], rate)
        part = transcribe_file(tmp_path / "cut.wav", model, settings)
        expected = [note for note in without_offset(whole.notes.tolist()) if note[-1] < cut]
        assert len(expected) > 1
        assert [note for note in without_offset(part.notes.tolist()) if note[-1] < cut] == expected
        decided = int(cut / HOP) - lookahead - 1
        np.testing.assert_array_equal(part.mix[:, :decided], whole.mix[:, :decided])


def test_listening_and_transcribing_agree(rt_mpe, tiny_model, tmp_path, tune):
    soundfile.write(tmp_path / "in.wav", tune(1.6, 48_000), 48_000)
    options = ["--model", tiny_model, "--lookahead", "2", "--sensitivity", "0.6"]
    results = ["-o", tmp_path / "t.mid", "--posteriorgrams", tmp_path / "t.npz"]
    rt_mpe("transcribe", tmp_path / "in.wav", *results, *options)
    begun = time.monotonic()
    ended = rt_mpe("listen", "--source", f"file:{tmp_path / 'in.wav'}", "--quiet", "--blocksize", "1000",
                   "--record", tmp_path / "l.mid", "--sink", f"json:{tmp_path / 'l.json'}", *options)  # fmt: skip
    assert time.monotonic() - begun > 1.5  # a file is heard at its own pace
    assert (ended.code, ended.out, ended.err) == (0, [], [])
    lines = [json.loads(line) for line in (tmp_path / "l.json").read_text().splitlines()]
    listened = [
        [line[name] for name in ("onset", "offset", "midi", "voice", "emitted")]
        for line in lines
        if line["type"] == "note_off"
    ]
    transcribed = np.array(notes_of(tmp_path / "t.npz"))
    assert len(transcribed) > 5
    listened.sort(key=lambda note: (note[0], note[2]))
    np.testing.assert_allclose(listened, transcribed, atol=1e-4)
    assert (tmp_path / "l.mid").read_bytes() == (tmp_path / "t.mid").read_bytes()


def test_posteriorgrams_of_nothing():
    heard = Posteriorgrams(3)
    heard.finish(0)
    assert heard.mix.shape == (72, 0) and heard.slots.shape == (3, 72, 0) and heard.notes.shape == (0, 5)


# Listening: what is opened when, and how it ends


ORDER = """
    import time

    import numpy as np
    from realtime_mpe.sinks.base import NoteSink
    from realtime_mpe.errors import UserError
    from realtime_mpe.source import Block, DeviceLost

    log = []

    class Source:
        samplerate, name, duration, overflows, latency = 16000, "test", None, 0, 0.0
        def __init__(self, kind=""):
            log.append("source opened")
            self.kind, self.stopped = kind, False
        def blocks(self):
            log.append("source started")
            t = np.arange(16000) / 16000
            tone = 0.3 * np.sin(2 * np.pi * 880 * t) * np.sin(np.pi * t)  # swells and dies away: one note, no click
            for block in np.split(tone.astype(np.float32), 20):
                if self.stopped:
                    break
                yield Block(block, came=time.monotonic() - 5.0 if self.kind == "late" else None)
                if self.kind == "lost" and block.max() > 0.2:
                    raise DeviceLost("the device is gone; connect it")
        def stop(self):
            self.stopped = True
        def close(self):
            log.append("source closed")

    class Sink(NoteSink):
        def __init__(self, kind=""):
            if kind == "refuse":
                raise UserError("this sink is closed today; come tomorrow")
            log.append("sink opened")
            self.kind = kind
        def note_on(self, note):
            log.append("on")
            if self.kind == "broken":
                raise RuntimeError("a fault of somebody else's")
        def note_off(self, note):
            log.append("off")
        def close(self):
            log.append("sink closed")
"""


@pytest.fixture
def order(tmp_path, monkeypatch):
    """The module `ordered` with a source and a sink that log what happens to them."""
    (tmp_path / "ordered.py").write_text(textwrap.dedent(ORDER))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ordered", raising=False)
    import ordered

    return ordered


def test_sinks_are_open_before_the_sound_begins_and_closed_after(rt_mpe, tiny_model, order):
    ended = rt_mpe("listen", "--source", "ordered:Source", "--sink", "ordered:Sink", "--model", tiny_model, "--quiet")
    assert (ended.code, ended.err) == (0, [])
    assert order.log == ["sink opened", "source opened", "source started", "on", "off", "source closed", "sink closed"]


def test_what_is_open_is_closed_when_the_rest_cannot_be_opened(rt_mpe, tiny_model, order, tmp_path):
    take = tmp_path / "take.mid"
    base = ["listen", "--sink", "ordered:Sink", "--record", take, "--model", tiny_model, "--quiet"]
    ended = rt_mpe(*base, "--source", "ordered:Source", "--sink", "ordered:Sink:refuse")
    assert ended.code == 2 and order.log == ["sink opened", "sink closed"]
    order.log.clear()
    ended = rt_mpe(*base, "--source", "file:nowhere.wav")
    assert ended.code == 2 and order.log == ["sink opened", "sink closed"]
    order.log.clear()
    (tmp_path / "here.json").write_text("")
    ended = rt_mpe(*base, "--source", "ordered:Source", "--sink", f"json:{tmp_path / 'here.json'}")
    assert ended.code == 2 and order.log == ["sink opened", "source opened", "source closed", "sink closed"]
    assert not take.exists()  # an empty take would stand in the way of the next try


def test_a_broken_sink_does_not_silence_the_others(rt_mpe, tiny_model, order):
    sinks = ["--sink", "ordered:Sink:broken", "--sink", "ordered:Sink"]
    ended = rt_mpe("listen", "--source", "ordered:Source", *sinks, "--model", tiny_model, "--quiet")
    assert ended.code == 0
    assert len(ended.err) == 1 and "fault of somebody else's" in ended.err[0] and "Traceback" not in ended.err[0]
    assert order.log.count("on") == 2 and order.log.count("off") == 1


def test_a_lost_device_ends_the_notes_and_keeps_the_take(rt_mpe, tiny_model, order, tmp_path):
    take = tmp_path / "take.mid"
    ended = rt_mpe("listen", "--source", "ordered:Source:lost", "--record", take, "--sink", "ordered:Sink",
                   "--model", tiny_model, "--quiet")  # fmt: skip
    assert (ended.code, ended.err) == (3, ["rt-mpe: error: the device is gone; connect it"])
    assert order.log.count("on") == order.log.count("off") > 0
    types = [m.type for track in mido.MidiFile(take).tracks for m in track if not m.is_meta]
    assert types.count("note_on") == types.count("note_off") == order.log.count("on")


def test_a_live_device_gets_a_midi_port_or_says_why_not(rt_mpe, tiny_model, order, monkeypatch):
    opened = []

    class Port(NoteSink):
        def __init__(self, name):
            if not opened:
                opened.append(name)
                raise UserError("no MIDI system; start one")
            opened.append(name)
            self.name, self.api = name, "alsa"

    monkeypatch.setattr("realtime_mpe.capture.Capture", order.Source)
    monkeypatch.setattr("realtime_mpe.sinks.midi_port.VirtualPortSink", Port)
    ended = rt_mpe("listen", "--model", tiny_model)
    assert ended.code == 0 and opened == ["rt-mpe"]
    assert ended.err[0] == "rt-mpe: warning: the notes go to the screen only: no MIDI system; start one"
    assert any("note_on" in line for line in ended.out)
    ended = rt_mpe("listen", "-d", "mic", "--model", tiny_model)
    assert ended.code == 0 and opened == ["rt-mpe", "rt-mpe"]
    assert len(ended.err) == 1 and "'rt-mpe' (alsa)" in ended.err[0]
    rt_mpe("listen", "--model", tiny_model, "--sink", "ordered:Sink")
    assert opened == ["rt-mpe", "rt-mpe"]


def test_duration_and_json_on_standard_output(rt_mpe, tiny_model, order):
    options = ["--source", "ordered:Source", "--model", tiny_model, "--sink", "json:-", "--duration", "0.5"]
    ended = rt_mpe("listen", *options)
    lines = [json.loads(line) for line in ended.out]  # nothing else may come between them
    types = [line["type"] for line in lines]
    assert types.count("note_on") == types.count("note_off") > 0 and types.count("status") > 0
    assert lines[-1]["offset"] == pytest.approx(0.5, abs=0.1)
    assert any("note_on" in line for line in ended.err)


@pytest.mark.parametrize("kind, waited", [("", 0.0), ("late", 5000.0)])
def test_the_latency_told_counts_what_sound_has_waited(rt_mpe, tiny_model, order, kind, waited):
    ended = rt_mpe("listen", "--source", f"ordered:Source:{kind}", "--model", tiny_model, "--sink", "json:-", "--quiet")
    told = [line["latency_ms"] for line in map(json.loads, ended.out) if line["type"] == "status"]
    assert told and all(waited < latency < waited + 4000.0 for latency in told)


def test_listening_ends_when_nobody_reads(tiny_model, tmp_path, tune):
    soundfile.write(tmp_path / "long.wav", np.tile(tune(), 10), 16_000)
    command = [sys.executable, "-m", "realtime_mpe.cli", "listen", "--source", f"file:{tmp_path / 'long.wav'}"]
    command += ["--model", str(tiny_model), "--sink", "json:-", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        begun = time.monotonic()
        assert process.stderr.read() == b""
        assert process.wait(timeout=10) == 0
    assert time.monotonic() - begun < 10  # of 30 s of sound
