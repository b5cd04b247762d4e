"""The command line as a user meets it: output, exit codes, and never a traceback for a mistake of theirs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import Command

from kdkit import cli

KDKIT = str(Path(sys.executable).with_name("kdkit"))
RECIPE = """\
name: shell
data: {dataset: {use: digits}, train_samples: 100, batch_size: 50}
student: {model: mlp/16}
teacher: {model: mlp/32}
schedule: {use: offline}
losses: [{use: cross_entropy}, {use: logit_kl}]
train: {epochs: 2, optimizer: {lr: 0.1}}
"""


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """`main` in this process: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "r.yaml").write_text(RECIPE)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["kdkit", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def kdkit(main):
    """What a command that ends with a code prints: to standard output, or to standard error if it fails."""

    def run(*words, code=0):
        found, out, error = main(*words)
        assert found == code, out + error
        assert "Traceback" not in error
        return out if code == 0 else error

    return run


@pytest.fixture
def shell(main):
    """Exit code and standard error of a command."""

    def run(*words):
        code, _, error = main(*words)
        return code, error

    return run


def test_the_installed_command_ends_with_its_code(tmp_path):
    done = subprocess.run([KDKIT, "train", "none.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "none.yaml: No such file or directory\n")


def test_train_and_what_it_says(kdkit, tmp_path):
    code, said = Command(tmp_path, "train", "r.yaml", "train.epochs=1", "losses.1.temperature=2", COLUMNS="120").finish()
    assert code == 0 and "Traceback" not in said, said
    assert "distill epoch 1/1  loss" in said and "logit_kl" in said and "samples/s" in said and "teacher" in said
    assert json.loads((tmp_path / "runs" / "shell" / "result.json").read_text())["epochs"] == 1
    assert "trained already" in kdkit("train", "r.yaml", "train.epochs=1", "losses.1.temperature=2")
    assert "another recipe (different: losses.1.temperature, train.epochs)" in kdkit("train", "r.yaml", "train.epochs=3", code=2)


def test_check(kdkit):
    said = kdkit("check", "r.yaml")
    assert "total = 1 * cross_entropy + 1 * logit_kl" in said and "student mlp/16: 1,210 parameters" in said
    assert "note: the weights of teacher are random" in said


def test_mistakes_are_one_line_each_with_exit_code_2(kdkit):
    assert kdkit("train", "none.yaml", code=2).strip() == "none.yaml: No such file or directory"
    told = kdkit("train", "r.yaml", "losses.1.temprature=2", "train.epochs=-1", code=2).strip().splitlines()
    assert len(told) == 2 and all(line.startswith("override: ") for line in told)
    assert "is not of the form key.path=value" in kdkit("check", "r.yaml", "nonsense", code=2)
    assert "no such plugin file or folder" in kdkit("plugins", "--plugins", "none.py", code=2)
    assert "no plugin is called 'hnit'; did you mean 'hint'?" in kdkit("plugins", "hnit", code=2)
    assert "no model source is called" in kdkit("layers", "nowhere/net", code=2)
    assert "--size" in kdkit("layers", "test_resnet", "--size", "3,64", code=2)
    kdkit("train", code=2)
    kdkit("unknown", code=2)


def test_plugins(kdkit):
    listed = kdkit("plugins")
    for word in ("logit_kl", "response", "offline", "timm", "digits", "rkd_angle"):
        assert word in listed
    shown = kdkit("plugins", "logit_kl")
    for word in ("T^2 * KL", "temperature", "number > 0 or a ramp", "4.0", "1503.02531", "logit_kl.py"):
        assert word in shown
    keys = [line.split(" ")[0] for line in kdkit("plugins", "image_table").splitlines()]
    assert "class" in keys and "class_" not in keys


def test_plugins_that_fit_a_task(kdkit):
    names = {line.split(" ")[0] for line in kdkit("plugins", "--for", "detection").splitlines()}
    assert {"crosskd", "hint", "offline", "voc_boxes", "detection", "timm"} <= names
    assert not {"logit_kl", "digits", "classification"} & names
    assert "logit_kl" in kdkit("plugins", "--for", "segmentation")
    assert "rded" not in kdkit("plugins", "--for", "language_model")
    assert "no task is called 'detect'; did you mean 'detection'?" in kdkit("plugins", "--for", "detect", code=2)


def test_layers(kdkit):
    shown = kdkit("layers", "resnet18", "stem=small", "--size", "3,32,32")
    row = next(line for line in shown.splitlines() if line.startswith("layer2 "))
    assert "(B, 128, 16, 16)" in row and "stage2" in row


def test_schema_is_json(kdkit):
    assert "losses" in json.loads(kdkit("schema"))["properties"]


def test_compare(kdkit, tmp_path):
    alone = "{teacher: null, schedule: {use: supervised}, losses: [{use: cross_entropy}]}"
    text = f"name: which\nbase: r.yaml\nseeds: 1\nvariants:\n  alone: {alone}\n  taught:\n"
    (tmp_path / "study.yaml").write_text(text)
    said = kdkit("compare", "study.yaml", "train.epochs=1")
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert "1,210" in rows["alone"] and "1,210" in rows["taught"] and "2,410" in rows["teacher"]
    assert "2 runs: 0 trained already, 2 to train" in said and "one seed, so no deviation" in said
    assert kdkit("compare", "study.yaml", "train.epochs=1", "--dry").count("  seed 0  ") == 2
    (tmp_path / "study.yaml").write_text(text.replace("taught:", "taught: {data: {batch_size: 25}}"))
    told = kdkit("compare", "study.yaml", code=2).splitlines()
    assert told[0] == "study.yaml:6: taught: data.batch_size: 25 (alone: 50)" and "--allow data.batch_size" in told[-1]


def test_caches_are_listed_or_removed_not_both(kdkit):
    assert "not several" in kdkit("cache", "--list", "--clear", code=2)


def test_a_study_is_no_recipe(kdkit, tmp_path):
    (tmp_path / "s.yaml").write_text("name: s\nbase: r.yaml\nvariants: {a: {}}\nallow: [train.epoch]\n")
    assert (
        kdkit("train", "s.yaml", code=2).strip() == "s.yaml:3: variants: this is a study, which `kdkit compare` carries out, not a recipe"
    )
    assert kdkit("compare", "s.yaml", "--dry", code=2).strip() == "allow: no variant has the key 'train.epoch'"


def test_a_fault_of_kdkit_is_one_line_and_keeps_its_traceback(shell, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyError("a\nb")

    monkeypatch.setattr("kdkit.recipe.load", fails)
    code, told = shell("check", "r.yaml")
    assert code == 70 and told.count("\n") == 1
    assert "KeyError: 'a\\nb'; a fault of kdkit, not of what it was given" in told and "console.py:" in told
    (kept,) = tmp_path.glob("kdkit-*.txt")
    assert str(kept) in told and "Traceback" in kept.read_text()
    monkeypatch.setenv("KDKIT_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main()


@pytest.mark.parametrize("error", [MemoryError("so much"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_fault(shell, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("kdkit.recipe.load", fails)
    code, told = shell("check", "r.yaml")
    assert code == 2 and told == f"not enough memory; smaller images, batches or networks need less ({error})\n"


LARGE = [
    ("layers", "mlp/8", "--size", "3,99999999,99999999"),
    ("layers", "mlp/8", "--classes", "-5"),
    ("layers", "mlp/8", "--classes", "9" * 30),
    ("profile", "mlp/8", "--size", "3,99999,99999"),
    ("profile", "mlp/8", "--threads", "999999999"),
    ("profile", "mlp/8", "--batch", "99999999999"),
    ("profile", "mlp/8", "--classes", "99999999999"),
    ("profile", "mlp/8", "--runs", "99999999999"),
]


@pytest.mark.parametrize("words", LARGE, ids=lambda words: " ".join(words)[:40])
def test_numbers_that_nothing_could_hold_are_refused(shell, words):
    code, told = shell(*words)
    assert code == 2 and told.count("\n") == 1 and words[-2] in told, told


def test_a_fault_of_a_plugin_names_its_file_and_line(shell, tmp_path):
    head = "import kdkit\n\nclass Mine(kdkit.Loss):\n    '''Mine.'''\n    name, knowledge = 'mine', 'labels'\n\n"
    body = "    def forward(self, student, teacher, batch):\n        if student.logits.shape[0] == 50:\n            raise ZeroDivisionError('here')\n        return student.logits.sum()\n\n"
    (tmp_path / "mine.py").write_text(f"{head}{body}@kdkit.hookimpl\ndef kdkit_losses():\n    return [Mine]\n")
    code, told = shell("train", "r.yaml", "losses.0.use=mine", "--plugins", "mine.py", "--quiet")
    assert code == 70 and told.splitlines()[-1].startswith(
        f"{tmp_path}/mine.py:9: ZeroDivisionError: here; a fault of this plugin (traceback in "
    )
