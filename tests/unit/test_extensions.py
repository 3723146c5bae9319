"""Tables of extensions, with a real third-party distribution on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeprune.errors import ConfigError
from edgeprune.extensions import Extensions

FRACTIONS: Extensions[object] = Extensions("a number", "edgeprune_test.numbers", {"half": "fractions:Fraction"})


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that offers one more."""
    (tmp_path / "edgeprune_plugin.py").write_text(
        "class Third:\n    def __init__(self, size=3):\n        self.size = size\n"
    )
    info = tmp_path / "edgeprune_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeprune-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgeprune_test.numbers]\nthird = edgeprune_plugin:Third\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "edgeprune_plugin", raising=False)


def test_built_in_ones_are_made_with_options():
    made = FRACTIONS.make("half", numerator=1, denominator=2)
    assert str(made) == "1/2"


def test_an_object_is_returned_as_it_is():
    mine = object()
    assert FRACTIONS.make(mine) is mine


@pytest.mark.usefixtures("plugin")
def test_third_parties_are_listed_after_the_built_in_ones_and_made():
    assert FRACTIONS.names() == ["half", "third"]
    assert FRACTIONS.make("third", size=5).size == 5


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"a number must be one of half, found 'quarter'\."):
        FRACTIONS.make("quarter")
