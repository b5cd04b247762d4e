"""Small texts of which a byte follows from those before it, and recipes of language models for them."""

import pytest
import torch
import yaml
from training import merged

pytest.importorskip("transformers")

STILL = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 1}
GPT = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, **STILL}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = 259


def network(config=GPT):
    return {"model": f"hf/{config['model_type']}", "pretrained": False, "head": "language_model", "config": config}


def lay_out(folder):
    """train.txt and test.txt: words of letters in a row, such as `cdefg`, one or two a line."""
    draw = torch.Generator().manual_seed(0)

    def word():
        first, count = (int(torch.randint(high, (), generator=draw)) for high in (20, 5))
        return "".join(chr(97 + first + i) for i in range(2 + count))

    for part, count in (("train", 48), ("test", 12)):
        lines = [" ".join(word() for _ in range(1 + i % 2)) for i in range(count)]
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def recipe(folder, **changes):
    base = {
        "name": "language",
        "task": "language_model",
        "data": {
            "dataset": {
                "use": "text_files",
                "train": str(folder / "train.txt"),
                "test": str(folder / "test.txt"),
                "texts": "lines",
                "tokenizer": "bytes",
                "max_length": 14,
            },
            "batch_size": 8,
        },
        "teacher": network({**GPT, "n_embd": 24}),
        "student": network(),
        "schedule": {"use": "offline"},
        "losses": [{"use": "cross_entropy"}, {"use": "jsd"}],
        "train": {"epochs": 2, "optimizer": {"name": "adamw", "lr": 0.01}},
        "run": {"log_steps": 1, "folder": str(folder / "runs")},
    }
    made = merged(base, changes)
    # a network of another kind has no key of this one's
    return {**made, **{key: changes[key] for key in ("student", "teacher", "losses", "schedule") if key in changes}}


def write(folder, name="recipe.yaml", **changes):
    path = folder / name
    path.write_text(yaml.safe_dump(recipe(folder, **changes), sort_keys=False))
    return path
