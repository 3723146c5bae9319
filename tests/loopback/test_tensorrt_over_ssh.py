"""A TensorRT engine built behind a real OpenSSH server, by a stand-in for trtexec, over a link that is lost meanwhile."""

from __future__ import annotations

import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgeprune.backends.tensorrt import building
from edgeprune.backends.tensorrt.flags import BuildOptions
from edgeprune.boards.board import Board
from edgeprune.boards.ssh import SshTransport
from edgeprune.errors import BoardBusyError, RemoteError
from edgeprune.files import sha256_of
from edgeprune.testing import trtexec
from edgeprune.testing.proxy import FaultyLink

pytestmark = pytest.mark.loopback

DATA = Path(__file__).parents[1] / "data" / "trtexec"
DEADLINE_S = 30.0


def build(transport: SshTransport, python: Path, root: Path, path: Path) -> dict[str, Any]:
    board = Board(transport, name="far", python=str(python), root=str(root))
    model = building.Model(b"a model", {}, {})
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            return building.build(board, building.version_on(board), model, BuildOptions(), path)
        except BoardBusyError:
            # The lock of the host that was lost goes when the board sees the end of the link.
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_a_build_goes_on_when_the_link_is_lost_and_is_taken_up(
    board: SshTransport, far_board: SshTransport, link: FaultyLink, tmp_path: Path
) -> None:
    folder, root = tmp_path / "bin", tmp_path / "root"
    recorded = {name: DATA / f"resnet18.{name}.json" for name in ("layers", "profile", "times")}
    trtexec.install(folder, "10.3.0", build_s=2.0, **recorded)
    # A session over SSH has a PATH of its own; the board's Python is the place to add to it.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPATH={shlex.quote(str(folder))}:$PATH exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    with ThreadPoolExecutor(1) as other:
        lost = other.submit(build, far_board, python, root, tmp_path / "lost.plan")
        end = time.monotonic() + DEADLINE_S
        while not list(root.glob("tensorrt/*/build.json")):
            assert time.monotonic() < end, lost.exception() if lost.done() else "it was not started"
            time.sleep(0.02)
        link.cut()
        with pytest.raises(RemoteError):
            lost.result(DEADLINE_S)
    started = next(root.glob("tensorrt/*/build.json")).read_text()
    record = build(board, python, root, tmp_path / "engine.plan")
    assert record["engine_sha256"] == sha256_of(tmp_path / "engine.plan")
    assert next(root.glob("tensorrt/*/build.json")).read_text() == started, "it was started a second time"
    assert not (tmp_path / "lost.plan").exists()
