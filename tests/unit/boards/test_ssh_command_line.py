"""What the account's shell is given must mean the same to every shell, in a process group of its own or not."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.boards.ssh_commands import MAX_COMMAND_BYTES, command_line
from edgeprune.errors import ConfigError
from edgeprune.testing.transport import AWKWARD

SHELLS = [name for name in ("sh", "bash", "dash", "zsh", "mksh", "fish", "busybox") if shutil.which(name)]


def started(shell: str, argv: list[str], *, leader: bool = True, stdin: bytes = b"go\n") -> subprocess.CompletedProcess:
    """Give a command line to a shell as a server would."""
    program = [shell, "sh"] if shell == "busybox" else [shell]
    return subprocess.run(
        [*program, "-c", command_line(argv, "TAG")],
        input=stdin,
        capture_output=True,
        start_new_session=leader,
        timeout=20,
    )


@pytest.mark.parametrize("leader", [True, False], ids=["leads a group", "is in our group"])
@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_survive_the_shell(shell, leader):
    done = started(shell, ["printf", "<%s>\\0", *AWKWARD], leader=leader)
    assert done.stdout.decode() == "TAG\n" + "".join(f"<{text}>\0" for text in AWKWARD)
    assert done.returncode == 0


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_any_argument_survives(text):
    assert started("sh", ["printf", "%s", text]).stdout.decode() == f"TAG\n{text}"


@pytest.mark.parametrize("leader", [True, False], ids=["leads a group", "is in our group"])
def test_the_number_that_is_told_is_that_of_the_process_group(leader):
    done = started("sh", ["sh", "-c", "ps -o pgid= -p $$; echo $$"], leader=leader)
    group, pid = done.stdout.decode().split()[1:]
    assert done.stderr.decode().split() == ["TAG", group]
    assert group == pid


def test_what_follows_the_word_go_is_the_input():
    assert started("sh", ["cat"], stdin=b"go\nfirst\n\0second").stdout == b"TAG\nfirst\n\0second"


@pytest.mark.parametrize("stdin", [b"", b"no\n", b"g"])
def test_without_the_word_go_nothing_is_started(stdin, tmp_path):
    done = started("sh", ["touch", str(tmp_path / "started")], stdin=stdin)
    assert done.returncode == 125
    assert not (tmp_path / "started").exists()


def test_bytes_that_are_no_text_survive():
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert started("sh", ["printf", "%s", name]).stdout == b"TAG\ncaf\xe9"


@pytest.mark.parametrize("argv", [[], ["echo", "a\0b"], ["echo", "x" * MAX_COMMAND_BYTES]])
def test_what_cannot_be_a_command_line_is_refused(argv):
    with pytest.raises(ConfigError, match="a command"):
        command_line(argv, "TAG")
