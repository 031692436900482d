"""Remove from a graph what costs time at every call: unread inputs, repeated or unchanged outputs."""

from typing import Any

import attrs
import torch
from torch import Tensor, fx

__all__ = ["Wiring", "constants_to_inputs", "prune", "straighten", "without_unread"]

_aten = torch.ops.aten


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


def straighten(module: fx.GraphModule) -> None:
    """Remove the calls of a functional graph that give what they take: aliases, copies, and views there and back."""
    graph = module.graph
    output = graph.output_node()
    for node in list(graph.nodes):
        source = _same(node)
        # an output that is a copy keeps the value that an input has before it is written into
        if source is not None and not (node.target is _aten.clone.default and output in node.users):
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def _same(node: fx.Node) -> fx.Node | None:
    """The node whose value a call gives unchanged, laid out alike."""
    args: Any = node.args
    if node.target in {_aten.alias.default, _aten.detach.default, _aten.clone.default}:
        source = args[0]
    elif node.target is _aten.copy.default:
        source = args[1]
    elif node.target in {_aten.view.default, _aten.permute.default}:
        before = args[0]
        if before.target is not node.target:
            return None
        source = before.args[0]
        if node.target is _aten.permute.default and [before.args[1][i] for i in args[1]] != sorted(args[1]):
            return None
    else:
        return None
    now, then = node.meta.get("val"), source.meta.get("val")
    if not isinstance(now, Tensor) or not isinstance(then, Tensor):
        return None
    alike = (now.shape, now.stride(), now.dtype, now.device) == (
        then.shape,
        then.stride(),
        then.dtype,
        then.device,
    )
    return source if alike else None


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
    return Wiring(without_unread(module), tuple(given))


def without_unread(module: fx.GraphModule) -> tuple[int, ...]:
    """Remove the calls and inputs that nothing reads any more; which inputs are left."""
    graph = module.graph
    graph.eliminate_dead_code()
    inputs = []
    for index, node in enumerate([node for node in graph.nodes if node.op == "placeholder"]):
        if node.users:
            inputs.append(index)
        else:
            graph.erase_node(node)
    module.recompile()
    return tuple(inputs)


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
    if constants:
        graph.recompile()
    return constants
