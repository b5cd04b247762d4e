"""Batches of token ids, and recipes that train on texts from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_texts import BERT, LAYER, lay_out, recipe, write
from test_imports import imports
from training import task, together, weights

import kdkit
from kdkit import cli
from kdkit import recipe as recipes
from kdkit.contracts.dataset_source import DataInfo, Texts
from kdkit.contracts.records import Outputs
from kdkit.data.loaders import prepare
from kdkit.errors import DataError, RecipeError
from kdkit.models.tapped import TappedModel
from kdkit.recipe.data_section import DataSpec
from kdkit.runs import checks
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun
from kdkit.study.report import output as report

CPU = torch.device("cpu")
IDS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16], [17]]


class Source(kdkit.DatasetSource):
    """Six short texts of three classes."""

    name = "six"

    def info(self):
        return DataInfo((4,), 3, 6, 6)

    def split(self, part):
        return Texts({"input_ids": IDS}, torch.tensor([0, 1, 2, 0, 1, 2]), {"input_ids": 99})


def six(**settings):
    return prepare(
        DataSpec(dataset={"use": "six"}, **{"batch_size": 2, **settings}), Source(None), task("text_classification"), seed=0, device=CPU
    )


def test_a_batch_is_as_long_as_its_longest_text():
    for batch in [*six().train.epoch(0), *six(eval_batch_size=4).test]:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        lengths = [len(IDS[i]) for i in batch.index]
        assert ids.shape == mask.shape == (len(batch.labels), max(lengths)) and mask.sum(1).tolist() == lengths
        for row, real, index in zip(ids, mask.bool(), batch.index, strict=True):
            assert row[real].tolist() == IDS[index] and (row[~real] == 99).all()
        assert batch.labels.tolist() == [int(i) % 3 for i in batch.index]


def test_an_epoch_of_texts_can_begin_in_the_middle():
    whole, rest = list(six().train.epoch(3)), list(six().train.epoch(3, start=1))
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(whole[1:], rest, strict=True))


@pytest.mark.parametrize("key", ["image_size", "augment", "timm_augment"])
def test_options_for_images_are_refused_for_texts(key):
    with pytest.raises(DataError, match=f"data.{key}: is for images, and dataset 'six' has texts"):
        six(**{key: 8 if key == "image_size" else {}})


@pytest.mark.parametrize(
    ("tokens", "labels"), [({"a": [[1]]}, [0, 1]), ({"a": [[1], []]}, [0, 1]), ({"a": [[1]], "b": [[1, 2]]}, [0]), ({}, [])]
)
def test_texts_that_do_not_fit_together_are_refused(tokens, labels):
    with pytest.raises(DataError, match="as many labels as texts"):
        Texts(tokens, torch.tensor(labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("texts"))


def test_check_of_a_recipe_of_texts(folder):
    told = str(checks.make(recipes.load(write(folder))))
    assert "160 training and 304 test texts of up to 12 tokens, 151 classes" in told
    assert "multiply-accumulates per text" in told
    assert "the student begins with 41 of its 41 tensors from a teacher" in told


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": {"model": "resnet18"}}, "'timm' builds networks for images, and the data are texts"),
        ({"student": {"model": "hf/bert", "config": BERT, "init": {"from": "teecher"}}}, "no such teacher; did you mean 'teacher'"),
        ({"losses": [{"use": "at", "layers": [{"student": f"{LAYER}.0", "teacher": f"{LAYER}.1"}]}]}, r"must be maps \(B, C, H, W\)"),
    ],
    ids=["a network for images", "init", "a loss on maps"],
)
def test_check_refuses_impossible_recipes_of_texts(folder, changes, says):
    with pytest.raises(RecipeError, match=says):
        checks.make(recipes.load(write(folder, **changes)))


def test_a_cache_of_hidden_states_is_refused(folder):
    teacher = {**recipe(folder)["teacher"], "cache": {"views": "all", "what": "taps"}}
    with pytest.raises(RecipeError, match="as long as the longest text of a batch"):
        checks.make(recipes.load(write(folder, teacher=teacher)))


@pytest.fixture(scope="module")
def run(folder):
    """Response, hidden states and relations together."""
    return kdkit.train(write(folder), folder=folder / "run", quiet=True)


def test_a_student_of_texts_learns(folder, run):
    losses = [line["train"]["loss"] for line in LoadedRun(run.folder).folder.metrics("epoch")]
    assert losses[1] < losses[0] and run.test["nll"] < 5.1


def test_a_further_run_on_texts_ends_with_the_same_weights(folder, run):
    again = kdkit.train(write(folder), folder=folder / "again", quiet=True)
    assert all(torch.equal(value, weights(again.folder)[name]) for name, value in weights(run.folder).items())


def test_hidden_states_are_compared_where_there_are_tokens(folder, run):
    """A second derivation of hint and rkd_distance by plain loops over the texts of a batch."""
    trained = LoadedRun(run.folder)
    batch = next(iter(trained.data().test))
    batch = kdkit.Batch({name: value[:5] for name, value in batch.inputs.items()}, batch.labels[:5], batch.index[:5])
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    student = TappedModel(trained.student().module, [f"{LAYER}.0"])
    teacher = TappedModel(trained.teachers()[0].module, [f"{LAYER}.0"])
    with torch.no_grad():
        s, t = student(batch.inputs), teacher(batch.inputs)
    pair = {"layers": [{"student": f"{LAYER}.0", "teacher": f"{LAYER}.0"}]}
    hint, relation = kdkit.build_loss("hint", **pair), kdkit.build_loss("rkd_distance", **pair)
    for loss in (hint, relation):
        loss.setup(s, t)
    (adapter,) = hint.adapters
    errors = [
        (adapter(s.features[f"{LAYER}.0"][b, i]) - t.features[f"{LAYER}.0"][b, i]) ** 2 for b, n in enumerate(lengths) for i in range(n)
    ]
    assert torch.allclose(hint(s, t, batch), torch.stack(errors).mean(), rtol=1e-4)
    pooled = [
        Outputs(o.logits, {name: torch.stack([f[b, :n].mean(0) for b, n in enumerate(lengths)]) for name, f in o.features.items()})
        for o in (s, t)
    ]
    assert torch.allclose(relation(s, t, batch), relation(*pooled, batch), rtol=1e-4)


def test_a_cache_of_answers_to_texts_gives_the_same_student_up_to_rounding(folder):
    losses = [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 2}]
    teacher = recipe(folder)["teacher"]
    plain = kdkit.train(write(folder, losses=losses), folder=folder / "plain", quiet=True)
    cached = {**teacher, "cache": {"views": "all", "dtype": "fp32"}}
    checkpoint = folder / "teacher.safetensors"
    save_file(LoadedRun(plain.folder).teachers()[0].module.state_dict(), checkpoint)
    kept = kdkit.train(write(folder, losses=losses, teacher={**cached, "checkpoint": str(checkpoint)}), folder=folder / "kept", quiet=True)
    assert len(list((folder / "runs" / "teacher-cache").iterdir())) == 1
    one, other = weights(plain.folder), weights(kept.folder)
    assert max(float((value - other[name]).abs().max()) for name, value in one.items()) < 1e-3


def test_transformers_loads_the_exported_student(folder, run):
    from transformers import AutoModelForSequenceClassification

    made = export(LoadedRun(run.folder), folder=folder / "exported")
    network = AutoModelForSequenceClassification.from_pretrained(folder / "exported").eval()
    assert network.config.id2label == dict(enumerate(LoadedRun(run.folder).info.class_names))
    ids = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        found = network(**ids).logits
        for ours in (LoadedRun(run.folder).student(), kdkit.load_student(folder / "exported")):
            assert torch.allclose(found, ours(ids).logits, atol=1e-6)
    assert "from_pretrained" in made.notes[0]
    assert "/" not in json.loads((folder / "exported" / "config.json").read_text())["kdkit"]["options"]["model"].removeprefix("hf/")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's, about itself
def test_onnx_gives_the_student_s_logits_for_texts_of_any_length(folder, run):
    onnxruntime = pytest.importorskip("onnxruntime")
    made = export(LoadedRun(run.folder), "onnx", folder / "onnx")
    session = onnxruntime.InferenceSession(str(made.files[0]))
    for ids in (torch.tensor([[2, 9, 3]]), torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])):
        given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        with torch.no_grad():
            wanted = LoadedRun(run.folder).student()(given).logits
        (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)


EXTRA = {"transformers", "tokenizers", "datasets"}


@pytest.mark.slow
def test_only_plugins_for_texts_need_the_extra():
    """The core imports none of it, and no plugin before it is used: it need not be installed for images."""
    code = "import sys, kdkit.recipe.registry, kdkit.runs.checks, kdkit.runs.training; kdkit.recipe.registry.load(); print([*filter(sys.modules.__contains__, sys.argv[1:])])"
    assert subprocess.run([sys.executable, "-c", code, *EXTRA], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    for file in Path(kdkit.__file__).parent.rglob("*.py"):
        assert not {module.split(".")[0] for module, _ in imports(file)} & EXTRA, file


def test_a_run_on_texts_is_shown_and_reported(folder, run, capsys):
    assert cli.app(["show", str(run.folder)], standalone_mode=False) is None
    assert "init (from teacher, layers 1-3)" in " ".join(capsys.readouterr().out.split())
    written = report.write([run.folder], output=folder / "report")
    assert "The test data are texts" in written.page.with_suffix(".md").read_text()


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("schedule", "losses"),
    [
        ({"use": "cs_kd"}, ["rkd_distance", "hint"]),
        ({"use": "cs_kd", "mutual": False}, ["rkd_distance", "hint"]),
        ({"use": "dlb"}, ["rkd_distance", "hint"]),
        ({"use": "bake", "layer": f"{LAYER}.1"}, ["rkd_distance"]),
        ({"use": "branches", "split": f"{LAYER}.0", "branches": 2}, []),
        ({"use": "mean_teacher", "second_view": False}, ["rkd_distance", "hint"]),
    ],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_no_schedule_reads_padding(tmp_path_factory, schedule, losses):
    """With other token ids where there is no token, training comes to the same weights: networks mask them, and so do schedules."""
    home = lay_out(tmp_path_factory.mktemp("padding"))
    pair = [{"student": f"{LAYER}.1", "teacher": f"{LAYER}.1"}]
    changes = {
        "teacher": None,
        "student": {"model": "hf/bert", "pretrained": False, "config": {**BERT, "num_hidden_layers": 2}},
        "schedule": schedule,
        "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}, *({"use": name, "layers": pair} for name in losses)],
        "train": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    }
    ends = []
    for name, token in (("zeros", "[PAD]"), ("words", "word9")):
        config = home / "tokenizer" / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": token}))
        ends.append(weights(kdkit.train(write(home, **changes), folder=home / name, quiet=True).folder))
    used = {name: value for name, value in ends[0].items() if "word_embeddings" not in name}  # the padding's own embedding decays
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in used.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"train": {"epochs": 1, "optimizer": {"lr": 0.1}, "mixup": {"mixup_alpha": 0.2}}},
            "train.mixup: targets of task 'text_classification' cannot be mixed",
        ),
        ({"teacher": None, "schedule": {"use": "ddgsd"}}, "compares views of images, and texts have one"),
        ({"teacher": None, "schedule": {"use": "mean_teacher", "second_view": True}}, "compares views of images, and texts have one"),
    ],
    ids=["mixup", "two views", "second view"],
)
def test_options_that_texts_do_not_have(folder, changes, says):
    student = {"model": "hf/bert", "pretrained": False, "config": BERT}
    with pytest.raises(RecipeError, match=says):
        checks.make(recipes.load(write(folder, student=student, losses=[{"use": "cross_entropy"}, {"use": "logit_kl"}], **changes)))


def test_tokens_that_a_network_has_not_are_told(folder):
    student = {"model": "hf/bert", "pretrained": False, "config": {**BERT, "vocab_size": 9}}
    file = write(folder, student=student, teacher=None, schedule={"use": "supervised"}, losses=[{"use": "cross_entropy"}])
    with pytest.raises(RecipeError, match="student: student knows 9 tokens, and the data's tokenizer has 44"):
        kdkit.train(file, folder=folder / "short", quiet=True)


@pytest.mark.slow
def test_two_processes_learn_texts_as_one_does(tmp_path):
    """Each pads its own half of a batch; a mean over the tokens of a batch (hint) is left out, as each process has its own."""
    lay_out(tmp_path)
    still = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = recipe(tmp_path)
    losses = [made["losses"][0], made["losses"][1], {**made["losses"][3], "gather": True}]
    file = write(
        tmp_path,
        losses=losses,
        teacher={**made["teacher"], "config": still},
        student={**made["student"], "config": {**still, "num_hidden_layers": 2}},
        train={"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    )
    kdkit.train(file, folder=tmp_path / "one", quiet=True)
    for process in together(tmp_path, "train", file, "--run", tmp_path / "two"):
        code, told = process.finish()
        assert code == 0, told
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(value, two[name], atol=1e-5) for name, value in one.items())
