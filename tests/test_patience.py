"""`train.patience`: a stage ends when validation has not become better for so many epochs."""

import pytest
from training import assert_same_run, metrics, write

from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks, training

# A learning rate that moves nothing: validation is best in the first epoch, and equal ever after.
STILL = {"data": {"validation": 16}, "train": {"epochs": 9, "patience": 3, "optimizer": {"name": "sgd", "lr": 1e-12}}}


def epochs(run):
    return [line["epoch"] for line in metrics(run) if line["kind"] == "epoch"]


@pytest.mark.parametrize(
    ("changes", "last"),
    [({}, 4), ({"patience": 9}, 9), ({"patience": None}, 9), ({"evaluate_every": 3}, 6), ({"evaluate_every": 3, "average_best": 1}, 4)],
    ids=["patience", "not reached", "none", "only after a measurement", "measured each epoch"],
)
def test_patience_ends_a_stage_when_validation_no_longer_rises(tmp_path, capsys, changes, last):
    result = training.train(recipe.load(write(tmp_path, **{**STILL, "train": STILL["train"] | changes})), tmp_path / "run")
    assert result.epochs == last and epochs(tmp_path / "run") == list(range(1, last + 1))
    says = f"stage 'distill' ends after epoch {last}: validation top-1 was best in epoch {result.best['epoch']} (train.patience)"
    assert (says in capsys.readouterr().out) == (last < 9)


def test_patience_resumes_to_the_same_end(tmp_path):
    whole = write(tmp_path, **STILL)
    training.train(recipe.load(whole), tmp_path / "whole", quiet=True)
    run = tmp_path / "again"
    training.train(recipe.load(whole), run, quiet=True)
    (run / "result.json").unlink()
    (run / "student.safetensors").unlink()
    training.train(recipe.load(whole), run, quiet=True)
    assert_same_run(run, tmp_path / "whole")
    assert epochs(run) == [1, 2, 3, 4]


def test_patience_needs_validation_data(tmp_path):
    with pytest.raises(RecipeError, match=r"train\.patience: the epochs are chosen on validation data"):
        checks.make(recipe.load(write(tmp_path, train={"patience": 2})))
