"""Features say what a runtime will really do: padding, remainders, traffic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.latency.features import UNITS, Machine, features, vector_bits
from edgeprune.spec import Kernel

AVX512 = Machine(vector_bits=512, l1_bytes=32768, l2_bytes=1 << 20)


def conv(cin: int, cout: int, size: int = 8, op: str = "nchwc.Conv", **attributes: object) -> Kernel:
    given_ = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "groups": 1, "bias": True, **attributes}
    return Kernel(op, "conv", ((1, cin, size, size),), (1, cout, size, size), tuple(sorted(given_.items())))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("isa", "bits"),
    [
        (("sse2", "avx2", "avx512f"), 512),
        (("avx2", "avx"), 256),
        (("asimd", "fp"), 128),
        ((), 128),
        (("AVX512F",), 512),
    ],
)
def test_vector_width_follows_the_instruction_set(isa: tuple[str, ...], bits: int) -> None:
    assert vector_bits(isa) == bits


def test_the_machine_is_read_from_a_header() -> None:
    header = {"fingerprint": {"isa": ["avx2"], "caches_bytes": {"L1d": 49152, "L2": 2097152}}}
    assert Machine.from_header(header) == Machine(256, 49152, 2097152)
    assert Machine.from_header({"identity": {"isa": ["asimd"]}}) == Machine(128, 0, 0)


def test_a_blocked_convolution_works_on_whole_blocks_and_a_plain_one_on_whole_output_vectors() -> None:
    # Blocked kernels come padded: 52 -> 40 channels are 64 -> 48.
    matrix = features([conv(64, 48), conv(52, 40, op="FusedConv")], AVX512)
    assert matrix.work.tolist() == [64 * 48 * 9 * 64, 52 * 48 * 9 * 64]
    assert np.exp(matrix.column("log_macs")[1]) == pytest.approx(52 * 40 * 9 * 64)
    assert matrix.slow_traffic.tolist() == [0, 52 * 9 * 64 * 4]
    assert matrix.traffic[0] == 4 * (64 * 64 + 48 * 64 + 64 * 48 * 9)


def test_remainders_and_vectors_show_the_stairs() -> None:
    matrix = features([conv(52, 68, op="FusedConv"), conv(64, 64)], AVX512)
    assert matrix.column("in_mod_16").tolist() == [4, 0]
    assert matrix.column("out_mod_64").tolist() == [4, 0]
    assert matrix.column("out_vectors").tolist() == [5, 4]
    assert matrix.column("out_vectors_mod_4").tolist() == [1, 0]


def test_the_input_layer_is_read_without_padding() -> None:
    assert features([conv(3, 16)], AVX512).work[0] == 3 * 16 * 9 * 64


def test_a_depthwise_convolution_multiplies_each_channel_once() -> None:
    matrix = features([conv(32, 32, groups=32)], AVX512)
    assert matrix.work[0] == 32 * 9 * 64
    assert matrix.column("depthwise")[0] == 1


def test_a_matrix_product_with_weights_reads_them() -> None:
    linear = Kernel("Gemm", "gemm", ((4, 96),), (4, 10), (("bias", True), ("trans_b", 1)))
    product = Kernel("MatMul", "gemm", ((2, 4, 96), (2, 96, 10)), (2, 4, 10))
    matrix = features([linear, product], AVX512)
    assert np.exp(matrix.column("log_macs")) == pytest.approx([4 * 96 * 10, 2 * 4 * 96 * 10])
    assert matrix.column("log_bytes_weights")[0] == pytest.approx(math.log1p(96 * 10 * 4))
    assert matrix.column("log_bytes_weights")[1] == 0


def test_precision_scales_traffic_and_not_work() -> None:
    full, half = conv(64, 64), conv(64, 64)
    half = Kernel(half.op, half.family, half.inputs, half.output, half.attributes, "fp16")
    matrix = features([full, half], AVX512)
    assert matrix.traffic[0] == 2 * matrix.traffic[1]
    assert matrix.work[0] == matrix.work[1]


def test_operations_get_columns_of_their_own() -> None:
    matrix = features([conv(8, 8), conv(8, 8, op="FusedConv")], AVX512, ("FusedConv", "nchwc.Conv"))
    assert matrix.names == (*UNITS, "op_FusedConv", "op_nchwc.Conv")
    assert matrix.values[:, -2:].tolist() == [[0, 1], [1, 0]]


shapes = st.lists(st.integers(1, 300), max_size=4).map(tuple)


@given(
    st.lists(
        st.builds(
            Kernel,
            op=st.sampled_from(["Add", "nchwc.Conv", "Gemm", "ReduceMean", "Concat"]),
            family=st.sampled_from(["conv", "gemm", "pool", "reduce", "elementwise", "layout", "concat", "other"]),
            inputs=st.lists(shapes.filter(bool), max_size=3).map(tuple),
            output=shapes.filter(bool),
            attributes=st.sampled_from([(), (("groups", 4), ("kernel", (3, 1)), ("residual", True))]),
        ),
        max_size=8,
    )
)
def test_features_of_any_kernel_are_finite(kernels: list[Kernel]) -> None:
    matrix = features(kernels, AVX512)
    assert matrix.values.shape == (len(kernels), len(UNITS))
    assert np.isfinite(matrix.values).all()
    assert (matrix.work > 0).all()
    assert (matrix.traffic > 0).all()
