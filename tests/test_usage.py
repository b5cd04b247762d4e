"""A command line that does not fit is told in one line, and a mistake is told before anything heavy is imported."""

import subprocess
import sys

import pytest

from kdkit import cli

HEAVY = (
    "timm", "torchvision", "sklearn", "torchmetrics", "accelerate", "transformers", "datasets", "scipy", "matplotlib",
    "PIL", "pandas", "jinja2",
)  # fmt: skip
RECIPE = """\
name: shell
data: {dataset: {use: digits}}
student: {model: mlp/16}
schedule: {use: supervised}
losses: [{use: cross_entropy}]
train: {epochs: 2, optimizer: {lr: 0.1}}
"""


@pytest.fixture
def kdkit(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["kdkit", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def test_layers_command_shows_layers_that_have_an_alias_alone(kdkit):
    listed = kdkit("layers", "resnet18", "--stages", "--size", "32")[1].splitlines()[1:]
    assert [line.split()[-1] for line in listed] == ["logits", "stage1", "stage2", "stage3", "stage4", "penultimate"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trian r.yaml", "kdkit: no such command 'trian'. Did you mean 'train'?"),
        ("train r.yaml --epochs 3", "kdkit train: no such option: --epochs; a recipe's value is given as train.epochs=3"),
        ("train r.yaml --epochs=3", "kdkit train: no such option: --epochs; a recipe's value is given as train.epochs=3"),
        ("check r.yaml --batch-size", "kdkit check: no such option: --batch-size; a recipe's value is given as data.batch_size=VALUE"),
        ("check r.yaml --nonsense", "kdkit check: no such option: --nonsense; `kdkit check -h` shows what there is"),
        ("layers resnet18 --epochs 3", "kdkit layers: no such option: --epochs; `kdkit layers -h` shows what there is"),
        ("check", "kdkit check: missing argument 'recipe'; `kdkit check -h` shows what there is"),
        ("export run --format tflite", "kdkit export: invalid value for '--format': 'tflite' is not one of 'timm', 'onnx'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(kdkit, words, line):
    assert kdkit(*words.split()) == (2, "", f"{line}\n")


def test_completion_needs_a_shell(kdkit, monkeypatch):
    monkeypatch.setattr("kdkit.cli.commands._in_a_shell", lambda: False)
    code, printed, error = kdkit("--install-completion")
    assert "this process was started by none of them" in str(code) and not printed and not error


def test_version(kdkit):
    code, printed, _ = kdkit("--version")
    assert code == 0 and printed.startswith("kdkit 0.") and "torch " in printed and printed.count("\n") == 1


def test_flags_take_no_value_in_the_help(kdkit):
    code, printed, _ = kdkit("train", "-h")
    assert code == 0 and "--quiet" in printed and "bool" not in printed
    assert kdkit("train", "--help") == (0, printed, "")


def test_a_size_on_the_command_line_may_be_a_side(kdkit):
    assert "(B, 64, 16, 16)" in kdkit("layers", "resnet18", "--size", "32")[1]
    assert "images (3, 16, 16)" in kdkit("profile", "mlp/4", "--size", "16", "--runs", "1")[1]


TYPOS = """\
import sys
from kdkit import cli
for words in ("check r.yaml", "train r.yaml", "compare r.yaml other.yaml", "cache r.yaml"):
    sys.argv = ["kdkit", *words.split(), "train.epocs=3"]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 2
print(*sys.modules)
"""


def test_a_typo_is_told_before_heavy_libraries_are_imported(kdkit, tmp_path):
    (tmp_path / "other.yaml").write_text(RECIPE.replace("shell", "other"))
    done = subprocess.run([sys.executable, "-c", TYPOS], capture_output=True, text=True, check=True)
    assert done.stderr.count("train.epocs: no such key; did you mean 'epochs'?") == 4
    imported = set(done.stdout.split())
    assert "torch" in imported and not imported.intersection(HEAVY)
