"""Convolutions that DeepBench (baidu-research/DeepBench, Apache-2.0) timed on several accelerators, forward pass, fp32."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import edgeprune

from . import is_test

FILES = {
    "Titan Xp": "NV_TitanXp_train__FP32.csv",
    "GTX 1080 Ti": "NV_1080Ti_train__Results_FP32.csv",
    "P100": "NV_P100_train__Results_FP32.csv",
    "M40": "NV_M40_train__Results_FP32.csv",
    "V100": "NV_V100_train__Results_FP32.csv",
    "T4": "NV_T4_train__Results_FP32.csv",
    "MI25": "AMD_MI25_train__Results_FP32.csv",
    "KNL 7250": "IA_KNL7250_train__Results_FP32.csv",
}
"""Device to the file of its sheet."""

_COLUMNS = ("batch", "in_channels", "height", "width", "out_channels", "kernel_size", "stride", "padding")


def rows(folder: Path, device: str) -> list[dict[str, str]]:
    """The convolutions of one sheet; its columns come in two orders and several spellings."""
    with (folder / "deepbench" / FILES[device]).open(newline="") as stream:
        sheet = list(csv.reader(stream))
    start = next(number for number, line in enumerate(sheet) if line and line[0] == "Convolution")
    names = [name.strip().lower().partition(" (")[0] for name in sheet[start + 1]]
    found = []
    for line in sheet[start + 2 :]:
        if not (len(line) > 13 and line[2].strip().isdigit()):
            break
        cell = dict(zip(names, line, strict=False))
        pair = {"vertical": cell["vertical stride"], "horizontal": cell["horizontal stride"]}
        found.append(
            {
                "batch": cell["n"],
                "in_channels": cell["c"],
                "height": cell["h"],
                "width": cell["w"],
                "out_channels": cell["k"],
                "kernel_size": f"{cell['r']}x{cell['s']}",
                "stride": f"{pair['vertical']}x{pair['horizontal']}",
                "padding": f"{cell['pad_h']}x{cell['pad_w']}",
                "forward_ms": str(float(cell["forward"])),
            }
        )
    return found


def table(folder: Path, device: str, held_out: bool) -> edgeprune.LatencyTable:
    """The held-out fifth, or the rest."""
    chosen = [row for row in rows(folder, device) if is_test(",".join(row[name] for name in _COLUMNS)) == held_out]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_COLUMNS, "forward_ms"])
    writer.writeheader()
    writer.writerows(chosen)
    text.seek(0)
    return edgeprune.LatencyTable.from_csv(
        text,
        kernel="conv2d",
        columns={name: name for name in _COLUMNS},
        latency_ms="forward_ms",
        device=device,
        runtime="vendor library",
    )
