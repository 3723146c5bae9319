"""What a path that leads nowhere may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.near_files import near_files


def test_a_file_of_a_like_name_is_found_there_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables").mkdir()
    for name in ("board.parquet", "tables/v100.parquet", "v10.csv"):
        (tmp_path / name).touch()
    assert near_files(Path("v100.parquet"), ".parquet") == "tables/v100.parquet"
    assert near_files(Path("tables/baord.parquet"), ".parquet") == "board.parquet"
    assert near_files(Path("board.parqet"), ".parquet") == "board.parquet"
    elsewhere = f"a path from {tmp_path}, or an absolute one"
    # An ending in common makes no two names alike.
    assert near_files(Path("nosuch.parquet"), ".parquet") == elsewhere
    assert near_files(Path("nosuch.parquet"), ".parquet", otherwise="another") == f"{elsewhere}, or another"
