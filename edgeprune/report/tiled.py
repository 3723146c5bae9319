"""Report data of a run that removed tiles."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from edgeprune.report.data import Card, FrozenGroup, GroupChoice, ReportData
from edgeprune.report.pruning import metric_card

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
    checked = result.measured
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
        dense_ms=None if checked is None else checked.dense_ms,
        metric=next(iter(result.metrics_before)),
        groups=(
            *(GroupChoice(name, size, kept) for name, (kept, size) in result.widths.items() if kept < size),
            *(GroupChoice(f"{name} (tiles)", one.tiles, one.kept) for name, one in result.layers.items()),
        ),
        frozen=tuple(FrozenGroup(name, None, why) for name, why in result.dense.items()),
        hashes=hashes if table_hash is None else {**hashes, "latency table": table_hash},
        notes=result.notes,
    )
