"""Learning embeddings without labels: the scores, runs with and without labels, the way on to a classifier, what is refused."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_stage_resume import interrupt_at
from training import PLAIN, TINY, assert_same_run, merged, task, train, write

import kdkit
from kdkit import recipe as recipes
from kdkit.recipe import registry
from kdkit.runs import checks
from kdkit.runs.run import Run
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun, evaluate
from kdkit.study.lockstep import train_together

INFO = kdkit.DataInfo((3, 8, 8), outputs=3, num_train=8, num_test=8)


def drawn(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def measured(name, *batches, **options):
    """The value of a score on (embeddings, labels, teacher's embeddings), batch by batch."""
    kind = registry.load().tasks["none"]
    score = next(score for score in kind(kind.Options(**options)).scores(INFO) if score.name == name)
    metric = score.build()
    for answer, label, teacher in batches:
        metric.update(*score.sees(kdkit.Rows(answer, label, teacher)))
    return score.numbers(metric.compute())[name]


def labelled(count=30, width=4):
    """Embeddings of three classes that overlap, and the last sample without a label."""
    x, _ = drawn((count, width), (1,))
    labels = torch.arange(count) % 3
    x[:, 0] += 2.0 * (labels == 1)
    x[:, 1] += 2.0 * (labels == 2)
    return x, torch.where(torch.arange(count) == count - 1, -1, labels)


def test_cka_is_that_of_gram_matrices_and_does_not_see_rotation_scale_or_shift():
    x, y, q = drawn((20, 4), (20, 6), (4, 4))
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, l = (centre @ (v.double() @ v.double().T) @ centre for v in (x, y))  # noqa: E741
    expected = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
    none = torch.full((20,), -1)
    assert measured("cka", (x[:7], none[:7], y[:7]), (x[7:], none[7:], y[7:])) == pytest.approx(float(expected), rel=1e-6)
    rotated = 3 * x @ torch.linalg.qr(q)[0] + 5
    assert measured("cka", (x, none, rotated)) == pytest.approx(1, abs=1e-5)
    assert measured("cka", (torch.ones(20, 4), none, y)) == 0  # a constant embedding


@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_the_probe_and_what_is_explained_leave_each_image_out(penalty):
    from sklearn.linear_model import Ridge

    x, labels = labelled()
    (y,) = drawn((30, 5))

    def left_out(x, wanted):
        x = ((x - x.mean(0)) / x.std(0, unbiased=False)).double().numpy()
        guesses = []
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            guesses.append(Ridge(alpha=penalty).fit(x[others], wanted[others]).predict(x[i : i + 1])[0])
        return np.stack(guesses)

    right = left_out(x[:-1], np.eye(3)[labels[:-1]]).argmax(1) == labels[:-1].numpy()
    assert measured("probe", (x, labels, None), penalty=penalty) == pytest.approx(100 * right.mean())
    wanted = y.double().numpy()
    errors = ((wanted - left_out(x, wanted)) ** 2).sum()
    expected = 1 - errors / ((wanted - wanted.mean(0)) ** 2).sum()
    assert measured("explained", (x, labels, y), penalty=penalty) == pytest.approx(100 * expected, rel=1e-6)


@pytest.mark.parametrize("neighbours", [1, 4, 20, 100])
def test_neighbours_vote_by_cosine_with_weights(neighbours):
    x, labels = labelled()
    known, right = labels >= 0, []
    x_known, l_known = x[known], labels[known].tolist()
    for i, own in enumerate(l_known):
        cosines = [(float(torch.cosine_similarity(x_known[i], other, dim=0)), j) for j, other in enumerate(x_known) if j != i]
        votes = [0.0] * 3
        for cosine, j in sorted(cosines, reverse=True)[:neighbours]:
            votes[l_known[j]] += math.exp(cosine / 0.07)
        right.append(votes.index(max(votes)) == own)
    found = measured("knn", (x, labels, None), neighbours=neighbours)
    assert found == pytest.approx(100 * sum(right) / len(right)) and 40 < found < 100


def test_without_labels_there_is_no_accuracy_and_of_one_image_or_nan_no_number():
    kind = task("none")
    unlabelled = [score.name for score in kind.scores(kdkit.DataInfo((3, 8, 8), 0, 8, 8, test_labelled=False))]
    assert unlabelled == ["cka", "explained"]
    assert [score.name for score in kind.scores(INFO)] == ["cka", "explained", "knn", "probe"]
    x, labels = labelled()
    for name in ("cka", "explained", "knn", "probe"):
        assert math.isnan(measured(name, (x[:1], labels[:1], x[:1])))
        assert math.isnan(measured(name, (torch.where(x > 2, math.nan, x), labels, x)))


def test_embeddings_of_several_models_are_side_by_side():
    x, y = (kdkit.Outputs(value) for value in drawn((5, 3), (5, 4)))
    both = task("none").combined([x, y]).logits
    cosine = torch.cosine_similarity
    expected = (cosine(x.logits[:1], x.logits[1:2]) + cosine(y.logits[:1], y.logits[1:2])) / 2
    torch.testing.assert_close(cosine(both[:1], both[1:2]), expected)


SPEC = merged(PLAIN, {
    "task": "none",
    "data": {"dataset": {"train": 32, "test": 12}, "augment": {"crop_padding": 1, "flip": 0.5}, "batch_size": 9},  # the last batch is smaller
    "losses": [{"use": "embedding"}, {"use": "seed", "queue": 20}, {"use": "embedding", "name": "tokens", "layers": [{"student": "stage3", "teacher": "stage3"}], "distance": "mse"}],
})  # fmt: skip
ALONE = {"teacher": None, "task": {"use": "none", "decides": "neighbours"}, "schedule": {"use": "mutual"}}


def test_a_run_is_resumed_measured_exported_and_gone_on_with(tmp_path):
    whole = train(tmp_path, SPEC)
    assert list(whole.test) == ["cka", "explained", "knn", "probe"] and all(map(math.isfinite, whole.test.values()))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, SPEC, into="parts")
    train(tmp_path, SPEC, into="parts")
    assert_same_run(tmp_path / "run", tmp_path / "parts")
    run = LoadedRun(whole.folder)
    found = {one.role: one.metrics for one in evaluate(run, device=torch.device("cpu"))}
    assert found["student"] == pytest.approx(whole.test, rel=1e-5) and found["teacher"]["cka"] == pytest.approx(1)
    export(run, "onnx", tmp_path / "onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert [(one.name, one.shape[1]) for one in session.get_outputs()] == [("embedding", 8)]
    export(run, "timm", tmp_path / "exported")
    images = torch.rand(2, 3, 8, 8)
    answers = [kdkit.load_student(folder)(images).logits for folder in (tmp_path / "run", tmp_path / "exported")]
    assert torch.equal(*answers) and answers[0].shape == (2, 8)
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert not any(key.startswith("fc.") for key in weights)

    on = {"use": "supervised", "losses": [{"use": "cross_entropy"}]}
    begun = {"student": {"checkpoint": "run/student.safetensors", "new_head": True}, "teacher": None, "schedule": {"use": "supervised"}}
    classifier = train(tmp_path, PLAIN, into="on", losses=on["losses"], train={"epochs": 1, "optimizer": {"lr": 1e-12}}, **begun)
    after = load_file(classifier.folder / "student.safetensors")
    assert after["fc.weight"].shape == (6, 8) and "top1" in classifier.test
    torch.testing.assert_close(after["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])


def test_runs_side_by_side_are_what_they_are_alone(tmp_path):
    once = {"train": {"epochs": 1}}
    kinds = {
        "taught": merged(SPEC, once),
        "peers": merged(SPEC, {**ALONE, **once, "losses": SPEC["losses"][:1], "data": {"validation": 12}}),
    }
    runs = [Run(recipes.load(write(tmp_path, {**spec, "name": name}, f"{name}.yaml")), tmp_path / "together" / name) for name, spec in kinds.items()]  # fmt: skip
    assert [outcome.reason for outcome in train_together(runs)] == [None, None]
    for name in kinds:
        kdkit.train(tmp_path / f"{name}.yaml", folder=tmp_path / name, quiet=True)
        assert_same_run(tmp_path / name, tmp_path / "together" / name)


def test_a_teacher_of_another_recipe_and_files_with_a_head_lose_it(tmp_path):
    own = {
        "name": "teacher",
        "teacher": None,
        "schedule": {"use": "supervised"},
        "losses": [{"use": "cross_entropy"}],
        "train": {"epochs": 1},
    }
    write(tmp_path, merged(PLAIN, own), "teacher.yaml")
    taught = merged(SPEC, {"losses": SPEC["losses"][:1], "train": {"epochs": 1}, "run": {"folder": str(tmp_path / "runs")}})
    found = train(tmp_path, {**taught, "teacher": {"recipe": "teacher.yaml"}})
    assert found.teacher["cka"] == pytest.approx(1) and set(found.teacher) == {"cka", "explained", "knn", "probe"}
    with_head = {**TINY, "checkpoint": "runs/teacher/student.safetensors"}
    plan = checks.make(recipes.load(write(tmp_path, {**taught, "teacher": with_head})))
    assert plan.notes == ("student.safetensors: 2 keys of its head are left out (fc.bias, fc.weight)",)
    again = train(tmp_path, {**taught, "teacher": with_head}, into="again")
    assert again.test == found.test
    # the same network, measured as a student that learns nothing
    still = {"student": with_head, "losses": [{"use": "embedding", "weight": 0}], "train": {"epochs": 1, "optimizer": {"weight_decay": 0}}}
    assert train(tmp_path, merged({**taught, "teacher": with_head}, still), into="still").test["cka"] > found.test["cka"]


def test_a_vision_transformer_teaches_patch_tokens(tmp_path):
    vit = {"model": "vit_tiny_patch16_224", "args": {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}}
    losses = [
        {"use": "embedding"},
        {"use": "embedding", "name": "patches", "layers": [{"student": "stage1", "teacher": "norm"}], "hidden": 6},
    ]
    spec = {**SPEC, "teacher": vit, "losses": losses, "train": {"epochs": 1, "optimizer": {"lr": 0.05}}}
    plan = checks.make(recipes.load(write(tmp_path, spec)))
    assert dict(plan.teachers[0].taps) == {"penultimate": (12,), "norm": (17, 12)}
    assert plan.student.taps[1] == ("stage1", (4, 8, 8)) and len(plan.stages[0].adapters) == 2


def pictures(folder, parts):
    for part in parts:
        (folder / part).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (20 * i, 255 - 20 * i, 7 * i)).save(folder / part / f"{i}.png")
    return {"use": "image_folder", "root": str(folder)}


def test_a_folder_of_images_is_enough(tmp_path):
    data = {"dataset": pictures(tmp_path / "images", ("train", "test")), "image_size": 8, "batch_size": 4}
    spec = {**SPEC, "data": data, "losses": SPEC["losses"][:1], "train": {"epochs": 1, "optimizer": {"lr": 0.05}}}
    assert set(train(tmp_path, spec).test) == {"cka", "explained"}
    for changes, says in (
        ({"task": "classification"}, "has test images without labels, which task 'classification' measures by; `task: none` does without"),
        ({"task": {"use": "none", "decides": "probe"}}, "has test images without labels, and the task says `decides: probe`"),
    ):
        with pytest.raises(kdkit.RecipeError, match=says) as told:
            checks.make(recipes.load(write(tmp_path, {**spec, **changes})))
        assert "\n" not in str(told.value)


PEEK = '''
"""A relation of images of one class."""

import kdkit


class Peek(kdkit.Loss):
    """Reads labels, which its kind of knowledge does not say."""

    name = "peek"
    knowledge = "relation"

    def forward(self, student, teacher, batch):
        return (student.logits.sum(1) * batch.labels).mean()


@kdkit.hookimpl
def kdkit_losses():
    return [Peek]
'''
REFUSED = {
    "a loss on labels": ({"losses": [{"use": "cross_entropy"}]}, "losses.0.use: 'cross_entropy' is for classes, and task 'none' has rows of embeddings; its usual loss is 'embedding'"),
    "a loss on numbers": ({"losses": [{"use": "mse"}]}, "losses.0.use: 'mse' is for numbers"),
    "a loss on predictions": ({"losses": [{"use": "logit_kl"}]}, "losses.0.use: 'logit_kl' is for"),
    "a loss that reads labels beside": ({"plugins": ["peek.py"], "losses": [{"use": "peek"}]}, "losses.0: reads the labels of training images"),
    "no teacher to be like": ({"teacher": None, "schedule": {"use": "mutual"}}, "'cka', which decides, compares with a teacher, and none answers"),
    "validation without the teacher": ({"data": {"validation": 12}}, "data.validation: 'cka', which decides, compares with a teacher"),
    "balanced classes": ({"data": {"sampling": "balanced"}}, "data.sampling: targets of task 'none' make no groups to balance"),
    "a metric on labels": ({"metrics": ["MeanSquaredError"]}, "metrics.0: 'MeanSquaredError' does not count answers of task 'none'"),
    "mixed images": ({"train": {"mixup": {"mixup_alpha": 0.2}}}, "train.mixup: targets of task 'none' cannot be mixed"),
    "a teacher's own classes": ({"teacher": {"num_classes": 6}}, "'cka', which decides, compares with a teacher, and none answers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_in_one_line(tmp_path, case):
    changes, says = REFUSED[case]
    (tmp_path / "peek.py").write_text(PEEK)
    spec = merged(SPEC, {"data": {"batch_size": 8}, "losses": SPEC["losses"][:1], **{k: v for k, v in changes.items() if k != "data"}})
    with pytest.raises(kdkit.RecipeError) as told:
        checks.make(recipes.load(write(tmp_path, merged(spec, {"data": changes.get("data", {})}))))
    assert says in str(told.value) and "\n" not in str(told.value), told.value


@pytest.mark.parametrize("wrong", [[[0, 1]] * 4, [0.5] * 4, [3] * 4, [-2] * 4], ids=str)
def test_what_is_no_label_is_refused(wrong):
    with pytest.raises(kdkit.DataError, match="-1 for none"):
        task("none").targets(wrong, INFO, "labels")
