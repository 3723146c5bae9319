import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.errors import TaskError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import uniform_plan
from edgeprune.surgery.program_module import ProgramModule


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), offset=st.sampled_from([0.0, 3.0, 1e4]))
def test_statistics_equal_those_of_all_data_at_once(sizes, offset):
    torch.manual_seed(len(sizes))
    loader = [(torch.randn(size, 3, 2, 2) * 2 + offset, None) for size in sizes]
    norm = nn.BatchNorm2d(3, momentum=0.3)
    reestimate_batch_norm(norm, loader)
    values = torch.cat([inputs for inputs, _ in loader]).double().transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-5, atol=1e-5)
    assert norm.momentum == 0.3
    assert norm.num_batches_tracked == len(sizes)


def test_a_later_batch_norm_sees_what_normalized_earlier_ones_show_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2))
    model[0].running_mean.fill_(100.0)
    inputs = torch.randn(64, 2) * 3 + 1
    reestimate_batch_norm(model, [(inputs, None)])
    first = (inputs - inputs.mean(0)) / (inputs.var(0, unbiased=False) + model[0].eps).sqrt()
    torch.testing.assert_close(model[2].running_mean, first.relu().mean(0))


def test_nothing_else_changes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(0.5)
    )
    model[1].eval()
    model[3].train()
    kept = {
        name: value.clone() for name, value in model.state_dict().items() if "running" not in name and "num" not in name
    }
    record = reestimate_batch_norm(model, [(torch.randn(8, 3), None)] * 3, batches=2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    assert [module.training for module in model] == [True, False, True, True]
    assert not model[1]._forward_pre_hooks
    assert record.details == {"batches": 2, "batch_norms": 1}


def test_a_failure_on_the_way_leaves_the_statistics_alone():
    model = nn.Sequential(nn.BatchNorm1d(2))

    def loader():
        yield torch.randn(4, 2), None
        raise KeyboardInterrupt

    class Loader:
        def __iter__(self):
            return loader()

    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norm(model, Loader())
    assert torch.equal(model[0].running_mean, torch.zeros(2))
    assert torch.equal(model[0].running_var, torch.ones(2))
    assert model[0].num_batches_tracked == 0
    assert not model[0]._forward_pre_hooks


def test_a_batch_with_one_value_per_channel_is_refused():
    with pytest.raises(TaskError, match=r"batch norm '0' at least 2 values per channel, found 1 at shape \(1, 2\)"):
        reestimate_batch_norm(nn.Sequential(nn.BatchNorm1d(2)), [(torch.randn(1, 2), None)])


def test_an_empty_loader_is_refused():
    with pytest.raises(TaskError, match="calibration data must yield at least one batch"):
        reestimate_batch_norm(nn.Sequential(nn.BatchNorm1d(2)), [])


def test_a_model_without_batch_norm_is_left_alone():
    assert reestimate_batch_norm(nn.Linear(2, 2), []).details["batch_norms"] == 0


def test_it_recovers_accuracy_that_wrong_statistics_cost(task, small_net):
    model = small_net()
    fine_tune(model, task, epochs=3, lr=5e-3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(1.5)
            module.running_var.mul_(4)
    told = []
    record = reestimate_batch_norm(model, task.objectives[0].train, task=task, progress=lambda *step: told.append(step))
    assert record.before["accuracy"] < 0.6
    assert record.after["accuracy"] > record.before["accuracy"] + 0.2
    assert told[-1] == ("re-estimating batch norm", 20, 20)


def test_a_cut_program_gets_the_statistics_that_its_own_class_gets():
    """Where the user's forward cannot run with the new sizes the cut model has no batch-norm modules, only their operations."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    ).eval()
    data = [(torch.randn(5, 3, 9, 9) + 1, None) for _ in range(3)]
    plan = uniform_plan(trace(model, data[0][0]), 0.5)
    own = apply(model, plan)
    program = ProgramModule.of(copy.deepcopy(own), plan.program).eval()
    for module in (own, program):
        record = reestimate_batch_norm(module, data)
        assert record.details == {"batches": 3, "batch_norms": 2}
        assert not module.training
    expected = own.state_dict()
    assert not torch.equal(expected["1.running_mean"], apply(model, plan).state_dict()["1.running_mean"])
    for name, value in program.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert torch.equal(program(data[0][0]), program(data[0][0]))
    before = copy.deepcopy(program.state_dict())
    with pytest.raises(TaskError):
        reestimate_batch_norm(program, [*data, (torch.randn(1, 3, 5, 5), None)])
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_operations_of_a_cut_program_that_share_a_batch_norm_are_pooled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.last(self.norm(self.conv(x)) + self.norm(3 * self.conv(x) + 1))

    torch.manual_seed(0)
    model = Twice().eval()
    data = [(torch.randn(4, 3, 5, 5), None) for _ in range(2)]
    plan = uniform_plan(trace(model, data[0][0]), 0.5)
    own = apply(model, plan)
    program = ProgramModule.of(copy.deepcopy(own), plan.program).eval()
    for module in (own, program):
        reestimate_batch_norm(module, data)
    torch.testing.assert_close(program.state_dict()["norm.running_mean"], own.state_dict()["norm.running_mean"])
    torch.testing.assert_close(program.state_dict()["norm.running_var"], own.state_dict()["norm.running_var"])
