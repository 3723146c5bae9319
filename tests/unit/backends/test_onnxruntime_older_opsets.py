"""Exported models at the edges of what an older opset can say."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx")

import numpy as np  # noqa: E402 (after the skip)

from edgeprune.backends.onnxruntime import exporting  # noqa: E402
from edgeprune.backends.onnxruntime.older_opsets import converted  # noqa: E402
from edgeprune.backends.onnxruntime.runtime import onnxruntime  # noqa: E402
from edgeprune.backends.onnxruntime.versions import OnnxVersions  # noqa: E402
from edgeprune.errors import ExportError  # noqa: E402

info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
FLOAT = onnx.TensorProto.FLOAT


def model(nodes, inputs, outputs, constants=()):
    graph = onnx.helper.make_graph(
        nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(a, n) for n, a in constants]
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    made.ir_version = 8
    return made


def test_a_split_of_a_weight_gets_its_sizes():
    weight = np.arange(5, dtype=np.float32)
    split = node("Split", ["w"], ["a", "b"], num_outputs=2)
    made = model(
        [split, node("Add", ["x", "a"], ["y"])], [info("x", FLOAT, [3])], [info("y", FLOAT, [3])], [("w", weight)]
    )
    older = converted(made, OnnxVersions(13, 7))
    session = onnxruntime.InferenceSession(older.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros(3, np.float32)})[0].tolist() == [0, 1, 2]


def test_a_split_of_an_unknown_size_is_refused():
    nodes = [node("Reshape", ["x", "s"], ["r"]), node("Split", ["r"], ["y", "z"], num_outputs=2)]
    inputs = [info("x", FLOAT, [4]), info("s", onnx.TensorProto.INT64, [1])]
    made = model(nodes, inputs, [info("y", FLOAT, None), info("z", FLOAT, None)])
    with pytest.raises(ExportError, match="a Split of r in 2, whose size is not known"):
        converted(made, OnnxVersions(13, 7))


def test_shapes_that_contradict_each_other_are_no_export(monkeypatch, tmp_path):
    wrong = model([node("Relu", ["x"], ["y"])], [info("x", FLOAT, [3])], [info("y", FLOAT, [4])])
    monkeypatch.setattr(exporting, "_program", lambda *_: (wrong, {}))
    with pytest.raises(ExportError, match="must pass the ONNX checker"):
        exporting.export(None, (), tmp_path / "engine.onnx", OnnxVersions(18, 8))
    assert not (tmp_path / "engine.onnx").exists()
