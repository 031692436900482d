"""Compile a train step into one graph: forward, backward, unscale, clip, optimizer, loss scale."""

from collections.abc import Callable
from typing import Any, Literal

from steploop.compilation.aten_graph import check_torch
from steploop.compilation.compiled_step import CompiledStep as CompiledStep
from steploop.compilation.compiled_step import Figures as Figures
from steploop.compilation.folding_step import FoldingStep as FoldingStep
from steploop.errors import ConfigError

__all__ = ["CompiledStep", "Figures", "FoldingStep", "compile"]


def compile(  # noqa: A001  (steploop.compile, as in torch.compile)
    train_step: Callable[[Any, Any], Any],
    *,
    mode: Literal[True, "auto"] = True,
    report: Callable[[str], None] | None = None,
) -> FoldingStep:
    """Compile ``train_step`` into one graph that computes the same.

    The step is traced once, on tensors without values, with all Python in it: states, closures, dictionaries. What
    it does to tensors becomes one graph of ATen calls (forward, backward, unscaling, clipping, optimizer, average),
    which torch's Inductor compiles; Python is not run again. Counters, schedules and the loss scale's value stay
    with the host, which hands the graph the numbers that depend on the step.

        >>> step = compile(train_step)                                   # doctest: +SKIP
        >>> state = functools.reduce(step, batches, state)               # doctest: +SKIP

    **Several steps at once.** ``state = step.fold(state, batches)`` takes a step on each batch, and ``step.scan`` keeps what each
    of them computed: the bits of single steps, without most of what Python does between two of them.

    **Numbers.** Those of eager but for the order of sums and, for Adam and its kin, bias corrections in float32: on
    small nets the parameters agree to 1e-4 of their largest after 100 steps in float32 (1e-5 for most optimizers,
    5e-3 for RAdam, 1e-1 for Muon, which computes in bfloat16), and steps are skipped where eager skips them. Random
    numbers are eager's own in every pass, part of a batch and recomputation: the same generators, seeded by (seed,
    attempted steps, pass). On a processor without bfloat16 arithmetic, convolutions and products are computed in float32
    and rounded.

    **Optimizers of torch.optim that can be captured:** SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, ASGD,
    Adagrad, Adadelta, Muon, with all their options. Not LBFGS, SparseAdam and Adafactor, which read values in Python.
    Others can be, if they keep tensors and no Python numbers in their slots, and read no tensor.

    **States.** Parameters, slots, buffers and averages are updated in place, and the state that went in is spent, as
    in eager; with ``optimizer_step(donate=False)`` it stays whole. States of either form go on in the other, from a
    checkpoint too. Several states in a mapping train in one graph.

    **Phases.** What a step decides by counters, rates, numbers of the batch or of the step before (``state.step % 3 == 0``,
    ``state.epoch < 5``, ``if state.finite``) is a branch: a graph for each, chosen at every step. In arithmetic with tensors
    such numbers are inputs (``loss * state.epoch``). A number that is read as it is (``int(state.step)``) would be another
    graph at every step and is refused; of other values at most eight get a graph, later ones run in eager, with a warning.

    **Shapes.** One graph for each form of batch. Another form than the first runs in eager until it has come three
    times, so a short last batch costs no graph in a short run and one in a long one; a third warns, and beyond eight no
    more are compiled. Texts, bools and enums in a batch are part of its form; numbers are not.

    **Ranks.** Where a state has ranks, torch.compile compiles the pass of each part of a batch, and the rest of the step is eager: so the
    number of ranks changes no bit of a compiled run, and compiled and eager ranks train together. See ``steploop docs ranks``.

    **What Python reads besides** is built into the graph and guarded, so that another value is another graph: attributes
    of modules and objects, globals, closures, defaults, as far as the code in reach names them. Tensors there are read anew,
    and what the step leaves in attributes (attention maps) is the newest after each step. Not seen are the clock, the
    environment, files, and lists or dictionaries of more than 100 items.

    **What a graph cannot do** raises CompileError with the line and what to write instead: reading a tensor (``.item()``,
    ``if``, ``print``), shapes that depend on values, counting in Python (``self.calls += 1``), Python's or NumPy's random
    numbers, a generator of your own, sparse tensors, changing a batch in place.

    Args:
        train_step: ``(state, batch) -> state``, or with a mapping of states.
        mode: True compiles, or raises. "auto" takes a few steps of each form on clones of the state, which cannot
            disturb the run, and goes on with the faster one; a form of batch for which the step cannot be captured goes
            on in eager, and the report says so once. The figures are in ``figures`` of what is returned.
        report: is called with what happens, in short sentences: "compiling: 14 s".

    Returns:
        A callable ``(state, batch) -> state``. The first step of a run, which makes the optimizer's slots, is eager.
        Graphs are kept in Inductor's cache on disk: a second run takes them from there.

    Raises:
        ConfigError: ``train_step`` cannot be called, or the mode is unknown.
        CompileError: this is another torch than the one whose internals are used (mode=True).
    """
    if not callable(train_step):
        raise ConfigError(f"compile: expected a train step, (state, batch) -> state, but got {train_step!r}.")
    if mode is not True and mode != "auto":
        raise ConfigError(f"compile: mode must be True or 'auto', but is {mode!r}.")
    if mode is True:  # "auto" goes on in eager, and says so
        check_torch()
    return FoldingStep(train_step, mode, report)
