"""Features of GPUs: tiles, waves of tiles, and what is left over."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.latency.features import UNITS, Machine, features
from edgeprune.latency.tiles import TILE_UNITS
from edgeprune.spec import Kernel

GPU = Machine(multiprocessors=80)


def conv(cin: int, cout: int, size: int, kernel: int = 3, groups: int = 1, batch: int = 1) -> Kernel:
    attributes = (("groups", groups), ("kernel", (kernel, kernel)), ("stride", (1, 1)))
    return Kernel("Conv", "conv", ((batch, cin, size, size),), (batch, cout, size, size), attributes, "fp16")


def column(kernels: list[Kernel], name: str) -> np.ndarray:
    return features(kernels, GPU).column(name)


def test_the_multiprocessors_are_read_from_a_header() -> None:
    assert Machine.from_header({"identity": {}, "fingerprint": {"multiprocessors": 80}}).multiprocessors == 80
    for nonsense in (None, "80", -1, 0.5):
        assert Machine.from_header({"identity": {}, "fingerprint": {"multiprocessors": nonsense}}).multiprocessors == 0
    # Those of a board count where the runtime uses its GPU.
    probed = {"fingerprint": {"facts": {"multiprocessors": 132}}}
    assert Machine.from_header({**probed, "identity": {"runtime_gpu": "NVIDIA H200"}}).multiprocessors == 132
    assert Machine.from_header({**probed, "identity": {}}).multiprocessors == 0


def test_only_a_gpu_has_tiles() -> None:
    kernels = [conv(64, 64, 28)]
    assert features(kernels, Machine()).names == tuple(UNITS)
    matrix = features(kernels, GPU, ("Conv",))
    assert matrix.names == (*UNITS, *TILE_UNITS, "op_Conv")
    assert matrix.values.shape == (1, len(matrix.names))
    assert matrix.values[0, : len(UNITS)].tolist() == features(kernels, Machine()).values[0].tolist()


def test_a_wave_that_is_not_full_costs_as_much_as_a_full_one() -> None:
    # 128 x 128 positions are 128 tiles of 128 rows: two waves over 80 multiprocessors; 100 x 100 are 79 tiles, one wave.
    work = column([conv(64, 128, 128), conv(64, 128, 100), conv(64, 128, 80)], "log_tiles_128_128")
    assert np.exp(work[0] - work[1]) == pytest.approx(2)
    assert work[1] == work[2]
    filled = column([conv(64, 128, 128), conv(64, 128, 100)], "last_wave_128_128")
    assert filled == pytest.approx([128 / 160, 79 / 80])


def test_channels_are_padded_to_whole_tiles_and_depth_to_whole_steps() -> None:
    assert np.ptp(column([conv(64, 65, 200), conv(64, 128, 200)], "log_tiles_128_64")) == 0
    assert np.ptp(column([conv(32, 64, 200, 1), conv(20, 64, 200, 1)], "log_tiles_128_64")) == 0
    assert column([conv(96, 48, 28)], "out_twos").tolist() == [4]
    assert column([conv(96, 48, 28)], "in_twos").tolist() == [5]
    assert np.exp(column([conv(64, 64, 28), conv(64, 64, 28, groups=64)], "log_depth")) == pytest.approx([576, 9])


def test_the_batch_counts_as_rows() -> None:
    assert column([conv(64, 64, 32, batch=8)], "aspect") == pytest.approx(np.log(8 * 32 * 32 / 64))


def test_any_family_has_finite_tiles() -> None:
    kernels = [
        Kernel("Gemm", "gemm", ((4, 96),), (4, 10)),
        Kernel("MatMul", "gemm", ((2, 4, 96), (2, 96, 10)), (2, 4, 10)),
        Kernel("Relu", "elementwise", ((1, 3, 8, 8),), (1, 3, 8, 8)),
        Kernel("Softmax", "softmax", ((1, 7),), (1, 7)),
    ]
    assert np.isfinite(features(kernels, GPU).values).all()
