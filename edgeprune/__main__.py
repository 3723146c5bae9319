"""``python -m edgeprune`` is the same as ``edgeprune``."""

from __future__ import annotations

import sys

from edgeprune.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
