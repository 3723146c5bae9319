"""What a GPU adds to the features: tiles of the matrix product that a convolution is, and waves of tiles.

A convolution of M = batch x output positions by N = output channels over K = input channels x taps runs as a grid of tiles,
and the grid as waves over the multiprocessors: the last wave costs as much as a full one. Which tile a library takes is
its secret, so there are several, and a regression learns which one the times follow.

Source: wave and tile quantization, NVIDIA, "Matrix Multiplication Background User's Guide"
(https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/); scaling times by waves, Yu, Gao,
Golikov and Pekhimenko, "Habitat: a runtime-based computational performance predictor for deep neural network training",
USENIX ATC 2021.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.latency.arrays import Floats, padded

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (128, 64), (64, 64), (128, 32), (32, 32))
"""Rows (output positions) and columns (output channels) of a tile."""

DEPTH = 32
"""The inner dimension is walked in steps of this many."""

TILE_UNITS: Mapping[str, str] = {
    **{f"log_tiles_{rows}_{columns}": "log multiply-accumulates of all waves" for rows, columns in TILES},
    **{f"last_wave_{rows}_{columns}": "share of the last wave that is filled" for rows, columns in TILES[2:6]},
    "log_least_tiles": "log multiply-accumulates of all waves, of the tile that needs fewest",
    "log_tile_count": "log tiles of 128 x 64",
    "log_depth": "log inner dimension",
    "depth_mod_32": "inner dimension",
    "depth_mod_64": "inner dimension",
    "rows_mod_64": "output positions",
    "rows_mod_128": "output positions",
    "in_twos": "how often 2 divides the input channels",
    "out_twos": "how often 2 divides the output channels",
    "aspect": "log output positions per output channel",
    "split_depth": "log inner dimension per tile of 64 x 64 where tiles leave multiprocessors idle",
    "in_over_out": "log input channels per output channel",
    "pixels_in_out": "log positions of the input per position of the output",
}
"""Every feature of tiles and its unit, in column order."""


def tile_columns(
    rows: Floats, columns: Floats, depth: Floats, in_channels: Floats, pixels_in: Floats, multiprocessors: int
) -> dict[str, Floats]:
    """Features of tiles, each of shape (kernels,).

    Args:
        rows: Output positions of the whole batch.
        columns: Output channels.
        depth: Input channels of a group times taps.
        in_channels: Input channels.
        pixels_in: Positions of the input.
        multiprocessors: Tiles that run at a time.
    """
    found: dict[str, Floats] = {}
    deep = padded(depth, DEPTH)
    for high, wide in TILES:
        waves = np.ceil(rows / high) * np.ceil(columns / wide) / multiprocessors
        found[f"log_tiles_{high}_{wide}"] = np.log(np.ceil(waves) * high * wide * deep)
        name = f"last_wave_{high}_{wide}"
        if name in TILE_UNITS:
            found[name] = waves / np.ceil(waves)
    tiles = np.ceil(rows / 64) * np.ceil(columns / 64)
    found["log_least_tiles"] = np.min([found[f"log_tiles_{high}_{wide}"] for high, wide in TILES], axis=0)
    found["log_tile_count"] = np.log(np.ceil(rows / 128) * np.ceil(columns / 64))
    found["log_depth"] = np.log(depth)
    found["depth_mod_32"], found["depth_mod_64"] = depth % 32, depth % 64
    found["rows_mod_64"], found["rows_mod_128"] = rows % 64, rows % 128
    found["in_twos"], found["out_twos"] = _twos(in_channels), _twos(columns)
    found["aspect"] = np.log(rows / columns)
    found["split_depth"] = np.log(depth) + np.log(np.minimum(1.0, tiles / multiprocessors))
    found["in_over_out"] = np.log(in_channels / columns)
    found["pixels_in_out"] = np.log(pixels_in / rows)
    return found


def _twos(count: Floats) -> Floats:
    whole = np.maximum(count, 1).astype(np.int64)
    return np.log2((whole & -whole).astype(np.float64))
