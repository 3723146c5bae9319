"""What a kernel is known by."""

import copy
import json
from dataclasses import asdict, replace

from edgeprune.spec import Kernel

CONV = Kernel("Conv", "conv", ((1, 3, 8, 8),), (1, 4, 8, 8), (("kernel", (3, 3)), ("bias", True)), origin=("conv2d",))


def test_a_key_says_everything_but_the_origin_and_is_that_of_this_kernel_alone() -> None:
    fields = asdict(CONV)
    del fields["origin"]
    assert CONV.key == json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert Kernel.from_key(CONV.key) == CONV
    assert json.loads(replace(CONV, precision="int8").key)["precision"] == "int8"
    assert {CONV: 1}[replace(CONV, origin=())] == 1


def test_a_remembered_hash_goes_with_no_other_kernel_and_into_no_other_process() -> None:
    known = {CONV: 1}
    wide = replace(CONV, output=(1, 8, 8, 8))
    assert wide not in known
    assert hash(wide) == hash(Kernel.from_key(wide.key)) != hash(CONV)
    again = copy.copy(CONV)
    assert again == CONV
    assert known[again] == 1
    assert "_hash" not in CONV.__getstate__()
