"""Where a table may be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.cli.table_out import require_free
from edgeprune.errors import ConfigError


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
