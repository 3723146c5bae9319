"""What `edgeprune prune` leaves in its folder for `compile` and `report`: the settings of the run, and its example inputs."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from edgeprune.budget import Budget
from edgeprune.errors import ConfigError
from edgeprune.loop.result import MetricVerdict, PruningRound, Spent
from edgeprune.spec import Constraints

if TYPE_CHECKING:
    import torch

FILE_NAME = "prune.json"
INPUTS_NAME = "inputs.npz"
MODEL_FOLDER = "model"
PLAN_NAME = "plan.json"
REPORT_NAME = "report.html"
TUNING_FOLDER = "tuning"
DEPLOYMENT_SUFFIX = ".deployment.json"


class PruneOptions(BaseModel):
    """What a user asked `edgeprune prune` for; paths and file references are absolute, so that they mean the same later.

    Attributes:
        model: ``package.module:factory`` or ``/absolute/file.py:factory``.
        table: Latency table or predictor settings; None only where tiles are removed for a budget that needs none.
        latency: Latency budget as the user wrote it, or None.
        params: Budget of parameters as the user wrote it, or None.
        macs: Budget of multiply-accumulates as the user wrote it, or None.
        energy: Budget of energy as the user wrote it, or None.
        memory: Budget of memory as the user wrote it, or None.
        precision: Of the latency that is meant, or None for that of the table.
        percentile: Of the latency that is meant.
        sustained: Whether the latency in thermal equilibrium is meant.
        input: ``NAME=SHAPE[:DTYPE]`` each.
        inputs: File of example inputs instead.
        weights: Weights of the dense model.
        task: ``/absolute/file.py:factory`` of the task.
        board: Where the result is measured, or ``"none"``.
        backend: Backend of the run.
        keep: See `edgeprune.spec.Constraints`, as the next three.
        min_width: Pattern to fewest units.
        multiple_of: Pattern to divisor.
        same_as: Pattern to module.
        criterion: Importance, or None for the default.
        calibrate_damage: Whether damage is calibrated by measured losses.
        allocator: How widths are chosen.
        epochs: Of fine-tuning.
        lr: Learning rate of fine-tuning.
        distill: Losses by which the dense model teaches.
        tap: Modules whose values those compare; the ends of stages where there are none.
        ema: Decay of the average of the weights, or None.
        amp: Precision of the forward while tuning, or None for float32.
        blocks: Whether whole residual blocks may go.
        refit: Whether layers are refitted before they are tuned.
        refit_biases: Whether their biases alone are.
        soft_masking: Epochs of fine-tuning that train under masks; 0 for none.
        reallocate_every: Steps between the allocations of soft masking.
        netadapt: Whether widths are searched with short tunings.
        limit: ``NAME=LIMIT`` each, of the objectives of the task.
        pagcp: Rounds of the search under those limits; 0 for none.
        hold_limits: Whether they must hold before tuning.
        tiles: Rows and columns of the tiles that are removed instead of channels, ``"auto"`` for sizes by latency, or None.
        channels: Whether channels are removed beside tiles.
        power_weight: What modelled power is worth where tiles go.
        seed: Of the factory, of example inputs and of tuning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    table: Path | None = None
    latency: str | None = None
    params: str | None = None
    macs: str | None = None
    energy: str | None = None
    memory: str | None = None
    precision: str | None = None
    percentile: int = 50
    sustained: bool = False
    input: tuple[str, ...] = ()
    inputs: Path | None = None
    weights: Path | None = None
    task: str | None = None
    board: str = "none"
    backend: str
    keep: tuple[str, ...] = ()
    min_width: dict[str, int] = Field(default_factory=dict)
    multiple_of: dict[str, int] = Field(default_factory=dict)
    same_as: dict[str, str] = Field(default_factory=dict)
    criterion: str | None = None
    calibrate_damage: bool = False
    allocator: str
    epochs: int
    lr: float
    distill: tuple[str, ...] = ()
    tap: tuple[str, ...] = ()
    ema: float | None = None
    amp: Literal["bfloat16", "float16"] | None = None
    blocks: bool = False
    refit: bool = False
    refit_biases: bool = False
    soft_masking: int = 0
    reallocate_every: int = 50
    netadapt: bool = False
    limit: tuple[str, ...] = ()
    pagcp: int = 0
    hold_limits: bool = False
    tiles: tuple[int, int] | Literal["auto"] | None = None
    channels: bool = False
    power_weight: float = 0.0
    seed: int = 0

    @property
    def budget(self) -> Budget:
        """What the pruned model may cost.

        Raises:
            ConfigError: A text cannot be read, or there is none.
        """
        return Budget.of(self.latency, self.params, self.macs, self.energy, self.memory)

    @property
    def constraints(self) -> Constraints:
        """What widths must respect."""
        return Constraints(self.keep, self.min_width, self.multiple_of, self.same_as)


class Recovered(BaseModel):
    """What one recovery step did, as `edgeprune.recovery.evaluation.RecoveryRecord`, which needs torch."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: str
    before: dict[str, float]
    after: dict[str, float]
    details: dict[str, JsonValue]


class PruningRecord(BaseModel):
    """Settings and figures of one `edgeprune prune`.

    Attributes:
        schema_version: Of this file.
        options: What it was asked for.
        table_hash: Latency table that the widths were chosen with; None where tiles were removed without one, as for the next
            three.
        weights_hash: SHA-256 of the weights file, or None without one.
        budget_ms: Budget, milliseconds; None where tiles were removed and no plan was tried on a board.
        dense_predicted_ms: Predicted latency of the dense model, milliseconds.
        predicted_ms: Predicted latency of the pruned model, milliseconds.
        dense_ms: Latency of the dense model that the budget refers to, milliseconds; None where nothing was measured.
        measured_ms: That times the measured ratio of the pruned model, milliseconds.
        board: Board of those measurements; without them the one that the latency table was measured on.
        threads: Threads of the runtime that the latency table holds for.
        conditions: Where and how it was measured, for the manifest.
        plan_hash: Hash of the plan.
        rounds: What the closed loop tried, in order; none where tiles were removed without a board, or for no latency.
        chosen: Index of the round whose plan was taken.
        spent: What the plan takes of budgets besides the latency.
        check_max_abs: Largest difference between cut and masked model.
        metrics_before: Validation metric of the dense model by objective.
        metrics_after: The same of the pruned model.
        recovery: What each recovery step did, for a run that goes on with its model.
        verdicts: Per objective both, its limit and whether it is kept.
        outputs: Where there are several objectives: by objective the places of the model's outputs that it reads.
        tiles: Where tiles were removed: by weight how many are kept, and of how many.
        tile_sizes: Where sizes of tiles were chosen by latency: by weight outputs and inputs of a tile.
        widths: Where channels were removed beside them: by group how many units are kept, and of how many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[4] = 4
    options: PruneOptions
    table_hash: str | None
    weights_hash: str | None
    budget_ms: float | None
    dense_predicted_ms: float | None
    predicted_ms: float | None
    dense_ms: float | None
    measured_ms: float | None
    board: str
    threads: int
    conditions: str
    plan_hash: str
    rounds: tuple[PruningRound, ...]
    chosen: int
    spent: tuple[Spent, ...]
    check_max_abs: float
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    recovery: tuple[Recovered, ...]
    verdicts: tuple[MetricVerdict, ...]
    outputs: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    tiles: dict[str, tuple[int, int]] = Field(default_factory=dict)
    tile_sizes: dict[str, tuple[int, int]] = Field(default_factory=dict)
    widths: dict[str, tuple[int, int]] = Field(default_factory=dict)

    @property
    def unfinished(self) -> bool:
        """Whether the last plan still waits for a board."""
        return bool(self.rounds) and self.rounds[-1].measured is None

    @classmethod
    def load(cls, folder: Path) -> PruningRecord:
        """Read the record of a finished run.

        Raises:
            ConfigError: The folder holds no finished run, or a damaged one.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ConfigError(
                f"{folder} must hold a finished pruning run, there is no {FILE_NAME} in it.", hint="edgeprune prune"
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ConfigError(
                f"{path} must be as this version of edgeprune prune writes it, it is not valid.",
                hint="edgeprune prune, without --resume",
            ) from error


def interrupted(out: Path) -> PruneOptions | None:
    """Options of the run in a folder that was interrupted while it tuned, or None."""
    from edgeprune.loop.interruption import Interruption

    state = Interruption(out / TUNING_FOLDER).read()
    try:
        return None if state is None else PruneOptions.model_validate(state["information"]["options"])
    except (ValidationError, KeyError, TypeError):
        return None


def deployment_record(artifact: Path, board: str) -> Path:
    """Where `edgeprune deploy` keeps what it found: beside the artifact, one file per board."""
    whole = artifact.absolute()
    return whole.parent / f"{whole.name}.{re.sub(r'[^A-Za-z0-9.@_-]+', '_', board)}{DEPLOYMENT_SUFFIX}"


def file_hash(path: Path | None) -> str | None:
    """SHA-256 of a file; None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else None


def absolute_reference(reference: str) -> str:
    """A model reference that means the same from another working directory."""
    where, separator, name = reference.rpartition(":")
    return f"{Path(where).resolve()}{separator}{name}" if where.endswith(".py") else reference


def save_inputs(inputs: tuple[torch.Tensor, ...] | dict[str, torch.Tensor], path: Path) -> None:
    """Write example inputs; positional ones are named by their number."""
    import numpy as np

    named: dict[str, Any] = inputs if isinstance(inputs, dict) else {str(at): one for at, one in enumerate(inputs)}
    np.savez(path, **{name: tensor.detach().cpu().numpy() for name, tensor in named.items()})


def load_inputs(path: Path) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """Read what `save_inputs` wrote."""
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as arrays:
        named = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    if all(name.isdigit() for name in named):
        return tuple(named[str(at)] for at in range(len(named)))
    return named


def check_out(out: Path) -> None:
    """Refuse to write into what is not ours; asked before the long steps.

    Raises:
        ConfigError: `out` is a file, or a folder of something else.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder, {out} is a file.")
    ours = (out / name for name in (FILE_NAME, PLAN_NAME, TUNING_FOLDER))
    if out.is_dir() and any(out.iterdir()) and not any(path.exists() for path in ours):
        raise ConfigError(
            f"--out must be empty or hold an earlier run, {out} holds something else.", hint="--out another"
        )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder whose contents appear in `out` when the block ends well, the record last; nothing appears otherwise.

    Reports and deployments of the run that was in `out` before go: they are about another plan.

    Raises:
        ConfigError: `out` is a file, or a folder of something else.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        out.mkdir(exist_ok=True)
        # Without its record a folder is no finished run: it goes first and comes last.
        (out / FILE_NAME).unlink(missing_ok=True)
        for stale in (out / REPORT_NAME, *out.glob(f"*{DEPLOYMENT_SUFFIX}")):
            stale.unlink(missing_ok=True)
        for entry in sorted(partial.iterdir(), key=lambda path: path.name == FILE_NAME):
            target = out / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            entry.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
