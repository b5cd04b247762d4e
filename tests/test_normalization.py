import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms import Normalize

import kdkit
from kdkit.models.normalization import InputAdapter, NormalizationAdapter

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def images(channels=3, size=6, **options):
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-5)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalization_agrees_with_torchvision(dtype, tolerance, layout):
    raw = images(dtype=torch.float64)
    original = Normalize(*IMAGENET)(raw)
    required = Normalize(*INCEPTION)(raw)
    given_ = original.to(dtype).contiguous(memory_format=layout)
    found = NormalizationAdapter(*IMAGENET, *INCEPTION)(given_)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found.double(), required, rtol=0, atol=tolerance)


def test_unit_range_is_mean_0_std_1():
    torch.testing.assert_close(NormalizationAdapter(0.0, 1.0, *IMAGENET)(images()), Normalize(*IMAGENET)(images()))
    back = NormalizationAdapter(*IMAGENET, 0, 1)(Normalize(*IMAGENET)(images()))
    torch.testing.assert_close(back, images())


def test_uint8_is_read_as_a_share_of_255():
    raw = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = NormalizationAdapter(0.0, 1.0, *IMAGENET)(raw)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Normalize(*IMAGENET)(raw / 255))


channel = st.tuples(st.floats(-1, 1), st.floats(0.1, 2))


@settings(deadline=None)
@given(st.lists(channel, min_size=1, max_size=5))
def test_normalization_from_same_to_same_is_the_identity(values):
    mean, std = zip(*values, strict=True)
    torch.testing.assert_close(NormalizationAdapter(mean, std, mean, std)(images(len(mean))), images(len(mean)), rtol=0, atol=0)


@settings(deadline=None)
@given(st.lists(st.tuples(channel, channel), min_size=1, max_size=5))
def test_normalization_there_and_back_is_the_identity(values):
    one, two = zip(*values, strict=True)
    (mean, std), (mean2, std2) = zip(*one, strict=True), zip(*two, strict=True)
    there = NormalizationAdapter(mean, std, mean2, std2)(images(len(mean)))
    torch.testing.assert_close(NormalizationAdapter(mean2, std2, mean, std)(there), images(len(mean)), rtol=1e-4, atol=1e-4)


def test_grey_is_repeated_for_a_colour_network():
    grey = images(1)
    for mean, std in ((0.0, 1.0), ((0.2,), (0.5,))):
        raw = grey * std if isinstance(std, float) else grey * std[0] + mean[0]
        torch.testing.assert_close(NormalizationAdapter(mean, std, *IMAGENET)(grey), Normalize(*IMAGENET)(raw.repeat(1, 3, 1, 1)))


def test_colour_becomes_luminance_for_a_grey_network():
    raw = images()
    grey = 0.299 * raw[:, :1] + 0.587 * raw[:, 1:2] + 0.114 * raw[:, 2:]
    torch.testing.assert_close(NormalizationAdapter(*IMAGENET, (0.3,), (0.6,))(Normalize(*IMAGENET)(raw)), (grey - 0.3) / 0.6)


def test_normalization_constants_are_neither_parameters_nor_saved():
    adapter = NormalizationAdapter(*IMAGENET, (0.5,), (0.5,))
    assert not list(adapter.parameters())
    assert not adapter.state_dict()
    assert len(list(adapter.buffers())) == 3


@pytest.mark.parametrize(
    ("arguments", "batch", "says"),
    [
        ((*IMAGENET, *INCEPTION), images(1), "1 channels where 3 were announced"),
        ((0.0, 1.0, *IMAGENET), images(4), "4 channels, the network takes 3"),
        ((0.0, 1.0, (0.5,), (0.5,)), images(2), "2 channels, the network takes 1"),
        ((0.0, 1.0, *IMAGENET), images()[0], "shape"),
        ((0.0, 1.0, *IMAGENET), images().long(), "int64"),
    ],
)
def test_normalization_of_images_that_do_not_fit(arguments, batch, says):
    with pytest.raises(kdkit.ModelError, match=says):
        NormalizationAdapter(*arguments)(batch)


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 1.0, 0.0, 0.0), (0.0, (1.0, -1.0), 0.0, 1.0), ((0.0,) * 3, (1.0,) * 4, 0.0, 1.0), ((0.0,) * 3, 1.0, (0.0,) * 4, 1.0)],
)
def test_normalization_values_that_make_no_sense(arguments):
    with pytest.raises(kdkit.ModelError):
        NormalizationAdapter(*arguments)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest", "area"])
def test_adapter_resizes(mode):
    adapter = InputAdapter(NormalizationAdapter(0.0, 1.0, 0.5, 0.5), 4, mode)
    antialias = mode in ("bilinear", "bicubic")
    torch.testing.assert_close(adapter(images(size=9)), (F.interpolate(images(size=9), (4, 4), mode=mode, antialias=antialias) - 0.5) / 0.5)
    assert adapter(images(size=3)).shape == (4, 3, 4, 4)


def test_adapter_leaves_size_and_text_alone():
    adapter = InputAdapter(NormalizationAdapter(0.0, 1.0, 0.0, 1.0), 6)
    assert torch.equal(adapter(images()), images())
    text = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    assert adapter(text) is text
