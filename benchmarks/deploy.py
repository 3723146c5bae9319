"""Deployments over a real OpenSSH server on the loopback address: how fast, how little, how often, and what a kill leaves.

Sections, each kept in benchmarks/results/deploy.json as soon as it is measured; those that are there are not measured again
(`--again` forgets them), and those that are missing are printed:

upload     a file of `--megabytes` through `Board.push` and through OpenSSH's own `sftp`, interleaved: ratio of the rates
redeploy   bytes that go to the board when a release that it runs is deployed once more, gates and all
cycles     deploy and roll back `--cycles` times with both gates on: every time `current` must be a whole, expected release
fleet      eight boards (folders of their own) at once, twice: none may be inconsistent
kills      `kill -9` of this side and of the board's after every state, `--repeats` times: `current` whole, and a re-run converges

    python benchmarks/deploy.py [upload redeploy cycles fleet kills] [--cycles 1000] [--megabytes 200] [--repeats 3]

The machine should do nothing else while `upload` is measured.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from edgeprune.boards.board import Board
from edgeprune.boards.config import BoardConfig, BoardEntry
from edgeprune.boards.known_hosts import fingerprint
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.compiling import compile as compile_artifact
from edgeprune.deployment.deploying import STATES, deploy
from edgeprune.deployment.fleet import deploy_to
from edgeprune.deployment.status import rollback, status
from edgeprune.errors import BoardBusyError
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

RESULTS = Path(__file__).parent / "results" / "deploy.json"
BOARD_STATES = ("copied", "staged", "intent", "linked", "switched", "previous", "recorded")
ONE = "import sys; from edgeprune.deployment.deploying import deploy; deploy(sys.argv[1], sys.argv[2], rounds=1)"


@dataclass
class Bench:
    """What all sections use: the server, two tiny artifacts, a folder for boards, and how much is asked for."""

    server: OpenSshServer
    artifacts: list[Artifact]
    folder: Path
    options: argparse.Namespace

    def url(self, name: str) -> str:
        """A board with a folder of its own."""
        return f"ssh://board?python={quote(sys.executable)}&root={quote(str(self.folder / name))}"

    def whole(self, name: str) -> str:
        """Id of the release that a board runs; raises where it is not whole."""
        return Artifact.load(self.folder / name / "current").id


def upload(bench: Bench) -> dict[str, Any]:
    """Rate of our upload over sftp's, in turns."""
    size = bench.options.megabytes * 1_000_000
    source = bench.folder / "blob"
    ratios, ours_mb_s, theirs_mb_s = [], [], []
    for turn in range(bench.options.repeats):
        with source.open("wb") as stream:  # new content each time, so that nothing is there already
            for _ in range(bench.options.megabytes):
                stream.write(os.urandom(1_000_000))
        with Board.open(bench.url("upload")) as board:
            board.call("status", {})
            started = time.perf_counter()
            board.push(source)
            ours = time.perf_counter() - started
        command = ["sftp", "-q", "-b", "-", "-F", str(bench.server.config), "board"]
        line = f'put "{source}" "{bench.folder / "by sftp"}"\n'
        started = time.perf_counter()
        subprocess.run(command, input=line, text=True, check=True, stdout=subprocess.DEVNULL)
        theirs = time.perf_counter() - started
        ours_mb_s.append(size / 1e6 / ours)
        theirs_mb_s.append(size / 1e6 / theirs)
        ratios.append(theirs / ours)
        print(f"  {turn + 1}: {ours_mb_s[-1]:.0f} MB/s, sftp {theirs_mb_s[-1]:.0f} MB/s, ratio {ratios[-1]:.2f}")
    return {
        "megabytes": bench.options.megabytes,
        "ratio": statistics.median(ratios),
        "mb_s": ours_mb_s,
        "sftp_mb_s": theirs_mb_s,
        "target": 0.6,
    }


def redeploy(bench: Bench) -> dict[str, Any]:
    """Bytes on the wire towards the board, counted by a proxy."""
    with FaultyLink(bench.server.host, bench.server.port) as link:
        key = fingerprint(base64.b64decode(bench.server.public_keys()[0].split()[1]))
        options = {
            "python": sys.executable,
            "root": str(bench.folder / "redeploy"),
            "identity": str(bench.server.identity),
            "host_key": key,
        }
        url = f"ssh://{bench.server.user}@{link.host}:{link.port}?{urlencode(options)}"
        deploy(bench.artifacts[0], url, rounds=1)
        first = link.sent_bytes
        deploy(bench.artifacts[0], url, rounds=1)
        again = link.sent_bytes - first
    print(f"  first {first / 1e3:.0f} kB, again {again / 1e3:.1f} kB")
    return {"first_bytes": first, "again_bytes": again, "target_bytes": 100_000}


def cycles(bench: Bench) -> dict[str, Any]:
    """Deploy and roll back, gates on."""
    url, name = bench.url("cycles"), "cycles"
    deploy(bench.artifacts[0], url, rounds=1, budget_ms=1000)
    inconsistent, started = 0, time.monotonic()
    for done in range(1, bench.options.cycles + 1):
        deploy(bench.artifacts[1], url, rounds=1, budget_ms=1000)
        inconsistent += bench.whole(name) != bench.artifacts[1].id
        rollback(url)
        inconsistent += bench.whole(name) != bench.artifacts[0].id
        if done % 10 == 0 or done == bench.options.cycles:
            left = (time.monotonic() - started) / done * (bench.options.cycles - done)
            print(f"  {done} of {bench.options.cycles}, about {left / 60:.0f} min left", flush=True)
    seconds = (time.monotonic() - started) / bench.options.cycles
    return {"cycles": bench.options.cycles, "inconsistent": inconsistent, "seconds_per_cycle": seconds}


def fleet(bench: Bench) -> dict[str, Any]:
    """Eight boards at once, from one release to the next."""
    names = [f"board-{number}" for number in range(8)]
    config = BoardConfig()
    for name in names:
        config.add(name, BoardEntry(ssh="board", python=sys.executable, root=str(bench.folder / name)), replace=True)
    states = []
    for artifact in bench.artifacts:
        report = deploy_to(artifact, names, canary=1, at_once=8, rounds=1)
        states += [outcome.state for outcome in report.outcomes]
        for outcome in report.outcomes:
            if outcome.message:
                print(f"  {outcome.board}: {outcome.state} ({outcome.message})")
        if any(bench.whole(name) != artifact.id for name in names):
            states.append("inconsistent")
    return {"boards": 8, "states": {state: states.count(state) for state in sorted(set(states))}}


def kills(bench: Bench) -> dict[str, Any]:
    """Kill after every state, of either side."""
    faults = [f"after:{state}" for state in STATES] + [f"after:board:{state}" for state in BOARD_STATES]
    bad: list[str] = []
    for turn in range(bench.options.repeats):
        for fault in faults:
            name = f"kill {turn} {fault}".replace(":", " ")
            deploy(bench.artifacts[0], bench.url(name), rounds=1)
            command = [sys.executable, "-c", ONE, str(bench.artifacts[1].folder), bench.url(name)]
            subprocess.run(command, env={**os.environ, "EDGEPRUNE_FAULT": fault}, capture_output=True, check=False)
            if bench.whole(name) not in {artifact.id for artifact in bench.artifacts}:
                bad.append(f"{fault}: something else runs")
            _deploy_soon(bench.artifacts[1], bench.url(name))
            seen = status(bench.url(name))
            if bench.whole(name) != bench.artifacts[1].id or not seen.confirmed or seen.previous is None:
                bad.append(f"{fault}: the second run did not converge")
            shutil.rmtree(bench.folder / name)
        print(f"  {turn + 1} of {bench.options.repeats} times {len(faults)} states, {len(bad)} bad", flush=True)
    return {"states": len(faults), "repeats": bench.options.repeats, "bad": bad}


def _deploy_soon(artifact: Artifact, url: str) -> None:
    """Deploy once the lock of the host that was killed has gone with its link."""
    deadline = time.monotonic() + 30
    while True:
        try:
            deploy(artifact, url, rounds=1)
            return
        except BoardBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "upload": upload,
    "redeploy": redeploy,
    "cycles": cycles,
    "fleet": fleet,
    "kills": kills,
}


@contextlib.contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Bench]:
    """A server, two artifacts of tiny networks, and a place for boards; all gone afterwards."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edgeprune deploy ") as scratch:
        folder = Path(scratch)
        for name in ("sshd", "boards"):
            (folder / name).mkdir()
        artifacts = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            net = torch.nn.Linear(20, 10)
            artifacts.append(compile_artifact(net, torch.randn(1, 20), folder / f"net{seed}", name=f"net{seed}"))
        with OpenSshServer(folder / "sshd") as server:
            os.environ["EDGEPRUNE_SSH_CONFIG"] = str(server.config)
            os.environ["EDGEPRUNE_CONFIG"] = str(folder / "boards.toml")
            os.environ["EDGEPRUNE_STATE"] = str(folder / "state")
            yield Bench(server, artifacts, folder / "boards", options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure sections that are there already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if wrong := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"a section must be one of {', '.join(SECTIONS)}, found {wrong[0]}")
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    wanted = [name for name in options.sections or SECTIONS if options.again or name not in found]
    if wanted:
        with prepared(options) as bench:
            for name in wanted:
                print(f"{name}:", flush=True)
                machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
                found[name] = {**SECTIONS[name](bench), "machine": machine, "load": os.getloadavg()[0]}
                options.out.parent.mkdir(exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in SECTIONS:
        print(f"{name}: {json.dumps(found[name]) if name in found else 'not measured yet'}")


if __name__ == "__main__":
    main()
