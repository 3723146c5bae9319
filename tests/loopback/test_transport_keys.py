"""Whom the SSH transport trusts, and how it logs in, against real servers."""

from __future__ import annotations

import os
import subprocess

import pytest

from edgeprune.boards.ssh import SshTransport
from edgeprune.boards.ssh_config import resolve, with_overrides
from edgeprune.boards.ssh_connection import show_host_key
from edgeprune.errors import AuthError, ConfigError, ConnectError, HostKeyError
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback


def refused(error: type[Exception], transport: SshTransport) -> str:
    """The one-line message with which the first call fails."""
    with transport, pytest.raises(error) as caught:
        transport.run(["true"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fingerprint_of(server, kind: str = "ed25519") -> str:
    """What ssh-keygen says of a server's key."""
    path = server.folder / f"host_{kind}.pub"
    return subprocess.run(["ssh-keygen", "-lf", path], check=True, capture_output=True, text=True).stdout.split()[1]


def test_unknown_host_key_is_refused_and_nothing_is_written(sshd, tmp_path):
    empty = tmp_path / "known_hosts"
    empty.write_text("")
    message = refused(HostKeyError, SshTransport(sshd.target, identity=sshd.identity, known_hosts=empty))
    assert "must be known" in message
    assert f"edgeprune device add NAME --ssh {sshd.target} --host-key {fingerprint_of(sshd)}" in message
    assert empty.read_text() == ""


def test_unknown_host_is_not_told_who_we_are(new_server, tmp_path):
    server = new_server()
    refused(HostKeyError, SshTransport(server.target, identity=server.identity, known_hosts=tmp_path / "none"))
    assert "publickey" not in server.log


def test_changed_host_key_names_the_old_line(sshd, new_server, tmp_path):
    other = new_server().public_keys()[0]
    known = tmp_path / "known_hosts"
    known.write_text(f"# boards\n[{sshd.host}]:{sshd.port} {other}\n")
    message = refused(HostKeyError, SshTransport(sshd.target, identity=sshd.identity, known_hosts=known))
    assert f"{known}:2" in message
    assert fingerprint_of(sshd) in message
    assert "changed" in message


def test_revoked_host_key_is_refused_even_if_pinned(sshd, tmp_path):
    known = tmp_path / "known_hosts"
    key = sshd.public_keys()[0]
    known.write_text(f"[{sshd.host}]:{sshd.port} {key}\n@revoked * {key}\n")
    for pin in (None, fingerprint_of(sshd)):
        transport = SshTransport(sshd.target, identity=sshd.identity, known_hosts=known, host_key=pin)
        assert f"{known}:2" in refused(HostKeyError, transport)


def test_certificate_authority_and_broken_lines_do_not_stop_a_known_host(sshd, tmp_path):
    known = tmp_path / "known_hosts"
    key = sshd.public_keys()[0]
    known.write_text(f"nonsense\n@cert-authority * {key}\n[{sshd.host}]:{sshd.port} {key}\n")
    with SshTransport(sshd.target, identity=sshd.identity, known_hosts=known) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


def test_hashed_name_with_port_is_known(sshd, tmp_path):
    known = tmp_path / "known_hosts"
    known.write_text(sshd.known_hosts.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    with SshTransport(sshd.target, identity=sshd.identity, known_hosts=known) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


@pytest.fixture(scope="module")
def many_keys(sshd, tmp_path_factory):
    """A server with host keys of three types."""
    with OpenSshServer(tmp_path_factory.mktemp("many"), key_types=["ed25519", "ecdsa", "rsa"]) as server:
        yield server


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_a_host_that_is_known_by_any_one_of_its_keys_is_known(many_keys, tmp_path, kind):
    server = many_keys
    line = (server.folder / f"host_{kind}.pub").read_text()
    known = tmp_path / "known_hosts"
    known.write_text(f"[{server.host}]:{server.port} {line}")
    with SshTransport(server.target, identity=server.identity, known_hosts=known) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"
    settings = with_overrides(resolve(server.target), known_hosts=known)
    assert show_host_key(settings).fingerprint == fingerprint_of(server, kind)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_a_pinned_key_of_any_type_is_accepted(many_keys, tmp_path, kind):
    server = many_keys
    pin = fingerprint_of(server, kind)
    with SshTransport(
        server.target, identity=server.identity, known_hosts=tmp_path / "none", host_key=pin
    ) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"
    shown = show_host_key(with_overrides(resolve(server.target), known_hosts=tmp_path / "none"), pinned=pin)
    assert shown.fingerprint == pin
    assert kind in shown.key_type


def test_another_key_than_the_pinned_one_is_refused_though_known_hosts_trusts_it(sshd, new_server):
    pin = fingerprint_of(new_server())
    message = refused(
        HostKeyError, SshTransport(sshd.target, identity=sshd.identity, known_hosts=sshd.known_hosts, host_key=pin)
    )
    assert pin in message
    assert fingerprint_of(sshd) in message
    assert "changed" in message


def test_fetched_key_is_the_one_that_ssh_keygen_shows_and_fits_as_pin(sshd, tmp_path):
    none = tmp_path / "none"
    key = show_host_key(with_overrides(resolve(sshd.target), known_hosts=none))
    shown = key.fingerprint
    assert (key.key_type, shown) == ("ssh-ed25519", fingerprint_of(sshd))
    with SshTransport(sshd.target, identity=sshd.identity, known_hosts=none, host_key=shown) as transport:
        assert transport.run(["true"]).returncode == 0


@pytest.mark.parametrize("pin", ["SHA1:abc", "0f:1e:2d", ""])
def test_a_pin_that_is_no_fingerprint_is_refused_at_once(pin):
    with pytest.raises(ConfigError, match="must read SHA256:"):
        SshTransport("board", host_key=pin)


def test_wrong_user_key(sshd):
    wrong = sshd.folder / "wrong key"
    if not wrong.exists():
        sshd.new_key(wrong.name)
    message = refused(AuthError, SshTransport(sshd.target, identity=wrong, known_hosts=sshd.known_hosts))
    assert str(wrong) in message
    assert f"ssh-copy-id -p {sshd.port} {sshd.user}@{sshd.host}" in message


def test_wrong_user(sshd):
    transport = SshTransport(
        f"edgeprune-nobody@{sshd.host}:{sshd.port}", identity=sshd.identity, known_hosts=sshd.known_hosts
    )
    assert "edgeprune-nobody@" in refused(AuthError, transport)


def test_identity_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="private key file, found none"):
        SshTransport("board", identity=tmp_path / "missing")


def test_identity_that_is_not_a_key(sshd, tmp_path):
    (tmp_path / "key").write_text("hello\n")
    message = refused(AuthError, SshTransport(sshd.target, identity=tmp_path / "key", known_hosts=sshd.known_hosts))
    assert "not a private key" in message


def test_key_with_a_passphrase_points_to_ssh_add(sshd, tmp_path):
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    message = refused(AuthError, SshTransport(sshd.target, identity=locked, known_hosts=sshd.known_hosts))
    assert f"ssh-add {locked}" in message


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_user_keys_of_other_types(new_server, kind):
    server = new_server()
    key = server.new_key("second_key", kind)
    with (server.folder / "authorized_keys").open("a") as file:
        file.write(key.with_suffix(".pub").read_text())
    with SshTransport(server.target, identity=key, known_hosts=server.known_hosts) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """A real ssh-agent; call it with a key file to add the key."""
    address = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(address)], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(address))

    def add(key):
        for _ in range(100):
            if address.exists():
                break
            subprocess.run(["sleep", "0.05"], check=True)
        subprocess.run(["ssh-add", "-q", str(key)], check=True)

    yield add
    process.terminate()
    process.wait(5)


def test_keys_of_the_agent_are_used(sshd, agent, tmp_path):
    agent(sshd.identity)
    config = tmp_path / "config"
    config.write_text(f"Host board\n HostName {sshd.host}\n Port {sshd.port}\n User {sshd.user}\n IdentityFile none\n")
    with SshTransport("board", config=config, known_hosts=sshd.known_hosts) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


def test_a_locked_key_that_the_agent_holds_is_used_and_tried_first(sshd, new_server, agent, tmp_path):
    server = new_server(options=["MaxAuthTries 1"])
    for name in ("spare1", "spare2"):
        agent(server.new_key(name))
    agent(server.identity)
    with SshTransport(server.target, identity=server.identity, known_hosts=server.known_hosts) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


def test_too_many_keys_are_named(new_server, agent, tmp_path):
    server = new_server(options=["MaxAuthTries 2"])
    for number in range(4):
        agent(server.new_key(f"spare{number}"))
    config = tmp_path / "config"
    config.write_text(f"Host board\n HostName {server.host}\n Port {server.port}\n IdentityFile none\n")
    message = refused(AuthError, SshTransport("board", config=config, known_hosts=server.known_hosts))
    assert "closed the connection after" in message
    assert "IdentitiesOnly" in message


def test_an_agent_that_is_not_there_is_no_obstacle(sshd, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    with SshTransport(sshd.target, identity=sshd.identity, known_hosts=sshd.known_hosts) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"
    assert "agent" in caplog.text


def jump_config(tmp_path, gate, board, *, trust_gate: bool = True):
    """ssh_config in which ``inner`` is behind ``gate``, each with its own key and known_hosts."""
    path = tmp_path / "jump_config"
    path.write_text(
        f"Host gate\n HostName {gate.host}\n Port {gate.port}\n User {gate.user}\n IdentityFile {gate.identity}\n"
        f" UserKnownHostsFile {gate.known_hosts if trust_gate else '/dev/null'}\n"
        f"Host inner\n HostName {board.host}\n Port {board.port}\n User {board.user}\n IdentityFile {board.identity}\n"
        f" UserKnownHostsFile {board.known_hosts}\n ProxyJump gate\n"
        "Host *\n IdentitiesOnly yes\n GlobalKnownHostsFile /dev/null\n"
    )
    # ssh -G prints paths without quotes, so these have no spaces to lose.
    return path


@pytest.fixture
def two_servers(sshd, tmp_path_factory):
    """A gate and a board behind it."""
    with (
        OpenSshServer(tmp_path_factory.mktemp("gate"), environment={"WHERE": "gate"}) as gate,
        OpenSshServer(tmp_path_factory.mktemp("inner"), environment={"WHERE": "inner"}) as inner,
    ):
        yield gate, inner


def test_jump_host(two_servers, tmp_path):
    gate, inner = two_servers
    config = jump_config(tmp_path, gate, inner)
    with SshTransport("inner", config=config) as transport:
        assert transport.run(["sh", "-c", "echo $WHERE"]).stdout == b"inner\n"
        (tmp_path / "file").write_bytes(os.urandom(1_000_000))
        transport.put(tmp_path / "file", str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert "Accepted publickey" in gate.log
    assert "Accepted publickey" in inner.log


def test_shown_host_key_behind_a_jump_host(two_servers, tmp_path):
    gate, inner = two_servers
    config = jump_config(tmp_path, gate, inner)
    assert show_host_key(resolve("inner", config=config), config=config).fingerprint == fingerprint_of(inner)


def test_unknown_jump_host_is_refused_even_if_the_board_is_known(two_servers, tmp_path):
    gate, inner = two_servers
    config = jump_config(tmp_path, gate, inner, trust_gate=False)
    message = refused(HostKeyError, SshTransport("inner", config=config))
    assert f"{gate.host}:{gate.port}" in message
    assert message.endswith("ssh gate"), "boards are pinned one by one, but a jump host is known by known_hosts alone"
    assert "Accepted publickey" not in inner.log


def test_jump_host_that_is_named_with_the_board(two_servers, tmp_path):
    gate, inner = two_servers
    config = tmp_path / "config"
    config.write_text(
        f"Host *\n IdentityFile {gate.identity}\n IdentitiesOnly yes\n UserKnownHostsFile {gate.known_hosts}\n"
        " GlobalKnownHostsFile /dev/null\n"
    )
    pin = fingerprint_of(inner)
    jump = f"{gate.user}@{gate.host}:{gate.port}"
    through = {"config": config, "identity": inner.identity, "host_key": pin}
    with SshTransport(inner.target, jump=jump, **through) as transport:
        assert transport.run(["sh", "-c", "echo $WHERE"]).stdout == b"inner\n"
    assert "Accepted publickey" in gate.log
    settings = with_overrides(resolve(inner.target, config=config), jumps=(jump,))
    assert show_host_key(settings, config=config).fingerprint == pin
    with pytest.raises(ConfigError, match="must not hold a password"):
        SshTransport(inner.target, jump="me:secret@gate")


def test_board_that_the_jump_host_cannot_reach(two_servers, tmp_path):
    gate, inner = two_servers
    inner.stop()
    message = refused(ConnectError, SshTransport("inner", config=jump_config(tmp_path, gate, inner)))
    assert f"the jump host {gate.user}@{gate.host}:{gate.port} cannot reach it" in message


def test_jump_hosts_in_a_loop(tmp_path):
    config = tmp_path / "config"
    config.write_text("Host a\n ProxyJump b\nHost b\n ProxyJump a\n")
    assert "loop" in refused(ConfigError, SshTransport("a", config=config))


def test_proxy_command(sshd, tmp_path):
    config = tmp_path / "config"
    relay = (
        "import os,socket,sys,threading; s=socket.create_connection((sys.argv[1],int(sys.argv[2])));"
        "threading.Thread(target=lambda:[s.sendall(b) for b in iter(lambda:os.read(0,65536),b'')],daemon=True).start();"
        "[os.write(1,b) for b in iter(lambda:s.recv(65536),b'')]"
    )
    (tmp_path / "relay.py").write_text(relay)
    config.write_text(
        f"Host board\n HostName {sshd.host}\n Port {sshd.port}\n User {sshd.user}\n IdentityFile {sshd.identity}\n"
        f" UserKnownHostsFile {sshd.known_hosts}\n ProxyCommand python3 {tmp_path}/relay.py %h %p\n"
    )
    with SshTransport("board", config=config) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


def test_hint_for_an_unknown_key_names_the_alias_that_was_used(sshd, tmp_path):
    config = tmp_path / "config"
    config.write_text(f"Host orin\n HostName {sshd.host}\n Port {sshd.port}\n UserKnownHostsFile /dev/null\n")
    assert "device add NAME --ssh orin --host-key SHA256:" in refused(HostKeyError, SshTransport("orin", config=config))
