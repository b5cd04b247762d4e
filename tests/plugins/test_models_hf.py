"""Classifiers of transformers, without a hub."""

import sys

import pytest
import torch
from small_texts import BERT, NARROW

import kdkit
from kdkit.errors import ModelError
from kdkit.models.build import build_model
from kdkit.models.inheritance import inherit
from kdkit.recipe import registry
from kdkit.recipe.types import source_of

SOURCES = registry.load().models
IDS = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
DISTILBERT = {
    "model_type": "distilbert",
    "n_layers": 2,
    "dim": 16,
    "n_heads": 2,
    "hidden_dim": 24,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}


def source(model, **options):
    kind, name = source_of(model, SOURCES)
    return SOURCES[kind](SOURCES[kind].Options(model=model, **options), name)


def build(model, classes=5, **options):
    made = source(model, **options)
    return build_model(made.options, made, classes, kdkit.TextShape((12,)))


def test_sizes_of_the_published_pair():
    """CLINC150: 151 intents, DistilBERT is 38.80 % smaller than BERT; from the recipe's own configurations, which need no hub."""
    counts = []
    for name in ("bert", "distilbert"):
        with torch.device("meta"):
            network = source(f"hf/{name}-base-uncased", config={"model_type": name}).build(151, (12,))
        counts.append(sum(p.numel() for p in network.parameters()))
    assert counts == [109_598_359, 67_069_591]
    assert round(100 * (counts[1] / counts[0] - 1), 2) == -38.80


def test_a_folder_has_its_weights_and_a_new_classifier(tmp_path):
    saved = build("hf/bert", classes=7, pretrained=False, config=BERT).module
    saved.save_pretrained(tmp_path / "saved")
    loaded = build(f"hf/{tmp_path / 'saved'}").module
    assert loaded.classifier.weight.shape == (5, 16)
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if not name.startswith("classifier"))
    fewer = build(f"hf/{tmp_path / 'saved'}", config={"num_hidden_layers": 2}).module
    assert len(fewer.bert.encoder.layer) == 2
    assert torch.equal(fewer.bert.encoder.layer[1].output.dense.weight, saved.bert.encoder.layer[1].output.dense.weight)


@pytest.mark.parametrize("config", [{"hidden_size": 32}, DISTILBERT], ids=["wider", "another architecture"])
def test_weights_of_another_network_are_refused(tmp_path, config):
    build("hf/bert", pretrained=False, config=BERT).module.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match="has not the weights of such a network .*pretrained: false"):
        build(f"hf/{tmp_path / 'saved'}", config=config)


def test_a_folder_is_meant_from_its_file(tmp_path):
    from kdkit.contracts.options import Text

    options = SOURCES["hf"].Options(model=Text.of("hf/../saved", tmp_path / "recipes"))
    assert options.model == f"hf/{tmp_path / 'saved'}"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("hf/no/such-model", {}, "'no/such-model' cannot be built: OSError.*a folder of this machine is written hf/./FOLDER"),
        ("hf/bert", {"config": {"model_type": "brt"}}, "'bert' cannot be built: ValueError"),
        ("hf/bert", {"config": {**BERT, "hidden_size": 15}}, "'bert' cannot be built: ValueError: The hidden size"),
        ("hf/bert", {"config": BERT, "pretrained": False, "input_size": 32}, "normalize and input_size are for images"),
        (
            "hf/bert",
            {"config": {**BERT, "num_hiden_layers": 2}},
            "config: bert has no 'num_hiden_layers'; did you mean 'num_hidden_layers'",
        ),
        ("hf/bert", {"config": {**BERT, "max_position_embeddings": 11}}, "reads 11 tokens at most, and texts have up to 12"),
        ("hf/roberta", {"config": {**BERT, "model_type": "roberta", "max_position_embeddings": 13}}, "reads 11 tokens at most"),
        ("hf//no/such/folder", {}, "there is no folder /no/such/folder"),
    ],
    ids=["no such model", "no such type", "impossible", "for images", "no such key", "too long", "too long for roberta", "no such folder"],
)
def test_impossible_hf_models_are_one_line(model, options, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=says) as caught:
        build(model, **options)
    assert "\n" not in str(caught.value)


def test_images_are_refused():
    made = source("hf/bert", pretrained=False, config=BERT)
    with pytest.raises(ModelError, match="'hf' builds networks for texts, and the data are images"):
        build_model(made.options, made, 5, (3, 8, 8))


def test_layers_are_observed_by_path():
    model = build("hf/bert", pretrained=False, config=BERT)
    seen = kdkit.taps(model.module, ["bert.encoder.layer.*", "penultimate"])(IDS)
    assert seen.logits.shape == (2, 5) and torch.equal(seen.mask, IDS["attention_mask"].bool())
    assert {name: tuple(value.shape) for name, value in seen.features.items()} == {
        **{f"bert.encoder.layer.{i}": (2, 4, 16) for i in range(4)},
        "penultimate": (2, 16),
    }


def test_inputs_that_a_network_does_not_take_are_kept_back():
    model = build("hf/distilbert", pretrained=False, config=DISTILBERT)
    types = {"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}
    model.module.eval()
    assert torch.equal(model({**IDS, **types}).logits, model(IDS).logits)


def test_distilbert_begins_with_layers_of_bert():
    bert, student = build("hf/bert", pretrained=False, config=BERT), build("hf/distilbert", pretrained=False, config=DISTILBERT)
    rename = source("hf/distilbert", config=DISTILBERT).rename
    copied = inherit(student.module, bert.module, [0, 3], lambda name: rename(name, student.module))
    assert {name for name in student.module.state_dict() if name not in copied} == {"pre_classifier.weight", "pre_classifier.bias"}
    ours, theirs = student.module.distilbert.eval(), bert.module.bert.eval()
    del theirs.encoder.layer[1:3]
    theirs.embeddings.token_type_embeddings.weight.data.zero_()  # which DistilBERT has not
    with torch.no_grad():
        assert torch.allclose(ours(**IDS).last_hidden_state, theirs(**IDS).last_hidden_state, atol=1e-6)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    source = registry.load().models["hf"]
    with pytest.raises(ModelError) as told:
        source(source.Options(model="hf/bert"), "bert").build(2, (4,))
    assert str(told.value) == "needs transformers: pip install 'kdkit[text]'"


def test_layers_are_listed():
    from kdkit.cli.listing import layers

    words = [
        "pretrained=false",
        f"config={{model_type: bert, num_hidden_layers: 1, hidden_size: {NARROW['hidden_size']}, num_attention_heads: 2}}",
    ]
    rows = {row.name: row.shape for row in layers("hf/bert", words, 3, "9")}
    assert rows["bert.encoder.layer.0"] == (2, 9, 16) and rows["classifier"] == (2, 3)
