"""The on-board runner carried along with a request, for what must leave no file on a board."""

from __future__ import annotations

from edgeprune.boards.runner_package import runner_package

# One line and no backslash: not every login shell passes on line ends within quotes, and fish reads backslashes there.
_FIRST_WORD = (
    "import io, os, sys, zipfile; "
    "size, data = int(sys.argv[1]), bytearray(); "
    'exec("while len(data) < size: data += os.read(0, size - len(data)) or sys.exit(1)"); '
    "opened = zipfile.ZipFile(io.BytesIO(data)); "
    'carried = dict(__name__="carried"); '
    'exec(opened.read("carried.py").decode("utf-8"), carried); '
    'sys.exit(carried["main"](opened, sys.argv[1:]))'
)


def carried(python: str, verb: str, request: bytes) -> tuple[list[str], bytes]:
    """Command and standard input that run a verb of the runner out of memory.

    Args:
        python: The board's Python.
        verb: Of the runner.
        request: Its line of JSON.
    """
    content = runner_package().content
    return [python, "-c", _FIRST_WORD, str(len(content)), verb], content + request
