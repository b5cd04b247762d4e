"""What teacher and data mean by classes and tokens is compared before anything is trained."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_texts import BERT, WORDS, lay_out, tokenizer
from small_texts import recipe as text_recipe
from small_texts import write as write_texts

from kdkit import plan, recipe
from kdkit.dataset_source import DataInfo
from kdkit.errors import ModelError, RecipeError
from kdkit.meaning import other_class_names, refuse_other_meaning
from kdkit.providers import Meaning

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
def test_what_differs_is_refused(theirs, says):
    with pytest.raises(ModelError, match=says):
        refuse_other_meaning(theirs, DataInfo((8,), 3, 9, 9, CATS, (), "a", 40), "teacher")


@pytest.mark.parametrize(
    "theirs",
    [Meaning(), Meaning(CATS, "a", 40), Meaning(("Katze", "Hund", "Aal")), Meaning(num_tokens=41)],
    ids=["unknown", "equal", "translated", "more tokens"],
)
def test_what_may_be_is_left_alone(theirs):
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
        plan.make(recipe.load(student))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("file", "key"), [("run.json", "data"), ("config.json", "kdkit")])
def test_a_checkpoint_in_a_run_or_an_export_with_other_classes(tmp_path, file, key):
    save_file({"1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / file).write_text(json.dumps({key: {"class_names": ["dog", "cat", "eel"]}}))
    teacher = {"model": "mlp/8", "checkpoint": str(tmp_path / "model.safetensors")}
    path = write(tmp_path, folders(tmp_path / "ours", CATS), "student", teacher=teacher, **TAUGHT)
    with pytest.raises(RecipeError, match="teacher has the classes in another order: class 0 is 'dog' there"):
        plan.make(recipe.load(path))


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
        plan.make(recipe.load(path))


def test_a_tokenizer_with_more_ids_than_the_network_knows(texts):
    path = supervised(texts, "recipe.yaml")
    with pytest.raises(RecipeError, match="student: student knows 43 tokens, and the data's tokenizer has 44"):
        plan.make(recipe.load(path, {"student.config.vocab_size": 43}))
