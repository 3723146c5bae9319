"""What was never trained is lowered as what was: the first table of a user is of a factory's fresh weights."""

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


def test_a_trained_model_is_not_copied(fresh):
    trained = in_trained_form(fresh)
    assert in_trained_form(trained) is trained


def test_norms_of_one_size_stay_apart():
    """Equal vectors become one constant of the engine, which could then not have two widths at once."""
    body = [
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *body, nn.Conv2d(16, 4, 1)).eval()
    vectors = [value for value in in_trained_form(net).state_dict().values() if value.shape == (16,)]
    assert not any(torch.equal(one, other) for place, one in enumerate(vectors) for other in vectors[:place])
    lowered = edgeprune.lower(edgeprune.trace(net, EXAMPLE))
    widths = dict(zip(lowered.graph.widths(), (10, 5), strict=True))
    (output,) = onnxruntime.InferenceSession(lowered.network_engine(widths)).run(None, {"input": EXAMPLE.numpy()})
    assert output.shape == (1, 4, 7, 7)
