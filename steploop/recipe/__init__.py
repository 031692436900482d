"""Recipe: what a recipe file gives to a run, and how recipe files are found and configured."""

from typing import TYPE_CHECKING

from steploop.core.lazy import lazy_names

if TYPE_CHECKING:
    from steploop.core.extras import import_extra as import_extra
    from steploop.recipe.recipe import Logger as Logger
    from steploop.recipe.recipe import Recipe as Recipe
    from steploop.recipe.recipe_files import load_recipe_file as load_recipe_file
    from steploop.recipe.recipe_paths import find_recipe as find_recipe
    from steploop.recipe.recipe_paths import shipped_recipes as shipped_recipes

# Public name -> the module it is defined in.
_HOMES = {
    "import_extra": ".core.extras",
    "Logger": "recipe",
    "Recipe": "recipe",
    "find_recipe": "recipe_paths",
    "load_recipe_file": "recipe_files",
    "shipped_recipes": "recipe_paths",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (they are strings)

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
