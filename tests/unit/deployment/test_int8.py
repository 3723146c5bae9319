"""Int8 artifacts: calibrated with a task's data, held against its metrics, deployed to a real board of this machine."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from edgeprune import Task, deploy, trace, uniform_plan
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.compiling import compile as compile_artifact
from edgeprune.deployment.engine_metrics import samples_of
from edgeprune.errors import ConfigError, InputError, ParityError
from edgeprune.tasks.limits import Tolerance


class Two(nn.Module):
    """Two inputs by name, a dict of outputs: what a task of a real model has."""

    def __init__(self):
        super().__init__()
        self.image, self.number = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, image, number):
        features = torch.relu(self.image(image)).mean((2, 3)) + self.number(number)
        return {"logits": self.head(features), "features": features}


def accuracy(outputs, targets):
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return float((logits.argmax(1) == targets).float().mean())


def loss(outputs, targets):
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return nn.functional.cross_entropy(logits, targets)


def batches(count, seed, size=24):
    """Images that are brighter on the left (class 0) or on the right (class 1)."""
    dice = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        targets = torch.randint(2, (size,), generator=dice)
        images = torch.randn(size, 3, 12, 12, generator=dice)
        images[..., :6] += 0.6 * (1 - targets).view(-1, 1, 1, 1)
        images[..., 6:] += 0.6 * targets.view(-1, 1, 1, 1)
        found.append((images, targets))
    return found


@pytest.fixture(scope="module")
def trained():
    """A network that tells the sides apart, and its task."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    train = batches(12, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(6):
        for images, targets in train:
            optimizer.zero_grad()
            loss(net(images), targets).backward()
            optimizer.step()
    task = Task.single(train=train, validation=batches(5, 2), loss=loss, metric=accuracy)
    return net.eval(), task


def test_task_calibrates_and_judges_and_the_board_checks_it_again(trained, root, tmp_path):
    net, task = trained
    said = []
    artifact = compile_artifact(
        net,
        torch.randn(1, 3, 12, 12),
        tmp_path / "int8",
        precision="int8",
        task=task,
        progress=lambda *told: said.append(told),
    )
    manifest = Artifact.load(tmp_path / "int8").manifest
    assert manifest.canonical() == artifact.manifest.canonical()
    assert (manifest.precision, manifest.quantization["layers"], manifest.quantization["kept"]) == ("int8", 2, [])
    assert manifest.quantization["snr_db"] > 25
    told = manifest.metrics["accuracy"]
    assert told["module"] > 0.9
    assert told["worst"] == pytest.approx(0.99 * told["module"])
    assert told["worst"] <= told["engine"] <= 1
    assert manifest.host_parity["passed"]
    assert manifest.host_parity["max_abs"] > 1e-4, "an engine that agrees like a float one was not quantized"
    assert {step for step, _ in said} >= {"quantize", "metrics"}

    assert deploy(artifact, "local", rounds=3).changed


def test_golden_samples_are_the_tasks_own(trained, tmp_path):
    import numpy as np

    net, task = trained
    compile_artifact(net, torch.randn(4, 3, 12, 12), tmp_path / "out", task=task)
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        assert (golden["input_0"][0] == task.objectives[0].train[0][0][:4].numpy()).all()
    assert Artifact.load(tmp_path / "out").manifest.quantization is None


def test_an_engine_that_recognizes_less_is_refused(trained, tmp_path):
    net, task = trained
    fooled = Task.single(
        train=task.objectives[0].train, validation=task.objectives[0].validation, loss=loss, metric=_bitwise(net)
    )
    with pytest.raises(
        ParityError, match="of the int8 engine must be no more than 1% worse than the module's 1, found 0"
    ):
        compile_artifact(net, torch.randn(1, 3, 12, 12), tmp_path / "out", precision="int8", task=fooled)
    assert not (tmp_path / "out").exists()
    accepted = compile_artifact(
        net, torch.randn(1, 3, 12, 12), tmp_path / "out", precision="int8", task=fooled, metric_loss=Tolerance(1.0)
    )
    assert next(iter(accepted.manifest.metrics.values()))["engine"] < 0.1


def _bitwise(net):
    """A metric that no rounding passes: the share of outputs that are exactly the module's."""
    known = set()
    with torch.no_grad():
        for images, _ in batches(5, 2):
            known |= {round(float(value), 6) for value in net(images).flatten()}

    def exact(outputs, targets):
        return float(sum(round(float(value), 6) in known for value in outputs.flatten()) / outputs.numel())

    return exact


def test_named_inputs_and_dict_outputs_reach_the_metric(tmp_path):
    torch.manual_seed(0)
    data = [({"image": images, "number": torch.randn(24, 4)}, targets) for images, targets in batches(3, 3)]
    task = Task.single(train=data, validation=data, loss=loss, metric=accuracy)
    example = {"image": torch.randn(5, 3, 12, 12), "number": torch.randn(5, 4)}
    artifact = compile_artifact(
        Two().eval(), example, tmp_path / "out", precision="int8", task=task, metric_loss=Tolerance(0.05)
    )
    assert artifact.manifest.quantization["layers"] == 3
    assert set(artifact.manifest.metrics) == {"accuracy"}


def test_int8_without_data_says_where_they_come_from(trained, tmp_path):
    net, _ = trained
    with pytest.raises(ConfigError, match="int8 engines need calibration data, found none") as told:
        compile_artifact(net, torch.randn(1, 3, 12, 12), tmp_path / "out", precision="int8")
    assert "--task" in told.value.hint
    with pytest.raises(ConfigError, match="fp16"):
        compile_artifact(net, torch.randn(1, 3, 12, 12), tmp_path / "out", precision="fp16")


def test_inputs_that_are_no_batches_are_named(trained):
    net, task = trained
    strange = Task.single(train=[("text", torch.zeros(1))], validation=[], loss=loss, metric=accuracy)
    with pytest.raises(InputError, match="must be batches of tensors, found str"):
        samples_of(strange, net, 4)
    assert len(samples_of(task, net, 30)[0]) == 30


def test_a_task_is_of_whole_models(trained, tmp_path):
    net, task = trained
    plan = replace(uniform_plan(trace(net, torch.randn(1, 3, 12, 12)), ratio=0.5), parts=("0",))
    with pytest.raises(ConfigError, match="a task's data are inputs of a whole model, found a plan for parts of one"):
        compile_artifact(net, torch.randn(1, 3, 12, 12), tmp_path / "out", plan=plan, task=task)


def test_few_samples_are_warned_of_and_told(trained, tmp_path, caplog):
    net, task = trained
    few = replace(task, objectives=(replace(task.objectives[0], train=[(x[:8], y[:8]) for x, y in batches(1, 1)]),))
    artifact = compile_artifact(
        net,
        torch.randn(1, 3, 12, 12),
        tmp_path / "few",
        precision="int8",
        task=few,
        snr_db=5.0,
        metric_loss=Tolerance(0.5),
    )
    assert artifact.manifest.quantization["samples"] == 8
    assert "int8 is calibrated with 8 samples only" in caplog.text
    wrong = replace(task, objectives=(replace(task.objectives[0], train=[(torch.randn(8, 1, 5, 5), torch.zeros(8))]),))
    with pytest.raises(InputError, match="golden inputs must have shape") as caught:
        compile_artifact(net, torch.randn(1, 3, 12, 12), tmp_path / "wrong", precision="int8", task=wrong)
    assert caught.value.hint.startswith("a --task whose batches have the shape")
