"""Trace a function into a graph of functional ATen calls.

torch promises nothing about what is imported here, so it is imported inside of the functions, after
``check_torch`` has seen a torch that this was written for.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from steploop.compilation import kept_graphs
from steploop.compilation.cpu_libraries import forget_if_switched
from steploop.compilation.decompositions import decompositions, inductor_options, table_for
from steploop.compilation.draws import Draws, drawing
from steploop.compilation.generator_events import Event
from steploop.compilation.kept_graphs import KeptGraph, Outline, outline_of
from steploop.compilation.pruning import constants_to_inputs, prune, straighten
from steploop.errors import CompileError

__all__ = [
    "TORCH_RELEASES",
    "CapturedGraph",
    "capture",
    "check_torch",
    "fake_mode",
    "reads_a_value",
    "traced_again",
]

TORCH_RELEASES = ("2.14", "2.15")  # those whose private names were tried


@attrs.frozen(eq=False)
class CapturedGraph:
    """A graph of functional ATen calls, which writes only into its inputs, at its end.

    Attributes:
        inputs: fake tensors like those that it takes.
        constants: tensors that the function found in its surroundings; they come after the inputs that were given.
        draws: how it draws random numbers.
        drawn: how many tensors are drawn for it: its last inputs.
        outline: what a caller has to know of it.
        key: names what is kept of it on disk; None where nothing is.
        kept: what an earlier process has compiled of it.
    """

    inputs: list[Tensor]
    constants: list[Tensor]
    draws: Draws
    drawn: int
    outline: Outline
    _make: Callable[[], fx.GraphModule]
    key: str | None = None
    kept: KeptGraph | None = None

    @cached_property
    def module(self) -> fx.GraphModule:
        """Takes ``inputs`` and gives a tuple of tensors."""
        return self._make()


def check_torch() -> None:
    """Raise CompileError unless torch is a release whose private names are used here."""
    if not torch.__version__.startswith(tuple(f"{release}." for release in TORCH_RELEASES)):
        raise CompileError(
            f"steploop.compile uses internals of torch {' and '.join(TORCH_RELEASES)}, but this is torch {torch.__version__}. "
            f"Install 'torch=={TORCH_RELEASES[-1]}.*', or train without compiling."
        )


def fake_mode() -> Any:
    """Make a mode for ``capture``, whose tensors have shapes and dtypes but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    forget_if_switched()
    # Inductor's cache on disk asks for a shape environment; in this one every shape is a number
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=True)


def reads_a_value(error: BaseException) -> bool:
    """Whether ``error`` says that Python read a number or shape that only the graph knows."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)) or (
        isinstance(error, RuntimeError) and ".numpy() is not supported for tensor subclasses" in str(error)
    )


def capture(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    mode: Any,
    surroundings: Sequence[AbstractContextManager[Any]],
    events: Sequence[Event],
    *,
    drawn_outside: bool = False,
) -> CapturedGraph:
    """Trace ``function`` twice: with autograd, and then without mutation and decomposed.

    The first pass sees the backward pass as ATen calls on the inputs; functionalization cannot look through
    ``backward()`` itself, so it gets the graph of the first pass. Where an earlier process has compiled what comes of
    that one, there is no second pass until somebody asks for the graph.

    Args:
        function: takes and gives tensors; may write into its inputs.
        inputs: fake tensors of ``mode``.
        mode: of ``fake_mode``.
        surroundings: entered for the first pass.
        events: what the function does to random generators, when it has run.
        drawn_outside: whether all random numbers become inputs.
    """
    # torch registers some of its decompositions late
    import torch._inductor.decomposition
    from torch._dispatch.python import enable_python_dispatcher
    from torch.compiler import _compile_session_context
    from torch.fx.experimental.proxy_tensor import make_fx

    # the python dispatcher replaces native_batch_norm, whose schema hides that it writes, by one that tells
    with _no_collection(), mode, _compile_session_context(), enable_python_dispatcher(), ExitStack() as stack:
        for one in surroundings:
            stack.enter_context(one)
        # a part that the user compiled is traced like the rest
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        first = make_fx(function)(*inputs)
    _refuse_sparse(first)
    constants = constants_to_inputs(first)
    with mode:
        draws, drawn = drawing(first, events, outside=drawn_outside)
        plain = [t.detach() for t in inputs]
        plain += [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=c.device) for c in constants]
        plain += drawn
    key = kept_graphs.key_of(first, plain)
    kept = kept_graphs.find(key)
    if kept is None:
        module, outline = _functional(first, plain, mode)
    else:
        module, outline = None, kept.outline
    taken = [plain[i] for i in outline.wiring.inputs]
    return CapturedGraph(
        taken, constants, draws, len(drawn), outline, lambda: module or _functional(first, plain, mode)[0], key, kept
    )  # fmt: skip


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from looking at ever more nodes while there is nothing to collect."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _functional(first: fx.GraphModule, plain: list[Tensor], mode: Any) -> tuple[fx.GraphModule, Outline]:
    """Trace a graph once more, without mutation and decomposed; remove what costs time."""
    import torch._inductor.lowering  # torch registers some lowerings late
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    function = torch.func.functionalize(first, remove="mutations")
    options = inductor_options(cpp_wrapper=False)
    with _no_collection(), mode, torch.no_grad(), enable_python_dispatcher(), config.patch(options):
        functional = make_fx(function, decomposition_table=table_for(plain))(*plain)
    straighten(functional)
    written = _written(functional)
    wiring = prune(functional)
    return functional, outline_of(functional, wiring, [plain[i] for i in wiring.inputs], written)


def traced_again(
    make: Callable[[dict[Any, Callable[..., Any]]], Callable[..., Any]], inputs: Sequence[Tensor], mode: Any
) -> fx.GraphModule:
    """Trace a function of tensors that neither writes nor differentiates into a graph of decomposed calls.

    Args:
        make: makes the function; it is given every decomposition that there is, call -> function.
        inputs: fake tensors of ``mode``.
        mode: of ``fake_mode``.
    """
    from torch._decomp import decomposition_table
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    with mode, torch.no_grad(), config.patch(inductor_options(cpp_wrapper=False)):
        table = table_for(inputs)
        function = make({**decomposition_table, **decompositions()})
        return make_fx(function, decomposition_table=table)(*inputs)


def _refuse_sparse(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if getattr(node.meta.get("val"), "layout", torch.strided) is not torch.strided:
            raise CompileError(
                "computes with sparse tensors, or has sparse gradients, which no graph takes. Use nn.Embedding(sparse=False) and "
                "dense tensors, or run this step in eager."
            )


def _written(graph: fx.GraphModule) -> frozenset[int]:
    """Which inputs a functional graph writes into, at its end."""
    places = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    return frozenset(
        places[node.args[0]]
        for node in graph.graph.nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0] in places
    )
