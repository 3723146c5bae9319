"""How well does one layer do from half of its inputs? Relative errors on held-out images, median over the layers.

For every layer of a trained ResNet-20 that reads the inner channels of a residual block: the squared error of its output over
the output's variance, on held-out images, when only a share of its input channels is left. Plain: the best by magnitude stay,
weights and biases as they were. Then the weights and the intercept are refitted by least squares on training images: for the
channels chosen by magnitude, and for those chosen by the LASSO. All read what the dense model gives them, so layers are
independent. A network that is done is not run again.

    python benchmarks/reconstruction_layers.py --data cifar10 --weights resnet20.safetensors

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage_curves import accuracy, images, load_model
from equal_latency import write
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune.criteria import registry
from edgeprune.criteria.damage import best_units
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "reconstruction"
SHARES = (0.75, 0.5, 0.25)
TRAIN_IMAGES, TEST_IMAGES, BATCH = 2_000, 1_000, 100
POSITIONS = 10
"""Random output positions of an image, the paper's number."""


def rows(model: nn.Module, layer: nn.Conv2d, samples: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input patches, shape (rows, channels, 9), and outputs, shape (rows, outputs), at random positions."""
    taken: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    random = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for part in torch.split(samples, BATCH):
            model(part)
            unfolded = F.unfold(taken.pop(), layer.kernel_size, padding=layer.padding, stride=layer.stride)
            places = torch.randperm(unfolded.shape[2], generator=random)[:POSITIONS]
            found.append(unfolded[:, :, places].transpose(1, 2).flatten(0, 1))
    handle.remove()
    inputs = torch.cat(found).double()
    outputs = inputs @ layer.weight.detach().double().flatten(1).T
    return inputs.reshape(len(inputs), layer.in_channels, -1), outputs


def error(predicted: torch.Tensor, outputs: torch.Tensor) -> float:
    """Squared error over the variance of the outputs."""
    return float(((outputs - predicted) ** 2).sum() / ((outputs - outputs.mean(0)) ** 2).sum())


def refitted(train: tuple[torch.Tensor, torch.Tensor], test: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Outputs on other rows by least squares, without any pull towards the old weights."""
    inputs, outputs = train[0][:, kept].flatten(1), train[1]
    solution = torch.linalg.lstsq(inputs - inputs.mean(0), outputs - outputs.mean(0)).solution
    return (test[:, kept].flatten(1) - inputs.mean(0)) @ solution + outputs.mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    options = parser.parse_args()
    path = RESULTS / f"layers-{options.weights.stem}.json"
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        write(path, measured(options))
    table(json.loads(path.read_text()))


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every layer at every share."""
    model = load_model(options.weights)
    splits = {
        name: images(options.data / f"{name}.parquet", n)
        for name, n in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES))
    }
    train = list(zip(*(torch.split(part, BATCH) for part in splits["train"]), strict=True))
    task = Task.single(train=train, validation=train, loss=F.cross_entropy, metric=accuracy, name="accuracy")
    graph = edgeprune.trace(model, torch.zeros(1, 3, 32, 32))
    inner = {branch.groups[0]: branch for branch in graph.branches if len(branch.groups) == 1}
    scores = {name: registry.get(name).score(graph, model, task, groups=list(inner)) for name in ("l2", "lasso")}
    modules = dict(model.named_modules())
    found = []
    for group in (group for group in graph.groups if group.name in inner):
        reader = next(m.parameter.rpartition(".")[0] for m in group.members if m.role == "input")
        layer = modules[reader]
        assert isinstance(layer, nn.Conv2d)
        samples, held = (rows(model, layer, splits[name][0], seed) for seed, name in enumerate(("train", "test")))
        for share in SHARES:
            width = max(1, round(share * group.size))
            magnitude, lasso = (list(best_units(scores[name][group.name], width)) for name in ("l2", "lasso"))
            weight = layer.weight.detach().double().flatten(2)[:, magnitude].flatten(1)
            plain = error(held[0][:, magnitude].flatten(1) @ weight.T, held[1])
            fits = [error(refitted(samples, held[0], kept), held[1]) for kept in (magnitude, lasso)]
            found.append({"layer": reader, "share": share, "plain": plain, "l2_refit": fits[0], "lasso_refit": fits[1]})
    return found


def table(found: list[dict[str, Any]]) -> None:
    """Medians over the layers."""
    print("| kept | plain | magnitude + refit | LASSO + refit | LASSO / magnitude | magnitude / plain |")
    print("|---|---|---|---|---|---|")
    for share in SHARES:
        cells = [row for row in found if row["share"] == share]
        medians = [float(np.median([row[name] for row in cells])) for name in ("plain", "l2_refit", "lasso_refit")]
        ratios = [
            float(np.median([row[a] / row[b] for row in cells]))
            for a, b in (("lasso_refit", "l2_refit"), ("l2_refit", "plain"))
        ]
        print(f"| {share:.0%} | " + " | ".join(f"{value:.3f}" for value in (*medians, *ratios)) + " |")


if __name__ == "__main__":
    main()
