"""Targets as large as images: masks that move with their images, pixels as rows, from end to end."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_masks import CLASSES, HEIGHT, MAPS, WIDTH, lay_out, write
from torch import Tensor
from torchvision import tv_tensors
from training import assert_same_run, metrics, start, stop_and_go_on, weights

import kdkit
from kdkit import recipe
from kdkit.contracts.dataset_source import DataInfo, InMemory
from kdkit.data.loaders import prepare
from kdkit.data.together import fitted, unfitted
from kdkit.engine.evaluate import Tally
from kdkit.errors import DataError, RecipeError
from kdkit.recipe import registry
from kdkit.recipe.data_section import DataSpec
from kdkit.runs import checks
from kdkit.runs.run import Run
from kdkit.students.loaded import LoadedRun
from kdkit.study.lockstep import train_together
from kdkit.testing import check_task

TASK = registry.load().tasks["segmentation"]
IGNORED = 255
CPU = torch.device("cpu")
INFO = DataInfo((3, 8, 8), 3, 4, 4)


class InMemoryMasks(kdkit.DatasetSource):
    """Images whose pixels are their classes, so that each can be told from where it came."""

    name = "masks"
    task = "segmentation"

    def info(self):
        return DataInfo((1, 9, 11), 255, 6, 4)

    def split(self, part):
        shape = (6 if part == "train" else 4, 9, 11)
        masks = torch.arange(255).repeat(3)[: shape[0] * 99].view(-1)[: 99 * shape[0]]
        masks = torch.cat([masks, torch.zeros(99 * shape[0] - len(masks), dtype=masks.dtype)]).view(shape)
        return InMemory(masks[:, None].to(torch.uint8), masks)


def loaded(**settings):
    spec = DataSpec(dataset={"use": "masks"}, **{"batch_size": 3, "workers": 0, **settings})
    return prepare(spec, InMemoryMasks(None), TASK(), seed=3, device=CPU)


def shown(loader, epoch):
    return [(batch.inputs, batch.labels, batch.index) for batch in loader.epoch(epoch)]


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("grid", ["targets", "answer"])
def test_the_task_keeps_the_promises(grid, rows):
    check_task(TASK(TASK.Options(grid=grid, rows_per_image=rows)))


AUGMENT = {"flip": 0.5, "crop": [7, 8]}


def test_a_mask_moves_with_its_image():
    for settings in ({}, {"joint_augment": AUGMENT}, {"joint_augment": {"crop": [14, 20], "flip": 1.0}}):
        for pixels, masks, _ in shown(loaded(**settings).train, 1):
            counts = masks != IGNORED
            assert (pixels[:, 0] * 255).round()[counts].equal(masks[counts].float())
            assert not pixels[:, 0][~counts].any(), "what is padded is black, and does not count"
    for batch in loaded(image_size=[18, 30]).test:
        assert batch.labels.shape == (3, 18, 30) or len(batch.labels) == 1
        assert (batch.labels[:, :, :4] == IGNORED).all() and (batch.labels[:, :, 4:26] != IGNORED).all()


def test_views_follow_from_seed_view_and_sample_with_any_number_of_workers():
    settings = {"joint_augment": {"scale": [0.7, 1.4], "color_jitter": 0.3, **AUGMENT}}
    here, there = (loaded(workers=workers, **settings).train for workers in (0, 2))
    first, again, read, later = (shown(one, epoch) for one, epoch in ((here, 0), (here, 0), (there, 0), (here, 1)))
    same = lambda a, b: all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))  # noqa: E731
    assert same(first, again) and same(first, read) and not same(first, later)


def test_measured_batches_are_not_larger_than_those_of_training():
    assert max(len(batch.labels) for batch in loaded(eval_batch_size=256).test) == 3


def random_batch(height=6, width=7, classes=4, samples=3):
    dice = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes + 1, (samples, height, width), generator=dice)
    labels[labels == classes] = IGNORED
    logits = torch.randn(samples, classes, height // 2, width // 2, generator=dice)
    return kdkit.Outputs(logits), kdkit.Batch(torch.zeros(samples, 3, height, width), labels, torch.arange(samples) + 10)


def test_rows_are_the_pixels_that_count():
    answer, batch = random_batch()
    (rows,), asked = TASK().rows([answer], batch)
    whole = F.interpolate(answer.logits, batch.labels.shape[1:], mode="bilinear", align_corners=False)
    expected = F.cross_entropy(whole, batch.labels, ignore_index=IGNORED)
    torch.testing.assert_close(F.cross_entropy(rows.logits, asked.labels), expected)
    assert asked.index.tolist() == [10 + n for n, labels in enumerate(batch.labels) for _ in range(int((labels != IGNORED).sum()))]
    (coarse,), small = TASK(TASK.Options(grid="answer")).rows([answer], batch)
    assert len(coarse.logits) == int((batch.labels[:, 1::2, 1::2] != IGNORED).sum()) or len(small.labels) <= answer.logits[:, 0].numel()


@pytest.mark.parametrize(
    ("known", "count", "distinct"),
    [([20, 30, 40], 15, 15), ([3, 30, 40], 15, 3), ([0, 30, 40], 15, 0)],
    ids=["enough", "few", "none in one image"],
)
def test_drawn_rows_count_and_come_without_repetition_where_there_are_enough(known, count, distinct):
    answer, batch = random_batch()
    labels = torch.full_like(batch.labels, IGNORED).flatten(1)
    for image, number in enumerate(known):
        labels[image, :number] = image
    batch = kdkit.Batch(batch.inputs, labels.view_as(batch.labels), batch.index)
    (rows,), asked = TASK(TASK.Options(rows_per_image=count)).rows([answer], batch)
    assert rows.logits.shape == (3 * count, 4) and (asked.labels != IGNORED).all()
    assert torch.equal(asked.labels, asked.index - 10)
    first = rows.logits[asked.index == 10]
    assert len(first.unique(dim=0)) == distinct if distinct else len(first) == 0


@pytest.mark.parametrize("rows", [None, 4])
def test_a_batch_without_a_pixel_that_counts_teaches_nothing(rows):
    from kdkit.engine.objective import Objective

    answer, batch = random_batch()
    batch = kdkit.Batch(batch.inputs, torch.full_like(batch.labels, IGNORED), batch.index)
    plugins = registry.load().losses
    entries = {name: (_entry(name), plugins[name](_entry(name))) for name in ("cross_entropy", "logit_kl")}
    logits = answer.logits.clone().requires_grad_()
    lesson = kdkit.Lesson(kdkit.Outputs(logits), [answer])
    Objective(entries, TASK(TASK.Options(rows_per_image=rows)))(lesson, batch).total.backward()
    assert not logits.grad.any()


def _entry(name):
    options = registry.load().losses[name].Options
    entry = type("Entry", (recipe.sections.LossEntry, options), {})
    return entry(use=name)


def test_scores_are_those_of_plain_loops():
    answer, batch = random_batch()
    teacher = kdkit.Outputs(torch.randn(3, 4, 6, 7, generator=torch.Generator().manual_seed(2)))
    task, info = TASK(), DataInfo((3, 6, 7), 4, 3, 3, ("a", "b", "c", "d"))
    tally = Tally([*task.scores(info), *task.agreement(info)], together=False)
    known = task.remembered(teacher, batch)
    for n in range(3):
        one = kdkit.Batch(batch.inputs[n : n + 1], batch.labels[n : n + 1], batch.index[n : n + 1])
        (rows,), asked = task.scored_rows([kdkit.Outputs(answer.logits[n : n + 1])], one)
        tally.add(kdkit.Rows(rows.logits, asked.labels, known[n : n + 1]))
    counts = batch.labels != IGNORED
    said = F.interpolate(answer.logits, (6, 7), mode="bilinear", align_corners=False).argmax(1)[counts]

    def ious(truth: Tensor) -> list[float]:
        return [100 * float(((said == k) & (truth == k)).sum() / ((said == k) | (truth == k)).sum()) for k in range(4)]

    truth, theirs = batch.labels[counts], teacher.logits.argmax(1)[counts]
    expected = {
        "mean_iou": np.mean(ious(truth)),
        "pixel_accuracy": 100 * float((said == truth).float().mean()),
        "class_accuracy": np.mean([100 * float((said[truth == k] == k).float().mean()) for k in range(4)]),
        **{f"iou/{name}": value for name, value in zip("abcd", ious(truth), strict=True)},
        "agreement": 100 * float((said == theirs).float().mean()),
        "iou_to_teacher": np.mean(ious(theirs)),
    }
    assert tally.values() == pytest.approx(expected, rel=1e-5)


def test_a_class_that_does_not_occur_has_no_iou():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = F.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    task = TASK()
    tally = Tally(task.scores(INFO), together=False)
    (rows,), asked = task.scored_rows([kdkit.Outputs(logits)], kdkit.Batch(labels, labels, torch.arange(1)))
    tally.add(kdkit.Rows(rows.logits, asked.labels))
    assert tally.values() == {"mean_iou": 100, "pixel_accuracy": 100, "class_accuracy": 100, "iou/0": 100}


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.full((8, 8), 3), "its mask: a pixel has the value 3, but classes go from 0 to 2"),
        (np.zeros((8, 9), int), "its mask is 8 x 9, the image 8 x 8"),
        (np.zeros((8, 8)), "pixels are torch.float64, and must be whole numbers"),
        (np.zeros((8, 8, 3), int), "a mask is \\(H, W\\)"),
        ("road", "its target is no mask"),
        (Image.new("RGB", (8, 8)), "its mask has the shape \\(3, 8, 8\\)"),
    ],
)
def test_what_is_no_mask_is_refused(mask, says):
    with pytest.raises(DataError, match=says):
        TASK().movable(mask, (8, 8), INFO)


VARIANTS = {
    "taught": {},
    "drawn": {"task": {"use": "segmentation", "rows_per_image": 9}},
    "coarse": {"task": {"use": "segmentation", "grid": "answer"}, "data": {"batch_size": 5, "drop_last": False}},
    "cached": {"teacher": {"cache": {"views": 2, "what": "logits", "dtype": "fp32", "dir": "cache", "top_k": 2}}, "losses": [{"use": "logit_kl"}]},
    "alone": {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "data": {"validation": 4}},
    "mutual": {"teacher": None, "schedule": {"use": "mutual"}, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs that were trained side by side."""
    folder = lay_out(tmp_path_factory.mktemp("masks"))
    jobs = [
        Run(recipe.load(write(folder, f"{name}.yaml", name=name, **changes)), folder / "together" / name)
        for name, changes in VARIANTS.items()
    ]
    for outcome in train_together(jobs):
        assert outcome.reason is None, outcome.reason
    return folder


@pytest.mark.first(2)
@pytest.mark.parametrize("name", VARIANTS)
def test_side_by_side_a_run_is_what_it_is_alone(trained, name):
    kdkit.train(trained / f"{name}.yaml", folder=trained / "alone" / name, quiet=True)
    assert_same_run(trained / "alone" / name, trained / "together" / name)


def test_a_stopped_run_goes_on_with_the_same_bits(trained, monkeypatch):
    stop_and_go_on(trained / "drawn.yaml", trained / "stopped", monkeypatch)
    assert_same_run(trained / "stopped", trained / "together" / "drawn")


@pytest.mark.slow
def test_two_processes_equal_one(trained):
    """Their shares have different numbers of pixels that count."""
    networks = (trained / "net.py").read_text().replace("nn.BatchNorm2d(width)", "nn.Identity()")
    (trained / "plain.py").write_text(networks)
    plain, losses = {"file": "plain.py"}, [{"use": "cross_entropy"}, {"use": "logit_kl"}]
    path = write(trained, "two.yaml", student=plain, teacher=plain, losses=losses)
    kdkit.train(path, folder=trained / "one", quiet=True)
    for command in start(trained, [("train", path, "--run", "two")] * 2):
        code, log = command.finish()
        assert code == 0, log
    for key, value in weights(trained / "one").items():
        torch.testing.assert_close(weights(trained / "two")[key], value, rtol=1e-4, atol=1e-5)
    ones, twos = metrics(trained / "one")[-1]["test"], metrics(trained / "two")[-1]["test"]
    assert twos == pytest.approx(ones, abs=1e-3)


def test_a_run_tells_the_classes_and_can_be_evaluated_and_exported(trained):
    from kdkit.students.export import export
    from kdkit.students.loaded import evaluate

    run = LoadedRun(trained / "together" / "taught", plugins=[trained / "net.py"])
    assert run.info.class_names == CLASSES and run.info.crop == (8, 10) and run.info.image_shape == (3, HEIGHT, WIDTH)
    result = run.folder.result().test
    assert {"mean_iou", "iou/left", "agreement", "iou_to_teacher"} <= result.keys()
    assert next(iter(evaluate(run, device=CPU))).metrics == pytest.approx(result)
    export(run, trained / "exported")


def test_predict_writes_masks_of_the_images_own_size(trained, monkeypatch, capsys):
    from kdkit import cli

    Image.new("RGB", (WIDTH, HEIGHT)).save(trained / "one.png")
    words = ["predict", trained / "together" / "alone", trained / "one.png", "--plugins", trained / "net.py"]
    monkeypatch.setattr("sys.argv", ["kdkit", *map(str, words), "--masks", str(trained / "written")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    header, row = capsys.readouterr().out.splitlines()
    assert header == "file,mask" and row.endswith("written/one.png")
    found = Image.open(trained / "written" / "one.png")
    assert found.size == (WIDTH, HEIGHT) and found.mode == "L" and np.asarray(found).max() < len(CLASSES)
    monkeypatch.setattr("sys.argv", ["kdkit", *map(str, words)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "say where they go by --masks FOLDER" in capsys.readouterr().err


def test_predicted_masks_are_those_that_are_scored(trained):
    from kdkit.students.predictions import Predictor, find_images

    run = LoadedRun(trained / "together" / "alone", plugins=[trained / "net.py"])
    files = find_images([trained / "test" / "images"])
    right = counted = 0
    for said in Predictor.of(run.folder.path, device=CPU, plugins=[trained / "net.py"])(files, CPU):
        truth = torch.as_tensor(np.array(Image.open(trained / "test" / "masks" / said.file.name)))
        right += int((said.values["mask"] == truth).sum())
        counted += int((truth < len(CLASSES)).sum())
    assert 100 * right / counted == pytest.approx(run.folder.result().test["pixel_accuracy"], rel=1e-5)


def test_a_mask_replaces_no_image_and_no_other_mask(tmp_path):
    from kdkit.students.prediction_files import Pictures
    from kdkit.students.predictions import ImageFile

    picture = tmp_path / "one.png"
    with pytest.raises(DataError, match="is one of the images; choose another folder for --masks"):
        Pictures(tmp_path, "--masks", [ImageFile(picture, picture)]).write(Path("one.png"), b"")
    written = Pictures(tmp_path / "masks", "--masks")
    written.write(Path("a/one.jpg"), b"")
    with pytest.raises(DataError, match="is the picture of another image of that name"):
        written.write(Path("a/one.png"), b"")


def test_no_pixel_to_measure_on_is_an_error():
    task = TASK()
    tally = Tally(task.scores(INFO), together=False)
    nothing = torch.full((1, 2, 2), IGNORED)
    (rows,), asked = task.scored_rows([kdkit.Outputs(torch.zeros(1, 3, 2, 2))], kdkit.Batch(nothing, nothing, torch.arange(1)))
    tally.add(kdkit.Rows(rows.logits, asked.labels))
    with pytest.raises(DataError, match="no pixel of the images to measure on counts"):
        tally.values()


def test_image_and_mask_keep_their_places_when_they_are_scaled():
    ramp = torch.arange(12, dtype=torch.uint8).expand(12, 12)
    pixels, mask = fitted(tv_tensors.Image(ramp[None]), tv_tensors.Mask(ramp.clone()), (4, 4), "bilinear", IGNORED)
    assert mask[0].tolist() == [1, 4, 7, 10] and pixels[0, 0, 1:3].tolist() == [4, 7]


def test_a_fitted_mask_comes_back_at_its_own_size():
    mask = (torch.arange(30 * 50).view(30, 50) % 7).to(torch.uint8)
    pixels = tv_tensors.Image(torch.zeros(3, 30, 50, dtype=torch.uint8))
    _, moved = fitted(pixels, tv_tensors.Mask(mask), (120, 150), "bilinear", IGNORED)
    assert moved.shape == (120, 150) and (moved[:15] == IGNORED).all() and (moved[105:] == IGNORED).all()
    assert torch.equal(unfitted(moved.as_subclass(Tensor), (30, 50), (120, 150)), mask)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"mixup": {"mixup_alpha": 0.2}}}, "targets of task 'segmentation' cannot be mixed"),
        ({"data": {"augment": {"flip": 0.5}}}, "data.augment: moves images, and would leave the targets"),
        ({"data": {"timm_augment": {}}}, "data.timm_augment: moves images"),
        ({"data": {"sampling": "balanced"}}, "targets of task 'segmentation' make no groups to balance"),
        ({"data": {"dataset": {"classes": ["ground", "left"]}}}, "train/images/00.png: its mask: a pixel has the value 2"),
        ({"data": {"joint_augment": {"scale": [0, 2]}}}, "scale: must be a range"),
        ({"losses": [{"use": "crd", "layers": MAPS}]}, "'crd' is for classes of samples, and task 'segmentation'"),
        ({"losses": [{"use": "bce"}]}, "'bce' is for labels"),
        ({"task": "classification"}, "training labels are missing: its part has no `labels`, which task 'classification' needs"),
        ({"student": {"model": "mlp/4"}}, "and task 'segmentation' asks for the form of"),
        (
            {"teacher": None, "schedule": {"use": "ddgsd"}, "losses": [{"use": "logit_kl"}]},
            "targets of task 'segmentation' move with each view",
        ),
        ({"teacher": {"cache": {"views": "all"}}}, "`data.joint_augment` gives ever new views"),
    ],
    ids=["mixup", "augment", "timm", "balanced", "values", "scale", "memory", "other task", "no labels", "network", "views", "cache"],
)
def test_what_does_not_fit_is_refused_in_one_line(trained, changes, says):
    path = write(trained, "refused.yaml", **changes)
    if "student" in changes:
        path = write(trained, "refused.yaml", losses=[{"use": "cross_entropy"}])
        text = path.read_text().replace("model: python/Pixels\n  file: net.py\nteacher", "model: mlp/4\nteacher")
        path.write_text(text)
    with pytest.raises(RecipeError, match=says) as error:
        checks.make(recipe.load(path))
    assert all("\n" not in line for line in str(error.value).splitlines())


def test_masks_do_not_move_with_the_augmentation_of_another_task():
    with pytest.raises(DataError, match="joint_augment: the targets of task 'classification' do not move"):
        prepare(
            DataSpec(dataset={"use": "digits"}, joint_augment={"flip": 0.5}),
            registry.load().datasets["digits"](None),
            registry.load().tasks["classification"](),
            seed=0,
            device=CPU,
        )


@pytest.mark.parametrize(("rows", "reason"), [(9, None), (None, "reads")], ids=["drawn", "all"])
def test_a_step_can_be_recorded_where_the_number_of_rows_is_fixed(rows, reason, tmp_path):
    from test_capture import compare

    train = {"device": "cpu", "optimizer": {"lr": 1e-3, "args": {"fused": True}}}
    path = write(lay_out(tmp_path, train=16), task={"use": "segmentation", "rows_per_image": rows}, train=train)
    reasons = compare(path)
    assert not reasons if reason is None else all(reason in one for one in reasons) and reasons
