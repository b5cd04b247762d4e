"""The keys of a study file, and their JSON Schema for editors."""

from __future__ import annotations

import json
import math
import random
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from kdkit.contracts.options import LONGEST_NAME, RUN_NAME, FolderPath, Options, RecipePath
from kdkit.recipe import types
from kdkit.recipe.registry import Registry

SEEDS = 3  # default number of seeds
MOST_SEEDS = 1000
Seed = Annotated[int, Field(ge=0, strict=True)]
Seeds = (
    # Strict, as pydantic would take `true` or "3" for a number.
    Annotated[int, Field(gt=0, le=MOST_SEEDS, strict=True)]
    | Annotated[list[Seed], Field(min_length=1, max_length=MOST_SEEDS)]
)


class Range(Options):
    """A range of numbers, of which some are tried."""

    from_: float = Field(alias="from", allow_inf_nan=False, description="Smallest value.")
    to: float = Field(allow_inf_nan=False, description="Largest value.")
    scale: Literal["linear", "log"] = Field(
        default="linear", description="Scale on which the draws are evenly spread."
    )
    draws: int = Field(
        gt=1,
        le=1000,
        strict=True,
        description=(
            "How many: one at random in each of so many equal parts. Several ranges are drawn"
            " together, not as a grid."
        ),
    )

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.from_ >= self.to:
            raise ValueError("`from` has to be below `to`")
        if self.scale == "log" and self.from_ <= 0:
            raise ValueError("a range on a log scale begins above 0")
        return self

    def draw(self, key: str, *, shuffle: bool) -> list[float]:
        """Draw its values, always the same for a key, in rising or in random order."""
        generator = random.Random(key)
        parts = [(part + generator.random()) / self.draws for part in range(self.draws)]
        if shuffle:
            generator.shuffle(parts)
        return [self._at(part) for part in parts]

    def _at(self, part: float) -> float:
        """Return the value at a part of the way, with three digits."""
        low, high = self.from_, self.to
        if self.scale == "log":
            value = math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
        else:
            value = low + part * (high - low)
        # rounded: names and recipes are read by people
        return min(max(float(f"{value:.3g}"), low), high)


Values = Annotated[
    Annotated[Annotated[list[Any], Field(min_length=1)], Tag("list")]
    | Annotated[Range, Tag("range")],
    # by its form, so that an error is that of the form which was meant
    Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "list"),
]


class HalvingSpec(Options):
    """How `kdkit search` halves the candidates."""

    eta: int = Field(
        default=3,
        ge=2,
        le=10,
        strict=True,
        description="Of so many candidates of a rung, one goes on to the next.",
    )
    rungs: int = Field(
        default=3,
        ge=1,
        le=10,
        strict=True,
        description=(
            "Number of rungs: the last trains to the end, each one before for 1/eta of the epochs"
            " that the next has after the warm-up."
        ),
    )


class StudySpec(Options):
    """A study: what is compared, and over which seeds."""

    name: str = Field(
        pattern=RUN_NAME,
        max_length=LONGEST_NAME,
        description="Name of the study and of its folder.",
    )
    question: str = Field(default="", description="What it asks, for its report.")
    base: RecipePath | dict[str, Any] | None = Field(
        default=None,
        description="Recipe that the variants build on: a file, or a recipe written out.",
    )
    baseline: str | None = Field(
        default=None, description="Variant that the others are compared with (default: the first)."
    )
    variants: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description=(
            "By name, what is merged over the base; `recipe: FILE` takes another recipe in its"
            " place."
        ),
    )
    vary: dict[str, Values] = Field(
        default_factory=dict,
        description=(
            "Values by key path, a list or a range: every variant that has the key is trained with"
            " each; several keys are a grid."
        ),
    )
    search: HalvingSpec = Field(
        default=HalvingSpec(), description="How `kdkit search` halves what `vary` makes."
    )
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description=(
            "Values by key path, which all variants have: each is trained with all combinations,"
            " and goes on with the one that is best on validation data."
        ),
    )
    tune_seeds: Seeds = Field(
        default=2,
        description="Of the search: how many (the first that are not in `seeds`), or which.",
    )
    seeds: Seeds = Field(default=SEEDS, description="How many (0, 1, 2...), or which.")
    allow: tuple[str, ...] = Field(
        default=(),
        description="Keys in which variants may differ although they are not what is compared.",
    )
    show: tuple[str, ...] = Field(
        default=(),
        description=(
            "Further columns of the table: scores of the runs by name, `loss` (training loss of the"
            " last epoch), `late_loss` (its mean over the last 60 % of the epochs). Scores that"
            " recipes name under `metrics` need not be named again."
        ),
    )
    folder: FolderPath | None = Field(
        default=None, description="In place of the recipes' `run.folder`."
    )

    @field_validator("seeds", "tune_seeds")
    @classmethod
    def _once_each(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError("a seed is given twice")
        return value


def schema(plugins: Registry) -> str:
    """Build the schema: a study's own keys, and recipes in their places; a variant may contain any
    part of a recipe.
    """
    recipe = json.loads(types.schema(plugins))
    shared = recipe.pop("$defs")
    _require_nothing(shared)
    replaced = {"type": "string", "description": "Recipe file in the place of the base."}
    variant = {
        **recipe,
        "title": "Variant",
        "properties": {**recipe["properties"], "recipe": replaced},
    }
    content = StudySpec.model_json_schema()
    keys = content["properties"]
    # StudySpec cannot name the types of recipes: they depend on the plugins that are found.
    keys["base"]["anyOf"] = [{"type": "string"}, {"$ref": "#/$defs/Recipe"}]
    keys["variants"]["additionalProperties"] = {
        "anyOf": [{"$ref": "#/$defs/Variant"}, {"type": "null"}]
    }
    keys["extends"] = {
        "type": "string",
        "description": "Study file that this one builds on: mappings merge, lists replace.",
    }
    content["$defs"] = {**content.get("$defs", {}), **shared, "Recipe": recipe, "Variant": variant}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _require_nothing(node: Any) -> None:
    """Remove `required` from a section, as the base may supply what is missing."""
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _require_nothing(child)
    # A recipe key may be called `required`; only a list is the schema's own word.
    if isinstance(node, dict) and isinstance(node.get("required"), list):
        del node["required"]
