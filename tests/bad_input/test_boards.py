"""Boards that cannot be reached, trusted or used: one line, exit 3 or 4, and whatever runs there goes on."""

from __future__ import annotations

import base64
import shutil
import socket
import sys
from pathlib import Path
from urllib.parse import urlencode

import pytest

from edgeprune.boards.known_hosts import fingerprint
from edgeprune.testing.command_line import CommandLine
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

DEPLOY = ("deploy", "second", "--rounds", "1", "--board")


def url(target: str, board: Path, **options: str) -> str:
    return f"ssh://{target}?{urlencode({'root': str(board), 'python': sys.executable, **options})}"


def server_key(sshd: OpenSshServer) -> str:
    return fingerprint(base64.b64decode(sshd.public_keys()[0].split()[1]))


def ssh_config(sshd: OpenSshServer, folder: Path, known_hosts: str, identity: Path | None = None) -> dict[str, str]:
    """Environment with an ssh_config like the server's own, with other known hosts or another key."""
    folder.mkdir()
    (folder / "known_hosts").write_text(known_hosts)
    text = sshd.config.read_text().replace(str(sshd.known_hosts), str(folder / "known_hosts"))
    (folder / "config").write_text(text.replace(str(sshd.identity), str(identity or sshd.identity)))
    return {"EDGEPRUNE_SSH_CONFIG": str(folder / "config")}


def test_a_board_nobody_added(edgeprune: CommandLine) -> None:
    edgeprune.refuse(*DEPLOY, "atlantis", code=2, parts=["the board must be one of local", "found 'atlantis'"])


@pytest.mark.loopback
def test_a_key_that_the_board_does_not_accept(over_ssh: CommandLine, sshd: OpenSshServer, tmp_path: Path) -> None:
    other = tmp_path / "other key"
    made = sshd.new_key(f"other_{tmp_path.name}")
    shutil.move(made, other)
    environment = ssh_config(sshd, tmp_path / "ssh", sshd.known_hosts.read_text(), identity=other)
    line = over_ssh.refuse(*DEPLOY, url("board", over_ssh.board), code=3, parts=[sshd.user], environment=environment)
    assert str(other) in line, "the key that was tried is named"


@pytest.mark.loopback
def test_a_host_key_that_is_not_known(over_ssh: CommandLine, sshd: OpenSshServer, tmp_path: Path) -> None:
    environment = ssh_config(sshd, tmp_path / "ssh", "")
    over_ssh.refuse(
        *DEPLOY,
        url("board", over_ssh.board),
        code=3,
        parts=["the host key of", "must be known", f"--host-key {server_key(sshd)}"],
        environment=environment,
    )
    assert (tmp_path / "ssh" / "known_hosts").read_text() == "", "no key is added silently"


@pytest.mark.loopback
def test_a_host_key_that_has_changed(over_ssh: CommandLine, sshd: OpenSshServer, tmp_path: Path) -> None:
    sshd.new_key(f"former_{tmp_path.name}")
    former = (sshd.folder / f"former_{tmp_path.name}.pub").read_text().split()
    known = f"[{sshd.host}]:{sshd.port} {former[0]} {former[1]}\n"
    environment = ssh_config(sshd, tmp_path / "ssh", known)
    over_ssh.refuse(
        *DEPLOY,
        url("board", over_ssh.board),
        code=3,
        parts=[fingerprint(base64.b64decode(former[1])), server_key(sshd), "changed", "ssh-keygen -R"],
        environment=environment,
    )
    assert (tmp_path / "ssh" / "known_hosts").read_text() == known


def test_a_port_that_nobody_listens_on(edgeprune: CommandLine) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        edgeprune.refuse(
            *DEPLOY, url(f"somebody@127.0.0.1:{port}", edgeprune.board), code=3, parts=[f"127.0.0.1:{port}"]
        )


@pytest.mark.loopback
def test_a_link_that_swallows_everything(over_ssh: CommandLine, sshd: OpenSshServer) -> None:
    with FaultyLink(sshd.host, sshd.port) as link:
        link.black_hole()
        address = url(
            f"{sshd.user}@{link.host}:{link.port}",
            over_ssh.board,
            identity=str(sshd.identity),
            host_key=server_key(sshd),
        )
        over_ssh.refuse(*DEPLOY, address, code=3, parts=[f"{link.host}:{link.port}"])


@pytest.mark.loopback
@pytest.mark.parametrize("python", ["/no/such/python3", "/bin/true"])
def test_a_board_without_python(over_ssh: CommandLine, python: str) -> None:
    over_ssh.refuse(
        *DEPLOY,
        url("board", over_ssh.board, python=python),
        code=4,
        parts=["needs python >= 3.6", f"none at {python}", "install python3", "--python"],
    )


@pytest.mark.loopback
@pytest.mark.parametrize("verb", ["deploy", "profile"])
def test_a_board_whose_python_lacks_the_runtime(over_ssh: CommandLine, bare_python: Path, verb: str) -> None:
    address = url("board", over_ssh.board, python=str(bare_python))
    profile = ("profile", "net.py:build", "--input", "image=1x3x16x16", "--minutes", "0.1", "--out", "new.parquet")
    over_ssh.refuse(
        *(DEPLOY if verb == "deploy" else (*profile, "--board")),
        address,
        code=4,
        parts=["onnxruntime", "edgeprune device setup"],
    )


@pytest.mark.loopback
def test_doctor_names_a_missing_runtime_once_with_its_reason(over_ssh: CommandLine, bare_python: Path) -> None:
    done = over_ssh.run("doctor", "--board", url("board", over_ssh.board, python=str(bare_python)))
    assert done.returncode == 4
    (line,) = [
        line for line in done.stdout.splitlines() if "onnxruntime" in line and not line.startswith(("ok", "missing:"))
    ]
    assert line.startswith("missing ")
    assert f"onnxruntime is not installed for {bare_python} (needed >= " in line
    assert f"-> edgeprune device setup '{url('board', over_ssh.board, python=str(bare_python))}'" in line
