import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from edgeprune.tasks.task import Task


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def _small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture
def small_net():
    """Makes the same untrained net each time."""
    return _small_net


@pytest.fixture(scope="session")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    train = TensorDataset(images[:1000], labels[:1000])
    validation = TensorDataset(images[1000:1400], labels[1000:1400])
    return train, validation


@pytest.fixture
def task(digits):
    train, validation = digits
    return Task.single(
        train=DataLoader(train, batch_size=50, shuffle=True),
        validation=DataLoader(validation, batch_size=150),
        loss=nn.CrossEntropyLoss(),
        metric=accuracy,
    )
