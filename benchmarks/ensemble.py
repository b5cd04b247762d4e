"""How much of an ensemble's gain one distilled model keeps (Hinton et al., arXiv:1503.02531,
section 5).

Trains the ten models of recipes/fashion_mnist/single.yaml, measures them alone and together, and
distils their ensemble into single models of the same architecture at several temperatures. Runs
that are there already are reused.

    python benchmarks/ensemble.py data.dataset.root=data
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdkit import recipe
from kdkit.runs import training
from kdkit.runs.result import Result

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "fashion_mnist"
MEMBERS = range(100, 110)  # seeds, as in ensemble.yaml


def trained(name: str, overrides: Mapping[str, object]) -> Result:
    """What a recipe comes to, from the folder of its run where it was trained already."""
    loaded = recipe.load(RECIPES / name, overrides)
    return training.train(
        loaded, training.folder_for(loaded, loaded.spec.run.folder, loaded.spec.name), quiet=True
    )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f}" + (
        f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key.path=value for every recipe")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1, 2, 5, 10])
    parser.add_argument("--seeds", type=int, default=3, help="distilled models per temperature")
    chosen = parser.parse_args()
    overrides = dict(word.split("=", 1) for word in chosen.overrides)
    members = [trained("single.yaml", {**overrides, "seed": seed}).test["top1"] for seed in MEMBERS]
    distilled = {
        t: [
            trained("ensemble.yaml", {**overrides, "seed": seed, "losses.logit_kl.temperature": t})
            for seed in range(chosen.seeds)
        ]
        for t in chosen.temperatures
    }
    ensemble = (distilled[chosen.temperatures[0]][0].teacher or {})["top1"]
    gain = ensemble - statistics.mean(members)
    print(f"one model       {spread(members)}   ({len(members)} models)")
    print(f"ensemble        {ensemble:.2f}   (gain {gain:.2f})")
    for t, results in distilled.items():
        found = [result.test["top1"] for result in results]
        print(
            f"distilled, T {t:<4g}{spread(found)}   keeps"
            f" {(statistics.mean(found) - statistics.mean(members)) / gain:.0%} of the gain"
        )
    print(
        f"Fashion-MNIST, top-1 % on test data after the last epoch; {chosen.seeds} distilled models"
        " per temperature, mean +- deviation."
    )


if __name__ == "__main__":
    main()
