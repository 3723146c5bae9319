"""Ways to hold a board's clocks still; which of them a board may use says the file of its device type. Python >= 3.6.

Nothing here asks for a password: what needs root is run through ``sudo -n``, and its refusal is said in one sentence.
"""

import contextlib
import os
import re
import subprocess

import sensors
from failures import Failure
from tree import FOLDERS_OF_COMMANDS

PATIENCE_S = 20.0
UNLOCKED = "measure without --lock-clocks"
_GOVERNORS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"


def run(argv, text=None):
    """Run a command; None, or in a few words why it failed."""
    return ended(argv, text)[0]


def ended(argv, text=None):
    """(None, or in a few words why it failed; what it printed on both streams) of a command."""
    try:
        done = subprocess.run(
            argv,
            input=(text or "").encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
            env=environment(),
        )
    except OSError as error:
        return "%s: %s" % (argv[0], error.strerror), ""
    except subprocess.TimeoutExpired:
        return "%s gave no answer within %d s" % (" ".join(argv), PATIENCE_S), ""
    said = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode == 0:
        return None, said
    last = said.splitlines()[-1].strip() if said else "%s ended with exit code %d" % (" ".join(argv), done.returncode)
    return last, said


def answer(argv):
    """What a command prints, on both streams; nothing where it is not there or takes too long."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S, env=environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def environment():
    """With the folders of system commands, which a session over SSH often has not in its path."""
    path = os.pathsep.join([os.environ.get("PATH", "")] + ["/" + folder for folder in FOLDERS_OF_COMMANDS])
    return dict(os.environ, PATH=path)


def refusal(reason, hint=None):
    """The failure that says why clocks cannot be locked."""
    allow = "allow the commands to %s without a password (sudoers, NOPASSWD), or measure without --lock-clocks" % user()
    message = "the board must allow its clocks to be locked, found: %s." % reason.rstrip(".")
    return Failure("CommandError", message, hint or allow)


def user():
    """Who runs this, for a sentence."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or "user %d" % os.getuid()


def as_root(argv):
    """The command as root: as it is for root, else through sudo, which must not ask."""
    return list(argv) if os.geteuid() == 0 else ["sudo", "-n"] + list(argv)


class Way(object):
    """One way to lock clocks.

    Args:
        tree: Facts of the board.
        root: The board's folder.
        request: Of the verb ``clocks``.
    """

    name = ""
    asked = False
    """Whether somebody named just this one, so that the others are no substitute."""

    def __init__(self, tree, root, request):
        self.tree, self.root, self.request = tree, root, request

    def missing(self):
        """None, or why it does not work here."""
        raise NotImplementedError

    def prepare(self):
        """Store what `restoring` needs; nothing is changed yet."""

    def apply(self):
        """Lock."""
        raise NotImplementedError

    def restoring(self):
        """Commands that undo `apply`: dictionaries of ``argv``, where it reads one ``input``, and ``lasting`` where what
        is undone outlives a restart of the board."""
        raise NotImplementedError

    def require(self, argv, text=None):
        """Run a command as root; what it printed.

        Raises:
            failures.Failure: It failed.
        """
        reason, said = ended(as_root(argv), text)
        if reason is not None:
            raise refusal("%s: %s" % (self.name, reason))
        return said

    def has(self, program):
        """Whether a program is there."""
        folders = os.environ.get("PATH", "").split(os.pathsep) + ["/" + folder for folder in FOLDERS_OF_COMMANDS]
        return any(os.access(os.path.join(folder, program), os.X_OK) for folder in folders)


class NvpModel(Way):
    """``nvpmodel``: the power mode that was asked for, by name or number; the one before comes back.

    Sources: NVIDIA, Jetson Linux Developer Guide, "Platform Power and Performance", nvpmodel (-q, -m; a mode outlives a restart);
    https://github.com/tonible14012002/fall_detector (what -p --verbose prints on a Jetson Xavier NX).
    """

    name = "nvpmodel"
    asked = True
    _MODE = re.compile(r"POWER_MODEL: ID=([0-9]+) NAME=(\S+)")

    def missing(self):
        if not self.has("nvpmodel"):
            return "there is no nvpmodel"
        if sensors.power_mode(self.tree)[1] is None:
            return "nvpmodel does not tell the number of the power mode that is on"
        known = self.modes()
        if self.number(known) is None:
            names = ", ".join("%s (%s)" % (name, number) for number, name in known) or "none"
            return "nvpmodel must know power mode %s, it knows %s" % (self.request["power_mode"], names)
        return None

    def modes(self):
        """(number, name) of each mode that the board has."""
        return self._MODE.findall(answer(["nvpmodel", "-p", "--verbose"]))

    def number(self, known):
        """Number of the mode that was asked for, or None."""
        wanted = str(self.request["power_mode"])
        return next((number for number, name in known if wanted in (number, name)), None)

    def prepare(self):
        self.former, self.wanted = str(sensors.power_mode(self.tree)[1]), self.number(self.modes())

    def apply(self):
        if self.wanted != self.former:
            # With nothing to read it cannot be told to restart the board, and says so.
            self.require(["nvpmodel", "-m", self.wanted])
        found = str(sensors.power_mode(self.tree)[1])
        if found != self.wanted:
            raise refusal("nvpmodel: the power mode stayed %s" % found)

    def restoring(self):
        if self.wanted == self.former:
            return []
        return [{"argv": as_root(["nvpmodel", "-m", self.former]), "lasting": True}]


class JetsonClocks(Way):
    """``jetson_clocks``: the highest clocks of the power mode that is chosen; it stores and restores by itself.

    Sources: NVIDIA, Jetson Linux Developer Guide, "Platform Power and Performance", jetson_clocks (--store, --restore, --show);
    https://github.com/rbonghi/jetson_stats (what --show prints on a Jetson Nano and a Xavier).
    """

    name = "jetson_clocks"
    _CORE = re.compile(r"^(cpu[0-9]{1,4}): *Online=1 .*?\bMinFreq=([0-9]{1,12}) MaxFreq=([0-9]{1,12})\b", re.M)

    def missing(self):
        return None if self.has("jetson_clocks") else "there is no jetson_clocks"

    def prepare(self):
        self.stored = os.path.join(self.root, "jetson_clocks.conf")
        # It refuses to write over a file of an earlier run.
        with contextlib.suppress(OSError):
            os.remove(self.stored)
        self.require(["jetson_clocks", "--store", self.stored])

    def apply(self):
        self.require(["jetson_clocks"])
        cores = self._CORE.findall(answer(as_root(["jetson_clocks", "--show"])))
        # A core that is turned off meanwhile, or one that no release locks, is no reason to refuse; all of them are.
        if cores and all(int(least) < int(most) for _, least, most in cores):
            raise refusal("jetson_clocks: the clock of %s is still free to go from %s to %s kHz" % cores[0], UNLOCKED)

    def restoring(self):
        return [{"argv": as_root(["jetson_clocks", "--restore", self.stored])}]


class NvidiaSmi(Way):
    """``nvidia-smi --lock-gpu-clocks`` at the highest SM clock; undone by ``--reset-gpu-clocks``, which also undoes a lock
    that somebody else had set: the driver does not tell of one.

    Sources: NVIDIA, nvidia-smi manual, --lock-gpu-clocks and --reset-gpu-clocks; https://github.com/gperdrizet/PUBSUM (what it
    prints for GPUs older than Volta: a warning, and no failure); NVIDIA, Driver Persistence (what a driver that leaves an idle
    GPU forgets).
    """

    name = "nvidia_smi"
    _WARNED = re.compile(r"^.*(?:not supported|persistence mode is disabled).*$", re.I | re.M)
    """Its exit code says success all the same; in the second case the lock ends when the GPU has nothing to do."""

    def missing(self):
        if not self.has("nvidia-smi"):
            return "there is no nvidia-smi"
        return None if self.highest_mhz() else "nvidia-smi tells no highest SM clock"

    def highest_mhz(self):
        said = self.tree.run("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
        words = (said or "").split()
        return int(words[0]) if words and words[0].isdigit() else None

    def apply(self):
        clock = self.highest_mhz()
        said = self.require(["nvidia-smi", "--lock-gpu-clocks=%d,%d" % (clock, clock)])
        warned = self._WARNED.search(said)
        if warned:
            hint = "sudo nvidia-smi --persistence-mode=1" if "persistence" in warned.group().lower() else UNLOCKED
            raise refusal("nvidia_smi: %s" % warned.group().strip()[:200], hint)

    def restoring(self):
        return [{"argv": as_root(["nvidia-smi", "--reset-gpu-clocks"])}]


class CpuFreq(Way):
    """The governor ``performance`` on every core; the former ones are put back.

    Source: Linux, Documentation/admin-guide/pm/cpufreq.rst.
    """

    name = "cpufreq"

    def missing(self):
        return None if self.tree.glob(_GOVERNORS) else "the kernel offers no CPU frequency governors"

    def prepare(self):
        self.former = {path: self.tree.read(path) for path in self.tree.glob(_GOVERNORS)}

    def apply(self):
        for path in sorted(self.former):
            self.require(["tee", self.tree.path(path)], "performance\n")
        wrong = sorted({self.tree.read(path) or "nothing" for path in self.former} - {"performance"})
        if wrong:
            raise refusal("cpufreq: the governor stayed %s" % wrong[0])

    def restoring(self):
        commands = []
        for path, governor in sorted(self.former.items()):
            if governor:
                commands.append({"argv": as_root(["tee", self.tree.path(path)]), "input": governor + "\n"})
        return commands


# What a device type's file may name; one line each.
WAYS = {way.name: way for way in (NvpModel, JetsonClocks, NvidiaSmi, CpuFreq)}
