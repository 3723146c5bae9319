"""The first thing that a board is asked: whether its Python can run the runner, where its folder is, and what lies there."""

from __future__ import annotations

from typing import NamedTuple

from edgeprune.boards.runner_events import parse_object
from edgeprune.boards.transport import CommandResult

# Also valid Python 2, whose answer is then refused for its version and not for a syntax error; one line, since not every
# login shell passes on line ends within quotes.
GREETING = (
    "import json, os, sys; "
    'root = os.path.join(os.path.expanduser("~"), os.path.expanduser(sys.argv[1])); '
    'runner = os.path.join(root, "runner", sys.argv[2]); '
    "size = os.path.getsize(runner) if os.path.isfile(runner) else -1; "
    'home = os.path.join(root, "environment"); '
    'maker = os.path.join(home, "maker"); '
    'told = open(maker, "rb").read().decode("utf-8", "replace") if os.path.isfile(maker) else ""; '
    'own = os.path.join(home, "bin", "python"); '
    # As `maker_now` of the onboard environments says it.
    'asked = "%d.%d %s" % (tuple(sys.version_info[:2]) + (sys.prefix,)); '
    "own = own if told == asked and os.path.exists(own) else None; "
    'print(""); '
    'print(json.dumps({"greeting": 1, "version": list(sys.version_info[:3]), "root": root, "runner_bytes": size, '
    '"python": own}))'
)


class Greeting(NamedTuple):
    """What the board answered.

    Attributes:
        version: Of its Python.
        root: Absolute root folder.
        runner_bytes: Size of the runner of this version that lies there; -1 where there is none.
        python: Python of the environment that the asked Python made there, or None.
    """

    version: tuple[int, ...]
    root: str
    runner_bytes: int
    python: str | None


def answer_of(ended: CommandResult) -> Greeting | str:
    """The answer to `GREETING`; where there is none, the last line of its complaint."""
    for line in reversed(ended.stdout.decode("utf-8", "replace").splitlines()):
        answer = parse_object(line)
        if answer is not None and "greeting" in answer:
            own = answer.get("python")
            return Greeting(
                tuple(answer["version"]),
                str(answer["root"]),
                int(answer["runner_bytes"]),
                None if own is None else str(own),
            )
    said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
    return said[-1].strip() if said else ""
