"""Turns what a run directory says into values of the expected types, and lists what is not of its type."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from steploop.runs.logger_options import LOGGER_OPTIONS
from steploop.runs.safe_text import safe_lines, safe_text

__all__ = [
    "Line",
    "Status",
    "checked_config",
    "checked_line",
    "checked_status",
    "is_number",
    "is_whole_line",
    "unresumable",
]

Line = Mapping[str, Any]

MOST_STEPS: Final = 1 << 53
_STATES: Final = frozenset({"running", "finished", "interrupted", "failed"})
_ENDINGS: Final = {"finished", "early_stop", "limit", "interrupted"}
_WIDEST: Final = 1 << 1000
_LONGEST_S: Final = 1e12
_TEXTS: Final = ("steploop", "device", "precision", "data", "git_commit")
_CHECKED: Final = frozenset({*_TEXTS, "recipe", "config", "versions", "tuning", "command", "compile"})
_LONGEST_NAME: Final = 200  # characters of a metric's or a setting's name


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold (True and False are none)."""
    if type(value) is int:
        return -_WIDEST <= value <= _WIDEST
    return isinstance(value, float) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number that steps can be counted with."""
    return type(value) is int and 0 <= value < MOST_STEPS


def is_duration(value: Any) -> bool:
    """Whether a value is a number of seconds, or of some other amount that adds up."""
    return is_number(value) and 0 <= value < _LONGEST_S


def name_of(key: Any) -> str:
    """A name as it is shown: short, and safe to print."""
    text = safe_text(str(key)[:_LONGEST_NAME])
    return text if len(str(key)) <= _LONGEST_NAME else f"{text}…"


@attrs.frozen(kw_only=True)
class Status:
    """What status.json says.

    Attributes:
        state: running, finished, interrupted, failed; or "" if it says none of these.
        pid, host: of the process that wrote it.
        step: applied steps.
        exit_code: of the process, once it has ended.
        ending: why it ended: finished, early_stop, limit, interrupted; None where it says none of these.
        error: why a run failed, safe to print.
        metric: the name of the metric that decides which evaluation is the best.
        best: that evaluation as a line of the log, with this metric alone.
    """

    state: str = ""
    pid: int | None = None
    host: str | None = None
    step: int | None = None
    exit_code: int | None = None
    ending: str | None = None
    error: str | None = None
    metric: str | None = None
    best: Line | None = None


class _Reader:
    """Takes values out of an object by name and type, and notes each that is of another type."""

    def __init__(self, values: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self._values = values
        self._where = where
        self._problems = problems

    def take(self, name: str, kind: type, what: str) -> Any:
        """The value, or None if it is missing, null, or noted as a problem."""
        value = self._values.get(name)
        if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
            return value
        self.note(f"{name} should be {what}, but is {_shown(value)}")
        return None

    def count(self, name: str) -> int | None:
        """A number of steps."""
        value = self._values.get(name)
        if value is None or is_count(value):
            return value
        self.note(f"{name} should be a number of steps, but is {_shown(value)}")
        return None

    def text(self, name: str) -> str | None:
        """A text, safe to print."""
        value = self.take(name, str, "a text")
        return None if value is None else safe_text(value)

    def note(self, problem: str) -> None:
        """Add a problem."""
        self._problems.append(f"{self._where}: {problem}.")


def _shown(value: Any) -> str:
    return safe_text(repr(value)[:60])


def checked_status(values: Mapping[str, Any], problems: list[str]) -> Status:
    """The status in the object of ``status.json``; what is not of its type is left out and noted in ``problems``."""
    read = _Reader(values, "status.json", problems)
    state = read.text("state")
    if state not in _STATES:
        read.note(
            f"state should be one of {', '.join(sorted(_STATES))}, but is {_shown(values.get('state'))}"
        )
        state = ""
    best = read.take("best", dict, "an object") or {}
    metrics = read.take("metrics", dict, "an object") or {}
    if not all(value is None or is_number(value) for value in metrics.values()):
        read.note("metrics should hold numbers")
    for name in ("checkpoint", "best_checkpoint", "evaluation_due"):
        read.text(name)
    read.count("epoch")
    exit_code = read.take("exit_code", int, "a whole number")
    ending = read.text("ending")
    return Status(
        state=state or "",
        pid=read.count("pid"),
        host=read.text("host"),
        step=read.count("step"),
        exit_code=exit_code if exit_code is None or abs(exit_code) < MOST_STEPS else None,
        ending=ending if ending in _ENDINGS else None,
        error=None if (error := read.take("error", str, "a text")) is None else safe_lines(error),
        metric=_Reader(best, "status.json: best", problems).text("metric"),
        best=_best_line(best),
    )


def _best_line(best: Mapping[str, Any]) -> Line | None:
    if not is_count(best.get("step")):
        return None
    place = {key: best[key] for key in ("step", "epoch") if key in best}
    metrics = {str(best.get("metric")): best.get("value")}
    return checked_line({"kind": "eval", **place, "metrics": metrics, "best": True})


_WATCHING: Final = {
    **dict.fromkeys(("log_every", "checkpoint_every", "layer_norms"), int),
    **dict.fromkeys(LOGGER_OPTIONS, bool),
}


def unresumable(values: Mapping[str, Any]) -> str | None:
    """What in the object of ``config.json`` keeps a run from being resumed; None if nothing does."""
    problems: list[str] = []
    config = checked_config(values, problems)
    recipe = config["recipe"] if isinstance(config["recipe"], dict) else {}
    missing = [f"recipe.{key}" for key in ("path", "name", "sha256") if recipe.get(key) is None]
    missing += [key for key in ("config", "device") if values.get(key) is None]
    problems += [f"config.json: {name} is missing." for name in missing]
    read = _Reader(values, "config.json", problems)
    inner = _Reader(read.take("watching", dict, "an object") or {}, "config.json: watching", problems)
    for name, kind in _WATCHING.items():
        inner.take(name, kind, "a whole number" if kind is int else "true or false")
    if not isinstance(values.get("compile"), (bool, str, type(None))):
        read.note(f"compile should be true, false or auto, but is {_shown(values['compile'])}")
    return problems[0] if problems else None


def checked_config(values: Mapping[str, Any], problems: list[str]) -> Line:
    """The object of ``config.json`` without what is not of its type, which is noted in ``problems``."""
    read = _Reader(values, "config.json", problems)
    recipe = values.get("recipe")
    if not isinstance(recipe, str):
        inner = _Reader(read.take("recipe", dict, "an object") or {}, "config.json: recipe", problems)
        recipe = {key: inner.text(key) for key in ("name", "sha256")}
        recipe["path"] = inner.take("path", str, "a text")  # as it is: a file is opened by it
        if recipe["name"] is None:
            read.note("it names no recipe")
    found: dict[str, Any] = {
        **{name_of(k): v for k, v in values.items() if k not in _CHECKED},
        "recipe": recipe if isinstance(recipe, dict) else safe_text(recipe),
    }
    found["config"] = {name_of(k): v for k, v in (read.take("config", dict, "an object") or {}).items()}
    found |= {key: read.text(key) for key in _TEXTS if key in values}
    for key in ("versions", "tuning"):
        part = read.take(key, dict, "an object") or {}
        found[key] = {name_of(k): safe_text(v) for k, v in part.items()}
    command = read.take("command", list, "a list of words") or []
    found["command"] = tuple(safe_text(word) for word in command)
    if isinstance(compiled := values.get("compile"), (bool, str)):
        found["compile"] = compiled
    return found


def checked_line(value: Mapping[str, Any]) -> Line | None:
    """A line of ``metrics.jsonl`` with names that are safe to print; None if a value in it is not of its type."""
    kind = value.get("kind")
    if not isinstance(kind, str):
        return None
    line: dict[str, Any] = {"kind": kind}
    check = _number if kind in {"train", "eval"} else _plain
    try:
        for key, part in value.items():
            if key != "kind":
                line |= _CHECKS.get(key, check)(name_of(key), part)
    except ValueError:
        return None
    return line


_NEEDED: Final = {"train": {"step", "attempted"}, "eval": {"step", "attempted", "metrics"}}


def is_whole_line(value: Mapping[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` has all that a run needs of it when it goes on."""
    line = checked_line(value)
    return line is not None and _NEEDED.get(line["kind"], set()) <= line.keys()


# Each gives the entry of a line for a value, or none for a value that is left out; ValueError for one of a wrong type.


def _count(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else _required(name, value, is_count(value))


def _duration(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else _required(name, value, is_duration(value))


def _metrics(name: str, value: Any) -> dict[str, Any]:
    numbers = isinstance(value, dict) and all(n is None or is_number(n) for n in value.values())
    return _required(name, numbers and {name_of(key): number for key, number in value.items()}, numbers)


def _flag(name: str, value: Any) -> dict[str, Any]:
    return _required(name, value, isinstance(value, bool))


def _number(name: str, value: Any) -> dict[str, Any]:
    return {name: value} if value is None or is_number(value) else {}


def _plain(name: str, value: Any) -> dict[str, Any]:
    return {name: safe_text(value) if isinstance(value, str) else value}


def _required(name: str, value: Any, right: bool) -> dict[str, Any]:
    if not right:
        raise ValueError(name)
    return {name: value}


_CHECKS: Final[Mapping[str, Callable[[str, Any], dict[str, Any]]]] = {
    **dict.fromkeys(("step", "attempted", "epoch", "batch", "skipped", "phase"), _count),
    **dict.fromkeys(("time_s", "eval_s", "data_wait"), _duration),
    "metrics": _metrics,
    "best": _flag,
}
