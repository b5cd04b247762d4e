"""timm's datasets: Hugging Face's in places, webdataset's as a stream."""

import gc
import io
import random
import signal
import tarfile

import numpy as np
import pytest
import torch
import yaml
from kdkit_plugins.datasets.timm import Timm, TimmOptions
from PIL import Image
from training import lines, task, together, weights, write

from kdkit.data.loaders import prepare
from kdkit.errors import DataError
from kdkit.recipe.data_section import BatchAugment, DataSpec

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:This DataLoader will create")
CPU = torch.device("cpu")
CLASSES, SHARD, SHARDS = 3, 12, 4


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def load(workers=0, rank=0, world=1, options=None, **settings):
    spec = DataSpec(**{"dataset": {"use": "timm"}, "batch_size": 6, "eval_batch_size": 5, "workers": workers} | settings)
    return prepare(spec, Timm(TimmOptions(**options)), task(), seed=3, device=CPU, rank=rank, world=world)


@pytest.fixture
def shards(tmp_path):
    """Options that name shards of grey images, each of its own shade; the class is the shade modulo 3."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"part-{shard:04d}.tar", "w") as tar:
            for i in range(SHARD):
                value = shard * SHARD + i
                for ending, content in (("png", png(value)), ("cls", str(value % CLASSES).encode())):
                    entry = tarfile.TarInfo(f"{value:06d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    parts = {"train_split": "part-{0000..0003}.tar|48", "test_split": "part-{0000..0001}.tar|24"}
    yield {"dataset": "wds/", "root": tmp_path, "num_classes": CLASSES, "image_shape": (3, 8, 8), **parts}
    gc.collect()  # webdataset leaves shards open: here, where that is ignored


def shades(batches):
    return [(batch.inputs[:, 0, 4, 4] * 255).round().int().tolist() for batch in batches]


def test_stream_gives_each_image_with_its_class(shards):
    loaded = load(options=shards)
    batches = list(loaded.train.epoch(0))
    assert len(batches) == len(loaded.train) == 8 and loaded.train.num_samples == 48 and not loaded.train.indexed
    assert sorted(sum(shades(batches), [])) == list(range(48))
    assert all([s % CLASSES for s in seen] == b.labels.tolist() for seen, b in zip(shades(batches), batches, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_epochs_come_again_and_differ(shards, workers):
    settings = {"workers": workers, "options": shards, "augment": BatchAugment(crop_padding=2, flip=0.5)}
    one, again = load(**settings).train, load(**settings).train
    epochs = [list(one.epoch(number)) for number in (1, 0)]
    repeated = list(again.epoch(1))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(epochs[0], repeated, strict=True))
    assert shades(epochs[0]) != shades(epochs[1])
    rest = list(again.epoch(1, start=5))
    assert len(rest) == 3 and all(torch.equal(a.inputs, b.inputs) for a, b in zip(repeated[5:], rest, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_measured_once_over(shards, workers):
    batches = list(load(workers, options=shards).test)
    assert sorted(sum(shades(batches), [])) == list(range(24)) and load(options=shards).test.num_samples == 24


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_samples": 10}, "data.train_samples: this dataset can only be read from start to end"),
        ({"train_fraction": 0.5}, "data.train_fraction"),
        ({"validation": 10}, "data.validation"),
        ({"batch_size": 60}, "60 is more than the 48 training images"),
    ],
)
def test_options_that_a_stream_cannot_have_are_refused(shards, settings, says):
    with pytest.raises(DataError, match=says):
        load(options=shards, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_shards(shards, workers):
    """Each its own, in batches of as many for each; another deal in each epoch."""
    ranks = [load(workers, rank, 2, options=shards, augment=BatchAugment(flip=0.5)) for rank in range(2)]
    deals = []
    for number in range(3):
        epochs = [list(loaded.train.epoch(number)) for loaded in ranks]
        assert [len(epoch) for epoch in epochs] == [8, 8] == [len(loaded.train) for loaded in ranks]
        assert {len(batch.labels) for epoch in epochs for batch in epoch} == {3}
        seen = [sum(shades(epoch), []) for epoch in epochs]
        assert sorted(seen[0] + seen[1]) == list(range(48))
        deals.append({shade // SHARD for shade in seen[0]})
        places = torch.cat([batch.index for epoch in epochs for batch in epoch])
        assert len(places.unique()) == 48
    assert any(deal != deals[0] for deal in deals)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", [1, 2])
def test_processes_measure_each_image_once(shards, workers, last):
    """Of three shards one process has two; so it may be, as no process waits for another while it measures."""
    shards |= {"test_split": f"part-{{0000..000{last}}}.tar|{(last + 1) * SHARD}"}
    ranks = [load(workers, rank, 2, options=shards).test for rank in range(2)]
    parts = [list(part) for part in ranks]
    assert sorted(sum((sum(shades(part), []) for part in parts), [])) == list(range((last + 1) * SHARD))
    places = torch.cat([batch.index for part in parts for batch in part])
    assert len(places.unique()) == len(places)
    assert sorted(sum(shades(ranks[1].whole()), [])) == list(range((last + 1) * SHARD))


def test_two_processes_train_on_shards_and_go_on(shards, tmp_path):
    data = {"dataset": {"use": "timm", **shards, "root": str(shards["root"]), "image_shape": [3, 8, 8]}, "workers": 1}
    path = write(tmp_path, data={**data, "augment": {"flip": 0.5}}, train={"epochs": 6})
    text = yaml.safe_load(path.read_text())
    text["data"]["dataset"] = data["dataset"]
    path.write_text(yaml.safe_dump(text))
    commands = together(tmp_path, "train", path, "--run", "whole")
    assert [command.finish()[0] for command in commands] == [0, 0], commands[0].log.read_text()
    stopped = together(tmp_path, "train", path, "--run", "run")
    assert stopped[0].wait_for(lambda: lines(tmp_path / "run") >= 9), stopped[0].finish()
    stopped[1].send(signal.SIGTERM)
    assert [command.finish()[0] for command in stopped] == [143, 143], stopped[0].log.read_text()
    assert [command.finish()[0] for command in together(tmp_path, "train", path, "--run", "run")] == [0, 0]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_reading_a_stream_leaves_the_global_random_states_alone(shards):
    loaded = load(options=shards)
    before = random.getstate(), torch.get_rng_state().tolist()
    list(loaded.train.epoch(0))
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_more_workers_than_shards_is_said(shards):
    shards |= {"train_split": "part-{0000..0001}.tar|24"}
    with pytest.raises(DataError, match="the stream ended after 2 of 4 batches"):
        list(load(workers=4, options=shards).train.epoch(0))


def test_unknown_lengths_and_classes_are_asked_for(shards):
    with pytest.raises(DataError, match="how many images has its test part"):
        load(options=shards | {"test_split": "part-{0000..0001}.tar"})
    with pytest.raises(DataError, match="set num_classes or class_map"):
        load(options={key: value for key, value in shards.items() if key != "num_classes"})


def test_errors_of_timm_are_passed_on(tmp_path):
    with pytest.raises(DataError, match=r"^timm dataset 'torch/kmnist', split 'train', root .*: RuntimeError: Dataset not found") as raised:
        load(options={"dataset": "torch/kmnist", "root": tmp_path})
    assert "\n" not in str(raised.value)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Options that name a local Hugging Face dataset of 9 + 6 images."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for part, count in (("train", 9), ("validation", 6)):
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "label": [i % CLASSES for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "made" / f"{part}.parquet")
    return {"dataset": f"hfds/{tmp_path / 'made'}", "root": tmp_path / "cache", "image_shape": (3, 8, 8)}


def test_hugging_face_images_have_places(parquet):
    loaded = load(options=parquet, batch_size=3, train_samples=6)
    assert (loaded.info.num_classes, loaded.info.num_train, loaded.info.num_test) == (3, 9, 6)
    for batch in loaded.train.epoch(0):
        assert (batch.inputs[:, 0, 0, 0] * 255).round().int().tolist() == batch.index.tolist()
        assert torch.equal(batch.labels, batch.index % CLASSES)
    assert sum(shades(loaded.test), []) == list(range(6))
