"""What a recipe may say of a teacher works in a run, alone and together."""

import pytest

import kdkit
from kdkit.errors import RecipeError

RECIPE = """\
name: teacher
data: {dataset: {use: synthetic, train: 24, test: 8, image_size: 32, channels: 1}, batch_size: 8, workers: 0}
student: {model: test_resnet, args: {in_chans: 1}}
teacher: {model: test_resnet, args: {in_chans: 3}%s}
schedule: {use: offline}
losses: [{use: cross_entropy}, {use: logit_kl}, {use: hint, layers: [{student: stage1, teacher: stage1}]}]
train: {epochs: 1, optimizer: {lr: 0.01}}
"""


@pytest.mark.parametrize(
    "said",
    [
        "precision: fp32",
        "precision: bf16",
        "mode: train",
        "fold_batchnorm: true",
        "input_size: 48, interpolation: bicubic",
        "input_size: 48, precision: bf16, fold_batchnorm: true",
        "precision: fp32, mode: train",
    ],
)
def test_a_teacher_so_described_teaches(tmp_path, said):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE % f", {said}")
    result = kdkit.train(path, folder=tmp_path / "run", quiet=True)
    assert result.teacher is not None and 0 <= result.test["kl_to_teacher"] < 100


def test_a_loss_that_is_never_used_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text((RECIPE % "").replace("teacher: {model: test_resnet, args: {in_chans: 3}}\n", "").replace("offline", "supervised"))
    with pytest.raises(RecipeError, match="r.yaml:5: losses.1: 'logit_kl' is never used"):
        kdkit.check(path)


def test_a_recipe_that_teaches_itself_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text((RECIPE % "").replace("teacher: {model: test_resnet, args: {in_chans: 3}}", "teacher: {recipe: r.yaml}"))
    with pytest.raises(RecipeError, match="r.yaml:4: teacher.recipe: r.yaml has this recipe among its own teachers"):
        kdkit.check(path)


def test_a_misspelt_key_beside_recipe_says_what_is_allowed(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        (RECIPE % "").replace("teacher: {model: test_resnet, args: {in_chans: 3}}", "teacher: {recipe: t.yaml, precison: bf16}")
    )
    with pytest.raises(RecipeError, match="teacher.precison: no such key; did you mean 'precision'"):
        kdkit.check(path)


def test_a_last_batch_of_one_image_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text((RECIPE % "").replace("train: 24", "train: 25").replace("workers: 0", "workers: 0, drop_last: false"))
    with pytest.raises(RecipeError, match="r.yaml:2: data.drop_last: the last of 25 images"):
        kdkit.check(path)


def test_words_among_an_optimizers_arguments_are_plain_words(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text((RECIPE % "").replace("optimizer: {lr: 0.01}", "optimizer: {lr: 0.01, args: {word: a, more: [b, {c: d}]}}"))
    from kdkit import recipe

    arguments = recipe.load(path).spec.train.optimizer.args
    assert type(arguments["word"]) is str and type(arguments["more"][0]) is str and type(arguments["more"][1]["c"]) is str
