"""Steps of kdkit on a CUDA device beside the same steps by hand: eager, and as a CUDA graph.

    python benchmarks/gpu.py [--parts pairs losses folding runs] [--steps 200] [--precision bf16]

Batches of 64 images of 32 x 32 pixels, held on the device, cropped and flipped. `by hand` draws the
images, augments, asks both networks, and steps the optimizer in plain torch, with nothing else;
`captured` is that step in one CUDA graph. kdkit's steps include its batches, its checks, its hooks
and its logging. `runs` trains whole epochs, evaluation included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kdkit
from kdkit import recipe
from kdkit.contracts.records import Batch
from kdkit.data import loaders
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import optimize
from kdkit.engine.trainer import Trainer, batches
from kdkit.runs import training
from kdkit.runs.folder import RunFolder
from kdkit.runs.networks import ModelFactory
from kdkit.runs.run import Run
from kdkit.study.lockstep import train_together

IMAGES, TEST = 50_000, 10_000
PAIRS = [("resnet32x4", "resnet8x4"), ("resnet56", "resnet20")]
KD = [
    {"use": "cross_entropy", "weight": 0.1},
    {"use": "logit_kl", "weight": 0.9, "temperature": 4},
]
MEAN = (0.5071, 0.4867, 0.4408)
DEVIATION = (0.2675, 0.2565, 0.2761)


def at(*names: str) -> dict[str, Any]:
    """The same layers of both networks."""
    return {"layers": [{"student": name, "teacher": name} for name in names]}


LOSSES: dict[str, list[dict[str, Any]]] = {
    "logit_kl": KD[1:],
    "dkd": [{"use": "dkd"}],
    "dist": [{"use": "dist"}],
    "hint": [{"use": "hint", "weight": 100, **at("stage2")}],
    "at": [{"use": "at", "weight": 1000, **at("stage1", "stage2", "stage3")}],
    "sp": [{"use": "sp", "weight": 3000, **at("stage3")}],
    "vid": [{"use": "vid", **at("stage2", "stage3")}],
    "rkd": [
        {"use": "rkd_distance", "weight": 25, **at("penultimate")},
        {"use": "rkd_angle", "weight": 50, **at("penultimate")},
    ],
    "crd": [{"use": "crd", "weight": 0.8, **at("penultimate")}],
    "review": [{"use": "review", "weight": 5, **at("stage1", "stage2", "stage3", "penultimate")}],
}


def content(
    student: str, teacher: str | None, losses: list[dict[str, Any]], precision: str, **train: Any
) -> dict[str, Any]:
    """A recipe on invented images of CIFAR-100's form."""
    data = {"use": "synthetic", "train": IMAGES, "test": TEST, "image_size": 32}
    optimizer = {
        "name": "momentum",
        "lr": 1e-3,
        "weight_decay": 5e-4,
        "decay_norm_and_bias": True,
    }
    found: dict[str, Any] = {
        "name": "gpu",
        "data": {
            "dataset": {**data, "num_classes": 100},
            "batch_size": 64,
            "eval_batch_size": 1000,
            "augment": {"crop_padding": 4, "flip": 0.5},
        },
        "student": {"model": f"cifar/{student}"},
        "schedule": {"use": "offline" if teacher else "supervised"},
        "losses": losses,
        "train": {"epochs": 240, "optimizer": optimizer, "precision": precision, **train},
    }
    if teacher:
        found["teacher"] = {"model": f"cifar/{teacher}", "precision": precision}
    return found


@contextlib.contextmanager
def loaded(spec: dict[str, Any]) -> Iterator[recipe.Recipe]:
    """The recipe, from a file as always."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu.yaml"
        path.write_text(json.dumps(spec))
        yield recipe.load(path)


def trainer_of(spec: dict[str, Any]) -> tuple[Trainer, ModelFactory]:
    """kdkit's trainer of a recipe."""
    with loaded(spec) as found:
        accelerator = build_accelerator(found.spec.train)
        prepared = data_of(json.dumps(spec["data"]), found, accelerator.device)
        factory = ModelFactory(found, prepared.info, {}, device=accelerator.device)
        schedule = found.plugins.schedules[found.spec.schedule.use](found.spec.schedule)
        stage = next(iter(schedule.stages(factory)))
        trainer = training.build_trainer(found, prepared, factory, accelerator, 0, stage)
    trainer.learner.train()
    return trainer, factory


KEPT: dict[str, loaders.Data] = {}


def data_of(key: str, found: recipe.Recipe, device: torch.device) -> loaders.Data:
    """The images of a recipe, read once."""
    if key not in KEPT:
        source = found.plugins.datasets["synthetic"](found.spec.data.dataset)
        KEPT[key] = loaders.prepare(found.spec.data, source, found.task, seed=0, device=device)
    return KEPT[key]


def milliseconds(step: Callable[[], object], steps: int) -> float:
    """The mean time of a step."""
    for _ in range(max(1, steps // 5)):
        step()
    synchronise()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - began) / steps * 1e3


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_kdkit(spec: dict[str, Any], *, capture: bool, steps: int) -> float:
    """kdkit's step, its batch included."""
    trainer, _ = trainer_of(spec)
    reasons: list[str] = []
    trainer.capture(capture, reasons.append)
    coming: Iterator[Batch] = iter(())

    def step() -> None:
        nonlocal coming
        if (batch := next(coming, None)) is None:
            coming = batches(trainer.loader, trainer.stage, trainer.epoch)
            batch = next(coming)
        optimize(trainer, [batch])

    found = milliseconds(step, steps)
    if capture and reasons:
        raise RuntimeError(reasons[0])
    return found


def by_hand(
    student: str, teacher: str | None, precision: str, *, capture: bool, steps: int
) -> float:
    """The step in plain torch."""
    trainer, factory = trainer_of(content(student, teacher, KD if teacher else KD[:1], precision))
    device = trainer.accelerator.device
    network: nn.Module = trainer.stage.students[0].module
    taught: nn.Module | None = factory.teacher().module if teacher else None
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=torch.tensor(1e-3, device=device) if capture else 1e-3,
        momentum=0.9,
        weight_decay=5e-4,
        fused=device.type == "cuda",
    )
    pixels = torch.randint(0, 256, (IMAGES, 3, 40, 40), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 100, (IMAGES,), device=device)
    windows = pixels.unfold(2, 32, 1).unfold(3, 32, 1)
    mean, deviation = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, DEVIATION))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = (
        contextlib.nullcontext
        if half is None
        else lambda: torch.autocast(device.type, dtype=half, cache_enabled=not capture)
    )

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, IMAGES, (64,), device=device)
        top, left = (torch.randint(0, 9, (64,), device=device) for _ in range(2))
        images = windows[chosen, :, top, left].float().div_(255)
        mirrored = torch.rand(64, 1, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
        images = ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)
        return images, labels[chosen]

    def step() -> None:
        images, targets = batch()
        optimizer.zero_grad(set_to_none=True)
        with cast():
            z_s = network(images)
            with torch.no_grad():
                z_t = None if taught is None else taught(images)
        loss = F.cross_entropy(z_s.float(), targets)
        if z_t is not None:
            log_q, log_p = (F.log_softmax(z.float() / 4, 1) for z in (z_s, z_t))
            soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            loss = 0.1 * loss + 0.9 * 16 * soft
        loss.backward()
        optimizer.step()

    if not capture or device.type != "cuda":
        return milliseconds(step, steps)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return milliseconds(graph.replay, steps)


class Sheet:
    """A table of times, printed line by line as well."""

    def __init__(self, title: str, *columns: str) -> None:
        self.table = Table(title=title)
        for column in columns:
            self.table.add_column(column, justify="right" if column != columns[0] else "left")

    def add(self, name: str, *cells: str) -> None:
        self.table.add_row(name, *cells)
        print(name, *cells, sep="  ", flush=True)


def measured(work: Callable[[], float]) -> float:
    """A time; not a number where it fails, with the reason."""
    try:
        return work()
    except Exception as error:  # a table with a hole says more than none
        print("failed:", type(error).__name__, " ".join(str(error).split())[:300], flush=True)
        return float("nan")


def works(teacher: str, student: str, precision: str, steps: int) -> dict[str, Callable[[], float]]:
    """The rows of the table of pairs."""
    spec = content(student, teacher, KD, precision)
    full = content(student, teacher, KD, "fp32")
    alone = content(student, None, KD[:1], precision)
    return {
        "by hand, eager": lambda: by_hand(student, teacher, precision, capture=False, steps=steps),
        "by hand, captured": lambda: by_hand(
            student, teacher, precision, capture=True, steps=steps
        ),
        "kdkit, fp32, eager": lambda: of_kdkit(full, capture=False, steps=steps),
        "kdkit, eager": lambda: of_kdkit(spec, capture=False, steps=steps),
        "kdkit, captured": lambda: of_kdkit(spec, capture=True, steps=steps),
        "kdkit, student alone, captured": lambda: of_kdkit(alone, capture=True, steps=steps),
    }


def pairs(precision: str, steps: int) -> Table:
    """Steps of `logit_kl` by hand and by kdkit."""
    sheet = Sheet(
        f"ms a step, {precision}", "", *(" -> ".join(pair) for pair in PAIRS), "x by hand"
    )
    rows: dict[str, list[float]] = {}
    for teacher, student in PAIRS:
        for name, work in works(teacher, student, precision, steps).items():
            rows.setdefault(name, []).append(measured(work))
            print(teacher, student, name, f"{rows[name][-1]:.2f} ms", flush=True)
    for name, found in rows.items():
        hand = rows["by hand, captured" if "captured" in name else "by hand, eager"]
        ratio = " / ".join(f"{own / other:.2f}" for own, other in zip(found, hand, strict=True))
        sheet.add(name, *(f"{value:.2f}" for value in found), ratio)
    return sheet.table


def losses(precision: str, steps: int) -> Table:
    """Steps of several losses, captured and not."""
    sheet = Sheet(
        f"ms a step, {precision}, {' -> '.join(PAIRS[0])}",
        "",
        "captured",
        "x logit_kl",
        "eager",
        "captured / eager",
    )
    teacher, student = PAIRS[0]
    base = float("nan")
    for name, own in LOSSES.items():
        spec = content(student, teacher, [KD[0], *own], precision)
        captured = measured(lambda spec=spec: of_kdkit(spec, capture=True, steps=steps))
        eager = measured(lambda spec=spec: of_kdkit(spec, capture=False, steps=max(1, steps // 4)))
        base = captured if name == "logit_kl" else base
        sheet.add(
            name,
            f"{captured:.2f}",
            f"{captured / base:.2f}",
            f"{eager:.2f}",
            f"{captured / eager:.2f}",
        )
    return sheet.table


def folding(precision: str, steps: int) -> Table:
    """Captured steps with the teacher's batch norms folded into its convolutions, and without."""
    sheet = Sheet(f"ms a captured step, {precision}", "", "as it is", "folded", "ratio")
    for teacher, student in PAIRS:
        spec = content(student, teacher, KD, precision)
        folded = {**spec, "teacher": {**spec["teacher"], "fold_batchnorm": True}}
        plain, quick = (
            measured(lambda spec=one: of_kdkit(spec, capture=True, steps=steps))
            for one in (spec, folded)
        )
        sheet.add(f"{teacher} -> {student}", f"{plain:.2f}", f"{quick:.2f}", f"{quick / plain:.2f}")
    return sheet.table


def runs(precision: str, epochs: int) -> Table:
    """Whole epochs, evaluation included, and what 240 of them would take."""
    sheet = Sheet("training with evaluation", "", "s an epoch", "min for 240")
    teacher, student = PAIRS[1]
    cases = {
        f"{teacher} -> {student}": content(student, teacher, KD, precision),
        " -> ".join(PAIRS[0]): content(PAIRS[0][1], PAIRS[0][0], KD, precision),
        f"{PAIRS[0][0]} alone": content(PAIRS[0][0], None, KD[:1], precision),
    }
    one = float("nan")
    for name, spec in cases.items():
        took = measured(lambda spec=spec: seconds([spec], epochs))
        one = took if name == f"{teacher} -> {student}" else one
        sheet.add(name, f"{took:.2f}", f"{took * 240 / 60:.1f}")
    methods = [
        content(student, None, KD[:1], precision),
        *(
            content(student, teacher, [KD[0], *LOSSES[name]], precision)
            for name in ("logit_kl", "dkd", "dist", "rkd")
        ),
    ]
    two = measured(lambda: seconds(methods[1:3], epochs))
    five = measured(lambda: seconds(methods, epochs))
    sheet.add("two methods in lockstep", f"{two:.2f}", f"{two * 240 / 60:.1f}")
    sheet.add("five methods in lockstep", f"{five:.2f}", f"{five * 240 / 60:.1f}")
    sheet.add("a further student / a run of its own", f"{(two - one) / one:.2f}", "")
    return sheet.table


def seconds(specs: list[dict[str, Any]], epochs: int) -> float:
    """Seconds of an epoch of runs side by side, evaluation included; the first one, which also
    records, is left out.
    """
    ends: dict[int, float] = {}
    plain = RunFolder.log

    def log(folder: RunFolder, **line: Any) -> None:
        if line["kind"] == "epoch":
            ends[line["epoch"]] = time.perf_counter()  # the last run's counts
        plain(folder, **line)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(RunFolder, "log", log):
        jobs = []
        for number, spec in enumerate(specs):
            path = Path(folder) / f"{number}.yaml"
            own = {"name": f"run{number}", "train": {**spec["train"], "epochs": epochs + 1}}
            path.write_text(json.dumps({**spec, **own}))
            jobs.append(Run(recipe.load(path), Path(folder) / f"run{number}"))
        for outcome in train_together(jobs):
            if outcome.result is None:
                raise RuntimeError(outcome.reason)
    return (ends[epochs + 1] - ends[1]) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["pairs", "losses", "folding", "runs"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    asked = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(name, "torch", torch.__version__, "kdkit", kdkit.__version__, flush=True)
    console = Console()
    tables = {
        "pairs": lambda: pairs(asked.precision, asked.steps),
        "losses": lambda: losses(asked.precision, asked.steps),
        "folding": lambda: folding(asked.precision, asked.steps),
        "runs": lambda: runs(asked.precision, asked.epochs),
    }
    for part in asked.parts:
        console.print(tables[part]())


if __name__ == "__main__":
    main()
