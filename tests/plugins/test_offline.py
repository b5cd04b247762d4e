"""One teacher, and several whose answers are combined, averaged over or drawn."""

import json

import pytest
import torch
import torch.nn.functional as F
from loss_examples import ON_DETECTORS, OPTIONS
from training import PLAIN, TINY, Command, assert_same_run, lines, merged, metrics, task, together, train, weights, write

import kdkit
from kdkit.recipe import registry
from kdkit.testing import random_batch, random_outputs
from kdkit.testing.probes import probes

PLUGINS = registry.load()
Offline = PLUGINS.schedules["offline"]
NAMES = ("one", "two", "three")


class Pair:
    """A student and teachers that say which of them answered, and whether a graph was being recorded."""

    def __init__(self, *names):
        self.recorded, self.names, self.task = {}, names or ("teacher",), task()

    def answers(self, who, seed):
        def answer(inputs):
            self.recorded[who] = torch.is_grad_enabled()
            return random_outputs({"a": (3,)}, size=len(inputs), seed=seed).map(lambda x: x.requires_grad_())

        return answer

    def student(self):
        return self.answers("student", 0)

    def teachers(self):
        return {name: self.answers(name, seed) for seed, name in enumerate(self.names, 1)}


def lesson_of(*names, batch=None, **options):
    """The lesson of a batch of three."""
    (stage,) = Offline(Offline.Options(**options)).stages(Pair(*names))
    (lesson,) = stage.step(batch or random_batch(3))
    return lesson


def said(teacher):
    return random_outputs({"a": (3,)}, size=3, seed=teacher).logits


def test_one_stage_with_one_teacher():
    (stage,) = Offline(Offline.Options()).stages(Pair())
    (lesson,) = stage.step(random_batch(3))
    assert stage.training == kdkit.StageTraining() and len(stage.students) == 1
    assert lesson.weights is None and list(lesson.named) == ["teacher"]
    torch.testing.assert_close(lesson.student.logits, random_outputs(size=3).logits)
    torch.testing.assert_close(lesson.teachers[0].logits, random_outputs(size=3, seed=1).logits)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "each", "random"])
def test_one_teacher_teaches_as_it_is(combine):
    lesson = lesson_of(combine=combine)
    assert torch.equal(lesson.teachers[0].logits, said(1)) and lesson.weights is None and set(lesson.teachers[0].features) == {"a"}


@pytest.mark.parametrize("combine", ["probabilities", "logits", "each", "random"])
def test_only_the_student_has_a_gradient(combine):
    models = Pair(*NAMES)
    (stage,) = Offline(Offline.Options(combine=combine)).stages(models)
    (lesson,) = stage.step(random_batch(3))
    assert models.recorded == {"student": True, **dict.fromkeys(NAMES, False)}
    assert lesson.student.features["a"].requires_grad
    for teacher in (*lesson.teachers, *lesson.named.values()):
        assert not teacher.logits.requires_grad and not any(x.requires_grad for x in teacher.features.values())


def test_needs_a_teacher():
    assert (Offline.scheme, Offline.needs_teacher) == ("offline", True)


@pytest.mark.parametrize("given", [None, (1, 2, 5), {"three": 5, "one": 1, "two": 2}])
def test_answers_are_combined_by_weights(given):
    shares = [1 / 3] * 3 if given is None else [1 / 8, 2 / 8, 5 / 8]
    z = [said(seed) for seed in (1, 2, 3)]
    (probabilities,) = lesson_of(*NAMES, weights=given).teachers
    torch.testing.assert_close(probabilities.logits.exp(), sum(w * x.softmax(1) for w, x in zip(shares, z, strict=True)))
    (logits,) = lesson_of(*NAMES, weights=given, combine="logits").teachers
    torch.testing.assert_close(logits.logits, sum(w * x for w, x in zip(shares, z, strict=True)))
    assert logits.features == {}
    each = lesson_of(*NAMES, weights=given, combine="each")
    assert list(each.weights) == pytest.approx(shares)
    assert all(torch.equal(teacher.logits, x) for teacher, x in zip(each.teachers, z, strict=True))
    assert all(torch.equal(each.named[name].features["a"], answer.features["a"]) for name, answer in zip(NAMES, each.teachers, strict=True))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["cross_entropy", "entropy"])
def test_each_image_weighs_its_teachers(kind, mixed):
    """Sample by sample, as the paper writes it."""
    batch = random_batch(3)
    if mixed:
        batch = kdkit.Batch(batch.inputs, 0.7 * F.one_hot(batch.labels, 5) + 0.3 * F.one_hot(batch.labels.flip(0), 5), batch.index)
    (teacher,) = lesson_of(*NAMES, per_sample=kind, batch=batch).teachers
    for row in range(3):
        p = [said(seed)[row].softmax(0) for seed in (1, 2, 3)]
        target = batch.labels[row] if mixed else F.one_hot(batch.labels[row], 5)
        doubt = [-((q if kind == "entropy" else target) * q.log()).sum() for q in p]
        total = sum(x.exp() for x in doubt)
        w = [(1 - x.exp() / total) / 2 for x in doubt]
        assert float(sum(w)) == pytest.approx(1)
        torch.testing.assert_close(teacher.logits[row].exp(), sum(x * q for x, q in zip(w, p, strict=True)))


def test_one_teacher_is_drawn_for_a_batch_by_the_weights():
    counts = torch.zeros(3)
    (stage,) = Offline(Offline.Options(combine="random", weights=(1, 3, 0))).stages(Pair(*NAMES))
    torch.manual_seed(0)
    for _ in range(400):
        (lesson,) = stage.step(random_batch(3))
        assert sorted(lesson.weights) == [0, 0, 1] and len(lesson.teachers) == 3
        counts += lesson.weights
    assert counts[2] == 0 and 70 < counts[0] < 130


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"combine": "each", "per_sample": "entropy"}, "not `combine: each`"),
        ({"combine": "random", "per_sample": "cross_entropy"}, "not `combine: random`"),
        ({"weights": (1, 2), "per_sample": "entropy"}, "weights or per_sample, not both"),
        ({"weights": (1, -2)}, "must not be negative"),
        ({"weights": {"one": 0, "two": 0}}, "one must be above 0"),
        ({"weights": ()}, "one must be above 0"),
    ],
)
def test_options_that_contradict_each_other(options, says):
    with pytest.raises(ValueError, match=says):
        Offline.Options(**options)


RESNET = {**TINY, "name": "wide", "args": {**TINY["args"], "channels": [8, 8, 8, 16]}}
MLP = {"model": "mlp/24", "name": "flat", "input_size": 6, "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
VIT = {
    "model": "test_vit",
    "name": "vit",
    "args": {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "input_size": 16,
    "interpolation": "bicubic",
}
SEVERAL = merged(PLAIN, {"name": "several", "teacher": None, "train": {"epochs": 1}}) | {"teachers": [RESNET, MLP, VIT]}
HINTS = [
    {"use": "hint", "name": "map", "teacher": "wide", "layers": [{"student": "stage3", "teacher": "stage3"}]},
    {"use": "hint", "name": "tokens", "teacher": "vit", "layers": [{"student": "stage2", "teacher": "blocks.1"}]},
    {"use": "rkd_distance", "teacher": "flat", "layers": [{"student": "penultimate", "teacher": "penultimate"}]},
]


def schedule(**options):
    return {"schedule": {"use": "offline", **options}}


@pytest.mark.first(1)
@pytest.mark.parametrize("options", [{}, {"per_sample": "cross_entropy"}, {"combine": "each", "weights": {"flat": 1, "vit": 2, "wide": 0}}])
def test_teachers_of_all_kinds_side_by_side(tmp_path, options):
    train(tmp_path, SEVERAL, losses=[*PLAIN["losses"], *HINTS], **schedule(**options))
    terms = metrics(tmp_path / "run")[-1]["train"]
    assert {"map", "tokens", "rkd_distance", "logit_kl"} <= set(terms) and all(terms[name] > 0 for name in ("map", "tokens", "logit_kl"))


LAYERS = [{"student": "penultimate", "teacher": "penultimate"}]


@pytest.mark.parametrize(
    ("losses", "options", "says"),
    [
        ([{"use": "hint", "layers": LAYERS}], {}, "losses.1: hint: the answer that teaches has no layer 'penultimate'; tapped are: "),
        (
            [{"use": "hint", "layers": LAYERS}],
            {"combine": "each"},
            "losses.1: hint: teacher layer 'penultimate' is (16,) in one teacher, (24,) in",
        ),
        ([{"use": "hint", "layers": LAYERS}], {"combine": "random"}, "say which of them this loss looks at: `teacher: NAME`"),
        ([{"use": "logit_kl", "teacher": "wyde"}], {}, "there is no such teacher; did you mean 'wide'?"),
        ([], {"weights": [1, 2]}, "schedule: weights: must be for the teachers wide, flat, vit, not 2"),
        ([], {"weights": {"wide": 1, "vit": 2}}, "weights: must be for the teachers wide, flat, vit, not wide, vit"),
    ],
)
def test_mistakes_are_one_line(tmp_path, losses, options, says):
    with pytest.raises(kdkit.RecipeError) as caught:
        kdkit.check(write(tmp_path, SEVERAL, losses=[{"use": "cross_entropy"}, *losses], **schedule(**options)))
    assert says in str(caught.value) and "recipe.yaml:" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_losses_without_adapters_take_teachers_of_several_widths(tmp_path):
    path = write(tmp_path, SEVERAL, losses=[{"use": "rkd_distance", "layers": LAYERS}], **schedule(combine="each"))
    assert "rkd_distance" in str(kdkit.check(path))


READING = [
    n
    for n, cls in PLUGINS.losses.items()
    if issubclass(cls.Options, kdkit.FeatureOptions) and cls.knowledge != "labels" and n not in ON_DETECTORS
]


@pytest.mark.parametrize("name", READING)
def test_every_loss_on_layers_refuses_a_combined_answer(name):
    """The ensemble has no layers."""
    cls = PLUGINS.losses[name]
    p = probes(cls, OPTIONS.get(name, {}))[0]
    with pytest.raises(kdkit.ShapeError, match="teacher: NAME"):
        cls(p.loss.options).setup(p.student, kdkit.ensemble([p.teacher, p.teacher]), p.context)


SEEDS = merged(PLAIN, {"name": "pupil", "teacher": None, "train": {"epochs": 1}}) | {
    "teachers": {"recipe": "teacher.yaml", "seeds": [0, 1, 2]}
}
TAUGHT = {**PLAIN, "name": "taught", "schedule": {"use": "supervised"}, "teacher": None, "losses": [{"use": "cross_entropy"}]}


@pytest.mark.slow
def test_one_recipe_with_several_seeds(tmp_path):
    """Each is trained once, by its seed, and every command knows them."""
    write(tmp_path, TAUGHT, "teacher.yaml", train={"epochs": 1})
    path = write(tmp_path, SEEDS)
    code, log = Command(tmp_path, "train", path).finish()
    assert code == 0, log
    runs = tmp_path / "runs"
    made = sorted(folder for folder in runs.iterdir() if folder.name.startswith("taught"))
    results = [json.loads((folder / "result.json").read_text()) for folder in made]
    assert {result["seed"] for result in results} == {0, 1, 2}
    assert not torch.equal(*(weights(folder)["conv1.weight"] for folder in made[:2]))
    before = {folder: (folder / "student.safetensors").stat().st_mtime_ns for folder in made}
    whole = json.loads((runs / "pupil" / "result.json").read_text())

    code, log = Command(tmp_path, "train", path, "--run", "again").finish()
    assert code == 0, log
    assert "trained first" not in log and {folder: (folder / "student.safetensors").stat().st_mtime_ns for folder in made} == before
    assert_same_run(tmp_path / "again", runs / "pupil")

    code, log = Command(tmp_path, "evaluate", "runs/pupil").finish()
    assert code == 0 and "teachers together" in log and f"{whole['teacher']['nll']:.4f}" in log
    code, log = Command(tmp_path, "profile", "runs/pupil", "--runs", "2").finish()
    assert code == 0 and all(f"pupil: teacher{number}" in log for number in (1, 2, 3)), log
    code, log = Command(tmp_path, "compare", path, "--seeds", "1").finish()
    assert code == 0 and "teacher" in log and "pupil" in log, log


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    teachers = [{"model": "mlp/16"}, {"model": "mlp/24"}]
    recipe = {**SEVERAL, "student": {"model": "mlp/6"}, "teachers": teachers, **schedule(per_sample="cross_entropy", combine="logits")}
    path = write(tmp_path, recipe)
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    one, two = (weights(tmp_path / run) for run in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_offline_resumes_to_the_same_bits(tmp_path):
    recipe = merged(SEVERAL, {"train": {"epochs": 3}, "run": {"checkpoint_steps": 2}, **schedule(combine="random")})
    path = write(tmp_path, recipe, losses=[*PLAIN["losses"], HINTS[0]])
    assert Command(tmp_path, "train", path, "--run", "whole").finish()[0] == 0
    command = Command(tmp_path, "train", path, "--run", "run")
    assert command.wait_for(lambda: lines(tmp_path / "run") >= 9), command.finish()
    command.process.kill()
    command.process.join()
    code, log = Command(tmp_path, "train", path, "--run", "run").finish()
    assert code == 0 and "going on" in log
    assert_same_run(tmp_path / "run", tmp_path / "whole")
