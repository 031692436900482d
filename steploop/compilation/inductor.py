"""Trace a function into a graph of ATen calls and compile it; only here are torch's private names used.

torch promises nothing about what is imported here, so it is imported inside of the functions, after
``check_torch`` has seen a torch that this was written for.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from steploop.compilation.batch_norm_layouts import batch_norms, keep_batch_norm_layouts
from steploop.compilation.cpp_entry import direct
from steploop.compilation.draws import Draws, drawing, is_random
from steploop.compilation.generator_events import Event
from steploop.compilation.kernel_files import remove_truncated
from steploop.compilation.low_precision import in_float32
from steploop.compilation.pruning import Wiring, constants_to_inputs, prune, straighten
from steploop.compilation.repeated_parts import Kernel, Run, in_parts, split_repeated
from steploop.errors import CompileError

__all__ = [
    "CapturedGraph",
    "Run",
    "capture",
    "check_compiler",
    "check_torch",
    "compile_graph",
    "fake_mode",
    "reads_a_value",
    "traced_again",
]

_TORCH = "2.14"
_CACHE_TAG = (
    "steploop-2"  # what is marked on the graph is no part of torch's own cache key: change it with _KEPT
)

# ATen calls that stay ATen calls on the CPU. Inductor's own code for them was slower, on channels_last tensors most
# of all: the backward of max-pooling is a scatter, and BatchNorm reduces over every axis but the innermost.
_KEPT = (
    "_native_batch_norm_legit_functional.default",
    "native_batch_norm_backward.default",
    "max_pool2d_with_indices.default",
    "max_pool2d_with_indices_backward.default",
)


@attrs.frozen
class CapturedGraph:
    """A graph of functional ATen calls, which writes only into its inputs, at its end.

    Attributes:
        module: takes ``inputs`` and gives a tuple of tensors.
        inputs: fake tensors like those that it takes.
        constants: tensors that the function found in its surroundings; they come after the inputs that were given.
        wiring: which inputs and constants are left, and where its outputs are.
        draws: how it draws random numbers.
        drawn: how many tensors are drawn for it: its last inputs.
        random: whether the graph itself draws.
        written: which inputs it writes into.
        text: the same for graphs that compile to the same.
    """

    module: fx.GraphModule
    inputs: list[Tensor]
    constants: list[Tensor]
    wiring: Wiring
    draws: Draws
    drawn: int
    random: bool
    written: frozenset[int]
    text: str


def check_torch() -> None:
    """Raise CompileError unless torch is the release whose private names are used here."""
    if not torch.__version__.startswith(_TORCH + "."):
        raise CompileError(
            f"steploop.compile uses internals of torch {_TORCH}, but this is torch {torch.__version__}. "
            f"Install 'torch=={_TORCH}.*', or train without compiling."
        )


def check_compiler(device: torch.device) -> None:
    """Raise CompileError where Inductor would find no C++ compiler for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type != "cpu":
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(
            "steploop.compile needs a C++ compiler for the CPU, and found none. Install g++ (on Debian: "
            "apt install g++), name one in the environment variable CXX, or train without compiling."
        ) from error


def fake_mode() -> Any:
    """Make a mode for ``capture``, whose tensors have shapes and dtypes but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

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
    ``backward()`` itself, so it gets the graph of the first pass.

    Args:
        function: takes and gives tensors; may write into its inputs.
        inputs: fake tensors of ``mode``.
        mode: of ``fake_mode``.
        surroundings: entered for the first pass.
        events: what the function does to random generators, when it has run.
        drawn_outside: whether all random numbers become inputs.
    """
    # torch registers some of its decompositions and lowerings late
    import torch._inductor.lowering
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import config
    from torch.compiler import _compile_session_context
    from torch.fx.experimental.proxy_tensor import make_fx

    # the python dispatcher replaces native_batch_norm, whose schema hides that it writes, by one that tells
    with mode, _compile_session_context(), enable_python_dispatcher(), ExitStack() as stack:
        for one in surroundings:
            stack.enter_context(one)
        # a part that the user compiled is traced like the rest
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        first = make_fx(function)(*inputs)
    _refuse_sparse(first)
    constants = constants_to_inputs(first)
    with mode:
        draws, drawn = drawing(first, events, outside=drawn_outside)
    with mode, torch.no_grad(), enable_python_dispatcher(), config.patch(_options(cpp_wrapper=False)):
        table = _table_for(inputs)
        plain = [t.detach() for t in inputs]
        plain += [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=c.device) for c in constants]
        plain += drawn
        functional = make_fx(torch.func.functionalize(first, remove="mutations"), decomposition_table=table)(
            *plain
        )
    straighten(functional)
    written = _written(functional)
    wiring = prune(functional)
    taken = [plain[i] for i in wiring.inputs]
    shapes = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in taken]
    return CapturedGraph(
        functional, taken, constants, wiring, draws, len(drawn),
        any(is_random(node) for node in functional.graph.nodes if node.op == "call_function"),
        written, f"{functional.code}{shapes}",
    )  # fmt: skip


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

    with mode, torch.no_grad(), config.patch(_options(cpp_wrapper=False)):
        table = _table_for(inputs)
        function = make({**decomposition_table, **_decompositions()})
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


def _norms(tensors: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:  # noqa: A002 (torch's name)
    """Decompose ``_foreach_norm`` into single norms, which fuse with what precedes them."""
    return [torch.linalg.vector_norm(t, ord, dtype=dtype) for t in tensors]


def _products(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Decompose ``_foreach_mul`` into single products: on a CPU there is no kernel for a list."""
    return [t * factor for t in tensors]


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return Inductor's decompositions and ours."""
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), torch.ops.aten._foreach_norm.Scalar: _norms}


def _decompositions_on_cpu() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions for the CPU; a named function, because Inductor's cache key has its name."""
    table = {**_decompositions(), **in_float32(), torch.ops.aten._foreach_mul.Tensor: _products}
    for op in _kept_ops():
        table.pop(op, None)
    return table


def _table_for(inputs: Sequence[Tensor]) -> dict[Any, Callable[..., Any]]:
    """Return the decompositions that a trace of these inputs applies."""
    return _decompositions_on_cpu() | batch_norms() if _on_cpu(inputs) else _decompositions()


def _kept_ops() -> list[Any]:
    found = []
    for name in _KEPT:
        op, overload = name.split(".")
        found.append(getattr(getattr(torch.ops.aten, op), overload))
    return found


def _on_cpu(inputs: Sequence[Tensor]) -> bool:
    return all(t.device.type == "cpu" for t in inputs)


def _options(*, cpp_wrapper: bool) -> dict[str, Any]:
    return {
        # torch's own generators, so that a seed gives the numbers that eager draws
        "fallback_random": True,
        # the caller has compared shapes and strides already
        "size_asserts": False,
        "scalar_asserts": False,
        "nan_asserts": False,
        # what calls the kernels, in C++ too: 39 us a step instead of 62 on a small model
        "cpp_wrapper": cpp_wrapper,
    }


def compile_graph(graph: CapturedGraph, mode: Any) -> Run:
    """Compile a captured graph with Inductor, through its cache on disk.

    Raises:
        CompileError: there is no C++ compiler, or Inductor refuses the graph.
    """
    check_compiler(graph.inputs[0].device)
    remove_truncated()
    split = split_repeated(graph.module)
    if split is None:
        return _compiled(graph.module, graph.inputs, mode)
    main = _compiled(split.main, [graph.inputs[i] for i in split.inputs], mode)
    return in_parts(split, main, [_of_any_length(kernel) for kernel in split.kernels])


def _of_any_length(kernel: Kernel) -> Run:
    """Compile a graph over flat tensors for every length."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs: list[Tensor] = []
    for number, (is_number, dtype) in enumerate(kernel.kinds):
        like = torch.empty(() if is_number else kernel.length, dtype=dtype)
        sizes: Any = [] if is_number else [DimDynamic.DUCK]  # one length for all
        inputs.append(
            mode.from_tensor(
                like,
                source=ConstantSource(f"x{number}"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
            )
        )
    FakeTensorProp(kernel.module, mode).propagate_dont_convert_inputs(*inputs)
    return _compiled(kernel.module, inputs, mode)


def _compiled(module: fx.GraphModule, inputs: list[Tensor], mode: Any) -> Run:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
    from torch._inductor.virtualized import V

    settings: Any = torch.compiler.config
    on_cpu = _on_cpu(inputs)
    kept = [node for node in module.graph.nodes if on_cpu and node.target in _kept_ops()]
    for node in kept:
        node.meta["should_fallback"] = True
    keep_batch_norm_layouts()
    # C++ reaches some of the kept calls only through Python again
    options = _options(cpp_wrapper=on_cpu and not kept)
    with (
        settings.patch(cache_key_tag=_CACHE_TAG),
        config.patch(options),
        V.set_fake_mode(mode),
        tracing(TracingContext(mode)),
        torch.no_grad(),
    ):
        try:
            module = _recursive_joint_graph_passes(module, input_device=inputs[0].device) or module
            output: Any = module.graph.output_node()
            output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
            compiled = compile_fx_inner(
                module,
                inputs,
                is_inference=True,
                cpp_wrapper=options["cpp_wrapper"],
                get_decomp_fn=_decompositions_on_cpu if on_cpu else _decompositions,
            )
        except Exception as error:
            raise CompileError(
                f"Inductor could not compile the train step: {type(error).__name__}: {_first_line(error)} "
                "Train without compiling, or with mode='auto', which goes on in eager."
            ) from error
    # the wrapper around it only logs and checks what is checked here
    return direct(getattr(compiled, "current_callable", None) or compiled)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
