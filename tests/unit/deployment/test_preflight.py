"""What an artifact needs of a board's memory, against what boards tell of theirs."""

from dataclasses import replace

import pytest

from edgeprune.boards.board import Board
from edgeprune.deployment import preflight
from edgeprune.errors import IncompatibleTargetError

NEEDED = 50_000_000


@pytest.fixture
def needy(artifacts, forge):
    """Manifest of an artifact that needs 50 MB."""
    requires = {**artifacts[0].manifest.requires, "memory_bytes": NEEDED}
    return forge(artifacts[0], "needy", requires=requires).manifest


@pytest.mark.parametrize(
    ("memory_bytes", "available_bytes", "enough"),
    [
        (0, None, True),
        (NEEDED, None, True),
        (NEEDED - 1, None, False),
        (2 * NEEDED, NEEDED - 1, False),
        (2 * NEEDED, NEEDED, True),
    ],
)
def test_memory_that_is_free_counts_and_unknown_memory_is_no_reason_to_refuse(
    root, needy, memory_bytes, available_bytes, enough
):
    with Board.open("local") as board:
        probed = board.probe()
    facts = {**probed.facts, "memory_available_bytes": available_bytes}
    fingerprint = replace(probed, memory_bytes=memory_bytes, facts=facts)
    if enough:
        preflight.check(needy, fingerprint, board="local")
    else:
        with pytest.raises(IncompatibleTargetError) as caught:
            preflight.check(needy, fingerprint, board="local")
        assert (caught.value.field, caught.value.needed) == ("memory", "50.0 MB")


def test_free_memory_is_among_the_facts_of_a_probe(root):
    with Board.open("local") as board:
        probed = board.probe()
    assert 0 < probed.facts["memory_available_bytes"] <= probed.memory_bytes
