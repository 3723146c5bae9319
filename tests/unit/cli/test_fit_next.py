"""What `fit` says to run next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgeprune.cli.fit import _backend


@pytest.mark.parametrize(
    ("runtime", "said"), [("onnxruntime", None), ("tvm", "tvm"), ("tensorrt", "tensorrt"), ("imported by hand", None)]
)
def test_a_backend_is_named_where_it_is_not_the_default(runtime: str, said: str | None) -> None:
    predictor: Any = SimpleNamespace(table=SimpleNamespace(header={"runtime": runtime}))
    assert _backend(cast(Any, predictor)) == said
