"""The runner without a file of it on the board: it came with the request, and lives in the memory of this process alone.

The host's first word (`edgeprune/boards/carrying.py`) reads the archive from standard input and runs this file, which has every
other module imported out of that archive. Python >= 3.6, stdlib only.
"""

import importlib.abc
import importlib.util
import os
import sys


class Archive(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports modules from an open zip archive.

    Args:
        opened: The archive; its modules lie at its top.
    """

    def __init__(self, opened):
        self._sources = {name[: -len(".py")]: opened.read(name).decode("utf-8") for name in opened.namelist()}

    def find_spec(self, fullname, path=None, target=None):
        """The module of the archive, or None."""
        return importlib.util.spec_from_loader(fullname, self) if fullname in self._sources else None

    def get_source(self, fullname):
        """Source of a module of the archive."""
        return self._sources[fullname]

    def is_package(self, fullname):
        """None of them is."""
        return False


def main(opened, words):
    """Run a verb; the exit code.

    Args:
        opened: The archive.
        words: As the runner's own ``sys.argv``.
    """
    # Nor is anything else written: what is imported to see whether it loads would be compiled and kept.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # `python -c` looks in the folder that it was started in first; a file there is none of the runner's.
    if sys.path and sys.path[0] == "":
        del sys.path[0]
    archive = Archive(opened)
    sys.meta_path.insert(0, archive)
    runner = {"__name__": "runner"}
    exec(archive.get_code("__main__"), runner)
    return runner["main"](words)
