"""Every built-in backend keeps what the interface promises."""

from __future__ import annotations

import pytest

from edgeprune.backends import registry
from edgeprune.errors import BackendUnavailableError
from edgeprune.testing.backends import BackendConformance


class TestOnnxRuntime(BackendConformance):
    @pytest.fixture
    def backend(self):
        return registry.get("onnxruntime")


class TestTvm(BackendConformance):
    @pytest.fixture
    def backend(self):
        try:
            return registry.get("tvm")
        except BackendUnavailableError as error:
            pytest.skip(str(error))
