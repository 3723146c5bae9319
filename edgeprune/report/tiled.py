"""Report data of a run that removed tiles."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from edgeprune.report.data import Card, FrozenGroup, GroupChoice, ReportData
from edgeprune.report.pruning import candidate_rows, metric_card, round_rows

if TYPE_CHECKING:
    from edgeprune.loop.tiled_result import TiledResult


def from_tiles(result: TiledResult, *, title: str, table_hash: str | None, parameters: tuple[int, int]) -> ReportData:
    """What a run of tiles knows; layers stand where groups of channels stand otherwise, tiles where units do.

    Args:
        result: Of `edgeprune.prune_tiles`.
        title: Headline.
        table_hash: Of the latency table, if there was one.
        parameters: Of the dense and the pruned model.
    """
    cards = [Card("kept of the budgeted cost", f"{result.share:.1%}", f"predicted; {result.allocation.unit}")]
    if result.power_share is not None:
        name, _, how = result.power_of.partition(", ")
        cards.append(Card(name, f"{result.power_share:.1%}", f"of dense; {how}"))
    checked = result.measured
    # One scale for the page: that of the budget where plans were tried, else that of the comparison.
    dense_ms = result.dense_ms if result.dense_ms is not None else None if checked is None else checked.dense_ms
    if checked is not None:
        value, detail = (
            f"{checked.dense_ms:.3f} → {checked.pruned_ms:.3f} ms",
            ", ".join(filter(None, (f"{checked.ratio:.1%} of dense, interleaved", checked.disturbance))),
        )
        cards.insert(0, Card(f"latency on {checked.board}", value, detail))
    elif result.predicted_ms is not None:
        value = f"{result.dense_predicted_ms:.3f} → {result.predicted_ms:.3f} ms"
        cards.insert(0, Card("latency, predicted only", value, "not measured on a board"))
    cards += [metric_card(verdict) for verdict in result.verdicts]
    cards.append(Card("parameters", f"{parameters[0]:,} → {parameters[1]:,}"))
    cards.append(Card("cut equals masked", f"{result.check_max_abs:.1e}", "largest absolute difference, before tuning"))
    hashes = {"plan": result.plan.hash, "model": result.plan.signature}
    return ReportData(
        title=title,
        provenance="latency unverified" if checked is None else f"measured on {checked.board}",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        cards=tuple(cards),
        dense_ms=None if checked is None else dense_ms,
        candidates=() if checked is None or dense_ms is None else candidate_rows(result, checked, dense_ms, parameters),
        metric=next(iter(result.metrics_before)),
        rounds=()
        if result.dense_ms is None or result.budget_ms is None
        else round_rows(result, result.dense_ms, result.budget_ms),
        groups=(
            *(GroupChoice(name, size, kept) for name, (kept, size) in result.widths.items() if kept < size),
            *(GroupChoice(_named(name, result), one.tiles, one.kept) for name, one in result.layers.items()),
        ),
        frozen=tuple(FrozenGroup(name, None, why) for name, why in result.dense.items()),
        hashes=hashes if table_hash is None else {**hashes, "latency table": table_hash},
        notes=result.notes,
    )


def _named(name: str, result: TiledResult) -> str:
    """A layer, with the size of its tiles where that was chosen for it."""
    if name not in result.sizes:
        return f"{name} (tiles)"
    rows, columns = result.sizes[name]
    return f"{name} (tiles of {rows}x{columns})"
