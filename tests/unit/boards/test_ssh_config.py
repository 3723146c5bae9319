"""ssh settings, from OpenSSH's client where it is installed and from paramiko's parser where it is not."""

from __future__ import annotations

import getpass
import logging
import shutil
from pathlib import Path

import pytest

from edgeprune.boards import ssh_config
from edgeprune.boards.ssh_config import SshTarget, resolve, with_overrides
from edgeprune.errors import ConfigError

needs_client = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client")


@pytest.fixture
def config(tmp_path: Path):
    """Writes an ssh_config file."""

    def written(text: str) -> Path:
        path = tmp_path / "ssh_config"
        path.write_text(text)
        return path

    return written


@pytest.fixture
def no_client(monkeypatch, tmp_path):
    """A machine without the ssh program."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(params=[pytest.param("client", marks=needs_client), "parser"])
def either_way(request):
    """Both sources of settings, one after the other."""
    if request.param == "parser":
        request.getfixturevalue("no_client")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("board", SshTarget("board")),
        ("me@board", SshTarget("board", "me")),
        ("me@board:2222", SshTarget("board", "me", 2222)),
        ("ssh://me@board:2222", SshTarget("board", "me", 2222)),
        ("ssh://board/", SshTarget("board")),
        ("10.0.0.7:22", SshTarget("10.0.0.7", None, 22)),
        ("me@[fe80::1]:22", SshTarget("fe80::1", "me", 22)),
        ("fe80::1", SshTarget("fe80::1")),
        ("my_board-7.lan", SshTarget("my_board-7.lan")),
        ("firm\\me@board", SshTarget("board", "firm\\me")),
    ],
)
def test_targets(text, expected):
    assert SshTarget.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "@",
            "me@",
            "@board",
            "-oProxyCommand=id",
            "me@-oX",
            "-me@board",
            "a b",
            "a\nb",
            "board;id",
            "$(id)@board:",
        ),
        *("board:0", "board:99999", "board:x", "ssh://board/path", "ssh://b?x=1", "me@bo@ard;"),
    ],
)
def test_what_is_not_a_target_is_refused(text):
    with pytest.raises(ConfigError, match="an ssh target must be"):
        SshTarget.parse(text)


@pytest.mark.parametrize("text", ["me:secret@board", "ssh://me:secret@board:22", "me:sec@ret@board", ":secret@board"])
def test_a_password_is_refused_and_not_repeated(text):
    with pytest.raises(ConfigError, match="must not hold a password") as caught:
        SshTarget.parse(text)
    assert "sec" not in str(caught.value)


def test_settings_of_an_alias(either_way, config, tmp_path):
    path = config(
        f"""
        Host board
          HostName 10.0.0.7
          Port 2222
          User nvidia
          IdentityFile {tmp_path}/key
          IdentitiesOnly yes
          HostKeyAlias orin
          UserKnownHostsFile {tmp_path}/known {tmp_path}/known2
          GlobalKnownHostsFile /dev/null
          ProxyJump me@gate:2200,inner
        """
    )
    found = resolve("board", config=path)
    assert found.address == "nvidia@10.0.0.7:2222"
    assert found.identities == (tmp_path / "key",)
    assert found.only_identities
    assert found.host_key_alias == "orin"
    assert found.known_hosts == (tmp_path / "known", tmp_path / "known2", Path("/dev/null"))
    assert found.jumps == ("me@gate:2200", "inner")


def test_the_target_wins_over_the_file(either_way, config):
    path = config("Host *\n  User nvidia\n  Port 2222\n")
    assert resolve("me@board:33", config=path).address == "me@board:33"
    assert resolve("board", config=path).address == "nvidia@board:2222"


def test_defaults(either_way, config):
    found = resolve("board", config=config(""))
    assert found.address == f"{getpass.getuser()}@board:22"
    assert found.jumps == ()
    assert found.command is None
    assert not found.only_identities
    assert "id_ed25519" in {path.name for path in found.identities}
    assert all("~" not in str(path) for path in (*found.identities, *found.known_hosts))
    assert [path.name for path in found.known_hosts][:2] == ["known_hosts", "known_hosts2"]


def test_tokens_are_expanded(either_way, config, monkeypatch):
    monkeypatch.setenv("KEYS", "/keys")
    path = config("Host board\n  HostName ten.lan\n  User me\n  IdentityFile ${KEYS}/%h-%r-%%\n")
    assert resolve("board", config=path).identities == (Path("/keys/ten.lan-me-%"),)


def test_proxy_command_with_its_tokens(either_way, config):
    path = config("Host board\n  HostName ten.lan\n  Port 33\n  ProxyCommand nc %h %p\n")
    assert resolve("board", config=path).command == "nc ten.lan 33"


def test_proxy_none_means_direct(either_way, config):
    path = config("Host board\n  ProxyJump none\nHost other\n  ProxyCommand none\n")
    assert resolve("board", config=path).jumps == ()
    assert resolve("other", config=path).command is None


@needs_client
def test_include_and_match_are_followed_with_the_client(config, tmp_path):
    (tmp_path / "more").write_text('Match host ten.* user me\n  Port 4444\n  IdentityFile "/my keys/id"\n')
    path = config(f"Include {tmp_path}/more\nHost board\n  HostName ten.lan\n")
    found = resolve("me@ten.lan", config=path)
    assert found.port == 4444
    assert found.identities == (Path("/my keys/id"),)
    assert resolve("other@ten.lan", config=path).port == 22


@needs_client
def test_known_hosts_file_with_a_space_in_its_name(config, tmp_path):
    spaced = tmp_path / "my hosts"
    spaced.write_text("")
    path = config(f'Host board\n  UserKnownHostsFile "{spaced}" {tmp_path}/other\n  GlobalKnownHostsFile none\n')
    assert resolve("board", config=path).known_hosts == (spaced, tmp_path / "other")


@needs_client
def test_a_broken_configuration_says_what_ssh_says(config):
    with pytest.raises(ConfigError, match="Bad configuration option: nonsense") as caught:
        resolve("board", config=config("Nonsense yes\n"))
    assert "\n" not in str(caught.value)


def test_the_parser_says_what_it_ignores(no_client, config, caplog):
    path = config("Include more.conf\nHost board\n  ServerAliveInterval 9\n  Port 2222\n")
    with caplog.at_level(logging.WARNING, logger="edgeprune"):
        assert resolve("board", config=path).port == 2222
    assert "there is no ssh client" in caplog.text
    assert "Include more.conf" in caplog.text
    assert "serveraliveinterval" in caplog.text


def test_the_parser_has_nothing_to_say_when_nothing_is_ignored(no_client, config, caplog):
    with caplog.at_level(logging.WARNING, logger="edgeprune"):
        resolve("board", config=config("Host board\n  Port 2222\n"))
    assert caplog.text == ""


@needs_client
def test_settings_that_decide_about_trust_and_are_not_used_are_named(config, caplog, tmp_path):
    path = config(f"Host board\n  RevokedHostKeys {tmp_path}/revoked\n")
    with caplog.at_level(logging.WARNING, logger="edgeprune"):
        resolve("board", config=path)
    assert "revokedhostkeys" in caplog.text


def test_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="found none at"):
        resolve("board", config=tmp_path / "missing")


def test_the_environment_names_the_configuration(config, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(config("Host board\n  Port 5555\n")))
    assert resolve("board").port == 5555


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [
        ("", "/run/agent", "/run/agent"),
        ("IdentityAgent none", "/run/agent", None),
        ("IdentityAgent /run/other", "/run/agent", "/run/other"),
        ("IdentityAgent SSH_AUTH_SOCK", "/run/agent", "/run/agent"),
    ],
)
def test_the_agent(either_way, config, monkeypatch, setting, variable, expected):
    monkeypatch.setenv("SSH_AUTH_SOCK", variable)
    assert resolve("board", config=config(f"Host board\n  {setting}\n")).agent == expected


def test_no_agent_where_none_runs(either_way, config, monkeypatch):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    assert resolve("board", config=config("")).agent is None


def test_overrides_replace_keys_and_known_hosts(config, tmp_path):
    settings = resolve("board", config=config(""))
    changed = with_overrides(settings, identity=tmp_path / "key", known_hosts=tmp_path / "known")
    assert changed.identities == (tmp_path / "key",)
    assert changed.only_identities
    assert changed.known_hosts == (tmp_path / "known",)
    assert with_overrides(settings) == settings


def test_a_process_whose_user_has_no_name_can_name_one(config, no_client, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match=r"the user who connects must have a login name, found none of user id \d+"):
        resolve("board", config=config(""))
    monkeypatch.setenv("LOGNAME", "me")
    assert resolve("board", config=config("")).user == "me"


def test_without_a_client_a_file_that_names_no_host_name_does_not_hide_one(no_client, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host board\n  User me\n")
    found = ssh_config._ask_parser(SshTarget.parse("board"), None)
    assert found["user"] == ["me"]
    assert "hostname" not in found
