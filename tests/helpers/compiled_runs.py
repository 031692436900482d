"""Small models and train steps for the tests of compilation, and graphs that run without Inductor."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.compilation import compiled_step
from steploop.compilation.aten_graph import check_torch
from steploop.compilation.population import vmapped_step
from steploop.core.trees import named_leaves
from steploop.errors import CompileError


def compile_runs_on_this_torch() -> bool:
    """Whether this torch is the release that steploop.compile is written for."""
    try:
        check_torch()
    except CompileError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not compile_runs_on_this_torch(),
    reason="Inductor needs g++, and steploop.compile one release of torch",
)

Batch = tuple[Tensor, Tensor]


def decaying(step: int) -> float:
    return 0.05 * 0.99**step


def objective(model: nn.Module, batch: Batch) -> Any:
    inputs, labels = batch
    logits = model(inputs)
    return F.cross_entropy(logits, labels), {"logits": logits}


def train_step(state: TrainState, batch: Batch) -> TrainState:
    state = forward_loss(state, batch, objective)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=1.0)
    state = optimizer_step(state)
    return schedule(state, decaying)


def mlp(*, dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=not norm),  # before a norm its gradient is rounding noise
        nn.BatchNorm1d(8) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout) if dropout else nn.Identity(),
        nn.Linear(8, 4),
    )


def first_state(
    model: nn.Module | None = None, optimizer: Optimizer | None = None, **settings: Any
) -> TrainState:
    described = optimizer or Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    return schedule(TrainState.create(model or mlp(), described, **settings), decaying)


def batches(count: int, size: int = 10) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for _ in range(count)
    ]


def folded(step: Callable[[Any, Any], Any], state: Any, given: list[Any]) -> Any:
    for batch in given:
        state = step(state, batch)
    return state


def run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they were captured, call by call: all but Inductor is tested, without its seconds."""
    if not compile_runs_on_this_torch():
        pytest.skip("steploop.compile is written for another torch")

    def interpret(graph: Any, mode: Any) -> Callable[[list[Tensor]], Any]:
        def run(inputs: list[Tensor]) -> Any:
            with torch.no_grad():
                return graph.module(*inputs)

        return run

    monkeypatch.setattr(compiled_step, "compile_graph", interpret)
    monkeypatch.setattr(vmapped_step, "compile_graph", interpret)


def assert_alike(a: TrainState, b: TrainState, tolerance: float) -> None:
    """Same structure, dtypes, layouts and plain values; tensors equal to ``tolerance``, relative to their largest entry."""
    for field in ("params", "buffers", "slots", "ema"):
        left, right = dict(named_leaves(getattr(a, field))), dict(named_leaves(getattr(b, field)))
        assert list(left) == list(right), field
        for name, x in left.items():
            y = right[name]
            assert type(x) is type(y), (field, name)
            if not isinstance(x, Tensor):
                assert x == y, (field, name)
                continue
            assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device), (
                field,
                name,
            )
            assert x.requires_grad == y.requires_grad, (field, name)
            assert x.isfinite().all() == y.isfinite().all(), (field, name)
            largest = float(x.detach().double().abs().max().clamp(min=1e-3)) if x.numel() else 1.0
            gap = float((x.detach().double() - y.detach().double()).abs().max()) if x.numel() else 0.0
            assert gap <= tolerance * largest, (field, name, gap, largest)
    for field in (
        "epoch", "batch", "attempted_steps", "applied_steps", "nonfinite_steps", "scale", "finite", "seed", "precision",
    ):  # fmt: skip
        assert getattr(a, field) == getattr(b, field), field
    for left, right in zip(a.hyper, b.hyper, strict=True):
        assert dict(left) == dict(right)
    assert abs(float(a.loss) - float(b.loss)) <= tolerance * max(1.0, abs(float(a.loss)))
