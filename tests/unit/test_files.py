"""Files that appear whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from edgeprune.files import replacing, write_text


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def _fail_halfway(path: Path, failure: type[BaseException]) -> None:
    path.write_text("half")
    raise failure


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_no_other(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(failure), replacing(path) as partial:
        _fail_halfway(partial, failure)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_draft(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the block that ended last"
    assert list(tmp_path.iterdir()) == [path]


def test_it_has_the_permissions_of_any_new_file_and_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    write_text(link, "größer")
    assert link.is_symlink()
    written = tmp_path / "elsewhere" / "file"
    assert written.read_text(encoding="utf-8") == "größer"
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    write_text(written, "private", mode=0o600)
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
