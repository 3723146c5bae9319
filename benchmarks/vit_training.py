"""Trains the small vision transformer of `vit.py` on CIFAR-10 within so many minutes, taught by a ResNet.

The learning rate goes by the share of the time that is over, so a run ends when it should on a machine of any speed. After each
epoch everything is on disk: the same command goes on from there, and minutes of earlier parts count. Half of the loss is that of
the labels, half the teacher's softened outputs on the very same flipped and moved images.

    python benchmarks/vit_training.py --data cifar10 --teacher resnet56_jpeg.safetensors --out vit.safetensors --threads 2

Data and teacher are those of `benchmarks/damage_curves.py`. What it came to is printed, and in a JSON file beside the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from damage_curves import accuracy, images, load_model
from equal_latency import Flipped
from quickstart import host
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from vit_model import VisionTransformer

PEAK, WARM_UP, DECAY, BATCH = 2e-3, 0.05, 0.05, 128
TEMPERATURE, TEACHER_SHARE = 2.0, 0.5


def rate(share: float) -> float:
    """Learning rate when a share of the time is over: up along a line, down along a cosine."""
    if share < WARM_UP:
        return PEAK * max(share, 1e-3) / WARM_UP
    return PEAK * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP)))) / 2


def loss_of(outputs: torch.Tensor, taught: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the labels, and with the teacher's softened outputs."""
    soft = F.kl_div(
        F.log_softmax(outputs / TEMPERATURE, 1),
        F.log_softmax(taught / TEMPERATURE, 1),
        log_target=True,
        reduction="batchmean",
    )
    hard = F.cross_entropy(outputs, labels, label_smoothing=0.1)
    return (1 - TEACHER_SHARE) * hard + TEACHER_SHARE * TEMPERATURE**2 * soft


class State:
    """What a run goes on from: weights, the optimizer's averages, how far it came."""

    def __init__(self, out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.model, self.optimizer = out.with_suffix(".training"), model, optimizer
        self.seconds, self.epochs, self.images = 0.0, 0, 0

    def load(self) -> None:
        """Where there is one."""
        if not self.path.exists():
            return
        tensors = load_file(self.path)
        self.model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        saved = self.optimizer.state_dict()
        saved["state"] = {
            place: {key: tensors[f"optimizer.{place}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for place in range(sum(name.endswith(".step") for name in tensors))
        }
        self.optimizer.load_state_dict(saved)
        self.seconds, epochs, seen = tensors["progress"].tolist()
        self.epochs, self.images = int(epochs), int(seen)

    def save(self) -> None:
        """In one step."""
        tensors = {f"model.{name}": value.contiguous() for name, value in self.model.state_dict().items()}
        for place, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{key}": value.clone() for key, value in values.items()}
        tensors["progress"] = torch.tensor([self.seconds, self.epochs, self.images], dtype=torch.float64)
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self.path)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; vectors and positions do not decay."""
    plain = [value for name, value in model.named_parameters() if value.ndim < 2 or name == "positions"]
    decaying = [value for name, value in model.named_parameters() if value.ndim >= 2 and name != "positions"]
    return torch.optim.AdamW([{"params": decaying, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}])


def tested(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in eval form."""
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in torch.split(inputs, 250)])
    return accuracy(outputs, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=58.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=50_000, help="training images; fewer for a try-out")
    parser.add_argument("--test-images", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, teacher = VisionTransformer(), load_model(options.teacher)
    state = State(options.out, model, optimizer_of(model))
    state.load()
    test = images(options.data / "test.parquet", options.test_images)
    train = Flipped(*images(options.data / "train.parquet", options.images), batch=BATCH)
    before, total = state.seconds, 60 * options.minutes
    started = time.monotonic()
    while state.seconds < total:
        torch.manual_seed(state.epochs + 1)
        model.train()
        for inputs, labels in train:
            state.seconds = before + time.monotonic() - started
            if state.seconds >= total:
                break
            for group in state.optimizer.param_groups:
                group["lr"] = rate(state.seconds / total)
            with torch.no_grad():
                taught = teacher(inputs)
            loss = loss_of(model(inputs), taught, labels)
            state.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            state.optimizer.step()
            state.images += len(labels)
        state.epochs += 1
        state.save()
        left = max(0.0, total - state.seconds)
        print(f"epoch {state.epochs}: loss {float(loss.detach()):.3f}, {left / 60:.1f} minutes left", flush=True)
    found = {
        "accuracy": tested(model, *test),
        "teacher": tested(teacher, *test),
        "test_images": len(test[1]),
        "epochs": state.images / len(train.labels),
        "minutes": state.seconds / 60,
        "threads": options.threads,
        "host": host(),
    }
    partial = options.out.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
    partial.replace(options.out)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    state.path.unlink(missing_ok=True)
    print(found)


if __name__ == "__main__":
    main()
