"""Shapes of images and texts, and random inputs of them."""

import pytest
import torch

from kdkit.contracts.inputs import TextShape, first_tensor, kind_of, moved, parse_shape, random_inputs, rows
from kdkit.errors import ModelError


def test_random_images_are_in_0_1_and_the_same_each_time():
    torch.manual_seed(1)
    images = random_inputs((3, 4, 5), 2)
    torch.manual_seed(2)
    assert images.shape == (2, 3, 4, 5) and images.min() >= 0 and images.max() < 1
    assert torch.equal(images, random_inputs((3, 4, 5), 2)) and not torch.equal(images, random_inputs((3, 4, 5), 2, seed=1))


def test_random_texts_are_of_full_length():
    texts = random_inputs(TextShape((7,)), 3)
    assert texts["input_ids"].shape == (3, 7) and texts["input_ids"].min() > 0 and texts["attention_mask"].eq(1).all()


def test_texts_without_data_have_no_mask():
    assert list(random_inputs(TextShape((7,)), 3, "meta")) == ["input_ids"]


@pytest.mark.parametrize(("shape", "kind"), [((3, 4, 5), "images"), (TextShape((7,)), "texts")])
def test_operations_on_images_and_texts(shape, kind):
    inputs = random_inputs(shape, 3)
    assert kind_of(shape) == kind and len(first_tensor(inputs)) == 3
    chosen = rows(inputs, torch.tensor([2, 0]))
    assert torch.equal(first_tensor(chosen), first_tensor(inputs)[[2, 0]])
    assert first_tensor(moved(inputs, torch.device("meta"))).is_meta


def test_a_shape_is_parsed():
    assert parse_shape("3,32,48") == (3, 32, 48) and parse_shape("12") == (12,)
    for wrong in ("3,32", "a", "0", "3,32,", ""):
        with pytest.raises(ModelError, match="--size: .* is not of the form C,H,W, such as 3,224,224, nor a whole number"):
            parse_shape(wrong)
