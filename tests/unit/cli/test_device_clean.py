"""What ``edgeprune device clean`` advises next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.testing.command_line import CommandLine


@pytest.mark.parametrize("releases", [True, False])
def test_after_a_dry_run_the_next_command_removes_the_same(tmp_path: Path, releases: bool) -> None:
    options = ["--releases"] if releases else []
    line = CommandLine(tmp_path, tmp_path / "root")
    told = json.loads(line.succeed("device", "clean", "local", "--dry-run", "--json", *options))
    assert told["next"] == " ".join(["edgeprune device clean local", *options])
