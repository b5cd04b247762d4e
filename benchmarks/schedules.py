"""Every schedule with response, feature and relation losses on handwritten digits: accuracy over
seeds, and cost.

Trains the recipes of recipes/digits/schedules, each with its own losses, with `hint` added and with
`rkd_distance` added, and prints a table in Markdown. Beside each stands the student alone with as
many optimizer steps, as more steps help by themselves. Runs that are there already are reused, so
that a table with more seeds trains only what is new.

    python benchmarks/schedules.py --seeds 5
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks, training

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "digits"
ADDED: dict[str, list[dict[str, Any]]] = {
    "": [],
    "+ hint": [{"use": "hint", "layers": [{"student": "layer3", "teacher": "layer3"}]}],
    "+ rkd_distance": [
        {
            "use": "rkd_distance",
            "weight": 10,
            "layers": [{"student": "penultimate", "teacher": "penultimate"}],
        }
    ],
}


def accuracies(
    path: Path,
    added: Sequence[dict[str, Any]],
    seeds: int,
    changes: Mapping[str, Any] | None = None,
) -> list[float]:
    """Top-1 on test data after the last epoch, one per seed; `changes` are values by key path.

    Raises:
        RecipeError: the losses have nobody to learn from under this schedule.
    """
    plain = recipe.load(path).plain()
    # whose features an ensemble has none of
    several = {"teacher": "teacher1"} if plain.get("teachers") else {}
    losses = [*plain["losses"], *({**entry, **several} for entry in added)]
    found = []
    for seed in range(seeds):
        loaded = recipe.load(path, {"losses": losses, "seed": seed, **(changes or {})})
        longer = f"-{loaded.spec.train.epochs}-epochs" if changes else ""
        folder = training.folder_for(
            loaded, loaded.spec.run.folder, f"{loaded.spec.name}-{len(losses)}{longer}-seed{seed}"
        )
        found.append(training.train(loaded, folder, quiet=True).test["top1"])
    return found


def cell(path: Path, added: Sequence[dict[str, Any]], seeds: int, notes: list[str]) -> str:
    """Mean and deviation, or a dash where the combination cannot be; why is noted."""
    try:
        found = accuracies(path, added, seeds)
    except RecipeError as error:
        notes.append(f"{path.stem}: {str(error).splitlines()[0].split(': ', 1)[1]}")
        return "-"
    return spread(found)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f}" + (
        f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    )


def alone_for(steps: int, seeds: int) -> str:
    """What the student alone reaches with so many optimizer steps, to the next whole epoch."""
    path = RECIPES / "alone.yaml"
    [stage] = checks.make(recipe.load(path)).stages
    epochs = math.ceil(steps / (stage.steps // stage.epochs))
    return spread(
        accuracies(path, [], seeds, {"train.epochs": epochs} if epochs != stage.epochs else None)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of recipes")
    chosen = parser.parse_args()
    notes: list[str] = []
    added = " | ".join(name for name in ADDED if name)
    print(
        "| recipe | cost of a step | steps | alone with as many steps | losses of the recipe |"
        f" {added} |"
    )
    print("| --- " * (len(ADDED) + 4) + "|")
    paths = [RECIPES / "alone.yaml", *sorted((RECIPES / "schedules").glob("*.yaml"))]
    for path in paths:
        if path.stem == "base" or (chosen.only and path.stem not in chosen.only):
            continue
        stages = checks.make(recipe.load(path)).stages
        cost, steps = (
            "; ".join(dict.fromkeys(str(stage.cost) for stage in stages)),
            sum(stage.steps for stage in stages),
        )
        cells = [cell(path, added, chosen.seeds, notes) for added in ADDED.values()]
        print(
            f"| {path.stem} | {cost} | {steps} | {alone_for(steps, chosen.seeds)} |"
            f" {' | '.join(cells)} |",
            flush=True,
        )
    print(
        f"\nTop-1 % on test data after the last epoch, {chosen.seeds} seeds, mean +- standard"
        " deviation."
    )
    print("\n".join(f"- {note}" for note in dict.fromkeys(notes)))


if __name__ == "__main__":
    main()
