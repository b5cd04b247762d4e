"""What a study of many runs costs beside their training: planning it, seeing what is finished,
claiming, booking, and the findings.

    python -P benchmarks/many_runs.py VARIANTS SEEDS [--unfinished | --findings]

The runs are small ones on digits. One of each variant's shape is trained; the folders of all others
are copies of it under the fingerprints of their own recipes. CPU seconds of one process, and the
files that it opened, by Python's audit hook.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

import kdkit
from kdkit import files
from kdkit.runs.folder import RunFolder
from kdkit.study import loading, lockstep
from kdkit.study.comparison import _measured
from kdkit.study.finder import Finder
from kdkit.study.plan import StudyRun, check, trainings
from kdkit.study.variants import Study

RECIPE = {
    "name": "tiny",
    "data": {"dataset": {"use": "digits"}, "train_samples": 100, "batch_size": 50},
    "student": {"model": "mlp/8"},
    "schedule": {"use": "supervised"},
    "losses": [{"use": "cross_entropy"}],
    "train": {"epochs": 1, "optimizer": {"lr": 0.1}, "device": "cpu"},
}
opened = 0


def timed(what: str, runs: int, call: Callable[[], object]) -> None:
    """Print CPU seconds, and files opened for each run."""
    before, cpu = opened, time.process_time()
    call()
    cpu = time.process_time() - cpu
    print(f"{what:34} {cpu:9.2f} s {1000 * cpu / runs:9.2f} ms a run", end="")
    print(f" {(opened - before) / runs:8.1f} files a run", flush=True)


def fill(planned: list[StudyRun], trained: Path) -> None:
    """Make a finished folder for every planned run: a copy of a trained one."""
    way_out, owner = "", RunFolder(trained).owner or ""
    marker = json.loads((trained / "run.json").read_text())
    recipe = files.read_sealed_text(trained / "recipe.yaml", way_out, owner)
    result = files.read_json(trained / "result.json", dict, way_out, owner)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for each in planned:
        key = each.recipe.fingerprint
        shutil.copytree(trained, each.folder)
        content = {k: v for k, v in marker.items() if k != files.SEAL}
        content |= {"fingerprint": key, "content": each.recipe.content()}
        files.write_json(each.folder / "run.json", content)
        files.write_sealed_text(each.folder / "recipe.yaml", recipe, key)
        plain = [{k: v for k, v in line.items() if k != files.CRC} for line in lines]
        log = "".join(files.log_line(line, key) for line in plain).encode()
        (each.folder / "metrics.jsonl").write_bytes(log)
        digest = files.file_digest(each.folder / "metrics.jsonl")
        own = {**result, "seed": each.seed, "files": {**result["files"], "metrics.jsonl": digest}}
        files.write_json(each.folder / "result.json", own, key)
        assert each.result is not None, f"{each.folder} does not count as finished"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", type=int)
    parser.add_argument("seeds", type=int)
    parser.add_argument("--unfinished", action="store_true", help="make no folders of runs")
    parser.add_argument("--findings", action="store_true", help="also make the findings")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "run": {"folder": str(folder)}}))
    trained = kdkit.train(folder / "tiny.yaml", folder=folder / "trained", quiet=True).folder
    rates = [round(0.001 * (i + 1), 3) for i in range(args.variants)]
    about = {"name": "many", "base": "tiny.yaml", "baseline": f"lr {rates[0]:g}"}
    about |= {"question": "How long?", "folder": str(folder / "runs"), "seeds": args.seeds}
    about |= {"vary": {"train.optimizer.lr": rates}, "allow": ["train.optimizer.lr"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(about))
    runs = args.variants * args.seeds

    def count(event: str, _: object) -> None:
        global opened
        opened += event == "open"

    sys.addaudithook(count)
    study = loading.load([folder / "study.yaml"])
    timed("load", runs, lambda: loading.load([folder / "study.yaml"]))
    timed("plan, nothing finished", runs, lambda: trainings(study))
    timed("check, nothing finished", runs, lambda: check(study))
    planned = trainings(study)
    study.path.mkdir(parents=True)
    keys = [each.recipe.fingerprint for each in planned]
    timed("booking all runs", 1, lambda: _booked(study, keys))
    timed("booking one pass more", 1, lambda: _booked(study, keys[:1]))
    if not args.unfinished:
        finished(study, planned, trained, findings=args.findings)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most")


def finished(study: Study, planned: list[StudyRun], trained: Path, *, findings: bool) -> None:
    """Measure what a process does in a study whose runs are finished."""
    runs = len(planned)
    fill(planned, trained)
    size = sum(file.stat().st_blocks * 512 for file in study.path.rglob("*"))
    count_of = sum(1 for file in study.path.rglob("*") if file.is_file())
    print(f"{count_of / runs:.1f} files and {size / runs:,.0f} bytes on disk a run")
    timed("plan, all finished", runs, lambda: trainings(study))
    timed("check, all finished", runs, lambda: check(study))
    timed("results of all runs", runs, lambda: [each.result for each in planned])
    timed("train, all finished", runs, lambda: lockstep.train_together(planned, spread=True))
    if findings:
        with _measured(study, print) as measured:
            timed("findings", runs, Finder(study, planned, {}, measured).findings)


def _booked(study: Study, keys: list[str]) -> None:
    with _measured(study, print) as measured:
        measured.spend(1.0, 1.0, keys)


if __name__ == "__main__":
    main()
