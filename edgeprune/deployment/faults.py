"""Test hook: die hard after a named state, as a power cut or `kill -9` would, or be interrupted there, as by Ctrl-C.

With the environment variable ``EDGEPRUNE_FAULT=after:<state>`` the process ends at once (exit status 137, nothing cleaned up)
when `reached` is called with that state. States of a deployment on this machine are `edgeprune.deployment.deploying.STATES`;
those that start with ``board:`` (`edgeprune/boards/onboard/releases.py`) travel with the request and end the runner on the
board instead. With ``EDGEPRUNE_FAULT=interrupt:<state>`` the process sends itself SIGINT there. Without the variable nothing
happens.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "EDGEPRUNE_FAULT"


def reached(state: str) -> None:
    """End or interrupt this process when the fault variable names `state`."""
    fault = os.environ.get(VARIABLE)
    if fault == f"after:{state}":
        os._exit(137)
    if fault == f"interrupt:{state}":
        signal.raise_signal(signal.SIGINT)


def request_fields() -> dict[str, str]:
    """What a request to the board must hold, so that faults fire there."""
    fault = os.environ.get(VARIABLE, "")
    return {"fault": fault} if fault.startswith("after:board:") else {}
