"""Test hook: die hard after a named state, as a power cut or `kill -9` would.

With the environment variable ``EDGEPRUNE_FAULT=after:<state>`` the process ends at once (exit status 137, nothing cleaned up)
when `reached` is called with that state. States of a deployment on this machine are `edgeprune.deployment.deploying.STATES`;
those that start with ``board:`` (`edgeprune/boards/onboard/releases.py`) travel with the request and end the runner on the
board instead. Without the variable nothing happens.
"""

from __future__ import annotations

import os

VARIABLE = "EDGEPRUNE_FAULT"


def reached(state: str) -> None:
    """End this process when the fault variable names `state`."""
    if os.environ.get(VARIABLE) == f"after:{state}":
        os._exit(137)


def request_fields() -> dict[str, str]:
    """What a request to the board must hold, so that faults fire there."""
    fault = os.environ.get(VARIABLE, "")
    return {"fault": fault} if fault.startswith("after:board:") else {}
