"""Find the numbers of a member that a graph would compute anew for every few elements of its tensors."""

from typing import Any

from torch import Tensor, fx

__all__ = ["costly_scalars"]

_COSTLY = ("pow", "div", "reciprocal", "sqrt", "rsqrt", "exp", "log")
_VIEWS = ("view", "reshape", "unsqueeze", "squeeze", "expand", "alias")


def costly_scalars(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Calls that give one number for each member (a bias correction, a clipping factor) and are used for whole tensors.

    Inductor computes such a chain inside of the loop over the tensor's elements, where a compiler cannot move it out: the
    loop writes to memory that may be what the chain reads. As outputs of the graph they are computed once.

    Args:
        graph: of a population.
        count: of its members.
    """
    costly: dict[fx.Node, bool] = {}
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            costly[node] = False
            continue
        small = _size(node) <= count
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        costly[node] = small and (
            name in _COSTLY or any(costly[part] and _size(part) <= count for part in node.all_input_nodes)
        )
        if not small and name not in _VIEWS:
            for part in node.all_input_nodes:
                base = _base(part)
                if costly[base] and _size(base) <= count:
                    found[base] = None
    return list(found)


def _size(node: fx.Node) -> float:
    value: Any = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else float("inf")


def _base(node: fx.Node) -> fx.Node:
    """The call behind views that make a number for each member fit to a tensor."""
    while node.op == "call_function" and str(node.target).removeprefix("aten.").partition(".")[0] in _VIEWS:
        node = node.all_input_nodes[0]
    return node
