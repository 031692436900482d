"""The class of all commands: options in groups, the settings of a recipe in its help, errors that name the nearest."""

import difflib
from typing import Any

import typer
from typer.core import TyperCommand

from steploop.errors import ConfigError
from steploop.tools.commands.completion import WORDS, recipe_among

__all__ = ["Command"]

_UsageError: Any = typer.BadParameter.__base__  # click's; newer versions of typer bring a click of their own


class Command(TyperCommand):
    """A command as ``steploop`` shows it.

    Options stand in the group that they name as ``rich_help_panel``. Where a recipe is given, its settings are listed.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the command; an option that there is not is refused with what was meant."""
        ctx.meta[WORDS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if (name := getattr(error, "option_name", None)) and "No such option" in str(error.message):
                raise _UsageError(f"There is no option {name}. {self._meant(ctx, name)}", ctx=ctx) from None
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, the settings of the recipe that is given, and the options in their groups."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        arguments: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is None:
                continue
            if param.param_type_name == "argument":
                arguments.append(record)
            else:
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in [("Arguments", arguments), *self._settings(ctx), *groups.items()]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def _settings(self, ctx: Any) -> list[tuple[str, list[tuple[str, str]]]]:
        """The settings of the recipe among the words, as a group of the help."""
        if not any(param.name == "overrides" for param in self.params):
            return []
        try:
            found = self._recipe_settings(ctx)
        except ConfigError as error:
            return [("Settings", [("", str(error))])]
        if found is None:
            return []
        name, settings = found
        return [(f"Settings of {name}, given as --set NAME=VALUE", settings)]

    def _recipe_settings(self, ctx: Any) -> tuple[str, list[tuple[str, str]]] | None:
        from steploop.recipe.written_settings import settings_in

        path = recipe_among(ctx)
        if path is None:
            return None
        return path.stem, [(f"{one.name}={one.default}", one.comment) for one in settings_in(path)]

    def _meant(self, ctx: Any, name: str) -> str:
        """What may have been meant by an option that there is not: another one, or a setting of the recipe."""
        setting = name.lstrip("-").replace("-", "_")
        try:
            found = self._recipe_settings(ctx)
        except ConfigError:
            found = None
        names = [] if found is None else [text.partition("=")[0] for text, _ in found[1]]
        options = [
            option for param in self.get_params(ctx) for option in param.opts if option.startswith("--")
        ]
        if near := difflib.get_close_matches(name, options, n=1, cutoff=0.85):
            return f"Did you mean {near[0]}?"
        if found is not None and (close := difflib.get_close_matches(setting, names, n=1, cutoff=0.8)):
            return f"{close[0]} is a setting of {found[0]}: give --set {close[0]}=VALUE."
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
        return (
            f"Did you mean {near[0]}?"
            if near
            else f"steploop {ctx.info_name} --help lists those that there are."
        )
