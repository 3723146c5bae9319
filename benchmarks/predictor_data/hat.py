"""Transformers timed by HAT (mit-han-lab/hardware-aware-transformers, MIT), encoder and decoder, milliseconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import is_test

FILES = {
    "Raspberry Pi, En-De": "wmt14ende_cpu_raspberrypi_all.csv",
    "Raspberry Pi, En-Fr": "wmt14enfr_cpu_raspberrypi_all.csv",
}


class Transformers(NamedTuple):
    """Descriptions and times.

    Attributes:
        descriptions: Field to number, per network.
        test: Shape (networks,): whether it is held out.
        ms: Shape (networks,): encoder and decoder together.
    """

    descriptions: list[dict[str, float]]
    test: np.ndarray
    ms: np.ndarray


def load(folder: Path, name: str) -> Transformers:
    """All networks of one file; the configuration is the text of its ten fields."""
    with (folder / "hat" / FILES[name]).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    fields = [field for field in rows[0] if not field.startswith("latency_")]
    return Transformers(
        [{field: float(row[field]) for field in fields} for row in rows],
        np.array([is_test(",".join(row[field] for field in fields)) for row in rows]),
        np.array([float(row["latency_mean_encoder"]) + float(row["latency_mean_decoder"]) for row in rows]),
    )
