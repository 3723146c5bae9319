"""Hold the clocks still while a run measures, and put them back whatever becomes of the run. Python >= 3.6.

Three processes keep the promise. The *owner* answers the host and lives as long as its standard input is open. Before it
changes anything it writes down how to undo it, and starts the *watchdog*: a process in a session of its own that waits
for the owner to end, however it ends, undoes the change and removes the note. Should both be killed, the *next run* finds
the note and undoes the change before it begins.

What is changed, and how that is undone, is in `clock_ways`.
"""

import contextlib
import fcntl
import json
import os
import signal
import time

import lock
import sensors
from clock_ways import PATIENCE_S, WAYS, refusal, run
from failures import Failure
from tree import Tree

NOTE, GUARD = "clocks.json", "clocks.lock"


def main(request, emit):
    """Verb ``clocks``: request {"root", "ways"}; locks the clocks, emits {"event": "held", "clocks": ...}, and restores
    them at the end of input.

    Args:
        request: ``ways`` names what the device type allows, see `WAYS`; all that are there are used, at least one. With
            ``nvpmodel`` among them ``power_mode`` is its mode, by name or number.
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
        ways = [WAYS[name](tree, root, request) for name in request["ways"] if name in WAYS]
        reasons = [way.missing() for way in ways]
        for way, reason in zip(ways, reasons):
            if way.asked and reason is not None:
                raise refusal(reason, "one of those, or measure in the mode that is on")
        found = [way for way, reason in zip(ways, reasons) if reason is None]
        if not found:
            raise refusal("; ".join(reasons) or "the device type names no way", "measure without --lock-clocks")
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

    Of a note from before the last start of the board only what outlives a restart counts: clocks do not, power modes do.

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
        restarted = note.get("boot") != boot_id()
        done = undo([entry for entry in note["restore"] if entry.get("lasting") or not restarted])
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


def state(tree):
    """What can be read of the clocks."""
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
