"""What ``edgeprune device clean`` advises next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("releases", [True, False])
def test_after_a_dry_run_the_next_command_removes_the_same(tmp_path: Path, releases: bool) -> None:
    options = ["--releases"] if releases else []
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "device", "clean", "local", "--dry-run", "--json", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "EDGEPRUNE_ROOT": str(tmp_path / "root"), "EDGEPRUNE_CONFIG": str(tmp_path / "boards.toml")},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["next"] == " ".join(["edgeprune device clean local", *options])
