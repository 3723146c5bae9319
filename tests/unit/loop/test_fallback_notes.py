"""A kernel that nothing like it was measured of is named, with what it is guessed to take, and never silently free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.cli.console import Output
from edgeprune.cli.profile import _tell
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.notes import table_notes

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


@pytest.fixture(scope="module")
def predictor():
    return edgeprune.fit(edgeprune.LatencyTable.load(TABLE))


class Running(nn.Module):
    """Kernels of a kind that the table holds, and a sum that no runtime fuses into them."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.summed = summed
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU())

    def forward(self, image):
        maps = self.body(image)
        return maps.cumsum(1) if self.summed else maps


@pytest.mark.parametrize("summed", [True, False])
def test_what_is_guessed_is_named_with_what_it_takes(predictor, tmp_path, summed):
    torch.manual_seed(0)
    model = Running(summed).eval()
    graph = edgeprune.trace(model, torch.zeros(1, 3, 32, 32))
    device = predictor.table.header["identity"]
    kernels = edgeprune.lower(graph, model=model, device=device, workdir=tmp_path)
    said = [
        note
        for note in table_notes(predictor, kernels, dense_latency(predictor, kernels))
        if note.startswith("No kernel like")
    ]
    if not summed:
        assert said == []
        return
    (note,) = said
    frame = predictor.predict(kernels.at({}))
    guessed = frame[frame["source"] == "fallback"]
    assert note.startswith("No kernel like CumSum was measured: what these take, ")
    assert f" {guessed['ms'].sum():.3g} ms of the dense model" in note
    assert guessed["ms"].min() > 0
    assert (guessed["high_ms"] / guessed["low_ms"]).min() > 2


def test_profile_says_what_it_could_not_measure(tmp_path, capsys):
    table = edgeprune.LatencyTable.load(TABLE)
    header = {name: value for name, value in table.header.items() if name != "schema"}
    kernel = table.kernels[0]
    told = {**header, "board": "bench", "drift": {"drifted_rows": 0}, "unsupported": {kernel.key: "the board says no."}}
    rest = edgeprune.LatencyTable.from_rows(told, [row for row in table.rows if row["key"] != kernel.key])
    _tell(Output(False), rest, told, tmp_path / "table.parquet")
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert f"1 kernels do not run alone and were left out ({kernel.op})" in text
    assert "the first one: the board says no." in text
