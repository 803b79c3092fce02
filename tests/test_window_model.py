"""Window models live: the file, the delays, and that the engine's notes come at their time and from their player."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import soundfile
import torch

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, MAX_LOOKAHEAD, N_BINS, N_PITCHES, SAMPLERATE
from realtime_mpe.bench import measure, table
from realtime_mpe.host import Engine
from realtime_mpe.model import OnnxModel, load_model
from realtime_mpe.notes import NoteEvent, Thresholds
from realtime_mpe.settings import Settings
from realtime_mpe.sinks.base import NoteSink
from realtime_mpe.training.export import export_window
from realtime_mpe.training.network import HARMONIC_BINS
from realtime_mpe.training.slots import SLOT_DIM, WINDOW, SlotConfig, SlotNetwork, harmonic_input
from realtime_mpe.transcribe import Posteriorgrams, transcribe_file
from realtime_mpe.voices import SlotVoices
from realtime_mpe.window_model import WindowModel

NEVER_BY_ONSET = Thresholds(onset=1.0, repeat=1.0)
PLAIN, RICH = 2, 1  # slots of `tiny_window_model`
# onset s, offset s, MIDI number, slot. High, so that the kernels are short and the truth is sharp.
NOTES = (
    (0.10, 0.50, 81, PLAIN),
    (0.25, 0.70, 90, PLAIN),
    (0.40, 0.90, 76, RICH),
    (0.80, 1.30, 93, PLAIN),
    (1.00, 1.50, 79, RICH),
    (1.60, 2.00, 81, RICH),
    (1.70, 2.00, 88, PLAIN),  # the last two sound when the recording ends
)
SECONDS = 2.0


def play(notes=NOTES, seconds=SECONDS, samplerate=SAMPLERATE):
    """(n,) float32: tones, pure ones of the one player, with a second harmonic of the other."""
    t = np.arange(round(seconds * samplerate)) / samplerate
    out = np.zeros(len(t))
    for onset, offset, midi, player in notes:
        sounds = (t >= onset) & (t < offset)
        phase = 2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t
        out += sounds * 0.3 * (np.sin(phase) + (0.02 * np.sin(2 * phase) if player == RICH else 0.0))
    return out.astype(np.float32)


def roll(notes, n_frames):
    out = np.zeros((N_PITCHES, n_frames), bool)
    for onset, offset, midi, _ in notes:
        out[midi - FIRST_MIDI, int(np.ceil(onset / FRAME_SECONDS)) : int(np.ceil(offset / FRAME_SECONDS))] = True
    return out


def hear(model, blocks, samplerate=SAMPLERATE, settings=None):
    """Blocks, or pairs of samples lost and a block, through the engine -> Posteriorgrams and the engine."""
    heard = Posteriorgrams(model.info.voices)
    engine = Engine(model, samplerate, [heard], settings)
    n = 0
    for block in blocks:
        lost, samples = block if isinstance(block, tuple) else (0, block)
        engine.process(samples, lost)
        n += len(samples)
    engine.finish()
    heard.finish(-(-n * SAMPLERATE // (samplerate * HOP)))
    return heard, engine


@torch.no_grad()
def hand_set(network):
    """Find a pitch where its own bin is loud and stands out; give it to slot RICH where its
    second harmonic sounds too, and else to slot PLAIN."""
    first, tall, last = (part[0].weight for part in network.trunk)
    for weight in (
        first,
        tall,
        last,
        network.mix[0][0].weight,
        network.branch[0][0].weight,
        network.branch[1][0].weight,
    ):
        weight[:2] = 0.0
    loud_and_above_its_neighbours = torch.tensor([-0.5, 0.0, 2.0, 0.0, -0.5])
    for channel, harmonic in enumerate((0, 36)):
        first[channel, HARMONIC_BINS.index(harmonic), :, 2] = loud_and_above_its_neighbours
        tall[channel, channel, 20, 1] = 1.0  # the middle of the pitch's three bins; row 19 is the lowest
        last[channel, channel, 2, 2] = 1.0
        network.branch[0][0].weight[channel, channel, 2, 2] = 1.0
        network.branch[1][0].weight[channel, channel, 2, 2] = 1.0
    network.mix[0][0].weight[0, 0, 3, 3] = 1.0
    network.mix[1].weight.zero_()
    network.mix[1].weight[0, 0] = 60.0
    network.mix[1].bias.fill_(
        -60.0 * 1.1
    )  # a tone of amplitude 0.3 that fills half of the kernels; a second harmonic of RICH stays below
    attention = network.attention
    for weight in attention.update.parameters():
        weight.zero_()
    attention.update.bias_ih[SLOT_DIM : 2 * SLOT_DIM] = 100.0  # slots stay their queries, whatever they attend to
    attention.queries.copy_(torch.eye(network.config.slots, SLOT_DIM))
    network.mask.weight.zero_()
    network.mask.weight[0, PLAIN] = 1.0
    network.mask.weight[1, RICH] = 2.5
    network.mask.bias.zero_()
    network.sharpness.fill_(20.0)
    network.activity.weight.zero_()
    network.activity.bias.fill_(10.0)


@pytest.fixture(scope="module")
def tiny_window_model(tmp_path_factory):
    """Path of a file made of `hand_set`."""
    network = SlotNetwork(SlotConfig(slots=4))
    hand_set(network)
    path = tmp_path_factory.mktemp("models") / "window.onnx"
    export_window(path, network, "hand", (NEVER_BY_ONSET,) * 5, {}, {"mix": 0.5, "slots": 0.5})
    return path


@pytest.fixture(scope="module")
def model(tiny_window_model):
    return load_model(str(tiny_window_model))


# The file


def test_an_exported_file_equals_torch_and_carries_its_metadata(tmp_path):
    torch.manual_seed(1)
    network = SlotNetwork(SlotConfig(8, timbre=True, film=True, polyphony=True)).eval()
    thresholds = tuple(Thresholds(on=0.5 + k / 20) for k in range(MAX_LOOKAHEAD + 1))
    path = tmp_path / "exp3c.onnx"
    export_window(path, network, "exp3c", thresholds, {"hours": 1}, {"mix": 0.5, "slots": 0.4}, lookahead=3, stride=5)
    assert list(tmp_path.iterdir()) == [path]
    model = load_model(str(path))
    assert isinstance(model, WindowModel)
    info = model.info
    assert (info.recipe, info.voices, info.window, info.stride, info.lookahead) == ("exp3c", 8, WINDOW, 5, 3)
    assert (info.parameters, info.thresholds, info.training) == (1_684_875, thresholds, {"hours": 1})
    frames = np.random.default_rng(0).random((WINDOW, N_BINS)).astype(np.float32)
    model._frames.extend(frames)
    mix, slots = model._run()
    with torch.no_grad():
        wanted = network(harmonic_input(torch.from_numpy(frames)[None]))
    np.testing.assert_allclose(mix, wanted.mix[0].sigmoid(), atol=1e-4)
    np.testing.assert_allclose(slots, wanted.slots[0], atol=1e-4)


def test_a_file_that_differs_from_torch_is_not_written(tiny_window_model, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx.export", lambda module, example, path, **_: shutil.copy(tiny_window_model, path))
    another = SlotNetwork(SlotConfig())
    with pytest.raises(ValueError, match="differs from torch"):
        export_window(tmp_path / "m.onnx", another, "exp1a", (NEVER_BY_ONSET,) * 5, {}, {"mix": 0.5, "slots": 0.5})
    assert not list(tmp_path.iterdir())


def test_the_kind_of_file_decides_what_plays_it(tiny_window_model, model):
    live = load_model("default")
    assert isinstance(live, OnnxModel) and live.latency == 0
    assert isinstance(model, WindowModel) and model.latency == model.info.stride - 1
    assert isinstance(load_model(f"onnx:{tiny_window_model}"), WindowModel)


def changed(source, target, **changes):
    """A copy of a model file with other metadata; None leaves a key out."""
    model = onnx.load(str(source))
    metadata = {entry.key: entry.value for entry in model.metadata_props} | changes
    onnx.helper.set_model_props(model, {key: value for key, value in metadata.items() if value is not None})
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"format": "rt-mpe window 2"}, "rt-mpe window 2"),
        ({"window": "24"}, "does not fit"),
        ({"window": "1000000000000"}, "does not fit"),
        ({"window": "wide"}, "wide"),
        ({"stride": "0"}, "stride of 0"),
        ({"stride": "20"}, "stride of 20"),
        ({"voices": "8"}, "does not fit"),
        ({"voices": "-1"}, "out of range"),
        ({"lookahead": "9"}, "out of range"),
        ({"recipe": None}, "recipe"),
        ({"thresholds": "[]"}, "out of range"),
        ({"analysis": json.dumps({"gamma": 6.0, "alignment": "centre"})}, "gamma 0.0 != 6.0"),
        ({"analysis": json.dumps({"gamma": 0.0})}, "alignment 'centre' != 'right'"),
        ({"format": "rt-mpe live 3", "analysis": "{}"}, "onset"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(rt_mpe, tiny_window_model, tmp_path, changes, reason):
    ended = rt_mpe("info", changed(tiny_window_model, tmp_path / "damaged.onnx", **changes))
    assert ended.code == 2 and ended.out == [] and len(ended.err) == 1
    assert ended.err[0].startswith("rt-mpe: error: ") and reason in ended.err[0], ended.err[0]


# Frame by frame


def test_every_row_speaks_of_its_own_frame_at_every_phase_of_the_stride(model):
    loud = np.zeros((40, N_PITCHES), bool)
    rng = np.random.default_rng(0)
    frames = np.zeros((len(loud), N_BINS), np.float32)
    for n in range(len(loud)):
        pitch = int(rng.integers(N_PITCHES))
        loud[n, pitch] = True
        frames[n, 3 * pitch + 1] = 1.0
    model.reset()
    for n, frame in enumerate(frames):
        (posteriors,) = model.process(frame[None])
        for lookahead, row in enumerate(posteriors.mix):
            spoken_of = n - model.latency - lookahead
            wanted = loud[spoken_of] if spoken_of >= 0 else np.zeros(N_PITCHES, bool)
            np.testing.assert_array_equal(row > 0.5, wanted)
        if n >= model.latency:
            np.testing.assert_array_equal(posteriors.embedding.max(1) > 0.4, loud[n - model.latency])
        assert posteriors.mix.shape == posteriors.onset.shape == (MAX_LOOKAHEAD + 1, N_PITCHES)
        assert not posteriors.onset.any()


def test_more_look_ahead_lets_the_network_see_more_of_what_follows(tiny_window_model, tmp_path, monkeypatch):
    """What a network that looks two frames ahead hears in a frame, it says of the one before the last."""
    model = WindowModel(str(changed(tiny_window_model, tmp_path / "m.onnx", stride="1")))

    def two_ahead():
        loud = np.stack(model._frames).T[1::3]
        return np.pad(loud[:, 2:], ((0, 0), (0, 2))), np.zeros((4, N_PITCHES, WINDOW), np.float32)

    monkeypatch.setattr(model, "_run", two_ahead)
    frame = np.zeros(N_BINS, np.float32)
    frame[3 * 40 + 1] = 1.0
    said = [heard.mix[:, 40] > 0.5 for heard in model.process(np.stack([frame, 0 * frame, 0 * frame]))]
    np.testing.assert_array_equal(said, np.eye(MAX_LOOKAHEAD + 1, dtype=bool)[2:])


def test_reset_equals_a_new_model(model, tiny_window_model):
    frames = np.random.default_rng(0).random((9, N_BINS)).astype(np.float32)
    model.reset()
    assert len(list(model.process(frames[:6]))) == 6
    model.reset()
    fresh = WindowModel(str(tiny_window_model))
    for again, first in zip(model.process(frames), fresh.process(frames), strict=True):
        for got, want in zip(again, first, strict=True):
            np.testing.assert_array_equal(got, want)


# Who plays


def test_a_note_goes_to_the_slot_that_says_most_of_it_over_its_first_frames():
    voices, history = SlotVoices(4), np.zeros((6, N_PITCHES, 4), np.float32)
    history[1:4, 30] = 0, 0, 0.9, 0  # of another note before it
    history[4, 30] = 0, 0.5, 0, 0.4
    history[5, 30] = 0, 0.1, 0, 0.4
    history[5, 31] = 0.9, 0, 0, 0
    begun = [NoteEvent(True, 30, 99), NoteEvent(True, 31, 100)]
    assert voices.process(begun, history, 99) == [(begun[0], 3), (begun[1], 0)]
    assert voices.count == 2 and voices.max_voices == 4
    ended = [NoteEvent(False, 31, 110), NoteEvent(False, 30, 110)]
    assert voices.process(ended, history, 109) == [(ended[0], 0), (ended[1], 3)]
    voices.reset()
    assert voices.count == 0


# The engine


@pytest.fixture(scope="module")
def whole(model):
    return hear(model, [play()])


def test_every_note_is_found_at_its_time_in_the_slot_of_its_player(whole):
    found = [(round(onset, 3), midi, voice) for onset, _, midi, voice, _ in whole[0].notes]
    assert [(midi, voice) for _, midi, voice in found] == [(midi, slot) for *_, midi, slot in NOTES]
    for (onset, offset, *_), row in zip(NOTES, whole[0].notes, strict=True):
        assert row[0] == pytest.approx(onset, abs=FRAME_SECONDS)
        assert row[1] == pytest.approx(offset, abs=1.5 * FRAME_SECONDS)


@pytest.mark.parametrize("lookahead", [0, 2, 4])
def test_the_declared_latency_is_when_a_note_is_sent(model, lookahead):
    heard, engine = hear(model, [play(NOTES[:3])], settings=Settings(lookahead))
    assert engine.latency == sum(engine.latencies.values())
    assert engine.latencies == {"resampler": 0, "front end": 13824, "model": 3 * HOP, "look-ahead": lookahead * HOP}
    assert [tuple(row) for row in heard.notes[:, 2:4]] == [note[2:] for note in NOTES[:3]]
    late = heard.notes[:, 4] - heard.notes[:, 0]
    np.testing.assert_allclose(late, engine.latency / SAMPLERATE, atol=FRAME_SECONDS)


def test_probabilities_lie_on_the_grid_of_label_frames(whole):
    n_frames = -(-round(SECONDS * SAMPLERATE) // HOP)
    assert whole[0].mix.shape == (N_PITCHES, n_frames)
    wrong = (whole[0].mix > 0.5) != roll(NOTES, n_frames)
    assert wrong.sum() <= 2 * len(NOTES)  # a frame at either end of a note


def test_any_chopping_gives_the_same_notes_and_probabilities(model):
    sound = play(samplerate=44_100)
    one = hear(model, [sound], 44_100)[0]
    cuts = np.sort(np.random.default_rng(1).integers(0, len(sound), 25))
    chopped = hear(model, np.split(sound, cuts), 44_100)[0]
    np.testing.assert_array_equal(chopped.notes, one.notes)
    np.testing.assert_array_equal(chopped.mix, one.mix)
    assert len(one.notes) == len(NOTES)


def test_a_gap_ends_what_sounds_and_the_clock_goes_on(model):
    sound = play()
    lost, at = 4_800, round(0.45 * SAMPLERATE)  # 0.45 to 0.75 s
    heard, engine = hear(model, [sound[:at], (lost, sound[at + lost :])])
    assert engine.lost == lost and not engine.sounding
    expected = [(0.10, 0.45, 81), (0.25, 0.45, 90), (0.40, 0.45, 76), (0.75, 0.90, 76)]
    expected += [note[:3] for note in NOTES[3:]]
    assert [midi for *_, midi in expected] == list(heard.notes[:, 2])
    np.testing.assert_allclose(heard.notes[:, :2], [note[:2] for note in expected], atol=1.6 * FRAME_SECONDS)
    assert (np.diff(heard.notes[:, 4]) >= 0).all()


def test_a_recording_shorter_than_the_latency_is_heard_to_its_end(model):
    heard, _ = hear(model, [play([(0.0, 0.2, 81, PLAIN)], seconds=0.2)])
    assert [tuple(row[2:4]) for row in heard.notes] == [(81, PLAIN)]
    assert heard.notes[0, 1] == pytest.approx(0.2, abs=1.5 * FRAME_SECONDS)
    assert len(hear(model, [])[0].notes) == 0


def test_velocity_is_that_of_the_note_although_the_decision_comes_after_its_end(model):
    played = []
    sink = NoteSink()
    sink.note_on = played.append
    engine = Engine(model, SAMPLERATE, [sink], Settings(lookahead=2))
    engine.process(play([(0.1, 0.2, 90, PLAIN), (0.5, 1.0, 90, PLAIN)], seconds=1.5))
    engine.finish()
    short, long = (note.velocity for note in played)
    assert short > 40 and abs(short - long) < 12


# The commands


def test_a_window_model_transcribes_a_file(rt_mpe, tiny_window_model, tmp_path, whole):
    soundfile.write(tmp_path / "a.wav", play(), SAMPLERATE, subtype="FLOAT")
    np.testing.assert_array_equal(transcribe_file(tmp_path / "a.wav", str(tiny_window_model)).notes, whole[0].notes)
    listen = ["listen", "--source", f"file:{tmp_path / 'a.wav'}", "--model", tiny_window_model, "--duration", 0.6]
    ended = rt_mpe(*listen, "--quiet", "--sink", "json")
    assert ended.code == 0 and not ended.err
    assert sum('"note_on"' in line for line in ended.out) == 3


def test_info_and_bench_tell_the_latency(rt_mpe, tiny_window_model):
    facts = json.loads("".join(rt_mpe("info", tiny_window_model, "--json").out))
    assert {name: facts[name] for name in ("recipe", "window", "stride", "latency")} == {
        "recipe": "hand",
        "window": 23,
        "stride": 4,
        "latency": 27 + 3 + 2,
    }
    text = rt_mpe("info", tiny_window_model).out
    assert "latency     32 (1024 ms)" in text and "recipe      hand" in text
    facts = asdict(measure(load_model(str(tiny_window_model)), 2.0))
    assert facts["latency_ms"] == {"resampler": 1.25, "front end": 864.0, "model": 96.0, "look-ahead": 64.0}
    text = "\n".join(table(facts | {"machine": "this", "start_seconds": 0.1, "peak_mb": None}))
    assert "stride 4 frames" in text and "1025 ms  resampler 1 + front end 864 + model 96 + look-ahead 64" in text
    assert facts["stages"]["model"]["mean_ms"] > facts["stages"]["CQT"]["mean_ms"] > 0
