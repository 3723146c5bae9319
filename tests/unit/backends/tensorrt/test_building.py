"""Engines built on a local board by the stand-in: what is written, kept, taken up again, and told when it fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("onnx")

from edgeprune.backends.tensorrt import building, versions
from edgeprune.backends.tensorrt.flags import BuildOptions
from edgeprune.boards.board import Board
from edgeprune.errors import (
    BackendError,
    BackendUnavailableError,
    BoardBusyError,
    CompileError,
    IncompatibleTargetError,
    RemoteTimeoutError,
)
from edgeprune.files import sha256_of
from edgeprune.profiling.uploads import upload


def held(board):
    """Take the board and let it go, once the lock of a killed host has gone."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with board.hold("profile"):
                return
        except BoardBusyError as error:
            if "has held it since" not in error.message or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("version", "options"),
    [("8.6.1", BuildOptions("fp16", dla_core=0)), ("10.3.0", BuildOptions()), ("11.1.0", BuildOptions("fp16"))],
)
def test_an_engine_is_built_timed_and_recorded(stand_in, build, model, tmp_path, version, options):
    stand_in(version)
    path = tmp_path / "engine.plan"
    record = build(model, path, options)
    assert record["tensorrt"] == version
    assert record["engine_sha256"] == sha256_of(path)
    assert record["unread"] == []
    assert len(record["kernels"]) == 26
    assert record["latency"]["queries"] == 200
    assert 0 < record["latency"]["median_ms"] <= record["latency"]["p99_ms"]
    # No path of a board stands in it: the same build elsewhere has the same commands.
    assert str(tmp_path) not in json.dumps(record)
    assert sorted(path.parent.glob("*.plan")) == [path]
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_the_engine_is_in_the_store_already_and_what_is_finished_is_taken_up(stand_in, build, model, tmp_path):
    stand_in()
    first = build(model, tmp_path / "first.plan")
    assert (tmp_path / "root" / "store" / first["engine_sha256"]).is_file()
    second = build(model, tmp_path / "second.plan")
    # Two builds differ, so an equal hash says that there was one.
    assert second["engine_sha256"] == first["engine_sha256"]
    # Other options are another build, which the timing cache of the first serves.
    third = build(model, tmp_path / "third.plan", BuildOptions("fp16"))
    assert third["engine_sha256"] != first["engine_sha256"]
    logs = [log.read_text() for log in (tmp_path / "root" / "tensorrt").glob("*/build.log")]
    assert sum("bytes of timing cache from" in log for log in logs) == 1


def test_a_finished_build_is_taken_up_only_as_it_was_written(stand_in, build, model, tmp_path):
    stand_in()
    first = build(model, tmp_path / "first.plan")
    (engine,) = (tmp_path / "root" / "tensorrt").glob("*/engine.plan")
    content = engine.read_bytes()
    engine.unlink()
    engine.write_bytes(content[:40])
    second = build(model, tmp_path / "second.plan")
    assert (tmp_path / "second.plan").stat().st_size == len(content)
    assert second["engine_sha256"] == sha256_of(tmp_path / "second.plan") != first["engine_sha256"]


def test_an_engine_of_another_gpu_is_another_build(stand_in, model, tmp_path):
    stand_in()
    with Board.open("local") as board:
        version = building.version_on(board)
        hashes = [
            building.build(board, version, model, BuildOptions(), tmp_path / "engine.plan", gpu=gpu)["engine_sha256"]
            for gpu in ({"gpu": "Orin"}, {"gpu": "Xavier"}, {"gpu": "Orin"})
        ]
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_finished_engine_that_cannot_be_timed_is_built_anew(stand_in, build, model, tmp_path):
    stand_in("8.6.1")
    first = build(model, tmp_path / "first.plan", BuildOptions())
    (folder,) = (path.parent for path in (tmp_path / "root" / "tensorrt").glob("*/engine.plan"))
    # As a system without the release that built it finds it: whole, and of no use.
    (folder / "engine.plan").unlink()
    (folder / "engine.plan").write_bytes(b"of another release")
    (folder / "build.hashes").write_text(
        json.dumps({name: sha256_of(folder / name) for name in ("engine.plan", "layers.json")})
    )
    (folder / "time.status").unlink()
    with pytest.raises(IncompatibleTargetError):
        build(model, tmp_path / "second.plan")
    third = build(model, tmp_path / "third.plan")
    assert third["engine_sha256"] == sha256_of(tmp_path / "third.plan") != first["engine_sha256"]


def test_a_build_outlives_its_host_and_is_taken_up(stand_in, build, model, tmp_path):
    stand_in(build_s=2.5)
    code = (
        "import sys\n"
        "from edgeprune.backends.tensorrt import building\n"
        "from edgeprune.backends.tensorrt.flags import BuildOptions\n"
        "from edgeprune.boards.board import Board\n"
        "model = building.Model(sys.stdin.buffer.read(), {}, {})\n"
        "with Board.open('local') as board:\n"
        "    building.build(board, building.version_on(board), model, BuildOptions(), __import__('pathlib').Path('x.plan'))\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        start_new_session=True,
    )
    host.stdin.write(model.content)
    host.stdin.close()
    records = tmp_path / "root" / "tensorrt"
    deadline = time.monotonic() + 30
    while not list(records.glob("*/build.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(host.pid, signal.SIGKILL)
    host.wait()
    assert not list(records.glob("*/build.status"))
    with Board.open("local") as board, pytest.raises(BoardBusyError, match="after its host has gone"):
        held(board)
    started = next(iter(records.glob("*/build.json"))).read_text()
    record = build(model, tmp_path / "engine.plan")
    assert sha256_of(tmp_path / "engine.plan") == record["engine_sha256"]
    assert next(iter(records.glob("*/build.json"))).read_text() == started, "it was started a second time"


def test_a_build_that_takes_too_long_goes_on_and_is_taken_up(stand_in, build, model, tmp_path, monkeypatch):
    stand_in(build_s=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(building, "_BUILD_S", 0.7)
        with pytest.raises(RemoteTimeoutError, match="it goes on there"):
            build(model, tmp_path / "engine.plan")
    assert not (tmp_path / "engine.plan").exists()
    assert build(model, tmp_path / "engine.plan")["engine_sha256"] == sha256_of(tmp_path / "engine.plan")


@pytest.mark.parametrize(("failing", "named"), [("memory", "15485 MB"), ("killed", "SIGKILL")])
def test_a_build_that_fails_tells_why_and_leaves_no_file(stand_in, build, model, tmp_path, failing, named, caplog):
    stand_in(failing=failing)
    with caplog.at_level("INFO", "edgeprune.backends.tensorrt"), pytest.raises(CompileError) as caught:
        build(model, tmp_path / "engine.plan")
    assert named in caught.value.message
    assert caught.value.log_tail
    assert "\n" not in caught.value.message
    assert "build.log" in caplog.text
    assert not (tmp_path / "engine.plan").exists()
    # What failed is tried again: nothing of it is taken for a result.
    stand_in()
    build(model, tmp_path / "engine.plan")
    assert (tmp_path / "engine.plan").is_file()


def test_a_build_that_ends_well_without_an_engine_is_refused(stand_in, build, model, tmp_path):
    program = stand_in(name="thorough")
    forgetful = program.with_name("trtexec")
    forgetful.write_text(
        "#!/bin/sh\n"
        'for word; do shift; case "$word" in --saveEngine=*) ;; *) set -- "$@" "$word";; esac; done\n'
        f'exec "{program}" "$@"\n'
    )
    forgetful.chmod(0o755)
    with pytest.raises(CompileError, match="must write the engine, found that it ended well without one") as caught:
        build(model, tmp_path / "engine.plan")
    assert caught.value.log_tail


def test_an_export_that_cannot_be_read_leaves_the_engine_and_says_so(stand_in, build, model, tmp_path):
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"Layers": [{"Na')
    stand_in(layers=damaged)
    record = build(model, tmp_path / "engine.plan")
    assert record["kernels"] is None
    assert record["latency"]["queries"] == 200
    assert "layers" in record["unread"][0]


def test_a_board_without_trtexec_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with Board.open("local") as board, pytest.raises(BackendUnavailableError) as caught:
        building.version_on(board)
    assert "/usr/src/tensorrt/bin/trtexec" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec", IncompatibleTargetError),
        ("error while loading shared libraries: libnvinfer.so.10", BackendUnavailableError),
    ],
)
def test_a_trtexec_that_is_too_old_or_broken_is_refused(tmp_path, monkeypatch, said, kind):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "trtexec").write_text(f"#!/bin/sh\necho '{said}'\n")
    (folder / "trtexec").chmod(0o755)
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    with Board.open("local") as board, pytest.raises(kind):
        building.version_on(board)


@pytest.mark.parametrize("version", ["8.6.1", "11.1.0"])
def test_a_timing_tells_layers_where_they_are_asked_for(stand_in, build, model, tmp_path, version):
    stand_in(version)
    build(model, tmp_path / "engine.plan")
    events = []
    with Board.open("local") as board:
        request = {
            "runtime": "tensorrt",
            "engines": upload(board, {"a": tmp_path / "engine.plan"}, ()),
            "rounds": [["a"]],
        }
        for layers in (True, False):
            board.call("bench", {**request, "layers": layers}, on_event=events.append)
        damaged = tmp_path / "damaged.json"
        damaged.write_text('[{"count": 3}, {"name": "conv1"}]')
        stand_in(version, profile=damaged)
        with pytest.raises(BackendError, match="a profile that cannot be read"):
            board.call("bench", {**request, "layers": True})
    told, untold = (event for event in events if event["event"] == "sample")
    assert len(told["layers"]) == 26
    assert told["layers"][1] == ["/conv1/Conv + /relu/Relu", 0.0288488]
    assert told["times_ms"] == untold["times_ms"]
    assert "layers" not in untold


def test_boards_that_differ_in_their_gpu_alone_are_two(stand_in, tmp_path):
    program, identities = stand_in("11.1.0"), []
    for name in ("Orin", "Thor"):
        told = program.with_name("nvidia-smi")
        told.write_text(f"#!/bin/sh\necho '{name}, 540.3.0, 8.7, [N/A]'\n")
        told.chmod(0o755)
        with Board.open("local") as board:
            found = board.probe()
        assert found.runtimes["tensorrt"]["gpu"] == name
        assert "runtime_gpu" not in found.identity("onnxruntime")
        identities.append(found.identity("tensorrt"))
    assert {key for key in identities[0] if identities[0][key] != identities[1][key]} == {"runtime_gpu"}


def test_the_probe_tells_release_and_library(stand_in, tmp_path):
    stand_in("11.1.0")
    library = tmp_path / "lib" / "libnvinfer.so.11.1.0"
    library.parent.mkdir()
    library.write_bytes(b"a library")
    library.with_name("libnvinfer.so.8.6.1").write_bytes(b"that of another release")
    with Board.open("local") as board:
        found = board.probe()
    assert found.runtimes["tensorrt"] == {"version": "11.1.0", "sha256": sha256_of(library)}
    assert versions.parse(found.runtimes["tensorrt"]["version"]) == versions.Version(11, 1, 0)
    library.write_bytes(b"a newer build of it")
    with Board.open("local") as board:
        assert board.probe().runtimes["tensorrt"]["sha256"] == sha256_of(library)
