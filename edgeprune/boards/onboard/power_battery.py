"""What a battery gives, as its fuel gauge tells: phones, tablets, laptops. Python >= 3.6.

Sources: Linux, Documentation/ABI/testing/sysfs-class-power (microamperes, microvolts, microwatts, status, scope); Linux
commit 05f94eb98907 (the sign of the current differs by driver); Tencent Matrix, BatteryCurrencyInspector.java (so does the
unit on phones).
"""

from power_source import POWER, SHARE, TOTAL, Channel, Source, absent

NAME = "battery"
LEAST_MW = 50.0
"""No board that runs this takes less; a smaller figure means another unit than the kernel's."""


def find(tree, request):
    """See `power_source`."""
    sources, absences = [], []
    folders = [
        folder
        for folder in tree.glob("/sys/class/power_supply/*")
        # A mouse has a battery too; its scope says so. USB-C ports are listed as supplies and are not measured.
        if tree.read(folder + "/type") == "Battery" and tree.read(folder + "/scope") != "Device"
    ]
    for folder in folders:
        name = folder.rsplit("/", 1)[1]
        channel = Channel(NAME, name, POWER, TOTAL if len(folders) == 1 else SHARE)
        reason = why_not(tree, folder)
        if reason is None:
            sources.append(Source([channel], _reader(tree, folder, channel.name)))
        else:
            absences.append(absent(NAME, "power of battery %s cannot be read: %s" % (name, reason), there=True))
    if not folders:
        # Android shows the folder's name and refuses what is in it.
        hidden = tree.exists("/sys/class/power_supply/battery")
        reason = (
            "/sys/class/power_supply/battery exists, but its user may not read it (Android refuses it without root)."
            if hidden
            else "there is no battery under /sys/class/power_supply."
        )
        absences.append(absent(NAME, reason, there=hidden))
    return sources, absences


def why_not(tree, folder):
    """Why the battery's power says nothing now, or None."""
    status = tree.read(folder + "/status")
    if status != "Discharging":
        return "its status is %s, and only while it is discharging does it feed the board." % (status or "unknown")
    found_mw = power_mw(tree, folder)
    if found_mw is None:
        return "it tells neither power_now nor current_now and voltage_now, or its user may not read them."
    if found_mw < LEAST_MW:
        return (
            "%.3f mW is what current_now and voltage_now make in the kernel's microamperes and microvolts, too little for "
            "a running board; some makers use other units." % found_mw
        )
    return None


def power_mw(tree, folder):
    """Milliwatts, or None; the sign is dropped, since drivers do not agree on it."""
    microwatts = tree.read_int(folder + "/power_now")
    if microwatts is not None:
        return abs(microwatts) / 1e3
    microamperes, microvolts = tree.read_int(folder + "/current_now"), tree.read_int(folder + "/voltage_now")
    if microamperes is None or microvolts is None:
        return None
    return abs(microamperes) / 1e6 * abs(microvolts) / 1e6 * 1e3


def _reader(tree, folder, name):
    def read():
        # Plugged in meanwhile: the current is no longer what the board takes.
        found_mw = power_mw(tree, folder) if tree.read(folder + "/status") == "Discharging" else None
        return {} if found_mw is None else {name: found_mw}

    return read
