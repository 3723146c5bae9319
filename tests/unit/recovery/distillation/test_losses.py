"""Each distillation loss against its formula, written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.errors import ConfigError
from edgeprune.recovery.distillation import registry
from edgeprune.recovery.distillation.attention import Attention
from edgeprune.recovery.distillation.channelwise import Channelwise
from edgeprune.recovery.distillation.features import Features
from edgeprune.recovery.distillation.logits import Logits
from edgeprune.testing.distillation import DistillationConformance


class TestLogits(DistillationConformance):
    def distillation(self):
        return Logits()


class TestFeatures(DistillationConformance):
    def distillation(self):
        return Features()


class TestChannelwise(DistillationConformance):
    def distillation(self):
        return Channelwise()


class TestAttention(DistillationConformance):
    def distillation(self):
        return Attention()


def pair(shape=(2, 3, 8), seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=shape), random.normal(size=shape)


def found(loss, student, teacher):
    return float(loss.loss(torch.tensor(student), torch.tensor(teacher)))


def test_features_are_squared_differences_over_the_squares_of_the_dense_ones():
    student, teacher = pair()
    above = sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat, strict=True))
    assert found(Features(), student, teacher) == pytest.approx(above / sum(t**2 for t in teacher.flat))
    assert found(Features(), 7 * student, 7 * teacher) == pytest.approx(above / (teacher**2).sum())


def test_channelwise_is_the_divergence_of_spatial_softmaxes():
    student, teacher = pair()
    temperature = 2.5
    total = 0.0
    for image in range(2):
        for channel in range(3):
            p, q = (np.exp(values[image, channel] / temperature) for values in (teacher, student))
            p, q = p / p.sum(), q / q.sum()
            total += sum(p[i] * np.log(p[i] / q[i]) for i in range(8))
    assert found(Channelwise(temperature), student, teacher) == pytest.approx(temperature**2 / 3 * total / 2)


def test_channelwise_sees_where_a_channel_looks_and_not_its_level():
    student, teacher = pair()
    loss = found(Channelwise(), student, teacher)
    assert found(Channelwise(), student + np.array([3.0, -1.0, 0.5])[:, None], teacher) == pytest.approx(loss)
    assert found(Channelwise(), student[:, :, ::-1].copy(), teacher) != pytest.approx(loss, rel=1e-2)
    flat = 0.1 * student, 0.1 * teacher
    assert 0.25 < found(Channelwise(8.0), *flat) / found(Channelwise(4.0), *flat) < 4.0


def test_attention_is_the_difference_of_normalized_maps():
    student, teacher = pair((2, 3, 8))
    total = 0.0
    for image in range(2):
        maps = []
        for values in (student, teacher):
            energy = [sum(values[image, c, i] ** 2 for c in range(values.shape[1])) for i in range(8)]
            length = sum(one**2 for one in energy) ** 0.5
            maps.append([one / length for one in energy])
        total += sum((one - two) ** 2 for one, two in zip(*maps, strict=True))
    assert found(Attention(), student, teacher) == pytest.approx(total / 2)


def test_attention_has_no_channels_and_no_scale():
    student, teacher = pair((2, 3, 8))
    _, wide = pair((2, 7, 8), seed=1)
    assert found(Attention(), student, wide) > 0
    loss = found(Attention(), student, teacher)
    assert found(Attention(), 5 * student[:, [2, 0, 1]], teacher) == pytest.approx(loss)


def test_the_table_makes_each_by_its_name():
    made = {name: registry.get(name, temperature=3.0) for name in registry.names()}
    assert {name: one.name for name, one in made.items()} == {name: name for name in made}
    assert {one.temperature for one in made.values()} == {3.0}
    assert made["attention"].whole_teacher
    with pytest.raises(ConfigError, match=r"must be one of logits, .*, found 'logit'"):
        registry.require_names(["features", "logit"])
