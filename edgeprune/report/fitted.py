"""Report data of a fitted predictor: how right it is, where it is weak, and what it was fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from edgeprune.boards import fingerprint
from edgeprune.latency.table_card import flagged
from edgeprune.report import collecting
from edgeprune.report.data import Card, ReportData
from edgeprune.report.measured_stairs import measured_staircases
from edgeprune.report.pruning import engines, threads

if TYPE_CHECKING:
    from edgeprune.latency.fit_report import FitReport
    from edgeprune.latency.predictor import Predictor

_EDGES = 10
"""Stair edges that are told in words."""


def from_predictor(predictor: Predictor) -> ReportData:
    """Everything that a table and the fit to it know of themselves."""
    table, report = predictor.table, predictor.report()
    header = table.header
    facts = header.get("fingerprint") or {}
    kernels, networks = collecting.held_out_predictions(predictor)
    return ReportData(
        title=f"Latency predictor of {table.device}",
        provenance=f"{header.get('label', 'of unknown origin')} on {table.board} ({engines(header)}, "
        f"{threads(header['threads'])})",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        cards=tuple(_cards(predictor, report)),
        # Of somebody else's table only some facts are known: no more is told of it.
        board={
            "board": table.board,
            **(collecting.board_facts(fingerprint.from_facts(facts)) if "cpu_model" in facts else {}),
        },
        conditions=collecting.flat_conditions(header.get("conditions") or {}),
        disturbances=collecting.disturbances(header),
        staircases=measured_staircases(predictor),
        kernel_predictions=kernels,
        network_predictions=networks,
        sentinels_ms=collecting.sentinels(header),
        noise=f"On what the fit had not seen: {report.summary()}.",
        errors=collecting.error_table(report),
        hashes={"latency table": table.hash, "measured": str(header.get("created", "not told"))},
        notes=tuple(_notes(predictor, report)),
    )


def _cards(predictor: Predictor, report: FitReport) -> Iterator[Card]:
    table = predictor.table
    yield Card("measured", f"{len(table.kernels)} kernels, {len(table.networks)} networks")
    for row in report.rows():
        if row["median_error_percent"] is None or row not in (report.families[0], report.end_to_end):
            continue
        noise = row["noise_median_percent"]
        ceiling = "not repeated" if noise is None else f"measurements repeat to {noise:.1f} %"
        yield Card(f"median error, {row['family']}", f"{row['median_error_percent']:.1f} %", ceiling)
    total = report.end_to_end
    if total is not None and total["coverage_percent"] is not None:
        yield Card(
            f"inside the {report.level:.0%} interval, end to end",
            f"{total['coverage_percent']:.0f} %",
            f"median full width {total['width_percent']:.1f} %",
        )


def _notes(predictor: Predictor, report: FitReport) -> Iterator[str]:
    for row in report.weak:
        yield (
            f"Weak: {row['family']}, {row['region']}: median error {row['median_error_percent']:.1f} % on {row['n']} kernels, "
            f"{row['elsewhere_median_percent']:.1f} % on the others of its family."
        )
    if not report.weak:
        yield "Weak regions: none; no kind of kernel is missed by significantly more than the rest of its family."
    if report.edges:
        told = ", ".join(
            f"{edge['group']} at {edge['width']} ({edge['below_ms']:.4f} to {edge['at_ms']:.4f} ms)"
            for edge in report.edges[:_EDGES]
        )
        yield f"Edges of the staircase that profiling found, the largest of {len(report.edges)}: {told}."
    if report.left_out:
        yield f"Networks that hold a kernel which cannot be predicted: {', '.join(report.left_out)}."
    flags = predictor.table.header.get("flags") or {}
    yield from (f"{flagged(len(keys))} as {flag}." for flag, keys in sorted(flags.items()) if keys)
    if refused := predictor.table.header.get("unsupported"):
        yield f"{len(refused)} kernels could not be measured alone; they are predicted from others."
    if report.transferred_from is not None:
        yield f"It stands on the predictor of {report.transferred_from}."
