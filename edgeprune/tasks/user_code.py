"""What the user's own code raises, as a `TaskError` that names the line; a bug of theirs is none of edgeprune."""

from __future__ import annotations

import logging
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from edgeprune.errors import EdgepruneError, TaskError

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = {"site-packages", "dist-packages"}
_MESSAGE_CHARS = 300

_log = logging.getLogger("edgeprune.tasks")


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Run the user's code in a block.

    Args:
        what: Whose code it is, e.g. ``"the metric of objective 'top-1'"``.

    Raises:
        TaskError: The block raised something; says what, and in which line of the user's. The cause is the original.
    """
    try:
        yield
    except EdgepruneError:
        raise
    except (Exception, SystemExit) as error:
        _log.debug("%s raised", what, exc_info=error)
        where = location(error.__traceback__)
        raise TaskError(
            f"{what} must run without errors, it raised {described(error)}{f' ({where})' if where else ''}.",
            hint=f"mend {where or 'it'}; the same with --verbose shows the whole traceback",
        ) from error


def described(error: BaseException) -> str:
    """Class and text of an exception in one line, without a full stop."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _MESSAGE_CHARS else text[:_MESSAGE_CHARS].rstrip() + " ..."
    return f"{type(error).__name__}: {text}".rstrip(".: ") if text else type(error).__name__


def location(trace: TracebackType | None) -> str | None:
    """``file.py:7`` of the innermost frame that is neither edgeprune's nor that of an installed package."""
    not_theirs = {Path(sysconfig.get_path("stdlib")).resolve(), _PACKAGE}
    for frame in reversed(traceback.extract_tb(trace)):
        path = Path(frame.filename)
        installed = not _INSTALLED.isdisjoint(path.parts) or not not_theirs.isdisjoint(path.resolve().parents)
        if path.is_file() and not installed:
            near = os.path.relpath(path)
            return f"{path if near.startswith(os.pardir) else near}:{frame.lineno}"
    return None
