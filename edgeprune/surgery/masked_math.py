"""What an operation means when some of the entries that it runs over are removed: our own definitions, written down once.

A removed position is NaN. `Gone` positions of an axis are those where every value is NaN; what runs over an axis runs over
the rest. Nothing here is shared with the cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgeprune.errors import SurgeryError

Tensor = torch.Tensor

_AT_ONCE = 1 << 25
"""Scores of an attention that are held at once."""


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """A vector as a tensor of so many axes that lies along one of them."""
    view = [1] * rank
    view[axis] = -1
    return values.reshape(view)


def gone_along(x: Tensor, dim: int) -> Tensor:
    """True per position of one axis where every value is NaN."""
    return x.isnan().movedim(dim, 0).reshape(x.shape[dim], -1).all(dim=1)


def left_of(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Without the removed positions of some axes; also which positions are left of each of them."""
    left = []
    for dim in dims:
        gone = gone_along(x, dim)
        # Where all is gone it went along another axis, or there is nothing to run over.
        kept = torch.arange(len(gone)) if bool(gone.all()) else (~gone).nonzero().flatten()
        left.append(kept)
        if len(kept) < len(gone):
            x = x.index_select(dim, kept)
    return x, left


def put_back(found: Tensor, like: Tensor, dims: Sequence[int], left: Sequence[Tensor]) -> Tensor:
    """A result in the full shape, removed positions marked."""
    for dim, kept in zip(dims, left, strict=True):
        if len(kept) < like.shape[dim]:
            shape = list(found.shape)
            shape[dim] = like.shape[dim]
            found = found.new_full(shape, float("nan")).index_copy(dim, kept, found)
    return found


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None, *, log: bool) -> Tensor:
    """Softmax over the entries that are left."""
    some, left = left_of(x if dtype is None else x.to(dtype), [dim])
    shifted = some - some.amax(dim, keepdim=True)
    total = shifted.exp().sum(dim, keepdim=True)
    found = shifted - total.log() if log else shifted.exp() / total
    return put_back(found, x, [dim], left)


def normalized_over(x: Tensor, dims: Sequence[int], epsilon: float, *, centered: bool) -> Tensor:
    """Each row minus its mean (where `centered`), over the root of its mean square, over the entries that are left."""
    some, left = left_of(x, dims)
    if centered:
        some = some - some.mean(tuple(dims), keepdim=True)
    some = some * (some.square().mean(tuple(dims), keepdim=True) + epsilon).rsqrt()
    return put_back(some, x, dims, left)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Over the last axes."""
    x = _gone_with(x, weight)
    found = normalized_over(x, range(x.ndim - len(shape), x.ndim), epsilon, centered=True)
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, epsilon: float | None) -> Tensor:
    """Over the last axes, without centering."""
    x = _gone_with(x, weight)
    epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    found = normalized_over(x, range(x.ndim - len(shape), x.ndim), epsilon, centered=False)
    return found if weight is None else found * weight


def _gone_with(x: Tensor, weight: Tensor | None) -> Tensor:
    """Entries whose weight is removed are removed, also where no layer made them: zeros from a padding, say."""
    return x if weight is None else x.masked_fill(weight.isnan(), math.nan)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Over the channels of each group and all positions."""
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    x = x if weight is None else _gone_with(x, weight.reshape(per_channel))
    found = torch.cat(
        [
            normalized_over(part, range(1, x.ndim), epsilon, centered=True)
            for part in torch.split(x, x.shape[1] // groups, dim=1)
        ],
        dim=1,
    )
    found = found if weight is None else found * weight.reshape(per_channel)
    return found if bias is None else found + bias.reshape(per_channel)


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """``torch.matmul`` over the contracted positions that are left, which must be the same on both sides."""
    rows, columns = one.ndim - 1, max(other.ndim - 2, 0)
    gone_one, gone_other = _inside(one, rows), _inside(other, columns)
    if not torch.equal(gone_one, gone_other):
        index = int((gone_one != gone_other).nonzero()[0])
        raise SurgeryError(f"a product must not read units that the plan removes, found contracted position {index}.")
    return torch.matmul(_emptied(one, rows, gone_one), _emptied(other, columns, gone_other))


def einsum(equation: str, operands: Sequence[Tensor]) -> Tensor:
    """``torch.einsum``, its sums over the positions that are left, which must be the same for all operands."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    named = left.replace("...", "").replace(",", "")
    summed = {letter for letter in named if (letter not in right if arrow else named.count(letter) > 1)}
    found = list(operands)
    for letter in sorted(summed):
        places = [(index, _place(term, letter)) for index, term in enumerate(terms) if letter in term]
        gone = [_inside(found[index], axis % found[index].ndim) for index, axis in places]
        gone = [mask for mask, (index, axis) in zip(gone, places, strict=True) if found[index].shape[axis] > 1]
        if any(not torch.equal(gone[0], mask) for mask in gone[1:]):
            raise SurgeryError(
                f"einsum {equation!r} must not read units that the plan removes, found some of {letter!r}."
            )
        for index, axis in places:
            if gone and found[index].shape[axis] > 1:
                found[index] = _emptied(found[index], axis % found[index].ndim, gone[0])
    return torch.einsum(equation, *found)


def _place(term: str, letter: str) -> int:
    """Axis of a letter in one operand, from the end where an ellipsis comes before it."""
    before, _, after = term.partition("...")
    return before.index(letter) if letter in before else after.index(letter) - len(after)


def bilinear(one: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``one weight other + bias`` with weight [out, in1, in2]."""
    found = einsum("...i,oij,...j->...o", (one, weight, other))
    return found if bias is None else found + bias


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """``v * g / norm of v``, the norm over what is left of all axes but one."""
    dims = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    some, left = left_of(v, dims)
    return put_back(some * (g / some.square().sum(dims, keepdim=True).sqrt()), v, dims, left)


def marks_of(operands: Sequence[object]) -> list[Tensor]:
    """Where the tensors among them are removed."""
    return [value.isnan() for value in operands if isinstance(value, torch.Tensor) and value.is_floating_point()]


def marked(found: Tensor, marks: Sequence[Tensor], *, in_place: bool) -> Tensor:
    """A result with the marks of what it was made of, for operations that put other values in the place of some."""
    for gone in marks if found.is_floating_point() else ():
        found = found.masked_fill_(gone, math.nan) if in_place else found.masked_fill(gone, math.nan)
    return found


def pad(x: Tensor, amounts: Sequence[int], mode: str, value: float | None) -> Tensor:
    """``F.pad``; what is removed along the axes that are not padded is removed at the new positions too."""
    found = F.pad(x, list(amounts), mode, value)
    for axis in range(x.ndim - len(amounts) // 2):
        found = _marked_along(found, axis, gone_along(x, axis))
    return found


def windows(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """``F.unfold``; a removed channel is removed where its window lies on the padding too."""
    found = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    channels = x.shape[-3]
    return _marked_along(found, -2, gone_along(x, -3).repeat_interleave(found.shape[-2] // channels))


def sampled(x: Tensor, grid: Tensor, mode: int, padding: int, corners: bool) -> Tensor:
    """``F.grid_sample`` with its modes as numbers; a removed channel is removed outside of the input too."""
    return _marked_along(torch.grid_sampler(x, grid, mode, padding, corners), 1, gone_along(x, 1))


def unpooled(x: Tensor, places: Tensor, size: Sequence[int], *sliding: Sequence[int]) -> Tensor:
    """``F.max_unpool2d`` and ``3d`` (with stride and padding); a removed channel is removed where its zeros are too."""
    unpool = torch.ops.aten.max_unpool3d if len(size) == 3 else torch.ops.aten.max_unpool2d
    return _marked_along(unpool(x, places, list(size), *map(list, sliding)), 1, gone_along(x, 1))


def _marked_along(found: Tensor, axis: int, gone: Tensor) -> Tensor:
    return found.masked_fill(along(gone, axis, found.ndim), math.nan) if found.is_floating_point() else found


def _inside(x: Tensor, dim: int) -> Tensor:
    """Positions of one axis that are removed for some of the other positions that are not removed themselves."""
    gone = x.isnan()
    elsewhere = gone.all(dim=dim, keepdim=True)
    return (gone & ~elsewhere).movedim(dim, 0).reshape(x.shape[dim], -1).any(dim=1)


def _emptied(x: Tensor, dim: int, gone: Tensor) -> Tensor:
    """Zero at removed positions of one axis; what was removed along another axis stays marked."""
    elsewhere = x.isnan().all(dim=dim, keepdim=True)
    return x.masked_fill(along(gone, dim, x.ndim) & ~elsewhere, 0.0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> Tensor:
    """``softmax(query key^T * scale + mask) value``; the scale is that of the original head dimension.

    Some rows at a time: all scores of thousands of tokens would take gigabytes.
    """
    heads = query.shape[-3] if query.ndim > 2 else 1
    if query.ndim > 2 and 1 < key.shape[-3] < heads:
        key, value = (x.repeat_interleave(heads // x.shape[-3], dim=-3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    length, width = query.shape[-2], key.shape[-2]
    if causal:
        mask = torch.ones((length, width), dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], length, mask.shape[-1])
    rows = max(1, _AT_ONCE * length // max(1, query.shape[:-1].numel() * width))
    found = [
        _attention_of(query[..., start : start + rows, :], key, value, _rows(mask, start, rows), scale)
        for start in range(0, length, rows)
    ]
    return torch.cat(found, dim=-2)


def _rows(mask: Tensor | None, start: int, count: int) -> Tensor | None:
    return None if mask is None else mask[..., start : start + count, :]


def _attention_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = matmul(query, key.transpose(-1, -2)) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask & ~scores.isnan(), -math.inf)
    elif mask is not None:
        scores = scores + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ value
