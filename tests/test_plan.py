"""`kdkit check`: what a recipe would do, and what of it cannot work, before any data or weight is read."""

import pytest

from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks

GOOD = """\
name: good
data: {dataset: {use: synthetic, train: 96, test: 32, image_size: 32, num_classes: 7}, batch_size: 8, drop_last: false}
student: {model: test_resnet}
teacher: {model: test_vit, input_size: 160}
schedule: {use: offline}
losses:
  - {use: cross_entropy, weight: 0.1}
  - {use: logit_kl, weight: {from: 0, to: 1, epochs: 2}, temperature: 2}
  - use: rkd_distance
    layers: [{student: penultimate, teacher: penultimate}]
train: {epochs: 3, accumulate: 5, optimizer: {lr: 0.1}}
"""


def made(tmp_path, text, **overrides):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return checks.make(recipe.load(path, overrides))


def test_the_plan_of_a_recipe(tmp_path):
    found = made(tmp_path, GOOD)
    assert found.info.image_shape == (3, 32, 32) and found.num_train == 96
    assert found.student.role == "student test_resnet" and found.student.taps == (("penultimate", (96,)),)
    assert found.teachers[0].taps[0][0] == "penultimate" and found.teachers[0].macs > 0
    (stage,) = found.stages
    assert stage.formula == "0.1 * cross_entropy + 0->1 * logit_kl(temperature 2) + 1 * rkd_distance(penultimate ~ penultimate)"
    assert (stage.epochs, stage.steps) == (3, 9)  # 12 batches an epoch, 5 to a step
    assert stage.adapters == ()
    assert any("random" in note for note in found.notes)


def test_the_plan_counts_parameters_and_macs(tmp_path):
    text = GOOD.replace("test_resnet", "mlp/20").replace("penultimate, teacher", "logits, teacher")
    found = made(tmp_path, text)
    inputs = 3 * 32 * 32
    assert found.student.parameters == (inputs + 1) * 20 + 21 * 7
    assert found.student.macs == inputs * 20 + 20 * 7


def test_the_plan_names_adapters_with_their_parameters(tmp_path):
    text = GOOD.replace("rkd_distance", "hint").replace(
        "{student: penultimate, teacher: penultimate}", "{student: stage2, teacher: penultimate}"
    )
    with pytest.raises(RecipeError, match="losses.2: "):
        made(tmp_path, text)
    text = GOOD.replace("use: rkd_distance", "use: hint\n    adapter: linear").replace("test_vit, input_size: 160", "test_resnet")
    ((name, parts, parameters),) = made(tmp_path, text).stages[0].adapters
    assert name == "hint" and "Linear" in parts and parameters >= 96 * 96


def test_the_plan_counts_subsets_and_dropped_batches(tmp_path):
    found = made(tmp_path, GOOD, **{"data.train_samples": 50, "data.validation": 10, "data.drop_last": True, "train.accumulate": 1})
    assert found.num_train in (40, 50)  # validation images are taken from the chosen ones, or beside them
    assert found.stages[0].steps == 3 * (found.num_train // 8)


BAD = {  # what is replaced, by what; the line; what the message says
    "layer": ("student: penultimate", "student: layr1", 10, "losses.2.layers.0: there is no layer 'layr1'; did you mean 'layer1'?"),
    "stage": ("teacher: penultimate", "teacher: stage99", 10, "losses.2.layers.0: there is no layer 'stage99'"),
    "glob": ("student: penultimate", "student: 'layer*'", 10, "losses.2.layers.0: 'layer*' is 4 student layers"),
    "model": ("test_resnet", "test_resnot", 3, "student.model: timm has no model 'test_resnot'; did you mean"),
    "shape": ("use: rkd_distance", "use: at", 9, "losses.2: at: student 'penultimate' (B, "),
    "batch": ("batch_size: 8", "batch_size: 800", 2, "data.batch_size: 800 is more than the 96 training images"),
    "size": ("test_vit, input_size: 160", "test_vit, input_size: 7", 4, "teacher: "),
    "mlp": ("test_vit, input_size: 160", "mlp/abc", 4, "teacher.model: 'abc' is no list of hidden sizes"),
    "optimizer": ("lr: 0.1", "lr: 0.1, name: sgdd", 11, "did you mean 'sgd'?"),
    "device": ("epochs: 3", "epochs: 3, device: 'cuda:99'", 11, "train.device: this machine has no 'cuda:99'; it has cpu"),
    "tracker": (
        "train: {",
        "run: {trackers: [tensorbord]}\ntrain: {",
        11,
        "run.trackers.0: unknown 'tensorbord'; did you mean 'tensorboard'? allowed: ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_check_tells_what_cannot_work_with_its_place(tmp_path, case):
    old, new, line, says = BAD[case]
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, GOOD.replace(old, new, 1))
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/r.yaml:{line}: ") and says in told, told


def test_check_tells_several_problems_at_once(tmp_path):
    text = GOOD.replace("student: penultimate", "student: layr1").replace("teacher: penultimate", "teacher: layr2")
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text.replace("  - use: rkd", "  - {use: sp, layers: [{student: nothing, teacher: stage1}]}\n  - use: rkd"))
    assert len(str(caught.value).splitlines()) == 2


def test_check_tells_class_counts_that_differ(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n\ndef net(num_classes):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))\n"
    )
    text = (
        GOOD.replace("{model: test_vit, input_size: 160}", "{model: python/net, file: net.py}")
        .replace("rkd_distance", "sp")
        .replace("teacher: penultimate", "teacher: '1'")
    )
    with pytest.raises(RecipeError, match=r"r.yaml:4: teacher: .*gives \(4, 10\).*7 classes"):
        made(tmp_path, text)


def test_check_of_a_teacher_recipe_of_other_classes(tmp_path):
    head, losses = GOOD.index("losses:"), GOOD.index("train: {epochs")
    alone = GOOD[:head] + "losses: [{use: cross_entropy}]\n" + GOOD[losses:]
    alone = alone.replace("num_classes: 7", "num_classes: 5").replace("teacher: {model: test_vit, input_size: 160}\n", "")
    (tmp_path / "t.yaml").write_text(alone.replace("offline", "supervised"))
    with pytest.raises(RecipeError, match="r.yaml:4: teacher.*5 classes, this recipe's data has 7"):
        made(tmp_path, GOOD.replace("{model: test_vit, input_size: 160}", "{recipe: t.yaml}"))


def test_check_tells_a_faulty_plugin_with_its_place(tmp_path):
    (tmp_path / "mine.py").write_text('''
import kdkit


class Mine(kdkit.Loss):
    """Fails."""

    name = "mine"
    knowledge = "response"

    def forward(self, student, teacher, batch):
        return student.logits @ teacher.logits


@kdkit.hookimpl
def kdkit_losses():
    return [Mine]
''')
    with pytest.raises(RecipeError, match="r.yaml:8: losses.1: fails on the models' shapes: RuntimeError"):
        made(
            tmp_path,
            GOOD.replace("use: logit_kl, weight: {from: 0, to: 1, epochs: 2}, temperature: 2", "use: mine") + "plugins: [mine.py]\n",
        )


def test_check_tells_a_checkpoint_that_is_none(tmp_path):
    (tmp_path / "weights.pt").write_text("nothing")
    with pytest.raises(RecipeError, match="r.yaml:3: student.checkpoint: .*weights.pt"):
        made(tmp_path, GOOD.replace("{model: test_resnet}", "{model: test_resnet, checkpoint: weights.pt}"))
