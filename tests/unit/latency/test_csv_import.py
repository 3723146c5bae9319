"""Other people's tables come in as kernels that fit and predict, or one sentence says which row and column does not."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import ConfigError, TableFileMissingError, TableFormatError, TableMismatchError
from edgeprune.latency.csv_kernels import KINDS
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.spec import Kernel

TINYNAS = Path(__file__).parents[2] / "data" / "tinynas_v100_conv.csv"
FIELDS = {"in_channels": "cin", "out_channels": "cout", "height": "h", "kernel_size": "kernel", "stride": "stride"}
HEAD = "cin,cout,h,kernel,stride,ms\n"
GOOD = "16,32,28,3,1,0.05\n"


def imported(text: str, **changes: Any) -> LatencyTable:
    given_ = {"kernel": "conv2d", "columns": FIELDS, "latency_ms": "ms", "device": "v100", **changes}
    return LatencyTable.from_csv(io.StringIO(text), **given_)


@pytest.fixture(scope="module")
def v100() -> LatencyTable:
    """Convolutions of TensorRT on a V100."""
    more = {"residual": "elmt_fused", "precision": "precision", "batch": "batch"}
    rest = {"latency_ms": "latency_ms", "device": "v100", "runtime": "tensorrt", "facts": {"multiprocessors": 80}}
    regular = LatencyTable.from_csv(
        TINYNAS, kernel="conv2d", columns={**FIELDS, **more}, where={"conv_type": "Regular"}, **rest
    )
    depthwise = LatencyTable.from_csv(
        TINYNAS,
        kernel="depthwise_conv2d",
        columns={"channels": "cin", "height": "h", "kernel_size": "kernel", "stride": "stride", **more},
        where={"conv_type": "Depthwise"},
        **rest,
    )
    return regular.merge(depthwise)


def test_a_real_table_of_another_project_fits_and_predicts(v100: LatencyTable, tmp_path: Path) -> None:
    assert len(v100.kernels) == 400
    assert {kernel.precision for kernel in v100.kernels} == {"fp16"}
    assert {kernel.attribute("groups") == kernel.inputs[0][1] for kernel in v100.kernels} == {True, False}
    held_out = v100.kernels[::2]
    hidden = {kernel.key for kernel in held_out}
    predictor = fit(v100.filter(key=[row["key"] for row in v100.rows if row["key"] not in hidden]))
    truth = np.array([v100.measurements[kernel.key].median_ms for kernel in held_out])
    errors = np.abs(np.log(predictor.kernel_ms(held_out) / truth))
    constant = np.abs(np.log(truth / np.median(truth)))
    # Tactics of TensorRT jump; 200 kernels that span four orders of magnitude give no more than the rough size.
    assert np.median(errors) < 0.35
    assert np.median(errors) < np.median(constant) / 3
    assert LatencyTable.load(v100.save(tmp_path / "v100.parquet")) == v100


def test_the_header_says_where_the_table_comes_from(v100: LatencyTable) -> None:
    header = v100.header
    assert header["label"] == "imported"
    assert (header["runtime"], header["precision"], header["threads"]) == ("tensorrt", "fp16", 1)
    assert header["identity"] == {"device": "v100", "runtime": "tensorrt"}
    regular, depthwise = header["imported"]
    digest = hashlib.sha256(TINYNAS.read_bytes()).hexdigest()
    assert (regular["source"], regular["sha256"]) == (TINYNAS.name, digest)
    assert (regular["where"], depthwise["where"]) == ({"conv_type": "Regular"}, {"conv_type": "Depthwise"})
    assert regular["rows"] + depthwise["rows"] == 400
    assert repr(v100) == "LatencyTable(400 kernels, 0 networks, tensorrt on v100)"


def test_the_kernels_are_those_that_lowering_makes(measured: LatencyTable) -> None:
    (plain,) = imported(HEAD + GOOD).kernels
    (fused,) = imported(HEAD + GOOD, constants={"activation": "Relu"}).kernels
    known = next(kernel for kernel in measured.kernels if kernel.op == "FusedConv")
    assert [name for name, _ in fused.attributes] == [name for name, _ in known.attributes]
    assert (fused.op, fused.family, fused.attribute("activation")) == ("FusedConv", "conv", "Relu")
    assert plain == Kernel(
        "Conv",
        "conv",
        ((1, 16, 28, 28),),
        (1, 32, 28, 28),
        (
            *(("activation", ""), ("bias", True), ("dilation", (1, 1)), ("groups", 1)),
            *(("kernel", (3, 3)), ("pads", (1, 1, 1, 1)), ("residual", False), ("stride", (1, 1))),
        ),
    )
    gemm = next(kernel for kernel in measured.kernels if kernel.op == "Gemm")
    linear = imported(
        "i,o,ms\n117,10,0.01\n", kernel="linear", columns={"in_features": "i", "out_features": "o"}
    ).kernels
    assert linear == [gemm]


def test_windows_strides_and_padding_of_two_sizes() -> None:
    text = "n,cin,cout,h,w,k,s,p,ms\n4,1,32,161,700,5x20,2x2,0x0,0.13\n4,1,32,161,700,(1;3),1,(0;1),0.13\n"
    columns = {
        "batch": "n",
        "in_channels": "cin",
        "out_channels": "cout",
        "height": "h",
        "width": "w",
        "kernel_size": "k",
        "stride": "s",
        "padding": "p",
    }
    first = imported(text.splitlines()[0] + "\n" + text.splitlines()[1], columns=columns).kernels[0]
    assert (first.output, first.attribute("kernel")) == ((4, 32, 79, 341), (5, 20))
    with pytest.raises(
        TableFormatError, match="line 3 of the given file, column 'k': kernel_size must be a size from 1"
    ):
        imported(text, columns=columns)


def test_parts_are_told_in_one_column_or_in_two() -> None:
    def parts(kind: str, cells: str, **columns: str) -> Kernel:
        text = ",".join([*columns.values(), "ms"]) + f"\n{cells},0.05\n"
        return imported(text, kernel=kind, columns=columns).kernels[0]

    one = parts("concat", "32+64,28", channels="c", height="h")
    two = parts("concat", "32,64,28", channels="c", more_channels="d", height="h")
    assert one == two
    assert (one.inputs, one.output) == (((1, 32, 28, 28), (1, 64, 28, 28)), (1, 96, 28, 28))
    assert parts("concat", "16x16;32,28", channels="c", height="h").output == (1, 64, 28, 28)
    for cells, message in (
        (
            "32,28",
            "line 2 of the given file: a concatenation must have the channels of at least two parts, found 32 alone",
        ),
        ("32+,28", "column 'c': channels must be a whole number from 1, or several such as 32"),
    ):
        with pytest.raises(TableFormatError, match=message):
            parts("concat", cells, channels="c", height="h")
    with pytest.raises(TableFormatError, match="the parts of a split must be equal, found 5 of 32 channels"):
        parts("split", "32,28,5", channels="c", height="h", parts="n")


def test_a_transposed_convolution_grows_its_image() -> None:
    names = ("in_channels", "out_channels", "height", "kernel_size", "stride", "padding", "output_padding", "groups")

    def made(*cells: object) -> Kernel:
        text = ",".join([*names, "ms"]) + "\n" + ",".join(map(str, cells)) + ",0.05\n"
        return imported(text, kernel="conv_transpose2d", columns=dict(zip(names, names, strict=True))).kernels[0]

    # As PyTorch has it: (size - 1) * stride - 2 * padding + kernel + output padding.
    kernel = made(16, 32, 14, 3, 2, 1, 1, 4)
    assert (kernel.output, kernel.inputs) == ((1, 32, 28, 28), ((1, 16, 14, 14), (16, 8, 3, 3), (32,)))
    with pytest.raises(TableFormatError, match="groups must divide the channels, found 3 groups of 16 and 32 channels"):
        made(16, 32, 14, 3, 2, 1, 1, 3)
    with pytest.raises(TableFormatError, match="the padding must leave some of the image"):
        made(16, 32, 1, 3, 1, 2, 0, 1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_makes_kernels_that_fit(kind: str) -> None:
    required = KINDS[kind].required
    fields = [*required]
    lines = [",".join([*fields, "ms"])]
    for size in (8, 16, 24, 32):
        values = {"sizes": "3", "counts": f"{size}+{2 * size}", "count": str(size)}
        lines.append(",".join([*(values[required[name]] for name in fields), f"{0.001 * size}"]))
    table = imported("\n".join(lines), kernel=kind, columns={name: name for name in fields})
    assert len(table.kernels) == 4
    assert np.isfinite(fit(table).kernel_ms(table.kernels)).all()


@pytest.mark.parametrize(("unit", "value"), [("latency_ms", "0.05"), ("latency_us", "50"), ("latency_s", "5e-5")])
def test_times_in_any_unit(unit: str, value: str) -> None:
    text = f"cin,cout,h,kernel,stride,time\n16,32,28,3,1,{value}\n"
    table = imported(text, **{"latency_ms": None, unit: "time"})
    assert table.measurements[table.kernels[0].key].median_ms == pytest.approx(0.05)


def test_rows_of_one_kernel_are_rounds_of_one_measurement() -> None:
    table = imported(HEAD + GOOD + "16,32,28,3,1,0.07\n16,32,28,3,1,0.04\n16,64,28,3,1,0.09\n")
    first = next(kernel for kernel in table.kernels if kernel.output[1] == 32)
    timed = table.measurements[first.key]
    assert (timed.median_ms, timed.min_ms, timed.samples) == (0.05, 0.04, 3)
    assert timed.rounds_ms == (0.05, 0.07, 0.04)


def test_a_file_a_handle_and_other_separators_give_the_same_kernels(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("\ufeff" + (HEAD + GOOD).replace(",", ";"), encoding="utf-8")
    rest: dict[str, Any] = {"kernel": "conv2d", "columns": FIELDS, "latency_ms": "ms", "device": "v100"}
    with path.open(encoding="utf-8-sig", newline="") as stream:
        opened = LatencyTable.from_csv(stream, **rest)
    assert LatencyTable.from_csv(path, **rest).measurements == imported(HEAD + GOOD).measurements == opened.measurements
    assert opened.header["imported"][0]["source"] == "table.csv"


def test_constants_threads_and_precision() -> None:
    table = imported(HEAD + GOOD, constants={"batch": 8, "precision": "int8", "threads": 4})
    assert table.kernels[0].inputs == ((8, 16, 28, 28),)
    assert (table.header["threads"], table.header["precision"]) == (4, "int8")
    several = "cin,cout,h,kernel,stride,t,ms\n16,32,28,3,1,1,0.05\n16,32,28,3,1,2,0.03\n"
    with pytest.raises(TableFormatError, match="one number of threads, found 1 and, in line 3 of the given file, 2"):
        imported(several, columns={**FIELDS, "threads": "t"})
    assert len(imported(several, columns={**FIELDS, "threads": "t"}, where={"t": 2}).kernels) == 1
    with pytest.raises(TableFormatError, match="the constant 'batch': batch must be a whole number") as caught:
        imported(HEAD + GOOD, constants={"batch": "many"})
    assert caught.value.hint == "constants={'batch': ...}", "no other row is better"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("16,32,28,3,1,nan", "line 3 of the given file, column 'ms': a latency must be finite, found nan"),
        ("16,32,28,3,1,-1", "line 3 of the given file, column 'ms': a latency must be positive, found -1"),
        ("16,32,28,3,1,0", "column 'ms': a latency must be positive, found 0"),
        ("16,32,28,3,1,3e9", "column 'ms': a latency must lie between 1e-06 and 1e+06 ms, found 3e+09 ms"),
        ("16,32,28,3,1,fast", "column 'ms': a latency must be a number, found 'fast'"),
        ("16,32,28,3,1", "line 3 of the given file: a row must have as many cells as there are columns, 6, found 5"),
        ("16,32,28,3,1,1,3", "a row must have as many cells as there are columns, 6, found 7"),
        ("16,32,28,3,1,", "column 'ms': a latency must be a number, found ''"),
        ("16,32,28,3,,1.0", "line 3 of the given file, column 'stride': stride must have a value, found an empty cell"),
        ("16,-32,28,3,1,1.0", "column 'cout': out_channels must be a whole number from 1, found '-32'"),
        ("16.5,32,28,3,1,1.0", "column 'cin': in_channels must be a whole number from 1, found '16.5'"),
        ("inf,32,28,3,1,1.0", "column 'cin': in_channels must be a whole number from 1, found 'inf'"),
        ("16,32,28,0,1,1.0", "column 'kernel': kernel_size must be a size from 1 such as 3 or 3x3, found '0'"),
        ("16,32,28,three,1,1.0", "column 'kernel': kernel_size must be a size"),
    ],
)
def test_an_impossible_value_is_named_with_row_and_column(row: str, message: str) -> None:
    with pytest.raises(TableFormatError) as caught:
        imported(HEAD + GOOD + row + "\n")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "skip_invalid=True" in caught.value.hint or "latency_us=" in caught.value.hint
    table = imported(HEAD + GOOD + row + "\n", skip_invalid=True)
    assert (len(table.kernels), table.header["imported"][0]["left_out"]) == (1, 1)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (
            "cin,cout,h,kernel,ms\n1,1,1,1,1\n",
            {},
            "must have a column 'stride', found none of that name. "
            "Try: columns={'stride': ...} (there are: cin, cout, h, kernel, ms)",
        ),
        ("", {}, "must hold a line of column names and rows below it, found an empty file"),
        (HEAD, {}, "must hold at least one row to import, found only the line of column names"),
        (
            HEAD + GOOD,
            {"where": {"h": 9, "stride": 1}},
            "found none of 1 whose h is '9' and stride is '1'. Try: where={'h': '28'} (there are: 28)",
        ),
        (HEAD + "16,32,28,3,1,0,05\n", {}, "found 7. Try: decimal points where there are decimal commas"),
        (HEAD + '16,32,28,3,1,"0,05"\n', {}, "found '0,05'. Try: a decimal point in place of the comma"),
        (
            HEAD + "16,32,28,3,1,-1\n",
            {"skip_invalid": True},
            "found none (1 could not be used; line 2 of the given file, column 'ms': a latency must be positive, found -1)",
        ),
        ("cin,cin,cout,h,kernel,stride,ms\n1,1,1,1,1,1,1\n", {}, "must come once, found 'cin' twice"),
        (
            HEAD.replace("ms", "latency_us") + GOOD,
            {"latency_ms": "latency_us"},
            "must be the one that their column is named after, found latency_ms='latency_us'. Try: latency_us='latency_us'",
        ),
        (HEAD.replace("ms", "Time (ns)") + GOOD, {"latency_ms": "Time (ns)"}, "divide the column by 1000"),
        (HEAD + "512,512,112,3,1,0.00005\n", {}, "must hold times that a device can reach, found 5e-05 ms"),
        (HEAD + "16,32,28,3,1,900000\n", {}, "must hold times that a device can have"),
        (HEAD + GOOD, {"constants": {"groups": 5}}, "groups must divide the channels, found 5 groups of 16 and 32"),
        (
            HEAD + GOOD,
            {"constants": {"precision": "fp64"}},
            "must be one of fp32, fp16, int8, found 'fp64'. Try: constants={'precision': ...}",
        ),
        (HEAD + GOOD, {"constants": {"precision": "half"}}, "found 'half'. Try: constants={'precision': 'fp16'}"),
        (
            HEAD.replace("ms", "p,ms") + "16,32,28,3,1,half,0.05\n",
            {"columns": {**FIELDS, "precision": "p"}},
            "found 'half'. Try: constants={'precision': 'fp16'} with where={'p': 'half'}, instead of the column",
        ),
        (
            HEAD + GOOD,
            {"constants": {"batch": 0}},
            "the constant 'batch': batch must be a whole number from 1, found '0'",
        ),
        (HEAD + '16,32,28,3,1,"fast\n', {}, "a latency must be a number, found 'fast'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(
    text: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TableFormatError) as caught:
        imported(text, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "conv9d"}, "must be one of conv2d, depthwise_conv2d, conv_transpose2d, linear"),
        ({"columns": {"in_channels": "cin"}}, "found no column or constant for out_channels, height, kernel_size"),
        ({"columns": {**FIELDS, "colour": "cin"}}, "a field of conv2d must be one of in_channels"),
        ({"constants": {"stride": 1}}, "must have a column or a constant, found both for stride"),
        ({"latency_ms": None}, "exactly one of latency_ms, latency_us and latency_s must name the column"),
        ({"latency_us": "us"}, "found latency_ms and latency_us"),
        ({"device": " "}, "must name the device it was measured on"),
    ],
)
def test_a_mapping_that_tells_too_little_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        imported(HEAD + GOOD, **changes)
    assert message in str(caught.value)


def test_what_is_no_csv_file_is_refused(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"kernel": "conv2d", "columns": FIELDS, "latency_ms": "ms", "device": "v100"}
    with pytest.raises(TableFileMissingError, match="found no such file"):
        LatencyTable.from_csv(tmp_path / "none.csv", **rest)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(TableFormatError, match=r"must be UTF-8 text, found .*binary\.csv"):
        LatencyTable.from_csv(tmp_path / "binary.csv", **rest)
    with pytest.raises(ConfigError, match="must be open as text"):
        LatencyTable.from_csv(io.BytesIO(b"a"), **rest)  # type: ignore[arg-type]


def test_a_table_without_an_architecture_is_not_pruned_with(v100: LatencyTable) -> None:
    with pytest.raises(TableMismatchError, match="must say its device's architecture and isa"):
        v100.target()
    facts = {"architecture": "aarch64", "isa": ["asimd"]}
    assert imported(HEAD + GOOD, facts=facts).target() == facts


@given(st.text(max_size=80))
def test_any_text_is_a_table_or_a_typed_refusal(text: str) -> None:
    for content in (text, HEAD + text, HEAD + GOOD + text):
        with contextlib.suppress(TableFormatError):
            assert len(imported(content, skip_invalid=bool(len(text) % 2)).kernels) >= 1


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_any_numbers_of_any_kind_are_a_kernel_or_a_typed_refusal(kind: str, data: st.DataObject) -> None:
    fields = [*KINDS[kind].required, data.draw(st.sampled_from(sorted(KINDS[kind].optional)))]
    cell = st.sampled_from(["0", "1", "3", "8", "64", "3x5", "32+64", "1e9", "-2", "nan", "inf", "fp16", "Relu", ""])
    cells = data.draw(st.lists(cell, min_size=len(fields), max_size=len(fields)))
    text = ",".join([*fields, "ms"]) + "\n" + ",".join([*cells, "5"]) + "\n"
    with contextlib.suppress(TableFormatError):
        table = imported(text, kernel=kind, columns={name: name for name in fields})
        assert all(size >= 1 for shape in (*table.kernels[0].inputs, table.kernels[0].output) for size in shape)
