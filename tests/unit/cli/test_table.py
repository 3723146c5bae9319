"""`edgeprune table` as a process: import, validate, diff, merge, filter, card, and what each says to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeprune.latency.table import LatencyTable
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
    assert plain["achieved"]["gflops"][0] > 0.01
    assert plain["achieved"]["gigabytes"] is None
    every = edgeprune.succeed(*importing, "--out", "deeper/every.parquet")
    assert "times of 0.00932 to 15.7 ms, convolutions and products at 0.0261 to 113220 GFLOP/s" in every
    assert "prune would refuse this table: its import must say the device's facts, e.g. --fact architecture=" in every
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


def test_filtered_parts_merge_into_the_table_that_they_came_from(edgeprune: CommandLine) -> None:
    """A real table, taken apart by family and put together again: every row is as it was."""
    whole = DATA / "onnxruntime_avx512_kernels.parquet"
    before = json.loads(edgeprune.succeed("table", "validate", str(whole), "--json"))
    assert (before["schema"], before["kernels"], before["networks"]) == (1, 477, 30)
    convs = json.loads(
        edgeprune.succeed("table", "filter", str(whole), "--family", "conv", "--out", "parts/convs.parquet", "--json")
    )
    families = ("layout", "elementwise", "gemm", "pool", "network")
    words = [word for family in families for word in ("--family", family)]
    rest = json.loads(edgeprune.succeed("table", "filter", str(whole), *words, "--out", "parts/rest.parquet", "--json"))
    assert (convs["networks"], rest["networks"]) == (0, 30)
    assert convs["kernels"] + rest["kernels"] == 477
    words = ["--family", "network", "--out", "parts/nets.parquet", "--json"]
    nets = json.loads(edgeprune.succeed("table", "filter", str(whole), *words))
    assert (nets["kernels"], nets["next"]) == (0, "edgeprune table card parts/nets.parquet"), (
        "nothing can be fitted to it"
    )
    said = edgeprune.succeed(
        "table", "merge", "parts/convs.parquet", "parts/rest.parquet", "--out", "parts/both.parquet"
    )
    assert "477 kernels and 30 networks" in said
    assert "wrote parts/both.parquet (latency table)" in said
    both = LatencyTable.load(edgeprune.folder / "parts" / "both.parquet")
    assert list(both.rows) == list(LatencyTable.load(whole).rows)
    shown = edgeprune.succeed("table", "validate", "parts/both.parquet")
    assert "parts/both.parquet is valid: schema 1, 477 kernels and 30 networks, onnxruntime on " in shown


def test_a_fit_is_drawn_on_request(edgeprune: CommandLine) -> None:
    whole = DATA / "onnxruntime_avx512_kernels.parquet"
    edgeprune.succeed("table", "filter", str(whole), "--op", "FusedConv", "--out", "fused.parquet")
    answer = json.loads(edgeprune.succeed("fit", "fused.parquet", "--report", "drawn/fit.html", "--json"))
    assert [file["path"] for file in answer["files"]] == ["fused.json", "drawn/fit.html"]
    page = (edgeprune.folder / "drawn" / "fit.html").read_text()
    assert "Error of each prediction" in page
    done = edgeprune.run("fit", "fused.parquet", "--report", "fused.parquet")
    assert done.returncode == 2
    assert "--report must be a .html file, found fused.parquet. Try: --report fused.html" in done.stderr


def test_a_few_kernels_of_a_new_device_stand_on_another_s_table(edgeprune: CommandLine) -> None:
    """Times of a device that takes 1.7 times as long: *made* from those of a real one."""
    known = LatencyTable.load(DATA / "onnxruntime_avx512_kernels.parquet").filter(op="FusedConv")
    known.save(edgeprune.folder / "known.parquet")
    few = known.filter(key=[kernel.key for kernel in known.kernels[::8]])
    times = ("median_ms", "p90_ms", "min_ms")
    rows = [
        {**row, **{name: 1.7 * row[name] for name in times}, "rounds_ms": [1.7 * ms for ms in row["rounds_ms"]]}
        for row in few.rows
    ]
    header = {**few.header, "identity": {**few.header["identity"], "cpu_model": "another one"}}
    LatencyTable(header, rows).save(edgeprune.folder / "few.parquet")
    answer = json.loads(edgeprune.succeed("fit", "few.parquet", "--transfer-from", "known.parquet", "--json"))
    assert known.hash[:12] in answer["transferred_from"]
    assert answer["errors"][0]["model"].startswith("transfer")
    assert answer["errors"][0]["median_error_percent"] < 10
    assert {"few.json", "few.source.json", "few.source.parquet"} <= {path.name for path in edgeprune.folder.iterdir()}
    done = edgeprune.run("fit", "few.parquet", "--transfer-from", "knwon.parquet")
    assert done.returncode == 2
    said = "error: there must be a latency table at knwon.parquet, found no such file. Try: known.parquet\n"
    assert done.stderr == said


def test_what_is_not_valid_or_must_not_be_mixed_is_refused(edgeprune: CommandLine) -> None:
    whole = DATA / "onnxruntime_avx512_kernels.parquet"
    content = whole.read_bytes()
    (edgeprune.folder / "short.parquet").write_bytes(content[: len(content) // 2])
    said = refused(edgeprune, 2, "validate", "short.parquet")
    assert "must be a whole Parquet file written by edgeprune, found short.parquet" in said
    # Somebody's own program has written what are no milliseconds.
    table = LatencyTable.load(whole)
    times = ("median_ms", "p90_ms", "min_ms")
    short = [row for row in table.rows if row["kind"] == "kernel" and row["p90_ms"] < 0.09]
    slow = [row | {name: 1e7 * row[name] for name in times} | {"rounds_ms": (1e7 * row["median_ms"],)} for row in short]
    LatencyTable(table.header, slow).save(edgeprune.folder / "slow.parquet")
    said = refused(edgeprune, 2, "validate", "slow.parquet")
    assert "slow.parquet must hold times that a device can have, found " in said
    assert "these seem to be us" in said
    # The same device with the runtime upgraded between the two runs.
    header = {**table.header, "identity": {**table.header["identity"], "runtime_version": "9.9.9"}}
    LatencyTable(header, table.rows).save(edgeprune.folder / "upgraded.parquet")
    said = refused(edgeprune, 4, "merge", str(whole), "upgraded.parquet", "--out", "mixed.parquet")
    assert "tables that are merged must agree in identity.runtime_version, found " in said
    assert "'9.9.9'" in said
    assert not (edgeprune.folder / "mixed.parquet").exists()
    said = refused(edgeprune, 2, "merge", str(whole), "--out", "mixed.parquet")
    assert "there must be at least two tables to merge, found 1" in said
    said = refused(edgeprune, 2, "filter", str(whole), "--op", "Gelu", "--out", "none.parquet")
    assert "must hold at least one row, found none of 507" in said
    assert "Try: --op " in said
    assert "must be a condition to filter by" in refused(edgeprune, 2, "filter", str(whole), "--out", "none.parquet")


def test_bad_input_is_one_line_and_writes_nothing(edgeprune: CommandLine) -> None:
    (edgeprune.folder / "bad.csv").write_text("cin,cout,h,kernel,stride,precision,latency_ms\n3,8,8,3,1,fp16,-1\n")
    said = refused(edgeprune, 2, "import", "bad.csv", *MAPPING, "--out", "bad.parquet")
    assert "line 2 of bad.csv, column 'latency_ms': a latency must be positive, found -1" in said
    said = refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--column", "width=breadth", "--out", "bad.parquet")
    assert (
        "v100.csv must have a column 'breadth', found none of that name. Try: --column width=COLUMN (there are: precision, conv"
        in said
    )
    said = refused(edgeprune, 2, "import", "v10.csv", *MAPPING, "--out", "bad.parquet")
    assert "there must be a CSV file at v10.csv, found no such file. Try: v100.csv" in said
    said = refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--where", "conv_type=Regulr", "--out", "bad.parquet")
    assert (
        "found none of 400 whose conv_type is 'Regulr'. Try: --where conv_type=Regular (there are: Depthwise," in said
    )
    said = refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--fact", "x")
    assert "--fact must be NAME=VALUE, found 'x'. Try: --fact multiprocessors=80" in said
    assert "--column must be NAME=VALUE" in refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--column", "width")
    assert "must not be a CSV file" in refused(edgeprune, 2, "import", "v100.csv", *MAPPING, "--out", "v100.csv")
    assert "must be a whole Parquet file" in refused(edgeprune, 2, "card", "v100.csv")
    said = refused(edgeprune, 2, "card", "jjj")
    assert "there must be a latency table at jjj, found no such file. Try: a path from " in said
    assert "or edgeprune profile MODEL --board NAME for a new one" in said
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
    assert "found none" in refused(edgeprune, 2, "layers", "nowhere", "--device", "x")


def test_the_help_of_import_names_every_kind(edgeprune: CommandLine) -> None:
    said = " ".join(edgeprune.succeed("table", "import", "--help").replace("│", " ").split())
    assert "conv_transpose2d" in said
    assert "global_average_pool2d" in said
    assert "--where COLUMN=VALUE" in said
    assert "--latency-us COLUMN" in said
