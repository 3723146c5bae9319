"""Plain data that all packages share: immutable, JSON-ready, free of torch.

Units are in the names (`_ms`, `_bytes`, `_mb`, `_hz`, `_celsius`). Every shape is a tuple of ints, batch first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

from edgeprune.errors import ConfigError

Precision = Literal["fp32", "fp16", "int8"]
AttributeValue = int | float | str | bool | tuple[int | float, ...]

SMALLEST_SHARE = 1 / 8
"""Share of a channel group's units below which nothing is profiled, and nothing pruned without an explicit constraint."""


def smallest_width(size: int) -> int:
    """Fewest units that a group of `size` units keeps by default."""
    return max(1, round(size * SMALLEST_SHARE))


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one input or output, deployment batch included.

    Attributes:
        name: Name as the engine knows it.
        shape: All dimensions, batch first.
        dtype: NumPy name, e.g. ``"float32"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Kernel:
    """One fused operation as a runtime executes it (conv + batch norm + relu is one).

    Two kernels are equal when the runtime would spend the same time on them; where they come from does not count.

    Attributes:
        op: The runtime's own operation, domain first where it has one, e.g. ``"nchwc.Conv"``, ``"FusedConv"``, ``"Gemm"``.
        family: What the predictor regresses together: ``conv``, ``gemm`` (batched products too), ``pool``, ``reduce``,
            ``norm``, ``softmax``, ``elementwise``, ``layout``, ``concat``, ``other``.
        inputs: Shapes of the data inputs as the runtime holds them: channels of blocked operations are padded to whole
            blocks. Weights are told by `attributes`.
        output: Shape of the output, padded likewise.
        attributes: Sorted (name, value) pairs: for ``conv`` at least ``kernel``, ``stride``, ``pads``, ``dilation``,
            ``groups``, ``activation``, ``residual``, ``bias``; for ``gemm`` ``bias``, ``trans_b``.
        precision: Arithmetic precision.
        origin: Names of the graph nodes (`edgeprune.ChannelGraph`) that this kernel computes.
    """

    op: str
    family: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    attributes: tuple[tuple[str, AttributeValue], ...] = ()
    precision: Precision = "fp32"
    origin: tuple[str, ...] = field(default=(), compare=False)

    def __hash__(self) -> int:
        # A prediction looks each kernel up ten times, and to hash nested tuples takes as long as the rest of that.
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash((self.op, self.family, self.inputs, self.output, self.attributes, self.precision))
            self.__dict__["_hash"] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Texts have other hashes in another process.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @cached_property
    def key(self) -> str:
        """Canonical text of everything but `origin`; equal keys mean equal kernels."""
        # Asked for ten thousand times before a profile measures anything: no copies of what is immutable.
        told = {one.name: getattr(self, one.name) for one in fields(self) if one.compare}
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Kernel:
        """Rebuild a kernel from `key`.

        Raises:
            ConfigError: If `key` is not the key of a kernel.
        """
        try:
            fields = json.loads(key)
            return cls(
                op=fields["op"],
                family=fields["family"],
                inputs=tuple(tuple(shape) for shape in fields["inputs"]),
                output=tuple(fields["output"]),
                attributes=tuple((name, _frozen(value)) for name, value in fields["attributes"]),
                precision=fields["precision"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"a kernel key must be JSON written by Kernel.key, found {key[:80]!r}.") from error

    def attribute(self, name: str, default: AttributeValue | None = None) -> AttributeValue | None:
        """Value of one attribute, or `default`."""
        return dict(self.attributes).get(name, default)


def _frozen(value: Any) -> AttributeValue:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Constraints:
    """What the allocation must respect, by module pattern (`fnmatch` on names such as ``"layers.*.conv1"``).

    Attributes:
        keep: Patterns of modules whose channels stay as they are.
        min_width: Pattern to the fewest units that may be kept; without one an eighth of a group, the narrowest that is
            profiled. A smaller number is taken at its word, and latencies there are extrapolated.
        multiple_of: Pattern to the number that kept widths must be a multiple of.
        same_as: Pattern to a module name: groups that match get the same width as that module's group.
    """

    keep: tuple[str, ...] = ()
    min_width: Mapping[str, int] = field(default_factory=dict)
    multiple_of: Mapping[str, int] = field(default_factory=dict)
    same_as: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep: Any = self.keep
        if isinstance(keep, str):
            raise ConfigError(f"keep must be a list of patterns, found {keep!r}.", hint=f"keep=[{keep!r}]")
        object.__setattr__(self, "keep", tuple(self.keep))
        for name, example in (("min_width", 16), ("multiple_of", 8), ("same_as", "stem")):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(
                    f"{name} must map patterns of modules to values, found {getattr(self, name)!r}.",
                    hint=f"{name}={{'*': {example!r}}}",
                )
        for name in ("min_width", "multiple_of"):
            for pattern, value in getattr(self, name).items():
                if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                    raise ConfigError(
                        f"{name} of {pattern!r} must be a whole number of at least 1, found {value!r}.",
                        hint=f"{name}={{{pattern!r}: 8}}",
                    )


@dataclass(frozen=True)
class Measurement:
    """Repeated timings of one thing on one board.

    Attributes:
        median_ms: Median over all rounds, milliseconds.
        p90_ms: 90th percentile, milliseconds.
        min_ms: Smallest sample, milliseconds.
        spread: Relative spread: median absolute deviation over the median, of the round medians.
        rounds_ms: Median of each round, milliseconds, in order.
        samples: Number of timed samples.
        times_ms: Every timed sample as it was taken, milliseconds, those that were interrupted and what a call costs included,
            so that another statistic can be taken later; empty where they are not known.
        cpu_share: CPU time over wall time of each of these, in the same order.
    """

    median_ms: float
    p90_ms: float
    min_ms: float
    spread: float
    rounds_ms: tuple[float, ...]
    samples: int
    times_ms: tuple[float, ...] = ()
    cpu_share: tuple[float, ...] = ()


@dataclass(frozen=True)
class DeviceSpec:
    """Facts of a device *type*: no host names, no secrets. One TOML in ``devices/`` each; unknown facts are left out.

    Attributes:
        name: File stem, e.g. ``"raspberry-pi-5"``.
        title: What a person calls it.
        architecture: As ``uname -m`` prints it, e.g. ``"aarch64"``.
        backends: Names of backends that run there, best first.
        facts: Everything else that the file states (cores, vector_bits, memory, power modes, sensors).
        sources: Where the facts come from.
    """

    name: str
    title: str
    architecture: str
    backends: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """What a board is and runs, as probed. Latencies of boards with different `identity` must not be mixed.

    Attributes:
        architecture: ``uname -m``.
        cpu_model: As the kernel names it, or ``"unknown"``.
        isa: CPU feature flags that matter to kernels, sorted.
        cores: Logical cores that the process may use.
        caches_bytes: Cache sizes of the first core that the process may use, e.g. ``{"L1d": 32768, "L2": 1048576}``.
        memory_bytes: Total memory.
        os: Distribution and version.
        kernel: ``uname -r``.
        libc: E.g. ``"glibc 2.36"``.
        python: Version of the board's Python.
        runtimes: Runtime name to ``{"version": ..., "sha256": ...}`` of its library.
        power_mode: Name of the active power mode where there is one.
        governor: CPU frequency governor, or None where the kernel exposes none.
        free_disk_bytes: Free space where edgeprune keeps its files.
        load: One-minute load average at probing time.
        sensors: Readable power and temperature sensors.
        disturbances: Sentences on what could disturb a measurement.
        absences: Sentences on what the board lacks, e.g. a runtime or the right to read a sensor.
        facts: Whatever else it told (board model, JetPack, clocks, temperatures); JSON-ready.
    """

    architecture: str
    cpu_model: str
    isa: tuple[str, ...]
    cores: int
    caches_bytes: Mapping[str, int]
    memory_bytes: int
    os: str
    kernel: str
    libc: str
    python: str
    runtimes: Mapping[str, Mapping[str, str]]
    power_mode: str | None
    governor: str | None
    free_disk_bytes: int
    load: float
    sensors: tuple[str, ...] = ()
    disturbances: tuple[str, ...] = ()
    absences: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, runtime: str) -> dict[str, Any]:
        """The part that decides whether two latency tables may be mixed, for one runtime."""
        return {
            "architecture": self.architecture,
            "cpu_model": self.cpu_model,
            "isa": list(self.isa),
            "power_mode": self.power_mode,
            **({"bound_cores": list(bound)} if (bound := self.facts.get("cores_bound")) else {}),
            "runtime": runtime,
            **{f"runtime_{name}": value for name, value in self.runtimes.get(runtime, {}).items()},
        }


@dataclass(frozen=True)
class Requirement:
    """One thing that an artifact needs of a board.

    Attributes:
        field: What, e.g. ``"architecture"`` or ``"onnxruntime"``.
        needed: What must be there, for a person.
        found: What is there, for a person.
        met: Whether it is met.
        hint: The command that mends it.
    """

    field: str
    needed: str
    found: str
    met: bool
    hint: str | None = None
