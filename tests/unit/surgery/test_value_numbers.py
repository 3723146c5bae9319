"""Two computations have equal value numbers only where their values are equal."""

import copy
import itertools

import pytest
import torch
from torch import nn

from edgeprune.surgery.value_numbers import UnseenValueError, WithoutValues


class _Net(nn.Module):
    """Something to compute from two weights and an input."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.register_buffer("seen", torch.zeros(4))
        self.plain = torch.ones(4)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def _add_in_place(net, x):
    y = x @ net.first
    y.add_(1)
    return y


def _view_written_before(net, x):
    y = x @ net.first
    view = y[:2]
    y.mul_(2)
    return view + 1


def _view_written_after(net, x):
    y = x @ net.first
    result = y[:2] + 1
    y.mul_(2)
    return result


def _written_through_a_view(net, x):
    y = x @ net.first
    y[:2].mul_(2)
    return y[:2] + 1


def _written_elsewhere(net, x):
    y = x @ net.first
    y[2:].mul_(2)
    return y[:2] + 1


def _two_draws(net, x):
    return torch.rand_like(x) - torch.rand_like(x)


def _one_draw(net, x):
    draw = torch.rand_like(x)
    return draw - draw


def _unused(net, x):
    net.second.exp()
    return x @ net.first


def _complex(net, x):
    return torch.complex(x, x @ net.first)


def _of_several_written_at_once(place):
    def body(net, x):
        both = [x @ net.first, x @ net.second]
        torch._foreach_add_(both, 1.0)
        return both[place]

    return body


def _plain_attribute_written(net, x):
    net.plain.add_(1)
    return x * net.plain


def _plain_attribute_written_by_numpy(net, x):
    array = net.plain.numpy()
    array += 2
    return x * net.plain


def _statistics_that_a_norm_wrote(net, x):
    nn.functional.batch_norm(x, net.seen, net.seen + 1, training=True)
    return net.seen.clone()


def _statistics_that_an_instance_norm_wrote(factor):
    def body(net, x):
        nn.functional.instance_norm((factor * x)[None], net.seen, net.seen + 1, use_input_stats=True)
        return net.seen + 2

    return body


def _drawn_after(count):
    def body(net, x):
        torch.rand(count)
        return torch.rand(4)

    return body


def _seeded(seed):
    def body(net, x):
        torch.manual_seed(seed)
        return torch.rand(5)

    return body


BODIES = {
    "conjugated": lambda net, x: torch.view_as_real(_complex(net, x).conj().resolve_conj()),
    "not conjugated": lambda net, x: torch.view_as_real(_complex(net, x).clone()),
    "product of conjugated": lambda net, x: torch.view_as_real(_complex(net, x).conj() @ _complex(net, x)),
    "product of complex": lambda net, x: torch.view_as_real(_complex(net, x) @ _complex(net, x)),
    "imaginary part": lambda net, x: _complex(net, x).imag + 0,
    "imaginary part of conjugated": lambda net, x: _complex(net, x).conj().imag + 0,
    "the first of several written at once": _of_several_written_at_once(0),
    "the second of several written at once": _of_several_written_at_once(1),
    "plain attribute": lambda net, x: x * net.plain,
    "plain attribute written": _plain_attribute_written,
    "plain attribute written by NumPy": _plain_attribute_written_by_numpy,
    "NumPy in between": lambda net, x: x * torch.from_numpy(net.plain.numpy() * 5),
    "statistics": lambda net, x: net.seen.clone(),
    "statistics that a norm wrote": _statistics_that_a_norm_wrote,
    "statistics that an instance norm wrote": _statistics_that_an_instance_norm_wrote(1),
    "others that an instance norm wrote": _statistics_that_an_instance_norm_wrote(2),
    "drawn after three": _drawn_after(3),
    "drawn after ten": _drawn_after(10),
    "seed 3": _seeded(3),
    "seed 4": _seeded(4),
    "product": lambda net, x: x @ net.first,
    "something unused besides": _unused,
    "the other weight": lambda net, x: x @ net.second,
    "the other way round": lambda net, x: net.first @ x,
    "plus one": lambda net, x: x @ net.first + 1,
    "plus two": lambda net, x: x @ net.first + 2,
    "plus one, in place": _add_in_place,
    "transposed": lambda net, x: x @ net.first.T,
    "rows": lambda net, x: (x @ net.first)[:2],
    "other rows": lambda net, x: (x @ net.first)[2:],
    "a constant": lambda net, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "another constant": lambda net, x: x * torch.tensor([1.0, 2.0, 3.0, 5.0]),
    "view written before it is read": _view_written_before,
    "view written after it was read": _view_written_after,
    "written through a view": _written_through_a_view,
    "written elsewhere": _written_elsewhere,
    "two draws": _two_draws,
    "one draw": _one_draw,
    "scaled dot product": lambda net, x: nn.functional.scaled_dot_product_attention(x, net.first, net.second),
    "other scale": lambda net, x: nn.functional.scaled_dot_product_attention(x, net.first, net.second, scale=0.3),
    "eval norm": lambda net, x: nn.functional.batch_norm(x, net.seen, net.seen + 1),
    "train norm": lambda net, x: nn.functional.batch_norm(x, net.seen, net.seen + 1, training=True),
    "eval norm, other epsilon": lambda net, x: nn.functional.batch_norm(x, net.seen, net.seen + 1, eps=0.5),
}
X = torch.linspace(-1, 1, 16).reshape(4, 4) ** 3


def _numbers(twins, module, inputs):
    twin = twins.copy(module)
    with twins.running() as numbering:
        return numbering.of(twin(*inputs))


@pytest.mark.parametrize("one", BODIES)
def test_a_computation_has_the_numbers_of_its_copy(one):
    twins = WithoutValues()
    net = _Net(BODIES[one])
    inputs = twins.inputs([X])
    assert _numbers(twins, net, inputs) == _numbers(twins, net, inputs)


def test_equal_numbers_only_where_values_are_equal():
    twins = WithoutValues()
    net = _Net(None)
    inputs = twins.inputs([X])
    values, numbers = {}, {}
    for name, body in BODIES.items():
        net.body = body
        numbers[name] = _numbers(twins, net, inputs)
        torch.manual_seed(1)
        values[name] = copy.deepcopy(net)(X)
    for one, other in itertools.combinations(BODIES, 2):
        same = values[one].shape == values[other].shape and torch.equal(values[one], values[other])
        assert same or numbers[one] != numbers[other], f"{one} and {other}"
    assert numbers["product"] == numbers["something unused besides"], "what is not used does not count"


def test_what_is_tied_is_told_from_what_is_equal():
    twins = WithoutValues()
    tied = _Net(lambda net, x: x @ net.second)
    tied.second = tied.first
    inputs = twins.inputs([X])
    first = _numbers(twins, tied, inputs)
    tied.body = lambda net, x: x @ net.first
    assert _numbers(twins, tied, inputs) == first


def test_modules_that_share_tensors_share_numbers_and_are_left_alone():
    def forward(net, x):
        net.kept = x @ net.first
        return net.kept

    one, other = _Net(forward), _Net(forward)
    other.first = one.first
    twins = WithoutValues()
    inputs = twins.inputs([X])
    assert _numbers(twins, one, inputs) == _numbers(twins, other, inputs)
    other.first = nn.Parameter(one.first.detach().clone())
    assert _numbers(twins, one, inputs) != _numbers(twins, other, inputs)
    assert not hasattr(one, "kept"), "what a forward puts aside goes into the copy"
    assert not one.first.is_meta


def test_writes_of_one_run_are_gone_in_the_next():
    def forward(net, x):
        result = x + net.seen
        net.seen.add_(1)
        return result

    twins = WithoutValues()
    net = _Net(forward)
    inputs = twins.inputs([X])
    assert _numbers(twins, net, inputs) == _numbers(twins, net, inputs)
    twin = twins.copy(net)
    with twins.running() as numbering:
        once, again = numbering.of(twin(*inputs)), numbering.of(twin(*inputs))
    assert once != again


def test_values_that_come_from_nowhere_are_refused():
    twins = WithoutValues()
    net = _Net(lambda net, x: x + net.stray)
    inputs = twins.inputs([X])
    net.stray = torch.empty(4, 4, device="meta")
    with pytest.raises(UnseenValueError):
        _numbers(twins, net, inputs)


def test_values_that_steer_are_not_guessed():
    twins = WithoutValues()
    net = _Net(lambda net, x: x if x.sum() > 0 else -x)
    inputs = twins.inputs([X])
    with pytest.raises(RuntimeError):
        _numbers(twins, net, inputs)


def _own_generator(net, x):
    return torch.rand(4, generator=torch.Generator().manual_seed(3))


def _written_where_it_was_moved(net, x):
    y = x @ net.first
    y.to("cpu").add_(1)
    return y


def _written_into_a_constant(net, x):
    net.plain.copy_(x[0])
    return net.plain


@pytest.mark.parametrize("body", [_own_generator, _written_where_it_was_moved, _written_into_a_constant])
def test_what_cannot_be_followed_is_refused(body):
    twins = WithoutValues()
    inputs = twins.inputs([X])
    with pytest.raises(UnseenValueError):
        _numbers(twins, _Net(body), inputs)


def test_constants_that_are_kept_elsewhere_have_values_and_nothing_is_drawn():
    kept = {}

    def body(net, x):
        kept["ramp"] = torch.linspace(0, 1, 4)
        torch.manual_seed(5)
        return x * kept["ramp"] + torch.rand(4)

    twins = WithoutValues()
    inputs = twins.inputs([X])
    net = _Net(body)
    state = torch.get_rng_state()
    _numbers(twins, net, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(kept["ramp"], torch.linspace(0, 1, 4))
