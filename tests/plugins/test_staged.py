import pytest
import torch
from training import PLAIN, metrics, train, weights, write

import kdkit

HINT = {"use": "hint", "layers": [{"student": "stage2", "teacher": "stage2"}]}
RECIPE = {
    **PLAIN,
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}, HINT],
    "schedule": {
        "use": "staged",
        "stages": [
            {"name": "hints", "losses": {"hint": 10.0}, "epochs": 2, "lr": 0.02, "train": ["student.stage1", "student.stage2", "hint"]},
            {"name": "answers", "losses": ["cross_entropy", "logit_kl"], "epochs": 1},
        ],
    },
}


def stages(*plans, **options):
    return {"use": "staged", "stages": list(plans), **options}


def epochs(run):
    return [line for line in metrics(run) if line["kind"] == "epoch"]


def test_each_stage_has_its_own_losses_weights_epochs_and_rate(tmp_path):
    train(tmp_path, RECIPE)
    first, second, third = epochs(tmp_path / "run")
    assert [line["stage"] for line in (first, second, third)] == ["hints", "hints", "answers"]
    assert set(first["train"]) == {"loss", "hint", "hint.weighted"}
    assert first["train"]["hint.weighted"] == pytest.approx(10 * first["train"]["hint"])
    assert set(third["train"]) == {"loss", "cross_entropy", "cross_entropy.weighted", "logit_kl", "logit_kl.weighted"}
    rates = [line["lr"] for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert max(rates[:12]) == pytest.approx(0.02, rel=0.1) and max(rates[12:]) == pytest.approx(0.05, rel=0.1)


def test_parameters_that_train_does_not_name_stay_bit_for_bit(tmp_path):
    """Batch norm's statistics included; in the next stage it learns again."""
    only_hint = {**RECIPE, "losses": [HINT]}
    nothing = {"name": "hints", "epochs": 2, "train": ["hint"]}
    some = {**nothing, "train": ["student.stage1", "student.stage2", "hint"]}
    runs = {"start": [nothing], "some": [some], "all": [some, {"name": "rest", "epochs": 1}]}
    for run, plans in runs.items():
        train(tmp_path, {**only_hint, "schedule": stages(*plans)}, into=run)
    start, after_some, after_all = (weights(tmp_path / run) for run in runs)
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], after_some[name])}
    assert moved == {"layer1", "layer2"}
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], after_all[name])}
    assert moved >= {"conv1", "bn1", "layer1", "layer2"}


def test_a_loss_goes_on_with_what_it_has_learnt(tmp_path):
    """Two stages of one epoch each with a constant rate and no momentum are two epochs, but for the random numbers of shuffling."""
    plan = {"losses": ["hint"], "epochs": 1, "train": ["hint"]}
    changes = {"losses": [HINT], "train": {"lr_schedule": {"name": "constant"}}}
    train(tmp_path, PLAIN, into="twice", schedule=stages({"name": "a", **plan}, {"name": "b", **plan}), **changes)
    a, b = epochs(tmp_path / "twice")
    train(tmp_path, PLAIN, into="long", schedule=stages({"name": "a", **plan, "epochs": 2}), **changes)
    first, second = epochs(tmp_path / "long")
    assert a["train"] == first["train"]
    assert b["train"]["hint"] < 0.9 * a["train"]["hint"]
    assert b["train"]["hint"] == pytest.approx(second["train"]["hint"], rel=0.1)


@pytest.mark.parametrize(
    ("plans", "says"),
    [
        ([{"name": "a", "losses": ["hnit"]}], "did you mean 'hint'"),
        ([{"name": "a", "train": ["studnet"]}], "train: did you mean 'student'?"),
        ([{"name": "a", "train": ["student.stage9"]}], "student.stage9: there is no layer 'stage9'"),
        ([{"name": "a", "train": ["cross_entropy"]}], "'cross_entropy' has nothing that learns"),
        ([{"name": "a"}, {"name": "a"}], "two stages have one name"),
        ([{"name": "A b"}], "may hold small letters, digits and '_', a letter first, got 'A b'"),
        ([], "needs at least 1"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, plans, says):
    with pytest.raises(kdkit.RecipeError) as caught:
        kdkit.check(write(tmp_path, {**RECIPE, "schedule": stages(*plans)}))
    assert says in str(caught.value) and "recipe.yaml:" in str(caught.value)


def test_check_says_what_each_stage_does(tmp_path):
    said = str(kdkit.check(write(tmp_path, RECIPE)))
    assert "stage hints: 2 epochs" in said and "total = 10 * hint(stage2 ~ stage2)" in said
    assert "stage answers: 1 epochs" in said and "total = 1 * cross_entropy + 1 * logit_kl" in said


def test_a_teacher_that_stops_early_answers_turned_images_too(tmp_path):
    plan = {"name": "hints", "epochs": 1}
    result = train(tmp_path, RECIPE, losses=[{"use": "cross_entropy"}, HINT], schedule=stages(plan, turned=True))
    assert result.test["top1"] >= 0
