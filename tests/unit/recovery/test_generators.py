"""Where everything random was, and back to there."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from edgeprune.errors import ConfigError
from edgeprune.recovery.generators import Generators

CPU = torch.device("cpu")


def loader(seed):
    return DataLoader(range(10), shuffle=True, generator=torch.Generator().manual_seed(seed))


def drawn(data):
    return [torch.rand(2).tolist(), random.random(), np.random.rand(3).tolist(), [int(one) for one in data]]


def test_after_the_block_all_of_them_draw_what_they_would_have_drawn():
    data = loader(0)
    generators = Generators([data], CPU)
    before = generators.states()
    expected = drawn(data)
    generators.restore(before)

    def interrupted():
        with generators.kept():
            assert drawn(data) == expected
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert drawn(data) == expected
    assert drawn(data) != expected


def test_states_of_other_loaders_are_refused():
    states = Generators([loader(0)], CPU).states()
    with pytest.raises(ConfigError, match="as many generators along as when the training began, found 0 instead of 1"):
        Generators([[1, 2]], CPU).restore(states)
