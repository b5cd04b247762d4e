"""A teacher's answers from a file: they teach as the network that gave them, and what they cannot do is refused in one line."""

import numpy
import pytest
import torch
from safetensors.torch import save_file
from test_lockstep import STREAMS
from training import PLAIN, assert_same_run, merged, train, write

import kdkit
from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks
from kdkit.runs.run import Run
from kdkit.study.lockstep import train_together

NETWORK = {"model": "mlp/8"}
BASE = {**PLAIN, "student": {"model": "mlp/4"}, "train": {"epochs": 1, "optimizer": {"lr": 0.05}}}
FILE = {**BASE, "teacher": {"model": "answers/logits", "file": "teacher.npz"}}
ROWS = numpy.linspace(-2, 2, 48 * 6, dtype="float32").reshape(48, 6)


VIEWS = """\
import kdkit
class TwoViews(kdkit.Schedule):
    \"\"\"A teacher sees another view than its student.\"\"\"
    name, scheme, needs_teacher = "two_views", "offline", True
    def stages(self, models):
        student, teacher = models.student(), models.teacher()
        yield kdkit.Stage("two_views", [student], lambda b: [kdkit.Lesson(student(b.inputs), [teacher(b.views[0])])], views=2)
@kdkit.hookimpl
def kdkit_schedules():
    return [TwoViews]
"""


def refused(folder, base=FILE, **changes):
    with pytest.raises(RecipeError) as caught:
        checks.make(recipe.load(write(folder, base, **changes)))
    (line,) = str(caught.value).splitlines()
    return line.replace(f"{folder}/", "")


def answers_of(folder, teacher):
    """What the teacher of a recipe says of all training images."""
    from kdkit.data import loaders
    from kdkit.runs.networks import ModelFactory

    read = recipe.load(write(folder, {**BASE, "teacher": teacher}))
    source = read.plugins.datasets["synthetic"](read.spec.data.dataset)
    opened = loaders.prepare(read.spec.data, source, read.task, seed=0, device=torch.device("cpu"))
    network = ModelFactory(read, opened.info, {}, device=torch.device("cpu")).teacher()
    rows = torch.empty(48, 6)
    for batch in opened.train.epoch(0):
        rows[batch.index] = network(batch.inputs).logits
    return rows


def weights(result):
    from safetensors.torch import load_file

    return load_file(result.folder / "student.safetensors")


@pytest.mark.parametrize("file", ["teacher.npz", "teacher.safetensors"])
def test_an_answers_file_teaches_as_the_network_that_gave_it(file, tmp_path):
    rows = answers_of(tmp_path, NETWORK)
    if file.endswith("npz"):
        numpy.savez_compressed(tmp_path / file, logits=rows.numpy())
    else:
        save_file({"logits": rows}, tmp_path / file)
    by_network = train(tmp_path, {**BASE, "teacher": NETWORK}, "network")
    by_file = train(tmp_path, FILE, "file", teacher={"file": file})
    assert by_network.teacher and by_file.teacher is None
    for name, value in weights(by_network).items():
        torch.testing.assert_close(weights(by_file)[name], value, rtol=0, atol=1e-6)


HINT = [{"use": "hint", "layers": [{"student": "layer1", "teacher": "layer1"}]}]
MARGINS = [{"use": "cross_entropy"}, {"use": "srrl"}]
RECIPES = {
    "augment": ({"data": {"augment": {"crop_padding": 1}}}, "data.augment: changes images"),
    "timm_augment": ({"data": {"timm_augment": {}}}, "data.timm_augment: changes images"),
    "mixup": ({"train": {"mixup": {"mixup_alpha": 0.4}}}, "train.mixup: changes images"),
    "layers": ({"losses": HINT}, "losses.0: 'hint' looks at 'layer1' of teacher, which has answers alone, and no layers"),
    "checkpoint": ({"teacher": {"checkpoint": "teacher.npz"}}, "teacher.checkpoint: says how a network is built or asked"),
    "mode": ({"teacher": {"mode": "train"}}, "teacher.mode: says how a network is built or asked"),
    "cache": ({"teacher": {"cache": {"views": 1}}}, "teacher.cache: says how a network is built or asked"),
    "init": ({"student": {"init": {"from": "teacher"}}}, "student.init: teacher has answers alone, and no weights"),
    "student": ({"student": {"model": "answers/logits", "file": "teacher.npz"}}, "student.model: has answers alone, and no network"),
    "array": ({"teacher": {"model": "answers/logit"}}, "teacher.model: teacher.npz: has no array 'logit'; it has logits"),
    "classes": ({"teacher": {"num_classes": 9, "classes": [0, 1, 2, 3, 4, 5]}}, "teacher.model: 'logits' has 6 columns, for 9 classes"),
    "file": ({"teacher": {"file": "none.npz"}}, "teacher.file: no such file"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_what_an_answers_file_cannot_do_is_one_line(kind, tmp_path):
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS)
    changes, says = RECIPES[kind]
    assert f": {says}" in refused(tmp_path, **changes)


FILES = {
    "rows": (ROWS[:47], "'logits' has 47 rows, and the dataset's whole training part 48 samples"),
    "columns": (ROWS[:, :5], "'logits' has 5 columns, for 6 classes"),
    "sides": (ROWS.reshape(48, 2, 3), "'logits' is (48, 2, 3), not (N, K)"),
    "whole_numbers": (ROWS.astype("int64"), "teacher.npz: 'logits' is int64, not a row of floating-point logits"),
    "objects": (ROWS.astype(object), "teacher.npz: 'logits' is object, not a row of floating-point logits"),
    "not_finite": (numpy.where(ROWS[3, 1] == ROWS, numpy.nan, ROWS), "numbers that are not finite, first in row 3 (counted from 0)"),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_answers_file_that_does_not_fit_is_one_line(kind, tmp_path):
    rows, says = FILES[kind]
    numpy.savez(tmp_path / "teacher.npz", logits=rows)
    line = refused(tmp_path)
    assert ": teacher.model: " in line and says in line


@pytest.mark.parametrize("name", ["teacher.npz", "teacher.safetensors"])
@pytest.mark.parametrize("left", [0, 40, 700])
def test_a_damaged_answers_file_is_one_line(left, name, tmp_path):
    whole = tmp_path / name
    if name.endswith("npz"):
        numpy.savez(whole, logits=ROWS)
    else:
        save_file({"logits": torch.from_numpy(ROWS)}, whole)
    whole.write_bytes(whole.read_bytes()[:left])
    assert "or damaged: " in refused(tmp_path, teacher={"file": name})


def test_probabilities_are_noted_and_classes_can_be_chosen(tmp_path):
    numpy.savez(tmp_path / "teacher.npz", logits=torch.from_numpy(ROWS).softmax(1).numpy())
    told = checks.make(recipe.load(write(tmp_path, FILE)))
    assert any("say `answers: softmax`" in note for note in told.notes) and not any("random" in note for note in told.notes)
    numpy.savez(tmp_path / "teacher.npz", logits=numpy.concatenate([ROWS, ROWS[:, :1]], 1))
    train(tmp_path, merged(FILE, {"teacher": {"num_classes": 7, "classes": [0, 1, 2, 3, 4, 6]}}))


def test_runs_in_lockstep_read_one_answers_file(tmp_path):
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS.astype("float16"))
    found = []
    for name, rate in (("slow", 0.01), ("fast", 0.1)):
        path = write(tmp_path, merged(FILE, {"name": name, "train": {"optimizer": {"lr": rate}}}), f"{name}.yaml")
        found.append(Run(recipe.load(path), tmp_path / "together" / name))
    assert [outcome.reason for outcome in train_together(found)] == [None, None]
    for job in found:
        alone = kdkit.train(job.recipe.source.path, folder=tmp_path / job.recipe.spec.name, quiet=True)
        assert_same_run(alone.folder, job.folder)


def test_a_study_with_an_answers_file_tells_no_agreement(tmp_path):
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS)
    variants = {"one": {}, "two": {"losses": [{"use": "logit_kl"}]}}
    study = {"name": "s", "question": "why?", "base": FILE, "baseline": "one", "variants": variants}
    found = kdkit.compare(write(tmp_path, study, "study.yaml"), seeds=1)
    assert all("agreement" not in variant.last and variant.last["top1"] for variant in found.variants)


def test_an_answers_file_for_a_stream_is_refused(tmp_path):
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS)
    (tmp_path / "streams.py").write_text(STREAMS)
    base = {**FILE, "data": {"dataset": {"use": "flow"}, "batch_size": 8}, "plugins": ["streams.py"]}
    assert "teacher.model: this dataset is read from start to end" in refused(tmp_path, base)


def test_an_answers_file_for_further_views_is_refused(tmp_path):
    numpy.savez(tmp_path / "teacher.npz", logits=ROWS)
    (tmp_path / "views.py").write_text(VIEWS)
    says = "stage 'two_views' shows 2 views of each image at once, to which teacher has no answers"
    assert f"teacher.model: {says}" in refused(tmp_path, plugins=["views.py"], schedule={"use": "two_views"})
