"""The user's file of boards."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.boards.config import BoardConfig, BoardEntry, check_name, config_path, require_known
from edgeprune.boards.cores import core_list
from edgeprune.errors import ConfigError, UnknownBoardError

ORIN = BoardEntry(
    ssh="nvidia@10.0.0.7:2222",
    type="jetson-orin-nano",
    python="/opt/my python/bin/python3",
    root="~/somewhere",
    host_key="SHA256:" + "a" * 43,
    identity="~/.ssh/id_ed25519",
    jump="ann@gate:2222,inner-gate",
    cores="0,4-7",
)


@pytest.fixture
def config(tmp_path: Path) -> BoardConfig:
    return BoardConfig(tmp_path / "deep" / "boards.toml")


def test_a_missing_file_is_an_empty_list(config: BoardConfig) -> None:
    assert config.list() == {}
    assert not config.path.exists()


def test_an_added_board_is_read_back_by_another_process_s_view(config: BoardConfig) -> None:
    config.add("orin", ORIN)
    config.add("pi", BoardEntry(ssh="pi"))
    again = BoardConfig(config.path)
    assert list(again.list()) == ["orin", "pi"]
    assert again.get("orin") == ORIN
    assert again.get("pi") == BoardEntry(ssh="pi", python="python3", root="~/.edgeprune")
    assert [path.name for path in config.path.parent.iterdir()] == ["boards.toml"]


def test_a_taken_name_is_refused_unless_it_is_to_be_replaced(config: BoardConfig) -> None:
    config.add("pi", BoardEntry(ssh="pi@one"))
    with pytest.raises(ConfigError, match=r"name must be free, but 'pi' is pi@one\. Try: edgeprune device remove pi"):
        config.add("pi", BoardEntry(ssh="pi@two"))
    config.add("pi", BoardEntry(ssh="pi@two"), replace=True)
    assert config.get("pi").ssh == "pi@two"


def test_a_removed_board_is_gone_and_the_others_stay(config: BoardConfig) -> None:
    config.add("orin", ORIN)
    config.add("pi", BoardEntry(ssh="pi"))
    config.remove("orin")
    assert list(config.list()) == ["pi"]
    with pytest.raises(UnknownBoardError):
        config.remove("orin")


def test_an_unknown_board_is_told_with_the_known_ones_the_nearest_and_the_next_step(
    config: BoardConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(config.path))
    config.add("orin-lab", ORIN)
    with pytest.raises(UnknownBoardError) as caught:
        config.get("orin-lap")
    assert str(caught.value) == (
        "the board must be one of local, orin-lab, found 'orin-lap'; did you mean 'orin-lab'? Try: orin-lab"
    )
    with pytest.raises(UnknownBoardError, match=r"found 'far'\. Try: edgeprune device add far --ssh user@host"):
        require_known("far")
    require_known("local")
    require_known("ssh://me@far")


@pytest.mark.parametrize(
    ("name", "words"),
    [("local", "must not be 'local'"), ("", "letters, digits"), ("a b", "letters, digits"), ("a/b", "letters, digits")],
)
def test_a_name_that_could_be_something_else_is_refused(config: BoardConfig, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.add(name, ORIN)
    assert not config.path.exists()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(string.ascii_letters + string.digits + "._-", min_size=1).filter(lambda text: text != "local"),
    python=st.text(st.characters(blacklist_categories=("Cs",)), min_size=1),
)
def test_any_valid_entry_survives_the_file(tmp_path: Path, name: str, python: str) -> None:
    config = BoardConfig(tmp_path / "boards.toml")
    entry = BoardEntry(ssh="user@host", python=python)
    assert check_name(name) == name
    config.add(name, entry, replace=True)
    assert config.get(name) == entry


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[boards.orin]\nssh = "a\n', r"boards\.toml must be valid TOML, found: .*line 2"),
        ("[boards.orin]\n", r"boards\.orin\.ssh breaks a rule \(Field required\)"),
        ('[boards.orin]\nssh = "h"\npyhton = "x"\n', r"boards\.orin\.pyhton breaks a rule .*found 'x'"),
        ('[boards.orin]\nssh = "-oProxyCommand=x"\n', r"boards\.orin\.ssh breaks a rule \(an ssh target must be"),
        ('[boards.orin]\nssh = "h"\nhost_key = "MD5:x"\n', r"boards\.orin\.host_key breaks a rule"),
        ('[boards.local]\nssh = "h"\n', r"must not be 'local'"),
        ("title = 1\n", r"title breaks a rule"),
    ],
)
def test_a_broken_file_is_named_with_its_line_or_key(config: BoardConfig, text: str, words: str) -> None:
    config.path.parent.mkdir()
    config.path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        config.list()
    assert str(config.path) in str(caught.value)
    with pytest.raises(ConfigError):
        config.add("pi", BoardEntry(ssh="pi"))
    assert config.path.read_text() == text


def test_bytes_that_are_not_text_are_named_with_their_line(config: BoardConfig) -> None:
    config.path.parent.mkdir()
    config.path.write_bytes(b"# fine\n\xff\n")
    with pytest.raises(ConfigError, match="must be UTF-8 text, found other bytes in line 2"):
        config.list()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = BoardConfig(tmp_path / "file" / "boards.toml")
    with pytest.raises(ConfigError, match=r"must be writable, found: .*EDGEPRUNE_CONFIG"):
        config.add("pi", BoardEntry(ssh="pi"))


def test_a_linked_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    link = tmp_path / "boards.toml"
    link.symlink_to(tmp_path / "dotfiles" / "boards.toml")
    BoardConfig(link).add("pi", BoardEntry(ssh="pi"))
    assert link.is_symlink()
    assert (tmp_path / "dotfiles" / "boards.toml").is_file()


def test_the_environment_chooses_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "mine.toml"))
    assert config_path() == tmp_path / "mine.toml"
    monkeypatch.delenv("EDGEPRUNE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_path() == tmp_path / "edgeprune" / "boards.toml"


def test_groups_name_boards_and_survive_changes_of_boards(config: BoardConfig) -> None:
    for name in ("a", "b", "c"):
        config.add(name, BoardEntry(ssh=name))
    text = config.path.read_text()
    config.path.write_text(text + '\n[groups]\nkitchen = ["a", "b", "local", "ssh://u@h?root=/x,y"]\nattic = ["c"]\n')
    config.add("d", BoardEntry(ssh="d"))
    assert config.members(["kitchen"]) == ["a", "b", "local", "ssh://u@h?root=/x,y"]
    assert config.members(["c, kitchen", "a,d"]) == ["c", "a", "b", "local", "ssh://u@h?root=/x,y", "d"]
    assert config.members(["ssh://u@h?root=/p,q"]) == ["ssh://u@h?root=/p,q"]
    with pytest.raises(ConfigError, match="'attic' is a group"):
        config.add("attic", BoardEntry(ssh="x"))
    config.remove("c")
    assert config.groups() == {"kitchen": ["a", "b", "local", "ssh://u@h?root=/x,y"]}
    config.remove("a")
    assert config.members(["kitchen"])[0] == "b"


@pytest.mark.parametrize("word", ["nowhere", "a,,b", "", "../a", "$(id)", "a b", "a\nb"])
def test_members_that_are_not_known_are_refused(config: BoardConfig, word: str) -> None:
    config.add("a", BoardEntry(ssh="a"))
    config.add("b", BoardEntry(ssh="b"))
    with pytest.raises(UnknownBoardError, match="the board must be one of local, a, b, found"):
        config.members([word])


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ('groups = {a = ["x"]}\nboards = {a = {ssh = "h"}}', "must not be called as a board is"),
        ('[groups]\n"a b" = ["x"]', "must consist of letters"),
        ("[groups]\na = 3", "list"),
        ('[groups]\na = [""]', "at least 1 character"),
    ],
)
def test_groups_that_cannot_be_name_their_key(config: BoardConfig, lines: str, rule: str) -> None:
    config.path.parent.mkdir(parents=True)
    config.path.write_text(lines + "\n")
    with pytest.raises(ConfigError, match=rule):
        config.list()


@pytest.mark.parametrize(
    ("text", "cores"),
    [("4-7", (4, 5, 6, 7)), ("3", (3,)), ("2, 0-1,1", (0, 1, 2)), ("6-6", (6,)), ("0,10-11", (0, 10, 11))],
)
def test_cores_are_written_as_taskset_takes_them(text: str, cores: tuple[int, ...]) -> None:
    assert core_list(text) == cores
    assert BoardEntry(ssh="pi", cores=text).cores == text


@pytest.mark.parametrize("text", ["", "7-4", "-3", "4-", "a", "1,,2", "0x3", "12345"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cores are written as taskset takes them, 4-7 or 0,2-3"):
        core_list(text)
