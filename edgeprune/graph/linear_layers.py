"""Linear layers that another module could stand in for: which of them forward calls as a module, and which it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Node

from edgeprune.graph.capture import module_path
from edgeprune.graph.rules._base import named_arguments

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph

_LINEAR = "aten.linear.default"
_POINTWISE = (
    "alias", "celu", "clone", "contiguous", "dropout", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "log_softmax", "mish", "relu", "relu6", "select", "selu", "sigmoid", "silu", "slice", "softmax", "softplus", "squeeze",
    "tanh", "to", "transpose", "unsqueeze", "view",
)  # fmt: skip
"""What may lie between a classifier and the output of a model."""
_ELEMENT_WISE = (
    "alias", "celu", "clone", "contiguous", "dropout", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "tanh",
)  # fmt: skip
"""Functions of one tensor that do the same to every element."""


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model, by the names of their weights, in program order.

    Attributes:
        replaceable: Weights of ``nn.Linear`` modules that forward calls, and that nothing else reads.
        classifiers: Those among them whose output goes to an output of the model, and nowhere else.
        others: Weights of other ``nn.Linear`` modules, with the reason why no other module can stand in for them.
    """

    replaceable: tuple[str, ...]
    classifiers: frozenset[str]
    others: dict[str, str]


def linear_layers(model: nn.Module, graph: ChannelGraph) -> LinearLayers:
    """Sort the ``nn.Linear`` modules of a model.

    Args:
        model: The traced model.
        graph: Its trace.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    readers = readers_of_parameters(graph)
    modules = {
        f"{path}.weight" if path else "weight": (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    reasons: dict[str, str] = {}
    for name, (path, module) in modules.items():
        nodes = readers.get(name, [])
        if not path:
            reasons[name] = "it is the model itself"
        elif id(module.weight) not in names or name not in names[id(module.weight)]:
            reasons[name] = "its weight is computed from other parameters"
        elif len(names[id(module.weight)]) > 1:
            reasons[name] = f"its weight is also {next(n for n in names[id(module.weight)] if n != name)!r}"
        elif type(module).forward is not nn.Linear.forward or module._forward_hooks or module._forward_pre_hooks:
            reasons[name] = "its class or a hook changes what it computes"
        elif not nodes:
            reasons[name] = "forward does not read its weight, or not as a parameter of the traced program"
        elif any(str(node.target) != _LINEAR or module_path(node) != path for node in nodes):
            reasons[name] = "forward reads its weight without calling the layer"
    good = [name for name in readers if name in modules and name not in reasons]
    return LinearLayers(
        tuple(good), frozenset(name for name in good if all(_is_last(node) for node in readers[name])), reasons
    )


@dataclass(frozen=True)
class LinearChain:
    """Two linear layers with nothing but element-wise operations between them: only the second reads what the first makes.

    Attributes:
        producer: Weight of the first layer.
        consumer: Weight of the second.
        operations: Between them, each on the result of the one before.
    """

    producer: str
    consumer: str
    operations: tuple[Node, ...]


def linear_chains(graph: ChannelGraph) -> tuple[LinearChain, ...]:
    """All such pairs of layers that other modules could stand in for, in program order."""
    names = linear_layers(graph.model, graph).replaceable
    readers = {name: nodes for name, nodes in readers_of_parameters(graph).items() if name in names and len(nodes) == 1}
    consumers = {nodes[0]: name for name, nodes in readers.items()}
    found = []
    for name, (start,) in readers.items():
        between: list[Node] = []
        node = start
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user in consumers and named_arguments(user)["input"] is node:
                found.append(LinearChain(name, consumers[user], tuple(between)))
            if str(user.target).removeprefix("aten.").partition(".")[0].rstrip("_") not in _ELEMENT_WISE:
                break
            between.append(user)
            node = user
    return tuple(found)


def readers_of_parameters(graph: ChannelGraph) -> dict[str, list[Node]]:
    """The operations that read each parameter, parameters in the order in which they are first read."""
    targets = graph.program.graph_signature.inputs_to_parameters
    nodes = {node.name: node for node in graph.program.graph.nodes if node.op == "placeholder"}
    found = {target: list(nodes[name].users) for name, target in targets.items() if name in nodes}
    order = {node: index for index, node in enumerate(graph.program.graph.nodes)}
    first = {name: min((order[node] for node in users), default=len(order)) for name, users in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: first[name])}


def _is_last(node: Node) -> bool:
    """Whether nothing but functions of one tensor lies between an operation and the outputs."""
    for user in node.users:
        if user.op == "output":
            continue
        kind = str(user.target).removeprefix("aten.").partition(".")[0].rstrip("_")
        if kind not in _POINTWISE or len(user.all_input_nodes) != 1 or not _is_last(user):
            return False
    return bool(node.users)
