"""Streams: read from start to end, by one process, or by several where the stream can be shared."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CPU, CROPS, spec
from training import task

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, SharedStream, Stream
from kdkit.data.loaders import prepare
from kdkit.errors import DataError


class Counting:
    """Images of one shade each, 0 to 23, in an order that the seed gives; each `world`-th from `rank` on."""

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world

    def __len__(self):
        return 24

    def read(self, seed, workers, batch_size):
        order = range(24) if seed is None else np.random.default_rng(seed).permutation(24).tolist()
        for shade in list(order)[self.rank :: self.world]:
            yield Image.fromarray(np.full((4, 4, 3), shade, dtype=np.uint8)), shade % 4


class Dealt(Counting):
    """The same, for several processes."""

    def share(self, rank, world):
        return Dealt(rank, world)


class Source(DatasetSource):
    """A dataset that is a stream."""

    name = "streamed"
    stream = Dealt

    def info(self):
        return DataInfo((3, 4, 4), 4, 24, 24)

    def split(self, part):
        return self.stream()


class Alone(Source):
    """One that cannot be shared."""

    stream = Counting


def load(source=Source, rank=0, world=1, **settings):
    return prepare(spec(batch_size=6, **settings), source(source.Options()), task(), seed=1, device=CPU, rank=rank, world=world)


def shades(batches):
    return [int(shade) for batch in batches for shade in (batch.inputs[:, 0, 0, 0] * 255).round()]


def test_a_stream_that_can_be_shared_says_how():
    assert isinstance(Dealt(), SharedStream) and isinstance(Counting(), Stream) and not isinstance(Counting(), SharedStream)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_train_on_parts_of_a_streams_epoch(world):
    epochs = [list(load(rank=rank, world=world).train.epoch(2)) for rank in range(world)]
    assert [len(epoch) for epoch in epochs] == [4] * world
    assert sorted(shade for epoch in epochs for shade in shades(epoch)) == list(range(24))
    assert len(torch.cat([batch.index for epoch in epochs for batch in epoch]).unique()) == 24


def test_processes_measure_each_image_of_a_stream_once():
    ranks = [load(rank=rank, world=2) for rank in range(2)]
    assert sorted(shade for loaded in ranks for shade in shades(loaded.test)) == list(range(24))
    assert shades(ranks[1].test.whole()) == list(range(24))
    assert sum(len(loaded.test) for loaded in ranks) == 6


def test_start_of_a_stream_skips_batches():
    train = load(rank=1, world=2, augment=CROPS).train
    whole, rest = list(train.epoch(0)), list(train.epoch(0, start=3))
    assert len(rest) == 1 and torch.equal(rest[0].inputs, whole[3].inputs)


def test_a_stream_that_cannot_be_shared_is_for_one_process():
    assert len(shades(load(Alone).train.epoch(0))) == 24
    with pytest.raises(DataError, match="2 training processes cannot share; use one") as raised:
        load(Alone, world=2)
    assert "\n" not in str(raised.value)


def test_repeats_of_a_stream_are_refused():
    with pytest.raises(DataError, match=r"data.repeats: this dataset can only be read from start to end"):
        load(repeats=2, augment=CROPS)
