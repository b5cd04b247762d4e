"""What teacher and data mean by classes and tokens is compared before anything is trained."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_texts import BERT, WORDS, lay_out, tokenizer
from small_texts import recipe as text_recipe
from small_texts import write as write_texts
from test_data import Held
from test_data import data as held_data

from kdkit import recipe
from kdkit.contracts.dataset_source import DataInfo, InMemory
from kdkit.contracts.model_source import Meaning
from kdkit.errors import DataError, ModelError, RecipeError
from kdkit.runs import checks, training
from kdkit.runs.meaning import other_class_names, refuse_other_meaning

CATS = ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (Meaning(("dog", "cat", "eel")), "has the classes in another order: class 0 is 'dog' there and 'cat' in the data"),
        (Meaning(("cat", "cow", "dog")), "class 1 is 'cow' there and 'dog' in the data"),
        (Meaning(tokenizer="b"), "has another tokenizer than the data"),
        (Meaning(num_tokens=30), "knows 30 tokens, and the data's tokenizer has 40"),
    ],
    ids=["another order", "one more before it", "tokenizer", "too few tokens"],
)
def test_other_classes_or_tokens_are_refused(theirs, says):
    with pytest.raises(ModelError, match=says):
        refuse_other_meaning(theirs, DataInfo((8,), 3, 9, 9, CATS, (), "a", 40), "teacher")


@pytest.mark.parametrize(
    "theirs",
    [Meaning(), Meaning(CATS, "a", 40), Meaning(("Katze", "Hund", "Aal")), Meaning(num_tokens=41)],
    ids=["unknown", "equal", "translated", "more tokens"],
)
def test_unnamed_classes_and_tokens_are_accepted(theirs):
    refuse_other_meaning(theirs, DataInfo((8,), 3, 9, 9, CATS, (), "a", 40), "teacher")
    assert other_class_names(theirs, DataInfo((8,), 3, 9, 9, CATS)) == ("Katze" if theirs.class_names[:1] == ("Katze",) else "")


def folders(root, names, count=4):
    """Class folders of small pictures, in a training and a test part."""
    for part in ("train", "test"):
        for number, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (40 * number, 20 * i, 0)).save(root / part / name / f"{i}.png")
    return {"dataset": {"use": "image_folder", "root": str(root)}, "image_size": 8, "batch_size": 4, "workers": 0}


def write(folder, data, name, **changes):
    content = {
        "name": name, "data": data, "student": {"model": "mlp/8"}, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}],
        "train": {"epochs": 1, "optimizer": {"lr": 0.1}}, "run": {"folder": str(folder / "runs")}, **changes,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path


TAUGHT = {"schedule": {"use": "offline"}, "losses": [{"use": "logit_kl"}]}


def test_a_teacher_of_a_recipe_with_other_classes(tmp_path):
    write(tmp_path, folders(tmp_path / "theirs", ("ant", "cat", "dog")), "teacher")
    student = write(tmp_path, folders(tmp_path / "ours", CATS), "student", teacher={"recipe": "teacher.yaml"}, **TAUGHT)
    with pytest.raises(
        RecipeError, match=r"student.yaml:1: teacher: the teacher of teacher.yaml has the classes in another order"
    ) as raised:
        checks.make(recipe.load(student))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("file", "key"), [("run.json", "data"), ("config.json", "kdkit")])
def test_a_checkpoint_in_a_run_or_an_export_with_other_classes(tmp_path, file, key):
    shapes = {"layer1.0.weight": (8, 192), "layer1.0.bias": (8,), "fc.weight": (3, 8), "fc.bias": (3,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / file).write_text(json.dumps({key: {"class_names": ["dog", "cat", "eel"]}}))
    teacher = {"model": "mlp/8", "checkpoint": str(tmp_path / "model.safetensors")}
    path = write(tmp_path, folders(tmp_path / "ours", CATS), "student", teacher=teacher, **TAUGHT)
    with pytest.raises(RecipeError, match="teacher has the classes in another order: class 0 is 'dog' there"):
        checks.make(recipe.load(path))


@pytest.fixture
def texts(tmp_path):
    return lay_out(tmp_path)


def reversed_tokenizer(folder):
    """The same words with other numbers."""
    WORDS.reverse()
    try:
        tokenizer(folder)
    finally:
        WORDS.reverse()


def supervised(folder, name, **dataset):
    """A recipe of the student's network on labels alone."""
    data = {"dataset": {**text_recipe(folder)["data"]["dataset"], **dataset}, "batch_size": 16}
    student = {"model": "hf/bert", "pretrained": False, "config": BERT}
    changes = {"data": data, "student": student, "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
    return write_texts(folder, name, **changes)


@pytest.mark.parametrize("where", ["of a recipe", "in a folder"])
def test_a_teacher_with_another_tokenizer(texts, where):
    if where == "of a recipe":
        reversed_tokenizer(texts / "other")
        supervised(texts, "teacher.yaml", tokenizer=str(texts / "other"))
        teacher = {"recipe": "teacher.yaml"}
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(**{key: value for key, value in BERT.items() if key != "model_type"}, num_labels=151)
        transformers.BertForSequenceClassification(config).save_pretrained(texts / "other")
        reversed_tokenizer(texts / "other")
        teacher = {"model": "hf/./other"}
    losses = [{"use": "logit_kl"}]
    path = write_texts(texts, student={"model": "hf/bert", "pretrained": False, "config": BERT}, teacher=teacher, losses=losses)
    with pytest.raises(RecipeError, match="teacher.* has another tokenizer than the data: the same words are other token ids there"):
        checks.make(recipe.load(path))


def test_a_tokenizer_with_more_ids_than_the_network_knows(texts):
    path = supervised(texts, "recipe.yaml")
    with pytest.raises(RecipeError, match="student: student knows 43 tokens, and the data's tokenizer has 44"):
        checks.make(recipe.load(path, {"student.config.vocab_size": 43}))


def test_a_dataset_of_one_class(tmp_path):
    path = write(tmp_path, folders(tmp_path / "ours", ("cat",)), "alone")
    with pytest.raises(RecipeError, match=r"alone.yaml:1: data.dataset: says 1 class: there must be two to tell apart"):
        checks.make(recipe.load(path))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("augment", [{}, {"timm_augment": {}}], ids=["plain", "augmented"])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, mode, augment):
    data = {**folders(tmp_path / "ours", CATS), **augment}
    for path in (tmp_path / "ours").rglob("*.png"):
        Image.new(mode, (8, 8), 1000).save(path if mode == "I;16" else path.with_suffix(".tiff"))
    with pytest.raises(DataError, match="its pixels are not of 8 bits"):
        training.train(recipe.load(write(tmp_path, data, "wide")), quiet=True)


def test_pixels_from_0_to_1_are_refused():
    class Binary(Held):
        def split(self, part):
            held = super().split(part)
            return InMemory(held.images // 128, held.labels)

    with pytest.raises(DataError, match="no pixel is above 1, but they are taken as 0 to 255"):
        held_data(Binary)


def test_a_teacher_that_is_worse_here_than_on_its_own_test_data(tmp_path, capsys):
    """Its classes have the same names, and other pictures."""
    data = folders(tmp_path / "theirs", CATS)
    write(tmp_path, data, "teacher", train={"epochs": 30, "optimizer": {"lr": 0.1}})
    ours = {**data, "dataset": {"use": "image_folder", "root": str(shutil.copytree(tmp_path / "theirs", tmp_path / "ours"))}}
    for part in ("train", "test"):
        (tmp_path / "ours" / part / "cat").rename(tmp_path / "ours" / part / "x")
        (tmp_path / "ours" / part / "eel").rename(tmp_path / "ours" / part / "cat")
        (tmp_path / "ours" / part / "x").rename(tmp_path / "ours" / part / "eel")
    training.train(recipe.load(write(tmp_path, ours, "student", teacher={"recipe": "teacher.yaml"}, **TAUGHT)))
    assert "% on its own: do both mean the same by their classes" in " ".join(capsys.readouterr().out.split())
