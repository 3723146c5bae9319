"""ONNX Runtime is run on the host and on boards without writing its telemetry's files into the user's home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune.boards.onboard

pytest.importorskip("onnxruntime")

ONBOARD = Path(edgeprune.boards.onboard.__file__).parent
ON_HOST = """
import os
from edgeprune.backends.onnxruntime import engines
assert "ORT_DISABLE_TELEMETRY" not in os.environ, "the environment is the user's"
engines.onnxruntime.get_available_providers()
"""


def environment(home: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    return {**kept, "HOME": str(home), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def written(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for path in home.rglob("*") if "onnxruntime" in str(path.relative_to(home))]


def test_the_host_s_import_writes_nothing_into_the_home(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ON_HOST], env=environment(tmp_path), check=True)
    assert written(tmp_path) == []


def test_the_board_s_probe_which_imports_it_writes_nothing_into_the_home(tmp_path: Path) -> None:
    request = json.dumps({"root": str(tmp_path / "root")}) + "\n"
    done = subprocess.run(
        [sys.executable, str(ONBOARD), "probe"],
        input=request,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "onnxruntime" in json.loads(done.stdout.splitlines()[-1])["result"]["runtimes"]
    assert written(tmp_path) == []
