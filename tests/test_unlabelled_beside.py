"""Unlabelled samples beside labelled ones: which come when, who reads what of them, and runs that end with the same bits in any way."""

import numpy
import pytest
import torch
from small_masks import lay_out
from small_masks import write as write_masks
from test_stage_resume import interrupt_at
from training import assert_same_run, merged, metrics, task, together, train, weights, write

import kdkit
from kdkit import recipe as recipes
from kdkit.contracts.dataset_source import DataInfo, InMemory, Texts
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Lesson
from kdkit.data.loaders import prepare
from kdkit.engine.objective import build
from kdkit.errors import DataError, Interrupted, RecipeError, ShapeError
from kdkit.recipe.data_section import DataSpec
from kdkit.runs import checks
from kdkit.runs.fill_caches import fill
from kdkit.runs.run import Run
from kdkit.study.lockstep import train_together

CPU = torch.device("cpu")
TRAIN, LEFT, OTHER = 20, 9, 7


class Numbered(kdkit.DatasetSource):
    """Images of one grey each, which is their number; half of them of either class, or with two numbers as targets."""

    name = "numbered"

    def __init__(self, first=0, count=TRAIN, dims=0):
        super().__init__(None)
        self.first, self.count, self.dims = first, count, dims

    def info(self):
        return DataInfo((1, 4, 4), 2, self.count, 4)

    def split(self, part):
        numbers = torch.arange(self.count if part == "train" else 4) + self.first
        images = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
        return InMemory(images, numbers % 2 if not self.dims else torch.rand(len(numbers), self.dims))


def loader(other=False, dims=0, rank=0, world=1, **changes):
    beside = {"share": 1 / 3} | ({"dataset": {"use": "numbered"}} if other else {})
    own = {"train_samples": 8, "validation": 3, "batch_size": 6, "workers": 0, "unlabelled": beside}
    spec = DataSpec(dataset={"use": "numbered"}, **own | changes)
    source = Numbered(100, OTHER) if other else None
    asked = task("multilabel" if dims else "classification")
    return prepare(spec, Numbered(dims=dims), asked, seed=1, device=CPU, rank=rank, world=world, unlabelled=source)


def greys(batch):
    return (batch.inputs[:, 0, 0, 0] * 255).round().long().tolist()


@pytest.mark.parametrize("other", [False, True], ids=["left out", "another dataset"])
@pytest.mark.parametrize("files", [False, True], ids=["held", "read"])
def test_each_batch_has_its_share_and_the_unlabelled_come_in_turn(other, files):
    # a crop of the whole image, read one by one
    settings = {"timm_augment": {"scale": [1, 1], "ratio": [1, 1], "flip": 0}} if files else {}
    data = loader(other, **settings)
    epochs = [list(data.train.epoch(number)) for number in range(9)]
    own, beside, held = set(), [], {greys(batch)[0] for batch in data.validation}
    for batch in (batch for epoch in epochs for batch in epoch):
        seen = greys(batch)
        assert (len(seen), batch.labelled, len(batch.index)) == (6, 4, 6)
        # the image of another dataset's place i has the index 20 + i, and the grey 100 + i
        assert batch.index.tolist() == [grey - 80 if grey >= 100 else grey for grey in seen]
        assert batch.labels.tolist() == [grey % 2 for grey in seen[:4]] + [-1, -1]
        own |= set(seen[:4])
        beside += seen[4:]
    assert len(own) == 8 and len(data.train) == 2
    count = OTHER if other else LEFT
    passes = [beside[start : start + count] for start in range(0, len(beside), count)]
    assert all(len(set(one)) == count and set(one) == set(passes[0]) for one in passes[:4])
    assert passes[0] != passes[1] and not own & set(beside) and not held & (own | set(beside))
    assert data.info.unlabelled == count and data.train.indices.tolist() == sorted(data.train.indices.tolist())


def test_a_batch_is_made_without_those_before_it_and_shared_by_processes():
    whole = list(loader().train.epoch(3))
    assert torch.equal(next(loader().train.epoch(3, start=1)).index, whole[1].index)
    parts = [list(loader(rank=rank, world=2).train.epoch(3)) for rank in (0, 1)]
    for one, *shares in zip(whole, *parts, strict=True):
        assert [share.labelled for share in shares] == [2, 2]
        known, others = (torch.cat([share.index[at] for share in shares]) for at in (slice(2), slice(2, None)))
        assert torch.equal(torch.cat([known, others]), one.index)


def test_augmentation_is_by_sample_and_copies_have_views_of_their_own():
    shifted = {"augment": {"crop_padding": 2}}
    first, again = (list(loader(**shifted, **more).train.epoch(0)) for more in ({}, {"batch_size": 6}))
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(first, again, strict=True))
    one, other = (next(loader(**shifted).train.epoch(0, view=view)) for view in (0, 1))
    assert torch.equal(one.index, other.index) and not torch.equal(one.inputs[4:], other.inputs[4:])
    batch = next(loader(**shifted, repeats=2).train.epoch(0))
    assert batch.index[0] == batch.index[1] and not torch.equal(batch.inputs[0], batch.inputs[1])


def test_targets_of_several_numbers_and_of_masks(tmp_path):
    batch = next(loader(dims=2).train.epoch(0))
    assert (batch.labels[4:] == -1).all() and (batch.labels[:4] >= 0).all()
    smaller = {"scale": [0.5, 0.9]}  # than the crop, which is then padded
    spec = write_masks(lay_out(tmp_path), data={"train_samples": 4, "unlabelled": {"share": 0.5}, "joint_augment": smaller})
    found = recipes.load(spec)
    data = prepare(found.spec.data, found.dataset(), found.task, seed=0, device=CPU)
    batches = [batch for epoch in range(3) for batch in data.train.epoch(epoch)]
    beside = torch.cat([batch.labels[2:] for batch in batches])
    # no class, but where the image ends; the mask's own 9s, which do not count, are not there
    assert set(beside.unique().tolist()) == {0, 255} and (beside == 0).float().mean() > 0.7
    assert {1, 2} & set(torch.cat([batch.labels[:2] for batch in batches]).unique().tolist())


class Words(kdkit.DatasetSource):
    """Texts of ever more words, all of them the text's number."""

    name = "words"

    def __init__(self, first=0, count=8):
        super().__init__(None)
        self.first, self.count = first, count

    def info(self):
        return DataInfo((8,), 2, self.count, self.count)

    def split(self, part):
        ids = [[self.first + i] * (i + 1) for i in range(self.count)]
        return Texts({"input_ids": ids}, torch.arange(self.count) % 2, {"input_ids": 99})


@pytest.mark.parametrize("other", [None, Words(50, 5)], ids=["left out", "another dataset"])
def test_texts_are_padded_together(other):
    beside = {"dataset": {"use": "words"}} if other else {}
    spec = DataSpec(dataset={"use": "words"}, train_samples=4, batch_size=4, unlabelled=beside)
    data = prepare(spec, Words(), task("text_classification"), seed=0, device=CPU, unlabelled=other)
    for batch in (batch for epoch in range(3) for batch in data.train.epoch(epoch)):
        first = batch.inputs["input_ids"][:, 0].tolist()
        assert batch.index.tolist() == [number - 42 if number >= 50 else number for number in first]
        assert batch.inputs["attention_mask"].sum(1).tolist() == [number % 50 + 1 for number in first]
        assert batch.labelled == 2 and batch.labels[2:].tolist() == [-1, -1] and all(number >= 50 for number in first[2:]) == bool(other)


LOSSES = [
    {"use": "cross_entropy"},
    {"use": "cross_entropy", "name": "second", "output": 1},
    {"use": "logit_kl"},
    {"use": "sp", "layers": [{"student": "f", "teacher": "f"}]},
]
MIXED = Batch(torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, -1, -1]), torch.arange(5), labelled=3)


def answer(views=False, **options):
    made = Outputs(torch.randn(5, 6, **options), {"f": torch.randn(5, 4), "output1": torch.randn(5, 6)})
    return made.seen_beside({"turned": Outputs(torch.randn(15, 6))}) if views else made


def test_losses_on_labels_see_the_labelled_samples_and_others_all(tmp_path):
    found = build(recipes.load(write(tmp_path, losses=LOSSES)))
    student, teacher = answer(views=True, requires_grad=True), answer()
    value = found(Lesson(student, [teacher]), MIXED)
    whole = found(Lesson(student, [teacher]), Batch(MIXED.inputs, MIXED.labels.clamp(min=0), MIXED.index))
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(value.terms["cross_entropy"], cross_entropy(student.logits[:3], MIXED.labels[:3]).detach())
    torch.testing.assert_close(value.terms["second"], cross_entropy(student.features["output1"][:3], MIXED.labels[:3]))
    assert all(value.terms[name] == whole.terms[name] for name in ("logit_kl", "sp"))
    assert value.samples == 5
    copies = student.first(3, 5).views["turned"].logits
    assert torch.equal(copies, student.views["turned"].logits[[0, 1, 2, 5, 6, 7, 10, 11, 12]])


def test_pixels_of_unlabelled_images_teach_and_have_no_class(tmp_path):
    losses = [{"use": "cross_entropy"}, {"use": "logit_kl"}]
    path = write_masks(lay_out(tmp_path, 4, 2), losses=losses, data={"train_samples": 2, "unlabelled": {}})
    found = build(recipes.load(path))
    masks = torch.randint(0, 3, (4, 5, 6))
    masks[0, 0], masks[2:], masks[2:, 0] = 255, 0, 255
    student, teacher = (Outputs(torch.randn(4, 3, 5, 6)) for _ in range(2))
    terms = found(Lesson(student, [teacher]), Batch(torch.rand(4, 3, 5, 6), masks, torch.arange(4), labelled=2)).terms
    cross_entropy = torch.nn.functional.cross_entropy(student.logits[:2], masks[:2], ignore_index=255)
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy)
    counts = masks != 255
    s, t = ((one.logits / 4).log_softmax(1) for one in (student, teacher))
    each = 16 * (t.exp() * (t - s)).sum(1)
    torch.testing.assert_close(terms["logit_kl"], each[counts].mean())


@pytest.mark.parametrize("read", [lambda b: b.labels + 1, lambda b: len(b.labels), lambda b: b.classes, lambda b: torch.stack([b.labels])])
def test_labels_of_a_mixed_batch_are_not_read_by_mistake(read):
    assert MIXED.without_labels().inputs is MIXED.inputs
    with pytest.raises(ShapeError, match=r"reads the labels of training images, and those of `data.unlabelled` have none"):
        read(MIXED.without_labels())


PAIR = [{"student": "layer1", "teacher": "layer1"}]
RECIPE = {
    "name": "beside",
    "data": {
        "dataset": {"use": "synthetic", "image_size": 8, "train": 40, "test": 12, "num_classes": 4},
        "train_samples": 12,
        "batch_size": 8,
        "augment": {"crop_padding": 1, "flip": 0.5},
        "unlabelled": {"share": 0.5},
    },
    "teacher": {"model": "mlp/8"},
    "student": {"model": "mlp/4"},
    "schedule": {"use": "offline"},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}, {"use": "hint", "layers": PAIR}],
    "train": {"epochs": 3, "optimizer": {"lr": 0.05}},
    "run": {"log_steps": 1, "checkpoint_steps": 1},
}
OTHERS = {"dataset": {"use": "synthetic", "image_size": 8, "train": 10, "test": 4, "num_classes": 2, "seed": 5}}
SELF = {"teacher": None, "losses": [{"use": "cross_entropy"}, {"use": "logit_mse"}]}
STAGES = [{"name": "hints", "losses": ["hint"], "epochs": 1}, {"name": "rest", "losses": ["cross_entropy", "logit_kl"], "epochs": 2}]
RUNS = {
    "offline": {},
    "another_dataset": {"data": {"unlabelled": OTHERS}},
    "mean_teacher": {**SELF, "schedule": {"use": "mean_teacher", "decay": 0.5}},
    "staged": {"schedule": {"use": "staged", "stages": STAGES}},
    "assistants": {
        "losses": RECIPE["losses"][:2],
        "schedule": {"use": "assistants", "dense": True, "drop": 0.3, "assistants": [{"model": "mlp/6"}]},
    },
    "accumulated": {"data": {"unlabelled": {"share": 0.75}}, "train": {"accumulate": 2}},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each run by itself."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(folder, merged(RECIPE, changes), into=name).folder for name, changes in RUNS.items()}


@pytest.mark.first(2)
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, alone, name):
    spec = merged(RECIPE, RUNS[name])
    interrupt_at(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train(tmp_path, spec)
    monkeypatch.undo()
    train(tmp_path, spec)
    assert_same_run(tmp_path / "run", alone[name])


def test_side_by_side_they_end_with_the_same_bits(tmp_path, alone):
    found = []
    for name, changes in RUNS.items():
        path = write(tmp_path, {**merged(RECIPE, changes), "name": "beside"}, f"{name}.yaml")
        found.append(Run(recipes.load(path), tmp_path / name))
    assert all(outcome.reason is None for outcome in train_together(found))
    for name in RUNS:
        assert_same_run(tmp_path / name, alone[name])


@pytest.mark.parametrize("beside", [{}, OTHERS], ids=["left out", "another dataset"])
def test_a_cache_changes_nothing_and_is_another_for_other_images(tmp_path, beside):
    spec = merged(RECIPE, {"data": {"unlabelled": beside}, "losses": RECIPE["losses"][:2]})
    kept = {"cache": {"views": 2, "dtype": "fp32", "dir": "cache"}}
    for into in ("first", "again"):
        train(tmp_path, merged(spec, {"teacher": kept}), into=into)
    assert_same_run(tmp_path / "first", tmp_path / "again")
    (name,) = (folder.name for folder in (tmp_path / "cache").iterdir())
    if beside:
        train(tmp_path, merged(spec, {"teacher": kept, "data": {"unlabelled": {"dataset": {"seed": 6}}}}), into="other")
        assert len(list((tmp_path / "cache").iterdir())) == 2
    found = next(one for one in fill(recipes.load(write(tmp_path, merged(spec, {"teacher": kept}))), quiet=True))
    # two views of all: 12 labelled images, and 28 that are left or 10 others
    assert found.path.name == name and found.filled == (44 if beside else 80)


@pytest.mark.parametrize(("beside", "rows"), [({}, 40), (OTHERS, 50)], ids=["left out", "another dataset"])
def test_answers_in_a_file_have_a_row_for_each_image_of_both(tmp_path, beside, rows):
    spec = merged(RECIPE, {"data": {"augment": None, "unlabelled": beside}, "losses": RECIPE["losses"][:2]})
    answers = torch.randn(rows, 4).numpy()
    numpy.savez(tmp_path / "all.npz", logits=answers)
    numpy.savez(tmp_path / "few.npz", logits=answers[:-1])
    spec["teacher"] = {"model": "answers/logits", "file": "few.npz"}
    with pytest.raises(RecipeError, match=f"has {rows - 1} rows, and the dataset's whole training part {rows}"):
        checks.make(recipes.load(write(tmp_path, spec)))
    result = train(tmp_path, merged(spec, {"teacher": {"file": "all.npz"}, "train": {"epochs": 1}}))
    assert all(line["terms"]["logit_kl"] > 0 for line in metrics(result.folder) if "terms" in line)


def test_a_run_on_masks_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    path = write_masks(lay_out(tmp_path, 10, 4), data={"train_samples": 4, "unlabelled": {}})
    kdkit.train(path, folder=tmp_path / "whole", quiet=True)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        kdkit.train(path, folder=tmp_path / "run", quiet=True)
    monkeypatch.undo()
    kdkit.train(path, folder=tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, alone):
    path = write(tmp_path, RECIPE)
    for command in together(tmp_path, "train", path, "--run", "two"):
        code, log = command.finish()
        assert code == 0, log
    ours, theirs = weights(tmp_path / "two"), weights(alone["offline"])
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


HIDDEN = "reads the labels of training images, and those of `data.unlabelled` have none"
ON_LABELS = {"teacher": None, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}]}
REFUSED = {
    "a response loss": ({"losses": [{"use": "cross_entropy"}, {"use": "dkd"}]}, "losses.1", HIDDEN),
    "a loss that draws by class": ({"losses": [{"use": "cross_entropy"}, {"use": "crd", "layers": PAIR}]}, "losses.1", HIDDEN),
    "a schedule": ({**ON_LABELS, "schedule": {"use": "ddgsd"}}, "schedule", HIDDEN),
    "weights by labels": (
        {"teacher": None, "teachers": [{"model": "mlp/8"}, {"model": "mlp/6"}], "losses": ON_LABELS["losses"],
         "schedule": {"use": "offline", "per_sample": "cross_entropy"}},
        "schedule", HIDDEN,
    ),
    "an order": ({**ON_LABELS, "schedule": {"use": "cs_kd"}}, "data.unlabelled", "chooses which images come together; leave unlabelled out"),
    "mixup": ({"train": {"mixup": {"mixup_alpha": 0.2}}}, "train.mixup", "mixes labels, and those of `data.unlabelled` have none"),
    "nothing left": ({"data": {"train_samples": None}}, "data.unlabelled", "there are none: `train_samples` or `train_fraction` leaves some out"),
    "another shape": ({"data": {"unlabelled": {"dataset": {**OTHERS["dataset"], "image_size": 6}}}}, "data.unlabelled", "(3, 6, 6); the labelled have (3, 8, 8); set data.image_size"),
    "other channels": ({"data": {"image_size": 8, "unlabelled": {"dataset": {**OTHERS["dataset"], "channels": 1}}}}, "data.unlabelled", "(1, 8, 8); the labelled have (3, 8, 8)"),
    "few labels": ({"data": {"batch_size": 32}}, "data.batch_size", "16 is more than the 12 training images"),
    "an unknown dataset": ({"data": {"unlabelled": {"dataset": {"use": "synthetik"}}}}, "data.unlabelled.dataset.use", "did you mean 'synthetic'"),
    "no share": ({"data": {"unlabelled": {"share": 0.01}}}, "data", "unlabelled.share: 0.01 of 8 samples leaves none of one kind in a batch"),
    "incomplete batches": ({"data": {"drop_last": False}}, "data", "unlabelled needs drop_last: true"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, what):
    changes, place, says = REFUSED[what]
    with pytest.raises(RecipeError) as raised:
        checks.make(recipes.load(write(tmp_path, merged(RECIPE, changes))))
    assert f": {place}: " in str(raised.value) and says in str(raised.value) and "\n" not in str(raised.value)


def test_the_plan_tells_them_and_which_no_loss_reads(tmp_path):
    assert "beside them: 28 unlabelled training images" in str(checks.make(recipes.load(write(tmp_path, RECIPE))))
    alone = {"teacher": None, "losses": [{"use": "cross_entropy"}], "schedule": {"use": "supervised"}}
    told = str(checks.make(recipes.load(write(tmp_path, merged(RECIPE, alone)))))
    assert "no loss reads the unlabelled samples" in told


def test_processes_that_cannot_share_a_batch_are_told():
    with pytest.raises(DataError, match=r"data.unlabelled.share: 5 of 6 images have labels, which cannot be shared equally by 2"):
        loader(world=2, unlabelled={"share": 0.2})


def test_fingerprints_know_them(tmp_path):
    prints = [
        recipes.load(write(tmp_path, merged(RECIPE, {"data": {"unlabelled": own}}))).fingerprint
        for own in (None, {}, {"share": 0.3}, OTHERS)
    ]
    assert len(set(prints)) == 4
