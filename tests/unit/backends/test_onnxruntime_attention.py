"""Fused attention of any number of axes is exported, and gives what torch gives."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgeprune.backends.onnxruntime.exporting import SOURCES_KEY, export


class _Windows(nn.Module):
    """Attention over the last two of several axes, as of windows of windows."""

    def __init__(self, leading, mask):
        super().__init__()
        torch.manual_seed(0)
        self.leading, self.qkv = leading, nn.Linear(8, 24)
        self.register_buffer("mask", None if mask is None else torch.randn(mask))

    def forward(self, x):
        query, key, value = self.qkv(x.reshape(*self.leading, 6, 8)).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask).exp()


@pytest.mark.parametrize(
    ("leading", "mask"),
    [
        ((2,), None),
        ((2,), (6, 6)),
        ((2,), (2, 6, 6)),
        ((2, 3), None),
        ((2, 3, 4), None),
        ((2, 3, 4), (6, 6)),
        ((2, 3, 4), (4, 6, 6)),
        ((2, 3, 4), (2, 1, 4, 6, 6)),
        ((1, 2, 3, 4), None),
    ],
)
def test_attention_over_any_number_of_axes(tmp_path, leading, mask):
    net = _Windows(leading, mask)
    x = torch.randn(leading[0], 6 * 8 * int(np.prod(leading[1:])))
    export(net, (x,), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    sources = set(json.loads(session.get_modelmeta().custom_metadata_map[SOURCES_KEY]).values())
    traced = {node.name for node in torch.export.export(net, (x,), strict=False).graph.nodes}
    assert "scaled_dot_product_attention" in sources
    assert sources <= traced, "what was added comes from the attention"
