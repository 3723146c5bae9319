"""How long a user waits before anything happens: `import edgeprune` and `edgeprune --help`, beside a bare interpreter.

Fresh processes, interleaved; the median of each is printed and written to benchmarks/results/startup.json.

    python benchmarks/startup.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HELP = "import sys; from edgeprune.cli.main import run; sys.argv = ['edgeprune', '--help']; sys.exit(run())"
COMMANDS = {"python": "pass", "import edgeprune": "import edgeprune", "edgeprune --help": HELP}
LIMITS_S = {"import edgeprune": 0.3, "edgeprune --help": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(parser.parse_args().repeats):
        for name, code in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        limit = f", limit {LIMITS_S[name]} s" if name in LIMITS_S else ""
        print(f"{name}: {median:.3f} s (slowest {max(times[name]):.3f}){limit}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "startup.json").write_text(json.dumps({"median_s": medians, "python": sys.version}, indent=1) + "\n")


if __name__ == "__main__":
    main()
