"""Which wheels fit a board: by what boards tell of themselves, and against pip's own library of tags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.tags import Tag, compatible_tags, cpython_tags

from edgeprune.boards.fingerprint import from_facts
from edgeprune.boards.wheels import WheelTarget, fits, target_of, version_of
from edgeprune.errors import IncompatibleTargetError


def target(python: str, abi: str | None, architecture: str, libc: str, bits: int = 64) -> WheelTarget:
    facts = {"python_bits": bits, **({} if abi is None else {"python_abi": abi})}
    return target_of(from_facts({"python": python, "architecture": architecture, "libc": libc, "facts": facts}))


BOOKWORM = target("3.11.2", "cpython-311-aarch64-linux-gnu", "aarch64", "glibc 2.36")
JETPACK_4 = target("3.6.9", "cpython-36m-aarch64-linux-gnu", "aarch64", "glibc 2.27")


def test_tags_go_from_the_board_s_glibc_down_to_the_oldest_that_wheels_name() -> None:
    assert BOOKWORM.abi == "cp311"
    assert BOOKWORM.platforms[0] == "manylinux_2_36_aarch64"
    assert BOOKWORM.platforms[-3:] == ("manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64")
    assert "manylinux_2_37_aarch64" not in BOOKWORM.platforms
    assert str(BOOKWORM) == "CPython 3.11.2 on aarch64 with glibc 2.36"


@pytest.mark.parametrize(
    ("found", "abi", "first", "last"),
    [
        (JETPACK_4, "cp36m", "manylinux_2_27_aarch64", "linux_aarch64"),
        (target("3.13.0", "cpython-313t-x86_64-linux-gnu", "x86_64", "glibc 2.41"), "cp313t", "manylinux_2_41_x86_64", None),
        (target("3.9.2", "cpython-39-arm-linux-gnueabihf", "aarch64", "glibc 2.31", 32), "cp39", "manylinux_2_31_armv7l", None),
        (target("3.9.2", "cpython-39-arm-linux-gnueabihf", "armv7l", "glibc 2.31", 32), "cp39", "manylinux_2_31_armv7l", None),
        (target("3.12.1", "cpython-312-x86_64-linux-musl", "x86_64", "musl"), "cp312", "musllinux_1_2_x86_64", None),
        (target("3.12.0rc1", "cpython-312-i386-linux-gnu", "x86_64", "glibc 2.17", 32), "cp312", "manylinux_2_17_i686", None),
    ],
)  # fmt: skip
def test_boards_of_all_kinds(found: WheelTarget, abi: str, first: str, last: str | None) -> None:
    assert (found.abi, found.platforms[0]) == (abi, first)
    assert last is None or found.platforms[-1] == last
    assert found.architecture in first


def test_names_of_before_pep_600_are_known_on_x86_alone() -> None:
    x86 = target("3.10.1", "cpython-310-x86_64-linux-gnu", "x86_64", "glibc 2.31").platforms
    assert {"manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "manylinux_2_5_x86_64"} <= set(x86)
    assert not {"manylinux2010_aarch64", "manylinux1_aarch64"} & set(BOOKWORM.platforms)


@pytest.mark.parametrize(
    ("abi", "libc", "message"),
    [
        ("pypy39-pp73-x86_64-linux-gnu", "glibc 2.31", "CPython, the board has pypy39-pp73"),
        (None, "glibc 2.31", "CPython, the board has an implementation that does not tell its ABI"),
        ("cpython-39-aarch64-linux-gnu", "glibc 2.16", r"glibc >= 2\.17, the board has glibc 2\.16"),
        ("cpython-39-aarch64-linux-gnu", "unknown", r"glibc 2\.x or musl, the board has unknown"),
    ],
)
def test_boards_for_which_no_wheels_are_made(abi: str | None, libc: str, message: str) -> None:
    with pytest.raises(IncompatibleTargetError, match=message) as caught:
        target("3.9.2", abi, "aarch64", libc)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("wheel", "bookworm", "jetpack_4"),
    [
        ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl", True, False),
        ("onnxruntime-1.10.0-cp36-cp36m-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", False, True),
        ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_27_x86_64.whl", False, False),
        ("apache_tvm-0.27.0.post1-py3-none-manylinux_2_28_aarch64.whl", True, False),
        ("apache_tvm_ffi-0.1.14-cp38-abi3-manylinux_2_24_aarch64.whl", True, False),
        ("flatbuffers-25.12.19-py2.py3-none-any.whl", True, True),
        ("packaging-26.3-py3-none-any.whl", True, True),
        ("old-1.0-py2-none-any.whl", False, False),
        ("newer-1.0-py312-none-any.whl", False, False),
    ],
)
def test_wheels_fit_by_their_names(wheel: str, bookworm: bool, jetpack_4: bool) -> None:
    assert (fits(wheel, BOOKWORM), fits(wheel, JETPACK_4)) == (bookworm, jetpack_4)


PYTHONS = st.sampled_from(["cp36", "cp38", "cp39", "cp311", "cp312", "py2", "py3", "py36", "py310", "py311", "py312"])
ABIS = st.sampled_from(["none", "abi3", "cp36m", "cp39", "cp311", "cp312"])
PLATFORMS = st.sampled_from(
    ["any", "linux_aarch64", "manylinux_2_17_aarch64", "manylinux_2_34_aarch64", "manylinux_2_39_aarch64", "win_amd64"]
)


@given(PYTHONS, ABIS, PLATFORMS, st.sampled_from([BOOKWORM, JETPACK_4]))
def test_a_wheel_fits_when_pip_s_own_tags_say_so(python: str, abi: str, platform: str, board: WheelTarget) -> None:
    version = [int(part) for part in board.python.split(".")[:2]]
    known = {*cpython_tags(version, [board.abi], board.platforms)}
    known |= {*compatible_tags(version, f"cp{version[0]}{version[1]}", board.platforms)}
    assert fits(f"name-1.0-{python}-{abi}-{platform}.whl", board) == (Tag(python, abi, platform) in known)


def test_names_of_wheels() -> None:
    assert version_of("apache_tvm_ffi-0.1.14.post1-1-py3-none-any.whl") == ("apache-tvm-ffi", "0.1.14.post1")
    for wrong in ("onnxruntime-1.0.tar.gz", "onnxruntime.whl"):
        with pytest.raises(ValueError, match="is no wheel's name"):
            version_of(wrong)
