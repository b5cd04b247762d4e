"""Every loss of the registry by itself: CPU time and peak memory of forward and backward, beside
its naive form where there is one.

    python benchmarks/losses.py [--losses crd,rkd_angle] [--size cifar|small] [--steps 7]

A loss stands on random answers of the shapes of CIFAR-100: batches of 64, 100 classes, a student's
maps of 64 x 8 x 8 and a teacher's of 256 x 8 x 8, embeddings of 64 and 256. It gets the first of
the layers in LAYERS that it accepts; CASES has further sizes.

Time is the process's CPU time, the median of runs that alternate with the naive form's. Peak memory
is what forward and backward together allocate beyond what was there before, gradients included: the
largest running sum over the allocator's own events, which torch's profiler records in one further
run. So temporaries inside an operation count; the libraries' scratch memory that bypasses the
allocator does not. The naive forms write the formula down as the papers' code does. Both must give
one value, or the script ends with an error.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kdkit
from kdkit.contracts.options import at_epoch
from kdkit.contracts.task import serves
from kdkit.recipe import registry
from kdkit.study.step_memory import peak_memory
from kdkit.testing.forms import Network
from kdkit.testing.outputs import random_outputs
from kdkit.testing.probes import readable
from kdkit.testing.stand_ins import random_survey

# by layer: the student's and the teacher's, without the batch
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    batch: int
    classes: int
    images: int
    student: int  # channels
    teacher: int
    side: int

    def layers(self) -> dict[str, Shapes]:
        """What a loss may be put on."""
        s = self.student
        t = self.teacher
        side = self.side
        early = ((s // 2, 2 * side, 2 * side), (t // 2, 2 * side, 2 * side))
        late = ((s, side, side), (t, side, side))
        return {
            "map": {"late": late},
            "embedding": {"embedding": ((s,), (t,))},
            "two maps": {"early": early, "late": late},
            "two maps, as wide": {
                name: (shapes[0], shapes[0]) for name, shapes in (("early", early), ("late", late))
            },
            "tokens": {"late": ((side**2 + 1, s), (side**2 + 1, t))},
            "tokens of two layers": {
                name: ((side**2 + 1, s), (side**2 + 1, t)) for name in ("early", "late")
            },
        }


SIZES = {"cifar": Size(64, 100, 50000, 64, 256, 8), "small": Size(8, 10, 40, 4, 8, 4)}
LAYERS = ["map", "embedding", "two maps", "two maps, as wide", "tokens", "tokens of two layers"]
RELATION_LAYERS = ["embedding", "two maps", "two maps, as wide"]
# More sizes, by loss: batch and width of both embeddings.
CASES: Mapping[str, Mapping[str, Sequence[tuple[int, int]]]] = {
    "cifar": {
        "rkd_angle": [(256, 512), (1024, 512)],
        "rkd_distance": [(256, 512)],
        "cc": [(256, 512)],
    },
    "small": {"rkd_angle": [(16, 8)]},
}
OPTIONS: Mapping[str, Mapping[str, int]] = {"minilm_relations": {"heads": 2}}
"""Options of losses that cannot be tried with their defaults on these layers."""
NAIVE_UP_TO = 2**30  # bytes of N^2 D differences and N^3 products
SURVEYED = 500  # images that stand for all of them before the first step


@dataclass
class Subject:
    """A loss, set up, and what it is timed on."""

    loss: kdkit.Loss
    place: str
    student: kdkit.Outputs
    teacher: kdkit.Outputs
    batch: kdkit.Batch

    def run(self, form: Callable[..., Tensor] | None = None) -> Run:
        """Forward and backward of the loss, or of another form of it, with a state of its own."""
        loss = copy.deepcopy(self.loss)
        student = self.student.map(lambda x: x.clone().requires_grad_())
        teacher = readable(loss, self.teacher)

        def step() -> Tensor:
            torch.manual_seed(0)
            value = (
                form(loss, student, teacher, self.batch)
                if form
                else loss(student, teacher, self.batch)
            )
            value.backward()
            student.map(forget)
            loss.zero_grad()
            return value.detach()

        return step


def forget(x: Tensor) -> Tensor:
    x.grad = None
    return x


def subjects(
    cls: type[kdkit.Loss], size: Size, more: Sequence[tuple[int, int]]
) -> Iterator[Subject]:
    """The loss on the first layers that it accepts, and on further embeddings.

    Raises:
        ShapeError: it accepts none.
    """
    refusals: list[str] = []
    layers = size.layers()
    for place in RELATION_LAYERS if cls.knowledge == "relation" else LAYERS:
        try:
            yield subject(cls, place, layers[place], size, size.batch)
            break
        except (kdkit.ShapeError, kdkit.TapError, ValidationError) as error:
            refusals.append(f"{place}: {error}")
    else:
        raise kdkit.ShapeError(f"{cls.name} accepts none of the layers:\n" + "\n".join(refusals))
    for batch, width in more:
        yield subject(cls, "embedding", {"embedding": ((width,), (width,))}, size, batch)


def subject(cls: type[kdkit.Loss], place: str, shapes: Shapes, size: Size, batch: int) -> Subject:
    layers = cls.Options.model_fields.get("layers")
    # a default, such as `penultimate`, is a layer that these examples have not
    reads_layers = layers is not None and (
        layers.is_required() or cls.knowledge in ("feature", "relation")
    )
    options = dict(OPTIONS.get(cls.name, {}))
    if reads_layers:
        options["layers"] = [{"student": name, "teacher": name} for name in shapes]
    torch.manual_seed(0)
    loss = cls(at_epoch(cls.Options(**options), 1000.0))  # behind every ramp
    sides = [{name: pair[side] for name, pair in shapes.items()} for side in (0, 1)]
    student, teacher = (
        random_outputs(side, size=batch, classes=size.classes, seed=seed, views=cls.needs_views)
        for seed, side in enumerate(sides)
    )
    networks = [Network(side, size.classes) for side in sides]
    student, teacher = networks[0].answer(student), networks[1].answer(teacher)
    labels = torch.arange(size.images) % size.classes
    loss.setup(
        student,
        readable(loss, teacher),
        kdkit.Context(
            networks[0],
            networks[1].requires_grad_(False),
            size.classes,
            len(labels),
            labels,
            behind=lambda network, layer, taps: network.behind(layer, taps),
            survey=functools.partial(random_survey, labels[:SURVEYED]),
        ),
    )
    index = (
        torch.randperm(len(labels))[:batch]
        if batch <= len(labels)
        else torch.arange(batch) % len(labels)
    )
    found = kdkit.Batch(torch.rand(batch, 3, 32, 32), labels[index], index)
    shown = place if reads_layers else "logits"
    loss(student, readable(loss, teacher), found)  # what setup let pass must be computable
    return Subject(loss, shown, student, teacher, found)


def cpu_time(run: Run) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def crd(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """As the authors write it: K + 1 rows of a memory for each image, multiplied by its
    embedding.
    """
    own, (part,) = loss.rows[batch.index], loss.parts
    chosen = torch.cat([own[:, None], loss.draw(own)], 1)
    ((f_s, f_t),) = loss.options.pairs(student, teacher)
    v_s, v_t = F.normalize(part.student(f_s)), F.normalize(part.teacher(f_t))
    noise = loss.options.negatives / len(part.student_memory)
    total = v_s.new_zeros(())
    for v, memory, known in (
        (v_s, part.teacher_memory, part.partition[:1]),
        (v_t, part.student_memory, part.partition[1:]),
    ):
        rows = memory.index_select(0, chosen.flatten()).view(*chosen.shape, -1)
        scores = (torch.bmm(rows, v[:, :, None])[..., 0] / loss.options.temperature).exp()
        if not known.any():
            known.copy_(scores.detach().mean().log())
        p = scores / (known.exp() * len(memory))
        total = (
            total
            - (p[:, 0] / (p[:, 0] + noise)).log().sum()
            - (noise / (p[:, 1:] + noise)).log().sum()
        )
    with torch.no_grad():
        for v, memory in ((v_s, part.student_memory), (v_t, part.teacher_memory)):
            momentum = loss.options.momentum
            memory.index_copy_(0, own, F.normalize(momentum * memory[own] + (1 - momentum) * v))
    return total / len(own)


def rkd_angle(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """As the authors write it: all N^2 differences of D numbers."""
    return F.smooth_l1_loss(*(angles(e) for e in embeddings(loss, student, teacher)))


def angles(e: Tensor) -> Tensor:
    sides = F.normalize(e[None] - e[:, None], dim=2)
    return torch.bmm(sides, sides.transpose(1, 2)).flatten()


def rkd_distance(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """From all N^2 differences of D numbers."""
    return F.smooth_l1_loss(*(distances(e) for e in embeddings(loss, student, teacher)))


def distances(e: Tensor) -> Tensor:
    square = (e[None] - e[:, None]).square().sum(2)
    d = square.clamp_min(1e-12).sqrt() * (1 - torch.eye(len(e)))
    return d / d[d > 0].mean()


def cc(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """Row by row."""
    rows = [
        torch.stack([correlations(loss, e, i) for i in range(len(e))])
        for e in embeddings(loss, student, teacher)
    ]
    return F.mse_loss(*rows)


def correlations(loss: kdkit.Loss, e: Tensor, i: int) -> Tensor:
    e, width = F.normalize(e), 2 * loss.options.gamma
    powers = (
        width**p / torch.tensor(float(p)).add(1).lgamma().exp() * (e[i] * e).sum(1) ** p
        for p in range(loss.options.order + 1)
    )
    return sum(powers) * torch.tensor(-width).exp()


def nst(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """With the products of all pairs of channels at every position."""
    x, y = (F.normalize(f.flatten(2), dim=2) for f in embeddings(loss, student, teacher))
    pairs = [
        ((one[:, :, None] * other[:, None]).sum(3).square()).mean()
        for one, other in ((x, x), (y, y), (x, y))
    ]
    return pairs[0] + pairs[1] - 2 * pairs[2]


def fsp(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """With the products of all pairs of channels at every position."""
    (f_s, f_t), (g_s, g_t) = loss.options.pairs(student, teacher)
    flows = []
    for f, g in ((f_s, g_s), (f_t, g_t)):
        f = F.adaptive_avg_pool2d(f, g.shape[2:])
        flows.append((f.flatten(2)[:, :, None] * g.flatten(2)[:, None]).mean(3))
    return F.mse_loss(*flows)


def ickd(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch
) -> Tensor:
    """Image by image."""
    f_s, f_t = embeddings(loss, student, teacher)
    errors = [
        (F.normalize(one @ one.T) - F.normalize(other @ other.T)).square().sum() / len(other)
        for one, other in zip(loss.adapters[0](f_s).flatten(2), f_t.flatten(2), strict=True)
    ]
    return torch.stack(errors).mean()


def embeddings(
    loss: kdkit.Loss, student: kdkit.Outputs, teacher: kdkit.Outputs
) -> tuple[Tensor, Tensor]:
    ((e_s, e_t),) = loss.options.pairs(student, teacher)
    return e_s, e_t


NAIVE = {form.__name__: form for form in (crd, rkd_angle, rkd_distance, cc, nst, fsp, ickd)}
GROWS = {"rkd_angle", "rkd_distance"}  # with N^2 * D


def compare(found: Subject, steps: int) -> tuple[list[float], list[float], int, int]:
    """Times and peak memory of the loss, and of its naive form where that fits."""
    ours = found.run()
    form = NAIVE.get(found.loss.name)
    name = found.loss.name
    n = len(found.batch.index)
    widest = max((x[0].numel() for x in found.student.features.values()), default=0)
    naive = (
        found.run(form)
        if form and (name not in GROWS or 4 * n**2 * (n + widest) <= NAIVE_UP_TO)
        else None
    )
    one, other = ours(), naive() if naive else None
    if other is not None:
        torch.testing.assert_close(
            other,
            one,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda text: f"{name}'s naive form gives another value: {text}",
        )
    times = [(cpu_time(ours), cpu_time(naive) if naive else 0.0) for _ in range(steps)]
    return (
        *map(list, zip(*times, strict=True)),
        peak_memory(ours),
        peak_memory(naive) if naive else 0,
    )


def row(found: Subject, steps: int) -> list[str]:
    ours, naive, peak, naive_peak = compare(found, steps)
    fast, slow = 1000 * statistics.median(ours), 1000 * statistics.median(naive)
    shown = [
        found.loss.name,
        found.place,
        str(len(found.batch.index)),
        f"{fast:.2f}",
        f"{peak / 2**20:.2f}",
    ]
    if not naive_peak:
        return shown
    return [
        *shown,
        f"{slow:.1f}",
        f"{naive_peak / 2**20:.1f}",
        f"{slow / fast:.1f}x",
        f"{naive_peak / peak:.1f}x",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--size", choices=SIZES, default="cifar")
    parser.add_argument("--steps", type=int, default=7, help="timed runs of each form")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plugins = registry.load()
    known, task = plugins.losses, plugins.tasks["classification"]()
    # the examples are images of classes; losses for other tasks cannot be tried on them
    every = sorted(name for name, cls in known.items() if serves(cls.for_tasks(), task))
    table = Table(
        "loss", "on", "batch", "ms", "MiB", "naive, ms", "naive, MiB", "time", "memory", box=None
    )
    for column in table.columns[2:]:
        column.justify = "right"
    refused: list[str] = []
    for name in options.losses.split(",") if options.losses else every:
        try:
            for found in subjects(
                known[name], SIZES[options.size], CASES[options.size].get(name, ())
            ):
                table.add_row(*row(found, options.steps))
        except kdkit.ShapeError as error:
            refused.append(str(error))
    Console(width=120).print(table)
    if refused:
        raise SystemExit("\n".join(refused))


if __name__ == "__main__":
    main()
