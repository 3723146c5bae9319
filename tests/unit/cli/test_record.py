"""The folder of a pruning run: it appears whole, and takes nothing of the run before along."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.cli.record import FILE_NAME, deployment_record, staged


def run(out: Path, text: str) -> None:
    with staged(out) as folder:
        (folder / "plan.json").write_text(text)
        (folder / FILE_NAME).write_text(text)


def test_a_new_run_takes_the_place_of_the_old_one_and_of_what_was_said_about_it(tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    run(out, "first")
    (out / "artifact").mkdir()
    for name in ("artifact.deployment.json", "dense.deployment.json", "report.html"):
        (out / name).write_text("about the first")
    run(out, "second")
    assert sorted(path.name for path in out.iterdir()) == ["artifact", "plan.json", FILE_NAME]
    assert (out / "plan.json").read_text() == "second"


def test_a_run_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    run(out, "first")
    (out / "report.html").write_text("about the first")
    with pytest.raises(IsADirectoryError), staged(out) as folder:
        folder.write_text("a record that cannot be written")
    assert (out / "plan.json").read_text() == "first"
    assert (out / "report.html").is_file()
    assert list(tmp_path.iterdir()) == [out]


def test_each_board_has_a_record_of_its_own_deployment(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    boards = ("local", "bench", "pi@10.0.0.7:22", "a/b")
    records = [deployment_record(artifact, board) for board in boards]
    assert records[1] == tmp_path / "artifact.bench.deployment.json"
    assert len(set(records)) == len(boards)
    assert all(record.parent == tmp_path for record in records)
