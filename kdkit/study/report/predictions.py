"""Predictions of a study's networks on the test data: classes, confusions, the teacher's soft
targets, CKA of layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kdkit.contracts import task as contracts
from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.task import Task
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.evaluate import Predictions, predict
from kdkit.errors import KdkitError, RecipeError
from kdkit.models.devices import for_reading
from kdkit.models.freezing import in_eval_mode
from kdkit.models.tapped import TappedModel
from kdkit.recipe.consent import Unasked
from kdkit.students.loaded import LoadedRun
from kdkit.study.findings import Findings, Variant, rank
from kdkit.study.report.alike import Alike, alike
from kdkit.study.report.document import Picture

SEEDS = 3  # number of first seeds of each variant whose students answer again
COMPARED = 6  # variants whose layers are compared with the teacher's
EXAMPLES = 3  # number of uncertain examples, and of ordinary ones
BEST = 2  # number of students whose answers the task draws: the baseline's and the best one's
DRAWN = 4  # number of images that it draws them for
HELD = 2**30  # maximum bytes of test images held between two networks


@dataclass(frozen=True)
class Example:
    """A test image: its place, pixels (C, H, W), class, and the teacher's logits (K,)."""

    index: int
    image: Tensor
    label: int
    logits: Tensor


@dataclass(frozen=True)
class Drawn:
    """A picture that the task draws of a test image, and the names of the networks in it."""

    picture: Picture
    names: tuple[str, ...]


@dataclass
class Answers:
    """The answers of networks that could be loaded again.

    Attributes:
        of_classes: whether answers are one class for each sample; other tasks have no predictions
            and examples.
        classes: names of the classes, their numbers where they have none.
        students: predictions of each variant's first seeds, by seed.
        teacher: predictions of all teachers combined.
        examples: test images, for the teacher's soft targets.
        drawn: pictures that the task draws of test images.
        alike: similarity of layers, by variant, for its first seed.
        missing: what is left out and why, a phrase each.
    """

    of_classes: bool = True
    classes: tuple[str, ...] = ()
    students: dict[str, dict[int, Predictions]] = field(default_factory=dict)
    teacher: Predictions | None = None
    examples: tuple[Example, ...] = ()
    drawn: tuple[Drawn, ...] = ()
    alike: dict[str, Alike] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def class_accuracy(self, variant: str) -> Tensor:
        """Compute the accuracy of each class in percent (K,), mean over the seeds; NaN for a class
        without test images.
        """
        return torch.stack([confusion(one).diag() for one in self.students[variant].values()]).mean(
            0
        )

    def confusion_change(self, variant: str, baseline: str) -> Tensor:
        """Compute the change in percentage points (true, predicted) of a class's images, mean over
        the seeds of each.
        """
        ours, theirs = (
            torch.stack([confusion(one) for one in self.students[name].values()]).mean(0)
            for name in (variant, baseline)
        )
        # NaN: a class without test images has not changed
        return (ours - theirs).nan_to_num(0)


def confusion(found: Predictions) -> Tensor:
    """Compute the percentage of each class's images (true, predicted)."""
    classes = found.logits.shape[1]
    pairs = found.labels * classes + found.logits.argmax(1)
    counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes).float()
    # 0 / 0 = NaN for a class without test images: whoever draws it decides what that means.
    return 100 * counts / counts.sum(1, keepdim=True)


def ask(
    findings: Findings,
    overrides: Mapping[str, object],
    plugins: Sequence[Path],
    say: Callable[[str], None],
) -> Answers:
    """Run the first seeds of each variant, and the teacher, on the test data again; what no longer
    exists is noted in `missing`.

    Args:
        findings: the study.
        overrides: `data.` keys for the present location of the data.
        plugins: Python files and folders of the runs that may run.
        say: called with a message for each network.

    Raises:
        RecipeError: the data section has no such key.
    """
    return _Asking(findings, overrides, plugins, say).all()


class _Asking:
    def __init__(
        self,
        findings: Findings,
        overrides: Mapping[str, object],
        plugins: Sequence[Path],
        say: Callable[[str], None],
    ) -> None:
        self.findings = findings
        self.overrides = overrides
        self.plugins = plugins
        self.say = say
        self.answers = Answers()
        self._gone: dict[str, list[str]] = {}  # missing networks by reason
        self._batches: Iterable[Batch] | None = None
        self._asked: object = None  # the data section of the current batches

    def all(self) -> Answers:
        # Opened before anything is asked, so that a wrong override is told at once.
        runs = {variant.name: list(self._runs(variant)) for variant in self.findings.variants}
        opened = [one for each in runs.values() for _, one in each]
        self.answers.of_classes = all(map(_gives_classes, opened))
        teachers = self._teachers(opened)
        compared = [v.name for v in _best_first(self.findings)][:COMPARED] if teachers else []
        for name, each in runs.items():
            for place, (seed, run) in enumerate(each):
                # Layers of several teachers are not comparable: the first one stands for them.
                teacher = teachers[0] if place == 0 and name in compared else None
                if self.answers.of_classes or teacher is not None:
                    self.say(f"{name}, seed {seed}: answers the test data")
                    self._student(name, seed, run, teacher)
        self.answers.drawn = tuple(self._drawn(runs, teachers))
        self.answers.missing = [
            f"the answers of {_listed(who)}: {reason}" for reason, who in self._gone.items()
        ]
        return self.answers

    def _drawn(
        self, runs: Mapping[str, Sequence[tuple[int, LoadedRun]]], teachers: Sequence[TappedModel]
    ) -> Iterator[Drawn]:
        """Let the task draw the answers of the teacher, the baseline and the best variants."""
        names = [v.name for v in _best_first(self.findings) if runs[v.name]][:BEST]
        first = runs[names[0]][0][1] if names else None
        if first is None or type(first.recipe.task).drawn is Task.drawn:
            return
        with self._told("test images"):
            batches = self._test(first)
            students = {name: runs[name][0][1].student(device=_device(batches)) for name in names}
            models = {**({"teacher": teachers[0]} if teachers else {}), **students}
            for number, example in enumerate(_spread(batches, models), 1):
                figure = first.recipe.task.drawn(example, first.info)
                about = f"Test image {number} with the answers of {', '.join(models)}."
                picture = Picture(f"answers-{number}", figure, about, wide=True, photo=True)
                yield Drawn(picture, tuple(models))

    def _runs(self, variant: Variant) -> Iterator[tuple[int, LoadedRun]]:
        for seed, folder in list(zip(variant.seeds, variant.folders, strict=True))[:SEEDS]:
            with self._told(f"{variant.name}, seed {seed}"):
                yield seed, LoadedRun(folder, self.overrides, self.plugins)

    @contextlib.contextmanager
    def _told(self, of: str) -> Iterator[None]:
        """Note and skip what can no longer be read; a wrong override is an error."""
        try:
            yield
        # Python of a run folder runs only when its user names it: the report says which file it
        # would need.
        except Unasked as error:
            self._gone.setdefault(error.says, []).append(of)
        except (KdkitError, OSError) as error:
            # A wrong `--data` key is the user's mistake, not a run that has gone.
            if self.overrides and isinstance(error, RecipeError):
                raise
            self._gone.setdefault(" ".join(str(error).split()), []).append(of)

    def _test(self, run: LoadedRun) -> Iterable[Batch]:
        """Return the test batches of a run, reusing the previous run's if their data are the
        same.
        """
        content = run.folder.about()["content"]["data"]
        if self._batches is None or content != self._asked:
            # Runs may have been trained on a device that this machine lacks.
            device = build_accelerator(for_reading(run.recipe.spec.train)).device
            found = run.data(device=device)
            small = found.test.num_samples * math.prod(found.info.image_shape) * 4 < HELD
            # Held, so that images are decoded once for all networks.
            self._batches, self._asked = list(found.test) if small else found.test, content
            if self.answers.of_classes:
                names = found.info.class_names or map(str, range(found.info.outputs))
                self.answers.classes = tuple(names)
        return self._batches

    def _student(self, name: str, seed: int, run: LoadedRun, teacher: TappedModel | None) -> None:
        with self._told(f"{name}, seed {seed}"):
            batches = self._test(run)
            student = run.student(device=_device(batches))
            if self.answers.of_classes:
                self.answers.students.setdefault(name, {})[seed] = predict(student, batches)
            if teacher is not None:
                with self._told(f"{name}, layer by layer"):
                    self.answers.alike[name] = alike(student, teacher, batches)

    def _teachers(self, runs: Sequence[LoadedRun]) -> list[TappedModel]:
        """Load the teachers of the findings; compute the predictions of all combined, and the
        answers to be drawn.
        """
        taught = [run for run in runs if run.recipe.spec.all_teachers()]
        if not taught or self.findings.teacher is None:
            return []
        with self._told("the teacher"):
            batches = self._test(taught[0])
            teachers = taught[0].teachers(device=_device(batches))
            if self.answers.of_classes and teachers:
                found, *others = (predict(teacher, batches) for teacher in teachers)
                if others:
                    said = [Outputs(one.logits) for one in (found, *others)]
                    found = replace(found, logits=taught[0].recipe.task.combined(said).logits)
                self.answers.teacher = found
                self.answers.examples = tuple(_examples(found, batches))
            return teachers
        return []


def _listed(names: Sequence[str], most: int = 4) -> str:
    rest = len(names) - most
    return "; ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _gives_classes(run: LoadedRun) -> bool:
    """Check whether answers are logits (N, K) of classes, one row for each sample."""
    task, info = run.recipe.task, run.info
    return task.rows_are == "classes" and task.fits((1, info.outputs), info, 1)


def _best_first(findings: Findings) -> list[Variant]:
    """List the baseline, then the other variants that have runs, the best first."""
    score = findings.deciding
    return sorted(
        findings.ran,
        key=lambda v: (v.name != findings.baseline, -rank(score, v.last[score.name])),
    )


def _device(batches: Iterable[Batch]) -> torch.device:
    return next(iter(batches)).labels.device


def _spread(
    batches: Iterable[Batch], models: Mapping[str, TappedModel]
) -> Iterator[contracts.Example]:
    """Choose evenly spaced images, and ask the networks."""
    count = sum(len(batch.index) for batch in batches)
    chosen = {(2 * place + 1) * count // (2 * DRAWN) for place in range(min(DRAWN, count))}
    seen = 0
    for batch in batches:
        for place in sorted(chosen & set(range(seen, seen + len(batch.index)))):
            one = batch.map(lambda value, at=place - seen: value[at : at + 1])  # type: ignore[misc]
            with in_eval_mode(*(model.module for model in models.values())), torch.no_grad():
                answers = {
                    name: model(one.inputs).logits[0].cpu() for name, model in models.items()
                }
            yield contracts.Example(first_tensor(one.inputs)[0].cpu(), one.labels[0].cpu(), answers)
        seen += len(batch.index)


def _examples(teacher: Predictions, batches: Iterable[Batch]) -> Iterator[Example]:
    """Choose images that the teacher classifies correctly: those of which it is least sure, and
    ordinary ones.
    """
    # that of the predictions
    order = torch.cat([batch.index.cpu() for batch in batches]).sort().values
    chosen = {int(order[place]): place for place in _chosen(teacher)}
    images: dict[int, Tensor] = {}
    for batch in batches:
        if not isinstance(batch.inputs, Tensor):
            return  # token ids are no pictures
        images |= {
            i: image.cpu()
            for i, image in zip(batch.index.tolist(), batch.inputs, strict=True)
            if i in chosen
        }
    for index, place in chosen.items():
        yield Example(place, images[index], int(teacher.labels[place]), teacher.logits[place])


def _chosen(teacher: Predictions) -> list[int]:
    """Choose the images with the most probable second class, then the median ones of further
    classes; one of each class.
    """
    # 0 where the teacher is wrong, so that such images are never chosen.
    second = teacher.logits.softmax(1).topk(2).values[:, 1] * (
        teacher.logits.argmax(1) == teacher.labels
    )
    right: dict[int, list[int]] = {}  # by class, the least sure first
    for place in second.argsort(descending=True, stable=True).tolist():
        if second[place] > 0:
            right.setdefault(int(teacher.labels[place]), []).append(place)
    unsure = {label: places[0] for label, places in list(right.items())[:EXAMPLES]}
    ordinary = [
        right[label][len(right[label]) // 2]
        for label in sorted(right, key=lambda label: (label in unsure, label))
    ]
    return [
        *unsure.values(),
        *[place for place in ordinary if place not in unsure.values()][:EXAMPLES],
    ]
