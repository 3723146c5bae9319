"""Other people's measurements on real devices, and the one rule that says what of them is held out."""

from __future__ import annotations

import hashlib


def is_test(config: str) -> bool:
    """Whether a configuration is held out: a fifth of them, by the SHA-1 of their text."""
    return int(hashlib.sha1(config.encode()).hexdigest(), 16) % 5 == 0
