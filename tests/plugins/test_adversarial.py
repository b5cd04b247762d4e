"""The adversarial schedules, the attacked view, the robust accuracy, and the adversarial features."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from kdkit_plugins.schedules._attacks import AttackOptions, against_answers, against_labels, attacked
from test_stage_resume import interrupt_at
from torch import nn
from training import PLAIN, assert_same_run, merged, train, write

import kdkit
from kdkit.contracts.records import Batch, Outputs
from kdkit.engine.evaluate import Judge, measure
from kdkit.errors import RecipeError
from kdkit.models.freezing import in_eval_mode
from kdkit.models.normalization import InputAdapter, NormalizationAdapter
from kdkit.models.tapped import TappedModel
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

ALONE = {"teacher": None, "schedule": {"use": "adversarial_alone", "steps": 2}, "losses": [{"use": "cross_entropy", "view": "attacked"}]}
ARD = {"schedule": {"use": "adversarial", "steps": 2}, "losses": [{"use": "logit_kl", "view": "attacked", "temperature": 30}]}
RSLAD = {
    "schedule": {"use": "adversarial", "steps": 2, "against": "teacher", "start": "normal"},
    "losses": [{"use": "logit_kl", "view": "attacked", "temperature": 1, "weight": 0.83}, {"use": "logit_kl", "temperature": 1}],
}


def network(mean=0.4, std=0.2, dropout=0.5):
    """A network that normalises by itself, as those of recipes do: what it is called with is in [0, 1]."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 5))
    return TappedModel(layers.train(), adapt=InputAdapter(NormalizationAdapter(0.0, 1.0, mean, std)))


def images(count=6):
    """Some at the ends of the range."""
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return (x * 1.4 - 0.2).clamp(0, 1)


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("start", ["uniform", "normal", "image"])
@pytest.mark.parametrize("std", [1.0, 0.2])
def test_an_attack_stays_in_its_box_of_pixels_and_harms(start, std):
    student, x, options = network(std=std), images(), AttackOptions(epsilon=8, step=2, steps=5, start=start)
    with in_eval_mode(student.module):
        found = attacked(options, x, against_labels(student, LABELS))
        assert against_labels(student, LABELS)(found) > against_labels(student, LABELS)(x)
    assert (found - x).abs().max() <= 8 / 255 + 1e-6
    assert (found - x).abs().max() > 7.9 / 255  # five steps of 2 reach the border
    assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad


def test_an_attack_leaves_no_trace_in_the_student():
    student = network()
    before, modes = copy.deepcopy(student.module.state_dict()), [m.training for m in student.module.modules()]
    student.module[1].eval()
    with in_eval_mode(student.module):
        attacked(AttackOptions(steps=3), images(), against_labels(student, LABELS))
    assert all(torch.equal(value, before[key]) for key, value in student.module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.module.parameters())
    assert [m.training for m in student.module.modules()] == [*modes[:2], False, *modes[3:]]


def by_hand(student, x, labels, steps, epsilon, step):
    """One image at a time, in the normalised space of the network, with an epsilon that is divided by its deviation."""
    norm, found = student.adapt.normalization, []
    for image, label in zip(x, labels, strict=True):
        original, low, high = (norm(value[None]) for value in (image, torch.zeros_like(image), torch.ones_like(image)))
        moved = original.clone()
        for _ in range(steps):
            moved.requires_grad_()
            loss = F.cross_entropy(student.module(moved), label[None])
            (slope,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + step * norm.scale * slope.sign()
            moved = torch.minimum(torch.maximum(moved, original - epsilon * norm.scale), original + epsilon * norm.scale)
            moved = torch.minimum(torch.maximum(moved, low), high)
        found.append((moved - norm.shift) / norm.scale)
    return torch.cat(found)


def test_pixels_and_normalised_values_give_one_attack():
    student, x = network(), images()
    with in_eval_mode(student.module):
        found = attacked(AttackOptions(steps=4, start="image"), x, against_labels(student, LABELS))
        expected = by_hand(student, x, LABELS, 4, 8 / 255, 2 / 255)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_attack_on_a_teachers_answer_raises_the_divergence():
    student, x = network(), images()
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    with in_eval_mode(student.module):
        harm = against_answers(student, logits)
        p, q = logits.softmax(1), student(x).logits.softmax(1)
        torch.testing.assert_close(harm(x), (p * (p / q).log()).sum())
        assert harm(attacked(AttackOptions(start="normal"), x, harm)) > harm(x)


@pytest.mark.first(1)
@pytest.mark.parametrize("recipe", [ALONE, ARD, RSLAD], ids=["alone", "ard", "rslad"])
def test_recipes_of_the_papers_run(recipe, tmp_path):
    spec = merged(PLAIN, {**recipe, "train": {"epochs": 1}})
    plugins, entry = registry.load(), spec["schedule"]
    schedule = plugins.schedules[entry["use"]]
    own = schedule(schedule.Options(**{k: v for k, v in entry.items() if k != "use"}))
    student, teacher = network(dropout=0), network(mean=0.1).freeze()
    models = type("M", (), {"student": lambda self: student, "teachers": lambda self: {"teacher": teacher}})()
    (stage,) = own.stages(models)
    (lesson,) = stage.step(Batch(images(), LABELS, torch.arange(6)))
    assert set(lesson.student.views) == {"attacked"}
    assert not torch.equal(lesson.student.views["attacked"].logits, lesson.student.logits)
    result = train(tmp_path, spec)  # the whole way, check included
    assert math.isfinite(result.test["top1"])


def test_a_loss_of_a_view_reads_the_students_answer_to_it_and_the_teachers_to_the_images():
    from kdkit.contracts.schedule import Lesson
    from kdkit.engine.objective import of_view

    clean, moved, taught, seen = (Outputs(torch.randn(6, 5)) for _ in range(4))
    lesson = Lesson(clean.seen_beside({"attacked": moved}), [taught, taught.seen_beside({"attacked": seen})])
    found = of_view("kl", lesson, "attacked", 6)
    assert found.student is moved and found.teachers[0] is taught and found.teachers[1] is seen
    with pytest.raises(kdkit.ShapeError, match="kl: there is no view 'atacked'; did you mean 'attacked'"):
        of_view("kl", lesson, "atacked", 6)
    with pytest.raises(kdkit.ShapeError, match="view 'attacked' has 6 images, of a batch of 2"):
        of_view("kl", lesson, "attacked", 2)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"losses": [{"use": "logit_kl", "view": "atacked"}]}, r"recipe.yaml:\d+: losses.0.*there is no view 'atacked'"),
        ({"schedule": {"use": "offline"}}, r"losses.0.*there is no view 'attacked'; the schedule shows none"),
        ({"schedule": {"use": "adversarial", "epsilon": 300}}, r"schedule.epsilon"),
        ({"schedule": {"use": "adversarial_alone"}}, r"teacher: schedule 'adversarial_alone' has no teacher"),
        ({"metrics": [{"use": "robust_accuracy", "steps": 0}]}, r"metrics.0.steps"),
        ({"decide_by": "top7"}, r"recipe.yaml:\d+: decide_by: 'top7' is no metric plugin"),
    ],
)
def test_mistakes_are_one_line(changed, says, tmp_path):
    path = write(tmp_path, {**PLAIN, **ARD, **changed})
    with pytest.raises(RecipeError, match=says):
        kdkit.check(path)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    spec = merged(PLAIN, {**RSLAD, "train": {"epochs": 2}, "run": {"checkpoint_steps": 1}})
    whole = train(tmp_path, spec, into="whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, spec, into="parts")
    again = train(tmp_path, spec, into="parts")
    assert whole.folder != again.folder
    assert_same_run(whole.folder, again.folder)


# robust accuracy


def judge_of(**options):
    pytest.importorskip("art")
    metric = registry.load().metrics["robust_accuracy"]
    task = registry.load().tasks["classification"]()
    info = kdkit.DataInfo((1, 8, 8), 5, 60, 60)
    return Judge(task, [*task.scores(info)[:1], metric(metric.Options(**options)).score(task, info)], [])


def batches(size):
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        labels = network().twin().module.eval()(network().adapt(x)).argmax(1)
    index = torch.arange(60)
    return [Batch(x[i : i + size], labels[i : i + size], index[i : i + size]) for i in range(0, 60, size)]


def test_the_librarys_attack_is_ours():
    """Two implementations, one number: the accuracy under PGD from the image itself."""
    student, judge = network(), judge_of(restarts=0, steps=5, epsilon=3, step=1)
    found = measure(student, batches(20), judge)
    right = []
    with in_eval_mode(student.module):
        for batch in batches(60):
            options = AttackOptions(epsilon=3, step=1, steps=5, start="image")
            moved = attacked(options, batch.inputs, against_labels(student, batch.labels))
            right = (student(moved).logits.argmax(1) == batch.labels).float()
    name = judge.scores[1].name
    assert found[name] == pytest.approx(100 * right.mean().item())
    assert found["top1"] == 100 and 0 < found[name] < 100


def test_measuring_leaves_gradients_modes_and_random_numbers_alone():
    import numpy as np

    student, judge = network(), judge_of(steps=2)
    state, numeric = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = measure(student, batches(20), judge)
    assert all(p.grad is None for p in student.module.parameters()) and student.module.training
    assert torch.equal(state, torch.get_rng_state()) and (numeric == np.random.get_state()[1]).all()
    assert measure(student, batches(20), judge) == first


def test_a_fraction_is_the_same_samples_in_batches_of_any_size():
    judge = judge_of(steps=1, restarts=0, fraction=0.3)
    one, other = (measure(network(), batches(size), judge) for size in (7, 60))
    assert one == pytest.approx(other)


def test_no_sample_is_no_accuracy():
    judge = judge_of(steps=1, fraction=0.001)
    with pytest.raises(kdkit.RunError, match="fraction=0.001': none of the samples is shown"):
        measure(network(), batches(20)[1:], judge)


def test_it_decides_and_is_reported(tmp_path):
    pytest.importorskip("art")
    spec = {**PLAIN, **ARD, "decide_by": {"use": "robust_accuracy", "steps": 2}, "train": {**PLAIN["train"], "epochs": 1}}
    result = train(tmp_path, merged(spec, {"data": {"validation": 10}}))
    assert next(iter(result.test)) == "robust_accuracy_steps=2"
    assert "robust_accuracy_steps=2" in result.teacher and "robust_accuracy_steps=2" in result.validation


# adversarial features

Loss = registry.load().losses["adversarial"]


def set_up(size=6, widths=(4, 4), **options):
    loss = Loss(Loss.Options(layers=[{"student": "a", "teacher": "a"}], widths=(3,), **options))
    student, teacher = (random_outputs({"a": (width,)}, size=size, seed=seed) for seed, width in enumerate(widths))
    loss.setup(student, teacher)
    return loss, student, teacher, random_batch(size)


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out; the student's side enters with its value and -reversal times its slope."""
    (judge,), (adapter,), k, total = loss.discriminators, loss.adapters, loss.options.reversal, 0
    for f_s, f_t in zip(adapter(student.features["a"]), teacher.features["a"], strict=True):
        turned = f_s.detach() * (1 + k) - k * f_s
        said, real = (1 / (1 + (-judge(f)).exp()) for f in (turned, f_t))
        total = total - real.log() - (1 - said).log()
    return total.sum() / len(teacher.features["a"])


@pytest.mark.parametrize("options", [{}, {"reversal": 0.3}, {"reversal": 0.0}])
@pytest.mark.parametrize("widths", [(4, 4), (5, 3)])
def test_is_the_formula(widths, options):
    assert_agrees(*(lambda loss, *answers: (loss, formula, *answers))(*set_up(widths=widths, **options)))


def test_the_discriminator_learns_to_tell_them_and_the_student_to_be_taken_for_the_teacher():
    loss, student, teacher, batch = set_up(size=64)
    teacher = teacher.map(lambda x: x + 2)  # told apart by the mean
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(student, teacher, batch)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 < 2 * math.log(2) < values[0] * 1.5
    f = student.features["a"].clone().requires_grad_()
    loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    moved = kdkit.Outputs(student.logits, {"a": f.detach() - 10 * f.grad})  # descending
    assert loss.discriminators[0](moved.features["a"]).mean() > loss.discriminators[0](f).mean()
