"""Operations for which it matters how far apart channels lie: those that are gone leave a zero behind while they run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class Places:
    """Index tensors that a cut program needs to put channels back in their places, and to pick them out again.

    Attributes:
        inputs: Of a written program, one per index tensor; equal ones are shared.
        constants: Their values by name.
    """

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.constants: dict[str, dict[str, Any]] = {}

    def nodes(
        self, node: Mapping[str, Any], argument: str, rank: int, masks: Mapping[int, npt.NDArray[np.bool_]]
    ) -> list[dict[str, Any]]:
        """An operation between the zeros that it needs and the positions that stay; the last node has its name.

        Args:
            node: The written operation.
            argument: Name of the argument that is filled up.
            rank: Axes of that.
            masks: Axis to True where a position stays, for every axis that is filled up.
        """
        nodes: list[dict[str, Any]] = []

        def add(operation: str, values: dict[str, Any]) -> dict[str, str]:
            nodes.append({**node, "name": f"{node['name']}_places_{len(nodes)}", "op": operation, "args": values})
            return {"node": nodes[-1]["name"]}

        found = node["args"][argument]
        for axis, mask in masks.items():
            # One zero at the end, which every position that is gone reads.
            pads = [0, 0] * (rank - 1 - axis) + [0, 1]
            found = add("aten.constant_pad_nd.default", {"self": found, "pad": pads, "value": 0})
            index = self._index(np.where(mask, np.cumsum(mask) - 1, mask.sum()))
            found = add("aten.index_select.default", {"self": found, "dim": axis, "index": index})
        found = add(node["op"], {**node["args"], argument: found})
        for axis, mask in masks.items():
            index = self._index(np.flatnonzero(mask))
            found = add("aten.index_select.default", {"self": found, "dim": axis, "index": index})
        nodes[-1]["name"] = node["name"]
        return nodes

    def _index(self, places: npt.NDArray[np.int64]) -> dict[str, str]:
        # Named by its values: programs of two plans are compared by the names that operations read.
        data = places.tolist()
        name = f"places_{hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]}"
        if name not in self.constants:
            self.constants[name] = {"dtype": "int64", "data": data}
            self.inputs.append({"name": name, "kind": "constant", "target": name})
        return {"node": name}
