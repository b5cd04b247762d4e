"""YAML with positions, parents and overrides."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.contracts.options import Text
from kdkit.errors import RecipeError
from kdkit.recipe.yaml_source import Source, override_words, parse_overrides


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        ("-2.5e+2", -250.0),
        ("3", 3),
        ("0.1", 0.1),
        ("true", True),
        ("off", "off"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("null", None),
        ("a b", "a b"),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(tmp_path, text, value):
    data = Source(write(tmp_path / "a.yaml", f"key: {text}\n")).data
    assert data["key"] == value and type(data["key"]) in (type(value), Text)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_yaml_numbers_in_scientific_notation_are_numbers(number):
    word = f"{number:e}"
    assert math.isclose(parse_overrides([f"a={word}"])["a"], number, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: is given twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 2\n", 3, "b: is given twice (first on line 2)"),
        ("a: [1, {x: 1, x: 2}]\n", 1, "x: is given twice"),
        ("a: [1\n", 1, "what is opened here is not closed: a `]` or a `,` is missing"),
        ("- a\n", 1, "a recipe is a mapping of keys"),
        ("", 1, "a recipe is a mapping of keys"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "!!python/object/apply:os.getcwd: values have no tags here"),
        ("? [1, 2]\n: 3\n", 1, "a key is a word"),
        ("a: &x [1, *x]\n", 1, "contains itself"),
        ("extends: nowhere.yaml\n", 1, "extends: no such file: nowhere.yaml"),
        ("extends: [a.yaml]\n", 1, "extends: names one recipe file"),
    ],
)
def test_yaml_errors_have_file_and_line(tmp_path, text, line, says):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(RecipeError) as caught:
        Source(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_recipe_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        Source(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Source(tmp_path / "binary.yaml")


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    write(tmp_path / "base.yaml", "a: {x: 1, y: 2}\nl: [1, 2, 3]\nb: 1\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\na: {y: 3, z: 4}\nl: [9]\n")
    source = Source(child)
    assert source.data == {"a": {"x": 1, "y": 3, "z": 4}, "l": [9], "b": 1}
    assert source.where(["a", "x"]) == f"{tmp_path}/base.yaml:1"
    assert source.where(["a", "z"]) == f"{child}:2"
    assert source.where(["l", 0]) == f"{child}:3"


def test_extends_in_a_circle_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        Source(tmp_path / "a.yaml")


def test_yaml_strings_know_the_folder_of_their_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "here: a.txt\n")
    child = write(tmp_path / "sub" / "child.yaml", "extends: ../base.yaml\nthere: b.txt\n")
    monkeypatch.chdir(tmp_path)
    data = Source(child, {"mine": "c.txt"}).data
    assert data["here"].folder.resolve() == tmp_path
    assert data["there"].folder.resolve() == tmp_path / "sub"
    assert data["mine"].folder == tmp_path


RECIPE = "train: {epochs: 1}\nlosses:\n  - {use: ce}\n  - {use: kl, temperature: 4}\n  - {use: kl, name: late}\n"


def test_overrides(tmp_path):
    path = write(tmp_path / "r.yaml", RECIPE)
    words = ["train.epochs=3", "losses.1.temperature=2e0", "losses.ce.weight=0.5", "losses.late.temperature=1", "train.ema.decay=0.9"]
    source = Source(path, parse_overrides(words))
    assert source.data["train"] == {"epochs": 3, "ema": {"decay": 0.9}}
    assert source.data["losses"] == [
        {"use": "ce", "weight": 0.5},
        {"use": "kl", "temperature": 2.0},
        {"use": "kl", "name": "late", "temperature": 1},
    ]
    assert source.where(["train", "epochs"]) == "override"
    assert source.where(["losses", 1]) == f"{path}:4"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("losses.5.weight", "no item called '5' in a list of 3"),
        ("losses.kl.weight", "2 items called 'kl'"),
        ("losses.hint.weight", "no item called 'hint'"),
    ],
)
def test_an_override_that_leads_nowhere(tmp_path, key, says):
    path = write(tmp_path / "r.yaml", RECIPE.replace("name: late", "weight: 3"))
    with pytest.raises(RecipeError, match=f"override: {key}: .*{says}"):
        Source(path, {key: 1})


@pytest.mark.parametrize("word", ["epochs", "=3", "a=[1"])
def test_a_word_that_is_no_override_is_refused(word):
    with pytest.raises(RecipeError, match="override: "):
        parse_overrides([word])


def test_overrides_can_be_written_as_words():
    values = {"a.b": 1e-4, "c": "no", "d": [1, {"x": None}], "e": "data/x y", "f": True, "g": "true"}
    assert parse_overrides(override_words(values)) == values
    assert override_words(parse_overrides(["data.dataset.root=/images"])) == ["data.dataset.root=/images"]
