"""Do damage curves foretell the loss? Spearman's rank correlation over random plans, for every criterion.

A plan draws for every group a width between a floor and all of its units; the floor of the plan itself is drawn between half
and all. It is really cut, and its increase of the loss on test images, without any recovery, stands beside the sum of the
curves, as the criterion gives them and calibrated by measured losses. Scores and calibration see training images only. A
criterion that is done is not run again; what is missing is printed.

    python benchmarks/damage_curves.py --data cifar10 --weights resnet20.safetensors
    python benchmarks/damage_curves.py --table                                        # only print what is there

The data are a folder with train.parquet and test.parquet (columns `label` and `jpeg`); the weights are those of a CIFAR-10
ResNet with three stages of 16, 32 and 64 channels and shortcuts without parameters. Pillow must be installed.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from edgeprune.criteria import registry
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.criteria.damage import best_units, damage_curves
from edgeprune.errors import ModelError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "damage_curves"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLANS, TEST_IMAGES, TRAIN_BATCHES, BATCH = 100, 300, 32, 64


class Block(nn.Module):
    """Two convolutions beside a shortcut that skips pixels and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wider = outputs - inputs
        self.before = self.wider // 2
        stride = 2 if self.wider else 1
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.wider:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.wider - self.before))
        return F.relu(inner + x)


class ResNet(nn.Module):
    """Of He et al. for CIFAR-10."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(inputs if index == 0 else outputs, outputs) for index in range(blocks)))
            for inputs, outputs in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def load_model(path: Path) -> ResNet:
    """The network that the weights are of."""
    state = load_file(path)
    model = ResNet(blocks=sum(name.startswith("layer1.") and name.endswith("conv1.weight") for name in state))
    model.load_state_dict(state)
    return model.eval()


def padded_behind(model: ResNet) -> ResNet:
    """The same function with channels in another order: shortcuts pad behind theirs, not on both sides.

    Torch-Pruning takes the channels of a padded tensor to begin where those before the padding do, so only this form does it cut
    as it means to.
    """
    found = copy.deepcopy(model)
    order = torch.arange(16)
    with torch.no_grad():
        for stage in (found.layer1, found.layer2, found.layer3):
            for block in stage:
                block.conv1.weight.copy_(block.conv1.weight[:, order])
                if block.wider:
                    inner = order + block.before
                    others = [channel for channel in range(len(block.bn2.bias)) if channel not in inner.tolist()]
                    order, block.before = torch.cat([inner, torch.tensor(others)]), 0
                block.conv2.weight.copy_(block.conv2.weight[order])
                for name in ("weight", "bias", "running_mean", "running_var"):
                    values = getattr(block.bn2, name)
                    values.copy_(values[order])
        found.linear.weight.copy_(found.linear.weight[:, order])
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(found(x), model(x))
    return found


def images(path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of a split, normalized, and their labels."""
    rows = pd.read_parquet(path).head(count)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in rows["jpeg"]])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    values = (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return values, torch.tensor(rows["label"].to_numpy())


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())


def cell(name: str, model: ResNet, graph, task: Task, held_out: tuple[torch.Tensor, torch.Tensor]) -> dict[str, object]:
    """One criterion: its scores, curves and plans."""
    inputs, labels = held_out
    criterion = registry.get(name)
    started = time.monotonic()
    scores = criterion.score(graph, model, task)
    scoring_s = time.monotonic() - started
    curves = damage_curves(scores, criterion.normalization)
    started = time.monotonic()
    calibrated = DamageCalibration().calibrate(curves, scores, graph, model, task).curves
    calibrating_s = time.monotonic() - started
    random = np.random.default_rng(0)
    with torch.no_grad():
        dense = float(F.cross_entropy(model(inputs), labels))
        increases, plain, scaled = [], [], []
        for _ in range(PLANS):
            floor = random.uniform(0.5, 1.0)
            widths = {
                group: int(random.integers(max(1, int(floor * len(values))), len(values) + 1))
                for group, values in scores.items()
            }
            kept = {group: best_units(values, widths[group]) for group, values in scores.items()}
            pruned = apply(model, make_plan(graph, kept, allow_empty=True)).eval()
            increases.append(float(F.cross_entropy(pruned(inputs), labels)) - dense)
            plain.append(sum(float(curves[group][width]) for group, width in widths.items()))
            scaled.append(sum(float(calibrated[group][width]) for group, width in widths.items()))
    return {
        "criterion": name,
        "spearman": float(spearmanr(plain, increases).statistic),
        "spearman_calibrated": float(spearmanr(scaled, increases).statistic),
        "scoring_s": scoring_s,
        "calibrating_s": calibrating_s,
        "dense_loss": dense,
        "increases": increases,
        "damage": plain,
        "damage_calibrated": scaled,
    }


def table() -> None:
    """Print what is there, and what is not."""
    print("| criterion | Spearman | calibrated | scoring, s | calibrating, s |\n|---|---|---|---|---|")
    missing = []
    for name in registry.CRITERIA.builtin:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            missing.append(name)
            continue
        found = json.loads(path.read_text())
        if "refused" in found:
            print(f"| `{name}` | refused: {found['refused']} | | | |")
        else:
            print(
                f"| `{name}` | {found['spearman']:.2f} | {found['spearman_calibrated']:.2f} | {found['scoring_s']:.1f} "
                f"| {found['calibrating_s']:.1f} |"
            )
    print(f"missing: {', '.join(missing) or 'nothing'}")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        if options.data is None or options.weights is None:
            parser.error("--data and --weights must be given")
        torch.set_num_threads(1)
        RESULTS.mkdir(parents=True, exist_ok=True)
        model = load_model(options.weights)
        train = images(options.data / "train.parquet", TRAIN_BATCHES * BATCH)
        batches = list(zip(train[0].split(BATCH), train[1].split(BATCH), strict=True))
        task = Task.single(train=batches, validation=batches, loss=F.cross_entropy, metric=accuracy)
        graph = trace(model, train[0][:2])
        held_out = images(options.data / "test.parquet", TEST_IMAGES)
        for name in registry.CRITERIA.builtin:
            path = RESULTS / f"{name}.json"
            if path.exists():
                continue
            try:
                found = cell(name, model, graph, task, held_out)
            except ModelError as error:
                found = {"criterion": name, "refused": error.message}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n")
            partial.replace(path)
            print(f"{name} done", flush=True)
    table()


if __name__ == "__main__":
    main()
