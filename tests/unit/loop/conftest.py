"""A small trained residual net, and a latency table of it that was really measured on this machine."""

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from edgeprune.boards.board import Board
from edgeprune.errors import ConnectError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.latency.fitting import fit
from edgeprune.latency.predictor import Predictor
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row, network_row
from edgeprune.loop import verification
from edgeprune.loop.planning import Planner
from edgeprune.lowering.kernel_graph import KernelGraph, lower
from edgeprune.profiling import design
from edgeprune.profiling.run import profile
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.spec import Measurement
from edgeprune.tasks.task import Task

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_bn = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_bn = nn.BatchNorm2d(width)

    def forward(self, inputs):
        inner = self.first_bn(self.first(inputs)).relu()
        return (inputs + self.second_bn(self.second(inner))).relu()


class DigitsNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.block = Block(32)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        hidden = self.block(self.stem_bn(self.stem(images)).relu())
        return self.head(self.down_bn(self.down(hidden)).relu().mean((2, 3)))


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def digits_task():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return Task.single(
        train=DataLoader(TensorDataset(images[:900], labels[:900]), batch_size=60, shuffle=True),
        validation=DataLoader(TensorDataset(images[900:1300], labels[900:1300]), batch_size=200),
        loss=nn.CrossEntropyLoss(),
        metric=accuracy,
    )


@dataclass(frozen=True)
class Case:
    """Everything that `prune` needs; made once, since tracing and measuring take seconds."""

    model: nn.Module
    example: torch.Tensor
    task: Task
    graph: ChannelGraph
    kernel_graph: KernelGraph
    predictor: Predictor
    board: Board | None


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("EDGEPRUNE_ROOT", str(tmp_path_factory.mktemp("board")))
    torch.manual_seed(0)
    model, task = DigitsNet(), digits_task()
    fine_tune(model, task, epochs=3, lr=5e-3)
    example = torch.zeros(1, 1, 8, 8)
    graph = trace(model, example)
    with Board.open("local") as board:
        kernel_graph = lower(graph, model=model, workdir=tmp_path_factory.mktemp("engines"))
        table = profile(model, example, board, minutes=0.08, graph=graph, kernel_graph=kernel_graph)
        yield Case(model, example, task, graph, kernel_graph, fit(table), board)
    patch.undo()
    torch.set_num_threads(threads)


class LostBoard:
    """The local board, whose link breaks when engines are brought to it."""

    def __init__(self, board):
        self._board = board
        self.name = board.name

    def __getattr__(self, name):
        return getattr(self._board, name)

    def push(self, content, **options):
        raise ConnectError("the board must answer, found no route to it.")


@pytest.fixture
def roughly(monkeypatch):
    """One comparison does, where the closed loop measures to 0.7 %, which takes four for nets so quick."""
    monkeypatch.setattr(verification, "PRECISION", 1.0)


@pytest.fixture
def lost_board(case):
    return LostBoard(case.board)


@pytest.fixture
def lost_board_of():
    return LostBoard


def chain(*widths):
    layers, channels = [], 1
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


EXAMPLE = torch.zeros(1, 1, 16, 16)


def deeper_planner(predictor, folder):
    """Of a net that is deep enough for plans next to any budget; its predictions are extrapolated, and only those count."""
    torch.manual_seed(0)
    model = chain(32, 48, 64, 64, 80, 64)
    device = predictor.table.header["identity"]
    kernel_graph = lower(trace(model, EXAMPLE), model=model, device=device, workdir=folder)
    return Planner(model, kernel_graph, predictor)


@pytest.fixture(scope="session")
def planned():
    """Makes a planner of a deeper net from a predictor and a folder for engines."""
    return deeper_planner


@pytest.fixture(scope="session")
def tabled(tmp_path_factory):
    """A planner of the small trained net whose latencies come from a table of another machine: nothing is timed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, task = DigitsNet(), digits_task()
    fine_tune(model, task, epochs=1, lr=5e-3)
    predictor = fit(LatencyTable.load(TABLE))
    device = predictor.table.header["identity"]
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    kernels = lower(graph, model=model, device=device, workdir=tmp_path_factory.mktemp("tabled"))
    return Planner(model, kernels, predictor, task=task)


@pytest.fixture(scope="session")
def modelled(tmp_path_factory):
    """A case without a board. Its table holds the net's kernels and networks, timed as the other machine's predictor says."""

    def timed(ms):
        return Measurement(ms, ms, ms, 0.0, (ms,), 1)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, task, law = DigitsNet(), digits_task(), fit(LatencyTable.load(TABLE))
    fine_tune(model, task, epochs=3, lr=5e-3)
    example = torch.zeros(1, 1, 8, 8)
    traced = trace(model, example)
    graph = lower(traced, model=model, device=law.table.target(), workdir=tmp_path_factory.mktemp("modelled"))
    every = [(widths, graph.at(widths)) for widths in design.networks(graph, 8)]
    kernels = {kernel.key: kernel for _, executed in every for kernel in executed}.values()
    rows = [kernel_row(kernel, timed(float(law.kernel_ms([kernel])[0]))) for kernel in kernels]
    rows += [
        network_row(f"network-{place}", executed, timed(law.network_ms(executed)), widths)
        for place, (widths, executed) in enumerate(every)
    ]
    header = {name: law.table.header[name] for name in ("identity", "runtime", "threads", "precision")}
    header |= {"label": "modelled", "reference": {"median_ms": law.network_ms(every[0][1])}}
    predictor = fit(LatencyTable.from_rows(header, rows))
    return Case(model, example, task, traced, graph, predictor, board=None)


@pytest.fixture
def predictor_with(case):
    """Makes the predictor as it would be had the dense network not been profiled, or had it taken another time."""

    def made(*dense_ms):
        changed = []
        for row in case.predictor.table.rows:
            if row["kind"] == "network" and json.loads(row["widths"]) == case.graph.widths():
                changed += [{**row, "median_ms": value} for value in dense_ms]
            else:
                changed.append(row)
        predictor = copy.copy(case.predictor)
        predictor.table = LatencyTable(dict(case.predictor.table.header), changed)
        return predictor

    return made


class Augmented(Dataset):
    """Images of another data set with noise from the generators of torch, Python and NumPy."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image, label = self.data[index]
        noise = torch.randn(image.shape) + random.random() + float(np.random.rand())
        return image + 0.05 * noise, label


@pytest.fixture(scope="session")
def another_process(tabled):
    """Makes the planner of a process of its own: its data are at their beginning, and everything random begins at a seed."""

    def made(seed, steps, **options):
        """`steps` are in an epoch, of 60 images each; `options` are the planner's."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        lead = tabled.task.objectives[0]
        own = torch.Generator().manual_seed(3)
        data = Augmented(lead.train.dataset, 60 * steps)
        train = DataLoader(data, batch_size=60, shuffle=True, generator=own)
        task = Task.single(train=train, validation=lead.validation, loss=nn.CrossEntropyLoss(), metric=lead.metric)
        return Planner(tabled.model, tabled.kernel_graph, tabled.predictor, task=task, **options)

    return made
