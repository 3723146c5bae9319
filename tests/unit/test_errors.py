"""The page on errors names every class with the exit code that it has, and every class has a next step on the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeprune import errors
from edgeprune.cli.hints import next_step
from edgeprune.errors import EdgepruneError

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, EdgepruneError) and kind.__module__ == errors.__name__
}


def made(kind: type[EdgepruneError], hint: str | None = None) -> EdgepruneError:
    if issubclass(kind, errors.BudgetInfeasibleError):
        return kind("it must fit, found more.", best_ms=1.0, hint=hint)
    if issubclass(kind, errors.IncompatibleTargetError):
        return kind("memory", "2 MB", "1 MB", hint=hint)
    return kind("it must fit, found more.", hint=hint)


def test_the_page_names_every_class_with_its_exit_code() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (\d) \|", PAGE.read_text(), re.MULTILINE))
    assert told == {name: str(kind.exit_code) for name, kind in CLASSES.items()}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_has_a_next_step_on_the_command_line(name: str) -> None:
    assert len(next_step(made(CLASSES[name]), ["prune", "--json"])) > 5
    assert next_step(made(CLASSES[name], "this"), ["prune"]) == "this"


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("--task FACTORY, whose training data are taken; golden_inputs= in Python", None),
        ("columns={'in_channels': ...}", "--column in_channels=COLUMN"),
        ("columns={'width': 'the width'} (there are: w)", "--column 'width=the width' (there are: w)"),
        ("columns={'in_channels': ...} (there are: a)", "--column in_channels=COLUMN (there are: a)"),
        ("constants={'batch': ...}", "--constant batch=VALUE"),
        ("constants={'precision': 'fp16'} with where={'p': 'half'}", "--constant precision=fp16 with --where p=half"),
        ("where={'conv type': 'Regular'} (there are: Regular)", "--where 'conv type=Regular' (there are: Regular)"),
        ("where={...: '2'}", "--where COLUMN=2"),
        ("facts={'isa': ['avx2', 'fma']}", """--fact 'isa=["avx2", "fma"]'"""),
        ("latency_ms=... (there are: a, b)", "--latency-ms COLUMN (there are: a, b)"),
        ("latency_ms='time_ms' (there are: a, b)", "--latency-ms time_ms (there are: a, b)"),
        ("where={...: 2}, and one table for each", "--where COLUMN=2, and one table for each"),
        ("latency_us='latency_us'", "--latency-us latency_us"),
        ('latency_ms="latency_ms"', "--latency-ms latency_ms"),
        (
            "latency_us= or latency_s=, if the column is in these",
            "--latency-us or --latency-s, if the column is in these",
        ),
        ("skip_invalid=True, if that marks a failed run", "--skip-invalid, if that marks a failed run"),
        ("min_width={'layers.*': 8}", "--min-width 'layers.*=8'"),
        ("--input x=1x3:float32", "--input x=1x3:float32"),
    ],
)
def test_hints_of_the_library_are_told_as_options(hint: str, said: str | None) -> None:
    expected = "--task FACTORY, whose training data are taken" if said is None else said
    assert next_step(errors.ConfigError("it must fit.", hint=hint), ["table", "import"]) == expected


def test_usage_names_the_verb() -> None:
    assert next_step(errors.ConfigError("it must fit."), ["--json", "deploy", "x"]) == "edgeprune deploy --help"
    assert next_step(errors.ConfigError("it must fit."), []) == "edgeprune --help"
