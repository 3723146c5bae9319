"""The table of distillation losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgeprune.errors import ConfigError
from edgeprune.extensions import Extensions

if TYPE_CHECKING:
    from edgeprune.recovery.distillation._base import Distillation

DISTILLATIONS: Extensions[Distillation] = Extensions(
    "a distillation",
    "edgeprune.distillation",
    {
        "logits": "edgeprune.recovery.distillation.logits:Logits",
        "features": "edgeprune.recovery.distillation.features:Features",
        "channelwise": "edgeprune.recovery.distillation.channelwise:Channelwise",
        "attention": "edgeprune.recovery.distillation.attention:Attention",
    },
)
names, get = DISTILLATIONS.names, DISTILLATIONS.make


def require_names(names: Iterable[str]) -> None:
    """Refuse what is none, before anything is imported for it.

    Raises:
        ConfigError: There is no distillation of a name.
    """
    known = DISTILLATIONS.names()
    for name in names:
        if name not in known:
            raise ConfigError(f"{DISTILLATIONS.what} must be one of {', '.join(known)}, found {name!r}.")
