import pytest
import torch

import kdkit
from kdkit.models.build import build_model
from kdkit.recipe import registry

PYTHON = registry.load().models["python"]
NET = """
import dataclasses
from torch import nn

@dataclasses.dataclass
class Sizes:
    width: int

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.body = nn.Conv2d(3, Sizes(width).width, 1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def narrow(num_classes):
    return Net(num_classes, width=2)

def wrong(num_classes):
    return 3

def broken(num_classes):
    raise ValueError("two\\nlines")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def build(name, file, shape=(3, 4, 4), **options):
    source = PYTHON(PYTHON.Options(model=f"python/{name}", file=str(file), **options), name)
    return build_model(source.options, source, 5, shape, ["body", "penultimate"])


def test_class_and_function(file):
    for name, args, width in (("Net", {"width": 6}, 6), ("narrow", {}, 2)):
        out = build(name, file, args=args)(torch.rand(2, 3, 4, 4))
        assert out.logits.shape == (2, 5)
        assert out.features["penultimate"].shape == (2, width)


def test_one_text_is_one_module_and_another_text_another(file):
    one, two = build("Net", file).module, build("narrow", file).module
    assert type(one) is type(two)
    file.write_text(NET.replace("width=4", "width=5"))
    assert build("Net", file).module.body.out_channels == 5


def test_channels_are_the_recipes(file):
    assert build("Net", file, (1, 4, 4), in_channels=3)(torch.rand(2, 1, 4, 4)).logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("Nett", {}, r"net\.py defines no 'Nett'; did you mean 'Net'\?"),
        ("qqqqqq", {}, "it defines: Sizes, Net, narrow, wrong, broken"),
        ("Net", {"widht": 3}, r"Net\(num_classes=5, \.\.\.\) failed: TypeError: .*widht"),
        ("wrong", {}, r"wrong\(\) returned int, not a torch\.nn\.Module"),
        ("broken", {}, "ValueError: two lines"),
    ],
)
def test_mistakes_are_one_line(file, name, args, says):
    with pytest.raises(kdkit.ModelError, match=says) as caught:
        build(name, file, args=args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("import nothing_like_it", "cannot be imported: ModuleNotFoundError"),
        ("def (", "cannot be imported: SyntaxError"),
    ],
)
def test_files_that_do_not_load(tmp_path, content, says):
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(kdkit.ModelError, match=says):
        build("Net", path)
