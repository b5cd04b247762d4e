"""The parts of a report, top to bottom: findings, learning curves, and answers of the networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml

from kdkit.study import search_table
from kdkit.study.findings import Findings, Variant, rank
from kdkit.study.report import heatmaps, plots, words
from kdkit.study.report.document import (
    Block,
    Document,
    Facts,
    Figures,
    Listing,
    Picture,
    Pictures,
    Section,
    Words,
)
from kdkit.study.report.forest import forest
from kdkit.study.report.mean_curves import Courses
from kdkit.study.report.plots import Priced
from kdkit.study.report.predictions import COMPARED, SEEDS, Answers, confusion
from kdkit.study.search import Halved

LINES = 12  # maximum lines of a command that is not folded
MANY = 20  # maximum number of classes; of more, those that differ most are drawn


@dataclass(frozen=True)
class Material:
    """The content of a report.

    Attributes:
        findings: figures and statistics.
        courses: of each variant, over the epochs.
        recipes: resolved recipe of each variant, as plain data; missing ones are left out.
        answers: to the test data.
        search: that chose a variant; None without one.
        made: pictures of images that the first run of each variant has made, PNG by name.
    """

    findings: Findings
    courses: Mapping[str, Courses]
    recipes: Mapping[str, Mapping[str, Any]]
    answers: Answers
    search: Halved | None = None
    made: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Omitted parts and the reasons, a phrase each."""
        # A variant without a finished run has no folders, and is told as a failure instead.
        gone = [v.name for v in self.findings.variants if v.folders and v.name not in self.recipes]
        gone = (
            [f"the curves and recipes of {', '.join(gone)}: their runs are not there any more"]
            if gone
            else []
        )
        return [*gone, *self.answers.missing]


def document(material: Material) -> Document:
    """Build the whole report; a part without data says so in its place."""
    material = _best_first(material)
    findings = material.findings
    # Other tasks than classification have no confusions and no softened classes.
    of_classes = [
        ("Classes and confusions", _classes),
        ("What the teacher knows that labels do not say", _softened),
    ]
    parts = [
        ("Differences", _differences),
        ("Results", _results),
        ("Cost", _cost),
        ("Learning curves", _learning),
        *([("Agreement with the teacher", _agreement)] if findings.agreement else []),
        *(of_classes if material.answers.of_classes else []),
        *([("Images that were made", _made)] if any(material.made.values()) else []),
        *([("Answers to test images", _drawn)] if material.answers.drawn else []),
        ("Similar layers", _layers),
        *([("Search", _search)] if material.search else []),
        ("Protocol", _protocol),
        ("How to repeat it", _repeat),
    ]
    sections = [Section(title, list(write(material))) for title, write in parts]
    shown = [section for section in sections if section.blocks]
    return Document(findings.name, findings.question, list(words.answer(findings)), shown)


def _differences(material: Material) -> Iterator[Block]:
    if (drawn := forest(material.findings)) is not None:
        yield drawn


def _best_first(material: Material) -> Material:
    """Sort the variants by the deciding score; those without a result come last."""
    found, name = material.findings, material.findings.deciding.name
    order = {v.name: -rank(found.deciding, v.last[name]) for v in found.ran}
    ranked = sorted(found.variants, key=lambda v: order.get(v.name, math.inf))
    return replace(
        material,
        findings=replace(found, variants=tuple(ranked)),
        courses={v.name: material.courses[v.name] for v in ranked},
    )


def _protocol(material: Material) -> Iterator[Block]:
    yield Facts(list(words.protocol(material.findings, material.recipes)))
    about = [(v.name, v.about) for v in material.findings.variants if v.about]
    if about:
        yield Words("What each variant learns from:")
        yield Facts(about)


def _search(material: Material) -> Iterator[Block]:
    found = material.search
    assert found is not None
    yield Words(
        f"{'. '.join(search_table.sentences(found))}. Above, the winner is measured on test data"
        " with other seeds; the baseline was not searched, which favours the winner."
    )
    unit = f" {found.score.unit}" if found.score.unit else ""
    yield Figures(
        search_table.header(found),
        search_table.rows(found),
        f"{found.score.title}{unit} on validation data after each rung, mean over the seeds.",
        marked=0,
    )


def _results(material: Material) -> Iterator[Block]:
    yield words.score_table(material.findings)
    if (both := words.intervals_table(material.findings)) is not None:
        yield both
    yield words.further_table(material.findings)
    yield from words.parts_tables(material.findings)
    for variant in material.findings.variants:
        for seed, reason in variant.failures.items():
            yield Words(f"{variant.name}, seed {seed}, has no result: {reason.rstrip('.')}.")


def _cost(material: Material) -> Iterator[Block]:
    findings = material.findings
    table = words.cost_table(findings)
    if table is None:
        yield Words("What training and networks cost was not measured.")
        return
    yield table
    if together := findings.together:
        yield Words(_all_in_all(together))
    score = findings.deciding
    # NaN cannot be drawn, and would take the limits of the axis with it.
    shown = [v for v in findings.ran if v.cost and all(map(math.isfinite, v.last[score.name]))]
    # An older kdkit has not recorded processor time: seconds then stand for all.
    measured = all(v.cost and v.cost.cpu_seconds > 0 for v in shown)
    points = [
        Priced(v.name, v.last[score.name], v.cost.cpu_seconds if measured else v.cost.seconds)
        for v in shown
        if v.cost
    ]
    if len(points) > 1:
        unit, teacher = "CPU seconds" if measured else "seconds", _of_teacher(findings)
        yield plots.against_cost(points, findings.baseline, unit, teacher, score)


def _of_teacher(findings: Findings) -> float | None:
    """Return the deciding score of the teacher."""
    return findings.teacher.last.get(findings.deciding.name) if findings.teacher else None


def _all_in_all(together: Mapping[str, float]) -> str:
    trained, reused = int(together.get("trained", 0)), int(together.get("reused", 0))
    seconds = (
        f", which took {together['wall']:,.0f} s and {together['cpu']:,.0f} CPU s in all"
        if trained and "wall" in together
        else ""
    )
    return f"{trained} runs were trained for this study{seconds}; {reused} were there already."


def _learning(material: Material) -> Iterator[Block]:
    findings, courses = material.findings, material.courses
    teacher, score = _of_teacher(findings), findings.deciding
    curves = plots.learning_curves(courses, findings.baseline, teacher, score)
    if curves is None:
        yield Words("The runs are not there any more, so there are no curves.")
        return
    bands = any(one.seeds > 1 for one in courses.values())
    yield Words(
        "Lines are means over the seeds; bands are one standard deviation to each side."
        if bands
        else "One seed each, so no bands."
    )
    yield curves
    losses = plots.training_loss(courses, findings.baseline), plots.loss_terms(courses)
    yield from (one for one in losses if one is not None)


def _agreement(material: Material) -> Iterator[Block]:
    findings, courses = material.findings, material.courses
    drawn = list(plots.to_teacher(courses, findings.baseline, findings.agreement))
    if not drawn:
        yield Words("No run was measured against a teacher while it was trained.")
        return
    names = {one.name for one in findings.agreement}
    # Variants without a teacher are compared with the common one after training only.
    silent = [v.name for v in findings.variants if not names & courses[v.name].scores.keys()]
    without = (
        f" Not measured while training, for want of a teacher: {', '.join(silent)}."
        if silent
        else ""
    )
    yield Words(f"On the test data, over the epochs. Bands as above.{without}")
    yield from drawn


def _classes(material: Material) -> Iterator[Block]:
    findings, answers = material.findings, material.answers
    names = [v.name for v in findings.variants if v.name in answers.students]
    if not names:
        yield Words("No student can be asked again, so nothing is known of single classes.")
        return
    accuracy = torch.stack([answers.class_accuracy(name) for name in names])
    chosen = list(range(accuracy.shape[1]))
    many = (
        f"Of {len(chosen)} classes, the {MANY} on which the variants differ most. "
        if len(chosen) > MANY
        else ""
    )
    if many:
        # In the order of the data's classes, not of the differences.
        chosen = sorted(
            # NaN: classes without test images come last
            (accuracy.amax(0) - accuracy.amin(0)).nan_to_num(-1).topk(MANY).indices.tolist()
        )
    rows = names
    if answers.teacher is not None:
        rows, accuracy = (
            [*names, "(teacher)"],
            torch.cat([accuracy, confusion(answers.teacher).diag()[None]]),
        )
    shown = [answers.classes[i] for i in chosen]
    yield Pictures(
        "Test accuracy by class, %",
        [heatmaps.class_accuracy(rows, shown, accuracy[:, chosen])],
        f"{many}{_asked(material)}.",
    )
    leader = _leader(findings, names)
    if leader is not None and findings.baseline in names:
        change = answers.confusion_change(leader, findings.baseline)
        # A matrix of many classes is not readable: the largest changes are drawn as bars.
        draw = (
            heatmaps.confusion_pairs if len(answers.classes) > MANY else heatmaps.confusion_change
        )
        yield Pictures(
            f"Confusions of {leader} minus those of {findings.baseline}, points",
            [draw(leader, findings.baseline, answers.classes, change)],
            "Of the images of a class, how many more percent are taken for each class. On the"
            " diagonal, more is better; elsewhere, less.",
        )


def _leader(findings: Findings, names: list[str]) -> str | None:
    """Return the best variant other than the baseline."""
    score = findings.deciding
    others = [v for v in findings.ran if v.name in names and v.name != findings.baseline]
    return max(others, key=lambda v: rank(score, v.last[score.name])).name if others else None


def _asked(material: Material) -> str:
    """Describe which runs answered again."""
    answers, most = material.answers.students, max(len(v.seeds) for v in material.findings.variants)
    seeds = sorted({seed for found in answers.values() for seed in found})
    of = f" (the first {SEEDS} of {most} of each variant)" if most > SEEDS else ""
    return (
        f"Seed {seeds[0]}"
        if len(seeds) == 1
        else f"Mean over the seeds {', '.join(map(str, seeds))}{of}"
    )


def _softened(material: Material) -> Iterator[Block]:
    examples, classes = material.answers.examples, material.answers.classes
    if not examples:
        several = (
            "The variants have no teacher in common"
            if material.findings.teacher is None
            else "The teacher cannot be asked again"
        )
        asked = material.answers.teacher is not None
        reason = (
            "The test data are texts, or the teacher gets none of them right" if asked else several
        )
        yield Words(f"{reason}, so its answers are not drawn.")
        return
    caption = (
        "The teacher gets these images right. First those to which it gives the most probable"
        " second class, then ordinary ones, of which it is as sure as of half of their class; of"
        " each kind, at most one of a class. Bars: its probabilities softmax(z / T); the number is"
        " that of its second choice. A higher temperature T shows what else the image resembles."
        " The light bar is the label."
        + (
            f" Of {len(classes)} classes, the {heatmaps.BARS} most probable."
            if len(classes) > heatmaps.BARS
            else ""
        )
    )
    drawn = [
        heatmaps.softened(i, one.image, one.label, one.logits, classes)
        for i, one in enumerate(examples, 1)
    ]
    yield Pictures("The teacher's answers to test images, by temperature", drawn, caption)


def _drawn(material: Material) -> Iterator[Block]:
    drawn = material.answers.drawn
    yield Pictures(
        "Answers to test images",
        [picture.picture for picture in drawn],
        f"{len(drawn)} test images, evenly spaced in the order of the data, with the answers of the"
        f" first seed of each network: {', '.join(drawn[0].names)}.",
    )


def _made(material: Material) -> Iterator[Block]:
    making = {name: pictures for name, pictures in material.made.items() if pictures}
    yield Words(
        f"The latest images that the first run of each of {', '.join(making)} has made and learnt"
        " from, with the teacher's answers to them."
    )
    yield Pictures(
        "Images that were made",
        [
            Picture(
                f"made-{i}-{j}",
                heatmaps.images(png, f"{name}: {title}"),
                f"Images that {name} has made for its student to learn from.",
                photo=True,
            )
            for i, (name, pictures) in enumerate(making.items(), 1)
            for j, (title, png) in enumerate(pictures.items(), 1)
        ],
    )


def _layers(material: Material) -> Iterator[Block]:
    found, findings = material.answers.alike, material.findings
    if not found:
        yield Words("Teacher and students cannot be compared layer by layer here.")
        return
    # All variants are compared on the same images.
    images = next(iter(found.values())).images
    first = (
        "first "
        if any(len(recipe.get("teachers") or ()) > 1 for recipe in material.recipes.values())
        else ""
    )
    rest = len(findings.variants) - len(found)
    only = (
        f" Drawn are the baseline and the {len(found) - 1} best of the others."
        if rest and len(found) == COMPARED
        else ""
    )
    yield Pictures(
        f"Similarity of the {first}teacher's layers with the student's (linear CKA)",
        [
            heatmaps.similar_layers(i, name, one.rows, one.columns, one.values)
            for i, (name, one) in enumerate(found.items(), 1)
        ],
        f"Linear CKA (Kornblith et al. 2019; unbiased, over batches) on the first {images} test"
        " images: 1 says that one layer is a rotation and rescaling of the other, 0 that they have"
        f" nothing in common. The first seed of each variant.{only}",
    )


def _repeat(material: Material) -> Iterator[Block]:
    findings = material.findings
    if findings.command:
        # Runs without a study have a command each.
        yield Listing("The command", findings.command, folded=findings.command.count("\n") > LINES)
    versions = ", ".join(f"{name} {version}" for name, version in findings.versions.items())
    yield Facts([("versions", versions), *findings.machine.items()])
    for variant in findings.variants:
        if variant.name in material.recipes:
            baseline = " (baseline)" if variant.name == findings.baseline else ""
            text = yaml.safe_dump(
                dict(material.recipes[variant.name]), sort_keys=False, allow_unicode=True, width=100
            )
            yield Listing(f"Recipe of {variant.name}{baseline}, seed {variant.seeds[0]}", text)
    yield Listing(
        "Run folders",
        "\n".join(line for variant in findings.variants for line in _folders(variant)),
    )
    for sentence in material.missing:
        yield Words(f"Left out: {sentence}")


def _folders(variant: Variant) -> Iterator[str]:
    for seed, folder in zip(variant.seeds, variant.folders, strict=True):
        yield f"{variant.name}, seed {seed}: {folder}"
