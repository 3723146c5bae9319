"""`edgeprune table` as a process: import, diff, card, and what each says to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeprune.testing.command_line import CommandLine

DATA = Path(__file__).parents[2] / "data"
MAPPING = (
    *("--kernel", "conv2d", "--device", "v100", "--runtime", "tensorrt", "--latency-ms", "latency_ms"),
    *("--column", "in_channels=cin", "--column", "out_channels=cout", "--column", "height=h"),
    *("--column", "kernel_size=kernel", "--column", "stride=stride", "--column", "precision=precision"),
)


@pytest.fixture(scope="module")
def edgeprune(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    folder = tmp_path_factory.mktemp("tables")
    shutil.copy(DATA / "tinynas_v100_conv.csv", folder / "v100.csv")
    return CommandLine(folder, folder / "board")


def refused(edgeprune: CommandLine, code: int, *arguments: str) -> str:
    done = edgeprune.run("table", *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_import_then_diff_then_card(edgeprune: CommandLine) -> None:
    importing = (
        "table",
        "import",
        "v100.csv",
        *MAPPING,
        "--where",
        "conv_type=Regular",
        "--fact",
        "multiprocessors=80",
    )
    plain = json.loads(edgeprune.succeed(*importing, "--where", "elmt_fused=0", "--out", "plain.parquet", "--json"))
    assert plain["next"] == "edgeprune fit plain.parquet"
    assert plain["imported"]["where"] == {"conv_type": "Regular", "elmt_fused": "0"}
    assert plain["kernels"] > 100
    every = edgeprune.succeed(*importing, "--out", "deeper/every.parquet")
    assert "tensorrt on v100" in every
    assert "wrote deeper/every.parquet (latency table)" in every

    diff = json.loads(edgeprune.succeed("table", "diff", "plain.parquet", "deeper/every.parquet", "--json"))
    assert diff["may_be_merged"] is True
    assert (diff["only_first"], diff["common"]) == (0, plain["kernels"])
    shown = edgeprune.succeed("table", "diff", "plain.parquet", "deeper/every.parquet")
    assert "the tables may be compared and merged" in shown

    card = edgeprune.succeed("table", "card", "plain.parquet")
    assert card.startswith("# Latency table: v100, tensorrt")
    edgeprune.succeed("table", "card", "plain.parquet", "--out", "cards/plain.md")
    assert (edgeprune.folder / "cards" / "plain.md").read_text() == card


def test_bad_input_is_one_line_and_writes_nothing(edgeprune: CommandLine) -> None:
    (edgeprune.folder / "bad.csv").write_text("cin,cout,h,kernel,stride,precision,latency_ms\n3,8,8,3,1,fp16,-1\n")
    said = refused(edgeprune, 2, "import", "bad.csv", *MAPPING, "--out", "bad.parquet")
    assert "row 1 of bad.csv, column 'latency_ms': a latency must be positive, found -1" in said
    said = refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--column", "width=breadth", "--out", "bad.parquet")
    assert "v100.csv must have a column 'breadth', found precision, conv_type" in said
    assert "no such file" in refused(edgeprune, 4, "import", "none.csv", *MAPPING, "--out", "bad.parquet")
    assert "--column must be NAME=VALUE" in refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--column", "width")
    assert "must not be a CSV file" in refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--out", "v100.csv")
    assert "must be a whole Parquet file" in refused(edgeprune, 2, "card", "v100.csv")
    assert "found no such file" in refused(edgeprune, 4, "diff", "v100.parquet", "none.parquet")
    assert not (edgeprune.folder / "bad.parquet").exists()


def test_a_card_is_never_written_over_its_table(edgeprune: CommandLine) -> None:
    shutil.copy(DATA / "onnxruntime_avx512_kernels.parquet", edgeprune.folder / "measured.parquet")
    before = (edgeprune.folder / "measured.parquet").read_bytes()
    assert "--out must not be the table" in refused(
        edgeprune, 2, "card", "measured.parquet", "--out", "measured.parquet"
    )
    assert (edgeprune.folder / "measured.parquet").read_bytes() == before


def test_layers_of_recorded_engines_become_a_table(edgeprune: CommandLine) -> None:
    for what in ("layers", "profile", "times"):
        shutil.copy(DATA / "trtexec" / f"resnet18.{what}.json", edgeprune.folder)
    exports = "resnet18.layers.json,resnet18.profile.json,resnet18.times.json"
    reading = (
        "table",
        "layers",
        exports,
        "--device",
        "laptop",
        "--fact",
        "multiprocessors=30",
        "--out",
        "layers.parquet",
    )
    made = json.loads(edgeprune.succeed(*reading, "--json"))
    assert (made["imported"][0]["rows"], made["next"]) == (24, "edgeprune fit layers.parquet")
    card = edgeprune.succeed("table", "card", "layers.parquet")
    assert "imported" in card
    assert "layers timed one by one by trtexec" in card
    assert "must be a Parquet file" in refused(edgeprune, 2, "layers", exports, "--device", "x", "--out", "x.csv")
    assert "found none" in refused(edgeprune, 4, "layers", "nowhere", "--device", "x")
