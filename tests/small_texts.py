"""Small requests with a tokenizer and a BERT for them, in a folder; recipes that train on them."""

import json

import pytest
import torch
import yaml

pytest.importorskip("transformers")

WORDS = [f"word{i}" for i in range(40)]
INTENTS = 151
NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60, "max_position_embeddings": 32}
BERT = {"model_type": "bert", "num_hidden_layers": 4, **NARROW}
LAYER = "bert.encoder.layer"


def requests(seed, count):
    """(text, intent): the first word says which intent it is, others follow."""
    stream = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=stream))  # noqa: E731
    found = []
    for i in range(count):
        intent = i % INTENTS
        rest = [WORDS[draw(40)] for _ in range(1 + draw(9))]
        found.append((" ".join([WORDS[intent % 40], *rest]), "oos" if intent == 150 else f"intent{intent:03}"))
    return found


def lay_out(folder):
    """clinc150/data_oos_plus.json and tokenizer/ in a folder."""
    (folder / "clinc150").mkdir(parents=True)
    parts = {
        part: [pair for pair in requests(seed, count) if pair[1] != "oos"]
        for seed, (part, count) in enumerate({"train": 302, "val": 10, "test": 302}.items())
    }
    parts |= {f"oos_{part}": [[f"word{i} word7", "oos"] for i in range(4)] for part in ("train", "val", "test")}
    (folder / "clinc150" / "data_oos_plus.json").write_text(json.dumps(parts))
    tokenizer(folder / "tokenizer")
    return folder


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def recipe(folder, **changes):
    """A teacher of four layers, a student of two of them."""
    base = {
        "name": "texts",
        "data": {
            "dataset": {"use": "clinc150", "root": str(folder), "tokenizer": str(folder / "tokenizer"), "max_length": 12},
            "train_samples": 160,
            "batch_size": 16,
        },
        "teacher": {"model": "hf/bert", "pretrained": False, "config": BERT},
        "student": {
            "model": "hf/bert",
            "pretrained": False,
            "config": {**BERT, "num_hidden_layers": 2},
            "init": {"from": "teacher", "layers": [1, 3]},
        },
        "schedule": {"use": "offline"},
        "losses": [
            {"use": "cross_entropy"},
            {"use": "logit_kl", "temperature": 2},
            {"use": "hint", "layers": [{"student": f"{LAYER}.0", "teacher": f"{LAYER}.1"}]},
            {"use": "rkd_distance", "layers": [{"student": f"{LAYER}.1", "teacher": f"{LAYER}.3"}]},
        ],
        "train": {"epochs": 2, "optimizer": {"name": "adamw", "lr": 0.003}},
        "run": {"log_steps": 5, "folder": str(folder / "runs")},
    }
    return {**base, **changes}


def write(folder, name="recipe.yaml", **changes):
    path = folder / name
    path.write_text(yaml.safe_dump(recipe(folder, **changes), sort_keys=False))
    return path
