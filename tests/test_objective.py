"""The weighted sum, term by term."""

import pytest
import torch
from training import PLAIN, write

import kdkit
from kdkit import recipe
from kdkit.contracts.loss import Context
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Lesson
from kdkit.engine.objective import build, no_teacher, sum_of, without_graph
from kdkit.errors import PluginError

BATCH = Batch(torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4]), torch.arange(5))


def objective(folder, losses=PLAIN["losses"], only=None):
    return build(recipe.load(write(folder, losses=losses)), only)


def outputs(dtype=torch.float32, **options):
    return Outputs(torch.randn(5, 6, **options).to(dtype))


def test_total_is_the_weighted_sum(tmp_path):
    found = objective(
        tmp_path, [{"use": "cross_entropy", "weight": 0.25}, {"use": "logit_kl", "weight": 3}, {"use": "logit_kl", "temperature": 1}]
    )
    student = outputs(requires_grad=True)
    value = found(Lesson(student, [outputs()]), BATCH)
    assert value.terms.keys() == value.weighted.keys() == {"cross_entropy", "logit_kl", "logit_kl_2"}
    by_hand = 0.25 * value.terms["cross_entropy"] + 3 * value.terms["logit_kl"] + value.terms["logit_kl_2"]
    torch.testing.assert_close(value.total.detach(), by_hand)
    assert value.samples == 5
    assert value.total.requires_grad
    assert not any(term.requires_grad for term in value.terms.values())
    # a balance asks for the gradient of each
    assert all(term.requires_grad for term in value.weighted.values())
    alone = without_graph(value)
    assert not any(term.requires_grad for term in (alone.total, *alone.weighted.values()))


@pytest.mark.parametrize("name", ["half", "train", "losses"])
def test_a_loss_may_have_the_name_of_something_that_every_module_has(tmp_path, name):
    losses = [{"use": "cross_entropy"}, {"use": "logit_kl", "name": name}]
    run = kdkit.train(write(tmp_path, losses=losses, train={"epochs": 1}), folder=tmp_path / "run", quiet=True)
    assert f'"{name}"' in (run.folder / "metrics.jsonl").read_text()
    assert objective(tmp_path, losses).eval().half().losses[name].options.name == name


def test_a_loss_is_averaged_over_teachers_and_labels_counted_once(tmp_path):
    found = objective(tmp_path)
    student, teachers = outputs(), [outputs(), outputs(), outputs()]
    alone = [found(Lesson(student, [teacher]), BATCH) for teacher in teachers]
    together = found(Lesson(student, teachers), BATCH)
    torch.testing.assert_close(together.terms["logit_kl"], torch.stack([value.terms["logit_kl"] for value in alone]).mean())
    assert together.terms["cross_entropy"] == alone[0].terms["cross_entropy"]


def test_without_a_teacher_losses_on_labels_are_left(tmp_path):
    assert objective(tmp_path)(Lesson(outputs()), BATCH).terms.keys() == {"cross_entropy"}
    assert objective(tmp_path, only=["logit_kl"])(Lesson(outputs(), [outputs()]), BATCH).terms.keys() == {"logit_kl"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_get_full_precision(tmp_path, dtype):
    found = objective(tmp_path)
    student, teacher = outputs(dtype), outputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half = found(Lesson(student, [teacher]), BATCH)
    full = found(Lesson(Outputs(student.logits.float()), [Outputs(teacher.logits.float())]), BATCH)
    assert half.total == full.total
    assert half.total.dtype == torch.float32


def test_a_loss_on_labels_that_reads_the_teacher_is_told():
    assert repr(no_teacher().detach()) == "Outputs()"
    for name in ("logits", "features", "views", "mask"):
        with pytest.raises(PluginError, match="has no teacher to read"):
            getattr(no_teacher().detach(), name)


def test_a_sum_of_nothing_is_zero():
    assert sum_of([], like=torch.ones(2)) == 0


def test_adapters_are_sized_by_a_half_precision_probe_in_full_precision(tmp_path):
    layers = [{"student": "stage2", "teacher": "stage2"}]
    found = objective(tmp_path, [{"use": "hint", "layers": layers}])
    student, teacher = (Outputs(torch.rand(5, 6), {"stage2": torch.rand(5, width, 4, 4, dtype=torch.bfloat16)}) for width in (3, 7))
    found.setup(Lesson(student, [teacher]), BATCH, Context(torch.nn.Identity(), None, 6, 5, BATCH.labels))
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert found(Lesson(student, [teacher]), BATCH).total.requires_grad
