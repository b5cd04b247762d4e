"""Recipes, studies, overrides and command lines made from valid ones by mistakes: each is taken, or refused in one line a problem, soon."""

import contextlib
import io
import os
import re
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdkit import cli, recipe
from kdkit.contracts.model_source import CacheOptions, RecipeTeacher, StudentOptions, TeacherOptions
from kdkit.errors import KdkitError
from kdkit.recipe import registry
from kdkit.recipe.data_section import BatchAugment, DataSpec, TimmAugment
from kdkit.recipe.sections import EmaSpec, LrScheduleSpec, MixupSpec, OptimizerSpec, RunSpec, TrainSpec
from kdkit.recipe.yaml_source import parse_overrides
from kdkit.runs import checks, training
from kdkit.study import loading

SECONDS = 60  # of the processor, on a slow machine; nearly all need less than one
TRIED = {"taken": 0, "refused": 0}

DATA = {
    "dataset": {"use": "synthetic", "image_size": "8", "train": "24", "test": "8", "num_classes": "3"},
    "batch_size": "8",
    "validation": "4",
    "seed": "1",
    "augment": {"crop_padding": "1", "flip": "0.5"},
}
TRAIN = {
    "epochs": "2",
    "optimizer": {"name": "sgd", "lr": "0.1", "weight_decay": "1e-4", "args": {}},
    "lr_schedule": {"name": "cosine", "warmup_epochs": "1"},
    "clip_grad": "1",
}
LAYERS = [{"student": "penultimate", "teacher": "penultimate"}]
RECIPES = [
    {"name": "e", "data": DATA, "student": {"model": "test_resnet"}, "teacher": {"model": "test_resnet"}, "schedule": {"use": "offline"}, "losses": [{"use": "cross_entropy"}, {"use": "hint", "layers": [{"student": "stage1", "teacher": "stage1"}]}], "train": TRAIN},
    {"name": "a", "seed": "0", "data": DATA, "student": {"model": "mlp/8"}, "teacher": {"model": "mlp/8", "normalize": {"mean": ["0.5"], "std": ["0.5"]}}, "schedule": {"use": "offline"},
     "losses": [{"use": "cross_entropy", "weight": "0.5"}, {"use": "logit_kl", "temperature": {"from": "8", "to": "2", "epochs": "1"}}, {"use": "hint", "layers": LAYERS}], "train": TRAIN, "run": {"folder": "runs", "trackers": [], "log_steps": "5"}},
    {"name": "b", "data": DATA, "student": {"model": "mlp/8-8", "activation": "relu"}, "schedule": {"use": "mutual"}, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}], "train": {**TRAIN, "mixup": {"mixup_alpha": "0.5"}, "ema": {"decay": "0.9"}}},
    {"name": "c", "data": DATA, "student": {"model": "mlp/8"}, "teachers": [{"model": "mlp/8"}, {"model": "mlp/16", "name": "large", "precision": "bf16"}], "schedule": {"use": "offline"},
     "losses": [{"use": "cross_entropy"}, {"use": "rkd_distance", "layers": LAYERS, "teacher": "large"}, {"use": "dkd", "beta": "2"}], "train": TRAIN},
    {"name": "d", "data": DATA, "student": {"model": "mlp/8"}, "teacher": {"recipe": "teacher.yaml", "seed": "1", "cache": {"views": "2"}}, "schedule": {"use": "offline"}, "losses": [{"use": "logit_kl"}], "train": TRAIN},
]  # fmt: skip
TEACHER = {"name": "t", "data": {**DATA, "validation": "4"}, "student": {"model": "mlp/16"}, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "train": TRAIN}  # fmt: skip
PLAIN = RECIPES[-4]
STUDY = {
    "name": "s", "question": "why?", "base": PLAIN, "baseline": "a", "variants": {"a": {}, "b": {"losses": [{"use": "logit_kl"}]}, "c": {"recipe": "teacher.yaml"}},
    "vary": {"train.optimizer.lr": ["0.1", "0.2"]}, "seeds": "2", "allow": ["train.epochs"], "show": ["nll"], "folder": "runs",
}  # fmt: skip
ODD = [
    "", "null", "~", "true", "off", "0", "-1", "1", "2", "7", "0.5", "-0.5", "1e-9", "1e300", "1e999", ".inf", "-.inf", ".nan", "nan", "inf", "010", "0x_", "0b_", "1_000", "1:30", "1e400",
    "4294967296", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 30, "9" * 5000, "'9" + "9" * 4000 + "'", "1000000000", "1000000", "'3'", "3.0",
    "2024-02-30", "2024-01-01T00:00:00Z", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x", "!!set {a, b}", "!!binary aGk=", "!!omap [a: 1]", "!!python/name:os.system ''", "!x y", "! 3", "!!str 3", "=", "<<", "*a", "&a", "&a [*a]", "*nowhere",
    '"\\0"', '"a\\0b"', '"\\e[31m"', '"a\\nb"', '"\\r"', '"\\ud800"', '"\\u202e"', '"\\U99999999"', "é", "日本", "😀", "'", '"', "''", "' '", "[", "]", "{", "}", ",", ":", "-", "?", "|", ">", "@", "`", "%", "#",
    "[]", "[[]]", "[[[[]]]]", "{}", "{a: 1}", "{use: x}", "{use: logit_kl}", "{model: mlp/8}", "{recipe: r.yaml}", "{recipe: teacher.yaml}", "{recipe: teacher.yaml, seeds: [0, 1]}", "{from: 1, to: 2, epochs: 3}", "{from: 0, to: 0, epochs: 1e-300}", "[1, 2]", "[a, b]", "[null]", "[" * 40 + "]" * 40,
    "x", "x" * 300, "x" * 5000, "all", "auto", "best", "teacher", "student", "penultimate", "logits", "stage1", "layer9", "*.weight", "[bold]x", "{x!r}", "%s",
    "~nosuchuser/x", "~", "/", ".", "..", "/dev/null", "r.yaml", "teacher.yaml", "gone.yaml", "plug.py", "folder", "loop", "locked/x", "empty", "half.safetensors",
    "mlp/8", "mlp/0", "mlp/-8", "mlp/99999999999999999999", "mlp/16384-16384", "mlp/", "/mlp", "timm/nothing", "resnet18", "torchvision/nothing", "torchvision/resnet18", "hf/./folder", "hf/nothing/here", "python/Net", "cifar/resnet8", "cifar/nothing", "@recipe/x", "hf-hub:a/b",
]  # fmt: skip
KEYS = ["use", "model", "name", "weight", "seed", "epochs", "<<", "extends", "plugins", "", "1", "null", "2024-02-30", '"a\\nb"', '"\\e"', "x" * 300, "é", "[a]", "{a: 1}", "? x", "file", "args", "layers", "cache", "init", "normalize", "checkpoint", "new_head", "input_size", "image_size", "train_samples", "train_fraction", "timm_augment", "repeats", "drop_last", "workers", "teachers", "accumulate", "device", "precision", "average_best", "recipe", "seeds", "vary", "variants", "base", "temperature", "top_k", "views", "dir", "max_gb", "root", "download", "stages", "teacher", "student"]  # fmt: skip
PLUGINS = {plugin.name: (kind, plugin) for kind, plugin in registry.load()}
OPTIONS = sorted({key for _, plugin in registry.load() for key in plugin.Options.model_fields})
NUMBERS = ["-1", "0", "1", "2", "3", "5", "7", "8", "24", "100", "1000", "16384", "100000", "1000000", "4294967296", "9223372036854775807", "1e-300", "1e-9", "0.001", "0.5", "0.999", "1.5", "1e9", "1e38", "1e39", "1e300"]  # fmt: skip
LIKELY = [*NUMBERS, "true", "false", "null", "[]", "[0]", "[1, 2]", "[0.5, 2]", "[1, 1, 1]", "x", "''", "{}", "{from: 1, to: 2, epochs: 3}", "{model: mlp/8}", "[{model: mlp/8}]", "[{student: logits, teacher: logits}]", "[{student: penultimate, teacher: '*'}]", "[{student: '0', teacher: '0'}]", "teacher", "rand-m7-mstd0.5", "all", "teacher.yaml", "[student]", "{student: [head]}", "[cross_entropy]", "{use: cross_entropy}", "{decay: 0.9}", "{mixup_alpha: 1}", "{mean: [0, 0], std: [0, 0]}", "{views: all}", "{views: 1, what: taps, top_k: 2}", "{from: teacher}", "{from: teacher, layers: [0]}"]  # fmt: skip
SECTIONS = {
    "data": [DataSpec], "train": [TrainSpec], "run": [RunSpec], "optimizer": [OptimizerSpec], "lr_schedule": [LrScheduleSpec], "augment": [BatchAugment, TimmAugment],
    "mixup": [MixupSpec], "ema": [EmaSpec], "cache": [CacheOptions], "teacher": [RecipeTeacher],
}  # fmt: skip


class Pairs(list):
    """A mapping that may have a key twice."""


def written(tree):
    """A tree as YAML; its leaves are YAML already."""
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{key}: {written(value)}" for key, value in tree) + "}"
    return "[" + ", ".join(map(written, tree)) + "]" if isinstance(tree, list) else tree


def at_top(tree):
    return "".join(f"{key}: {written(value)}\n" for key, value in tree)


def pairs(tree):
    if isinstance(tree, dict):
        return Pairs((key, pairs(value)) for key, value in tree.items())
    return [pairs(value) for value in tree] if isinstance(tree, list) else tree


def places(tree, above=()):
    """Every place in a tree of pairs, as indices."""
    yield above
    if isinstance(tree, list):
        for i, part in enumerate(tree):
            yield from places(part[1] if isinstance(part, tuple) else part, (*above, i))


def get(tree, place):
    for i in place:
        tree = tree[i][1] if isinstance(tree[i], tuple) else tree[i]
    return tree


def put(tree, place, value):
    """The tree with another value there; None takes it away."""
    if not place:
        return value if value is not None else Pairs()
    first, *rest = place
    old = tree[first]
    inside = put(old[1] if isinstance(old, tuple) else old, rest, value) if rest or value is not None else None
    new = [] if inside is None else [(old[0], inside)] if isinstance(old, tuple) else [inside]
    return type(tree)([*tree[:first], *new, *tree[first + 1 :]])


def given_option(draw, tree, place):
    """The tree with one more key in a section, often one that may stand there, with a value that may be right."""
    section, parent = get(tree, place), get(tree, place[:-1])
    called = parent[place[-1]][0] if isinstance(parent[place[-1]], tuple) else None
    said = dict(section)
    uses = {str(said.get("use")), str(said.get("model")).partition("/")[0]}
    models = [plugin.Options for _, plugin in registry.load() if plugin.name in uses] + SECTIONS.get(called, [])
    if "model" in said:
        models += [StudentOptions, TeacherOptions]
    fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
    if not fields:
        return tree
    key = draw(st.sampled_from(sorted(fields)))
    said = str(fields[key].annotation)
    words = [word.strip(" '") for part in re.findall(r"Literal\[([^]]*)\]", said) for word in part.split(",")]
    words += [*(NUMBERS if "int" in said or "float" in said else []), *(["true", "false"] if "bool" in said else [])]
    value = draw(st.sampled_from(words or LIKELY) | st.sampled_from(LIKELY))
    return put(tree, place, Pairs([pair for pair in section if pair[0] != key] + [(key, value)]))


def odd(draw, tree, place, others):
    return put(tree, place, draw(st.sampled_from(ODD)))


def number(draw, tree, place, others):
    numbers = [p for p in places(tree) if isinstance(get(tree, p), str) and re.fullmatch(r"[\d.e-]+", get(tree, p))]
    return put(tree, draw(st.sampled_from(numbers)), draw(st.sampled_from(NUMBERS))) if numbers else tree


def option(draw, tree, place, others):
    sections = [p for p in places(tree) if p and isinstance(get(tree, p), Pairs)]
    return given_option(draw, tree, draw(st.sampled_from(sections))) if sections else tree


def plugin(draw, tree, place, others):
    """Another plugin of the same kind, with what it needs at least."""
    uses = [p for p in places(tree) if isinstance(get(tree, p), Pairs) and str(dict(get(tree, p)).get("use")) in PLUGINS]
    if not uses:
        return tree
    chosen = draw(st.sampled_from(uses))
    kind = PLUGINS[dict(get(tree, chosen))["use"]][0]
    name = draw(st.sampled_from([name for name, (other_kind, _) in PLUGINS.items() if other_kind == kind]))
    fields = PLUGINS[name][1].Options.model_fields
    layers = draw(st.sampled_from(["penultimate", "stage1", "0"]))
    needed = [("layers", [Pairs([("student", layers), ("teacher", layers)])])] if "layers" in fields else []
    return put(tree, chosen, Pairs([("use", name), *needed]))


def drop(draw, tree, place, others):
    return put(tree, place, None)


def key(draw, tree, place, others):
    """A key more, or another one, or one twice."""
    parent = get(tree, place[:-1])
    if not isinstance(parent, Pairs):
        return tree
    i, (old, value) = place[-1], parent[place[-1]]
    new = draw(st.sampled_from([old, *KEYS, *OPTIONS]))
    kept = [parent[i]] if draw(st.booleans()) else []
    added = (new, value if draw(st.booleans()) else draw(st.sampled_from(ODD)))
    return put(tree, place[:-1], Pairs([*parent[:i], *kept, added, *parent[i + 1 :]]))


def other(draw, tree, place, others):
    return put(tree, place, draw(st.sampled_from(others)))


def alias(draw, tree, place, others):
    changed = put(tree, place, f"&a {written(get(tree, place))}")
    return Pairs([*changed, ("a", "*a")]) if isinstance(changed, Pairs) else changed


def deeper(draw, tree, place, others):
    value = get(tree, place)
    return put(tree, place, Pairs([("a", value)]) if draw(st.booleans()) else [[value]])


MISTAKES = [odd, number, number, option, option, option, option, plugin, plugin, drop, key, key, other, alias, deeper]


@st.composite
def mistaken(draw, bases):
    """A file's text: a valid one with a few mistakes."""
    tree = pairs(draw(st.sampled_from(bases)))
    others = [get(base, place) for base in map(pairs, bases) for place in places(base)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if found := [place for place in places(tree) if place]:
            tree = draw(st.sampled_from(MISTAKES))(draw, tree, draw(st.sampled_from(found)), others)
    text = at_top(tree) if isinstance(tree, Pairs) else written(tree)
    for _ in range(draw(st.sampled_from([0] * 9 + [1, 2]))):
        i = draw(st.integers(0, len(text)))
        text = text[:i] + draw(st.sampled_from(ODD)) + text[i + draw(st.integers(0, 9)) :]
    return text


@st.composite
def words(draw):
    """`key.path=value` for a valid recipe, with mistakes in both."""
    tree = pairs(PLAIN)
    place, steps = draw(st.sampled_from([place for place in places(tree) if place])), []
    for i, number in enumerate(place):
        part = get(tree, place[:i])[number]
        steps.append(part[0] if isinstance(part, tuple) else draw(st.sampled_from([str(number)] * 9 + ["hint", "9", "-1", "é", "9" * 30])))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(steps)))
        steps[at : at + draw(st.integers(0, 1))] = [draw(st.sampled_from(KEYS + OPTIONS))]
    value = draw(
        st.sampled_from(NUMBERS + LIKELY)
        | st.sampled_from(NUMBERS + LIKELY)
        | st.sampled_from(ODD)
        | mistaken(RECIPES)
        | st.text(max_size=9)
    )
    return draw(st.sampled_from(["{}={}"] * 17 + ["{}", "={}", "{}=="])).format(".".join(steps), value)


def surroundings(folder):
    """What odd values name, and the recipe of a teacher."""
    (folder / "teacher.yaml").write_text(at_top(pairs(TEACHER)))
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "empty").touch()
    (folder / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "plug.py").write_text("x = 1\n")
    if not os.path.lexists(folder / "loop"):
        (folder / "loop").symlink_to("loop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    surroundings(made)
    before = os.getcwd()
    os.chdir(made)
    yield made
    os.chdir(before)


def holds(call):
    """Whether it is taken; if not, that it is refused as it should be."""
    begin = time.process_time()
    try:
        call()
    except KdkitError as error:
        TRIED["refused"] += 1
        lines = str(error).split("\n")
        for line in lines:
            assert line.isprintable() and len(line) <= 2000, line
            assert re.match(r"override: |[^\n]*\.yaml(:\d+)?: |allow: ", line), line
        assert len(lines) <= 60
    else:
        TRIED["taken"] += 1
    assert time.process_time() - begin < SECONDS


def check(path, overrides=()):
    holds(lambda: checks.make(recipe.load(path, parse_overrides(overrides))))


def a_recipe(folder, text):
    (folder / "r.yaml").write_text(text, errors="surrogatepass")
    check(folder / "r.yaml")


def a_study(folder, text):
    (folder / "s.yaml").write_text(text, errors="surrogatepass")
    holds(lambda: loading.load([folder / "s.yaml"]))


def an_override(folder, said):
    (folder / "r.yaml").write_text(at_top(pairs(PLAIN)))
    check(folder / "r.yaml", said)


RUN = {**TEACHER, "name": "kept", "student": {"model": "mlp/8"}}
COMMANDS = [  # those that train are left out, and what would write outside the folder
    ["check", "r.yaml", "losses.0.weight=0.5"], ["layers", "mlp/8", "activation=relu", "--size", "3,8,8", "--classes", "3"],
    ["profile", "mlp/8", "runs/kept", "--size", "3,8,8", "--classes", "3", "--runs", "1", "--batch", "2", "--threads", "1"],
    ["show", "runs/kept"], ["evaluate", "runs/kept", "data.interpolation=bilinear"], ["export", "runs/kept"], ["report", "runs/kept", "--data", "dataset.noise=0.25"],
    ["plugins", "hint", "--plugins", "plug.py"], ["schema", "--study"], ["cache", "--list"], ["compare", "s.yaml", "train.epochs=3", "--seeds", "2", "--allow", "seed", "--dry"],
]  # fmt: skip
SAID = [word for word in ODD if not re.search(r"\d{3}", word)] + ["3,4", "3,8,8", "0,0,0", "3,99999999,9", "1,1,1", "-3,8,8", "1" * 30, "runs", "runs/gone", "activation=tanh", "activation=", "dropout=2", "a.b=1", "=", "--best", "--cpu", "--size", "--classes", "--batch", "--seeds", "--allow", "--plugins", "--data", "--nothing", "-x", "--", "--help", "-h", "--version", "é=é", "\x1b[31m", "a\nb", "\udcff"]  # fmt: skip


@st.composite
def command_lines(draw):
    command, *rest = draw(st.sampled_from(COMMANDS))
    for _ in range(draw(st.integers(1, 2))):
        i = draw(st.integers(0, len(rest)))
        rest[i : i + draw(st.integers(0, 1))] = [draw(st.sampled_from(SAID))]
    line = [command if draw(st.integers(0, 30)) else draw(st.sampled_from(SAID)), *rest]
    return [*line, "--dry"] if command == "compare" else line


def a_command(folder, line):
    (folder / "r.yaml").write_text(at_top(pairs(PLAIN)))
    (folder / "s.yaml").write_text(at_top(pairs(STUDY)))
    if not (folder / "runs" / "kept").exists():
        (folder / "kept.yaml").write_text(at_top(pairs(RUN)))
        training.train(recipe.load(folder / "kept.yaml"), quiet=True)
    begin, told, old = time.process_time(), io.StringIO(), sys.argv
    sys.argv = ["kdkit", *line]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = old
    code = ended.value.code or 0
    TRIED["refused" if code else "taken"] += 1
    assert code in (0, 2), told.getvalue()
    lines = told.getvalue().removesuffix("\n").split("\n")
    assert not code or (told.getvalue() and all(one.isprintable() and len(one) <= 2000 for one in lines)), lines
    assert time.process_time() - begin < SECONDS


KINDS = {
    "recipe": (a_recipe, mistaken(RECIPES)),
    "study": (a_study, mistaken([STUDY])),
    "override": (an_override, st.lists(words(), min_size=1, max_size=2)),
    "command": (a_command, command_lines()),
    "text": (a_recipe, st.text(max_size=40) | st.lists(st.sampled_from([*ODD, "\n", " ", ": ", "- "]), max_size=9).map("".join)),
}
EXAMPLES = {"recipe": (60, 4000), "study": (25, 1500), "override": (40, 2500), "command": (40, 1000), "text": (100, 4000)}


@pytest.mark.parametrize("kind", KINDS)
def test_fuzzed_recipes_a_few(folder, kind):
    tried(folder, kind, EXAMPLES[kind][0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_fuzzed_recipes_many(folder, kind):
    tried(folder, kind, EXAMPLES[kind][1])


def tried(folder, kind, examples):
    run, inputs = KINDS[kind]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def property_holds(made):
        run(folder, made)

    property_holds()
