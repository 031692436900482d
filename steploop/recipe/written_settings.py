"""Read the settings of a recipe from its text: names, defaults and comments, without running it."""

import ast
import io
import tokenize
from pathlib import Path

import attrs

from steploop.errors import ConfigError

__all__ = ["WrittenSetting", "settings_in"]


@attrs.frozen
class WrittenSetting:
    """A field of ``Config`` as its author wrote it.

    Attributes:
        name: of the field.
        default: as ``--set`` takes it where it is a plain value, else its expression.
        comment: what stands beside it, or in the lines above it; without either, the choices of a ``Literal``.
    """

    name: str
    default: str
    comment: str


def settings_in(path: Path) -> list[WrittenSetting]:
    """Read the fields of a recipe's ``Config``, in its order.

    Fields that it inherits from a class of another file are not seen.

    Raises:
        ConfigError: the file cannot be read, or is not Python.

    Example:
        >>> from steploop.recipe import find_recipe
        >>> settings_in(find_recipe("mnist"))[2]
        WrittenSetting(name='hidden', default='128', comment='units of the hidden layer')
    """
    try:
        source = path.read_bytes()
        tree = ast.parse(source)
        comments = _comments(source)
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise ConfigError(f"The recipe {path} is not Python: {error}.") from error
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, WrittenSetting] = {}
    for node in _with_bases("Config", classes):
        end = node.lineno
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                name = field.target.id
                comment = _comment(field, end, comments) or _choices(field.annotation)
                found[name] = WrittenSetting(name, _default(field.value), comment)
            end = field.end_lineno or field.lineno
    return list(found.values())


def _with_bases(name: str, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """A class after those of the file that it inherits from, so that its own fields come last."""
    node = classes.pop(name, None)
    if node is None:
        return []
    names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return [*(found for base in names for found in _with_bases(base, classes)), node]


def _comments(source: bytes) -> dict[int, tuple[str, bool]]:
    """Line number -> its comment, and whether the line holds nothing else."""
    tokens = tokenize.tokenize(io.BytesIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("#").strip(), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _comment(field: ast.AnnAssign, before: int, comments: dict[int, tuple[str, bool]]) -> str:
    """The comments in the lines of a field; else those in the lines between it and what stands before it."""
    inside = range(field.lineno, (field.end_lineno or field.lineno) + 1)
    found = [comments[line][0] for line in inside if line in comments]
    if not found:
        above: list[str] = []
        line = field.lineno - 1
        while line > before and comments.get(line, ("", False))[1]:
            above.insert(0, comments[line][0])
            line -= 1
        found = above
    return " ".join(found)


def _choices(annotation: ast.expr) -> str:
    """The choices of a ``Literal``, as a person lists them; "" for any other type."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Literal")):
        return ""
    parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    *first, last = [
        str(part.value) if isinstance(part, ast.Constant) else ast.unparse(part) for part in parts
    ]
    return f"{', '.join(first)} or {last}" if first else last


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):  # attrs.field(default=..., validator=...)
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        value = given.get("default", value)
    if value is None:
        return ""
    try:
        plain = ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)
    if isinstance(plain, (tuple, list)):
        return ",".join(map(str, plain))
    return "none" if plain is None else str(plain)
