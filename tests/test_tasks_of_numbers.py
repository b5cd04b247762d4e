"""Several labels or numbers an image: scores by their definition, what is refused, and a run from training to export."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from test_stage_resume import interrupt_at
from training import assert_same_run, merged, task, train, write

import kdkit
from kdkit import recipe as recipes
from kdkit.contracts.task import Rows
from kdkit.engine.evaluate import Tally
from kdkit.runs import checks
from kdkit.runs.run import Run
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun, evaluate
from kdkit.study.lockstep import train_together
from kdkit.testing import check_task

INFO = kdkit.DataInfo((1, 8, 8), outputs=3, num_train=40, num_test=20, class_names=("a", "b", "c"))


def scored(name, answer, target, teacher=None, size=7, **options):
    """The scores of random answers, in batches; with a teacher, the agreement."""
    asked = type(task(name))(type(task(name)).Options(**options))
    tally = Tally(asked.scores(INFO) if teacher is None else asked.agreement(INFO), together=False)
    for at in torch.split(torch.arange(len(answer)), size):
        tally.add(Rows(answer[at], target[at], None if teacher is None else teacher[at]))
    return tally.values()


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["multilabel", "regression"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_promises_hold_for_a_single_output_too(name, outputs):
    check_task(task(name), dataclasses.replace(INFO, outputs=outputs, class_names=()))


def test_scores_of_labels_are_those_of_scikit_learn():
    answer, shares = drawn(0, 40, 3), drawn(1, 40, 3).sigmoid()
    answer[:20, 0] = answer[0, 0]  # equal answers count as one threshold
    found, holds, decided = scored("multilabel", answer, shares), (shares >= 0.5).numpy(), (answer > 0).numpy()
    each = [100 * sk.average_precision_score(holds[:, k], answer[:, k]) for k in range(3)]
    assert [found[f"ap/{name}"] for name in "abc"] == pytest.approx(each, abs=1e-4)
    assert found["map"] == pytest.approx(np.mean(each), abs=1e-4)
    for average in ("macro", "micro"):
        assert found[f"{average}_f1"] == pytest.approx(100 * sk.f1_score(holds, decided, average=average), abs=1e-4)


def test_labels_that_do_not_occur_are_left_out():
    answer, target = drawn(0, 30, 3), (drawn(1, 30, 3) > 0).float()
    target[:, 1], answer[:, 1] = 0, -1
    found = scored("multilabel", answer, target)
    assert "ap/b" not in found and found["map"] == pytest.approx((found["ap/a"] + found["ap/c"]) / 2)
    f1 = [100 * sk.f1_score(target[:, k], answer[:, k] > 0) for k in (0, 2)]
    assert found["macro_f1"] == pytest.approx(np.mean(f1), abs=1e-4)
    assert math.isnan(scored("multilabel", answer, 0 * target)["map"])


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-4, 0.0), (1.0, 1e4)])
def test_scores_of_numbers_are_those_of_scikit_learn(scale, shift):
    answer, target = (scale * drawn(seed, 40, 3) + shift for seed in (0, 1))
    ours, (s, t) = scored("regression", answer, target), (x.double().numpy() for x in (answer, target))
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(t, s))
    assert ours["rmse"] == pytest.approx(sk.mean_squared_error(t, s) ** 0.5)
    assert ours["r2"] == pytest.approx(sk.r2_score(t, s), rel=1e-5)
    assert [ours[f"mae_of/{name}"] for name in "abc"] == pytest.approx(list(np.abs(s - t).mean(0)))


def test_outputs_whose_targets_do_not_vary_have_no_r2():
    answer, target = drawn(0, 20, 3), drawn(1, 20, 3)
    target[:, 1] = 0.1
    kept = [sk.r2_score(target[:, k], answer[:, k]) for k in (0, 2)]
    assert scored("regression", answer, target)["r2"] == pytest.approx(np.mean(kept))
    assert math.isnan(scored("regression", answer, target[:, 1:2].expand(20, 3))["r2"])


@pytest.mark.parametrize("decides", ["mae", "r2"])
def test_the_score_that_decides_comes_first(decides):
    answer = drawn(0, 9, 3)
    assert next(iter(scored("regression", answer, answer, decides=decides))) == decides


def test_agreement_is_the_share_of_equal_decisions_and_the_distance():
    answer, teacher = torch.tensor([[1.0, -1.0, 2.0], [3.0, 1.0, -1.0]]), torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    found = scored("multilabel", answer, teacher, teacher)
    assert found["agreement"] == pytest.approx(100 * 5 / 6)
    assert found["probability_difference"] == pytest.approx((answer.sigmoid() - teacher.sigmoid()).abs().mean().item())
    assert scored("regression", answer, teacher, teacher) == {"mae_to_teacher": pytest.approx(7 / 6)}


NO_TARGETS = {
    "one class of a sample": ("multilabel", [0, 2, 1], "have the shape (3,), not (N, 3); a target is 3 numbers from 0 to 1"),
    "out of range": ("multilabel", [[0, 1, 0], [0, 0, 1.5]], "sample 1 has 1.5 for 'c'; a target is 3 numbers from 0 to 1"),
    "unknown": ("multilabel", [[0, -1, 0]], "sample 0 has -1 for 'b'"),
    "lists of names": ("multilabel", [[0, 1], [1]], "are no table of numbers: expected sequence of length 2"),
    "NaN": ("regression", [[0, 1, 2], [0, math.nan, 0]], "sample 1 has nan for 'b'; a target is 3 finite numbers"),
    "too large for fp32": ("regression", [[0, 1, 1e60]], "sample 0 has inf for 'c'"),
    "other numbers": ("regression", [[0, 1]], "have the shape (1, 2), not (N, 3)"),
    "complex": ("regression", torch.ones(1, 3, dtype=torch.complex64), "are complex numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_TARGETS)
def test_what_is_no_target_is_refused_in_one_line(case):
    name, values, says = NO_TARGETS[case]
    with pytest.raises(kdkit.DataError) as told:
        task(name).targets(values, INFO, "dataset 'x': training labels")
    assert f"training labels{':' if 'sample' in says else ''} {says}" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("values", [[True, False], [1, 0], np.array([1.0, 0.0]), torch.tensor([1, 0])])
def test_one_number_a_sample_becomes_a_column(values):
    for name in ("multilabel", "regression"):
        found = task(name).targets(values, dataclasses.replace(INFO, outputs=1), "labels")
        assert found.dtype == torch.float32 and found.tolist() == [[1.0], [0.0]]


def test_mixed_images_have_their_labels_by_shares():
    mix = task("multilabel").mixer({"mixup_alpha": 1.0, "cutmix_alpha": 0.0, "mode": "elem"}, INFO)
    targets = torch.tensor([[1.0, 0, 1], [0, 0.5, 1]])
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 4, 4).clone()
    mixed, shares = mix(images, targets)
    first = 1 - mixed[:, 0, 0, 0]  # the share of the first image in each
    torch.testing.assert_close(shares, first[:, None] * targets[0] + (1 - first)[:, None] * targets[1])


PLUGIN = '''
"""Noise with a bright spot, and where it is: as three labels, or as two numbers."""

import kdkit
import torch


def spots(part):
    draw = torch.Generator().manual_seed(len(part))
    count = 48 if part == "train" else 20
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)
    places = torch.randint(0, 7, (count, 2), generator=draw)
    for image, (x, y) in zip(images, places.tolist(), strict=True):
        image[:, y : y + 2, x : x + 2] = 255
    return images, places


class Sides(kdkit.DatasetSource):
    """Where the spot is, as three labels."""

    name = "sides"
    task = "multilabel"

    def info(self):
        return kdkit.DataInfo((1, 8, 8), outputs=3, num_train=48, num_test=20, class_names=("left", "top", "middle"))

    def split(self, part):
        images, places = spots(part)
        middle = ((places - 3).abs().amax(1, keepdim=True) < 2)
        return kdkit.InMemory(images, torch.cat([places < 3, middle], 1))


class Places(Sides):
    """Where the spot is, as two numbers."""

    name = "places"
    task = "regression"

    def info(self):
        return kdkit.DataInfo((1, 8, 8), outputs=2, num_train=48, num_test=20, class_names=("x", "y"))

    def split(self, part):
        images, places = spots(part)
        return kdkit.InMemory(images, places / 6)


@kdkit.hookimpl
def kdkit_datasets():
    return [Sides, Places]
'''
PLAIN = {
    "name": "plain",
    "plugins": ["spots.py"],
    "data": {"batch_size": 8, "validation": 8, "augment": {"crop_padding": 1}},
    "teacher": {"model": "mlp/16"},
    "student": {"model": "mlp/8"},
    "schedule": {"use": "offline"},
    "train": {"epochs": 2, "optimizer": {"lr": 0.05}},
    "run": {"log_steps": 1},
}
TASKS = {
    "multilabel": merged(PLAIN, {
        "data": {"dataset": {"use": "sides"}},
        "losses": [{"use": "bce", "pos_weight": [1, 2, 3]}, {"use": "mld"}, {"use": "binary_kd", "target": "sigmoid"}],
        "metrics": ["MultilabelAUROC"],
        "train": {"mixup": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}},
    }),
    "regression": merged(PLAIN, {
        "data": {"dataset": {"use": "places"}},
        "losses": [{"use": "mse"}, {"use": "smooth_l1"}, {"use": "bounded_regression"}, {"use": "attentive_imitation"}, {"use": "logit_mse"}],
        "metrics": ["R2Score"],
    }),
}  # fmt: skip
SCORES = {
    "multilabel": {"map", "macro_f1", "micro_f1", "ap/left", "ap/top", "ap/middle", "agreement", "probability_difference", "MultilabelAUROC"},
    "regression": {"mae", "rmse", "r2", "mae_of/x", "mae_of/y", "mae_to_teacher", "R2Score"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "spots.py").write_text(PLUGIN)
    return tmp_path


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


@pytest.mark.first(1)
def test_a_run_is_resumed_measured_and_exported(folder, name):
    whole = train(folder, TASKS[name])
    assert set(whole.test) == SCORES[name] and all(map(math.isfinite, whole.test.values()))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(kdkit.Interrupted):
            train(folder, TASKS[name], into="parts")
    train(folder, TASKS[name], into="parts")
    assert_same_run(folder / "run", folder / "parts")
    run = LoadedRun(whole.folder, plugins=[folder / "spots.py"])
    again = next(
        scores.metrics for scores in evaluate(run, device=torch.device("cpu")) if (scores.role, scores.part) == ("student", "test")
    )
    assert again == pytest.approx(whole.test, rel=1e-5)
    export(run, "onnx", folder / "exported")


@pytest.mark.parametrize(
    ("name", "augment", "is_told"),
    [
        ("regression", {"augment": {"crop_padding": 1}}, True),
        ("regression", {"augment": {"flip": 0.5}}, True),
        ("regression", {"augment": None, "timm_augment": {}}, True),
        ("regression", {"augment": None, "timm_augment": {"scale": [1, 1], "ratio": [1, 1], "flip": 0, "color_jitter": 0.3}}, False),
        ("regression", {"augment": {"crop_padding": 0}}, False),
        ("multilabel", {"augment": {"flip": 0.5}}, False),
    ],
)
def test_check_notes_that_images_move_without_their_numbers(folder, name, augment, is_told):
    alone = merged(TASKS[name], {"data": augment, "teacher": None, "schedule": {"use": "supervised"}, "losses": TASKS[name]["losses"][:1]})
    notes = checks.make(recipes.load(write(folder, alone))).notes
    (key,) = (key for key, value in augment.items() if value is not None)
    says = f"data.{key} moves images, and targets of task '{name}' stay as they are: those that are coordinates in the image would be wrong"
    assert notes == ((says,) if is_told else ())


def test_runs_side_by_side_are_what_they_are_alone(folder, name):
    alone = merged(TASKS[name], {"teacher": None, "schedule": {"use": "supervised"}, "losses": TASKS[name]["losses"][:1]})
    together = {"taught": TASKS[name], "alone": alone}
    runs = [
        Run(recipes.load(write(folder, {**spec, "name": key}, f"{key}.yaml")), folder / "together" / key) for key, spec in together.items()
    ]
    assert [outcome.reason for outcome in train_together(runs)] == [None, None]
    for key in together:
        kdkit.train(folder / f"{key}.yaml", folder=folder / key, quiet=True)
        assert_same_run(folder / key, folder / "together" / key)


def test_students_learn_where_the_spot_is(folder, name):
    longer = {"train": {"epochs": 12, "optimizer": {"lr": 0.1}, "mixup": None}, "teacher": None, "schedule": {"use": "supervised"}}
    found = train(folder, merged(TASKS[name], {**longer, "losses": TASKS[name]["losses"][:1], "data": {"augment": None}})).test
    assert found["map"] > 80 if name == "multilabel" else found["r2"] > 0.5, found


REFUSED = {
    "a softmax over labels": ("multilabel", {"losses": [{"use": "bce"}, {"use": "logit_kl"}]},
                              "losses.1.use: 'logit_kl' is for classes, and task 'multilabel' has rows of labels; its usual loss on labels is 'bce'"),
    "a softmax over numbers": ("regression", {"losses": [{"use": "mse"}, {"use": "dist"}]},
                               "losses.1.use: 'dist' is for classes, and task 'regression' has rows of numbers; its usual loss on labels is 'mse'"),
    "labels as classes": ("multilabel", {"losses": [{"use": "cross_entropy"}]}, "'cross_entropy' is for classes"),
    "a sigmoid over numbers": ("regression", {"losses": [{"use": "mld"}]}, "'mld' is for labels, and task 'regression' has rows of numbers"),
    "mixed numbers": ("regression", {"train": {"mixup": {"mixup_alpha": 0.4}}, "data": {"batch_size": 7}}, "train.mixup: targets of task 'regression' cannot be mixed"),
    "classes of labels": ("multilabel", {"metrics": [{"use": "MulticlassF1Score", "num_classes": 3}]},
                          "metrics.0: 'MulticlassF1Score' is for classes, and task 'multilabel' has rows of labels; did you mean 'MultilabelF1Score'?"),
    "classes of numbers": ("regression", {"metrics": ["MulticlassExactMatch"]},
                           "metrics.0: 'MulticlassExactMatch' is for classes, and task 'regression' has rows of numbers"),
    "targets out of range": ("regression", {"task": "multilabel", "data": {"dataset": {"use": "far"}}, "losses": [{"use": "bce"}]},
                             "sample 0 has 7 for 'x'; a target is 2 numbers from 0 to 1"),
    "targets that are not finite": ("regression", {"data": {"dataset": {"use": "nowhere"}}}, "sample 0 has nan for 'x'; a target is 2 finite numbers"),
    "weights of other labels": ("multilabel", {"losses": [{"use": "bce", "pos_weight": [1, 2]}]}, "losses.0: bce: 2 numbers of pos_weight for 3 labels"),
    "a weight of 0": ("multilabel", {"losses": [{"use": "bce", "pos_weight": 0}]}, "losses.0.pos_weight"),
    "no such score": ("regression", {"task": {"use": "regression", "decides": "rmse"}}, "task.decides"),
}  # fmt: skip
WRONG = '''
class Far(Places):
    """Numbers above 1."""

    name = "far"

    def split(self, part):
        images, places = spots(part)
        return kdkit.InMemory(images, places + 7 - places[0])


class Nowhere(Places):
    """No numbers."""

    name = "nowhere"

    def split(self, part):
        images, places = spots(part)
        return kdkit.InMemory(images, places.log() * float("nan"))


@kdkit.hookimpl
def kdkit_datasets():
    return [Sides, Places, Far, Nowhere]
'''


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_in_one_line(folder, case):
    (folder / "spots.py").write_text(PLUGIN + WRONG)
    base, changes, says = REFUSED[case]
    with pytest.raises(kdkit.RecipeError) as told:
        checks.make(recipes.load(write(folder, merged(TASKS[base], changes))))
    assert says in str(told.value) and "\n" not in str(told.value), told.value
