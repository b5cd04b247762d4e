"""What may differ between recipes that are compared, and what is told of the rest."""

import pytest
from training import PLAIN, write

from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.recipe.fairness import Unequal, differences, refuse_mixed, refuse_unequal, short, unequal

OTHER_KNOWLEDGE = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "seed": 4}


def loaded(folder, **variants):
    write(folder, PLAIN, "base.yaml")
    return {
        "base": recipe.load(folder / "base.yaml"),
        **{name: recipe.load(write(folder, {**PLAIN, "name": name}, f"{name}.yaml", **changes)) for name, changes in variants.items()},
    }


def test_variants_may_differ_in_knowledge(tmp_path):
    assert list(unequal(loaded(tmp_path, other=OTHER_KNOWLEDGE), "base")) == []


def test_variants_may_differ_in_bookkeeping(tmp_path):
    changes = {"run": {"folder": "elsewhere"}, "data": {"workers": 7}}
    assert list(unequal(loaded(tmp_path, other=changes), "base")) == []


@pytest.mark.parametrize(
    ("changes", "key", "value", "known"),
    [
        ({"train": {"epochs": 3}}, "train.epochs", 3, 2),
        ({"train": {"optimizer": {"lr": 0.5}}}, "train.optimizer.lr", 0.5, 0.05),
        ({"train": {"ema": {"decay": 0.5}}}, "train.ema", {"decay": 0.5, "warmup": False}, None),
        ({"data": {"batch_size": 4}}, "data.batch_size", 4, 8),
        ({"data": {"seed": 1}}, "data.seed", 1, 0),
        ({"data": {"dataset": {"train": 40}}}, "data.dataset.train", 40, 48),
        ({"student": {"args": {"channels": [4, 4, 8, 16]}}}, "student.args.channels.3", 16, 8),
        ({"student": {"input": {"grey": True, "size": 4}}}, "student.input", "grey, 4 x 4 (bilinear)", None),
    ],
)
def test_variants_may_not_differ_in_anything_else(tmp_path, changes, key, value, known):
    recipes = loaded(tmp_path, other=changes)
    assert list(unequal(recipes, "base")) == [Unequal("other", key, value, known)]
    assert list(unequal(recipes, "base", [key])) == []
    assert list(unequal(recipes, "base", [key.rpartition(".")[0]])) == []  # and what is below an allowed key
    assert list(unequal(recipes, "base", [f"{key}x", key[:-1]])) != []


def test_unequal_variants_are_told_with_every_key_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = loaded(
        tmp_path, longer={"train": {"epochs": 3}}, fine=OTHER_KNOWLEDGE, both={"train": {"epochs": 4}, "data": {"batch_size": 4}}
    )
    with pytest.raises(RecipeError) as caught:
        refuse_unequal(recipes, "base")
    *told, advice = str(caught.value).splitlines()

    def line(name, key):
        return 1 + next(i for i, text in enumerate((tmp_path / name).read_text().splitlines()) if text.strip().startswith(f"{key}:"))

    assert told == [
        f"longer.yaml:{line('longer.yaml', 'epochs')}: longer: train.epochs: 3 (base: 2)",
        f"both.yaml:{line('both.yaml', 'batch_size')}: both: data.batch_size: 4 (base: 8)",
        f"both.yaml:{line('both.yaml', 'epochs')}: both: train.epochs: 4 (base: 2)",
    ]
    assert "--allow train.epochs --allow data.batch_size" in advice
    refuse_unequal(recipes, "base", ["train.epochs", "data.batch_size"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "none"),
        (True, "true"),
        (1e-5, "1e-05"),
        ("a b", "a b"),
        ({"a": [1, None], "b": 2.5}, "{a: [1, null], b: 2.5}"),
        ("x" * 61, f"{'x' * 57}..."),
    ],
)
def test_values_are_told_as_recipes_write_them(value, words):
    assert short(value) == words


def test_keys_are_told_as_recipes_write_them(tmp_path):
    (tmp_path / "images.csv").write_text("path,a,b,split\n")
    data = {"dataset": {"use": "image_table", "train": str(tmp_path / "images.csv"), "class": "a"}, "image_size": 8, "batch_size": 8}
    recipes = {name: recipe.load(write(tmp_path, {**PLAIN, "data": data}, f"{name}.yaml")) for name in ("base", "other")}
    recipes["other"] = recipe.load(tmp_path / "other.yaml", {"data.dataset.class": "b"})
    assert list(unequal(recipes, "base")) == [Unequal("other", "data.dataset.class", "b", "a")]
    assert list(unequal(recipes, "base", ["data.dataset.class"])) == []


def test_a_table_is_of_one_task():
    refuse_mixed("task", {"a": "classification", "b": "classification"})
    with pytest.raises(RecipeError, match=r"^different tasks have no common table \(classification: a, c; regression: b\)$"):
        refuse_mixed("task", {"a": "classification", "b": "regression", "c": "classification"})


def test_differences_are_told_at_the_deepest_key():
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 2, "c": [1, 3]}, "e": 5}
    assert list(differences(old, new)) == [("a.b", 1, 2), ("a.c.1", 2, 3), ("d", 1, None), ("e", None, 5)]
    assert list(differences({"a": [1]}, {"a": [1, 2]})) == [("a", [1], [1, 2])]
    assert list(differences(old, old)) == []


def test_few_views_of_a_cache_are_another_augmentation(tmp_path):
    flipped = {"data": {"augment": {"flip": 0.5}}}
    write(tmp_path, PLAIN, "base.yaml")
    found = loaded(
        tmp_path, two={**flipped, "teacher": {"cache": {"views": 2}}}, all={**flipped, "teacher": {"cache": {"views": "all"}}}, live=flipped
    )
    assert [(one.variant, one.key, one.value) for one in unequal(found, "live", ["data"])] == [("two", "teacher.cache.views", 2)]
    assert not list(unequal(found, "live", ["data", "teacher.cache.views"]))
