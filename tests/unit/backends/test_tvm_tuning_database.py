"""What tuning keeps, for which processor, and what it tunes next: nothing here needs TVM."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgeprune.backends.tvm import transfer, tuning_database
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.target import TvmTarget, target_of
from edgeprune.backends.tvm.task_choice import ENOUGH, Allowance, TaskState, choose
from edgeprune.backends.tvm.tuning import Tuning, parse_duration, require_here, require_known
from edgeprune.backends.tvm.tuning_database import Record, TuningDatabase
from edgeprune.backends.tvm.workloads import Shape
from edgeprune.boards.board import Board
from edgeprune.boards.host import host_cpu_model, host_isa
from edgeprune.errors import CompileError, ConfigError, EmulatedProcessorError, IncompatibleTargetError

TARGET = TvmTarget("x86_64", "x86-64", ("+avx2", "+fma"), ("avx2", "fma"), "Fast CPU @ 3 GHz")
DRAWN, RULED = [[["SamplePerfectTile", ["b0"], [2, 16], ["l1", "l2"]]], []], [[["GetSBlock", [], ["conv"], ["b0"]]], []]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path))
    return tmp_path


def tuned(target=TARGET, times=(3e-3, None, 1e-3, 2e-3)):
    """A database with one function whose schedules took these times; the first schedule is the rule's."""
    with tuning_database.writing(tuning_database.folder_of(target), tuning_database.identity_of(target)) as database:
        workload = database.add_workload(["17", "bW9kdWxl"])
        for number, seconds in enumerate(times):
            database.add_record(Record(workload, DRAWN if number else RULED, seconds))
    return tuning_database.folder_of(target)


def test_what_was_measured_is_found_again_best_first():
    tuned()
    found = tuning_database.found(TARGET)
    assert [record.seconds for record in found.best(0, 9)] == [1e-3, 2e-3, 3e-3]
    assert [record.searched for record in found.best(0, 9)] == [True, True, False]
    assert found.trials(0) == 4
    assert found.best(1) == []


def test_a_database_of_another_processor_is_not_used_and_that_is_said(caplog):
    tuned()
    other = replace(TARGET, model="Slow CPU")
    with caplog.at_level(logging.WARNING):
        assert tuning_database.found(other) is None
    assert "for Slow CPU, found Fast CPU @ 3 GHz" in caplog.text
    caplog.clear()
    # Neither what has another instruction set nor what no one knows by name is served, and there is nothing to tell.
    assert tuning_database.found(replace(TARGET, features=("+avx2",))) is None
    assert tuning_database.found(replace(TARGET, model="unknown")) is None
    assert tuning_database.found(TARGET) is not None
    assert caplog.text == ""


def test_a_folder_that_was_copied_from_another_machine_is_of_that_machine(caplog):
    folder, other = tuned(), replace(TARGET, model="Slow CPU")
    folder.rename(tuning_database.folder_of(other))
    with caplog.at_level(logging.WARNING):
        assert tuning_database.found(other) is None
    assert "Fast CPU" in caplog.text
    # Tuning for this one begins its own, and mixes nothing.
    tuned(other, times=(5e-3,))
    assert [record.seconds for record in tuning_database.found(other).records] == [5e-3]


@pytest.mark.parametrize("name", [tuning_database.WORKLOADS, tuning_database.RECORDS])
def test_a_line_that_was_cut_off_costs_that_line(name):
    folder = tuned()
    whole = (folder / name).read_bytes()
    for length in range(len(whole)):
        (folder / name).write_bytes(whole[:length])
        kept = TuningDatabase(folder)
        lines = whole[:length].count(b"\n")
        assert len(kept.workloads if name == tuning_database.WORKLOADS else kept.records) == lines
        if name == tuning_database.WORKLOADS:
            assert kept.records == []  # they are of a function that is not there
    (folder / name).write_bytes(whole[:-5])
    tuned(times=(7e-3,))
    again = tuning_database.found(TARGET)
    assert again.records[-1].seconds == 7e-3
    for file in (tuning_database.WORKLOADS, tuning_database.RECORDS):
        for line in (folder / file).read_text().splitlines():
            json.loads(line)


def test_a_database_that_is_not_understood_is_begun_anew(caplog):
    folder = tuned()
    (folder / tuning_database.WORKLOADS).write_text('{"not": "a function"}\n["17", "bW9kdWxl"]\n')
    with caplog.at_level(logging.WARNING):
        tuned(times=(4e-3,))
    assert "begun anew" in caplog.text
    assert [record.seconds for record in tuning_database.found(TARGET).records] == [4e-3]


def test_two_tunings_at_once_are_refused():
    folder, identity = tuned(), tuning_database.identity_of(TARGET)
    with (
        tuning_database.writing(folder, identity),
        pytest.raises(CompileError, match="one process at a time") as caught,
    ):
        tuned()
    assert caught.value.hint
    assert len(tuning_database.found(TARGET).records) == 4


def test_time_goes_where_it_saves_most():
    small, large = TaskState(1, 1.0, 10), TaskState(4, 1.0, 10)
    assert choose([small, large]) == 1
    # Sixteen times as many trials have won nothing: what is left there is less than what was never looked at.
    for _ in range(10):
        large.told(16, 1.1)
    assert choose([small, large]) == 0
    assert (large.trials, large.best_ms) == (170, 1.0)
    small.told(16, 0.25)
    assert small.best_ms == 0.25
    large.exhausted = True
    small.trials = ENOUGH
    assert choose([small, large]) is None
    assert choose([TaskState(1, 0.001, 0), TaskState(1, 10.0, ENOUGH)]) is None, "nothing is to be had of a thousandth"


def test_trials_and_time_are_both_kept_to():
    allowance = Allowance(100.0, trials=50)
    assert allowance.next_batch(16, 0.0) == 16
    allowance.spent_trials = 40
    assert allowance.next_batch(16, 20.0) == 10
    assert allowance.left_s(20.0) == 5.0
    # A trial takes half a second: eight fit.
    assert Allowance(100.0, None, spent_trials=40).next_batch(16, 96.0, begun_s=76.0) == 8
    assert Allowance(100.0, None, spent_trials=40).next_batch(16, 100.5) == 0
    assert Allowance(100.0, None, spent_trials=40).expected_trials(20.0) == 200


@pytest.mark.parametrize(
    ("extent", "factors", "wanted"),
    [
        (48, [4, 16], [3, 16]),
        (56, [4, 16], [4, 14]),
        (61, [4, 16], [1, 61]),
        (30, [2, 4, 8], [1, 3, 10]),
        (7, [1, 1], [7, 1]),
    ],
)
def test_a_tile_keeps_its_size_as_far_as_the_new_width_divides_by_it(extent, factors, wanted):
    found = transfer.refactored(extent, factors)
    assert found[0] * found[-1] * (found[1] if len(found) == 3 else 1) == extent
    assert found == wanted


def test_the_innermost_factor_stays_within_its_limit():
    assert transfer.refactored(128, [1, 128], innermost=64) == [2, 64]
    assert transfer.refactored(61, [4, 16], innermost=16) == [61, 1]


def test_neighbors_compute_the_same_at_the_nearest_widths():
    def conv(channels, name="conv2d_nchw"):
        return Shape(((name, (0, 2)),), ((channels, 9),))

    others = [conv(64), conv(16), conv(60), conv(58, "matmul"), conv(50)]
    assert transfer.nearest(conv(56), others, known=[0, 1, 2, 3], count=2) == [2, 0]
    assert transfer.nearest(conv(60), others, known=[2], count=2) == [], "it is no neighbor of itself"


def test_times_are_read_and_what_is_none_is_refused():
    assert [parse_duration(text) for text in ("90s", "10min", "1.5h")] == [90.0, 600.0, 5400.0]
    for text in ("10", "ten minutes", "10 days", ""):
        with pytest.raises(ConfigError, match="s, min or h") as caught:
            parse_duration(text)
        assert caught.value.hint == "--tune 10min"
    with pytest.raises(ConfigError, match="must be positive"):
        Tuning(0.0)
    with pytest.raises(ConfigError, match="at least one trial"):
        Tuning(1.0, trials=0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere only a probe knows the processor's name")
def test_this_machine_has_one_database_whether_it_was_probed_as_a_board_or_not():
    with Board.open("local") as board:
        probed = target_of(board.probe())
    assert probed.model != "unknown"
    assert tuning_database.folder_of(probed) == tuning_database.folder_of(target_of(None))


def test_only_this_processor_is_timed_for():
    with pytest.raises(CompileError, match="aarch64, Cortex-A72") as caught:
        require_here(TvmTarget("aarch64", "cortex-a72", (), ("asimd", "fp"), "Cortex-A72"))
    assert caught.value.hint
    assert host_isa()
    here = TvmTarget("x86_64", "x86-64", (), (), host_cpu_model())
    with pytest.raises(CompileError, match="Another CPU"):
        require_here(replace(here, model="Another CPU"))


def test_a_board_that_cannot_run_the_engine_is_refused_before_anything_is_searched():
    with Board.open("local") as board:
        found = board.probe()
        lacking = replace(found, runtimes={name: one for name, one in found.runtimes.items() if name != "tvm"})
        older = replace(found, runtimes={**lacking.runtimes, "tvm": {"version": "0.26.0", "sha256": ""}})
        for device, told in ((lacking, "none"), (older, "0.26.0")):
            with pytest.raises(IncompatibleTargetError, match=r"0\.27") as caught:
                Tvm(tuning=Tuning(60)).for_board(device)
            assert caught.value.found == told
            assert caught.value.hint == "edgeprune device setup BOARD --backend tvm"
            assert Tvm().for_board(device).target.model == found.cpu_model
        emulated = replace(found, facts={**found.facts, "emulated": True})
        with pytest.raises(EmulatedProcessorError, match="must be timed on a real processor"):
            Tvm(tuning=Tuning(60)).for_board(emulated)


def test_candidates_are_timed_on_the_board_unless_that_is_this_machine():
    tuning = Tuning(60)
    with Board.open("local") as board:
        here = Tvm(tuning=tuning).built_on(board)
        assert here.tuning.board is None
    with pytest.raises(CompileError, match="which board pi does not tell") as caught:
        require_known(replace(TARGET, model="unknown"), SimpleNamespace(name="pi"))
    assert caught.value.hint == "compile without --tune"
