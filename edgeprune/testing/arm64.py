"""An arm64 Debian behind a native sshd: another architecture from end to end, by qemu's user-mode emulation.

The userland is made once by debootstrap and kept; each board begins with a fresh layer over it. All mounts are in a mount
namespace of the server's own, and go with it. What runs there is *emulated*: numbers are right, and times mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from edgeprune.testing.ssh_server import MissingPartError, program, with_own_mounts
from edgeprune.testing.sshd import OpenSshServer

CACHE_VARIABLE = "EDGEPRUNE_TEST_CACHE"
"""Environment variable with the folder that keeps the userland between runs of the tests."""
MIRROR_VARIABLE = "EDGEPRUNE_DEBIAN_MIRROR"
"""Environment variable with the Debian mirror that debootstrap asks."""

_SUITE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_DEBOOTSTRAP_S = 1800.0

# The first bytes of an arm64 program, and which of their bits count.
# Source: qemu, scripts/qemu-binfmt-conf.sh (aarch64_magic, aarch64_mask).
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
_KINDS = "/proc/sys/fs/binfmt_misc"
# An emulator that this machine has registered itself is used. F: opened now, so that it is found in any root folder.
# Source: Linux, Documentation/admin-guide/binfmt-misc.rst.
_REGISTER = (
    f"[ -e {_KINDS}/register ] || mount -t binfmt_misc binfmt_misc {_KINDS} || exit 91; "
    f"grep -qs '^flags: .*F' {_KINDS}/qemu-aarch64 || [ -e {_KINDS}/$2 ] || "
    f"printf %s ':'\"$2\"':M::{_MAGIC}:{_MASK}:'\"$1\"':POF' > {_KINDS}/register || exit 92; shift 2; "
)
_LACKING = {
    91: "no binfmt_misc can be mounted here",
    92: "qemu cannot be registered with the kernel here",
    93: "no overlay can be mounted here",
    94: "no /proc, /sys and /dev can be mounted into a folder here",
}
"""What the exit codes of the scripts above mean."""
_UNREGISTER = (
    f"[ -e {_KINDS}/register ] || mount -t binfmt_misc binfmt_misc {_KINDS} || exit 0; "
    f"[ ! -e {_KINDS}/$1 ] || echo -1 > {_KINDS}/$1"
)
_ENTER = (
    _REGISTER + 'mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$3" || exit 93; '
    'for name in proc sys dev; do mount --rbind "/$name" "$3/$name" || exit 94; done; shift 3; exec "$@"'
)


def userland(cache: Path) -> Path:
    """A folder with an arm64 Debian and Python 3, made where the cache has none: some minutes, and 300 MB.

    Args:
        cache: Folder that keeps it, on a file system that can hold devices and set-uid programs.

    Raises:
        MissingPartError: A program, root's rights, or the network are missing.
    """
    qemu = _emulator()
    made = cache / f"{_SUITE}-arm64"
    if made.is_dir():
        return made
    debootstrap = program("debootstrap", "debootstrap")
    partial = made.with_name(f"{made.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    mirror = os.environ.get(MIRROR_VARIABLE, _MIRROR)
    log = cache / f"debootstrap-{os.getpid()}.log"
    command = [debootstrap, "--arch=arm64", "--variant=minbase", "--include=python3", _SUITE, str(partial), mirror]
    try:
        with log.open("wb") as said:
            done = subprocess.run(
                [*with_own_mounts(), "/bin/sh", "-c", _REGISTER + 'exec "$@"', "sh", qemu, _entry(), *command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=_DEBOOTSTRAP_S,
                check=False,
            )
    finally:
        unregister()
    if done.returncode in _LACKING:
        raise MissingPartError(f"{_LACKING[done.returncode]}: {log.read_text(errors='replace').strip()}")
    if done.returncode:
        last = (log.read_text(errors="replace").splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MissingPartError(f"no arm64 Debian can be made here, debootstrap says: {last}")
    log.unlink()
    if made.is_dir():  # another run was quicker
        shutil.rmtree(partial)
    else:
        partial.rename(made)
    return made


class Arm64Board(OpenSshServer):
    """A native ``sshd`` whose sessions are confined to an arm64 userland; see `OpenSshServer`."""

    def __init__(self, folder: Path, lower: Path, *, cpu: str = "max") -> None:
        """Nothing runs or is mounted yet.

        Args:
            folder: An existing folder for its files, the layer with what the board writes among them.
            lower: What `userland` made; it is left as it is.
            cpu: Processor that qemu emulates, as ``qemu-aarch64 -cpu help`` lists them.

        Raises:
            MissingPartError: A program or root's rights are missing.
        """
        self._qemu = _emulator()
        self._lower = lower
        # sshd demands that nobody but root can write to any folder above.
        self.root = Path(f"/run/ep-arm64-{os.getpid()}-{folder.name}")
        self._layer = folder / "layer"
        super().__init__(folder, environment={"QEMU_CPU": cpu}, options=[f'ChrootDirectory "{self.root}"'])

    def _command(self) -> list[str]:
        words = [self._qemu, _entry(), str(self._lower), str(self._layer), str(self.root)]
        return [*with_own_mounts(), "/bin/sh", "-c", _ENTER, "sh", *words, *super()._command()]

    def _write_configuration(self) -> None:
        super()._write_configuration()
        for place in (self._layer / "upper", self._layer / "work", self.root):
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(0o755)

    def _answers(self) -> bool:
        if super()._answers():
            return True
        lacking = _LACKING.get(self._process.returncode) if self._process is not None else None
        if lacking is not None:
            self.stop()
            raise MissingPartError(f"{lacking}: {' '.join(self.log.split())[-300:]}")
        return False

    def stop(self) -> None:
        """End the server and everything that runs in the userland, and what was registered with the kernel."""
        within = self._namespace()
        super().stop()
        # A server that has only just been started is still among this machine's own mounts.
        if within is not None and within != str(Path("/proc/self/ns/mnt").readlink()):
            _end_all_in(within)
        unregister()
        with contextlib.suppress(FileNotFoundError):
            self.root.rmdir()

    def with_processor(self, folder: Path, cpu: str) -> OpenSshServer:
        """Another server for the same userland, while this one runs: the same board with another processor.

        Args:
            folder: An existing folder for its files.
            cpu: Processor that qemu emulates for what it starts.
        """
        assert self._process is not None
        return _SameUserland(folder, self.root, self._process.pid, cpu)

    def _namespace(self) -> str | None:
        if self._process is None or self._process.poll() is not None:
            return None
        return str(Path(f"/proc/{self._process.pid}/ns/mnt").readlink())


class _SameUserland(OpenSshServer):
    def __init__(self, folder: Path, root: Path, pid: int, cpu: str) -> None:
        self._enter = [program("nsenter", "util-linux"), "--mount", "--target", str(pid), "--"]
        super().__init__(folder, environment={"QEMU_CPU": cpu}, options=[f'ChrootDirectory "{root}"'])

    def _command(self) -> list[str]:
        return [*self._enter, *super()._command()]


def unregister() -> None:
    """Take qemu out of the kernel's list of interpreters, if this module has put it there."""
    subprocess.run([*with_own_mounts(), "/bin/sh", "-c", _UNREGISTER, "sh", _entry()], capture_output=True, check=False)


def _entry() -> str:
    """Name of what this process registers: runs of tests beside each other must not take qemu from one another."""
    return f"ep-qemu-aarch64-{os.getpid()}"


def _emulator() -> str:
    path = program("qemu-aarch64-static", "qemu-user-static")
    if os.geteuid() != 0:
        raise MissingPartError("an arm64 userland is mounted by root only")
    return path


def _end_all_in(namespace: str) -> None:
    for pid in _members(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _members(namespace: str) -> Iterator[int]:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str((place / "ns" / "mnt").readlink()) == namespace:
                yield int(place.name)
        except OSError:
            continue
