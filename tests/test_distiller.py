"""A recipe's losses as one module in another training loop."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import write

import kdkit

torch.manual_seed(0)
IMAGES, LABELS = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
KL = {"use": "logit_kl", "temperature": 2}
HINT = {"use": "hint", "layers": [{"student": "body.*", "teacher": "body.*"}]}


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3, stride=2))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        return self.head(self.drop(self.body(images).mean((2, 3))))


def distiller(losses, teacher=None, **options):
    return kdkit.Distiller(Network(2), Network(4) if teacher is None else teacher, losses, IMAGES, LABELS, **options)


def test_value_is_the_weighted_sum_over_answers_of_both_networks():
    teacher = Network(4)
    found = distiller([{"use": "cross_entropy", "weight": 0.5}, KL | {"weight": 2}], teacher)
    found.student.eval()
    value = found(IMAGES, LABELS)
    ours, theirs = found.student(IMAGES), teacher(IMAGES)
    kl = F.kl_div((ours / 2).log_softmax(1), (theirs / 2).log_softmax(1), reduction="batchmean", log_target=True) * 4
    torch.testing.assert_close(value.total, 0.5 * F.cross_entropy(ours, LABELS) + 2 * kl)
    assert [*value.terms] == ["cross_entropy", "logit_kl"]


def test_adapters_learn_and_teachers_stay_outside():
    teacher = Network(4).train()
    found = distiller([KL, HINT], teacher)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    adapters = [name for name, _ in found.named_parameters() if name.startswith("objective.losses.hint")]
    assert len(adapters) >= 2  # a glob: one adapter for each layer
    assert found.student.training  # the batch that sizes are read from leaves the mode as it was
    assert len(found.state_dict()) == len(found.student.state_dict()) + len(found.objective.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    hints = []
    for _ in range(20):
        value = found(IMAGES, LABELS)
        optimizer.zero_grad()
        value.total.backward()
        optimizer.step()
        hints.append(value.terms["hint"].item())
    assert hints[-1] < hints[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    copied = distiller([KL, HINT], teacher)
    copied.load_state_dict(found.state_dict())
    copied.eval(), found.eval()
    assert torch.equal(copied(IMAGES, LABELS).total, found(IMAGES, LABELS).total)


def test_teachers_move_with_the_module():
    teacher = Network(4)
    distiller([KL], teacher).double()
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}


def test_ramps_follow_the_epoch():
    found = distiller([KL | {"weight": {"from": 0, "to": 2, "epochs": 4}}]).eval()
    totals = [found(IMAGES, LABELS, epoch=epoch).total.item() for epoch in (0, 1, 2, 4, 9)]
    assert totals[0] == 0
    assert [total / totals[1] for total in totals[1:]] == pytest.approx([1, 2, 4, 4])


def test_several_teachers_by_name():
    small, large = Network(3), Network(5)
    losses = [KL, KL | {"teacher": "large", "name": "of_large"}]
    found = distiller(losses, {"small": small, "large": large}).eval()
    both, alone = found(IMAGES, LABELS).terms.values()
    one = distiller([KL], small).eval()
    one.student.load_state_dict(found.student.state_dict())
    torch.testing.assert_close(both, (one(IMAGES, LABELS).terms["logit_kl"] + alone) / 2)


def test_a_teacher_that_changes_is_asked_as_it_is():
    teacher = Network(4)
    found = distiller([KL], teacher).eval()
    before = found(IMAGES, LABELS).total
    with torch.no_grad():
        teacher.head.bias += torch.tensor([5.0, 0.0, 0.0])
    assert not torch.equal(found(IMAGES, LABELS).total, before)


def test_labels_alone_need_no_teacher():
    found = kdkit.Distiller(Network(2), None, [{"use": "cross_entropy"}], IMAGES, LABELS)
    assert [*found(IMAGES, LABELS).terms] == ["cross_entropy"]


def test_losses_of_a_recipe_file(tmp_path):
    path = write(tmp_path, losses=[{"use": "cross_entropy"}, KL])
    assert [*distiller(path)(IMAGES, LABELS).terms] == ["cross_entropy", "logit_kl"]


def test_a_loss_that_remembers_images_gets_their_places():
    pair = {"student": "drop@input", "teacher": "drop@input"}
    crd = {"use": "crd", "layers": [pair], "size": 4, "negatives": 2}
    targets = torch.tensor([0, 1, 2] * 4)
    found = distiller([crd], targets=targets)
    value = found(IMAGES, targets[6:], index=torch.arange(6, 12))
    assert value.total.isfinite()


def test_rows_of_another_task():
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 1]]).repeat(3, 1)
    found = kdkit.Distiller(Network(2), Network(4), [{"use": "bce"}, {"use": "mld"}], IMAGES, labels, task="multilabel")
    found.eval()
    torch.testing.assert_close(
        found(IMAGES, labels).terms["bce"], F.binary_cross_entropy_with_logits(found.student(IMAGES), labels).detach()
    )


MISTAKES = {
    "loss": ([{"use": "logit_k"}], {}, "losses.0.use: unknown 'logit_k'; did you mean 'logit_kl'?"),
    "option": ([KL | {"temperatur": 4}], {}, "losses.0.temperatur: no such key; did you mean 'temperature'?"),
    "value": ([KL | {"temperature": -1}], {}, "losses.0.temperature: input should be greater than 0, got -1"),
    "none": ([], {}, "losses: needs at least 1"),
    "layer": ([HINT | {"layers": [{"student": "bodi", "teacher": "body"}]}], {}, "there is no layer 'bodi'; did you mean 'body'?"),
    "teacher": ([KL | {"teacher": "large"}], {}, "logit_kl: no teacher is called 'large'; allowed: teacher"),
    "no teacher": ([KL], {"teacher": {}}, "logit_kl: needs a teacher"),
    "task": ([KL], {"task": "clasification"}, "no task is called 'clasification'; did you mean 'classification'?"),
}


@pytest.mark.parametrize("losses, options, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(losses, options, says):
    with pytest.raises(kdkit.KdkitError) as caught:
        distiller(losses, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_moving_average_of_the_student_may_teach():
    student = Network(2)
    average = torch.optim.swa_utils.AveragedModel(student)
    found = kdkit.Distiller(student, average.module, [KL], IMAGES, LABELS)
    optimizer = torch.optim.SGD(found.parameters(), lr=0.5)
    for _ in itertools.repeat(None, 2):
        optimizer.zero_grad()
        (found(IMAGES, LABELS).total + F.cross_entropy(student(IMAGES), LABELS)).backward()
        optimizer.step()
        average.update_parameters(student)
    assert all(not torch.equal(a, b) for a, b in zip(average.module.parameters(), student.parameters(), strict=True))
