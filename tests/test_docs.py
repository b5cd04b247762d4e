"""What the documentation says is so: generated pages are fresh, links lead somewhere, files and commands shown do work."""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kdkit_plugins.models.cifar import CifarSource
from torch import nn
from training import PATIENCE, forked

import kdkit
from kdkit import cli, recipe
from kdkit.errors import KdkitError
from kdkit.recipe import catalogue, registry, types
from kdkit.study import loading as study_file
from kdkit.study.plan import trainings
from kdkit.study.report.heatmaps import TEMPERATURES
from kdkit.testing import check_loss

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))


def generator():
    sys.path.insert(0, str(DOCS))  # as for a script: it imports the modules beside it
    try:
        return importlib.import_module("generate")
    finally:
        sys.path.remove(str(DOCS))


GENERATED = generator().pages()


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the prose before it."""

    language: str
    text: str
    before: str

    @property
    def file(self) -> str | None:
        """The file that the prose tells to save it as."""
        found = re.findall(r"\b[Ss]ave (?:[\w ,]+ )?(?:as )?`([\w.-]+)`", self.before.rsplit("\n\n", 1)[-1])
        return found[-1] if found else None


def blocks(page: Path) -> Iterator[Block]:
    parts = re.split(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for before, language, text in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        yield Block(language, text, before.strip())


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def slugs(page: Path) -> set[str]:
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def tiny(text: str) -> str:
    """A recipe's text with one epoch and no warm-up."""
    return re.sub(r"\bepochs: \d+", "epochs: 1", re.sub(r"warmup_epochs: \d+", "warmup_epochs: 0", text))


def carry_out(line: str) -> str:
    """Run a `kdkit` line in this process; what it prints."""
    words = [re.sub(r"^3$", "1", word) for word in shlex.split(line, comments=True)]  # three seeds would only take longer
    assert words[0] == "kdkit"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.app(words[1:], standalone_mode=False)
    return printed.getvalue()


def run_pytest(folder: str, words: list[str]) -> None:
    """Be `python -m pytest` in a folder."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.exit(pytest.main([*words, "-q", "-p", "no:cacheprovider"]))


def follow(page: Path) -> str:
    """Do all that a page says, in the current folder: save its files, run its commands and code; what was printed."""
    printed = ""
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(tiny(block.text) if block.language == "yaml" else block.text)
        elif block.language == "bash":
            for line in block.text.splitlines():
                if line.startswith("python -m pytest"):
                    process = forked(run_pytest, str(Path.cwd()), line.split()[3:])
                    process.start()
                    process.join(PATIENCE)
                    assert process.exitcode == 0
                else:
                    printed += carry_out(line)
        elif block.language == "console" and block.text.startswith("$ "):
            command, wanted = block.text[2:].split("\n", 1)
            with pytest.raises(KdkitError) as caught:
                carry_out(command)
            assert str(caught.value) == wanted.strip()
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {})
        elif block.language == "text":
            missing = [line for line in block.text.splitlines() if line not in printed]
            assert not missing, f"not printed by the commands before: {missing}"
        else:
            raise AssertionError(f"a block that nobody tries: {block}")
    return printed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkout(folder):
    """A folder to be in with the recipes, cut short."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for path in (folder / "recipes").rglob("*.yaml"):
        path.write_text(tiny(path.read_text()))
    return folder


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_pages_are_fresh(path):
    assert path.read_text(encoding="utf-8") == GENERATED[path], "run `make docs`"


def test_generated_pages_do_not_depend_on_the_terminal_or_the_folder(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert generator().pages() == GENERATED


def test_the_recipe_schema_is_fresh():
    assert (ROOT / "recipes" / "recipe.schema.json").read_text() == types.schema(registry.load()), "run `make docs`"


def test_every_plugin_has_an_entry():
    page = "".join((DOCS / "reference" / name).read_text() for name in ("losses.md", "plugins.md"))
    kinds = catalogue.KINDS
    plugins = list(registry.load())
    assert len(plugins) >= 20
    for kind, plugin in plugins:
        assert f"\n### {plugin.name} ({kinds[kind]})\n" in page
        for option, field in plugin.Options.model_fields.items():
            common = kind == "models" and option in kdkit.ModelOptions.model_fields
            assert (
                common or f"| `{field.alias or option}` |" in page.partition(f"### {plugin.name} ({kinds[kind]})")[2].partition("\n### ")[0]
            )


def test_every_public_name_has_an_entry():
    page = (DOCS / "reference" / "python.md").read_text()
    assert [name for name in kdkit.__all__ if f"`{name}`" not in page and f"### kdkit.{name}\n" not in page] == []
    assert "|  |" not in page, "a name without a description"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{target}: no such file"
        assert not anchor or anchor in slugs(goal), f"{target}: no such heading"


def test_the_index_has_every_page():
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", (DOCS / "README.md").read_text())}
    assert set(DOCS.rglob("*.md")) - {DOCS / "README.md"} == {path for path in linked if path.is_relative_to(DOCS) and path.suffix == ".md"}


def test_decisions_are_numbered():
    numbers = [int(path.name[:3]) for path in sorted((DOCS / "decisions").glob("*.md"))]
    assert numbers == sorted(set(numbers)), "two have one number"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_shown_exist(page):
    known = (DOCS / "reference" / "cli.md").read_text()
    lines = [line for block in blocks(page) if block.language in ("bash", "console") for line in block.text.splitlines()]
    for found in filter(None, (re.search(r"\bkdkit ((?:new )?[\w-]+)(.*)", line) for line in lines)):
        section = known.partition(f"## kdkit {found[1]}\n")[2].partition("\n## ")[0]
        assert section, f"{found[0]}: no such command"
        for option in re.findall(r"(?<= )--[\w-]+", found[2].partition("#")[0]):
            assert f"| `{option}" in section, f"{found[0]}: no such option"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted((DOCS / "tutorial").glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_can_be_followed(page, folder):
    printed = follow(page)
    assert "on test data after the last epoch" in printed
    assert any((folder / "runs").glob("*/result.json"))


def test_the_readme_shows_the_real_recipe_and_its_commands_work(checkout):
    shown, compared = (block.text for block in blocks(ROOT / "README.md") if block.language == "yaml")
    assert shown == (ROOT / "recipes" / "digits" / "response.yaml").read_text()
    (checkout / "recipes/digits/compared.yaml").write_text(compared)
    loaded = study_file.load([checkout / "recipes/digits/compared.yaml"])
    assert len(trainings(loaded)) == 5 * (1 + 2 + 2)  # two of the three variants have a temperature
    printed = "".join(
        carry_out(line) for block in blocks(ROOT / "README.md") if block.language == "bash" for line in block.text.splitlines()
    )
    assert "total = 0.1 * cross_entropy + 0.9 * logit_kl(temperature 4)" in printed
    assert "student, test, last epoch" in printed
    (code,) = [block.text for block in blocks(ROOT / "README.md") if "kdkit.train(" in block.text]
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_shows_a_loss_that_keeps_its_promises_and_trains(checkout):
    (code,) = [block.text for block in blocks(ROOT / "README.md") if "kdkit.Loss" in block.text]
    (checkout / "total_variation.py").write_text(code)
    check_loss(registry.load((checkout / "total_variation.py",)).losses["total_variation"], temperature=2.0)
    losses = [{"use": "cross_entropy"}, {"use": "total_variation", "weight": 4}]
    result = kdkit.train("recipes/digits/response.yaml", overrides={"losses": losses}, plugins=["total_variation.py"], quiet=True)
    assert '"total_variation.weighted"' in (result.folder / "metrics.jsonl").read_text()


def test_the_readme_has_a_place_for_the_table():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^<!-- demo -->$.*^<!-- /demo -->$", text, re.MULTILINE | re.DOTALL)
    assert [text.count(mark) for mark in ("<!-- demo -->", "<!-- /demo -->")] == [1, 1]


BASE = """
name: base
data: {dataset: {use: digits}, batch_size: 50}
teacher: {model: mlp/32}
student: {model: mlp/8}
schedule: {use: offline}
losses: [{use: cross_entropy}]
train: {epochs: 1, optimizer: {lr: 0.1}}
"""


def completed(fragment: str) -> dict:
    """A recipe of which a page shows a part: data and training are filled up, other sections are taken as they are."""
    base, shown = yaml.safe_load(BASE), yaml.safe_load(fragment)
    plugins, dataset = registry.load(), shown.get("data", {}).get("dataset", {}).get("use")
    if dataset in plugins.datasets:
        base["losses"] = [{"use": plugins.tasks[plugins.datasets[dataset].task].default_loss}]
    merged = {key: {**base[key], **shown.get(key, {})} for key in ("data", "train")}
    needs_teacher = (shown.get("schedule") or base["schedule"])["use"] in ("offline", "staged")
    return {**base, **({} if needs_teacher else {"teacher": None}), **shown, **merged}


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_recipes_in_a_guide_are_valid(page, folder):
    for block in blocks(page):
        if block.language in ("python", "yaml") and block.file:
            Path(block.file).write_text(block.text)
    Path("runs/encoder").mkdir(parents=True)
    for name in ("teacher.pt", "teacher.npz", "runs/encoder/student.safetensors"):
        Path(name).touch()
    Path("teacher.yaml").write_text(BASE)
    Path("base.yaml").write_text(BASE)
    for number, block in enumerate(block for block in blocks(page) if block.language == "yaml"):
        if "variants:" in block.text or "vary:" in block.text:
            Path(f"study{number}.yaml").write_text(block.text)
            trainings(study_file.load([Path(f"study{number}.yaml")]))
            continue
        shown = completed(block.text)
        if "extends" in shown:  # what a guide refuses; it is tried where the guide is followed
            continue
        path = folder / f"shown{number}.yaml"
        path.write_text(yaml.safe_dump(shown))
        assert recipe.load(path).spec.losses


def test_the_guide_to_models_builds_its_networks(folder):
    for block in blocks(DOCS / "how-to" / "own-model.md"):
        if block.file:
            Path(block.file).write_text(block.text)
        if block.language == "bash":
            assert "features.3" in carry_out(block.text)
    assert "ReLU" in carry_out("kdkit layers ours/tiny width=8 --size 1,8,8 --plugins ours.py")


def test_the_guide_to_models_tells_how_cifar_networks_are_normalised():
    told = " ".join((DOCS / "how-to" / "own-model.md").read_text().split())
    own = CifarSource(CifarSource.Options(model="cifar/resnet20"), "resnet20").normalization(nn.Identity())
    for values in (own.mean, own.std):
        assert str(values) in told
    (published,) = re.findall(r"normalize: \{mean: \[0.*?\}", told)
    assert published in (ROOT / "recipes/cifar100/resnet20_from_resnet56.yaml").read_text()


def test_the_guide_to_reports_tells_the_temperatures_that_are_drawn():
    told = " ".join((DOCS / "how-to" / "report.md").read_text().split())
    *first, last = map(str, TEMPERATURES)
    assert f"at the temperatures {', '.join(first)} and {last}:" in told


def test_weights_of_losses_are_those_of_the_shipped_recipes():
    weights = generator().shipped_weights()
    assert weights["fsp"] == "3 (cifar100), 4 (cifar100)"
    assert weights["rkd_distance"].startswith("25 (cifar100") and weights["review"].startswith("0 to 5 over 20 epochs (cifar100)")
    assert weights["logit_mse"].startswith("0.5 (")  # not the 0 where a grid begins


def test_the_guide_to_data_trains_on_its_plugin(folder):
    shown = list(blocks(DOCS / "how-to" / "own-data.md"))
    (plugin,) = [block for block in shown if block.language == "python"]
    (whole,) = [block for block in shown if block.text.startswith("name: spots")]
    Path(plugin.file).write_text(plugin.text)
    Path("spots.yaml").write_text(whole.text)
    assert kdkit.train("spots.yaml", quiet=True).test["top1"] > 60  # a quarter would be chance


@pytest.mark.slow
def test_the_guide_to_several_labels_can_be_followed(folder):
    printed = follow(DOCS / "how-to" / "several-labels.md")
    assert "mAP %" in printed and "MAE to teacher" in printed


# of the trainers that it shows, not of kdkit
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")
def test_the_guide_to_other_trainers_can_be_followed(folder, capsys):
    follow(DOCS / "how-to" / "own-trainer.md")
    printed = capsys.readouterr().out
    assert "'hint':" in printed and "epoch 1: " in printed and Path("student/model.safetensors").is_file()


@pytest.mark.slow
def test_the_guide_to_searching_can_be_followed(folder):
    Path("base.yaml").write_text(BASE)
    shown = list(blocks(DOCS / "how-to" / "search.md"))
    (study,) = [block for block in shown if block.file]
    Path(study.file).write_text(study.text)
    printed = "".join(carry_out(line) for block in shown if block.language == "bash" for line in block.text.splitlines())
    assert "12 candidates, by top-1 on validation data, seed 3" in printed and "runs/weights/report.html" in printed
    assert recipe.load(Path("runs/weights/winner.yaml")).spec.losses[1].use == "logit_kl"


def test_the_guide_to_mixing_shows_what_check_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = "".join(carry_out(block.text.strip()) for block in blocks(DOCS / "how-to" / "mix-losses.md") if block.language == "bash")
    (shown,) = [block.text for block in blocks(DOCS / "how-to" / "mix-losses.md") if block.language == "text"]
    assert shown in printed


def test_the_guide_to_loops_runs(checkout, capsys):
    for block in blocks(DOCS / "how-to" / "use-in-your-own-loop.md"):
        assert block.language == "python"
        exec(compile(tiny(block.text), "guide", "exec"), {})
    assert "runs/alone-1/student.safetensors" in capsys.readouterr().out


def test_the_guide_to_resuming_quotes_the_real_message(checkout):
    texts = [block.text.strip() for block in blocks(DOCS / "how-to" / "resume.md") if block.language == "text"]
    kdkit.train("recipes/digits/teacher.yaml", quiet=True)
    with pytest.raises(kdkit.RunError) as caught:
        kdkit.train("recipes/digits/teacher.yaml", overrides={"train.epochs": 2}, quiet=True)
    assert str(caught.value) in texts


def test_the_run_folder_page_names_every_key(checkout):
    result = kdkit.train("recipes/digits/response.yaml", overrides={"run.log_steps": 1, "data.validation": 0.1}, quiet=True)
    page = (DOCS / "reference" / "run-folder.md").read_text()
    for name in ("metrics.jsonl", "result.json"):
        lines = (result.folder / name).read_text()
        written = [yaml.safe_load(line) for line in (lines.splitlines() if name.endswith("l") else [lines])]
        inner = {k for line in written for part in ("test", "validation") for k in line.get(part) or {}}
        keys = {k for line in written for k in line} | inner
        assert len(keys) > 8
        assert [k for k in sorted(keys) if f"`{k}`" not in page] == [], name
    files = {path.name for path in result.folder.iterdir() if path.is_file()}
    assert [name for name in sorted(files) if f"`{name}`" not in page] == []


def test_no_page_shows_a_path_of_the_machine_it_was_written_on():
    for page in [*PAGES, *ROOT.glob("recipes/**/*.yaml")]:
        assert str(ROOT) not in page.read_text(), page
