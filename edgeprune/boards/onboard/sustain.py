"""Latencies of a cool board and of one in thermal equilibrium, in one process. Python >= 3.6.

First the board rests until it cools no further, and every engine is timed in short bursts. Then one engine, the heater,
runs without a pause until neither its latency nor any temperature moves, or the time is used up; and every engine is timed
again, the heater running in between. What is compared was timed by one process with the same arrays, so the ratio of the
two is the board's and nothing else's.
"""

import gc
import time

import bench
import sensors
import tree

WINDOW_S = 1.0
COMPARED = 30
"""Windows whose medians are compared: the last so many with as many before. Heat sinks take minutes: what moves little in ten
seconds is not yet still."""
COOLED = 10
"""Readings over which a resting board must not fall any more."""
STEADY = 0.01
"""The latency stands still when the two medians differ by less than this share..."""
STEADY_CELSIUS = 1.0
"""...and temperatures when the medians of the hottest sensor do by less than this."""
REFRESH_S = 0.5


def main(request, emit):
    """Verb ``sustain``.

    Args:
        request: ``engines``, ``root``, ``runtime``, ``threads``, ``samples``, ``sample_ms``, ``warmup_ms`` as of `bench`;
            ``heater`` (id of the engine that heats), ``rest_s`` (longest rest before), ``limit_s`` (longest heating),
            ``window_s``.
        emit: Takes events: ``rest`` and ``heat`` (seconds, run_ms, celsius, None where no sensor tells), ``sample`` (as of
            `bench`, with ``phase``, ``"burst"`` or ``"sustained"``).

    Returns:
        ``settled`` (whether equilibrium was reached within the limit), ``seconds`` of heating, ``moved`` (share by which
        the latency still moved at the end, None where the time was too short to tell), ``celsius`` (hottest sensor
        ``cool`` and ``hot``), ``conditions`` before and after.
    """
    runtime, threads = request.get("runtime", "onnxruntime"), int(request.get("threads", 1))
    loaded = bench.load_all(request, runtime, threads, emit)
    heater = loaded[request["heater"]]
    window_s = request.get("window_s", WINDOW_S)
    facts = tree.Tree()
    before = bench.conditions()
    gc.collect()
    gc.disable()
    cool = rest(facts, request.get("rest_s", 60.0), window_s, emit)
    shares = {}
    time_all(request, loaded, shares, "burst", None, emit)
    windows, temperatures = [], []
    begin = time.perf_counter()
    while True:
        windows.append(heat(heater, window_s))
        temperatures.append(hottest(facts))
        seconds = time.perf_counter() - begin
        emit({"event": "heat", "seconds": seconds, "run_ms": windows[-1], "celsius": temperatures[-1]})
        settled = settled_at(windows, temperatures)
        if settled or seconds >= request.get("limit_s", 600.0):
            break
    time_all(request, loaded, shares, "sustained", heater, emit)
    return {
        "settled": settled,
        "seconds": seconds,
        "moved": moved(windows),
        "celsius": {"cool": cool, "hot": temperatures[-1]},
        "conditions": {"before": before, "after": bench.conditions()},
    }


def rest(facts, limit_s, window_s, emit):
    """Do nothing until the hottest sensor falls no further, at most `limit_s`; where no sensor tells, a tenth of that.

    Returns:
        The hottest sensor at the end, degrees Celsius, or None.
    """
    begin = time.perf_counter()
    celsius = [hottest(facts)]
    limit_s = limit_s if celsius[0] is not None else limit_s / 10
    while time.perf_counter() - begin < limit_s:
        time.sleep(min(window_s, limit_s))
        celsius.append(hottest(facts))
        emit({"event": "rest", "seconds": time.perf_counter() - begin, "celsius": celsius[-1]})
        if cooled(celsius):
            break
    return celsius[-1]


def cooled(celsius):
    """Whether the last ten readings fell by less than a degree in all; False where there are fewer or none can be read."""
    last = [value for value in celsius[-COOLED:] if value is not None]
    return len(last) == COOLED and last[0] - last[-1] < STEADY_CELSIUS


def heat(engine, window_s):
    """Run an engine for a while; time of one run, milliseconds."""
    runs, begin = 0, time.perf_counter()
    while True:
        engine.run(1)
        runs += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= window_s:
            return elapsed / runs * 1e3


def settled_at(windows, temperatures):
    """Whether latency and temperature stand still, by the medians of the last windows and of those before them."""
    change = moved(windows)
    if change is None or change > STEADY:
        return False
    known = [value for value in temperatures if value is not None]
    if len(known) < 2 * COMPARED:
        # No sensor, or one that answers now and then: the latency has to do.
        return True
    last, former = bench.median(known[-COMPARED:]), bench.median(known[-2 * COMPARED : -COMPARED])
    return abs(last - former) < STEADY_CELSIUS


def moved(windows):
    """Share by which the median of the last windows differs from that of those before; None with too few."""
    if len(windows) < 2 * COMPARED:
        return None
    last, former = bench.median(windows[-COMPARED:]), bench.median(windows[-2 * COMPARED : -COMPARED])
    return abs(last / former - 1.0)


def hottest(facts):
    """Highest temperature that can be read, degrees Celsius, or None."""
    return max(sensors.temperatures(facts).values(), default=None)


def time_all(request, loaded, shares, phase, heater, emit):
    """Time every engine; with a heater, right after it has run."""
    threads = int(request.get("threads", 1))
    for name in sorted(loaded):
        if heater is not None:
            heat(heater, REFRESH_S)
        item = bench.time_item(
            loaded[name],
            request.get("warmup_ms", 20.0) / 1e3,
            request.get("sample_ms", 5.0) / 1e3,
            int(request.get("samples", 5)),
            request.get("item_ms", 1000.0) / 1e3,
            shares.setdefault(name, []),
            threads,
        )
        item.update({"event": "sample", "phase": phase, "id": name})
        emit(item)
