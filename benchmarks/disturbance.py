"""Does a table come out right where a run is disturbed? Real disturbances of real runs over a real OpenSSH server.

One network is profiled again and again, on one core of this machine: quiet, quiet once more (what two quiet runs differ by is
the least that can be asked), and with

- `busy`: a program pinned to the same core, busy 30 of every 100 ms during the middle third of the run,
- `stopped`: the program on the board stopped (SIGSTOP) for 20 s in the middle,
- `cut`: the link reset in the middle; the run waits for the board, and goes on.

What is looked at: what the run noticed (samples that were interrupted and taken anew, stretches measured again, rows that are
flagged in the table), whether a sample is there twice, and how far the kernels of the table are from those of the quiet run of
the same seed. A cell that is done is not run again; what is missing is printed. Use a machine that does nothing else. sshd
must be installed. Five cells per seed, three minutes each.

    python benchmarks/disturbance.py                              # all, into benchmarks/results/disturbance/
    python benchmarks/disturbance.py --only busy --seeds 1        # some
    python benchmarks/disturbance.py --minutes 0.6 --seeds 1 --results /tmp/try     # a trial
    python benchmarks/disturbance.py --table                      # only print what is there
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictor_networks import families
from quickstart import host

import edgeprune
from edgeprune.files import write_text
from edgeprune.latency.table import LatencyTable
from edgeprune.profiling.statistics import UNDISTURBED
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

RESULTS = Path(__file__).parent / "results" / "disturbance"
KINDS = ("quiet", "again", "busy", "stopped", "cut")
STOPPED_S = 20.0
GOAL = 0.05
"""How far the kernels of a disturbed run may be from a quiet one's, in the median."""
_BURNER = """
import time
while True:
    end = time.monotonic() + 0.030
    while time.monotonic() < end:
        pass
    time.sleep(0.070)
"""


@dataclass(frozen=True)
class Cell:
    """One run."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-seed{self.seed}"


@dataclass
class Bench:
    """Where a run takes place.

    Attributes:
        board: Through the link.
        link: What can be cut.
        root: The board's folder.
        core: The one that everything on the board runs on.
    """

    board: str
    link: FaultyLink
    root: Path
    core: int


@contextlib.contextmanager
def bench(folder: Path, core: int) -> Iterator[Bench]:
    """This machine as a board on one core, behind a link that can be cut."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # the server inherits it, and so does all that it starts
    server = OpenSshServer(folder)
    try:
        server.start()
    finally:
        os.sched_setaffinity(0, allowed)
    try:
        with FaultyLink(server.host, server.port) as link:
            address = server.board_behind(link, folder / "root")
            yield Bench(address, link, folder / "root", core)
    finally:
        server.stop()


def run(cell: Cell, minutes: float, core: int) -> dict[str, Any]:
    """One cell from nothing."""
    model, x = families.build("resnet")
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as name, bench(Path(name), core) as place:
        out = Path(name) / "table.parquet"
        disturbing = Disturbing(cell.kind, place)
        said: list[str] = []
        begun = time.monotonic()
        with disturbing:
            table = edgeprune.profile(
                *(model, x, place.board),
                minutes=minutes,
                seed=cell.seed,
                out=out,
                progress=disturbing.watch(out),
                told=said.append,
            )
        seconds = round(time.monotonic() - begun, 1)
        disturbing.check(seconds)
        return {
            "cell": cell.name,
            "kind": cell.kind,
            "seed": cell.seed,
            "minutes": minutes,
            "core": core,
            "host": host(),
            "seconds": seconds,
            "disturbed_s": disturbing.seconds,
            "links_lost": sum("came back" in sentence for sentence in said),
            **noticed(table, disturbing.records()),
            "networks_ms": {hashed(row["kernels"]): row["median_ms"] for row in table.rows if row["kind"] == "network"},
            "kernels_ms": {hashed(row["key"]): row["median_ms"] for row in table.rows if row["kind"] == "kernel"},
        }


class Disturbing:
    """Disturbs one run in its middle, by the time that has passed since it began to measure and the time that it says is left."""

    def __init__(self, kind: str, place: Bench) -> None:
        self.kind, self.place = kind, place
        self.seconds = 0.0
        self._journals: dict[str, Path] = {}
        self._begun: float | None = None
        self._burner: subprocess.Popen[bytes] | None = None
        self._burning_s = 0.0
        self._stopping: threading.Thread | None = None
        self._done = False

    def __enter__(self) -> Disturbing:
        return self

    def __exit__(self, *_: object) -> None:
        self._cool()
        if self._stopping is not None:
            self._stopping.join()

    def watch(self, out: Path) -> Callable[[int, int, float, str], None]:
        """A `progress` that disturbs the run, and keeps every journal, which `profile` removes when it is done."""

        def progress(done: int, total: int, left_s: float, message: str) -> None:
            for path in out.parent.glob(f"{out.name}.journal*"):
                kept = out.parent / f"kept-{path.name}"
                if path.name not in self._journals:
                    os.link(path, kept)
                    self._journals[path.name] = kept
            if message.startswith("round"):
                now = time.monotonic()
                self._begun = self._begun or now
                spent = now - self._begun
                self._at(spent / (spent + left_s) if left_s or spent else 0.0)

        return progress

    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """Journal and record of everything that was measured."""
        return [
            (name, json.loads(line)) for name, path in self._journals.items() for line in path.read_text().splitlines()
        ]

    def check(self, seconds: float) -> None:
        """That the disturbance took place.

        Raises:
            RuntimeError: It did not, so the run says nothing.
        """
        least = {"quiet": 0.0, "again": 0.0, "busy": seconds / 10}.get(self.kind, 1e-9)
        if self.seconds < least:
            raise RuntimeError(f"{self.kind}: disturbed for {self.seconds} of {seconds:.0f} s: give it more minutes")

    def _at(self, share: float) -> None:
        """What is due when a share of the run is over."""
        if self.kind == "busy":
            if self._burner is None and share >= 1 / 3:
                # A session of its own: schedulers that group by session would give it next to nothing, or half.
                pin = f"import os; os.sched_setaffinity(0, {{{self.place.core}}})\n"
                self._burner = subprocess.Popen([sys.executable, "-c", pin + _BURNER], start_new_session=True)
                self._burning_s = time.monotonic()
            elif share >= 2 / 3:
                self._cool()
        elif self.kind in ("stopped", "cut") and share >= 1 / 2 and not self._done:
            self._done = True
            if self.kind == "cut":
                self.seconds = 0.001
                self.place.link.cut()
            else:
                self._stopping = threading.Thread(target=self._stop, args=(self._runner(),))
                self._stopping.start()

    def _cool(self) -> None:
        if self._burner is not None and not self.seconds:
            self._burner.kill()
            self._burner.wait()
            self.seconds = round(time.monotonic() - self._burning_s, 1)

    def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(STOPPED_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.seconds = STOPPED_S

    def _runner(self) -> int:
        """Process of the program that times, once there is one."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                    # The last two: a shell that starts it has the same text in one word.
                    if words[-2:-1] == [b"bench"] and words[1].startswith(bytes(self.place.root)):
                        return int(entry.name)
            time.sleep(0.01)
        raise RuntimeError("the program on the board must be timing, none was seen for 30 s")


def noticed(table: LatencyTable, records: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What a run says of its own disturbance."""
    samples = [(journal, record) for journal, record in records if record.get("kind") == "sample"]
    shares = [share for _, record in samples for share in record["cpu_share"]]
    places = Counter(
        (
            journal,
            record["round"],
            record["attempt"],
            record["stretch"],
            record["id"],
        )  # networks come in several stretches
        for journal, record in samples
        if record["stretch"] is not None
    )
    drift = table.header["drift"]
    return {
        "samples": len(shares),
        "interrupted_samples": sum(share < UNDISTURBED for share in shares),
        "items": len(samples),
        "items_with_interrupted_samples": sum(min(record["cpu_share"]) < UNDISTURBED for _, record in samples),
        "samples_doubled": sum(count > 1 for count in places.values()),
        "repeated_stretches": drift["repeated_stretches"],
        "largest_drift": drift["largest"],
        "flagged_rows": {flag: len(names) for flag, names in table.header["flags"].items()},
    }


def hashed(key: str) -> str:
    """A short name of a kernel or network."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def apart(row: dict[str, Any], quiet: dict[str, Any], what: str) -> list[float]:
    """Relative distances of the times that both runs have."""
    first, second = quiet[what], row[what]
    return [abs(second[key] / first[key] - 1.0) for key in sorted(set(first) & set(second))]


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per cell beside the quiet run of its seed."""
    lines = [
        "| run | disturbed | samples interrupted | stretches repeated | rows flagged | measured twice | kernels in common "
        "| from the quiet run: median | 90th percentile | networks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    quiet = {row["seed"]: row for row in rows if row["kind"] == "quiet"}
    missed, judged = [], 0
    for row in sorted(rows, key=lambda row: (row["seed"], KINDS.index(row["kind"]))):
        flagged = ", ".join(f"{flag} {count}" for flag, count in row["flagged_rows"].items()) or "none"
        begin = (
            f"| {row['cell']} | {_disturbed(row)} | {row['interrupted_samples']} of {row['samples']} "
            f"| {row['repeated_stretches']} | {flagged} | {row['samples_doubled']} "
        )
        if row["kind"] == "quiet" or row["seed"] not in quiet:
            lines.append(f"{begin}| {len(row['kernels_ms'])} | | | |")
            continue
        kernels, networks = (apart(row, quiet[row["seed"]], what) for what in ("kernels_ms", "networks_ms"))
        judged += 1
        # A busy core must be noticed; where the others lie between two samples, nothing was disturbed.
        unseen = row["kind"] == "busy" and row["interrupted_samples"] <= quiet[row["seed"]]["interrupted_samples"]
        if statistics.median(kernels) > GOAL or row["samples_doubled"] or unseen:
            missed.append(row["cell"])
        lines.append(
            f"{begin}| {len(kernels)} | {statistics.median(kernels):.2%} | {sorted(kernels)[int(0.9 * len(kernels))]:.2%} "
            f"| {statistics.median(networks):.2%} |"
        )
    verdict = f"MISSED by {', '.join(missed)}" if missed else f"met by {judged} runs" if judged else "no run to judge"
    goal = f"at most {GOAL:.0%} from the quiet run in the median, no sample twice, and a busy core is noticed"
    return "\n".join([*lines, "", f"{goal}: {verdict}"])


def _disturbed(row: dict[str, Any]) -> str:
    if row["kind"] == "cut":
        return f"link lost {row['links_lost']}x"
    return f"{row['disturbed_s']:.0f} of {row['seconds']:.0f} s" if row["disturbed_s"] else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, help="one kind of run instead of all")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--minutes", type=float, default=3.0, help="of profiling per run")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="that the board has")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else KINDS
    cells = [Cell(kind, seed) for seed in range(arguments.seeds) for kind in kinds]
    arguments.results.mkdir(parents=True, exist_ok=True)
    for cell in [] if arguments.table else cells:
        path = arguments.results / f"{cell.name}.json"
        if not path.exists():
            print(f"running {cell.name}", flush=True)
            write_text(path, json.dumps(run(cell, arguments.minutes, arguments.core), indent=1) + "\n")
    rows = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*-seed*.json"))]
    if rows:
        print(markdown(rows))
    missing = [cell.name for cell in cells if not (arguments.results / f"{cell.name}.json").exists()]
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
