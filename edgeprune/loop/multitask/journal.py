"""What a search has measured so far, so that the same search does not measure it again after an interruption.

Everything that a search decides follows from what it measured. So it is begun anew after an interruption, is told what was
measured then, in the order in which it asks, and comes to where it was without looking at anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.files import write_text
from edgeprune.recovery.checkpoint import weights_hash

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.recovery.fine_tuning import FineTuning
    from edgeprune.recovery.generators import Generators

_NAME = "measured.jsonl"
_SCHEMA = 1

_log = logging.getLogger("edgeprune.loop")


class Journal:
    """JSON lines, one per measurement, each written when it is there; a line that was cut off is none.

    Args:
        folder: Where it lies, and where the tunings of a search keep theirs; made when there is something to write. None: nothing
            is kept.
        identity: What the search is, JSON values; a journal of another one is begun anew.
        generators: Everything random that a measurement may draw from.

    Attributes:
        recalled: How many measurements were told.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], generators: Generators | None = None) -> None:
        self._folder, self._generators = folder, generators
        self._identity = {"schema": _SCHEMA, "identity": _digest(identity)}
        self._known: list[dict[str, Any]] = []
        self.recalled = 0
        if folder is not None:
            self._known = self._read(folder / _NAME)

    def recall(self, request: Any, measure: Callable[[], Any], *, draws: bool = False) -> Any:
        """What was measured, or is measured now.

        Args:
            request: What is asked for, JSON values; where it is not what was asked for then, all that came after is forgotten.
            measure: Measures it; gives JSON values.
            draws: Whether it draws from generators: they are put where they were behind it.
        """
        if self._folder is None:
            return measure()
        asked = _digest(request)
        if self.recalled < len(self._known):
            entry = self._known[self.recalled]
            if entry["request"] == asked:
                self.recalled += 1
                if draws and self._generators is not None:
                    self._generators.restore(entry["generators"])
                return entry["value"]
            _log.warning("the interrupted search asked for something else from step %d on", self.recalled + 1)
            self._known = self._known[: self.recalled]
            self._forget_tunings()
            lines = [self._identity, *self._known]
            write_text(self._folder / _NAME, "".join(json.dumps(line) + "\n" for line in lines))
        entry = {"request": asked, "value": measure()}
        if draws and self._generators is not None:
            entry["generators"] = self._generators.states()
        self._append(entry)
        # As it would be told: a pair is a list there.
        return json.loads(json.dumps(entry["value"]))

    def checkpoint(self, name: str) -> Path | None:
        """Where a tuning keeps what it goes on from; None where nothing is kept."""
        if self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{name}.safetensors"

    def _forget_tunings(self) -> None:
        """Those of another search would be refused."""
        assert self._folder is not None
        for tuning in self._folder.glob("*.safetensors"):
            tuning.unlink()

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._folder is not None
        path = self._folder / _NAME
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(self._identity) + "\n")
        with path.open("ab") as file:
            file.write((json.dumps(entry) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self._known.append(entry)
        self.recalled += 1

    def _read(self, path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        data = path.read_bytes()
        entries, whole = list[dict[str, Any]](), 0
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            entries.append(entry)
            whole += len(line)
        if not entries or entries[0] != self._identity:
            self._forget_tunings()
            path.unlink()
            if entries:
                _log.warning("the interrupted search in %s was another one; it begins anew", path.parent)
            return []
        if whole < len(data):
            os.truncate(path, whole)
        _log.info("going on with the search in %s: %d measurements are there", path.parent, len(entries) - 1)
        return entries[1:]


def identity_of_search(
    settings: Any, planner: Planner, tuning: FineTuning | None = None, distill: Sequence[Distillation] = ()
) -> dict[str, Any]:
    """What makes a search the same as an earlier one, as JSON values, besides its data.

    Args:
        settings: Of the search, as they are written out.
        planner: Of the dense model.
        tuning: How it is tuned on the way.
        distill: By what it is taught then.
    """
    named = [*planner.model.named_parameters(), *planner.model.named_buffers()]
    assert planner.task is not None
    return {
        "search": repr(settings),
        "model": weights_hash(named),
        "latency table": planner.predictor.table_hash,
        "objectives": [[one.name, str(one.limit), one.weight, one.higher_is_better] for one in planner.task.objectives],
        "criterion": planner.criterion.name,
        "fine-tuning": None if tuning is None else asdict(tuning),
        "distillation": [[one.name, one.temperature, one.weight] for one in distill],
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
