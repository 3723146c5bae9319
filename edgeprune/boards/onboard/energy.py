"""Replay engines on the board while its power is read, with idle windows before, between and after. Python >= 3.6.

Nothing is integrated here: windows and readings go to the host as they are, on one clock (`time.monotonic`, which all
processes of a machine share).
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time

import bench
import engines
import tree
from failures import Failure

_CHUNK_S = 0.02
"""Runs are made in portions of about this long, so that a window ends when it should."""
_PER_EVENT = 1000
_FIRST_READING_S = 20.0
_PARTING_S = 5.0


def main(request, emit):
    """Run one energy request.

    Args:
        request: ``engines`` (id to entry, see `engines`), ``order`` (ids as they are replayed, with repeats), ``root``,
            ``runtime``, ``threads``, ``channels`` (names, see `power`; none where somebody else reads the power),
            ``interval_s`` (between two polls), ``idle_s`` and ``replay_s`` (least length of a window), ``settle_s`` (runs
            before a replay window begins, and rest before an idle window begins), ``meter`` and ``sysroot`` (see `power`).
        emit: Takes events: ``window`` (phase ``"idle"`` or ``"replay"``, id, start_s, end_s, runs, own: cores that
            this process kept busy, others: cores that other programs did, None where the kernel does not tell) as they
            end, then ``readings``
            (channel, t_s, values) of all windows.

    Returns:
        ``conditions`` before and after, ``missed``: readings that failed, by channel.

    Raises:
        Failure: An engine does not load or run; no power can be read; the sampler ended early.
    """
    runtime, threads = request.get("runtime", "onnxruntime"), int(request.get("threads", 1))
    store = os.path.join(os.path.expanduser(request["root"]), "store")
    loaded = {}
    for name in sorted(set(request["order"])):
        loaded[name] = engines.load(request["engines"][name], store, runtime, threads)
        loaded[name].bind()
    settle_s, idle_s, replay_s = (float(request[name]) for name in ("settle_s", "idle_s", "replay_s"))
    facts = tree.Tree()
    before = bench.conditions()
    with Sampler(request) if request["channels"] else Elsewhere() as sampler:
        sampler.wait()
        gc.collect()
        gc.disable()
        try:
            time.sleep(settle_s)
            emit(window(facts, "idle", None, lambda: rest(idle_s)))
            for name in request["order"]:
                emit(replayed(facts, name, loaded[name], settle_s, replay_s))
                time.sleep(settle_s)
                emit(window(facts, "idle", None, lambda: rest(idle_s)))
        finally:
            gc.enable()
        # A source that is renewed late tells of the last window after it has ended.
        time.sleep(min(settle_s, 1.0))
        missed = sampler.finish()
        for channel, readings in sorted(sampler.readings().items()):
            for start in range(0, len(readings), _PER_EVENT):
                part = readings[start : start + _PER_EVENT]
                emit(
                    {
                        "event": "readings",
                        "channel": channel,
                        "t_s": [t_s for t_s, _ in part],
                        "values": [value for _, value in part],
                    }
                )
    return {"conditions": {"before": before, "after": bench.conditions()}, "missed": missed}


def replayed(facts, name, engine, settle_s, replay_s):
    """The window of one replay; what runs before it is not in it."""
    if not hasattr(engine, "repeated"):
        replay(engine, settle_s)
        return window(facts, "replay", name, lambda: replay(engine, replay_s))
    # Of an engine that runs in a process of its own nobody counts the runs before that ends.
    with engine.repeated(settle_s, replay_s) as child:
        child.begin()
        time.sleep(settle_s)
        found = window(facts, "replay", name, lambda: rest(replay_s), child.cpu_s)
        if not child.infers():
            raise Failure(
                "BackendError", "a replay must go on until its window ends, found that the engine had ended before."
            )
        return whole_runs(found, child.query_s())


def whole_runs(found, run_s):
    """A window of runs that take so long each, ended with the last one that it holds whole."""
    runs = int((found["end_s"] - found["start_s"]) / run_s)
    end_s = found["start_s"] + runs * run_s if runs else found["end_s"]
    return dict(found, runs=runs, end_s=end_s)


def window(facts, phase, name, act, child_s=None):
    """Do something and tell when it began and ended, and who else used the processor meanwhile.

    Args:
        facts: `tree.Tree`.
        phase: ``"idle"`` or ``"replay"``.
        name: Id of the engine, or None.
        act: Does it, and returns how often it ran.
        child_s: Tells the processor time of a process that works for us meanwhile, seconds.
    """
    busy, own = busy_s(facts), own_s(child_s)
    start = time.monotonic()
    runs = act()
    end = time.monotonic()
    busy_after, own_after = busy_s(facts), own_s(child_s)
    others = None
    if busy is not None and busy_after is not None:
        others = round(max(0.0, (busy_after - busy) - (own_after - own)) / max(end - start, 1e-9), 3)
    return {
        "event": "window",
        "phase": phase,
        "id": name,
        "start_s": start,
        "end_s": end,
        "runs": runs,
        "own": round((own_after - own) / max(end - start, 1e-9), 4),
        "others": others,
    }


def rest(seconds):
    """Do nothing; returns 0, the number of runs."""
    time.sleep(seconds)
    return 0


def replay(engine, seconds):
    """Run an engine back to back for at least so long; returns how often it ran."""
    clock = time.monotonic
    begin = clock()
    engine.run(1)
    runs, elapsed = 1, clock() - begin
    while elapsed < seconds:
        pace_s = max(elapsed / runs, 1e-9)
        count = max(1, int(min(_CHUNK_S, seconds - elapsed) / pace_s))
        engine.run(count)
        runs += count
        elapsed = clock() - begin
    return runs


def busy_s(facts):
    """Processor time that all programs together have used, seconds over all cores, or None."""
    fields = (facts.read("/proc/stat") or "").split("\n", 1)[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[1:8])
    return (user + nice + system + irq + softirq) / float(os.sysconf("SC_CLK_TCK"))


def own_s(child_s=None):
    """Processor time of this process, of the children that have ended and of one that has not, seconds."""
    times = os.times()
    return times[0] + times[1] + times[2] + times[3] + (child_s() if child_s is not None else 0.0)


class Elsewhere(object):
    """In place of the sampling process where the power is not read on the board."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass

    def wait(self):
        """Nothing has to come first."""

    def finish(self):
        """No reading failed."""
        return {}

    def readings(self):
        """None are here."""
        return {}


class Sampler(object):
    """The sampling process; what it reads lies in a file until the end, so that nothing is done with it meanwhile."""

    def __init__(self, request):
        wanted = {"action": "sample", "names": request["channels"], "root": request["root"]}
        for name in ("interval_s", "meter", "sysroot", "nvml"):
            if request.get(name) is not None:
                wanted[name] = request[name]
        self._file = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0]), "power"],
            stdin=subprocess.PIPE,
            stdout=self._file,
            stderr=subprocess.DEVNULL,
        )
        self._child.stdin.write(json.dumps(wanted).encode("ascii") + b"\n")
        self._child.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # It ends its own programs when its input ends; only one that hangs is killed.
        self._child.stdin.close()
        try:
            self._child.wait(timeout=_PARTING_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._file.close()

    def wait(self):
        """Return when the first reading is there.

        Raises:
            Failure: What the sampler failed with, or that it read nothing.
        """
        end = time.monotonic() + _FIRST_READING_S
        while time.monotonic() < end:
            if any(event["event"] == "power" for event in self._events()):
                return
            if self._child.poll() is not None:
                self._refuse()
            time.sleep(0.02)
        raise Failure(
            "PowerUnavailableError",
            "a power sensor must give a reading within %.0f s, found none." % _FIRST_READING_S,
            "edgeprune device probe",
        )

    def finish(self):
        """End sampling; returns how many readings failed, by channel.

        Raises:
            Failure: The sampler had ended before.
        """
        if self._child.poll() is not None:
            self._refuse()
        self._child.stdin.close()
        self._child.wait()
        results = [event["result"] for event in self._events() if event["event"] == "result"]
        return results[0]["missed"] if results else {}

    def readings(self):
        """Channel to its readings, [(seconds, value)], in the order of reading."""
        found = {}
        for event in self._events():
            if event["event"] == "power":
                for name, value in event["values"].items():
                    found.setdefault(name, []).append((event["t_s"], value))
        return found

    def _events(self):
        self._file.flush()
        size = os.fstat(self._file.fileno()).st_size
        content = os.pread(self._file.fileno(), size, 0)
        whole = content.rfind(b"\n") + 1
        return [json.loads(line.decode("ascii")) for line in content[:whole].splitlines()]

    def _refuse(self):
        for event in self._events():
            if event["event"] == "error":
                raise Failure(event["error"], event["message"], event.get("hint"), **(event.get("details") or {}))
        raise Failure(
            "CommandError", "the power sampler must run until the replay ends, but it ended with exit code %s."
            % self._child.returncode
        )
