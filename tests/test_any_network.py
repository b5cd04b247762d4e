"""Networks and teachers as people have them: one small input of each kind, at `check` and in training."""

import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import PLAIN as ON_ANY_DEVICE
from training import merged, train, write

import kdkit
from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun, evaluate

CPU = torch.device("cpu")
# some of these networks make tensors of their own, on the processor
PLAIN = merged(ON_ANY_DEVICE, {"train": {"device": "cpu"}})

NET = """\
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU(), nn.Linear(width, num_classes))
"""
OWN = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": {"model": "python/Net", "file": "net.py", "checkpoint": "w.pt"}}


def checked(folder, base=OWN, **changes):
    """What `kdkit check` says of a recipe beside a `net.py`."""
    if not (folder / "net.py").exists():
        (folder / "net.py").write_text(NET)
    return checks.make(recipe.load(write(folder, base, **changes)))


def refused(folder, base=OWN, **changes):
    """The one line with which `kdkit check` refuses it, without the place of the file."""
    with pytest.raises(RecipeError) as caught:
        checked(folder, base, **changes)
    (line,) = str(caught.value).splitlines()
    return line.replace(f"{folder}/", "")


def opened(result):
    """The run, read again by somebody who trusts its `net.py`."""
    return LoadedRun(result.folder, plugins=[result.folder.parent / "net.py"])


def refused_lines(folder, base, **changes):
    """All lines with which `kdkit check` refuses it."""
    with pytest.raises(RecipeError) as caught:
        checked(folder, base, **changes)
    return str(caught.value).splitlines()


def weights_of(classes=6, width=4, prefix=""):
    scope = {}
    exec(NET, scope)
    return {prefix + key: value.clone() for key, value in scope["Net"](classes, width).state_dict().items()}


FITS = {  # what the file holds, the prefix in the recipe, what `check` notes
    "plain": (weights_of(), "", ()),
    "data_parallel": (weights_of(prefix="module."), "", ("w.pt: the prefix `module.` of its keys is dropped",)),
    "nested": ({"epoch": 3, "state_dict": weights_of(prefix="model.")}, "", ("w.pt: the prefix `model.` of its keys is dropped",)),
    "net": ({"net": weights_of(), "optimizer": {"lr": 0.1}}, "", ()),
    "named_by_nobody": ({"my_own": weights_of(), "optimizer": {"lr": 0.1}}, "", ()),
    "average": (
        {"net": weights_of(), "model_ema": weights_of()},
        "",
        ("w.pt: the weights are those under `model_ema.`; it also has some under `net.`",),
    ),
    "average_chosen": ({"net": weights_of(), "model_ema": weights_of()}, "net.", ()),
    "two_networks": (
        {**weights_of(prefix="teacher."), **weights_of(width=2, prefix="student.")},
        "teacher.",
        ("w.pt: 4 keys without the prefix `teacher.` are left out (student.1.bias, student.1.weight, student.3.bias, ...)",),
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_checkpoint_weights_that_fit_are_taken_with_a_note(tmp_path, case):
    content, prefix, notes = FITS[case]
    torch.save(content, tmp_path / "w.pt")
    found = checked(tmp_path, teacher={"strip_prefix": prefix})
    assert tuple(note for note in found.notes if note.startswith("w.pt")) == notes


MISFITS = {  # what the file holds, what `check` says; `train` plans first, so it says the same
    "other_network": (
        weights_of(width=5),
        "does not fit: 3 keys of another shape (1.weight (5, 192), not (4, 192), 1.bias (5,), not (4,), ",
    ),
    "two_networks": (
        {**weights_of(prefix="teacher."), **weights_of(prefix="student.")},
        "with `strip_prefix: teacher.` or `student.` 4 of 4 keys would fit",
    ),
    "part": ({k: v for k, v in weights_of(prefix="a.").items() if "3" not in k}, "2 of 4 keys would fit"),
    "fewer_classes": (weights_of(3), "is a classifier ('3') of 3 classes, not of 6; a teacher needs weights for these classes"),
    "several": (
        {"a": weights_of(), "b": weights_of()},
        "weights under several keys; say which are meant by `strip_prefix`, one of `a.`, `b.`",
    ),
    "none": ({"epoch": 3, "best": 0.5}, "holds no weights, which are a mapping of tensors; it holds 2 keys (epoch, best)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_checkpoint_weights_that_do_not_fit_are_refused_at_check(tmp_path, case):
    content, says = MISFITS[case]
    torch.save(content, tmp_path / "w.pt")
    line = refused(tmp_path)
    assert line.startswith("recipe.yaml:") and ": teacher.checkpoint: w.pt" in line and says in line


def test_a_student_of_other_classes_is_told_of_a_new_head(tmp_path):
    save_file(weights_of(3), tmp_path / "w.safetensors")
    changes = {"student": {"model": "python/Net", "file": "net.py", "checkpoint": "w.safetensors"}}
    base = merged({**PLAIN, "student": None}, changes)
    assert "student.checkpoint: w.safetensors is a classifier ('3') of 3 classes, not of 6; `new_head: true` leaves it out" in refused(
        tmp_path, base
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_torchscript_archive_as_checkpoint_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "w.pt")
    assert "w.pt: is a TorchScript archive, whose code kdkit does not run" in refused(tmp_path)


NEEDS_NUMBERS = {  # a network that runs in torch, but not without numbers
    "numpy": """
    def forward(self, x):
        return self.fc(torch.from_numpy(np.tanh(x.detach().cpu().numpy())).flatten(1))
""",
    "looks_at_values": """
    def forward(self, x):
        x = x.flatten(1)
        return self.fc(x if x.mean() > 0 else -x)
""",
    "torchscript": """
    def forward(self, x):
        return self.inner(self.fc(x.flatten(1)))
""",
    "onnxruntime": """
    def forward(self, x):
        return torch.from_numpy(self.session.run(None, {"x": self.fc(x.flatten(1)).numpy()})[0])
""",
}
HARD = """import numpy as np
import torch
from pathlib import Path
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, num_classes)
        if (script := Path(__file__).parent / "inner.pt").exists():
            self.inner = torch.jit.load(str(script))
        if (graph := Path(__file__).parent / "inner.onnx").exists():
            import onnxruntime
            self.session = onnxruntime.InferenceSession(str(graph))
        own = Path(__file__).parent / "own.pt"
        if own.exists():
            self.fc.load_state_dict(torch.load(own))
"""
PLAIN_NET = {"model": "python/Net", "file": "net.py"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", NEEDS_NUMBERS)
def test_a_network_that_needs_numbers_to_run_is_checked_and_teaches(tmp_path, case):
    if case == "onnxruntime":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        value = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node("Neg", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [value("x", 1, ["B", 6])], [value("y", 1, ["B", 6])])
        onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "inner.onnx")
    if case == "torchscript":
        torch.jit.script(torch.nn.Linear(6, 6)).save(tmp_path / "inner.pt")
    (tmp_path / "net.py").write_text(HARD + NEEDS_NUMBERS[case])
    base = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": PLAIN_NET}
    found = checked(tmp_path, base)
    assert found.teachers[0].macs >= 3 * 8 * 8 * 6
    result = train(tmp_path, base, train={"epochs": 1})
    assert result.teacher is not None


def test_a_network_with_weights_of_its_own_is_not_called_random(tmp_path):
    (tmp_path / "net.py").write_text(HARD + NEEDS_NUMBERS["looks_at_values"])
    base = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": PLAIN_NET}
    assert any("the weights of teacher are random" in note for note in checked(tmp_path, base).notes)
    torch.save(torch.nn.Linear(3 * 8 * 8, 6).state_dict(), tmp_path / "own.pt")
    assert not any("random:" in note for note in checked(tmp_path, base).notes)


def test_images_of_a_size_that_a_network_does_not_take_are_still_told_as_such(tmp_path):
    (tmp_path / "net.py").write_text(HARD + NEEDS_NUMBERS["looks_at_values"])
    line = refused(tmp_path, {**PLAIN, "student": {"model": "mlp/8"}, "teacher": {**PLAIN_NET, "input_size": 9}})
    assert "teacher: teacher" in line and "mat1 and mat2 shapes cannot be multiplied (4x243 and 192x6)" in line and "got (" not in line


CHANGING = """\
import torch
from torch import nn
from torch.ao.quantization import PerChannelMinMaxObserver
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.ReLU())
        self.seen = PerChannelMinMaxObserver(ch_axis=1)
        self.register_buffer("range", torch.zeros(0))
        self.register_buffer("late", None)
        self.fc = nn.Linear(8, num_classes)
    def forward(self, x):
        if self.training:
            if not len(self.range):
                self.range, self.late = torch.ones(8), torch.ones(2)
{change}
        x = self.body(x)
        if self.training:
            self.seen(x)
        return self.fc(x * self.range if len(self.range) else x)
"""
PRUNED = """\
            if self.fc.in_features == 8:  # units are removed, once
                self.body[1].weight.data = self.body[1].weight.data[:5].clone()
                self.body[1].bias.data = self.body[1].bias.data[:5].clone()
                self.fc.weight.data = self.fc.weight.data[:, :5].clone()
                self.fc.in_features, self.range = 5, torch.ones(5)
"""


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.*:DeprecationWarning", "ignore:.*observer.*:UserWarning", "ignore:.*reduce_range.*:UserWarning"
)
@pytest.mark.parametrize(("change", "width"), [("", 8), (PRUNED, 5)], ids=["grown", "pruned"])
def test_a_student_whose_tensors_change_their_shape_is_read_again_wherever_it_is_needed(tmp_path, change, width):
    (tmp_path / "net.py").write_text(CHANGING.format(change=change))
    base = {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}
    result = train(tmp_path, base)
    assert not any("built again" in says for says in result.warnings)
    kept = load_file(result.student)
    assert kept["range"].shape == (width,) and kept["seen.min_val"].ndim == 1 and kept["late"].shape == (2,)
    assert kept["fc.weight"].shape == (6, width)
    assert [score.metrics["top1"] for score in evaluate(opened(result), device=CPU) if score.role == "student"] == [result.test["top1"]]
    images = torch.rand(4, 3, 8, 8)
    wanted = kdkit.load_student(result.folder, plugins=[tmp_path / "net.py"])(images).logits
    exported = export(opened(result), folder=tmp_path / "out")
    assert exported.files and torch.equal(opened(result).student()(images).logits, wanted)
    again = {
        **base,
        "name": "second",
        "student": {"model": "mlp/8"},
        "teacher": {"recipe": "recipe.yaml"},
        "run": {"folder": str(tmp_path)},
    }
    (tmp_path / "run").rename(tmp_path / "plain")
    write(tmp_path, again, name="second.yaml")
    assert kdkit.train(tmp_path / "second.yaml", folder=tmp_path / "second", quiet=True).teacher["top1"] == result.test["top1"]


def test_a_student_whose_tensors_change_their_shape_resumes(tmp_path):
    (tmp_path / "net.py").write_text(CHANGING.format(change=""))
    base = {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}
    whole = train(tmp_path, base, into="whole")
    train(tmp_path, base, into="stopped")
    for name in ("result.json", "student.safetensors"):
        (tmp_path / "stopped" / name).unlink()
    assert train(tmp_path, base, into="stopped").test == whole.test


@pytest.mark.filterwarnings("ignore:.*torch.ao.*:DeprecationWarning", "ignore:.*reduce_range.*:UserWarning")
def test_a_student_whose_tensors_change_their_shape_has_no_moving_average(tmp_path):
    (tmp_path / "net.py").write_text(CHANGING.format(change=""))
    base = {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}, "train": {**PLAIN["train"], "ema": {"decay": 0.9}}}
    with pytest.raises(
        kdkit.RunError, match=r"step 1: the student's '[\w.]+' has another shape than at the start, so that `train.ema` has"
    ):
        train(tmp_path, base)


STRANGE = {  # what a forward does to its network, and what is told when training ends
    "another_tensor": ("            self.scale = nn.Parameter(torch.ones(8))\n", "1 key unexpected (scale)"),
    "not_in_its_state": ("            self.fc.forward = lambda x: 3 * x[:, :6]\n", "its logits would differ by "),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.*:DeprecationWarning", "ignore:.*observer.*:UserWarning", "ignore:.*reduce_range.*:UserWarning"
)
@pytest.mark.parametrize("case", STRANGE)
def test_a_student_that_cannot_be_built_again_is_told_when_training_ends(tmp_path, case):
    change, says = STRANGE[case]
    (tmp_path / "net.py").write_text(CHANGING.format(change=change))
    result = train(tmp_path, {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}, train={"epochs": 1})
    (told,) = [warning for warning in result.warnings if "the student cannot be built again from" in warning]
    assert says in told and "so it cannot be evaluated or exported, nor teach" in told


TEN = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": {**PLAIN_NET, "checkpoint": "w.pt", "num_classes": 10}}
CHOSEN = [0, 2, 4, 6, 8, 9]


@pytest.fixture
def ten(tmp_path):
    """Beside the recipe, a network of ten classes with weights."""
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)
    torch.save(weights_of(10), tmp_path / "w.pt")
    return tmp_path


def test_chosen_classes_of_a_teacher_are_read_wherever_it_answers(ten):
    base = merged(TEN, {"teacher": {"classes": CHOSEN, "cache": {"views": 1}}, "run": {"folder": str(ten / "runs")}})
    hints = [{"use": "rkd_distance", "layers": [{"student": "logits", "teacher": "logits"}]}, {"use": "logit_kl"}]
    result = train(ten, {**base, "losses": hints}, teacher={"cache": {"what": "taps"}})
    run = opened(result)
    ((teacher,), batch) = run.teachers(), next(iter(run.data().test))
    scope = {}
    exec(NET, scope)
    network = scope["Net"](10).eval()
    network.load_state_dict(torch.load(ten / "w.pt"))
    assert torch.allclose(teacher(batch.inputs).logits, network(batch.inputs)[:, CHOSEN])
    assert {score.role: score.metrics for score in evaluate(run, device=CPU)}["teacher"] == pytest.approx(dict(result.teacher))


CLASSES = {  # what the teacher says of its classes, and what `check` says then
    "more": ({}, "'logit_kl' compares predictions with those of teacher, and its 10 classes are not the data's: `classes` says which are"),
    "unsaid": (
        {"num_classes": None},
        "is a classifier ('3') of 10 classes, not of 6; a teacher needs weights for these classes, or say which",
    ),
    "too_few": ({"classes": [0, 1]}, "teacher.classes: 2 different classes are named, and the data has 6"),
    "twice": ({"classes": [0, 1, 2, 3, 4, 4]}, "teacher.classes: 5 different classes are named, and the data has 6"),
    "too_high": ({"classes": [0, 1, 2, 3, 4, 10]}, "teacher.classes: class 10 of a network of 10, counted from 0"),
    "no_names": ({"classes": {"cat": 1}}, "teacher.classes: the data's classes have no names; give a list of numbers"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_that_cannot_be_chosen_are_refused_at_check(ten, case):
    changes, says = CLASSES[case]
    told = refused_lines(ten, TEN, teacher=changes)
    assert any(says in line for line in told), told


def test_classes_by_the_names_of_the_data(ten):
    data = {"dataset": {"use": "digits"}, "image_size": 8, "batch_size": 8}
    teacher = {"model": "mlp/8", "num_classes": 20, "classes": {str(digit): 19 - digit for digit in range(10)}}
    base = {**PLAIN, "data": data, "student": {"model": "mlp/8"}, "teacher": teacher}
    assert checked(ten, base).teachers[0].macs == 64 * 8 + 8 * 20
    del teacher["classes"]["3"]
    assert "teacher.classes: a number for each class of the data, please: " in refused(ten, base)


def test_a_loss_that_reads_the_classifier_of_such_a_teacher_is_refused(ten):
    layers = [{"student": "layer1", "teacher": "2"}]
    told = refused(ten, TEN, teacher={"classes": CHOSEN}, losses=[{"use": "srrl", "layers": layers}])
    assert "losses.0: " in told and "classifier" in told


ENCODER = """\
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 24))
"""
ON_LAYERS = [
    {"use": "hint", "adapter": "linear", "layers": [{"student": "layer1", "teacher": "1"}]},
    {"use": "rkd_distance", "layers": [{"student": "layer1", "teacher": "logits"}]},
]


@pytest.mark.parametrize("teacher", [PLAIN_NET, {"model": "test_resnet", "input_size": 32}], ids=["a_class_of_a_file", "timm"])
def test_a_teacher_without_classes_teaches_by_its_layers(tmp_path, teacher):
    (tmp_path / "net.py").write_text(ENCODER)
    losses = ON_LAYERS if teacher is PLAIN_NET else ON_LAYERS[1:]
    base = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": {**teacher, "num_classes": 0}, "losses": losses}
    result = train(tmp_path, base, train={"epochs": 1})
    assert result.teacher is None and "agreement" not in result.test
    assert not any("guessing" in warning for warning in result.warnings)
    assert {score.role for score in evaluate(opened(result), device=CPU)} == {"student"}
    line = refused(tmp_path, {**base, "losses": [{"use": "logit_kl"}]})
    assert "losses.0: 'logit_kl' compares predictions with those of teacher, and it has no classes" in line


@pytest.mark.parametrize(("last", "answers"), [("Softmax(1)", "softmax"), ("Sigmoid()", "sigmoid")])
def test_probabilities_given_for_logits_are_told_and_turned_into_logits(ten, last, answers):
    text = NET.replace("nn.Linear(width, num_classes))", f"nn.Linear(width, num_classes), nn.{last})")
    (ten / "net.py").write_text(text)
    torch.save(weights_of(6), ten / "w.pt")
    base = {**TEN, "teacher": {**PLAIN_NET, "checkpoint": "w.pt"}}
    (told,) = [says for says in train(ten, base, train={"epochs": 1}).warnings if "as probabilities do" in says]
    assert told.endswith(f"if they are, say `answers: {answers}`")
    result = train(ten, base, into="read", teacher={"answers": answers}, train={"epochs": 1})
    assert not any("probabilities" in says for says in result.warnings)
    (teacher,) = opened(result).teachers()
    scope = {}
    exec(NET, scope)
    network, images = scope["Net"](6).eval(), torch.rand(4, 3, 8, 8)
    network.load_state_dict(torch.load(ten / "w.pt"))
    logits = teacher(images).logits
    if answers == "softmax":  # up to a constant that no softmax sees
        assert torch.allclose(logits.softmax(1), network(images).softmax(1))
    else:
        assert torch.allclose(logits, network(images), atol=1e-5)


BLOCKS = """\
from torch import nn
def body():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, {width}))
"""
TWO_FILES = """\
from blocks import body
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(body(), nn.Linear({width}, num_classes))
"""


def test_a_network_of_two_files_of_which_both_are_part_of_the_run(tmp_path):
    base = {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}
    counts, marks = [], []
    for folder, width in (("a", 4), ("b", 5), ("a", 6)):  # other files of these names, and other texts of these files
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "blocks.py").write_text(BLOCKS.format(width=width))
        (tmp_path / folder / "net.py").write_text(TWO_FILES.format(width=width))
        counts.append(checked(tmp_path / folder, base).student.parameters)
        marks.append(recipe.load(tmp_path / folder / "recipe.yaml").fingerprint)
    assert counts == [193 * width + (width + 1) * 6 for width in (4, 5, 6)] and len(set(marks)) == 3


def test_a_module_of_the_same_name_from_elsewhere_stays_what_it_was(tmp_path, monkeypatch):
    theirs = types.ModuleType("blocks")
    monkeypatch.setitem(sys.modules, "blocks", theirs)
    (tmp_path / "blocks.py").write_text(BLOCKS.format(width=4))
    (tmp_path / "net.py").write_text(TWO_FILES.format(width=4))
    assert checked(tmp_path, {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}).student.macs
    assert sys.modules["blocks"] is theirs and str(tmp_path) not in sys.path


def test_a_plugin_of_two_files(tmp_path):
    (tmp_path / "halves.py").write_text("HALF = 0.5\n")
    plugin = """\
import kdkit
from halves import HALF
class Half(kdkit.Loss):
    \"\"\"Half of the mean squared difference of the logits.\"\"\"
    name = "halved"
    knowledge = "response"
    Options = kdkit.ResponseOptions
    def forward(self, student, teacher, batch):
        return HALF * (student.logits - teacher.logits).square().mean()
@kdkit.hookimpl
def kdkit_losses():
    return [Half]
"""
    (tmp_path / "half.py").write_text(plugin)
    base = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": {"model": "mlp/8"}, "plugins": ["half.py"], "losses": [{"use": "halved"}]}
    assert "halved" in checked(tmp_path, base).stages[0].formula


TWO_OUTPUTS = """\
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.ReLU())
        self.one, self.other = nn.Linear(4, num_classes), nn.Linear(4, num_classes)
    def forward(self, x):
        x = self.body(x)
        a, b = self.one(x), self.other(x)
        return (a, b) if self.training else (a + b) / 2
"""


def test_one_output_learns_from_labels_and_the_other_from_the_teacher(tmp_path):
    (tmp_path / "net.py").write_text(TWO_OUTPUTS)
    base = {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}
    for output, notes in ((0, 1), (1, 0)):
        found = checked(tmp_path, base, losses=[{"use": "cross_entropy"}, {"use": "logit_kl", "output": output}])
        assert sum("the student gives 2 outputs in training mode" in note for note in found.notes) == notes

    def moved(*losses):
        """Which of the two classifiers learn."""
        result = train(tmp_path, base, restart=True, losses=list(losses), train={"epochs": 1}, run={"snapshots": 1})
        fresh = opened(
            train(tmp_path, base, into="still", restart=True, losses=list(losses), train={"epochs": 1, "optimizer": {"lr": 1e-30}})
        )
        before, after = fresh.student().module, opened(result).student().module
        return [not torch.equal(getattr(before, name).weight, getattr(after, name).weight) for name in ("one", "other")]

    assert moved({"use": "cross_entropy"}) == [True, False]
    assert moved({"use": "logit_kl", "output": 1}) == [False, True]
    assert moved({"use": "cross_entropy"}, {"use": "logit_kl", "output": 1}) == [True, True]


def test_outputs_that_are_not_there_are_refused_at_check(tmp_path):
    (tmp_path / "net.py").write_text(TWO_OUTPUTS)
    base = {**PLAIN, "student": PLAIN_NET, "teacher": {"model": "mlp/8"}}
    line = refused(tmp_path, base, losses=[{"use": "cross_entropy"}, {"use": "logit_kl", "output": 2}])
    assert line.endswith("losses.1.output: there is no such output: the student gives 2 in training mode, counted from 0")
    (tmp_path / "net.py").write_text(TWO_OUTPUTS.replace("(a, b) if", "{'a': a} if"))
    assert "student: returns dict, no tensor of logits, nor several that begin with one" in refused(tmp_path, base)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_a_network_with_auxiliary_classifiers_as_its_library_makes_it(tmp_path):
    base = merged(PLAIN, {"student": None, "data": {"image_size": 64}, "teacher": None})
    base |= {"student": {"model": "torchvision/googlenet"}, "teacher": {"model": "mlp/8"}}
    assert any("the student gives 3 outputs in training mode" in note for note in checked(tmp_path, base).notes)


def test_a_divergence_to_each_teacher_teaches_the_mean_of_their_softened_predictions():
    student, first, second = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    loss = kdkit.build_loss("logit_kl", temperature=4)
    batch = kdkit.Batch(torch.rand(5, 3, 8, 8), torch.arange(5), torch.arange(5))

    def slope(*teachers):
        z = student.clone().requires_grad_(True)
        values = [loss(kdkit.Outputs(z), kdkit.Outputs(teacher), batch) for teacher in teachers]
        (gradient,) = torch.autograd.grad(torch.stack(values).mean(), z)
        return gradient

    softened = 4 * torch.stack([(first / 4).softmax(1), (second / 4).softmax(1)]).mean(0).log()  # logits that T = 4 makes the mean
    assert torch.allclose(slope(first, second), slope(softened), atol=1e-6)
    assert not torch.allclose(slope(first, second), slope(kdkit.combined([first, second])), atol=1e-3)  # softened after the mean
