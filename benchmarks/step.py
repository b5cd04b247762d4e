"""A step of kdkit's engine against the same step written by hand in plain torch: CPU time,
interleaved in one process.

    python benchmarks/step.py [--steps 60] [--size small|large|both]

Both sides train the same networks on the same batch from memory, in the same memory format, with
the same optimizer. The hand-written side keeps hooks registered all the time, checks nothing, logs
nothing and has no switches. Ratios below 1 are work that kdkit does not do: it stops the teacher
behind its deepest tap, and normalises once where two adapters agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kdkit import recipe
from kdkit.contracts.records import Batch
from kdkit.data import loaders
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import optimize
from kdkit.runs import training
from kdkit.runs.networks import ModelFactory

SIZES = {
    "small": {"image_size": 16, "batch_size": 16},
    "large": {"image_size": 32, "batch_size": 32},
}
STAGES = ["layer2", "layer3", "layer4"]
LOSSES = {
    "logit_kl": "{use: logit_kl, weight: 0.9, temperature: 4}",
    "hint": "{use: hint, weight: 100, layers: [{student: 'layer[234]', teacher: 'layer[234]'}]}",
    "at": "{use: at, weight: 1000, layers: [{student: 'layer[234]', teacher: 'layer[234]'}]}",
    "rkd": (
        "{use: rkd_distance, weight: 25, layers: [{student: global_pool, teacher: global_pool}]}, "
        "{use: rkd_angle, weight: 50, layers: [{student: global_pool, teacher: global_pool}]}"
    ),
    "sp": "{use: sp, weight: 3000, layers: [{student: layer4, teacher: layer4}]}",
}
RECIPE = """
name: step
data: {{dataset: {{use: synthetic, train: 256, test: 16, image_size: {image_size}, num_classes: 100}}, batch_size: {batch_size}}}
student: {{model: resnet18, stem: small, args: {{layers: [1, 1, 1, 1], channels: [16, 32, 64, 128], in_chans: 3}}}}
teacher: {{model: resnet18, stem: small, args: {{layers: [2, 2, 2, 2], channels: [32, 64, 128, 256], in_chans: 3}}}}
schedule: {{use: offline}}
losses: [{{use: cross_entropy}}, {losses}]
train: {{epochs: 1, optimizer: {{name: momentum, lr: 1e-3, weight_decay: 5e-4, decay_norm_and_bias: true}}}}
"""  # noqa: E501


def engine(loss: str, size: str) -> tuple[Callable[[], None], Batch, nn.Module, nn.Module]:
    """kdkit's step, and what it works on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.yaml"
        path.write_text(RECIPE.format(losses=LOSSES[loss], **SIZES[size]))
        loaded = recipe.load(path)
    accelerator = build_accelerator(loaded.spec.train)
    source = loaded.plugins.datasets["synthetic"](loaded.spec.data.dataset)
    prepared = loaders.prepare(
        loaded.spec.data, source, loaded.task, seed=0, device=accelerator.device
    )
    factory = ModelFactory(loaded, prepared.info, {}, device=accelerator.device)
    stage = next(iter(loaded.plugins.schedules["offline"](loaded.spec.schedule).stages(factory)))
    trainer = training.build_trainer(loaded, prepared, factory, accelerator, 0, stage)
    trainer.learner.train()
    batch = next(iter(prepared.train.epoch(0)))
    student = (
        training.ModelFactory(loaded, prepared.info, {}, device=accelerator.device).student().module
    )
    return lambda: void(optimize(trainer, [batch])), batch, student, factory.teacher().module


def by_hand(loss: str, batch: Batch, student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
    """The same step in plain torch."""
    student.train()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    images = batch.inputs
    seen: dict[tuple[int, str], Tensor] = {}
    names = {"hint": STAGES, "at": STAGES, "rkd": ["global_pool"], "sp": ["layer4"]}.get(loss, [])
    for number, network in enumerate((student, teacher)):
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda _, __, output, key=(number, name): seen.__setitem__(key, output)
            )
    widths = {"layer2": (32, 64), "layer3": (64, 128), "layer4": (128, 256)}
    regress = nn.ModuleDict(
        {
            name: nn.Sequential(
                nn.Conv2d(*widths[name], 1, bias=False), nn.BatchNorm2d(widths[name][1]), nn.ReLU()
            )
            for name in names
            if loss == "hint"
        }
    )
    optimizer = torch.optim.SGD(
        [*student.parameters(), *regress.parameters()], lr=1e-3, momentum=0.9, weight_decay=5e-4
    )

    def knowledge(z_s: Tensor, z_t: Tensor) -> Tensor:
        pairs = [(seen[0, name], seen[1, name]) for name in names]
        if loss == "logit_kl":
            return (
                0.9
                * 16
                * F.kl_div(
                    F.log_softmax(z_s / 4, 1),
                    F.log_softmax(z_t / 4, 1),
                    reduction="batchmean",
                    log_target=True,
                )
            )
        if loss == "hint":
            return (
                100
                * sum(F.mse_loss(regress[name](seen[0, name]), seen[1, name]) for name in names)
                / len(names)
            )
        if loss == "at":
            return 1000 * sum(F.mse_loss(attention(s), attention(t)) for s, t in pairs) / len(pairs)
        if loss == "sp":
            return 3000 * F.mse_loss(similarity(*pairs[0][:1]), similarity(pairs[0][1]))
        ((s, t),) = pairs
        return 25 * F.smooth_l1_loss(distances(s), distances(t)) + 50 * F.smooth_l1_loss(
            angles(s), angles(t)
        )

    def step() -> None:
        optimizer.zero_grad()
        normalised = (images - mean) / std
        with torch.no_grad():
            z_t = teacher(normalised)
        z_s = student(normalised)
        (F.cross_entropy(z_s, batch.labels) + knowledge(z_s, z_t)).backward()
        optimizer.step()

    return step


def attention(f: Tensor) -> Tensor:
    return F.normalize(f.pow(2).mean(1).flatten(1))


def similarity(f: Tensor) -> Tensor:
    f = f.flatten(1)
    return F.normalize(f @ f.t())


def distances(f: Tensor) -> Tensor:
    """As the authors of RKD write it."""
    square = f.pow(2).sum(1)
    result = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * f @ f.t()).clamp(min=1e-12).sqrt()
    result = result * (1 - torch.eye(len(f)))
    return result / result[result > 0].mean()


def angles(f: Tensor) -> Tensor:
    """As the authors of RKD write it."""
    difference = F.normalize(f.unsqueeze(0) - f.unsqueeze(1), p=2, dim=2)
    return torch.bmm(difference, difference.transpose(1, 2)).flatten()


def void(_: object) -> None:
    """Forget a value, so that no graph is kept."""


def cpu_time(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each side")
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(
        "size", "loss", "by hand, ms", "kdkit, ms", "ratio", "quartiles of the ratio", box=None
    )
    for size in SIZES if arguments.size == "both" else [arguments.size]:
        for loss in LOSSES:
            ours, batch, student, teacher = engine(loss, size)
            theirs = by_hand(loss, batch, student, teacher)
            for _ in range(5):
                ours(), theirs()
            pairs = [(cpu_time(theirs), cpu_time(ours)) for _ in range(arguments.steps)]
            hand, kdkit = (statistics.median(column) for column in zip(*pairs, strict=True))
            low, _, high = statistics.quantiles((k / h for h, k in pairs), n=4)
            table.add_row(
                size,
                loss,
                f"{1000 * hand:.1f}",
                f"{1000 * kdkit:.1f}",
                f"{kdkit / hand:.3f}",
                f"{low:.3f} - {high:.3f}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
