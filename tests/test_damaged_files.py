"""Damaged files: noticed in one line, or made good; never a traceback, never used in silence.

Each kind of file is cut short, emptied, filled with garbage, changed by one bit, and replaced by that of another run; then each command
that may read it is run. An outcome is right if it is
- refused: exit code 2, and one line that names the file;
- told: exit code 0, the file is named, and what the command leaves is what it leaves with whole files;
- untouched: the command says and leaves the same as with whole files.
"""

import collections
import contextlib
import io
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training import PLAIN

import kdkit
from kdkit import cli
from kdkit.runs.scoring import Standing

MLP = {"student": {"model": "mlp/6"}, "losses": [{"use": "cross_entropy"}]}
DATA = {**PLAIN["data"], "validation": 8}
ALONE = {**PLAIN, **MLP, "data": DATA, "teacher": None, "schedule": {"use": "supervised"}}
TAUGHT = {"teacher": {"recipe": "teacher.yaml", "cache": {"views": "all"}}, "losses": PLAIN["losses"], "schedule": {"use": "offline"}}
RECIPES = {
    "teacher": {**ALONE, "run": {"snapshots": 1}},
    "pupil": {**ALONE, **TAUGHT, "train": {**PLAIN["train"], "average_best": 2}},
    "next": {**ALONE, **TAUGHT, "student": {"model": "mlp/5"}},
    "half": {**ALONE, "student": {"model": "mlp/4"}, "train": {**PLAIN["train"], "epochs": 3, "average_best": 2}},
    "route": {**ALONE, **TAUGHT, "teacher": {"recipe": "teacher.yaml"}, "schedule": {"use": "rco", "anchors": [1, 2], "epochs": 1}},
}


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, its student, a run that was killed, exported and cached; and the same of another seed, under `other`."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("whole", 0), ("other", 1)):
        home = folder / name
        home.mkdir()
        for recipe, content in RECIPES.items():
            (home / f"{recipe}.yaml").write_text(yaml.safe_dump({**content, "name": recipe, "seed": seed}))
        with contextlib.chdir(home):
            kdkit.train("pupil.yaml", quiet=True)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                patch.setattr(Standing, "keep_snapshot", killed_after_two)
                kdkit.train("half.yaml", quiet=True)
            assert run("export", "runs/pupil", "--output", "exported")[0] == 0
    return folder


def killed_after_two(standing):
    if standing.trainer.epoch == 2:
        raise Killed
    # the teacher's are not asked for


def run(*words):
    """Exit code, output and error output of a command in this process; code 1 and the exception if there is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["kdkit", *map(str, words)])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException as error:  # what would be a traceback
            return 1, out.getvalue(), f"{type(error).__name__}: {error}"
    return code, out.getvalue(), err.getvalue()


def load():
    """The exported student, loaded by a program."""
    try:
        return 0, str(kdkit.load_student("exported")({"images": torch.ones(1, 1, 8, 8)}["images"]).logits.tolist()), ""
    except kdkit.KdkitError as error:
        return 2, "", str(error)
    except BaseException as error:
        return 1, "", f"{type(error).__name__}: {error}"


def tensors(path):
    return {name: value.tolist() for name, value in load_file(path).items()} if Path(path).exists() else None


# By name: the command, and what it leaves
COMMANDS = {
    "show": (lambda: run("show", "runs/pupil"), lambda: None),
    "evaluate": (lambda: run("evaluate", "runs/pupil"), lambda: None),
    "best": (lambda: run("evaluate", "runs/pupil", "--best"), lambda: None),
    "export": (lambda: run("export", "runs/pupil", "--output", "again"), lambda: tensors("again/model.safetensors")),
    "load": (load, lambda: None),
    "train": (lambda: run("train", "pupil.yaml"), lambda: tensors("runs/pupil/student.safetensors")),
    "go on": (lambda: run("train", "half.yaml"), lambda: tensors("runs/half/student.safetensors")),
    "teach": (lambda: run("train", "next.yaml"), lambda: tensors("runs/next/student.safetensors")),
    "route": (lambda: run("train", "route.yaml"), lambda: tensors("runs/route/student.safetensors")),
    "caches": (lambda: run("cache", "--list"), lambda: None),
}

# Kinds of files, with the command that is tried in the default run; `slow` tries all
FILES = {
    "runs/pupil/student.safetensors": "export",
    "runs/pupil/best.safetensors": "best",
    "runs/pupil/result.json": "show",
    "runs/pupil/run.json": "evaluate",
    "runs/pupil/recipe.yaml": "evaluate",
    "runs/pupil/metrics.jsonl": "show",
    "runs/pupil/checkpoints/stage0-*.pt": "train",
    "runs/teacher/student.safetensors": "teach",
    "runs/teacher/snapshots/*/epoch-0001.safetensors": "route",
    "runs/teacher/run.json": "evaluate",
    "runs/teacher/result.json": "teach",
    "runs/teacher/recipe.yaml": "evaluate",
    "runs/half/run.json": "go on",
    "runs/half/metrics.jsonl": "go on",
    "runs/half/checkpoints/stage0-*.pt": "go on",
    "runs/half/best-epochs/stage0/student1-epoch-0001.safetensors": "go on",
    "runs/teacher-cache/*/cache.json": "caches",
    "runs/teacher-cache/*/column-0.bin": "teach",
    "runs/teacher-cache/*/checks.bin": "teach",
    "runs/teacher-cache/*/states.bin": "teach",
    "exported/config.json": "load",
    "exported/model.safetensors": "load",
}


def flipped(content, place=2):
    """With one bit changed, at a third of it or elsewhere; not in white space, which says nothing."""
    position = len(content) * place // 6
    while content[position : position + 1].isspace():
        position += 1
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


DAMAGES = {
    "truncate": lambda content, other: content[: len(content) // 2],
    "empty": lambda content, other: b"",
    "garbage": lambda content, other: bytes((7 * i + 129) % 251 for i in range(len(content))),
    "bit": lambda content, other: flipped(content),
    "bit at the end": lambda content, other: flipped(content, 5),
    "another": lambda content, other: other,
}


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def healthy(world, tmp_path_factory):
    """What each command says and leaves with whole files."""

    def outcome(command, known={}):  # noqa: B006 -- kept for the module
        if command not in known:
            home = tmp_path_factory.mktemp("healthy") / "copy"
            shutil.copytree(world / "whole", home)
            with contextlib.chdir(home):
                ask, left = COMMANDS[command]
                found = ask()
                known[command] = plain(found[1]), left()
            assert found[0] == 0, found
        return known[command]

    return outcome


def plain(text):
    """What is printed, without times and speeds, and without what a run that trains tells of its steps."""
    text = re.sub(r".* samples/s.*\n", "", text)
    text = re.sub(r"left [\d:]+|for [\d.,]+ s|just now|\d+ (second|minute|hour)s? ago", "", text)
    return re.sub(r" {2,}", " ", text)


def tried(world, healthy, home, pattern, damage, command):
    """Damage a file of a copy of the world, run a command, and say how that ended."""
    shutil.copytree(world / "whole", home)
    file = only(home, pattern)
    content, other = file.read_bytes(), only(world / "other", pattern).read_bytes()
    file.write_bytes(DAMAGES[damage](content, other))
    expected, expected_left = healthy(command)
    with contextlib.chdir(home):
        ask, left = COMMANDS[command]
        code, out, err = ask()
        made = left()
    said = out + err
    named = any(str(path) in said for path in names_of(file, damage))
    if code == 2:
        return "refused" if named and len(err.splitlines()) == 1 else f"unclear: {err}"
    if code != 0:
        return f"traceback: {err}"
    if made != expected_left:
        return f"silent: another result; it says {said}"
    if plain(out) == expected:
        return "untouched"
    return "told" if named else f"silent: it says {said}"


def names_of(file, damage):
    """What a line may call a damaged file."""
    if file.suffix == ".bin" or file.name == "cache.json":  # a cache is its folder
        return [file.parent.name]
    if file.name == "run.json" and damage == "another":  # whole: then this is another run's folder, and the run is not there
        return [file.name, file.parent.relative_to(file.parents[2]), file.parents[1]]
    return [file.name]


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "bit at the end"])
@pytest.mark.parametrize("pattern", FILES)
def test_damaged_files_are_noticed_where_they_are_used(world, healthy, tmp_path, pattern, damage):
    outcome = tried(world, healthy, tmp_path / "copy", pattern, damage, FILES[pattern])
    assert outcome in ("refused", "told", "untouched")
    assert (outcome == "untouched") <= harmless(pattern, damage)


def harmless(pattern, damage):
    """What is not read, or not needed, in whatever form it is."""
    return (
        pattern == "runs/pupil/checkpoints/stage0-*.pt"  # the run is finished
        or pattern.endswith("/states.bin")  # a row that seems not to be there is asked for again, one that seems to be has a check sum
        or (pattern, damage) == ("runs/half/metrics.jsonl", "truncate")  # lines that are written again
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_damaged_file_under_every_command(world, healthy, tmp_path):
    counts, wrong = collections.Counter(), []
    for pattern in FILES:
        for damage in DAMAGES:
            for command in COMMANDS:
                outcome = tried(world, healthy, tmp_path / "copy", pattern, damage, command)
                counts[outcome.partition(":")[0]] += 1
                if outcome not in ("refused", "told", "untouched"):
                    wrong.append((pattern, damage, command, outcome))
                shutil.rmtree(tmp_path / "copy")
    print(f"tried {sum(counts.values())}: {dict(counts)}")
    assert not wrong, "\n".join(map(str, wrong))
