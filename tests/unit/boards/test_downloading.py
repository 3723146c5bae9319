"""Choosing wheels for another machine with this machine's own pip, from a folder instead of an index."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.boards.downloading import download, pip_arguments
from edgeprune.boards.wheels import WheelTarget
from edgeprune.errors import WheelUnavailableError
from edgeprune.testing.wheels import write_wheel

BOARD = WheelTarget(
    "3.9.2", "cp39", ("manylinux_2_31_aarch64", "manylinux_2_17_aarch64", "linux_aarch64"), "glibc 2.31"
)
NEW, OLD = "cp39-cp39-manylinux_2_34_aarch64", "cp39-cp39-manylinux_2_17_aarch64"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip finds; nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def test_the_newest_that_fits_comes_with_what_it_depends_on(index: Path, tmp_path: Path) -> None:
    write_wheel(index, "runtime", "2.0", {"runtime.py": b""}, tag=NEW)
    write_wheel(index, "runtime", "1.5", {"runtime.py": b""}, tag=OLD, requires=["Needed.Thing>=1"])
    write_wheel(index, "runtime", "1.0", {"runtime.py": b""}, tag=OLD)
    write_wheel(index, "needed_thing", "1.2", {"needed.py": b""})
    told: list[str] = []
    (tmp_path / "out").mkdir()
    found = download(["runtime>=1"], BOARD, tmp_path / "out", progress=told.append)
    assert [(wheel.name, wheel.version) for wheel in found] == [("needed-thing", "1.2"), ("runtime", "1.5")]
    assert all(wheel.path.stat().st_size == wheel.size_bytes for wheel in found)
    assert any("runtime-1.5" in line for line in told)


def test_a_version_without_a_fitting_wheel_is_refused_with_those_that_have_one(index: Path, tmp_path: Path) -> None:
    write_wheel(index, "runtime", "2.0", {"runtime.py": b""}, tag=NEW)
    write_wheel(index, "runtime", "1.5", {"runtime.py": b""}, tag=OLD)
    (tmp_path / "out").mkdir()
    with pytest.raises(WheelUnavailableError) as caught:
        download(["runtime==2.0"], BOARD, tmp_path / "out")
    assert caught.value.fitting == ("1.5",)
    assert "a wheel of runtime==2.0 must fit CPython 3.9.2 on aarch64 with glibc 2.31" in caught.value.message
    assert "looked for cp39 with manylinux_2_31_aarch64 to manylinux_2_17_aarch64" in caught.value.message
    assert caught.value.hint == "--runtime-version 1.5"
    with pytest.raises(WheelUnavailableError, match="no version has one"):
        download(["nothing"], BOARD, tmp_path / "out")


def test_versions_of_a_dependency_are_not_taken_for_those_of_the_runtime(index: Path, tmp_path: Path) -> None:
    write_wheel(index, "runtime", "1.5", {"runtime.py": b""}, tag=OLD, requires=["needed.thing>=2"])
    write_wheel(index, "needed_thing", "1.2", {"needed.py": b""}, tag=OLD)
    (tmp_path / "out").mkdir()
    with pytest.raises(WheelUnavailableError) as caught:
        download(["Runtime==1.5"], BOARD, tmp_path / "out")
    assert caught.value.fitting == ()
    assert "versions with one: 1.2" in caught.value.message
    assert caught.value.hint == "another version of runtime, which depends on another needed-thing: --runtime-version"


def test_pip_is_asked_for_the_board_s_platform_and_for_no_sources() -> None:
    words = pip_arguments(["runtime"], BOARD, Path("out"))
    assert words[words.index("--only-binary") + 1] == ":all:"
    assert words[words.index("--python-version") + 1] == "3.9.2"
    assert [words[at + 1] for at, word in enumerate(words) if word == "--platform"] == list(BOARD.platforms)


def test_an_index_that_cannot_be_reached_is_told_apart_from_one_that_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(WheelUnavailableError, match="must reach a package index") as caught:
        download(["runtime"], BOARD, tmp_path)
    assert caught.value.fitting is None
    assert "PIP_INDEX_URL" in (caught.value.hint or "")
