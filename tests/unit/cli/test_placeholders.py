"""Hints say the model, board, table and artifact of the command line that they answer, not words to replace."""

from __future__ import annotations

import pytest

from edgeprune import errors
from edgeprune.cli.hints import next_step
from edgeprune.errors import EdgepruneError

MODEL = ("net.py:build", "--input", "x=1x3x8x8")
EXPLAIN, PROFILE = "edgeprune explain MODEL", "edgeprune profile MODEL --energy --board BOARD"


@pytest.mark.parametrize(
    ("words", "hint", "said"),
    [
        (("prune", *MODEL, "--table", "t.parquet"), EXPLAIN, "edgeprune explain net.py:build --input x=1x3x8x8"),
        (("prune", "--latency", "9ms", "net.py:build", "--inputs", "a b.npz"), EXPLAIN, "build --inputs 'a b.npz'"),
        (("profile", *MODEL), PROFILE, "profile net.py:build --input x=1x3x8x8 --energy --board local"),
        (("profile", *MODEL, "--board", "pi"), PROFILE, "x=1x3x8x8 --energy --board pi"),
        (("profile", "a.py:one", "b.py:two", "--input", "x=1x3"), EXPLAIN, EXPLAIN),
        (("prune", *MODEL), PROFILE, "edgeprune profile net.py:build --input x=1x3x8x8 --energy --board BOARD"),
        (("compile", *MODEL, "--board", "pi"), "edgeprune device setup BOARD, which", "device setup pi, which"),
        (("compile", *MODEL), "edgeprune compile --board BOARD", "edgeprune compile --board BOARD"),
        (("prune", *MODEL, "--table", "t.json"), "edgeprune table card TABLE, or", "edgeprune table card t.json, or"),
        (("deploy", "out/engine"), "edgeprune deploy ARTIFACT", "edgeprune deploy out/engine"),
        (("deploy", "out", "--to", "cams"), "edgeprune doctor --board NAME", "edgeprune doctor --board NAME"),
        (("device", "probe", "pi"), "edgeprune doctor --board NAME", "edgeprune doctor --board pi"),
        (("device", "setup", "pi"), "edgeprune doctor --board NAME", "edgeprune doctor --board pi"),
        (("device", "add", "pi", "--ssh", "me@pi"), "edgeprune doctor --board NAME", "edgeprune doctor --board NAME"),
        (("prune", "--resume", "--out", "run"), EXPLAIN, EXPLAIN),
        (("device", "--json"), EXPLAIN, EXPLAIN),
        (("nonsense", "x"), EXPLAIN, EXPLAIN),
        ((), EXPLAIN, EXPLAIN),
        # What nobody but the user knows.
        (("prune", *MODEL), "--task FILE.py:FACTORY", "--task FILE.py:FACTORY"),
    ],
)
def test_what_the_command_line_tells_is_told_back(words: tuple[str, ...], hint: str, said: str) -> None:
    assert next_step(errors.ConfigError("it must fit.", hint=hint), words).endswith(said)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.EmptyPlanError, "edgeprune explain net.py:build --input x=1x3x8x8, which says what stays and why"),
        (errors.TableMissingError, "edgeprune profile net.py:build --input x=1x3x8x8 --board pi"),
        (errors.RemoteError, "edgeprune doctor --board pi"),
    ],
)
def test_so_does_what_helps_with_a_kind_of_error(kind: type[EdgepruneError], said: str) -> None:
    assert next_step(kind("it must fit."), ("prune", *MODEL, "--board", "pi")) == said
