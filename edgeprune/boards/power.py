"""What can be read of a board's power, and which readings together are the power of the whole board.

A total is never summed with its parts: a rail through which everything flows stands alone; rails are added only where the
device type's file, or the definition of the sensor itself, says that none is part of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import PowerUnavailableError
from edgeprune.spec import DeviceSpec

METER = "meter"
"""Source and rail of an external meter."""


@dataclass(frozen=True)
class PowerSensor:
    """One readable sensor.

    Attributes:
        name: Unique on the board, e.g. ``"ina3221 VDD_IN"``.
        rail: What it measures; sensors of the same rail are alternatives.
        source: Reader that found it, e.g. ``"ina3221"``.
        kind: ``"power"`` (milliwatts of a moment, or as last renewed), ``"average"`` (milliwatts, the mean over the last
            `window_s`), or ``"energy"`` (millijoules, a counter).
        role: ``"total"`` (all that the board takes), ``"share"`` (disjoint from other shares), ``"inside"`` (part of another
            sensor), or ``"unknown"``.
        period_s: How often it is renewed, seconds, or None where no source says so.
        window_s: Averaging window, seconds, or None where no source says so.
        wrap_mj: A counter starts anew after this many millijoules; None where it is not known to.
        stated: Where `period_s` and `window_s` come from.
        value: A first reading, in the unit of its kind, or None of a sensor that is followed and not asked.
    """

    name: str
    rail: str
    source: str
    kind: str
    role: str = "unknown"
    period_s: float | None = None
    window_s: float | None = None
    wrap_mj: float | None = None
    stated: str | None = None
    value: float | None = None


@dataclass(frozen=True)
class PowerAbsence:
    """Why a source of power readings gives none.

    Attributes:
        source: Name of the reader.
        reason: One sentence.
        there: Whether the board has the sensor and does not let it be read.
    """

    source: str
    reason: str
    there: bool


@dataclass(frozen=True)
class PowerScope:
    """Sensors whose sum is what is measured.

    Attributes:
        sensors: At least one; none is part of another.
        covers: A phrase for a person: what the sum is the power of, and how that is known.
    """

    sensors: tuple[PowerSensor, ...]
    covers: str

    @property
    def rails(self) -> tuple[str, ...]:
        """Names of what is summed."""
        return tuple(sensor.rail for sensor in self.sensors)


@dataclass(frozen=True)
class BoardPower:
    """What can be read of a board's power.

    Attributes:
        sensors: Best first.
        absences: What cannot be read, and why.
        device: The board's type, where known; its file says which rail is the total, or which rails add up to it.
    """

    sensors: tuple[PowerSensor, ...]
    absences: tuple[PowerAbsence, ...]
    device: DeviceSpec | None = None

    @classmethod
    def of(cls, told: Mapping[str, Any], device: DeviceSpec | None = None) -> BoardPower:
        """From the result of the runner's verb ``power``."""
        sensors = [
            PowerSensor(**{name: channel.get(name) for name in PowerSensor.__dataclass_fields__})
            for channel in told["channels"]
        ]
        absences = [PowerAbsence(entry["source"], entry["reason"], entry["there"]) for entry in told["absences"]]
        return cls(tuple(sensors), tuple(absences), device)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Why sensors that are there cannot be read, one sentence each; where nothing is there at all, one that says so."""
        there = tuple(absence.reason for absence in self.absences if absence.there)
        if there or self.sensors:
            return there
        return (f"nothing of {', '.join(absence.source for absence in self.absences)} is there.",)

    def scope(self, rails: Sequence[str] | None = None) -> PowerScope:
        """Sensors whose sum is the power of the board, or of the rails that are asked for.

        The order of preference: `rails`; an external meter; the device type's ``total_power_rail``, else its
        ``summed_power_rails``; a sensor that is the total by its own definition; all sensors that are disjoint by theirs.

        Args:
            rails: Rails to be summed; the caller answers for none being part of another.

        Raises:
            PowerUnavailableError: There is no such rail, none that can be read, or nothing says which ones add up.
        """
        known: dict[str, PowerSensor] = {}
        for sensor in self.sensors:
            known.setdefault(sensor.rail, sensor)
        if rails is not None:
            return self._asked(known, tuple(rails))
        if METER in known:
            return PowerScope((known[METER],), "what the external meter measures")
        facts = {} if self.device is None else self.device.facts
        title = "" if self.device is None else self.device.title
        total, summed = facts.get("total_power_rail"), facts.get("summed_power_rails")
        if total in known:
            return PowerScope((known[total],), f"{total}, the total of {title} by its device file")
        if summed and all(rail in known for rail in summed):
            return PowerScope(
                tuple(known[rail] for rail in summed), f"{' + '.join(summed)}, the sum for {title} by its device file"
            )
        totals = [sensor for sensor in known.values() if sensor.role == "total"]
        if totals:
            return PowerScope((totals[0],), f"{totals[0].rail}, which is a total by its own definition")
        shares = [sensor for sensor in known.values() if sensor.role == "share"]
        if shares:
            names = " + ".join(sensor.rail for sensor in shares)
            return PowerScope(tuple(shares), f"{names}: what is beside these is not seen")
        raise self._nothing(tuple(known))

    def _asked(self, known: Mapping[str, PowerSensor], rails: tuple[str, ...]) -> PowerScope:
        missing = [rail for rail in rails if rail not in known]
        if missing or not rails:
            raise PowerUnavailableError(
                f"rails must be among those that can be read ({', '.join(known) or 'none'}), "
                f"found {', '.join(missing) or 'none'}.",
                hint="edgeprune device probe",
            )
        if len(set(rails)) < len(rails):
            raise PowerUnavailableError(f"rails must be named once each, found {', '.join(rails)}.")
        total = None if self.device is None else self.device.facts.get("total_power_rail")
        whole = [rail for rail in rails if rail == total or known[rail].role == "total"]
        if whole and len(rails) > 1:
            raise PowerUnavailableError(
                f"a total must not be summed with its parts, found {whole[0]} with {len(rails) - 1} more.",
                hint=f"rails=({whole[0]!r},)",
            )
        for rail in rails:
            outer = next((other for other in rails if rail.startswith(f"{other} ")), None)
            if outer is not None and known[rail].role == "inside":
                raise PowerUnavailableError(
                    f"a rail must not be summed with its part, found {outer} with {rail}.", hint=f"rails=({outer!r},)"
                )
        return PowerScope(tuple(known[rail] for rail in rails), f"{' + '.join(rails)}, as asked for")

    def _nothing(self, known: tuple[str, ...]) -> PowerUnavailableError:
        if known:
            return PowerUnavailableError(
                f"it must be known which rails add up to the board's power, found {', '.join(known)} and no device type "
                "that says so.",
                hint="give the board its --type with edgeprune device add --replace, or name the rails with --rail",
            )
        return PowerUnavailableError(
            f"the board's power must be readable, found no sensor that is: {' '.join(self.obstacles)}",
            hint="an external meter with --meter, or docs/power.md",
        )
