"""What `edgeprune compile --tune` refuses before anything is done."""

from __future__ import annotations

import pytest

from edgeprune.cli.commands import root
from edgeprune.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--tune-trials", "50"], "must come with --tune", "--tune 10min --tune-trials 50"),
        (["--tune", "soon"], "a number with s, min or h, found 'soon'", "--tune 10min"),
        (["--tune", "0s"], "must be positive", "--tune 10min"),
        (["--tune", "5min"], "--tune needs --backend tvm, found onnxruntime", "--backend tvm --tune 10min"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_loaded(words, message, hint, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        root().main(["compile", "absent.py:build", "--out", str(tmp_path / "out"), *words], standalone_mode=False)
    assert caught.value.hint == hint
    assert list(tmp_path.iterdir()) == []
