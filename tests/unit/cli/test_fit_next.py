"""What `fit` says to run next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgeprune.cli.fit import _backend, _next
from edgeprune.cli.prunable import unprunable
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row
from edgeprune.spec import Kernel, Measurement


@pytest.mark.parametrize(
    ("runtime", "said"), [("onnxruntime", None), ("tvm", "tvm"), ("tensorrt", "tensorrt"), ("imported by hand", None)]
)
def test_a_backend_is_named_where_it_is_not_the_default(runtime: str, said: str | None) -> None:
    predictor: Any = SimpleNamespace(table=SimpleNamespace(header={"runtime": runtime}))
    assert _backend(cast(Any, predictor)) == said


def test_what_cannot_be_pruned_with_is_not_to_be_pruned_with() -> None:
    row = kernel_row(Kernel("Relu", "elementwise", ((1, 8),), (1, 8)), Measurement(1.0, 1.0, 1.0, 0.0, (1.0,), 1))
    identity = {"device": "pi", "runtime": "onnxruntime"}
    header = {"identity": identity, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
    imported = LatencyTable.from_rows(header, [row])
    known = LatencyTable.from_rows({**header, "identity": {**identity, "architecture": "aarch64", "isa": []}}, [row])
    said = [_next(cast(Any, SimpleNamespace(table=table)), Path("t.parquet")) for table in (imported, known)]
    other = LatencyTable.from_rows({**known.header, "runtime": "sklearn"}, [row])
    assert _next(cast(Any, SimpleNamespace(table=other)), Path("t.parquet")) == "edgeprune table card t.parquet"
    told = """the device's facts, e.g. --fact architecture=aarch64 --fact 'isa=["asimd"]'"""
    assert unprunable(imported) == f"prune would refuse this table: its import must say {told}"
    assert "must say the backend that it is of, --runtime " in (unprunable(other) or "")
    assert unprunable(known) is None
    assert said == ["edgeprune table card t.parquet", "edgeprune prune MODEL --table t.parquet --latency 50%"]
