"""Checks of a recipe's data, training section and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import nn

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory, Stream, Texts
from kdkit.contracts.records import Batch
from kdkit.contracts.task import Rows, Score
from kdkit.data import beside
from kdkit.data.images import Pictures, called
from kdkit.data.labels import CALLED, Part, described, labels_of, split
from kdkit.data.mixing import options_of as mixing_options
from kdkit.data.transforms import with_channels
from kdkit.engine.evaluate import Tally
from kdkit.engine.optim import build_optimizer
from kdkit.engine.scores import scores_of
from kdkit.errors import DataError, RunError, one_line, suggest
from kdkit.models.devices import chosen
from kdkit.recipe import Recipe, fetching
from kdkit.runs.check_report import Checks, Report
from kdkit.runs.random_batches import PROBE


class DataChecks(Checks):
    """Checks the data and the way they are used for training."""

    def __init__(self, recipe: Recipe, report: Report, fetch: Callable[[str], None] | None) -> None:
        super().__init__(recipe, report)
        self.fetch = fetch

    def info(self, source: DatasetSource) -> DataInfo:
        """Return the properties of the dataset. Missing files are fetched first, or noted as files
        that training will fetch.
        """
        if (says := self._fetched(source)) is None:
            info = self._described(source)
            self.report.notes += source.notes()
            return info
        try:
            return described(source, self.task)
        except DataError as error:
            raise DataError(f"is not there yet, so nothing is known of it; {says}") from error

    def beside(self, info: DataInfo) -> DataInfo:
        """Return the properties of the data with the number of unlabelled samples, if the recipe
        has some; missing files as in `info`.
        """
        source = self.recipe.unlabelled()
        if source is not None:
            self._fetched(source)
        return beside.described(self.spec.data, info, source, self.task)

    def _fetched(self, source: DatasetSource) -> str | None:
        """Fetch missing files, or note that training will; return that note."""
        if self.fetch:
            fetching.fetch(self.recipe, source, self.fetch)
            return None
        if (lacking := source.lacks()) is None:
            return None
        # A check must not promise a download that training would refuse.
        if lacking.folder is not None:
            fetching.refuse_elsewhere(self.recipe, lacking.folder)
        says = f"training first fetches {lacking}"
        self.report.notes.append(says)
        return says

    def _described(self, source: DatasetSource) -> DataInfo:
        """Return the properties of a dataset that is there.

        Raises:
            DataError: the recipe's task does not take its samples; names tasks that do.
        """
        try:
            return described(source, self.task)
        except DataError as error:
            kind = {1: "texts", 3: "images"}.get(len(source.info().image_shape))
            fitting = [
                name for name, task in self.recipe.plugins.tasks.items() if task.takes == kind
            ]
            if kind == self.task.takes or not fitting:
                raise
            raise DataError(f"{error}; for {kind}: {', '.join(sorted(fitting))}") from error

    def check_labels(self, source: DatasetSource, info: DataInfo) -> None:
        """Read both parts if that is cheap, to report wrong labels before anything is trained."""
        parts: tuple[Literal["train", "test"], ...] = ("train", "test")
        if self.spec.data.synthetic_batches is not None:
            parts = ("test",)
        # Sources whose parts take long to read, or would be fetched, say so by `split_at_check`.
        for name in parts if source.split_at_check and source.lacks() is None else ():
            part = split(source, name, info)
            whose = f"dataset '{source.name}': {CALLED[name]}"
            if self.task.moves:
                self._try_first_target(part, info, whose)
            elif not isinstance(part, Stream) and (info.labelled or name == "test"):
                labels = labels_of(part, self.task, f"{whose} labels")
                self.task.targets(labels, info, f"{whose} labels")

    def _try_first_target(self, part: Part, info: DataInfo, whose: str) -> None:
        """Convert the first image and its target, as only reading all would find each wrong one."""
        if isinstance(part, Stream | Texts) or not len(part):
            return
        shown = Pictures(part) if isinstance(part, InMemory) else part
        image, target = shown[0]
        try:
            with_channels(image, info.image_shape[0])
            self.task.movable(target, (image.height, image.width), info)
        except DataError as error:
            raise DataError(f"{whose} {called(shown, 0)}: {error}") from None

    def check_training(self, num_train: int, info: DataInfo) -> None:
        train = self.spec.train
        for key in ("average_best", "patience"):
            if getattr(train, key) and not self.spec.data.validation:
                says = "the epochs are chosen on validation data; set `data.validation`"
                self.report.refuse(["train", key], says)
        with self.report.at("train", "device"):
            chosen(train.device)
        with self.report.at("train", "capture"):
            if train.capture is True and not torch.cuda.is_available():
                raise RunError("true needs a CUDA device; auto records steps where there is one")
        with self.report.at("train", "optimizer"):
            # Any small network does: only the optimizer's name and arguments are tried.
            build_optimizer(train, nn.Linear(PROBE, PROBE), nn.Identity())
        if train.mixup:
            with self.report.at("train", "mixup"):
                self.task.mixer(mixing_options(train.mixup), info)
                self._refuse_unmixable(num_train, info)
        with self.report.at("metrics"):
            self._try_scores(info)
        targets = self.task.random_targets(info, torch.arange(PROBE))
        if self.spec.data.sampling == "balanced" and self.task.strata(targets) is None:
            says = f"targets of task '{self.task.name}' make no groups to balance"
            self.report.refuse(["data", "sampling"], says)

    def _refuse_unmixable(self, num_train: int, info: DataInfo) -> None:
        """Check that every image can be mixed with another one of its batch.

        Raises:
            DataError: some have no labels, or a batch is odd.
        """
        data, size = self.spec.data, self.spec.data.batch_size
        if info.unlabelled:
            raise DataError(
                "mixes labels, and those of `data.unlabelled` have none; leave one of them out"
            )
        if size % 2 or (not data.drop_last and num_train % size % 2):
            raise DataError(
                f"mixes pairs, so every batch must be even: batches of {size} of {num_train} images"
            )

    def note_moved(self) -> None:
        """Note that images are moved by an augmentation which leaves numbers as they are: right for
        numbers that describe a whole image, wrong for coordinates in it.
        """
        data = self.spec.data
        given = {"augment": data.augment, "timm_augment": data.timm_augment}
        moving = [key for key, augment in given.items() if augment and augment.moves]
        if moving and self.task.rows_are == "numbers" and not self.task.moves:
            self.report.notes.append(
                f"data.{moving[0]} moves images, and targets of task '{self.task.name}' stay as"
                " they are: those that are coordinates in the image would be wrong"
            )

    def _try_scores(self, info: DataInfo) -> None:
        """Compute the scores on random answers: each must give one number."""
        targets = self.task.random_targets(info, torch.arange(PROBE))
        answer = self.task.random_answer(info, PROBE)
        batch = Batch(
            self.task.random_inputs(info.image_shape, PROBE), targets, torch.arange(PROBE)
        )
        (rows,), asked = self.task.scored_rows([answer], batch)
        scores = scores_of(self.recipe, info)
        own = {score.name for score in self.task.scores(info)}
        deciding = scores[0] if self.spec.decide_by else None
        named = (score for score in scores if score.name not in own and score is not deciding)
        others = (i for i, e in enumerate(self.spec.metrics) if e != self.spec.decide_by)
        places: list[tuple[list[str | int], Score]] = [
            (["metrics", i], score) for i, score in zip(others, named, strict=False)
        ]
        if deciding and deciding.name not in own:
            places.append((["decide_by"], deciding))
        for place, score in places:
            tally = Tally([score], together=False)
            try:
                tally.add(Rows(rows.logits, asked.labels), score.shown)
                tally.values()
            except Exception as error:  # torchmetrics and plugins raise errors of any type
                says = f"'{score.name}' does not count answers of task '{self.task.name}': {error}"
                self.report.refuse(place, one_line(says))

    def refuse_labels(self) -> None:
        """Report the keys that need labels of training images, if there are none."""
        asked = {
            "validation": self.spec.data.validation,
            "sampling": self.spec.data.sampling == "balanced",
        }
        places: list[list[str | int]] = [["data", key] for key, wanted in asked.items() if wanted]
        for place in places + ([["train", "mixup"]] if self.spec.train.mixup else []):
            self.report.refuse(place, "needs the labels of training images, and they have none")

    def check_trackers(self) -> None:
        known = [tracker.value for tracker in LoggerType]
        # Accelerate takes `all` for every tracker that is installed.
        installed = {"all", *map(str, get_available_trackers())}
        for i, name in enumerate(self.spec.run.trackers):
            if name not in known:
                self.report.refuse(
                    ["run", "trackers", i], f"unknown '{name}'; {suggest(name, known)}"
                )
            elif name not in installed:
                says = f"'{name}' is not installed (`pip install {name}`)"
                self.report.refuse(["run", "trackers", i], says)
