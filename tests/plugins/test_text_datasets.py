"""CLINC150 and Hugging Face datasets, from files."""

import json
import sys

import pytest
import torch
from kdkit_plugins.datasets.clinc150 import Clinc150
from kdkit_plugins.datasets.hf_dataset import HfDataset
from small_texts import BERT, lay_out, write

import kdkit
from kdkit.errors import DataError
from kdkit.students.loaded import LoadedRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("texts"))


def clinc(root, folder, **options):
    return Clinc150(Clinc150.Options(root=root, tokenizer=str(folder / "tokenizer"), **options))


def test_requests_and_intents_are_the_file_s(folder):
    source = clinc(folder, folder)
    content = json.loads((folder / "clinc150" / "data_oos_plus.json").read_text())
    info = source.info()
    assert info.num_classes == 151 and info.class_names[-1] == "oos" and list(info.class_names) == sorted(info.class_names)
    for part, count in (("train", info.num_train), ("test", info.num_test)):
        texts = source.split(part)
        pairs = content[part] + content[f"oos_{part}"]
        assert len(texts) == count == len(pairs)
        assert [info.class_names[i] for i in texts.labels] == [intent for _, intent in pairs]
        assert texts.lengths == [2 + len(text.split()) for text, _ in pairs]  # one token a word, one before and one behind
    assert list(texts.tokens) == ["input_ids"]


def test_long_texts_are_cut(folder):
    assert max(clinc(folder, folder, max_length=5).split("train").lengths) == 5


def test_sizes_of_the_dataset_are_known_before_it_is_fetched(tmp_path, folder):
    info = clinc(tmp_path, folder, download=True).info()
    assert (info.num_classes, info.num_train, info.num_test) == (151, 15_250, 5_500)
    with pytest.raises(DataError, match="there is no .*data_full.json; `download: true` fetches it"):
        clinc(tmp_path, folder, config="full").info()


def test_the_dataset_is_fetched_once(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(sys.modules[Clinc150.__module__], "URL", (folder / "clinc150").as_uri() + "/{file}")
    wanted = clinc(tmp_path, folder, download=True)
    assert str(wanted.lacks()) == f"{(folder / 'clinc150').as_uri()}/data_oos_plus.json to {tmp_path / 'clinc150'}"
    wanted.fetch()
    assert wanted.lacks() is None
    assert len(wanted.split("test")) == clinc(tmp_path, folder).info().num_test
    monkeypatch.setattr(sys.modules[Clinc150.__module__], "URL", "file:///nowhere/{file}")
    with pytest.raises(DataError, match="file:///nowhere/data_full.json cannot be fetched"):
        clinc(tmp_path, folder, download=True, config="full").fetch()


@pytest.mark.parametrize("content", ["{", '{"train": []}'])
def test_a_damaged_file_is_told(tmp_path, folder, content):
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "data_oos_plus.json").write_text(content)
    with pytest.raises(DataError, match=r"data_oos_plus.json: cannot be read: .*once it is removed"):
        clinc(tmp_path, folder).split("train")


def test_a_tokenizer_that_is_not_there_is_told(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="tokenizer './nothing' cannot be loaded"):
        Clinc150(Clinc150.Options(root=folder, tokenizer="./nothing")).split("train")


def hf(folder, **options):
    return HfDataset(HfDataset.Options(tokenizer=str(folder / "tokenizer"), **options))


@pytest.fixture
def files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [("word1 word2", "word3", "no"), ("word4", "word5 word6", "yes"), ("word7", "word8", "yes")]
    for part in ("train", "test"):
        lines = ["one,two,class", *(",".join(row) for row in rows)]
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return {"dataset": "csv", "files": {part: tmp_path / f"{part}.csv" for part in ("train", "test")}, "text": "one", "label": "class"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_files_of_words_and_classes(folder, files):
    source = hf(folder, **files)
    info = source.info()
    assert (info.num_classes, info.num_train, info.num_test, info.class_names) == (2, 3, 3, ("no", "yes"))
    texts = source.split("train")
    assert texts.lengths == [4, 3, 3] and torch.equal(texts.labels, torch.tensor([0, 1, 1]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_pairs_of_texts_have_types(folder, files):
    texts = hf(folder, **{**files, "text": ("one", "two")}).split("test")
    assert texts.lengths == [6, 6, 5] and texts.tokens["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_column_that_is_not_there_is_told(folder, files):
    with pytest.raises(DataError, match="has no column 'label'; it has: one, two, class"):
        hf(folder, **{**files, "label": "label"}).info()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("row", "says"), [("word1,word2,maybe", "test: 'maybe' is no class of the training part"), (",word2,no", "text 3 is none: None")]
)
def test_a_row_that_is_wrong_is_told(folder, files, row, says):
    with files["files"]["test"].open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=says):
        hf(folder, **files).split("test")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_recipe_with_files_trains(tmp_path, folder, files):
    with files["files"]["train"].open("a") as more:
        more.writelines(["word1,word2,no\n", "word3,word4,yes\n"] * 2)
    dataset = {**files, "use": "hf_dataset", "tokenizer": str(folder / "tokenizer"), "max_length": 12, "text": ["one", "two"]}
    dataset["files"] = {part: str(path) for part, path in files["files"].items()}
    student = {"model": "hf/bert", "pretrained": False, "config": {**BERT, "num_hidden_layers": 1}}
    alone = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
    file = write(tmp_path, data={"dataset": dataset, "batch_size": 3}, student=student, **alone)
    run = kdkit.train(file, folder=tmp_path / "run", quiet=True)
    assert LoadedRun(run.folder).info.further == ("token_type_ids",)
    assert kdkit.train(file, folder=tmp_path / "run", quiet=True).seconds == run.seconds  # it is known again
