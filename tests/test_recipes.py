"""Every recipe that comes with kdkit can be carried out, as far as that can be told without its data."""

import json
import re

import jsonschema
import pytest
from recipe_files import RECIPES, lay_out

from kdkit import recipe
from kdkit.recipe import registry, types
from kdkit.runs import checks
from kdkit.study import loading as study_file
from kdkit.study import plan as study_checks

EVERY = sorted(RECIPES.rglob("*.yaml"))
STUDIES = [path for path in EVERY if re.search(r"^(variants|tune|vary):", path.read_text(), re.MULTILINE)]
FILES = [path for path in EVERY if path not in STUDIES]
NAMES = [str(path.relative_to(RECIPES)) for path in FILES]
OFTEN = {"base", "alone", "fsp", "review", "crd"}


def planned(path):
    """A recipe or study as a parameter; the default run plans the small ones and what differs most between methods, .ci/run plans all."""
    large = (
        "search",
        "methods",
        "searched",
        "alpha",
        "semi",
        "compared",
        "robust",
        "discriminator",
    )  # studies of many candidates or networks
    small = path.relative_to(RECIPES).parts[0] in ("digits", "mnist") and path.stem not in large
    often = small or (path.parent.name == "resnet32x4-resnet8x4" and path.stem in OFTEN)
    return pytest.param(path, id=str(path.relative_to(RECIPES)), marks=[] if often else pytest.mark.slow)


def test_there_are_recipes_of_every_benchmark():
    assert {path.parent.name for path in FILES} >= {"digits", "mnist", "cifar100", "imagenet"}
    assert len(FILES) >= 12 and len(STUDIES) >= 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # where `make` and the guides run them: recipes may fetch data below the current folder
        yield lay_out(home)


@pytest.mark.parametrize("path", [planned(path) for path in STUDIES])
def test_a_study_compares_fairly_what_can_be_carried_out(path, folder):
    loaded = study_file.load([folder / path.relative_to(RECIPES)])
    lengths = study_checks.check(loaded)  # which refuses unequal and longer training
    assert list(lengths) == list(loaded.variants) and all(one.steps > 0 for one in lengths.values())


@pytest.mark.parametrize("path", [planned(path) for path in FILES])
def test_a_recipe_can_be_carried_out(path, folder):
    made = checks.make(recipe.load(folder / path.relative_to(RECIPES)))
    assert made.student.parameters > 0
    assert all(stage.steps > 0 for stage in made.stages)


@pytest.mark.parametrize("path", EVERY, ids=[str(path.relative_to(RECIPES)) for path in EVERY])
def test_a_recipe_says_what_it_shows_and_how_to_run_it(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert comments and path.read_text().startswith("# ")
    if path.stem != "base":
        command = "search" if path.stem == "search" else "compare" if path in STUDIES else "train"
        assert any(re.match(rf"#   kdkit {command} recipes/{re.escape(str(path.relative_to(RECIPES)))}\b", line) for line in comments)


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(json.loads(types.schema(registry.load())))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_an_editor_with_the_schema_accepts_a_recipe(path, validator):
    validator.validate(recipe.load(path, files=False).source.data)


def test_names_of_recipes_are_unique():
    names = [recipe.load(path, files=False).spec.name for path in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_recipe_may_be_tried_for_two_epochs(path, folder):
    recipe.load(folder / path.relative_to(RECIPES), {"train.epochs": 2})


@pytest.mark.parametrize("name", ["assistants", "born_again", "rco"])
def test_schedules_of_several_stages_can_be_carried_out_in_two_epochs(name, folder):
    made = checks.make(recipe.load(folder / "digits" / "schedules" / f"{name}.yaml", {"train.epochs": 2}))
    assert len(made.stages) > 1 and all(stage.steps > 0 for stage in made.stages)
