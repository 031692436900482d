"""Find the parts of a graph that are there once for each parameter, such as the optimizer's update, and take them out.

An update of a hundred parameters is a thousand nodes, which Inductor looks at one by one, and of which it makes a
kernel for every shape. Taken out and seen as flat tensors they are one kernel of any length, called a hundred times.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from steploop.compilation.draws import is_random
from steploop.compilation.pruning import without_unread

__all__ = ["Kernel", "Part", "Run", "Split", "in_parts", "split_repeated"]

# A compiled graph: takes its inputs as a list, which it may empty, and gives its outputs.
Run = Callable[[list[Tensor]], Sequence[Tensor]]

_FEWEST = 16  # equal parts that are worth a kernel of their own; a step of fewer parameters is one graph
_LARGE = 1 << 15  # numbers from which a kernel shares its work among threads

_aten = torch.ops.aten
# besides those that torch marks as working on each number by itself
_ALSO_POINTWISE = {_aten.copy.default, _aten.clone.default, _aten.scalar_tensor.default}

_MAIN = object()  # the owner of what stays


@attrs.frozen
class Kernel:
    """What equal parts compute.

    Attributes:
        kinds: of each input whether it is a single number, and its dtype.
        length: one for which it is compiled with care: the others of its parts are about as large.
    """

    kinds: tuple[tuple[bool, torch.dtype], ...]
    length: int


@attrs.frozen
class Part:
    """One of many equal parts.

    Attributes:
        kernel: which of the distinct ones computes it.
        taken: where its inputs are: the index of an input of the whole, or ``~index`` of an output of the main graph.
        shape: of its tensors.
        stride: of its tensors.
    """

    kernel: int
    taken: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@attrs.frozen
class Split:
    """How a graph without its repeated parts, and these, are called in place of the whole.

    Attributes:
        inputs: which of the inputs of the whole the main graph takes.
        kernels: what the parts compute.
        parts: what is called after the main graph, and with what.
        outputs: for each output of the whole: (-1, index in the main graph) or (number of the part, index in it).
    """

    inputs: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    parts: tuple[Part, ...]
    outputs: tuple[tuple[int, int], ...]


def split_repeated(module: fx.GraphModule) -> tuple[Split, list[fx.GraphModule]] | None:
    """Take the repeated parts out of ``module``, which is rewritten; None, and nothing is, where there are few.

    Returns:
        How to call them, and the graph of each kernel: over flat tensors of one length, into some of which it writes, and
        single numbers.
    """
    graph = module.graph
    found = _found(graph)
    texts: dict[Any, list[_Found]] = defaultdict(list)
    for part in found:
        texts[part.text()].append(part)
    repeated = [part for parts in texts.values() if len(parts) >= _FEWEST for part in parts]
    if not repeated:
        return None
    places = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    output: Any = graph.output_node()
    whole = list(output.args[0])
    moved = {node: (i, part) for i, part in enumerate(repeated) for node in part.nodes}
    kept: dict[fx.Node, int] = {
        node: i for i, node in enumerate(dict.fromkeys(n for n in whole if n not in moved))
    }
    kernels: dict[Any, int] = {}
    made: list[Kernel] = []
    modules = []
    parts = []
    for part in repeated:
        key = part.text(), part.large
        if key not in kernels:
            kernels[key] = len(made)
            made.append(Kernel(part.kinds(), part.numel))
            modules.append(part.module())
        taken = []
        for node in part.taken:
            node = part.flattened(graph, node)  # noqa: PLW2901  (what is handed over)
            taken.append(places[node] if node in places else ~kept.setdefault(node, len(kept)))
        parts.append(Part(kernels[key], tuple(taken), part.shape, part.stride))
    outputs = []
    for node in whole:
        number, owner = moved.get(node, (-1, None))
        outputs.append((number, kept[node] if owner is None else owner.given.index(node)))
    output.args = (tuple(kept),)
    for node in reversed([n for n in graph.nodes if n in moved]):
        graph.erase_node(node)
    return Split(without_unread(module), tuple(made), tuple(parts), tuple(outputs)), modules


def in_parts(split: Split, main: Run, kernels: Sequence[Run]) -> Run:
    """Call the main graph and then each part, as the whole graph would be called."""
    calls = [
        (kernels[part.kernel], part.taken, [number for number, _ in split.kernels[part.kernel].kinds], part.shape, part.stride)
        for part in split.parts
    ]  # fmt: skip

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        made = main([inputs[i] for i in split.inputs])
        given: list[Sequence[Tensor]] = []
        for kernel, taken, numbers, shape, stride in calls:
            tensors = [inputs[i] if i >= 0 else made[~i] for i in taken]
            flat = [t if single else _flat(t) for t, single in zip(tensors, numbers, strict=True)]
            given.append([t.as_strided(shape, stride) for t in kernel(flat)])
        return [made[at] if number < 0 else given[number][at] for number, at in split.outputs]

    return run


def _flat(tensor: Tensor) -> Tensor:
    """All numbers of a tensor without gaps, in the order in which they lie in memory."""
    return tensor if tensor.dim() == 1 else tensor.detach().as_strided((tensor.numel(),), (1,))


class _Found:
    """A part: its nodes in their order, with what it takes from elsewhere and what it gives as outputs of the whole."""

    def __init__(self, nodes: list[fx.Node], outputs: set[fx.Node]) -> None:
        self.nodes = nodes
        own = set(nodes)
        self.taken = list(dict.fromkeys(arg for n in nodes for arg in n.all_input_nodes if arg not in own))
        self.given = [n for n in nodes if n in outputs]
        # a copy_ gives the tensor that it writes into
        whole = next(n for n in nodes if _value(n).dim() > 0)
        written = next((n.args[0] for n in nodes if _is_write(n) and _value(n).dim() > 0), whole)
        self.shape = tuple(_value(whole).shape)
        self.stride: tuple[int, ...] = _value(written).stride()
        self.numel = _value(whole).numel()
        self.large = self.numel >= _LARGE

    def fits(self) -> bool:
        """Whether all tensors of more than one number have one shape, and lie in memory alike and without gaps."""
        device = _value(self.nodes[0]).device
        for node in (*self.nodes, *self.taken):
            value = _value(node)
            if value.device != device or device.type != "cpu":
                return False
            if value.dim() == 0:
                continue
            if tuple(value.shape) != self.shape or value.numel() < 2:
                return False
            if node.op == "placeholder" and value.stride() != self.stride:
                return False
        return _is_dense(self.shape, self.stride) and (
            _value_format(self.shape, self.stride) is not None
            or all(n.op == "placeholder" for n in self.taken)
        )

    def kinds(self) -> tuple[tuple[bool, torch.dtype], ...]:
        """Of each input whether it is a single number, and its dtype."""
        return tuple((_value(n).dim() == 0, _value(n).dtype) for n in self.taken)

    def text(self) -> Any:
        """The same for parts that compute the same, whatever their shape is."""
        names = {node: f"in{i}" for i, node in enumerate(self.taken)}
        names |= {node: f"n{i}" for i, node in enumerate(self.nodes)}
        calls = [
            (str(n.target), str(_value(n).dtype), _value(n).dim() == 0, fx.map_arg((n.args, tuple(n.kwargs.items())), lambda a: names[a]))
            for n in self.nodes
        ]  # fmt: skip
        return repr((self.kinds(), calls, [names[n] for n in self.given]))

    def module(self) -> fx.GraphModule:
        """The part as a graph of its own, over flat tensors."""
        graph = fx.Graph()
        inside = {node: graph.placeholder(f"x{i}") for i, node in enumerate(self.taken)}
        for node in self.nodes:
            if node.target is _aten.clone.default:  # its memory format is of another shape
                inside[node] = graph.call_function(node.target, (inside[node.args[0]],))  # type: ignore[index]
            else:
                inside[node] = graph.node_copy(node, lambda n: inside[n])
        graph.output(tuple(inside[n] for n in self.given))
        return fx.GraphModule(torch.nn.Module(), graph)

    def flattened(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """A tensor of the main graph as it is handed over: in the memory format of what it updates."""
        value = _value(node)
        if node.op == "placeholder" or value.dim() == 0 or value.stride() == self.stride:
            return node
        with graph.inserting_after(node):
            new = graph.call_function(
                _aten.clone.default, (node,), {"memory_format": _value_format(self.shape, self.stride)}
            )
        mode: Any = value.fake_mode  # type: ignore[attr-defined]  # the values of a graph are fake tensors
        with mode:
            new.meta["val"] = torch.empty_strided(
                self.shape, self.stride, dtype=value.dtype, device=value.device
            )
        return new


def _found(graph: fx.Graph) -> list[_Found]:
    """The parts that only lead to writes and outputs, each of one parameter."""
    output = graph.output_node()
    last = [n for n in reversed(list(graph.nodes)) if n.op == "call_function"]
    movable: set[fx.Node] = set()
    for node in last:
        if (
            isinstance(node.meta.get("val"), Tensor)
            and (_is_write(node) or _is_pointwise(node))
            and all(u in movable or u is output for u in node.users)
        ):
            movable.add(node)
    owner = _components(movable)
    # numbers that one part alone needs go with it
    for node in last:
        if node not in movable or _value(node).dim() > 0 or _is_write(node):
            continue
        users = {owner.get(u, _MAIN) for u in node.users if not (_is_write(u) and u not in owner)}
        owner[node] = users.pop() if len(users) == 1 else _MAIN
    for node in last:
        if _is_write(node) and node in movable and node not in owner:
            owner[node] = owner.get(node.args[1], _MAIN)
    members: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if owner.get(node, _MAIN) is not _MAIN:
            members[owner[node]].append(node)
    outputs = set(output.all_input_nodes)
    parts = [_Found(nodes, outputs) for nodes in members.values()]
    parts = [part for part in parts if part.fits()]
    writes = [n for n in graph.nodes if _is_write(n)]
    # what another one writes has its new value when a part is called
    return [
        part for part in parts if not {n.args[0] for n in writes if n not in part.nodes} & {*part.taken}
    ]  # fmt: skip


def _components(movable: set[fx.Node]) -> dict[fx.Node, Any]:
    """Node -> a mark that those have in common that are joined by tensors of more than one number, or by what is written."""
    joined: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while joined.setdefault(node, node) is not node:
            node = joined[node]
        return node

    tensors = [n for n in movable if _value(n).dim() > 0]
    written = {n.args[0] for n in movable if _is_write(n)}
    for node in tensors:
        for other in node.all_input_nodes:
            if (other in movable and _value(other).dim() > 0) or other in written:
                joined[root(node)] = root(other)
    return {node: root(node) for node in tensors}


def _is_write(node: fx.Node) -> bool:
    """Whether a node writes into an input of the graph."""
    first = node.args[0] if node.args else None
    return node.target is _aten.copy_.default and isinstance(first, fx.Node) and first.op == "placeholder"


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_random(node):
        return False
    return torch.Tag.pointwise in target.tags or target in _ALSO_POINTWISE


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _value_format(shape: Sequence[int], stride: Sequence[int]) -> torch.memory_format | None:
    """The memory format of dense tensors of this shape, if it has a name."""
    for fmt in (torch.contiguous_format, torch.channels_last):
        if fmt is torch.channels_last and len(shape) != 4:
            continue
        if torch.empty(tuple(shape), device="meta", memory_format=fmt).stride() == tuple(stride):
            return fmt
    return None
