"""A board that is throttled, lost or restarted while it is profiled: one sentence, and no sample is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgeprune.latency.table import LatencyTable
from edgeprune.testing.command_line import CommandLine, one_line
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

PROFILE = ("profile", "net.py:build", "--input", "image=1x3x16x16:float32", "--out", "new/table.parquet")
BOOT = Path("/proc/sys/kernel/random/boot_id")


def samples(journal: Path) -> list[dict[str, Any]]:
    """Records of what was timed; of a line that is being written there may be a part."""
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "sample"]


def test_throttling_that_begins_in_the_middle_is_told_and_kept(edgeprune: CommandLine, tmp_path: Path) -> None:
    """*Emulated*: a program in the firmware's place, which tells of throttling once something has been timed."""
    journal = edgeprune.folder / "new" / "table.parquet.journal.jsonl"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "vcgencmd").write_text(
        f"#!/bin/sh\nif grep -q sample '{journal}' 2>/dev/null; then echo throttled=0x4; else echo throttled=0x0; fi\n"
    )
    (folder / "vcgencmd").chmod(0o755)
    path = f"{folder}:{edgeprune.environment['PATH']}"
    said = edgeprune.succeed(*PROFILE, "--minutes", "0.03", environment={"PATH": path})
    sentence = "while it was measured, the firmware reports that the processor is throttled now (throttled=0x4)."
    assert said.count(sentence) == 1
    assert sentence in LatencyTable.load(edgeprune.folder / "new" / "table.parquet").header["disturbances"]
    assert f"- {sentence}" in edgeprune.succeed("table", "card", "new/table.parquet")


@pytest.mark.loopback
def test_a_link_that_is_lost_and_a_board_that_restarts_lose_and_double_no_sample(
    edgeprune: CommandLine, sshd: OpenSshServer, tmp_path: Path
) -> None:
    """A real link that is reset. The restart is *emulated*: what was recorded before it bears the name of another boot."""
    out = edgeprune.folder / "new"
    journal, kept = out / "table.parquet.journal.jsonl", tmp_path / "kept"
    with FaultyLink(sshd.host, sshd.port) as link:
        board = sshd.board_behind(link, edgeprune.board)
        command = (*PROFILE, "--minutes", "0.05", "--wait", "0", "--board", board)
        process = edgeprune.start(*command)
        try:
            out_said, err_said = _cut_after(process, link, journal, 10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        line = one_line(process.returncode, out_said, err_said, 3)
        assert f"{link.host}:{link.port}" in line
        assert " Try: " in line
        assert not (out / "table.parquet").exists()
        before = samples(journal)
        assert len(before) >= 10
        edgeprune.assert_tidy()
        boot = BOOT.read_text().strip()
        assert boot in journal.read_text()
        journal.write_text(journal.read_text().replace(boot, "0" * len(boot)))
        os.link(journal, kept)  # the command removes it when it is done

        said = edgeprune.succeed(*command)
    assert f"going on: {len(before)} measurements of the interrupted run are kept" in said
    assert said.count("the board was restarted while it was measured.") == 1
    after = samples(kept)
    assert after[: len(before)] == before
    places = Counter(
        (record["round"], record["attempt"], record["stretch"], record["id"])
        for record in after
        if record["stretch"] is not None
    )
    assert max(places.values()) == 1
    table = LatencyTable.load(out / "table.parquet")
    assert "the board was restarted while it was measured." in table.header["disturbances"]
    assert [path.name for path in out.iterdir()] == ["table.parquet"]


def _cut_after(process: subprocess.Popen[str], link: FaultyLink, journal: Path, count: int) -> tuple[str, str]:
    """What the command said, whose link is cut once so much was recorded."""
    deadline = time.monotonic() + 120
    while len(samples(journal)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    link.cut()
    return process.communicate(timeout=120)
