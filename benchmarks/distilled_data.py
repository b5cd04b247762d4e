"""Networks and kernel regressions on 1, 10 and 50 distilled images a class, beside random images.

    python benchmarks/distilled_data.py [FOLDER] [--conv]

Prints a Markdown table: mean +- standard deviation of 3 seeds, each of which makes its own images.
`--conv`: DM and RDED with a small convolutional network instead, 10 images a class. Everything is
kept in FOLDER (default: runs/distilled_data), and what is there already is not made again.
"""

import statistics
import sys
from pathlib import Path

import kdkit
from kdkit import recipe
from kdkit.recipe import distilled_data
from kdkit.runs.distilling import distill

RECIPES = Path(__file__).parent.parent / "recipes" / "distilled_data"
SEEDS = (0, 1, 2)
SHORTER = {
    "label_solve": {"targets": 10_000},
    "kip": {"steps": 150, "targets": 1000},
}


def run(folder, data, method, images, seed, conv):
    """Make the images if there are none; accuracies in per cent by name."""
    own = f"_{method}" if method != "random" else "_conv" if conv else ""
    path = RECIPES / f"{data}{own}.yaml"
    name = f"{data}-{'conv-' if conv else ''}{method}-{images}-{seed}"
    options = {"use": method, "images_per_class": images, **SHORTER.get(method, {})}
    changes = {
        "name": name,
        "seed": seed,
        "run.folder": str(folder),
        "data.batch_size": min(100 if conv else 1000, 10 * images),
        **{f"distill_data.{key}": value for key, value in options.items()},
    }
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        distill(recipe.load(path, overrides=changes), quiet=True)
    figures = distilled_data.read(file)[2]["figures"]
    found = {
        "kernel": figures.get("kernel regression, test %"),
        "random kernel": figures.get("with the images' own labels, test %"),
    }
    result = kdkit.train(path, overrides={**changes, "data.distilled": str(file)}, quiet=True)
    return {**found, "network": result.test["top1"]}


def main():
    conv = "--conv" in sys.argv
    given = [word for word in sys.argv[1:] if not word.startswith("--")]
    folder = Path(given[0] if given else "runs/distilled_data").absolute()
    methods = ("random", "dm", "rded") if conv else ("random", "label_solve", "kip")
    print("| data | images a class | method | kernel regression, % | network, % |")
    print("| --- | ---: | --- | ---: | ---: |")
    for data in ("mnist", "fashion_mnist"):
        for images in (10,) if conv else (1, 10, 50):
            for method in methods:
                found = [run(folder, data, method, images, seed, conv) for seed in SEEDS]
                cells = [told([one.get(key) for one in found]) for key in ("kernel", "network")]
                print(f"| {data} | {images} | {method} | {' | '.join(cells)} |", flush=True)
                if method == "label_solve":
                    cell = told([one["random kernel"] for one in found])
                    print(
                        f"| {data} | {images} | the same images, own labels | {cell} | |",
                        flush=True,
                    )


def told(values):
    if None in values:
        return ""
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
