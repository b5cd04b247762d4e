"""Distilled datasets: methods against second derivations, the file, and runs that train on it."""

import ast

import numpy as np
import pytest
import torch
from kdkit_plugins.distillers._kernels import Standardised, accuracy, factor, ntk, one_hot
from kdkit_plugins.distillers.rded import cropped, mosaics
from torch import nn
from training import PLAIN, merged, train, write

import kdkit
from kdkit import recipe
from kdkit.errors import DataError, RecipeError
from kdkit.models.tapped import TappedModel
from kdkit.recipe import distilled_data, registry
from kdkit.runs.distilling import distill
from kdkit.testing import assert_agrees, random_batch, random_outputs

PLUGINS = registry.load()
ALONE = {
    **PLAIN,
    "teacher": None,
    "schedule": {"use": "supervised"},
    "losses": [{"use": "cross_entropy"}],
    "train": {"epochs": 1, "optimizer": {"lr": 0.05}},
    "data": {**PLAIN["data"], "dataset": {**PLAIN["data"]["dataset"], "train": 120}, "batch_size": 6},
}
OPTIONS = {
    "random": {},
    "label_solve": {},
    "kip": {"steps": 3, "targets": 30},
    "dm": {"steps": 2, "real": 4},
    "rded": {"crops": 2, "tiles": 2},
}


def material(classes=3, count=40, side=8):
    """Classes that a bright corner of their own tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 120, (count, 1, side, side), generator=generator, dtype=torch.uint8)
    for number in range(classes):
        images[labels == number, :, number * 2 : number * 2 + 2, :] += 100

    def student():
        network = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 16), nn.ReLU(), nn.Linear(16, classes))
        return TappedModel(network, ["penultimate"], outputs=classes)

    return kdkit.Material(images, labels, images, labels, classes, student, lambda: student().freeze(), lambda *told: None)


def made(name, **options):
    torch.manual_seed(0)
    method = PLUGINS.distillers[name]
    return method(method.Options(**{**OPTIONS[name], **options})).distill(material())


def drawn_kernel(x, y, layers, draws=1_000_000):
    """The recursion of Jacot et al. for two inputs, its expectations over the layers' Gaussian values drawn."""
    pairs = np.array([[x @ x, x @ y], [y @ x, y @ y]])
    s = 2 * pairs / len(x) + 0.01
    n = s.copy()
    for _ in range(layers):
        u = np.random.default_rng(0).multivariate_normal(np.zeros(2), s, draws)
        relu, slope = np.maximum(u, 0), (u > 0).astype(float)
        s = 2 * relu.T @ relu / draws + 0.01
        n = s + 2 * n * (slope.T @ slope / draws)
    return n


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_kernel_is_that_of_an_infinitely_wide_network(layers):
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ntk(layers)(x, x)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = torch.tensor(drawn_kernel(x[i].numpy(), x[j].numpy(), layers))
        torch.testing.assert_close(found[[i, j]][:, [i, j]], expected, rtol=0.01, atol=0.01)
    assert torch.linalg.eigvalsh(found).min() > 0


def test_the_kernel_is_nearly_that_of_a_wide_network():
    torch.manual_seed(0)
    x, width = torch.randn(4, 5, dtype=torch.float64), 3000
    parameters = [torch.randn(*shape).double().requires_grad_() for shape in ((5, width), (width,), (width, 1), (1,))]

    def network(row):
        w, b, v, c = parameters
        return (2 / width) ** 0.5 * ((2 / 5) ** 0.5 * row @ w + 0.1 * b).relu() @ v + 0.1 * c

    rows = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(network(row), parameters)]) for row in x])
    found = ntk(1)(x, x)
    assert ((found - rows @ rows.T).abs() / found.diagonal().mean()).max() < 6 / width**0.5


def test_a_kernels_gradient_is_finite_also_where_images_are_equal():
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1] = x[0]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(ntk(1)(x, x).square().sum(), x)
    assert slope.isfinite().all()


def test_solved_labels_are_the_least_squares():
    found, given = made("label_solve", images_per_class=2), material()
    seen, kernel = Standardised(given.images), ntk(1)
    s, t = seen.rows(found.images), seen.rows(given.images)
    k = kernel(s, s)
    a = (kernel(t, s) @ torch.linalg.inv(k + 1e-6 * k.diagonal().mean() * torch.eye(len(k)).double())).numpy()
    y = one_hot(given.labels, 3).numpy()
    square = a.T @ a
    expected = np.linalg.solve(square + 1e-6 * square.diagonal().mean() * np.eye(len(square)), a.T @ y)
    torch.testing.assert_close(found.labels.double() - 1 / 3, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.labels.sum(1), torch.ones(6).double())
    before = ((a @ one_hot(torch.arange(3).repeat_interleave(2), 3).numpy() - y) ** 2).mean()
    assert ((a @ expected - y) ** 2).mean() < before


def test_kernel_inducing_points_lower_the_error_of_the_regression():
    found, start, given = made("kip", steps=60, images_per_class=1), made("random", images_per_class=1), material()
    seen, kernel = Standardised(given.images), ntk(1)

    def error(images, labels):
        s, t = seen.rows(images), seen.rows(given.images)
        guess = kernel(t, s) @ torch.cholesky_solve(labels, factor(kernel(s, s), 1e-6))
        return (guess - one_hot(given.labels, 3)).square().mean()

    assert found.images.min() >= 0 and found.images.max() <= 1
    assert error(found.images * 255, found.labels - 1 / 3) < 0.7 * error(start.images, one_hot(start.labels, 3))
    torch.testing.assert_close(found.labels.sum(1), torch.ones(3).double())
    rows = seen.rows(found.images * 255)
    expected = accuracy(kernel, rows, found.labels - 1 / 3, 1e-6, seen.rows(given.images), given.labels)
    assert found.figures["kernel regression, test %"] == pytest.approx(expected, abs=5)


def test_matched_images_have_the_mean_of_the_real_ones():
    """Without turning and shifting, and with a network that is the identity, the means themselves agree."""
    given = material()
    identity = TappedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), ["penultimate"], outputs=3)
    given = kdkit.Material(
        *(getattr(given, f) for f in ("images", "labels", "test_images", "test_labels", "classes")), lambda: identity, None, print
    )
    given = kdkit.Material(**{**vars(given), "tell": lambda *told: None})
    method = PLUGINS.distillers["dm"]
    still = {"turn": 0, "resize": 1, "shift": 0, "momentum": 0}
    torch.manual_seed(0)
    found = method(method.Options(images_per_class=2, steps=60, lr=0.2, real=13, **still)).distill(given)
    for number in range(3):
        real = given.images[given.of_class(number)].float().mean(0) / 255
        assert (found.images[2 * number : 2 * number + 2].mean(0) - real).abs().max() < 0.03


def test_mosaics_are_of_the_crops_that_the_teacher_recognises():
    found = made("rded", images_per_class=1)
    assert found.images.shape == (3, 1, 8, 8) and found.labels.tolist() == [0, 1, 2]
    crops = torch.rand(8, 2, 3, 3)
    whole = mosaics(crops, 2, torch.Size([6, 6]))
    assert torch.equal(whole[1, :, 3:, :3], crops[6]) and torch.equal(whole[0, :, :3, 3:], crops[1])
    images = torch.rand(5, 2, 7, 9)
    cut = cropped(images, 3, 4)
    for image, crop in zip(images, cut, strict=True):
        places = image.unfold(1, 3, 1).unfold(2, 4, 1)  # (C, rows, columns, 3, 4)
        assert (places == crop[:, None, None]).all(-1).all(-1).all(0).any()
    with pytest.raises(DataError, match="class 0 has 14 images to crop.*take 16"):
        made("rded", images_per_class=4)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_method_writes_a_file_that_a_recipe_trains_on(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = {**ALONE, "distill_data": {"use": name, "images_per_class": 2, **OPTIONS[name]}}
    if name == "rded":
        spec = merged(spec, {"teacher": PLAIN["teacher"], "schedule": {"use": "offline"}, "losses": [{"use": "logit_kl"}]})
    written = distill(recipe.load(write(tmp_path, spec)), quiet=True)
    first = written.file.read_bytes()
    assert written.images == 12 and written.picture.read_bytes()[:4] == b"\x89PNG"
    assert distill(recipe.load(tmp_path / "recipe.yaml"), quiet=True).file.read_bytes() == first  # the same, bit for bit
    images, labels, about = distilled_data.read(written.file)
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 8, 8) and len(labels) == 12
    assert about["method"] == name and about["samples"] == 120 and about["outputs"] == 6
    result = train(tmp_path, merged(spec, {"data": {"distilled": str(written.file)}}))
    assert 0 <= result.test["top1"] <= 100


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """A file of learnt labels, some of them negative."""
    path = tmp_path_factory.mktemp("soft") / "a.safetensors"
    images = torch.randint(0, 255, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.full((12, 6), -0.1)
    labels[torch.arange(12), torch.arange(12) % 6] = 1.5
    distilled_data.write(path, images, labels, {"method": "x", "samples": 9, "outputs": 6, "dataset": "synthetic", "figures": {}})
    return path


@pytest.mark.parametrize(
    ("labels", "losses"),
    [
        ("shares", [{"use": "cross_entropy"}]),
        ("hard", [{"use": "cross_entropy", "class_weights": "balanced"}]),
        ("shares", [{"use": "cross_entropy", "class_weights": "balanced"}]),
        ("solved", [{"use": "label_mse"}]),
    ],
)
def test_learnt_labels_are_learnt_from(labels, losses, soft, tmp_path):
    spec = {**ALONE, "losses": losses, "data": {**ALONE["data"], "distilled": {"file": str(soft), "labels": labels}}}
    assert np.isfinite(train(tmp_path, spec).test["top1"])
    batch = next(iter(kdkit_batches(tmp_path / "recipe.yaml")))
    if labels == "hard":
        assert torch.equal(batch.labels, batch.index % 6)
    else:
        right = {"shares": (1.0, 0.0), "solved": (1.5, -0.1)}[labels]
        assert torch.equal(batch.labels.argmax(1), batch.index % 6)
        assert (batch.labels[0].max().item(), batch.labels[0].min().item()) == pytest.approx(right)


def kdkit_batches(path):
    from kdkit.engine.accelerator import build_accelerator
    from kdkit.runs.opening import open_data

    loaded = recipe.load(path)
    return open_data(loaded, build_accelerator(loaded.spec.train)).train.epoch(0)


def test_validation_data_of_learnt_labels_is_measured_by_class(soft, tmp_path):
    spec = {**ALONE, "data": {**ALONE["data"], "distilled": str(soft), "validation": 6}}
    assert np.isfinite(train(tmp_path, spec).validation["top1"])


def test_squared_error_on_labels_is_the_formula():
    loss = PLUGINS.losses["label_mse"](PLUGINS.losses["label_mse"].Options())
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()

    def formula(loss, student, teacher, batch):
        total, (rows, classes) = 0, student.logits.shape
        for z, label in zip(student.logits, batch.labels, strict=True):
            for k in range(classes):
                total = total + (z[k] - (1.0 if k == label else 0.0) + 1 / classes) ** 2
        return total / (rows * classes)

    assert_agrees(loss, formula, student, teacher, batch)


def broken(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.with_name("broken.safetensors").write_bytes(content)
    return path.with_name("broken.safetensors")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": {"distilled": "none.safetensors"}}, "data.distilled.file: no such file"),
        ({"data": {"distilled": "recipe.yaml"}}, "is no file of `kdkit distill-data`, or damaged"),
        ({"data": {"distilled": {"file": "SOFT", "labels": "warm"}}}, "data.distilled.labels"),
        (
            {"data": {"distilled": "SOFT", "dataset": {"num_classes": 5}}},
            "has 6 classes of dataset 'synthetic', and dataset 'synthetic' has 5",
        ),
        (
            {"data": {"distilled": "SOFT", "dataset": {"image_size": 9}}},
            "has images of 3 x . x . of dataset 'synthetic', and those of .* are 3 x 9 x 9",
        ),
        ({"data": {"distilled": "SOFT"}, "train": {"mixup": {"mixup_alpha": 0.1}}}, "train.mixup: mixes classes"),
        ({"distill_data": {"use": "kipp"}}, "distill_data.*did you mean 'kip'"),
        ({"distill_data": {"use": "kip", "images_per_class": 0}}, "distill_data.images_per_class"),
        ({"distill_data": {"use": "random", "file": "images.png"}}, "distill_data.file: .* its name ends in .safetensors"),
    ],
)
def test_mistakes_are_one_line(changed, says, soft, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(soft.read_bytes())
    text = str(changed).replace("SOFT", str(tmp_path / "a.safetensors"))
    path = write(tmp_path, merged(ALONE, ast.literal_eval(text)))
    with pytest.raises(RecipeError, match=says):
        kdkit.check(path)


def test_a_damaged_file_is_refused(soft):
    with pytest.raises(DataError, match="is damaged: its images or labels are not those that were written"):
        distilled_data.read(broken(soft))
    with pytest.raises(DataError, match="its content does not match its `sha256`"):
        distilled_data.read(broken(soft, soft.read_bytes().index(b"outputs")))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "has no `distill_data:`"),
        ({"distill_data": {"use": "rded"}}, "distill_data.use: 'rded' needs one `teacher:`"),
        ({"distill_data": {"use": "random"}, "data": {"distilled": "SOFT"}}, "data.distilled: is what this command makes"),
        ({"distill_data": {"use": "random"}, "data": {"train_samples": 3, "batch_size": 2}}, "distill_data: class . has no training image"),
        (
            {"distill_data": {"use": "dm", "images_per_class": 2, "steps": 4, "real": 4, "lr": 3e38}},
            "distill_data: its images or labels are not finite",
        ),
        (
            {"distill_data": {"use": "dm", "images_per_class": 1, "steps": 1}},
            "distill_data: the student cannot embed 1 images: Expected more",
        ),
        ({"distill_data": {"use": "random", "file": "FOLDER/a.safetensors"}}, "a.safetensors is a folder, not a file"),
        ({"distill_data": {"use": "random"}, "task": "multilabel"}, "is for one class of each image, and task 'multilabel'"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changed, says, soft, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    changed = ast.literal_eval(str(changed).replace("SOFT", str(soft)).replace("FOLDER", str(tmp_path)))
    losses = {"losses": [{"use": "bce"}]} if "task" in changed else {}
    with pytest.raises(RecipeError, match=says):
        distill(recipe.load(write(tmp_path, merged({**ALONE, **losses}, changed))), quiet=True)


def test_a_convnet_halves_its_images():
    source = PLUGINS.models["convnet"]
    network = source(source.Options(model="convnet/4-6"), "4-6").build(5, (2, 12, 8))
    assert network(torch.rand(3, 2, 12, 8)).shape == (3, 5) and network.fc.in_features == 6 * 3 * 2
    for name, says in (("4-", "is no list of channels"), ("4-4-4-4", "halves images 4 times")):
        with pytest.raises(kdkit.ModelError, match=says):
            source(source.Options(model=f"convnet/{name}"), name).build(5, (2, 12, 8))
