"""known_hosts, form by form; keys and hashed names are made by OpenSSH's own ssh-keygen where it is installed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.boards.known_hosts import KnownHosts, fingerprint, host_names, parse_line, read_known_hosts
from edgeprune.errors import HostKeyError


def wire(kind: str, body: bytes) -> bytes:
    """A public key in wire format."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in (kind.encode(), body))


ED = wire("ssh-ed25519", b"\x01" * 32)
OTHER = wire("ssh-ed25519", b"\x02" * 32)
RSA = wire("ssh-rsa", b"\x03" * 256)


def text(key: bytes) -> str:
    """``type base64``."""
    length = int.from_bytes(key[:4], "big")
    return f"{key[4 : 4 + length].decode()} {base64.b64encode(key).decode()}"


def hashed(name: str) -> str:
    """A host name as `HashKnownHosts yes` stores it."""
    salt = b"s" * 20
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@pytest.fixture
def write(tmp_path: Path):
    """Writes lines into a known_hosts file and reads it."""

    def written(*lines: str, name: str = "known_hosts") -> KnownHosts:
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return read_known_hosts([tmp_path / name])

    return written


def check(known: KnownHosts, host: str, key: bytes, port: int = 22, alias: str | None = None) -> None:
    kind = text(key).split()[0]
    known.check(host_names(host, port, alias), kind, key, address=f"me@{host}:{port}", target=f"me@{host}")


def test_plain_name_is_trusted(write):
    check(write(f"board {text(ED)} a comment"), "board", ED)


def test_one_of_several_names_is_trusted(write):
    check(write(f"board,10.0.0.7,board.lan {text(ED)}"), "10.0.0.7", ED)


def test_names_ignore_case(write):
    check(write(f"Board {text(ED)}"), "bOARD", ED)


def test_unknown_host_says_fingerprint_and_next_step(write):
    with pytest.raises(HostKeyError) as caught:
        check(write(f"elsewhere {text(ED)}"), "board", ED)
    message = str(caught.value)
    assert "must be known, found ssh-ed25519 SHA256:" in message
    assert f"edgeprune device add NAME --ssh me@board --host-key {fingerprint(ED)}" in message
    assert "\n" not in message


def test_changed_key_names_file_and_line(write, tmp_path):
    with pytest.raises(HostKeyError) as caught:
        check(write("# mine", "", f"board {text(OTHER)}"), "board", ED)
    message = str(caught.value)
    assert f"{tmp_path / 'known_hosts'}:3" in message
    assert fingerprint(ED) in message
    assert fingerprint(OTHER) in message
    assert "ssh-keygen -R 'board'" in message


def test_key_of_another_type_than_the_known_one_counts_as_changed(write, tmp_path):
    with pytest.raises(HostKeyError, match=r"must be the known one, ssh-rsa SHA256:.*known_hosts:1, found ssh-ed25519"):
        check(write(f"board {text(RSA)}"), "board", ED)


def test_second_key_of_the_same_host_is_trusted(write):
    known = write(f"board {text(OTHER)}", f"board {text(RSA)}", f"board {text(ED)}")
    for key in (OTHER, RSA, ED):
        check(known, "board", key)


def test_port_is_part_of_the_name(write):
    check(write(f"[board]:2222 {text(ED)}"), "board", ED, port=2222)
    with pytest.raises(HostKeyError, match="must be known"):
        check(write(f"[board]:2222 {text(ED)}"), "board", ED, port=22)


def test_line_without_port_is_trusted_on_any_port(write):
    check(write(f"board {text(ED)}"), "board", ED, port=2222)


def test_line_without_port_never_makes_another_port_look_changed(write):
    with pytest.raises(HostKeyError, match=r"must be known, .* no entry for \[board\]:2222"):
        check(write(f"board {text(OTHER)}"), "board", ED, port=2222)


def test_ipv6_addresses(write):
    check(write(f"fe80::1 {text(ED)}"), "FE80::1", ED)
    check(write(f"[fe80::1]:2222 {text(ED)}"), "fe80::1", ED, port=2222)


def test_hashed_names(write):
    check(write(f"{hashed('board')} {text(ED)}"), "board", ED)
    check(write(f"{hashed('[board]:2222')} {text(ED)}"), "board", ED, port=2222)
    with pytest.raises(HostKeyError, match="must be known"):
        check(write(f"{hashed('board')} {text(ED)}"), "other", ED)


def test_changed_key_under_a_hashed_name(write):
    with pytest.raises(HostKeyError, match="known_hosts:1"):
        check(write(f"{hashed('board')} {text(OTHER)}"), "board", ED)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_names_that_ssh_keygen_hashed(tmp_path):
    path = tmp_path / "known_hosts"
    path.write_text(f"board {text(ED)}\n[board]:2222 {text(RSA)}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(path)], check=True, capture_output=True)
    assert "board" not in path.read_text()
    known = read_known_hosts([path])
    check(known, "board", ED)
    check(known, "board", RSA, port=2222)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_fingerprint_is_that_of_ssh_keygen(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")], check=True, capture_output=True, text=True
    )
    key = base64.b64decode((tmp_path / "key.pub").read_text().split()[1])
    assert fingerprint(key) == shown.stdout.split()[1]


@pytest.mark.parametrize(
    ("pattern", "host", "matches"),
    [
        ("*.lan", "board.lan", True),
        ("*.lan", "board.example", False),
        ("board?", "board7", True),
        ("board?", "board", False),
        ("*.lan,!bad.lan", "board.lan", True),
        ("*.lan,!bad.lan", "bad.lan", False),
        ("!bad.lan,*.lan", "bad.lan", False),
        ("!bad.lan", "good.lan", False),
        ("10.0.0.*", "10.0.0.7", True),
        ("board.lan", "boardxlan", False),
        ("[board]:22*", "[board]:2222", True),
        ("[a-z]", "b", False),
    ],
)
def test_patterns(pattern, host, matches):
    entry = parse_line(f"{pattern} {text(ED)}", Path("known_hosts"), 1)
    assert entry is not None
    assert entry.matches(host) is matches


def test_revoked_key_is_refused_even_where_another_line_trusts_it(write, tmp_path):
    with pytest.raises(HostKeyError) as caught:
        check(write(f"board {text(ED)}", f"@revoked * {text(ED)}"), "board", ED)
    assert "revoked" in str(caught.value)
    assert f"{tmp_path / 'known_hosts'}:2" in str(caught.value)


def test_revoked_key_of_other_hosts_says_nothing(write):
    check(write(f"board {text(ED)}", f"@revoked other {text(ED)}"), "board", ED)


def test_revoked_line_makes_no_host_known(write):
    with pytest.raises(HostKeyError, match="must be known"):
        check(write(f"@revoked board {text(OTHER)}"), "board", ED)


def test_certificate_authority_is_named_and_trusts_nothing(write, tmp_path):
    with pytest.raises(HostKeyError) as caught:
        check(write(f"@cert-authority *.lan {text(ED)}"), "board.lan", ED)
    assert f"{tmp_path / 'known_hosts'}:1 trusts a certificate authority" in str(caught.value)
    assert "cannot be checked here" in str(caught.value)


def test_certificate_authority_beside_a_plain_line_does_no_harm(write):
    check(write(f"@cert-authority * {text(RSA)}", f"board {text(ED)}"), "board", ED)


def test_host_key_alias_is_the_only_name(write):
    check(write(f"alias {text(ED)}"), "10.0.0.7", ED, port=2222, alias="alias")
    with pytest.raises(HostKeyError, match="no entry for alias"):
        check(write(f"10.0.0.7 {text(ED)}"), "10.0.0.7", ED, alias="alias")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("board", "host names, key type and key"),
        ("board ssh-ed25519", "host names, key type and key"),
        ("board ssh-ed25519 !!!!", "not valid base64"),
        ("board ssh-ed25519 AAAA", "not a ssh-ed25519 key"),
        (f"board ssh-rsa {text(ED).split()[1]}", "not a ssh-rsa key"),
        (f"@unheard-of board {text(ED)}", "unknown marker @unheard-of"),
        ("board 1024 35 1234567", "protocol 1"),
        (f"|1|onlysalt {text(ED)}", "|1|salt|hash"),
        (f"|2|AAAA|AAAA {text(ED)}", "|1|salt|hash"),
        (f"|1|AAAA|AAAA {text(ED)}", "wrong length"),
        (f"|1|?|? {text(ED)}", "not valid base64"),
        ("\x00\xff\ufffd garbage", "host names, key type and key"),
    ],
)
def test_broken_line_is_skipped_with_a_warning_and_hides_nothing(write, caplog, line, reason):
    with caplog.at_level(logging.WARNING, logger="edgeprune"):
        known = write(line, f"board {text(ED)}")
    assert "known_hosts:1 skipped" in caplog.text
    assert reason in caplog.text
    check(known, "board", ED)


def test_comments_and_blank_lines_are_silent(write, caplog):
    with caplog.at_level(logging.WARNING, logger="edgeprune"):
        known = write("# comment", "", "   ", "\t# indented", f"  board\t{text(ED)}\r")
    assert caplog.text == ""
    check(known, "board", ED)


def test_several_files_are_read_and_missing_ones_are_not_an_error(tmp_path):
    (tmp_path / "user").write_text(f"one {text(ED)}\n")
    (tmp_path / "global").write_text(f"two {text(RSA)}\n")
    known = read_known_hosts([tmp_path / "user", tmp_path / "missing", tmp_path / "global"])
    check(known, "one", ED)
    check(known, "two", RSA)


def test_file_that_cannot_be_read_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="edgeprune"):
        known = read_known_hosts([tmp_path])
    assert str(tmp_path) in caplog.text
    assert known.entries == ()


def test_known_types_come_in_the_order_of_the_files(write):
    known = write(f"@revoked board {text(OTHER)}", f"board {text(RSA)}", f"board {text(ED)}", f"other {text(OTHER)}")
    assert known.key_types(host_names("board", 22)) == ("ssh-rsa", "ssh-ed25519")


_names = st.text(string.ascii_lowercase + string.digits + ".-", min_size=1, max_size=20)


@given(_names, st.integers(1, 65535))
def test_any_host_matches_its_own_line_plain_and_hashed(host, port):
    name = host_names(host, port)[0]
    for field in (name, hashed(name)):
        entry = parse_line(f"{field} {text(ED)}", Path("known_hosts"), 1)
        assert entry is not None
        assert entry.matches(name)


@given(st.text(max_size=200))
def test_any_line_is_read_or_refused_with_a_reason(line):
    try:
        parse_line(line, Path("known_hosts"), 1)
    except ValueError as error:
        assert str(error)  # noqa: PT017 (both outcomes are right)
