"""Make one graph of a population from the graph of one member: ``torch.vmap`` over its calls."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from steploop.compilation.aten_graph import CapturedGraph, traced_again
from steploop.compilation.draws import Draws
from steploop.compilation.kept_graphs import outline_of
from steploop.compilation.population.batching_rules import NoRule, call_under_vmap
from steploop.compilation.population.literals import Literal, call_with_literals
from steploop.compilation.population.member_scalars import costly_scalars
from steploop.compilation.pruning import Wiring
from steploop.errors import CompileError

__all__ = ["batched"]


def batched(
    graph: CapturedGraph, mode: Any, literals: Sequence[Literal], dims: Sequence[int | None], count: int
) -> CapturedGraph:
    """The graph of ``count`` members.

    It takes the inputs of ``graph``, with a first axis of members where ``dims`` has a 0; then the numbers of
    ``literals``, (members, literals) in float64; then which members go on, (members,) bool. It writes into the inputs
    into which ``graph`` writes, for members that go on, and gives what ``graph`` gives, with a first axis of members; after
    that, what only makes it quicker.

    Args:
        graph: of one member.
        mode: the fake mode that it was traced in.
        literals: what becomes an input.
        dims: for each input, 0 or None.
        count: of members.

    Raises:
        CompileError: a call has no batching rule.
    """
    written = [i for i, taken in enumerate(graph.outline.wiring.inputs) if taken in graph.outline.written]
    nodes = list(graph.module.graph.nodes)
    lifted: dict[int, dict[int | str, int]] = {}
    for number, literal in enumerate(literals):
        lifted.setdefault(literal.node, {})[literal.place] = number

    def make(decompositions: dict[Any, Callable[..., Any]]) -> Callable[..., Any]:
        def one(*inputs: Tensor) -> tuple[Tensor, ...]:
            *given, numbers, goes_on = inputs
            outputs, new = _run(graph.module, nodes, given, lifted, numbers, decompositions)
            return (*outputs, *(torch.where(goes_on, new[i], given[i]) for i in written))

        return torch.vmap(one, in_dims=(*dims, 0, 0))

    with mode:
        fakes = [
            t if dim is None else _with_axis(t, count) for t, dim in zip(graph.inputs, dims, strict=True)
        ]
        device = graph.inputs[0].device
        fakes.append(torch.empty((count, len(literals)), dtype=torch.float64, device=device))
        fakes.append(torch.empty((count,), dtype=torch.bool, device=device))
    try:
        module = traced_again(make, fakes, mode)
    except NoRule as error:
        raise CompileError(
            f"calls {error}, which torch.vmap has no rule for, so that a population cannot compute it as one graph. Train the members "
            "apart, or write that part with other functions."
        ) from error
    _write(module, written, count)
    outline = outline_of(module, Wiring(tuple(range(len(fakes))), ()), fakes, frozenset(written))
    return CapturedGraph(fakes, [], Draws(None), 0, outline, lambda: module)


def _write(module: fx.GraphModule, written: Sequence[int], count: int) -> None:
    """Write the last outputs of a graph into these inputs, at its end; give the costly numbers of members instead."""
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output: Any = graph.output_node()
    values = list(output.args[0])
    given = values[: len(values) - len(written)]
    with graph.inserting_before(output):
        for index, value in zip(written, values[len(given) :], strict=True):
            graph.call_function(torch.ops.aten.copy_.default, (inputs[index], value))
    output.args = ((*given, *costly_scalars(graph, count)),)
    graph.eliminate_dead_code()
    module.recompile()


def _with_axis(tensor: Tensor, count: int) -> Tensor:
    """A fake tensor like ``tensor`` with a first axis of members."""
    step = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.empty_strided(
        (count, *tensor.shape), (step, *tensor.stride()), dtype=tensor.dtype, device=tensor.device
    )


def _batched_call(
    node: fx.Node, args: Any, kwargs: Any, decompositions: dict[Any, Callable[..., Any]]
) -> Any:
    """Call under ``torch.vmap``; NoRule where torch fails in it, whatever it raises."""
    given: Any = node.args[0] if node.args else None
    if node.target is torch.ops.aten.as_strided.default and args[0].stride() != given.meta["val"].stride():
        raise NoRule("aten.as_strided on a tensor that lies otherwise for all members")
    try:
        return call_under_vmap(node.target, args, kwargs, decompositions)
    except NoRule:
        raise
    except Exception as error:
        line = str(error).strip().split("\n", maxsplit=1)[0]
        raise NoRule(
            f"{str(node.target).removesuffix('.default')} ({type(error).__name__}: {line})"
        ) from error


def _run(  # noqa: PLR0917  (what an interpreter needs)
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[Tensor],
    lifted: dict[int, dict[int | str, int]],
    numbers: Tensor,
    decompositions: dict[Any, Callable[..., Any]],
) -> tuple[list[Any], dict[int, Tensor]]:
    """Run a functional graph on the values of one member: what it gives, and what it would write into its inputs."""
    values: dict[fx.Node, Any] = {}
    written: dict[int, Tensor] = {}
    rest = iter(inputs)
    place: dict[fx.Node, int] = {}
    outputs: list[Any] = []
    for index, node in enumerate(nodes):
        if node.op == "placeholder":
            place[node] = len(place)
            values[node] = next(rest)
        elif node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        elif node.op == "output":
            outputs = [values[part] for part in node.args[0]]  # type: ignore[index, union-attr]  # a tuple of nodes
        elif node.target is torch.ops.aten.copy_.default and node.args[0] in place:
            values[node] = written[place[node.args[0]]] = values[node.args[1]]  # type: ignore[index]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            if index in lifted:
                own = {key: numbers[number] for key, number in lifted[index].items()}
                values[node] = call_with_literals(node, [*args, *kwargs.values()], own)
            else:
                values[node] = _batched_call(node, args, kwargs, decompositions)
    return outputs, written
