"""Parity per task: a network of several heads, compiled, checked on this host, deployed, and what `status` says of it."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from edgeprune import compile as compile_artifact  # noqa: E402
from edgeprune.backends import registry  # noqa: E402
from edgeprune.deployment.agreement import Parity  # noqa: E402
from edgeprune.deployment.artifact import Artifact, describe_file  # noqa: E402
from edgeprune.deployment.deploying import deploy  # noqa: E402
from edgeprune.deployment.manifest import Manifest, TaskOutputs, Tolerance  # noqa: E402
from edgeprune.deployment.status import status  # noqa: E402
from edgeprune.errors import ConfigError, ParityError  # noqa: E402

TASKS = {"seg": (1,), "depth": (0,)}


class Heads(torch.nn.Module):
    def __init__(self, off=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.seg, self.depth = (torch.nn.Conv2d(*shape, 1) for shape in ((3, 8), (8, 4), (8, 1)))
        self.off = off

    def forward(self, images):
        hidden = self.trunk(images).relu()
        return {"depth": self.depth(hidden), "seg": self.seg(hidden) + self.off}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.set_num_threads(1)
    return compile_artifact(
        Heads(),
        torch.zeros(1, 3, 8, 8),
        tmp_path_factory.mktemp("heads") / "out",
        tasks=TASKS,
        tolerances={"seg": Tolerance(relative=1e-2, snr_db=40.0)},
    )


def test_tolerances_are_those_of_the_tasks_that_read_an_output(artifact):
    first, second = (tensor["name"] for tensor in artifact.model["outputs"])
    manifest = artifact.manifest
    assert manifest.tasks["seg"].outputs == [second]
    assert manifest.tolerance_of(second).relative == 1e-2
    assert manifest.tolerance_of(first) == manifest.tolerance
    both = manifest.model_copy(
        update={
            "tasks": {**manifest.tasks, "all": manifest.tasks["depth"].model_copy(update={"outputs": [first, second]})}
        }
    )
    assert both.tolerance_of(second) == Tolerance(relative=1e-4, snr_db=80.0)
    told = manifest.host_parity["tasks"]
    assert told["seg"]["tolerance"] == 1e-2
    assert 0 <= told["depth"]["relative"] < 1e-5


def test_what_is_told_of_a_task_is_of_one_output(artifact):
    """The first may be far off, the second, which a strict task reads too, may not: each beside its own tolerance."""
    first, second = (tensor["name"] for tensor in artifact.model["outputs"])
    loose, strict = Tolerance(relative=0.1, snr_db=20.0), Tolerance(relative=1e-3, snr_db=60.0)
    tasks = {
        "both": TaskOutputs(outputs=[first, second], tolerance=loose),
        "strict": TaskOutputs(outputs=[second], tolerance=strict),
    }
    figures = {"max_abs": 0.0, "snr_db": 70.0, "passed": True, "worst_case": "sample 0"}
    outputs = [{**figures, "name": name, "required_relative": found} for name, found in ((first, 0.01), (second, 5e-4))]
    whole = dict.fromkeys(("cases", "max_abs", "cosine", "nan", "inf", "load_ms", "peak_memory_bytes"), 0)
    result = {**whole, "passed": True, "snr_db": 70.0, "top1_agreement": None, "outputs": outputs}
    parity = Parity.from_result(result, artifact.manifest.model_copy(update={"tasks": tasks}))
    assert all(task.passed and task.relative <= task.tolerance for task in parity.tasks.values())
    assert (parity.tasks["both"].relative, parity.tasks["both"].tolerance) == (5e-4, 1e-3)
    outputs[0] |= {"snr_db": 30.0, "max_abs": 9.0}
    outputs[1] |= {"snr_db": 55.0, "passed": False}
    failed = {**result, "passed": False, "snr_db": 30.0, "max_abs": 9.0}
    parity = Parity.from_result(failed, artifact.manifest.model_copy(update={"tasks": tasks}))
    assert "within 0.001 of their scale and 60 dB, found max abs 0, 55.0 dB" in parity.complaint()


def test_a_manifest_without_tasks_has_the_bytes_that_it_always_had(artifact):
    fields = json.loads(artifact.manifest.canonical())
    assert set(fields["tasks"]) == {"seg", "depth"}
    assert Manifest.parse(artifact.manifest.canonical(), "it") == artifact.manifest
    del fields["tasks"]
    plain = Manifest.model_validate(fields)
    assert b'"tasks"' not in plain.canonical().split(b'"host_parity"')[0]
    assert Manifest.parse(plain.canonical(), "it") == plain


def with_engine_of(artifact, folder, off):
    """A copy whose engine adds something to the segmentation, with hashes that are right again."""
    shutil.copytree(artifact.folder, folder)
    registry.get("onnxruntime").export(Heads(off), (torch.zeros(1, 3, 8, 8),), folder / "engine.onnx")
    files = {name: describe_file(folder / name) for name in artifact.manifest.files}
    manifest = artifact.manifest.model_copy(update={"files": files})
    (folder / "manifest.json").write_bytes(manifest.canonical())
    return Artifact.load(folder)


def test_the_gate_on_the_board_judges_each_task_by_its_own_tolerance(artifact, root, tmp_path):
    """The engine's segmentation is off by more than the tolerance of depth, and by less than its own."""
    done = deploy(with_engine_of(artifact, tmp_path / "slightly", 1e-3), "local", rounds=3)
    seg, depth = done.parity.tasks["seg"], done.parity.tasks["depth"]
    assert seg.passed
    assert 1e-4 < seg.relative < 1e-2 == seg.tolerance
    assert depth.relative < 1e-5
    running = status("local").current
    assert running.tasks == {"seg": str(seg), "depth": str(depth)}
    assert running.tasks["seg"].startswith(f"{seg.relative:.2g} of the scale, 0.01 allowed")
    with pytest.raises(ParityError, match=r"within 0\.01 of their scale and 40 dB.*\(in \S+ of seg, "):
        deploy(with_engine_of(artifact, tmp_path / "far", 0.5), "local", rounds=3)
    assert status("local").current == running


def test_tasks_must_be_of_the_network(tmp_path):
    for wrong, message in (
        ({"tasks": {"seg": (2,)}}, "task 'seg' must read some of the 2 outputs"),
        ({"tasks": {"seg": ()}}, "task 'seg' must read some of the 2 outputs"),
        (
            {"tolerances": {"seg": Tolerance(relative=1.0, snr_db=1.0)}},
            "must be for a task, found one for 'seg' and no",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            compile_artifact(Heads(), torch.zeros(1, 3, 8, 8), tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
