"""Detection: boxes move with images, networks answer like torchvision's, scores are COCO's."""

import copy

import pytest
import torch
from torch import nn

from kdkit import testing
from kdkit.contracts.dataset_source import DataInfo
from kdkit.data.images import stack
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
