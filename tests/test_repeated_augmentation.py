"""Repeated augmentation: each image of an epoch several times side by side, in views of its own."""

import pytest
import torch
from test_data import CROPS, KINDS, POLICY, Held, data, every_kind, same
from training import PLAIN, Command, together, weights, write

from kdkit import recipe
from kdkit.data import augment
from kdkit.data.augment import draw_crop_flip, permutation
from kdkit.data.indexed import MOST_VIEWS
from kdkit.engine.trainer import MOST_EPOCHS
from kdkit.errors import DataError, RecipeError
from kdkit.recipe.data_section import DataSpec
from kdkit.runs import checks


def sorted_rows(batches):
    """The samples of some batches, in an order of their own."""
    return sorted((int(i), x.tolist()) for batch in batches for i, x in zip(batch.index, batch.inputs, strict=True))


@pytest.mark.parametrize(("count", "repeats"), [(256, 3), (512, 2), (300, 3), (513, 4)])
def test_repeats_come_in_the_order_of_timms_sampler(count, repeats):
    """The same permutation given, and as far as an epoch of timm's goes, which has whole multiples of 256 images."""
    from timm.data.distributed_sampler import RepeatAugSampler

    sampler = RepeatAugSampler(range(count), num_replicas=1, rank=0, shuffle=False, num_repeats=repeats)
    order = permutation(1, 0, count)
    source = type("Many", (Held,), {"__doc__": "Many.", "train": count})
    loaded = data(source, augment=CROPS, repeats=repeats, drop_last=False)
    seen = torch.cat([batch.index for batch in loaded.train.epoch(0)]).tolist()
    assert len(seen) == count and seen == [int(order[p // repeats]) for p in range(count)]
    expected = [int(order[i]) for i in sampler]
    assert seen[: len(expected)] == expected and len(expected) == count // 256 * 256


@pytest.mark.parametrize("world", [2, 4])
def test_repeats_of_each_process_are_those_of_timms_sampler(world):
    from timm.data.distributed_sampler import RepeatAugSampler

    source = type("Many", (Held,), {"__doc__": "Many.", "train": 256 * world})
    order = permutation(1, 0, 256 * world)
    for rank in range(world):
        sampler = RepeatAugSampler(range(256 * world), num_replicas=world, rank=rank, shuffle=False, num_repeats=3)
        loaded = data(source, augment=CROPS, repeats=3, rank=rank, world=world)
        assert torch.cat([batch.index for batch in loaded.train.epoch(0)]).tolist() == [int(order[i]) for i in sampler]


@every_kind
def test_repeated_copies_of_an_image_differ_and_come_again(kind):
    source, settings = KINDS[kind]
    loaded = data(source, repeats=4, **settings)
    batches = list(loaded.train.epoch(2))
    assert len(batches) == len(loaded.train) == 5
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index.view(10, 4), index[::4, None].expand(10, 4)) and len(index.unique()) == 10
    copies = torch.cat([batch.inputs for batch in batches]).flatten(1).view(10, 4, -1)
    distinct = sum(len(one.unique(dim=0)) for one in copies)
    assert distinct > 30  # crops and flips of one image may agree by chance
    assert same(batches, data(source, repeats=4, **settings).train.epoch(2))
    assert not same(batches, loaded.train.epoch(3))


@every_kind
def test_first_copies_are_the_pictures_without_repeats(kind):
    source, settings = KINDS[kind]
    plain = {int(i): x for batch in data(source, **settings).train.epoch(1) for i, x in zip(batch.index, batch.inputs, strict=True)}
    for batch in data(source, repeats=2, **settings).train.epoch(1):
        for i, x in zip(batch.index[::2].tolist(), batch.inputs[::2], strict=True):
            assert torch.equal(plain[i], x)


@every_kind
@pytest.mark.parametrize(("world", "sizes"), [(2, {}), (4, {}), (2, {"batch_size": 12, "drop_last": False})])
def test_processes_share_the_repeated_images_of_one(kind, world, sizes):
    source, settings = KINDS[kind]
    settings = {**settings, "repeats": 3, **sizes}
    ranks = [list(data(source, rank=rank, world=world, **settings).train.epoch(1)) for rank in range(world)]
    for whole, *parts in zip(data(source, **settings).train.epoch(1), *ranks, strict=True):
        assert sorted_rows([whole]) == sorted_rows(parts)
        assert {len(part.labels) for part in parts} == {len(whole.labels) // world}


@every_kind
def test_start_of_a_repeated_epoch_skips_without_changing_what_follows(kind):
    source, settings = KINDS[kind]
    train = data(source, repeats=3, **settings).train
    whole = list(train.epoch(2))
    for start in (0, 2, 5):
        assert same(train.epoch(2, start=start), whole[start:])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_no_repeats():
    source, settings = KINDS["read, timm"]
    assert same(*(data(source, repeats=3, **settings, workers=workers).train.epoch(1) for workers in (0, 2)))


def test_views_of_repeated_copies_are_no_other_views():
    """A stage's further views are numbered by epochs and multiples of MOST_EPOCHS; the copies of each by multiples of MOST_VIEWS."""
    assert MOST_VIEWS == MOST_EPOCHS**2
    index = torch.arange(8)
    views = [epoch + view * MOST_EPOCHS + copy * MOST_VIEWS for epoch in (0, 1) for view in (0, 1) for copy in (0, 1, 2)]
    drawn = {tuple(augment.uniform(3, view, index, 1).flatten().tolist()) for view in views}
    assert len(drawn) == len(views)
    each = torch.tensor(views[:8])
    assert augment.uniform(3, each, index, 2).tolist() == [
        augment.uniform(3, int(v), index[i : i + 1], 2)[0].tolist() for i, v in enumerate(each)
    ]
    assert torch.equal(draw_crop_flip(3, torch.full((8,), 5), index, 2, 0.5), draw_crop_flip(3, 5, index, 2, 0.5))


def test_without_repeats_a_recipe_is_what_it_was(tmp_path):
    plain = recipe.load(write(tmp_path))
    assert "repeats" not in plain.content()["data"]
    one = recipe.load(write(tmp_path, data={"repeats": 1}))
    two = recipe.load(write(tmp_path, data={"repeats": 2, "augment": {"flip": 0.5}}))
    assert one.fingerprint == plain.fingerprint and two.content()["data"]["repeats"] == 2


@pytest.mark.slow
def test_two_processes_learn_from_repeats_what_one_learns(tmp_path):
    repeated = {"repeats": 3, "augment": {"crop_padding": 1, "flip": 0.5}, "drop_last": False}
    path = write(tmp_path, {**PLAIN, "student": {"model": "mlp/8"}, "teacher": {"model": "mlp/8"}}, data=repeated)
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    assert [command.finish()[0] for command in commands] == [0, 0, 0], commands[0].log.read_text()
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


REFUSED = [
    (
        {"schedule": {"use": "cs_kd"}, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}], "teacher": None},
        "stage '.*' chooses which",
    ),
    ({"teacher": {"cache": {"views": 2}}}, r"data.repeats`\) come in ever new views"),
    ({"teacher": {"cache": {"views": 2}}, "data": {"repeats": 1, "sampling": "balanced"}}, r"data.sampling`\) come in ever new views"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=["arranged", "cached", "cached, balanced"])
def test_repeats_with_options_that_exclude_them_are_one_line(tmp_path, changes, says):
    path = write(tmp_path, **{**changes, "data": {"repeats": 2, "augment": {"flip": 0.5}} | changes.get("data", {})})
    with pytest.raises(RecipeError, match=says) as raised:
        checks.make(recipe.load(path))
    assert "\n" not in str(raised.value)


def test_repeats_need_augmentation():
    with pytest.raises(ValueError, match="repeats needs augment, timm_augment or joint_augment"):
        DataSpec(dataset={"use": "held"}, repeats=2)
    assert DataSpec(dataset={"use": "held"}, repeats=2, timm_augment=POLICY).repeats == 2


def test_an_arranged_epoch_has_no_repeats():
    with pytest.raises(DataError, match="data.repeats: the schedule chooses"):
        data(augment=CROPS, repeats=2).train.epoch(0, arrange=lambda order, *_: order)
