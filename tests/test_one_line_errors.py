"""Whatever is handed to a recipe, a study or an override: it is taken, or refused in one line for each problem, soon."""

import re
import time

import pytest

from kdkit import recipe
from kdkit.errors import KdkitError, RecipeError
from kdkit.recipe.yaml_source import Source, parse_overrides
from kdkit.runs import checks
from kdkit.study import loading

RECIPE = """\
name: NAME
seed: 0
data: {dataset: {use: synthetic, image_size: 8, train: 24, test: 8, num_classes: 3}, batch_size: 8}
student: {model: mlp/8}
teacher: {model: mlp/8}
schedule: {use: offline}
losses:
  - {use: cross_entropy}
  - {use: logit_kl, temperature: 4}
train: {epochs: 1, optimizer: {lr: 0.1, args: {}}}
"""
ALONE = (
    RECIPE.replace("teacher: {model: mlp/8}\n", "").replace("offline", "supervised").replace("  - {use: logit_kl, temperature: 4}\n", "")
)
DEEP = "[" * 1000 + "]" * 1000
DOUBLING = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 21))
LONG = "9" * 5000

SCALARS = {  # of an override, or in a file: what the key says, and what is told of it (None: it is taken)
    "date": ("name", "2024-02-30", None),
    "a day in a list": ("run.trackers", "[2024-02-30]", None),
    "empty int": ("seed", "!!int ''", "!!int: values have no tags here"),
    "no bool": ("seed", "!!bool maybe", "!!bool: values have no tags here"),
    "no time": ("name", "!!timestamp x", "!!timestamp: values have no tags here"),
    "binary": ("train.optimizer.args", "{x: !!binary aGk=}", "!!binary: values have no tags here"),
    "set": ("train.optimizer.args", "!!set {a, b}", "!!set: values have no tags here"),
    "python": ("name", "!!python/name:os.system ''", "!!python/name:os.system: values have no tags here"),
    "5,000 digits": ("seed", LONG, "is too large, or is no number"),
    "5,000 digits behind a point": ("train.optimizer.lr", f"0.{LONG}", None),
    "a number without digits": ("seed", "0x_", "is too large, or is no number"),
    "text of 5,000 digits": ("seed", f"'{LONG}'", "seed: "),
    "a large float": ("seed", "1e300", "seed: "),
    "no number": ("losses.0.weight", ".nan", "losses.0.weight: "),
    "no number as text": ("losses.0.weight", "'nan'", "losses.0.weight: "),
    "NUL": ("plugins", '["a\\0b"]', "holds \\x00, a control character"),
    "half a character": ("name", '"\\ud800"', "holds \\ud800, a control character"),
    "no character": ("name", '"\\U99999999"', "means nothing"),
    "no user": ("teacher.checkpoint", "~nosuchuser/x", "teacher.checkpoint: '~nosuchuser/x' is no path"),
    "plugin of no user": ("plugins", "[~nosuchuser/x]", "plugins.0: '~nosuchuser/x' is no path"),
    "a large image": ("data.image_size", "1000000000", "data.image_size: input should be less than or equal to 4096"),
    "a large batch": ("data.eval_batch_size", "9" * 30, "data.eval_batch_size: "),
    "a long name": ("name", "n" * 300, "name: string should have at most 200 characters"),
    "a long file name": ("teacher.checkpoint", "n" * 5000, "teacher.checkpoint: the name of a file has 255 bytes at most"),
    "a long plugin name": ("plugins", f"[{'n' * 5000}]", "plugins.0: the name of a file has 255 bytes at most"),
    "a long folder": ("run.folder", "n" * 5000, "run.folder: the name of a file has 255 bytes at most"),
    "a long loss": ("losses.0.use", "n" * 5000, "losses.0.use: unknown 'nnn"),
    "200 kB": ("losses.0.weight", f"[{'abc, ' * 40_000}]", "losses.0.weight: "),
    "line end in a key": ("train.optimizer.args", '{"a\\nb": 1}', None),
    "line end in a wrong key": ("train.optimizer", '{"a\\nb": 1}', "train.optimizer.a\\nb: no such key"),
    "line end in a value": ("losses.0.use", '"a\\nb"', "losses.0.use: unknown 'a\\nb'"),
    "escape": ("name", '"\\e[31m"', "holds \\x1b, a control character"),
    "turned round": ("losses.0.use", '"\\u202Eabc"', "unknown '\\u202eabc'"),
    "deep": ("train.optimizer.args", DEEP, "lists and mappings are more than 32 deep"),
    "deep mapping": ("train.optimizer.args", "{a: " * 100 + "1" + "}" * 100, "lists and mappings are more than 32 deep"),
    "a large network": ("teacher.model", "mlp/99999999999999999999", "is no list of hidden sizes, each below a million"),
    "itself": ("train.optimizer.args", "&x {a: *x}", "contains itself"),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.yaml"):
        (tmp_path / name).write_text(text.replace("NAME", name.partition(".")[0]))
        return tmp_path / name

    return write


def refused(call, *args, seconds=20, **options):
    """The lines of the error that a call ends with."""
    begin = time.process_time()
    with pytest.raises(KdkitError) as caught:
        call(*args, **options)
    assert time.process_time() - begin < seconds
    lines = str(caught.value).split("\n")
    for line in lines:
        assert line.isprintable() and len(line) <= 2000 and re.match(r"override: |.*\.yaml:\d+: |.*\.yaml: |allow: ", line), line[:300]
    return lines


@pytest.mark.parametrize("case", SCALARS)
def test_a_wrong_override_is_one_line(write, case):
    key, value, says = SCALARS[case]
    path = write(RECIPE)

    def load():
        return checks.make(recipe.load(path, parse_overrides([f"{key}={value}"])))

    if says is None:
        recipe.load(path, parse_overrides([f"{key}={value}"]))
    else:
        told = refused(load)
        assert any(line.startswith("override: ") and says in line for line in told), told


@pytest.mark.parametrize("case", SCALARS)
def test_a_wrong_value_in_a_file_is_one_line(write, case):
    key, value, says = SCALARS[case]
    last, *above = reversed(key.split("."))
    tree = f"{last}: {value}"
    for step in above:
        tree = f"{step}: {{{tree}}}"
    if key.startswith("losses."):
        tree = f"losses: [{{{last}: {value}}}]" if last == "use" else f"losses: [{{use: cross_entropy, {last}: {value}}}]"
    write(RECIPE, "base.yaml")
    path = write(f"extends: base.yaml\n{tree}\n")
    if says is None:
        recipe.load(path)
    else:
        told = refused(lambda: checks.make(recipe.load(path)))
        assert any(line.startswith((f"{path}:2: ", f"{path}: ")) and says in line for line in told), told


FILES = {
    "a set": ("!!set {a, b}\n", 1, "!!set: values have no tags here"),
    "a date as a key": ("2024-02-30: x\n", 1, "2024-02-30: no such key"),
    "a key twice, written otherwise": ("'name': a\nname: b\n", 2, "name: is given twice (first on line 1)"),
    "deep": (f"a: {DEEP}\n", 1, "lists and mappings are more than 32 deep"),
    "deep by aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 1000)), 32, "more than 32 deep"),
    "doubling": (DOUBLING, 15, "more than 50,000 values"),
    "many values": ("a: [" + "1, " * 60_000 + "]\n", 1, "more than 50,000 values"),
    "a merge of itself": ("a: &x {<<: *x}\n", 1, "contains itself"),
    "a merge of a word": ("<<: x\n", 1, "<<: takes a mapping"),
    "a second document": ("name: a\n---\nname: b\n", 2, "a second document (`---`) begins"),
    "a tab": ("data:\n\tdataset: x\n", 2, "a tab, which cannot indent YAML: use spaces"),
    "indented less": ("data:\n    a: 1\n  b: 2\n", 3, "is indented otherwise than what it belongs to, which begins on line 1"),
    "indented more": ("data:\n  a: 1\n    b: 2\n", 3, "a `:` where none can be: is the line above no `key: value`, or this one indented too far"),
    "a star": ("plugins: [*.py]\n", 1, "begins with a character that has a meaning in YAML: write text in quotes"),
    "an at": ("name: @home\n", 1, "begins with a character that has a meaning in YAML: write text in quotes"),
    "an open quote": ("seed: 1\nname: 'a\nlosses: []\n", 2, "what is opened here is not closed: a quote is missing"),
    "an open bracket": ("losses: [\n  a,\nname: b\n", 1, "what is opened here is not closed: a `]` or a `,` is missing"),
    "no colon": ("name a\nseed: 1\n", 2, "a `:` where none can be: is the line above no `key: value`"),
    "a control character": ("seed: 1\nname: a\x1bb\n", 2, "holds '\\x1b', a character that no text file has"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_recipe_is_one_line(write, case):
    text, line, says = FILES[case]
    path = write(text)
    told = refused(recipe.load, path)
    assert any(one.startswith(f"{path}:{line}: ") and says in one for one in told), told


def test_a_recipe_file_that_is_too_large_is_not_read(write):
    assert "is larger than 1,000,000 bytes" in refused(recipe.load, write("# " + "x" * 2_000_000))[0]


def test_values_of_a_script_that_no_recipe_can_hold(write):
    path, own = write(RECIPE), []
    own.append(own)
    for value in (object(), own, b"bytes", {1, 2}):
        assert refused(recipe.load, path, {"train.optimizer.args": value})[0].startswith("override: train.optimizer.args: ")
    refused(recipe.load, path, {"a." * 2000 + "b": 1})


def test_a_chain_of_extends_has_an_end(write, tmp_path):
    for i in range(1500):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    assert "extends a file that extends another, and so on, more than 20 times" in refused(recipe.load, tmp_path / "0.yaml")[0]


@pytest.mark.parametrize(("forks", "depth"), [(2, 14), (1, 300)])
def test_teachers_of_teachers_have_an_end(write, forks, depth):
    write(ALONE, f"r{depth}.yaml")
    for i in range(depth):
        write(RECIPE.replace("teacher: {model: mlp/8}", f"teachers: [{', '.join([f'{{recipe: r{i + 1}.yaml}}'] * forks)}]"), f"r{i}.yaml")
    path = write("extends: r0.yaml\n")
    count = {2: 16_383, 1: 65}[forks]  # of a long chain, no more are looked at
    assert f"r1.yaml, its teachers and theirs are {count} recipes, more than 64" in refused(recipe.load, path)[0]


def test_a_few_teachers_of_teachers_are_fine(write):
    write(ALONE, "r2.yaml")
    for i in range(2):
        write(
            RECIPE.replace("teacher: {model: mlp/8}", f"teachers: [{{recipe: r{i + 1}.yaml}}, {{recipe: r{i + 1}.yaml, seed: 7}}]"),
            f"r{i}.yaml",
        )
    assert len(checks.make(recipe.load(write("extends: r0.yaml\n"))).teachers) == 2


STUDIES = {
    "many seeds": ("seeds: 100000000000\nvariants: {a: {}}", "seeds: "),
    "10^4 points": ("variants: {a: {}}\nvary: {train.optimizer.lr: [LIST], seed_: [1], losses.0.weight: [LIST]}", "seed_: no variant has this key"),
    "10^4 points, all keys known": ("variants: {a: {}}\nvary: {train.optimizer.lr: [LIST], losses.0.weight: [LIST]}", "vary: makes 10,000 variants, more than 1,000"),
    "10^9 points": ("variants: {a: {}}\nvary: {train.optimizer.lr: [LIST], losses.0.weight: [LIST], losses.1.weight: [LIST], losses.1.temperature: [LIST], train.optimizer.momentum: [0]}", "vary: makes 100,000,000 variants, more than 1,000"),
    "a date": ("seeds: 2024-02-30\nvariants: {a: {}}", "seeds: "),
    "a long name": (f"variants: {{a: {{recipe: {'n' * 5000}}}}}", "variants.a.recipe: the name of a file has 255 bytes at most"),
    "no user": ("variants: {a: {recipe: ~nosuchuser/x}}", "variants.a.recipe: '~nosuchuser/x' is no path"),
    "a line end in a variant": ('variants: {b: {}, "a\\nb": {losses: 3}}', "(variant a\\nb)"),
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES)
def test_a_wrong_study_is_one_line(write, case):
    text, says = STUDIES[case]
    write(RECIPE, "base.yaml")
    path = write(f"name: s\nbase: base.yaml\n{text.replace('LIST', ', '.join(f'0.{i:03}1' for i in range(100)))}\n", "s.yaml")
    told = refused(loading.load, [path])
    assert any(says in line for line in told), told


def test_wrong_seeds_on_the_command_line_are_one_line(write):
    with pytest.raises(RecipeError, match="between 1 and 1000 seeds are possible, not 100000000000"):
        loading.load([write(RECIPE)], seeds=100_000_000_000)


def test_long_names_of_variants_fit_into_folders(write):
    write(RECIPE, "base.yaml")
    path = write(f"name: s\nbase: base.yaml\nvariants: {{{'n' * 900}: {{}}, {'n' * 901}: {{}}}}\n", "s.yaml")
    names = [one.spec.name for one in loading.load([path]).variants.values()]
    assert len(set(names)) == 2 and all(len(name) < 200 for name in names)


MEANT = {  # what is said, and what is meant
    "epochs": "override: epochs: no such key; did you mean 'train.epochs'?",
    "lr": "override: lr: no such key; did you mean 'train.optimizer.lr' or 'train.adapters.lr'?",
    "train.batch_size": "override: train.batch_size: no such key; did you mean 'data.batch_size'?",
    "temperature": "override: temperature: no such key; did you mean 'losses.1.temperature'?",
    "losses.0.temperature": "override: losses.0.temperature: no such key; did you mean 'losses.1.temperature'?",
    "train.epoch": "override: train.epoch: no such key; did you mean 'epochs'?",
}


@pytest.mark.parametrize("key", MEANT)
def test_a_key_of_another_section_is_suggested(write, key):
    assert refused(recipe.load, write(RECIPE), {key: 2})[0].startswith(MEANT[key])


def test_a_plugin_whose_name_begins_so_is_suggested(write):
    told = refused(recipe.load, write(RECIPE), {"losses.0.use": "rkd"})[0]
    assert told.startswith("override: losses.0.use: unknown 'rkd'; did you mean 'rkd_angle' or 'rkd_distance'?")
    assert told.count(",") == 20 and "in all" in told


def test_only_the_options_of_the_loss_that_is_meant_are_suggested(write, tmp_path):
    plugin = "import kdkit\n\nclass Logit(kdkit.Loss):\n    '''Mine.'''\n    name, knowledge = 'logit', 'response'\n\n    def forward(self, student, teacher, batch):\n        return student.logits.sum()\n\n@kdkit.hookimpl\ndef kdkit_losses():\n    return [Logit]\n"
    (tmp_path / "mine.py").write_text(plugin)
    told = refused(recipe.load, write(RECIPE), {"losses.0": {"use": "logit", "temprature": 2}, "plugins": [str(tmp_path / "mine.py")]})
    assert told == ["override: losses.0.temprature: no such key; allowed: name, output, teacher, use, view, weight"]


def test_an_override_of_a_missing_item_lists_those_that_exist(write):
    told = refused(recipe.load, write(RECIPE), {"losses.kd.temperature": 2})
    assert told == ["override: losses.kd.temperature: no item called 'kd' in a list of 2; there are 0 cross_entropy, 1 logit_kl"]


def test_an_empty_value_is_told_how_it_is_written(write):
    told = refused(recipe.load, write(RECIPE), parse_overrides(["teacher.strip_prefix="]))
    assert told == [
        "override: teacher.strip_prefix: needs a text, got nothing; an empty text is written '', as in \"teacher.strip_prefix=''\""
    ]
    assert recipe.load(write(RECIPE), parse_overrides(["teacher.strip_prefix=''"])).spec.teacher.strip_prefix == ""


def test_a_merge_brings_the_keys_of_another_mapping(write):
    assert Source(write("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")).data["b"] == {"x": 1, "y": 3}
