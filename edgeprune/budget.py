"""Budgets: what a pruned model may cost, in numbers or as shares of the dense model, and how people write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from edgeprune.errors import ConfigError

_NUMBER = r"[0-9]*\.?[0-9]+(?:e-?[0-9]+)?"
_BOUNDS = (
    ("latency", "latency_ms", "latency_ratio", " ms"),
    ("parameter", "parameters", "parameters_ratio", ""),
    ("multiply-accumulate", "macs", "macs_ratio", ""),
    ("energy", "energy_mj", "energy_ratio", " mJ"),
    ("memory", "memory_bytes", "memory_ratio", " bytes"),
)
_NAMES = {
    "latency": "latency",
    "parameter": "params",
    "multiply-accumulate": "macs",
    "energy": "energy",
    "memory": "memory",
}
"""What `Budget.of` calls them."""
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
# Name in `Budget.of`, field, field of the share, units, and an example.
_READ: tuple[tuple[str, str, str, dict[str, float], str], ...] = (
    ("params", "parameters", "parameters_ratio", _COUNTS, "1.2M"),
    ("macs", "macs", "macs_ratio", _COUNTS, "1.2M"),
    ("energy", "energy_mj", "energy_ratio", {"mJ": 1.0, "uJ": 1e-3, "J": 1e3}, "30mJ"),
    ("memory", "memory_bytes", "memory_ratio", _BYTES, "8MB"),
)


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost; all that is given holds at once, each as a number or as a share, not both.

    Attributes:
        latency_ms: Upper bound of the latency, milliseconds.
        latency_ratio: Upper bound of the latency as a share of the dense model's, in (0, 1].
        parameters: Upper bound of the number of parameters.
        parameters_ratio: The same as a share of the dense model's, in (0, 1].
        macs: Upper bound of the multiply-accumulates of convolutions and matrix products, at the deployment batch.
        macs_ratio: The same as a share of the dense model's, in (0, 1].
        energy_mj: Upper bound of the energy of one inference above idle, as the predictor says, millijoules.
        energy_ratio: The same as a share of the dense model's, in (0, 1].
        memory_bytes: Upper bound of weights and live activations (`edgeprune.allocation.memory.Memory`), bytes.
        memory_ratio: The same as a share of the dense model's, in (0, 1].
    """

    latency_ms: float | None = None
    latency_ratio: float | None = None
    parameters: float | None = None
    parameters_ratio: float | None = None
    macs: float | None = None
    macs_ratio: float | None = None
    energy_mj: float | None = None
    energy_ratio: float | None = None
    memory_bytes: float | None = None
    memory_ratio: float | None = None

    def __post_init__(self) -> None:
        for what, amount, share, unit in _BOUNDS:
            number, ratio = getattr(self, amount), getattr(self, share)
            if number is not None and ratio is not None:
                raise ConfigError(f"a budget must have exactly one of {amount} and {share}, found both.")
            if number is not None and not (math.isfinite(number) and number > 0):
                raise ConfigError(
                    f"{'an' if what == 'energy' else 'a'} {what} budget must be greater than 0{unit}, found {number}.",
                    hint=f'Budget.of({_NAMES[what]}="50%"), or a number that the dense model has some of',
                )
            if ratio is not None and not 0 < ratio <= 1:
                raise ConfigError(
                    f"a relative {what} budget must lie in (0 %, 100 %], found {ratio:.3%}.",
                    hint=f'Budget.of({_NAMES[what]}="50%"), which is half of the dense model\'s',
                )
        if not self.bounds_latency and not self.bounds_more:
            raise ConfigError(
                "a budget must bound something: exactly one of latency_ms and latency_ratio, or another cost.",
                hint='Budget.of(latency="12ms") or Budget.of(latency="50%")',
            )

    @property
    def bounds_latency(self) -> bool:
        """Whether it bounds the latency."""
        return self.latency_ms is not None or self.latency_ratio is not None

    @property
    def bounds_more(self) -> bool:
        """Whether it bounds something besides the latency."""
        return any(getattr(self, name) is not None for _, *pair, _ in _BOUNDS[1:] for name in pair)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a latency budget: ``"12ms"``, ``"800us"``, ``"0.012s"`` or ``"50%"``.

        Raises:
            ConfigError: If the text is none of these.
        """
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(ms|us|s|%)\s*", text)
        if match is None:
            raise ConfigError(
                f"a latency budget must be a number with a unit, found {text!r}.",
                hint='Budget.of(latency="12ms") or Budget.of(latency="50%")',
            )
        value, unit = float(match[1]), match[2]
        if unit == "%":
            return cls(latency_ratio=value / 100)
        return cls(latency_ms=value * {"s": 1e3, "ms": 1.0, "us": 1e-3}[unit])

    @classmethod
    def of(
        cls,
        latency: str | None = None,
        params: str | None = None,
        macs: str | None = None,
        energy: str | None = None,
        memory: str | None = None,
    ) -> Budget:
        """Read several bounds, each of which may be a share such as ``"40%"``.

        Args:
            latency: As in `parse`.
            params: ``"250000"``, ``"500k"``, ``"1.2M"``.
            macs: The same, or ``"4G"``.
            energy: ``"30mJ"``, ``"900uJ"``, ``"0.03J"``.
            memory: ``"8MB"``, ``"512KiB"``, ``"8000000B"``; a kB is 1000 bytes, a KiB 1024.

        Raises:
            ConfigError: If a text is none of these, or there is none at all.
        """
        given: dict[str, float] = {}
        if latency is not None:
            timed = cls.parse(latency)
            given |= (
                {"latency_ratio": timed.latency_ratio} if timed.latency_ratio else {"latency_ms": timed.latency_ms or 0}
            )
        for (name, number, share, units, example), text in zip(_READ, (params, macs, energy, memory), strict=True):
            if text is None:
                continue
            match = re.fullmatch(rf"\s*({_NUMBER})\s*({'|'.join(units)}|%)\s*", text)
            if match is None:
                number_of = "a number" if "" in units else "a number with a unit"
                raise ConfigError(
                    f"the budget of {name} must be {number_of} or a share, found {text!r}.",
                    hint=f'Budget.of({name}="40%") or Budget.of({name}="{example}")',
                )
            value, unit = float(match[1]), match[2]
            given |= {share: value / 100} if unit == "%" else {number: value * units[unit]}
        return cls(**given)

    def resolve_ms(self, dense_ms: float) -> float:
        """The latency in milliseconds, given the dense model's; that itself where the latency is not bounded."""
        return self.latency_ms if self.latency_ms is not None else (self.latency_ratio or 1.0) * dense_ms

    def __str__(self) -> str:
        texts = []
        if self.latency_ms is not None:
            texts.append(f"{self.latency_ms:g} ms")
        if self.latency_ratio is not None:
            texts.append(f"{100 * self.latency_ratio:g}% of dense")
        for name, number, share in (
            ("parameters", self.parameters, self.parameters_ratio),
            ("multiply-accumulates", self.macs, self.macs_ratio),
            ("mJ", self.energy_mj, self.energy_ratio),
            ("bytes", self.memory_bytes, self.memory_ratio),
        ):
            if number is not None:
                texts.append(f"{number:g} mJ" if name == "mJ" else f"{number:,.0f} {name}")
            if share is not None:
                texts.append(f"{100 * share:g}% of the {({'mJ': 'energy', 'bytes': 'memory'}).get(name, name)}")
        return ", ".join(texts)
