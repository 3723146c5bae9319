"""The search for schedules: MetaSchedule's evolution, function by function, in a process of its own.

Started by `edgeprune.backends.tvm.tuning`, which speaks JSON lines with it: a crash in the compiler ends this process and not
the user's, and what was measured until then is in the database. Every trial is a candidate that was built and timed, or failed
to be; the rule's own schedule is the first of each function, so search is never behind it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.backends.tvm import cost_model, search_space, transfer, tuning_database
from edgeprune.backends.tvm.candidate_timing import BoardsTiming, Timing
from edgeprune.backends.tvm.scheduling import ruled
from edgeprune.backends.tvm.task_choice import Allowance, TaskState, choose
from edgeprune.backends.tvm.tuning_database import Record, TuningDatabase
from edgeprune.backends.tvm.workloads import REFUSALS, Shape, Workloads, hash_of, instructions_of, shape_of
from edgeprune.errors import CompileError, EdgepruneError

_BATCH = 16
_STARTS = 3
"""Schedules that a function takes over from its neighbors."""
_FIRST = 6
"""Schedules that a function without neighbors begins with."""
_KEPT = 32
"""Schedules of a function that the evolution begins with, at most."""
_ENDLESS = 1 << 20


@dataclass
class _Task:
    """One function that is tuned."""

    module: Any
    shape: Shape
    workload: int
    state: TaskState
    context: Any = None
    seen: set[int] = field(default_factory=set)


class Search:
    """One tuning.

    Args:
        request: ``target`` (as `TvmTarget.llvm`), ``isa``, ``folder`` and ``identity`` of the database, ``functions`` (JSON of a
            module, calls per inference), ``seconds``, ``trials`` or None, ``seed``, ``processes``, ``where`` (it is timed, in
            words); for a board ``linker`` and ``engines`` (a folder for candidates), else None.
        database: To add to.
        timing: Builds and times candidates.
        tell: Told events.
    """

    def __init__(self, request: Mapping[str, Any], database: TuningDatabase, timing: Timing, tell: Any) -> None:
        import tvm
        from tvm.s_tir import meta_schedule as ms

        self._request, self._database, self._timing, self._tell = request, database, timing, tell
        self._target = tvm.target.Target(request["target"])
        self._workloads = Workloads(database)
        self._shapes: list[Shape] = [shape_of(module) for module in self._workloads.modules]
        self._memory = ms.database.MemoryDatabase()
        self._model = cost_model.Throughputs(request["seed"])
        self._asked = cost_model.as_metaschedule(self._model)
        self._features = cost_model.extractor()
        self._allowance = Allowance(request["seconds"], request["trials"])
        self._begun, self._first_trial = time.monotonic(), 0.0
        self._curve: list[tuple[int, float]] = []
        self._started: list[int] = []
        self._old = {record.workload for record in database.records if record.searched and record.seconds is not None}
        self._tasks: list[_Task] = []

    def run(self) -> dict[str, Any]:
        """Tune; returns what the other side is told in the end."""
        import tvm

        modules = [(tvm.ir.load_json(text), calls) for text, calls in self._request["functions"]]
        self._say("looking at the functions")
        missing: list[_Task] = []
        for module, calls in modules:
            index = self._workloads.add(module)
            if index == len(self._shapes):
                self._shapes.append(shape_of(module))
            state = TaskState(calls, float("inf"), self._database.trials(index))
            task = _Task(module, self._shapes[index], index, state)
            self._tasks.append(task)
            if not self._database.best(index):
                missing.append(task)
        known = len(modules) - len(missing)
        self._rules(missing)
        self._tasks = [task for task in self._tasks if self._database.best(task.workload)]
        for task in self._tasks:
            task.state.best_ms = 1e3 * (self._database.best(task.workload)[0].seconds or 0.0)
        if modules and not self._tasks:
            raise CompileError(
                f"tuning must be able to build functions and to time them on {self._request['where']}, found that none could be.",
                hint="edgeprune doctor --board BOARD" if self._request["linker"] else "edgeprune doctor",
            )
        before_ms = sum(task.state.calls * self._rule_ms(task) for task in self._tasks)
        self._note()
        self._begin()
        while (chosen := choose([task.state for task in self._tasks])) is not None and self._room():
            self._round(self._tasks[chosen])
            self._note()
        return {
            "event": "tuned",
            "functions": len(self._tasks),
            "known": known,
            "started": len(self._started),
            "trials": self._allowance.spent_trials,
            "seconds": self._passed(),
            "rule_ms": before_ms,
            "best_ms": sum(task.state.network_ms for task in self._tasks),
            "curve": self._curve,
        }

    def _rules(self, tasks: Sequence[_Task]) -> None:
        """Time the rule's schedule of functions of which nothing is known: what takes most is tuned first."""
        from tvm.s_tir import Schedule

        for begin in range(0, len(tasks), 4):
            count = self._room(4)
            part = tasks[begin : begin + count]
            if not part:
                return
            self._say("timing the rule's schedules")
            found = [ruled(task.module, tuple(self._request["isa"])) or Schedule(task.module) for task in part]
            for task, schedule, time_s in zip(part, found, self._times([one.mod for one in found]), strict=True):
                self._keep(task, schedule, time_s)

    def _begin(self) -> None:
        """Try what functions begin with that were never searched, what takes most first: the schedules of neighbors that other
        tunings have searched, else tiles of the rule's kind.
        """
        for task in sorted(self._tasks, key=lambda one: -one.state.network_ms):
            if any(record.searched for record in self._database.best(task.workload, _KEPT)):
                continue
            if not self._room():
                return
            near = (task.shape, self._workloads, self._shapes, self._database, sorted(self._old))
            begun = transfer.starts(task.module, *near, self._room(_STARTS))
            if begun:
                self._started.append(task.workload)
            else:
                begun = search_space.first(task.module, self._room(_FIRST))
            if begun:
                self._say("trying what functions begin with")
                self._prepare(task)
                candidates = [search_space.processed(task.context, schedule) for schedule in begun]
                self._try(task, [one for one in candidates if one is not None])
                self._note()

    def _round(self, task: _Task) -> None:
        """Let the evolution propose candidates of one function, and try them."""
        self._prepare(task)
        share = task.state.network_ms / max(1e-9, sum(one.state.network_ms for one in self._tasks))
        self._say(f"function {self._tasks.index(task) + 1} of {len(self._tasks)}, {share:.0%} of the time")
        try:
            found = task.context.generate_measure_candidates()
        except REFUSALS:
            found = None
        if not found:
            task.state.exhausted = True
            return

        fresh = {hash_of(one.sch.mod): one for one in found}
        new = [one for key, one in fresh.items() if key not in task.seen]
        self._try(task, new[: self._room()])
        self._notify(task, list(found))
        if not new:
            task.state.exhausted = True

    def _try(self, task: _Task, candidates: Sequence[Any]) -> None:

        if not candidates:
            return
        times = self._times([one.sch.mod for one in candidates])
        for candidate, time_s in zip(candidates, times, strict=True):
            task.seen.add(hash_of(candidate.sch.mod))
            self._keep(task, candidate.sch, time_s)
            self._remember(task, candidate.sch.trace, time_s)
        self._learn(task, candidates, times)
        ran = [time_s for time_s in times if time_s is not None]
        task.state.told(len(candidates), 1e3 * min(ran) if ran else None)

    def _prepare(self, task: _Task) -> None:
        """The context of a function, which knows what the database does."""
        if task.context is not None:
            return
        from tvm.s_tir import meta_schedule as ms

        seed = (self._request["seed"] * 7919 + task.workload) % (2**31 - 2) + 1
        task.context = search_space.context_of(
            task.module, self._target, name=f"function{task.workload}", seed=seed, threads=self._request["processes"]
        )
        candidates, times = [], []
        for record in self._database.best(task.workload, _KEPT):
            try:
                schedule = self._workloads.schedule(record)
                arguments = ms.arg_info.ArgInfo.from_entry_func(schedule.mod, remove_preproc=True)
            except REFUSALS:
                continue
            task.seen.add(hash_of(schedule.mod))
            candidates.append(ms.search_strategy.MeasureCandidate(schedule, arguments))
            times.append(record.seconds)
            self._remember(task, schedule.trace, record.seconds)
        if candidates:
            self._learn(task, candidates, times)
        designs = search_space.spaces(task.context, seed)
        if designs:
            task.context.pre_tuning(_ENDLESS, _BATCH, designs, self._memory, self._asked)
        else:
            task.state.exhausted = True

    def _learn(self, task: _Task, candidates: Sequence[Any], times: Sequence[float | None]) -> None:
        try:
            features = self._features(task.context, candidates)
        except REFUSALS:
            return  # programs that the features were not made for: then this function is searched without the model
        self._model.learn(task.workload, features, times)

    def _remember(self, task: _Task, trace: Any, time_s: float | None) -> None:
        """Let the evolution know what a schedule took."""
        from tvm.s_tir.meta_schedule.database import TuningRecord

        if time_s is not None:
            workload = self._memory.commit_workload(task.module)
            self._memory.commit_tuning_record(TuningRecord(trace, workload, [time_s], self._target, None))

    def _notify(self, task: _Task, found: Sequence[Any]) -> None:
        from tvm.s_tir.meta_schedule.runner import RunnerResult

        # The evolution counts what came back, and reads nothing of it: what was measured is in its database.
        task.context.notify_runner_results(found, [RunnerResult([0.0], None) for _ in found])

    def _times(self, modules: Sequence[Any]) -> list[float | None]:
        if not self._allowance.spent_trials:
            self._first_trial = self._passed()
        times = self._timing.seconds(modules)
        self._allowance.spent_trials += len(modules)
        return times

    def _keep(self, task: _Task, schedule: Any, time_s: float | None) -> None:
        self._database.add_record(Record(task.workload, instructions_of(schedule), time_s))

    def _rule_ms(self, task: _Task) -> float:
        """What the rule's schedule takes; where only search has one that runs, what that takes."""
        found = self._database.best(task.workload, _ENDLESS)
        return 1e3 * (next((one for one in found if not one.searched), found[0]).seconds or 0.0)

    def _passed(self) -> float:
        return time.monotonic() - self._begun - self._timing.waited_s

    def _room(self, most: int = _BATCH) -> int:
        return self._allowance.next_batch(most, self._passed(), self._first_trial)

    def _note(self) -> None:
        now_ms = sum(task.state.network_ms for task in self._tasks)
        self._curve.append((self._allowance.spent_trials, now_ms))

    def _say(self, message: str) -> None:
        allowance = self._allowance
        now = f", functions add up to {self._curve[-1][1]:.3g} ms" if self._curve else ""
        self._tell(
            {
                "event": "progress",
                "done": allowance.spent_trials,
                "total": allowance.expected_trials(self._passed()),
                "left_s": allowance.left_s(self._passed()),
                "message": f"{message}{now}",
            }
        )


def _timing(request: Mapping[str, Any], ask: Callable[[Sequence[str]], Mapping[str, Any]]) -> Timing:
    """What builds candidates, and times them here or has them timed on a board."""
    if request["linker"] is None:
        return Timing(request["target"], request["processes"])
    return BoardsTiming(request["target"], request["processes"], request["linker"], Path(request["engines"]), ask)


def main() -> None:
    """Serve one request, a line of JSON on standard input; further lines answer what was asked."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def tell(event: Mapping[str, Any]) -> None:
            answers.write(json.dumps(event) + "\n")
            answers.flush()

        def ask(engines: Sequence[str]) -> Mapping[str, Any]:
            tell({"event": "time", "engines": list(engines)})
            line = sys.stdin.readline()
            if not line:
                sys.exit("the other side is gone")
            found: dict[str, Any] = json.loads(line)
            return found

        request = json.loads(sys.stdin.readline())
        try:
            with (
                tuning_database.writing(Path(request["folder"]), request["identity"]) as database,
                _timing(request, ask) as timing,
            ):
                tell(Search(request, database, timing, tell).run())
        except EdgepruneError as error:
            tell({"event": "error", "message": error.message, "hint": error.hint})
        except OSError as error:
            tell(
                {
                    "event": "error",
                    "message": f"tuning must be able to keep what it measures, found: {error}.",
                    "hint": None,
                }
            )
