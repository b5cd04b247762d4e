import pytest
import timm
import torch

import kdkit
from kdkit.contracts.features import as_map, as_tokens, as_vectors, pooled_alike, prefix_tokens, resized


@pytest.mark.parametrize(
    ("count", "prefix"),
    [(196, 0), (197, 1), (198, 2), (201, 5), (50, 1), (65, 1), (257, 1), (261, 5), (1374, 5), (1, 0), (2, 1), (15, None), (24, None)],
)
def test_prefix_tokens_before_the_patches(count, prefix):
    assert prefix_tokens(count) == prefix


def test_tokens_fold_row_by_row_without_their_prefix():
    patches = torch.arange(2 * 9 * 4.0).reshape(2, 9, 4)
    tokens = torch.cat([torch.full((2, 1, 4), -1.0), patches], 1)
    folded = as_map(tokens)
    assert folded.shape == (2, 4, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(folded[:, :, row, column], patches[:, 3 * row + column])
    assert torch.equal(as_tokens(folded), patches)


@pytest.mark.parametrize("f", [torch.rand(2, 15, 4), torch.rand(2, 4), torch.rand(2)])
def test_features_without_positions_are_refused(f):
    with pytest.raises(kdkit.ShapeError):
        as_map(f)


def test_maps_and_tokens_become_vectors_by_their_mean():
    f = torch.rand(2, 5, 4, 4)
    assert torch.equal(as_vectors(f), f.mean((2, 3)))
    assert torch.equal(as_vectors(f[:, :, 0]), f[:, :, 0].mean(1))
    assert torch.equal(as_vectors(f[:, :, 0, 0]), f[:, :, 0, 0])
    with pytest.raises(kdkit.ShapeError):
        as_vectors(torch.rand(2))


def test_map_sizes():
    large, small = torch.rand(1, 2, 8, 6), torch.rand(1, 3, 4, 6)
    one, other = pooled_alike(large, small)
    assert torch.equal(other, small)
    torch.testing.assert_close(one, large.unflatten(2, (4, 2)).mean(3))
    assert resized(large, (8, 6)) is large
    assert resized(large, (3, 3)).shape == (1, 2, 3, 3)


@pytest.mark.parametrize(("name", "layer", "size"), [("test_vit", "stage3", 160), ("swin_tiny_patch4_window7_224", "stage2", 224)])
def test_features_of_real_transformers_are_maps(name, layer, size):
    """A bright corner of the image is bright in that corner of the map."""
    module = timm.create_model(name, num_classes=3).eval()
    tapped = kdkit.taps(module, [layer])
    dark = torch.zeros(1, 3, size, size)
    bright = dark.clone()
    bright[:, :, : size // 4, -size // 4 :] = 5
    with torch.no_grad():
        change = (as_map(tapped(bright).features[layer]) - as_map(tapped(dark).features[layer])).abs().mean((0, 1))
    rows, columns = change.shape
    corner = change[: rows // 4 or 1, -(columns // 4 or 1) :].mean()
    assert rows == columns > 1 and corner > 2 * change[rows // 2 :, : columns // 2].mean()


class TestFormsOfPairs:
    def pair(self, options, f_s, f_t):
        layers = [{"student": "a", "teacher": "a"}]
        student, teacher = (kdkit.Outputs(torch.zeros(2, 3), {"a": f}) for f in (f_s, f_t))
        ((one, other),) = options(layers=layers).pairs(student, teacher)
        return one.shape, other.shape

    def test_adapter_for_any_form(self):
        assert self.pair(kdkit.FeatureOptions, torch.rand(2, 5), torch.rand(2, 7)) == ((2, 5), (2, 7))
        assert self.pair(kdkit.FeatureOptions, torch.rand(2, 10, 5), torch.rand(2, 10, 7)) == ((2, 10, 5), (2, 10, 7))
        assert self.pair(kdkit.FeatureOptions, torch.rand(2, 10, 5), torch.rand(2, 17, 7)) == ((2, 5, 3, 3), (2, 7, 4, 4))
        assert self.pair(kdkit.FeatureOptions, torch.rand(2, 10, 5), torch.rand(2, 7, 8, 8)) == ((2, 5, 3, 3), (2, 7, 8, 8))

    def test_adapter_of_maps(self):
        assert self.pair(kdkit.MapOptions, torch.rand(2, 10, 5), torch.rand(2, 10, 7)) == ((2, 5, 3, 3), (2, 7, 3, 3))

    def test_adapter_of_tokens(self):
        assert self.pair(kdkit.TokenOptions, torch.rand(2, 10, 5), torch.rand(2, 10, 7)) == ((2, 10, 5), (2, 10, 7))
        assert self.pair(kdkit.TokenOptions, torch.rand(2, 10, 5), torch.rand(2, 7, 3, 3)) == ((2, 9, 5), (2, 9, 7))
        with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(2, 10, 5\) and teacher 'a' \(2, 7, 4, 4\) must be equally many"):
            self.pair(kdkit.TokenOptions, torch.rand(2, 10, 5), torch.rand(2, 7, 4, 4))

    def test_adapter_of_vectors(self):
        assert self.pair(kdkit.VectorOptions, torch.rand(2, 10, 5), torch.rand(2, 7, 3, 3)) == ((2, 5), (2, 7))

    def test_adapter_of_embeddings(self):
        assert self.pair(kdkit.RelationOptions, torch.rand(2, 10, 5), torch.rand(2, 7, 3, 3)) == ((2, 50), (2, 63))
