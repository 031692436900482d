"""Label runs by the fields of their Config that differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from steploop.runs.reading import RunRecord
from steploop.runs.safe_text import safe_text

__all__ = ["differences", "labels", "settings", "short"]

_LONGEST = 2000  # characters of a list or of nested values
_OUTSIDE = ("precision", "device", "compile")


def settings(run: RunRecord) -> dict[str, Any]:
    """What may tell a run from another: recipe, fields of its Config, precision, device, compilation."""
    found: dict[str, Any] = {"recipe": run.recipe, **run.fields}
    found.update({key: run.config[key] for key in _OUTSIDE if key in run.config and key not in found})
    return found


def differences(runs: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """Setting -> its value in each run (None where it has none), for the settings that are not the same in all."""
    all_settings = [settings(run) for run in runs]
    keys = dict.fromkeys(key for one in all_settings for key in one)
    table = {key: tuple(one.get(key) for one in all_settings) for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values[1:])}


def short(value: Any) -> str:
    """A setting as it is written on a command line, safe to print."""
    text = _written(value)
    return safe_text(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}")


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if isinstance(value, bool) else "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ",".join(f"{k}={_written(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(_written(v) for v in value)
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """A label for each run: what differs in its Config, and its directory where that alone does not tell."""
    if len(runs) == 1:
        return [safe_text(runs[0].name)]
    different = differences(runs)
    names = [
        " ".join(
            short(values[i]) if key == "recipe" else f"{key}={short(values[i])}"
            for key, values in different.items()
        )
        for i in range(len(runs))
    ]
    places = [safe_text(run.name) for run in runs]
    if len(set(places)) < len(places):
        places = [safe_text(run.path) for run in runs]
    return [
        name if name and names.count(name) == 1 else f"{name} ({place})" if name else place
        for name, place in zip(names, places, strict=True)
    ]
