"""What TVM compiles for, and what an engine file tells of itself: nothing here needs TVM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.tvm import engine_file, kernels
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.target import target_of
from edgeprune.boards.fingerprint import from_facts
from edgeprune.errors import CompileError
from edgeprune.latency.table import LatencyTable
from edgeprune.spec import TensorSpec

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"
PI = {"architecture": "aarch64", "cpu_model": "Cortex-A76", "isa": ["asimd", "asimddp", "atomics", "fp", "sve"]}


def test_only_what_the_board_told_is_switched_on():
    found = target_of(
        {"architecture": "x86_64", "cpu_model": "any", "isa": ["sse2", "avx", "avx2", "fma", "avx512_fp16"]}
    )
    assert found.features == ("+avx", "+avx2", "+fma")
    assert found.isa == ("avx", "avx2", "fma")
    assert found.llvm["mcpu"] == "x86-64", "a newer name would bring instructions that nobody asked the board for"


def test_an_arm_core_is_named_and_what_its_name_would_imply_is_switched_off():
    found = target_of(PI)
    assert (found.cpu, found.triple) == ("cortex-a76", "aarch64-linux-gnu")
    assert {"+dotprod", "+lse", "-fullfp16", "-rdm", "-sve"} <= set(found.features)
    assert found.isa == ("asimd", "asimddp", "atomics", "fp")


def test_a_table_is_lowered_for_the_core_that_its_kernels_were_compiled_for():
    header = {**LatencyTable.load(TABLE).header, "identity": {**PI, "device": "board"}}
    assert target_of(LatencyTable(header, []).target()) == target_of(PI)


def test_code_for_a_board_with_several_kinds_of_cores_is_tuned_for_none():
    assert target_of({**PI, "cpu_model": "4x Cortex-A55 + 4x Cortex-A76"}).cpu == "generic"
    assert target_of({**PI, "cpu_model": "unknown"}).cpu == "generic"


def test_another_architecture_is_refused_with_the_next_step():
    with pytest.raises(CompileError, match="aarch64 and x86_64, found a board with riscv64") as caught:
        Tvm().for_board({"architecture": "riscv64", "cpu_model": "any", "isa": []})
    assert caught.value.hint == "--backend onnxruntime"


def test_a_missing_cross_compiler_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="aarch64-linux-gnu-gcc") as caught:
        target_of(PI).linker()
    assert caught.value.hint == "apt-get install gcc-aarch64-linux-gnu"


def test_an_engine_of_another_series_of_tvm_or_a_newer_glibc_is_refused():
    board = from_facts({"architecture": "x86_64", "libc": "glibc 2.31", "runtimes": {"tvm": {"version": "0.27.1"}}})
    needs = {"series": "0.27", "glibc": "2.27"}
    assert all(item.met for item in Tvm().requirements(board, needs))
    newer = replace(board, runtimes={"tvm": {"version": "0.28.0"}})
    assert [item.field for item in Tvm().requirements(newer, needs) if not item.met] == ["tvm"]
    assert [item.field for item in Tvm().requirements(board, {**needs, "glibc": "2.36"}) if not item.met] == ["libc"]
    other = replace(board, libc="musl")
    assert [item.field for item in Tvm().requirements(other, needs) if not item.met] == ["libc"]


def test_an_engine_file_is_the_library_first_and_gives_its_description_back(tmp_path: Path):
    library = b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\x00" + b"\0GLIBC_2.17\0GLIBC_2.9\0GLIBC_2.2.5\0expf\0"
    told = {"isa": ["fp"], "series": "0.27"}
    content = engine_file.packed(library, told)
    assert content == engine_file.packed(library, told)
    assert content.startswith(library)
    path = tmp_path / "engine.so"
    path.write_bytes(content)
    assert engine_file.description_of(path) == {"format": 1, **told}
    assert engine_file.architecture_of(content) == "aarch64"
    assert engine_file.glibc_of(library) == "2.17"
    path.write_bytes(content[:-7])
    with pytest.raises(CompileError, match=r"engine\.so must be a TVM engine"):
        engine_file.description_of(path)
    path.write_bytes(engine_file.packed(library, told).replace(b'"format":1', b'"format":2'))
    with pytest.raises(CompileError):
        engine_file.description_of(path)


def test_a_library_of_an_unknown_machine_is_refused():
    with pytest.raises(CompileError, match="ELF library"):
        engine_file.architecture_of(b"\x7fELF\x02\x01" + bytes(12) + b"\x03\x00")


@pytest.mark.parametrize(("heads", "runs"), [(1, False), (2, True)])
def test_a_transposition_that_moves_nothing_is_no_kernel(heads, runs):
    shapes = {"x": (1, heads, 36, 22), "y": (1, 36, heads, 22)}
    turn = Operator("turn", "Transpose", ("x",), ("y",), (("perm", (0, 2, 1, 3)),))
    graph = OperatorGraph((turn,), (TensorSpec("x", shapes["x"]),), ("y",), shapes, {})
    (found,) = kernels.kernels(graph, shapes, [["turn"]])
    assert (found is not None) == runs
    if found is not None:
        assert (found.family, found.inputs, found.output) == ("layout", (shapes["x"],), shapes["y"])
        again = kernels.graph_of(found)
        assert kernels.kernels(again, again.shapes, [["operator0"]]) == [found]
