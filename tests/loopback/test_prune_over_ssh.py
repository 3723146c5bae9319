"""The closed loop over a real OpenSSH server that goes away between two rounds, and comes back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from torch import nn

from edgeprune.boards.board import Board
from edgeprune.graph.tracing import trace
from edgeprune.latency.fitting import fit
from edgeprune.loop import verification
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.lowering.kernel_graph import lower
from edgeprune.profiling.run import profile
from edgeprune.spec import Kernel
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 96), (96, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def test_a_board_that_goes_away_between_rounds_leaves_a_plan_that_is_measured_later(
    new_server: Callable[..., OpenSshServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plans differ by a third: one short comparison tells them apart.
    monkeypatch.setattr(verification, "PRECISION", 1.0)
    server = new_server()
    monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(server.config))
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "boards.toml"))
    url = f"ssh://board?python={quote(sys.executable)}&root={quote(str(tmp_path / 'root'))}"
    model, x = network(), torch.zeros(1, 3, 16, 16)
    graph = trace(model, x)
    with Board.open(url) as board:
        lowered = lower(graph, model=model, device=board.probe(), workdir=tmp_path / "engines")
        predictor = fit(profile(model, x, board, minutes=0.05, graph=graph, kernel_graph=lowered))
    dense = lowered.at(graph.widths())

    class TooFast(type(predictor)):  # type: ignore[misc]
        """Takes pruned networks to be much faster than they are, so that one round is not enough."""

        def network(self, kernels: list[Kernel]) -> tuple[float, float, float]:
            ms, low_ms, high_ms = super().network(kernels)
            share = 1.0 if kernels == dense else 0.6
            return share * ms, share * low_ms, share * high_ms

    wrong = copy.copy(predictor)
    wrong.__class__ = TooFast
    cuts = 0

    def leave_at_the_second_cut(step: str, done: int, total: int) -> None:
        nonlocal cuts
        cuts += step == "cutting" and done == 0
        if cuts == 2:
            server.cut()

    planner = Planner(model, lowered, wrong)
    asked: dict[str, Any] = {"board": url, "planner": planner, "measuring_rounds": 8}
    begun = prune(model, x, "70%", progress=leave_at_the_second_cut, **asked)
    assert [turn.measured is None for turn in begun.rounds] == [False, True]
    assert begun.rounds[0].measured_ms(begun.dense_ms) > begun.budget_ms
    assert begun.measured_ms is None
    assert begun.chosen == 1
    assert any("The latency is unverified: it is predicted, " in note for note in begun.notes)
    server.start()
    later = prune(model, x, "70%", earlier=begun, **asked)
    assert later.rounds[0] == begun.rounds[0]
    assert later.rounds[1].widths == begun.rounds[1].widths
    assert later.rounds[1].measured is not None
    assert later.measured_ms is not None
    assert later.measured_ms < begun.rounds[0].measured_ms(begun.dense_ms)
