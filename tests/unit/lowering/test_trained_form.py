"""What was never trained is lowered as what was: the first table of a user is of a factory's fresh weights."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.lowering.trained_form import in_trained_form

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.next, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        nn.init.zeros_(self.next.bias)
        nn.init.zeros_(self.last.weight)

    def forward(self, image):
        hidden = self.norm(self.stem(image)).relu()
        return (hidden + self.last(self.next(hidden))).relu().mean((2, 3))


@pytest.fixture
def fresh():
    return Net().eval()


def kernels_of(model):
    lowered = edgeprune.lower(edgeprune.trace(model, EXAMPLE))
    return [kernel.key for kernel in lowered.at(lowered.graph.widths())]


def test_a_fresh_model_runs_the_kernels_of_a_trained_one(fresh):
    trained = Net().train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(2):
        trained(torch.randn(4, 3, 16, 16) + 1).square().mean().backward()
        optimizer.step()
    assert kernels_of(fresh) == kernels_of(trained.eval())


def test_the_model_itself_stays_as_it_is(fresh):
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    found = in_trained_form(fresh)
    assert found is not fresh
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    vectors = [value for value in found.state_dict().values() if value.ndim == 1]
    assert len(vectors) == 9
    assert all((vector != vector[0]).any() for vector in vectors)
    assert (found.norm.running_var > 0.5).all()


class Twice(nn.Module):
    """Two norms of 24 channels that no convolution takes in, behind layers that are cut by themselves."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.first, self.second = nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.one, self.two = (nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(24, 4)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(1, 24, 1, 1)) for _ in range(2))

    def forward(self, image):
        first, second = (self.stem, self.one, self.first), (self.down, self.two, self.second)
        for (before, body, norm), shift in zip((first, second), self.shifts, strict=True):
            image = before(image).relu()
            image = norm(torch.cat([image, body(image)], 1) * 1.5).relu() + shift
        return self.head(image.mean((2, 3)))


def test_equal_vectors_of_a_fresh_model_are_not_taken_for_one(tmp_path):
    """The exporter would keep one of them, and its length would be that of the first layer's channels."""
    lowered = edgeprune.lower(edgeprune.trace(Twice().eval(), EXAMPLE), workdir=tmp_path)
    widths = {"stem": 12, "down": 5}
    norms = [kernel for kernel in lowered.at(widths) if kernel.op == "BatchNormalization"]
    assert [kernel.inputs[1:] for kernel in norms] == [((kernel.output[1],),) * 4 for kernel in norms]
    assert {kernel.output[1] for kernel in norms} == {20, 13}
    session = onnxruntime.InferenceSession(lowered.network_engine(widths), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: np.ones(EXAMPLE.shape, np.float32)})
    assert found.shape == (1, 4)


def test_a_trained_model_is_not_copied(fresh):
    trained = in_trained_form(fresh)
    assert in_trained_form(trained) is trained
