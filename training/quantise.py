"""Convolutions in eight bits: a third of the work and a third less file; probabilities move by a hundredth.

The range of every activation is measured on music and fixed. Weights have seven bits, a scale for each channel: with
eight, sums overflow on processors without the instructions made for this. States are kept as the convolutions read
them, in eight bits and with their channels last: made so anew in every step, they would cost nearly as much as the
convolutions themselves.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from realtime_mpe.model import STATE_PREFIX

BRANCH = "/branch."  # in the names of its nodes; its sums stay whole: timbres differ by less than detection minds
PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}  # there is nothing left to fold, and no need to be told so


def quantised(model, levels: np.ndarray):
    """An ONNX live model -> the same with quantised convolutions. levels : (N, n_bins) float32 frames of music."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Music(CalibrationDataReader):
        def __init__(self, path: Path):
            self._feeds = feeds(path, levels)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        whole, smaller = (Path(folder) / name for name in ("whole.onnx", "smaller.onnx"))
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, PREPARED)
        onnx.save(model, str(whole))
        quantize_static(
            str(whole),
            str(smaller),
            Music(whole),
            op_types_to_quantize=["Conv", "Relu", "Add"],
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "Add" and BRANCH in node.name],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        found = onnx.load(str(smaller))
    keep_states(found)
    onnx.helper.set_model_props(found, metadata)
    return found


def keep_states(model) -> None:
    """Turn the states of a quantised live model, float32 (B, C, context, P), into uint8 (B, context, P, C).

    What a convolution reads is quantised where its state and the newest frame meet: now the frame alone is. Zeros stay
    silence; ValueError if a state can be below them.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name: value for value in graph.output}

    def reader(name: str):
        return next(node for node in graph.node if name in node.input)

    for state in [value for value in graph.input if value.name.startswith(STATE_PREFIX)]:
        new_state = outputs[f"new_{state.name}"]
        first, new_first = f"{state.name}.channels_first", f"{new_state.name}.channels_first"
        meeting = reader(state.name)
        if meeting.op_type == "Cast":  # to what the frame is, where training is not in single precision
            cast, meeting = meeting, reader(meeting.output[0])
            graph.node.remove(cast)
        quantising = reader(meeting.output[0])
        restoring = reader(quantising.output[0])
        cutting = next(node for node in graph.node if new_state.name in node.output)
        if numpy_helper.to_array(constants[quantising.input[2]]) != 0:
            raise ValueError(f"{state.name} can be negative; a state must come from a ReLU")
        quantising.input[0] = meeting.input[1]
        meeting.input[:] = [first, quantising.output[0]]
        restoring.input[0] = cutting.input[0] = meeting.output[0]
        cutting.output[0] = new_first
        graph.node.remove(quantising)
        graph.node.insert(list(graph.node).index(meeting), quantising)
        graph.node.insert(0, helper.make_node("Transpose", [state.name], [first], perm=[0, 3, 1, 2]))
        graph.node.append(helper.make_node("Transpose", [new_first], [new_state.name], perm=[0, 2, 3, 1]))
        phases, *sizes = state.type.tensor_type.shape.dim
        channels, context, pitches = (size.dim_value for size in sizes)
        kind = helper.make_tensor_type_proto(TensorProto.UINT8, (phases.dim_param, context, pitches, channels))
        state.type.CopyFrom(kind)
        new_state.type.CopyFrom(kind)
    del graph.value_info[:]  # what it says of what lies between is no longer so


def feeds(path: Path, levels: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The inputs of a live model for each frame in turn, with the states that it has by then."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    frame, *states = session.get_inputs()
    known = {state.name: np.zeros((1, *state.shape[1:]), np.float32) for state in states}
    for row in levels:
        feed = {frame.name: row[None, None].astype(np.float32), **known}
        yield feed
        known = dict(zip(known, session.run([f"new_{name}" for name in known], feed), strict=True))
