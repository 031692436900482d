"""Numbers that stand in the graphs of members and differ: found, and made inputs of one graph."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from steploop.errors import CompileError

__all__ = ["Literal", "call_with_literals", "differing_literals"]


@attrs.frozen
class Literal:
    """A number that differs between members.

    Attributes:
        node: which node of the graph has it as an argument.
        place: index or name of the argument.
        values: of each graph.
    """

    node: int
    place: int | str
    values: tuple[float, ...]


def differing_literals(graphs: Sequence[fx.Graph], describe: Callable[[int], str]) -> list[Literal]:
    """Compare graphs node by node; the numbers in which they differ.

    Args:
        graphs: of the members' steps.
        describe: what a message says of the graph at an index, beside the first.

    Raises:
        CompileError: the graphs differ in more than numbers.
    """
    first, *others = [list(graph.nodes) for graph in graphs]
    found: dict[tuple[int, int | str], list[Any]] = {}
    for which, nodes in enumerate(others, 1):
        place = {node: i for i, node in enumerate(nodes)}
        own = {node: i for i, node in enumerate(first)}
        for index, (mine, theirs) in enumerate(zip(first, nodes, strict=False)):
            if (mine.op, mine.target) != (theirs.op, theirs.target):
                raise CompileError(
                    f"is another graph for {describe(which)}: it calls {_name(theirs)} where the other calls {_name(mine)}. "
                    "Members of a population may differ in numbers, not in what is computed: train them apart."
                )
            left, right = dict(_arguments(mine)), dict(_arguments(theirs))
            if left.keys() != right.keys():
                raise CompileError(f"calls {_name(mine)} with other arguments for {describe(which)}.")
            for key, a in left.items():
                b = right[key]
                if _same(a, b, own, place):
                    continue
                if type(a) is not float or type(b) is not float:
                    raise CompileError(
                        f"calls {_name(mine)} with {_shown(a)} and, for {describe(which)}, with {_shown(b)}, which no input of a "
                        "graph can be. Train these members apart."
                    )
                values = found.setdefault((index, key), [a] * len(graphs))
                values[which] = b
        if len(first) != len(nodes):
            raise CompileError(f"is another graph for {describe(which)}: it makes more or fewer calls.")
    return [Literal(node, key, tuple(values)) for (node, key), values in found.items()]


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _shown(value: Any) -> str:
    return f"the result of {_name(value)}" if isinstance(value, fx.Node) else repr(value)


def _arguments(node: fx.Node) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(node.args)
    yield from node.kwargs.items()


def _same(a: Any, b: Any, left: dict[fx.Node, int], right: dict[fx.Node, int]) -> bool:
    if isinstance(a, fx.Node):
        return isinstance(b, fx.Node) and left[a] == right[b]
    if isinstance(a, (list, tuple)):
        return (
            isinstance(b, (list, tuple))
            and len(a) == len(b)
            and all(_same(x, y, left, right) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, float):
        return isinstance(b, float) and (repr(a) == repr(b) or (math.isnan(a) and math.isnan(b)))
    return bool(type(a) is type(b) and a == b)


# -- a call with tensors in the places of numbers ------------------------------------------------------------------------

_WITH_TENSORS: dict[str, Callable[..., Any]] = {
    "aten.add.Scalar": torch.add,
    "aten.sub.Scalar": torch.sub,
    "aten.mul.Scalar": torch.mul,
    "aten.div.Scalar": torch.div,
    "aten.rsub.Scalar": torch.rsub,
    "aten.remainder.Scalar": torch.remainder,
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.pow.Scalar": torch.pow,
    "aten.lerp.Scalar": torch.lerp,
    "aten.clamp_min.default": torch.maximum,
    "aten.clamp_max.default": torch.minimum,
    "aten.eq.Scalar": torch.eq,
    "aten.ne.Scalar": torch.ne,
    "aten.lt.Scalar": torch.lt,
    "aten.le.Scalar": torch.le,
    "aten.gt.Scalar": torch.gt,
    "aten.ge.Scalar": torch.ge,
    "aten.where.ScalarOther": torch.where,
    "aten.where.ScalarSelf": torch.where,
    "aten.where.Scalar": torch.where,
    "aten.full.default": lambda size, value, **_: value.expand(size).clone(),
    "aten.scalar_tensor.default": lambda value, **_: value.clone(),
    "aten.clamp.default": lambda x, low=None, high=None: torch.clamp(x, _as(low, x), _as(high, x)),
}
_WITH_ALPHA: dict[str, Callable[..., Any]] = {"aten.add.Tensor": torch.add, "aten.sub.Tensor": torch.sub}
_WITH_VALUE: dict[str, Callable[..., Any]] = {
    "aten.addcmul.default": torch.mul,
    "aten.addcdiv.default": torch.div,
}
_NARROW = {torch.bfloat16, torch.float16}


def _as(bound: Any, like: Tensor) -> Any:
    return bound if bound is None or isinstance(bound, Tensor) else torch.full_like(like, bound)


def call_with_literals(node: fx.Node, args: Sequence[Any], lifted: dict[int | str, Tensor]) -> Any:
    """Call a node's function with tensors of shape () in the places of some numbers.

    Args:
        node: of the graph.
        args: what stands for ``node.args`` and then ``node.kwargs``.
        lifted: index or name of an argument -> number of the member, in float64.

    Raises:
        CompileError: the call takes numbers only.
    """
    result = node.meta["val"].dtype
    tensors = [a for a in args if isinstance(a, Tensor)]
    floating = [t.dtype for t in tensors if t.dtype.is_floating_point]
    dtype = floating[0] if floating else (result if result.is_floating_point else torch.get_default_dtype())
    narrow = dtype in _NARROW
    if narrow:  # torch computes with the number in float32 and rounds at the end
        dtype = torch.float32
        args = [a.float() if isinstance(a, Tensor) and a.dtype in _NARROW else a for a in args]
    positional, named = (
        list(args[: len(node.args)]),
        dict(zip(node.kwargs, args[len(node.args) :], strict=True)),
    )
    for place, value in lifted.items():
        if isinstance(place, int):
            positional[place] = value.to(dtype)
        else:
            named[place] = value.to(dtype)
    found = _called(str(node.target), node.target, positional, named, set(lifted))
    return found.to(result) if found.dtype != result else found


def _called(name: str, target: Any, args: list[Any], kwargs: dict[str, Any], lifted: set[int | str]) -> Any:
    if name in _WITH_ALPHA and "alpha" in kwargs:
        return _WITH_ALPHA[name](args[0], args[1] * kwargs["alpha"])
    if name in _WITH_VALUE and "value" in kwargs:
        return args[0] + _WITH_VALUE[name](args[1], args[2]) * kwargs["value"]
    if name in _WITH_TENSORS:
        return _WITH_TENSORS[name](*args, **kwargs)
    arguments = target._schema.arguments
    takes: dict[int | str, Any] = {**dict(enumerate(arguments)), **{a.name: a for a in arguments}}
    if all(isinstance(takes[place].type, torch._C.TensorType) for place in lifted):
        return target(*args, **kwargs)
    raise CompileError(
        f"calls {name.removesuffix('.default')} with numbers that differ between members, and it takes no tensor in their place. "
        "Train these members apart."
    )
