import json

import pytest
import torch
from torch import nn

from edgeprune.backends.onnxruntime import exporting
from edgeprune.boards.board import Board
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.compiling import compile as compile_artifact
from edgeprune.deployment.manifest import MeasuredCost, Tolerance
from edgeprune.deployment.weights import sha256_of_weights
from edgeprune.errors import BackendError, ConfigError, ExportError, IncompatibleTargetError, InputError, ParityError
from edgeprune.spec import Fingerprint


def inputs():
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def fingerprint(**runtimes):
    return Fingerprint(
        architecture="aarch64", cpu_model="c", isa=(), cores=1, caches_bytes={}, memory_bytes=1 << 30, os="o", kernel="k",
        libc="l", python="3.9", runtimes=runtimes, power_mode=None, governor=None, free_disk_bytes=1 << 30, load=0.0,
    )  # fmt: skip


def test_manifest_states_needs_versions_costs_and_what_the_host_check_found(net, tmp_path):
    artifact = compile_artifact(
        net(),
        inputs(),
        tmp_path / "out",
        name="digits",
        predicted_ms=1.25,
        measured=MeasuredCost(latency_ms=1.3, dense_ms=2.5, conditions="measured on local"),
        labels=[str(digit) for digit in range(10)],
        normalization={"mean": [0.5], "std": [0.25]},
        golden_inputs=torch.randn(40, 3, 12, 12),
    )
    manifest = Artifact.load(tmp_path / "out").manifest
    assert manifest == artifact.manifest
    assert (manifest.name, manifest.backend, manifest.precision, manifest.plan_hash) == (
        "digits",
        "onnxruntime",
        "fp32",
        None,
    )
    assert manifest.requires["runtime"] == "onnxruntime"
    assert manifest.requires["opset"] >= 17
    assert "architecture" not in manifest.requires
    assert {"edgeprune", "torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert manifest.predicted.latency_ms == 1.25
    assert manifest.measured.conditions == "measured on local"
    assert manifest.host_parity["passed"]
    assert manifest.host_parity["cases"] == 35
    model = json.loads((tmp_path / "out" / "model.json").read_text())
    assert model["labels"][3] == "3"
    assert model["normalization"] == {"mean": [0.5], "std": [0.25]}
    assert model["outputs"][0]["shape"] == [1, 10]


def test_same_inputs_give_the_same_artifact_under_source_date_epoch(net, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    made = [compile_artifact(net(), inputs(), tmp_path / name) for name in "ab"]
    assert made[0].id == made[1].id
    assert made[0].manifest.created == "1970-01-02T00:00:00Z"


def test_source_date_epoch_must_be_a_number(net, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH must be seconds since 1970, found 'yesterday'"):
        compile_artifact(net(), inputs(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_engine_that_is_not_exact_enough_is_refused_and_nothing_is_written(net, tmp_path):
    with pytest.raises(ParityError, match=r"on this host must agree .* a tolerance of .* would have passed"):
        compile_artifact(net(), inputs(), tmp_path / "out", tolerance=Tolerance(relative=1e-12, snr_db=400.0))
    assert list(tmp_path.iterdir()) == []


def test_module_is_left_as_it_was(net, tmp_path):
    module = net().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    compile_artifact(module, inputs(), tmp_path / "out")
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_several_inputs_and_outputs_by_name(tmp_path):
    class Two(torch.nn.Module):
        def forward(self, left, right):
            return {"sum": left + right, "product": left * right}

    one, two = torch.randn(2, 4), torch.randn(2, 4)
    artifact = compile_artifact(Two(), {"right": two, "left": one}, tmp_path / "out")
    assert [tensor["name"] for tensor in artifact.model["inputs"]] == ["left", "right"]
    assert len(artifact.model["outputs"]) == 2


def test_board_that_lacks_the_runtime_is_told_at_compile_time(net, tmp_path):
    with pytest.raises(IncompatibleTargetError, match="needs onnxruntime"):
        compile_artifact(net(), inputs(), tmp_path / "out", fingerprint=fingerprint())
    compile_artifact(net(), inputs(), tmp_path / "out", fingerprint=fingerprint(onnxruntime={"version": "1.23.2"}))


def test_hints_name_the_board_that_it_is_compiled_for(net, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "root"))
    old = fingerprint(onnxruntime={"version": "1.11.1"})
    with Board.open("local") as board:
        with pytest.raises(ExportError, match="must be expressible in opset 16") as caught:
            compile_artifact(torch.nn.LayerNorm(6), torch.randn(2, 6), tmp_path / "out", fingerprint=old, board=board)
        assert caught.value.hint.startswith("edgeprune device setup local,")
        with pytest.raises(IncompatibleTargetError) as lacking:
            compile_artifact(net(), inputs(), tmp_path / "out", fingerprint=fingerprint(), board=board)
        assert lacking.value.hint == "edgeprune device setup local"
    with pytest.raises(IncompatibleTargetError) as lacking:
        compile_artifact(net(), inputs(), tmp_path / "out", fingerprint=fingerprint())
    assert lacking.value.hint == "edgeprune device setup BOARD"


def test_input_that_does_not_fit_is_one_sentence(net, tmp_path):
    with pytest.raises((InputError, BackendError)):
        compile_artifact(net(), torch.randn(1, 5, 12, 12), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_pruned_module_compiles_with_the_hash_and_the_prediction_of_its_plan(net, tmp_path):
    import edgeprune

    module = net()
    graph = edgeprune.trace(module, inputs())
    plan = edgeprune.uniform_plan(graph, 0.5).with_prediction(latency_ms=1.0, low_ms=0.5, high_ms=2.0, table="abc")
    artifact = compile_artifact(edgeprune.apply(module, plan), inputs(), tmp_path / "out", plan=plan, predicted_ms=1.0)
    assert artifact.manifest.plan_hash == plan.hash
    predicted = artifact.manifest.predicted
    assert (predicted.latency_ms, predicted.low_ms, predicted.high_ms, predicted.table) == (1.0, 0.5, 2.0, "abc")
    assert artifact.engine.stat().st_size < compile_artifact(module, inputs(), tmp_path / "dense").engine.stat().st_size


def test_the_manifest_says_which_weights_it_was_made_of(tmp_path):
    torch.manual_seed(0)
    module, example = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(1, 3, 8, 8)
    first = compile_artifact(module, example, tmp_path / "first", seed=3).manifest.source
    assert first is not None
    assert first.seed == 3
    # Whatever the engine makes of it: the same weights in another file, and others.
    copied = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    copied.load_state_dict(module.state_dict())
    assert sha256_of_weights(copied) == first.weights_sha256
    with torch.no_grad():
        copied[1].running_mean += 1e-6
    assert sha256_of_weights(copied) != first.weights_sha256


def test_weights_that_one_file_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "MOST_BYTES", 1000)
    with pytest.raises(ExportError, match="must fit into one ONNX file") as caught:
        compile_artifact(nn.Linear(20, 20), torch.randn(1, 20), tmp_path / "artifact")
    assert caught.value.hint == "prune it further"
    assert not (tmp_path / "artifact").exists()
