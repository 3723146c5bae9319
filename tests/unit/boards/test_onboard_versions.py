"""What reaches a board needs no newer Python than 3.6 and no more of a shell than POSIX, as tools that know both tell."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import edgeprune.boards
from edgeprune.boards.carrying import carried
from edgeprune.boards.greeting import GREETING

vermin = pytest.importorskip("vermin", reason="pip install -e '.[dev]'")

BOARDS = Path(edgeprune.boards.__file__).parent
DOCUMENT = Path(__file__).parents[3] / "docs" / "deployment.md"
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted((BOARDS / "onboard").glob("*.py"))}
WORDS = {"greeting": GREETING, "carrying": carried("python3", "probe", b"")[0][2]}
EXAMPLE = re.findall(
    "```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8").split("\n## Using the release\n")[1], re.S
)[0]
OLDEST = (3, 6)
SHELLS = [words for words in (["dash"], ["busybox", "ash"], ["sh"]) if shutil.which(words[0])]
GIVEN_BY_THE_USER = {("hooks.py", "command"), ("power_meter.py", "text"), ("ssh_route.py", "exec {hop.command}")}


def needs(source: str, name: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None, str]:
    """Oldest Python 2 and Python 3 that run a source (None: none does), and what asks for them."""
    config = vermin.Config()
    config.set_verbose(2)
    config.set_eval_annotations(True)
    found = vermin.visit(source, config, name)
    two, three = found.minimum_versions()
    return two, three, found.output_text()


def complaint(source: str, name: str) -> str | None:
    """What of a source Python 3.6 does not have, or None."""
    _, three, told = needs(source, name)
    if three is not None and three <= OLDEST:  # (0, 0) is of a source that asks for nothing
        return None
    newer = [line for line in told.splitlines() if not re.search(r"\b(2\.\d+|~3|3\.[0-6])$", line)]
    return f"{name} needs Python {three}: {newer or told}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_an_onboard_file_needs_no_newer_python(name: str) -> None:
    assert complaint(SOURCES[name], name) is None


@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_word_that_a_board_is_started_with_needs_no_newer_python(name: str) -> None:
    assert complaint(WORDS[name], name) is None


def test_the_greeting_is_python_2_too_so_that_an_old_board_is_told_its_version() -> None:
    assert needs(GREETING, "greeting")[0] is not None


def test_the_program_that_the_documentation_shows_runs_where_the_runner_does() -> None:
    assert complaint(EXAMPLE, "docs/deployment.md") is None


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ("import subprocess\nsubprocess.run(['a'], capture_output=True)", "capture_output"),
        ("import time\ntime.time_ns()", "time_ns"),
        ("if (n := 1):\n    pass", "named expressions"),
        ("'ab'.removeprefix('a')", "removeprefix"),
        ("def f(a, /):\n    pass", "positional-only"),
        ("from __future__ import annotations", "annotations"),
        ("import dataclasses", "dataclasses"),
        ("with (open('a') as a, open('b') as b):\n    pass", "parenthes"),
    ],
)
def test_what_python_3_6_lacks_is_found(planted: str, told: str) -> None:
    found = complaint(planted + "\n" + SOURCES["store.py"], "store.py")
    assert found is not None
    assert told in found


class Snippet(NamedTuple):
    """A script for a board's shell: where it stands, and its text, or what of it only the user knows."""

    file: str
    text: str
    known: bool


def snippets() -> Iterator[Snippet]:
    """Every ``["sh", "-c", script, ...]`` of the package's part for boards."""
    for path in sorted(BOARDS.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.List):
                continue
            words = [word.value if isinstance(word, ast.Constant) else word for word in node.elts]
            for word, after, script in zip(words, words[1:], [*words[2:], None], strict=False):
                if word not in ("sh", "/bin/sh"):
                    continue
                if isinstance(after, ast.Name) and after.id in constants:  # a shell that the script before it starts
                    yield Snippet(path.name, str(constants[after.id]), True)
                elif after == "-c" and isinstance(script, ast.Name):
                    yield Snippet(path.name, str(constants.get(script.id, script.id)), script.id in constants)
                elif after == "-c" and isinstance(script, ast.JoinedStr):
                    yield Snippet(path.name, ast.unparse(script)[2:-1], False)
                elif after == "-c":
                    yield Snippet(path.name, str(script), True)


FOUND = list(snippets())


def test_all_scripts_for_shells_are_looked_at() -> None:
    from edgeprune.boards import ssh_commands, ssh_files, ssh_shell_files

    texts = {snippet.text for snippet in FOUND if snippet.known}
    assert {ssh_commands._LEAD, ssh_commands._COMMAND, ssh_commands._GUARD, ssh_files._HASH} <= texts
    assert {ssh_shell_files._SIZE, ssh_shell_files._WRITE, ssh_shell_files._READ} <= texts
    assert {(snippet.file, snippet.text) for snippet in FOUND if not snippet.known} == GIVEN_BY_THE_USER


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_the_scripts_are_ones_of_a_posix_shell(shell: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script"
    for snippet in FOUND:
        if snippet.known:
            script.write_text(snippet.text + "\n")
            done = subprocess.run([*shell, "-n", str(script)], capture_output=True, text=True, timeout=20)
            assert (done.returncode, done.stderr) == (0, ""), f"{snippet.file}: {snippet.text}"
    script.write_text("case $x in a) echo;; esac | (\n")
    assert subprocess.run([*shell, "-n", str(script)], capture_output=True, timeout=20).returncode != 0
