"""Models that cannot be built, inputs that do not fit, budgets out of reach, tables that cannot be trusted."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgeprune.latency.table import LatencyTable
from edgeprune.testing.command_line import CommandLine

INPUT = ("--input", "image=1x3x16x16:float32")
FACTORIES = """
import torch

def nothing():
    pass

def fails():
    raise RuntimeError("no checkpoint here\\nand a second line")
"""


@pytest.mark.parametrize(
    ("factory", "parts"),
    [
        ("absent_package.models:build", ["absent_package", "must import", "ModuleNotFoundError"]),
        ("broken.py:build", ["broken.py", "must import", "SyntaxError"]),
        ("factories.py:nothing", ["must return a torch.nn.Module", "None"]),
        ("factories.py:fails", ["must run without errors", "RuntimeError: no checkpoint here"]),
        ("net.py", ["there is no folder 'net.py'", "package.module:factory or file.py:factory"]),
    ],
)
def test_a_factory_that_gives_no_model(edgeprune: CommandLine, factory: str, parts: list[str]) -> None:
    (edgeprune.folder / "factories.py").write_text(FACTORIES)
    (edgeprune.folder / "broken.py").write_text("def build(:\n")
    edgeprune.refuse("compile", factory, *INPUT, "--out", "new", code=2, parts=parts)


@pytest.mark.parametrize("verb", ["compile", "profile"])
def test_an_input_of_another_shape_than_the_model_takes(edgeprune: CommandLine, verb: str) -> None:
    edgeprune.refuse(
        *(verb, "net.py:build", "--input", "image=1x4x16x16:float32", "--out", "new"),
        code=2,
        parts=["must run on its example inputs", "1x4x16x16"],
    )


def test_a_budget_out_of_reach_names_what_can_be_reached_and_that_is_true(edgeprune: CommandLine) -> None:
    prune = ("prune", "net.py:build", *INPUT, "--table", "table.parquet", "--board", "none", "--out", "new")
    line = edgeprune.refuse(*prune, "--latency", "1us", code=4, parts=["the smallest plan found reaches"])
    reachable = re.search(r"Try: (?:.*)--latency (\S+)$", line)
    assert reachable, line
    assert re.search(r"reaches [\d.]+ ms", line), line
    edgeprune.succeed(*prune, "--latency", reachable[1])


def test_a_release_slower_than_its_budget_is_not_switched_to(edgeprune: CommandLine) -> None:
    current = edgeprune.current()
    done = edgeprune.run("deploy", "second", "--rounds", "1", "--latency", "1us")
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"still runs {current}" in done.stderr
    assert edgeprune.current() == current
    edgeprune.assert_tidy()


def flip(path: Path) -> None:
    """Change one byte among the medians, the file's frame left whole."""
    columns = pq.ParquetFile(path).metadata.row_group(0)
    where = next(
        columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema == "median_ms"
    )
    start = where.dictionary_page_offset or where.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + where.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(content)


def forget_a_number(path: Path) -> None:
    """Put NaN where a median was."""
    table = pq.read_table(path)
    values = table.column("median_ms").to_pylist()
    values[0] = float("nan")
    where = table.schema.get_field_index("median_ms")
    column = pa.array(values, pa.float64())
    pq.write_table(table.set_column(where, table.schema.field(where), column), path)


def edit(path: Path) -> None:
    """Numbers that could be, but are not what was measured."""
    table = pq.read_table(path)
    where = table.schema.get_field_index("p90_ms")
    column = pa.array([1.5 * value for value in table.column("p90_ms").to_pylist()], pa.float64())
    pq.write_table(table.set_column(where, table.schema.field(where), column), path)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [(flip, ["table.parquet"]), (forget_a_number, ["table.parquet", "nan"]), (edit, ["sha256", "table.parquet"])],
    ids=["a flipped byte", "NaN", "edited"],
)
def test_a_table_that_is_damaged(edgeprune: CommandLine, damage: object, parts: list[str]) -> None:
    assert callable(damage)
    damage(edgeprune.folder / "table.parquet")
    edgeprune.refuse("fit", "table.parquet", code=2, parts=parts)


def test_a_table_of_another_device(edgeprune: CommandLine) -> None:
    path = edgeprune.folder / "table.parquet"
    table = LatencyTable.load(path)
    identity = table.header["identity"]
    other = "x86_64" if identity["architecture"] == "aarch64" else "aarch64"
    header = {name: found for name, found in table.header.items() if name != "schema"}
    LatencyTable.from_rows({**header, "identity": {**identity, "architecture": other}}, table.rows).save(path)
    edgeprune.refuse(
        *("prune", "net.py:build", *INPUT, "--table", "table.parquet", "--latency", "60%", "--board", "local"),
        *("--out", "new"),
        code=4,
        parts=["architecture", other, identity["architecture"]],
    )


BROKEN_TASKS = """
import edgeprune, torch

DATA = [(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.long))]

def accuracy(outputs, targets):
    return accuarcy_of(outputs, targets)

def loss(outputs, targets):
    return torch.nn.functional.mse_loss(outputs, targets.float()[:, None].double() @ outputs)

def typo():
    return edgeprune.Task.single(train=DATA, validation=DATA, loss=torch.nn.functional.cross_entropy, metric=accuracy)

def dtypes():
    return edgeprune.Task.single(train=DATA, validation=DATA, loss=loss, metric=accuracy)

def shapes():
    wrong = [(torch.zeros(4, 1, 16, 16), torch.zeros(4, dtype=torch.long))]
    return edgeprune.Task.single(train=wrong, validation=DATA, loss=loss, metric=accuracy)
"""


@pytest.mark.parametrize(
    ("factory", "parts"),
    [
        ("typo", ["metric of objective 'accuracy'", "NameError", "accuarcy_of", "(broken_task.py:7)"]),
        ("dtypes", ["loss of objective 'accuracy'", "RuntimeError", "(broken_task.py:10)"]),
        ("shapes", ["the model on a batch of the task, 4x1x16x16 float32,", "RuntimeError"]),
    ],
)
def test_a_bug_in_the_users_task_is_told_with_its_line_before_the_long_steps(
    edgeprune: CommandLine, factory: str, parts: list[str]
) -> None:
    (edgeprune.folder / "broken_task.py").write_text(BROKEN_TASKS)
    prune = ("prune", "net.py:build", *INPUT, "--table", "table.parquet", "--latency", "50%", "--out", "new")
    task = ("--task", f"broken_task.py:{factory}")
    edgeprune.refuse(*prune, *task, code=2, parts=parts, unsaid="fit the predictor")
