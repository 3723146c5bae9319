"""edgeprune: profile a device once, prune against a latency budget, deploy the compiled engine to the board.

The public names load on first use, so that ``import edgeprune`` costs milliseconds and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.budget import Budget
    from edgeprune.deployment.artifact import Artifact
    from edgeprune.deployment.compiling import compile
    from edgeprune.deployment.deploying import deploy
    from edgeprune.errors import EdgepruneError
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.graph.tracing import trace
    from edgeprune.latency.fitting import fit
    from edgeprune.latency.predictor import Predictor
    from edgeprune.latency.table import LatencyTable
    from edgeprune.loop.pareto import pareto
    from edgeprune.loop.pruning import prune
    from edgeprune.loop.tiles import prune_tiles
    from edgeprune.lowering.kernel_graph import KernelGraph, lower
    from edgeprune.profiling.run import profile
    from edgeprune.spec import Constraints
    from edgeprune.surgery.checking import check
    from edgeprune.surgery.cutting import apply
    from edgeprune.surgery.plan import PruningPlan, uniform_plan
    from edgeprune.surgery.storage import load, save
    from edgeprune.tasks.task import Objective, Task

_MODULES = {
    "Artifact": "deployment.artifact",
    "Board": "boards.board",
    "Budget": "budget",
    "ChannelGraph": "graph.channel_graph",
    "Constraints": "spec",
    "EdgepruneError": "errors",
    "KernelGraph": "lowering.kernel_graph",
    "LatencyTable": "latency.table",
    "Objective": "tasks.task",
    "Predictor": "latency.predictor",
    "PruningPlan": "surgery.plan",
    "Task": "tasks.task",
    "apply": "surgery.cutting",
    "check": "surgery.checking",
    "compile": "deployment.compiling",
    "deploy": "deployment.deploying",
    "fit": "latency.fitting",
    "load": "surgery.storage",
    "lower": "lowering.kernel_graph",
    "pareto": "loop.pareto",
    "profile": "profiling.run",
    "prune": "loop.pruning",
    "prune_tiles": "loop.tiles",
    "save": "surgery.storage",
    "trace": "graph.tracing",
    "uniform_plan": "surgery.plan",
}

__all__ = [
    "Artifact",
    "Board",
    "Budget",
    "ChannelGraph",
    "Constraints",
    "EdgepruneError",
    "KernelGraph",
    "LatencyTable",
    "Objective",
    "Predictor",
    "PruningPlan",
    "Task",
    "apply",
    "check",
    "compile",
    "deploy",
    "fit",
    "load",
    "lower",
    "pareto",
    "profile",
    "prune",
    "prune_tiles",
    "save",
    "trace",
    "uniform_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    value = getattr(import_module(f"edgeprune.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
