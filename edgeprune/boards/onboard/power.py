"""Power on the board: what can be read and why not, and a sampler that runs as a process of its own. Python >= 3.6.

The sampler is its own process, so that it takes no time from the one that runs engines but the core that it wakes on; it
samples while the board is idle just as while it works, so that what it takes itself is subtracted with the idle power.
"""

import os
import select
import sys
import threading
import time

import power_battery
import power_hwmon
import power_ina3221
import power_meter
import power_nvidia_smi
import power_nvml
import power_odpm
import power_pmic
import power_rapl
import power_tegrastats
import tree
from failures import Failure
from power_source import absent

# Readers by preference, one line each: of two that read the same rail, the first is taken.
READERS = (
    power_meter,
    power_ina3221,
    power_hwmon,
    power_nvml,
    power_nvidia_smi,
    power_rapl,
    power_pmic,
    power_odpm,
    power_battery,
    power_tegrastats,
)


def main(request, emit):
    """Verb ``power``.

    With ``action`` ``"list"`` (default) the result holds ``channels``, best first, each with a reading ``value``, and
    ``absences``. With ``"sample"`` it emits ``{"event": "power", "t_s": monotonic seconds, "values": {name: value}}``
    until its standard input ends. ``meter`` of the request is the command of an external meter.

    Raises:
        Failure: PowerUnavailableError when a channel of ``names`` cannot be read.
    """
    facts = tree.Tree(request.get("sysroot", "/"))
    sources, absences = find(facts, request)
    if request.get("action", "list") == "sample":
        return sample(chosen(sources, request["names"]), request.get("interval_s", 0.05), emit)
    channels = []
    for source in sources:
        values = source.read() if source.read is not None else {}
        channels.extend(dict(channel.event(), value=values.get(channel.name)) for channel in source.channels)
    return {"channels": channels, "absences": absences}


def find(facts, request):
    """(sources by preference, absences) of all readers; of sensors with one name only the first is kept, and that is told."""
    sources, absences, names = [], [], set()
    for reader in READERS:
        found, missing = reader.find(facts, request)
        absences.extend(missing)
        for source in found:
            again = [channel.name for channel in source.channels if channel.name in names]
            if again:
                reason = "power sensor %s is there more than once, and only the first one is read." % again[0]
                absences.append(absent(reader.NAME, reason, there=True))
                continue
            names.update(channel.name for channel in source.channels)
            sources.append(source)
    return sources, absences


def chosen(sources, names):
    """The sources that hold these channels.

    Raises:
        Failure: PowerUnavailableError for one that is not among them.
    """
    known = {channel.name for source in sources for channel in source.channels}
    for name in names:
        if name not in known:
            raise Failure(
                "PowerUnavailableError",
                "power sensor %s must be readable, found %s." % (name, ", ".join(sorted(known)) or "none that is"),
                "edgeprune device probe",
            )
    return [source for source in sources if any(channel.name in names for channel in source.channels)]


def sample(sources, interval_s, emit):
    """Emit readings until standard input ends; returns how often a source gave nothing, {channel name: count}."""
    lock, missed, ended = threading.Lock(), {}, threading.Event()
    polled = [source for source in sources if source.read is not None]
    children = [(source, tree.start(source.stream)) for source in sources if source.stream is not None]

    def note(source, t_s, values):
        with lock:
            if ended.is_set():
                return
            # A program may print a line per GPU: what one line does not hold is not missing.
            for channel in source.channels if source.read is not None else ():
                if channel.name not in values:
                    missed[channel.name] = missed.get(channel.name, 0) + 1
            if values:
                emit({"event": "power", "t_s": round(t_s, 6), "values": values})

    def follow(source, child):
        for line in iter(child.stdout.readline, b""):
            t_s, values = source.parse(line.decode("utf-8", "replace").strip())
            if values:
                note(source, time.monotonic() if t_s is None else t_s, values)
            if ended.is_set():
                return

    threads = [threading.Thread(target=follow, args=entry, daemon=True) for entry in children]
    for thread in threads:
        thread.start()
    descriptor = sys.stdin.fileno()
    due = time.monotonic()
    try:
        while True:
            for source in polled:
                before = time.monotonic()
                values = source.read()
                note(source, (before + time.monotonic()) / 2.0, values)
            due = max(due + interval_s, time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], max(0.0, due - time.monotonic()))
            if ready and not os.read(descriptor, 4096):
                return {"missed": missed}
    finally:
        with lock:  # A thread may hold a line that it has read already, and the result must stay the last event.
            ended.set()
        for _, child in children:
            tree.stop(child)
