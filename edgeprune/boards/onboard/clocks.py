"""Hold the clocks still while a run measures, and put them back whatever becomes of the run. Python >= 3.6.

Three processes keep the promise. The *owner* answers the host and lives as long as its standard input is open. Before it
changes anything it writes down how to undo it, and starts the *watchdog*: a process in a session of its own that waits
for the owner to end, however it ends, undoes the change and removes the note. Should both be killed, the *next run* finds
the note and undoes the change before it begins.

Nothing here asks for a password: what needs root is run through ``sudo -n``, and its refusal is said in one sentence.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time

import lock
from failures import Failure
from tree import FOLDERS_OF_COMMANDS, Tree

NOTE, GUARD = "clocks.json", "clocks.lock"
PATIENCE_S = 20.0
_GOVERNORS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"


def main(request, emit):
    """Verb ``clocks``: request {"root", "ways"}; locks the clocks, emits {"event": "held", "clocks": ...}, and restores
    them at the end of input.

    Args:
        request: ``ways`` names what the device type allows, see `WAYS`; all that are there are used, at least one.
        emit: Takes events.

    Returns:
        ``restored`` (whether the watchdog undid everything within its time) and ``after``, the state then.

    Raises:
        failures.Failure: None of the ways works here, or a command refuses; nothing is changed then.
    """
    root, tree = request["root"], Tree(request.get("sysroot", "/"))
    os.makedirs(root, exist_ok=True)
    restore_leftover(root)
    if os.path.exists(os.path.join(root, NOTE)):
        raise refusal("clocks that an earlier run locked could not be restored")
    with guard(root) as guarded:
        before = state(tree)
        ways = [WAYS[name](tree, root) for name in request["ways"] if name in WAYS]
        found = [way for way in ways if way.missing() is None]
        if not found:
            reasons = [way.missing() for way in ways] or ["the device type names no way"]
            raise refusal("; ".join(reasons), "measure without --lock-clocks")
        for way in found:
            way.prepare()
        write_note(root, [command for way in found for command in way.restoring()])
        alive, undone = start_watchdog(root, guarded.fileno())
        try:
            for way in found:
                way.apply()
            names = [way.name for way in found]
            told = {"ways": names, "before": before, "during": state(tree), "pid": os.getpid()}
            hold(emit, {"event": "held", "clocks": told})
        finally:
            # The watchdog sees this end, and undoes.
            os.close(alive)
            restored = wait_for(undone)
    return {"restored": restored, "after": state(tree)}


def hold(emit, told):
    """Tell, and wait for the end of input; a host or link that is gone is one too, and so are the signals that end a session."""

    def ended(number, frame):
        raise EOFError

    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ended)
    with contextlib.suppress(EOFError, BrokenPipeError):
        # Only now: a signal that comes right after it must find its handler, also where it is ignored without one (nohup).
        emit(told)
        lock.wait_for_end_of_input(emit)
    # Nothing may come between this end and the undoing.
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def restore_leftover(root):
    """Undo what a run that was killed with its watchdog has left.

    A note from before the last start of the board is void: clocks do not outlive a restart.

    Returns:
        None where nothing was left, else whether it could be undone.
    """
    if not os.path.exists(os.path.join(root, NOTE)):
        return None
    with guard(root):
        note = read_note(root)
        if note is None:
            # The watchdog was quicker; or it is no note of ours, and says nothing.
            remove_note(root)
            return None
        done = note.get("boot") != boot_id() or undo(note["restore"])
        if done:
            remove_note(root)
        return done


@contextlib.contextmanager
def guard(root):
    """One process at a time handles the clocks; a watchdog that is still at work is waited for."""
    with open(os.path.join(root, GUARD), "a") as file:
        end = time.time() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() > end:
                    raise Failure(
                        "BoardBusyError",
                        "clocks must be free to be locked, but another process has handled them for %d s." % PATIENCE_S,
                        "wait until that run has ended",
                    )
                time.sleep(0.1)
        yield file


def start_watchdog(root, guarded):
    """Start the process that undoes the note's change once the returned descriptor is closed, by whatever end.

    Args:
        root: The board's folder.
        guarded: Descriptor of the guard, which the watchdog keeps until it is done.

    Returns:
        The descriptor whose end it waits for, and one on which it says that it is done.
    """
    owner_read, owner_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Twice forked and in a session of its own: neither the end of the connection nor a signal to the owner's group
            # reaches it.
            os.setsid()
            if os.fork():
                os._exit(0)
            os.close(owner_write)
            os.close(done_read)
            quiet = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(quiet, standard)
            close_others((owner_read, done_write, guarded))
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
                signal.signal(number, signal.SIG_IGN)
            os.read(owner_read, 1)
            note = read_note(root)
            if note is None or undo(note["restore"]):
                remove_note(root)
                os.write(done_write, b"1")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(owner_read)
    os.close(done_write)
    return owner_write, done_read


def close_others(kept):
    """Close what was inherited: an open pipe to the host would keep its connection, an open lock the owner's."""
    most = min(os.sysconf("SC_OPEN_MAX"), 4096) if hasattr(os, "sysconf") else 256
    for descriptor in range(3, most):
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def wait_for(undone):
    """Whether the watchdog said that it is done."""
    import select

    ready, _, _ = select.select([undone], [], [], PATIENCE_S)
    said = os.read(undone, 1) if ready else b""
    os.close(undone)
    return said == b"1"


def write_note(root, commands):
    """Write down how to undo, on the disk before anything is changed."""
    path = os.path.join(root, NOTE)
    partial = path + ".partial"
    with open(partial, "w") as file:
        json.dump({"boot": boot_id(), "restore": commands}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_note(root):
    """The note, or None where there is none that can be read."""
    try:
        with open(os.path.join(root, NOTE)) as file:
            note = json.load(file)
    except (IOError, OSError, ValueError):
        return None
    return note if isinstance(note, dict) and isinstance(note.get("restore"), list) else None


def remove_note(root):
    """Forget what was undone."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(root, NOTE))


def undo(commands):
    """Run the commands that undo, all of them whatever some of them say; True if all went well."""
    return all([run(entry["argv"], entry.get("input")) is None for entry in commands])


def boot_id():
    """Changes with every start of the board."""
    return Tree().read("/proc/sys/kernel/random/boot_id")


def run(argv, text=None):
    """Run a command; None, or in a few words why it failed."""
    path = os.pathsep.join([os.environ.get("PATH", "")] + ["/" + folder for folder in FOLDERS_OF_COMMANDS])
    try:
        done = subprocess.run(
            argv,
            input=(text or "").encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
            env=dict(os.environ, PATH=path),
        )
    except OSError as error:
        return "%s: %s" % (argv[0], error.strerror)
    except subprocess.TimeoutExpired:
        return "%s gave no answer within %d s" % (" ".join(argv), PATIENCE_S)
    if done.returncode == 0:
        return None
    said = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return said[-1].strip() if said else "%s ended with exit code %d" % (" ".join(argv), done.returncode)


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


def state(tree):
    """What can be read of the clocks."""
    import sensors

    found = {
        "governors": sensors.governors(tree),
        "clocks_khz": sensors.clocks(tree),
    }
    for name, program, arguments in (
        ("power_mode", "nvpmodel", ("-q",)),
        ("jetson_clocks", "jetson_clocks", ("--show",)),
        ("gpu_clocks", "nvidia-smi", ("--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader")),
    ):
        said = tree.run(program, *arguments) if tree.live else None
        if said is not None:
            found[name] = said.strip().splitlines()
    return found


class Way(object):
    """One way to lock clocks.

    Args:
        tree: Facts of the board.
        root: The board's folder.
    """

    name = ""

    def __init__(self, tree, root):
        self.tree, self.root = tree, root

    def missing(self):
        """None, or why it does not work here."""
        raise NotImplementedError

    def prepare(self):
        """Store what `restoring` needs; nothing is changed yet."""

    def apply(self):
        """Lock."""
        raise NotImplementedError

    def restoring(self):
        """Commands that undo `apply`: dictionaries of ``argv`` and, where it reads one, ``input``."""
        raise NotImplementedError

    def require(self, argv, text=None):
        """Run a command as root.

        Raises:
            failures.Failure: It failed.
        """
        reason = run(as_root(argv), text)
        if reason is not None:
            raise refusal("%s: %s" % (self.name, reason))

    def has(self, program):
        """Whether a program is there."""
        folders = os.environ.get("PATH", "").split(os.pathsep) + ["/" + folder for folder in FOLDERS_OF_COMMANDS]
        return any(os.access(os.path.join(folder, program), os.X_OK) for folder in folders)


class JetsonClocks(Way):
    """``jetson_clocks``: the highest clocks of the power mode that is chosen; it stores and restores by itself.

    Source: NVIDIA, Jetson Linux Developer Guide, "Platform Power and Performance", jetson_clocks (--store, --restore).
    """

    name = "jetson_clocks"

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

    def restoring(self):
        return [{"argv": as_root(["jetson_clocks", "--restore", self.stored])}]


class NvidiaSmi(Way):
    """``nvidia-smi --lock-gpu-clocks`` at the highest SM clock; undone by ``--reset-gpu-clocks``, which also undoes a lock
    that somebody else had set: the driver does not tell of one.

    Source: NVIDIA, nvidia-smi manual, --lock-gpu-clocks and --reset-gpu-clocks.
    """

    name = "nvidia_smi"

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
        self.require(["nvidia-smi", "--lock-gpu-clocks=%d,%d" % (clock, clock)])

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
WAYS = {way.name: way for way in (JetsonClocks, NvidiaSmi, CpuFreq)}
