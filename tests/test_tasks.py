"""Tasks: the promises of the standard ones, what `check` refuses, and that the core knows none of them."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import PLAIN, merged, task, train, write

import kdkit
from kdkit import recipe as recipes
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.synonyms import SYNONYMS
from kdkit.recipe import registry
from kdkit.runs import checks
from kdkit.students.predictions import Predictor, find_images
from kdkit.testing import check_task

CORE = Path(kdkit.__file__).parent
TASKS = registry.load().tasks
# words of one task, and the files of the core that may say them
WORDS = re.compile(r"num_classes|\btop-?[15]\b|\(B, K\)|text_classification")
MAY_SAY = {
    "contracts/synonyms.py": "the name by which plugins and old files call the number of outputs",
    "contracts/dataset_source.py": "tells authors of datasets of that name",
    "contracts/loss.py": "tells authors of losses of that name",
    "contracts/model_source.py": "the key of recipes for a teacher's own classes",
    "contracts/options.py": "arguments of timm and torchvision that recipes may not give",
    "start/tasks.py": "what `kdkit new` begins with, for each task by its name",
    "students/export.py": "timm's own format of an exported network",
}


def test_the_core_knows_no_task():
    said = {str(path.relative_to(CORE)) for path in CORE.rglob("*.py") if WORDS.search(path.read_text())}
    assert said == set(MAY_SAY), said ^ set(MAY_SAY)


@pytest.mark.parametrize("name", TASKS)
def test_standard_tasks_keep_their_promises(name):
    check_task(task(name))


@pytest.mark.parametrize("name", TASKS)
def test_the_usual_loss_of_a_task_is_there(name):
    loss = registry.load().losses[TASKS[name].default_loss]
    if TASKS[name].rows_are == "embeddings":  # learnt without labels
        assert loss.knowledge == "feature" and loss.for_tasks() == "any"
    else:
        assert loss.knowledge == "labels" and loss.for_tasks() & {name, TASKS[name].rows_are}


BROKEN = {
    "a score without a name": ({"scores": lambda self, info: []}, "`scores` is empty"),
    "targets that take all": ({"targets": lambda self, values, info, whose: torch.as_tensor(values) if isinstance(values, torch.Tensor) else torch.zeros(24)}, "takes 'a' for a target"),
    "rows without targets": ({"rows": lambda self, answers, batch: ([Outputs(answers[0].logits[:3])], batch)}, "rows` gives [3, 24] rows"),
    "nothing remembered": ({"remembered": lambda self, answer, batch: answer.logits[:2]}, "`remembered` has no entry for each sample"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_promises_are_found(case):
    changes, says = BROKEN[case]
    broken = type("Broken", (TASKS["classification"],), changes)
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_task(broken())


def test_datasets_may_say_the_number_of_outputs_by_either_name():
    for name in (*SYNONYMS, *SYNONYMS.values()):
        info = kdkit.DataInfo((3, 8, 8), num_train=9, num_test=9, **{name: 7})
        assert info.outputs == info.num_classes == 7


PIXELS = '''
"""Each quarter of an image has a label of its own, or none (-1): four rows an image."""

import kdkit
import torch
from PIL import Image


class Quarters(kdkit.Task):
    """A class for each quarter of an image; answers are (B, 4 K), targets (B, 4), -1 where nothing is to be said."""

    name = "quarters"
    rows_are = "classes"
    default_loss = "cross_entropy"

    def check(self, info):
        pass

    def targets(self, values, info, whose):
        try:
            return torch.as_tensor(values).long()
        except (TypeError, ValueError, RuntimeError):
            raise kdkit.DataError(f"{whose} are no numbers") from None

    def random_targets(self, info, index):
        return (index[:, None] + torch.arange(4, device=index.device)) % (info.outputs // 4 + 1) - 1

    def rows(self, answers, batch):
        counts = batch.labels.flatten() >= 0
        sample = batch.index.repeat_interleave(4)[counts]
        rows = [self.row_by_row(answer, counts) for answer in answers]
        return rows, kdkit.Batch(batch.inputs, batch.labels.flatten()[counts], sample)

    def row_width(self, info):
        return info.outputs // 4

    def row_by_row(self, answer, counts):
        logits = answer.logits
        return kdkit.with_logits(answer, logits.reshape(4 * len(logits), -1)[counts])

    def as_targets(self, answer):
        return answer.logits.reshape(len(answer.logits), 4, -1).argmax(2)

    def scores(self, info):
        from torchmetrics.classification import MulticlassAccuracy

        accuracy = lambda: MulticlassAccuracy(info.outputs // 4, average="micro")
        return [kdkit.Score(name="right", title="right", unit="%", scale=100.0, build=accuracy, meaning="share of quarters that are right")]


class Corners(kdkit.DatasetSource):
    """Noise with bright corners."""

    name = "corners"
    task = "quarters"

    def info(self):
        return kdkit.DataInfo((3, 8, 8), outputs=8, num_train=48, num_test=20)

    def split(self, part):
        draw = torch.Generator().manual_seed(len(part))
        count = 48 if part == "train" else 20
        images = torch.randint(0, 60, (count, 3, 8, 8), generator=draw, dtype=torch.uint8)
        targets = torch.randint(-1, 2, (count, 4), generator=draw)
        for i, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
            images[targets[:, i] == 1, :, top : top + 4, left : left + 4] += 150
        return kdkit.InMemory(images, targets)


@kdkit.hookimpl
def kdkit_tasks():
    return [Quarters]


@kdkit.hookimpl
def kdkit_datasets():
    return [Corners]
'''


@pytest.fixture
def quarters(tmp_path):
    """A recipe of a task with four rows an image, some of which do not count."""
    (tmp_path / "quarters.py").write_text(PIXELS)
    losses = [{"use": "cross_entropy"}, {"use": "logit_kl"}, {"use": "hint", "layers": [{"student": "layer1", "teacher": "layer1"}]}]
    data = {"dataset": {"use": "corners"}, "batch_size": 8, "eval_batch_size": 8}
    return {**PLAIN, "plugins": ["quarters.py"], "data": data, "losses": losses}


def test_a_task_of_several_rows_a_sample_is_trained_by_every_kind_of_loss(tmp_path, quarters):
    result = train(tmp_path, merged(quarters, {"train": {"epochs": 8, "optimizer": {"lr": 0.1}}}))
    assert set(result.test) == {"right"} and result.test["right"] > 75


def test_losses_see_the_rows_that_count(tmp_path, quarters):
    loaded = recipes.load(write(tmp_path, quarters))
    check_task(loaded.task, kdkit.DataInfo((3, 8, 8), outputs=8, num_train=9, num_test=9))
    batch = Batch(torch.rand(2, 3, 8, 8), torch.tensor([[0, 1, -1, 1], [-1, -1, -1, 0]]), torch.tensor([5, 7]))
    logits = torch.arange(16.0).reshape(2, 8)
    (rows,), asked = loaded.task.rows([Outputs(logits)], batch)
    assert rows.logits.tolist() == [[0, 1], [2, 3], [6, 7], [14, 15]]
    assert asked.labels.tolist() == [0, 1, 1, 0] and asked.index.tolist() == [5, 5, 5, 7]


REFUSED = {
    "no such task": ({"task": "clasification"}, "did you mean 'classification'"),
    "texts, and the dataset has images": ({"task": "text_classification"}, "the samples are (3, 8, 8); say which task it is (`task:`); for images: classification"),
    "no such metric": ({"metrics": ["MulticlassCohenKapa"]}, "metrics.0: 'MulticlassCohenKapa' is no metric plugin, nor a class of torchmetrics; did you mean 'MulticlassCohenKappa'"),
    "an argument that it does not take": ({"metrics": [{"use": "MulticlassCohenKappa", "wieghts": "none"}]}, "'MulticlassCohenKappa' does not take these arguments: "),
    "several numbers": ({"metrics": ["MulticlassConfusionMatrix"]}, "'MulticlassConfusionMatrix' does not count answers of task 'classification'"),
    "a metric of numbers": ({"metrics": ["R2Score"]}, "'R2Score' does not count answers"),
    "twice": ({"metrics": ["MulticlassCohenKappa", "MulticlassCohenKappa"]}, "there is a score 'MulticlassCohenKappa' already"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_in_one_line(tmp_path, case):
    changes, says = REFUSED[case]
    with pytest.raises(kdkit.RecipeError) as told:
        checks.make(recipes.load(write(tmp_path, {**PLAIN, **changes})))
    assert says in str(told.value) and len(str(told.value).splitlines()) == 1, told.value


ROWS = '''
import kdkit
from kdkit_plugins.tasks.classification import Classification


class Numbers(Classification):
    """The same with rows of numbers."""

    name = "numbered"
    rows_are = "numbers"
    default_loss = "logit_mse"


@kdkit.hookimpl
def kdkit_tasks():
    return [Numbers]
'''


def test_options_for_classes_are_refused_for_a_task_with_other_rows(tmp_path):
    (tmp_path / "rows.py").write_text(ROWS)
    recipe = {**PLAIN, "plugins": ["rows.py"], "task": "numbered", "losses": [{"use": "logit_mse"}]}
    cached = merged(recipe, {"teacher": {"cache": {"views": 1, "top_k": 2}}})
    with pytest.raises(kdkit.RecipeError, match="keeps the likeliest classes, and task 'numbered' has rows of numbers; leave it out"):
        checks.make(recipes.load(write(tmp_path, cached)))
    run = train(tmp_path, recipe).folder
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    device = torch.device("cpu")
    predictor = Predictor.of(run, device=device, plugins=[tmp_path / "rows.py"])
    (said,) = predictor(find_images([tmp_path / "a.png"]), device)
    assert list(said.values) == list("012345") and all(isinstance(value, float) for value in said.values.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("classification", {"class": "b", "probability": 0.9}),
        ("multilabel", {"labels": "b c", "a": 0.1, "b": 0.9, "c": 0.6}),
        ("regression", {"a": 0.1, "b": 0.9, "c": 0.6}),
    ],
)
def test_a_table_of_predictions_has_the_columns_of_the_task(name, expected):
    info = DataInfo((3, 8, 8), 3, 1, 1, ("a", "b", "c"))
    values = torch.tensor([[0.1, 0.9, 0.6]])
    logits = {"classification": torch.tensor([[0.05, 0.9, 0.05]]).log(), "multilabel": values.logit(), "regression": values}[name]
    (said,) = registry.load().tasks[name]().predicted(Outputs(logits), info)
    assert {key: round(value, 5) if isinstance(value, float) else value for key, value in said.items()} == expected


def test_losses_and_schedules_of_other_rows_are_refused(tmp_path):
    (tmp_path / "rows.py").write_text(ROWS)
    layers = [{"student": "layer1", "teacher": "layer1"}]
    names = ["cross_entropy", "logit_kl", "logit_mse", "hint", "srrl"]
    losses = [{"use": name, **({"layers": layers} if name in ("hint", "srrl") else {})} for name in names]
    path = write(tmp_path, {**PLAIN, "plugins": ["rows.py"], "task": {"use": "numbered"}, "losses": losses})
    with pytest.raises(kdkit.RecipeError) as told:
        recipes.load(path)
    lines = str(told.value).splitlines()
    assert len(lines) == 3, lines
    for name, line in zip(("cross_entropy", "logit_kl", "srrl"), lines, strict=True):
        whose = "classes of samples" if name == "srrl" else "classes"
        assert f"'{name}' is for {whose}, and task 'numbered' has rows of numbers; its usual loss on labels is 'logit_mse'" in line


def test_a_task_that_says_nothing_is_that_of_the_dataset(tmp_path):
    loaded = recipes.load(write(tmp_path, PLAIN))
    named = recipes.load(write(tmp_path, {**PLAIN, "task": "classification"}))
    assert loaded.task.name == named.task.name == "classification"
    assert "task" not in loaded.content() and named.content()["task"] == {"use": "classification"}


def test_metrics_change_no_fingerprint_and_are_told(tmp_path):
    metrics = ["MulticlassCohenKappa", {"use": "MulticlassFBetaScore", "beta": 2.0, "average": "macro"}]
    plain, more = ({**PLAIN, "metrics": some} for some in ([], metrics))
    assert recipes.load(write(tmp_path, plain)).fingerprint == recipes.load(write(tmp_path, more)).fingerprint
    result = train(tmp_path, more)
    kappa, beta = result.test["MulticlassCohenKappa"], result.test["MulticlassFBetaScore_beta=2.0_average=macro"]
    assert -1 <= kappa <= 1 and 0 <= beta <= 1


TAGS = '''
"""Several labels an image."""

import kdkit
import torch
from PIL import Image
import torch.nn.functional as F


class Tags(kdkit.Task):
    """K labels that do not exclude each other."""

    name = "tags"
    rows_are = "labels"
    default_loss = "tag_entropy"

    def check(self, info):
        pass

    def targets(self, values, info, whose):
        try:
            found = torch.as_tensor(values).float()
        except (TypeError, ValueError, RuntimeError):
            raise kdkit.DataError(f"{whose} are no numbers") from None
        if found.ndim != 2:
            raise kdkit.DataError(f"{whose} are no rows of labels")
        return found

    def random_targets(self, info, index):
        return ((index[:, None] + torch.arange(info.outputs, device=index.device)) % 2).float()

    def as_targets(self, answer):
        return (answer.logits > 0).float()

    def scores(self, info):
        from torchmetrics.classification import MultilabelAccuracy

        build = lambda: MultilabelAccuracy(info.outputs, average="micro")
        return [kdkit.Score(name="accuracy", title="accuracy", unit="%", scale=100.0, build=build, sees=self.seen, meaning="labels that are right")]

    def metric_arguments(self, info):
        return {"task": "multilabel", "num_labels": info.outputs}


class Entropy(kdkit.Loss):
    """Binary cross-entropy.

    Formula: -(y log sigmoid(z) + (1 - y) log sigmoid(-z)), mean over the batch and the labels.
    """

    name = "tag_entropy"
    knowledge = "labels"
    tasks = {"tags"}

    def forward(self, student, teacher, batch):
        return F.binary_cross_entropy_with_logits(student.logits, batch.labels)


class Shops(kdkit.DatasetSource):
    """Noise with three tags, one after the other."""

    name = "shops"
    task = "tags"

    def info(self):
        return kdkit.DataInfo((3, 8, 8), outputs=3, num_train=24, num_test=13)

    def split(self, part):
        return Shelf(24 if part == "train" else 13)


class Shelf:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, seed, workers, batch_size):
        from torchvision.transforms.functional import to_pil_image

        for i in range(self.count):
            yield to_pil_image(torch.full((3, 8, 8), 9 * i % 255, dtype=torch.uint8)), torch.tensor([i % 2, i % 5 < 2, i % 3 == 0])


@kdkit.hookimpl
def kdkit_tasks():
    return [Tags]


@kdkit.hookimpl
def kdkit_losses():
    return [Entropy]


@kdkit.hookimpl
def kdkit_datasets():
    return [Shops]
'''


@pytest.fixture
def tags(tmp_path):
    """A recipe of several labels an image, that come one by one from a stream."""
    (tmp_path / "tags.py").write_text(TAGS)
    data = {"dataset": {"use": "shops"}, "batch_size": 8}
    losses = [{"use": "tag_entropy"}, {"use": "binary_kd", "target": "sigmoid"}]
    return {**PLAIN, "plugins": ["tags.py"], "data": data, "losses": losses, "metrics": ["MultilabelAUROC"]}


def test_scores_do_not_depend_on_the_size_of_batches(tmp_path, tags):
    found = [train(tmp_path, merged(tags, {"data": {"eval_batch_size": size}}), f"run{size}").test for size in (1, 13)]
    assert set(found[0]) == {"accuracy", "MultilabelAUROC"}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], abs=1e-4), name


def test_a_softmax_over_labels_is_refused(tmp_path, tags):
    with pytest.raises(kdkit.RecipeError, match=r"losses\.1\.use: 'binary_kd' is for classes, and task 'tags' has rows of labels"):
        recipes.load(write(tmp_path, {**tags, "losses": [{"use": "tag_entropy"}, {"use": "binary_kd"}]}))


def test_teachers_of_labels_are_combined_by_their_sigmoids(tmp_path, tags):
    loaded = recipes.load(write(tmp_path, tags))
    check_task(loaded.task)
    answers = [Outputs(torch.tensor([[8.0, -2.0]])), Outputs(torch.tensor([[-2.0, -2.0]]))]
    mean = torch.stack([answer.logits.sigmoid() for answer in answers]).mean(0)
    torch.testing.assert_close(loaded.task.combined(answers).logits.sigmoid(), mean)
    torch.testing.assert_close(loaded.task.combined(answers, "logits").logits, torch.tensor([[3.0, -2.0]]))


def test_a_finished_run_that_lacks_a_metric_says_so(tmp_path, capsys):
    train(tmp_path)
    path = write(tmp_path, {**PLAIN, "metrics": ["MulticlassCohenKappa"]})
    kdkit.train(path, folder=tmp_path / "run", quiet=True)
    assert "was trained without MulticlassCohenKappa; `kdkit evaluate` with `metrics=[MulticlassCohenKappa]` counts it" in " ".join(
        capsys.readouterr().out.split()
    )


WITHIN = '''
"""A metric with an option."""

import kdkit
from pydantic import Field
from torchmetrics import MeanMetric


class Within(kdkit.MetricSource):
    """Share of samples at most n classes off."""

    name = "within"
    tasks = "any"

    class Options(kdkit.MetricOptions):
        n: int = Field(default=1, ge=0, description="How far.")

    def score(self, task, info):
        sees = lambda rows: (((rows.answer.argmax(1) - rows.target).abs() <= self.options.n).float(),)
        return kdkit.Score(name="within", title="within", build=MeanMetric, sees=sees, meaning="share")


@kdkit.hookimpl
def kdkit_metrics():
    return [Within]
'''


def test_a_metric_plugin_is_counted_and_its_options_are_checked(tmp_path):
    (tmp_path / "within.py").write_text(WITHIN)
    recipe = {**PLAIN, "plugins": ["within.py"], "metrics": [{"use": "within", "n": 5}]}
    assert train(tmp_path, recipe).test["within"] == 1.0
    with pytest.raises(kdkit.RecipeError, match=r"metrics\.0\.n: input should be greater than or equal to 0$"):
        checks.make(recipes.load(write(tmp_path, {**recipe, "metrics": [{"use": "within", "n": -1}]})))
