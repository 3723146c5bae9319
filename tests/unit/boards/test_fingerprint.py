"""From the probe's JSON to a fingerprint."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from edgeprune.boards.fingerprint import from_facts
from edgeprune.spec import Fingerprint

FULL = {
    "architecture": "aarch64",
    "cpu_model": "Cortex-A76",
    "isa": ["fp", "asimd"],
    "cores": 4,
    "caches_bytes": {"L2": 524288},
    "memory_bytes": 8 << 30,
    "os": "Debian",
    "kernel": "6.6",
    "libc": "glibc 2.36",
    "python": "3.11.2",
    "runtimes": {"onnxruntime": {"version": "1.31.1", "sha256": "ab"}},
    "power_mode": "15W",
    "governor": "performance",
    "free_disk_bytes": 1 << 30,
    "load": 0.5,
    "sensors": ["temperature cpu"],
    "disturbances": ["one."],
    "absences": ["two."],
    "facts": {"board_model": "Pi"},
}


def test_every_fact_finds_its_place() -> None:
    found = from_facts(FULL)
    assert {field.name for field in dataclasses.fields(Fingerprint)} == set(FULL)
    stored = json.loads(json.dumps(dataclasses.asdict(found)))
    assert stored == {**FULL, "isa": ["asimd", "fp"]}
    assert from_facts(stored) == found


@given(st.sets(st.sampled_from(sorted(FULL))), st.sets(st.sampled_from(sorted(FULL))))
def test_any_fact_may_be_missing_or_null(missing: set[str], null: set[str]) -> None:
    facts = {name: (None if name in null else value) for name, value in FULL.items() if name not in missing}
    found = from_facts({**facts, "something new": 1})
    assert found.identity("onnxruntime")["architecture"] == (
        "unknown" if {"architecture"} & (missing | null) else "aarch64"
    )
    assert from_facts(dataclasses.asdict(found)) == found


def test_the_runtime_s_build_and_the_power_mode_are_part_of_the_identity_and_the_load_is_not() -> None:
    found = from_facts(FULL)
    other_build = from_facts({**FULL, "runtimes": {"onnxruntime": {"version": "1.31.1", "sha256": "cd"}}})
    assert found.identity("onnxruntime") != other_build.identity("onnxruntime")
    assert found.identity("onnxruntime") != from_facts({**FULL, "power_mode": "25W"}).identity("onnxruntime")
    assert found.identity("onnxruntime") == from_facts({**FULL, "load": 3.0, "sensors": []}).identity("onnxruntime")
