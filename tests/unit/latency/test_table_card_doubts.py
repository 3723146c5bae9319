"""What became of a board while it was measured stands in its table's data card, of every run."""

from pathlib import Path

from edgeprune.latency.table import LatencyTable

DATA = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


def test_disturbances_of_every_run_are_doubts() -> None:
    table = LatencyTable.load(DATA)
    header = {name: value for name, value in table.header.items() if name != "schema"}
    told = {**header, "disturbances": ["the board was restarted."], "runs": [{"disturbances": ["it was | hot."]}]}
    card = LatencyTable.from_rows(told, table.rows).card()
    doubts = card.partition("## Doubts")[2]
    assert "- the board was restarted.\n" in doubts
    assert "- it was \\| hot." in doubts
    assert "restarted" not in table.card()


def test_the_card_names_models_as_they_were_typed() -> None:
    table = LatencyTable.load(DATA)
    entry = {"name": "net.py:build", "signature": "5e1f", "inputs": [[1, 3, 32, 32]], "dense": "dense", "networks": []}
    typed = {**entry, "signature": "77aa", "origin": ["a/net.py:wide", "--input", "x=1x3x32x32"]}
    card = LatencyTable({**table.header, "models": [entry, typed]}, table.rows).card()
    assert "| model | net.py:build, inputs [[1, 3, 32, 32]], signature 5e1f |" in card
    assert "| model | a/net.py:wide --input x=1x3x32x32, inputs [[1, 3, 32, 32]], signature 77aa |" in card
