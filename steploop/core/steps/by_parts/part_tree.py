"""The binary tree by which parts are summed: each node is cut in the middle."""

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Node", "join", "nodes_of"]

# The parts from the first number up to the second, without that one.
Node = tuple[int, int]


@functools.cache
def _parents(total: int) -> dict[Node, Node]:
    """Each node's parent in the tree over ``total`` parts, every node of which is cut in the middle."""
    found: dict[Node, Node] = {}
    nodes = [(0, total)]
    for start, stop in nodes:
        if stop - start > 1:
            middle = (start + stop) // 2
            halves = [(start, middle), (middle, stop)]
            found |= dict.fromkeys(halves, (start, stop))
            nodes += halves
    return found


def join(nodes: list[tuple[Node, Any]], total: int, add: Callable[[Any, Any], Any]) -> None:
    """Add the last two values as long as their nodes are the halves of one."""
    parents = _parents(total)
    while len(nodes) > 1 and parents.get(nodes[-2][0]) == parents.get(nodes[-1][0], 0):
        (node, right), (_, left) = nodes.pop(), nodes.pop()
        nodes.append((parents[node], add(left, right)))


@functools.cache
def nodes_of(numbers: range, total: int) -> tuple[Node, ...]:
    """The largest nodes that the parts ``numbers`` make up."""
    nodes: list[tuple[Node, Any]] = []
    for number in numbers:
        nodes.append(((number, number + 1), None))
        join(nodes, total, lambda *_: None)
    return tuple(node for node, _ in nodes)
