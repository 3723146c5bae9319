"""A measuring run over a real OpenSSH server whose link swallows what the board tells, and is then cut."""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.boards.board import Board
from edgeprune.boards.known_hosts import fingerprint
from edgeprune.errors import RemoteError
from edgeprune.profiling.measuring import measure
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback


def product(columns: int) -> bytes:
    """An engine of one matrix product."""
    weight = numpy_helper.from_array(np.full((64, columns), 0.01, np.float32), "w")
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, size]) for name, size in (("x", 64), ("y", columns))
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", *([one] for one in tensors))
    graph.initializer.append(weight)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def test_what_a_silent_link_swallowed_is_fetched_over_the_next(sshd: OpenSshServer, tmp_path: Path) -> None:
    engines: dict[str, bytes | Path] = {f"product{columns}": product(columns) for columns in range(16, 336, 16)}
    journal, root = tmp_path / "run.jsonl", tmp_path / "board"
    settings: dict[str, Any] = {"samples": 2, "sample_ms": 4.0, "warmup_ms": 2.0, "every": 5, "max_repeats": 0}
    said: list[str] = []
    with FaultyLink(sshd.host, sshd.port) as link:
        options = {
            "python": sys.executable,
            "root": str(root),
            "identity": str(sshd.identity),
            "host_key": fingerprint(base64.b64decode(sshd.public_keys()[0].split()[1])),
        }
        url = f"ssh://{sshd.user}@{link.host}:{link.port}?{urlencode(options)}"

        def swallow(done: int, total: int, left_s: float, message: str) -> None:
            if done >= 4:
                link.black_hole()

        def kept() -> int:
            return sum(path.read_bytes().count(b'"sample"') for path in (root / "measured").glob("*.jsonl"))

        def cut_later() -> None:
            end = time.monotonic() + 30
            while kept() < 10 and time.monotonic() < end:
                time.sleep(0.01)
            link.cut()
            link.mend()

        cutting = threading.Thread(target=cut_later)
        cutting.start()
        with pytest.raises(RemoteError), Board.open(url) as board:
            measure(board, engines, rounds=2, journal=journal, progress=swallow, **settings)
        cutting.join()
        arrived = journal.read_text().count('"kind":"sample"')
        with Board.open(url) as board:
            measure(board, engines, rounds=2, journal=journal, told=said.append, **settings)
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    (fetched,) = (record for record in records if record["kind"] == "fetched")
    assert fetched["samples"] >= 3
    assert said == [
        f"going on: {arrived} measurements of the interrupted run are kept, and {fetched['samples']} that the board had kept"
    ]
    times = Counter(
        (record["round"], record["id"])
        for record in records
        if record["kind"] == "sample" and record["stretch"] is not None
    )
    assert set(times.values()) == {1}
    assert len(times) == 2 * (len(engines) - 1)
    assert list((root / "measured").iterdir()) == []
