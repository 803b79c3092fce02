"""The network: streaming equals one shot, nothing looks ahead, the exported file equals torch, and the losses learn."""

import copy
import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import make_tune
from made_up import notes, untrained

from realtime_mpe.affinity import pair_features
from realtime_mpe.analysis import MAX_LOOKAHEAD, N_PITCHES, PAPER, PHASES, AnalysisConfig
from realtime_mpe.cqt import StreamingCqt
from realtime_mpe.errors import UserError
from realtime_mpe.grouping import JOIN_FEATURES
from realtime_mpe.lines import line_inputs
from realtime_mpe.model import OnnxModel, agreed, log_odds, open_session
from realtime_mpe.notes import NoteEvent, Thresholds
from realtime_mpe.timbre import timbre_inputs
from realtime_mpe.training import export as export_module
from realtime_mpe.training import quantise
from realtime_mpe.training.calibrate import hear
from realtime_mpe.training.company import CompanyNetwork
from realtime_mpe.training.export import differences, export, export_timbre, ridges
from realtime_mpe.training.frontend import FrontEnd
from realtime_mpe.training.grouping import GroupingNetwork
from realtime_mpe.training.lines import LineNetwork
from realtime_mpe.training.mixing import Mixture
from realtime_mpe.training.network import LiveNetwork, NetworkConfig, harmonics
from realtime_mpe.training.players import Players
from realtime_mpe.training.pointer import PointerNetwork
from realtime_mpe.training.slots import TIMBRE_FRAMES, TimbreEncoder
from realtime_mpe.training.train import SIZES
from realtime_mpe.voices import NEW_FEATURES, VOICE_FEATURES

SMALL = NetworkConfig(channels=16, embedding_channels=16, embedding_dim=8)
N_LIVE_BINS = AnalysisConfig().n_bins
HEADS = ("mix", "onset", "polyphony", "embedding")


@pytest.fixture(scope="module")
def network() -> LiveNetwork:
    torch.manual_seed(0)
    network = LiveNetwork(SMALL)
    network(torch.rand(2, 60, N_LIVE_BINS))  # normalisation statistics that are not the initial ones
    return network.eval()


def test_training_front_end_equals_the_runtime_on_every_frame():
    audio = np.random.default_rng(0).normal(0, 0.1, (2, 20 * 512)).astype(np.float32)
    got = FrontEnd().levels(torch.from_numpy(audio)).numpy()
    for row, signal in zip(got, audio, strict=True):
        np.testing.assert_allclose(row, StreamingCqt(AnalysisConfig()).process(signal), atol=2e-5)


@pytest.mark.parametrize("samples", [20 * 512, 20 * 512 + 1])
def test_the_centred_front_end_of_training_gives_the_runtimes_label_frames(samples):
    audio = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    label_frames = FrontEnd(PAPER).levels(torch.from_numpy(audio)[None])[0].numpy()
    cqt = StreamingCqt(PAPER)
    streamed = np.concatenate([cqt.process(audio), cqt.flush()])[cqt.latency // PAPER.hop - 1 :]
    assert len(label_frames) == 21 <= len(streamed)
    np.testing.assert_allclose(label_frames, streamed[:21], atol=2e-5)


@torch.no_grad()
def test_any_chopping_into_frames_equals_one_shot(network):
    frames = torch.rand(1, 50, N_LIVE_BINS)
    whole, _ = network(frames)
    states, parts = None, []
    for piece in frames.split([1, 7, 1, 1, 20, 13, 7], 1):
        outputs, states = network(piece, states)
        parts.append(outputs)
    for head in HEADS:
        chopped = torch.cat([part[head] for part in parts], 1)
        torch.testing.assert_close(chopped, whole[head], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_future_changes_nothing(network):
    frames = torch.rand(1, 40, N_LIVE_BINS)
    other = frames.clone()
    other[:, 25:] = torch.rand(1, 15, N_LIVE_BINS)
    a, b = network(frames)[0], network(other)[0]
    for head in HEADS:
        torch.testing.assert_close(a[head][:, :25], b[head][:, :25])
        assert not torch.allclose(a[head][:, 25:], b[head][:, 25:])


def test_harmonic_shift_reads_the_bin_of_the_harmonic_and_silence_beyond():
    frames = torch.arange(float(N_LIVE_BINS))[None, None]
    octave, below, eighth = harmonics(frames, (36, -36, 108))[0, :, 0]
    assert (octave[10], octave[200]) == (46, 236)
    assert (below[46], below[5]) == (10, 0)
    assert (eighth[100], eighth[200]) == (208, 0)


HALF = 5e-3  # what half precision of the weights leaves of an output of order one


def test_exported_file_equals_torch_and_carries_its_metadata(network, tmp_path):
    company = CompanyNetwork(SMALL.embedding_dim).eval()
    torch.nn.init.normal_(company.layers[-1].weight)  # before training it changes nothing
    lines = LineNetwork().eval()
    voters, groupings = ([kind().eval() for _ in range(2)] for kind in (PointerNetwork, GroupingNetwork))
    thresholds = tuple(Thresholds(on=0.5 + k / 20) for k in range(MAX_LOOKAHEAD + 1))
    path = tmp_path / "m.onnx"
    export(path, network, Players(lines, company, groupings, voters), 2, thresholds, {"hours": 1.5})
    model = OnnxModel(str(path))
    assert differences(network, model, ridges()).max() < HALF
    assert path.stat().st_size < 2.5 * model.info.parameters + 60_000  # bytes: the weights take two each
    assert (model.info.lookahead, model.info.thresholds, model.info.training) == (2, thresholds, {"hours": 1.5})
    rng = np.random.default_rng(0)
    features, new = (rng.normal(size=n).astype(np.float32) for n in ((5, VOICE_FEATURES), NEW_FEATURES))
    situation = torch.from_numpy(new)[None]
    with torch.no_grad():
        full = [v(torch.from_numpy(features)[None], situation, torch.ones(1, 5, dtype=bool))[0] for v in voters]
        empty = [v(torch.zeros(1, 3, VOICE_FEATURES), situation, torch.zeros(1, 3).bool())[0, 3:] for v in voters]
    for got, votes in ((model.pointer(features, new), full), (model.pointer(features[:0], new), empty)):
        np.testing.assert_allclose(got, torch.stack(votes).log_softmax(1).mean(0).numpy(), atol=HALF)
    some = notes(np.random.default_rng(2))
    each, every_two = line_inputs(some.pitch, some.start, some.end, 90)
    with torch.no_grad():
        line_odds = lines(
            torch.from_numpy(each)[None],
            torch.from_numpy(every_two).permute(1, 2, 0)[None],
            torch.ones(1, len(each), dtype=torch.bool),
        )[0].numpy()
    apart = ~np.eye(len(each), dtype=bool)
    np.testing.assert_allclose(
        model.grouping.lines(some.pitch, some.start, some.end, 90)[apart], line_odds[apart], atol=HALF
    )
    pairs = pair_features(some, line_odds, 90)
    groups = np.random.default_rng(3).normal(size=(7, JOIN_FEATURES)).astype(np.float32)
    with torch.no_grad():
        odds, joins = (
            torch.stack([getattr(grouping, part)(torch.from_numpy(x)) for grouping in groupings]).mean(0).numpy()
            for part, x in (("pair", pairs), ("join", groups))
        )
    np.testing.assert_allclose(model.grouping.affinity(pairs)[apart], odds[apart], atol=HALF)
    np.testing.assert_allclose(model.grouping.join_odds(groups), joins, atol=HALF)
    mean, frames = rng.normal(size=(7, 2 * SMALL.embedding_dim + 1)), rng.uniform(0.5, 32, 7)
    with torch.no_grad():
        timbres = company(torch.from_numpy(timbre_inputs(mean, frames))).numpy()
    np.testing.assert_allclose(model.timbre(mean, frames), timbres, atol=HALF)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("found", [[2e-4], [5e-5, 4e-2]], ids=["whole", "halved"])
def test_export_that_differs_from_torch_is_refused_and_leaves_no_file(network, tmp_path, monkeypatch, found):
    left = list(found)
    monkeypatch.setattr(export_module, "differences", lambda *_: np.array([0.0, left.pop(0)]))
    with pytest.raises(ValueError, match=f"differs from torch by {found[-1]:.1e}"):
        export(tmp_path / "m.onnx", network, untrained(SMALL.embedding_dim), 1, (Thresholds(),) * 5, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["grouping.0.pair.0.weight", "grouping.0.join.0.weight", "timbre.0.weight"])
def test_weights_of_another_shape_are_refused_when_the_file_is_read(network, tmp_path, monkeypatch, layer):
    players = untrained(SMALL.embedding_dim)
    whole = players.weights()
    monkeypatch.setattr(Players, "weights", lambda self: whole | {layer: whole[layer][:, :5]})
    with pytest.raises(UserError, match="does not fit its metadata"):
        export(tmp_path / "m.onnx", network, players, 1, (Thresholds(),) * 5, {})


def test_a_network_without_a_branch_hears_notes_and_one_voice(tmp_path):
    torch.manual_seed(0)
    network = LiveNetwork(SIZES["tiny"]).eval()
    path = tmp_path / "m.onnx"
    export(path, network, None, 1, (Thresholds(),) * 5, {})
    model = OnnxModel(str(path))
    assert model.info.parameters <= 20_000 and model.info.voices == 1 and path.stat().st_size < 200_000
    (heard,) = model.process(np.zeros((1, N_LIVE_BINS), np.float32))
    assert heard.embedding.shape == (N_PITCHES, 1)
    begun = [NoteEvent(True, 3, 0), NoteEvent(True, 9, 0)]
    assert [voice for _, voice in model.voices().process(begun, [heard.embedding], 0)] == [0, 0]


def test_the_convolutions_are_quantised_by_the_music_they_are_shown(network, tmp_path):
    levels = StreamingCqt(AnalysisConfig()).process(make_tune(6.0))
    parts = network, untrained(SMALL.embedding_dim), 1, (Thresholds(),) * 5, {}
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    export(whole, *parts)
    export(small, *parts, levels)
    kinds = {node.op_type for node in onnx.load(str(small)).graph.node}
    assert "QuantizeLinear" in kinds
    model = OnnxModel(str(small))
    assert model.info == dataclasses.replace(OnnxModel(str(whole)).info, name=str(small))
    found = differences(network, model, levels)
    assert 0 < found.mean() < 1e-2
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(small)).graph.initializer]
    weights = [np.abs(weight.astype(int)).max() for weight in weights if weight.dtype == np.int8]
    assert len(weights) > 10 and max(weights) == 64  # seven bits: no sum overflows
    states = [state for state in model._session.get_inputs() if state.name.startswith("state.")]
    assert all(state.type == "tensor(uint8)" for state in states)
    assert [state.shape[1:] for state in states[:3]] == [[2, N_PITCHES, 16], [2, N_PITCHES, 16], [4, N_PITCHES, 16]]


def test_a_state_that_can_be_negative_is_refused(network, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(quantise, "keep_states", lambda model: made.append(copy.deepcopy(model)))
    levels = StreamingCqt(AnalysisConfig()).process(make_tune(2.0))
    export(tmp_path / "m.onnx", network, untrained(SMALL.embedding_dim), 1, (Thresholds(),) * 5, {}, levels)
    (model,) = made
    found = "state.0"
    while (node := next(node for node in model.graph.node if found in node.input)).op_type != "QuantizeLinear":
        found = node.output[0]
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[2])
    assert onnx.numpy_helper.to_array(zero) == 0
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(1, np.uint8), zero.name))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="state.0 can be negative"):
        quantise.keep_states(model)


def test_two_phases_agree_on_the_mean_of_what_they_say_of_one_label():
    rng = np.random.default_rng(0)
    newest, before = rng.uniform(0.01, 0.99, (2, 3, MAX_LOOKAHEAD + 1, 4))
    odds, odds_before = np.log(newest / (1 - newest)), np.log(before / (1 - before))
    found = agreed(log_odds(newest), log_odds(before))
    np.testing.assert_allclose(np.log(found / (1 - found))[:, 0], (odds + odds_before)[:, 0] / 2)
    of_one_label = (odds_before[:, 1] + odds_before[:, 2]) / 2
    np.testing.assert_allclose(np.log(found / (1 - found))[:, 2], (odds[:, 2] + of_one_label) / 2)
    assert np.isfinite(agreed(log_odds(np.zeros((5, 2))), log_odds(np.ones((5, 2))))).all()


def test_the_engine_s_phases_are_those_that_training_hears(network, tmp_path):
    path, sound = tmp_path / "m.onnx", make_tune(2.0)
    export(path, network, untrained(SMALL.embedding_dim), 1, (Thresholds(),) * 5, {})
    model = OnnxModel(str(path))
    (heard,) = hear(network, FrontEnd(), [Mixture(sound, np.zeros((0, 4)))], torch.device("cpu"))
    live = list(model.process(StreamingCqt(AnalysisConfig(), model.steps).process(sound)))
    assert heard.steps == model.steps
    for name in ("mix", "onset", "embedding"):
        got = np.stack([getattr(step, name) for step in live])[: len(heard.mix)]
        np.testing.assert_allclose(got, getattr(heard, name), atol=HALF)


def test_model_reset_equals_a_new_model(network, tmp_path):
    path = tmp_path / "m.onnx"
    export(path, network, untrained(SMALL.embedding_dim), 1, (Thresholds(),) * 5, {})
    model, frames = OnnxModel(str(path)), np.random.default_rng(0).random((6, N_LIVE_BINS)).astype(np.float32)
    first = [heard.mix for heard in model.process(frames)]
    model.reset()
    np.testing.assert_array_equal([heard.mix for heard in model.process(frames)], first)


def test_phases_that_hear_in_one_run_say_what_each_says_alone(network, tmp_path):
    levels = StreamingCqt(AnalysisConfig(), PHASES).process(make_tune(2.0))
    for shown in (None, levels):  # as they are, and quantised
        path = tmp_path / "m.onnx"
        export(path, network, untrained(SMALL.embedding_dim), 1, (Thresholds(),) * 5, {}, shown)
        model = OnnxModel(str(path))
        alone = [heard for frame in levels for heard in model.process(frame[None])]
        for cuts in ([], [1], [1, 2, 5, 10], [3, 3, 4, 60]):
            model.reset()
            pieces = np.split(levels, cuts)
            together = [heard for piece in pieces for heard in model.process(piece)]
            for got, want in zip(zip(*together, strict=True), zip(*alone, strict=True), strict=True):
                np.testing.assert_array_equal(got, want)


def test_the_exported_timbre_teacher_equals_torch_and_names_its_front_end(tmp_path):
    torch.manual_seed(0)
    encoder = TimbreEncoder().eval()
    path = tmp_path / "teacher.onnx"
    export_timbre(path, encoder)
    session = open_session(path)
    view = np.random.default_rng(0).random((1, TIMBRE_FRAMES, PAPER.n_bins)).astype(np.float32)
    (embedding,) = session.run(["embedding"], {"view": view})
    with torch.no_grad():
        np.testing.assert_allclose(embedding, encoder(torch.from_numpy(view))[0][0], atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["format"], metadata["parameters"]) == ("rt-mpe timbre 1", "699584")
    assert json.loads(metadata["analysis"]) == PAPER.to_dict()
