"""A run told to people: in words, in blocks, as a picture."""

import io
import json
import re
import shutil
import sys

import pytest
import yaml
from matplotlib import image

import kdkit
from kdkit import cli
from kdkit.contracts.task import ScoreInfo
from kdkit.runs.folder import RunFolder
from kdkit.students import curves, show
from kdkit.students.curves import Curve
from kdkit.students.show import Story, brief, score_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    (folder / "r.yaml").write_text(
        "{name: told, seed: 3, data: {dataset: {use: digits}, train_samples: 64, validation: 64, augment: {crop_padding: 1}}, "
        "student: {model: mlp/8}, teacher: {model: mlp/32, activation: gelu}, schedule: {use: offline}, "
        "losses: [{use: cross_entropy, weight: 0.1}, {use: logit_kl, weight: {from: 0, to: 1, epochs: 2}, temperature: 3}], "
        "metrics: [MulticlassCohenKappa], train: {epochs: 1, optimizer: {lr: 0.1}, device: cpu}}"
    )
    return kdkit.train(folder / "r.yaml", folder=folder / "r", quiet=True)


def lines(epochs, stages=("warm", "main")):
    """metrics.jsonl of stages of so many epochs, each with a term of its own and measured every second epoch."""
    for number, stage in enumerate(stages, 1):
        for epoch in range(1, epochs + 1):
            train = {"loss": 4.0 / epoch, f"term{number}": 8.0 / epoch, f"term{number}.weighted": 4.0 / epoch}
            scores = {"test": {"top1": 10.0 * number + epoch}, "peers": [{"test": {"top1": 5.0}}]} if epoch % 2 == 0 else {}
            yield {"kind": "epoch", "stage": stage, "epoch": epoch, "step": epoch * 7, "lr": 0.1 / epoch, "train": train, **scores}


@pytest.fixture
def unfinished(run, tmp_path):
    """The folder of a run of two stages that has not come to its end."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(run.folder / name, folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(4)))
    return folder


def run_cli(monkeypatch, *words):
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_finished_run_is_told(run, monkeypatch, capsys):
    assert run_cli(monkeypatch, "show", run.folder) == 0
    out = capsys.readouterr().out
    assert "0.1 * cross_entropy + (0 -> 1 in 2 epochs) * logit_kl (temperature 3)" in out
    test = next(line for line in out.splitlines() if line.startswith("student, test, last epoch"))
    assert f"{run.test['top1']:.2f}" in test and f"{run.test['agreement']:.2f}" in test
    assert f"{run.teacher['nll']:.4f}" in next(line for line in out.splitlines() if line.startswith("teacher, test"))
    assert "cross_entropy, weighted" in out and "top-1 %, validation" in out
    assert re.search(r"^outputs +10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 *$", out, re.MULTILINE)
    assert (run.folder / "curves.png").is_file() and str(run.folder / "curves.png") in out


def test_scores_of_classes_are_told_in_a_line_for_each_kind():
    parts = [ScoreInfo(name=f"ap/{name}", title=name, unit="%", part_of="AP") for name in ("cat", "dog", "eel")]
    scores = [ScoreInfo(name="map", title="mAP", unit="%"), *parts, ScoreInfo(name="mae/x", title="x", digits=3, part_of="MAE")]
    assert list(show._parts({"map": 1.0, "ap/cat": 50.0, "ap/eel": 99.5, "mae/x": 0.25}, scores)) == [
        "AP %, test: cat 50.00, eel 99.50",
        "MAE, test: x 0.250",
    ]
    many = [ScoreInfo(name=f"ap/{i}", title=f"n{i}", part_of="AP") for i in range(21)]
    (line,) = show._parts({score.name: 1.0 for score in many}, many)
    assert line.endswith("n19 1.00, ... (21 in all)") and "n20" not in line


def scores_shown(folder):
    """The headings of the table of scores, and the cells of its last row, the teacher's."""
    table = score_table([("student", folder.result().test), ("teacher", folder.result().teacher)], folder.scores())
    return [str(column.header) for column in table.columns[1:]], [list(column.cells)[-1] for column in table.columns[1:]]


def test_scores_have_the_titles_and_digits_that_the_run_has_taken_down(run):
    heads, cells = scores_shown(RunFolder(run.folder))
    assert heads[:2] == ["top-1 %", "top-5 %"]
    assert heads[-5:] == ["ECE % ↓", "MulticlassCohenKappa", "agreement %", "KL to teacher, nats ↓", "mean |z_s - z_t| ↓"]
    assert cells[-4:] == [f"{run.teacher['MulticlassCohenKappa']:.4f}", "-", "-", "-"] and cells[0] == f"{run.teacher['top1']:.2f}"


def test_an_output_that_lacks_a_sign_shows_an_escape(run, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert run_cli(monkeypatch, "show", run.folder) == 0
    output.flush()
    assert rb"NLL, nats \u2193" in output.buffer.getvalue()


def test_a_run_of_an_older_kdkit_is_one_of_classification(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run.folder, tmp_path / "older")
    about = json.loads((run.folder / "run.json").read_text())
    for key in ("scores", "agreement", "sha256"):
        del about[key]
    (tmp_path / "older" / "run.json").write_text(json.dumps(about))
    heads, cells = scores_shown(RunFolder(tmp_path / "older"))
    assert heads[0] == "top-1 %" and cells[heads.index("NLL, nats ↓")] == f"{run.teacher['nll']:.4f}"
    assert run_cli(monkeypatch, "show", tmp_path / "older") == 0
    said = capsys.readouterr().out
    assert "top-1 %, validation" in said and (tmp_path / "older" / "curves.png").is_file()


def test_the_recipe_in_brief(run):
    said = dict(brief(yaml.safe_load((run.folder / "recipe.yaml").read_text())))
    assert said["run"] == "told, seed 3"
    assert said["student"] == "mlp/8 (activation relu)" and said["teacher"] == "mlp/32 (activation gelu)"
    assert said["schedule"] == "offline (combine probabilities, per_sample none)"
    assert said["data"] == "digits, train_samples 64, validation 64, batches of 64, augment (crop_padding 1)"
    assert said["train"] == "1 epochs, sgd, lr 0.1 cosine, fp32"


def test_a_loss_s_layers_and_a_recipe_s_teacher_in_brief(run):
    content = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    content["teacher"] = {"recipe": "/a/big.yaml", "mode": "train"}
    content["losses"] = [{"use": "hint", "weight": 2.0, "layers": [{"student": "a", "teacher": "b"}], "adapter": "linear", "off": False}]
    said = dict(brief(content))
    assert said["teacher"] == "the student of /a/big.yaml (mode train)"
    assert said["total"] == "2 * hint (a ~ b, adapter linear)"


def test_an_unfinished_run_is_told_as_far_as_it_goes(unfinished, monkeypatch, capsys):
    assert run_cli(monkeypatch, "show", unfinished, "--png", unfinished / "here" / "p.png") == 0
    out = capsys.readouterr().out
    assert "not finished: 8 epochs so far" in out and "  term2, weighted" in out
    assert (unfinished / "here" / "p.png").is_file() and not (unfinished / "curves.png").exists()


def test_a_run_without_an_epoch_has_no_picture(unfinished, monkeypatch, capsys):
    (unfinished / "metrics.jsonl").unlink()
    assert run_cli(monkeypatch, "show", unfinished) == 0
    assert "not finished: no epoch so far" in capsys.readouterr().out
    assert not (unfinished / "curves.png").exists()
    with pytest.raises(kdkit.RunError, match="no curves to draw"):
        Story(unfinished).draw()


@pytest.mark.parametrize(("name", "says"), [("x.nothing", "cannot be written"), ("no_folder", "no run folder")])
def test_show_of_what_is_no_run_is_one_line(name, says, unfinished, monkeypatch, capsys):
    words = [unfinished, "--png", unfinished / name] if "." in name else [unfinished / name]
    assert run_cli(monkeypatch, "show", *words) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_a_folder_that_cannot_be_written_into_is_shown_without_a_picture(unfinished, monkeypatch, capsys):
    (unfinished / "curves.png").mkdir()
    try:
        assert run_cli(monkeypatch, "show", unfinished) == 0
    finally:
        (unfinished / "curves.png").rmdir()
    said = capsys.readouterr().out
    assert "cross_entropy" in said and f"no picture of the curves: {unfinished / 'curves.png'}: cannot be written" in said


def test_curves_run_on_over_the_stages(unfinished):
    found = curves.read(RunFolder(unfinished))
    assert found.stages == [(0, "warm"), (4, "main")] and found.epochs == 8
    assert found.losses["loss"].x == list(range(1, 9))
    assert found.losses["term2"] == Curve([5, 6, 7, 8], [4.0, 2.0, 4.0 / 3, 1.0])
    assert found.scores["test"]["top1"] == Curve([2, 4, 6, 8], [12.0, 14.0, 22.0, 24.0])
    assert found.scores["test, student 2"]["top1"].y == [5.0] * 4
    assert found.lr.y[:2] == [0.1, 0.05]


def test_a_curve_has_no_point_for_what_is_no_number(unfinished):
    measured = [{**line, "test": {"top1": None if line["epoch"] == 2 else 3.0, "nll": None}} for line in lines(4, ("main",))]
    (unfinished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    assert curves.read(RunFolder(unfinished)).scores["test"] == {"top1": Curve([1, 3, 4], [3.0] * 3)}


def test_a_stage_that_comes_again_is_another_stretch(unfinished):
    (unfinished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(2, ("a", "b", "a"))))
    assert curves.read(RunFolder(unfinished)).stages == [(0, "a"), (2, "b"), (4, "a")]


def test_curve_blocks_rise_with_the_values():
    assert curves.blocks(Curve([1, 2, 3], [0.0, 3.5, 7.0]), 3, 10) == "▁▅█"
    assert curves.blocks(Curve([1, 2, 3, 4], [7.0, 0.0, 0.0, 7.0]), 4, 2) == "▁█"  # two epochs a character: the later one
    assert curves.blocks(Curve([1, 2], [2.0, 2.0]), 2, 10) == "▄▄"


def test_curve_blocks_stand_where_the_epochs_are():
    assert curves.blocks(Curve([3, 4], [1.0, 2.0]), 6, 10) == "  ▁█  "
    assert curves.blocks(Curve([2, 4], [1.0, 2.0]), 4, 10) == " ▁▁█"  # an epoch that was not measured shows the one before


def test_curves_do_not_run_from_one_stage_into_the_next(unfinished):
    found = curves.read(RunFolder(unfinished))
    loss = found.losses["loss"]
    xs, ys = curves.broken(loss.x, loss.y, found.stages)
    assert xs == [1, 2, 3, 4, 4, 5, 6, 7, 8] and ys[4] != ys[4]


def test_the_picture_of_curves_is_light_and_has_lines_that_differ_in_grey(unfinished):
    picture = image.imread(Story(unfinished).draw())
    height, width, _ = picture.shape
    assert height > 800 and width > 800
    grey = picture[..., :3].mean(2)
    assert (grey > 0.99).mean() > 0.8  # mostly paper
    assert (picture[0, 0, :3] == 1).all()
    inked = picture[..., :3][(picture[..., :3].max(2) - picture[..., :3].min(2)) > 0.4]
    assert len({tuple((color * 8).round()) for color in inked}) >= 3  # three colours at least
    lightness = [sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in curves.COLORS[:4]]
    assert min(abs(a - b) for a, b in zip(lightness, lightness[1:], strict=False)) > 20
    pairs = {(curves.COLORS[i % len(curves.COLORS)], curves.DASHES[i % len(curves.DASHES)]) for i in range(50)}
    assert len(pairs) == 50
