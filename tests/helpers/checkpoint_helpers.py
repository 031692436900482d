"""What the tests of checkpoints share: small states, files in memory, a model of a power loss, and faults on demand."""

import errno
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
    update_ema,
)
from steploop.checkpoint.storage.local import LOCAL

# -- states ------------------------------------------------------------------------------------------------------


def make_model(seed: int = 0, *, width: int = 5) -> nn.Module:
    """A small network with everything that is awkward: convolution in channels_last, BatchNorm, dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * 4, width),
    )


def make_state(seed: int = 0, *, optimizer: Optimizer | None = None, **options: Any) -> TrainState:
    """Its first state; ``seed`` is of the initial weights, so that two seeds differ everywhere."""
    options = {"ema": True, "precision": "fp16", "memory_format": torch.channels_last, "seed": 1} | options
    description = optimizer or Optimizer(torch.optim.AdamW, lr=1e-2, no_decay=True)
    return TrainState.create(make_model(seed), description, **options)


def make_linear(seed: int = 0, *, optimizer: Optimizer | None = None, **options: Any) -> TrainState:
    """The smallest state that has slots."""
    torch.manual_seed(seed)
    return TrainState.create(
        nn.Linear(3, 2), optimizer or Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9), **options
    )


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """The same ones every time."""
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, 3, 4, 4, generator=generator), torch.randint(0, 5, (6,), generator=generator))
        for _ in range(count)
    ]


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train_step(state: TrainState, batch: Any) -> TrainState:
    state = forward_loss(state, batch, objective)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=1.0)
    state = optimizer_step(state)
    return update_ema(state, decay=0.9) if state.ema is not None else state


def listed(path: Path | str) -> list[str]:
    """The names in a directory, sorted."""
    return sorted(entry.name for entry in Path(path).iterdir())


def bits(tensor: Tensor) -> bytes:
    """A tensor's values to the bit, whatever its dtype and layout."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- files in memory -----------------------------------------------------------------------------------------------


class MemoryFile:
    def __init__(self, fs: "MemoryFs", key: int) -> None:
        self._fs, self._key = fs, key

    def write(self, data: memoryview | bytes) -> None:
        self._fs.log("write", self._key, bytes(data))
        self._fs.contents[self._key] += bytes(data)

    def sync(self) -> None:
        self._fs.log("sync", self._key)

    def close(self) -> None:
        self._fs.log("close", self._key)


class MemoryReader:
    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        part = self._data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        pass


class MemoryFs:
    """Directories and files in memory, and a journal of every change that was asked for."""

    def __init__(self, tree: Mapping[str, Mapping[str, bytes]] | None = None) -> None:
        self.directories: dict[str, dict[str, int | None]] = {"/": {}}  # None: a directory
        self.contents: dict[int, bytes] = {}
        self.journal: list[tuple[Any, ...]] = []
        for directory, files in (tree or {}).items():
            self.make_directory(Path(directory))
            for name, data in files.items():
                self.create(Path(directory) / name).write(data)
        self.journal.clear()

    def log(self, *operation: Any) -> None:
        self.journal.append(operation)

    def make_directory(self, path: Path) -> None:
        parent = self._parent(path)
        if path.name in parent:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        self.log("mkdir", str(path))
        parent[path.name] = None
        self.directories[str(path)] = {}

    def create(self, path: Path) -> MemoryFile:
        parent = self._parent(path)
        if path.name in parent:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        key = len(self.contents)
        self.contents[key] = b""
        parent[path.name] = key
        self.log("create", str(path), key)
        return MemoryFile(self, key)

    def sync_directory(self, path: Path) -> None:
        self.log("syncdir", str(path))

    def rename(self, source: Path, target: Path) -> None:
        parent = self._parent(source)
        if target.name in parent and (parent[target.name] is not None or self.directories[str(target)]):
            raise OSError(errno.ENOTEMPTY, "not empty", str(target))
        self.log("rename", str(source), str(target))
        parent[target.name] = parent.pop(source.name)
        if str(source) in self.directories:
            self.directories[str(target)] = self.directories.pop(str(source))

    def names(self, path: Path) -> list[str]:
        return sorted(self.directories.get(str(path), {}))

    def unlink(self, path: Path) -> None:
        self.log("unlink", str(path))
        del self._parent(path)[path.name]

    def remove_directory(self, path: Path) -> None:
        self.log("rmdir", str(path))
        assert not self.directories.pop(str(path)), "only an empty directory can be removed"
        del self._parent(path)[path.name]

    def is_directory(self, path: Path) -> bool:
        return str(path) in self.directories

    def exists(self, path: Path) -> bool:
        return str(path) in self.directories or path.name in self.directories.get(str(path.parent), {})

    def open(self, directory: Path, name: str) -> MemoryReader:
        key = self.directories.get(str(directory), {}).get(name)
        if key is None:
            raise FileNotFoundError(errno.ENOENT, "missing", name)
        return MemoryReader(self.contents[key])

    def tree(self) -> dict[str, dict[str, bytes]]:
        """Directory -> file -> content."""
        return {
            directory: {name: self.contents[key] for name, key in entries.items() if key is not None}
            for directory, entries in self.directories.items()
            if directory != "/"
        }

    def _parent(self, path: Path) -> dict[str, int | None]:
        try:
            return self.directories[str(path.parent)]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "missing", str(path.parent)) from None


# -- a power loss --------------------------------------------------------------------------------------------------


class _Node:
    """A file or a directory as the disk knows it, and what is still in memory only."""

    def __init__(self, entries: dict[str, "_Node"] | None = None, data: bytes = b"") -> None:
        self.entries = entries  # None: a file
        self.data = data
        self.pending: list[tuple[Any, ...]] = []


def after_power_loss(  # noqa: C901  (one branch for each operation of the protocol)
    start: Mapping[str, Mapping[str, bytes]], journal: list[tuple[Any, ...]], rng: random.Random
) -> dict[str, dict[str, bytes]]:
    """What a disk may hold when the power fails after the operations of ``journal``.

    A file's writes since its last flush are each kept, lost (as zeros, where a later one is kept), torn or turned into
    garbage; a directory's changes since its last flush each arrive or do not, in any combination. A rename within one
    directory is one change. This is more than a journalling file system does, and less than none would.
    """
    root = _Node({})
    seen: dict[str, _Node] = {"/": root}  # by the path that the program sees
    files: dict[int, _Node] = {}
    for directory, contents in start.items():
        node = _Node({name: _Node(data=data) for name, data in contents.items()})
        seen[directory] = node
        seen |= {f"{directory}/{name}": child for name, child in node.entries.items()}
        root.entries[directory.lstrip("/")] = node
    for operation, *arguments in journal:  # one branch for each operation of the protocol
        if operation in {"mkdir", "create"}:
            path = Path(arguments[0])
            node = _Node({}) if operation == "mkdir" else _Node()
            seen[str(path)] = node
            if operation == "create":
                files[arguments[1]] = node
            seen[str(path.parent)].pending.append(("add", path.name, node))
        elif operation == "write":
            files[arguments[0]].pending.append(arguments[1])
        elif operation == "sync":
            node = files[arguments[0]]
            node.data += b"".join(node.pending)
            node.pending.clear()
        elif operation == "syncdir":
            node = seen[arguments[0]]
            for change in node.pending:
                _apply(node, change)
            node.pending.clear()
        elif operation == "rename":
            source, target = map(Path, arguments)
            seen[str(source.parent)].pending.append(("rename", source.name, target.name))
            seen = {_moved(path, source, target): node for path, node in seen.items()}
        elif operation in {"unlink", "rmdir"}:
            path = Path(arguments[0])
            seen.pop(str(path))
            seen[str(path.parent)].pending.append(("remove", path.name))
    return {
        f"/{name}": {
            child: _torn(file, rng) for child, file in _surviving(node, rng).items() if file.entries is None
        }
        for name, node in _surviving(root, rng).items()
        if node.entries is not None
    }


def _moved(path: str, source: Path, target: Path) -> str:
    return str(target / Path(path).relative_to(source)) if Path(path).is_relative_to(source) else path


def _apply(directory: _Node, change: tuple[Any, ...]) -> None:
    kind, name, *rest = change
    if kind == "add":
        directory.entries[name] = rest[0]
    elif kind == "remove":
        directory.entries.pop(name, None)
    elif name in directory.entries:
        directory.entries[rest[0]] = directory.entries.pop(name)


def _surviving(directory: _Node, rng: random.Random) -> dict[str, _Node]:
    after = _Node(dict(directory.entries))
    keep = rng.choice([0.0, 0.5, 0.9, 1.0])
    for change in directory.pending:
        if rng.random() < keep:
            _apply(after, change)
    return after.entries


def _torn(file: _Node, rng: random.Random) -> bytes:
    data, keep = file.data, rng.choice([0.0, 0.5, 1.0])
    for write in file.pending:
        luck = rng.random()
        if luck < keep:
            data += write
        elif luck < keep + 0.2:
            data += bytes(len(write))
        elif luck < keep + 0.3:
            data += rng.randbytes(len(write))
        elif luck < keep + 0.4:
            data += write[: rng.randrange(len(write) + 1)]
            break
    return data


# -- faults ----------------------------------------------------------------------------------------------------------


class FaultyFs:
    """The real files, where one operation fails: the ``nth``, or from the ``nth`` on."""

    def __init__(
        self,
        nth: int,
        *,
        sticky: bool = False,
        number: int = errno.EIO,
        within: Callable[[str], bool] | None = None,
    ) -> None:
        self.count, self.nth, self.sticky, self.number = 0, nth, sticky, number
        self.failed: list[str] = []
        self._within = within or (lambda _: True)

    def check(self, operation: str) -> None:
        if not self._within(operation):
            return
        self.count += 1
        if self.count == self.nth or (self.sticky and self.count > self.nth):
            self.failed.append(operation)
            raise OSError(self.number, f"injected into {operation}")

    def __getattr__(self, name: str) -> Any:
        real = getattr(LOCAL, name)
        if name in {"names", "is_directory", "exists", "open"}:
            return real

        def call(*arguments: Any) -> Any:
            self.check(name)
            result = real(*arguments)
            return _FaultyFile(self, result) if name == "create" else result

        return call


class _FaultyFile:
    def __init__(self, fs: FaultyFs, file: Any) -> None:
        self._fs, self._file = fs, file

    def write(self, data: memoryview | bytes) -> None:
        self._fs.check("write")
        self._file.write(data)

    def sync(self) -> None:
        self._fs.check("sync")
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        self._fs.check("close")
