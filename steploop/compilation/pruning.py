"""Remove from a graph what costs time at every call: unread inputs, repeated or unchanged outputs."""

from typing import Any

import attrs
import torch
from torch import Tensor, fx

__all__ = ["Wiring", "constants_to_inputs", "prune"]


@attrs.frozen
class Wiring:
    """How to call a pruned graph in place of the whole one.

    Attributes:
        inputs: which of the inputs it takes.
        given: for each output of the whole graph, the pruned one's output at that index; or, where it is an input
            passed through, its index among all inputs, as ``~index``.
    """

    inputs: tuple[int, ...]
    given: tuple[int, ...]


def _source(node: fx.Node) -> fx.Node:
    """Return the node that an alias stands for."""
    while node.target in {torch.ops.aten.alias.default, torch.ops.aten.detach.default}:
        node = node.args[0]  # type: ignore[assignment]  # their only argument is a node
    return node


def prune(module: fx.GraphModule) -> Wiring:
    """Rewrite ``module`` in place; see ``Wiring``."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    place = {node: index for index, node in enumerate(placeholders)}
    output: Any = graph.output_node()
    kept: dict[fx.Node, int] = {}
    given = []
    for node in output.args[0]:
        source = _source(node)
        given.append(~place[source] if source in place else kept.setdefault(source, len(kept)))
    output.args = (tuple(kept),)
    graph.eliminate_dead_code()
    inputs = []
    for index, node in enumerate(placeholders):
        if node.users:
            inputs.append(index)
        else:
            graph.erase_node(node)
    module.recompile()
    return Wiring(tuple(inputs), tuple(given))


def constants_to_inputs(graph: fx.GraphModule) -> list[Tensor]:
    """Turn every tensor that the graph holds into an input: it may change between calls."""
    constants: list[Tensor] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    by_name: dict[str, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in by_name:
            with graph.graph.inserting_after(last):
                last = by_name[name] = graph.graph.placeholder(f"constant_{len(constants)}")
            constants.append(getattr(graph, name))
        node.replace_all_uses_with(by_name[name])
        graph.graph.erase_node(node)
    graph.recompile()
    return constants
