"""Device types and their files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune
from edgeprune.boards.device_types import device_type, device_types, devices_folder, read_device_file
from edgeprune.boards.runner_package import runner_package
from edgeprune.errors import DeviceFileError
from edgeprune.spec import DeviceSpec

VALID = """
title = "A board"
architecture = "aarch64"
backends = ["onnxruntime"]
sources = ["its data sheet"]
[facts]
cores = 4
"""


def test_the_shipped_types_are_there_and_valid() -> None:
    names = [spec.name for spec in device_types()]
    assert names == sorted(names)
    assert {
        "x86-64-host",
        "jetson-orin-nano",
        "jetson-agx-orin",
        "raspberry-pi-5",
        "android-arm64",
        "nvidia-gpu",
        "jetson-xavier-nx",
        "jetson-nano",
        "jetson-thor",
        "raspberry-pi-4",
        "rk3588",
        "snapdragon-android",
    } <= set(names)
    assert names == [path.stem for path in sorted(devices_folder().glob("*.toml"))]


@pytest.mark.parametrize("spec", device_types(), ids=lambda spec: spec.name)
def test_every_type_states_its_sources_and_no_host(spec: DeviceSpec) -> None:
    assert spec.sources
    text = (devices_folder() / f"{spec.name}.toml").read_text()
    for word in ("password", "identity", "host_key", "ssh ="):
        assert word not in text


def test_the_shares_of_a_jetson_are_consistent() -> None:
    facts = device_type("jetson-orin-nano").facts
    assert facts["total_power_rail"] in facts["power_rails"]
    assert all(mode["cores_online"] <= facts["cores"] for mode in facts["power_modes"])
    assert "total_power_rail" not in device_type("jetson-agx-orin").facts


def test_an_unknown_type_is_told_with_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        DeviceFileError, match=r"must be one of android-arm64, .*found 'raspberrypi-5'.*--type raspberry-pi-5"
    ):
        device_type("raspberrypi-5")


def test_a_type_may_state_facts_that_nobody_thought_of(tmp_path: Path) -> None:
    path = tmp_path / "new-board.toml"
    path.write_text(VALID + 'fan = "none"\n')
    spec = read_device_file(path)
    assert (spec.name, spec.title, spec.facts) == ("new-board", "A board", {"cores": 4, "fan": "none"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("cores = 4", "cores = 0"), r"facts\.cores breaks a rule \(Input should be greater than 0\), found 0"),
        (("cores = 4", 'cores = "4"'), r"facts\.cores breaks a rule .*found '4'"),
        (('"onnxruntime"', '"caffe"'), r"backends\.0 breaks a rule .*found 'caffe'"),
        (('title = "A board"', ""), r"title breaks a rule \(Field required\)"),
        (("sources = [", "sources = []\nurls = ["), r"(sources|urls) breaks a rule"),
        (('"aarch64"', '"ARM 64"'), r"architecture breaks a rule"),
        (("[facts]", "[facts"), r"must be valid TOML.*line 6"),
    ],
)
def test_a_bad_file_is_named_with_key_and_rule(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "bad.toml"
    assert change[0] in VALID
    path.write_text(VALID.replace(*change))
    with pytest.raises(DeviceFileError, match=words) as caught:
        read_device_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_device_file_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceFileError, match=r"none\.toml must be a readable file, found: No such file"):
        read_device_file(tmp_path / "none.toml")


def test_the_files_are_found_in_an_installed_package(tmp_path: Path) -> None:
    package = Path(edgeprune.__file__).parent
    shutil.copytree(package, tmp_path / "site" / "edgeprune", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    shutil.copytree(devices_folder(), tmp_path / "site" / "edgeprune" / "_data" / "devices")
    code = (
        "from edgeprune.boards import device_types, runner_package\n"
        "print(device_types.devices_folder(), len(device_types.device_types()), runner_package.runner_package().name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    folder, count, runner = done.stdout.split()
    assert folder == str(tmp_path / "site" / "edgeprune" / "_data" / "devices")
    assert int(count) == len(device_types())
    assert runner == runner_package().name
