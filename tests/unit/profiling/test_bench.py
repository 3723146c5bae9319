"""The on-board bench, run as a board runs it: in its own process, with real ONNX Runtime."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import edgeprune.boards.onboard
from edgeprune.boards.board import Board
from edgeprune.errors import BackendError, TransferError
from edgeprune.profiling.uploads import upload

ONBOARD = Path(edgeprune.boards.onboard.__file__).parent
MODULES = ("failures", "engines", "tree", "gpus", "sensors", "kept", "pace", "bench")


@pytest.fixture
def onboard() -> Iterator[dict[str, ModuleType]]:
    """The modules as they import each other on a board: by bare name."""
    loaded: dict[str, ModuleType] = {}
    before = {name: sys.modules.get(name) for name in MODULES}
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, ONBOARD / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    yield loaded
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def run(board: Board, engines: dict[str, bytes], rounds: list[list[str]], **settings: Any) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    request = {"engines": upload(board, engines, kernels=()), "rounds": rounds, **settings}
    return board.call("bench", request, on_event=events.append), events


def test_items_are_timed_in_the_order_of_the_host_and_long_enough(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    rounds = [["large", "small", "small"], ["small", "large"]]
    engines = {"small": conv_engine(8), "large": conv_engine(64)}
    result, events = run(board, engines, rounds, samples=3, sample_ms=4.0, warmup_ms=5.0)
    items = [event for event in events if event["event"] == "sample"]
    assert [(item["round"], item["position"], item["id"]) for item in items] == [
        (number, position, name) for number, names in enumerate(rounds) for position, name in enumerate(names)
    ]
    for item in items:
        assert len(item["times_ms"]) == len(item["cpu_share"]) >= 3
        # The last sample ran `number` times.
        assert item["number"] * item["times_ms"][-1] >= 4.0 * 0.999
    fastest = {name: min(min(item["times_ms"]) for item in items if item["id"] == name) for name in engines}
    assert fastest["large"] > 5 * fastest["small"]
    assert 0 < result["overhead_ms"] < fastest["small"]


def test_state_of_the_machine_is_told_before_and_after(board: Board, conv_engine: Callable[..., bytes]) -> None:
    result, events = run(board, {"a": conv_engine(8)}, [["a"]], samples=1, sample_ms=1.0, warmup_ms=1.0)
    before, after = result["conditions"]["before"], result["conditions"]["after"]
    assert next(event for event in events if event["event"] == "ready")["conditions"] == before
    assert after["context"]["cpu_s"] > before["context"]["cpu_s"]
    assert after["context"]["wall_s"] > before["context"]["wall_s"]
    assert before["cores"]
    assert "load" in before


def test_optional_engine_that_does_not_load_is_told_and_left_out(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    engines = {"good": conv_engine(8), "bad": b"not a model"}
    settings = {"samples": 1, "sample_ms": 1.0, "warmup_ms": 1.0}
    _, events = run(board, engines, [["bad", "good"]], optional=["bad"], **settings)
    assert [event["id"] for event in events if event["event"] == "unusable"] == ["bad"]
    assert [(event["id"], event["position"]) for event in events if event["event"] == "sample"] == [("good", 1)]


def test_optional_engine_whose_outputs_are_not_what_its_file_says_is_left_out(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    """The runtime makes the outputs of a first run as they come, and refuses to write them into arrays of another size."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 8), ("y", 4))]
    split = helper.make_node("Split", ["x"], ["y"], axis=1, num_outputs=2)
    graph = helper.make_graph([split], "half", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    engines = {"bad": model.SerializeToString(), "good": conv_engine(8)}
    settings = {"samples": 1, "sample_ms": 1.0, "warmup_ms": 1.0}
    _, events = run(board, engines, [["bad", "good"]], optional=["bad"], **settings)
    assert [event["id"] for event in events if event["event"] == "unusable"] == ["bad"]
    assert [event["id"] for event in events if event["event"] == "sample"] == ["good"]


def test_required_engine_that_does_not_load_is_a_failure_with_the_reason(board: Board) -> None:
    with pytest.raises(BackendError, match=r"ONNX Runtime .* on the board must load the engine, found: .*protobuf"):
        run(board, {"bad": b"not a model"}, [["bad"]])


def test_engine_that_is_not_in_the_store_is_a_failure(board: Board) -> None:
    request = {"engines": {"a": {"blob": "0" * 64}}, "rounds": [["a"]]}
    with pytest.raises(TransferError, match=r"the board's store must hold the engine 0+, found no such file"):
        board.call("bench", request)


def test_engine_whose_batch_is_open_is_refused(board: Board) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "open",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(BackendError, match=r"every input size of an engine must be fixed, found 'batch' in input x"):
        run(board, {"open": model.SerializeToString()}, [["open"]])


def test_engine_with_integer_inputs_and_two_outputs_runs(board: Board) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "index"], ["rows"]),
            helper.make_node("Not", ["flag"], ["flipped"]),
        ],
        "mixed",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, [3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, [2]),
        ],
        [
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [3, 4]),
            helper.make_tensor_value_info("flipped", TensorProto.BOOL, [2]),
        ],
        [helper.make_tensor("table", TensorProto.FLOAT, [2, 4], list(range(8)))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    _, events = run(board, {"mixed": model.SerializeToString()}, [["mixed"]], samples=1, sample_ms=0.5, warmup_ms=0.5)
    assert events[-1]["times_ms"][0] > 0


def test_bound_outputs_hold_what_the_engine_computes(
    onboard: dict[str, ModuleType], conv_engine: Callable[..., bytes]
) -> None:
    engine = onboard["engines"].OnnxEngine(conv_engine(8))
    values = {"x": np.linspace(-1, 1, 8 * 16 * 16, dtype=np.float32).reshape(1, 8, 16, 16)}
    engine.bind(values)
    engine.run(2)
    expected = engine.compute(values)["y"]
    assert np.array_equal(engine._binding.get_outputs()[0].numpy(), expected)


def test_empty_engine_is_one_identity(onboard: dict[str, ModuleType]) -> None:
    model = onnx.load_model_from_string(onboard["engines"].EMPTY_ONNX)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_inputs_are_the_same_every_time_and_never_subnormal(onboard: dict[str, ModuleType]) -> None:
    pattern = onboard["engines"].pattern
    values = pattern((7, 1000), "float32")
    assert values.shape == (7, 1000)
    assert np.array_equal(values, pattern((7, 1000), "float32"))
    assert np.abs(values).min() >= 2.0**-12
    assert np.abs(values).max() <= 1.0
    assert abs(float(values.mean())) < 0.02
    assert set(np.unique(pattern((50,), "int64"))) == {0, 1}


class _Sharing:
    """An engine whose runs take a millisecond, of which some are lost to another program."""

    def __init__(self, clock: list[float], shares: list[float]) -> None:
        self.clock, self.shares, self.runs = clock, shares, 0

    def run(self, times: int) -> None:
        for _ in range(times):
            share = self.shares[self.runs % len(self.shares)]
            self.runs += 1
            self.clock[0] += 1e-3
            self.clock[1] += 1e-3 * share


@pytest.mark.parametrize(("threads", "shares", "taken"), [(1, [1.0], 4), (4, [4.0], 4), (4, [4.0, 2.5], 8)])
def test_samples_that_lost_a_core_are_replaced_at_any_number_of_threads(
    onboard: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    shares: list[float],
    taken: int,
) -> None:
    clock = [0.0, 0.0]
    monkeypatch.setattr(onboard["bench"].time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(onboard["bench"].time, "process_time", lambda: clock[1])
    item = onboard["bench"].time_item(_Sharing(clock, shares), 8e-3, 0.9e-3, 4, 1.0, [], threads)
    monkeypatch.undo()
    calm = [share for share in item["cpu_share"] if share >= 0.95 * max(shares)]
    assert len(calm) == 4
    assert taken - 1 <= len(item["cpu_share"]) <= taken


def test_warm_up_goes_on_while_the_time_falls(onboard: dict[str, ModuleType]) -> None:
    stands_still = onboard["bench"].stands_still
    assert not stands_still([5.0, 4.0, 3.0, 2.0, 1.8, 1.7])
    assert stands_still([5.0, 1.0, 1.0, 1.004, 1.0, 0.999, 1.002])
    assert stands_still([1.0, 1.04])
    assert not stands_still([1.0, 1.06])
    assert stands_still([1.0]) is None


def test_arithmetic_is_timed_around_each_sample_when_there_is_patience(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    settings: dict[str, Any] = {"samples": 3, "sample_ms": 2.0, "warmup_ms": 2.0}
    engines = {"a": conv_engine(32)}
    _, events = run(board, engines, [["a"], ["a"]], patience=4.0, **settings)
    items = [event for event in events if event["event"] == "sample"]
    for item in items:
        assert len(item["pace_ns"]) == len(item["times_ms"]) <= 9
        assert all(1.0 < value < 10_000.0 for value in item["pace_ns"])
        assert item["lost_s"] >= 0
    for unlooked in ({}, {"patience": 0.0}, {"patience": 4.0, "threads": 2}):
        _, events = run(board, engines, [["a"]], **settings, **unlooked)
        assert [event["pace_ns"] for event in events if event["event"] == "sample"] == [[]]


class Neighbor:
    """Arithmetic as it was recorded beside a neighbor that comes and goes: 37 ns a turn, 65 while it computes."""

    def __init__(self, slow: Callable[[int], bool]) -> None:
        self.slow, self.looks = slow, 0

    def __call__(self, turns: int) -> float:
        self.looks += 1
        return 65.0 if self.slow(self.looks) else 37.0 + 0.1 * (self.looks % 7)


def test_pace_waits_for_a_core_of_its_own(onboard: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    pace = onboard["pace"]
    neighbor = Neighbor(lambda look: look % 60 < 40)
    monkeypatch.setattr(pace, "_arithmetic", neighbor)
    core = pace.Pace()
    assert core.level_ns == pytest.approx(37.3, abs=0.4)
    assert core.slowed(65.0)
    assert not core.slowed(38.0)
    before = neighbor.looks
    far = pace.time.perf_counter() + 60.0
    assert all(core.await_calm(far) < 38.0 for _ in range(100))
    assert neighbor.looks > before + 200, "it looked twice at a time, and again while it was slowed"


def test_pace_waits_no_longer_than_it_may(onboard: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    pace = onboard["pace"]
    neighbor = Neighbor(lambda look: look > 100)
    monkeypatch.setattr(pace, "_arithmetic", neighbor)
    core = pace.Pace()
    assert core.await_calm(pace.time.perf_counter() + 0.01) == 65.0
    assert core.await_calm(0.0) == 65.0
    # What lasts is the board's own doing, heat or another clock: it is followed, and not waited for.
    for _ in range(300):
        core.look()
    assert not core.slowed(65.0)


def test_samples_that_a_neighbor_slowed_are_taken_anew_for_a_while(
    onboard: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def run(self, times: int) -> None:
            onboard["bench"].time.sleep(0.0005 * times)

    def timed(slow: Callable[[int], bool], patience: float) -> Any:
        monkeypatch.setattr(onboard["pace"], "_arithmetic", Neighbor(slow))
        core = onboard["pace"].Pace()
        # Sleeping takes no CPU time: every share counts as full.
        monkeypatch.setattr(onboard["bench"], "full_share", lambda *_: 0.0)
        return onboard["bench"].time_item(Engine(), 0.002, 0.002, 4, 1.0, [], 1, core, patience)

    item = timed(lambda look: look > 100 and look % 10 < 5, 50.0)
    assert sum(value < 40 for value in item["pace_ns"]) == 4
    assert len(item["times_ms"]) > 4
    assert item["lost_s"] > 0.002
    item = timed(lambda look: look > 100, 2.0)
    assert 4 <= len(item["times_ms"]) <= 12, "never calm: what was asked for, and some in vain"
    assert set(item["pace_ns"]) == {65.0}
