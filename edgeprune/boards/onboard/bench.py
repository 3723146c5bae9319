"""Time engines on the board, in the order that the host asks for. Python >= 3.6.

Every engine is loaded and bound before the first timing. An item is warmed up by time *and* until it is stable, then
timed in samples of back-to-back runs that are each long enough for the clock. What a call costs by itself (an engine
that does nothing) is timed in the same process, and the state of the machine is read before and after.
"""

import gc
import math
import os
import resource
import sys
import time

import engines
import failures
import kept
import pace
import sensors
import tree

_WINDOWS = 8
"""Warm-up is looked at in windows of an eighth of its time."""
_STABLE = 0.01
"""Warm-up ends when the median of the last three windows moved by less than this share."""
_ROUGHLY_STABLE = 0.05
_PATIENCE = 3
"""Warm-up is given up, and the item marked unstable, after this many times the asked time."""
_UNDISTURBED = 0.95
"""A sample with less than this share of its full CPU time (see `full_share`) was interrupted by something else."""
_EXTRA = 3
"""Samples are taken until enough are undisturbed, but at most this many times as many."""


def main(request, emit):
    """Run one bench request.

    Args:
        request: ``engines`` (id to entry, see `engines`; an entry may name a ``runtime`` of its own), ``rounds`` (lists of
            ids, timed in this order), ``root`` (the
            board's folder), ``runtime``, ``threads``, ``warmup_ms``, ``sample_ms``, ``samples``, ``item_ms`` (an item
            that took longer gets no more than three samples), ``settle_ms`` (work before the first item, so that clocks
            and caches leave their idle state), ``optional`` (ids that are told as an event and left out when they do not
            load or run; any other is a failure), ``patience`` (with one thread: as many times the asked time of an item may
            go by with waiting until nobody else slows the core down, see `pace`; 0, the default, does not look), ``keep``
            (name under which the board keeps what it tells, see `kept`, or nothing), ``forget`` (names of earlier runs that
            need not be kept any more), ``layers`` (of engines that run in a process of their own: time their layers too).
        emit: Takes events: ``loading`` (id, where some are optional: should it end this program, it is known which that
            was), ``loaded`` (done, total), ``unusable`` (id, message), ``ready`` (overhead_ms, conditions), and per item
            ``sample`` (round, position, id and what `time_item` returns).

    Returns:
        ``conditions`` before and after, and ``overhead_ms``, what an empty call costs, milliseconds.

    Raises:
        failures.Failure: An engine is missing, or does not load or run and is not optional.
    """
    runtime, threads = request.get("runtime", "onnxruntime"), int(request.get("threads", 1))
    warmup_s = request.get("warmup_ms", 20.0) / 1e3
    sample_s = request.get("sample_ms", 5.0) / 1e3
    samples, item_s = int(request.get("samples", 5)), request.get("item_ms", 1000.0) / 1e3
    patience = float(request.get("patience", 0.0)) if threads == 1 else 0.0
    kept.forget(request["root"], request.get("forget", ()))
    if request.get("keep"):
        emit = kept.keeping(request["root"], request["keep"], emit)
    loaded = load_all(request, runtime, threads, emit)
    empty = engines.empty(runtime, list(loaded.values()))
    before = conditions()
    gc.collect()
    gc.disable()
    try:
        order = [name for names in request["rounds"] for name in names if name in loaded]
        if order and not hasattr(loaded[order[0]], "timed"):
            _settle(loaded[order[0]], request.get("settle_ms", 100.0) / 1e3)
        overhead_ms = 0.0
        if empty is not None:
            overhead = time_item(empty, warmup_s, max(sample_s, 2e-3), max(samples, 5), item_s, [], 1)
            overhead_ms = median(own_times(overhead))
        emit(
            {
                "event": "ready",
                "overhead_ms": overhead_ms,
                "conditions": before,
            }
        )
        shares = {}
        # Of several threads those that spin may be the ones that slow this one down.
        core = pace.Pace() if patience else None
        for number, names in enumerate(request["rounds"]):
            for position, name in enumerate(names):
                if name not in loaded:
                    continue
                if hasattr(loaded[name], "timed"):
                    # A runtime that only runs in a process of its own brings its own clock.
                    item = loaded[name].timed(warmup_s, sample_s, samples, bool(request.get("layers")))
                else:
                    item = time_item(
                        loaded[name],
                        warmup_s,
                        sample_s,
                        samples,
                        item_s,
                        shares.setdefault(name, []),
                        threads,
                        core,
                        patience,
                    )
                item.update({"event": "sample", "round": number, "position": position, "id": name})
                emit(item)
    finally:
        gc.enable()
    return {"conditions": {"before": before, "after": conditions()}, "overhead_ms": overhead_ms}


def load_all(request, runtime, threads, emit):
    """Load and bind the engines of a request: id to engine; those that are optional and do not load are left out."""
    store = os.path.join(os.path.expanduser(request["root"]), "store")
    wanted, optional = sorted(request["engines"]), set(request.get("optional", ()))
    loaded = {}
    told = time.perf_counter()
    for done, name in enumerate(wanted, 1):
        if optional:
            # Of all of them: one that may not be left out must not be mistaken for the last one that may.
            emit({"event": "loading", "id": name})
        try:
            entry = request["engines"][name]
            engine = engines.load(entry, store, entry.get("runtime", runtime), threads)
            engine.bind()
            loaded[name] = engine
        except failures.Failure as failure:
            if failure.error != "BackendError" or name not in optional:
                raise
            emit({"event": "unusable", "id": name, "message": failure.message})
        if done == len(wanted) or time.perf_counter() - told > 0.5:
            told = time.perf_counter()
            emit({"event": "loaded", "done": done, "total": len(wanted)})
    return loaded


def _settle(engine, seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        engine.run(1)


def full_share(shares, threads):
    """CPU time per wall time of an engine that nothing interrupts.

    One at one thread. Several threads spin, wait and divide their work unevenly, so there it is the most that the engine
    was ever seen to get.
    """
    return 1.0 if threads == 1 else max(shares or [0.0])


def time_item(engine, warmup_s, sample_s, samples, item_s, known, threads, core=None, patience=0.0):
    """Warm one engine up and time it.

    Args:
        engine: Has ``run(times)``.
        warmup_s: Warm up at least so long, seconds.
        sample_s: Least length of one sample, seconds.
        samples: Number of undisturbed samples; more are taken for those that were not.
        item_s: Past this time, seconds, three samples are enough.
        known: CPU time over wall time of the engine's samples so far; those of this call are appended.
        threads: Threads inside one operation.
        core: `pace.Pace`, to see who slows the core down; None does not look.
        patience: Nothing is waited for, nor taken anew because it was slowed, past this many times the asked time.

    Returns:
        ``times_ms`` (time of one run, one value per sample), ``number`` (runs per sample), ``stable`` (whether warm-up
        settled, None where runs are too long to tell), ``cpu_share`` (CPU time of this process over wall time per
        sample; below `full_share` means that something else had a core for the rest), ``preempted`` (involuntary context
        switches while timed), ``pace_ns`` (what a turn of `pace` took around each sample, nanoseconds, the larger of before and
        after; empty without `core`), ``lost_s`` (waited for the core, or spent on samples that it was slowed in).
    """
    clock, cpu_clock = time.perf_counter, time.process_time
    begin = clock()
    run_s, stable = warm_up(engine, warmup_s, threads)
    number = max(1, int(math.ceil(sample_s / max(run_s, 1e-9))))
    times_ms, shares, paces = [], [], []
    lost_s = 0.0
    patient_until = begin + patience * (warmup_s + samples * max(sample_s, run_s))
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    while len(times_ms) < _EXTRA * samples:
        least = _UNDISTURBED * full_share(known, threads)
        fair = [place for place, share in enumerate(shares) if share >= least]
        calm = sum(core is None or not core.slowed(paces[place]) for place in fair)
        if calm >= samples or (len(fair) >= samples and clock() >= patient_until):
            break
        if len(times_ms) >= 3 and clock() - begin > item_s:
            break
        if core is not None:
            start = clock()
            before_ns = core.await_calm(patient_until)
            lost_s += clock() - start
        count = 0
        cpu = cpu_clock()
        start = clock()
        elapsed = 0.0
        more = number
        while True:
            engine.run(more)
            count += more
            elapsed = clock() - start
            if elapsed >= sample_s:
                break
            # The estimate was high: go on by what is missing, at least one run.
            more = max(1, int(math.ceil((sample_s - elapsed) / (elapsed / count))))
        shares.append(round((cpu_clock() - cpu) / elapsed, 4))
        known.append(shares[-1])
        times_ms.append(elapsed / count * 1e3)
        number = count
        if core is not None:
            paces.append(round(max(before_ns, core.look()), 3))
            lost_s += elapsed if core.slowed(paces[-1]) else 0.0
    return {
        "times_ms": times_ms,
        "number": number,
        "stable": stable,
        "cpu_share": shares,
        "preempted": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches,
        "pace_ns": paces,
        "lost_s": round(lost_s, 5),
    }


def warm_up(engine, warmup_s, threads):
    """Run until `warmup_s` has passed and the time per run stands still.

    Returns:
        Time of one run, seconds, and whether it stood still at the end (see `stands_still`).
    """
    clock, cpu_clock = time.perf_counter, time.process_time
    begin = clock()
    engine.run(1)
    run_s = max(clock() - begin, 1e-9)
    windows, shares = [], []
    while True:
        number = max(1, int(warmup_s / _WINDOWS / run_s))
        start, cpu = clock(), cpu_clock()
        engine.run(number)
        elapsed = max(clock() - start, 1e-9)
        # A window that was interrupted says nothing about the engine, unless there is no other.
        shares.append((cpu_clock() - cpu) / elapsed)
        if shares[-1] >= _UNDISTURBED * full_share(shares, threads) or not windows:
            run_s = max(elapsed / number, 1e-9)
            windows.append(run_s)
        spent = clock() - begin
        if spent < warmup_s:
            continue
        if len(windows) >= 6 and stands_still(windows):
            break
        # An engine whose single run is longer than the warm-up needs two runs, not six.
        if spent >= _PATIENCE * warmup_s:
            break
    return median(windows[-3:]), stands_still(windows)


def stands_still(windows):
    """Whether the median of the last three windows is within 1 % of that of the three before.

    With fewer than six windows it is the last half against the one before, within 5 %; with fewer than two nobody knows
    (None).
    """
    half = min(len(windows) // 2, 3)
    if half == 0:
        return None
    last, former = median(windows[-half:]), median(windows[-2 * half : -half])
    return abs(last - former) <= (_STABLE if half == 3 else _ROUGHLY_STABLE) * former


def own_times(item):
    """Undisturbed samples of an item, else the CPU time of each sample: what the engine itself took, milliseconds."""
    samples = list(zip(item["times_ms"], item["cpu_share"]))
    calm = [time_ms for time_ms, share in samples if share >= _UNDISTURBED]
    return calm or [time_ms * share for time_ms, share in samples]


def median(values):
    """Median of a list that is not empty."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2.0


def conditions():
    """What the machine tells about itself now, and what this process has used of it; what it does not tell is left out."""
    facts = tree.Tree()
    found = sensors.conditions(facts)
    found.update({"cores": _cores(), "context": _context()})
    steal = _steal_ticks(facts)
    if steal is not None:
        found["steal_ticks"] = steal
    return found


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _context():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "wall_s": time.perf_counter(),
        "cpu_s": time.process_time(),
        "preempted": usage.ru_nivcsw,
        "waited": usage.ru_nvcsw,
        "peak_memory_bytes": peak_bytes,
    }


def _steal_ticks(facts):
    """Time that a hypervisor gave to others, over all cores since the start, in ticks; None where the kernel does not tell."""
    fields = (facts.read("/proc/stat") or "").split("\n", 1)[0].split()
    return int(fields[8]) if len(fields) > 8 and fields[0] == "cpu" else None
