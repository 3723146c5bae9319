"""How good is the predictor on other people's measurements of real devices?

Four public sets (see --data): convolutions of TensorRT on a V100 (TinyNAS), transformers on a Raspberry Pi (HAT), cells of
NAS-Bench-201 on six devices with 20 cells each (HELP), and convolutions on accelerators with 10 to 40 each (DeepBench).
A fifth of every set, by the SHA-1 of the configuration's text, is held out: nothing but the figures of this program reads
it, and whatever was chosen (features, regressions, their settings) was chosen by cross-validation on the rest.

Each cell (task, seed) is a file in benchmarks/results/predictor_public/; what is there is not computed again, and what is
missing is printed. One thread; the whole takes hours, most of them on the largest V100 tables.

    python benchmarks/predictor_public.py --data DIR                      # everything
    python benchmarks/predictor_public.py --data DIR --only hat           # one set
    python benchmarks/predictor_public.py --table                         # only print what is there

DIR holds `tinynas_v100_trt/flat_fp16.csv`, `hat/*.csv`, `help_latency/nasbench201_latency_ms.csv` and
`deepbench/*.csv`; the files of benchmarks/predictor_data say where each comes from and how its columns are called.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from predictor_data import deepbench, hat, nasbench201, tinynas
from predictor_data.figures import covered, figures, intervals, markdown, transfer_verdict

import edgeprune
from edgeprune.latency.architectures import ArchitecturePredictor, fit_architectures
from edgeprune.latency.features import Machine, features

RESULTS = Path(__file__).parent / "results" / "predictor_public"
SEEDS = 5

Methods = dict[str, dict[str, Any]]


class Task(NamedTuple):
    """One line of the table.

    Attributes:
        set: Name of the data set, as `--only` takes it.
        name: What stands in the table and, made harmless, in the file's name.
        run: Seed to number of training configurations, number of test configurations, and figures by method.
        goal: Share within 10 % that is aimed at, percent.
        device: New device, where something is transferred.
        seeds: How many.
    """

    set: str
    name: str
    run: Callable[[Path, int], tuple[int, int, Methods]]
    goal: float | None = None
    device: str = ""
    seeds: int = SEEDS

    def path(self, seed: int) -> Path:
        """File of one cell."""
        word = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())
        return RESULTS / f"{word}-seed{seed}.json"


@cache
def v100(folder: Path) -> tuple[list[tinynas.Row], list[tinynas.Row]]:
    return tinynas.load(folder)


def convolutions(size: int | None, channels: bool) -> Callable[[Path, int], tuple[int, int, Methods]]:
    """V100: so many training kernels (None: all), or all but those of some output channels, which are then the test."""

    def run(folder: Path, seed: int) -> tuple[int, int, Methods]:
        train, test = v100(folder)
        if channels:
            train = [row for row in train if row["cout"] not in tinynas.HELD_OUT_CHANNELS]
            test = [row for row in test if row["cout"] in tinynas.HELD_OUT_CHANNELS]
        if size is not None:
            train = [train[place] for place in np.random.default_rng(seed).permutation(len(train))[:size]]
        measured = tinynas.table(test)
        truth = np.array([timed.median_ms for timed in measured.measurements.values()])
        known = tinynas.table(train)
        return len(train), len(test), kernels_by(known, measured, truth, seed)

    return run


def kernels_by(known: edgeprune.LatencyTable, asked: edgeprune.LatencyTable, truth: np.ndarray, seed: int) -> Methods:
    """Ours and its rivals on kernels."""
    from sklearn.ensemble import RandomForestRegressor

    begun = time.process_time()
    predictor = edgeprune.fit(known, seed=seed)
    fitted_s = time.process_time() - begun
    frame = predictor.predict(asked.kernels)
    (row,) = [row for row in predictor.report().rows() if row["family"] == "conv"]
    ours = {
        **figures(frame["ms"].to_numpy(), truth),
        **covered(frame, truth),
        "fit_s": fitted_s,
        "chosen": row["model"],
    }
    times = np.array([timed.median_ms for timed in known.measurements.values()])
    raw = {name: raw_configuration(table) for name, table in (("known", known), ("asked", asked))}
    forest = RandomForestRegressor(100, random_state=seed, n_jobs=1).fit(raw["known"], np.log(times))
    macs = {
        name: features(table.kernels, Machine()).column("log_macs")
        for name, table in (("known", known), ("asked", asked))
    }
    slope, offset = np.polyfit(macs["known"], np.log(times), 1)
    return {
        "edgeprune": ours,
        "random forest on raw configuration": figures(np.exp(forest.predict(raw["asked"])), truth),
        "log-FLOPs": figures(np.exp(offset + slope * macs["asked"]), truth),
    }


def raw_configuration(table: edgeprune.LatencyTable) -> np.ndarray:
    """What a row of the file says, and nothing that follows from it."""
    rows = []
    for kernel in table.kernels:
        given = dict(kernel.attributes)
        image, window, step = kernel.inputs[0], given["kernel"], given["stride"]
        rows.append((image[1], image[2], kernel.output[1], window[0], step[0], given["residual"], given["groups"] > 1))
    return np.array(rows, dtype=np.float64)


def transformers(name: str) -> Callable[[Path, int], tuple[int, int, Methods]]:
    """HAT: whole networks from their description."""

    def run(folder: Path, seed: int) -> tuple[int, int, Methods]:
        from sklearn.ensemble import RandomForestRegressor

        data = hat.load(folder, name)
        train = np.random.default_rng(seed).permutation(np.flatnonzero(~data.test))[:1600]
        test = np.flatnonzero(data.test)
        described = [data.descriptions[place] for place in train]
        asked, truth = [data.descriptions[place] for place in test], data.ms[test]
        predictor = fit_architectures(described, data.ms[train].tolist(), seed=seed)
        frame = predictor.predict(asked)
        raw = {
            key: np.array([list(row.values()) for row in rows])
            for key, rows in (("known", described), ("asked", asked))
        }
        forest = RandomForestRegressor(100, random_state=seed, n_jobs=1).fit(raw["known"], np.log(data.ms[train]))
        methods: Methods = {
            "edgeprune": {
                **figures(frame["ms"].to_numpy(), truth),
                **covered(frame, truth),
                "chosen": predictor.chosen,
            },
            "random forest on raw configuration": figures(np.exp(forest.predict(raw["asked"])), truth),
        }
        return len(train), len(test), methods

    return run


@cache
def sources(folder: Path) -> tuple[ArchitecturePredictor, ...]:
    """Predictors of the devices that are known already, each from 2 000 cells of the training part."""
    cells = nasbench201.load(folder)
    found = []
    for device in nasbench201.SOURCES:
        usable = np.flatnonzero(~cells.test & np.isfinite(cells.ms[device]))
        chosen = np.random.default_rng(0).permutation(usable)[:2000]
        described = [cells.descriptions[place] for place in chosen]
        found.append(fit_architectures(described, cells.ms[device][chosen].tolist()))
        print(f"NAS-Bench-201: {device} is known ({found[-1].chosen})", flush=True)
    return tuple(found)


def cells_of(device: str) -> Callable[[Path, int], tuple[int, int, Methods]]:
    """NAS-Bench-201: 20 cells of a new device."""

    def run(folder: Path, seed: int) -> tuple[int, int, Methods]:
        from sklearn.linear_model import RidgeCV

        cells = nasbench201.load(folder)
        usable = np.isfinite(cells.ms[device])
        train = np.random.default_rng(seed).permutation(np.flatnonzero(~cells.test & usable))[:20]
        test = np.flatnonzero(cells.test & usable)
        described = [cells.descriptions[place] for place in train]
        asked = [cells.descriptions[place] for place in test]
        times, truth = cells.ms[device][train], cells.ms[device][test]
        moved = fit_architectures(described, times.tolist(), transfer_from=sources(folder), seed=seed)
        frame = moved.predict(asked)
        flags = {key: one_hot(rows) for key, rows in (("known", described), ("asked", asked))}
        ridge = RidgeCV(np.logspace(-2, 2, 9)).fit(flags["known"], np.log(times))
        methods: Methods = {
            "edgeprune": {**figures(frame["ms"].to_numpy(), truth), **covered(frame, truth), "chosen": moved.chosen},
            "ridge on one-hot": figures(np.exp(ridge.predict(flags["asked"])), truth),
        }
        return len(train), len(test), methods

    return run


def one_hot(rows: list[dict[str, str]]) -> np.ndarray:
    """Edge times operation."""
    names = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    return np.array([[row[edge] == name for edge in sorted(row) for name in names] for row in rows], dtype=np.float64)


def accelerator(device: str, count: int) -> Callable[[Path, int], tuple[int, int, Methods]]:
    """DeepBench: some convolutions of a new accelerator on top of a Titan Xp's table."""

    def run(folder: Path, seed: int) -> tuple[int, int, Methods]:
        source = edgeprune.fit(deepbench.table(folder, "Titan Xp", held_out=False))
        known, asked = deepbench.table(folder, device, held_out=False), deepbench.table(folder, device, held_out=True)
        keys = [kernel.key for kernel in known.kernels]
        few = known.filter(key=[keys[place] for place in np.random.default_rng(seed).permutation(len(keys))[:count]])
        truth = np.array([timed.median_ms for timed in asked.measurements.values()])
        moved, alone = edgeprune.fit(few, transfer_from=source, seed=seed), edgeprune.fit(few, seed=seed)
        frame = moved.predict(asked.kernels)
        methods: Methods = {
            "edgeprune": {
                **figures(frame["ms"].to_numpy(), truth),
                **covered(frame, truth),
                "chosen": moved.report().rows()[0]["model"],
            },
            "edgeprune without transfer": figures(alone.kernel_ms(asked.kernels), truth),
        }
        return len(few.kernels), len(truth), methods

    return run


TASKS = (
    Task("tinynas", "V100 TensorRT fp16, 1 000 kernels", convolutions(1000, channels=False)),
    Task("tinynas", "V100 TensorRT fp16, 5 000 kernels", convolutions(5000, channels=False), 70.0),
    Task("tinynas", "V100 TensorRT fp16, all that remain", convolutions(None, channels=False), 80.0),
    Task("tinynas", "V100 TensorRT fp16, unseen output channels", convolutions(None, channels=True), 68.0),
    *(Task("hat", f"HAT {name}", transformers(name), 92.0) for name in hat.FILES),
    *(
        Task("nasbench201", f"NAS-Bench-201 {device}, 20 cells", cells_of(device), device=device, seeds=10)
        for device in nasbench201.TARGETS
    ),
    *(
        Task("deepbench", f"DeepBench {device}, {count} convolutions", accelerator(device, count), device=device)
        for device in ("V100", "T4", "P100", "MI25")
        for count in (10, 20, 40)
    ),
)


def cells(tasks: list[Task]) -> Iterator[tuple[Task, int, Path]]:
    """Every task with every seed: the first seeds of all tasks, then the second ones."""
    for seed in range(max(task.seeds for task in tasks)):
        for task in tasks:
            if seed < task.seeds:
                yield task, seed, task.path(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the public sets")
    parser.add_argument("--only", choices=sorted({task.set for task in TASKS}), help="one set instead of all")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.data):
        parser.error("--data must name the folder of the public sets (or --table, to print what is there)")
    tasks = [task for task in TASKS if arguments.only in (None, task.set)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for task, seed, path in cells(tasks) if not arguments.table else ():
        if path.exists():
            continue
        print(f"{task.name}, seed {seed}", flush=True)
        n_train, n_test, methods = task.run(arguments.data, seed)
        row = {
            "set": task.set,
            "task": task.name,
            "device": task.device,
            "seed": seed,
            "goal": task.goal,
            "n_train": n_train,
            "n_test": n_test,
            "edgeprune": edgeprune.__version__,
            "methods": methods,
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, indent=1) + "\n")
        partial.replace(path)
    places = [task.path(seed) for task in tasks for seed in range(task.seeds)]
    done = [json.loads(path.read_text()) for path in places if path.exists()]
    if done:
        print(markdown(done), intervals(done), transfer_verdict(done), sep="\n\n")
    missing = [f"{task.name} seed {seed}" for task, seed, path in cells(tasks) if not path.exists()]
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
