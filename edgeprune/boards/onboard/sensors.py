"""What a board can tell of its heat and clocks, found by looking and not by its name; its power is in `power`."""

import re

import gpus

UNCONNECTED_CELSIUS = -100.0


_MEMORY_RATES = ("/sys/kernel/debug/bpmp/debug/clk/emc/rate", "/sys/kernel/debug/clk/emc/clk_rate")
"""JetPack 5 and later, JetPack 4; Hz."""


def governors(tree):
    """Distinct CPU frequency governors over the cores, sorted; empty where the kernel exposes none."""
    files = tree.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    return sorted({name for name in map(tree.read, files) if name})


def clocks(tree):
    """CPU clocks by frequency domain, kHz: {"cpu0": {"current_khz", "min_khz", "max_khz"}}; unreadable ones left out."""
    found = {}
    seen = set()
    for folder in tree.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq"):
        domain = tree.read(folder + "/related_cpus") or folder
        if domain in seen:
            continue
        seen.add(domain)
        values = {
            "current_khz": tree.read_int(folder + "/scaling_cur_freq"),
            "min_khz": tree.read_int(folder + "/scaling_min_freq"),
            "max_khz": tree.read_int(folder + "/scaling_max_freq"),
        }
        if values["current_khz"] is not None:
            found[folder.split("/")[-2]] = {name: value for name, value in values.items() if value is not None}
    for folder in tree.glob("/sys/class/devfreq/*"):
        current = tree.read_int(folder + "/cur_freq")
        if current is not None:
            values = {"current_khz": current // 1000}
            for ours, theirs in (("min_khz", "min_freq"), ("max_khz", "max_freq")):
                value = tree.read_int("%s/%s" % (folder, theirs))
                if value is not None:
                    values[ours] = value // 1000
            found[folder.split("/")[-1]] = values
    # A Jetson's memory controller; the kernel's debug files are for root alone.
    rates = [rate for rate in map(tree.read_int, _MEMORY_RATES) if rate]
    if rates:
        found["emc"] = {"current_khz": rates[0] // 1000}
    return found


def held(domains):
    """Names of clock domains whose least clock is their highest: they are locked."""
    return sorted(
        name
        for name, values in domains.items()
        if values.get("min_khz") and values.get("min_khz") == values.get("max_khz")
    )


def fans(tree):
    """Fans by monitor: {"pwmfan 1": {"rpm", "pwm"}}, what is not told left out; ``pwm`` is from 0 to 255."""
    found = {}
    for what, pattern in (("rpm", "fan[0-9]*_input"), ("pwm", "pwm[0-9]*")):
        for path in tree.glob("/sys/class/hwmon/hwmon[0-9]*/" + pattern):
            match = re.search(r"/(?:fan(\d+)_input|pwm(\d+))$", path)
            value = tree.read_int(path) if match else None
            if value is not None:
                chip = tree.read(path.rsplit("/", 1)[0] + "/name") or path.split("/")[-2]
                found.setdefault("%s %s" % (chip, match.group(1) or match.group(2)), {})[what] = value
    return found


def temperatures(tree):
    """Thermal zones and hardware monitors, degrees Celsius, by name."""
    found = {}
    for folder in tree.glob("/sys/class/thermal/thermal_zone[0-9]*"):
        add_temperature(found, tree.read(folder + "/type") or folder.split("/")[-1], tree.read_int(folder + "/temp"))
    for path in tree.glob("/sys/class/hwmon/hwmon[0-9]*/temp[0-9]*_input"):
        chip = tree.read(path.rsplit("/", 1)[0] + "/name") or "hwmon"
        label = tree.read(path[: -len("_input")] + "_label")
        add_temperature(found, "%s %s" % (chip, label) if label else chip, tree.read_int(path))
    return found


def add_temperature(found, name, milli_celsius):
    """Add one reading; a Jetson reports -256 degrees for sensors that are not connected."""
    if milli_celsius is None or milli_celsius / 1000.0 < UNCONNECTED_CELSIUS:
        return
    key, copy = name, 2
    while key in found:
        key, copy = "%s %d" % (name, copy), copy + 1
    found[key] = milli_celsius / 1000.0


def throttling(tree):
    """Sentences on limits that hold the clocks down now, or did since the board was started."""
    found = []
    for folder in tree.glob("/sys/class/thermal/cooling_device[0-9]*"):
        kind, state = tree.read(folder + "/type") or "", tree.read_int(folder + "/cur_state")
        # A running fan is a cooling device too, and no reason for concern.
        if state and re.search(r"cpufreq|devfreq|processor|cpu|gpu", kind, re.I):
            found.append("clocks are held down by heat: cooling device %s is at step %d." % (kind, state))
    count = tree.read_int("/sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count")
    if count:
        found.append("the processor was throttled by heat %d times since it was started." % count)
    return found + module_throttling(tree) + firmware_throttling(tree)


# Sources: NVIDIA, Jetson Linux, the driver of soctherm-oc-event; Developer Guide, "Platform Power and Performance" (on Orin and
# Thor 1 is too low a voltage, 2 too high a current on average, 3 for an instant).
_SUPPLY = "/sys/class/hwmon/hwmon[0-9]*/oc[0-9]*_event_cnt"


def module_throttling(tree):
    """What a Jetson's module has done against its supply; each event lowers clocks for a moment, where it is turned on."""
    found = []
    for path in tree.glob(_SUPPLY):
        count = tree.read_int(path)
        if count and count > 0 and tree.read_int(path.replace("_event_cnt", "_throt_en")) != 0:
            found.append(
                "too low a voltage or too high a current (%s) made the module lower its clocks %d times since it was started."
                % (path.rsplit("/", 1)[1].split("_")[0], count)
            )
    return found


# Source: Raspberry Pi documentation, os.html#get_throttled.
THROTTLED_BITS = (
    (0, "the supply voltage", "too low"),
    (1, "the clock", "capped"),
    (2, "the processor", "throttled"),
    (3, "the soft temperature limit", "active"),
)


def firmware_throttling(tree):
    """What a Raspberry Pi's firmware says: bits 0 to 3 are now, 16 to 19 are since the start."""
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", tree.run("vcgencmd", "get_throttled") or "")
    if match is None:
        return []
    value = int(match.group(1), 16)
    found = []
    for bit, what, how in THROTTLED_BITS:
        if value >> bit & 1:
            when = "is %s now" % how
        elif value >> (bit + 16) & 1:
            when = "was %s at times since the start" % how
        else:
            continue
        found.append("the firmware reports that %s %s (throttled=%s)." % (what, when, match.group(1)))
    return found


def firmware_refuses(tree):
    """Whether a Raspberry Pi's firmware is there and this user may not ask it."""
    return tree.find_program("vcgencmd") is not None and tree.run("vcgencmd", "get_throttled") is None


def battery(tree):
    """A sentence when the board runs on its battery, else None."""
    for folder in tree.glob("/sys/class/power_supply/*"):
        # A mouse has a battery too; its scope says so.
        if tree.read(folder + "/type") == "Battery" and tree.read(folder + "/scope") != "Device":
            if tree.read(folder + "/status") == "Discharging":
                return "it runs on its battery, which may lower the clocks."
    return None


def load(tree):
    """Load average of the last minute, or None."""
    match = re.match(r"\d+(\.\d+)?", tree.read("/proc/loadavg") or "")
    return float(match.group(0)) if match else None


def power_mode(tree):
    """(name, number) of a Jetson's nvpmodel mode, else (the firmware's platform profile, None)."""
    said = tree.run("nvpmodel", "-q") or ""
    match = re.search(r"NV Power Mode:\s*(\S+)(?:\s+(\d+))?", said)
    if match:
        return match.group(1), int(match.group(2)) if match.group(2) else None
    return tree.read("/sys/firmware/acpi/platform_profile") or None, None


def conditions(tree):
    """What is worth recording before and after a measurement, as JSON."""
    domains, cards = clocks(tree), gpus.states(tree)
    found = {
        "governors": governors(tree),
        "clocks_khz": {name: values["current_khz"] for name, values in domains.items()},
        "clocks_held": held(domains),
        "temperatures_celsius": temperatures(tree),
        "fans": fans(tree),
        "throttling": throttling(tree) + gpus.throttling(cards),
        "power_mode": power_mode(tree)[0],
        "load": load(tree),
        "boot": tree.read("/proc/sys/kernel/random/boot_id"),
    }
    return dict(found, gpus=cards) if cards else found
