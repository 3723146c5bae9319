"""Clocks, heat and throttling of NVIDIA graphics cards, as ``nvidia-smi`` tells them. Python >= 3.6, stdlib only.

Sources: ``nvidia-smi --help-query-gpu`` (fields; ``clocks_event_reasons.active`` is ``clocks_throttle_reasons.active`` in drivers
before 535); NVIDIA, NVML API Reference, nvmlClocksEventReasons (bits). On a Jetson the program answers ``[N/A]``: its GPU's clock
is under /sys/class/devfreq, see `sensors`.
"""

import re

FIELDS = ("index", "clocks.sm", "clocks.mem", "temperature.gpu")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
HELD_DOWN = (
    (0x04, "its power limit"),
    (0x08, "a slowdown of the hardware"),
    (0x20, "heat, as the driver sees it"),
    (0x40, "heat, as the hardware sees it"),
    (0x80, "the power brake of the computer"),
)
"""Bits that hold clocks below what was asked for; the others say that it is idle, or that clocks were set."""

_ROW = re.compile(r"^\s*([0-9]{1,5})\s*,([^,\n]*),([^,\n]*),([^,\n]*),([^,\n]*)$", re.M)


def states(tree):
    """State of each GPU: ``index`` and, where they are told, ``sm_mhz``, ``memory_mhz``, ``celsius``, ``reasons``."""
    for reasons in REASONS:
        query = "--query-gpu=%s" % ",".join(FIELDS + (reasons,))
        found = parse(tree.run("nvidia-smi", query, "--format=csv,noheader,nounits") or "")
        if found:
            return found
    return []


def parse(text):
    """States by what the program prints; what is ``[N/A]`` is left out, and a GPU that tells nothing too."""
    found = []
    for index, clock, memory, celsius, reasons in _ROW.findall(text):
        state = {"sm_mhz": _whole(clock), "memory_mhz": _whole(memory), "celsius": _whole(celsius)}
        match = re.match(r"\s*0x([0-9a-fA-F]{1,16})\s*$", reasons)
        state["reasons"] = int(match.group(1), 16) if match else None
        state = {name: value for name, value in state.items() if value is not None}
        if state:
            found.append(dict(state, index=int(index)))
    return found


def throttling(gpus):
    """Sentences on what holds the clocks of GPUs down now."""
    return [
        "clocks of GPU %d are held down by %s." % (gpu["index"], what)
        for gpu in gpus
        for bit, what in HELD_DOWN
        if gpu.get("reasons", 0) & bit
    ]


def _whole(text):
    match = re.match(r"\s*(-?[0-9]{1,9})\s*$", text)
    return int(match.group(1)) if match else None
