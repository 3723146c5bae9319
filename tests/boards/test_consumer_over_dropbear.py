"""The documented program on a small board, while releases are switched over that board's own SSH server: dropbear and BusyBox."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from edgeprune.boards.board import Board
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.deploying import deploy
from edgeprune.testing.dropbear import DropbearServer

pytestmark = [pytest.mark.boards, pytest.mark.slow]

DOCUMENT = Path(__file__).parents[2] / "docs" / "deployment.md"


def test_program_answers_through_fifty_switches_with_whole_releases_only(
    small_board: DropbearServer, tiny_artifacts: list[Artifact], tmp_path: Path, host_with: Callable[[Path], None]
) -> None:
    import numpy as np
    import onnxruntime

    host_with(small_board.config)
    root = tmp_path / "board root; $(id)"
    url = f"ssh://board?python={quote(sys.executable)}&root={quote(str(root))}"
    values = np.random.default_rng(0).standard_normal((1, 20)).astype("float32")
    image = tmp_path / "an input.npy"
    np.save(image, values)
    said: dict[str, str] = {}
    for artifact in tiny_artifacts:
        release = deploy(artifact, url, rounds=1).release
        session = onnxruntime.InferenceSession(str(artifact.engine), providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: values})
        said[release] = f"{release} {scores.argmax()} {scores.max():.6g}"
    before, now = said
    program = tmp_path / "consumer.py"
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Using the release\n")[1]
    program.write_text(re.findall("```python\n(.*?)```", section, re.DOTALL)[0], encoding="utf-8")
    answered: list[str] = []
    with (
        Board.open(url) as board,
        subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "EDGEPRUNE_ROOT": str(root)},
        ) as consumer,
    ):
        assert consumer.stdin is not None
        assert consumer.stdout is not None

        def ask() -> str:
            answer = consumer.stdout.readline().strip()
            assert answer, "the program must live"
            return answer

        with board.hold("rollback"):
            for cycle in range(25):
                for verb, request, current in (
                    ("rollback", {"from": now, "verify": False}, before),
                    ("activate", {"folder": now}, now),
                ):
                    # An inference is under way while the link moves.
                    consumer.stdin.write(f"{image}\n")
                    assert board.call(verb, request)["current"] == current
                    answered.append(ask())
                    assert answered[-1] in said.values(), f"switch {2 * cycle}: neither release says so"
                    consumer.stdin.write(f"{image}\n")
                    assert ask() == said[current]
        consumer.stdin.close()
        assert consumer.wait(20) == 0
    assert len(answered) == 50
