"""The latency that a run means: of which table, of which percentile, state and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.cli.record import PruneOptions
    from edgeprune.latency.predictor import Predictor
    from edgeprune.latency.table import LatencyTable


def meant_table(options: PruneOptions) -> Any:
    """The table of the latency that is meant, still to be fitted, or None for settings of a predictor, or without one.

    Raises:
        TableFileMissingError: There is no such file.
        TableMismatchError: The table does not hold that latency.
    """
    import edgeprune
    from edgeprune.latency.predictor_file import require_settings

    if options.table is None:
        return None
    if options.table.suffix == ".json":
        require_settings(options.table)
        return None
    return _chosen(edgeprune.LatencyTable.load(options.table), options)


def fitted(table: Any, options: PruneOptions) -> Predictor:
    """The predictor of a run.

    Args:
        table: Of `meant_table`.
        options: With a table.
    """
    import edgeprune
    from edgeprune.latency.fitting import fit_with

    if table is not None:
        return edgeprune.fit(table)
    assert options.table is not None
    stored = edgeprune.Predictor.load(options.table)
    return fit_with(_chosen(stored.table, options), stored.settings, stored.source)


def _chosen(table: LatencyTable, options: PruneOptions) -> LatencyTable:
    if options.energy is not None and not table.energy:
        from edgeprune.latency.energy import required

        required(None, table.header)
    return table.chosen(percentile=options.percentile, sustained=options.sustained, precision=options.precision)
