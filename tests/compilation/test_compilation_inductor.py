"""Graphs that Inductor compiled: the numbers of eager, kept ATen calls, and the cache that a second process finds."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import attrs
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import (
    assert_alike,
    batches,
    decaying,
    first_state,
    folded,
    mlp,
    needs_compiler,
    objective,
    train_step,
)
from filelock import FileLock
from rank_processes import RankProcesses
from torch import nn
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import get_lock_dir
from torch.fx.experimental.proxy_tensor import make_fx

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    schedule,
    stack,
    unscale_and_clip,
    update_ema,
    vmap,
)
from steploop.compilation import inductor, kept_graphs
from steploop.compilation.inductor import check_compiler
from steploop.compilation.kept_graphs import Compiled, Form, KeptGraph, Outline
from steploop.compilation.kernel_files import remove_truncated
from steploop.compilation.population import vmapped_step
from steploop.compilation.pruning import Wiring
from steploop.compilation.repeated_parts import Kernel, Part, Split
from steploop.core.interruption import watched_by
from steploop.core.trees import named_leaves
from steploop.testing.state_comparison import require_same

pytestmark = needs_compiler


def test_100_compiled_steps_agree_with_eager():
    step, given = compile(train_step), batches(5) * 20
    eager = first_state()
    compiled, in_a_row = eager.clone(), eager.clone()
    single = folded(step, compiled, given)
    assert_alike(folded(train_step, eager, given), single, 1e-4)
    require_same(step.fold(in_a_row, given), single, "steps in a row are single steps")
    assert [graph.run.__module__ for graph in step._store.all()] == ["steploop.compilation.cpp_entry"]
    assert step.figures.form == "compiled"
    assert step.figures.compile_s[0] > 0


def test_fp16_with_everything_skips_the_steps_that_eager_skips():
    """Accumulation, dropout, BatchNorm, AdamW, a loss scale, an average with a warmup: in one graph."""

    def step(state, parts):
        state = unscale_and_clip(accumulate(state, parts, objective), max_norm=1.0)
        state = update_ema(optimizer_step(state), decay=lambda n: min(0.9, (1 + n) / (10 + n)))
        return schedule(state, decaying)

    given = batches(8)
    windows = [(given[i], given[(i + 1) % 8]) for i in range(8)]
    bad = (given[0][0] * 1e30, given[0][1])
    windows[2] = windows[5] = (given[0], bad)
    eager = first_state(
        mlp(norm=True), Optimizer(torch.optim.AdamW, lr=0.05), precision="fp16", ema=True,
        loss_scale=LossScale(scale=2.0**10, growth_interval=3),
    )  # fmt: skip
    compiled, fast = eager.clone(), compile(step)
    for window in windows:
        eager, compiled = step(eager, window), fast(compiled, window)
        assert eager.finite is compiled.finite
        assert eager.scale == compiled.scale
    assert eager.applied_steps == 6
    assert_alike(eager, compiled, 3e-2)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def furthest(a, b):
    """The largest difference of a parameter or slot, relative to the largest entry of its tensor."""
    pairs = zip(named_leaves([a.params, a.slots]), named_leaves([b.params, b.slots]), strict=True)
    return max(
        float((x - y).detach().abs().max() / x.detach().abs().max().clamp(min=1e-3))
        for (_, x), (_, y) in pairs
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_convolutional_net_keeps_its_layout_and_the_masks_of_eager(precision):
    """In bfloat16 equal entries of a pool may change places in either form: neither strays further from float32."""

    def plain(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, plain))
        return optimizer_step(unscale_and_clip(state, max_norm=1.0))

    eager = TrainState.create(
        small_cnn(), Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9), precision=precision,
        memory_format=torch.channels_last,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    given = [
        (
            torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last),
            torch.randint(0, 4, (4,), generator=generator),
        )
        for _ in range(6)
    ]
    compiled, fast = eager.clone(), compile(step)
    exact = folded(step, attrs.evolve(eager.clone(), precision="fp32"), given)
    a, b = folded(step, eager, given), folded(fast, compiled, given)
    if precision == "fp32":
        assert_alike(a, b, 1e-4)
    assert furthest(exact, b) <= 2 * furthest(exact, a) + 1e-4
    assert b.params["0.weight"].is_contiguous(memory_format=torch.channels_last)
    (graph,) = fast._store.all()
    called = {str(node.target) for node in graph.plan.graph.module.graph.nodes}
    assert "aten.native_batch_norm_backward.default" in called
    assert "aten.max_pool2d_with_indices_backward.default" in called


SECOND_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from compiled_runs import batches, first_state, folded, train_step
import hashlib
from steploop import compile
from steploop.compilation import aten_graph, inductor
from torch._dynamo.utils import counters
from steploop.core.trees import named_leaves
loaded, traced, load, trace = [], [], inductor._load, aten_graph._functional
inductor._load = lambda kept: loaded.append(1) or load(kept)
aten_graph._functional = lambda *given: traced.append(1) or trace(*given)
state = folded(compile(train_step), first_state(), batches(3))
print(len(loaded), len(traced), counters["inductor"]["fxgraph_cache_miss"])
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in state.tensors.params.values())).hexdigest())
"""


class NormOfTransposed(nn.Module):
    """A norm of a transposed tensor: torch's kernel returns another layout than its fake version says."""

    def __init__(self):
        super().__init__()
        self.inwards, self.norm = nn.Linear(1, 5, bias=False), nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.norm(self.inwards(x.unsqueeze(-1)).transpose(1, 2)).tanh().square().mean(2))


def test_a_norm_of_a_transposed_tensor_reads_the_entries_that_eager_reads():
    torch.manual_seed(0)
    state = first_state(NormOfTransposed())
    given = batches(5)
    assert_alike(folded(train_step, state.clone(), given), folded(compile(train_step), state, given), 1e-5)


def test_a_second_process_takes_the_graph_from_the_cache_and_mends_a_truncated_kernel(tmp_path):
    """What a linker left that was killed is deleted and compiled anew; loading it would end the process."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SECOND_PROCESS, str(Path(__file__).parents[1] / "helpers")]
    seen, digests = [], set()
    for run in range(4):
        if run == 2:
            (kernel,) = tmp_path.glob("*/*.main.so")
            whole = kernel.read_bytes()
            kernel.write_bytes(whole[: len(whole) // 2])
        if run == 3:  # the plan stands, and what it names is gone
            shutil.rmtree(tmp_path / "fxgraph")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        *counts, digest = done.stdout.split()[-4:]
        seen.append(counts)
        digests.add(digest)
    assert seen == [["0", "1", "1"], ["1", "0", "0"], ["1", "0", "0"], ["1", "1", "1"]]
    assert len(digests) == 1
    assert len(kernel.read_bytes()) == len(whole)


def traced(function, *inputs):
    return make_fx(function)(*inputs)


def test_a_kept_graph_is_named_by_all_that_makes_it(monkeypatch):
    x = torch.zeros(3)
    module = traced(lambda x: x * 2.0, x)
    names = [
        kept_graphs.key_of(module, [x]),
        kept_graphs.key_of(traced(lambda x: x * 3.0, x), [x]),
        kept_graphs.key_of(traced(lambda x: x + 2.0, x), [x]),
        kept_graphs.key_of(module, [x.double()]),
        kept_graphs.key_of(module, [torch.zeros(4)]),
    ]
    with config.patch("cpp.simdlen", 1):
        names.append(kept_graphs.key_of(module, [x]))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    names.append(kept_graphs.key_of(module, [x]))
    monkeypatch.setattr(kept_graphs, "source_tag", lambda: "another")
    names.append(kept_graphs.key_of(module, [x]))
    assert len(set(names)) == len(names)
    assert None not in names
    monkeypatch.undo()
    assert kept_graphs.key_of(traced(lambda x: x * 2.0, x), [x]) == names[0]


@pytest.mark.parametrize("what", ["an operator of the user's", "a module", "no cache", "a constant"])
def test_what_its_text_does_not_tell_is_not_kept(what):
    x, options = torch.zeros(3), {}
    module = traced(lambda x: x * 2.0, x)
    if what == "an operator of the user's":

        @torch.library.custom_op("steploop_tests::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        module = traced(twice, x)
    if what == "a module":
        module = torch.fx.symbolic_trace(nn.Linear(3, 3))
    if what == "no cache":
        options = {"force_disable_caches": True}
    if what == "a constant":
        held = torch.ones(3)
        module = traced(lambda x: x * held, x)
        assert any(node.op == "get_attr" for node in module.graph.nodes)
    with config.patch(options):
        assert kept_graphs.key_of(module, [x]) is None


def test_a_plan_is_read_as_it_was_written_and_a_damaged_one_is_no_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    outline = Outline(Wiring((0, 2), (0, -1)), random=True, written=frozenset({2, 0}), text="text")
    parts = (Part(0, (1, -2), (3, 4), (4, 1)), Part(0, (0, -1), (2,), (1,)))
    split = Split(
        (0, 1), (Kernel(((True, torch.float64), (False, torch.bfloat16)), 7),), parts, ((-1, 0), (1, 0))
    )
    compiled = (
        Compiled("key", Form(cpp_wrapper=True, adds_by_index=False)),
        Compiled("other", Form(cpp_wrapper=False, adds_by_index=True)),
    )
    whole = KeptGraph(outline, None, compiled[:1])
    kept_graphs.keep("whole", whole)
    assert kept_graphs.find("whole") == whole
    kept = KeptGraph(outline, split, compiled)
    kept_graphs.keep("name", kept)
    assert kept_graphs.find("name") == kept
    assert kept_graphs.find(None) is kept_graphs.find("other") is None
    path = tmp_path / "steploop" / "name"
    for content in (path.read_bytes()[:-3], b"", b"nothing", b"{}"):
        path.write_bytes(content)
        assert kept_graphs.find("name") is None


class Indexed(nn.Module):
    """Reads entries of a table in two ways, and adds into chosen ones."""

    def __init__(self):
        super().__init__()
        self.table, self.embedding = nn.Parameter(torch.randn(50, 64)), nn.Embedding(50, 64)

    def forward(self, chosen, weights):
        read = self.table[chosen] * weights + self.embedding(chosen).tanh()
        return torch.zeros(50, 64).index_put((chosen,), read, accumulate=True).square().sum()


def gradients_on_two_threads(compiled):
    """How many different results ten equal steps of a large batch have."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    batch = torch.randint(0, 50, (4096,)), torch.randn(4096, 64)

    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, lambda model, batch: model(*batch)))
        return optimizer_step(unscale_and_clip(state, max_norm=1e9))

    first = TrainState.create(Indexed(), Optimizer(torch.optim.SGD, lr=1.0, momentum=0.9))
    taken = compile(step) if compiled else step
    first = taken(taken(first, batch), batch)
    ends = {
        b"".join(t.detach().numpy().tobytes() for t in taken(first.clone(), batch).tensors.params.values())
        for _ in range(10)
    }
    torch.set_num_threads(1)
    return len(ends)


@pytest.mark.parametrize("compiled", [False, True])
def test_sums_over_indices_are_taken_in_one_order_on_several_threads(compiled):
    """torch adds them in the order in which its threads come, in eager and compiled, unless it is told not to."""
    alone = RankProcesses(1)  # no process that is forked later has threads of OpenMP
    try:
        assert alone.run(gradients_on_two_threads, compiled) == [1]
    finally:
        alone.close()


def works_in_a_fork():
    """Whether Inductor's pool of threads works in a fork of a process that used it."""
    AsyncCompile.pool().submit(int).result()
    process = os.fork()
    if process == 0:
        check_compiler(torch.device("cpu"))
        os._exit(AsyncCompile.pool().submit(int).result(timeout=60) or 7)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_fork_compiles_though_its_parent_has_compiled(monkeypatch):
    alone = RankProcesses(1)
    try:
        assert alone.run(works_in_a_fork) == [7]
    finally:
        alone.close()


def test_only_kernel_files_that_are_truncated_and_that_nobody_writes_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    whole = Path(torch._C.__file__).read_bytes()
    files = {
        "whole": whole,
        "short": whole[: len(whole) * 9 // 10],
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "busy": whole[:99],
    }
    (tmp_path / "ab").mkdir()
    for name, content in files.items():
        (tmp_path / "ab" / f"{name}.main.so").write_bytes(content)
    (tmp_path / "ab" / "other.cpp").write_bytes(b"")
    lock = FileLock(Path(get_lock_dir()) / "busy.lock")
    with lock:
        assert {path.name.split(".")[0] for path in remove_truncated()} == {"short", "half", "empty"}
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == [
        "busy.main.so",
        "other.cpp",
        "whole.main.so",
    ]


# -- libraries that are switched ---------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM over one step of what it is given."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(64, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, 0]


def convolved(seed=0, last=lambda: nn.Linear(64, 4)):
    """A state over a convolution of 16 images, whose result lies as the library that computes it chooses."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), last())
    return TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1), seed=0)


def test_a_step_is_right_after_a_population_was_traced_and_after_a_library_was_switched(monkeypatch):
    """A population of recurrent layers is traced without oneDNN; what torch remembers of that is no single step's."""
    images = torch.randn(16, 3, 6, 6).to(memory_format=torch.channels_last)
    given = [(images, torch.randint(0, 4, (16,)))] * 2
    monkeypatch.setattr(vmapped_step, "compile_graph", lambda graph, _: lambda inputs: graph.module(*inputs))
    functools.reduce(vmap(train_step), given, stack([convolved(seed, Recurrent) for seed in range(2)]))

    step = compile(train_step)
    eager = folded(train_step, convolved(), given)
    compiled = eager.clone()
    was = torch._C._get_mkldnn_enabled()
    try:
        for on in (True, False, True):
            torch._C._set_mkldnn_enabled(on)
            eager, compiled = folded(train_step, eager, given), folded(step, compiled, given)
            assert_alike(eager, compiled, 1e-4)
    finally:
        torch._C._set_mkldnn_enabled(was)
    assert len(step.figures.compile_s) == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("watched", [True, False], ids=["in a run", "outside"])
def test_a_compiler_outlives_a_signal_that_lets_a_run_stop(watched, signum, monkeypatch):
    """Ctrl-C in a terminal reaches the compiler too, and the run finishes its step; without a run it is as ever."""
    ended = []

    def compiling(graph, mode):
        with subprocess.Popen(["sleep", "30"]) as compiler:
            compiler.send_signal(signum)
            with suppress(subprocess.TimeoutExpired):
                compiler.wait(0.3 if watched else 60)
            ended.append(compiler.returncode)
            compiler.kill()

    monkeypatch.setattr(inductor, "_compile_graph", compiling)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    # what is caught here is as ever in a new program; in the background of a shell SIGINT is ignored, and stays so
    handler = signal.signal(signum, lambda *_: None)
    try:
        with watched_by(lambda: None) if watched else nullcontext():
            inductor.compile_graph(None, None)
    finally:
        signal.signal(signum, handler)
    assert ended == [None if watched else -signum]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
