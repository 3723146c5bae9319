"""Parity: how far an engine's outputs are from the golden ones, as the runner reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from edgeprune.deployment.artifact import GOLDEN_NAME, MODEL_NAME

if TYPE_CHECKING:
    from edgeprune.deployment.manifest import Manifest


@dataclass(frozen=True)
class TaskParity:
    """What the parity check found of the outputs of one task.

    Attributes:
        passed: Whether each was within its tolerance.
        outputs: Their names.
        max_abs: Largest absolute difference to the golden outputs.
        relative: Difference as a share of the output's scale, of the output that is nearest to its tolerance or beyond it.
        tolerance: Largest that is allowed of that output: another task that reads it may demand more.
        snr_db: Smallest signal-to-noise ratio, decibel; None where the outputs are equal bit by bit.
    """

    passed: bool
    outputs: tuple[str, ...]
    max_abs: float
    relative: float
    tolerance: float
    snr_db: float | None

    def __str__(self) -> str:
        found = f"{self.relative:.2g} of the scale, {self.tolerance:.2g} allowed"
        return f"{found} ({', '.join(self.outputs)})"


@dataclass(frozen=True)
class Parity:
    """What the parity check found, over all outputs.

    Attributes:
        passed: Whether every output was within tolerance.
        cases: Number of golden cases that ran.
        max_abs: Largest absolute difference to the golden outputs.
        relative: Largest difference as a share of the output's scale: the tolerance that would have passed.
        tolerance: The one that was asked for, of the worst output.
        snr_db: Smallest signal-to-noise ratio, decibel; None where the outputs are equal bit by bit. With tasks, where more may
            be asked of one output than of another: that of the worst output, as `max_abs` and `relative` are.
        snr_db_needed: The one that was asked for, of the worst output.
        cosine: Smallest cosine similarity.
        nan: Outputs that are NaN where the golden ones are not.
        inf: Outputs that are infinite where the golden ones are not.
        top1_agreement: Share of samples with the same largest output; None where no output looks like logits.
        worst: Name of the worst output and its worst case, with the tasks that read it.
        load_ms: Time to load the engine, milliseconds.
        peak_memory_bytes: Largest memory of the process that ran it.
        tasks: The same by task, where the artifact has several.
    """

    passed: bool
    cases: int
    max_abs: float
    relative: float
    tolerance: float
    snr_db: float | None
    snr_db_needed: float
    cosine: float
    nan: int
    inf: int
    top1_agreement: float | None
    worst: str
    load_ms: float
    peak_memory_bytes: int
    tasks: Mapping[str, TaskParity] = field(default_factory=dict)

    @classmethod
    def from_result(cls, result: Mapping[str, Any], manifest: Manifest) -> Parity:
        """Read the result of the runner's verb ``parity``."""
        tolerances = {output["name"]: manifest.tolerance_of(output["name"]) for output in result["outputs"]}
        worst = max(
            result["outputs"],
            key=lambda output: (
                not output["passed"],
                output["required_relative"] / tolerances[output["name"]].relative,
            ),
        )
        readers = [name for name, one in manifest.tasks.items() if worst["name"] in one.outputs]
        of_tasks = f" of {', '.join(readers)}" if readers else ""
        where = f"{worst['name']}{of_tasks}, {worst['worst_case']}"
        needed = tolerances[worst["name"]]
        # What is asked of one output must not stand beside what was found of another.
        told = worst if manifest.tasks else result
        return cls(
            passed=result["passed"],
            cases=result["cases"],
            max_abs=told["max_abs"],
            relative=told["required_relative"],
            tolerance=needed.relative,
            snr_db=told["snr_db"],
            snr_db_needed=needed.snr_db,
            cosine=result["cosine"],
            nan=result["nan"],
            inf=result["inf"],
            top1_agreement=result["top1_agreement"],
            worst=where,
            load_ms=result["load_ms"],
            peak_memory_bytes=result["peak_memory_bytes"],
            tasks={name: _of_task(one.outputs, result["outputs"], manifest) for name, one in manifest.tasks.items()},
        )

    def as_json(self) -> dict[str, Any]:
        """For manifests and reports; without tasks where there are none."""
        found = asdict(self)
        del found["tasks"]
        tasks = {name: {**asdict(one), "outputs": list(one.outputs)} for name, one in self.tasks.items()}
        return {**found, "tasks": tasks} if tasks else found

    def complaint(self) -> str:
        """What must hold and what was found, as half a sentence; and the tolerance that would have passed."""
        strays = f"; {self.nan} NaN and {self.inf} infinite values" if self.nan or self.inf else ""
        snr = "exact" if self.snr_db is None else f"{self.snr_db:.1f} dB"
        return (
            f"must agree with the golden outputs within {self.tolerance:.3g} of their scale and {self.snr_db_needed:.0f} dB, "
            f"found max abs {self.max_abs:.3g}, {snr} (in {self.worst}){strays}; "
            f"a tolerance of {self.relative:.3g} would have passed"
        )


def _of_task(names: Sequence[str], outputs: Sequence[Mapping[str, Any]], manifest: Manifest) -> TaskParity:
    own = [output for output in outputs if output["name"] in names]
    worst = max(own, key=lambda output: output["required_relative"] / manifest.tolerance_of(output["name"]).relative)
    ratios = [output["snr_db"] for output in own if output["snr_db"] is not None]
    return TaskParity(
        passed=all(output["passed"] for output in own),
        outputs=tuple(names),
        max_abs=max(output["max_abs"] for output in own),
        relative=worst["required_relative"],
        tolerance=manifest.tolerance_of(worst["name"]).relative,
        snr_db=min(ratios) if ratios else None,
    )


def request(manifest: Manifest, *, threads: int, cases: int | None = None) -> dict[str, Any]:
    """Fields of a ``parity`` request, but for where the files are."""
    fields: dict[str, Any] = {
        "engine": manifest.engine,
        "golden": GOLDEN_NAME,
        "model": MODEL_NAME,
        "runtime": manifest.backend,
        "threads": threads,
        "tolerance": manifest.tolerance.model_dump(),
        "tolerances": {
            name: manifest.tolerance_of(name).model_dump() for one in manifest.tasks.values() for name in one.outputs
        },
    }
    return fields if cases is None else {**fields, "cases": cases}
