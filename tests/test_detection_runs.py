"""Detection through whole runs: side by side, stopped, in two processes, cached, exported, predicted."""

import contextlib
import csv
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_stage_resume import kill_often
from training import assert_same_run, lines, merged, start, stop_and_go_on, weights
from training import write as write_recipe

import kdkit
from kdkit import cli, recipe
from kdkit.errors import ModelError, RecipeError
from kdkit.recipe.data_section import DataSpec
from kdkit.runs import checks
from kdkit.runs.run import Run
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun
from kdkit.students.predictions import Predictor, find_images
from kdkit.study.lockstep import train_together

CPU = torch.device("cpu")
HEIGHT, WIDTH = 64, 96
PYRAMID = [{"student": "backbone.fpn.layer_blocks.*", "teacher": "backbone.fpn.layer_blocks.*"}]
SMALL = {"model": "detector/fcos", "backbone": "resnet10t", "width": 64, "args": {"channels": [8, 8, 16, 16], "stem_width": 8}}
RECIPE = {
    "name": "boxes",
    "data": {
        "dataset": {"use": "coco_json", "root": ".", "train": "train/boxes.json", "test": "test/boxes.json"},
        "batch_size": 4,
        "joint_augment": {"scale": [0.8, 1.3], "flip": 0.5, "color_jitter": 0.2},
        "workers": 0,
    },
    "student": SMALL,
    "teacher": {**SMALL, "backbone": "resnet18"},
    "schedule": {"use": "offline"},
    "losses": [
        {"use": "detector"},
        {"use": "hint", "layers": PYRAMID},
        {"use": "binary_kd", "target": "sigmoid"},
        {"use": "pseudo_labels", "threshold": 0.0001, "most": 3},
    ],
    "train": {"epochs": 2, "optimizer": {"lr": 0.01}, "device": "cpu"},
}
VARIANTS = {
    "taught": {},
    "cached": {"teacher": {"cache": {"views": 2, "what": "logits", "dtype": "fp32", "dir": "cache"}}, "losses": [{"use": "detector"}, {"use": "mld"}]},
    "alone": {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "detector"}], "data": {"validation": 4}},
    "mutual": {"teacher": None, "schedule": {"use": "mutual"}, "losses": [{"use": "detector"}, {"use": "logit_mse"}]},
}  # fmt: skip


def lay_out(folder, **counts):
    """Bright boxes of two shapes on noise, none in the first image."""
    draw = np.random.default_rng(0)
    for part, count in {"train": 12, "test": 6, **counts}.items():
        images, annotations = [], []
        (folder / part).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            for kind in draw.integers(0, 2, number % 3):
                width, height = ((40, 16), (16, 40))[kind]
                x, y = int(draw.integers(0, WIDTH - width)), int(draw.integers(0, HEIGHT - height))
                pixels[y : y + height, x : x + width] += 90
                annotations.append(
                    {"id": len(annotations), "image_id": number, "category_id": int(kind) + 1, "bbox": [x, y, width, height]}
                )
            images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
        categories = [{"id": 1, "name": "wide"}, {"id": 2, "name": "high"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / part / "boxes.json").write_text(json.dumps(content))
    return folder


def write(folder, file, **changes):
    return write_recipe(folder, merged(RECIPE, changes), file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs that were trained side by side."""
    folder = lay_out(tmp_path_factory.mktemp("boxes"))
    jobs = [
        Run(recipe.load(write(folder, f"{name}.yaml", name=name, **changes)), folder / "together" / name)
        for name, changes in VARIANTS.items()
    ]
    for outcome in train_together(jobs):
        assert outcome.reason is None, outcome.reason
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_side_by_side_a_run_is_what_it_is_alone(trained, name):
    kdkit.train(trained / f"{name}.yaml", folder=trained / "alone" / name, quiet=True)
    assert_same_run(trained / "alone" / name, trained / "together" / name)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_bits(trained, monkeypatch):
    stop_and_go_on(trained / "taught.yaml", trained / "stopped", monkeypatch)
    assert_same_run(trained / "stopped", trained / "together" / "taught")


def test_the_scores_of_a_run_are_those_of_a_report(trained):
    result = LoadedRun(trained / "together" / "taught").folder.result()
    assert {"map", "ap_50", "recall", "found", "iou_to_teacher"} <= result.test.keys()
    assert 0 <= result.test["map"] <= result.test["ap_50"] <= 100


def predict(monkeypatch, capsys, *words):
    """What `kdkit predict` prints to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["kdkit", "predict", *map(str, words)])
    with contextlib.suppress(SystemExit):
        cli.main()
    return capsys.readouterr()


def test_the_least_score_of_predicted_boxes_is_chosen_and_empty_images_are_told(trained, monkeypatch, capsys):
    run, images = trained / "together" / "taught", trained / "test"
    few, many = (predict(monkeypatch, capsys, run, images, "--threshold", least) for least in (0.99, 0.001))
    assert few.out == "file,class,score,x0,y0,x1,y1\n" and not many.err
    assert few.err == "note: 6 of 6 images have no object with a score of 0.99 or more (task.shown; `--threshold` sets another)\n"
    rows = list(csv.DictReader(io.StringIO(many.out)))
    assert len(rows) > 6 and all(float(row["x0"]) < float(row["x1"]) and float(row["score"]) >= 0.001 for row in rows)
    wrong = predict(monkeypatch, capsys, run, images, "--threshold", 2)
    assert wrong.err.startswith("--threshold: shown: ") and wrong.err.count("\n") == 1 and not wrong.out


def test_predicted_boxes_come_back_in_the_pixels_of_their_file(trained, tmp_path):
    with Image.open(trained / "test" / "2.png") as picture:
        picture.resize((3 * WIDTH, 3 * HEIGHT), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    path = write(trained, "sized.yaml", name="sized", teacher=None, schedule={"use": "supervised"}, losses=[{"use": "detector"}],
                 data={"image_size": [HEIGHT, WIDTH]}, task={"use": "detection", "shown": 0.001})  # fmt: skip
    kdkit.train(path, folder=trained / "sized", quiet=True)
    predictor = Predictor.of(trained / "sized", device=CPU)
    small, large = predictor(find_images([trained / "test" / "2.png", tmp_path / "large.png"]), CPU)
    assert small.values["class"] and {*small.values["class"]} <= {"wide", "high"}
    assert len(large.values["box"]) and max(max(box) for box in large.values["box"]) > WIDTH
    assert predictor.task.drawn(small.example, predictor.info) is not None


def test_boxes_in_the_padding_are_left_out_of_predictions():
    from torchvision.tv_tensors import BoundingBoxes

    predictor = Predictor(None, None, None, DataSpec(dataset={"use": "coco_json"}, batch_size=1, image_size=[40, 40]))
    corners = BoundingBoxes([[0.0, 2, 40, 10], [0, 5, 20, 20]], format="XYXY", canvas_size=(40, 40))
    told = predictor._as_large_as((10, 20), {"class": ["a", "b"], "score": [0.9, 0.8], "box": corners, "note": 1})
    assert told == {"class": ["b"], "score": [0.8], "box": [[0, 0, 10, 5]], "note": 1}


@pytest.fixture(scope="module")
def in_onnx(trained):
    """A folder with an exported detector."""
    pytest.importorskip("onnxruntime")
    made = export(LoadedRun(trained / "together" / "alone"), "onnx", trained / "onnx")
    assert "other heights and widths that are multiples of 32" in made.notes[0]
    return trained / "onnx"


@pytest.mark.slow
def test_an_exported_detector_is_torchvisions_and_takes_images_of_other_sizes(trained, in_onnx, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = LoadedRun(trained / "together" / "alone")
    session = onnxruntime.InferenceSession(str(in_onnx / "model.onnx"))
    images = torch.rand(2, 3, 96, 160)
    found = session.run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        expected = run.student()(images).logits
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)
    export(run, folder=tmp_path / "weights")
    with torch.no_grad():
        again = kdkit.load_student(tmp_path / "weights")(images).logits
    assert torch.equal(again, expected)


def boxes_of_the_guide(folder, picture, capsys):
    """What the code of the guide prints for a picture, from a score of 0.01 on."""
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "detection.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for place, file in (
        ("runs/cells/export/model.onnx", folder / "model.onnx"),
        ("photos/1.jpg", picture),
        ("LEAST, OVERLAP = 0.3", "LEAST, OVERLAP = 0.01"),
    ):
        assert place in code
        code = code.replace(place, str(file))
    exec(compile(code, "detection.md", "exec"), {})
    lines = [re.fullmatch(r"(\w+) ([\d.]+) (\[.*\])", line).groups() for line in capsys.readouterr().out.splitlines()]
    return [(name, float(score), json.loads(box)) for name, score, box in lines]


@pytest.mark.slow
def test_the_guide_finds_the_predicted_boxes_with_onnx(trained, in_onnx, tmp_path, capsys):
    run, own = trained / "together" / "alone", trained / "test" / "2.png"
    (said,) = Predictor.of(run, device=CPU, threshold=0.01)(find_images([own]), CPU)
    found = boxes_of_the_guide(in_onnx, own, capsys)[: len(said.values["box"])]
    assert found and [(name, box) for name, _, box in found] == [
        (name, pytest.approx(box, abs=0.1)) for name, box in zip(said.values["class"], said.values["box"], strict=True)
    ]
    assert [score for _, score, _ in found] == pytest.approx(said.values["score"], abs=0.006)
    # a picture with padding beside it
    with Image.open(own) as picture:
        picture.crop((0, 0, 32, HEIGHT)).resize((64, 2 * HEIGHT)).save(tmp_path / "narrow.png")
    for _, _, (x0, y0, x1, y1) in boxes_of_the_guide(in_onnx, tmp_path / "narrow.png", capsys):
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 2 * HEIGHT


@pytest.mark.slow
def test_a_run_killed_at_random_moments_goes_on_with_the_same_bits(trained):
    kill_often(trained, trained / "taught.yaml", "killed", lines(trained / "together" / "taught"), 2, time.time_ns())
    assert_same_run(trained / "killed", trained / "together" / "taught")


@pytest.mark.slow
def test_a_teacher_of_more_classes_teaches_those_of_the_data(trained):
    teacher = {**SMALL, "checkpoint": str(trained / "together" / "taught" / "student.safetensors"), "num_classes": 2}
    losses = [{"use": use} for use in ("detector", "box_regression", "pseudo_labels")] + [{"use": "binary_kd", "target": "sigmoid"}]
    content = {**RECIPE, "teacher": {**teacher, "classes": {"high": 1}}, "losses": losses, "train": {**RECIPE["train"], "epochs": 1}}
    content = merged(content, {"data": {"dataset": {"classes": ["high"]}}})
    kdkit.train(write_recipe(trained, content, "one_class.yaml"), folder=trained / "one_class", quiet=True)
    whole, images = LoadedRun(trained / "together" / "taught").student(), torch.rand(2, 3, HEIGHT, WIDTH)
    assert LoadedRun(trained / "one_class").student()(images).logits.shape[2] == 6
    with torch.no_grad():
        chosen = LoadedRun(trained / "one_class").recipe.task.of_classes(whole(images).logits, [1])
        torch.testing.assert_close(chosen, whole(images).logits[..., [0, 1, 2, 3, 4, 6]])
    with pytest.raises(RecipeError, match="its 2 classes are not the data's: `classes` says which are"):
        checks.make(recipe.load(write_recipe(trained, content | {"teacher": teacher}, "strange.yaml")))


@pytest.mark.slow
def test_two_processes_equal_one(trained):
    """Their shares have different numbers of points that answer for objects. Nothing is normalised over a batch."""
    plain = {**SMALL, "backbone": "convnext_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}}
    losses = [{"use": "detector"}, {"use": "hint", "layers": PYRAMID, "adapter": "linear"}, RECIPE["losses"][3]]
    train = {"epochs": 1, "optimizer": {"lr": 1e-4}, "device": "cpu"}
    path = write_recipe(trained, {**RECIPE, "student": plain, "teacher": plain, "losses": losses, "train": train}, "two.yaml")
    kdkit.train(path, folder=trained / "one", quiet=True)
    for command in start(trained, [("train", path, "--run", "two")] * 2):
        code, log = command.finish()
        assert code == 0, log
    for key, value in weights(trained / "one").items():
        torch.testing.assert_close(weights(trained / "two")[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"mixup": {"mixup_alpha": 0.2}}}, "targets of task 'detection' cannot be mixed"),
        ({"data": {"augment": {"flip": 0.5}}}, "data.augment: moves images, and would leave the targets"),
        ({"losses": [{"use": "bce"}]}, "'bce' reads a label of each row, and rows of task 'detection' have none"),
        ({"losses": [{"use": "cross_entropy"}]}, "its usual loss on labels is 'detector'"),
        ({"student": {"model": "detector/yolo"}}, "there is no detector 'yolo'; allowed: fcos"),
        ({"student": {"backbone": "resnet10"}}, "timm's 'resnet10' is no backbone of a detector"),
        ({"teacher": {"model": "detector/retinanet"}}, "the detectors' rows do not agree: 129 anchors or points in an image, and 1,161"),
        ({"student": {"input_size": 32}}, "are in pixels of the batch's images, which all networks see at that size"),
        ({"losses": [{"use": "detector", "terms": {"classes": 2}}]}, "terms: 'classes' is no term of this detector; allowed: classification"),
    ],
    ids=["mixup", "augment", "row labels", "classes", "head", "backbone", "rows", "input", "terms"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(trained, changes, says):
    with pytest.raises((RecipeError, ModelError)) as error:
        checks.make(recipe.load(write(trained, "refused.yaml", **changes)))
    assert says in str(error.value)


FASTER = {"model": "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"}
LACKS = "rows of Faster R-CNN are detections, not anchors or points: it teaches by `pseudo_labels` and by maps that `layers` names, not by `score_weighted`"


@pytest.mark.parametrize(
    ("teacher", "use", "says"),
    [
        (FASTER, "score_weighted", LACKS),
        (FASTER, "crosskd", "'crosskd' reads by default (`layers` says what else): "),
        ({"run": "runs/teacher"}, "hint", "teacher.run: no such key; did you mean 'recipe'?"),
    ],
    ids=["rows", "default layers", "run"],
)
def test_what_a_teacher_lacks_is_told_once(trained, teacher, use, says):
    path = write_recipe(trained, {**RECIPE, "teacher": teacher, "losses": [{"use": "detector"}, {"use": use, "layers": PYRAMID} if use == "hint" else {"use": use}]}, "lacking.yaml")  # fmt: skip
    with pytest.raises(RecipeError) as error:
        checks.make(recipe.load(path))
    (told,) = [line for line in str(error.value).splitlines() if "this key is required" not in line]
    assert says in told


def test_a_plan_counts_classes_of_boxes(trained):
    assert str(checks.make(recipe.load(trained / "alone.yaml"))).splitlines()[0].endswith("test images (3, 64, 96), 2 classes")
