"""Settings that somebody wrote for another program, in our words: taken over, agreeing, or refused as different."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Wish:
    """One such setting: `variable=said` means `key=value`."""

    variable: str
    said: str
    key: str
    value: Any


def adopt(
    recipe: Recipe, wish: Wish, change: str = "change the launcher's setting or the recipe"
) -> tuple[Recipe, list[str]]:
    """Take the wish over where the recipe is silent; nothing to do where they agree; ConfigError where they differ."""
    section_name, name = wish.key.split(".")
    section = getattr(recipe, section_name)
    current = getattr(section, name)
    if current == wish.value:
        return recipe, []
    if name in section.model_fields_set and current != "auto":
        raise ConfigError(
            f"{wish.variable}={wish.said} means {wish.key}={wish.value}, but the recipe says {wish.key}={current}: "
            f"{change}"
        )
    changed = section.model_copy(update={name: wish.value})
    return recipe.model_copy(update={section_name: changed}), [
        f"{wish.key}={wish.value} taken from {wish.variable}={wish.said}"
    ]
