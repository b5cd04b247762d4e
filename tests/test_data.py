"""Order, pixels and shares of the batches: the same whatever the workers, the processes and the place of a restart."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training import task

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory
from kdkit.data.augment import crop_flip, draw_crop_flip
from kdkit.data.loaders import Data, prepare
from kdkit.data.subsets import choose, stratified_order
from kdkit.errors import DataError
from kdkit.recipe.data_section import BatchAugment, DataSpec, TimmAugment

CPU = torch.device("cpu")
SIZE, CLASSES = 12, 4


def random_images(count: int, channels: int = 3, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


class Held(DatasetSource):
    """Random images in memory."""

    name: ClassVar[str] = "held"
    train, test, channels = 40, 10, 3

    def info(self):
        return DataInfo((self.channels, SIZE, SIZE), CLASSES, self.train, self.test)

    def split(self, part):
        count = getattr(self, part)
        return InMemory(random_images(count, self.channels, seed=len(part)), torch.arange(count) % CLASSES)


class Files:
    """The images of `Held`, one by one; those in `broken` cannot be read, those in `tall` are higher."""

    def __init__(self, held: InMemory, broken: Any = (), tall: Any = (), mode: str = "RGB") -> None:
        self.images, self.labels = held.images.permute(0, 2, 3, 1).numpy(), held.labels.tolist()
        self.broken, self.tall, self.mode = broken, tall, mode

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.broken:
            raise self.broken[index]
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return image.resize((SIZE, SIZE + 5)) if index in self.tall else image, self.labels[index]


class Read(Held):
    """The same as files."""

    change: ClassVar[dict[str, Any]] = {}

    def split(self, part):
        return Files(super().split(part), **(self.change if part == "train" else {}))


def spec(**settings: Any) -> DataSpec:
    return DataSpec(**{"dataset": {"use": "held"}, "batch_size": 8, "eval_batch_size": 4, "workers": 0} | settings)


def data(source: type[DatasetSource] = Held, seed: int = 1, rank: int = 0, world: int = 1, **settings: Any) -> Data:
    return prepare(spec(**settings), source(source.Options()), task(), seed=seed, device=CPU, rank=rank, world=world)


def with_files(**change: Any) -> type[DatasetSource]:
    return type("Changed", (Read,), {"__doc__": "Changed.", "change": change})


def same(left: Any, right: Any) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)
        for a, b in zip(left, right, strict=True)
    )


CROPS = BatchAugment(crop_padding=2, flip=0.5)
POLICY = TimmAugment(auto_augment="rand-m9-n2-mstd0.5", color_jitter=0.4, random_erasing=0.5, vertical_flip=0.2)
KINDS: dict[str, tuple[type[DatasetSource], dict[str, Any]]] = {
    "held, batched": (Held, {"augment": CROPS}),
    "held, timm": (Held, {"timm_augment": POLICY}),
    "read, batched": (Read, {"augment": CROPS}),
    "read, timm": (Read, {"timm_augment": POLICY, "image_size": 10}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_batches_hold_the_named_samples_in_the_unit_interval(kind):
    source, settings = KINDS[kind]
    loaded = data(source, **settings)
    side = settings.get("image_size", SIZE)
    labels, seen = torch.arange(40) % CLASSES, []
    assert loaded.info.image_shape == (3, side, side)
    for batch in loaded.train.epoch(0):
        assert batch.inputs.shape == (8, 3, side, side) and batch.inputs.dtype == torch.float32
        assert float(batch.inputs.min()) >= 0 and 0.5 < float(batch.inputs.max()) <= 1
        assert torch.equal(batch.labels, labels[batch.index])
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)
    assert len(loaded.train) == 5 and loaded.train.num_samples == 40 and loaded.train.indexed


@every_kind
def test_epochs_come_again_and_differ(kind):
    source, settings = KINDS[kind]
    one, again = data(source, **settings), data(source, **settings)
    assert same(one.train.epoch(3), again.train.epoch(3))
    first, second = list(one.train.epoch(0)), list(one.train.epoch(1))
    assert not same(first, second) and not same(first, data(source, seed=2, **settings).train.epoch(0))
    by_index = [dict(zip(torch.cat([b.index for b in e]).tolist(), torch.cat([b.inputs for b in e]), strict=True)) for e in (first, second)]
    assert sum(not torch.equal(by_index[0][i], by_index[1][i]) for i in range(40)) > 25  # another view, not only another order


@every_kind
def test_start_of_a_loader_skips_without_changing_what_follows(kind):
    source, settings = KINDS[kind]
    train = data(source, **settings).train
    whole = list(train.epoch(2))
    for start in (0, 2, 5):
        assert same(train.epoch(2, start=start), whole[start:])


def test_start_of_a_loader_does_not_load_what_it_skips():
    loaded = data(with_files(broken={i: OSError("gone") for i in range(40)}))
    assert list(loaded.train.epoch(0, start=5)) == []
    order = torch.cat([batch.index for batch in data(Held).train.epoch(0)])
    skipped = with_files(broken={int(i): OSError("gone") for i in order[:16]})
    assert len(list(data(skipped).train.epoch(0, start=2))) == 3


@every_kind
@pytest.mark.parametrize("world", [2, 4])
def test_slices_of_the_ranks_make_the_whole_batch(kind, world):
    source, settings = KINDS[kind]
    ranks = [data(source, rank=rank, world=world, **settings).train.epoch(1) for rank in range(world)]
    for whole, *parts in zip(data(source, **settings).train.epoch(1), *ranks, strict=True):
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        assert {len(part.labels) for part in parts} == {8 // world}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["held, timm", "read, batched", "read, timm"])
def test_workers_of_a_loader_change_nothing(kind):
    source, settings = KINDS[kind]
    alone, one, four = (data(source, **settings | {"workers": workers}) for workers in (0, 1, 4))
    for number in (0, 1):  # the second epoch has the same worker processes
        batches = list(alone.train.epoch(number))
        assert same(one.train.epoch(number), batches) and same(four.train.epoch(number), batches)
    assert same(four.train.epoch(1, start=3), batches[3:])
    assert same(four.test, alone.test)


def test_two_epochs_of_a_loader_may_be_read_at_once():
    train = data(Read, workers=1, augment=CROPS).train
    expected = [list(train.epoch(0)), list(train.epoch(1))]
    left, right = zip(*zip(train.epoch(0), train.epoch(1), strict=True), strict=True)
    assert same(left, expected[0]) and same(right, expected[1])


def test_an_epoch_left_early_does_not_spoil_the_next():
    train = data(Read, workers=1, augment=CROPS).train
    expected = list(train.epoch(1))
    left = train.epoch(0)
    next(left)
    del left
    assert same(train.epoch(1), expected)


@every_kind
def test_global_random_states_are_left_alone(kind):
    source, settings = KINDS[kind]

    def state() -> list[Any]:
        name, keys, *rest = np.random.get_state()
        return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]

    loaded = data(source, **settings)
    before = state()
    list(loaded.train.epoch(0))
    list(loaded.test)
    assert state() == before


@pytest.mark.parametrize("kind", ["held, timm", "read, timm"])
def test_the_global_random_states_change_nothing(kind):
    source, settings = KINDS[kind]
    train = data(source, **settings).train
    expected = list(train.epoch(0))
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert same(train.epoch(0), expected)


def test_held_and_read_images_get_the_same_crops():
    assert same(data(Held, augment=CROPS).train.epoch(0), data(Read, augment=CROPS).train.epoch(0))


def test_crops_are_those_that_the_seed_names():
    """The cache counts on it: (seed, view, index) tells which of the finitely many pictures a batch shows."""
    images = Held(Held.Options()).split("train").images
    for batch in data(augment=CROPS, seed=5).train.epoch(3, view=1):
        outcome = draw_crop_flip(5, 1, batch.index, 2, 0.5)
        assert torch.equal(batch.inputs, crop_flip(images[batch.index], outcome, 2).float() / 255)


@every_kind
def test_few_views_repeat_the_pictures_in_another_order(kind):
    source, settings = KINDS[kind]
    train = data(source, **settings).train
    pictures = []
    for number in (0, 7):
        batches = list(train.epoch(number, view=0))
        order = torch.cat([batch.index for batch in batches]).argsort()
        pictures.append((order, torch.cat([batch.inputs for batch in batches])[order]))
    assert torch.equal(pictures[0][1], pictures[1][1]) and not torch.equal(pictures[0][0], pictures[1][0])


@pytest.mark.parametrize("source", [Held, Read])
def test_measuring_goes_through_all_images_in_order(source):
    test = data(source, augment=CROPS).test
    batches = list(test)
    assert [len(batch.labels) for batch in batches] == [4, 4, 2] and len(test) == 3 and test.num_samples == 10
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(10))
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), random_images(10, seed=4).float() / 255)


def test_measuring_is_shared_out_to_the_ranks():
    ranks = [data(rank=rank, world=4).test for rank in range(4)]
    indices = [torch.cat([batch.index for batch in test]).tolist() for test in ranks]
    assert indices[1] == [1, 5, 9] and sorted(sum(indices, [])) == list(range(10))
    assert {test.num_samples for test in ranks} == {10}


@pytest.mark.parametrize(("world", "sizes"), [(1, [7, 7, 7, 7, 7, 5]), (7, [1, 1, 1, 1, 1])])
def test_keeping_the_last_batch(world, sizes):
    train = data(batch_size=7, drop_last=False, world=world).train
    assert [len(batch.labels) for batch in train.epoch(0)] == sizes and len(train) == len(sizes)
    assert len(data(batch_size=7).train) == 5
    assert len(list(data(batch_size=8, drop_last=False, train_samples=20, world=4, rank=3).train.epoch(0))[-1].labels) == 1


def test_index_is_the_place_in_the_whole_part():
    train = data(Held, train_samples=16, validation=8).train
    images = Held(Held.Options()).split("train").images
    for batch in train.epoch(0):
        assert torch.equal(batch.inputs, images[batch.index].float() / 255)
    assert torch.equal(train.labels, train.indices % CLASSES) and len(train.labels) == train.num_samples == 16


@pytest.mark.parametrize("source", [Held, Read])
def test_validation_is_apart_from_training_and_not_augmented(source):
    loaded = data(source, validation=0.2, augment=CROPS)
    assert loaded.validation is not None and loaded.validation.num_samples == 8
    aside = list(loaded.validation)
    index = torch.cat([batch.index for batch in aside])
    assert not set(index.tolist()) & set(loaded.train.indices.tolist()) and loaded.train.num_samples == 32
    assert torch.equal(torch.cat([batch.inputs for batch in aside]), random_images(40, seed=5)[index].float() / 255)
    assert index.remainder(CLASSES).bincount().tolist() == [2, 2, 2, 2]
    assert data(source).validation is None


labels_of = st.lists(st.integers(0, 5), min_size=2, max_size=120).map(torch.tensor)


@given(labels_of, st.integers(0, 100), st.data())
@settings(max_examples=100, deadline=None)
def test_subsets_are_nested_and_keep_class_shares(labels, seed, drawn):
    order = stratified_order(labels, seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    count = drawn.draw(st.integers(1, len(labels)))
    sizes, got = labels.bincount(minlength=6), labels[order[:count]].bincount(minlength=6)
    classes = int((sizes > 0).sum())
    assert int((got > 0).sum()) == min(count, classes)  # one of each before a second of any
    assert float((got - sizes * count / len(labels)).abs().max()) <= 1 + classes / 2


def test_subsets_of_equal_classes_are_equal():
    labels = torch.arange(1000) % 10
    assert labels[stratified_order(labels, 0)[:400]].bincount().tolist() == [40] * 10


@given(labels_of, st.integers(0, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_choice_is_disjoint_nested_and_by_seed(labels, seed, drawn):
    total = len(labels)
    validation = drawn.draw(st.none() | st.integers(1, total - 1))
    rest = total - (validation or 0)
    large = drawn.draw(st.integers(1, rest))
    small = drawn.draw(st.integers(1, large))
    picks = [choose(spec(train_samples=n, validation=validation, seed=seed), labels) for n in (small, large)]
    (few, aside), (many, aside_too) = picks
    assert torch.equal(aside, aside_too) and len(aside) == (validation or 0)
    assert set(few.tolist()) <= set(many.tolist()) and len(few) == small and len(many) == large
    assert not set(many.tolist()) & set(aside.tolist())


def test_choice_depends_on_the_data_seed_alone():
    def chosen(seed: int, data_seed: int) -> list[int]:
        return prepare(spec(train_fraction=0.5, seed=data_seed), Held(Held.Options()), task(), seed=seed, device=CPU).train.indices.tolist()

    assert len(chosen(1, 0)) == 20
    assert chosen(1, 0) == chosen(2, 0) != chosen(1, 3)


PROBLEMS: list[tuple[Callable[[], Any], str]] = [
    (lambda: data(batch_size=41), r"data.batch_size: 41 is more than the 40 training images"),
    (lambda: data(batch_size=20, train_samples=10), r"data.batch_size: 20 is more than the 10 training images"),
    (lambda: data(world=3), r"data.batch_size: 8 images cannot be shared equally by 3"),
    (lambda: data(train_samples=50), r"data.train_samples: 50 asked for, .* 40 images"),
    (lambda: data(train_samples=39, validation=2), r"39 asked for, .* 38 images beside 2 for validation"),
    (lambda: data(validation=40), r"data.validation: 40 images asked for, but .* has 40"),
    (lambda: data(validation=1.5), r"data.validation: 1.5 is neither"),
    (lambda: data(timm_augment=TimmAugment(auto_augment="nonsense")), r"data.timm_augment: timm does not accept 'nonsense'"),
]


@pytest.mark.parametrize(("call", "says"), PROBLEMS)
def test_impossible_data_options_are_one_line(call, says):
    with pytest.raises(DataError, match=says) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_labels_outside_the_classes_and_wrong_shapes_are_refused():
    class Wrong(Held):
        """Five classes where four are said."""

        def split(self, part):
            return InMemory(random_images(40), torch.arange(40) % 5)

    class Larger(Held):
        """Larger images than said."""

        def split(self, part):
            return InMemory(random_images(40, size=14), torch.arange(40) % 4)

    with pytest.raises(DataError, match="labels go from 0 to 4, but there are 4 classes"):
        data(Wrong)
    with pytest.raises(DataError, match="says that its images are 3 x 12 x 12, but they are 3 x 14 x 14"):
        data(Larger)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("broken", "says"),
    [(DataError("some/file.png: cut short"), "^some/file.png: cut short$"), (OSError("no"), "^image 5 cannot be read: OSError: no$")],
)
def test_a_broken_image_names_itself_in_one_line(workers, broken, says):
    with pytest.raises(DataError, match=says):
        list(data(with_files(broken={5: broken}), workers=workers).train.epoch(0))


def test_images_of_many_sizes_need_a_size():
    class Unknown(with_files(tall=[3])):
        """Sizes are not known beforehand."""

        def info(self):
            return DataInfo((3, 0, 0), CLASSES, 40, 10)

    with pytest.raises(DataError, match=r"data.image_size: dataset 'held' has images of many sizes"):
        data(Unknown)
    with pytest.raises(DataError, match=r"^image 3: an image is 17 x 12, others 12 x 12: set data.image_size$"):
        list(data(with_files(tall=[3])).train.epoch(0))
    assert {batch.inputs.shape for batch in data(Unknown, image_size=9).train.epoch(0)} == {(8, 3, 9, 9)}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_colour_modes_become_rgb(mode):
    batch = next(data(with_files(mode=mode)).train.epoch(0))
    expected = np.stack([np.asarray(Files(Held(Held.Options()).split("train"), mode=mode)[i][0].convert("RGB")) for i in batch.index])
    assert torch.equal(batch.inputs, torch.tensor(expected).permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("settings", [{}, {"timm_augment": POLICY}, {"timm_augment": POLICY, "image_size": 20}])
def test_grey_images_stay_grey(settings):
    class Grey(Held):
        """One channel."""

        channels = 1

    side = settings.get("image_size", SIZE)
    assert next(data(Grey, **settings).train.epoch(0)).inputs.shape == (8, 1, side, side)


def test_images_in_memory_are_resized_like_pil_does():
    test = data(image_size=7).test
    found = torch.cat([batch.inputs for batch in test])
    for pixels, image in zip(found, random_images(10, seed=4), strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((7, 7), Image.Resampling.BILINEAR)
        assert float((pixels.permute(1, 2, 0) * 255 - torch.tensor(np.asarray(expected))).abs().max()) <= 1


def test_central_crop_when_measuring_only():
    whole, cropped = (data(Read, image_size=8, crop_pct=pct) for pct in (1.0, 0.5))
    assert same(whole.train.epoch(0), cropped.train.epoch(0)) and not same(whole.test, cropped.test)
    first = Image.fromarray(random_images(10, seed=4)[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(next(iter(cropped.test)).inputs[0].mul(255).round(), torch.tensor(np.asarray(first)[4:12, 4:12]).permute(2, 0, 1))


def test_timm_without_effects_gives_the_image_back():
    """A crop of the whole image at its own size: normalising and undoing it costs no bit."""
    none = TimmAugment(scale=(1, 1), ratio=(1, 1), flip=0, interpolation="bilinear", random_erasing=1e-9)
    assert same(data(timm_augment=none).train.epoch(0), data().train.epoch(0))


def test_erased_rectangles_hold_noise_inside_the_unit_interval():
    erase = TimmAugment(scale=(1, 1), ratio=(1, 1), flip=0, interpolation="bilinear", random_erasing=1.0)
    shares = []
    for batch in data(timm_augment=erase).train.epoch(0):
        plain = Held(Held.Options()).split("train").images[batch.index].float() / 255
        shares += (batch.inputs != plain).any(1).float().mean((1, 2)).tolist()
    assert all(0 < share < 0.5 for share in shares) and len(set(shares)) > 10


def test_importing_the_loaders_does_not_load_what_only_some_need():
    code = "import sys, kdkit.data.loaders; print(*[m for m in ('timm', 'torchvision', 'PIL', 'sklearn') if m in sys.modules])"
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip() == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["held, batched", "read, batched"])
def test_batches_on_a_cuda_device_are_the_same(kind):
    source, settings = KINDS[kind]
    there = prepare(spec(**settings), source(source.Options()), task(), seed=1, device=torch.device("cuda"))
    for mine, other in zip(data(source, **settings).train.epoch(0), there.train.epoch(0), strict=True):
        assert other.inputs.device.type == "cuda" and torch.equal(mine.inputs, other.inputs.cpu())
