"""What third-party libraries say stays off the terminal, unless ``--verbose`` asks for it.

Set once by the command line's entry point; the library itself never touches logging or warning settings.
"""

from __future__ import annotations

import logging
import sys
import warnings


class _QuietLogger(logging.Logger):
    """Drops records of everything but edgeprune.

    Filters on the root logger are not enough: torch puts handlers of its own on its own loggers.
    """

    def handle(self, record: logging.LogRecord) -> None:
        if self.name == "edgeprune" or self.name.startswith("edgeprune."):
            super().handle(record)


class _OneLineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


def install(*, verbose: bool) -> None:
    """Set logging and warnings for this process.

    Args:
        verbose: Show the log of edgeprune in full, and warnings of all libraries; else only edgeprune's own warnings.
    """
    handler = logging.StreamHandler(sys.stderr)
    if verbose:
        handler.setFormatter(logging.Formatter("%(relativeCreated)7.0f ms %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("edgeprune").setLevel(logging.DEBUG)
    else:
        logging.setLoggerClass(_QuietLogger)
        handler.setFormatter(_OneLineFormatter())
        warnings.simplefilter("ignore")
        logging.getLogger("edgeprune").setLevel(logging.WARNING)
    logging.captureWarnings(verbose)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
