"""The journal: what was appended is there after any interruption, and nothing else is."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.profiling.journal import Journal

REQUEST = {"engines": {"a": "1"}, "seed": 0}
RECORDS = [{"kind": "sample", "id": name, "times_ms": [0.1, 2.5]} for name in "abc"]


def test_records_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    with Journal(path, REQUEST) as first:
        for record in RECORDS[:2]:
            first.append(record)
    with Journal(path, REQUEST) as second:
        assert second.records == RECORDS[:2]
        assert second.resumed == 2
        second.append(RECORDS[2])
    assert Journal(path, REQUEST).records == RECORDS


def test_record_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path, REQUEST) as journal:
        journal.append(RECORDS[0])
        assert json.loads(path.read_text().splitlines()[-1]) == RECORDS[0]


@given(cut=st.integers(min_value=0), tail=st.binary(max_size=30).filter(lambda tail: b"\n" not in tail))
def test_file_that_was_cut_anywhere_gives_a_beginning_of_the_records_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("journal") / "run.jsonl"
    with Journal(path, REQUEST) as journal:
        for record in RECORDS:
            journal.append(record)
    content = path.read_bytes()
    # A kill leaves whole lines and the beginning of one; a lost power supply may leave other bytes there.
    kept = content[: cut % (len(content) + 1)]
    path.write_bytes(kept + tail)
    with Journal(path, REQUEST) as resumed:
        assert resumed.records == RECORDS[: max(0, kept.count(b"\n") - 1)]
        resumed.append({"kind": "more"})
        expected = list(resumed.records)
    with Journal(path, REQUEST) as again:
        assert again.records == expected
    assert list(path.parent.iterdir()) == [path]


def test_journal_of_another_request_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    for seed in (0, 1, 2):
        with caplog.at_level(logging.WARNING, "edgeprune.profiling"), Journal(path, {**REQUEST, "seed": seed}) as book:
            assert book.records == []
            book.append({"kind": "sample", "seed": seed})
    assert sorted(found.name for found in tmp_path.iterdir()) == ["run.jsonl", "run.jsonl.other-1", "run.jsonl.other-2"]
    assert json.loads((tmp_path / "run.jsonl.other-2").read_text().splitlines()[1])["seed"] == 1
    assert "is a journal of another run or is damaged; it was moved to" in caplog.text


@pytest.mark.parametrize("content", ["no json\n", "[1]\n", "\n", '{"kind":"header"}\n', "\0\0\0\n"])
def test_file_that_is_no_journal_is_put_aside_whole(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    with Journal(path, REQUEST) as journal:
        assert journal.records == []
    assert (tmp_path / "run.jsonl.other-1").read_text() == content


def test_line_that_was_damaged_in_the_middle_is_never_read_over(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path, REQUEST) as journal:
        for record in RECORDS:
            journal.append(record)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n")
    assert Journal(path, REQUEST).records == []
    assert (tmp_path / "run.jsonl.other-1").exists()


def test_discarded_journal_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path, REQUEST)
    journal.append(RECORDS[0])
    journal.discard()
    assert not path.exists()


def test_journal_without_a_path_lives_in_memory() -> None:
    with Journal(None, REQUEST) as journal:
        journal.append(RECORDS[0])
        assert journal.records == [RECORDS[0]]


def test_disk_of_the_host_that_fills_up_loses_nothing_that_was_recorded(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("12k")  # three pages
    path = disk / "run.jsonl"
    (disk / "something else").write_bytes(bytes(4096))
    record = {"kind": "sample", "times_ms": [0.123456789] * 40}
    first = Journal(path, REQUEST)
    with pytest.raises(OSError, match="No space left") as caught:
        [first.append(record) for _ in range(100)]
    first.close()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    kept = len(first.records)
    assert kept > 3
    (disk / "something else").unlink()
    with Journal(path, REQUEST) as second:
        assert second.records == [record] * kept
        second.append(record)
    assert Journal(path, REQUEST).records == [record] * (kept + 1)
