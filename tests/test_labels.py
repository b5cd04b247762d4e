"""What a dataset says of its samples and what it gives: told in one line where the two differ, at `check` where that is cheap."""

import pytest
import torch
from training import PLAIN, merged, task, train, write

import kdkit
from kdkit import recipe as recipes
from kdkit.errors import DataError
from kdkit.runs import checks

DATASET = '''
import torch
import kdkit


class Streamed:
    def __len__(self):
        return 24

    def read(self, seed, workers, batch_size):
        from torchvision.transforms.functional import to_pil_image
        for label in LABELS[:24]:
            yield to_pil_image(torch.zeros(3, 8, 8, dtype=torch.uint8)), label


class Mine(kdkit.DatasetSource):
    """Images of one colour."""

    name = "mine"
    split_at_check = AT_CHECK

    def info(self):
        return kdkit.DataInfo((3, 8, 8), 6, 24, 24)

    def split(self, part):
        return SPLIT


@kdkit.hookimpl
def kdkit_datasets():
    return [Mine]
'''
IN_MEMORY = "kdkit.InMemory(torch.zeros(len(LABELS), 3, 8, 8, dtype=torch.uint8), LABELS)"
GOOD = "torch.arange(24) % 6"


def mine(folder, labels=GOOD, split=IN_MEMORY, at_check=True):
    """A recipe on a dataset with these labels."""
    text = DATASET.replace("SPLIT", split).replace("LABELS", f"({labels})").replace("AT_CHECK", str(at_check))
    (folder / "mine.py").write_text(text)
    data = {"dataset": {"use": "mine"}, "batch_size": 8, "eval_batch_size": 8}
    return {**PLAIN, "plugins": ["mine.py"], "data": data}


def said(function, *arguments):
    with pytest.raises(kdkit.KdkitError) as told:
        function(*arguments)
    assert "\n" not in str(told.value)
    return str(told.value)


def checked(folder, recipe):
    return checks.make(recipes.load(write(folder, recipe)))


WRONG = {
    "regression": ("torch.linspace(-1, 1, 24)", "training labels are torch.float32 (-1.0, "),
    "whole floats": ("torch.arange(24.0) % 6", "a label is one whole number from 0 to 5"),
    "tags": ("torch.zeros(24, 6)", "training labels have the shape (24, 6); a label is one whole number from 0 to 5"),
    "too large": ("torch.arange(24) % 7", "training labels go from 0 to 6, but there are 6 classes"),
    "negative": ("torch.arange(24) % 7 - 1", "training labels go from -1 to 5, but there are 6 classes"),
    "too few": ("torch.arange(12) % 6", "says that it has 24 training samples, and gives 12"),
    "too many": ("torch.arange(36) % 6", "says that it has 24 training samples, and gives 36"),
    "broken": ("torch.arange(24) % nothing", "split('train') fails: NameError: name 'nothing' is not defined"),
}


@pytest.mark.parametrize("case", WRONG)
def test_check_tells_what_is_wrong_with_labels_in_one_line(tmp_path, case):
    labels, says = WRONG[case]
    told = said(checked, tmp_path, mine(tmp_path, labels))
    assert "data.dataset: dataset 'mine'" in told and says in told, told


@pytest.mark.first(1)
@pytest.mark.parametrize("case", ["regression", "too few", "broken"])
def test_train_tells_wrong_labels_where_check_may_not_look(tmp_path, case):
    labels, says = WRONG[case]
    recipe = mine(tmp_path, labels, at_check=False)
    checked(tmp_path, recipe)
    assert says in said(train, tmp_path, recipe)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("labels", "says"),
    [("[0.5] * 24", "labels are torch.float32 (0.5, "), ("[6] * 24", "go from 6 to 6"), ("torch.zeros(24, 6)", "have the shape (8, 6)")],
)
def test_labels_of_a_stream_are_told_on_the_first_batch(tmp_path, labels, says):
    assert says in said(train, tmp_path, mine(tmp_path, labels, "Streamed()"))


def test_sound_labels_pass_in_every_form():
    info = kdkit.DataInfo((3, 8, 8), 3, 2, 2)
    whole = torch.tensor([0, 2])
    for labels in (whole, [0, 2], whole.to(torch.uint8), whole.numpy(), [*whole]):
        assert torch.equal(task().targets(labels, info, "labels"), whole)
    with pytest.raises(DataError, match="are no numbers"):
        task().targets(["cat", "dog"], info, "labels")


SINGLE = {
    "batch_size 1": ({"batch_size": 1}, "every batch is a single image"),
    "a rest of 1": ({"train_samples": 17, "drop_last": False}, "the last of 17 images in batches of 8 is a single image"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_single_images_are_refused_where_batchnorm_sees_one_value(tmp_path, case):
    data, says = SINGLE[case]
    recipe = merged(PLAIN, {"data": data})  # a ResNet, whose last maps of 8 x 8 images have one position
    assert says in said(checked, tmp_path, recipe)


@pytest.mark.parametrize("case", SINGLE)
def test_single_images_are_fine_without_such_a_layer(tmp_path, case):
    data, _ = SINGLE[case]
    recipe = {**merged(PLAIN, {"data": data}), "student": {"model": "mlp/8"}}
    checked(tmp_path, recipe)
    larger = merged(PLAIN, {"data": {**data, "dataset": {"image_size": 32}}})
    checked(tmp_path, larger)


def test_one_class_is_refused(tmp_path):
    recipe = mine(tmp_path)
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("(3, 8, 8), 6", "(3, 8, 8), 1"))
    assert "data.dataset: says 1 class: " in said(checked, tmp_path, recipe)


def test_two_training_images_are_enough(tmp_path):
    data = {"train_samples": 2, "validation": 1, "batch_size": 1, "dataset": {"image_size": 32, "train": 12, "test": 4}}
    recipe = merged(PLAIN, {"data": data, "train": {"epochs": 1}})
    assert train(tmp_path, recipe).epochs == 1
