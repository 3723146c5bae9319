"""Real measurements for the tests of this folder; see tests/data/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.latency.fitting import fit
from edgeprune.latency.predictor import Predictor
from edgeprune.latency.table import LatencyTable

DATA = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


@pytest.fixture(scope="session")
def measured() -> LatencyTable:
    """Kernels and networks measured with ONNX Runtime on an x86-64 server CPU with AVX-512, one thread."""
    return LatencyTable.load(DATA)


@pytest.fixture(scope="session")
def predictor(measured: LatencyTable) -> Predictor:
    """Fitted to all of `measured`."""
    return fit(measured)
