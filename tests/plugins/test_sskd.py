import json

import pytest
import torch
import torch.distributed as dist
from training import forked, train

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

SSKD = registry.load().losses["sskd"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((6,), (6,)), ((6,), (10,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))]
TURNED = {"turned": 3}


def sskd(student=(6,), teacher=(10,), size=6, layers=PAIR, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = SSKD(SSKD.Options(layers=layers, **options))
    f_s = random_outputs({"a": student}, size=size, views=TURNED)
    f_t = random_outputs({"b": teacher}, size=size, seed=1, views=TURNED)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def projections(head, f):
    first, _, second = head
    return [(torch.clamp(x.flatten() @ first.weight.T + first.bias, min=0) @ second.weight.T + second.bias) for x in f]


def cosine_matrix(head, turned, plain):
    turned, plain = projections(head, turned), torch.stack(projections(head, plain))
    lengths = (plain**2).sum(1).sqrt()
    return torch.stack([plain @ one / (one @ one).sqrt() / lengths for one in turned])


def kept(t, truth, share):
    """All rows that are right, and of the others a share, the truth's rank first, then its probability."""
    places = []
    for i, row in enumerate(t):
        rank = int((row > row[truth[i]]).sum())
        places.append((rank, -float(row.softmax(0)[truth[i]]), i))
    right = [place for place in places if place[0] == 0]
    wrong = sorted(place for place in places if place[0] > 0)
    return [i for *_, i in right + wrong[: int(share * len(wrong))]]


def divergence(s, t, truth, share, temperature):
    rows = kept(t / temperature, truth, share)
    total = 0 * s.sum()
    for i in rows:
        p, q = (s[i] / temperature).softmax(0), (t[i] / temperature).softmax(0)
        total = total + (q * (q / p).log()).sum()
    return temperature**2 * total / max(len(rows), 1)


def formula(loss, student, teacher, batch):
    options, n = loss.options, len(batch.classes)
    images = [i for _ in range(3) for i in range(n)]
    a_s = cosine_matrix(loss.student_head[0], student.views["turned"].features["a"], student.features["a"])
    a_t = cosine_matrix(loss.teacher_head[0], teacher.views["turned"].features["b"], teacher.features["b"])
    value = options.similarity_weight * divergence(a_s, a_t.detach(), images, options.similarity_share, options.similarity_temperature)
    z_s, z_t = student.views["turned"].logits, teacher.views["turned"].logits
    labels = [int(batch.classes[i]) for i in images]
    value = value + options.logit_weight * divergence(z_s, z_t, labels, options.logit_share, options.logit_temperature)
    if next(loss.teacher_head.parameters()).requires_grad:
        value = value - sum((row[i].exp() / row.exp().sum()).log() for row, i in zip(a_t, images, strict=True)) / (3 * n)
    return value


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_is_the_formula(size, shapes):
    assert_agrees(*with_formula(sskd(*shapes, size=size)))


@pytest.mark.parametrize(
    "options", [{}, {"similarity_share": 0.25, "logit_share": 0.5}, {"similarity_temperature": 0.1, "logit_weight": 0}]
)
def test_is_the_formula_on_a_usual_batch(options):
    assert_agrees(*with_formula(sskd(size=64, **options)))


def test_is_the_formula_without_the_heads_task_when_the_head_rests():
    loss, *answers = sskd(size=8)
    loss.teacher_head.requires_grad_(False)
    value = loss(*answers)
    torch.testing.assert_close(value, formula(loss, *answers))
    learning, *_ = sskd(size=8)
    assert learning(*answers) > value + 1


def with_formula(case):
    loss, student, teacher, batch = case
    return loss, formula, student, teacher, batch


@pytest.mark.parametrize("shapes", SHAPES[:3])
def test_gradient(shapes):
    loss, student, teacher, batch = sskd(*shapes, size=3)
    loss, student, teacher = loss.double(), student.map(torch.Tensor.double), teacher.map(torch.Tensor.double)
    seen = student.views["turned"]

    def value(f, turned, logits):
        view = kdkit.Outputs(logits, {"a": turned})
        return loss(kdkit.Outputs(student.logits, {"a": f}, {"turned": view}), teacher, batch)

    inputs = [x.clone().requires_grad_() for x in (student.features["a"], seen.features["a"], seen.logits)]
    assert torch.autograd.gradcheck(value, inputs)


def test_the_teachers_head_learns_its_task_alone():
    loss, *answers = sskd()
    loss(*answers).backward()
    found = [p.grad.clone() for p in loss.teacher_head.parameters()]
    loss.zero_grad()
    student, teacher, _ = answers
    a_t = cosine_matrix(loss.teacher_head[0], teacher.views["turned"].features["b"], teacher.features["b"])
    torch.nn.functional.cross_entropy(a_t, torch.arange(6).repeat(3)).backward()
    for got, parameter in zip(found, loss.teacher_head.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_one_image_has_no_similarities():
    loss, student, teacher, batch = sskd(size=1, logit_weight=0)
    learning = student.map(lambda x: x.requires_grad_())
    value = loss(learning, teacher, batch)
    value.backward()
    assert value.item() == 0
    assert not learning.features["a"].grad.any() and not learning.views["turned"].features["a"].grad.any()


def test_a_share_of_nothing_right_is_nothing():
    """A teacher that is never right, of whose answers none is kept."""
    loss, student, teacher, batch = sskd(logit_share=0, similarity_weight=0)
    loss.teacher_head.requires_grad_(False)
    wrong = torch.nn.functional.one_hot((batch.labels + 1) % 5, 5).repeat(3, 1).float()
    teacher = kdkit.Outputs(teacher.logits, teacher.features, {"turned": kdkit.Outputs(wrong, teacher.views["turned"].features)})
    assert loss(student, teacher, batch).item() == 0


def test_the_order_of_equally_wrong_answers_does_not_matter():
    loss, student, teacher, batch = sskd(logit_share=0.5, similarity_share=0.5, size=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def shuffled(outputs):
        view = outputs.views["turned"].map(lambda x: torch.cat([part[order] for part in x.split(16)]))
        return kdkit.Outputs(outputs.logits[order], {name: x[order] for name, x in outputs.features.items()}, {"turned": view})

    other = kdkit.Batch(batch.inputs[order], batch.labels[order], batch.index[order])
    torch.testing.assert_close(loss(shuffled(student), shuffled(teacher), other), loss(student, teacher, batch))


def test_several_pairs_are_averaged():
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    student = random_outputs({"a": (3, 4, 4), "c": (6,)}, views=TURNED)
    teacher = random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1, views=TURNED)
    both = SSKD(SSKD.Options(layers=layers))
    both.setup(student, teacher)
    alone = []
    for i, layer in enumerate(layers):
        one = SSKD(SSKD.Options(layers=[layer]))
        one.setup(student, teacher)
        one.student_head[0].load_state_dict(both.student_head[i].state_dict())
        one.teacher_head[0].load_state_dict(both.teacher_head[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.slow
def test_keeps_the_promises_without_logits():
    check_loss(SSKD, logit_weight=0)


def test_refuses_outputs_without_turned_images():
    with pytest.raises(kdkit.ShapeError, match=r"`schedule: \{use: staged, turned: true\}`"):
        SSKD(SSKD.Options(layers=PAIR)).setup(random_outputs({"a": (6,)}), random_outputs({"b": (6,)}))


def test_refuses_other_classes_unless_logits_are_left_out():
    student, teacher = random_outputs({"a": (6,)}, views=TURNED), random_outputs({"b": (6,)}, classes=7, views=TURNED)
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(18, 5\) and teacher logits \(18, 7\).*logit_weight: 0"):
        SSKD(SSKD.Options(layers=PAIR)).setup(student, teacher)
    loss = SSKD(SSKD.Options(layers=PAIR, logit_weight=0))
    loss.setup(student, teacher)
    assert loss(student, teacher, random_batch()).isfinite()


LAYERS = [{"student": "penultimate", "teacher": "penultimate"}]
STAGES = [
    {"name": "head", "losses": ["sskd"], "train": ["sskd.teacher_head"], "epochs": 3},
    {"name": "distill", "train": ["student", "sskd.student_head"], "epochs": 1},
]


def test_trains_the_teachers_head_first_and_then_the_student(tmp_path):
    losses = [{"use": "cross_entropy", "weight": 0.1}, {"use": "logit_kl", "weight": 0.9}, {"use": "sskd", "layers": LAYERS}]
    train(tmp_path, losses=losses, schedule={"use": "staged", "turned": True, "stages": STAGES}, run={"log_steps": 1})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    head = [line["train"]["sskd"] for line in lines if line["kind"] == "epoch" and line["stage"] == "head"]
    assert head[2] < head[0]
    assert any(line["stage"] == "distill" and line["kind"] == "epoch" for line in lines)


def test_a_recipe_without_turned_images_is_told(tmp_path):
    with pytest.raises(kdkit.RecipeError, match=r"sskd.*`schedule: \{use: staged, turned: true\}`"):
        train(tmp_path, losses=[{"use": "cross_entropy"}, {"use": "sskd", "layers": LAYERS}])


def gathered(rank, world, folder):
    """A batch of eight on `world` processes; the gradients averaged by hand afterwards, as a data-parallel trainer does."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    student, teacher = random_outputs({"a": (6,)}, size=8, views=TURNED), random_outputs({"b": (10,)}, size=8, seed=1, views=TURNED)
    share = torch.arange(8).chunk(world)[rank]

    def mine(outputs):
        view = outputs.views["turned"].map(lambda x: torch.cat([part[share] for part in x.split(8)]))
        return kdkit.Outputs(outputs.logits[share], {name: x[share] for name, x in outputs.features.items()}, {"turned": view})

    loss = SSKD(SSKD.Options(layers=PAIR, gather=True, logit_share=0.5))
    torch.manual_seed(0)
    student, teacher, batch = mine(student).map(lambda x: x.clone().requires_grad_()), mine(teacher), random_batch(8)
    loss.setup(student, teacher)
    value = loss(student, teacher, kdkit.Batch(batch.inputs[share], batch.labels[share], batch.index[share]))
    value.backward()
    found = {
        "value": value.detach(),
        "slope": student.features["a"].grad,
        "slope of logits": student.views["turned"].logits.grad.view(3, -1, 5),
    }
    torch.save(found | {name: parameter.grad for name, parameter in loss.named_parameters()}, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_that_gather_equal_one(tmp_path):
    processes = [forked(gathered, rank, 2, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    gathered(0, 1, tmp_path)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, whole in one.items():
        dim = 1 if name == "slope of logits" else 0
        parts = torch.cat([first[name], second[name]], dim) / 2 if name.startswith("slope") else (first[name] + second[name]) / 2
        torch.testing.assert_close(parts, whole, msg=lambda text, name=name: f"{name}: {text}")
