"""How many models can the channel graph cut, and how fast? Side by side with Torch-Pruning, on random weights, one thread.

Every model is cut by half in every group, its outputs kept, with no word about the model itself. A model is covered if it
traces and the cut model runs, equals the masked one (`edgeprune.check` in float32, below 1e-4 in eval and in train form; where
train form is above it, since statistics of few values make rounding large, it must be below 1e-9 in float64), exports to ONNX
and gives the same there (below 1e-3), and trains; if at least 90 % of its weights' elements can go, at least 50 % of its
parameters do go, and each group is within one unit of the asked width. The peer only has to run after its cut.

Each side of each model is a process of its own with limits on time and memory, so that a hang is a row and not the end; the
sides take turns, twice each. What is done is not run again, so the script can be stopped at any time; what is missing is
printed. Use a machine that does nothing else meanwhile. Coverage alone, which no neighbor disturbs, can be had sooner:
``--jobs 2`` runs our side of two models at a time and times nothing; the turns that time come with the next call without it.

    python benchmarks/graph.py --zoo ZOO                             # everything, into benchmarks/results/graph/
    python benchmarks/graph.py --zoo ZOO --suite torchvision         # one suite
    python benchmarks/graph.py --zoo ZOO --jobs 2                    # coverage alone, two models at a time
    python benchmarks/graph.py --zoo ZOO --only resnet               # names that contain this; a:b is one model
    python benchmarks/graph.py --zoo ZOO --failed                    # again what is there and not covered
    python benchmarks/graph.py --zoo ZOO --stale                     # again what another state of the package gave
    python benchmarks/graph.py --zoo ZOO --table                     # only print what is there, as Markdown

edgeprune must be installed (or PYTHONPATH=.), with ONNX Runtime. The models and the peer are not among its dependencies.
They go into a folder of their own, without what they depend on (their torch would be another one):

    pip install --target ZOO --no-deps torchvision==0.28.0 timm==1.0.31 transformers torch-pruning==1.6.1
    pip install --target ZOO --no-deps huggingface-hub tokenizers safetensors regex pyyaml tqdm pillow httpx httpcore \\
        h11 anyio idna certifi requests urllib3 charset-normalizer

The folder is searched last. torchvision has no CPU build; the two operations that its import asks for are declared here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from graph_coverage import recording, table, zoo

RESULTS = Path(__file__).parent / "results" / "graph"
SIDES = ("ours", "peer")
_PEER_EXTRA_S = 120
"""What the peer's process may take besides: imports, building the model, and running the cut one."""


def path_of(name: str) -> Path:
    """Where a model's row lies."""
    library, _, architecture = name.partition(":")
    return RESULTS / library / f"{architecture}.json"


def cover(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row with all facts of our side but the times."""
    facts = run_side("ours", name, arguments, times_only=False)
    return {"model": name, "package": package_digest(), "host": host(), "facts": facts, "ours": [], "peer": []}


def measure(name: str, arguments: argparse.Namespace, row: dict[str, Any] | None) -> dict[str, Any]:
    """Both sides in turns, until a row has all of them; a side that did not get to a cut model has no second turn."""
    if row is None or row["package"] != package_digest():
        row = {"model": name, "package": package_digest(), "host": host(), "facts": None, "ours": [], "peer": []}
    for turn in range(arguments.rounds):
        for side in SIDES:
            if len(row[side]) == turn and (turn == 0 or "apply" in row[side][0] or "step" in row[side][0]):
                times_only = turn > 0 or (side == "ours" and row["facts"] is not None)
                row[side].append(run_side(side, name, arguments, times_only))
                if side == "ours" and row["facts"] is None:
                    row["facts"] = row[side][0]
    return row


def is_timed(row: dict[str, Any]) -> bool:
    """Whether both sides had their turns."""
    return bool(row["ours"]) and bool(row["peer"])


def run_side(side: str, name: str, arguments: argparse.Namespace, times_only: bool) -> dict[str, Any]:
    """Facts of one process, whatever becomes of it."""
    limit_s = arguments.limit if side == "ours" else arguments.peer_limit + _PEER_EXTRA_S
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        report = Path(folder) / "facts.jsonl"
        command = [sys.executable, __file__, "--side", side, "--only", name, "--report", str(report)]
        command += ["--peer-limit", str(arguments.peer_limit), "--memory", str(arguments.memory)]
        command += ["--zoo", arguments.zoo] if arguments.zoo else []
        command += ["--times-only"] if times_only else []
        with (Path(folder) / "words").open("w+") as words:
            try:
                code = subprocess.run(
                    command, stdout=words, stderr=words, timeout=limit_s, env=one_thread(), check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
                reason = f"more than {limit_s:.0f} s"
            else:
                reason = ending(code, arguments.peer_limit)
            facts = recording.read(report)
            if code and not any(key.endswith("_error") for key in facts):
                words.seek(0)
                last = (words.read().strip().splitlines() or [""])[-1] if code > 0 else ""
                last = recording.without_folders(last)[:200]
                facts["ended"] = f"{facts.get('at') or 'start'}: {reason}" + (f": {last}" if last else "")
    return facts


def ending(code: int, peer_limit_s: float) -> str:
    """What an exit status means."""
    if code == -signal.SIGALRM:
        return f"more than {peer_limit_s:.0f} s"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def one_thread() -> dict[str, str]:
    """The environment of a measuring process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_here(arguments: argparse.Namespace) -> None:
    """The measuring process itself."""
    size = int(arguments.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    zoo.prepare(arguments.zoo)
    if arguments.side == "ours":
        from graph_coverage import ours as side
    else:
        from graph_coverage import peer as side
    side.measure(arguments.only, recording.Record(Path(arguments.report)), arguments.peer_limit, arguments.times_only)


def package_digest() -> str:
    """Which state of edgeprune's graph and surgery a row was measured with."""
    import edgeprune

    root = Path(edgeprune.__file__).parent
    digest = hashlib.sha256()
    for part in ("graph", "surgery"):
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.read_bytes())
    for name in ("copying.py", "nesting.py", "parts.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()[:10]


def host() -> dict[str, Any]:
    """What it ran on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    found: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for package in ("torch", "onnxruntime", "torchvision", "timm", "transformers", "torch-pruning"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def stored(names: Sequence[str]) -> dict[str, Any]:
    """The rows that are there."""
    return {name: json.loads(path_of(name).read_text()) for name in names if path_of(name).exists()}


def wanted(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The models per suite."""
    suites = [arguments.suite] if arguments.suite else zoo.SUITES
    found = {suite: zoo.names(suite, RESULTS) for suite in suites}
    return {suite: [name for name in names if matches(name, arguments.only)] for suite, names in found.items()}


def matches(name: str, only: str | None) -> bool:
    """Whether a model is meant: by its whole name, a pattern with ``*``, or a part of the name."""
    if not only or name in (only, f"{name.partition(':')[0]}:{only}"):
        return True
    return fnmatch(name, only) if "*" in only or ":" in only else only in name


def print_tables(suites: dict[str, list[str]]) -> None:
    """Print per suite what is there and what is missing."""
    for suite, names in suites.items():
        rows = stored(names)
        if not names:
            continue
        print(f"\n### {suite}\n")
        if rows:
            print(table.markdown(names, rows))
        missing = [name for name in names if name not in rows]
        print(f"\nmissing: {', '.join(missing) or 'nothing'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", help="folder with torchvision, timm, transformers and torch-pruning; searched last")
    parser.add_argument("--suite", choices=zoo.SUITES, help="one suite instead of all")
    parser.add_argument("--only", help="a whole name (timm:levit_128), a pattern with *, or a part of names")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--failed", action="store_true", help="run again what is there and is not covered")
    parser.add_argument("--stale", action="store_true", help="again what another state of the package gave")
    parser.add_argument("--jobs", type=int, default=1, help="more than 1: coverage alone, so many models at a time")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side; the smallest times count")
    parser.add_argument("--limit", type=float, default=180, help="seconds for our process of a model")
    parser.add_argument("--peer-limit", type=float, default=75, help="seconds for the peer's constructor and step")
    parser.add_argument("--memory", type=float, default=12, help="address space of a process, GiB")
    parser.add_argument("--count", type=int, help="stop after this many models")
    for hidden in ("--side", "--report"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--times-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.side:
        run_here(arguments)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    zoo.prepare(arguments.zoo)
    suites = wanted(arguments)
    names = list(dict.fromkeys(name for names in suites.values() for name in names))
    rows = stored(names)
    again = {name for name in rows if arguments.failed and table.failures(rows[name])}
    again |= {name for name in rows if arguments.stale and rows[name]["package"] != package_digest()}
    done = {name for name in rows if arguments.jobs > 1 or is_timed(rows[name])} - again
    todo = [] if arguments.table else [name for name in names if name not in done][: arguments.count]

    stopping = threading.Event()

    def run(name: str) -> None:
        known = None if name in again else rows.get(name)
        row = cover(name, arguments) if arguments.jobs > 1 else measure(name, arguments, known)
        if stopping.is_set():
            return  # its processes were ended, too: what they say is no result
        path = path_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, indent=1) + "\n")
        partial.replace(path)
        verdict = "; ".join(table.failures(row)) or "covered"
        print(f"{name}: {verdict}", f"| peer: {table.peer_result(row)}" if row["peer"] else "", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for finished in [pool.submit(run, name) for name in todo]:
                finished.result()
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(cancel_futures=True)  # waits for processes that did not get the signal, which the limit ends
            raise
    print_tables(suites)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
