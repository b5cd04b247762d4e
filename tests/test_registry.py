"""Plugins add themselves by existing; one that is wrong is named."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kdkit
from kdkit.errors import PluginError
from kdkit.recipe import catalogue, registry

LOSS = '''
"""A loss of a stranger's.

Nobody, "Nothing", 2026.
"""
import kdkit


class {cls}(kdkit.Loss):
    """Mean absolute difference of the logits.

    Formula: mean |z_s - z_t|
    """

    name = "{name}"
    knowledge = "response"

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).abs().mean()


@kdkit.hookimpl
def kdkit_losses():
    return [{cls}]
'''

RECIPE = """
name: {name}
data: {{dataset: {{use: synthetic, train: 32, test: 16, image_size: 8}}, batch_size: 16, workers: 0}}
student: {{model: mlp/8}}
teacher: {{model: mlp/16}}
schedule: {{use: offline}}
losses: [{{use: {name}}}]
train: {{epochs: 1, optimizer: {{lr: 0.1}}}}
run: {{log_steps: 1}}
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def loss(name="mine", cls="Mine"):
    return LOSS.format(name=name, cls=cls)


def test_the_standard_plugins_are_found_through_the_entry_point():
    found = registry.load()
    assert {"cross_entropy", "logit_kl", "hint", "sp"} <= found.losses.keys()
    assert {"supervised", "offline"} <= found.schedules.keys()
    assert {"timm", "torchvision", "mlp", "python"} <= found.models.keys()
    assert {"digits", "mnist", "cifar100", "image_folder", "synthetic"} <= found.datasets.keys()
    assert not registry.load(installed=False).losses
    assert found.origins[found.losses["hint"]].endswith(os.path.join("feature", "hint.py"))


def test_a_file_in_a_folder_trains(tmp_path):
    write(tmp_path / "mine.py", loss())
    path = write(tmp_path / "r.yaml", RECIPE.format(name="mine") + "plugins: [mine.py]\n")
    result = kdkit.train(path, folder=tmp_path / "run", quiet=True)
    assert result.folder == tmp_path / "run" and "top1" in result.test
    assert "mine" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_files_and_folders_that_the_caller_names(tmp_path):
    write(tmp_path / "sub" / "mine.py", loss())
    write(tmp_path / "sub" / "deeper" / "other.py", loss("other", "Other"))
    write(tmp_path / "sub" / "_private.py", "raise RuntimeError")
    found = registry.load((tmp_path / "sub",), installed=False)
    assert set(found.losses) == {"mine", "other"}
    assert found.origins[found.losses["mine"]] == str(tmp_path / "sub" / "mine.py")


def test_two_files_of_one_name_do_not_get_mixed_up(tmp_path):
    write(tmp_path / "a" / "loss.py", loss("one", "One"))
    write(tmp_path / "b" / "loss.py", loss("two", "Two"))
    assert set(registry.load((tmp_path / "a", tmp_path / "b"), installed=False).losses) == {"one", "two"}


def test_a_file_that_is_named_twice_counts_once(tmp_path):
    file = write(tmp_path / "mine.py", loss())
    assert "mine" in registry.load([file, tmp_path / ".." / tmp_path.name / "mine.py", tmp_path]).losses


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "mine.py", loss())
    assert "mine" in registry.load((path,), installed=False).losses
    write(path, loss("yours", "Yours"))
    assert set(registry.load((path,), installed=False).losses) == {"yours"}


def test_a_distribution_with_an_entry_point_trains(tmp_path, monkeypatch):
    """As an installed package is found, without building and installing it."""
    write(tmp_path / "site" / "kdkit_near.py", loss("from_near", "FromNear"))
    write(tmp_path / "site" / "kdkit_near-1.0.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: kdkit-near\nVersion: 1.0\n")
    write(tmp_path / "site" / "kdkit_near-1.0.dist-info" / "entry_points.txt", "[kdkit]\nnear = kdkit_near\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry._load.cache_clear()
    try:
        result = kdkit.train(write(tmp_path / "r.yaml", RECIPE.format(name="from_near")), folder=tmp_path / "run", quiet=True)
        assert '"from_near"' in (result.folder / "metrics.jsonl").read_text()
        found = registry.load()
        assert found.origins[found.losses["from_near"]] == "kdkit-near (kdkit_near)"
    finally:
        registry._load.cache_clear()  # the next test is without it


@pytest.mark.slow
def test_an_installed_package_with_an_entry_point_trains(tmp_path):
    """Builds and installs a package into a folder of its own, and trains with its loss in a fresh process."""
    package = tmp_path / "package"
    write(package / "kdkit_mine.py", loss("from_afar", "FromAfar"))
    write(
        package / "pyproject.toml",
        """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "kdkit-mine"
        version = "1.0"
        [project.entry-points.kdkit]
        mine = "kdkit_mine"
        [tool.setuptools]
        py-modules = ["kdkit_mine"]
        """,
    )
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", str(site), str(package)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    path = write(tmp_path / "r.yaml", RECIPE.format(name="from_afar"))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    kdkit_command = str(Path(sys.executable).with_name("kdkit"))
    done = subprocess.run(
        [kdkit_command, "train", str(path), "--run", str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "from_afar" in (tmp_path / "run" / "metrics.jsonl").read_text()
    listed = subprocess.run([kdkit_command, "plugins"], env=environment, capture_output=True, text=True)
    assert "from_afar" in listed.stdout


FAULTS = {
    "misspelt hook": (loss().replace("kdkit_losses", "kdkit_loses"), "'kdkit_loses' is no kdkit hook; did you mean 'kdkit_losses'?"),
    "unmarked hook": (loss().replace("@kdkit.hookimpl\n", ""), "kdkit_losses() lacks @kdkit.hookimpl"),
    "no hook": ("import kdkit\n", "defines no kdkit hook"),
    "arguments": (loss().replace("kdkit_losses():", "kdkit_losses(register):"), "register"),
    "abstract": (loss().replace("def forward", "def backward"), "Mine does not implement forward"),
    "no class": (loss().replace("return [Mine]", "return [3]"), "3 is not a kdkit.Loss class"),
    "no list": (loss().replace("return [Mine]", "return 3"), "kdkit_losses() must return a list of classes, not 3"),
    "fails": (loss().replace("return [Mine]", "return [Yours]"), "kdkit_losses() failed: NameError"),
    "import": ("import nosuchmodule\n", "cannot be imported: ModuleNotFoundError"),
    "syntax": ("def\n", "cannot be imported: SyntaxError"),
    "name": (loss("Mine"), "Mine.name must be snake_case, got 'Mine'"),
    "no name": (loss().replace('name = "mine"', "pass"), "Mine.name must be snake_case, got None"),
    "knowledge": (loss().replace('"response"', '"respons"'), "Mine.knowledge is 'respons'; did you mean 'response'?"),
    "no docstring": (loss().replace('    """Mean absolute difference of the logits.\n\n    Formula: mean |z_s - z_t|\n    """\n', ""), "Mine has no docstring"),
    "reserved": (loss().replace('name = "mine"', 'name = "mine"\n    class Options(kdkit.LossOptions):\n        weight: float = 1'), "may not define weight"),
    "undescribed": (loss().replace('name = "mine"', 'name = "mine"\n    class Options(kdkit.LossOptions):\n        power: float = 1'), "power lacks Field(description=...)"),
    "foreign options": (loss().replace('name = "mine"', 'name = "mine"\n    Options = dict'), "Options must derive"),
    "twice": (loss("hint", "Hint"), "'hint' is registered twice: by "),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_plugin_is_named(case, tmp_path):
    text, says = FAULTS[case]
    path = write(tmp_path / "mine.py", text)
    with pytest.raises(PluginError) as caught:
        registry.load((path,))
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PluginError, match="no such plugin file or folder"):
        registry.load((tmp_path / "gone.py",))


PUBLISHED = '''\
"""Twice the mean of the student's logits."""

import kdkit
from kdkit_published._scale import SCALE


class Published(kdkit.Loss):
    """Twice the mean of the student's logits.

    Formula: 2 mean(z_s)
    """

    name = "published"
    knowledge = "labels"

    def forward(self, student, teacher, batch):
        return SCALE * student.logits.mean()


@kdkit.hookimpl
def kdkit_losses():
    return [Published]
'''


def test_an_installed_package_brings_its_plugins(tmp_path, monkeypatch):
    package, facts = tmp_path / "kdkit_published", tmp_path / "kdkit_published-0.1.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_scale.py").write_text("SCALE = 2\n")
    (package / "published.py").write_text(PUBLISHED)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: kdkit-published\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text("[kdkit]\npublished = kdkit_published\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._load.cache_clear()
    try:
        found = registry.load()
        assert found.losses["published"].__module__ == "kdkit_published.published" and "logit_kl" in found.losses
        (entry,) = (entry for entry in catalogue.entries(found) if entry.name == "published")
        assert entry.source == "kdkit_published.published" and entry.formula == "2 mean(z_s)"
    finally:
        registry._load.cache_clear()
