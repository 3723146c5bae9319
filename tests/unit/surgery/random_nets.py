"""Random networks: chains of steps on images, on tokens, and on images again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from random_images import IMAGE, Tensor
from random_tokens import TOKEN
from torch import nn

SIDE = 4
"""Images stay [batch, channels, 4, 4], so that any two can be joined."""

Steps = Sequence[tuple[str, int]]
"""Kind of each step, and the seed of what it chooses."""


class RandomNet(nn.Module):
    """Images, tokens, images, as far as there are steps; ``save`` and ``join`` make long shortcuts.

    Args:
        images: Steps on the image.
        tokens: Steps on its tokens.
        again: Steps on the image that the tokens are put together to, where their number still fits.
    """

    def __init__(self, images: Steps, tokens: Steps = (), again: Steps = ()) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.kinds: list[str] = []
        self.steps = nn.ModuleList()
        width, count = self._chain(images, 8, 0)
        if tokens:
            self._append("turn")
            width, count = self._chain(tokens, width, SIDE * SIDE)
        if tokens and again and count == SIDE * SIDE:
            self._append("turn")
            width, count = self._chain(again, width, 0)
        self.flat = not count and len(images) % 3 == 0
        self.head = nn.Linear(width * SIDE * SIDE if self.flat else width, 3)

    def _chain(self, steps: Steps, width: int, count: int) -> tuple[int, int]:
        """Append steps that start at a width and a number of tokens (0: an image); returns those that they end at."""
        saved: tuple[int, int] | None = None
        for kind, seed in steps:
            dice = random.Random(f"{kind} {seed}")
            if kind == "save":
                saved = width, count
                self._append(kind)
            elif kind == "join" and saved == (width, count):
                self._append("add")
            elif kind == "join" and saved is not None and not count:
                self._append("cat")
                width += saved[0]
            elif kind != "join" and count:
                step, width, count = TOKEN[kind](dice, width, count)
                self._append(kind, step)
            elif kind != "join":
                step, width = IMAGE[kind](dice, width)
                self._append(kind, step)
        return width, count

    def _append(self, kind: str, step: nn.Module | None = None) -> None:
        self.kinds.append(kind)
        self.steps.append(step or nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = saved = self.stem(x)
        for kind, step in zip(self.kinds, self.steps, strict=True):
            if kind == "save":
                saved = x
            elif kind == "add":
                x = x + saved
            elif kind == "cat":
                x = torch.cat([x, saved], 1)
            elif kind == "turn":
                x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
            else:
                x = step(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3) if x.ndim == 4 else 1))


def _steps(kinds: Sequence[str], most: int) -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from([*kinds, "save", "join"]), st.integers(0, 99)), max_size=most)


def networks() -> st.SearchStrategy[tuple[Steps, Steps, Steps]]:
    """Arguments of `RandomNet`."""
    convolutional = st.tuples(_steps(list(IMAGE), 6), st.just([]), st.just([]))
    attending = st.tuples(_steps(list(IMAGE), 1), _steps(list(TOKEN), 4), st.just([]))
    mixed = st.tuples(_steps(list(IMAGE), 2), _steps(list(TOKEN), 2), _steps(list(IMAGE), 2))
    return st.one_of(convolutional, attending, mixed)
