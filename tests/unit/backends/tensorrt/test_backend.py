"""From a module to a deployed release, with the stand-in in place of trtexec: nothing here was measured."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import edgeprune  # noqa: E402 (after the skips)
from edgeprune.backends import registry  # noqa: E402
from edgeprune.backends.tensorrt.backend import TensorRt  # noqa: E402
from edgeprune.deployment.artifact import Artifact  # noqa: E402
from edgeprune.errors import (  # noqa: E402
    BackendError,
    BackendUnavailableError,
    CompileError,
    ConfigError,
    IncompatibleTargetError,
    ParityError,
)
from edgeprune.testing.backends import SmallNet  # noqa: E402


def example():
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def compiled(stand_in, tmp_path):
    """Compiles `SmallNet` with a release's stand-in."""

    def make(version="10.3.0", name="artifact", seed=0, backend="tensorrt", **options):
        stand_in(version)
        torch.manual_seed(seed)
        with edgeprune.Board.open("local") as board:
            return edgeprune.compile(SmallNet(), example(), tmp_path / name, backend=backend, board=board, **options)

    return make


@pytest.mark.parametrize(("version", "precision"), [("8.6.1", "fp32"), ("11.1.0", "fp16")])
def test_an_artifact_is_built_on_the_board_and_deployed_there(compiled, version, precision):
    artifact = compiled(version, precision=precision)
    manifest = Artifact.load(artifact.folder).manifest
    assert manifest.backend == "tensorrt"
    assert manifest.engine == "engine.plan"
    assert manifest.precision == precision
    assert manifest.requires["tensorrt"] == version
    assert manifest.host_parity == {}
    record = json.loads((artifact.folder / "tensorrt.json").read_text(encoding="utf-8"))
    assert record["engine_sha256"] == manifest.files["engine.plan"].sha256
    deployment = edgeprune.deploy(artifact, "local", rounds=2)
    assert deployment.parity.passed
    assert deployment.parity.max_abs > 0
    # The recorded times of a ResNet-18, whatever the model: replayed, not measured.
    assert deployment.measured_ms == pytest.approx(record["latency"]["median_ms"], rel=0.05)
    assert edgeprune.deploy(artifact, "local", rounds=2, budget_ratio=1.0, reference=artifact).ratio == 1.0


def test_kernels_come_from_the_record_of_that_very_engine(compiled):
    artifact = compiled()
    backend = registry.get("tensorrt")
    engine = artifact.folder / "engine.plan"
    assert len(backend.parse_engine(engine)) == 26
    engine.chmod(0o644)
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(BackendError, match="another engine"):
        backend.parse_engine(engine)


def test_wrong_numbers_are_noticed_on_the_board(compiled):
    artifact = compiled()
    other = compiled(name="other", seed=1)
    # The engine of other weights under the manifest of these.
    manifest = artifact.manifest.model_copy(
        update={"files": {**artifact.manifest.files, "engine.plan": other.manifest.files["engine.plan"]}}
    )
    (artifact.folder / "engine.plan").write_bytes((other.folder / "engine.plan").read_bytes())
    (artifact.folder / "manifest.json").write_bytes(manifest.canonical())
    with pytest.raises(ParityError):
        edgeprune.deploy(Artifact.load(artifact.folder), "local", rounds=2)


def test_another_release_on_the_board_is_refused_before_anything_is_sent(compiled, stand_in):
    artifact = compiled("10.3.0")
    stand_in("11.1.0")
    with pytest.raises(IncompatibleTargetError) as caught:
        edgeprune.deploy(artifact, "local")
    assert (caught.value.field, caught.value.found) == ("tensorrt", "11.1.0")
    assert "10.3.0" in caught.value.needed
    assert "compile" in caught.value.hint


def test_a_dla_engine_is_bound_to_its_board_which_knows_its_core(compiled, tmp_path):
    artifact = compiled(precision="fp16", backend=TensorRt(dla_core=1))
    with edgeprune.Board.open("local") as board:
        board_is = board.probe()
    known = tmp_path / "root" / "tensorrt" / "engines" / f"{artifact.manifest.files['engine.plan'].sha256}.json"
    assert json.loads(known.read_text(encoding="utf-8"))["arguments"] == ["--useDLACore=1", "--allowGPUFallback"]
    assert edgeprune.deploy(artifact, "local", rounds=2).parity.passed
    needs = {**artifact.manifest.requires, "machine": "another"}
    unmet = [item.field for item in TensorRt().requirements(board_is, needs) if not item.met]
    assert unmet == ["machine"]
    assert artifact.manifest.requires.get("machine") == board_is.facts.get("machine")


def test_percentiles_are_refused_with_the_next_step(compiled):
    with pytest.raises(BackendUnavailableError, match="percentiles"):
        edgeprune.deploy(compiled(), "local", rounds=2, percentile=99)


def test_without_a_board_nothing_is_compiled(tmp_path):
    with pytest.raises(CompileError) as caught:
        edgeprune.compile(SmallNet(), example(), tmp_path / "artifact", backend="tensorrt")
    assert "--board" in caught.value.hint
    assert not (tmp_path / "artifact").exists()


def test_precisions_are_those_that_the_backend_has(tmp_path):
    with pytest.raises(ConfigError, match="fp32, fp16"):
        edgeprune.compile(SmallNet(), example(), tmp_path / "artifact", backend="tensorrt", precision="int8")
    with pytest.raises(ConfigError, match="onnxruntime must be one of fp32"):
        edgeprune.compile(SmallNet(), example(), tmp_path / "artifact", precision="fp16")


def test_what_it_cannot_do_is_a_typed_refusal(tmp_path):
    backend = TensorRt()
    for refused in (
        lambda: backend.operators(tmp_path / "engine.plan"),
        lambda: backend.network_engine(None, {}),
        lambda: backend.kernel_engine(None),
        lambda: backend.layout_rule(None, {}, "aarch64", ()),
        lambda: backend.infer_shapes(None, None, {}),
    ):
        with pytest.raises(BackendUnavailableError) as caught:
            refused()
        assert caught.value.hint
