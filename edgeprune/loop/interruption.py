"""What an interrupted run goes on from: what its search has measured, or all that it came to before it began to tune.

A folder of state and search, or of plan, cut model, state and checkpoint of the last finished epoch. Its state is written last
and holds what the run was, so that a folder without it is none, and one of another run is not gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError, PlanError
from edgeprune.files import sha256_of, write_text
from edgeprune.loop.realizing import Realized
from edgeprune.loop.result import PruningRound
from edgeprune.recovery.checkpoint import different, weights_hash
from edgeprune.recovery.evaluation import RecoveryRecord
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery import storage
from edgeprune.surgery.plan import PruningPlan

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.budget import Budget
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.planning import Planner
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.recovery.generators import Generators
    from edgeprune.tasks.task import Task

STATE_NAME = "state.json"
_MODEL, _EPOCHS, _SEARCH = "model", "epochs.safetensors", "search"
_OWN = (STATE_NAME, _MODEL, _EPOCHS, _SEARCH)
_SCHEMA = 2

_log = logging.getLogger("edgeprune.loop")


@dataclass(frozen=True)
class Begun:
    """What a run came to before it began to tune.

    Attributes:
        plan: The plan that was taken.
        rounds: All rounds; a single unmeasured one without a board.
        chosen: Index of the one that was taken.
        lost: See `edgeprune.loop.closing.Closed`.
        ended: The same.
        metrics_before: Validation metric of the dense model by objective.
        realized: The cut model, not yet tuned.
        left: How it is tuned: what the search, where there was one, has left of the fine-tuning.
        generators: Where everything random was when the tuning began (`edgeprune.recovery.generators.Generators.states`).
        more: What else the kind of run must know of it, JSON values.
    """

    plan: PruningPlan
    rounds: tuple[PruningRound, ...]
    chosen: int
    lost: str
    ended: str
    metrics_before: Mapping[str, float]
    realized: Realized
    left: FineTuning
    generators: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Interruption:
    """A folder for what an interrupted run goes on from.

    Attributes:
        folder: It; made when searching or tuning begins.
        information: Kept beside the state, JSON values: what a caller needs to begin the same run again.
        sources: Hashes of what the run was made from and its model and settings do not show, such as the file of its task; by
            names that say in a message what is not the same.
    """

    folder: Path
    information: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """File of the tuning's last finished epoch."""
        return self.folder / _EPOCHS

    def require_own(self) -> None:
        """Refuse to write into what is not ours; asked before the long steps.

        Raises:
            ConfigError: The folder is a file, or holds something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"a checkpoint must be a folder, {self.folder} is a file.")
        if self.folder.is_dir():
            foreign = next((entry.name for entry in sorted(self.folder.iterdir()) if not _is_ours(entry.name)), None)
            if foreign is not None:
                raise ConfigError(
                    f"a checkpoint must be a folder of its own, {self.folder} holds {foreign} too.",
                    hint=f"{self.folder / 'tuning'}",
                )

    def read(self) -> dict[str, Any] | None:
        """The state as it was written, or None where there is none that can be read."""
        try:
            state = json.loads((self.folder / STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and state.get("schema") == _SCHEMA else None

    def load(self, model: nn.Module, identity: Mapping[str, Any]) -> tuple[Begun | None, str]:
        """What an interrupted run of the same model and settings came to.

        Args:
            model: The dense model.
            identity: What the run is, JSON values.

        Returns:
            It, or None; and a sentence where there is an interrupted run that is not gone on with, or nothing.
        """
        state = self.read()
        if state is None:
            return None, ""
        differs = different(state["identity"], json.loads(json.dumps(self._whole(identity))))
        if differs:
            return None, (
                f"The interrupted run in {self.folder} was not gone on with: it differs in {', '.join(differs)}. It is replaced."
            )
        if "plan" not in state:  # it was interrupted while it searched
            return None, ""
        weights = self.folder / _MODEL / storage.WEIGHTS
        try:
            plan = PruningPlan.load(self.folder / _MODEL / storage.PLAN)
            whole = plan.hash == state["plan"] and sha256_of(weights) == state["weights"]
            module = storage.load(self.folder / _MODEL, model).train(model.training) if whole else None
        except (PlanError, OSError) as error:
            _log.info("the interrupted run cannot be read: %s", error)
            module = None
        if module is None:
            return (
                None,
                f"The interrupted run in {self.folder} was not gone on with: its files are damaged. It is replaced.",
            )
        from pydantic import TypeAdapter

        records = tuple(RecoveryRecord(**record) for record in state["recovery"])
        rounds = TypeAdapter(tuple[PruningRound, ...]).validate_python(state["rounds"])
        realized = Realized(module, state["check_max_abs"], records, tuple(state["notes"]))
        return Begun(
            plan=plan,
            rounds=rounds,
            chosen=state["chosen"],
            lost=state["lost"],
            ended=state["ended"],
            metrics_before=state["metrics_before"],
            realized=realized,
            left=FineTuning(**state["left"]),
            generators=state["generators"],
            more=state.get("more", {}),
        ), ""

    def searching(self, identity: Mapping[str, Any], generators: Generators) -> Path:
        """A search begins, or goes on: everything random is put where it was when it began the first time.

        Args:
            identity: What the run is, JSON values.
            generators: Everything random that the run draws from.

        Returns:
            Where the search keeps what it goes on from.

        Raises:
            ConfigError: The loaders bring more or fewer generators along than they did.
        """
        state = self.read()
        whole = json.loads(json.dumps(self._whole(identity)))
        if state is not None and "plan" not in state and state["identity"] == whole:
            _log.info("going on with the interrupted search in %s", self.folder)
            generators.restore(state["generators"])
        else:
            self.discard()
            self.folder.mkdir(parents=True, exist_ok=True)
            state = {
                "schema": _SCHEMA,
                "identity": whole,
                "information": dict(self.information),
                "generators": generators.states(),
            }
            write_text(self.folder / STATE_NAME, json.dumps(state, indent=1) + "\n")
        return self.folder / _SEARCH

    def save(self, begun: Begun, identity: Mapping[str, Any]) -> None:
        """Keep what a run came to, in place of what was kept before."""
        if "plan" in (self.read() or {"plan": ""}):
            self.discard()
        # A search stays what is gone on with until all of this is there.
        shutil.rmtree(self.folder / _MODEL, ignore_errors=True)
        storage.save(begun.realized.module, self.folder / _MODEL, begun.plan)
        state = {
            "schema": _SCHEMA,
            "identity": self._whole(identity),
            "information": dict(self.information),
            "plan": begun.plan.hash,
            "weights": sha256_of(self.folder / _MODEL / storage.WEIGHTS),
            "rounds": [asdict(turn) for turn in begun.rounds],
            "chosen": begun.chosen,
            "lost": begun.lost,
            "ended": begun.ended,
            "metrics_before": dict(begun.metrics_before),
            "check_max_abs": begun.realized.check_max_abs,
            "recovery": [asdict(record) for record in begun.realized.recovery],
            "notes": list(begun.realized.notes),
            "left": asdict(begun.left),
            "generators": begun.generators,
            "more": dict(begun.more),
        }
        write_text(self.folder / STATE_NAME, json.dumps(state, indent=1) + "\n")
        shutil.rmtree(self.folder / _SEARCH, ignore_errors=True)

    def discard(self) -> None:
        """Remove what is ours, and the folder when that was all; nothing is left to go on from."""
        # Without its state it is nothing, whatever interrupts the rest.
        (self.folder / STATE_NAME).unlink(missing_ok=True)
        for own in (_MODEL, _SEARCH):
            shutil.rmtree(self.folder / own, ignore_errors=True)
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.is_file() and _is_ours(entry.name):
                    entry.unlink(missing_ok=True)
            # Somebody else's file may have come meanwhile.
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _whole(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return {**identity, **self.sources}


def _is_ours(name: str) -> bool:
    """One of our entries, or a draft of one that a killed process left."""
    return any(name == own or (name.startswith(f".{own}.") and name.endswith(".partial")) for own in _OWN)


def common_identity(
    model: nn.Module, example_inputs: Sequence[Any], budget: Budget, predictor: Predictor | None, task: Task | None
) -> dict[str, Any]:
    """What of that every kind of run has: model, inputs, budget, table and objectives."""
    return {
        "model": weights_hash([*model.named_parameters(), *model.named_buffers()]),
        "example inputs": [list(example.shape) for example in example_inputs],
        "budget": str(budget),
        "latency table": None if predictor is None else predictor.table_hash,
        "objectives": [
            [one.name, str(one.limit), one.weight, one.higher_is_better, one.pooled]
            for one in (() if task is None else task.objectives)
        ],
    }


def identity_of(
    planner: Planner, budget: Budget, settings: FineTuning, losses: Sequence[Distillation]
) -> dict[str, Any]:
    """What makes a run the same as an earlier one, as JSON values."""
    rules = sorted((name, repr(rule)) for name, rule in planner.rules.items())
    return {
        **common_identity(planner.model, planner.graph.example_inputs, budget, planner.predictor, planner.task),
        "constraints": hashlib.sha256(repr(rules).encode()).hexdigest(),
        "criterion": planner.criterion.name,
        "damage calibration": repr(planner.calibrate_damage),
        "allocator": planner.allocator.name,
        "fine-tuning": asdict(settings),
        "distillation": [[one.name, one.temperature, one.weight] for one in losses],
    }
