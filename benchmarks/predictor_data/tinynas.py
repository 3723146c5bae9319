"""Convolutions that TinyNAS (alibaba/lightweight-neural-architecture-search, Apache-2.0) timed with TensorRT on a V100."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import edgeprune

from . import is_test

HELD_OUT_CHANNELS = ("96", "384", "1280")
"""Output channels that one of the tasks leaves out of the training part altogether."""

Row = dict[str, str]

_SHARED = {
    "height": "h",
    "width": "w",
    "kernel_size": "kernel",
    "stride": "stride",
    "residual": "elmt_fused",
    "precision": "precision",
    "batch": "batch",
}
_KINDS = {
    "Regular": ("conv2d", {"in_channels": "cin", "out_channels": "cout", **_SHARED}),
    "Depthwise": ("depthwise_conv2d", {"channels": "cin", **_SHARED}),
}


def load(folder: Path, precision: str = "fp16", batch: str = "1") -> tuple[list[Row], list[Row]]:
    """Training and test rows; the configuration is the text of all fields but the time."""
    with (folder / "tinynas_v100_trt" / f"flat_{precision}.csv").open(newline="") as stream:
        reader = csv.DictReader(stream)
        fields = [field for field in reader.fieldnames or () if field != "latency_ms"]
        rows = [row for row in reader if row["batch"] == batch]
    held_out = [is_test(",".join(row[field] for field in fields)) for row in rows]
    train = [row for row, test in zip(rows, held_out, strict=True) if not test]
    return train, [row for row, test in zip(rows, held_out, strict=True) if test]


def table(rows: Sequence[Row]) -> edgeprune.LatencyTable:
    """Rows as a user would import them; what is known of the device is its number of multiprocessors (a V100 has 80)."""
    found: edgeprune.LatencyTable | None = None
    for kind, (kernel, columns) in _KINDS.items():
        chosen = [row for row in rows if row["conv_type"] == kind]
        if not chosen:
            continue
        text = io.StringIO()
        writer = csv.DictWriter(text, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
        text.seek(0)
        part = edgeprune.LatencyTable.from_csv(
            text,
            kernel=kernel,
            columns=columns,
            latency_ms="latency_ms",
            device="V100",
            runtime="tensorrt",
            facts={"multiprocessors": 80},
        )
        found = part if found is None else found.merge(part)
    if found is None:
        raise ValueError("a table must be made of at least one row, found none.")
    return found
