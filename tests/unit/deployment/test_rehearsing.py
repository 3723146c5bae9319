"""What a deployment would do, found without a trace on the board ``local``."""

import json
import os
from pathlib import Path

import pytest

from edgeprune.boards.board import Board
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.rehearsing import rehearse
from edgeprune.errors import IncompatibleTargetError
from edgeprune.testing import forking


def everything(root):
    """Every path below a folder with what a write changes of it."""
    found = {}
    for path in [root, *root.rglob("*")]:
        stat = path.lstat()
        found[path.relative_to(root)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode)
    return found


def test_an_empty_board_stays_empty_and_lacks_all_files(artifacts, root):
    found = rehearse(artifacts[0])
    assert not root.exists()
    assert dict(found.missing) == {
        path.name: path.stat().st_size for path in artifacts[0].folder.iterdir() if path.is_file()
    }
    assert found.bytes_to_send == artifacts[0].size_bytes
    assert found.new_bytes == 2 * artifacts[0].size_bytes
    assert (found.runs, found.again) == (None, False)
    assert all(need.met for need in found.requirements)
    assert deploy(artifacts[0], rounds=1).bytes_sent == found.bytes_to_send


def test_a_board_that_runs_another_release_is_left_as_it_is_to_the_last_time_stamp(artifacts, running):
    # As an upload that broke off leaves it: that part is not sent again.
    (running / "incoming").mkdir(exist_ok=True)
    engine = artifacts[1].manifest.files["engine.onnx"]
    (running / "incoming" / f"{engine.sha256}.partial").write_bytes(artifacts[1].engine.read_bytes()[:100])
    # What a probe remembers is not there, so that one which writes would have to.
    (running / "libraries.json").unlink()
    before = everything(running)
    found = rehearse(artifacts[1], reference=artifacts[0])
    assert everything(running) == before
    assert found.runs == artifacts[0].release
    shared = {entry.sha256 for entry in artifacts[0].manifest.files.values()}
    lacking = {name for name, entry in artifacts[1].manifest.files.items() if entry.sha256 not in shared}
    assert set(found.missing) == lacking | {"manifest.json"}
    assert found.bytes_to_send == sum(found.missing.values()) - 100
    assert rehearse(artifacts[0]).again


def test_a_board_that_cannot_run_it_is_refused_as_a_deployment_would(artifacts, root, forge):
    needs = {**artifacts[0].manifest.requires, "architecture": "sparc"}
    with pytest.raises(IncompatibleTargetError, match="needs architecture sparc, the board has"):
        rehearse(forge(artifacts[0], "sparc", requires=needs))
    assert not root.exists()


def test_a_file_of_the_runners_names_in_the_working_directory_is_not_run(root, tmp_path, monkeypatch):
    (tmp_path / "store.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    with Board.open() as board, board.untouched():
        assert board.facts()["architecture"] == os.uname().machine
        assert board.call("store", {"action": "missing", "blobs": {"0" * 64: 5}})["missing"] == ["0" * 64]
    assert not root.exists()


def test_the_verb_says_what_would_be_sent_and_the_command_that_sends_it(artifacts, root):
    def run(*words):
        command = ("deploy", str(artifacts[0].folder), "--dry-run", *words)
        return forking.run(command, Path.cwd(), os.environ, 120)

    done = run()
    assert done.returncode == 0, done.stderr
    assert f"local runs no release; {artifacts[0].size_bytes / 1e6:.2f} MB would be sent" in done.stdout
    assert done.stdout.rstrip().endswith(f"edgeprune deploy {artifacts[0].folder}")
    many = json.loads(run("--to", "local", "--json").stdout)
    assert [(one["board"], one["bytes_to_send"]) for one in many["boards"]] == [("local", artifacts[0].size_bytes)]
    assert not root.exists()
    refused = run("--latency", "50%")
    assert refused.returncode == 2
    assert "a relative budget must come with the dense model as reference" in refused.stderr
