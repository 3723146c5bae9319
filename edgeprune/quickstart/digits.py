"""The handwritten digits inside scikit-learn: 1 797 real 8x8 scans, enlarged to 32x32, with a held-out test split.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(CC BY 4.0), as shipped in `sklearn.datasets.load_digits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

SIZE = 32
CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Three disjoint splits, images of shape (n, 1, 32, 32) with zero mean and unit variance, labels of shape (n,)."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Digits:
    """The digits, split by a fixed permutation: 1 200 to train, 237 to validate, 360 to test, whatever the seed of a run."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16.0
    images = functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = (images - 0.3053) / 0.3232
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2026))
    parts = torch.split(order, [1200, 237, 360])
    train, validation, test = ((images[part], labels[part]) for part in parts)
    return Digits(train, validation, test)


def resized(split: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """A split with images of shape (n, 1, size, size)."""
    images, labels = split
    if size == images.shape[-1]:
        return split
    return functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False), labels


def loader(split: tuple[Tensor, Tensor], *, seed: int | None = None, batch: int = 50) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of a split; shuffled anew each epoch when a seed is given."""
    data = TensorDataset(*split)
    if seed is None:
        return DataLoader(data, batch_size=batch)
    return DataLoader(data, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(seed))


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest logit is the label's, in [0, 1]."""
    return float((outputs.argmax(1) == labels).float().mean())


class Augmented:
    """Shuffled batches, each image turned by up to 9 degrees and moved by up to an eighth, at a size of choice.

    A convolutional net with a global pool takes any size; most of the training runs at half size, at a quarter of the cost.
    Iterating it draws from torch's global generator, which the training seeds.

    Args:
        split: Images of shape (n, 1, 32, 32) and labels.
        size: Height and width of the batches' images.
        batch: Images in a batch.
    """

    def __init__(self, split: tuple[Tensor, Tensor], size: int = SIZE, batch: int = 50) -> None:
        self.images, self.labels = split
        self.size, self.batch = size, batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.split(torch.randperm(len(self.labels)), self.batch):
            yield self._moved(self.images[chosen]), self.labels[chosen]

    def _moved(self, images: Tensor) -> Tensor:
        count = len(images)
        angle = (torch.rand(count) - 0.5) * 0.3
        affine = torch.zeros(count, 2, 3)
        affine[:, 0, 0], affine[:, 0, 1] = angle.cos(), -angle.sin()
        affine[:, 1, 0], affine[:, 1, 1] = angle.sin(), angle.cos()
        affine[:, :, 2] = (torch.rand(count, 2) - 0.5) * 0.25
        grid = functional.affine_grid(affine, [count, 1, self.size, self.size], align_corners=False)
        return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
