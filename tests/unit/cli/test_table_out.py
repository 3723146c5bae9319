"""Where a table may be written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeprune.cli.table_out import require_free, require_not_measured
from edgeprune.errors import ConfigError
from edgeprune.latency.table import LatencyTable

MEASURED = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


def test_a_table_is_written_over_only_where_that_was_said_or_is_meant(tmp_path: Path) -> None:
    table, other = tmp_path / "a[1].parquet", tmp_path / "other.parquet"
    require_free(table, replace=False)
    table.write_bytes(b"minutes of work")
    other.write_bytes(b"of another board")
    for extended in (None, other, tmp_path / "absent.parquet"):
        with pytest.raises(ConfigError, match="must not be there yet") as caught:
            require_free(table, replace=False, extended=extended)
        assert "--replace" in str(caught.value.hint)
    require_free(table, replace=True)
    require_free(table, replace=False, extended=tmp_path / "." / table.name)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    table = tmp_path / "a[1].parquet"
    table.write_bytes(b"saved, but its journals not yet removed")
    (tmp_path / "a[1].parquet.selection.jsonl").write_text("{}\n")
    require_free(table, replace=False)


def test_an_import_is_written_over_another_but_over_nothing_that_was_measured(tmp_path: Path) -> None:
    table, imported = tmp_path / "table.parquet", tmp_path / "imported.parquet"
    shutil.copy(MEASURED, table)
    held = LatencyTable.load(table)
    LatencyTable({**held.header, "label": "imported"}, held.rows).save(imported)
    require_not_measured(imported, replace=False)
    require_not_measured(tmp_path / "absent.parquet", replace=False)
    require_not_measured(table, replace=True)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1")
    for path in (table, damaged):
        with pytest.raises(ConfigError, match="must not be there yet, or be an import as well"):
            require_not_measured(path, replace=False)
