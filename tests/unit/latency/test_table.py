"""A latency table comes back as it was written, or says in one sentence why not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.errors import TableFormatError, TableMismatchError, TableMissingError
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row, network_row
from edgeprune.spec import Kernel, Measurement

HEADER: dict[str, Any] = {
    "identity": {
        "architecture": "x86_64",
        "cpu_model": "Test CPU",
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
    },
    "runtime": "onnxruntime",
    "threads": 1,
    "precision": "fp32",
}


def relu(channels: int) -> Kernel:
    return Kernel("Relu", "elementwise", ((1, channels, 8, 8),), (1, channels, 8, 8))


def timing(ms: float, rounds: int = 3) -> Measurement:
    values = tuple(ms * (1 + 0.01 * index) for index in range(-(rounds // 2), rounds - rounds // 2))
    return Measurement(ms, ms * 1.2, ms * 0.9, 0.01, values, 5 * rounds)


def rows() -> list[dict[str, Any]]:
    kernels = [relu(channels) for channels in (8, 16, 24)]
    found = [kernel_row(kernel, timing(0.01 * kernel.output[1])) for kernel in kernels]
    return [*found, network_row("net", [*kernels, kernels[0]], timing(1.5), {"layer": 24})]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatencyTable, bytes]:
    table = LatencyTable.from_rows(HEADER, rows())
    return table, table.save(tmp_path_factory.mktemp("saved") / "whole.parquet").read_bytes()


sizes = st.integers(1, 4096)
shapes = st.lists(sizes, min_size=1, max_size=4).map(tuple)
values = st.one_of(st.booleans(), sizes, shapes, st.text(max_size=6), st.floats(allow_nan=False, allow_infinity=False))
kernels = st.builds(
    Kernel,
    op=st.text(min_size=1, max_size=12),
    family=st.sampled_from(["conv", "gemm", "pool", "elementwise", "other"]),
    inputs=st.lists(shapes, max_size=3).map(tuple),
    output=shapes,
    attributes=st.dictionaries(st.sampled_from(["alpha", "activation", "bias", "note"]), values, max_size=3).map(
        lambda chosen: tuple(sorted(chosen.items()))
    ),
    precision=st.sampled_from(["fp32", "fp16", "int8"]),
)
times = st.floats(1e-5, 1e5)
measurements = st.builds(
    lambda samples, count: Measurement(
        float(np.median(samples)), max(samples), min(samples), 0.05, tuple(samples), count
    ),
    st.lists(times, min_size=1, max_size=5),
    st.integers(1, 10_000),
)
headers = st.fixed_dictionaries(
    {},
    optional={"board": st.text(max_size=8), "conditions": st.dictionaries(st.text(max_size=4), times, max_size=3)},
).map(lambda extra: {**HEADER, **extra})
tables = st.builds(
    lambda header, found, nets: LatencyTable.from_rows(
        header,
        [
            *(kernel_row(kernel, measurement) for kernel, measurement in found.items()),
            *(network_row(name, *net) for name, net in nets.items()),
        ],
    ),
    headers,
    st.dictionaries(kernels, measurements, max_size=6),
    st.dictionaries(
        st.text(max_size=6),
        st.tuples(
            st.lists(kernels, min_size=1, max_size=4),
            measurements,
            st.dictionaries(st.text(max_size=5), sizes, max_size=3),
        ),
        max_size=2,
    ),
)


@given(table=tables)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_comes_back_as_it_was_saved(table: LatencyTable, tmp_path: Path) -> None:
    loaded = LatencyTable.load(table.save(tmp_path / "table.parquet"))
    assert loaded.hash == table.hash
    assert loaded.header == table.header
    assert list(loaded.rows) == list(table.rows)
    assert loaded.kernels == table.kernels
    assert loaded.networks == table.networks
    assert loaded.measurements == table.measurements


def test_the_hash_does_not_depend_on_the_order_of_rows_but_on_every_value() -> None:
    table = LatencyTable.from_rows(HEADER, rows())
    assert LatencyTable.from_rows(HEADER, rows()[::-1]).hash == table.hash
    changed = rows()
    changed[0]["samples"] += 1
    assert LatencyTable.from_rows(HEADER, changed).hash != table.hash
    assert LatencyTable.from_rows({**HEADER, "threads": 2}, rows()).hash != table.hash


def test_every_sample_is_kept_and_tables_of_old_have_none(measured: LatencyTable, tmp_path: Path) -> None:
    taken = replace(timing(0.1), times_ms=(0.1, 0.11, 0.4), cpu_share=(1.0, 0.99, 0.3))
    plain, table = (LatencyTable.from_rows(HEADER, [kernel_row(relu(8), found)]) for found in (timing(0.1), taken))
    (found,) = LatencyTable.load(table.save(tmp_path / "raw.parquet")).measurements.values()
    assert (found.times_ms, found.cpu_share) == (taken.times_ms, taken.cpu_share)
    assert table.hash != plain.hash
    both = table.merge(LatencyTable.from_rows({**HEADER, "board": "other"}, table.rows))
    assert both.measurements[relu(8).key].times_ms == 2 * taken.times_ms
    # A table from before there were such columns is read under its own hash.
    assert {found.times_ms for found in measured.measurements.values()} == {()}
    old = [{name: value for name, value in row.items() if name not in ("times_ms", "cpu_share")} for row in plain.rows]
    assert LatencyTable.from_rows(HEADER, old).hash == plain.hash


def test_networks_count_their_kernels() -> None:
    (network,) = LatencyTable.from_rows(HEADER, rows()).networks
    assert network.kernels == {relu(8).key: 2, relu(16).key: 1, relu(24).key: 1}
    assert network.widths == {"layer": 24}


def test_the_frame_has_one_row_per_measured_thing() -> None:
    frame = LatencyTable.from_rows(HEADER, rows()).frame
    assert frame["kind"].tolist() == ["kernel"] * 3 + ["network"]
    assert frame.loc[frame["kind"] == "network", "median_ms"].item() == 1.5


def test_filter_keeps_rows_that_meet_every_condition(measured: LatencyTable) -> None:
    found = measured.filter(family="conv", op=("FusedConv",))
    assert found.kernels
    assert {kernel.op for kernel in found.kernels} == {"FusedConv"}
    assert not found.networks
    assert len(measured.filter(kind="network")) == len(measured.networks)
    assert LatencyTable.from_rows(found.header, found.rows) == found


def test_merging_keeps_the_rounds_of_both_runs() -> None:
    first = LatencyTable.from_rows(HEADER, rows()[:2])
    again = LatencyTable.from_rows(HEADER, [kernel_row(relu(16), timing(0.2)), kernel_row(relu(40), timing(0.4))])
    both = first.merge(again)
    assert [kernel.output[1] for kernel in both.kernels] == sorted([8, 16, 40], key=lambda size: relu(size).key)
    assert len(both.measurements[relu(16).key].rounds_ms) == 6
    assert both.measurements[relu(16).key].min_ms == pytest.approx(0.9 * 0.16)
    assert both.header["merged"] == [first.hash, again.hash]
    assert first.merge(first) is first


def test_merging_keeps_what_either_run_doubted() -> None:
    doubts = {"flags": {"drifted": ["a", "b"], "preempted": ["c"]}, "unsupported": {"x": "no"}}
    more = {"flags": {"drifted": ["b", "d"], "unstable": ["e"]}, "unsupported": {"y": "neither"}}
    first = LatencyTable.from_rows({**HEADER, **doubts}, rows()[:2])
    both = first.merge(LatencyTable.from_rows({**HEADER, **more}, rows()[2:]))
    assert both.header["flags"] == {"drifted": ["a", "b", "d"], "preempted": ["c"], "unstable": ["e"]}
    assert both.header["unsupported"] == {"x": "no", "y": "neither"}
    plain = LatencyTable.from_rows(HEADER, rows()[2:])
    assert first.merge(plain).header["flags"] == plain.merge(first).header["flags"] == doubts["flags"]


def test_merging_networks_of_one_name_but_other_kernels_keeps_both() -> None:
    first = LatencyTable.from_rows(HEADER, rows())
    other = LatencyTable.from_rows(HEADER, [network_row("net", [relu(8)], timing(0.1))])
    assert sorted(network.measurement.median_ms for network in first.merge(other).networks) == [0.1, 1.5]


def test_merging_keeps_what_either_run_told_and_renames_in_all_of_it() -> None:
    def told(signature: str, edge: int, *networks: str, **more: Any) -> dict[str, Any]:
        model = {
            "name": "Net",
            "signature": signature,
            "inputs": [[1, 3, 8, 8]],
            "dense": "net",
            "networks": [*networks],
        }
        drift = {"largest": 0.01 * edge, "repeated_stretches": edge, "drifted_rows": 0}
        return {**HEADER, "models": [model], "edges": [{"group": "a", "width": edge}], "drift": drift, **more}

    first = LatencyTable.from_rows(told("x", 8, "net", disturbances=["hot."]), rows())
    rest = [network_row("net", [relu(8)], timing(0.1)), network_row("small", [relu(16)], timing(0.1))]
    flags = {"drifted": ["net"]}
    second = LatencyTable.from_rows(
        told("y", 16, "net", "small", disturbances=["hot.", "restarted."], flags=flags), rest
    )
    both = first.merge(second)
    (renamed,) = {network.name for network in both.networks} - {"net", "small"}
    assert renamed.startswith("net-")
    assert [(model["signature"], model["dense"], model["networks"]) for model in both.header["models"]] == [
        ("x", "net", ["net"]),
        ("y", renamed, [renamed, "small"]),
    ]
    assert both.header["flags"] == {"drifted": [renamed]}, "not the network of the same name"
    assert [edge["width"] for edge in both.header["edges"]] == [8, 16]
    assert both.header["disturbances"] == ["hot.", "restarted."]
    assert both.header["drift"] == {"largest": 0.16, "repeated_stretches": 24, "drifted_rows": 1}
    # A further run with the same model adds its networks to it.
    again = first.merge(LatencyTable.from_rows(told("x", 8, "small"), rest[1:]))
    assert [model["networks"] for model in again.header["models"]] == [["net", "small"]]
    assert len(again.header["edges"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": {**HEADER["identity"], "runtime_version": "1.32.0"}}, "runtime_version, found '1.31.1' and '1.32.0'"),
        ({"identity": {"architecture": "x86_64"}}, "identity.cpu_model, found 'Test CPU' and None"),
        ({"threads": 4}, "threads, found 1 and 4"),
        ({"precision": "int8"}, "precision, found 'fp32' and 'int8'"),
    ],
)  # fmt: skip
def test_tables_of_different_devices_do_not_merge(change: dict[str, Any], message: str) -> None:
    first = LatencyTable.from_rows(HEADER, rows())
    with pytest.raises(TableMismatchError, match="must agree in") as caught:
        first.merge(LatencyTable.from_rows({**HEADER, **change}, rows()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("median_ms", math.nan, "median_ms must be a number, found nan"),
        ("median_ms", -1.0, "median_ms must lie between 1e-06 and 1e+06 ms, found -1.0"),
        ("median_ms", 0.0, "median_ms must lie between"),
        ("p90_ms", 4e6, "p90_ms must lie between 1e-06 and 1e+06 ms, found 4000000.0"),
        ("median_ms", "0.1", "median_ms must be a number, found '0.1'"),
        ("min_ms", 0.5, "min_ms must not exceed median_ms"),
        ("rounds_ms", [0.1, math.inf], "rounds_ms must be a list of numbers"),
        ("rounds_ms", [], "rounds_ms must be a list of numbers, found []"),
        ("times_ms", [0.1, 0.2], "times_ms and cpu_share must hold one value per sample each, found 2 and 0"),
        ("times_ms", "0.1", "times_ms must be a list of numbers, found '0.1'"),
        ("cpu_share", [math.nan], "cpu_share must be a list of numbers"),
        ("samples", 0, "samples must be a whole number from 1, found 0"),
        ("samples", True, "samples must be a whole number from 1, found True"),
        ("spread", -0.1, "spread must be a finite share from 0"),
        ("key", "{}", "the key must be a kernel's, found '{}'"),
        ("key", relu(8).key.replace("8", "-8"), "sizes must be whole numbers from 1"),
        ("key", relu(8).key.replace(":", ": "), "not written as Kernel.key writes it"),
        ("op", "Gelu", "op must agree with the key ('Relu'), found 'Gelu'"),
        ("kind", "layer", "kind must be 'kernel' or 'network', found 'layer'"),
    ],
)
def test_an_impossible_value_is_named_with_its_row(column: str, value: object, message: str) -> None:
    bad = rows()
    bad[0][column] = value
    with pytest.raises(TableFormatError, match=r"^row 0 of the latency table is not valid") as caught:
        LatencyTable.from_rows(HEADER, bad)
    assert message in str(caught.value)


def test_columns_must_be_complete_and_known() -> None:
    lacking, strange = rows(), rows()
    del lacking[1]["p90_ms"]
    strange[1]["watts"] = 3.0
    with pytest.raises(TableFormatError, match=r"row 1 .* missing p90_ms"):
        LatencyTable.from_rows(HEADER, lacking)
    with pytest.raises(TableFormatError, match=r"row 1 .* unknown 'watts'"):
        LatencyTable.from_rows(HEADER, strange)


def test_a_kernel_that_comes_twice_is_refused() -> None:
    with pytest.raises(TableFormatError, match="each kernel must come once"):
        LatencyTable.from_rows(HEADER, [*rows(), rows()[0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, "must have schema 1, found 7"),
        ({"identity": {}}, "identity in the header of a latency table must be the device's identity, found {}"),
        ({"threads": 0}, "threads in the header of a latency table must be a number of threads from 1, found 0"),
        ({"precision": "fp64"}, "must be one of fp32, fp16, int8, found 'fp64'"),
        (
            {"percentiles": {"a": {"95": 1.2}}},
            "percentiles in the header of a latency table must be records by network",
        ),
        ({"latency": {"quantile": 95}}, "latency in the header of a latency table must be a percentile, a state"),
        ({"note": math.nan}, "must be JSON"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TableFormatError) as caught:
        LatencyTable.from_rows({**HEADER, **change}, rows())
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableMissingError, match=r"nothing\.parquet, found no such file"):
        LatencyTable.load(tmp_path / "nothing.parquet")


def test_what_is_not_a_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    for content in (b"", b"PAR1", b"op,ms\nRelu,1\n", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(TableFormatError, match="must be a whole Parquet file written by edgeprune"):
            LatencyTable.load(path)
    pq.write_table(pa.table({"op": ["Relu"], "ms": [1.0]}), path)
    with pytest.raises(TableFormatError, match="found a foreign Parquet file"):
        LatencyTable.load(path)


def test_a_file_of_another_schema_or_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = LatencyTable.from_rows(HEADER, rows()).save(tmp_path / "table.parquet")
    table = pq.read_table(path)
    cases = {
        "missing median_ms": table.drop_columns(["median_ms"]),
        "unknown watts": table.append_column("watts", pa.array([1.0] * len(table))),
        "column samples of latency table": table.set_column(10, "samples", table["samples"].cast(pa.float64())),
        "column median_ms of latency table": table.set_column(5, "median_ms", table["median_ms"].cast(pa.string())),
        "must have schema 1, found 2": _with_header(table, schema=2),
    }
    for message, changed in cases.items():
        pq.write_table(changed.replace_schema_metadata(changed.schema.metadata or table.schema.metadata), path)
        with pytest.raises(TableFormatError) as caught:
            LatencyTable.load(path)
        assert message in str(caught.value)


def test_a_time_edited_by_hand_is_noticed(tmp_path: Path) -> None:
    path = LatencyTable.from_rows(HEADER, rows()).save(tmp_path / "table.parquet")
    table = pq.read_table(path)
    times = [value * 0.95 for value in table["median_ms"].to_pylist()]
    pq.write_table(table.set_column(5, table.schema.field(5), pa.array(times)), path)
    with pytest.raises(TableFormatError, match=r"must have sha256 [0-9a-f]{12}, found [0-9a-f]{12}"):
        LatencyTable.load(path)


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path, saved: tuple[LatencyTable, bytes]) -> None:
    _, whole = saved
    part = tmp_path / "part.parquet"
    part.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(TableFormatError, match=r"part\.parquet"):
        LatencyTable.load(part)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_refused_or_harmless(
    place: float, bit: int, tmp_path: Path, saved: tuple[LatencyTable, bytes]
) -> None:
    table, whole = saved
    content = bytearray(whole)
    content[int(len(content) * place)] ^= 1 << bit
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content)
    outcome = _loaded_or_message(damaged)
    assert outcome == table or "damaged.parquet" in str(outcome)


_THREADS = """
import os, sys
import pyarrow.parquet
from edgeprune import LatencyTable
before = len(os.listdir("/proc/self/task"))
LatencyTable.load(sys.argv[1]).save(sys.argv[2])
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_tables_are_read_and_written_without_threads_of_arrow(
    tmp_path: Path, saved: tuple[LatencyTable, bytes]
) -> None:
    """Such a thread that still holds the file when the interpreter ends aborts the process, now and then."""
    path = tmp_path / "table.parquet"
    path.write_bytes(saved[1])
    command = [sys.executable, "-c", _THREADS, str(path), str(tmp_path / "again.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_a_failed_save_leaves_the_former_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = LatencyTable.from_rows(HEADER, rows()).save(tmp_path / "table.parquet")
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        LatencyTable.from_rows(HEADER, rows()[:2]).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.parquet"]


def _loaded_or_message(path: Path) -> LatencyTable | str:
    try:
        return LatencyTable.load(path)
    except TableFormatError as error:
        return str(error)


def _with_header(table: pa.Table, **changes: object) -> pa.Table:
    metadata = dict(table.schema.metadata)
    header = {**json.loads(metadata[b"edgeprune.latency_table"]), **changes}
    return table.replace_schema_metadata({**metadata, b"edgeprune.latency_table": json.dumps(header).encode()})
