"""Parity: how far an engine's outputs are from the golden ones, as the runner reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.deployment.artifact import GOLDEN_NAME, MODEL_NAME

if TYPE_CHECKING:
    from edgeprune.deployment.manifest import Manifest


@dataclass(frozen=True)
class Parity:
    """What the parity check found, over all outputs.

    Attributes:
        passed: Whether every output was within tolerance.
        cases: Number of golden cases that ran.
        max_abs: Largest absolute difference to the golden outputs.
        relative: Largest difference as a share of the output's scale: the tolerance that would have passed.
        tolerance: The one that was asked for.
        snr_db: Smallest signal-to-noise ratio, decibel; None where the outputs are equal bit by bit.
        snr_db_needed: The one that was asked for.
        cosine: Smallest cosine similarity.
        nan: Outputs that are NaN where the golden ones are not.
        inf: Outputs that are infinite where the golden ones are not.
        top1_agreement: Share of samples with the same largest output; None where no output looks like logits.
        worst: Name of the worst output and its worst case.
        load_ms: Time to load the engine, milliseconds.
        peak_memory_bytes: Largest memory of the process that ran it.
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

    @classmethod
    def from_result(cls, result: Mapping[str, Any], manifest: Manifest) -> Parity:
        """Read the result of the runner's verb ``parity``."""
        worst = max(result["outputs"], key=lambda output: (not output["passed"], output["required_relative"]))
        return cls(
            passed=result["passed"],
            cases=result["cases"],
            max_abs=result["max_abs"],
            relative=result["required_relative"],
            tolerance=manifest.tolerance.relative,
            snr_db=result["snr_db"],
            snr_db_needed=manifest.tolerance.snr_db,
            cosine=result["cosine"],
            nan=result["nan"],
            inf=result["inf"],
            top1_agreement=result["top1_agreement"],
            worst=f"{worst['name']}, {worst['worst_case']}",
            load_ms=result["load_ms"],
            peak_memory_bytes=result["peak_memory_bytes"],
        )

    def as_json(self) -> dict[str, Any]:
        """For manifests and reports."""
        return asdict(self)

    def complaint(self) -> str:
        """What must hold and what was found, as half a sentence; and the tolerance that would have passed."""
        strays = f"; {self.nan} NaN and {self.inf} infinite values" if self.nan or self.inf else ""
        snr = "exact" if self.snr_db is None else f"{self.snr_db:.1f} dB"
        return (
            f"must agree with the golden outputs within {self.tolerance:.3g} of their scale and {self.snr_db_needed:.0f} dB, "
            f"found max abs {self.max_abs:.3g}, {snr} (in {self.worst}){strays}; "
            f"a tolerance of {self.relative:.3g} would have passed"
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
    }
    return fields if cases is None else {**fields, "cases": cases}
