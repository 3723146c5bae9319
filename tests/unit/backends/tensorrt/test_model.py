"""The model as a release takes it: opset, IR version, types; and it still computes the same."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from edgeprune.backends.onnxruntime import exporting  # noqa: E402 (after the skips)
from edgeprune.backends.tensorrt import model, versions  # noqa: E402
from edgeprune.errors import ExportError  # noqa: E402
from edgeprune.testing.backends import SmallNet  # noqa: E402

FAMILIES = {family.name: family for family in versions.DIALECTS}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`SmallNet` as edgeprune exports it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    exporting.export(SmallNet(), (torch.randn(1, 3, 16, 16),), path)
    return onnx.load(path)


def outputs(made):
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16), dtype=np.float32)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_keeps_its_numbers_and_its_ends(exported, name, precision):
    family = FAMILIES[name]
    made = model.prepared(exported, family, precision)
    opset = next(entry.version for entry in made.opset_import if entry.domain == "")
    assert opset <= family.opset
    assert made.ir_version <= family.ir_version
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in made.graph.initializer)
    assert half == (precision == "fp16" and family.strongly_typed)
    ends = [*made.graph.input, *made.graph.output]
    assert [end.name for end in ends] == [end.name for end in [*exported.graph.input, *exported.graph.output]]
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}
    want, have = outputs(exported), outputs(made)
    np.testing.assert_allclose(have, want, atol=(2e-2 if half else 1e-5) * np.abs(want).max())
    if half:
        assert not np.array_equal(have, want)


def test_preparing_leaves_the_model_as_it_is(exported):
    before = exported.SerializeToString()
    model.prepared(exported, FAMILIES["8.6"], "fp16")
    model.prepared(exported, FAMILIES["11"], "fp16")
    assert exported.SerializeToString() == before


@pytest.mark.parametrize("name", list(FAMILIES))
def test_nodes_are_known_by_name_and_by_what_they_come_from(exported, name):
    made = model.prepared(exported, FAMILIES[name], "fp16")
    operations, origins = model.operations(made), model.origins(exported)
    convolutions = [node for node, operation in operations.items() if operation == "Conv"]
    assert len(convolutions) == 3
    assert all(origins[node].startswith("conv2d") for node in convolutions)


def test_what_an_old_opset_cannot_say_is_one_sentence():
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], name="gelu")
    tensors = [info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", tensors[:1], tensors[1:])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.prepared(made, FAMILIES["10"], "fp32")
    with pytest.raises(ExportError) as caught:
        model.prepared(made, FAMILIES["8.6"], "fp32")
    assert "opset 17" in caught.value.message
    assert "\n" not in caught.value.message
