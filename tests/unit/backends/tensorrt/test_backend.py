"""From a module to a deployed release, with the stand-in in place of trtexec: nothing here was measured."""

import functools
import json
import struct

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import edgeprune  # noqa: E402 (after the skips)
from edgeprune.backends import registry  # noqa: E402
from edgeprune.backends.tensorrt import versions  # noqa: E402
from edgeprune.backends.tensorrt.backend import TensorRt  # noqa: E402
from edgeprune.deployment import compiling, gates  # noqa: E402
from edgeprune.deployment.artifact import Artifact, describe_file  # noqa: E402
from edgeprune.deployment.golden import make_golden  # noqa: E402
from edgeprune.errors import (  # noqa: E402
    BackendError,
    CompileError,
    ConfigError,
    IncompatibleTargetError,
    ParityError,
)
from edgeprune.tasks.limits import Tolerance  # noqa: E402


def net(seed=0):
    """A network that is exported in a moment."""
    torch.manual_seed(seed)
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


def example():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def compiled(stand_in, tmp_path, monkeypatch):
    """Compiles `net` with a release's stand-in."""
    # Every golden case is a process of its own.
    monkeypatch.setattr(compiling, "make_golden", functools.partial(make_golden, count=1))

    def make(version, backend="tensorrt", **options):
        stand_in(version)
        with edgeprune.Board.open("local") as board:
            return edgeprune.compile(
                net(), example(), tmp_path / "artifact", backend=backend, board=board, edge_cases=(), **options
            )

    return make


def test_an_artifact_is_built_on_the_board_and_deployed_there(compiled, stand_in, recorded):
    artifact = compiled("10.3.0")
    manifest = Artifact.load(artifact.folder).manifest
    assert (manifest.backend, manifest.engine, manifest.precision) == ("tensorrt", "engine.plan", "fp32")
    assert manifest.requires["tensorrt"] == "10.3.0"
    assert manifest.host_parity == {}
    # What the engine is made of could be checked here.
    assert manifest.export_parity["relative"] < 1e-5
    record = json.loads((artifact.folder / "tensorrt.json").read_text(encoding="utf-8"))
    assert record["engine_sha256"] == manifest.files["engine.plan"].sha256
    deployment = edgeprune.deploy(artifact, "local", rounds=2, budget_ratio=1.0, reference=artifact)
    assert deployment.parity.passed
    # Six digits of each output were printed.
    assert 0 < deployment.parity.max_abs < 1e-5
    # The recorded times of a ResNet-18, whatever the model: replayed, not measured.
    assert deployment.measured_ms == pytest.approx(record["latency"]["median_ms"], rel=0.05)
    assert deployment.ratio == 1.0

    # The same board again: percentiles are of single queries.
    queries = [query["computeMs"] for query in json.loads(recorded("resnet18.times.json"))]
    with edgeprune.Board.open("local") as board:
        tail = gates.measure_latency(
            board, artifact.folder / "engine.plan", None, runtime="tensorrt", threads=1, percentile=99, rounds=2
        )
    assert tail.measured_ms == pytest.approx(np.percentile(queries, 99))
    stand_in("11.1.0")
    with pytest.raises(IncompatibleTargetError) as caught:
        edgeprune.deploy(artifact, "local")
    assert (caught.value.field, caught.value.found) == ("tensorrt", "11.1.0")
    assert "10.3.0" in caught.value.needed
    assert "compile" in caught.value.hint


def test_an_fp16_engine_for_a_dla_is_bound_to_its_board(compiled, tmp_path):
    with pytest.raises(IncompatibleTargetError, match=r"up to 10\.7 or from 11\.4\.1, which build for a DLA") as caught:
        compiled("11.1.0", precision="fp16", backend=TensorRt(dla_core=1))
    assert (caught.value.found, "--dla" in caught.value.hint) == ("11.1.0", True)
    artifact = compiled("10.3.0", precision="fp16", backend=TensorRt(dla_core=1))
    with edgeprune.Board.open("local") as board:
        board_is = board.probe()
    known = tmp_path / "root" / "tensorrt" / "engines" / f"{artifact.manifest.files['engine.plan'].sha256}.json"
    assert json.loads(known.read_text(encoding="utf-8"))["arguments"] == ["--useDLACore=1", "--allowGPUFallback"]
    assert edgeprune.deploy(artifact, "local", rounds=1).parity.passed
    needs = {**artifact.manifest.requires, "machine": "another"}
    unmet = [item.field for item in TensorRt().requirements(board_is, needs) if not item.met]
    assert unmet == ["machine"]
    assert artifact.manifest.requires.get("machine") == board_is.facts.get("machine")


def test_an_fp16_engine_has_numbers_of_its_own_and_wrong_ones_are_noticed_on_the_board(compiled):
    artifact = compiled("11.1.0", precision="fp16")
    parity = edgeprune.deploy(artifact, "local", rounds=1).parity
    # Weights and activations were made fp16: that shows, and is allowed.
    assert parity.passed
    assert parity.max_abs > 1e-5
    # The stand-in's engine is a header and the model: one weight is another.
    backend, engine = registry.get("tensorrt"), artifact.folder / "engine.plan"
    assert len(backend.parse_engine(engine)) == 26
    content = engine.read_bytes()
    model = onnx.load_from_string(content[28:])
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.reshape(-1)[abs(values).argmax()] *= 20
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    engine.chmod(0o644)
    engine.write_bytes(content[:28] + model.SerializeToString())
    with pytest.raises(BackendError, match="another engine"):
        backend.parse_engine(engine)
    files = {**artifact.manifest.files, "engine.plan": describe_file(engine)}
    manifest = artifact.manifest.model_copy(update={"files": files})
    (artifact.folder / "manifest.json").write_bytes(manifest.canonical())
    with pytest.raises(ParityError, match="exported to ONNX it was within"):
        edgeprune.deploy(Artifact.load(artifact.folder), "local", rounds=1)


def test_an_int8_engine_is_calibrated_here_built_there_and_judged_by_the_task(compiled):
    images = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    data = [(batch, net().eval()(batch).argmax(1).detach()) for batch in images]
    task = edgeprune.Task.single(
        train=data[:3],
        validation=data[3:],
        loss=torch.nn.functional.cross_entropy,
        metric=lambda outputs, targets: (outputs.argmax(1) == targets).float().mean().item(),
    )
    artifact = compiled("10.3.0", precision="int8", task=task, metric_loss=Tolerance(0.2))
    manifest = Artifact.load(artifact.folder).manifest
    assert (manifest.precision, manifest.quantization["layers"], manifest.quantization["kept"]) == ("int8", 2, [])
    assert manifest.quantization["snr_db"] > 25
    assert manifest.metrics["metric"]["engine"] > 0.8 * manifest.metrics["metric"]["module"]
    record = json.loads((artifact.folder / "tensorrt.json").read_text(encoding="utf-8"))
    assert "--int8" in record["commands"]["build"]
    # The stand-in's engine is a header and the model.
    built = onnx.load_from_string((artifact.folder / "engine.plan").read_bytes()[28:])
    assert sum(node.op_type == "QuantizeLinear" for node in built.graph.node) > 4


@pytest.mark.slow
def test_an_int8_engine_for_a_dla_gets_its_scales_in_a_table(compiled, tmp_path):
    cases = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    artifact = compiled("8.6.1", precision="int8", golden_inputs=cases, backend=TensorRt(dla_core=0), snr_db=20.0)
    assert artifact.manifest.quantization["layers"] == 2
    words = json.loads((artifact.folder / "tensorrt.json").read_text(encoding="utf-8"))["commands"]["build"]
    assert {"--int8", "--fp16", "--useDLACore=0", "--allowGPUFallback"} <= set(words)
    named = next(word for word in words if word.startswith("--calib={store}/"))
    table = (tmp_path / "root" / "store" / named.rpartition("/")[2]).read_text(encoding="ascii").splitlines()
    assert table[0] == "TRT-8601-EntropyCalibration2"
    # The model stays as it is, and every tensor between its layers has a scale: 127 steps to the largest magnitude.
    built = onnx.load_from_string((artifact.folder / "engine.plan").read_bytes()[28:])
    assert "QuantizeLinear" not in {node.op_type for node in built.graph.node}
    scales = dict(line.rsplit(": ", 1) for line in table[1:])
    given = struct.unpack(">f", bytes.fromhex(scales[built.graph.input[0].name]))[0]
    assert 0.5 * float(cases.abs().max()) <= 127 * given <= float(cases.abs().max()) * 1.01
    assert set(scales) <= {built.graph.input[0].name} | {name for node in built.graph.node for name in node.output}
    assert all(node.output[0] in scales for node in built.graph.node if node.op_type in ("Conv", "Relu"))


def test_a_dla_in_int8_is_refused_where_no_table_can_be_given(compiled):
    with pytest.raises(IncompatibleTargetError, match=r"up to 10\.7, which build for a DLA in int8") as caught:
        compiled("11.1.0", precision="int8", golden_inputs=torch.randn(48, 3, 8, 8), backend=TensorRt(dla_core=0))
    assert caught.value.found == "11.1.0"
    assert versions.parse("10.3.0").number == 100300


def test_without_a_board_nothing_is_compiled(tmp_path):
    with pytest.raises(CompileError) as caught:
        edgeprune.compile(net(), example(), tmp_path / "artifact", backend="tensorrt")
    assert "--board" in caught.value.hint
    assert not (tmp_path / "artifact").exists()


def test_precisions_are_those_that_the_backend_has(tmp_path):
    with pytest.raises(ConfigError, match="fp32, fp16, int8"):
        edgeprune.compile(net(), example(), tmp_path / "artifact", backend="tensorrt", precision="int4")
    with pytest.raises(ConfigError, match="need calibration data"):
        edgeprune.compile(net(), example(), tmp_path / "artifact", backend="tensorrt", precision="int8")
    with pytest.raises(ConfigError, match="onnxruntime must be one of fp32"):
        edgeprune.compile(net(), example(), tmp_path / "artifact", precision="fp16")
