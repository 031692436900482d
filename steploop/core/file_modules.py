"""Load a Python file as a module under any name, and let a worker process find that module again."""

import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing as mp
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["HeldSource", "file_modules", "load_file", "offer_modules"]


class HeldSource(importlib.machinery.SourceFileLoader):
    """Run the text that it holds, not what is in the file by now, and leave no ``__pycache__``.

    Args:
        name: the module's name.
        path: the file, for tracebacks.
        text: its bytes when it was read.
    """

    def __init__(self, name: str, path: str, text: bytes) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002  (importlib's signature)
        """Compile the held text."""
        return self.source_to_code(self.text, self.path)


def load_file(name: str, path: Path, text: bytes) -> ModuleType:
    """Run a file as the module ``name``, which ``sys.modules`` then holds.

    Raises:
        Exception: what the file raises.
    """
    spec = importlib.util.spec_from_file_location(name, path, loader=HeldSource(name, str(path), text))
    assert spec is not None  # noqa: S101  (there is a loader)
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def file_modules() -> list[tuple[str, str, bytes | None]]:
    """List the modules that ``import`` would not find: name, file, and the text that was run, if it is known.

    A new process (start methods spawn and forkserver) must be given them: classes are unpickled by the name of
    their module.
    """
    found: list[tuple[str, str, bytes | None]] = []
    for name, module in list(sys.modules.items()):
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        if (
            "." in name
            or name.startswith("__")
            or not isinstance(loader, importlib.machinery.SourceFileLoader)
        ):
            continue
        path = Path(loader.path)
        if path.stem != "__init__" and (path.stem != name or str(path.parent) not in sys.path):
            found.append((name, str(path), getattr(loader, "text", None)))
    return found


def offer_modules(modules: list[tuple[str, str, bytes | None]]) -> None:
    """Let ``import`` find the modules that another process listed; called in a new process."""
    sys.meta_path.append(_Offered(modules))


class _Offered(importlib.abc.MetaPathFinder):
    """Asked last, so that nothing is run that is not needed."""

    def __init__(self, modules: list[tuple[str, str, bytes | None]]) -> None:
        self._modules = {name: (path, text) for name, path, text in modules}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  (the import system's signature)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._modules:
            return None
        file, text = self._modules[fullname]
        loader = _InWorker(fullname, file, Path(file).read_bytes() if text is None else text)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


class _InWorker(HeldSource):
    def exec_module(self, module: ModuleType) -> None:
        """Run the module; it may choose a start method, as it did where it was run first."""
        method = mp.get_start_method(allow_none=True)
        mp.set_start_method(None, force=True)
        try:
            super().exec_module(module)
        finally:
            mp.set_start_method(method, force=True)
