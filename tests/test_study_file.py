"""Study files: what they expand to, and what is told of what is wrong."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from training import write as write_recipe

from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.recipe import registry
from kdkit.recipe.yaml_source import Source
from kdkit.study import loading as study_file
from kdkit.study import spec as study_schema
from kdkit.study import variants
from kdkit.study.finder import about

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

BASE = {
    "name": "base",
    "data": {"dataset": {"use": "synthetic", "image_size": 8, "train": 48, "test": 20, "num_classes": 6}, "batch_size": 8},
    "student": {"model": "mlp/8"},
    "teacher": {"model": "mlp/16"},
    "schedule": {"use": "offline"},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 4}],
    "train": {"epochs": 1, "optimizer": {"lr": 0.1}},
}
STUDY = """\
name: knowledge
question: Which knowledge helps?
base: base.yaml
baseline: alone
variants:
  response:
  alone: {teacher: null, schedule: {use: supervised}, losses: [{use: cross_entropy}]}
  both:
    losses: [{use: logit_kl}, {use: dkd, beta: 2}]
vary:
  losses.logit_kl.weight: [0, 0.5]
seeds: [3, 1]
allow: [train.epochs]
"""


@pytest.fixture
def study(tmp_path):
    write_recipe(tmp_path, BASE, "base.yaml")

    def load(text=STUDY, *changes, **options):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "s.yaml").write_text(text)
        return study_file.load([tmp_path / "s.yaml"], **options)

    return load


def weights(found, variant):
    return [entry.weight for entry in found.variants[variant].spec.losses]


def test_variants_over_a_grid(study):
    found = study()
    assert list(found.variants) == [
        "response, weight 0", "response, weight 0.5", "alone", "both, weight 0", "both, weight 0.5",
    ]  # fmt: skip
    assert weights(found, "response, weight 0.5") == [1, 0.5] and weights(found, "both, weight 0") == [0, 1]
    assert found.variants["response, weight 0"].spec.losses[1].temperature == 4  # the base's
    assert found.variants["alone"].spec.teacher is None
    assert found.baseline == "alone" and found.seeds == (3, 1) and found.question == "Which knowledge helps?"
    assert found.allow == ("train.epochs", "losses.logit_kl.weight")
    assert found.recipe("alone", 3).spec.seed == 3 and found.recipe("alone", 3).fingerprint != found.recipe("alone", 1).fingerprint


def test_names_of_folders_are_safe_and_unique():
    called = variants.safe(["a, b 0.5", "a b 0.5", "../x", "é", "a-b-0.5-2"])
    assert list(called.values()) == ["a-b-0.5", "a-b-0.5-2", "x", "variant", "a-b-0.5-2-2"]


def test_a_grid_of_two_keys_is_their_product(study):
    found = study(STUDY, ("[0, 0.5]", "[0, 0.5]\n  losses.logit_kl.temperature: [1, 2, 3]"))
    assert len(found.variants) == 1 + 2 * 6
    assert "both, weight 0.5, temperature 3" in found.variants


def test_the_base_alone_is_varied(study):
    found = study("name: s\nbase: base.yaml\nvary: {train.optimizer.lr: [0.1, 1e-2], schedule: [{use: offline}]}\n")
    assert list(found.variants) == ["lr 0.1, schedule offline", "lr 0.01, schedule offline"]
    assert found.baseline == "lr 0.1, schedule offline" and found.seeds == (0, 1, 2)
    assert [one.spec.train.optimizer.lr for one in found.variants.values()] == [0.1, 0.01]


def test_the_baseline_may_be_a_variant_that_is_varied(study):
    assert study(STUDY, ("baseline: alone", "baseline: both")).baseline == "both, weight 0"


def test_a_base_written_out_and_a_variant_of_another_file(study, tmp_path):
    (tmp_path / "sub").mkdir()
    write_recipe(tmp_path / "sub", {**BASE, "train": {"epochs": 7, "optimizer": {"lr": 0.3}}}, "other.yaml")
    found = study(
        "name: s\nbase: {extends: base.yaml, train: {epochs: 2}}\n"
        "variants:\n  one: {}\n  two: {recipe: sub/other.yaml, train: {optimizer: {lr: 0.2}}}\n"
    )
    one, two = (found.variants[name].spec.train for name in ("one", "two"))
    assert (one.epochs, one.optimizer.lr) == (2, 0.1) and (two.epochs, two.optimizer.lr) == (7, 0.2)


def test_overrides_reach_all_variants(study, tmp_path):
    found = study(overrides={"train.epochs": 9, "run.folder": "elsewhere"}, seeds=2, allow=["data"])
    assert {one.spec.train.epochs for one in found.variants.values()} == {9}
    assert found.seeds == (0, 1) and found.allow[-1] == "data"
    assert str(found.path) == "elsewhere/knowledge"
    assert str(study(STUDY + "folder: here\n").path) == "here/knowledge"


def test_what_is_written_down_repeats_the_study(study, tmp_path):
    found = study(STUDY, overrides={"train.epochs": 4})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "study.yaml").write_text(found.dump())
    again = study_file.load([tmp_path / "elsewhere" / "study.yaml"])
    assert {name: again.recipe(name, 3).fingerprint for name in again.variants} == {
        name: found.recipe(name, 3).fingerprint for name in found.variants
    }
    assert (again.name, again.baseline, again.seeds, again.allow, again.path) == (
        found.name, found.baseline, found.seeds, found.allow, found.path,
    )  # fmt: skip


def test_aliases_in_a_study_do_not_tie_variants_together(study):
    found = study(
        "name: s\nbase: base.yaml\nvariants:\n  a: {losses: &l [{use: cross_entropy}, {use: logit_kl}]}\n  b: {losses: *l}\n"
        "vary: {losses.logit_kl.weight: [0, 2]}\n"
    )
    assert [weights(found, name)[1] for name in found.variants] == [0, 2, 0, 2]


BAD = {  # what is replaced, by what; the line; what is told
    "key": ("question:", "qestion:", "s.yaml:2: qestion: no such key; did you mean 'question'?"),
    "base": ("base: base.yaml", "base: bose.yaml", "s.yaml:3: base: no such file: "),
    "baseline": ("baseline: alone", "baseline: alne", "s.yaml:4: baseline: there is no variant 'alne'; did you mean 'alone'?"),
    "variant": ("[{use: cross_entropy}]", "[{use: cross_entrpy}]", "s.yaml:7: losses.0.use: unknown 'cross_entrpy'; did you mean"),
    "teacher": ("  alone:", "  teacher:", "s.yaml:7: variants.teacher: is the name of the teacher's row; give the variant another"),
    "recipe": ("response:", "response: {recipe: no.yaml}", "s.yaml:6: variants.response.recipe: no such file: no.yaml"),
    "grid": ("[0, 0.5]", "[0, -1]", "s.yaml:11: losses.1.weight: input should be greater than or equal to 0, got -1"),
    "grid key": ("logit_kl.weight:", "logit_kl.wieght:", "s.yaml:11: vary.losses.logit_kl.wieght: no variant has this key"),
    "grid twice": ("[0, 0.5]", "[0.5, 5e-1]", "s.yaml:11: vary.losses.logit_kl.weight: a value is given twice"),
    "no grid": ("[0, 0.5]", "0.5", "s.yaml:11: vary.losses.logit_kl.weight: needs a list, such as [a, b], got 0.5"),
    "seed": ("losses.logit_kl.weight: [0, 0.5]", "seed: [0, 1]", "s.yaml:11: vary.seed: the seeds of a study are its `seeds:`"),
    "seeds": ("[3, 1]", "[3, 3]", "s.yaml:12: seeds: a seed is given twice"),
    "no validation": (
        "seeds:",
        "tune: {train.epochs: [1, 2]}\nseeds:",
        "s.yaml:12: tune: the search chooses on validation data; set `data.validation`",
    ),
    "tune key": (
        "seeds:",
        "tune: {losses.logit_kl.temperature: [1, 2]}\nseeds:",
        "s.yaml:12: tune.losses.logit_kl.temperature: every variant needs this key, or some would be searched more than others (variant alone)",
    ),
    "tune twice": (
        "seeds:",
        "tune: {losses.logit_kl.weight: [1]}\nseeds:",
        "s.yaml:12: tune.losses.logit_kl.weight: is what the study varies",
    ),
    "tune seed": ("seeds:", "tune: {seed: [1]}\nseeds:", "s.yaml:12: tune.seed: the seeds of a study are its `seeds:`"),
    "tune seeds": ("seeds:", "tune_seeds: [3]\nseeds:", "s.yaml:12: tune_seeds: 3 is one of the study's own seeds; runs that choose"),
    "long search": (
        "seeds:",
        f"tune: {{train.epochs: {list(range(1, 202))}}}\nseeds:",
        "s.yaml:12: tune: makes 1,005 points, those of all variants together, more than 1,000",
    ),
    "no seeds": ("[3, 1]", "0", "s.yaml:12: seeds: input should be greater than 0, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_has_its_place(study, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    old, new, says = BAD[case]
    with pytest.raises(RecipeError) as caught:
        study(STUDY, (old, new))
    assert any(line.startswith(says) for line in str(caught.value).splitlines()), caught.value


def test_problems_of_all_variants_are_told_at_once(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        study(STUDY, ("use: supervised", "use: supervized"), ("beta: 2", "betta: 2"))
    told = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in told] == ["s.yaml:7", "s.yaml:9"]
    assert told[0].endswith("(variant alone)") and told[1].endswith("(variant both)")


def test_a_problem_of_the_base_is_told_once(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, BASE, "worse.yaml", train={"epochs": -1})
    with pytest.raises(RecipeError) as caught:
        study(STUDY, ("base.yaml", "worse.yaml"))
    line = 1 + (tmp_path / "worse.yaml").read_text().splitlines().index("  epochs: -1")
    assert str(caught.value) == f"worse.yaml:{line}: train.epochs: input should be greater than 0, got -1"


def test_an_override_of_what_is_varied_is_refused(study):
    with pytest.raises(RecipeError, match="override: losses.logit_kl.weight: is what the study varies"):
        study(overrides={"losses.logit_kl.weight": 2})


def test_an_override_of_what_is_tuned_is_refused(study):
    with pytest.raises(RecipeError, match=r"override: train\.epochs: is what the study tunes"):
        study("name: s\nbase: base.yaml\ntune: {train.epochs: [1, 2]}\n", overrides={"train.epochs": 3})


def test_recipes_instead_of_a_study(tmp_path):
    one, two = write_recipe(tmp_path, BASE, "one.yaml"), write_recipe(tmp_path, BASE, "two.yaml", losses=[{"use": "logit_kl"}])
    three = write_recipe(tmp_path, {**BASE, "name": "third"}, "three.yaml")
    found = study_file.load([one, two, three], {"train.epochs": 5}, seeds=4)
    assert list(found.variants) == ["base", "base, two", "third"] and found.baseline == "base"
    assert [one.spec.name for one in found.variants.values()] == ["base", "base-two", "third"]
    (called,) = study_file.load([write_recipe(tmp_path, {**BASE, "name": "teacher"}, "four.yaml")]).variants
    assert called == "teacher, four"  # `teacher` is the teacher's row
    assert found.name == "base-base-two-third" and found.seeds == (0, 1, 2, 3)
    assert {one.spec.train.epochs for one in found.variants.values()} == {5}


def test_a_schedule_is_told_in_the_words_of_its_recipe(tmp_path):
    schedule = {"use": "mutual", "peers": [{"model": "mlp/8", "input": {"grey": True}}]}
    path = write_recipe(tmp_path, {**BASE, "teacher": None, "schedule": schedule, "losses": [{"use": "cross_entropy"}]}, "mutual.yaml")
    assert about(recipe.load(path)) == "1 * cross_entropy; schedule mutual peers [{model: mlp/8, input: {grey: true}}]"


def test_a_study_is_compared_by_itself(study, tmp_path):
    study()
    with pytest.raises(RecipeError, match="is a study, which is compared by itself"):
        study_file.load([tmp_path / "base.yaml", tmp_path / "s.yaml"])
    with pytest.raises(RecipeError, match="name a study file, or recipes"):
        study_file.load([])


def test_a_study_dumps_as_plain_yaml(study):
    assert set(yaml.safe_load(study().dump())) == {"name", "question", "baseline", "folder", "seeds", "allow", "show", "variants"}


def test_the_schema_is_fresh():
    assert (RECIPES / "study.schema.json").read_text() == study_schema.schema(registry.load()), "run `make docs`"


def test_an_editor_with_the_schema_tells_good_from_bad(tmp_path):
    validator = jsonschema.Draft202012Validator(json.loads(study_schema.schema(registry.load())))
    (tmp_path / "s.yaml").write_text(STUDY.replace("both:\n", "both:\n    train: {epochs: 3}\n"))
    studies = [path for path in RECIPES.rglob("*.yaml") if "variants" in Source(path).data]
    for path in [tmp_path / "s.yaml", *studies]:
        validator.validate(Source(path).data)
    for old, new in (("beta: 2", "betta: 2"), ("question", "qestion"), ("[3, 1]", "0"), ("use: supervised", "use: supervized")):
        (tmp_path / "bad.yaml").write_text(STUDY.replace(old, new))
        assert not validator.is_valid(Source(tmp_path / "bad.yaml").data), new
