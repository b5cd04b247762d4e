"""What a search by successive halving tries: its candidates, and how long each rung trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdkit.errors import RecipeError, shown
from kdkit.recipe import Recipe
from kdkit.recipe.yaml_source import Source
from kdkit.study.findings import Length
from kdkit.study.loading import command_line
from kdkit.study.plan import EPOCHS, check
from kdkit.study.spec import MOST_SEEDS, HalvingSpec
from kdkit.study.study_file import StudyFile
from kdkit.study.variants import Study, first_seeds, renamed


@dataclass(frozen=True)
class Rung:
    """One rung: it trains some candidates until they have so many epochs.

    Attributes:
        epochs: of all stages together, since the beginning of the run.
        candidates: number of candidates that it trains.
        whole: whether these are all epochs of the recipe.
    """

    epochs: int
    candidates: int
    whole: bool


@dataclass(frozen=True)
class Search:
    """A search: a study of all candidates, and what the winner is compared with.

    Attributes:
        study: its variants are the candidates, its seeds those that the search trains.
        name: of the search and of its folder.
        baseline, written: name and recipe of the baseline.
        confirm: seeds with which winner and baseline are measured.
        halving: how many go on, and how often.
    """

    study: Study
    name: str
    baseline: str
    written: Recipe
    confirm: tuple[int, ...]
    halving: HalvingSpec

    @property
    def path(self) -> Path:
        """The folder of its findings; those of its runs are in `study.path`."""
        return self.study.folder / self.name

    def check(self, fetch: Callable[[str], None] | None = None) -> dict[str, Length]:
        """Check everything that can be refused before anything is trained; return the length of
        each candidate's whole training.

        Args:
            fetch: called with a message before each download (None: nothing is fetched).

        Raises:
            RecipeError: a candidate cannot work, differs from the baseline in more than what is
                compared, or trains longer or shorter than the others.
        """
        everything = {self.baseline: self.written, **self.study.variants}
        study = replace(self.study, variants=renamed(everything), baseline=self.baseline)
        lengths = check(study, fetch)
        candidates = {name: lengths[name] for name in self.study.variants}
        first, *others = candidates
        for name in others:
            if (own := candidates[name].epochs) != (known := candidates[first].epochs):
                says = f"all candidates need the same number of epochs, as a rung is one: {name}"
                raise RecipeError(f"{self.name}: {says} has {own}, {first} has {known}")
        return candidates

    def plan(self, lengths: Mapping[str, Length]) -> list[Rung]:
        """Plan the rungs.

        A candidate of a rung goes on from its checkpoint of the rung before: it trains with the
        first epochs of the whole schedule, not with a shorter schedule.
        """
        specs = [recipe.spec.train for recipe in self.study.variants.values()]
        every = math.lcm(*(spec.evaluate_every for spec in specs))
        warmup = max(spec.lr_schedule.within(spec.epochs).warmup_epochs for spec in specs)
        whole = next(iter(lengths.values())).epochs
        return plan(len(specs), whole, self.halving, warmup=warmup, every=every)

    def final(self, winner: str) -> Study:
        """Return the study that measures baseline and winner with fresh seeds, on test data."""
        recipe = self.study.variants[winner]
        # a winner that is the baseline by another name is not compared with itself
        is_new = recipe.fingerprint != self.written.fingerprint
        variants = {self.baseline: self.written, **({winner: recipe} if is_new else {})}
        return replace(
            self.study,
            name=self.name,
            variants=renamed(variants),
            baseline=self.baseline,
            seeds=self.confirm,
        )


def plan(
    candidates: int, epochs: int, halving: HalvingSpec, *, warmup: int = 0, every: int = 1
) -> list[Rung]:
    """Plan rungs for some candidates: each trains longer than the one before, and fewer of them.

    Args:
        candidates: their number.
        epochs: of a whole training.
        halving: the study's `search`.
        warmup: epochs of the warm-up, which a rung has on top: scores in it tell little.
        every: epochs between two measurements; a rung ends with one.
    """
    ends = []
    for after in range(halving.rungs):
        end = warmup + math.ceil((epochs - warmup) / halving.eta**after)
        ends.append(min(epochs, every * math.ceil(end / every)))
    made = []
    for end in sorted(set(ends)):
        made.append(Rung(end, candidates, end == epochs))
        candidates = left(candidates, halving)
    return made


def left(candidates: int, halving: HalvingSpec) -> int:
    """Return how many of a rung's candidates go on to the next: at least two, so that the last
    choice is between students that are trained to their ends.
    """
    return max(math.ceil(candidates / halving.eta), min(candidates, 2))


def steps_until(epochs: int, length: Length) -> int:
    """Return the optimizer steps of the first epochs of a training."""
    return math.ceil(length.steps * epochs / length.epochs)


def load(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path] = (),
    *,
    confirm: int | None = None,
) -> Search:
    """Read a study file as a search.

    Args:
        path: the study file.
        overrides: values by `key.path` for all candidates.
        plugins: further plugin files or folders.
        confirm: number of seeds that measure winner and baseline, in place of the file's `seeds`.

    Raises:
        RecipeError: all problems found in any candidate, one line each.
    """
    if confirm is not None and not 0 <= confirm <= MOST_SEEDS:
        raise RecipeError(f"between 0 and {MOST_SEEDS} seeds are possible, not {shown(confirm)}")
    source = Source(path)
    if not any(key in source.data for key in ("vary", "variants")):
        raise RecipeError(f"{path}: a search takes a study file, with `vary:`")
    file = StudyFile(source, overrides, plugins)
    study = file.study()
    _refuse(source, study)
    baseline, written = file.baseline(study)
    seeds = study.tune_seeds
    if isinstance(seeds, int):
        # Not those of `confirm`, which may be another number: the same search is gone on with.
        seeds = first_seeds(seeds, but=study.seeds)
    fresh = study.seeds if confirm is None else first_seeds(confirm, but=seeds)
    if shared := {*fresh} & {*seeds}:
        where = source.where(["tune_seeds"])
        raise RecipeError(
            f"{where}: tune_seeds: {min(shared)} is one of the study's own seeds; runs that choose"
            " are not those that are told"
        )
    options = [] if confirm is None else ["--confirm", str(confirm)]
    candidates = replace(
        study,
        name=f"{study.name}-search",
        seeds=tuple(seeds),
        command=command_line("search", [path], overrides or {}, plugins, options),
    )
    return Search(candidates, study.name, baseline, written, tuple(fresh), file.spec.search)


def _refuse(source: Source, study: Study) -> None:
    """Check that the candidates can be searched.

    Raises:
        RecipeError: there is a single one, one lacks validation data, or they would train for
            different numbers of epochs.
    """
    if study.tune:
        says = "a search halves what `vary` makes; `kdkit compare` takes `tune`"
        raise RecipeError(f"{source.where(['tune'])}: tune: {says}")
    if EPOCHS in source.data.get("vary", {}):
        says = "a rung of a search is a number of epochs, so all candidates train for as many"
        raise RecipeError(f"{source.where(['vary', EPOCHS])}: vary.{EPOCHS}: {says}")
    if len(study.variants) < 2:
        raise RecipeError(f"{source.where([])}: there is a single candidate; nothing to search")
    for name, recipe in study.variants.items():
        if not recipe.spec.data.validation:
            says = f"the search chooses on validation data; set `data.validation` (variant {name})"
            raise RecipeError(f"{source.where(['vary'])}: vary: {says}")
