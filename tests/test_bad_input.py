"""Everything that can be wrong with what people give: one line, the way out, no traceback, and nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile

from realtime_mpe.sinks import midi_file

FAKES = Path(__file__).parent / "fakes"


def refused(ended, *wanted, code=2):
    """Assert that a command said one line that holds every wanted text, and nothing else."""
    assert ended.code == code
    assert len(ended.err) == 1, ended.err
    assert ended.err[0].startswith("rt-mpe: error: ")
    for text in wanted:
        assert text in ended.err[0], (text, ended.err[0])
    assert ended.out == []


def played(path):
    """(note_ons, note_offs) of a take."""
    types = [m.type for track in mido.MidiFile(path).tracks for m in track]
    return types.count("note_on"), types.count("note_off")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A module `made_up` with sources of silence and of damaged samples, as fast as they can be read."""
    code = """
        import numpy as np
        from realtime_mpe.source import Block

        class Made:
            samplerate, name, duration, overflows, latency = 16000, "the microphone", None, 0, 0.0
            def blocks(self):
                for samples in self.sound():
                    yield Block(samples.astype(np.float32))
            def stop(self): pass
            def close(self): pass

        class Silent(Made):
            def sound(self):
                return np.zeros((80, 1600))

        class Pausing(Made):
            def sound(self):
                noise = np.random.default_rng(0).normal(0, 0.1, (10, 1600))
                return np.concatenate([noise, np.zeros((40, 1600)), noise, np.zeros((60, 1600))])

        class Damaged(Made):
            def sound(self):
                blocks = np.full((20, 1600), 0.1)
                blocks[3, 5:9] = np.nan, np.inf, -np.inf, np.nan
                blocks[4, :100] = 1.0
                blocks[5, :100] = -3.0
                return blocks
    """
    (tmp_path / "made_up.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_up", raising=False)


# Files


def bad_file(kind, folder):
    path = folder / f"{kind}.wav"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no sound " * 100)
    elif kind == "headeronly":
        soundfile.write(path, np.zeros(0, np.float32), 48_000)
    elif kind == "cutinheader":
        soundfile.write(path, np.zeros(4800, np.float32), 48_000)
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "headeronly", "cutinheader", "folder"])
def test_files_that_are_no_sound(rt_mpe, tiny_model, tmp_path, kind):
    path = bad_file(kind, tmp_path)
    out = tmp_path / "out.mid"
    refused(rt_mpe("transcribe", path, "-o", out, "--model", tiny_model), path.name)
    refused(rt_mpe("listen", "--source", f"file:{path}", "--record", out, "--model", tiny_model), path.name)
    assert not out.exists()


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac"])
def test_a_truncated_file_is_heard_as_far_as_it_goes(rt_mpe, tiny_model, tmp_path, tune, suffix):
    path = tmp_path / f"in.{suffix}"
    soundfile.write(path, tune(), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    ended = rt_mpe("transcribe", path, "-o", tmp_path / "out.mid", "--model", tiny_model)
    assert ended.code == 1
    assert len(ended.err) == 1 and ended.err[0].startswith(f"rt-mpe: warning: in.{suffix} is damaged: its last ")
    assert played(tmp_path / "out.mid")[0] > 5


def test_a_size_that_was_never_filled_in_is_no_damage(rt_mpe, tiny_model, tmp_path, tune):
    """What a program writes into a pipe has no size in its header."""
    path = tmp_path / "in.wav"
    soundfile.write(path, tune(), 16_000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    ended = rt_mpe("transcribe", path, "-o", tmp_path / "out.mid", "--model", tiny_model)
    assert (ended.code, ended.err) == (0, [])


def test_places_that_cannot_be_written(rt_mpe, tiny_model, tune_wav, tmp_path):
    (tmp_path / "file").write_text("")
    refused(rt_mpe("transcribe", tune_wav, "-o", tmp_path / "nowhere" / "x.mid", "--model", tiny_model), "x.mid")
    refused(rt_mpe("transcribe", tune_wav, "-o", tmp_path / "file" / "sub", "--model", tiny_model), "sub")
    npz = tmp_path / "nowhere" / "x.npz"
    refused(rt_mpe("transcribe", tune_wav, "--posteriorgrams", npz, "--model", tiny_model), "x.npz")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_take_is_never_overwritten(rt_mpe, tiny_model, tune_wav, tmp_path):
    take = tmp_path / "take.mid"
    take.write_bytes(b"precious")
    refused(rt_mpe("listen", "--source", f"file:{tune_wav}", "--record", take, "--model", tiny_model), "take.mid")
    assert take.read_bytes() == b"precious"


# Devices and ports


def test_unknown_and_ambiguous_devices(rt_mpe, tiny_model, monkeypatch, tmp_path):
    (tmp_path / "devices").mkdir()
    for name, facts in (("Mic One", "48000 2"), ("Mic Two", "48000 1"), ("Speakers", "48000 0")):
        (tmp_path / "devices" / name).write_text(facts)
    monkeypatch.setenv("FAKE_DEVICES", str(tmp_path / "devices"))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    listen = ["listen", "--record", tmp_path / "take.mid", "--model", tiny_model]
    refused(rt_mpe(*listen, "-d", "mic"), "'mic'", "0: Mic One", "1: Mic Two")
    refused(rt_mpe(*listen, "-d", "violin"), "'violin'", "0: Mic One", "1: Mic Two")
    refused(rt_mpe(*listen, "--source", "device:7"), "'7'", "0: Mic One")
    refused(rt_mpe(*listen, "-d", "speaker"), "'speaker'", "outputs only")
    refused(rt_mpe(*listen, "-d", "Mic Two", "--channel", "2"), "channel 2", "Mic Two")
    refused(rt_mpe(*listen, "-d", "0", "--source", "demo"), "not allowed with")
    assert not (tmp_path / "take.mid").exists()


def test_no_portaudio(rt_mpe, tiny_model, monkeypatch, tmp_path):
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    refused(rt_mpe("listen", "--record", tmp_path / "take.mid", "--model", tiny_model), "PortAudio", "apt install")
    ended = rt_mpe("devices")
    assert ended.code == 2 and len(ended.err) == 1 and "PortAudio" in ended.err[0]
    assert any(line.startswith("MIDI ports") for line in ended.out)
    ended = rt_mpe("doctor", "--model", tiny_model)
    assert ended.code == 0 and any(line.startswith("warn audio ") and "PortAudio" in line for line in ended.out)


def no_midi(number, name):
    import rtmidi

    raise rtmidi.SystemError("MidiOutAlsa::initialize: error creating ALSA sequencer client object.")


def test_no_midi_system(rt_mpe, tiny_model, tune_wav, monkeypatch):
    monkeypatch.setattr("rtmidi.MidiOut", no_midi)
    monkeypatch.setattr("rtmidi.get_compiled_api", lambda: [__import__("rtmidi").API_LINUX_ALSA])
    listen = ["listen", "--source", f"file:{tune_wav}", "--model", tiny_model]
    reason = "alsa: error creating ALSA sequencer client object"
    refused(rt_mpe(*listen, "--midi-port", "Synth"), "'Synth'", reason, "record:take.mid")
    refused(rt_mpe(*listen, "--virtual", "me"), "'me'", reason, "record:take.mid")
    refused(rt_mpe(*listen, "--sink", "midi:Synth", "--midi-api", "jack"), "'jack'", "alsa")
    refused(rt_mpe(*listen, "--split-ports", "me"), "'me 1'", reason)
    ended = rt_mpe("devices")
    assert any(reason in line for line in ended.out)


def test_port_not_found(rt_mpe, tiny_model, tune_wav, monkeypatch):
    class Out:
        def __init__(self, number, name):
            pass

        def get_ports(self):
            return ["FLUID Synth (1234)", "FLUID Synth (99)"]

        def delete(self):
            pass

    monkeypatch.setattr("rtmidi.MidiOut", Out)
    listen = ["listen", "--source", f"file:{tune_wav}", "--model", tiny_model]
    refused(rt_mpe(*listen, "--midi-port", "Moog"), "'Moog'", "FLUID Synth (1234)", "virtual:")
    refused(rt_mpe(*listen, "--midi-port", "fluid"), "'fluid'", "FLUID Synth (1234)", "FLUID Synth (99)")


# Models


def with_metadata(path, target, **changes):
    """A copy of a model file with other metadata; None takes a key away."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(path))
    metadata = {p.key: p.value for p in model.metadata_props} | changes
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: value for key, value in metadata.items() if value is not None})
    onnx.save(model, str(target))
    return target


def front_end(path, **changes):
    onnx = pytest.importorskip("onnx")
    metadata = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    return json.dumps(json.loads(metadata["analysis"]) | changes)


def test_missing_and_corrupt_models(rt_mpe, tiny_model, tune_wav, tmp_path):
    whole = tiny_model.read_bytes()
    files = {"cut.onnx": whole[: len(whole) // 2], "text.onnx": b"not a model", "empty.onnx": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in (*files, "missing.onnx"):
        path = tmp_path / name
        refused(rt_mpe("info", path), name)
        refused(rt_mpe("transcribe", tune_wav, "-o", tmp_path / "x.mid", "--model", path), name)
        refused(rt_mpe("listen", "--source", f"file:{tune_wav}", "--model", path), name)
    refused(rt_mpe("info", "nosuchmodel"), "'nosuchmodel'")
    refused(rt_mpe("bench", "--model", tiny_model, "--seconds", "0"), "0 s")
    assert not (tmp_path / "x.mid").exists()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"analysis": {"gamma": 20.0}}, "gamma 6.0 != 20.0"),
        ({"analysis": {"samplerate": 22_050}}, "samplerate 16000 != 22050"),
        ({"analysis": {"alignment": "centre"}}, "alignment"),
        ({"analysis": {"unheard_of": 1}}, "unheard_of"),
        ({"format": None}, "no format"),
        ({"format": "rt-mpe live 99"}, "rt-mpe live 99"),
        ({"thresholds": None}, "thresholds"),
        ({"thresholds": "[]"}, "out of range"),
        ({"thresholds": json.dumps([{"on": "loud", "off": 0.3, "onset": 0.5, "repeat": 0.5}] * 5)}, "out of range"),
        ({"lookahead": "17"}, "out of range"),
        ({"voices": "many"}, "many"),
        ({"training": "{"}, "damaged"),
    ],
)
def test_models_that_do_not_fit(rt_mpe, tiny_model, tmp_path, change, wanted):
    if isinstance(change.get("analysis"), dict):
        change = {"analysis": front_end(tiny_model, **change["analysis"])}
    path = with_metadata(tiny_model, tmp_path / "other.onnx", **change)
    refused(rt_mpe("info", path), "other.onnx", wanted)


def test_metadata_on_a_network_of_another_shape(rt_mpe, tiny_model, tmp_path):
    onnx = pytest.importorskip("onnx")
    tiny = onnx.load(str(tiny_model))
    value = onnx.helper.make_tensor_value_info
    names = ["mix", "onset", "embedding"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["frame"], [name]) for name in names],
        "other",
        [value("frame", onnx.TensorProto.FLOAT, [1, 7])],
        [value(name, onnx.TensorProto.FLOAT, [1, 7]) for name in names],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(model, {p.key: p.value for p in tiny.metadata_props})
    onnx.save(model, str(tmp_path / "other.onnx"))
    refused(rt_mpe("info", tmp_path / "other.onnx"), "other.onnx", "export")


# What is wrong with the sound


def test_silence_is_told_once_after_five_seconds(rt_mpe, tiny_model, sources):
    ended = rt_mpe("listen", "--source", "made_up:Silent", "--model", tiny_model)
    assert ended.code == 0
    told = [line for line in ended.err if "silent" in line]
    assert len(told) == 1 and "the microphone" in told[0] and "5 s" in told[0] and "--channel" in told[0]
    ended = rt_mpe("listen", "--source", "made_up:Silent", "--model", tiny_model, "--duration", "4.9")
    assert not any("silent" in line for line in ended.err)


def test_a_pause_is_no_silence(rt_mpe, tiny_model, sources):
    """Four seconds of rest, sound, then six seconds of rest: told once, for the second."""
    ended = rt_mpe("listen", "--source", "made_up:Pausing", "--model", tiny_model)
    assert sum("silent" in line for line in ended.err) == 1
    ended = rt_mpe("listen", "--source", "made_up:Pausing", "--model", tiny_model, "--duration", "8")
    assert sum("silent" in line for line in ended.err) == 0


def test_a_silent_file_is_told(rt_mpe, tiny_model, tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(16_000), 16_000)
    ended = rt_mpe("transcribe", tmp_path / "nothing.wav", "-o", tmp_path / "x.mid", "--model", tiny_model)
    assert ended.code == 0 and len(ended.err) == 1 and "nothing.wav is silent" in ended.err[0]
    assert played(tmp_path / "x.mid") == (0, 0)


def test_samples_that_are_no_numbers_or_clipped_are_counted(rt_mpe, tiny_model, sources, tmp_path):
    options = ["--sink", f"json:{tmp_path / 'x.json'}", "--model", tiny_model, "--quiet"]
    ended = rt_mpe("listen", "--source", "made_up:Damaged", *options)
    last = [json.loads(line) for line in (tmp_path / "x.json").read_text().splitlines() if "status" in line][-1]
    assert (last["invalid"], last["clipped"]) == (4, 200)
    assert ended.code == 0
    assert [line for line in ended.err if line.startswith("rt-mpe: warning: the microphone: 4 samples")]
    assert [line for line in ended.err if line.startswith("rt-mpe: warning: the microphone: 200 samples")]


def test_a_file_with_nan_is_transcribed_all_the_same(rt_mpe, tiny_model, tmp_path, tune):
    sound = tune()
    clean, damaged = tmp_path / "clean.wav", tmp_path / "damaged.wav"
    soundfile.write(clean, sound, 16_000, subtype="FLOAT")
    sound[100], sound[-1] = np.nan, np.inf  # in silence before the first note, and at the end
    soundfile.write(damaged, sound, 16_000, subtype="FLOAT")
    ended = rt_mpe("transcribe", clean, damaged, "-o", tmp_path / "out", "--model", tiny_model)
    assert ended.code == 0
    assert len(ended.err) == 1 and ended.err[0].startswith("rt-mpe: warning: damaged.wav: 2 samples were no numbers")
    takes = [(tmp_path / "out" / name).read_bytes() for name in ("clean.mid", "damaged.mid")]
    assert takes[0] == takes[1] and len(takes[0]) > 200


# A full disk


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """No MIDI file of more than no bytes can be written in tmp_path; the temporary folder has room."""
    refuge = tmp_path / "refuge"
    refuge.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(refuge))
    write = midi_file._write

    def write_or_fail(path, data, durable=False):
        if data and path.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data, durable)

    monkeypatch.setattr(midi_file, "_write", write_or_fail)
    return refuge


def test_a_take_survives_a_full_disk(rt_mpe, tiny_model, tune_wav, tmp_path, full_disk):
    options = ["--duration", "1", "--model", tiny_model, "--quiet"]
    ended = rt_mpe("listen", "--source", f"file:{tune_wav}", "--record", tmp_path / "take.mid", *options)
    saved = next(full_disk.glob("*/take.mid"))
    refused(ended, "take.mid", "No space left on device", str(saved))
    note_ons, note_offs = played(saved)
    assert note_ons == note_offs > 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without /dev/full")
def test_a_full_disk_under_one_sink_spares_the_others(rt_mpe, tiny_model, tune_wav, tmp_path):
    take = tmp_path / "take.mid"
    options = ["--duration", "1", "--model", tiny_model, "--quiet", "--sink", "json:/dev/full", "--record", take]
    ended = rt_mpe("listen", "--source", f"file:{tune_wav}", *options)
    assert ended.code == 0
    assert len(ended.err) == 1 and "/dev/full" in ended.err[0] and "No space left" in ended.err[0]
    assert played(take)[0] > 1


def test_transcribing_onto_a_full_disk(rt_mpe, tiny_model, tune_wav, tmp_path, full_disk):
    refused(rt_mpe("transcribe", tune_wav, "-o", tmp_path / "x.mid", "--model", tiny_model), "x.mid", "No space left")


# Words that cannot be right


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["listen", "--lookahead", "9"], "look-ahead 9"),
        (["listen", "--lookahead", "one"], "'one'"),
        (["listen", "--sensitivity", "1.5"], "sensitivity 1.5"),
        (["listen", "--sensitivity", "nan"], "sensitivity nan"),
        (["listen", "--duration", "0"], "duration of 0"),
        (["listen", "--duration", "nan"], "duration of nan"),
        (["listen", "--source", "radio:bbc"], "'radio:bbc' is unknown; choose one of demo, device, file"),
        (["listen", "--source", "file"], "needs its path"),
        (["listen", "--source", "file:WAV", "--channel", "4"], "channel 4"),
        (["listen", "--source", "file:WAV", "--samplerate", "8000"], "'samplerate'"),
        (["listen", "--source", "file:WAV", "--sink", "carrier-pigeon"], "'carrier-pigeon' is unknown"),
        (["listen", "--source", "file:WAV", "--sink", "no.such.module:Sink"], "no.such.module"),
        (["listen", "--source", "file:WAV", "--quiet"], "nothing to play to"),
        (["listen", "--source", "file:WAV", "--record", ""], "needs a file name"),
        (["listen", "--source", "file:WAV", "--record", "takes/"], "needs a file name, not 'takes/'"),
        (["listen", "--source", "file:WAV", "--record", os.curdir], "needs a file name, not '.'"),
        (["listen", "--source", "file:WAV", "--record", "take.mid", "--record-offset", "nan"], "by nan ms"),
        (["listen", "--source", "file:WAV", "--osc", "192.168.1..5:9000"], "'192.168.1..5:9000'"),
        (["transcribe", "WAV"], "-o OUT"),
        (["transcribe", "-o", "x.mid"], "FILE"),
        (["transcribe", "WAV", "WAV", "-o", "x.mid"], "2 files"),
        (["transcribe", "WAV", "-o", "x.mid", "--lookahead", "-1"], "look-ahead -1"),
        (["transcribe", "WAV", "-o", "~nobody-of-this-name/x.mid"], "no folder '~nobody-of-this-name'"),
        (["transcribe", "WAV", "-o", f"{'x' * 300}.mid"], "name too long"),
        (["transcribe", "WAV", "--posteriorgrams", "nowhere/x.npz"], "no folder 'nowhere'"),
        (["bench", "--seconds", "inf"], "inf s"),
        (["bench", "--soak", "inf"], "inf h"),
        (["export", "WAV", "-o", "x.onnx"], "run.json"),
        (["sing"], "'sing'"),
        (["listen", "--loud"], "--loud"),
    ],
)
def test_arguments_that_cannot_be(rt_mpe, tiny_model, tune_wav, tmp_path, monkeypatch, argv, wanted):
    monkeypatch.chdir(tmp_path)
    argv = [word.replace("WAV", str(tune_wav)) for word in argv]
    if argv[0] in ("listen", "transcribe"):
        argv += ["--model", str(tiny_model)]
    refused(rt_mpe(*argv), wanted)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without /dev/full")
def test_results_that_nobody_can_keep():
    command = [sys.executable, "-m", "realtime_mpe.cli", "info"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "rt-mpe: error: the output cannot be written: No space left on device\n"


def test_notes_are_kept_though_their_probabilities_cannot_be(rt_mpe, tiny_model, tune_wav, tmp_path):
    (tmp_path / "x.npz").mkdir()
    (tmp_path / "x.npz" / "tune.npz").mkdir()
    options = ["--posteriorgrams", tmp_path / "x.npz", "--model", tiny_model]
    refused(rt_mpe("transcribe", tune_wav, "-o", tmp_path / "x.mid", *options), "tune.npz")
    assert played(tmp_path / "x.mid")[0] > 1


# In a process of its own


def start(*argv, number=signal.SIGINT, handler=signal.SIG_DFL):
    """handler : of a signal, as the process inherits it; by default what it has in a terminal."""
    command = [sys.executable, "-m", "realtime_mpe.cli", *map(str, argv)]
    before = signal.signal(number, handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("kind", ["missing", "text"])
def test_a_real_process_says_one_line_too(tiny_model, tmp_path, kind):
    path = bad_file(kind, tmp_path)
    with start("listen", "--source", f"file:{path}", "--model", tiny_model) as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("rt-mpe: error: ") and path.name in err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_notes_and_saves_the_take(tiny_model, tmp_path, tune, name):
    if not hasattr(signal, name):
        pytest.skip(f"a system without {name}")
    long, take = tmp_path / "long.wav", tmp_path / "take.mid"
    soundfile.write(long, np.tile(tune(), 10), 16_000)
    number = getattr(signal, name)
    argv = ["listen", "--source", f"file:{long}", "--record", take, "--model", tiny_model]
    with start(*argv, number=number) as process:
        lines = []
        while sum("note_on" in line for line in lines) < 4:  # the fourth sounds while the signal comes
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        process.send_signal(number)
        process.send_signal(number)  # impatience must not cost the take
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["listening to", "saved"]
    shown = "".join(lines) + out
    assert shown.count("note_on") == shown.count("note_off") >= 4
    assert played(take) == (shown.count("note_on"), shown.count("note_off"))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a system without SIGHUP")
def test_what_is_started_with_nohup_outlasts_the_terminal(tiny_model, tmp_path, tune):
    soundfile.write(tmp_path / "tune.wav", tune(), 16_000)
    argv = ["listen", "--source", f"file:{tmp_path / 'tune.wav'}", "--model", tiny_model]
    with start(*argv, number=signal.SIGHUP, handler=signal.SIG_IGN) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert float((first + out).splitlines()[-1].split()[0]) > 0.9 * len(tune()) / 16_000


def test_an_interrupted_transcription_says_so_in_one_line(tiny_model, tmp_path, tune):
    soundfile.write(tmp_path / "a.wav", np.tile(tune(), 200), 16_000)
    soundfile.write(tmp_path / "b.wav", tune(0.5), 16_000)
    files = [tmp_path / "b.wav", tmp_path / "a.wav"]
    with start("transcribe", *files, "-o", tmp_path / "out", "--model", tiny_model) as process:
        assert "b.wav" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path / "out") == ["b.mid"]
