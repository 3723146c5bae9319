"""Environments on the board, driven as the host drives them: one process per verb, killed wherever it hurts."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import edgeprune.boards
from edgeprune.testing.wheels import write_wheel

ONBOARD = Path(edgeprune.boards.__file__).parent / "onboard"
STATES = ("board:unpacked", "board:built", "board:used")
ID, OTHER = "0123456789abcdef", "fedcba9876543210"


class Runner:
    """A board's folder, driven through the runner by one of the board's Pythons."""

    def __init__(self, root: Path, python: str = sys.executable) -> None:
        self.root, self.python = root, python

    def call(self, verb: str, **request: Any) -> Any:
        done = subprocess.run(
            [self.python, str(ONBOARD), verb],
            input=json.dumps({"root": str(self.root), **request}) + "\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode == 137:
            return "killed"
        event = json.loads(done.stdout.splitlines()[-1])
        return event["result"] if event["event"] == "result" else event

    def store(self, wheel: Path) -> dict[str, str]:
        """Put a wheel into the store."""
        content = wheel.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / "store").mkdir(parents=True, exist_ok=True)
        (self.root / "store" / sha256).write_bytes(content)
        return {"name": wheel.name, "sha256": sha256}

    def build(self, *wheels: Path, identity: str = ID, **request: Any) -> Any:
        entries = [self.store(wheel) for wheel in wheels]
        return self.call("environment", action="build", id=identity, wheels=entries, **request)

    @property
    def used(self) -> str | None:
        return self.call("environment", action="status")["used"]  # type: ignore[no-any-return]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "board root")


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    return write_wheel(
        tmp_path,
        "hello",
        "1.0",
        {
            "hello/__init__.py": b"text = 'hello'\n",
            "hello-1.0.data/scripts/say-hello": b"#!/bin/sh\necho hello\n",
            "hello-1.0.data/data/share/hello.txt": b"hello",
            "hello-1.0.data/purelib/more.py": b"",
        },
    )


def test_an_environment_is_built_aside_and_used_only_when_told(runner: Runner, hello: Path) -> None:
    built = runner.build(hello, record={"packages": {"hello": "1.0"}})
    assert built == {"name": ID, "python": str(runner.root / "environments" / ID / "bin" / "python"), "reused": False}
    assert runner.used is None
    said = subprocess.run(
        [built["python"], "-c", "import hello, more; print(hello.text)"], capture_output=True, text=True
    )
    assert said.stdout == "hello\n"
    folder = runner.root / "environments" / ID
    assert (folder / "share" / "hello.txt").read_text() == "hello"
    assert subprocess.run([folder / "bin" / "say-hello"], capture_output=True).stdout == b"hello\n"
    used = runner.call("environment", action="use", name=ID, blobs=[runner.store(hello)["sha256"]])
    assert used == {"used": ID, "changed": True, "removed": []}
    assert (runner.root / "environment").readlink() == Path("environments", ID)
    assert list((runner.root / "store").iterdir()) == [], "what it was made of need not stay"
    assert runner.build(hello)["reused"]
    status = runner.call("environment", action="status")
    assert status["environments"][ID]["packages"] == {"hello": "1.0"}


def test_it_sees_nothing_of_the_system_s_packages_and_tells_the_probe_what_it_is(runner: Runner, hello: Path) -> None:
    built = runner.build(hello, record={"packages": {"hello": "1.0"}})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([built["python"], "-c", "import numpy"], capture_output=True, text=True, env=environment)
    assert "No module named 'numpy'" in done.stderr
    facts = Runner(runner.root, built["python"]).call("probe")["facts"]
    assert (facts["environment"]["name"], facts["environment"]["packages"]) == (ID, {"hello": "1.0"})
    assert "environment" not in runner.call("probe")["facts"]


@pytest.mark.parametrize("state", STATES)
def test_killed_anywhere_what_is_used_is_whole_and_a_second_run_converges(
    runner: Runner, hello: Path, tmp_path: Path, state: str
) -> None:
    runner.build(hello, identity=OTHER)
    runner.call("environment", action="use", name=OTHER)
    fault = {"fault": f"after:{state}"}
    outcome = [runner.build(hello, **fault)]
    if outcome[0] != "killed":
        outcome.append(runner.call("environment", action="use", name=ID, **fault))
    assert "killed" in outcome
    now = runner.used
    assert now in (ID, OTHER)
    python = runner.root / "environment" / "bin" / "python"
    assert subprocess.run([python, "-c", "import hello"]).returncode == 0
    assert runner.build(hello)["name"] == ID
    assert runner.call("environment", action="use", name=ID)["used"] == ID
    assert {path.name for path in (runner.root / "environments").iterdir()} <= {ID, OTHER}


def test_what_does_not_work_is_built_anew_under_another_name(runner: Runner, hello: Path) -> None:
    runner.build(hello)
    runner.call("environment", action="use", name=ID)
    again = runner.build(hello, anew=ID)
    assert (again["name"], again["reused"]) == (f"{ID}-2", False)
    assert runner.used == ID
    runner.call("environment", action="use", name=f"{ID}-2")
    third = runner.build(hello, anew=f"{ID}-2")
    assert third["name"] == ID, "the one before still works, for all that the board knows"
    assert runner.call("environment", action="drop", name=f"{ID}-2") == {"removed": None}, "it is used"


def test_a_build_whose_host_is_gone_is_waited_for(runner: Runner, hello: Path) -> None:
    runner.root.mkdir()
    with (runner.root / "environment.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for event in (runner.build(hello), runner.call("clean")):
            assert event["error"] == "BoardBusyError"
            assert "found a run that lost its host and still builds one" in event["message"]
    assert not runner.build(hello)["reused"]


def test_the_one_before_is_kept_and_older_ones_go(runner: Runner, hello: Path) -> None:
    for number in range(3):
        name = f"{number:016x}"
        runner.build(hello, identity=name)
        used = runner.call("environment", action="use", name=name)
    assert used["removed"] == [f"{0:016x}"]
    assert {path.name for path in (runner.root / "environments").iterdir()} == {f"{1:016x}", f"{2:016x}"}


def test_a_python_that_did_not_make_it_does_not_get_it(runner: Runner, hello: Path, tmp_path: Path) -> None:
    from edgeprune.boards.board import Board
    from edgeprune.boards.local import LocalTransport

    runner.build(hello)
    runner.call("environment", action="use", name=ID)
    venv.create(tmp_path / "other", with_pip=False, symlinks=True)
    # Another version below the same prefix, as a distribution has them.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 6, 9, 'final', 0)")
    older = tmp_path / "python3.6"
    older.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    older.chmod(0o755)
    others = (str(tmp_path / "other" / "bin" / "python"), str(older))
    for python, own in ((sys.executable, True), *((other, False) for other in others)):
        with Board(LocalTransport(), name="board", python=python, root=str(runner.root)) as board:
            assert board.base_python == python
            assert board.python == (str(runner.root / "environment" / "bin" / "python") if own else python)
    (runner.root / "environment" / "bin" / "python").unlink()
    with Board(LocalTransport(), name="board", python=sys.executable, root=str(runner.root)) as board:
        assert board.python == sys.executable, "its Python is gone"


BAD = {
    "listed": ({}, {"bad.py": b"not what is listed"}, "must hold bad.py as it lists it, found other content"),
    "unlisted": ({"stray.py": b""}, {}, "must list all of its files, found stray.py unlisted"),
    "outside": ({"../outside.py": b""}, {}, "must keep its files inside the environment, found '../outside.py'"),
    "absolute": ({"/etc/outside.py": b""}, {}, "must keep its files inside the environment, found '/etc/outside.py'"),
    "folders": ({"bad-1.0.data/elsewhere/x": b""}, {}, "must use the folders data, headers, platlib, purelib, scripts"),
    "two": (
        {"other-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\n"},
        {},
        "must describe itself in one .dist-info folder",
    ),
    "version": ({}, {"bad-1.0.dist-info/WHEEL": b"Wheel-Version: 2.0\n"}, "must have version 1 of the format, found 2"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_wheel_is_refused_and_leaves_nothing(runner: Runner, tmp_path: Path, kind: str) -> None:
    unlisted, altered, message = BAD[kind]
    wheel = write_wheel(tmp_path, "bad", "1.0", {"bad.py": b""}, unlisted=unlisted, altered=altered)
    event = runner.build(wheel)
    assert event["error"] == "TransferError"
    assert message in event["message"]
    assert list((runner.root / "environments").iterdir()) == []
    assert not (runner.root.parent / "outside.py").exists()


def test_what_is_no_wheel_and_what_the_disk_damaged_are_refused(runner: Runner, hello: Path, tmp_path: Path) -> None:
    (tmp_path / "not-1.0-py3-none-any.whl").write_bytes(b"not a zip file")
    assert "must be a whole wheel" in runner.build(tmp_path / "not-1.0-py3-none-any.whl")["message"]
    entry = runner.store(hello)
    (runner.root / "store" / entry["sha256"]).write_bytes(b"damaged")
    event = runner.call("environment", action="build", id=ID, wheels=[entry])
    assert "must have sha256" in event["message"]
    assert not (runner.root / "store" / entry["sha256"]).exists(), "the next upload sends it anew"


def _rewritten(wheel: Path, but: str = "nothing") -> None:
    """Write a wheel anew, compressed and without one of its files."""
    with zipfile.ZipFile(wheel) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if not name.endswith(but)}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in kept.items():
            archive.writestr(name, content)


def _without_record(wheel: Path) -> None:
    _rewritten(wheel, "/RECORD")


def _with_damaged_stream(wheel: Path) -> None:
    _rewritten(wheel)
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo("hello/__init__.py")
    content = bytearray(wheel.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    content[start : start + info.compress_size] = b"\xff" * info.compress_size
    wheel.write_bytes(content)


def _encrypted(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    wheel.write_bytes(content)


@pytest.mark.parametrize("damage", [_without_record, _with_damaged_stream, _encrypted])
def test_a_damaged_wheel_is_refused_and_leaves_nothing(runner: Runner, hello: Path, damage: Any) -> None:
    damage(hello)
    event = runner.build(hello)
    assert (event.get("error"), list((runner.root / "environments").iterdir())) == ("TransferError", [])
    assert "must be a whole wheel" in event["message"]


def test_clean_tells_what_it_removes_and_leaves_releases_alone(runner: Runner, hello: Path) -> None:
    runner.build(hello)
    runner.call("environment", action="use", name=ID)
    release = runner.root / "releases" / ID
    release.mkdir(parents=True)
    (runner.root / "current").symlink_to(Path("releases", ID))
    work = runner.root / "tensorrt" / ("0a" * 16)
    work.mkdir(parents=True)
    (work / "engine.plan").write_bytes(b"an engine")
    (runner.root / "store" / "ab").hardlink_to(work / "engine.plan")
    (work / "build.log").write_bytes(b"log")
    (release / "engine.plan").write_bytes(b"another engine")
    (work / "kept.plan").hardlink_to(release / "engine.plan")
    (work.parent / "timing-10.3.0.cache").write_bytes(b"cache")
    planned = runner.call("clean", dry_run=True)
    assert (runner.root / "environment").exists()
    done = runner.call("clean")
    gone = [entry["what"] for entry in done["removed"]]
    assert done["removed"] == planned["removed"]
    freed = {entry["what"]: entry["bytes"] for entry in done["removed"]}
    assert freed[str(runner.root / "store" / "ab")] == 0, "the build has it too"
    assert freed[str(work)] == len(b"an engine") + len(b"log"), "what a release has too is not freed"
    assert [path.name for path in work.parent.iterdir()] == ["timing-10.3.0.cache"]
    assert {str(runner.root / "environment"), str(runner.root / "environments")} <= set(gone)
    assert any(Path(what).parent.name == "store" for what in gone), "uploads that no release needs"
    assert done["current"] == ID
    assert release.is_dir()
    assert runner.call("clean")["removed"] == []
    everything = runner.call("clean", releases=True)
    assert str(runner.root / "releases") in [entry["what"] for entry in everything["removed"]]
    assert not runner.root.exists()
    assert runner.call("clean") == {"removed": [], "current": None}


def test_clean_waits_for_a_build_of_an_engine_that_still_runs(runner: Runner) -> None:
    work = runner.root / "tensorrt" / ("0a" * 16)
    work.mkdir(parents=True)
    with subprocess.Popen(["sleep", "30"]) as orphan:
        started = int(Path(f"/proc/{orphan.pid}/stat").read_text().rpartition(")")[2].split()[19])
        (work / "build.log").touch()
        (work / "build.json").write_text(json.dumps({"identity": "", "pid": orphan.pid, "started": started}))
        event = runner.call("clean", releases=True)
        orphan.kill()
    assert (event["error"], work.is_dir()) == ("BoardBusyError", True)
    assert f"process {orphan.pid}" in event["message"]
    assert runner.call("clean", releases=True)["current"] is None
    assert not runner.root.exists()


def test_clean_leaves_what_is_not_edgeprune_s(runner: Runner) -> None:
    runner.root.mkdir()
    (runner.root / "mine.txt").write_text("mine")
    runner.call("clean", releases=True)
    assert [path.name for path in runner.root.iterdir()] == ["mine.txt"]
