"""Measuring: metrics against naive formulas, and a finished run measured again."""

import json
import math
import shutil
import sys

import pytest
import torch

import kdkit
from kdkit import cli
from kdkit.contracts.task import Rows
from kdkit.engine.evaluate import Tally
from kdkit.recipe import registry
from kdkit.students.loaded import LoadedRun, evaluate

MLP = {"name": "net", "data": {"dataset": {"use": "digits"}, "batch_size": 50, "train_samples": 200, "validation": 100}}
CPU = torch.device("cpu")


def recipe(path, **changes):
    """A recipe file of perceptrons on digits; JSON is YAML too."""
    content = {
        **MLP,
        "student": {"model": "mlp/16"},
        "schedule": {"use": "supervised"},
        "losses": [{"use": "cross_entropy"}],
        "train": {"epochs": 2, "optimizer": {"lr": 0.1}, "device": "cpu"},
        "run": {"folder": str(path.parent)},
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Folder with the runs `teacher` and `net`, which learnt from it; net's result."""
    folder = tmp_path_factory.mktemp("taught")
    recipe(folder / "teacher.yaml", name="teacher", student={"model": "mlp/32"})
    losses = [{"use": "cross_entropy", "weight": 0.5}, {"use": "logit_kl", "temperature": 2.0}]
    file = recipe(folder / "net.yaml", teacher={"recipe": "teacher.yaml"}, schedule={"use": "offline"}, losses=losses)
    return folder, kdkit.train(file, quiet=True)


def metrics(logits, labels, teacher=None, size=7):
    """The scores of classification, gathered in batches of that size."""
    task = registry.load().tasks["classification"]()
    info = kdkit.DataInfo((3, 8, 8), logits.shape[1], 9, 9)
    tally = Tally([*task.scores(info), *(task.agreement(info) if teacher is not None else ())], together=False)
    for part in torch.arange(len(logits)).split(size):
        tally.add(Rows(logits[part], labels[part], None if teacher is None else teacher[part]))
    return tally.values()


def run_cli(monkeypatch, *words):
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_metrics_are_the_naive_formulas():
    torch.manual_seed(0)
    logits, theirs, labels = torch.randn(40, 7).double(), torch.randn(40, 7).double(), torch.randint(7, (40,))
    found = metrics(logits, labels, theirs)
    rows, their_rows, classes = logits.tolist(), theirs.tolist(), labels.tolist()

    def shares(row):
        total = sum(math.exp(z) for z in row)
        return [math.exp(z) / total for z in row]

    def places(row):
        return sorted(range(7), key=lambda k: -row[k])

    pairs = [(shares(row), shares(other)) for row, other in zip(rows, their_rows, strict=True)]
    assert found["top1"] == pytest.approx(100 * sum(places(r)[0] == c for r, c in zip(rows, classes, strict=True)) / 40)
    assert found["top5"] == pytest.approx(100 * sum(c in places(r)[:5] for r, c in zip(rows, classes, strict=True)) / 40)
    assert found["nll"] == pytest.approx(-sum(math.log(p[c]) for (p, _), c in zip(pairs, classes, strict=True)) / 40)
    assert found["agreement"] == pytest.approx(100 * sum(places(r)[0] == places(t)[0] for r, t in zip(rows, their_rows, strict=True)) / 40)
    assert found["kl_to_teacher"] == pytest.approx(sum(q[k] * math.log(q[k] / p[k]) for p, q in pairs for k in range(7)) / 40)
    bins = [[] for _ in range(15)]
    for (p, _), c in zip(pairs, classes, strict=True):
        bins[min(14, int(max(p) * 15))].append((max(p), p.index(max(p)) == c))
    gaps = [abs(sum(conf for conf, _ in b) - sum(hit for _, hit in b)) for b in bins if b]
    assert found["ece"] == pytest.approx(100 * sum(gaps) / 40, abs=1e-4)


def test_few_classes_have_no_top5():
    assert "top5" not in metrics(torch.randn(9, 5), torch.zeros(9, dtype=torch.int64))


def test_a_run_measured_again_gives_exactly_its_result(taught):
    folder, result = taught
    scores = {(s.role, s.part): s.metrics for s in evaluate(LoadedRun(folder / "net"), device=CPU)}
    assert scores["student", "test"] == result.test
    assert scores["teacher", "test"] == result.teacher
    assert result.validation.items() <= scores["student", "validation"].items()
    assert {"agreement", "kl_to_teacher"} <= scores["student", "validation"].keys()
    assert set(scores) == {(role, part) for role in ("student", "teacher") for part in ("test", "validation")}


def test_evaluate_best_is_the_epoch_that_was_best_on_validation(taught):
    folder, result = taught
    scores = {(s.role, s.part): s.metrics for s in evaluate(LoadedRun(folder / "net"), best=True, device=CPU)}
    assert scores["student", "test"] == result.best["test"]
    assert result.best["validation"].items() <= scores["student", "validation"].items()


def test_evaluate_changes_data_and_nothing_else(taught):
    folder, result = taught
    whole = LoadedRun(folder / "net", {"data.validation": 50}).data(device=CPU)
    assert whole.validation.num_samples == 50
    with pytest.raises(kdkit.RecipeError, match=r"train\.epochs: .* only `data\.`"):
        LoadedRun(folder / "net", {"train.epochs": 3})


def test_evaluate_prints_the_table(taught, monkeypatch, capsys):
    folder, result = taught
    assert run_cli(monkeypatch, "evaluate", folder / "net", "data.eval_batch_size=100") == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("student, test"))
    assert f"{result.test['top1']:.2f}" in line and f"{result.test['kl_to_teacher']:.4f}" in line
    assert "teacher, validation" in out


def test_load_student_is_the_run_s_student(taught):
    folder, result = taught
    student = kdkit.load_student(folder / "net")
    images = torch.rand(3, 1, 8, 8)
    assert not student.module.training
    assert student(images).logits.shape == (3, 10)
    assert sum(p.numel() for p in student.module.parameters()) == result.parameters
    best = kdkit.load_student(folder / "net", best=True)
    assert torch.equal(best(images).logits, LoadedRun(folder / "net").student(best=True)(images).logits)


def test_a_teacher_s_run_that_has_gone_is_told_not_trained_again(taught, tmp_path, monkeypatch, capsys):
    folder, _ = taught
    shutil.copytree(folder, tmp_path / "copy")
    gone = tmp_path / "copy" / "teacher"
    shutil.rmtree(gone)
    text = (tmp_path / "copy" / "net" / "recipe.yaml").read_text().replace(f"folder: {folder}", f"folder: {tmp_path / 'copy'}")
    (tmp_path / "copy" / "net" / "recipe.yaml").write_text(text.partition("\n")[2])  # without the digest
    assert run_cli(monkeypatch, "evaluate", tmp_path / "copy" / "net") == 2
    said = capsys.readouterr().err
    assert "the run that trained its teacher" in said and "teacher.yaml" in said and len(said.splitlines()) == 1
    assert not gone.exists()


def test_a_teacher_is_found_beside_the_run_wherever_both_were_moved(taught, tmp_path):
    folder, result = taught
    shutil.copytree(folder / "net", tmp_path / "renamed")
    shutil.copytree(folder / "teacher", tmp_path / "other_name")
    moved = LoadedRun(tmp_path / "renamed")
    assert moved._taught_by()["teacher"].file.parent == tmp_path / "other_name"  # not the one in the folder that the recipe names
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(moved.teachers()[0](images).logits, kdkit.load_student(folder / "teacher")(images).logits)


@pytest.mark.parametrize(("spoil", "words", "says"), [
    (lambda run: (run / "student.safetensors").unlink(), [], "is not finished (2 epochs so far)"),
    (lambda run: (run / "recipe.yaml").unlink(), [], "no run folder"),
    (lambda run: (run / "best.safetensors").unlink(), ["--best"], "there is no best.safetensors"),
])  # fmt: skip
def test_evaluate_of_what_cannot_be_measured_is_one_line(spoil, words, says, taught, tmp_path, monkeypatch, capsys):
    shutil.copytree(taught[0] / "net", tmp_path / "run")
    spoil(tmp_path / "run")
    assert run_cli(monkeypatch, "evaluate", tmp_path / "run", *words) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_without_validation_there_is_no_best_epoch(taught):
    folder, _ = taught
    text = (folder / "net" / "recipe.yaml").read_text()
    assert "validation: 100" in text
    run = LoadedRun(folder / "net", {"data.validation": None})
    (folder / "net" / "best.safetensors").rename(folder / "aside")
    try:
        with pytest.raises(kdkit.RunError, match=r"only `data\.validation` can tell"):
            run.student(best=True)
    finally:
        (folder / "aside").rename(folder / "net" / "best.safetensors")


@pytest.mark.parametrize("present", [7, 3], ids=["all classes", "classes without samples"])
def test_metrics_of_unequal_classes_are_those_of_scikit_learn(present):
    from sklearn.metrics import balanced_accuracy_score, f1_score

    draw = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(present), torch.randint(present, (60,), generator=draw) ** 2 % present])
    logits = torch.randn(len(labels), 7, generator=draw)
    logits[:, present:] -= 9  # of those classes, there are neither samples nor predictions
    found, predicted = metrics(logits, labels), logits.argmax(1)
    assert found["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(100 * f1_score(labels, predicted, average="macro"))
