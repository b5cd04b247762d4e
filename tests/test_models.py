import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import kdkit
from kdkit.models.build import build_model, load_checkpoint
from kdkit.models.weight_files import read_weights


class Grid(nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, x):
        self.seen = x
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


class GridSource(kdkit.ModelSource):
    """A small network."""

    name = "grid"
    channels, own, loaded = 3, None, False

    def build(self, num_classes, image_shape):
        self.shape = image_shape
        return Grid(image_shape[0], num_classes)

    def load(self, module):
        self.loaded = True

    def normalization(self, module):
        return self.own

    def in_channels(self, image_channels):
        return self.channels


def grid(**options):
    return GridSource(kdkit.ModelOptions(model="grid/x", **options), "x")


def build(source, shape=(3, 8, 8), **more):
    return build_model(source.options, source, 5, shape, role="student x", **more)


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return {key: value.clone() for key, value in Grid(3, 5).state_dict().items()}


def same(module, weights):
    return all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


def test_images_arrive_as_the_network_expects():
    source = grid()
    source.own = kdkit.Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model = build(source, layers=["conv", "penultimate"])
    out = model(X)
    expected = (X - torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)) / torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)
    torch.testing.assert_close(model.module.seen, expected)
    assert out.features["penultimate"].shape == (2, 4)
    assert source.loaded
    assert (model.input_shape, model.role) == ((3, 8, 8), "student x")


def test_recipe_overrides_normalisation_and_size():
    source = grid(normalize={"mean": [0.5], "std": [0.25]}, input_size=4, interpolation="nearest")
    source.own = kdkit.Normalize(mean=(0.1,) * 3, std=(0.5,) * 3)
    model = build(source)
    model(X)
    assert source.shape == model.input_shape == (3, 4, 4)
    torch.testing.assert_close(model.module.seen, (X[..., ::2, ::2] - 0.5) / 0.25)


def test_number_of_channels_is_adapted():
    source = grid()
    source.own = kdkit.Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    model = build(source, (1, 8, 8))
    model(X[:, :1])
    assert model.module.seen.shape == (2, 3, 8, 8)
    source.channels = 1
    model = build(source, (1, 8, 8))
    model(X[:, :1])
    torch.testing.assert_close(model.module.seen, (X[:, :1] - 0.2) / 0.5)  # one value stands for the three
    with pytest.raises(kdkit.ModelError, match="student x: images have 4 channels, the network takes 1"):
        build(source, (4, 8, 8))
    with pytest.raises(kdkit.ModelError, match="2 means and 3 deviations for 1 channels"):
        build_model(kdkit.ModelOptions(model="grid/x", normalize={"mean": [0.1] * 2, "std": [0.2] * 3}), source, 5, (1, 8, 8))


def test_meta_device_reads_nothing(tmp_path):
    source = grid(checkpoint=str(tmp_path / "absent.pt"))
    model = build(source, layers=["conv"], weights=False)
    assert all(value.is_meta for value in (*model.module.parameters(), *model.module.buffers(), *model.adapt.buffers()))
    assert not source.loaded
    assert model(X.to("meta")).features["conv"].shape == (2, 4, 8, 8)


def test_same_seed_gives_the_same_network():
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(build(grid()).module)
    assert same(networks[0], networks[1].state_dict())


def test_a_run_s_file_takes_the_place_of_the_recipes_weights(tmp_path, weights):
    save_file(weights, tmp_path / "student.safetensors")
    source = grid(checkpoint=str(tmp_path / "absent.pt"), strip_prefix="conv")
    model = build(source, file=tmp_path / "student.safetensors", device=torch.device("cpu"))
    assert same(model.module, weights)
    assert not source.loaded


@pytest.mark.parametrize(
    "nest", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": {"state_dict": w}}, lambda w: {"state_dict_ema": w}]
)
def test_torch_checkpoints(tmp_path, weights, nest):
    torch.save(nest(weights), tmp_path / "w.pt")
    assert same(build(grid(checkpoint=str(tmp_path / "w.pt"))).module, weights)


def test_prefix_of_a_checkpoint_is_stripped_or_suggested(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_file({f"module.net.{key}": value for key, value in weights.items()}, path)
    assert same(build(grid(checkpoint=str(path), strip_prefix="module.net.")).module, weights)
    assert same(build(grid(checkpoint=str(path))).module, weights)  # all keys have it, and fit without
    save_file({**{f"module.net.{key}": value for key, value in weights.items()}, "margin": torch.ones(1)}, path)
    with pytest.raises(kdkit.ModelError) as caught:
        build(grid(checkpoint=str(path)))
    assert str(caught.value) == (
        f"student x: {path} does not fit: 8 keys missing (conv.weight, conv.bias, bn.weight, ...); "
        "10 keys unexpected (margin, module.net.bn.bias, module.net.bn.num_batches_tracked, ...); "
        "with `strip_prefix: module.net.` 9 of 9 keys would fit"
    )


def test_a_source_knows_other_names_of_its_layers(tmp_path, weights):
    class Renaming(GridSource):
        def rename(self, key, module):
            assert isinstance(module, Grid)
            return key.replace("linear.", "head.")

    other = {f"module.{key.replace('head.', 'linear.')}": value for key, value in weights.items()}
    torch.save(other, tmp_path / "other.pt")
    torch.save({**other, "module.head.bias": weights["head.bias"]}, tmp_path / "both.pt")
    save_file(weights, tmp_path / "own.safetensors")

    def load(file, prefix="module."):
        options = kdkit.ModelOptions(model="grid/x", checkpoint=tmp_path / file, strip_prefix=prefix)
        return build(Renaming(options, "x")).module

    assert same(load("other.pt"), weights) and same(load("own.safetensors", ""), weights)
    with pytest.raises(kdkit.ModelError, match="both.pt does not fit: several of its keys mean 'head.bias'"):
        load("both.pt")


def test_misfits_of_a_checkpoint_are_counted_and_change_nothing(tmp_path, weights):
    module = Grid(3, 5)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    wrong = {**weights, "conv.bias": torch.zeros(9), "extra": torch.zeros(1)}
    del wrong["head.bias"], wrong["bn.num_batches_tracked"]
    torch.save(wrong, tmp_path / "w.pt")
    with pytest.raises(
        kdkit.ModelError,
        match=r"1 key missing \(head.bias\); 1 key unexpected \(extra\); 1 key of another shape \(conv.bias \(9,\), not \(4,\)\)$",
    ):
        load_checkpoint(tmp_path / "w.pt", module)
    assert same(module, before)


def test_old_checkpoints_without_batchnorm_counters(tmp_path, weights):
    del weights["bn.num_batches_tracked"]
    torch.save(weights, tmp_path / "w.pt")
    assert torch.equal(build(grid(checkpoint=str(tmp_path / "w.pt"))).module.head.weight, weights["head.weight"])


def test_checkpoint_with_a_classifier_of_other_classes(tmp_path):
    torch.save(Grid(3, 7).state_dict(), tmp_path / "w.pt")
    with pytest.raises(kdkit.ModelError, match=r"w.pt is a classifier \('head'\) of 7 classes, not of 5; `new_head: true` leaves it out"):
        build(grid(checkpoint=str(tmp_path / "w.pt")))
    torch.manual_seed(3)
    fresh = build(grid()).module.state_dict()
    torch.manual_seed(3)
    found = build(grid(checkpoint=str(tmp_path / "w.pt"), new_head=True)).module
    theirs = torch.load(tmp_path / "w.pt")
    assert same(found, {key: fresh[key] if key.startswith("head.") else theirs[key] for key in fresh})


def test_a_new_head_takes_a_file_without_one_and_no_other_misfit(tmp_path, weights):
    save_file({key: value for key, value in weights.items() if not key.startswith("head.")}, tmp_path / "body.safetensors")
    assert torch.equal(build(grid(checkpoint=str(tmp_path / "body.safetensors"), new_head=True)).module.conv.weight, weights["conv.weight"])
    save_file({**weights, "conv.bias": torch.zeros(9)}, tmp_path / "wide.safetensors")
    with pytest.raises(kdkit.ModelError, match=r"wide.safetensors does not fit: 1 key of another shape \(conv.bias \(9,\)"):
        build(grid(checkpoint=str(tmp_path / "wide.safetensors"), new_head=True))


def test_a_new_head_needs_a_checkpoint_and_a_classifier(tmp_path):
    with pytest.raises(ValueError, match="new_head leaves a checkpoint's classifier out, but there is no `checkpoint`"):
        kdkit.ModelOptions(model="grid/x", new_head=True)

    class Headless(GridSource):
        def build(self, num_classes, image_shape):
            return nn.Sequential(nn.Conv2d(image_shape[0], num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    options = kdkit.ModelOptions(model="grid/x", checkpoint=tmp_path / "absent.pt", new_head=True)
    with pytest.raises(kdkit.ModelError, match="^student x: new_head: this network has no single linear classifier") as caught:
        build(Headless(options, "x"), weights=False)
    assert "\n" not in str(caught.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_never_runs(tmp_path, weights):
    torch.save({**weights, "bomb": Bomb(tmp_path / "boom")}, tmp_path / "w.pt")
    with pytest.raises(kdkit.ModelError, match="code in a file is never run"):
        build(grid(checkpoint=str(tmp_path / "w.pt")))
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "boom").exists()  # it would have


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.pt", b"junk", "w.pt: "),
        ("w.pt", b"", "w.pt: "),
        ("w.safetensors", b"junk", "w.safetensors: cannot be read"),
        ("w.pt", {"epoch": 3}, "holds no weights"),
        ("w.pt", [1, 2], "holds no weights"),
        ("w.pt", None, "no such checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, name, content, says):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(kdkit.ModelError, match=says) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
