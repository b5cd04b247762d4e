"""Runs side by side: each is what it would be alone, and what they share is done once."""

import contextlib
import re
import signal

import pytest
import torch
from training import PLAIN, Command, assert_same_run, lines, merged, write

import kdkit
from kdkit import recipe
from kdkit.data import images
from kdkit.errors import BusyError
from kdkit.models import tapped
from kdkit.runs import progress, training
from kdkit.runs.folder import RunFolder
from kdkit.runs.run import Run
from kdkit.study import lockstep
from kdkit.study.lockstep import train_together

TAPS = {"layers": [{"student": "stage3", "teacher": "stage3"}]}
BASE = merged(
    PLAIN,
    {
        "data": {"augment": {"crop_padding": 1, "flip": 0.5}, "validation": 8},
        "student": {"args": {"drop_rate": 0.3}},
        "teacher": {"fold_batchnorm": True},
    },
)
VARIANTS = {
    "alone": {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]},
    "response": {},
    "feature": {"losses": [{"use": "cross_entropy"}, {"use": "hint", **TAPS}]},
    "folded_less": {"losses": [{"use": "hint", "layers": [{"student": "layer2.0.bn1@input", "teacher": "layer2.0.bn1@input"}]}]},
    "relation": {"losses": [{"use": "cross_entropy"}, {"use": "rkd_distance", "layers": [{"student": "penultimate", "teacher": "penultimate"}]}]},
    "memory": {"losses": [{"use": "crd", "negatives": 16, "layers": [{"student": "penultimate", "teacher": "penultimate"}]}]},
    "average": {"train": {"ema": {"decay": 0.7}, "evaluate_every": 2}},
    "mixed": {"train": {"mixup": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}},
    "mixed_feature": {"train": {"mixup": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}, "losses": [{"use": "hint", **TAPS}]},
    "adam": {"train": {"optimizer": {"name": "adamw", "lr": 0.01}, "epochs": 3, "clip_grad": 0.5}},
    "accumulated": {"train": {"accumulate": 2}},
    "layout": {"train": {"channels_last": False}},
    "cached": {"teacher": {"cache": {"views": 2, "what": "taps", "dtype": "fp32", "dir": "cache"}}, "losses": [{"use": "hint", **TAPS}]},
    "cached_mixed": {"train": {"mixup": {"mixup_alpha": 0.4}}, "teacher": {"cache": {"views": 1, "dtype": "fp32", "dir": "cache"}}},
    "cached_cut": {"train": {"mixup": {"cutmix_alpha": 1.0}}, "teacher": {"cache": {"views": 1, "dtype": "fp32", "dir": "cache"}}},
    "cached_all": {"teacher": {"cache": {"views": "all", "what": "logits", "dir": "cache"}}},
    "mutual": {"teacher": None, "schedule": {"use": "mutual"}},
    "generations": {"teacher": None, "schedule": {"use": "born_again", "generations": 2}},
    "two_stages": {"schedule": {"use": "staged", "stages": [{"name": "hints", "losses": ["hint"], "train": ["student.layer3", "hint"], "epochs": 1}, {"name": "rest", "losses": ["logit_kl"]}]},
                   "losses": [{"use": "hint", **TAPS}, {"use": "logit_kl"}]},
}  # fmt: skip


def jobs(folder, base=BASE, variants=VARIANTS, **changes):
    made = []
    for name, own in variants.items():
        path = write(folder, {**merged(merged(base, own), changes), "name": name}, f"{name}.yaml")
        made.append(Run(recipe.load(path), folder / "together" / name))
    return made


def alone(folder, job):
    kdkit.train(job.recipe.source.path, folder=folder / "alone" / job.folder.name, quiet=True)
    return folder / "alone" / job.folder.name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = jobs(folder)
    return folder, found, train_together(found)


def test_they_stand_in_for_all_kinds(trained):
    knowledge = {job.recipe.plugins.losses[loss.use].knowledge for job in trained[1] for loss in job.recipe.spec.losses}
    schemes = {job.recipe.plugins.schedules[job.recipe.spec.schedule.use].scheme for job in trained[1]}
    assert knowledge == {"labels", "response", "feature", "relation"} and schemes == {"none", "offline", "online", "self"}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_ends_with_the_bits_that_it_has_alone(trained, name):
    folder, found, outcomes = trained
    place = list(VARIANTS).index(name)
    assert outcomes[place].reason is None
    assert_same_run(alone(folder, found[place]), found[place].folder)


@pytest.mark.slow
def test_files_read_by_workers_too(tmp_path):
    changes = {"data": {"augment": None, "timm_augment": {"auto_augment": "rand-m5"}, "workers": 2}}
    found = jobs(tmp_path, variants={name: VARIANTS[name] for name in ("response", "mixed", "mutual")}, **changes)
    train_together(found)
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


def count(monkeypatch, owner, name):
    calls = []
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **named: (calls.append(given), plain(*given, **named))[1])
    return calls


def test_batches_are_made_once_and_answered_once(tmp_path, monkeypatch):
    found = jobs(tmp_path, variants={name: VARIANTS[name] for name in ("alone", "response", "feature", "relation", "average")})
    made, answered = count(monkeypatch, images.Finish, "as_drawn"), count(monkeypatch, tapped.TappedModel, "forward")
    train_together(found[:1])
    once = len(made)
    made.clear()
    answered.clear()
    train_together(found[1:])
    steps, epochs = 40 // 8, 2
    assert len(made) == once + 1  # on which the teacher is measured
    by_teacher = [model for model, images in answered if model.role == "teacher" and images.device.type != "meta"]
    assert len(by_teacher) == 1 + 1 + steps * epochs  # measured on one batch, losses set up on one


def test_the_teacher_stops_behind_the_deepest_tap_of_all(tmp_path, monkeypatch):
    def variant(layer):
        return {"losses": [{"use": "cross_entropy"}, {"use": "hint", "layers": [{"student": layer, "teacher": layer}]}]}

    found = jobs(tmp_path, variants={layer: variant(layer) for layer in ("stage1", "stage2")})
    seen = []
    plain = tapped.TappedModel.forward

    def forward(model, inputs):
        answer = plain(model, inputs)
        if model.role == "teacher" and model.layers and inputs.device.type != "meta":
            seen.append(("logits" in vars(answer), set(answer.features)))
        return answer

    monkeypatch.setattr(tapped.TappedModel, "forward", forward)
    train_together(found)
    assert seen and all(one == (False, {"stage1", "stage2"}) for one in seen)


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    told = []
    bad = {"train": {"optimizer": {"lr": 1e30}}}
    found = jobs(tmp_path, variants={"response": {}, "bad": bad, "adam": VARIANTS["adam"]})
    outcomes = train_together(found, say=told.append)
    assert [outcome.result is None for outcome in outcomes] == [False, True, False]
    assert "step" in outcomes[1].reason and any("bad: failed: " in line for line in told)
    assert_same_run(alone(tmp_path, found[2]), found[2].folder)


def test_out_of_memory_is_one_runs_own(tmp_path, monkeypatch):
    found = jobs(tmp_path, variants={"response": {}, "adam": VARIANTS["adam"]})
    plain = training.build_trainer

    def build(recipe, *given):
        if recipe.spec.name == "adam":
            raise torch.OutOfMemoryError("no more")
        return plain(recipe, *given)

    monkeypatch.setattr(training, "build_trainer", build)
    outcomes = train_together(found)
    assert outcomes[0].result is not None and "max-parallel" in outcomes[1].reason


def test_a_plugins_mistake_is_no_reason_to_be_silent(tmp_path, monkeypatch):
    found = jobs(tmp_path, variants={"response": {}})
    monkeypatch.setattr(training, "build_trainer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_together(found)


def test_what_is_changed_in_place_is_noticed(tmp_path):
    (tmp_path / "vandal.py").write_text(
        "import kdkit\n"
        "class Vandal(kdkit.Loss):\n"
        "    'Writes where it must not.'\n    name = 'vandal'\n    knowledge = 'response'\n"
        "    def forward(self, student, teacher, batch):\n"
        "        teacher.logits.mul_(2)\n        return (student.logits - teacher.logits).abs().mean()\n"
        "@kdkit.hookimpl\ndef kdkit_losses():\n    return [Vandal]\n"
    )
    found = jobs(tmp_path, variants={"vandal": {"plugins": ["vandal.py"], "losses": [{"use": "vandal"}]}, "response": {}})
    outcomes = train_together(found)
    assert "in place" in outcomes[1].reason


def test_so_many_at_a_time(tmp_path):
    told = []
    found = jobs(tmp_path, variants={name: VARIANTS[name] for name in ("alone", "response", "feature")})
    train_together(found, max_parallel=2, say=told.append)
    assert [line.split(":")[0] for line in told if line.startswith("pass")] == ["pass 1 of 2", "pass 2 of 2"]
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


def test_seeds_and_images_go_apart(tmp_path):
    variants = {"a": {}, "b": {"seed": 1}, "c": {"data": {"train_samples": 24}}, "d": {"train": {"accumulate": 2}}, "e": {}}
    kinds = [lockstep._kind(job.recipe) for job in jobs(tmp_path, variants=variants)]
    assert kinds[0] == kinds[4] and len(set(kinds)) == 4


def test_finished_runs_are_taken_as_they_are(tmp_path, monkeypatch):
    found = jobs(tmp_path, variants={"response": {}, "adam": VARIANTS["adam"]})
    first = train_together(found[:1])
    steps = count(monkeypatch, training.Prepared, "turns")
    both = train_together(found)
    assert len(steps) == 1 and both[0].result == first[0].result


def test_time_is_what_each_would_take_alone(tmp_path):
    """The work that is shared counts for every run."""
    found = jobs(tmp_path, variants={name: {"seed": 0} for name in "abc"}, train={"epochs": 4})
    outcomes = [outcome.result for outcome in train_together(found)]
    assert max(one.cpu_seconds for one in outcomes) < 2.5 * min(one.cpu_seconds for one in outcomes)
    lone = kdkit.train(found[0].recipe.source.path, folder=tmp_path / "lone", quiet=True)
    assert outcomes[2].cpu_seconds == pytest.approx(lone.cpu_seconds, rel=0.7)


@pytest.mark.parametrize(
    ("held", "order", "waits"),
    [
        ((), [(1, [0, 1]), (2, [2, 3])], []),
        ((0,), [(2, [2, 3]), (1, [1]), (1, [0])], ["a"]),
        ((1, 2, 3), [(1, [0]), (1, [1]), (2, [2, 3])], ["b, c, d"]),
    ],
    ids=["none", "one", "three"],
)
def test_whole_passes_are_claimed_first_then_what_others_leave(tmp_path, monkeypatch, held, order, waits):
    found, claimed, said, outcomes = jobs(tmp_path, variants=dict.fromkeys("abcd", {})), [], [], {}
    with contextlib.ExitStack() as elsewhere:
        for i in held:
            elsewhere.enter_context(RunFolder(found[i].folder).held())
        monkeypatch.setattr("kdkit.study.lockstep.time.sleep", lambda _: elsewhere.close())  # the other process ends
        for number, folders in lockstep._claims(found, [[0, 1], [2, 3]], outcomes, said.append):
            claimed.append((number, list(folders)))
            for i in folders:
                with pytest.raises(BusyError):
                    RunFolder(found[i].folder).held()
                outcomes[i] = lockstep.Outcome(found[i], reason="failed")
    assert claimed == order, "each once, though all fail"
    assert said == [f"waiting for what other processes train: {names}" for names in waits]
    for job in found:
        with RunFolder(job.folder).held():
            pass


def test_a_claimed_run_is_told_with_the_way_out(tmp_path):
    found, told = jobs(tmp_path, variants={"response": {}}), []
    with RunFolder(found[0].folder).held():
        outcomes = train_together(found, say=told.append)
    assert outcomes[0].reason.endswith("another process is training in this folder; with `--spread` processes share a study")


@pytest.mark.slow
def test_interrupted_they_all_go_on(tmp_path):
    names = ("response", "feature", "mutual")
    for name in names:
        write(tmp_path, {**merged(BASE, VARIANTS[name]), "name": name}, f"{name}.yaml", train={"epochs": 4})
    script = tmp_path / "study.yaml"
    script.write_text(
        "name: s\nbase: response.yaml\nvariants:\n" + "".join(f"  {name}: {{recipe: {name}.yaml}}\n" for name in names) + "seeds: 1\n"
    )
    command = Command(tmp_path, "compare", "study.yaml")
    command.wait_for(lambda: all(lines(tmp_path / "runs" / "s" / f"{name}-seed0") >= 9 for name in names))
    command.send(signal.SIGTERM)
    code, said = command.finish()
    assert code == 128 + signal.SIGTERM and "goes on" in said
    assert Command(tmp_path, "compare", "study.yaml").finish()[0] == 0
    for name in names:
        kdkit.train(tmp_path / f"{name}.yaml", folder=tmp_path / "alone" / name, quiet=True)
        assert_same_run(tmp_path / "alone" / name, tmp_path / "runs" / "s" / f"{name}-seed0")


@pytest.mark.slow
def test_all_of_a_stream_is_measured(tmp_path):
    """Several workers each have a last batch of their own, so that there are more batches than the stream's length says."""
    (tmp_path / "streams.py").write_text(STREAMS)
    data = {"dataset": {"use": "flow"}, "augment": None, "validation": None, "workers": 2, "eval_batch_size": 8}
    base = {
        **BASE,
        "data": {"batch_size": 8, **data},
        "plugins": ["streams.py"],
        "student": {"model": "mlp/8"},
        "teacher": {"model": "mlp/8"},
    }
    found = jobs(tmp_path, base, {"response": {}, "adam": {"train": {"optimizer": {"name": "adamw", "lr": 0.01}}}})
    train_together(found)
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


STREAMS = '''
"""Images in a row."""

import kdkit
import numpy as np
import torch
from PIL import Image


class Flow:
    """Each worker has every second image."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, seed, workers, batch_size):
        worker = torch.utils.data.get_worker_info()
        for number in range(worker.id, self.count, worker.num_workers):
            generator = np.random.default_rng(number)
            yield Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)), number % 6


class FlowOptions(kdkit.DatasetOptions):
    """Options of Flow."""


class FlowSource(kdkit.DatasetSource):
    """Images in a row, for tests."""

    name = "flow"
    Options = FlowOptions

    def info(self):
        return kdkit.DataInfo((3, 8, 8), 6, 32, 21)

    def split(self, part):
        return Flow(32 if part == "train" else 21)


@kdkit.hookimpl
def kdkit_datasets():
    return [FlowSource]
'''


def test_networks_of_one_name_from_two_plugins_are_two_teachers(tmp_path):
    for scale in (1, 3):
        (tmp_path / f"net{scale}.py").write_text(
            "import kdkit\nimport torch\n"
            "class Source(kdkit.ModelSource):\n"
            "    'A line.'\n    name = 'line'\n"
            "    def build(self, num_classes, image_shape):\n"
            f"        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, num_classes), torch.nn.Hardtanh(-{scale}, {scale}))\n"
            "@kdkit.hookimpl\ndef kdkit_models():\n    return [Source]\n"
        )
    base = merged(BASE, {"teacher": None, "student": {"model": "mlp/8", "args": None, "stem": None}})
    base = {**base, "teacher": {"model": "line/x"}, "student": {"model": "mlp/8"}}
    found = jobs(tmp_path, base, {f"by{scale}": {"plugins": [f"net{scale}.py"]} for scale in (1, 3)})
    train_together(found)
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


def test_a_group_that_takes_long_says_how_far_it_is(tmp_path, monkeypatch):
    """Where no line is held back: one for each epoch that all have finished, and one for each of the teacher's."""
    monkeypatch.setattr(progress.Seldom, "due", True)
    write(tmp_path, {**merged(PLAIN, VARIANTS["alone"]), "name": "teacher"}, "t.yaml")
    taught = {**PLAIN, "teacher": {"recipe": "t.yaml"}, "run": {"folder": str(tmp_path / "runs")}}
    jobs = [Run(recipe.load(write(tmp_path, {**taught, "name": name}, f"{name}.yaml")), tmp_path / name) for name in "ab"]
    said = []
    train_together(jobs, say=said.append)
    over = [line for line in said if "is over" in line]
    assert [line.partition(", about ")[0] for line in over] == [
        f"pass 1 of 1: epoch {n} is over in all runs, 0 of 2 have ended" for n in (1, 2)
    ]
    assert re.search(r", about \d+:\d\d:\d\d left in all$", over[0]) and over[1].endswith(", about 0:00:00 left in all")
    assert [line[:15] for line in said if "loss" in line] == ["train epoch 1/2", "train epoch 2/2"]


def test_who_waits_for_many_runs_looks_seldom_and_names_a_few(tmp_path, monkeypatch):
    found, said, slept = jobs(tmp_path, variants=dict.fromkeys("abcd", {})), [], []
    monkeypatch.setattr(lockstep, "NAMED", 2)
    monkeypatch.setattr(lockstep, "LOOKS", 0.5)
    with contextlib.ExitStack() as elsewhere:
        for job in found:
            elsewhere.enter_context(RunFolder(job.folder).held())
        monkeypatch.setattr("kdkit.study.lockstep.time.sleep", lambda seconds: (slept.append(seconds), elsewhere.close()))
        next(lockstep._claims(found, [[0, 1], [2, 3]], {}, said.append))
    assert slept == [8.0] and said == ["waiting for what other processes train: a, b and 2 more"]
