"""Keep on disk what was compiled of a graph, beside torch's own cache: a second process traces once and compiles nothing.

What functionalizing a graph, splitting it and compiling it come to hangs on the graph as it was traced, on torch and its
settings, and on the modules of this folder; the key is made of these.
"""

import hashlib
import json
import operator
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from steploop.compilation.cpu_libraries import libraries
from steploop.compilation.decompositions import on_cpu, table_for
from steploop.compilation.draws import is_random
from steploop.compilation.pruning import Wiring
from steploop.compilation.repeated_parts import Kernel, Part, Split
from steploop.core.atomic_files import replace_file

__all__ = ["Compiled", "Form", "KeptGraph", "Outline", "find", "keep", "key_of", "outline_of", "source_tag"]

# what a call may be given besides tensors: what the text of a graph tells apart
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@attrs.frozen
class Outline:
    """What a caller has to know of a graph.

    Attributes:
        wiring: which inputs and constants are left, and where its outputs are.
        random: whether the graph itself draws.
        written: which inputs it writes into.
        text: the same for graphs that compile to the same.
    """

    wiring: Wiring
    random: bool
    written: frozenset[int]
    text: str


@attrs.frozen(kw_only=True)
class Form:
    """How a graph is compiled and called.

    Attributes:
        cpp_wrapper: whether C++ calls its kernels.
        adds_by_index: whether it adds into entries that tensors choose, which torch does in any order unless it is told.
    """

    cpp_wrapper: bool
    adds_by_index: bool


@attrs.frozen
class Compiled:
    """A graph that Inductor has compiled.

    Attributes:
        key: its name in Inductor's cache.
        form: how it was compiled.
    """

    key: str
    form: Form


@attrs.frozen
class KeptGraph:
    """All that calling a compiled graph needs.

    Attributes:
        outline: of the whole.
        split: how its parts are called; None where it has none.
        compiled: the main graph, and the kernels of its parts.
    """

    outline: Outline
    split: Split | None
    compiled: tuple[Compiled, ...]


def outline_of(
    module: fx.GraphModule, wiring: Wiring, inputs: Sequence[Tensor], written: frozenset[int]
) -> Outline:
    """Make the outline of a functional graph that takes tensors like ``inputs``."""
    random = any(is_random(node) for node in module.graph.nodes if node.op == "call_function")
    return Outline(wiring, random, written, _digest(module.code, _forms(inputs)))


def key_of(module: fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """Name the graph that a first trace has given; None if its text does not say all of it."""
    from torch._inductor import config

    if not on_cpu(inputs) or not config.fx_graph_cache or config.force_disable_caches:
        return None
    for node in module.graph.nodes:
        target = node.target
        known = isinstance(target, torch._ops.OpOverload) and target.namespace in {"aten", "prims"}
        if node.op == "call_function" and not known and target is not operator.getitem:
            return None
        if node.op not in {"call_function", "placeholder", "output"}:
            return None
        plain: list[bool] = []

        def look(one: Any, plain: list[bool] = plain) -> None:
            plain.append(isinstance(one, (fx.Node, *_PLAIN)))

        fx.node.map_aggregate((node.args, node.kwargs), look)
        if not all(plain):
            return None
    return _digest(module.code, _forms(inputs), _settings(inputs), source_tag())


def find(key: str | None) -> KeptGraph | None:
    """What is kept under a key."""
    if key is None:
        return None
    try:
        return _read(json.loads(_file(key).read_bytes()))
    except Exception:  # noqa: BLE001  (absent, of a full disk or damaged: it is made anew)
        return None


def keep(key: str, graph: KeptGraph) -> None:
    """Keep a graph; nothing is said if the disk takes none."""
    path = _file(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(attrs.asdict(graph), default=_as_json).encode())


def _as_json(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else sorted(value)


def _read(found: dict[str, Any]) -> KeptGraph:
    outline, split = found["outline"], found["split"]
    return KeptGraph(
        Outline(
            Wiring(tuple(outline["wiring"]["inputs"]), tuple(outline["wiring"]["given"])),
            outline["random"], frozenset(outline["written"]), outline["text"],
        ),
        None if split is None else Split(
            tuple(split["inputs"]),
            tuple(
                Kernel(tuple((number, getattr(torch, dtype)) for number, dtype in kernel["kinds"]), kernel["length"])
                for kernel in split["kernels"]
            ),
            tuple(
                Part(part["kernel"], tuple(part["taken"]), tuple(part["shape"]), tuple(part["stride"]))
                for part in split["parts"]
            ),
            tuple((number, at) for number, at in split["outputs"]),
        ),
        tuple(Compiled(compiled["key"], Form(**compiled["form"])) for compiled in found["compiled"]),
    )  # fmt: skip


@cache
def source_tag() -> str:
    """A digest of the modules that make graphs."""
    folder = Path(__file__).parent
    return _digest(*[file.read_bytes() for file in sorted(folder.glob("*.py"))])


def _file(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "steploop" / key


def _settings(inputs: Sequence[Tensor]) -> str:
    """A digest of torch and of its settings that may change what is made of a graph for the CPU.

    Torch's own digest (``FxGraphHashDetails``) reads all of torch's files and imports all of Inductor: a second.
    """
    from torch._inductor import config

    chosen = [
        (str(call), getattr(to, "__module__", ""), getattr(to, "__qualname__", ""))
        for call, to in table_for(inputs).items()
    ]
    return _digest(
        _torch_files(), sorted(chosen), sorted(config.save_config_portable(ignore_private_configs=False).items()),
        torch.compiler.config.cache_key_tag, torch.get_default_dtype(), torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(), *libraries(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]  # set by a module of its own class
    )  # fmt: skip


@cache
def _torch_files() -> str:
    """A digest of torch's version and of the times and sizes of its Python files, in case somebody edits them."""
    root = Path(torch.__file__).parent
    stats = [
        (name, file.name, (stat := file.stat()).st_mtime_ns, stat.st_size)
        for name in (
            "_decomp",
            "_dispatch",
            "_functorch",
            "_inductor",
            "_prims",
            "_refs",
            "_subclasses",
            "fx",
        )
        for file in sorted((root / name).rglob("*.py"))
    ]
    return _digest(torch.__version__, torch.version.git_version, stats)


def _forms(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors]


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
