"""Language models: a row is a token, and students that write the texts they learn from."""

import json

import pytest
import torch
from kdkit_plugins.schedules.gkd import Gkd
from small_language import BERT, GPT, LLAMA, VOCABULARY, lay_out, network, recipe, write
from small_texts import tokenizer
from training import assert_same_run, stop_and_go_on, task, weights

import kdkit
from kdkit import recipe as recipes
from kdkit.cache.packing import KeptAnswers
from kdkit.contracts.model_source import CacheOptions
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Lesson
from kdkit.engine import objective
from kdkit.errors import KdkitError
from kdkit.models.build import build_model
from kdkit.recipe import registry
from kdkit.recipe.types import source_of
from kdkit.runs import checks
from kdkit.runs.run import Run
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun
from kdkit.study.lockstep import train_together

PLUGINS = registry.load()
LANGUAGE = task("language_model")
BETA, SHARE = 0.3, 0.1
K = 11
LENGTHS = torch.tensor([7, 4, 2, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("language"))


def some_texts(prompt=0):
    """Four texts, of which the last has no next token; the first tokens of each may be a prompt."""
    ids = torch.arange(28).view(4, 7) * 5 % K
    places = torch.arange(7)
    inputs = {"input_ids": ids, "attention_mask": (places < LENGTHS[:, None]).long()}
    if prompt:
        inputs["completion_mask"] = inputs["attention_mask"] * (places >= prompt)
    return Batch(inputs, torch.empty(4, 0, dtype=torch.int64), torch.arange(4) + 10)


def answer(seed, tokens=7):
    return Outputs(2 * torch.randn(4, tokens, K, generator=torch.Generator().manual_seed(seed)))


def kl(a, b):
    return (a * (a / b).log()).sum()


HAND = {
    "cross_entropy": ({}, lambda p, q, y: -p[y].log()),
    "logit_kl": ({"temperature": 1.0}, lambda p, q, y: kl(q, p)),
    "abkd": ({"alpha": 0.0, "beta": 1.0, "temperature": 1.0}, lambda p, q, y: kl(p, q)),
    "jsd": ({"beta": BETA}, lambda p, q, y: BETA * kl(q, (1 - BETA) * p + BETA * q) + (1 - BETA) * kl(p, (1 - BETA) * p + BETA * q)),
    "skewed_kl": ({"alpha": SHARE}, lambda p, q, y: kl(q, SHARE * q + (1 - SHARE) * p)),
    "skewed_kl, reverse": ({"alpha": SHARE, "direction": "reverse"}, lambda p, q, y: kl(p, SHARE * p + (1 - SHARE) * q)),
    "skewed_kl, plain": ({"alpha": 0.0, "direction": "reverse"}, lambda p, q, y: kl(p, q)),
}


@pytest.mark.parametrize("prompt", [0, 3])
def test_losses_are_their_formulas_on_each_token_that_counts(folder, prompt):
    losses = [{"use": case.split(",")[0], "name": f"loss{i}", **HAND[case][0]} for i, case in enumerate(HAND)]
    found = objective.build(recipes.load(write(folder, losses=losses)))
    student, teacher, batch = answer(0), answer(1), some_texts(prompt)
    told = found(Lesson(student, [teacher]), batch).terms
    p, q = student.logits.softmax(2), teacher.logits.softmax(2)
    places = [(i, n) for i in range(4) for n in range(max(1, prompt), int(LENGTHS[i]))]
    assert len(places) == (5 if prompt else 10)
    for i, (case, (_, by_hand)) in enumerate(HAND.items()):
        values = [by_hand(p[i, n - 1], q[i, n - 1], batch.inputs["input_ids"][i, n]) for i, n in places]
        torch.testing.assert_close(told[f"loss{i}"], torch.stack(values).mean(), msg=case)


def test_rows_are_the_next_tokens_that_count():
    batch = some_texts()
    longer = Outputs(torch.cat([answer(0).logits, torch.full((4, 2, K), torch.nan)], 1))  # as a cache answers
    for given in (answer(0), longer, Outputs(answer(0).logits[:, :6])):
        (rows,), asked = LANGUAGE.rows([given], batch)
        assert torch.equal(rows.logits, torch.cat([answer(0).logits[i, : n - 1] for i, n in enumerate(LENGTHS.tolist())]))
        assert asked.labels.tolist() == [int(batch.inputs["input_ids"][i, n]) for i in range(4) for n in range(1, int(LENGTHS[i]))]
        assert asked.index.tolist() == [10] * 6 + [11] * 3 + [12]


def test_several_teachers_are_one_by_the_mean_of_their_probabilities():
    both = LANGUAGE.combined([answer(0), answer(1)]).logits.softmax(2)
    torch.testing.assert_close(both, (answer(0).logits.softmax(2) + answer(1).logits.softmax(2)) / 2)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_largest_logits_are_those_of_a_row(axis):
    """Of tokens (B, N, K) as of pixels (B, K, H, W); a text that is shorter is filled up."""
    shape = (7, K) if axis == 2 else (K, 3, 2)
    kept = KeptAnswers(CacheOptions(views=1, top_k=3, dtype="fp32"), shape, logits=True, taps={}, axis=axis)
    given = answer(0, 5).logits if axis == 2 else torch.randn(4, *shape)
    packed = kept.pack(Outputs(given))
    assert {name: tuple(value.shape[1:]) for name, value in packed.items()} == {column.name: column.shape for column in kept.columns()}
    found = kept.unpack(packed, "teacher").logits.softmax(axis)
    p = given.softmax(axis)
    found = found[:, :5] if axis == 2 else found
    top = p >= p.topk(3, axis).values.amin(axis, keepdim=True)
    torch.testing.assert_close(found[top], p[top])
    torch.testing.assert_close(found.sum(axis), torch.ones_like(p.sum(axis)))
    rest = torch.where(top, 0, p).sum(axis, keepdim=True) / (K - 3)
    torch.testing.assert_close(found[~top], rest.expand_as(p)[~top])


# texts that a student writes


def built(config=GPT, **options):
    kind, name = source_of(network(config)["model"], PLUGINS.models)
    made = PLUGINS.models[kind](PLUGINS.models[kind].Options(**network(config), **options), name)
    torch.manual_seed(1)
    return build_model(made.options, made, VOCABULARY, kdkit.TextShape((14,))).module.eval()


class Reader(torch.nn.Module):
    """The same network without a memory of what it has read."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


@torch.no_grad()
def written(module, batch, **options):
    torch.manual_seed(0)
    return Gkd(Gkd.Options(**options)).written(module, batch)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt2", "llama"])
def test_a_student_writes_on_behind_each_prompt(config, marked):
    module, batch = built(config), some_texts(3 if marked else 0)
    made, again = (written(each, batch, prompt=3) for each in (module, Reader(module)))
    prompts = LENGTHS.clamp(max=3)
    places = torch.arange(7)
    given = places < prompts[:, None]
    ids, mask, own = (made.inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    assert torch.equal(ids[given], batch.inputs["input_ids"][given]) and bool((ids < VOCABULARY).all())
    assert torch.equal(mask.bool(), given | own.bool()) and not bool((given & own.bool()).any())
    assert torch.equal(ids, again.inputs["input_ids"]), "what is remembered gives the same tokens"
    assert made.labelled == 0 and own.sum() > 8 and torch.equal(made.index, batch.index)


def test_a_text_ends_where_the_network_ends_it():
    module, batch = built(), some_texts()
    module.lm_head = torch.nn.Linear(16, VOCABULARY)
    module.lm_head.bias.data.zero_()[1] = 1e4  # the end is certain
    made = written(module, batch, prompt=2)
    assert made.inputs["completion_mask"].tolist() == [[0, 0, 1, 0, 0, 0, 0]] * 3 + [[0, 1, 0, 0, 0, 0, 0]]
    assert (made.inputs["input_ids"] * made.inputs["completion_mask"]).sum(1).tolist() == [1, 1, 1, 1]
    module.config.eos_token_id = [3, 1]
    batch.inputs["input_ids"][:, :2] = 3  # a text that ends within the prompt is not written on, one that begins so is
    assert written(module, batch, prompt=2).inputs["completion_mask"].sum(1).tolist() == [0, 0, 0, 1]


def test_tokens_are_drawn_by_the_student_s_probabilities():
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            z = torch.tensor([1.0, 0.5, 0.0, -1.0]) * 2
            return z.expand(*input_ids.shape, 4)

    ids = torch.zeros(400, 26, dtype=torch.long)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, :0], torch.arange(400))
    drawn = written(Fixed(), batch, prompt=1, temperature=2.0).inputs["input_ids"][:, 1:]
    wanted = torch.tensor([1.0, 0.5, 0.0, -1.0]).softmax(0)
    assert torch.allclose(drawn.flatten().bincount(minlength=4) / drawn.numel(), wanted, atol=0.02)


def test_labels_teach_nothing_on_texts_that_the_student_wrote(folder):
    found = objective.build(recipes.load(write(folder)))
    batch = Batch(some_texts(2).inputs, some_texts().labels, torch.arange(4), labelled=0)
    value = found(Lesson(answer(0), [answer(1)]), batch)
    assert value.terms["cross_entropy"] == 0 and value.terms["jsd"] > 0


# runs


def trained(folder, name, **changes):
    return kdkit.train(write(folder, **changes), folder=folder / name, quiet=True)


GKD = {"schedule": {"use": "gkd", "prompt": 2, "on_policy": 0.5}}


@pytest.fixture(scope="module")
def run(folder):
    """Labels, responses, hidden states and relations together."""
    pair = [{"student": "transformer.h.0", "teacher": "transformer.h.1"}]
    losses = [{"use": "cross_entropy"}, {"use": "skewed_kl"}, *({"use": use, "layers": pair} for use in ("hint", "rkd_distance"))]
    return trained(folder, "run", losses=losses)


def test_a_language_model_learns_and_is_measured_by_token(folder, run):
    losses = [line["train"]["cross_entropy"] for line in LoadedRun(run.folder).folder.metrics("epoch")]
    assert losses[1] < losses[0]
    loaded = LoadedRun(run.folder)
    nlls, hits = [], []
    for batch in loaded.data().test:
        with torch.no_grad():
            logits = loaded.student()(batch.inputs).logits
        for z, ids, mask in zip(logits, batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
            for n in range(1, int(mask.sum())):
                nlls.append(-z[n - 1].log_softmax(0)[ids[n]])
                hits.append(float(z[n - 1].argmax() == ids[n]))
    nll = torch.stack(nlls).mean()
    assert run.test["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert run.test["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-5)
    assert run.test["top1"] == pytest.approx(100 * sum(hits) / len(hits))
    assert 0 <= run.test["agreement"] <= 100


def test_a_student_that_writes_goes_on_with_the_same_bits(folder, monkeypatch):
    path = write(folder, **GKD, run={"checkpoint_steps": 2})
    kdkit.train(path, folder=folder / "whole", quiet=True)
    stop_and_go_on(path, folder / "parts", monkeypatch, steps=5)
    assert_same_run(folder / "whole", folder / "parts")


def test_side_by_side_each_ends_with_the_bits_that_it_has_alone(folder):
    variants = {"divergence": {"losses": [{"use": "jsd"}]}, "own": {**GKD, "losses": [{"use": "jsd"}]}}
    runs = [Run(recipes.load(write(folder, f"{name}.yaml", **own)), folder / "together" / name) for name, own in variants.items()]
    assert all(outcome.reason is None for outcome in train_together(runs))
    for name in variants:
        kdkit.train(folder / f"{name}.yaml", folder=folder / "alone" / name, quiet=True)
        assert_same_run(folder / "alone" / name, folder / "together" / name)


@pytest.mark.parametrize("texts", ["blocks", "lines"])
def test_a_cache_answers_as_the_teacher_does(folder, texts):
    """To blocks in the same bits; a line has another padding in the cache."""
    teacher = recipe(folder)["teacher"]
    data = {"dataset": {"texts": texts}}
    live = trained(folder, f"live_{texts}", data=data)
    kept = trained(folder, f"kept_{texts}", data=data, teacher={**teacher, "cache": {"views": "all", "dtype": "fp32"}})
    one, other = weights(live.folder), weights(kept.folder)
    exact = texts == "blocks"
    assert all(torch.equal(value, other[name]) if exact else torch.allclose(value, other[name], atol=1e-3) for name, value in one.items())


REFUSED = {
    "a head for classes": ({"student": {**network({**GPT, "pad_token_id": 0}), "head": "classes"}}, "gives (4, 259) for 4 samples, and task 'language_model' asks for the form of (4, 14, 259)"),
    "a cache of texts to come": ({**GKD, "teacher": {**network(), "cache": {"views": "all"}}}, "stage 'distill' makes batches of its own, which caches do not keep; leave `cache` out"),
    "more texts than a network reads": ({"student": network({**GPT, "n_positions": 8})}, "reads 8 tokens at most, and texts have up to 14"),
    "fewer tokens than the tokenizer's": ({"student": network({**GPT, "vocab_size": 100})}, "gives (4, 14, 100) for 4 samples"),
    "a network that sees the next token": ({"student": network(BERT)}, "config: bert sees the tokens that it is to say; `is_decoder: true` hides them"),
    "frequencies of classes": ({"losses": [{"use": "cross_entropy", "class_weights": "balanced"}]}, "needs the labels of all training samples"),
    "a task of classes": ({"task": "text_classification", "student": {**network(), "head": "classes"}, **GKD}, "gkd"),
    "classes that nobody gave": ({"task": "text_classification", "student": {**network({**GPT, "pad_token_id": 0}), "head": "classes"}, "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}, "labels"),
    "nothing to write": ({"schedule": {"use": "gkd", "prompt": 14}}, "prompt: 14 tokens are given, and texts have 14 at most"),
    "no text": ({"data": {"dataset": {"train": "empty.txt"}}}, "empty.txt: has no text"),
    "too short": ({"data": {"dataset": {"train": "short.txt", "texts": "blocks"}}}, "short.txt: has 4 tokens, fewer than the 14 of a block (`max_length`)"),
    "no file": ({"data": {"dataset": {"train": "none.txt"}}}, "none.txt"),
    "no tokenizer": ({"data": {"dataset": {"tokenizer": "./nowhere"}}}, "does not say how many token ids there are|there is no folder"),
}  # fmt: skip


def test_a_line_is_what_an_editor_calls_one(folder):
    (folder / "lines.txt").write_text("\ufeffab\u2028c\x0cd\n\n \nef", encoding="utf-8")
    texts = recipes.load(write(folder, data={"dataset": {"train": "lines.txt"}})).dataset().split("train")
    own = [[byte + 3 for byte in line.encode()] + [1] for line in ("ab\u2028c\x0cd", "ef")]
    assert [list(ids) for ids in texts.tokens["input_ids"]] == own


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_in_one_line(folder, case):
    changes, says = REFUSED[case]
    (folder / "empty.txt").write_text("\n")
    (folder / "short.txt").write_text("abc")
    with pytest.raises(KdkitError) as told:
        checks.make(recipes.load(write(folder, **changes)))
    assert any(words in str(told.value) for words in says.split("|")) and len(str(told.value).splitlines()) == 1, told.value


def test_a_teacher_with_another_tokenizer_is_refused(folder):
    alone = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "train": {"epochs": 1}}
    tokenizer(folder / "tokenizer")
    padded = network({**GPT, "vocab_size": VOCABULARY})
    trained(folder, "words", **alone, student=padded, data={"dataset": {"tokenizer": str(folder / "tokenizer")}})
    teacher = {**padded, "checkpoint": str(folder / "words" / "student.safetensors")}
    with pytest.raises(KdkitError, match="has another tokenizer than the data"):
        checks.make(recipes.load(write(folder, teacher=teacher)))


def test_transformers_loads_and_continues_the_exported_student(folder, run):
    from transformers import AutoModelForCausalLM

    made = export(LoadedRun(run.folder), folder=folder / "exported")
    module = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    ids = {"input_ids": torch.tensor([[100, 101, 102]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        found = module(**ids).logits
        for ours in (LoadedRun(run.folder).student(), kdkit.load_student(folder / "exported")):
            assert torch.allclose(found, ours(ids).logits, atol=1e-6)
    assert module.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 3
    assert "AutoModelForCausalLM.from_pretrained" in made.notes[0]
    assert json.loads((folder / "exported" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_ids_beyond_the_tokenizer_s_are_left_out():
    wider = built({**GPT, "vocab_size": VOCABULARY + 5})
    assert wider(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, VOCABULARY)
