"""Patterns that can match nothing are told from the names of modules alone, before a model is traced."""

import pytest
import torch
from torch import nn

from edgeprune.cli.compile import require_compilable
from edgeprune.errors import ConfigError, ConstraintError
from edgeprune.spec import Constraints
from edgeprune.surgery.constraints import require_possible


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        value = torch.relu(self.stem(image))
        for block in self.blocks:
            value = value + torch.relu(block(value))
        return self.head(value.mean((2, 3)))


@pytest.mark.parametrize("pattern", ["nolayer", "stemm", "blocks.7", "blocks.*.conv", "*.nolayer", "ste.*", "head.x"])
def test_what_can_match_nothing_is_refused(pattern):
    with pytest.raises(ConstraintError, match="must match at least one group") as caught:
        require_possible(Constraints(keep=(pattern,)), Net())
    assert caught.value.hint.startswith("one of ")
    with pytest.raises(ConstraintError, match="same_as must match"):
        require_possible(Constraints(same_as={"stem": pattern}), Net())


@pytest.mark.parametrize(
    "pattern",
    [
        "stem",
        "st*",
        "blocks.*",
        "blocks.1",
        "*",
        "stem (+2 layers)",
        "blocks.0[0:4]",
        "*heads",
        "blocks.*heads",
        "blocks.* heads",
        "blocks.?[[]0:4]",
        "head.weight",
        "image",
        "imag*",
        "add_1",
        "cat_*",
    ],
)
def test_what_could_match_passes(pattern):
    require_possible(Constraints(keep=(pattern,), min_width={pattern: 2}), Net())


def test_a_precision_that_cannot_be_is_told_without_a_model():
    require_compilable("onnxruntime", "fp32", has_task=False)
    require_compilable("onnxruntime", "int8", has_task=True)
    with pytest.raises(ConfigError, match="must be one of fp32, int8, found 'int4'") as caught:
        require_compilable("onnxruntime", "int4", has_task=False)
    assert "--precision fp32" in caught.value.hint
    with pytest.raises(ConfigError, match="need calibration data"):
        require_compilable("onnxruntime", "int8", has_task=False)
