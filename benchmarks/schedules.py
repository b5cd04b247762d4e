"""Every schedule with response, feature and relation losses on handwritten digits: accuracy over seeds, and cost.

Trains the recipes of recipes/digits/schedules, each with its own losses, with `hint` added and with `rkd_distance` added, and prints a
table in Markdown. Runs that are there already are reused, so that a table with more seeds trains only what is new.

    python benchmarks/schedules.py --seeds 5
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdkit import plan, recipe, runs
from kdkit.errors import RecipeError

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "digits"
ADDED: dict[str, list[dict[str, Any]]] = {
    "": [],
    "+ hint": [{"use": "hint", "layers": [{"student": "layer3", "teacher": "layer3"}]}],
    "+ rkd_distance": [{"use": "rkd_distance", "weight": 10, "layers": [{"student": "penultimate", "teacher": "penultimate"}]}],
}


def accuracies(path: Path, added: Sequence[dict[str, Any]], seeds: int) -> list[float]:
    """Top-1 on test data after the last epoch, one per seed.

    Raises:
        RecipeError: the losses have nobody to learn from under this schedule.
    """
    plain = recipe.load(path).plain()
    several = {"teacher": "teacher1"} if plain.get("teachers") else {}  # whose features an ensemble has none of
    losses = [*plain["losses"], *({**entry, **several} for entry in added)]
    found = []
    for seed in range(seeds):
        loaded = recipe.load(path, {"losses": losses, "seed": seed})
        folder = runs.folder_for(loaded, loaded.spec.run.folder, f"{loaded.spec.name}-{len(losses)}-seed{seed}")
        found.append(runs.train(loaded, folder, quiet=True).test["top1"])
    return found


def cell(path: Path, added: Sequence[dict[str, Any]], seeds: int, notes: list[str]) -> str:
    """Mean and deviation, or a dash where the combination cannot be; why is noted."""
    try:
        found = accuracies(path, added, seeds)
    except RecipeError as error:
        notes.append(f"{path.stem}: {str(error).splitlines()[0].split(': ', 1)[1]}")
        return "-"
    return f"{statistics.mean(found):.2f}" + (f" +- {statistics.stdev(found):.2f}" if seeds > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of recipes")
    chosen = parser.parse_args()
    notes: list[str] = []
    print("| recipe | cost of a step | steps | losses of the recipe | " + " | ".join(name for name in ADDED if name) + " |")
    print("| --- " * (len(ADDED) + 3) + "|")
    paths = [RECIPES / "alone.yaml", *sorted((RECIPES / "schedules").glob("*.yaml"))]
    for path in paths:
        if path.stem == "base" or (chosen.only and path.stem not in chosen.only):
            continue
        stages = plan.make(recipe.load(path)).stages
        cost, steps = "; ".join(dict.fromkeys(str(stage.cost) for stage in stages)), sum(stage.steps for stage in stages)
        cells = [cell(path, added, chosen.seeds, notes) for added in ADDED.values()]
        print(f"| {path.stem} | {cost} | {steps} | {' | '.join(cells)} |", flush=True)
    print(f"\nTop-1 % on test data after the last epoch, {chosen.seeds} seeds, mean +- standard deviation.")
    print("\n".join(f"- {note}" for note in dict.fromkeys(notes)))


if __name__ == "__main__":
    main()
