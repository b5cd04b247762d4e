"""Each network sees what its `input` says of a sample, wherever it is trained, taught by, measured, kept or exported."""

import json

import numpy as np
import pytest
import small_masks
import torch
from test_capture import compare
from test_every_loss_and_schedule import WIDER
from test_lockstep import alone, count, jobs
from test_stage_resume import interrupted
from test_teacher_cache import ALL, name_of
from torchvision.transforms import v2
from training import PLAIN, assert_same_run, merged, train, write

import kdkit
from kdkit import recipe
from kdkit.contracts.inputs import TextShape
from kdkit.contracts.model_source import InputOptions
from kdkit.errors import InputError, RecipeError
from kdkit.models import tapped
from kdkit.models.seen import Seen, SeenInput
from kdkit.recipe import registry
from kdkit.students import profile
from kdkit.students.cost_table import subjects
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun, evaluate
from kdkit.study.lockstep import train_together
from kdkit.study.measurements import who_teaches

SHAPE = (3, 8, 8)
FIELDS = {"colour": 3, "depth": 1}
RANDOM = {"crop": {"size": 6, "place": "random"}}
GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def batch(channels=3, side=8, count=4):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def seen(options, shape=SHAPE, fields=None):
    return Seen(InputOptions.model_validate(options), shape, fields or {})


WHAT = {
    "size": ({"size": 4}, 3, lambda x: v2.functional.resize(x, [4, 4], antialias=True)),
    "larger": ({"size": 12, "interpolation": "nearest"}, 3, lambda x: v2.functional.resize(x, [12, 12], v2.InterpolationMode.NEAREST)),
    "grey": ({"grey": True}, 3, lambda x: (x * GREY).sum(1, keepdim=True)),
    "grey of grey": ({"grey": True}, 1, lambda x: x),
    "crop": ({"crop": 5}, 3, lambda x: x[:, :, 1:6, 1:6]),
    "all": (
        {"crop": 6, "grey": True, "size": 3},
        3,
        lambda x: v2.functional.resize((x * GREY).sum(1, keepdim=True)[:, :, 1:7, 1:7], [3, 3]),
    ),
    "a field": ({"field": "depth"}, 4, lambda x: x[:, 3:]),
    "another field": ({"field": "colour", "size": 4}, 4, lambda x: v2.functional.resize(x[:, :3], [4, 4], antialias=True)),
    "nothing": ({}, 3, lambda x: x),
}


@pytest.mark.parametrize(("options", "channels", "expected"), WHAT.values(), ids=WHAT)
def test_a_network_sees_a_part_of_each_sample(options, channels, expected):
    images = batch(channels)
    reduce = seen(options, (channels, 8, 8), FIELDS)
    found = reduce(images)
    torch.testing.assert_close(found, expected(images))
    assert found.shape[1:] == reduce.shape
    torch.testing.assert_close(reduce(found), found)  # what is reduced already passes
    pixels = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(reduce(pixels).float() / (255 if found.dtype != reduce(pixels).dtype else 1), reduce(pixels / 255))


def test_a_random_crop_is_another_window_of_each_image():
    images, reduce = batch(count=64), seen(RANDOM)
    torch.manual_seed(0)
    drawn = reduce(images, drawing=True)
    windows = images.unfold(2, 6, 1).unfold(3, 6, 1)  # (B, C, 3, 3, 6, 6)
    matches = (windows == drawn[:, :, None, None]).all(-1).all(-1).all(1)  # (B, 3, 3)
    assert (matches.flatten(1).sum(1) == 1).all()
    assert matches.any(0).all()  # each place may come
    torch.manual_seed(0)
    assert torch.equal(reduce(images, drawing=True), drawn)
    assert torch.equal(reduce(images), images[:, :, 1:7, 1:7])


def test_crops_are_drawn_in_training_and_central_in_measurements():
    model = tapped.TappedModel(torch.nn.Flatten(), adapt=SeenInput(seen(RANDOM), torch.nn.Identity()))
    images = batch()
    central = images[:, :, 1:7, 1:7].flatten(1)
    torch.manual_seed(0)
    assert not torch.equal(model(images).logits, central)  # a student
    model.module.eval()
    assert torch.equal(model(images).logits, central)
    model.freeze()
    assert not torch.equal(model(images).logits, central)  # a teacher
    assert torch.equal(model.twin()(images).logits, central)  # as it is measured


REFUSED = {
    "a crop larger than the image": ({"crop": 9}, SHAPE, {}, "crop: 9 x 9 pixels of images of 8 x 8"),
    "grey of two channels": ({"grey": True}, (2, 8, 8), {}, "grey: is made of colour images (3 channels), these have 2"),
    "texts": ({"size": 4}, TextShape((8,)), {}, "is for images, and the data are texts"),
    "a field of samples without": ({"field": "depth"}, SHAPE, {}, "there is no 'depth'; samples of this dataset have no fields"),
    "fields of other images": ({"field": "depth"}, SHAPE, FIELDS, "the dataset's fields have 4 channels, its images 3"),
    "another field": ({"field": "deep"}, (4, 8, 8), FIELDS, "there is no 'deep'; did you mean 'depth'?"),
}


@pytest.mark.parametrize(("options", "shape", "fields", "says"), REFUSED.values(), ids=REFUSED)
def test_what_samples_do_not_have_is_refused(options, shape, fields, says):
    with pytest.raises(InputError) as error:
        seen(options, shape, fields)
    assert says in str(error.value) and "\n" not in str(error.value)


CHECKED = {
    "student": ({"student": {"input": {"crop": 9}}}, "student.input: crop: 9 x 9 pixels of images of 8 x 8"),
    "teacher": ({"teacher": {"input": {"field": "depth"}}}, "teacher.input: field: there is no 'depth'"),
    "unknown key": ({"student": {"input": {"sise": 4}}}, "did you mean 'size'"),
    "no side": ({"student": {"input": {"crop": {"place": "random"}}}}, "student.input.crop.size"),
    "cache": ({"teacher": {"input": RANDOM, "cache": {"views": 1}}}, "a crop that is drawn for each step"),
}


@pytest.mark.parametrize(("changes", "says"), CHECKED.values(), ids=CHECKED)
def test_check_tells_it_in_one_line_at_its_place(tmp_path, changes, says):
    with pytest.raises(RecipeError) as error:
        kdkit.check(write(tmp_path, **changes))
    assert says in str(error.value) and str(tmp_path / "recipe.yaml") in str(error.value)


def test_answers_from_a_file_see_nothing(tmp_path):
    np.savez(tmp_path / "teacher.npz", logits=np.random.default_rng(0).normal(size=(48, 6)).astype("float32"))
    spec = {**PLAIN, "teacher": {"model": "answers/logits", "file": "teacher.npz"}}
    assert kdkit.check(write(tmp_path, spec)).teachers
    with pytest.raises(RecipeError, match=r"teacher\.input: says how a network is built or asked"):
        kdkit.check(write(tmp_path, spec, teacher={"input": {"size": 4}}))


def test_masks_belong_to_whole_images(tmp_path):
    small_masks.lay_out(tmp_path)
    with pytest.raises(RecipeError, match=r"student\.input: crop: targets of task 'segmentation' belong to the whole image"):
        kdkit.check(small_masks.write(tmp_path, student={"input": {"crop": 8}}))


@pytest.mark.slow
def test_a_student_may_see_smaller_images_than_their_masks(tmp_path):
    small_masks.lay_out(tmp_path)
    result = kdkit.train(small_masks.write(tmp_path, student={"input": {"size": 8}}), folder=tmp_path / "run", quiet=True)
    assert kdkit.load_student(result.folder, plugins=[tmp_path / "net.py"]).sees == (3, 8, 8)
    assert 0 < result.test["mean_iou"] <= 100


def test_check_tells_what_each_network_sees(tmp_path):
    plan = str(kdkit.check(write(tmp_path, student={"input": {"grey": True, "size": 6}})))
    assert [line.endswith(", sees (1, 6, 6)") for line in plan.splitlines()[1:3]] == [False, True]


@pytest.mark.parametrize(
    ("model", "channels"),
    [({"model": "resnet18"}, 1), ({"model": "resnet18", "pretrained": True}, 3), ({"model": "torchvision/resnet18"}, 3)],
)
def test_a_grey_network_has_one_channel_where_its_source_can_build_one(model, channels):
    from kdkit.models.build import build_model
    from kdkit.recipe.types import source_of

    source, name = source_of(model["model"], registry.load().models)
    kind = registry.load().models[source]
    options = kind.Options.model_validate({**model, "input": {"grey": True}})
    built = build_model(options, kind(options, name), 4, SHAPE, weights=False)
    assert (built.sees, built.input_shape) == ((1, 8, 8), (channels, 8, 8))


# Runs


INPUTS = {
    "grey": {"student": {"input": {"grey": True}}, "teacher": {"input": {"size": 4}}},
    "same_teacher": {"student": {"input": RANDOM}, "teacher": {"input": {"size": 4}}},
    "drawn": {"student": {"args": {"drop_rate": 0.3}}, "teacher": {"input": RANDOM}},
    "drawn_too": {"student": {"args": {"drop_rate": 0.2}}, "teacher": {"input": RANDOM}},
}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = jobs(folder, PLAIN, INPUTS, train={"epochs": 1})
    with pytest.MonkeyPatch.context() as patch:
        answered = count(patch, tapped.TappedModel, "forward")
        outcomes = train_together(found)
    return folder, found, outcomes, answered


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["grey", "same_teacher", "drawn_too"])
def test_a_run_beside_others_ends_with_the_bits_that_it_has_alone(together, name):
    folder, found, outcomes, _ = together
    place = list(INPUTS).index(name)
    assert outcomes[place].reason is None
    assert_same_run(alone(folder, found[place]), found[place].folder)


def test_a_teacher_answers_once_for_all_that_show_it_the_same(together):
    answered = together[3]
    networks = {id(model.module) for model, images in answered if model.role == "teacher" and images.device.type != "meta"}
    assert len(networks) == 3  # at 4 x 4 for two runs, drawn for each of two


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    changes = {"student": {"input": {**RANDOM, "size": 4, "grey": True}}, "teacher": {"input": RANDOM}}
    train(tmp_path, into="whole", **changes)
    run = interrupted(tmp_path, 8, **changes)
    train(tmp_path, **changes)
    assert_same_run(run, tmp_path / "whole")


def test_a_recorded_step_draws_its_crops_anew(tmp_path):
    base = merged(PLAIN, {"data": {"dataset": {"train": 32}}, "train": {"device": "cpu", "optimizer": {"args": {"fused": True}}}})
    assert not compare(write(tmp_path, base, student={"input": RANDOM}, teacher={"input": RANDOM}))


SHOWN = {"size": {"size": 4}, "another size": {"size": 5}, "interpolation": {"size": 4, "interpolation": "area"}, "grey": {"grey": True}}


def test_a_cache_is_of_one_input(tmp_path):
    names = [name_of(tmp_path, teacher={"input": options, "cache": ALL}) for options in ({"crop": 6}, *SHOWN.values())]
    assert len({*names, name_of(tmp_path)}) == len(names) + 1


def test_a_recipe_without_inputs_keeps_its_fingerprint(tmp_path):
    write(
        tmp_path, {**PLAIN, "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "name": "t"}, "t.yaml"
    )
    taught = recipe.load(write(tmp_path, {**PLAIN, "teacher": {"recipe": "t.yaml"}}))
    content = taught.content()
    assert "input" not in content["student"] and "input" not in content["teacher"]
    plain, small = (recipe.load(taught.source.path, changes) for changes in ({}, {"student.input.size": 4}))
    assert plain.fingerprint == taught.fingerprint != small.fingerprint


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run whose teacher has a recipe with an input of its own, and one whose recipe gives it another."""
    folder = tmp_path_factory.mktemp("taught")
    own = {**PLAIN, "name": "t", "student": {**WIDER, "input": {"crop": 6}}, "teacher": None}
    write(
        folder,
        {**own, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "train": {**PLAIN["train"], "epochs": 1}},
        "t.yaml",
    )
    base = {**PLAIN, "teacher": {"recipe": "t.yaml"}, "student": {**PLAIN["student"], "input": {"grey": True, "size": 6}}}
    base = {**base, "train": {**PLAIN["train"], "epochs": 1}, "run": {"folder": str(folder / "runs")}}
    kept = train(folder, base, into="kept").folder
    other = train(folder, base, into="other", teacher={"input": {"size": 4}}).folder
    return kept, other


def test_a_teacher_sees_what_it_saw_in_its_training_unless_told_otherwise(taught):
    kept, other = (LoadedRun(folder) for folder in taught)
    assert kept.teachers()[0].sees == (3, 6, 6) and other.teachers()[0].sees == (3, 4, 4)
    assert kept.teachers()[0].adapt.seen.options.crop.size == 6
    assert who_teaches(kept.recipe) != who_teaches(other.recipe)


def test_a_student_is_measured_by_what_it_sees(taught):
    run = LoadedRun(taught[0])
    scores = [score for score in evaluate(run, device=torch.device("cpu")) if score.role == "student"]
    measured = json.loads((taught[0] / "result.json").read_text())["test"]
    assert scores[0].metrics == pytest.approx(measured)
    listed = subjects([str(taught[0])], None, None, torch.device("cpu"))
    assert [one.shape for one in listed] == [(3, 6, 6), (1, 6, 6)]
    costs = profile.measure_together([(one.model, one.shape) for one in listed], runs=1)
    whole = profile.measure(listed[1].model, SHAPE, runs=1)
    assert whole.macs == costs[1].macs < costs[0].macs


@pytest.mark.slow
def test_an_exported_student_takes_what_it_sees_and_says_so(taught, tmp_path):
    run, images = LoadedRun(taught[0]), batch()
    student = run.student()
    logits, reduced = student(images).logits, student.adapt.seen(images)
    timm = export(run, "timm", tmp_path / "timm")
    assert "it sees of a sample: grey, 6 x 6 (bilinear)" in timm.notes[-1]
    again = kdkit.load_student(tmp_path / "timm")
    assert torch.equal(again(images).logits, logits) and torch.equal(again(reduced).logits, logits)
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    made = export(run, "onnx", tmp_path / "onnx")
    assert made.notes[0].startswith("images (B, 1, 6, 6) in [0, 1] to logits") and made.notes[0].endswith("grey, 6 x 6 (bilinear)")
    session = onnxruntime.InferenceSession(str(made.files[0]))
    (found,) = session.run(None, {"images": reduced.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits, rtol=1e-4, atol=1e-5)
    about = {entry.key: json.loads(entry.value) for entry in onnx.load(made.files[0]).metadata_props}
    assert about["input_shape"] == [1, 6, 6]
    assert about["input"] == {"grey": True, "size": 6, "interpolation": "bilinear"}


PAIRED = '''
import kdkit
import torch


class Paired(kdkit.DatasetSource):
    """Colour and depth of the same scenes, for tests."""

    name = "paired"

    def info(self):
        return kdkit.DataInfo((4, 8, 8), 3, 24, 12, fields={"colour": 3, "depth": 1})

    def split(self, part):
        count = 24 if part == "train" else 12
        stream = torch.Generator().manual_seed(count)
        return kdkit.InMemory(torch.randint(256, (count, 4, 8, 8), dtype=torch.uint8, generator=stream), torch.arange(count) % 3)


@kdkit.hookimpl
def kdkit_datasets():
    return [Paired]
'''


def test_a_student_of_one_modality_learns_from_a_teacher_of_both(tmp_path):
    (tmp_path / "paired.py").write_text(PAIRED)
    changes = {"plugins": ["paired.py"], "data": {"dataset": None, "augment": {"crop_padding": 1, "flip": 0.5}}}
    path = write(
        tmp_path, merged(merged(PLAIN, changes), {"data": {"dataset": {"use": "paired"}}, "student": {"input": {"field": "depth"}}})
    )
    run = kdkit.train(path, folder=tmp_path / "run", quiet=True).folder
    student = LoadedRun(run, plugins=[tmp_path / "paired.py"]).student()
    assert (student.sees, LoadedRun(run, plugins=[tmp_path / "paired.py"]).teachers()[0].sees) == ((1, 8, 8), (4, 8, 8))
    images = batch(4)
    fields = {"colour": images[:, :3], "depth": images[:, 3:]}
    logits = student(images).logits
    assert torch.equal(student(fields).logits, logits) and torch.equal(student(fields["depth"]).logits, logits)
    export(LoadedRun(run, plugins=[tmp_path / "paired.py"]), "timm", tmp_path / "timm")
    assert torch.equal(kdkit.load_student(tmp_path / "timm")(images).logits, logits)
