"""A teacher whose answers are kept: training comes to the same, no stale answer is ever read, what cannot be kept is refused."""

import dataclasses
import functools
import os
import re
import signal
import time

import pytest
import torch
from training import PATIENCE, PLAIN, PROCESSES, Command, forked, merged, write

from kdkit import recipe
from kdkit.cache import store as answer_store
from kdkit.cache.folder import clear, look, stores
from kdkit.cache.opening import answering, open_cache
from kdkit.cache.packing import KeptAnswers, Slots
from kdkit.cache.parts import parts_of
from kdkit.contracts.model_source import CacheOptions
from kdkit.contracts.records import Outputs
from kdkit.data import augment
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import train_epoch
from kdkit.errors import RecipeError, RunError
from kdkit.runs import checks, opening, training
from kdkit.runs.fill_caches import fill
from kdkit.runs.networks import ModelFactory

ALL = {"views": "all"}
SHIFTS = {"augment": {"crop_padding": 1, "flip": 0.5}}
HINT = {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}
WITH_HINT = [{"use": "cross_entropy"}, {"use": "logit_kl"}, HINT]


def only_mlp(**changes):
    """No batch norm, no channels-last."""
    base = {**PLAIN, "student": {"model": "mlp/16"}, "teacher": {"model": "mlp/40"}}
    return merged(base, changes)


class Counted:
    """A teacher's forward that says how many images it was asked about."""

    def __init__(self, teacher):
        self.teacher, self.images = teacher, 0

    def __call__(self, inputs):
        self.images += len(inputs)
        return self.teacher.forward(inputs)


@dataclasses.dataclass
class Wired:
    """A recipe ready to train, its teacher's answers kept where it says so."""

    trainer: object
    teacher: object
    cache: object
    asked: Counted
    recipe: object
    data: object

    def train(self, epochs=2):
        for _ in range(epochs):
            for _ in train_epoch(self.trainer):
                pass
        if self.cache:
            self.cache.store.close()
        return {name: value.clone() for name, value in self.trainer.stage.students[0].module.state_dict().items()}


def wired(folder, base=PLAIN, touch=lambda teacher: None, tell=lambda text: None, **changes):
    """The first stage of a recipe, with the cache between its loader and its teacher."""
    loaded = recipe.load(write(folder, base, **{"run": {"folder": str(folder / "runs")}, **changes}))
    accelerator = build_accelerator(loaded.spec.train)
    opened = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, opened.info, {}, device=accelerator.device)
    teacher = factory.teacher()
    touch(teacher)
    cache, asked = open_cache(loaded, "teacher", teacher, opened.info, opened.train, tell), Counted(teacher)
    if cache is not None:
        opened = dataclasses.replace(opened, train=cache.loader(opened.train))
        teacher.answers = functools.partial(cache.answer, forward=asked)
    stage = next(iter(loaded.plugins.schedules[loaded.spec.schedule.use](loaded.spec.schedule).stages(factory)))
    return Wired(training.build_trainer(loaded, opened, factory, accelerator, 0, stage), teacher, cache, asked, loaded, opened)


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=0, atol=tolerance), name


def caches(folder):
    return stores(folder / "runs" / "teacher-cache")


# Training comes to the same


@pytest.mark.parametrize("losses", [PLAIN["losses"], WITH_HINT], ids=["logits", "taps"])
@pytest.mark.parametrize("shown", [{}, SHIFTS], ids=["plain", "shifted"])
def test_fp32_training_from_a_cache_comes_to_the_same_numbers(tmp_path, losses, shown):
    cache = {"views": "all", "what": "taps", "dtype": "fp32"}
    alone = wired(tmp_path, losses=losses, data=shown).train()
    first = wired(tmp_path, losses=losses, data=shown, teacher={"cache": cache}).train()
    again = wired(tmp_path, losses=losses, data=shown, teacher={"cache": cache})
    close(first, alone, 1e-6)
    close(again.train(), alone, 1e-6)


def test_cached_training_is_bitwise_equal_where_a_row_does_not_depend_on_its_batch(tmp_path):
    """A network whose answer to an image is the same bits in whatever batch it comes."""
    base = only_mlp(teacher={"model": "mlp/1"})
    alone = wired(tmp_path, base).train()
    there = wired(tmp_path, base, teacher={"cache": {**ALL, "dtype": "fp32"}})
    kept = there.train()
    assert all(torch.equal(kept[name], alone[name]) for name in alone)


MIXED = {"train": {"mixup": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}, "data": SHIFTS}
KEPT_MIXES = {"teacher": {"cache": {"views": 2, "dtype": "fp32"}}, **MIXED}


def test_kept_mixes_teach_as_the_teacher_and_come_again(tmp_path):
    alone, kept = wired(tmp_path, **MIXED).train(), wired(tmp_path, **KEPT_MIXES).train()
    assert all(torch.equal(kept[name], alone[name]) for name in alone)
    again = wired(tmp_path, **KEPT_MIXES)
    batches = [list(again.data.train.epoch(number)) for number in (1, 2, 3)]
    # a run that goes on in the middle of an epoch
    for first, third, resumed in zip(batches[0][3:], batches[2][3:], again.data.train.epoch(3, 3), strict=True):
        for batch in (third, resumed):
            assert all(torch.equal(getattr(batch, part), getattr(first, part)) for part in ("inputs", "labels", "index"))
            assert torch.equal(again.teacher(batch.inputs).logits, again.teacher.forward(batch.inputs).logits)
    assert not torch.equal(batches[0][0].inputs, batches[1][0].inputs)
    assert again.asked.images == 8  # one batch, to compare


@pytest.mark.parametrize("change", [{"seed": 1}, {"data": {"batch_size": 16}}, {"train": {"mixup": {"mixup_alpha": 0.5}}}])
def test_mixes_of_other_batches_are_another_cache(tmp_path, change):
    for own in ({}, change):
        wired(tmp_path, merged(PLAIN, KEPT_MIXES), **own).cache.close()
    assert len(caches(tmp_path)) == 2


def test_an_empty_and_a_full_cache_give_the_same_bits(tmp_path):
    kept = {"cache": {**ALL, "what": "taps"}}
    first, second = wired(tmp_path, losses=WITH_HINT, data=SHIFTS, teacher=kept), None
    ours = first.train(3)
    second = wired(tmp_path, losses=WITH_HINT, data=SHIFTS, teacher=kept)
    theirs = second.train(3)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert 0 < second.asked.images <= 8 < first.asked.images  # one batch, to compare


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_cache_in_half_precision_is_within_rounding(tmp_path, dtype):
    alone = wired(tmp_path, losses=WITH_HINT, data=SHIFTS)
    kept = wired(tmp_path, losses=WITH_HINT, data=SHIFTS, teacher={"cache": {**ALL, "what": "taps", "dtype": dtype}})
    batch = next(iter(kept.data.train.epoch(0)))
    own, read = alone.teacher(batch.inputs), kept.teacher(batch.inputs)
    relative = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    for ours, theirs in ((own.logits, read.logits), (own.features["stage3"], read.features["stage3"])):
        assert theirs.dtype == torch.float32 and ours.stride() == theirs.stride()
        assert torch.allclose(ours, theirs, rtol=relative, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_training_in_half_precision_from_a_cache(tmp_path, dtype):
    """By how far the weights have moved; a network without batch norm, which would make small differences large."""
    alone = wired(tmp_path, only_mlp(), data=SHIFTS)
    began = {name: value.detach().clone() for name, value in alone.trainer.stage.students[0].module.named_parameters()}
    kept = wired(tmp_path, only_mlp(), data=SHIFTS, teacher={"cache": {**ALL, "dtype": dtype}})
    ours, theirs = kept.train(), alone.train()
    moved = max(float((theirs[name] - value).abs().max()) for name, value in began.items())
    apart = max(float((theirs[name] - ours[name]).abs().max()) for name in began)
    assert 0 < apart < {"fp16": 0.001, "bf16": 0.01}[dtype] * moved


def test_a_cached_layer_that_is_the_logits_stays_one_tensor_with_them(tmp_path):
    losses = [*PLAIN["losses"], {"use": "rkd_distance", "layers": [{"student": "logits", "teacher": "logits"}]}]
    there = wired(tmp_path, losses=losses, teacher={"cache": ALL})
    answer = there.teacher(next(iter(there.data.train.epoch(0))).inputs)
    assert answer.features["logits"] is answer.logits
    assert [column.name for column in there.cache.store.columns] == ["logits"]


def test_a_teacher_that_stops_at_its_deepest_tap_is_cached_without_logits(tmp_path):
    there = wired(tmp_path, losses=[{"use": "cross_entropy"}, HINT], teacher={"cache": {**ALL, "what": "taps"}})
    assert [column.name for column in there.cache.store.columns] == ["tap stage3"]
    there.train()


def test_a_cache_has_the_mixed_precision_of_training(tmp_path):
    """Losses are set up outside autocast; the answers kept there are those of training."""
    there = wired(tmp_path, only_mlp(), train={"precision": "bf16"}, teacher={"cache": {**ALL, "dtype": "fp32"}})
    inputs = next(iter(there.data.train.epoch(0))).inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = there.teacher.forward(inputs).logits.float()
    assert torch.equal(there.teacher(inputs).logits, own)


# Which views


def test_few_cached_views_come_again(tmp_path):
    there = wired(tmp_path, data=SHIFTS, teacher={"cache": {"views": 3}})
    plain = wired(tmp_path, data=SHIFTS).data.train
    for epoch in range(7):
        shown, expected = next(iter(there.data.train.epoch(epoch))), next(iter(plain.epoch(epoch, view=epoch % 3)))
        assert torch.equal(shown.inputs, expected.inputs) and torch.equal(shown.index, expected.index)
    there.train(7)
    assert there.asked.images == 3 * 48 + 8  # and one batch once more, to compare


def test_few_cached_views_of_timms_augmentations(tmp_path):
    data = {"timm_augment": {"auto_augment": "rand-m5"}, "workers": 0}
    there = wired(tmp_path, data=data, teacher={"cache": {"views": 2}})
    there.train(4)
    assert there.asked.images == 2 * 48 + 8


def test_of_all_views_each_is_cached_once(tmp_path):
    there = wired(tmp_path, data={"augment": {"flip": 0.5}}, teacher={"cache": ALL})
    assert there.cache.slots.count == 2
    plain = wired(tmp_path, data={"augment": {"flip": 0.5}}).data.train
    for epoch in (0, 5, 11):
        ours, theirs = next(iter(there.data.train.epoch(epoch))), next(iter(plain.epoch(epoch)))
        assert torch.equal(ours.inputs, theirs.inputs)
    there.train(20)
    assert bool(there.cache.store.known(torch.arange(2 * 48)).all())


def test_a_slot_of_the_cache_is_one_picture_of_an_image():
    """By a table of what each image showed in many views."""
    for flip in (0.0, 0.5, 1.0):
        options = CacheOptions(views="all")
        data = recipe_data(padding=1, flip=flip)
        slots, index, seen = Slots.of(options, data, seed=3, mixed=False), torch.arange(40), {}
        assert slots.count == (18 if flip == 0.5 else 9)
        images = torch.rand(40, 3, 6, 6)
        for view in range(200):
            outcome = augment.draw_crop_flip(3, view, index, 1, flip)
            shown = slots.shown(view, index)
            pictures = augment.crop_flip(images, outcome, 1)
            assert torch.equal(augment.crop_flip(images, torch.tensor([slots.outcome(int(s)) for s in shown]), 1), pictures)
            for i in range(40):
                before = seen.setdefault((i, int(shown[i])), pictures[i])
                assert torch.equal(before, pictures[i])
        assert {slot for _, slot in seen} == set(range(slots.count))


def recipe_data(padding, flip):
    from kdkit.recipe.data_section import BatchAugment, DatasetEntry, DataSpec

    return DataSpec(dataset=DatasetEntry(use="synthetic"), augment=BatchAugment(crop_padding=padding, flip=flip))


def test_a_cache_of_top_k_keeps_the_largest_probabilities_exactly():
    logits = torch.randn(50, 30) * 3
    kept = KeptAnswers(CacheOptions(views=1, top_k=4, dtype="fp32"), (30,), True, {})
    found = kept.unpack(kept.pack(Outputs(logits)), "teacher").logits
    own, read = logits.double().softmax(1), found.double().softmax(1)
    for row in range(50):
        best = sorted(range(30), key=lambda k: -own[row, k])
        assert read[row, best[:4]].tolist() == pytest.approx(own[row, best[:4]].tolist(), rel=1e-5)
        rest = own[row, best[4:]].sum().item() / 26
        assert read[row, best[4:]].tolist() == pytest.approx([rest] * 26, rel=1e-4)
    assert kept.bytes == 4 * 4 + 4 * 2 + 4


def test_a_cache_refuses_numbers_too_large_for_half_precision(tmp_path):
    def enlarge(teacher):
        teacher.module.get_submodule("fc").weight.data.mul_(1e7)

    with pytest.raises(RunError, match="above 65,504, which `dtype: fp16` cannot hold; set `cache.dtype: bf16`"):
        wired(tmp_path, touch=enlarge, teacher={"cache": ALL})
    wired(tmp_path, touch=enlarge, teacher={"cache": {**ALL, "dtype": "bf16"}})


# A stale cache is never read


def name_of(folder, base=PLAIN, touch=lambda teacher: None, **changes):
    there = wired(folder, base, touch, **{"teacher": {"cache": ALL}, **changes})
    there.cache.store.close()
    return there.cache.store.path.name


def nudge(teacher):
    with torch.no_grad():
        teacher.module.get_submodule("fc").weight[0, 0] += 1e-6


def nudge_statistics(teacher):
    next(value for name, value in teacher.module.named_buffers() if "running" in name).view(-1)[0] += 1e-3


STALE = {
    "weights": {"touch": nudge},
    "running statistics": {"touch": nudge_statistics},
    "normalisation": {"teacher": {"normalize": {"mean": [0.5], "std": [0.25]}, "cache": ALL}},
    "size": {"teacher": {"input_size": 16, "cache": ALL}},
    "interpolation": {"teacher": {"interpolation": "bicubic", "cache": ALL}},
    "precision": {"teacher": {"precision": "bf16", "cache": ALL}},
    "precision of training": {"train": {"precision": "bf16"}},
    "folding": {"teacher": {"fold_batchnorm": True, "cache": ALL}},
    "channels last": {"train": {"channels_last": True}},
    "type": {"teacher": {"cache": {**ALL, "dtype": "bf16"}}},
    "top k": {"teacher": {"cache": {**ALL, "top_k": 2}}},
    "taps": {"losses": WITH_HINT, "teacher": {"cache": {**ALL, "what": "taps"}}},
    "images": {"data": {"dataset": {"seed": 1}}},
    "noise": {"data": {"dataset": {"noise": 0.3}}},
    "padding": {"data": {"augment": {"crop_padding": 1}}},
    "flips": {"data": {"augment": {"flip": 1.0}}},
    "image size": {"data": {"image_size": 10}},
    "architecture": {"teacher": {"args": {"act_layer": "gelu"}, "cache": ALL}},
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The name of the cache of PLAIN."""
    return name_of(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("change", STALE.values(), ids=STALE.keys())
def test_another_cache_where_answers_would_be_others(tmp_path, usual, change):
    assert name_of(tmp_path, **change) != usual


SHARED = {
    "seed": {"seed": 7, "data": SHIFTS},
    "share of flips": {"data": {"augment": {"crop_padding": 1, "flip": 0.2}}},
    "subset": {"data": {**SHIFTS, "train_samples": 24}},
    "nothing": {"data": SHIFTS},
    "batch size": {"data": {**SHIFTS, "batch_size": 16}},
    "student": {"student": {"args": {"channels": [4, 4, 4, 8]}}, "data": SHIFTS},
    "loss": {"losses": [{"use": "logit_kl", "temperature": 2}], "data": SHIFTS},
    "epochs": {"train": {"epochs": 5}, "data": SHIFTS},
    "max_gb": {"teacher": {"cache": {**ALL, "max_gb": 1}}, "data": SHIFTS},
}


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A recipe whose teacher does not depend on the seed, and the name of its cache."""
    folder = tmp_path_factory.mktemp("fixed")
    torch.save(wired(folder).teacher.module.state_dict(), folder / "teacher.pt")
    base = merged(PLAIN, {"teacher": {"checkpoint": str(folder / "teacher.pt")}})
    return base, name_of(folder, base, data=SHIFTS)


@pytest.mark.parametrize("change", SHARED.values(), ids=SHARED.keys())
def test_the_same_cache_where_answers_are_the_same(tmp_path, fixed, change):
    base, name = fixed
    assert name_of(tmp_path, base, **change) == name


def test_few_cached_views_depend_on_the_seed(tmp_path, fixed):
    few = {"teacher": {"cache": {"views": 3}}}
    assert name_of(tmp_path, fixed[0], data=SHIFTS, **few) != name_of(tmp_path, fixed[0], data=SHIFTS, seed=1, **few)
    assert name_of(tmp_path, fixed[0], **few) == name_of(tmp_path, fixed[0], seed=1, **few)  # nothing is augmented


def test_images_that_changed_in_place_have_another_cache(tmp_path, usual, monkeypatch):
    """Files may change under a path that stays the same."""
    source = recipe.load(write(tmp_path)).plugins.datasets["synthetic"]
    split = source.split

    def changed(self, part):
        found = split(self, part)
        found.images[5, 0, 0, 0] ^= 1
        return found

    monkeypatch.setattr(source, "split", changed)
    assert name_of(tmp_path) != usual


@pytest.mark.parametrize(("dtype", "factor"), [("fp16", 1.03), ("fp32", 1.001), ("bf16", 1.03)])
def test_a_cache_of_other_weights_is_found_by_the_first_answer(tmp_path, dtype, factor):
    """A hook changes the answers a little, and is no part of the network's code."""
    kept = {"cache": {**ALL, "dtype": dtype}}
    wired(tmp_path, teacher=kept).train(1)

    def scale(teacher):
        teacher.module.register_forward_hook(lambda module, images, logits: logits * factor)

    with pytest.raises(RunError, match="does not hold what teacher says; remove it with `kdkit cache --clear resnet18-"):
        wired(tmp_path, touch=scale, teacher=kept).train(1)


@pytest.mark.parametrize("file", ["column-0.bin", "checks.bin", "states.bin"])
@pytest.mark.parametrize("how", ["flipped", "other", "zeros", "garbage"])
def test_a_damaged_row_of_a_cache_is_asked_for_again(tmp_path, file, how):
    """Whatever is in a file of the right size, training comes to the same."""
    kept = {"cache": {**ALL, "dtype": "fp32"}}
    first = wired(tmp_path, only_mlp(), teacher=kept)
    ours = first.train(1)
    path = first.cache.store.path / file
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 3] ^= 4
    elif how == "other":  # rows that change places
        half = len(content) // 2
        content = content[half:] + content[:half]
    else:
        content = bytearray(len(content)) if how == "zeros" else bytearray(os.urandom(len(content)))
    path.write_bytes(content)
    told = []
    again = wired(tmp_path, only_mlp(), tell=told.append, teacher=kept)
    theirs = again.train(1)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if file != "states.bin":  # a row that is empty, or whole, by mistake
        assert told and all(str(again.cache.store.path) in one and "are damaged" in one for one in told)
    last = wired(tmp_path, only_mlp(), teacher=kept)
    last.train(1)
    assert last.asked.images <= 8, "what was damaged is kept again"


# Shared, and killed


def train_in_a_process(folder, epochs, mark=None):
    torch.set_num_threads(1)
    there = wired(folder, losses=WITH_HINT, data=SHIFTS, teacher={"cache": {"views": 2, "what": "taps", "dtype": "fp32"}})
    if mark:
        mark.set()
    there.train(epochs)


def rows_are_right(folder):
    """Every row of the cache is what the teacher says."""
    there = wired(folder, losses=WITH_HINT, data=SHIFTS, teacher={"cache": {"views": 2, "what": "taps", "dtype": "fp32"}})
    count = 0
    for view in range(2):
        for batch in there.data.train.epoch(0, view=view):
            rows = there.cache.rows(view, batch.index)
            known = there.cache.store.known(rows)
            own = there.cache.kept.pack(there.teacher.forward(batch.inputs))
            for name, value in there.cache.store.read(rows[known]).items():
                assert torch.allclose(value, own[name][known], atol=1e-5)
            count += int(known.sum())
    there.cache.store.close()
    return count


@pytest.mark.slow
def test_two_trainings_share_a_cache(tmp_path):
    both = [forked(train_in_a_process, tmp_path, 4) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(PATIENCE)
    assert [one.exitcode for one in both] == [0, 0]
    assert rows_are_right(tmp_path) == 2 * 48 and len(caches(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.01, 0.05])
def test_a_killed_training_leaves_no_wrong_row_in_the_cache(tmp_path, after):
    mark = PROCESSES.Event()
    one = forked(train_in_a_process, tmp_path, 10_000, mark)
    one.start()
    assert mark.wait(60)
    time.sleep(after)
    os.kill(one.pid, signal.SIGKILL)
    one.join()
    assert rows_are_right(tmp_path) >= 8  # at least the first batch, asked now
    assert wired(tmp_path, losses=WITH_HINT, data=SHIFTS, teacher={"cache": {"views": 2, "what": "taps", "dtype": "fp32"}}).train(2)


# What cannot be kept


REFUSED = {
    "all mixes": ({"train": {"mixup": {"mixup_alpha": 1.0}}}, r"teacher.cache.views: `train.mixup` gives ever new views"),
    "mixes that end": (
        {"train": {"mixup": {"mixup_alpha": 1.0, "off_epoch": 1}}, "teacher": {"cache": {"views": 2}}},
        r"teacher.cache: epochs of kept mixes repeat, and later ones are not mixed \(`train.mixup.off_epoch`\)",
    ),
    "batch statistics": ({"teacher": {"mode": "train", "cache": ALL}}, r"teacher.cache: with `mode: train` an answer depends on"),
    "all of timm's": ({"data": {"timm_augment": {}}}, r"teacher.cache.views: `data.timm_augment` gives ever new views"),
    "layers": ({"losses": WITH_HINT}, r"teacher.cache.what: losses look at stage3, which is not kept; write `what: taps`"),
    "all of top k": ({"teacher": {"cache": {**ALL, "top_k": 6}}}, r"teacher.cache.top_k: 6 of 6 classes; leave it out"),
    "whole logits": (
        {
            "losses": [*PLAIN["losses"], {"use": "rkd_distance", "layers": [{"student": "logits", "teacher": "logits"}]}],
            "teacher": {"cache": {**ALL, "top_k": 2}},
        },
        r"teacher.cache.top_k: 'rkd_distance' compares all logits",
    ),
    "size": (
        {"teacher": {"cache": {"views": 10_000, "max_gb": 0.001}}, "data": SHIFTS},
        r"teacher.cache.max_gb: the cache may take up to 5.76 MB \(10000 views of 48 samples, 12 bytes each\), `max_gb` is 0.001; keep less",
    ),
    "turned images": (
        {"schedule": {"use": "staged", "turned": True, "stages": [{"name": "one", "epochs": 1}]}},
        r"teacher.cache: teacher is shown other samples than those of the batch",
    ),
    "no number": ({"teacher": {"cache": {"views": "some"}}}, r"teacher.cache.views"),
    "misspelt": ({"teacher": {"cache": {"views": 1, "dytpe": "fp16"}}}, r"teacher.cache.dytpe: no such key; did you mean 'dtype'"),
}


@pytest.mark.parametrize("changes, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_cached_is_refused_with_its_place(tmp_path, changes, says):
    path = write(tmp_path, merged(PLAIN, {"teacher": {"cache": ALL}}), **changes)
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: " + says):
        checks.make(recipe.load(path))


def test_cached_teachers_see_the_same_views(tmp_path):
    one = {**PLAIN["teacher"], "cache": {"views": 2}}
    path = write(tmp_path, {**PLAIN, "teacher": None, "teachers": [one, {**one, "cache": {"views": 3}}]}, data=SHIFTS)
    with pytest.raises(RecipeError, match=r"teachers.1.cache.views: all teachers see the same samples"):
        checks.make(recipe.load(path))


def test_a_cache_of_a_random_teacher_is_refused(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.head = torch.nn.Linear(192, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(torch.nn.functional.dropout(x.flatten(1), 0.1))\n"
    )
    base = {**PLAIN, "teacher": {"model": "python/Net", "file": "net.py", "cache": ALL}}
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: teacher.cache: teacher answers the same samples twice in different ways"):
        wired(tmp_path, base)


def test_a_cache_refuses_other_images_than_those_of_a_batch(tmp_path):
    there = wired(tmp_path, teacher={"cache": ALL})
    batch = next(iter(there.data.train.epoch(0)))
    with pytest.raises(RunError, match="teacher is shown other samples than those of the batch"):
        there.teacher(batch.inputs.clone())


@pytest.mark.parametrize(
    "schedule",
    [
        {"use": "offline"},
        {"use": "staged", "stages": [{"name": "one", "epochs": 1}, {"name": "two", "epochs": 1}]},
        {"use": "assistants", "assistants": [{"model": "mlp/16"}]},
    ],
    ids=lambda schedule: schedule["use"],
)
def test_a_cache_serves_schedules_that_show_the_teacher_the_batch(tmp_path, schedule):
    path = write(tmp_path, schedule=schedule, teacher={"cache": ALL})
    assert any("are kept" in note for note in checks.make(recipe.load(path)).notes)


def test_only_cache_options_that_change_numbers_are_in_the_fingerprint(tmp_path):
    def fingerprint(**cache):
        return recipe.load(write(tmp_path, teacher={"cache": {**ALL, **cache}})).fingerprint

    assert fingerprint() == fingerprint(max_gb=3) == fingerprint(dir="elsewhere")
    assert len({fingerprint(), fingerprint(views=2), fingerprint(what="taps"), fingerprint(top_k=2), fingerprint(dtype="fp32")}) == 5


def test_a_cache_lies_where_the_recipe_says(tmp_path):
    there = wired(tmp_path, teacher={"cache": {**ALL, "dir": "elsewhere"}})
    assert there.cache.store.path.parent == tmp_path / "elsewhere"


def test_check_says_how_large_a_cache_may_grow(tmp_path):
    path = write(tmp_path, data=SHIFTS, teacher={"cache": ALL})
    assert "note: the answers of teacher are kept, up to 10.4 kB (18 views of 48 samples, 12 bytes each)" in str(
        checks.make(recipe.load(path))
    )


def test_a_cache_that_would_outgrow_its_bound_is_refused_before_it_is_written(tmp_path, monkeypatch):
    """Files are given whole pages, which `check` cannot know."""
    with pytest.raises(RecipeError, match=r"teacher.cache.max_gb: the cache may take \d+.* kB .*, `max_gb` is 1.1e-05"):
        wired(tmp_path, data=SHIFTS, teacher={"cache": {**ALL, "max_gb": 1.1e-5}})


def test_several_teachers_have_a_cache_each(tmp_path):
    teachers = [{**PLAIN["teacher"], "cache": {"views": 2}}, {"model": "mlp/16", "cache": {"views": 2}}, {"model": "mlp/8"}]
    loaded = recipe.load(write(tmp_path, {**PLAIN, "teacher": None, "teachers": teachers}, data=SHIFTS, run={"folder": str(tmp_path)}))
    checks.make(loaded)
    accelerator = build_accelerator(loaded.spec.train)
    opened = opening.open_data(loaded, accelerator)
    teachers = ModelFactory(loaded, opened.info, {}, device=accelerator.device).teachers()
    for _ in range(2):
        with answering(loaded, teachers, opened) as kept:
            for batch, expected in zip(kept.train.epoch(5), opened.train.epoch(5, view=1), strict=True):
                assert torch.equal(batch.inputs, expected.inputs)
                for teacher in teachers.values():
                    assert torch.allclose(teacher(batch.inputs).logits, teacher.forward(expected.inputs).logits, atol=1e-2)
        assert all(teacher.answers is None for teacher in teachers.values())
    assert sorted(found.filled for found in stores(tmp_path / "teacher-cache")) == [48, 48]
    assert len(clear(tmp_path / "teacher-cache")) == 2  # nobody uses them any more


# Filled ahead


@pytest.mark.parametrize(
    "data, options, count",
    [
        (SHIFTS, ALL, 18),
        ({"augment": {"crop_padding": 1}, "drop_last": True, "batch_size": 20}, ALL, 9),
        (SHIFTS, {"views": 2, "what": "taps"}, 2),
        ({"timm_augment": {}, "workers": 0, "batch_size": 20}, {"views": 3}, 3),
    ],
)
def test_a_cache_that_is_filled_ahead_answers_everything(tmp_path, data, options, count):
    losses = WITH_HINT if "what" in options else PLAIN["losses"]
    said = {"losses": losses, "data": data, "teacher": {"cache": {**options, "dtype": "fp32"}}, "run": {"folder": str(tmp_path / "runs")}}
    alone = wired(tmp_path, losses=losses, data={**data, "augment": None} if "timm_augment" in data else data)
    (found,) = fill(recipe.load(write(tmp_path, **said)), quiet=True)
    assert found.filled == found.about["count"] == 48 * count
    there = wired(tmp_path, **said)
    assert there.cache.store.path == found.path
    for epoch in (0, 1, 4):
        for batch in there.data.train.epoch(epoch):
            assert torch.allclose(there.teacher(batch.inputs).logits, alone.teacher(batch.inputs).logits, atol=1e-5)
    assert there.asked.images <= 20  # one batch, to compare


def test_a_cached_teacher_of_another_recipe_is_trained_first(tmp_path):
    losses = [{"use": "cross_entropy"}]
    write(tmp_path, {**PLAIN, "teacher": None}, name="other.yaml", schedule={"use": "supervised"}, losses=losses, train={"epochs": 1})
    base = {**PLAIN, "teacher": {"recipe": "other.yaml", "cache": ALL}, "run": {"folder": str(tmp_path / "runs")}}
    (found,) = fill(recipe.load(write(tmp_path, {**base, "name": "taught"})), quiet=True)
    assert found.filled == 48 and found.path.name.startswith("other-") and (tmp_path / "runs" / "plain" / "result.json").exists()


def test_filling_a_cache_resumes(tmp_path, monkeypatch):
    said = {"data": SHIFTS, "teacher": {"cache": ALL}, "run": {"folder": str(tmp_path / "runs")}}
    loaded, writes = recipe.load(write(tmp_path, **said)), []
    whole = answer_store.AnswerStore.write

    def stops(self, rows, values):
        if len(writes) == 30:
            raise KeyboardInterrupt
        writes.append(len(rows))
        whole(self, rows, values)

    monkeypatch.setattr(answer_store.AnswerStore, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        fill(loaded, quiet=True)
    (left,) = caches(tmp_path)
    assert left.filled == 30 * 8
    monkeypatch.setattr(
        answer_store.AnswerStore, "write", lambda self, rows, values: (writes.append(len(rows)), whole(self, rows, values))[1]
    )
    (found,) = fill(loaded, quiet=True)
    assert found.filled == 18 * 48 and sum(writes) == 18 * 48


def content(path):
    """The bytes of a cache's files, without its description."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix == ".bin"}


@pytest.mark.parametrize(
    "data, options", [(SHIFTS, ALL), ({"timm_augment": {}, "workers": 0, "batch_size": 20}, {"views": 3})], ids=["outcomes", "views"]
)
def test_a_cache_filled_in_parts_has_the_bytes_of_one_filled_at_once(tmp_path, monkeypatch, data, options):
    """Also after a stop, and with a damaged row in a part; what the cache has is not asked for again."""
    cache = {"cache": {**options, "dir": "there"}}
    loaded = recipe.load(write(tmp_path, data=data, teacher=cache, run={"folder": str(tmp_path / "runs")}))
    (whole,) = fill(loaded, quiet=True)
    expected = content(whole.path)
    (tmp_path / "there").rename(tmp_path / "at once")
    written, answers = answer_store.AnswerStore.write, []

    def stops(self, rows, values):
        answers.append(len(rows))
        written(self, rows, values)
        if len(answers) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answer_store.AnswerStore, "write", stops)
        fill(loaded, quiet=True, spread=True)
    (part,) = parts_of(whole.path).glob("*/resnet18-*")
    assert look(part).filled == sum(answers)
    column = part / "column-0.bin"
    column.write_bytes(bytes(byte ^ 1 for byte in column.read_bytes()))
    (found,) = fill(loaded, quiet=True, spread=True)
    assert content(found.path) == expected
    assert [path.name for path in (tmp_path / "there").iterdir()] == [whole.path.name]
    monkeypatch.setattr(answer_store.AnswerStore, "write", stops)
    fill(loaded, quiet=True, spread=True)
    assert len(answers) == 3


def test_a_cache_that_becomes_full_while_a_part_is_filled_loses_nothing(tmp_path, monkeypatch):
    """As by a training beside, after which another process removes the parts."""
    cache = {"cache": {"views": 1, "dir": "there"}}
    loaded = recipe.load(write(tmp_path, teacher=cache, run={"folder": str(tmp_path / "runs")}))
    written = answer_store.AnswerStore.write

    def beside(self, rows, values):
        written(self, rows, values)
        monkeypatch.undo()
        fill(loaded, quiet=True)
        fill(loaded, quiet=True, spread=True)
        assert not parts_of(tmp_path / "there" / self.path.name).exists()

    monkeypatch.setattr(answer_store.AnswerStore, "write", beside)
    (found,) = fill(loaded, quiet=True, spread=True)
    assert found.filled == 48 and [path.name for path in (tmp_path / "there").iterdir()] == [found.path.name]


@pytest.mark.slow
def test_processes_share_the_filling_of_a_cache_and_one_that_is_killed_is_replaced(tmp_path):
    data = {**SHIFTS, "dataset": {"train": 480}}
    base = {"data": data, "teacher": {"cache": {**ALL, "dir": "there"}}}
    (whole,) = fill(recipe.load(write(tmp_path, **base)), quiet=True)
    (tmp_path / "there").rename(tmp_path / "at once")
    parts = parts_of(whole.path)
    killed, other = (Command(tmp_path, "cache", "recipe.yaml", "--spread") for _ in range(2))
    assert killed.wait_for(lambda: len([*parts.glob("*/done")]) > 3)
    killed.send(signal.SIGKILL)
    third = Command(tmp_path, "cache", "recipe.yaml", "--spread")
    for process in (other, third):
        code, said = process.finish()
        assert code == 0 and "8,640 answers" in said, said
    assert content(whole.path) == content(tmp_path / "at once" / whole.path.name)
    assert not parts.exists()


def test_the_cache_command_fills_lists_and_removes(tmp_path):
    write(tmp_path, data=SHIFTS, teacher={"cache": ALL})
    code, said = Command(tmp_path, "cache", "recipe.yaml").finish()
    assert code == 0 and "runs/teacher-cache/resnet18-" in said and "864 answers" in said
    code, said = Command(tmp_path, "cache", "--list").finish()
    assert code == 0 and "48 x 18" in said and "100.0 %" in said and "seconds ago" in said
    name = next((tmp_path / "runs" / "teacher-cache").iterdir()).name
    code, said = Command(tmp_path, "cache", "--clear", name).finish()
    assert code == 0 and said.startswith("removed runs/teacher-cache/resnet18-")
    assert not any((tmp_path / "runs" / "teacher-cache").iterdir())


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["cache"], "name a recipe whose teacher caches are to be filled"),
        (["cache", "recipe.yaml"], r"recipe.yaml:\d+: teacher: has no `cache:`"),
        (["cache", "--clear", "nothing"], "no cache in runs/teacher-cache is called 'nothing'"),
    ],
)
def test_the_cache_command_says_in_a_line_what_is_wrong(tmp_path, arguments, says):
    write(tmp_path)
    code, said = Command(tmp_path, *arguments).finish()
    assert code == 2 and len(said.splitlines()) == 1
    assert re.search(says, said)
