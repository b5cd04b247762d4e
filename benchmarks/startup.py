"""What a typo in a recipe costs before it is told: CPU seconds of `kdkit check`, against those
of `import torch` alone.

python benchmarks/startup.py

Medians of 5 processes each, in turns; with the compiled files of Python left out, as on the first
start after an installation.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5


def cpu_seconds(arguments: list[str], code: int) -> float:
    """What a Python process with these arguments takes, which must end with that code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(
            f"{arguments} ended with {done.returncode}, not {code}: {done.stderr.decode()}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print both, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "typo.yaml"
        recipe.write_text(
            f"extends: {ROOT / 'recipes/digits/response.yaml'}\ntrian: {{epochs: 3}}\n",
            encoding="utf-8",
        )
        typo = ["-m", "kdkit", "check", str(recipe)]
        for title, flags in (
            ("with compiled files", []),
            ("without them", ["-X", f"pycache_prefix={folder}/none", "-B"]),
        ):
            runs = [
                (cpu_seconds([*flags, *typo], 2), cpu_seconds([*flags, "-c", "import torch"], 0))
                for _ in range(REPEATS)
            ]
            told, torch = (statistics.median(column) for column in zip(*runs, strict=True))
            print(
                f"{title}: a typo is told after {told:.2f} CPU s; import torch {torch:.2f}; ratio"
                f" {told / torch:.2f}"
            )


if __name__ == "__main__":
    main()
