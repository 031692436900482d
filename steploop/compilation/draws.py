"""Take random calls out of a graph, and draw for it: see ``generator_events``."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from steploop.compilation.generator_events import Event, mark
from steploop.core.ambient_generators import generators_of
from steploop.core.seeds import fold_in
from steploop.errors import CompileError

__all__ = ["Draws", "drawing", "is_random"]

# Calls that fill their first argument, calls that look at its shape only, and calls that make a tensor.
_FILL = {"bernoulli_.float", "uniform_.default", "normal_.default", "exponential_.default", "cauchy_.default", "log_normal_.default",
         "geometric_.default", "random_.default", "random_.to", "random_.from"}  # fmt: skip
_LIKE = {"bernoulli.p", "rand_like", "randn_like", "randint_like"}
_MAKE = {"rand", "randn", "randint", "randperm", "normal.float_float"}


@attrs.frozen
class _Call:
    """A call whose numbers do not depend on the values of tensors."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: tuple[Any, ...] | None  # shape, strides, dtype and device of the tensor that stands first
    mask: bool = False  # a dropout, of which the mask is drawn

    def draw(self) -> Tensor:
        first: tuple[Tensor, ...] = ()
        if self.like is not None:
            shape, stride, dtype, device = self.like
            first = (torch.empty_strided(shape, stride, dtype=dtype, device=device),)
        drawn = self.function(*first, *self.args, **self.kwargs)
        return drawn[1] if self.mask else drawn  # type: ignore[no-any-return]


@attrs.frozen
class Draws:
    """How a step draws its random numbers.

    Attributes:
        seed: the state and the pass that seed the graph's own draws; None where it has none or nothing seeds.
        program: the events and calls that the host repeats; their tensors are the last inputs of the graph.
    """

    seed: tuple[str, int] | None
    program: tuple[Event | _Call, ...] = ()

    def run(self, states: dict[str, Any]) -> list[Tensor]:
        """Draw; the generators are left as eager leaves them."""
        device = next(iter(states.values())).device
        generators = generators_of(device)
        kept: dict[int, list[Tensor]] = {}
        drawn = []
        before = [g.get_state() for g in generators]
        try:
            for step in self.program:
                if isinstance(step, _Call):
                    drawn.append(step.draw())
                elif step.kind == "keep":
                    kept[step.value] = [g.get_state() for g in generators]
                elif step.kind == "restore":
                    for generator, state in zip(generators, kept[step.value], strict=True):
                        generator.set_state(state)
                else:
                    seed = step.value
                    if step.kind == "seed":
                        name, number = seed
                        seed = fold_in(states[name].seed, states[name].attempted_steps, number)
                    for generator in generators:
                        generator.manual_seed(seed)
        except BaseException:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            raise
        return drawn


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or torch.Tag.nondeterministic_seeded not in node.target.tags
    ):
        return False
    # attention carries the tag for its dropout; its argument stands where the schema says
    names = [a.name for a in node.target._schema.arguments]
    if "dropout_p" in names:
        place = names.index("dropout_p")
        rate = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", 0.0)
        return bool(rate)
    return True


def drawing(
    module: fx.GraphModule, events: Sequence[Event], *, outside: bool = False
) -> tuple[Draws, list[Tensor]]:
    """Decide how the step draws, and rewrite its graph: events' marks go, and perhaps draws become inputs.

    Args:
        module: the graph.
        events: what the step does to the generators.
        outside: whether all draws become inputs.

    Returns:
        The draws, and tensors like those that become inputs, after all other inputs.
    """
    graph = module.graph
    order = [
        node
        for node in graph.nodes
        if node.target is mark or (node.op == "call_function" and is_random(node))
    ]
    for node in order:
        if node.kwargs.get("generator") is not None or any(isinstance(a, torch.Generator) for a in node.args):
            raise CompileError(
                "draws from a generator of its own, whose state no graph moves. Leave generator=... out: torch's own generator "
                "is seeded by (seed, step) for every pass."
            )
    places = [i for i, node in enumerate(order) if node.target is not mark]
    seed, plain = None, True
    if places:
        inside = order[places[0] : places[-1]]
        plain = not outside and not any(
            n.target is mark and events[_number(n)].kind != "keep" for n in inside
        )
        first = [events[_number(n)] for n in order[: places[0]] if events[_number(n)].kind != "keep"]
        if first and first[-1].kind == "seed":
            seed = first[-1].value
        elif first and first[-1].kind == "manual":
            plain = False
    like: list[Tensor] = []
    program: list[Event | _Call] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in order:
        if node.target is mark:
            program.append(events[_number(node)])
            graph.erase_node(node)
        elif not plain:
            call = _taken_out(node)
            program.append(call)
            drawn = _value(node)
            with graph.inserting_after(last):
                last = graph.placeholder(f"draw_{len(like)}")
            _replace(graph, node, last, call)
            if call.mask:
                drawn = node.meta["val"][1]
            like.append(
                torch.empty_strided(drawn.shape, drawn.stride(), dtype=drawn.dtype, device=drawn.device)
            )
    module.recompile()
    return Draws(seed, () if plain else tuple(program)), like


def _value(node: Any) -> Any:
    """What a call gives, or its first result, as a fake tensor; a call in place gives what its first argument is."""
    value = node.meta["val"] if "val" in node.meta else node.args[0].meta["val"]
    return value[0] if isinstance(value, tuple) else value


def _number(node: fx.Node) -> int:
    return node.args[0]  # type: ignore[return-value]  # made by Events.add


def _taken_out(node: fx.Node) -> _Call:
    target: Any = node.target
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    args, kwargs = node.args, dict(node.kwargs)
    full = f"{name}.{overload}"
    if name in _MAKE or full in _MAKE:
        call = _Call(target, args, kwargs, None)
    elif name in _LIKE or full in _LIKE or full in _FILL or name == "native_dropout":
        first = _value(node)
        like = (tuple(first.shape), tuple(first.stride()), first.dtype, first.device)
        call = _Call(target, args[1:], kwargs, like, mask=name == "native_dropout")
    else:
        call = None
    if call is None or any(isinstance(a, fx.Node) for a in (*call.args, *call.kwargs.values())):
        raise CompileError(
            f"draws with {name}, whose numbers depend on tensors, in a step that seeds its generators more than once (two passes, "
            "activation checkpointing, torch.manual_seed). Draw uniform numbers (torch.rand) and compute from them, or draw in "
            "a step of one pass."
        )
    return call


def _replace(graph: fx.Graph, node: fx.Node, drawn: fx.Node, call: _Call) -> None:
    """Put what was drawn in the place of a call."""
    aten = torch.ops.aten
    full = str(node.target).removeprefix("aten.")
    with graph.inserting_before(node):
        if full in _FILL:
            node.replace_all_uses_with(graph.call_function(aten.copy_.default, (node.args[0], drawn)))
        elif call.mask:
            rate: Any = node.args[1]
            kept = graph.call_function(aten.mul.Tensor, (node.args[0], drawn))
            scaled = graph.call_function(aten.mul.Tensor, (kept, 1.0 / (1.0 - rate) if rate < 1.0 else 0.0))
            for user in list(node.users):  # (output, mask)
                user.replace_all_uses_with(drawn if user.args[1] else scaled)
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(drawn)
    graph.erase_node(node)
