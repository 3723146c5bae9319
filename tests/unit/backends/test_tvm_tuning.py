"""Tuning by TVM, really done on small networks with few trials."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.backends.tvm import tuning_database
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.tuning import Tuning
from edgeprune.errors import BackendUnavailableError
from edgeprune.testing.backends import keys
from edgeprune.testing.command_line import CommandLine

pytestmark = pytest.mark.slow

EXAMPLE = (1, 8, 12, 12)


@pytest.fixture(autouse=True)
def _only_with_tvm():
    try:
        registry.get("tvm")
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
    return tmp_path


def net(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 12, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(12),
        nn.Flatten(),
    ).eval()


def compiled(folder, width, trials=None, seconds=120.0):
    """An artifact and the sentences of its tuning."""
    said, seen = [], []
    tuning = (
        None
        if trials is None
        else Tuning(seconds, trials, progress=lambda *event: seen.append(event), told=said.append)
    )
    artifact = edgeprune.compile(net(width), torch.randn(*EXAMPLE), folder, backend=Tvm(tuning=tuning))
    return artifact, said, seen


def test_tuned_once_used_for_every_width(state):
    backend = Tvm()
    plain, _, _ = compiled(state / "plain", 16)
    tuned, said, seen = compiled(state / "tuned", 16, trials=40)
    assert "40 trials" in said[0]
    assert seen[-1][0] <= 40
    assert any(left_s > 0 for _, _, left_s, _ in seen)
    assert tuned.manifest.host_parity["relative"] <= 1e-4
    known = tuning_database.found(backend.target)
    assert len(known.records) == 40
    quicker = sum(known.best(index)[0].searched for index in range(len(known.workloads)))
    assert backend.searched(tuned.engine)[0] == quicker > 0
    assert backend.searched(plain.engine)[0] == 0
    assert keys(backend.parse_engine(tuned.engine)) == keys(backend.parse_engine(plain.engine))

    # Without tuning again, the next compilation uses it; engines for latency tables do not.
    again, _, _ = compiled(state / "again", 16)
    assert again.engine.read_bytes() == tuned.engine.read_bytes()
    backend.export(net(16), (torch.randn(*EXAMPLE),), state / "table.so")
    assert (state / "table.so").read_bytes() == plain.engine.read_bytes()

    # Another width: what is equal is known, what is not begins with the schedules of its neighbor.
    other, said, _ = compiled(state / "other", 12, trials=12)
    assert " begun with schedules of similar widths" in said[0]
    assert ", 0 begun" not in said[0]
    assert ", 0 of them known" not in said[0]
    assert other.manifest.host_parity["relative"] <= 1e-4
    database = tuning_database.found(backend.target)
    assert len(database.records) == 52

    # Nothing of this is anything but text, and TVM itself reads it.
    from tvm.s_tir.meta_schedule.database import JSONDatabase

    folder = tuning_database.folder_of(backend.target)
    for name in (tuning_database.WORKLOADS, tuning_database.RECORDS):
        for line in (folder / name).read_text("ascii").splitlines():
            assert isinstance(json.loads(line), list)
    read = JSONDatabase(
        str(folder / tuning_database.WORKLOADS), str(folder / tuning_database.RECORDS), allow_missing=False
    )
    assert len(read) == 52


SCRIPT = """
import torch
from torch import nn
import edgeprune
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.tuning import Tuning

print("imported", flush=True)
net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).eval()
tell = lambda done, *_: print("at", done, flush=True)
edgeprune.compile(net, torch.randn(1, 8, 12, 12), "artifact", backend=Tvm(tuning=Tuning(120, {trials}, progress=tell)))
print("done", flush=True)
"""


def test_a_killed_tuning_goes_on_and_a_script_without_a_guard_runs_once(state):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = state / "script.py"
    script.write_text(SCRIPT.format(trials=400))
    killed = subprocess.Popen([sys.executable, script], cwd=state, env=environment, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("at ") and int(line.split()[1]) >= 8:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    folder = tuning_database.folder_of(Tvm().target)
    # What it had started ends by itself, when it next says something.
    deadline = time.monotonic() + 60
    while True:
        try:
            with tuning_database.writing(folder, tuning_database.identity_of(Tvm().target)) as database:
                kept = len(database.records)
            break
        except edgeprune.errors.CompileError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert kept >= 8
    script.write_text(SCRIPT.format(trials=6))
    done = subprocess.run(
        [sys.executable, script], cwd=state, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.count("imported") == done.stdout.count("done") == 1
    assert len(tuning_database.found(Tvm().target).records) == kept + 6


NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
"""


def test_the_command_says_what_came_of_it_and_which_runtime_is_the_faster(tmp_path):
    command = CommandLine(tmp_path, tmp_path / "board")
    (tmp_path / "net.py").write_text(NET)
    words = [
        "compile",
        "net.py:build",
        "--input",
        "x=1x3x20x20",
        "--backend",
        "tvm",
        "--tune",
        "60s",
        "--tune-trials",
        "12",
    ]
    said = command.succeed(*words)
    assert "12 trials: 1 functions" in said
    assert "of 1 functions have a schedule that tuning has found" in said
    assert "on this machine tvm takes" in said
    told = json.loads(command.succeed(*words, "--json"))
    assert told["beside_onnxruntime"]["ratio"] > 0
