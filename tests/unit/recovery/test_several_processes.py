"""Fine-tuning in two processes over gloo: the same weights as in one process with batches of twice the size."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from edgeprune.errors import EdgepruneError
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.tasks import ranks
from edgeprune.tasks.task import Objective, Task

torch.set_num_threads(1)
out = sys.argv[1]
if len(sys.argv) > 2:
    distributed.init_process_group("gloo")
rank, count = ranks.rank(), ranks.count()
images = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
data = TensorDataset(images, (images[:, 0] > images[:, 1]).long())


def loader(size, **options):
    if count == 1:
        return DataLoader(data, size, **options)
    return DataLoader(data, size // count, sampler=DistributedSampler(data, count, rank, shuffle=False), **options)


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def made(train):
    objectives = (
        Objective("accuracy", train, loader(16), nn.CrossEntropyLoss(), accuracy),
        Objective("pooled", train, loader(16), nn.CrossEntropyLoss(), lambda o, t: float(o.softmax(1).std()), pooled=True),
    )
    return Task(objectives)


def net(seed):
    torch.manual_seed(seed)
    unused = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    model.add_module("4", nn.Identity())
    model[4].unused = unused
    return model


# Each process begins with weights of its own; those of the first count.
model = net(rank)
record = fine_tune(
    model, made(loader(16)), epochs=3, lr=1e-2, optimizer="sgd", ema=0.9, max_gradient_norm=0.5, checkpoint=f"{out}/epochs"
)
normed = nn.Sequential(nn.BatchNorm1d(6))
reestimate_batch_norm(normed, loader(16))
found = {
    "weights": model.state_dict(), "before": record.before, "after": record.after,
    "losses": [one["loss"] for one in record.details["epochs"]], "norm": normed.state_dict(),
}
said = []
if count > 1:
    again = net(rank)
    resumed = fine_tune(
        again, made(loader(16)), epochs=3, lr=1e-2, optimizer="sgd", ema=0.9, max_gradient_norm=0.5, checkpoint=f"{out}/epochs"
    )
    assert resumed == record
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for batches in (8, 8 + rank):
        try:
            fine_tune(net(0), made([(images[:4], torch.zeros(4).long())] * batches), epochs=1)
        except EdgepruneError as error:
            said.append(str(error))
    try:
        if rank == 0:
            import edgeprune
            edgeprune.prune(model, images[:1], "50%")
    except EdgepruneError as error:
        said.append(str(error))
torch.save({**found, "said": said}, f"{out}/found{rank}-of-{count}.pt")
"""


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_processes_come_to_the_weights_of_one_with_twice_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": "2"}
    commands = [
        ([sys.executable, str(script), str(tmp_path / "two"), "gloo"], {**shared, **rendezvous, "RANK": str(rank)})
        for rank in range(2)
    ]
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for command, environment in commands
    ]
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
    try:
        runpy.run_path(str(script))
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    alone = torch.load(tmp_path / "one" / "found0-of-1.pt")
    both = [torch.load(tmp_path / "two" / f"found{rank}-of-2.pt") for rank in range(2)]
    for found in both:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(found["weights"][name], both[0]["weights"][name])
        for when in ("before", "after"):
            assert found[when] == pytest.approx(alone[when], rel=1e-4)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        for name, value in alone["norm"].items():
            torch.testing.assert_close(found["norm"][name], value, rtol=1e-5, atol=1e-6)
        same, uneven, *_ = found["said"]
        assert "must read its own share of the training data, found the same first batch in all" in same
        assert "must have equally many training batches, found 8, 9" in uneven
    assert "pruning must run in one process, found 2" in both[0]["said"][-1]
    # What one process wrote, the other did not write again.
    assert sorted(one.name for one in (tmp_path / "two").iterdir()) == ["epochs", "found0-of-2.pt", "found1-of-2.pt"]
