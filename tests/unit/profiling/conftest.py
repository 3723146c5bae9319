"""Tiny ONNX engines and this machine as a board with a root folder of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeprune.boards.board import Board


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board"))
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
    with Board.open("local") as opened:
        yield opened


@pytest.fixture(scope="session")
def conv_engine() -> Callable[..., bytes]:
    """Maker of engines of one convolution with `channels` in and out."""
    from onnx import TensorProto, helper

    def make(channels: int, size: int = 16) -> bytes:
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.01])
        shape = helper.make_tensor("shape", TensorProto.INT64, [4], [channels, channels, 3, 3])
        tensor = [1, channels, size, size]
        graph = helper.make_graph(
            [
                helper.make_node("ConstantOfShape", ["shape"], ["weight"], value=value),
                helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1, 1, 1, 1]),
            ],
            "conv",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, tensor)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, tensor)],
            [shape],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        return bytes(model.SerializeToString())

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size, as mount writes it."""
    place = tmp_path / "small disk"

    def mounted(size: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("mounting a small disk needs root")
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            place.rmdir()
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mounted
    if place.exists():
        subprocess.run(["umount", str(place)], check=True)
