"""Every loss under every schedule: two steps on tiny models in every stage, or one clear line that says why not."""

import itertools

import pytest
from training import TINY, train, write

import kdkit
from kdkit import recipe
from kdkit.contracts.task import serves
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import train_epoch
from kdkit.recipe import registry
from kdkit.runs import checks, opening, training
from kdkit.runs.networks import ModelFactory

PLUGINS = registry.load()
# maskedkd masks tokens of vision transformers, gkd writes texts
FOR_ANY_NETWORK = [name for name in PLUGINS.schedules if name not in ("maskedkd", "gkd")]
WIDER = {**TINY, "args": {**TINY["args"], "channels": [8, 8, 16, 16]}}
BASE = {
    "name": "pair",
    "data": {"dataset": {"use": "synthetic", "image_size": 16, "train": 24, "test": 8, "num_classes": 4}, "batch_size": 8},
    "student": TINY,
    "train": {"epochs": 1, "optimizer": {"lr": 1e-3}, "clip_grad": 1.0},
    "run": {"snapshots": 1},
}
BANK = {"round_size": 8, "warmup": 1, "every": 1, "iterations": 1}
SCHEDULES = {
    "assistants": {"assistants": [TINY]},
    "branches": {"split": "stage2"},
    "born_again": {"generations": 2},
    "class_incremental": {"stages": 2},
    "rco": {"anchors": [1]},
    "cmi": {**BANK, "width": 4, "latent": 4, "negatives": 8, "projection": 4},
    "dafl": {"width": 4, "latent": 4},
    "deep_inversion": BANK,
    "fast": {**BANK, "width": 4, "latent": 4},
    "staged": {"stages": [{"name": "all"}], "turned": True, "second": True},
}


def layers(*names):
    return {"layers": [{"student": name, "teacher": name} for name in names]}


OPTIONS = {
    "bert_pkd": layers("penultimate"),
    "byot": {"layers": [{"student": "stage2", "teacher": "stage4"}]},
    "cat_kd": layers("stage4"),
    "crd": {**layers("penultimate"), "negatives": 4, "size": 4},
    "ctkd": {"reversal": 1.0},
    "dense_mse": layers("stage3"),
    "frskd": layers("stage2", "stage3"),
    "mgd": {**layers("stage3"), "weight": 1e-4},
    "minilm_relations": {**layers("stage2", "stage3"), "heads": 2},
    "norm": layers("stage4"),
    "ofd": layers("layer3.0.act2@input"),
    "proteus": layers("stage3"),
    "queue_kl": {**layers("penultimate"), "queue": 16},
    "review": {**layers("stage2", "stage3"), "width": 4},
    "rrd": {**layers("penultimate"), "queue": 16},
    "scalekd": {**layers("stage2", "stage3"), "heads": 2},
    "sdd": layers("stage4"),
    "seed": {**layers("penultimate"), "queue": 16},
    "simkd": layers("stage4"),
    "srrl": layers("stage4"),
    "tinybert": {**layers("stage3", "stage2", "stage2"), "attention": 1, "heads": 2},
    "uskd": layers("stage3"),
    "vitkd": {**layers("stage2", "stage3"), "weight": 1e-4},
}
# What cannot be, and the words that say why.
WITHOUT_TEACHER = ("adversarial_alone", "supervised")
NO_TEACHER = "is never used: no stage of schedule '{}' has a teacher"
NO_NETWORK = "there is no teacher network to take a layer from"  # peers and passing answers have none that stays
WITHOUT_NETWORK = ["codistill", "ensemble_peers", "mean_teacher", "mutual", "okddip", "ps_kd", "branches"]
ON_LABELS = [name for name, cls in PLUGINS.losses.items() if cls.knowledge == "labels"]
READING = ["cat_kd", "fcfd", "nd", "ofd", "scalekd", "sdd", "simkd", "srrl", "wkd_logit"]
MAKING = [name for name, cls in PLUGINS.schedules.items() if not cls.needs_images]
FOR_CLASSES = [name for name, cls in PLUGINS.losses.items() if serves(cls.tasks or cls.for_tasks(), PLUGINS.tasks["classification"]())]
REFUSED = {
    **{(own, loss): NO_TEACHER.format(own) for own in WITHOUT_TEACHER for loss, cls in PLUGINS.losses.items() if cls.knowledge != "labels"},
    **{(schedule, loss): NO_NETWORK for schedule in WITHOUT_NETWORK for loss in READING},
    **{(schedule, "ofd"): "set up with a context that has its network" for schedule in WITHOUT_NETWORK},
    **{
        (schedule, loss): "by pooling and a linear classifier: its head is more"  # its logits are put together, or cut off
        for schedule in ("bake", "class_incremental")
        for loss in ("cat_kd", "sdd", "simkd", "srrl")
    },
    **{(schedule, "nd"): "needs a teacher that stays as it is" for schedule in ("bake", "cs_kd", "ddgsd", "dlb")},
    **{(schedule, loss): "reads the labels of training images, and they have none" for schedule in MAKING for loss in ON_LABELS},
    **{(schedule, "nd"): "and there are none" for schedule in MAKING},
    **{(schedule, "crd"): "numbered images" for schedule in MAKING},
    ("assistants", "fsp"): "must have equally many channels",
    **{(schedule, loss): "so that it cannot teach on its own" for schedule in ("assistants", "born_again") for loss in ("norm", "simkd")},
    **{
        (schedule, loss): "turned: true"
        for schedule in PLUGINS.schedules
        if schedule not in ("staged", *WITHOUT_TEACHER)
        for loss in ("hsakd", "sskd")
    },
    **{(schedule, "crld"): "second: true" for schedule in PLUGINS.schedules if schedule not in ("staged", *WITHOUT_TEACHER)},
}


def options(loss, schedule):
    if loss == "fsp" and schedule in ("offline", "rco", "staged"):  # where the teacher is wider, other layers are as wide
        return {"layers": [{"student": "stage3", "teacher": "stage1"}, {"student": "stage4", "teacher": "stage2"}]}
    compares = issubclass(PLUGINS.losses[loss].Options, kdkit.FeatureOptions)
    return OPTIONS.get(loss, layers("stage2", "stage3") if compares else {})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A recipe whose run has snapshots."""
    folder = tmp_path_factory.mktemp("teacher")
    alone = {**BASE, "name": "teacher", "student": WIDER, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
    train(folder, alone, into="runs/teacher")
    return folder / "recipe.yaml"


def two_steps(path):
    """The first two steps of every stage; the values of their terms."""
    loaded = recipe.load(path)
    checks.make(loaded)
    teachers = training.trained_teachers(loaded, path.parent / "run", quiet=True)
    accelerator = build_accelerator(loaded.spec.train)
    prepared = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, prepared.info, teachers, device=accelerator.device)
    carried, found = {}, []
    schedule = loaded.plugins.schedules[loaded.spec.schedule.use](loaded.spec.schedule)
    for number, stage in enumerate(schedule.stages(factory)):
        trainer = training.build_trainer(loaded, prepared, factory, accelerator, number, stage, carried)
        found += itertools.chain(*itertools.islice(train_epoch(trainer), 2))
        trainer.refuse_non_finite()
        trainer.close()
    factory.verify_frozen()
    return found


@pytest.mark.parametrize("schedule", FOR_ANY_NETWORK)
def test_several_losses_train_together_under_a_schedule(schedule, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    names = [loss for loss in ("byot", "logit_kl", "hint", "rkd_distance", "srrl") if (schedule, loss) not in REFUSED]
    values = two_steps(written(tmp_path, schedule, names, teacher))
    assert {*names} <= {name for value in values for name in value.terms} and all(value.total.isfinite() for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", FOR_ANY_NETWORK)
def test_every_loss_trains_under_a_schedule(schedule, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    wrong = []
    for loss in FOR_CLASSES:
        try:
            values = two_steps(written(tmp_path, schedule, [loss], teacher))
        except kdkit.KdkitError as error:
            if REFUSED.get((schedule, loss), "nothing") not in str(error) or "\n" in str(error):
                wrong.append(f"{loss}: {error}")
            continue
        if (schedule, loss) in REFUSED:
            wrong.append(f"{loss}: should be refused: {REFUSED[schedule, loss]}")
        if not any(loss in value.terms for value in values) or not all(value.total.isfinite() for value in values):
            wrong.append(f"{loss}: {[{name: float(x) for name, x in value.terms.items()} for value in values]}")
    assert not wrong, "\n".join(wrong)


def written(folder, schedule, names, teacher):
    """A recipe of these losses, beside cross-entropy."""
    losses = [{"use": loss, **options(loss, schedule)} for loss in names]
    data = {**BASE["data"], "synthetic_batches": 3} if schedule in MAKING else BASE["data"]
    if schedule not in MAKING:
        losses.insert(0, {"use": "cross_entropy", "name": "labels"})
    spec = {**BASE, "data": data, "schedule": {"use": schedule, **SCHEDULES.get(schedule, {})}, "losses": losses}
    return write(folder, {**spec, "teacher": {"recipe": str(teacher)}} if PLUGINS.schedules[schedule].needs_teacher else spec)
