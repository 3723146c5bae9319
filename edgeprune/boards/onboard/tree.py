"""Reading facts out of ``/proc``, ``/sys`` and ``/etc``, or out of a folder that holds a copy of them.

Boards differ in what their kernels expose and in who may read it, so an absent or unreadable file is an ordinary answer
here: None.
"""

import glob
import os
import select
import subprocess
import time

FOLDERS_OF_COMMANDS = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")
DEADLINE_S = 5.0
"""Longest that a program may take to answer, seconds."""


class Tree(object):
    """File system facts of one machine.

    Args:
        sysroot: ``/``, or the folder of a captured tree.
    """

    def __init__(self, sysroot="/"):
        self.sysroot = os.path.abspath(sysroot)

    @property
    def live(self):
        """Whether this is the running machine."""
        return self.sysroot == "/"

    def path(self, name):
        """Absolute path of ``name``, which is written with its leading slash, as on the machine itself."""
        return os.path.join(self.sysroot, name.lstrip("/"))

    def glob(self, pattern):
        """Matching paths as on the machine itself, sorted."""
        cut = 0 if self.live else len(self.sysroot)
        return sorted(found[cut:] for found in glob.glob(self.path(pattern)))

    def read_bytes(self, name):
        """Content, or None. Sensors answer with all kinds of errors (EIO, EAGAIN, EACCES)."""
        try:
            with open(self.path(name), "rb") as file:
                return file.read()
        except (IOError, OSError):
            return None

    def read(self, name):
        """Text without surrounding white space and the NUL bytes of a device tree, or None."""
        content = self.read_bytes(name)
        if content is None:
            return None
        return content.decode("utf-8", "replace").replace("\0", " ").strip()

    def read_int(self, name):
        """Whole number of at most 64 bits, as the kernel writes them, or None."""
        text = self.read(name)
        try:
            value = int(text, 0) if text else None
        except ValueError:
            return None
        return value if value is not None and abs(value) < 1 << 64 else None

    def exists(self, name):
        """Whether there is something of that name."""
        return os.path.exists(self.path(name))

    def find_program(self, program):
        """Path of a program of the machine, or None.

        It is looked for in the usual folders too, because a session over SSH often has no ``sbin`` in its path.
        """
        folders = [self.path(folder) for folder in FOLDERS_OF_COMMANDS]
        if self.live:
            folders = os.environ.get("PATH", "").split(os.pathsep) + folders
        for folder in folders:
            path = os.path.join(folder, program)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
        return None

    def run(self, program, *arguments):
        """Standard output of a program of the machine, or None when it is missing, fails, or takes over 5 s."""
        path = self.find_program(program)
        if path is None:
            return None
        try:
            done = subprocess.run(
                [path] + list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=DEADLINE_S,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None

    def first_line(self, command, wanted):
        """First line of a program that never ends by itself which is `wanted`, within 5 s; the program is ended.

        Args:
            command: Its command line.
            wanted: Takes a line, says whether it is the one.

        Returns:
            (the line, ""), or (None, what it said last or how it ended).
        """
        try:
            child = start(command)
        except OSError as error:
            return None, error.strerror or str(error)
        end = time.monotonic() + DEADLINE_S
        pending, last = b"", ""
        try:
            while True:
                ready, _, _ = select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))
                chunk = os.read(child.stdout.fileno(), 65536) if ready else b""
                if not chunk:
                    return None, last
                lines = (pending + chunk).split(b"\n")
                pending = lines.pop()[-65536:]
                for text in (line.decode("utf-8", "replace").strip() for line in lines):
                    if wanted(text):
                        return text, ""
                    last = text or last
        finally:
            stop(child)


def start(command):
    """Start a program that prints lines; its messages come with its lines.

    It stays in this process's group, so that what ends the runner from outside ends it too.

    Raises:
        OSError: It cannot be started.
    """
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stop(child):
    """End a program that `start` started; what it started itself ends when it next prints into the closed pipe."""
    child.kill()
    child.wait()
    child.stdout.close()
