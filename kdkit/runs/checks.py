"""Determines what a recipe would do without data, weights or training: shapes on the meta device,
losses on random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import Meaning, TeacherOptions
from kdkit.data import sizes
from kdkit.data.subsets import images_per_epoch, samples
from kdkit.errors import ModelError
from kdkit.recipe import Recipe, fetching, teacher_recipes
from kdkit.runs import beginnings
from kdkit.runs import check_caches as cache_plan
from kdkit.runs.check_data import DataChecks
from kdkit.runs.check_networks import NetworkChecks
from kdkit.runs.check_report import Checks, Report
from kdkit.runs.check_stages import StageChecks
from kdkit.runs.check_weights import compare_checkpoints
from kdkit.runs.networks import ModelFactory
from kdkit.runs.plan import Plan
from kdkit.runs.shapes_only import ShapesOnly
from kdkit.runs.trained_teachers import TrainedTeacher


def make(recipe: Recipe, fetch: Callable[[str], None] | None = None) -> Plan:
    """Plan a recipe.

    Args:
        recipe: the recipe to plan.
        fetch: called with a message before each download that the recipe allows (None: nothing is
            fetched).

    Raises:
        RecipeError: everything that cannot work, one line each with file and line.
    """
    # Guards the whole plan: networks and datasets may connect wherever they are built.
    with ShapesOnly(), contextlib.nullcontext() if fetch else fetching.nothing_fetched():
        return _Planner(recipe, fetch).plan()


class _Planner(Checks):
    def __init__(self, recipe: Recipe, fetch: Callable[[str], None] | None) -> None:
        super().__init__(recipe, Report(recipe, fetches=fetch is not None))
        self.fetch = fetch
        self.data = DataChecks(recipe, self.report, fetch)
        self.networks = NetworkChecks(recipe, self.report)
        self.stages = StageChecks(recipe, self.report, self.networks)

    def plan(self) -> Plan:
        spec = self.spec
        source = self.recipe.dataset()
        with self.report.at("data", "dataset"):
            info = self.data.info(source)
            with self.report.at("data"):
                # The size in a batch, which `data.image_size` may change.
                info = sizes.as_batched(spec.data, self.recipe.task, info)
                num_train = samples(spec.data, info.num_train)
                size = spec.data.labelled_size
                if spec.data.synthetic_batches is None and num_train < size:
                    raise self.recipe.error(
                        ["data", "batch_size"],
                        f"{size} is more than the {num_train} training images",
                    )
            with self.report.at("data", "unlabelled"):
                info = self.data.beside(info)
            self.data.check_labels(source, info)
            trained = self._trained(info)
        self.report.raise_if_any()
        build = functools.partial(ModelFactory, self.recipe, info, trained)
        factory = build(device=torch.device("meta"))
        # which channels go, and what is exported, needs numbers
        if beginnings.compresses(self.recipe, factory.trained):
            factory = build(device=torch.device("cpu"), rehearsal=True)
        self.networks.check_answers(factory, info, source)
        with self.report.at():
            self.report.notes += compare_checkpoints(factory)
        self.report.raise_if_any()
        self.networks.check_layers(factory)
        students, planned = self.networks.networks_of(factory, info)
        # the network may only need real numbers to run: try again off the meta device
        if self.report.problems:
            self.report.problems.clear()
            factory = build(device=torch.device("cpu"), rehearsal=True)
            students, planned = self.networks.networks_of(factory, info)
            if not self.report.problems:
                self.report.notes.append(
                    "a network does not run without numbers, so this was found out with random"
                    " weights on the processor"
                )
        self.report.raise_if_any()
        (student,) = students
        self.networks.compare_meanings(factory, info)
        self.report.raise_if_any()
        batches = math.ceil(images_per_epoch(spec.data, num_train) / spec.data.batch_size)
        steps = math.ceil(batches / spec.train.accumulate)
        # Such losses read weights in `setup`, and the meta device has none.
        if any(self.recipe.plugins.losses[entry.use].needs_networks for entry in spec.losses):
            factory = build(device=torch.device("cpu"), rehearsal=True)
        self.networks.check_caches(
            factory,
            info,
            num_train + info.unlabelled,
            {
                name: dict(model.taps)
                for name, model in zip(spec.all_teachers(), planned, strict=True)
            },
        )
        watching = cache_plan.Rehearsal(self.recipe, factory)
        self.networks.check_deciding(factory, info)
        # What a task of embeddings trains sees no label, even if the data have some.
        shown = replace(info, labelled=info.labelled and self.task.rows_are != "embeddings")
        with self.report.at("schedule"):
            schedule = self.recipe.plugins.schedules[spec.schedule.use](spec.schedule)
            stages = tuple(
                self.stages.plan(stage, factory, shown, num_train, steps, watching)
                for stage in schedule.stages(factory)
            )
        self.data.check_trackers()
        self.data.check_training(num_train, info)
        self.data.note_moved()
        if not info.labelled:
            self.data.refuse_labels()
        self._refuse_unused()
        self._note_unread(info)
        self.report.raise_if_any()
        self.stages.note_what_stays()
        return Plan(
            spec.name,
            info,
            # anchors and points, which are yes-or-no questions, have no labels to be counted
            self.task.rows_are if self.task.labels_rows else "classes",
            num_train,
            student,
            tuple(planned),
            stages,
            tuple(self.report.notes),
        )

    def _trained(self, info: DataInfo) -> dict[str, TrainedTeacher]:
        """Return the teachers of other recipes, whose own plans must be sound and whose classes
        must be those of the data.
        """
        found = {}
        for name, source in teacher_recipes(self.spec).items():
            with self.report.at(*self.spec.place_of(name)):
                # The teacher's recipe is checked whole: its training comes first, and would fail
                # late.
                planned = _Planner(source, self.fetch).plan()
                theirs = source.task.outputs(planned.info)
                whose = f"the teacher of {source.source.path.name}"
                one = self.spec.all_teachers()[name]
                assert isinstance(one, TeacherOptions)
                wanted = self.task.outputs(info)
                if theirs != wanted and one.classes is None and theirs and wanted:
                    says = (
                        f"{whose} knows {theirs} classes, this recipe's data has"
                        f" {info.outputs}; `classes` says which of them they are"
                    )
                    raise ModelError(says)
                self.networks.compare(
                    Meaning(planned.info.class_names, planned.info.tokenizer), info, whose, one
                )
                every = source.spec.run.snapshots
                kept = range(every, planned.stages[-1].epochs + 1, every) if every else ()
                found[name] = TrainedTeacher(
                    source.spec.student, None, dict.fromkeys(kept), outputs=theirs
                )
        return found

    def _note_unread(self, info: DataInfo) -> None:
        """Note that no loss reads the unlabelled samples, if the recipe has some."""
        kinds = {self.recipe.plugins.losses[entry.use].knowledge for entry in self.spec.losses}
        if info.unlabelled and kinds == {"labels"}:
            self.report.notes.append(
                "no loss reads the unlabelled samples (data.unlabelled): all are on labels"
            )

    def _refuse_unused(self) -> None:
        """Report the losses that no stage uses, if there are no other problems."""
        for i, name in enumerate(self.recipe.loss_names()):
            # A problem above may be the reason why it is not used.
            if name not in self.stages.used and not self.report.problems:
                says = (
                    f"'{name}' is never used: no stage of schedule '{self.spec.schedule.use}' has a"
                    " teacher for it, or asks for it"
                )
                self.report.refuse(["losses", i], says)
