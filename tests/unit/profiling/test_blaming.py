"""A kernel at which the board's program ends twice is left out: a real run whose program is killed when its turn comes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.boards.board import Board
from edgeprune.errors import RunnerEndedError
from edgeprune.profiling.blaming import Blame
from edgeprune.profiling.measuring import measure
from edgeprune.profiling.rounds import stretches

HOW = "the runner's verb 'bench' must give a result, but it was killed by SIGILL."


READY = {"event": "ready"}


def blamed(journal: list[dict[str, Any]], order: list[str], kernels: set[str], *events: dict[str, Any]) -> list[Any]:
    blame = Blame(kernels, order)
    for event in events or (READY,):
        blame.hear(event)
    return blame.records(journal, HOW)


def test_a_kernel_is_left_out_the_second_time_and_nothing_else_ever_is() -> None:
    first = blamed([], ["b", "c"], {"b", "c"})
    assert first == [{"kind": "ended", "id": "b"}]
    (again, left_out) = blamed([{"kind": "sample"}, *first], ["b", "c"], {"b", "c"})
    assert again == first[0]
    assert left_out == {"kind": "unusable", "id": "b", "message": f"twice when it was its turn, {HOW}"}
    assert blamed(first, ["c"], {"b", "c"}) == [{"kind": "ended", "id": "c"}], "another one than the last time"
    assert blamed(first, ["b"], {"c"}) == [], "a network cannot be left out"
    assert blamed(first, [], {"b"}) == []


def test_it_is_the_one_behind_the_last_that_was_measured() -> None:
    order, kernels = ["net", "b", "c", "net"], {"b", "c"}

    def measured(*places: int) -> list[dict[str, Any]]:
        return [READY, *({"event": "sample", "position": place} for place in places)]

    assert blamed([], order, kernels, *measured()) == [], "the sentinel ends it, and no kernel is to blame"
    assert blamed([], order, kernels, *measured(0)) == [{"kind": "ended", "id": "b"}]
    assert blamed([], order, kernels, *measured(0, 1)) == [{"kind": "ended", "id": "c"}]
    assert blamed([], order, kernels, {"event": "unusable", "id": "b"}, *measured(0)) == [{"kind": "ended", "id": "c"}]
    assert blamed([], order, kernels, *measured(0, 1, 2)) == []
    assert blamed([], order, kernels, *measured(0, 1, 2, 3)) == [], "all were measured"


def test_before_anything_is_measured_it_is_the_one_that_was_loaded_last() -> None:
    loading = [{"event": "loading", "id": name} for name in ("b", "net", "c")]
    assert blamed([], ["b", "c"], {"b", "c"}, *loading) == [{"kind": "ended", "id": "c"}]
    assert blamed([], ["b", "c"], {"b", "c"}, *loading[:2]) == [], "a network that ends it is no kernel's fault"
    assert blamed([], ["b", "c"], {"b", "c"}, {"event": "loaded"}) == [], "it ended before it loaded anything"
    assert blamed([], ["b", "c"], {"b", "c"}, *loading, READY) == [{"kind": "ended", "id": "b"}]


class Killing:
    """Kills what times on a board as soon as its copy of what it tells has so many samples; once."""

    def __init__(self, root: Path, samples: int) -> None:
        self.root, self.samples = root, samples
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> Killing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _kill(self) -> None:
        pid: int | None = None
        while not self._over.wait(0.002):
            kept = [path.read_bytes() for path in (self.root / "measured").glob("*.jsonl")]
            # Found as soon as it has begun: to look for it takes as long as some kernels.
            pid = timing(self.root) if kept and pid is None else pid
            if pid is not None and max(content.count(b'"event": "sample"') for content in kept) >= self.samples:
                os.kill(pid, signal.SIGKILL)
                return


def timing(root: Path) -> int:
    """Number of the process that times on the board in a folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[-2:-1] == [b"bench"] and bytes(root) in words[1]:
                    return int(entry.name)
    raise AssertionError("nothing is timed")


def test_the_same_command_goes_on_without_what_ends_the_program_again(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in (4, 8, 12, 16)}
    kernels = ["conv8", "conv12", "conv16"]
    settings: dict[str, Any] = {"rounds": 2, "samples": 2, "sample_ms": 40.0, "warmup_ms": 50.0, "max_repeats": 0}
    settings |= {"patience": 0.0, "journal": tmp_path / "run.jsonl", "kernels": kernels}
    ((first, second, _),) = stretches(kernels, every=20, seed=0, round_number=0)
    # The sentinel and the first kernel were timed.
    with Killing(tmp_path / "board", 2), pytest.raises(RunnerEndedError, match="killed by SIGKILL"):
        measure(board, engines, **settings)
    assert list((tmp_path / "board" / "measured").iterdir()) == []
    # The sentinel was timed once more.
    with Killing(tmp_path / "board", 1):
        found = measure(board, engines, **settings)
    assert set(found.unusable) == {second}
    assert "killed by SIGKILL" in found.unusable[second]
    assert set(found.measurements) == set(engines) - {second}
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records if record["kind"] == "ended"] == [second] * 2
    items = [record for record in records if record["kind"] == "sample" and record["stretch"] is not None]
    assert [record["id"] for record in items].count(first) == 2
    assert len({(record["round"], record["id"]) for record in items}) == len(items) == 4


def test_what_ends_the_program_as_it_is_loaded_is_known_too(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in (4, 8, 12)}
    settings: dict[str, Any] = {"rounds": 1, "samples": 2, "sample_ms": 2.0, "warmup_ms": 2.0, "max_repeats": 0}
    settings |= {"patience": 0.0, "journal": tmp_path / "run.jsonl", "kernels": ["conv8", "conv12"]}
    call, loading = board.call, []

    def ends(verb: str, request: dict[str, Any], **rest: Any) -> Any:
        """As a runtime would that crashes on one kernel, after what the board says first."""
        if verb != "bench":
            return call(verb, request, **rest)
        tell, crashes = rest.pop("on_event"), "conv8" in request["engines"]

        def heard(event: dict[str, Any]) -> None:
            tell(event)
            if event["event"] == "loading":
                loading.append(event["id"])
                if event["id"] == "conv8":
                    raise RunnerEndedError(HOW)

        return call(verb, {**request, "rounds": [[]]} if crashes else request, on_event=heard, **rest)

    monkeypatch.setattr(board, "call", ends)
    with pytest.raises(RunnerEndedError):
        measure(board, engines, **settings)
    found = measure(board, engines, **settings)
    assert found.unusable == {"conv8": f"twice when it was its turn, {HOW}"}
    assert set(found.measurements) == {"conv4", "conv12"}
    assert loading == [*["conv12", "conv4", "conv8"] * 2, "conv12", "conv4"], "each is told as it is loaded"
