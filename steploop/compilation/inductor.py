"""Compile a graph of ATen calls with Inductor, through its cache on disk.

Only here, in ``aten_graph`` and in what these two import are torch's private names used, inside of functions.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx

from steploop.compilation import kept_graphs
from steploop.compilation.aten_graph import CapturedGraph
from steploop.compilation.batch_norm_layouts import keep_batch_norm_layouts
from steploop.compilation.cpp_entry import direct
from steploop.compilation.decompositions import (
    adds_by_index,
    decompositions,
    decompositions_on_cpu,
    inductor_options,
    kept_calls,
    on_cpu,
)
from steploop.compilation.kept_graphs import Compiled, Form, KeptGraph
from steploop.compilation.kernel_files import remove_truncated
from steploop.compilation.repeated_parts import Kernel, Run, Split, in_parts, split_repeated
from steploop.core.interruption import sparing_children
from steploop.core.state.surroundings import sums_in_order
from steploop.errors import CompileError

__all__ = ["check_compiler", "compile_graph"]

_process = None  # the one that looked at Inductor's threads last


def check_compiler(device: torch.device) -> None:
    """Raise CompileError where Inductor would find no C++ compiler for the CPU."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    global _process  # noqa: PLW0603  (Inductor's threads are the process's, too)
    if _process != os.getpid():
        # a fork is given its parent's pool without the threads, and would wait for them for ever
        AsyncCompile.pool.cache_clear()
        _process = os.getpid()
    if device.type != "cpu":
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(
            "steploop.compile needs a C++ compiler for the CPU, and found none. Install g++ (on Debian: "
            "apt install g++), name one in the environment variable CXX, or train without compiling."
        ) from error


def compile_graph(graph: CapturedGraph, mode: Any) -> Run:
    """Compile a captured graph with Inductor, or load what an earlier process has compiled.

    Raises:
        CompileError: there is no C++ compiler, or Inductor refuses the graph.
    """
    with sparing_children():
        return _compile_graph(graph, mode)


def _compile_graph(graph: CapturedGraph, mode: Any) -> Run:
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    check_compiler(graph.inputs[0].device)
    remove_truncated()
    run = None if graph.kept is None else _loaded(graph.kept)
    if run is not None:
        return run
    found = split_repeated(graph.module)
    split, kernels = found or (None, [])
    main = graph.inputs if split is None else [graph.inputs[i] for i in split.inputs]
    made = [_compiled(graph.module, main, mode)]
    for kernel, module in zip(split.kernels if split else (), kernels, strict=True):
        inputs, any_length = _flat_inputs(kernel)
        FakeTensorProp(module, any_length).propagate_dont_convert_inputs(*inputs)
        made.append(_compiled(module, inputs, any_length))
    names = [name for _, name in made if name is not None]
    if graph.key is not None and len(names) == len(made):
        kept_graphs.keep(graph.key, KeptGraph(graph.outline, split, tuple(names)))
    return _joined(split, [run for run, _ in made])


def _joined(split: Split | None, runs: Sequence[Run]) -> Run:
    return runs[0] if split is None else in_parts(split, runs[0], runs[1:])


def _flat_inputs(kernel: Kernel) -> tuple[list[Tensor], Any]:
    """Make fake inputs of a kernel, flat tensors of every length, and their mode."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

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
    return inputs, mode


@contextmanager
def _compiling(mode: Any, form: Form) -> Iterator[None]:
    """Inductor's settings and surroundings for a graph whose fake tensors are of ``mode``."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.virtualized import V

    settings: Any = torch.compiler.config
    with (
        # what is marked on a graph is no part of torch's own key
        settings.patch(cache_key_tag=kept_graphs.source_tag()),
        config.patch(inductor_options(cpp_wrapper=form.cpp_wrapper)),
        sums_in_order("cpu" if form.adds_by_index else ""),
        V.set_fake_mode(mode),
        tracing(TracingContext(mode)),
        torch.no_grad(),
    ):
        yield


def _compiled(module: fx.GraphModule, inputs: list[Tensor], mode: Any) -> tuple[Run, Compiled | None]:
    """Compile one graph; how it is found again."""
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner

    cpu = on_cpu(inputs)
    kept = [node for node in module.graph.nodes if cpu and node.target in kept_calls()]
    for node in kept:
        node.meta["should_fallback"] = True
    keep_batch_norm_layouts()
    # C++ reaches some of the kept calls only through Python again
    form = Form(cpp_wrapper=cpu and not kept, adds_by_index=cpu and adds_by_index(module))
    with _compiling(mode, form):
        try:
            module = _recursive_joint_graph_passes(module, input_device=inputs[0].device) or module
            output: Any = module.graph.output_node()
            output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
            compiled = compile_fx_inner(
                module,
                inputs,
                is_inference=True,
                cpp_wrapper=form.cpp_wrapper,
                get_decomp_fn=decompositions_on_cpu if cpu else decompositions,
            )
        except Exception as error:
            raise CompileError(
                f"Inductor could not compile the train step: {type(error).__name__}: {_first_line(error)} "
                "Train without compiling, or with mode='auto', which goes on in eager."
            ) from error
    key = getattr(compiled, "_fx_graph_cache_key", None)
    return _run_of(compiled, form), None if key is None else Compiled(key, form)


def _run_of(compiled: Any, form: Form) -> Run:
    # the wrapper around it only logs and checks what is checked here
    run = direct(getattr(compiled, "current_callable", None) or compiled)
    if not form.adds_by_index:
        return run

    def in_order(inputs: list[Tensor]) -> Sequence[Tensor]:
        with sums_in_order("cpu"):
            return run(inputs)

    return in_order


def _loaded(kept: KeptGraph) -> Run | None:
    """Load what is kept; None if torch's cache has lost a part of it."""
    runs = []
    for compiled in kept.compiled:
        run = _load(compiled)
        if run is None:
            return None
        runs.append(run)
    return _joined(kept.split, runs)


def _load(compiled: Compiled) -> Run | None:
    """Load a graph for the CPU from torch's cache, without what imports all of Inductor."""
    from torch._inductor import config
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraphConstants

    form = compiled.form
    with config.patch(inductor_options(cpp_wrapper=form.cpp_wrapper)), suppress(OSError):
        for graph, *_ in FxGraphCache.iterate_over_candidates(
            local=True, remote_cache=None, key=compiled.key
        ):
            graph.after_deserialization(CompiledFxGraphConstants())
            return _run_of(graph, form)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
