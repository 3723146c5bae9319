"""The order of file operations while a release is staged and switched to, and what a kill or a power loss at any of them leaves.

The runner's own operations are recorded as it makes them. Every prefix of them is then replayed on a copy of the board: once
whole, as after a kill, and once with every subset of what was not yet synced, as after a power loss: names are durable once their
folder was synced, contents once their file was. That is what POSIX promises, and no file system keeps less.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECORDER = """
import builtins, json, os, stat

log = os.open(os.environ["RECORD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
root = os.environ["RECORD_ROOT"] + "/"
true = {name: getattr(os, name) for name in ("open", "fsync", "symlink", "replace", "rename", "unlink", "mkdir", "rmdir")}
true_open = builtins.open


def told(operation, *paths):
    inside = [os.path.relpath(os.path.abspath(os.fspath(path)), root) for path in paths]
    if not any(path.startswith("..") for path in inside):
        os.write(log, (json.dumps([operation] + inside) + "\\n").encode())


def os_open(path, flags, *rest, **more):
    new = flags & os.O_CREAT and not os.path.lexists(path)
    found = true["open"](path, flags, *rest, **more)
    if new:
        told("create", path)
    return found


def file_open(path, mode="r", *rest, **more):
    new = isinstance(path, str) and set(mode) & set("wax") and not os.path.lexists(path)
    found = true_open(path, mode, *rest, **more)
    if new:
        told("create", path)
    return found


def fsync(descriptor):
    true["fsync"](descriptor)
    path = os.readlink("/proc/self/fd/%d" % descriptor)
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        told("sync", path)
    else:
        with true_open(path, "rb") as stream:
            content = stream.read().decode("latin-1")
        os.write(log, (json.dumps(["write", os.path.relpath(path, root), content]) + "\\n").encode())


def symlink(target, path, *rest, **more):
    true["symlink"](target, path, *rest, **more)
    os.write(log, (json.dumps(["symlink", os.path.relpath(path, root), target]) + "\\n").encode())


def wrapped(name):
    def call(*paths, **more):
        true[name](*paths, **more)
        told("rename" if name == "replace" else name, *paths[:1 if name in ("mkdir", "unlink", "rmdir") else 2])
    return call


os.open, os.fsync, os.symlink, builtins.open = os_open, fsync, symlink, file_open
for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
    setattr(os, name, wrapped(name))
os.remove = os.unlink
"""
IGNORED = {"lock", "switch.lock"}
"""Files whose contents and presence mean nothing after a restart."""


@pytest.fixture(scope="module")
def recorded(runner, tmp_path_factory):
    """(folder that holds the board as it was, the former release, the new one, what happened in between)."""
    tmp_path = tmp_path_factory.mktemp("recorded")
    board = runner(tmp_path / "board root")
    board.release("one")
    two = board.release("two")
    blobs = board.blobs("three")
    before = shutil.copytree(board.root, tmp_path / "before", symlinks=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORDER)
    log = tmp_path / "operations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "site"))
        patch.setenv("RECORD", str(log))
        patch.setenv("RECORD_ROOT", str(board.root))
        three = board.call("stage", **blobs)["folder"]
        assert board.call("activate", folder=three)["current"] == three
    operations = [json.loads(line) for line in log.read_text().splitlines()]
    return before, two, three, [one for one in operations if one[1] not in IGNORED]


def parent(path):
    return str(Path(path).parent)


def pending(operations):
    """Numbers of the operations that a power loss may undo, after these have happened."""
    durable = set()
    for number, operation in enumerate(operations):
        if operation[0] == "write":
            durable.add(number)  # recorded where the file was synced
        if operation[0] != "sync":
            continue
        for earlier, (kind, *paths) in enumerate(operations[:number]):
            if kind not in ("write", "sync") and parent(paths[-1] if kind == "rename" else paths[0]) == operation[1]:
                durable.add(earlier)
                if kind == "rename":
                    # What a durable name leads to is there, by whatever name it was made.
                    made = [
                        at
                        for at, one in enumerate(operations[:earlier])
                        if one[0] in ("mkdir", "create", "symlink") and one[1] == paths[0]
                    ]
                    durable.update(made[-1:])
    # A file may be synced whose name is not yet: its content is lost with the name, which needs no entry of its own.
    return [number for number, one in enumerate(operations) if number not in durable and one[0] != "sync"]


def replay(root, operations, lost=()):
    """Make the operations on a copy of the board, but for the lost ones and those that need them."""
    for number, (kind, *arguments) in enumerate(operations):
        if number in lost:
            continue
        path = root / arguments[0]
        try:
            if kind == "create":
                path.open("xb").close()
            elif kind == "write" and path.exists():
                path.chmod(0o644)
                path.write_bytes(arguments[1].encode("latin-1"))
            elif kind == "symlink":
                path.symlink_to(arguments[1])
            elif kind == "rename":
                path.replace(root / arguments[1])
            elif kind == "unlink":
                path.unlink()
            elif kind == "mkdir":
                path.mkdir()
            elif kind == "rmdir":
                path.rmdir()
        except (FileNotFoundError, FileExistsError):
            assert lost, "an operation must be possible where all before it were made"


def broken_states(board, recorded, scratch, operations):
    """What is wrong with ``current`` after a kill or a power loss at some operation, one by one."""
    before, two, three, _ = recorded
    seen = set()
    # What breaks shows near the end, where ``current`` moves.
    for end in reversed(range(len(operations) + 1)):
        prefix = operations[:end]
        open_ones = pending(prefix)
        assert len(open_ones) <= 12, "too much is never synced"
        for count in range(len(open_ones) + 1):
            for lost in itertools.combinations(open_ones, count):
                # The same operations make the same state, whatever was synced in between.
                made = tuple(at for at, one in enumerate(prefix) if at not in lost and one[0] != "sync")
                if made in seen:
                    continue
                seen.add(made)
                root = scratch / f"copy {len(seen)}"
                shutil.copytree(before, root, symlinks=True, copy_function=os.link)
                detach(root, prefix)
                replay(root, prefix, lost)
                target = root / "current"
                name = str(target.readlink()) if target.is_symlink() else None
                if name not in (f"releases/{two}", f"releases/{three}"):
                    yield f"after {end} of {len(operations)} without {lost}: current is {name}"
                elif not (target / "manifest.json").exists() or board.damaged(target):
                    yield f"after {end} of {len(operations)} without {lost}: {name} is not whole"
                shutil.rmtree(root)


def detach(root, operations):
    """Files of the copy share their contents with the original until they are written: give these their own."""
    for kind, path, *_ in operations:
        if kind == "write" and (root / path).exists():
            content = (root / path).read_bytes()
            (root / path).unlink()
            (root / path).write_bytes(content)


def test_kill_or_power_loss_at_any_operation_leaves_a_whole_release_current(board, recorded, tmp_path):
    operations = recorded[3]
    assert list(broken_states(board, recorded, tmp_path, operations)) == []


def test_link_is_on_the_disk_before_it_is_renamed_and_the_rename_before_the_end(recorded):
    _, _, three, operations = recorded
    kinds = [[one[0], *one[1:2]] for one in operations]
    (switch,) = [at for at, one in enumerate(operations) if one[0] == "rename" and one[2] == "current"]
    link = operations[switch][1]
    made = kinds.index(["symlink", link])
    staged = next(at for at, one in enumerate(operations) if one[0] == "rename" and one[2] == f"releases/{three}")
    engine = next(at for at, one in enumerate(kinds) if one[0] == "write" and one[1].endswith("engine.onnx"))
    partial = parent(operations[engine][1])
    assert engine < kinds.index(["sync", partial]) < staged < kinds.index(["sync", "releases"], staged) < made
    assert made < kinds.index(["sync", "."], made) < switch < kinds.index(["sync", "."], switch)
    assert "unlink" not in {kind for kind, path in kinds if path == "current"}
    assert [path for kind, path in kinds if kind == "write"].count("journal.jsonl") == 2


@pytest.mark.parametrize(
    ("mistake", "broken"),
    [
        (lambda one: None if one == ["sync", "releases"] else [one], "is not whole"),
        (lambda one: None if one[0] == "write" and one[1].endswith("engine.onnx") else [one], "is not whole"),
        (lambda one: None if one[0] == "sync" and "release-" in one[1] else [one], "is not whole"),
        (
            lambda one: [["unlink", "current"], one] if one[0] == "rename" and one[2] == "current" else [one],
            "current is None",
        ),
    ],
    ids=["releases not synced", "file not synced", "folder not synced", "link removed first"],
)
def test_the_check_notices_what_would_break(board, recorded, tmp_path, mistake, broken):
    operations = [kept for one in recorded[3] for kept in mistake(one) or []]
    assert any(broken in one for one in broken_states(board, recorded, tmp_path, operations))


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace on this machine")
def test_kernel_sees_the_same_order(board, tmp_path):
    board.release("one")
    two = board.call("stage", **board.blobs("two"))["folder"]
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-o", str(trace), "-e", "trace=fsync,rename,renameat,renameat2,symlink,symlinkat"]
    request = json.dumps({"root": str(board.root), "folder": two}) + "\n"
    done = subprocess.run(
        [*command, sys.executable, str(board.program), "activate"], input=request, capture_output=True, text=True
    )
    if "ptrace" in done.stderr:
        pytest.skip("this machine does not let processes be traced")
    assert done.returncode == 0, done.stderr
    lines = [line for line in trace.read_text().splitlines() if str(board.root) in line or "releases/" in line]
    switch = next(at for at, line in enumerate(lines) if "rename" in line and '/current"' in line)
    link = next(at for at, line in enumerate(lines) if "symlink" in line and ".current-" in line)
    synced = [at for at, line in enumerate(lines) if "fsync" in line and f"<{board.root}>" in line]
    journal = [at for at, line in enumerate(lines) if "fsync" in line and "journal.jsonl" in line]
    assert journal[0] < link < switch < journal[-1]
    assert any(link < at < switch for at in synced)
    assert any(switch < at for at in synced)
