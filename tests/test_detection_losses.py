"""Losses of detection: each against a slow second form, on degenerate images, and on real detectors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdkit
from kdkit import testing
from kdkit.engine.objective import Objective
from kdkit.recipe import registry
from kdkit.recipe.sections import LossEntry
from kdkit.testing import probes

PLUGINS = registry.load()
CLASSES, BINS, SIZE = 3, 4, (32, 48)
MAPS = [{"student": f"backbone.{name}", "teacher": f"backbone.{name}"} for name in ("fine", "coarse")]
BOXES = [[4.0, 4, 20, 28, 1, 0], [18, 6, 44, 22, 2, 0], [1, 1, 14, 17, 0, 1]]
TARGETS = torch.tensor([BOXES, [[10.0, 2, 40, 30, 0, 0], *[[-1.0] * 6] * 2]])


class Backbone(nn.Module):
    """Two maps, of strides 8 and 16."""

    def __init__(self, width=32, inner=4):
        super().__init__()
        self.out_channels = width
        self.body = nn.Conv2d(3, inner, 8, stride=8)
        self.fine = nn.Conv2d(inner, width, 1)
        self.coarse = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, images):
        fine = self.fine(self.body(images))
        return {"0": fine, "1": self.coarse(fine)}


def detector(kind="fcos", seed=0, **sizes):
    """A detector with torchvision's head, whose answers differ from place to place."""
    from kdkit_plugins.models._detectors import as_network
    from kdkit_plugins.models._gfl import Gfl
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(((8,), (16,)), ((0.5, 1.0) if kind == "retinanet" else (1.0,),) * 2)
    if kind == "gfl":
        network = Gfl(Backbone(**sizes), CLASSES, anchors, BINS)
    else:
        network = {"fcos": FCOS, "retinanet": RetinaNet}[kind](Backbone(**sizes), CLASSES, anchor_generator=anchors)
    torch.manual_seed(seed)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.15)
    return as_network(network)


def near_objects(logits, spread):
    """An answer whose boxes lie around true ones, and around what is none."""
    boxes = TARGETS[:, torch.arange(logits.shape[1]) % 3, :4]
    boxes = torch.where(boxes < 0, torch.tensor([2.0, 2, 14, 14]), boxes)
    moves = spread * torch.randn(boxes.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return torch.cat([boxes + moves, logits[..., 4:]], 2)


def answer(network, images, *layers):
    return kdkit.taps(network, layers)(images)


def prepared(name, student="fcos", teacher="fcos", width=32, dtype=torch.float32, **options):
    """A loss, set up on two detectors, what it compares, and the detectors."""
    cls = PLUGINS.losses[name]
    networks = detector(student, 1, inner=3, width=width), detector(teacher, 2).eval().requires_grad_(False)
    loss = cls(cls.Options(**options))
    networks = [network.to(dtype) for network in networks]
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0), dtype=dtype)
    layers = [[getattr(pair, side) for pair in loss.options.taps()] for side in ("student", "teacher")]
    student, teacher = (answer(network, images, *names) for network, names in zip(networks, layers, strict=True))
    torch.manual_seed(0)
    if name == "box_regression":
        student, teacher = (kdkit.Outputs(near_objects(x.logits, spread)) for x, spread in ((student, 4.0), (teacher, 3.0)))
    loss.setup(student, teacher, kdkit.Context(*networks, CLASSES, 2, TARGETS))
    loss = loss.to(dtype)
    for weight in loss.parameters():  # what begins as the identity is something else
        nn.init.normal_(weight, std=0.2)
    learning = student.map(lambda x: x.detach().clone().requires_grad_(x.requires_grad))
    return loss, learning, teacher, kdkit.Batch(images, TARGETS, torch.arange(2)), networks


def score(rows):
    return rows[..., 5:].sigmoid() * rows[..., 4:5].sigmoid()


def giou(a, b):
    """Of two boxes, as its definition says."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = width * height if width > 0 and height > 0 else 0 * width
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union_, hull_ = (torch.as_tensor(area).clamp_min(1e-2) for area in (union, hull))  # a box may have no area
    return common / union_ - (hull - union) / hull_, common / union_


def naive_score_weighted(loss, student, teacher, batch, networks):
    total, row = 0.0, 0
    anchors = teacher.logits.shape[1] // (4 * 6 + 2 * 3)
    for pair, project in zip(loss.options.layers, loss.projectors, strict=True):
        f_s, f_t = student.features[pair.student], teacher.features[pair.teacher]
        error = scores = 0.0
        for i in range(f_t.shape[2]):
            for j in range(f_t.shape[3]):
                for b in range(len(f_t)):
                    best = max(float(score(teacher.logits[b, row + k]).max()) for k in range(anchors))
                    hidden = (project[0].weight[:, :, 0, 0] @ f_s[b, :, i, j] + project[0].bias).clamp_min(0)
                    guess = project[2].weight[:, :, 0, 0] @ hidden + project[2].bias
                    error, scores = error + best * ((guess - f_t[b, :, i, j]) ** 2).sum(), scores + best
                row += anchors
        total = total + error / (f_t.shape[1] * scores + 1e-9)
    return total


def naive_fgd(loss, student, teacher, batch, networks):
    total, o = 0.0, loss.options
    for pair, contexts, align in zip(o.layers, loss.contexts, loss.aligns, strict=True):
        f_s, f_t = align(student.features[pair.student]), teacher.features[pair.teacher]
        n, _, height, width = f_t.shape
        for b in range(n):
            weight = torch.zeros(height, width)
            for x0, y0, x1, y1, _, ignored in batch.labels[b].tolist():
                cells = [
                    (i, j)
                    for i in range(height)
                    for j in range(width)
                    if x0 < (j + 1) * SIZE[1] / width and x1 > j * SIZE[1] / width and y0 < (i + 1) * SIZE[0] / height
                    if y1 > i * SIZE[0] / height
                ]
                for i, j in cells if ignored == 0 else ():
                    weight[i, j] = max(float(weight[i, j]), 1 / len(cells))
            empty = (weight == 0).sum()
            shares = torch.where(weight > 0, o.foreground * weight, o.background / empty.clamp_min(1))
            pixels, planes = (
                [x.numel() * torch.softmax(x.flatten() / o.temperature, 0).view(x.shape) for x in (f.abs().mean(0), f.abs().mean((1, 2)))]
                for f in (f_s[b], f_t[b])
            )
            error = sum(
                shares[i, j] * planes[0][i, j] * (planes[1] * (f_s[b, :, i, j] - f_t[b, :, i, j]) ** 2).sum()
                for i in range(height)
                for j in range(width)
            )
            gaps = sum((of_s - of_t).abs().sum() for of_s, of_t in zip(pixels, planes, strict=True))
            whole = []
            for f, block in zip((f_s[b], f_t[b]), contexts, strict=True):
                flat = f.flatten(1)
                pooled = flat @ torch.softmax(block.weigh.weight[0, :, 0, 0] @ flat, 0)
                first, norm, _, last = block.transform
                hidden = first.weight @ pooled + first.bias
                hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
                whole.append(f + (last.weight @ hidden.clamp_min(0) + last.bias)[:, None, None])
            total = total + (error + o.attention * gaps + o.relation * ((whole[0] - whole[1]) ** 2).sum()) / n
    return total


def naive_box_regression(loss, student, teacher, batch, networks):
    errors, weights = 0.0, 0.0
    for b in range(2):
        real = [row for row in batch.labels[b].tolist() if row[4] >= 0 and row[5] == 0]
        for row_s, row_t in zip(student.logits[b], teacher.logits[b], strict=True):
            if loss.options.bound == "none":
                weight, error = float(score(row_t).max()), 1 - giou(row_s[:4], row_t[:4])[0]
            else:
                iou, truth = max((float(giou(row_t[:4], box)[1]), box) for box in real)
                weight = float(score(row_t)[int(truth[4])]) if iou >= loss.options.overlap else 0.0
                error, bound = (1 - giou(row[:4], truth)[0] for row in (row_s, row_t))
                error = error if error + loss.options.margin > bound else 0.0
            errors, weights = errors + weight * error, weights + weight
    return errors / max(1.0, weights)


def through(branch, f, first, last):
    """Convolutions `first` to `last` of a branch, with what follows each but the ReLU of the last."""
    rows = [module for module in branch.conv.modules() if isinstance(module, nn.Conv2d | nn.GroupNorm)]
    step = 1 + isinstance(rows[1], nn.GroupNorm)
    for number in range(first, last):
        f = f if number == first == 0 else f.clamp_min(0)
        conv, *norm = rows[step * number : step * (number + 1)]
        f = F.conv2d(f, conv.weight, conv.bias, padding=1)
        f = F.group_norm(f, 32, norm[0].weight, norm[0].bias) if norm else f
    return f


def naive_crosskd(loss, student, teacher, batch, networks):
    o = loss.options
    ours, theirs = (network.head for network in networks)
    top = bottom = 0.0
    row = 0
    for pair, stride in zip(o.maps(), (8, 16), strict=True):
        found = []
        for branch in ("classification_head", "regression_head"):
            f_s = through(getattr(ours, branch), student.features[pair.student], 0, o.layer)
            f_t = through(getattr(theirs, branch), teacher.features[pair.teacher], 0, o.layer)
            channels = [
                (f_s[:, c] - f_s[:, c].mean()) / (f_s[:, c].std() + 1e-6) * f_t[:, c].std() + f_t[:, c].mean() for c in range(f_s.shape[1])
            ]
            f = through(getattr(theirs, branch), torch.stack(channels, 1), o.layer, 4).clamp_min(0)
            last = getattr(theirs, branch).cls_logits if branch[0] == "c" else getattr(theirs, branch).bbox_reg
            found.append(F.conv2d(f, last.weight, last.bias, padding=1))
        for i in range(found[0].shape[2]):
            for j in range(found[0].shape[3]):
                for b in range(2):
                    z, z_t = found[0][b, :, i, j], teacher.logits[b, row, 5:]
                    q = z_t.sigmoid()
                    top = (
                        top
                        + o.classes * ((z.sigmoid() - q).abs() ** o.beta * F.binary_cross_entropy_with_logits(z, q, reduction="none")).sum()
                    )
                    left, up, right, down = stride * found[1][b, :, i, j].clamp_min(0)
                    box = [stride * j - left, stride * i - up, stride * j + right, stride * i + down]
                    top = top + o.boxes * q.max() * (1 - giou(box, teacher.logits[b, row, :4])[0])
                    bottom = bottom + q.max()
                row += 1
    return top / bottom.clamp_min(1)


def naive_ld(loss, student, teacher, batch, networks):
    total, weights, t = 0.0, 0.0, loss.options.temperature
    for b in range(2):
        for row in range(teacher.logits.shape[1]):
            weight = float(score(teacher.logits[b, row]).max())
            for side in range(4):
                bins = slice(side * (BINS + 1), (side + 1) * (BINS + 1))
                p, q = (torch.softmax(x.features["output1"][b, row, bins] / t, 0) for x in (student, teacher))
                total = total + t**2 * weight * (q * (q.log() - p.log())).sum() / 4
            weights += weight
    return total / max(1.0, weights)


CASES = {
    "ld": (naive_ld, {"student": "gfl", "teacher": "gfl", "temperature": 3.0}),
    "score_weighted": (naive_score_weighted, {"layers": MAPS}),
    "score_weighted of another width": (naive_score_weighted, {"layers": MAPS, "width": 64}),
    "score_weighted of anchors": (naive_score_weighted, {"layers": MAPS, "teacher": "retinanet"}),
    "score_weighted of the finest map": (naive_score_weighted, {"layers": MAPS[:1]}),
    "fgd": (naive_fgd, {"layers": MAPS, "relation": 1e-3, "temperature": 0.7}),
    "fgd of another width": (naive_fgd, {"layers": MAPS, "width": 64}),
    "box_regression": (naive_box_regression, {}),
    "box_regression by a margin": (naive_box_regression, {"overlap": 0.3, "margin": 0.2}),
    "box_regression without a bound": (naive_box_regression, {"bound": "none"}),
    "crosskd": (naive_crosskd, {"layers": MAPS}),
    "crosskd behind one layer": (naive_crosskd, {"layers": MAPS, "layer": 1, "beta": 2.0, "classes": 0.4, "boxes": 0.75}),
    "crosskd on maps": (naive_crosskd, {"layers": MAPS, "layer": 0, "student": "retinanet"}),
}


def slopes(value, student, networks):
    """The gradient for the student's answer, and for its head."""
    learnt = [*(x for x in student.features.values() if x.requires_grad), *networks[0].parameters()]
    # the logits of a network are a layer too where a loss names them so
    learnt += [] if any(x is student.logits for x in learnt) else [student.logits]
    return torch.autograd.grad(value, learnt, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_a_slow_second_form(case):
    naive, options = CASES[case]
    *given, networks = prepared(case.split()[0], **options, dtype=torch.float64)
    value, expected = given[0](*given[1:]), naive(*given, networks)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    found, known = (slopes(x, given[1], networks) for x in (value, expected))
    assert value > 0 and any(slope.any() for slope in found)
    for slope, right in zip(found, known, strict=True):
        torch.testing.assert_close(slope, right, rtol=1e-5, atol=1e-8 * float(1 + right.abs().max()))


# x0, y0, x1, y1, quality, three classes: of each image, the rows of a teacher that sees something.
SEEN = [
    [
        [4.0, 4, 20, 28, 9, -9, 2, -9],  # found
        [6, 4, 20, 28, 9, -9, 1, -9],  # the same object with a lower score
        [5, 4, 20, 28, 9, -9, -9, 1],  # another class there
        [30, 10, 60, 40, 9, 1, -9, -9],  # beyond the image: clipped
        [40, 20, 40.5, 30, 9, 3, -9, -9],  # thinner than a pixel
        [10, 10, 30, 30, -2, 1, -9, -9],  # a score of 0.09
    ],
    [],
]
LEARNT = [
    {"boxes": [[4.0, 4, 20, 28], [5, 4, 20, 28], [30, 10, 48, 32]], "labels": [1, 2, 0]},
    {"boxes": [], "labels": []},
]


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_pseudo_labels_are_the_detections_of_the_teacher(kind):
    loss, student, teacher, batch, (network, _) = prepared("pseudo_labels", kind, terms={"bbox_regression": 2.0})
    nothing = torch.tensor([0.0, 0, 9, 9, -9, -9, -9, -9])
    rows = [torch.stack([*map(torch.tensor, seen), *[nothing] * (8 - len(seen))]) for seen in SEEN]
    hidden = kdkit.Batch(batch.inputs, kdkit.contracts.missing_labels.HIDDEN_LABELS, batch.index)
    value = loss(student, kdkit.Outputs(torch.stack(rows)), hidden)
    learnt = [{"boxes": torch.tensor(each["boxes"]).view(-1, 4), "labels": torch.tensor(each["labels"]).long()} for each in LEARNT]
    terms = network.losses(student.features["output1"], student.features["output2"], SIZE, learnt)
    expected = sum(term * (2 if name == "bbox_regression" else 1) for name, term in terms.items() if name != "count")
    torch.testing.assert_close(value, expected)
    (slope,), (right,) = (torch.autograd.grad(x, [student.features["output1"]]) for x in (value, expected))
    assert slope.any() and torch.equal(slope, right)


def test_pseudo_labels_depend_on_every_option():
    def value(**options):
        loss, student, _, batch, _ = prepared("pseudo_labels", **options)
        return float(loss(student, kdkit.Outputs(torch.tensor([SEEN[0]] * 2)), batch).detach())

    others = {"threshold": 0.8, "overlap": 1.0, "most": 1, "terms": {"bbox_ctrness": 0.0}}
    assert all(value(**{name: other}) != value() for name, other in others.items())


LOSSES = {
    "score_weighted": {"layers": MAPS},
    "fgd": {"layers": MAPS},
    "crosskd": {"layers": MAPS},
    "box_regression": {},
    "box_regression without a bound": {"bound": "none"},
    "pseudo_labels": {},
    "pseudo_labels of distributions": {"student": "gfl"},
    "ld": {"student": "gfl", "teacher": "gfl"},
    "crosskd to distributions": {"layers": MAPS, "teacher": "gfl"},
}


def unsure(x):
    return torch.cat([x[..., :4], -1e3 + 0 * x[..., 4:]], 2) if x.ndim == 3 and x.shape[2] > 4 else x


def zero_features(x):
    return 0 * x if x.ndim == 4 else x


def no_boxes(batch):
    return kdkit.Batch(batch.inputs, batch.labels[:, :0], batch.index)


def padding(batch):
    return kdkit.Batch(batch.inputs, torch.full_like(batch.labels, -1), batch.index)


def same(x):
    return x


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher", "batch"),
    [
        (same, same, no_boxes),
        (same, same, padding),
        (same, unsure, same),
        (unsure, unsure, padding),
        (zero_features, zero_features, same),
        (lambda x: x.half(), lambda x: x.half(), same),
    ],
    ids=["no boxes", "padding alone", "an unsure teacher", "nothing at all", "zeros", "fp16"],
)
def test_value_and_gradient_are_finite(name, student, teacher, batch):
    loss, ours, theirs, shown, _ = prepared(name.split()[0], **LOSSES[name])
    cls = type(loss)
    options = {key: value for key, value in LOSSES[name].items() if key not in ("student", "teacher")}
    entry = type("Entry", (LossEntry, cls.Options), {})(use=cls.name, **options)
    objective = Objective({cls.name: (entry, loss)}, PLUGINS.tasks["detection"]())
    lesson = kdkit.Lesson(ours.map(student), [theirs.map(teacher)])
    value = objective(lesson, batch(shown)).total
    assert value.isfinite() and value.dtype == torch.float32
    learnt = [x for x in (*ours.features.values(), ours.logits) if x.requires_grad]
    found = torch.autograd.grad(value, learnt, allow_unused=True)
    assert all(slope is None or slope.isfinite().all() for slope in found)


BESIDE = {
    "check_teaches_the_student": "the student's anchors, which come with the teacher's, teach nothing",
    "check_reads_every_layer": "likewise",
    "check_the_gradient_is_that_of_the_value": "in fp64, to which networks of the context are not converted; the slow second form checks it",
}


@pytest.mark.parametrize(("name", "but"), [("score_weighted", {}), ("crosskd", BESIDE), ("ld", PLUGINS.losses["ld"].exceptions)])
def test_losses_on_detectors_keep_every_promise(name, but, monkeypatch):
    options = {} if name == "ld" else {"layers": MAPS}
    kind = "gfl" if name == "ld" else "fcos"
    loss, student, teacher, batch, networks = prepared(name, kind, kind, **options)
    context = kdkit.Context(*networks, CLASSES, 2, TARGETS)
    probe = probes.Probe(loss, student.detach(), teacher, batch, context, "maps of a detector").rows("repeated", [0, 1, 1, 0, 1, 0])
    monkeypatch.setitem(probes._known, (type(loss), repr(sorted(options.items()))), [probe])
    for check in testing.LOSS_CHECKS:
        if check.__name__ not in but:
            check(type(loss), **options)


REFUSED = [
    ("score_weighted", {"layers": MAPS[::-1]}, "(2, 30, 8) does not have the rows"),
    ("score_weighted", {"layers": MAPS[1:]}, "(2, 30, 8) does not have the rows of maps of 2 x 3, 1 x 2; `layers` must name"),
    ("crosskd", {"layers": MAPS[:1]}, "30 rows, and its maps in `layers` make 24; name all maps"),
    ("crosskd", {"layers": MAPS, "layer": 5}, "`layer: 5` is too many: the student's head has 4 convolutions"),
    ("crosskd", {"layers": MAPS, "width": 64}, "must be maps of one shape: heads of equal width"),
    ("ld", {}, "the student has no distributions of boxes, the teacher no distributions of boxes; both must be `detector/gfl`"),
    ("ld", {"student": "gfl"}, "the student has 4 bins, the teacher no distributions of boxes"),
    ("box_regression", {"teacher": "retinanet"}, "the detectors' rows do not agree: 30 anchors or points in an image, and 60"),
]


@pytest.mark.parametrize(("name", "options", "says"), REFUSED)
def test_what_cannot_be_compared_is_refused_in_a_line(name, options, says):
    with pytest.raises(kdkit.ShapeError) as told:
        prepared(name, **options)
    assert says in str(told.value) and "\n" not in str(told.value)


def test_networks_without_such_heads_are_refused():
    loss, student, teacher, _, networks = prepared("crosskd", layers=MAPS)
    with pytest.raises(kdkit.ShapeError, match="the teacher, Identity, has no head of convolutions"):
        loss.setup(student, teacher, kdkit.Context(networks[0], nn.Identity(), CLASSES, 2, TARGETS))
    with pytest.raises(kdkit.ShapeError, match="there is no teacher"):
        loss.setup(student, teacher)
    loss, student, teacher, *_ = prepared("pseudo_labels")
    with pytest.raises(kdkit.ShapeError, match="the student is no detector with a loss of its own"):
        loss.setup(student, teacher, kdkit.Context(nn.Identity(), nn.Identity(), CLASSES, 2, TARGETS))


PYRAMID = [{"student": "backbone.fpn.layer_blocks.*", "teacher": "backbone.fpn.layer_blocks.*"}]


def test_losses_on_features_compare_pyramids_of_different_backbones():
    """With the layers that losses on detectors take by default, and those that a recipe names."""
    from kdkit.contracts.layers import expand_pairs

    source = PLUGINS.models["detector"]

    def built(backbone, **args):
        options = source.Options(model="detector/fcos", backbone=backbone, width=64, args={"channels": [8, 8, 16, 16], **args})
        return source(options, "fcos").build(CLASSES, (3, 64, 96))

    networks = built("resnet10t", stem_width=8), built("resnet18")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for name in ("hint", "mgd", "pkd", "cwd", "at", "score_weighted", "fgd", "crosskd"):
        cls = PLUGINS.losses[name]
        written = cls.Options() if name in LOSSES else cls.Options(layers=PYRAMID)
        loss = cls(written.model_copy(update={"layers": tuple(expand_pairs(written.taps(), *networks))}))
        student, teacher = (
            answer(network, images, *[getattr(pair, side) for pair in loss.options.taps()])
            for network, side in zip(networks, ("student", "teacher"), strict=True)
        )
        loss.setup(student, teacher.detach(), kdkit.Context(*networks, CLASSES, 2, TARGETS))
        networks[0].zero_grad()
        value = loss(student, teacher.detach(), kdkit.Batch(images, 2 * TARGETS, torch.arange(2)))
        value.backward()
        reached = networks[0].backbone.body.conv1[0].weight.grad
        assert value.isfinite() and value > 0 and reached.isfinite().all() and reached.any(), name


def naive_gfl(network, raw, anchors):
    """The terms of the generalized focal loss, point by point."""
    total = {"classification": 0.0, "bbox_regression": 0.0, "bbox_distribution": 0.0}
    answering, scores = 0, 0.0
    for b in range(2):
        for row, (x0, y0, x1, y1) in enumerate(anchors[b].tolist()):
            stride, x, y = x1 - x0, (x0 + x1) / 2, (y0 + y1) / 2
            best = None
            for *box, label, ignored in TARGETS[b].tolist():
                sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
                reach = max(abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2))
                low, high = (0, 64) if stride == 8 else (64, float("inf"))  # of the finest and of the coarsest map
                if label < 0 or ignored or min(sides) <= 0 or reach >= 1.5 * stride or not low < max(sides) < high:
                    continue
                if best is None or (box[2] - box[0]) * (box[3] - box[1]) < best[0]:
                    best = (box[2] - box[0]) * (box[3] - box[1]), box, int(label), sides
            logits, z = raw[b, row, : 4 * (BINS + 1)].view(4, BINS + 1), raw[b, row, 4 * (BINS + 1) :]
            quality = torch.zeros_like(z)
            if best is not None:
                _, box, label, sides = best
                left, up, right, down = stride * (logits.softmax(1) * torch.arange(BINS + 1)).sum(1)
                overlap, iou = giou([x - left, y - up, x + right, y + down], box)
                quality[label] = iou.detach()
                weight = z.detach().sigmoid().max()
                total["bbox_regression"] = total["bbox_regression"] + 2 * weight * (1 - overlap)
                for side, distance in enumerate(sides):
                    distance = min(distance / stride, BINS - 0.1)
                    log_p = logits[side].log_softmax(0)
                    low = int(distance)
                    spread = (low + 1 - distance) * log_p[low] + (distance - low) * log_p[low + 1]
                    total["bbox_distribution"] = total["bbox_distribution"] - 0.25 * weight * spread / 4
                answering, scores = answering + 1, scores + weight
            p = z.sigmoid()
            entropy = -(quality * p.log() + (1 - quality) * (1 - p).log())
            total["classification"] = total["classification"] + ((p - quality).abs() ** 2 * entropy).sum()
    assert answering > 2
    return {name: value / (answering if name == "classification" else max(1.0, scores)) for name, value in total.items()}


def test_the_generalized_focal_loss_is_that_of_a_slow_second_form():
    network = detector("gfl").double()
    found = network(torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    raw = found["raw"].detach().double().requires_grad_()
    anchors = found["anchors"].double()
    real = [rows[(rows[:, 4] >= 0) & (rows[:, 5] == 0)].double() for rows in TARGETS]
    terms = network.losses(raw, anchors, SIZE, [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in real])
    expected = naive_gfl(network, raw, anchors)
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)
        slope, right = (torch.autograd.grad(x, raw, retain_graph=True)[0] for x in (value, expected[name]))
        torch.testing.assert_close(slope, right, rtol=1e-6, atol=1e-9)
        assert slope.any()


def test_a_detector_of_distributions_learns_where_objects_are():
    network = detector("gfl")
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    cls = PLUGINS.losses["detector"]
    loss, batch = cls(cls.Options()), kdkit.Batch(images, TARGETS, torch.arange(2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    values = []
    for _ in range(25):
        student = answer(network, images, "output1", "output2")
        loss.setup(student, student, kdkit.Context(network, None, CLASSES, 2, TARGETS))
        values.append(loss(student, student, batch))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert PLUGINS.tasks["detection"]().fits(student.logits.shape, kdkit.DataInfo((3, *SIZE), CLASSES, 2, 2), 2)
    assert values[-1] < 0.7 * values[0]
