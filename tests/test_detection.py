"""Detection: boxes move with images, networks answer like torchvision's, scores are COCO's."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdkit import testing
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.task import Example, Rows
from kdkit.data.images import stack
from kdkit.engine.evaluate import Tally
from kdkit.errors import DataError
from kdkit.recipe import registry

detection = registry.load().tasks["detection"]
INFO = DataInfo((3, 96, 128), 3, 8, 4, ("cat", "dog", "cow"))
SIZE = (96, 128)


def helpers():
    """The modules beside the task and the networks."""
    import kdkit_plugins.models._detectors as detectors
    import kdkit_plugins.tasks._boxes as boxes

    return detectors, boxes


def test_task_keeps_its_contract():
    testing.check_task(detection())


BOXES = {"boxes": [[10.0, 20, 50, 60], [60, 10, 120, 90]], "labels": [0, 2]}


def test_boxes_move_with_the_image():
    from torchvision.transforms import v2

    task = detection()
    moving = task.movable(BOXES, SIZE, INFO)
    picture = torch.zeros(3, *SIZE, dtype=torch.uint8)
    from torchvision import tv_tensors

    _, flipped = v2.RandomHorizontalFlip(1.0)(tv_tensors.Image(picture), moving)
    assert task.moved(flipped).tolist() == [[78, 20, 118, 60, 0, 0], [8, 10, 68, 90, 2, 0]]
    _, cut = v2.CenterCrop((96, 64))(tv_tensors.Image(picture), moving)
    # the crop begins at 32: one box ends at its edge, the other is cut off at both sides
    assert task.moved(cut).tolist() == [[0, 20, 18, 60, 0, 0], [28, 10, 64, 90, 2, 0]]
    _, gone = v2.functional.crop(tv_tensors.Image(picture), 0, 0, 96, 8), v2.functional.crop(moving["boxes"], 0, 0, 96, 8)
    assert task.moved({**moving, "boxes": gone}).shape == (0, 6)


def test_unequal_numbers_of_boxes_are_padded():
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    _, targets = stack([(picture, torch.ones(count, 6)) for count in (2, 0, 1)])
    assert targets.shape == (3, 2, 6)
    assert targets[..., 4].tolist() == [[1, 1], [-1, -1], [1, -1]]
    _, boxes = helpers()
    assert [len(rows) for rows in boxes.unpadded(targets)] == [2, 0, 1]


def padded(size):
    """A target of 10 x 20 pixels that was scaled and padded to a size."""
    from torchvision import tv_tensors

    from kdkit.data.together import fitted

    task = detection()
    moving = task.movable({"boxes": [[0.0, 0, 10, 10]], "labels": [1]}, (10, 20), INFO)
    return task.moved(fitted(tv_tensors.Image(torch.zeros(3, 10, 20)), moving, size, "bilinear", 0)[1])


def test_the_frame_of_a_padded_picture_follows_its_boxes():
    _, boxes = helpers()
    whole, upright = padded((20, 40)), padded((40, 40))
    assert whole.tolist() == [[0, 0, 20, 20, 1, 0]]  # fills the image
    assert upright.tolist() == [[0, 10, 20, 30, 1, 0], [0, 10, 40, 30, -1, -1]]
    _, targets = stack([(torch.zeros(3, 40, 40), rows) for rows in (upright, upright[:1], upright[:0])])
    assert boxes.frames(targets, (40, 50)).tolist() == [[0, 10, 40, 30], [0, 0, 50, 40], [0, 0, 50, 40]]
    assert [rows.tolist() for rows in boxes.unpadded(targets)] == [upright[:1].tolist()] * 2 + [[]]
    assert detection().targets(targets, INFO, "targets").equal(targets)


def answered(*rows):
    """An answer (1, A, 8): boxes with a certain class each."""
    certain = [[*box, 30.0, *(30.0 if k == label else -30.0 for k in range(3))] for *box, label in rows]
    return torch.tensor([certain])


def scored(answer, target, teacher=None):
    """The scores, or those of agreement with a teacher, of one image of 40 x 40 pixels."""
    info = DataInfo((3, 40, 40), 3, 8, 4, INFO.class_names)
    task = detection()
    tally = Tally(task.scores(info) if teacher is None else task.agreement(info), together=False)
    tally.add(Rows(answer, target[None], teacher))
    return tally.values()


def test_scores_and_agreement_clip_boxes_to_the_picture():
    """A box that reaches into the padding is the true one once it is clipped, to the student as to the teacher."""
    pytest.importorskip("faster_coco_eval")
    task, target = detection(), padded((40, 40))
    answer = answered((0, 0, 20, 40, 1))
    assert scored(answer, target)["map"] == pytest.approx(100)
    assert scored(answer, target[:1])["map"] == pytest.approx(10)  # not clipped: an IoU of 0.5
    batch = Batch(torch.zeros(1, 3, 40, 40), target[None], torch.zeros(1, dtype=torch.int64))
    remembered = task.remembered(Outputs(answer), batch)
    assert remembered[0, 0, :4].tolist() == [0, 10, 20, 30]
    assert scored(answer, target, remembered) == {"found": 100, "iou_to_teacher": 100}


def test_what_there_is_nothing_of_has_no_score():
    pytest.importorskip("faster_coco_eval")
    nothing, some = torch.zeros(0, 6), answered((5, 5, 20, 20, 1))
    found = scored(some, nothing)
    assert {"map", "ap_50", "ap_75", "recall"} == {name for name, value in found.items() if math.isnan(value)} == {*found}
    for answer, teacher, share in ((some, [], math.nan), (some, [[30, 30, 40, 40, 0.9, 1]], 0.0)):
        told = scored(answer, nothing, torch.tensor(teacher).view(1, -1, 6))
        assert str(told["found"]) == str(share) and math.isnan(told["iou_to_teacher"])
    (score, *_) = detection().scores(INFO)
    assert (score.text(math.nan), score.text(12)) == ("-", "12.00 %")


def test_a_picture_of_boxes_leaves_out_the_padding_and_writes_scores():
    task, target = detection(), padded((40, 40))
    answer = answered((0, 0, 20, 40, 1), (25, 12, 35, 20, 2))[0]
    example = Example(torch.zeros(3, 40, 40), target, {"student": answer})
    for one in (example, replace(example, target=None, frame=(0, 10, 40, 30))):
        *_, axes = task.drawn(one, INFO).axes
        assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 39.5), (29.5, 9.5))
        assert [text.get_text() for text in axes.texts] == ["1.00"] * 2
        assert min(outline.get_alpha() for outline in axes.patches) >= 0.6


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"boxes": [[5, 5, 5, 9]], "labels": [0]}, "box [5, 5, 5, 9] has no area"),
        ({"boxes": [[5, 5, 8, 9]], "labels": [3]}, "class 3, but classes go from 0 to 2"),
        ({"boxes": [[5, 5, 8, 9]], "labels": []}, "it has 1 boxes, 0 labels"),
        ({"labels": []}, "no boxes (M, 4) with labels"),
        (7, "no boxes (M, 4) with labels"),
    ],
)
def test_wrong_targets_are_refused(target, says):
    with pytest.raises(DataError, match=None) as refused:
        detection().movable(target, SIZE, INFO)
    assert says in str(refused.value)


def made(name):
    from torchvision.models import detection as theirs

    arguments = {"weights": None, "weights_backbone": None, "num_classes": 4}
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    sizes = {"min_size": SIZE[0], "max_size": SIZE[1]}
    if name == "ssdlite320_mobilenet_v3_large":
        network = getattr(theirs, name)(**arguments, **plain)
        network.transform.fixed_size = (SIZE[1], SIZE[0])
        return network
    return getattr(theirs, name)(**arguments, **plain, **sizes)


# classes that stand for none, and a factor of the last weights that makes random scores differ
NETWORKS = {
    "fcos_resnet50_fpn": (0, 10),
    "retinanet_resnet50_fpn": (0, 10),
    "ssdlite320_mobilenet_v3_large": (1, 1),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (1, 0.1),
}


def varied(theirs, images, factor):
    """Let a random detector see images, so that its answers differ from place to place."""
    detectors, _ = helpers()
    seeing = detectors.as_network(copy.deepcopy(theirs)).train()
    for layer in seeing.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        seeing(3 * images)
        for path, weight in seeing.named_parameters():
            if path.endswith(("cls_logits.weight", "cls_score.weight")):
                weight *= factor
    theirs.load_state_dict(seeing.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_detectors_answer_and_learn_like_torchvisions(name):
    detectors, boxes = helpers()
    background, factor = NETWORKS[name]
    assert detectors.background(name) == background
    torch.manual_seed(0)
    theirs, images = made(name).eval(), torch.rand(2, 3, *SIZE)
    varied(theirs, images, factor)
    ours = detectors.as_network(copy.deepcopy(theirs))
    assert (ours.not_in_onnx is not None) == name.startswith("fasterrcnn")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        listed, answer = theirs([*images]), ours(images)["logits"]
    inside = getattr(theirs, "roi_heads", theirs)
    rule = boxes.Rule(0.0, inside.nms_thresh, 100, candidates=100_000)
    found = boxes.detect(answer, rule, SIZE)
    assert detection().fits(answer.shape, DataInfo((3, *SIZE), answer.shape[2] - 5, 1, 1), 2)
    for each, rows in zip(listed, found, strict=True):
        # torchvision takes the root of FCOS's scores, which leaves their order as it is
        scores = rows[:, 4].sqrt() if name.startswith("fcos") else rows[:, 4]
        count = min(len(rows), len(each["scores"]))
        assert count > 20
        torch.testing.assert_close(scores[:count], each["scores"][:count], atol=1e-5, rtol=1e-4)
        # scores that are nearly equal may come in another order
        for box, label in zip(each["boxes"][:count], each["labels"][:count], strict=True):
            same = rows[rows[:, 5] + background == label, :4]
            assert float((same - box).abs().amax(1).min()) < 0.01
    targets = [
        {"boxes": torch.tensor(BOXES["boxes"]), "labels": torch.tensor(BOXES["labels"])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    for network in (theirs, ours):
        network.train()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.Dropout):
                layer.eval()
    torch.manual_seed(1)
    expected = theirs([*images], [{**each, "labels": each["labels"] + background} for each in targets])
    torch.manual_seed(1)
    for _ in images:  # torchvision's own transform draws a size of each image
        torch.empty(1).uniform_()
    made_of = ours(images)
    terms = ours.losses(made_of["raw"], made_of["anchors"], SIZE, targets)
    assert terms.keys() - {"count"} == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value, atol=1e-5, rtol=1e-4)
