"""A folder of a teacher's answers: it teaches as the answers that it holds, and damage is one line."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy
import pytest
import torch
from safetensors.torch import save_file
from test_answers_file import BASE, ROWS, refused, weights
from training import merged, train, write

from kdkit import recipe
from kdkit.cache import export
from kdkit.cache.folder import stores
from kdkit.errors import RecipeError, RunError
from kdkit.runs import fill_caches

FOLDER = {**BASE, "teacher": {"model": "answers/logits", "file": "answers"}}
PARTS = (slice(0, 20), slice(20, 48))
LARGEST = torch.from_numpy(ROWS).log_softmax(1).topk(2)


def write_npz(path, arrays):
    numpy.savez(path, **{name: value.numpy() for name, value in arrays.items()})


def write_parquet(path, arrays):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {name: [row.numpy() for row in value] for name, value in arrays.items()}
    parquet.write_table(pa.table(columns), path)


def write_tar(path, arrays, ends=("logits.npy", "npy", "npz"), change=None):
    """Samples of a web dataset, each beside a member that is no array; the keys are in no order."""
    with tarfile.open(path, "w") as archive:
        for row in range(len(arrays["logits"])):
            array, made, end = arrays["logits"][row].numpy(), io.BytesIO(), ends[row % len(ends)]
            numpy.savez(made, logits=array) if end == "npz" else numpy.save(made, array)
            for name, content in ((f"v1.0/{-row}.cls", b"3"), (f"v1.0/{-row}.{end}", made.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        if change is not None:
            change(archive)


WRITERS = {"npz": write_npz, "tar": write_tar, "safetensors": lambda path, arrays: save_file(arrays, path), "parquet": write_parquet}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_folder(folder, arrays, about, kind="npz"):
    folder.mkdir()
    shards = []
    for number, part in enumerate(PARTS):
        path = folder / f"part-{number}.{kind}"
        WRITERS[kind](path, {name: value[part].contiguous() for name, value in arrays.items()})
        shards.append({"file": path.name, "rows": part.stop - part.start, "sha256": digest(path)})
    return write_index(folder, {"format": 1, "rows": 48, "arrays": {"logits": about}, "shards": shards})


def write_index(folder, index):
    (folder / "index.json").write_text(json.dumps(index))
    return index


def whole(folder, kind="npz"):
    return write_folder(folder, {"logits": torch.from_numpy(ROWS)}, {"shape": [6], "dtype": "float32"}, kind)


def largest(folder, values=LARGEST.values, indices=LARGEST.indices, **about):
    arrays = {"logits.values": values, "logits.indices": indices}
    return write_folder(folder, arrays, {"shape": [6], "dtype": "float32", "top_k": 2, **about})


def spread():
    """The rows that the two likeliest classes stand for, by plain loops."""
    rows = numpy.zeros((48, 6), dtype="float32")
    for row, (values, indices) in enumerate(zip(*LARGEST, strict=True)):
        left = 1 - values.double().exp().sum()
        rows[row] = torch.log(left / 4)
        for value, index in zip(values, indices, strict=True):
            rows[row, index] = value
    return rows


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_teaches_as_one_file(kind, tmp_path):
    whole(tmp_path / "answers", kind)
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS)
    assert_weights(train(tmp_path, FOLDER, "a"), train(tmp_path, FOLDER, "b", teacher={"file": "teacher.npz"}), 0)


def added(name, content=b"", kind=tarfile.REGTYPE):
    def change(archive):
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(content), kind, "v1.0/0.npy"
        archive.addfile(member, io.BytesIO(content))

    return change


def npy(array):
    made = io.BytesIO()
    numpy.save(made, array)
    return made.getvalue()


TARS = {
    "link": (added("9.npy", kind=tarfile.SYMTYPE), "teacher.tar: '9.npy' is no plain file"),
    "lacks": (added("9.jpg"), "teacher.tar: '9' has no array 'logits'"),
    "twice": (added("v1.0/-1.logits.npy", npy(ROWS[0])), "teacher.tar: has 'v1.0/-1.logits.npy' twice"),
    "dtype": (added("9.npy", npy(ROWS[0].astype("float64"))), "'logits' of '9' is float64 (6,), and others are float32 (6,)"),
    "pickle": (added("9.npy", npy(ROWS[0].astype(object))), "teacher.tar: no tar file, or damaged: Object arrays cannot be loaded"),
    "rows": (added("9.npy", npy(ROWS[0])), "'logits' has 49 rows, and the dataset's whole training part 48 samples"),
}


@pytest.mark.parametrize("kind", TARS)
def test_a_shard_of_a_web_dataset_that_does_not_fit_is_one_line(kind, tmp_path):
    change, says = TARS[kind]
    write_tar(tmp_path / "teacher.tar", {"logits": torch.from_numpy(ROWS)}, change=change)
    assert says in refused(tmp_path, FOLDER, teacher={"file": "teacher.tar"})


def test_a_parquet_file_teaches_as_one_of_numpy(tmp_path):
    write_parquet(tmp_path / "teacher.parquet", {"logits": torch.from_numpy(ROWS)})
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS)
    assert_weights(*(train(tmp_path, FOLDER, kind, teacher={"file": f"teacher.{kind}"}) for kind in ("parquet", "npz")), 0)


def test_the_largest_log_probabilities_leave_the_rest_to_the_other_classes(tmp_path):
    largest(tmp_path / "answers")
    numpy.savez(tmp_path / "teacher.npz", logits=spread())
    assert_weights(train(tmp_path, FOLDER, "a"), train(tmp_path, FOLDER, "b", teacher={"file": "teacher.npz"}), 1e-6)


def assert_weights(ours, theirs, tolerance):
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=0, atol=tolerance)


def test_a_copy_of_a_folder_is_the_same_recipe_and_another_content_is_not(tmp_path):
    index = whole(tmp_path / "answers")
    shutil.copytree(tmp_path / "answers", tmp_path / "copy")
    prints = [recipe.load(write(tmp_path, FOLDER, teacher={"file": name})).fingerprint for name in ("answers", "copy")]
    write_index(tmp_path / "copy", {**index, "teacher": "another"})
    prints.append(recipe.load(write(tmp_path, FOLDER, teacher={"file": "copy"})).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def without(index, *keys):
    return {key: value for key, value in index.items() if key not in keys}


SHARDS = {
    "missing": (lambda folder, index: (folder / "part-1.npz").unlink(), "part-1.npz: No such file or directory"),
    "digest": (
        lambda folder, index: (folder / "part-1.npz").write_bytes(b"other"),
        "part-1.npz: is damaged: its SHA-256 is not the one in index.json",
    ),
    "sum": (lambda folder, index: write_index(folder, {**index, "rows": 47}), "its shards have 48 rows together, not 47"),
    "rows": (
        lambda folder, index: write_index(
            folder, {**index, "shards": [{**index["shards"][0], "rows": 19}, {**index["shards"][1], "rows": 29}]}
        ),
        "part-0.npz: 'logits' is (20, 6), and index.json says (19, 6)",
    ),
    "dtype": (
        lambda folder, index: write_index(folder, {**index, "arrays": {"logits": {"shape": [6], "dtype": "float16"}}}),
        "part-0.npz: 'logits' is float32, and index.json says float16",
    ),
    "version": (lambda folder, index: write_index(folder, {**index, "format": 2}), "index.json: is damaged: format: "),
    "key": (lambda folder, index: write_index(folder, without(index, "shards")), "index.json: is damaged: shards: Field required"),
    "outside": (
        lambda folder, index: write_index(folder, {**index, "shards": [{**index["shards"][0], "file": "../x.npz"}]}),
        "index.json: is damaged: shards.0.file: ",
    ),
    "name": (
        lambda folder, index: write_index(folder, {**index, "shards": [{**index["shards"][0], "file": "x\0.npz"}]}),
        "index.json: is damaged: shards.0.file: ",
    ),
    "shape": (
        lambda folder, index: write_index(folder, {**index, "arrays": {"logits": {"shape": [], "dtype": "float32", "top_k": 2}}}),
        "index.json: is damaged: arrays.logits.shape: ",
    ),
    "array": (
        lambda folder, index: write_index(folder, {**index, "arrays": {"other": index["arrays"]["logits"]}}),
        "answers: has no array 'logits'; it has other",
    ),
    "columns": (
        lambda folder, index: write_index(folder, {**index, "arrays": {"logits": {"shape": [5], "dtype": "float32"}}}),
        "'logits' has 5 columns, for 6 classes",
    ),
    "index": (lambda folder, index: (folder / "index.json").write_text("{"), "index.json: is damaged: it is not JSON"),
    "none": (lambda folder, index: (folder / "index.json").unlink(), "no such file: answers/index.json"),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_damaged_folder_is_one_line(kind, tmp_path):
    change, says = SHARDS[kind]
    change(tmp_path / "answers", whole(tmp_path / "answers"))
    assert says in refused(tmp_path, FOLDER)


TWICE = LARGEST.indices.clone()
TWICE[7] = 3
LARGEST_ROWS = {
    "logits": ({"values": LARGEST.values + 3}, {}, "those of row 0 (counted from 0) sum to "),
    "twice": ({"indices": TWICE}, {}, "row 7 (counted from 0) names classes twice, or others than 0 to 5: [3, 3]"),
    "outside": ({"indices": LARGEST.indices + 1}, {}, "names classes twice, or others than 0 to 5"),
    "floats": ({"indices": LARGEST.indices.float()}, {}, "'logits.indices' is float32, and index.json says int16 or int32 or int64"),
    "rest": ({"rest": True}, {}, "part-0.npz: has no array 'logits.rest'; it has logits.values, logits.indices"),
    "probabilities": ({}, {"teacher": {"answers": "softmax"}}, "'logits' has `top_k`, which is of logits; leave `answers` out"),
    "loss": (
        {},
        {"losses": [{"use": "sp", "layers": [{"student": "logits", "teacher": "logits"}]}]},
        "'sp' compares all logits, and the 2 largest are kept",
    ),
    "not_finite": ({"values": torch.full((48, 2), -torch.inf)}, {}, "numbers that are not finite, first in row 0"),
}


# Outputs of layers beside the logits

HINT = {"losses": [{"use": "logit_kl"}, {"use": "hint", "layers": [{"student": "block1", "teacher": "block1"}]}]}
MAPS = {**HINT, "student": {"model": "convnet/4"}}
STATES = torch.arange(48 * 4 * 4 * 3, dtype=torch.float32).view(48, 4, 4, 3).sin()


def with_layers(folder, layers, **abouts):
    arrays = {"logits": torch.from_numpy(ROWS), **layers}
    index = write_folder(folder, arrays, {"shape": [6], "dtype": "float32"})
    about = {name: {"shape": [*value.shape[1:]], "dtype": "float32", **abouts} for name, value in layers.items()}
    return write_index(folder, {**index, "arrays": {**index["arrays"], **about}})


def test_a_loss_reads_layers_of_a_folder_by_any_name_with_channels_first_or_last(tmp_path):
    with_layers(tmp_path / "first", {"a.b@input": STATES.permute(0, 3, 1, 2), "other": torch.zeros(48, 2)})
    with_layers(tmp_path / "last", {"a.b@input": STATES}, channels_last=True)
    first, last = (train(tmp_path, {**FOLDER, **reading("a.b@input")}, f"by {name}", teacher={"file": name}) for name in ("first", "last"))
    assert_weights(first, last, 1e-6)


def reading(teacher, use="hint"):
    return {**MAPS, "losses": [{"use": use, "layers": [{"student": "block1", "teacher": teacher}]}, {"use": "cross_entropy"}]}


NO_LAYERS = {
    "name": (reading("stage1"), {}, "losses.0.layers.0: there is no layer 'stage1'; did you mean 'stage'? allowed: logits, stage"),
    "glob": (reading("layer*"), {}, "no layer matches 'layer*'; allowed: logits, stage"),
    "finite": (reading("stage"), {"stage": STATES / 0}, "teacher.model: 'stage' has numbers that are not finite, first in row 0"),
    "dtype": (reading("stage"), {"stage": STATES.half()}, "teacher.model: part-0.npz: 'stage' is float16, and index.json says float32"),
    "sides": (
        reading("stage"),
        {"stage": STATES[:, 0, 0]},
        "index.json: is damaged: arrays.stage: channels_last is of maps [H, W, C], not [3]",
    ),
    "survey": (
        {**MAPS, "losses": [{"use": "dense_mse", "standardize_teacher": "phi_s", "layers": [{"student": "block1", "teacher": "stage"}]}]},
        {},
        "answers alone have no network",
    ),
}


@pytest.mark.parametrize("kind", NO_LAYERS)
def test_layers_that_do_not_fit_are_one_line(kind, tmp_path):
    changes, layers, says = NO_LAYERS[kind]
    with_layers(tmp_path / "answers", {"stage": STATES, **layers}, channels_last=True)
    assert says in refused(tmp_path, {**FOLDER, **changes})


@pytest.mark.parametrize("kind", LARGEST_ROWS)
def test_largest_answers_that_do_not_fit_are_one_line(kind, tmp_path):
    about, changes, says = LARGEST_ROWS[kind]
    largest(tmp_path / "answers", **about)
    assert says in refused(tmp_path, merged(FOLDER, changes))


# What `kdkit cache --export` writes

CACHED = {"model": "mlp/8", "cache": {"views": 1, "dtype": "fp32"}}
KEPT = {
    "all": ({}, {}),
    "top_k": ({"cache": {"top_k": 2}}, {}),
    "bf16": ({"cache": {"dtype": "bf16"}}, {}),
    "layers": ({"model": "convnet/6", "cache": {"what": "taps", "top_k": 2}}, MAPS),
}


def cached(folder, name="cached.yaml", **changes):
    return recipe.load(write(folder, {**BASE, "teacher": CACHED, "run": {"folder": "runs"}}, name, **changes))


@pytest.mark.parametrize("kind", KEPT)
def test_an_exported_cache_teaches_as_the_cache(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(export.write, "__defaults__", (500,))
    own, changes = KEPT[kind]
    teacher = merged(CACHED, own)
    given = cached(tmp_path, data={"train_samples": 40}, teacher=teacher, **changes)
    index = fill_caches.write_out(given, tmp_path / "answers", quiet=True)
    assert index.rows == 48 and len(index.shards) > 1 and (index.dataset, index.teacher) == ("synthetic", teacher["model"])
    by_cache = train(tmp_path, {**BASE, "teacher": teacher, **changes}, "cache")
    assert_weights(train(tmp_path, {**FOLDER, **changes}, "export"), by_cache, 0)


def test_an_export_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "save", lambda values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill_caches.write_out(cached(tmp_path), tmp_path / "out" / "answers", quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


EXPORTS = {
    "views": ({"data": {"augment": {"flip": 0.5}}, "teacher": {"cache": {"views": "all"}}}, "data: a folder of answers has one view"),
    "mixes": ({"train": {"mixup": {"mixup_alpha": 0.4}}}, "train.mixup: mixes are kept as training makes them"),
    "none": ({"teacher": {"cache": None}}, "teacher: has no `cache:` that could be filled"),
    "layers": (
        {
            "teacher": {"cache": {"what": "taps"}},
            "losses": [{"use": "hint", "layers": [{"student": "layer1", "teacher": "layer1"}]}, {"use": "cross_entropy"}],
        },
        "has layers alone; a folder of answers has a row of logits (K,) a sample",
    ),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_what_cannot_be_exported_is_one_line(kind, tmp_path):
    changes, says = EXPORTS[kind]
    with pytest.raises((RecipeError, RunError)) as caught:
        fill_caches.write_out(cached(tmp_path, **changes), tmp_path / "answers", quiet=True)
    assert says in str(caught.value) and not (tmp_path / "answers").exists()


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    whole(tmp_path / "answers")
    with pytest.raises(RunError, match="answers exists"):
        fill_caches.write_out(cached(tmp_path), tmp_path / "answers", quiet=True)
    assert len(list((tmp_path / "answers").iterdir())) == 3 and stores(tmp_path / "runs" / "teacher-cache") == []
