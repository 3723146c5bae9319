"""The next step beside an error: the library's own hint in words of the command line, or what helps with errors of its kind."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from edgeprune import errors
from edgeprune.cli.placeholders import filled
from edgeprune.errors import EdgepruneError

_BY_KIND: tuple[tuple[type[EdgepruneError], str], ...] = (
    (errors.UnknownBoardError, "edgeprune device list"),
    (errors.DeviceFileError, "docs/adding.md says what a device file must hold"),
    (errors.TableFormatError, "edgeprune table card TABLE, or edgeprune profile for a new one"),
    (errors.PlanError, "edgeprune prune again: a plan belongs to one model and version"),
    (errors.ManifestError, "edgeprune compile again: nothing in an artifact may be edited"),
    (errors.ConfigError, "edgeprune {verb} --help"),
    (errors.FactoryError, "call the factory in Python to see where"),
    (errors.InputError, "--input NAME=1x3x32x32:float32 as the model's forward takes it, or --inputs FILE.npz"),
    (errors.TaskError, "mend it in the task's file; python -c 'import edgeprune; help(edgeprune.Task)'"),
    (errors.TraceError, "edgeprune explain MODEL, and mend the line that it names"),
    (errors.ConstraintError, "edgeprune explain MODEL, which names all groups"),
    (errors.EmptyPlanError, "edgeprune explain MODEL, which says what stays and why"),
    (errors.SurgeryError, "edgeprune explain MODEL, and --keep what the message names"),
    (errors.ReconstructionError, "the same command without --refit"),
    (errors.ModelError, "edgeprune explain MODEL"),
    (errors.BudgetInfeasibleError, "a larger budget"),
    (errors.TableMissingError, "edgeprune profile MODEL --board NAME"),
    (errors.TableMismatchError, "edgeprune profile MODEL --board NAME"),
    (errors.UnsupportedKernelError, "edgeprune explain MODEL, and --keep the layer that the message names"),
    (errors.PowerUnavailableError, "edgeprune doctor --board NAME, or --meter COMMAND"),
    (errors.LatencyError, "end other work on the board, then the same command again"),
    (errors.CompileError, "the same command with --verbose, which shows the compiler's log"),
    (errors.BackendError, "edgeprune doctor"),
    (errors.RemoteError, "edgeprune doctor --board NAME"),
    (errors.DeployError, "edgeprune status --board NAME"),
    (EdgepruneError, "the same command with --verbose"),
)
"""First come, first served: a class stands before its bases."""

_QUOTES = "'\""

_SPELLED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"[;,] [^;,]*\bin Python$", ""),
    (r"\bcolumns=\{'(\w+)': \.\.\.\}", r"--column \1=COLUMN"),
    (r"\bcolumns=\{'(\w+)': ('[^{}]*'|\"[^{}]*\")\}", lambda found: _pair("--column", found)),
    (r"\bconstants=\{'(\w+)': \.\.\.\}", r"--constant \1=VALUE"),
    (r"\bconstants=\{'(\w+)': '([^{}]*)'\}", r"--constant \1=\2"),
    (r"\bwhere=\{\.\.\.: ([^}]*)\}", lambda found: f"--where {shlex.quote('COLUMN=' + found[1].strip(_QUOTES))}"),
    (r"\bwhere=\{('[^{}:]*'|\"[^{}:]*\"): ([^{}]*)\}", lambda found: _pair("--where", found)),
    (r"\bfacts=\{'isa': \[([^]]*)\]\}", lambda found: f"--fact 'isa=[{found[1].replace(_QUOTES[0], _QUOTES[1])}]'"),
    (r"\blatency_(ms|us|s)=\.\.\.", r"--latency-\1 COLUMN"),
    (r"\blatency_(ms|us|s)='([\w.]+)'(?= \()", r"--latency-\1 \2"),
    (r"\blatency_(ms|us|s)=(['\"]?)([\w.()\[\]/ -]*)\2(?=$| or |, )", r"--latency-\1 \3"),
    (r"\bBudget\.of\((\w+)=\"([^\"]*)\"\)", r"--\1 \2"),
    (r"\bskip_invalid=True", "--skip-invalid"),
    (r"\b(min_width|multiple_of)=\{'([^']*)': (\w+)\}", r"--\1 '\2=\3'"),
)
"""Arguments of the library, as options."""


def _pair(option: str, found: re.Match[str]) -> str:
    """One item of a mapping."""
    return f"{option} {shlex.quote('='.join(found[place].strip(_QUOTES) for place in (1, 2)))}"


def next_step(error: EdgepruneError, words: Sequence[str]) -> str:
    """What to try after an error.

    Args:
        error: Whose own hint counts, where there is one.
        words: The command line, without the program's name.
    """
    if error.hint:
        hint = error.hint
        for pattern, option in _SPELLED:
            hint = re.sub(pattern, option, hint)
        hint = hint.replace("--min_width", "--min-width").replace("--multiple_of", "--multiple-of")
        return filled(re.sub(r" (?=[ ,]|$)", "", hint), words)
    verb = next((word for word in words if not word.startswith("-")), "")
    found = next(hint for kind, hint in _BY_KIND if isinstance(error, kind))
    return filled(found.format(verb=verb).replace("edgeprune  ", "edgeprune "), words)
