"""Eight variants of one distillation trained side by side, against the same eight trained one
after another.

    python benchmarks/study.py [--only memory files] [--rounds 3] [--images 1024]

Both sides carry out whole recipes, run folders, checkpoints and the measurement after the last
epoch included: `kdkit.study.lockstep` all at once, `kdkit.train` one by one. The variants have one
student, one frozen teacher with random weights and one seed, and differ in their response loss. The
networks are such that the teacher's forward costs about 0.7 of the student's own step (forward,
cross-entropy, backward, optimizer), which is measured first. Without savings, eight runs cost 8 x
1.7 steps; with one teacher's forward for all, 8 + 0.7: 0.64.

memory: the largest resident set of a process that trains one variant, and of one that trains eight
side by side; what each further run adds is held against what a student has of its own: parameters,
gradients, the optimizer's momentum, and the activations of a step.

files: the same with images read from JPEG files by two workers, which augment them one by one;
every image that is read is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sides
import torch

import kdkit
from kdkit import recipe
from kdkit.engine.loop import optimize
from kdkit.runs.run import Run
from kdkit.study.lockstep import train_together
from kdkit.study.step_memory import peak_memory

HERE = Path(__file__).resolve()
VARIANTS: dict[str, dict[str, Any]] = {
    "kl1": {"use": "logit_kl", "temperature": 1},
    "kl2": {"use": "logit_kl", "temperature": 2},
    "kl4": {"use": "logit_kl", "temperature": 4},
    "kl8": {"use": "logit_kl", "temperature": 8},
    "mse": {"use": "logit_mse"},
    "jsd": {"use": "jsd"},
    "dkd": {"use": "dkd"},
    "dist": {"use": "dist"},
}


def network(*channels: int, blocks: int) -> dict[str, Any]:
    return {
        "model": "resnet18",
        "stem": "small",
        "args": {"layers": [blocks] * 4, "channels": list(channels), "in_chans": 3},
    }


def content(
    options: argparse.Namespace, loss: Mapping[str, Any] | None, **changes: Any
) -> dict[str, Any]:
    """The recipe of a variant, or of the student alone."""
    synthetic = {
        "use": "synthetic",
        "train": options.images,
        "test": 64,
        "image_size": options.image_size,
        "num_classes": 10,
    }
    made = {
        "data": {"dataset": synthetic, "batch_size": options.batch_size},
        "student": network(16, 32, 64, 128, blocks=1),
        "teacher": network(32, 64, 128, 256, blocks=1),
        "schedule": {"use": "offline"},
        "losses": [{"use": "cross_entropy"}, *([loss] if loss else [])],
        "train": {
            "epochs": options.epochs,
            "evaluate_every": options.epochs,
            "optimizer": {"name": "momentum", "lr": 0.001},
            "device": "cpu",
        },
    }
    if not loss:
        made |= {"teacher": None, "schedule": {"use": "supervised"}}
    return made | changes


def variants(options: argparse.Namespace, folder: Path, **changes: Any) -> list[Path]:
    chosen = list(VARIANTS.items())[: options.resident or options.runs]
    return [sides.write(content(options, loss, **changes), folder, name) for name, loss in chosen]


def unsaid() -> contextlib.AbstractContextManager[object]:
    """Every run warns that its teacher, whose weights are random, knows nothing."""
    return contextlib.redirect_stdout(io.StringIO())


def together(paths: Sequence[Path]) -> None:
    """All at once."""
    with tempfile.TemporaryDirectory() as folder, unsaid():
        outcomes = train_together(
            [Run(recipe.load(path), Path(folder) / path.stem) for path in paths]
        )
    if failed := [outcome.reason for outcome in outcomes if outcome.result is None]:
        raise SystemExit("\n".join(map(str, failed)))


def one_by_one(paths: Sequence[Path]) -> None:
    """One after another."""
    with tempfile.TemporaryDirectory() as folder, unsaid():
        for path in paths:
            kdkit.train(path, folder=Path(folder) / path.stem, quiet=True)


def teacher_share(options: argparse.Namespace) -> float:
    """What the teacher's forward costs, as a share of the student's own step."""
    alone = sides.opened(content(options, None))
    taught = sides.opened(content(options, VARIANTS["kl4"]))
    batch, teacher = next(iter(alone.data.train.epoch(0))), taught.factory.teacher()
    alone.trainer.learner.train()

    def ask() -> None:
        with torch.no_grad():
            teacher(batch.inputs)

    found = sides.in_turns(
        {"teacher": ask, "student": lambda: len(optimize(alone.trainer, [batch]))},
        options.steps,
        warm_up=3,
    )
    return sides.ratio(found["teacher"], found["student"]).cpu


def time_(options: argparse.Namespace) -> None:
    share = teacher_share(options)
    with tempfile.TemporaryDirectory() as folder:
        paths = variants(options, Path(folder))
        found = sides.in_turns(
            {"alone": lambda: one_by_one(paths), "together": lambda: together(paths)},
            options.rounds,
            warm_up=0,
        )
    show_times("images in memory", found, options.runs)
    bound = (options.runs + share) / (options.runs * (1 + share))
    sides.show(
        f"teacher's forward: {share:.2f} of the student's step; with nothing but the teacher shared"
        f" the ratio would be {bound:.3f}"
    )


def show_times(title: str, found: Mapping[str, Sequence[sides.Cost]], runs: int) -> None:
    table = sides.table(title, "CPU, s", "wall, s")
    for name, words in (("alone", "one by one"), ("together", "side by side")):
        cost = sides.median(found[name])
        table.add_row(f"{runs} runs {words}", f"{cost.cpu:.1f}", f"{cost.wall:.1f}")
    ratio = sides.ratio(found["together"], found["alone"])
    table.add_row(
        f"ratio (rounds: {sides.quartiles(found['together'], found['alone'])})",
        f"{ratio.cpu:.3f}",
        f"{ratio.wall:.3f}",
    )
    sides.show(table)


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG files of ten classes, a few of them for the test."""
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for part, images in (("train", count), ("test", 20)):
        for i in range(images):
            path = folder / part / str(i % 10) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = torch.rand((1, 3, 8, 8), generator=random)
            pixels = (
                torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[0]
                .mul(255)
                .to(torch.uint8)
            )
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path, quality=90)


def files(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder) / "images", Path(folder) / "log"
        write_images(root, max(options.batch_size, options.images // 4), options.file_size)
        data = {
            "dataset": {"use": "counted_folder", "root": str(root), "log": str(log)},
            "image_size": options.image_size,
            "timm_augment": {"scale": [0.3, 1.0]},
            "batch_size": options.batch_size,
            "workers": 2,
        }
        paths = variants(
            options, Path(folder), data=data, plugins=[str(HERE.with_name("counted_folder.py"))]
        )
        read: dict[str, list[int]] = {"alone": [], "together": []}

        def counted(name: str, side: Callable[[Sequence[Path]], None]) -> None:
            log.write_bytes(b"")
            side(paths)
            read[name].append(log.stat().st_size)

        turns = {
            "alone": lambda: counted("alone", one_by_one),
            "together": lambda: counted("together", together),
        }
        found = sides.in_turns(turns, max(1, options.rounds // 2), warm_up=0)
    show_times("JPEG files, 2 workers", found, options.runs)
    one, other = max(read["alone"]), max(read["together"])
    sides.show(
        f"images read for training: one by one {one:,}, side by side {other:,}, {one / other:.1f}"
        " times fewer"
    )


def resident(options: argparse.Namespace, runs: int) -> float:
    """The largest resident set of a process that trains so many variants side by side, in bytes."""
    words = [
        f"--{name}={getattr(options, name)}"
        for name in ("images", "epochs", "batch_size", "image_size", "threads")
    ]
    command = [
        sys.executable,
        str(HERE),
        *(word.replace("_", "-") for word in words),
        "--resident",
        str(runs),
    ]
    return (
        float(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[
                -1
            ]
        )
        * 1024
    )


def print_resident(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(variants(options, Path(folder)))
    status = Path("/proc/self/status").read_text().splitlines()
    # kB; rusage would begin with the parent's
    print(next(line for line in status if line.startswith("VmHWM")).split()[1])


def own_state(options: argparse.Namespace) -> tuple[int, int]:
    """Bytes of a student's parameters, buffers and momentum, and those that its step allocates
    at most, gradients included.
    """
    alone = sides.opened(content(options, None))
    trainer, batch = alone.trainer, next(iter(alone.data.train.epoch(0)))
    trainer.learner.train()
    activations = peak_memory(lambda: len(optimize(trainer, [batch])), warm_up=True)
    parameters = [p for p in trainer.learner.parameters() if p.requires_grad]
    # the momentum is as large as the parameters
    stays = [*trainer.learner.parameters(), *trainer.learner.buffers(), *parameters]
    return sum(tensor.nbytes for tensor in stays), activations


def memory(options: argparse.Namespace) -> None:
    one, several = (resident(options, runs) for runs in (1, options.runs))
    state, step = own_state(options)
    table = sides.table("memory", "MiB")
    for name, size in (
        ("resident set, one run", one),
        (f"resident set, {options.runs} runs side by side", several),
        ("added by each further run", (several - one) / (options.runs - 1)),
        ("a student's own: parameters, buffers, momentum", state),
        ("a student's own: gradients and activations of a step", step),
    ):
        table.add_row(name, f"{size / 2**20:.1f}")
    sides.show(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"time": time_, "memory": memory, "files": files}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument(
        "--runs", type=int, choices=range(2, len(VARIANTS) + 1), metavar="N", default=len(VARIANTS)
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--file-size", type=int, default=96, help="side of the images in the files")
    parser.add_argument(
        "--steps", type=int, default=30, help="timed steps of student and teacher by themselves"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    parser.add_argument("--resident", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.resident:
        print_resident(options)
        return
    for part in options.only:
        parts[part](options)


if __name__ == "__main__":
    main()
