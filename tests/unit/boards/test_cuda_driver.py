"""How many multiprocessors a GPU has, by a library with the driver's documented functions that is compiled here: *emulated*."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.boards.board import Board

# CUDA Driver API: cuda.h.
STUB = """
int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDeviceGet(int *device, int ordinal) { *device = 77; return ordinal ? 101 : 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 16 && device == 77 ? COUNT : 1024;
    return 0;
}
int cuGetErrorName(int status, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return status != 100; }
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compiles a driver, and lets the board's programs find it."""

    def made(**values: int) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("the emulated driver needs a C compiler (cc or gcc), this machine has none")
        folder = tmp_path / "driver"
        folder.mkdir()
        (folder / "cuda.c").write_text(STUB)
        defines = [f"-D{name}={value}" for name, value in values.items()]
        library = str(folder / "libcuda.so.1")
        subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", library, str(folder / "cuda.c")], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))

    return made


def test_the_driver_says_how_many_there_are(driver: Callable[..., None], board: Board) -> None:
    driver(INIT=0, COUNT=132)
    found = board.probe()
    assert found.facts["multiprocessors"] == 132
    assert not [sentence for sentence in found.absences if "multiprocessors" in sentence]


def test_a_driver_without_a_device_says_so_and_nothing_is_made_up(driver: Callable[..., None], board: Board) -> None:
    driver(INIT=100, COUNT=132)
    found = board.probe()
    assert "multiprocessors" not in found.facts
    assert (
        "how many multiprocessors the GPU has is not known: libcuda.so.1: cuInit says CUDA_ERROR_NO_DEVICE."
        in found.absences
    )


@pytest.mark.skipif(any(Path("/usr/lib").glob("*/libcuda.so.1")), reason="this machine has a driver of its own")
def test_a_board_without_a_driver_lacks_nothing(board: Board) -> None:
    found = board.probe()
    assert "multiprocessors" not in found.facts
    assert not [sentence for sentence in found.absences if "multiprocessors" in sentence]
