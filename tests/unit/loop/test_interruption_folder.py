"""The folder of an interrupted run: ours alone, and gone when it is done."""

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.errors import ConfigError
from edgeprune.loop.interruption import Begun, Interruption
from edgeprune.loop.realizing import Realized
from edgeprune.recovery.fine_tuning import FineTuning


@pytest.fixture(scope="module")
def begun():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    plan = edgeprune.uniform_plan(edgeprune.trace(model, torch.zeros(1, 3, 8, 8)), ratio=0.5)
    realized = Realized(edgeprune.apply(model, plan), 0.0, ())
    return Begun(plan, (), 0, "", "", {"metric": 0.5}, realized, FineTuning(), {})


def test_a_folder_of_something_else_is_refused(tmp_path):
    Interruption(tmp_path).require_own()
    Interruption(tmp_path / "new").require_own()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"must be a folder of its own, .* holds thesis\.tex too"):
        Interruption(tmp_path).require_own()
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file"):
        Interruption(tmp_path / "thesis.tex").require_own()


def test_only_what_is_ours_is_removed(begun, tmp_path):
    kept = Interruption(tmp_path / "tuning")
    kept.save(begun, {})
    kept.checkpoint.write_bytes(b"an epoch")
    (kept.folder / ".state.json.0123.partial").write_text("a draft of a process that was killed")
    kept.require_own()
    other = kept.folder / "notes.txt"
    other.write_text("somebody else's")
    kept.save(begun, {})
    kept.discard()
    assert list(kept.folder.iterdir()) == [other]
    other.unlink()
    kept.save(begun, {})
    kept.discard()
    assert not kept.folder.exists()


def test_a_run_of_another_source_is_not_gone_on_with(begun, tmp_path):
    Interruption(tmp_path, {}, {"source of the task": "one"}).save(begun, {"epochs": 3})
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    same, said = Interruption(tmp_path, {}, {"source of the task": "one"}).load(model, {"epochs": 3})
    assert same is not None
    assert said == ""
    none, said = Interruption(tmp_path, {}, {"source of the task": "two"}).load(model, {"epochs": 4})
    assert none is None
    assert "it differs in epochs, source of the task" in said
