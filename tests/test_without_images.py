"""Runs whose schedule makes its own images: checked, killed, side by side, measured, reported, refused where it cannot be."""

import random
import signal

import pytest
import torch
from PIL import Image
from test_lockstep import alone, jobs
from training import PLAIN, Command, assert_same_run, lines, merged, metrics, stop_and_go_on, train, write

import kdkit
from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks, pictures
from kdkit.study.lockstep import train_together

BANK = {"round_size": 8, "warmup": 2, "every": 3, "images": 24, "shift": 1}
GENERATED = {"latent": 4, "width": 4}
SCHEDULES = {
    "dafl": {**GENERATED, "every": 2, "batch_norm": 0.1},
    "deep_inversion": {**BANK, "iterations": 2, "total_variation": 0.1},
    "cmi": {**BANK, **GENERATED, "iterations": 2, "negatives": 8, "projection": 4},
    "fast": {**BANK, **GENERATED, "iterations": 2},
}
RECIPE = merged(
    PLAIN,
    {
        "data": {"synthetic_batches": 5},
        "losses": [{"use": "logit_kl"}, {"use": "hint", "weight": 0.1, "layers": [{"student": "stage3", "teacher": "stage3"}]}],
        "run": {"checkpoint_steps": 1},
    },
)


def of(schedule, **changes):
    return merged({**RECIPE, "name": schedule, "schedule": {"use": schedule, **SCHEDULES[schedule]}}, changes)


def refused(folder, spec):
    with pytest.raises(RecipeError) as told:
        checks.make(recipe.load(write(folder, spec)))
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_goes_on_to_the_same_bits_and_shows_its_images(schedule, tmp_path, monkeypatch):
    made = checks.make(recipe.load(write(tmp_path, of(schedule))))
    assert "no training and 20 test images" in str(made) and made.stages[0].steps == 10
    result = train(tmp_path, of(schedule), into="whole")
    assert result.test["top1"] >= 0
    stop_and_go_on(tmp_path / "recipe.yaml", tmp_path / "parts", monkeypatch, steps=7)  # between two rounds of an epoch
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    drawn = pictures.drawn(tmp_path / "whole")
    assert list(drawn) == ["train-generated" if schedule == "dafl" else "train-bank"]
    assert all(pictures.read(path) for path in drawn.values())
    values = [line["train"]["loss"] for line in metrics(tmp_path / "whole") if line["kind"] == "epoch"]
    assert len(values) == 2 and all(value > 0 for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(schedule, tmp_path):
    path = write(tmp_path, of(schedule, train={"epochs": 4}))
    assert Command(tmp_path, "train", path, "--run", "whole").finish()[0] == 0
    dice, total = random.Random(), lines(tmp_path / "whole")
    for share in sorted(dice.random() for _ in range(3)):
        command = Command(tmp_path, "train", path, "--run", "parts")
        if command.wait_for(lambda share=share: lines(tmp_path / "parts") >= share * total):
            command.send(signal.SIGKILL)
        command.process.join()
    code, log = Command(tmp_path, "train", path, "--run", "parts").finish()
    assert code == 0, log
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_step_of_several_batches_makes_images_once(tmp_path, monkeypatch):
    from kdkit_plugins.schedules.fast import Meta

    rounds, make = [], Meta.__call__
    monkeypatch.setattr(Meta, "__call__", lambda self, *, competing: rounds.append(competing) or make(self, competing=competing))
    # two epochs of six batches: steps 0 to 5, a round before steps 0 (2 to warm up) and 3
    train(tmp_path, of("fast", data={"synthetic_batches": 6}, train={"accumulate": 2}))
    assert rounds == [False, False, True]


@pytest.mark.parametrize(("schedule", "rates"), [("cmi", {"lr": 1e30}), ("fast", {"lr": 1e30, "lr_noise": 1e30})])
def test_images_that_cannot_be_made_stop_the_run_in_a_line(schedule, rates, tmp_path):
    spec = of(schedule)
    spec["schedule"] |= rates
    with pytest.raises(kdkit.RunError, match="the loss of the images that are made is nan") as told:
        train(tmp_path, spec)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_runs_side_by_side_end_as_alone(tmp_path):
    variants = {name: {"schedule": {"use": name, **options}} for name, options in SCHEDULES.items()}
    together = jobs(tmp_path, RECIPE, variants)
    train_together(together)
    for job in together:
        assert_same_run(alone(tmp_path, job), job.folder)


def test_training_images_are_neither_read_nor_needed(tmp_path, monkeypatch):
    from kdkit_plugins.datasets.synthetic import Synthetic

    split = Synthetic.split

    def only_test(self, part):
        assert part == "test", "the training part is read"
        return split(self, part)

    monkeypatch.setattr(Synthetic, "split", only_test)
    train(tmp_path, of("fast"))


WRONG = {
    "a label": ({"losses": [{"use": "cross_entropy"}]}, "losses.0: reads the labels of training images, and they have none"),
    "a memory of images": (
        {"losses": [{"use": "crd", "layers": [{"student": "penultimate", "teacher": "penultimate"}]}]},
        "numbered images",
    ),
    "a survey": (
        {"losses": [{"use": "dense_mse", "standardize_teacher": "phi_s", "layers": [{"student": "stage3", "teacher": "stage3"}]}]},
        "shows the teacher all training images before the first step, and there are none",
    ),
    "no number": ({"data": {"synthetic_batches": None}}, "schedule 'fast' makes its images; say how many batches an epoch has"),
    "images": ({"schedule": {"use": "offline"}}, "schedule 'offline' trains on images of the data; those that make their own: cmi, dafl"),
    "augmentation": ({"data": {"augment": {"flip": 0.5}}}, "there are no training images; leave augment out"),
    "validation": ({"data": {"validation": 4, "train_samples": 8}}, "leave train_samples, validation out"),
    "a cache": ({"teacher": {"cache": {"views": "all"}}}, "images that the schedule makes do not come again"),
    "mixup": ({"train": {"mixup": {"mixup_alpha": 0.2}}}, "train.mixup: needs the labels of training images"),
    "no batch norm": (
        {"losses": [{"use": "logit_kl"}], "teacher": {"model": "mlp/8", "stem": None, "args": None}},
        "the teacher has no batch norms",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_in_one_line(case, tmp_path):
    changes, says = WRONG[case]
    spec = of("fast")
    for section, values in changes.items():
        spec[section] = values if section in ("losses", "schedule") else merged(spec[section], values)
    for key in [key for key, value in spec["teacher"].items() if value is None]:
        del spec["teacher"][key]
    assert says in refused(tmp_path, spec)


def test_noise_follows_from_seed_epoch_and_batch():
    from kdkit.data.noise import NoiseLoader
    from kdkit.recipe.data_section import DataSpec

    spec = DataSpec.model_construct(synthetic_batches=3, batch_size=4)
    first = [batch.inputs for batch in NoiseLoader(spec, (1, 5, 6), 0, torch.device("cpu")).epoch(1)]
    late = list(NoiseLoader(spec, (1, 5, 6), 0, torch.device("cpu")).epoch(1, start=2))
    assert len(first) == 3 and torch.equal(first[2], late[0].inputs) and late[0].labels.tolist() == [-1] * 4
    assert not torch.equal(first[0], first[1]) and first[0].shape == (4, 1, 5, 6)


def test_processes_are_refused(tmp_path):
    from kdkit.data import sizes

    spec = recipe.load(write(tmp_path, of("fast"))).spec.data
    assert sizes.unshared(spec, 1) is None
    assert sizes.unshared(spec, 2) == ("synthetic_batches", "one process makes the images, and these are 2")


def test_a_picture_shows_any_channels_and_a_broken_one_is_left_out(tmp_path):
    for channels in (1, 2, 3, 5):
        (tmp_path / "one.png").write_bytes(pictures.grid(torch.rand(7, channels, 8, 9)))
        with Image.open(tmp_path / "one.png") as image:
            assert image.mode == "RGB"
        assert pictures.read(tmp_path / "one.png")
    (tmp_path / "one.png").write_bytes((tmp_path / "one.png").read_bytes()[:60])
    assert pictures.read(tmp_path / "one.png") is None


@pytest.mark.slow
def test_a_report_shows_the_images(tmp_path):
    from kdkit.study.report import output

    train(tmp_path, of("dafl", losses=[{"use": "logit_kl"}]), into="runs/dafl")
    report = output.write([tmp_path / "runs" / "dafl"], tmp_path / "report")
    assert "## Images that were made" in (tmp_path / "report" / "report.md").read_text()
    assert any(path.name == "made-1-1.png" for path in report.files)
