"""Reading facts out of ``/proc``, ``/sys`` and ``/etc``, or out of a folder that holds a copy of them.

Boards differ in what their kernels expose and in who may read it, so an absent or unreadable file is an ordinary answer
here: None.
"""

import glob
import os
import subprocess

FOLDERS_OF_COMMANDS = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")


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
        """Whole number, or None."""
        text = self.read(name)
        try:
            return int(text, 0) if text else None
        except ValueError:
            return None

    def exists(self, name):
        """Whether there is something of that name."""
        return os.path.exists(self.path(name))

    def run(self, program, *arguments):
        """Standard output of a program of the machine, or None when it is missing, fails, or takes over 5 s.

        It is looked for in the usual folders too, because a session over SSH often has no ``sbin`` in its path.
        """
        folders = [self.path(folder) for folder in FOLDERS_OF_COMMANDS]
        if self.live:
            folders = os.environ.get("PATH", "").split(os.pathsep) + folders
        for folder in folders:
            path = os.path.join(folder, program)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                break
        else:
            return None
        try:
            done = subprocess.run(
                [path] + list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=5.0,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
