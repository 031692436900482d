"""Find the modules that a recipe imports from its own folder, and digest them."""

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["imported_modules"]


def imported_modules(source: bytes, folder: Path) -> dict[str, str]:
    """Dotted name -> SHA-256 of each module below ``folder`` that a source imports, by itself or through another one.

    They are found by reading: imports inside of functions count, those by ``importlib`` do not. A name that Python
    takes from elsewhere (of an installed package, say) is left out, and so is steploop, whose version is recorded.
    """
    found: dict[str, str] = {}
    waiting = [(source, "")]
    while waiting:
        text, package = waiting.pop()
        for name in _imports(text, package):
            path = _file_of(name, folder)
            if (
                path is None
                or name in found
                or name.partition(".")[0] == "steploop"
                or _taken_from_elsewhere(name, path)
            ):
                continue
            try:
                inner = path.read_bytes()
            except OSError:
                continue
            found[name] = hashlib.sha256(inner).hexdigest()
            waiting.append((inner, name if path.name == "__init__.py" else name.rpartition(".")[0]))
    return dict(sorted(found.items()))


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Every module that a source may import, the packages above it too; a package's names may be modules."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if node.level and package else []
            base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _file_of(name: str, folder: Path) -> Path | None:
    place = folder.joinpath(*name.split(".")) if name else folder
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


def _taken_from_elsewhere(name: str, path: Path) -> bool:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return loaded is not None and Path(loaded).resolve() != path.resolve()
