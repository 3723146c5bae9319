import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from edgeprune.errors import TaskError
from edgeprune.tasks.batches import (
    batch_count,
    batches,
    call,
    labeled_batches,
    labeled_samples,
    loss_of,
    mode,
    objective_batches,
    sample_count,
    sharing,
    unpack,
    validate,
)
from edgeprune.tasks.task import Objective, Task


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def loader(count=12, batch_size=4):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(count, 5), torch.randint(0, 3, (count,))), batch_size=batch_size)


def single(**changes):
    parts = {
        "train": loader(),
        "validation": loader(),
        "loss": nn.CrossEntropyLoss(),
        "metric": accuracy,
        "name": "main",
        **changes,
    }
    return Task.single(**parts)


def test_a_working_task_validates_and_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validate(single(), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "the train data of objective 'main' must yield at least one batch, found an empty loader"),
        ({"validation": []}, "the validation data of objective 'main' must yield at least one batch"),
        (
            {"loss": lambda outputs, targets: outputs},
            r"loss of objective 'main' must be a scalar tensor, found shape \(4, 3\)",
        ),
        ({"loss": lambda outputs, targets: 1.0}, "must be a scalar tensor, found float"),
        (
            {"loss": lambda outputs, targets: outputs.sum() * float("nan")},
            "loss of objective 'main' must be finite, found nan",
        ),
        (
            {"loss": lambda outputs, targets: outputs.detach().sum()},
            "must be differentiable, found one without a gradient",
        ),
        ({"metric": lambda outputs, targets: float("nan")}, "metric of objective 'main' must be finite, found nan"),
        ({"metric": lambda outputs, targets: "good"}, "metric of objective 'main' must be a number, found str"),
        ({"metric": lambda outputs, targets: outputs}, "metric of objective 'main' must be a number, found Tensor"),
        ({"train": [torch.zeros(4, 5)]}, r"must be a pair \(inputs, targets\), found Tensor of length 4"),
        ({"train": [(torch.zeros(4, 5), 1, 2)]}, r"must be a pair \(inputs, targets\), found tuple of length 3"),
        ({"train": [{"x": torch.zeros(4, 5)}]}, r"must be a pair \(inputs, targets\), found dict of length 1"),
        ({"train": [7]}, r"must be a pair \(inputs, targets\), found int"),
    ],
)
def test_what_cannot_be_used_is_named(changes, message):
    with pytest.raises(TaskError, match=message):
        validate(single(**changes), nn.Linear(5, 3))


def test_an_objective_without_a_metric_is_told_what_it_is_for():
    with pytest.raises(
        TaskError, match=r"metric of objective 'seg' must be callable as metric\(outputs, targets\)"
    ) as caught:
        Objective("seg", [1], [1], nn.MSELoss())
    assert caught.value.hint.startswith("metric=accuracy, a function that returns one number")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 3}, "train data of objective 'main' must be iterable, found int"),
        ({"train": iter([1])}, "must be iterable more than once, found a one-shot list_iterator"),
        ({"loss": None}, r"loss of objective 'main' must be callable as loss\(outputs, targets\), found NoneType"),
        ({"metric": 0.5}, "metric of objective 'main' must be callable"),
    ],
)
def test_parts_of_the_wrong_kind_are_refused_at_once(changes, message):
    with pytest.raises(TaskError, match=message):
        single(**changes)


def test_a_task_needs_objectives_with_unique_names():
    with pytest.raises(TaskError, match="at least one objective, found none"):
        Task(())
    objective = single().objectives[0]
    with pytest.raises(TaskError, match="unique names, found main more than once"):
        Task((objective, objective))
    with pytest.raises(TaskError, match="found no 'other' among main"):
        single().objective("other")
    assert single().objective("main").name == "main"


def test_a_negative_weight_is_refused():
    with pytest.raises(TaskError, match="weight of objective 'main' must be at least 0, found -1"):
        Objective("main", loader(), loader(), nn.CrossEntropyLoss(), accuracy, weight=-1.0)


def test_a_limit_follows_the_direction_of_the_metric():
    assert single(limit=0.9).objectives[0].meets_limit(0.91)
    assert not single(limit=0.9).objectives[0].meets_limit(0.89)
    assert not single(limit=0.1, higher_is_better=False).objectives[0].meets_limit(0.2)
    assert single().objectives[0].meets_limit(-5.0)


class TwoInputs(nn.Module):
    def forward(self, first, second):
        return first - 2 * second


def test_inputs_may_be_a_tensor_a_sequence_or_a_dict():
    first, second = torch.full((2, 3), 5.0), torch.ones(2, 3)
    assert torch.equal(call(TwoInputs(), (first, second)), first - 2 * second)
    assert torch.equal(call(TwoInputs(), [first, second]), first - 2 * second)
    assert torch.equal(call(TwoInputs(), {"second": second, "first": first}), first - 2 * second)
    assert torch.equal(call(nn.Identity(), first), first)


def test_the_metric_gives_its_name_to_a_task_of_one_objective():
    assert single(name=None).objectives[0].name == "accuracy"
    assert single(name=None, metric=lambda outputs, targets: 0.0).objectives[0].name == "metric"
    assert single(name="top-1").objectives[0].name == "top-1"


def misspelled(outputs, targets):
    return accuarcy(outputs, targets)  # noqa: F821


class BrokenLoader:
    def __iter__(self):
        yield (torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))
        raise OSError("disk gone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": misspelled},
            r"metric of objective 'main' must run without errors, it raised NameError: .*accuarcy.* \(\S*test_task.py:\d+\)\.",
        ),
        (
            {"loss": lambda outputs, targets: nn.functional.mse_loss(outputs, targets)},
            r"loss of objective 'main' must run without errors, it raised RuntimeError: .* \(\S*test_task.py:\d+\)\.",
        ),
        (
            {"train": [(torch.zeros(4, 7), torch.zeros(4, dtype=torch.long))]},
            r"the model on a batch of the task, 4x7 float32, must run without errors, it raised RuntimeError: ",
        ),
    ],
)
def test_what_the_users_code_raises_is_told_with_its_line(changes, message):
    with pytest.raises(TaskError, match=message) as caught:
        validate(single(**changes), nn.Linear(5, 3))
    assert caught.value.__cause__ is not None
    assert "Try" not in caught.value.message
    assert caught.value.hint


def test_a_loader_that_fails_later_is_named_too():
    read = objective_batches(single(train=BrokenLoader()).objectives[0], "train", torch.device("cpu"))
    next(read)
    with pytest.raises(
        TaskError, match=r"train data of objective 'main' .* OSError: disk gone \(\S*test_task.py:\d+\)"
    ):
        next(read)


@pytest.mark.parametrize(
    ("inputs", "count"),
    [(torch.zeros(7, 2), 7), ({"a": 3, "b": torch.zeros(5)}, 5), ([torch.zeros(4, 1), torch.zeros(9)], 4), ("text", 1)],
)
def test_samples_are_counted_along_axis_0(inputs, count):
    assert sample_count(inputs) == count


def test_batches_are_limited_and_moved():
    found = list(batches(loader(), "data", torch.device("cpu"), 2))
    assert len(found) == 2
    assert all(inputs.shape == (4, 5) for inputs, _ in found)
    assert len(list(objective_batches(single().objectives[0], "validation", torch.device("cpu")))) == 3


def test_targets_that_are_no_tensors_pass_through():
    (_, targets), *_ = batches([(torch.zeros(2), {"boxes": np.ones(3), "label": "cat"})], "data", torch.device("cpu"))
    assert targets["label"] == "cat"
    assert unpack([1, 2], "data") == (1, 2)


def test_a_stream_has_no_known_number_of_batches():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1, 2, 3])

    assert batch_count(DataLoader(Stream())) is None
    assert batch_count(loader()) == 3


def test_forms_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())

    def fail():
        with mode(model, training=False):
            assert not model[0].training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model[0].training
    assert not model[1].training


def partly(mask):
    """An objective of samples that the targets say are labeled; its loss fails on the others."""

    def loss(outputs, targets):
        assert bool(targets["there"].all())
        assert len(outputs["main"]) == len(targets["values"])
        return (outputs["main"] - targets["values"]).square().mean()

    data = [(torch.randn(4, 5), {"values": torch.zeros(4, 3), "there": torch.tensor(mask)})]
    return Objective("main", data, data, loss, lambda o, t: float(loss(o, t)), labeled=lambda targets: targets["there"])


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Linear(5, 3)

    def forward(self, inputs):
        return {"main": self.main(inputs), "scale": self.main.weight.mean()}


@pytest.mark.parametrize("mask", [[True] * 4, [True, False, True, False], [False] * 4])
def test_loss_and_metric_see_the_samples_with_labels(mask):
    objective, model = partly(mask), Headed()
    validate(Task((objective,)), model)
    inputs, targets = objective.train[0]
    outputs = model(inputs)
    loss = loss_of(objective, outputs, targets)
    expected = outputs["main"][torch.tensor(mask)].square().mean() if any(mask) else torch.zeros(())
    assert torch.equal(loss, expected)
    loss.backward()
    assert model.main.weight.grad is not None
    assert bool(model.main.weight.grad.any()) == any(mask)
    assert labeled_samples(objective, outputs, targets, 4)[2] == sum(mask)


def test_one_bool_speaks_for_the_whole_batch():
    task = single(labeled=lambda targets: False)
    inputs, targets = next(iter(task.objectives[0].train))
    assert loss_of(task.objectives[0], nn.Linear(5, 3)(inputs), targets).item() == 0.0
    assert labeled_samples(single(labeled=lambda targets: True).objectives[0], inputs, targets, 4)[2] == 4


@pytest.mark.parametrize(
    ("labeled", "message"),
    [
        (lambda targets: targets, r"must give one bool per sample, or one for all, found int64 of shape \(4,\)"),
        (lambda targets: [True], r"found bool of shape \(1,\)"),
        (lambda targets: targets.there, r"labeled of objective 'main' must run without errors, it raised \w+Error"),
    ],
)
def test_labels_that_cannot_be_told(labeled, message):
    with pytest.raises(TaskError, match=message):
        validate(single(labeled=labeled), nn.Linear(5, 3))
    with pytest.raises(TaskError, match=r"must be callable as labeled\(targets\), found str"):
        single(labeled="there")


def test_the_same_loader_is_shared():
    one, other = loader(), loader()
    parts = [Objective(str(number), data, one, nn.MSELoss(), accuracy) for number, data in enumerate((one, other, one))]
    assert [[part.name for part in several] for several in sharing(parts, "train")] == [["0", "2"], ["1"]]
    assert [len(several) for several in sharing(parts, "validation")] == [3]


def test_batches_without_labels_are_passed_over_where_losses_are_averaged():
    data = [(torch.full((2, 5), float(place)), {"there": torch.tensor([place > 2] * 2)}) for place in range(6)]

    def of(batches):
        return Objective("late", batches, batches, accuracy, accuracy, labeled=lambda targets: targets["there"])

    cpu = torch.device("cpu")
    assert [float(inputs[0, 0]) for inputs, _ in labeled_batches(of(data), "train", cpu, 2)] == [3.0, 4.0]
    assert len(list(labeled_batches(of(data), "validation", cpu))) == 3
    with pytest.raises(TaskError, match="train data of objective 'late' must have labels for it in one batch at least"):
        list(labeled_batches(of(data[:3]), "train", cpu, 2))
