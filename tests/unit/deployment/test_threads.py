"""Threads that an artifact is for, threads that are asked for, and cores that the board lets us use."""

import os
from dataclasses import replace

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.cores import require_cores
from edgeprune.cli.console import Output
from edgeprune.cli.status import show
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.manifest import MeasuredCost, PredictedCost
from edgeprune.deployment.rehearsing import rehearse
from edgeprune.deployment.status import status
from edgeprune.deployment.threads import slower_note, thread_notes, threads_for
from edgeprune.errors import ConfigError, IncompatibleTargetError


@pytest.fixture
def core():
    """This process, and so the board, may use one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def for_two(artifacts, forge):
    """An artifact whose latency was predicted for two threads."""
    return forge(artifacts[0], "for two", predicted=PredictedCost(latency_ms=1.25, threads=2))


def test_more_threads_than_cores_are_refused_before_anything_is_sent(artifacts, root, core):
    with pytest.raises(IncompatibleTargetError) as caught:
        deploy(artifacts[0], "local", threads=2)
    assert (caught.value.field, caught.value.needed) == ("cores", "2 (one for each thread)")
    assert caught.value.found.startswith("1")
    assert caught.value.hint.startswith("--threads 1, or")
    with pytest.raises(IncompatibleTargetError):
        rehearse(artifacts[0], "local", threads=2)
    assert not (root / "releases").exists()


def test_an_artifact_for_two_threads_says_so_beside_what_was_measured_with_one(for_two, root, core, capsys):
    done = deploy(for_two, "local", threads=1, rounds=1)
    assert (done.threads, done.made_for_threads) == (1, 2)
    note = done.notes[0]
    assert note.startswith("1 thread asked for, but the latency of this artifact was predicted with 2 threads:")
    assert "deploy with --threads 2, or profile with --threads 1" in note
    found = status("local")
    assert (found.current.precision, found.current.backend) == ("fp32", "onnxruntime")
    assert found.current.checked["threads"] == 1
    assert found.current.checked["measured_ms"] == pytest.approx(done.measured_ms)
    show(found, "local", Output(False))
    told = capsys.readouterr().out
    assert "onnxruntime fp32" in told
    assert f"{done.measured_ms:.3f} ms here" in told


def test_threads_that_the_artifact_is_for_need_no_word(for_two, artifacts):
    with Board.open("local") as board:
        probed = replace(board.probe(), cores=4, facts={})
    assert threads_for(for_two.manifest, None) == 2
    assert threads_for(artifacts[0].manifest, None) == 1
    assert thread_notes(for_two.manifest, probed, 2, board="b") == ()
    assert thread_notes(artifacts[0].manifest, probed, 4, board="b") == ()
    bounded = replace(probed, facts={"cores_quota": 1.5})
    (note,) = thread_notes(for_two.manifest, bounded, 2, board="b")
    assert note.startswith("a control group bounds board b to the time of 1.5 cores, fewer than 2 threads")
    assert thread_notes(artifacts[0].manifest, bounded, 1, board="b") == ()
    require_cores(probed, 4, board="b")
    with pytest.raises(
        ConfigError, match=r"board b must have 5 cores for 5 threads, found 4 of its 8 that we may use\."
    ):
        require_cores(replace(probed, facts={"cores_there": 8}), 5, board="b")


def test_an_engine_that_takes_a_multiple_of_what_was_predicted_is_told(for_two, artifacts):
    assert slower_note(for_two.manifest, 2.4, 2) is None
    note = slower_note(for_two.manifest, 5.0, 2)
    assert note.startswith(
        "the engine took 5 ms with 2 threads, 4.0 times the 1.25 ms that were predicted for this artifact"
    )
    assert slower_note(artifacts[0].manifest, 5.0, 1) is None


def test_a_manifest_names_threads_only_where_they_are_known(for_two, forge):
    assert b'"threads":2' in for_two.manifest.canonical()
    measured = MeasuredCost(latency_ms=1.0, conditions="measured on local")
    older = forge(for_two, "older", predicted=PredictedCost(latency_ms=1.0), measured=measured).manifest
    assert b'"threads"' not in older.canonical()
    assert older.threads is None
