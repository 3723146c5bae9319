"""The model as a release takes it: opset, IR version, types; and it still computes the same."""

import json

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from edgeprune.backends.onnxruntime import exporting  # noqa: E402 (after the skips)
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers  # noqa: E402
from edgeprune.backends.onnxruntime.quantizing import quantize  # noqa: E402
from edgeprune.backends.tensorrt import model, scales, versions  # noqa: E402
from edgeprune.errors import ExportError  # noqa: E402
from edgeprune.testing import trtexec, trtexec_says  # noqa: E402
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


@pytest.mark.parametrize("release", trtexec.versions())
def test_an_int8_model_has_the_quantize_nodes_that_a_release_takes(exported, release):
    family = versions.dialect(versions.parse(release))
    dice = np.random.default_rng(0)
    cases = [(dice.standard_normal((1, 3, 16, 16), dtype=np.float32),) for _ in range(12)]
    made, told = model.quantized(model.prepared(exported, family, "int8"), cases, 20.0)
    assert told["layers"] > len(told["kept"]) == 0
    assert told["snr_db"] > 20
    opset = next(entry.version for entry in made.opset_import if entry.domain == "")
    assert (opset <= family.opset, made.ir_version <= family.ir_version) == (True, True)
    content = made.SerializeToString()
    assert trtexec_says.unparsed(content, release) is None
    assert (trtexec_says.refused(content, release, int8=False) is None) == family.strongly_typed
    assert trtexec_says.refused(content, release, int8=True) is None
    # For a DLA the same in a table: a scale for the input, and for what is made of it, the output under its own name.
    told = scales.of(made, versions.parse(release))
    lines = told.table.decode("ascii").splitlines()
    assert (
        lines[0]
        == f"TRT-{json.loads(trtexec._OPTIONS.read_text(encoding='utf-8'))[release]['version_tag']}-EntropyCalibration2"
    )
    named = [line.rpartition(": ")[0] for line in lines[1:]]
    floats = {exported.graph.input[0].name} | {name for node in exported.graph.node for name in node.output}
    assert {exported.graph.input[0].name, exported.graph.output[0].name} <= set(named) <= floats
    assert told.exact == ()
    # The nodes have the names that the float model's have: layers are joined back by them.
    assert model.operations(exported).items() <= model.operations(made).items()
    want, have = outputs(exported), outputs(made)
    assert 0 < np.abs(have - want).max() < 0.2 * np.abs(want).max()


@pytest.mark.parametrize("unsigned", [True, False])
def test_the_quantize_nodes_of_a_cpu_are_none_of_tensorrts(exported, tmp_path, unsigned):
    dice = np.random.default_rng(0)
    cases = [(dice.standard_normal((1, 3, 16, 16), dtype=np.float32),) for _ in range(4)]
    onnx.save(exported, tmp_path / "float.onnx")
    numbers = Int8Numbers(unsigned, narrow=False)
    quantize(tmp_path / "float.onnx", cases, tmp_path / "int8.onnx", needed_db=5, numbers=numbers)
    for release, said in (("8.6.1", "zeroPt must be all zeros"), ("10.3.0", "Non-zero zero point is not supported")):
        complaint = trtexec_says.unparsed((tmp_path / "int8.onnx").read_bytes(), release)
        assert said in complaint or "must be kINT8" in complaint


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
