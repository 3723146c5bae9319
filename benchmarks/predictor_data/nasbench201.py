"""NAS-Bench-201 cells timed by HELP (HayeonLee/HELP, MIT) on many devices, milliseconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import is_test

TARGETS = ("raspi4", "pixel2", "samsung_s7", "gold_6226", "titan_rtx_1", "2080ti_256")
"""New devices: a board, two phones, a server CPU, a GPU at batch 1 and one at batch 256. None is an estimate."""

SOURCES = (
    "pixel3",
    "samsung_a50",
    "essential_ph_1",
    "gold_6240",
    "silver_4114",
    "1080ti_1",
    "titanx_32",
    "titanxp_256",
)
"""Devices whose tables are known already. No target's machine is among them."""

LEAST_MS = 0.2
"""Times below are failed measurements (some 200 of 15 625 on two of the devices) and are left out."""


class Cells(NamedTuple):
    """Descriptions and times.

    Attributes:
        descriptions: Edge to operation, per cell.
        test: Shape (cells,): whether the cell is held out.
        ms: Device to times of shape (cells,); NaN where masked.
    """

    descriptions: list[dict[str, str]]
    test: np.ndarray
    ms: dict[str, np.ndarray]


def load(folder: Path) -> Cells:
    """All cells."""
    with (folder / "help_latency" / "nasbench201_latency_ms.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    times = {device: np.array([float(row[device]) for row in rows]) for device in (*TARGETS, *SOURCES)}
    return Cells(
        [describe(row["arch"]) for row in rows],
        np.array([is_test(row["arch"]) for row in rows]),
        {device: np.where(ms >= LEAST_MS, ms, np.nan) for device, ms in times.items()},
    )


def describe(arch: str) -> dict[str, str]:
    """``|op~0|+|op~0|op~1|+...`` as edge to operation."""
    edges = {}
    for node, part in enumerate(arch.split("+"), start=1):
        for edge in part.strip("|").split("|"):
            operation, _, origin = edge.partition("~")
            edges[f"{origin}-{node}"] = operation
    return edges
