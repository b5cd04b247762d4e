"""What losses learn of a teacher before the first step: asked once, kept, the same after a stop and in several processes, or refused."""

import re

import pytest
import torch
from test_distributed import NET, assert_alike
from test_lockstep import STREAMS, alone, jobs
from training import PLAIN, assert_same_run, merged, stop_and_go_on, together, train, write

import kdkit
from kdkit import recipe
from kdkit.cache import surveys
from kdkit.cache.folder import clear, stores
from kdkit.contracts.survey import Survey
from kdkit.engine.accelerator import build_accelerator
from kdkit.errors import KdkitError, PluginError, RecipeError, RunError, TapError
from kdkit.models.surveyed import surveyed
from kdkit.runs import checks, opening
from kdkit.runs.fill_caches import table
from kdkit.runs.networks import ModelFactory
from kdkit.study.lockstep import train_together

LAYER = {"layers": [{"student": "penultimate", "teacher": "penultimate"}]}
ND = {"use": "nd", **LAYER}
CKA = {"use": "wkd_logit", "cost": "cka", "images": 3}
WITH_ND = {**PLAIN, "losses": [{"use": "cross_entropy"}, ND]}
SHIFTS = {"augment": {"crop_padding": 1, "flip": 0.5}}


@pytest.fixture(autouse=True)
def made(monkeypatch, tmp_path):
    """The surveys that are made, not read; run folders are in the test's own."""
    monkeypatch.chdir(tmp_path)
    found = []

    def counted(survey, *given):
        found.append(survey)
        return surveyed(survey, *given)

    monkeypatch.setattr(surveys, "surveyed", counted)
    return found


def kept(folder):
    return stores(folder / "runs" / "teacher-cache")


class Wired:
    """A recipe's data and networks, as a run has them."""

    def __init__(self, folder, base=PLAIN, **changes):
        self.recipe = recipe.load(write(folder, base, **changes))
        accelerator = build_accelerator(self.recipe.spec.train)
        self.data = opening.open_data(self.recipe, accelerator)
        self.factory = ModelFactory(self.recipe, self.data.info, {}, device=accelerator.device)

    def found(self, reduce, *layers, images=None, **arguments):
        return self.factory.surveyed(Survey(reduce, layers, images, arguments), self.factory.teacher(), self.data)


def pixels(answers):
    """How often each image is shown, its sum of pixels and its label."""
    found = {name: torch.zeros(48, dtype=torch.float64) for name in ("shown", "pixels", "label")}
    for outputs, batch in answers:
        assert not outputs.logits.requires_grad and not torch.is_grad_enabled()
        assert (batch.index.diff() > 0).all()
        found["shown"][batch.index] += 1
        found["pixels"][batch.index] += batch.inputs.double().sum((1, 2, 3))
        found["label"][batch.index] += batch.labels
    return found


def means(answers, power=1):
    """A sum of every tensor, in double precision."""
    found = {}
    for outputs, _ in answers:
        for name, f in {"logits": outputs.logits, **outputs.features}.items():
            found[name] = found.get(name, 0) + (f.double() ** power).sum(0)
    return found


def drawing(answers):
    """Draws random numbers, as no function should."""
    torch.rand(3)
    return {"a": torch.zeros(1)}


def nothing(answers):
    return {}


def infinite(answers):
    return {"a": torch.tensor([1.0, torch.inf])}


# What it is shown


@pytest.mark.parametrize("data", [SHIFTS, {"timm_augment": {"auto_augment": "rand-m5"}}, {"drop_last": False, "batch_size": 13}])
def test_each_image_is_shown_once_as_it_is_measured(tmp_path, data):
    there = Wired(tmp_path, data=data, train={"mixup": {"mixup_alpha": 0.4}})
    found = there.found(pixels)
    part = there.recipe.dataset().split("train")
    assert torch.equal(found["shown"], torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(found["pixels"], part.images.double().sum((1, 2, 3)) / 255, rtol=1e-6, atol=0)
    assert found["label"].tolist() == [*part.labels]


def test_only_images_that_are_trained_on(tmp_path):
    there = Wired(tmp_path, data={"validation": 8, "train_samples": 30})
    shown = there.found(pixels)["shown"]
    assert shown.sum() == 30 and torch.equal(shown.nonzero()[:, 0], there.data.train.indices)


def test_only_those_that_are_asked_for(tmp_path):
    chosen = torch.tensor([3, 4, 17])
    assert Wired(tmp_path).found(pixels, images=chosen)["shown"].nonzero()[:, 0].tolist() == chosen.tolist()


def test_the_teacher_answers_in_eval_mode_without_autocast(tmp_path):
    there = Wired(tmp_path, teacher={"mode": "train"}, train={"precision": "bf16"})
    teacher = there.factory.teacher()
    norms = [norm for norm in teacher.module.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    found = there.found(means, "stage2")
    assert all(norm.training for norm in norms)
    teacher.module.eval()
    images = there.recipe.dataset().split("train").images.float() / 255
    with torch.no_grad():
        expected = kdkit.taps(teacher.module, ["stage2"])(teacher.adapt(images))
    torch.testing.assert_close(found["logits"], expected.logits.double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["stage2"], expected.features["stage2"].double().sum(0), rtol=1e-5, atol=1e-5)


def test_a_layer_that_no_loss_taps(tmp_path):
    assert Wired(tmp_path).found(means, "stage3", "penultimate").keys() == {"logits", "stage3", "penultimate"}


def test_the_random_state_does_not_tell_whether_it_was_kept(tmp_path):
    there = Wired(tmp_path)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        there.found(drawing)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


# Once, and when again


def test_a_study_asks_once(tmp_path, made):
    """Three variants of which one reads something else; each is what it would be alone."""
    base = merged(WITH_ND, {"data": SHIFTS, "teacher": {"fold_batchnorm": True}})
    variants = {
        "plain": {},
        "heavy": {"losses": [{"use": "cross_entropy"}, {**ND, "weight": 3}, {"use": "logit_kl"}]},
        "cka": {"losses": [{"use": "cross_entropy"}, CKA, ND]},
    }
    found = jobs(tmp_path, base, variants)
    assert [outcome.reason for outcome in train_together(found)] == [None] * 3
    # with CKA the teacher runs unfolded, which is another network
    assert [survey.name for survey in made] == ["class_sums", "values_of", "class_sums"]
    assert all(store.filled == 1 for store in kept(tmp_path)) and len(kept(tmp_path)) == 3
    clear(tmp_path / "runs" / "teacher-cache")
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


def test_another_run_reads_it(tmp_path, made):
    train(tmp_path, WITH_ND)
    whole = [{"use": "cross_entropy"}, {**ND, "weight": 2, "dropout": 0.1}]
    for name, changes in {
        "student": {"student": {"args": {"channels": [4, 4, 8, 16]}}},
        "options": {"losses": whole},
        "batches": {"data": {"batch_size": 12, **SHIFTS}},
        "name": {"name": "other"},
    }.items():
        train(tmp_path, WITH_ND, into=name, **changes)
    assert len(made) == 1


@pytest.mark.first(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"args": {"channels": [8, 8, 8, 12]}}},
        {"seed": 1},  # other weights of a teacher without a checkpoint
        {"teacher": {"normalize": {"mean": [0.1], "std": [0.2]}}},
        {"data": {"dataset": {"seed": 7}}},
        {"data": {"train_samples": 40}},
        {"data": {"image_size": 6}},
        {"losses": [{"use": "cross_entropy"}, {"use": "nd", "layers": [{"student": "stage3", "teacher": "stage3"}]}]},
    ],
    ids=["network", "weights", "normalisation", "images", "subset", "size", "layer"],
)
def test_what_follows_from_something_else_is_made_again(tmp_path, made, changes):
    for base in (WITH_ND, merged(WITH_ND, changes)):
        recipe_of = recipe.load(write(tmp_path, base))
        kdkit.train(recipe_of.source.path, folder=tmp_path / f"run{len(made)}", quiet=True)
    assert len(made) == 2 == len(kept(tmp_path))


def test_another_argument_or_function_is_another_survey(tmp_path, made):
    there = Wired(tmp_path)
    there.found(means)
    torch.testing.assert_close(there.found(means, power=2)["logits"], there.found(means, power=2)["logits"])
    there.found(pixels)
    tensors = [there.found(means, power=torch.tensor(p))["logits"] for p in (1, 2, 1)]
    assert torch.equal(tensors[0], tensors[2]) and not torch.equal(tensors[0], tensors[1])
    assert len(made) == 5


def test_a_function_whose_file_has_changed_is_another_one(tmp_path, made):
    there = Wired(tmp_path)
    for power in (1, 2, 1):
        file = tmp_path / "own.py"
        file.write_text(f"def own(answers):\n    return {{'a': sum(o.logits.double().pow({power}).sum() for o, _ in answers)}}\n")
        namespace = {}
        exec(compile(file.read_text(), file, "exec"), namespace)
        there.found(namespace["own"])
    assert len(made) == 2


def test_what_is_kept_is_what_was_computed(tmp_path):
    there = Wired(tmp_path)
    first, again = there.found(means, "stage3"), there.found(means, "stage3")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)


def test_a_damaged_survey_is_made_again(tmp_path, made):
    there = Wired(tmp_path)
    first = there.found(means)
    (store,) = kept(tmp_path)
    content = bytearray((store.path / "column-0.bin").read_bytes())
    content[3] ^= 1
    (store.path / "column-0.bin").write_bytes(content)
    assert torch.equal(there.found(means)["logits"], first["logits"])
    assert len(made) == 2
    (store.path / "cache.json").write_text("{")
    with pytest.raises(RunError, match="removes the cache"):
        there.found(means)


def test_it_is_listed_and_removed_like_a_cache(tmp_path, made):
    there = Wired(tmp_path, teacher={"cache": {"views": 1, "dir": "kept"}})
    there.found(means)
    (found,) = stores(tmp_path / "kept")
    assert re.fullmatch(r"means-[0-9a-f]{16}", found.path.name)
    assert (found.about["images"], found.filled, table([found]).row_count) == (48, 1, 1)
    clear(tmp_path / "kept", found.path.name)
    there.found(means)
    assert len(made) == 2


# A run that goes on, several processes


@pytest.mark.first(1)
@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch, made, gone):
    losses = [{"use": "cross_entropy"}, ND, CKA, {"use": "dense_mse", "standardize_teacher": "phi_s", **LAYER}]
    path = write(tmp_path, WITH_ND, losses=losses, run={"checkpoint_steps": 2})
    kdkit.train(path, folder=tmp_path / "whole", quiet=True)
    if gone:
        clear(tmp_path / "runs" / "teacher-cache")
    stop_and_go_on(path, tmp_path / "run", monkeypatch)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert len(made) == 3 * (1 + gone)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Each shows the teacher its share of the images."""
    (tmp_path / "net.py").write_text(NET)
    layers = {"layers": [{"student": "conv2", "teacher": "conv2"}]}
    base = {
        "name": "shared",
        "data": {
            "dataset": {"use": "synthetic", "image_size": 8, "train": 36, "test": 19, "num_classes": 6},
            "batch_size": 8,
            "drop_last": False,
        },
        "student": {"model": "python/Net", "file": "net.py", "args": {"width": 4}},
        "teacher": {"model": "python/Net", "file": "net.py", "args": {"width": 6}},
        "schedule": {"use": "offline"},
        "losses": [{"use": "cross_entropy"}, CKA, {"use": "dense_mse", "standardize_teacher": "phi_s", "weight": 0.01, **layers}],
        "train": {"epochs": 2, "optimizer": {"lr": 0.05}, "clip_grad": 1.0},
        "run": {"log_steps": 2},
    }
    path = write(tmp_path, base)
    kdkit.train(path, folder=tmp_path / "one", quiet=True)
    ours = {store.path.name: contents(store.path) for store in kept(tmp_path)}
    clear(tmp_path / "runs" / "teacher-cache")
    commands = together(tmp_path, "train", path, "--run", "two")
    assert [command.finish()[0] for command in commands] == [0, 0], commands[0].log.read_text()
    assert_alike(tmp_path / "two", tmp_path / "one")
    theirs = {store.path.name: contents(store.path) for store in kept(tmp_path)}
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for name, values in ours.items():
        for key, value in values.items():
            torch.testing.assert_close(theirs[name][key], value, rtol=1e-5, atol=1e-5)
    # once more, from what is there
    again = together(tmp_path, "train", path, "--run", "again")
    assert [command.finish()[0] for command in again] == [0, 0]
    assert_same_run(tmp_path / "again", tmp_path / "two")


def contents(path):
    found = surveys.KeptSurvey(path, {}).read()
    assert found
    return found


# The plan, and what cannot be


def test_the_plan_says_what_it_costs_and_makes_none(tmp_path, made):
    losses = [{"use": "cross_entropy"}, ND, CKA]
    plan = checks.make(recipe.load(write(tmp_path, WITH_ND, losses=losses)))
    shown = [note for note in plan.notes if "before the first step" in note]
    assert len(shown) == 2
    assert "nd shows teacher 48 training images before the first step, once each" in shown[0]
    assert re.search(r"wkd_logit shows teacher 1[0-8] training images", shown[1])
    assert not made and not kept(tmp_path)


def refusal(folder, base, **changes):
    """The one line of a check that refuses."""
    with pytest.raises(RecipeError) as error:
        checks.make(recipe.load(write(folder, base, **changes)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_stream_is_refused(tmp_path):
    (tmp_path / "streams.py").write_text(STREAMS)
    base = {**WITH_ND, "data": {"dataset": {"use": "flow"}, "batch_size": 8, "workers": 2}, "plugins": ["streams.py"]}
    assert "losses.1: nd shows the teacher all training images before the first step, and this dataset can only" in refusal(tmp_path, base)
    with pytest.raises(TapError, match="can only be read from start to end"):
        Wired(tmp_path, base).found(means)


def test_a_teacher_that_learns_is_refused(tmp_path):
    base = {**WITH_ND, "schedule": {"use": "mutual"}}
    del base["teacher"]
    says = refusal(tmp_path, base)
    assert "there is no teacher network to take a layer from" in says or "needs a teacher that stays as it is" in says


def test_several_teachers_are_refused_unless_one_is_named(tmp_path, made):
    base = {**WITH_ND, "teachers": [PLAIN["teacher"], PLAIN["teacher"]]}
    del base["teacher"]
    says = "describes one teacher, and several teach; say which of them this loss looks at: `teacher: NAME`"
    assert f"class_sums {says}" in refusal(tmp_path, base, schedule={"use": "offline", "combine": "each"})
    assert f"values_of {says}" in refusal(tmp_path, base, losses=[CKA])
    train(tmp_path, base, losses=[{"use": "cross_entropy"}, {**ND, "teacher": "teacher2"}])
    assert len(made) == 1


def test_images_without_labels_are_refused(tmp_path):
    base = merged(WITH_ND, {"task": {"use": "none"}, "losses": [ND]})
    assert "task" in refusal(tmp_path, base)  # of embeddings
    assert "those of `data.unlabelled` have none" in refusal(tmp_path, WITH_ND, data={"train_samples": 24, "unlabelled": {"share": 0.5}})


@pytest.mark.parametrize(
    ("ask", "error", "says"),
    [
        (lambda there: there.found(lambda answers: {}), PluginError, "must be a function with a name, at the top of a file"),
        (lambda there: there.found(nothing), PluginError, "nothing gives dict, not tensors by name"),
        (lambda there: there.found(infinite), RunError, "'a', which infinite computes from its answers, is not finite"),
        (lambda there: there.found(means, "stage9"), TapError, "teacher: there is no layer 'stage9'"),
    ],
)
def test_what_no_function_may_do(tmp_path, ask, error, says):
    with pytest.raises(error, match=re.escape(says)) as raised:
        ask(Wired(tmp_path))
    assert isinstance(raised.value, KdkitError) and "\n" not in str(raised.value)
