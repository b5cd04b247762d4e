"""The report of a tiny study: what the page holds, that it stands alone, and that its figures are the runs'."""

import csv
import io
import json
import re
import shutil
import statistics
from html.parser import HTMLParser

import pytest
import torch
from kdkit_plugins.tasks._classes import Classes
from PIL import Image
from training import PLAIN, merged, write
from typer.testing import CliRunner

import kdkit
from kdkit.cli import app
from kdkit.errors import RecipeError, RunError
from kdkit.students.loaded import LoadedRun
from kdkit.study.findings import Findings
from kdkit.study.report import output as report

ALONE = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
SHORT = {"data": {"dataset": {"test": 60}}, "train": {"epochs": 3}, "metrics": ["MulticlassCohenKappa"]}
VOID = ("meta", "link", "img", "br", "hr", "input", "wbr")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two variants with two seeds each, taught by a recipe's student."""
    folder = tmp_path_factory.mktemp("report")
    plain = merged(merged(PLAIN, SHORT), {"run": {"folder": str(folder)}})
    write(folder, merged(plain, {"name": "teacher", **ALONE}), "teacher.yaml")
    taught = {**plain, "name": "taught", "teacher": {"recipe": str(folder / "teacher.yaml")}}
    for seed in (0, 1):
        for recipe in (merged(taught, {"name": "alone", **ALONE}), taught):
            path = write(folder, recipe, f"{recipe['name']}.yaml", seed=seed)
            kdkit.train(path, folder=folder / "study" / f"{recipe['name']}-seed{seed}", quiet=True)
    return folder / "study"


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    return report.write([runs], tmp_path_factory.mktemp("out"))


class Reader(HTMLParser):
    """Takes a page apart, and complains of what is not well-formed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.links, self.ids, self.images, self.drawings = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.ids += [value for key, value in attributes if key == "id"]
        if tag in ("img", "svg"):
            (self.images if tag == "img" else self.drawings).append(dict(attributes))
        assert tag not in ("script", "iframe", "object", "link")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.get_starttag_text() == "<wbr>" and self.words:  # within a word
            data = self.words.pop() + data
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def result(runs, name, seed):
    return json.loads((runs / f"{name}-seed{seed}" / "result.json").read_text())


def test_the_page_of_a_report_is_complete(runs, written):
    page = Reader(written.page.read_text())
    for title in (
        "Protocol", "Results", "Cost", "Learning curves", "Agreement with the teacher", "Classes and confusions",
        "What the teacher knows that labels do not say", "Similar layers", "How to repeat it",
    ):  # fmt: skip
        assert title in page.text
    for name in ("alone", "taught"):
        values = [result(runs, name, seed)["test"]["top1"] for seed in (0, 1)]
        assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in page.text
        assert f"Recipe of {name}" in page.text
    assert "use: logit_kl" in page.text and "--run again/taught-seed1" in page.text and torch.__version__.split("+")[0] in page.text
    assert written.missing == ()
    kappa = [result(runs, "taught", seed)["test"]["MulticlassCohenKappa"] for seed in (0, 1)]
    assert "MulticlassCohenKappa" in page.text and f"{statistics.mean(kappa):.4f} ± {statistics.stdev(kappa):.4f}" in page.text


def test_the_page_stands_alone_and_its_pictures_are_there(written):
    page = Reader(written.page.read_text())
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert (
        all(link.startswith("#") for link in re.findall(r"url\((.*?)\)", written.page.read_text()))
        and "@import" not in written.page.read_text()
    )
    drawn = {file.stem: file for file in (written.page.parent / "report").iterdir()}
    for start in ("score-against-cost", "learning-curves-1", "training-loss-1", "losses-2", "agreement-1", "logit-difference-1", "kl-to-teacher-1",
                  "class-accuracy", "confusion-change", "similar-layers-2"):  # fmt: skip
        assert start in drawn
    assert len(page.drawings) == len(drawn) - 1 and not page.images  # the differences are a table there
    assert all(len(one["aria-label"]) > 20 for one in page.drawings)
    for file in drawn.values():
        content = file.read_bytes()
        picture = Image.open(io.BytesIO(content)).convert("L")
        low, high = picture.getextrema()
        assert high == 255 and low < 120, "something is drawn"
        border = [
            *picture.crop((0, 0, picture.width, 2)).get_flattened_data(),
            *picture.crop((0, 0, 2, picture.height)).get_flattened_data(),
        ]
        assert min(border) > 250, "nothing is cut at the top or the left"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pdf", "svg", "png"])
def test_figures_for_papers_are_all_those_of_the_page(runs, written, tmp_path, form):
    done = CliRunner().invoke(app, ["report", str(runs), "--output", str(tmp_path), "--figures", form])
    assert done.exit_code == 0
    assert {file.stem for file in (tmp_path / "figures").glob(f"*.{form}")} == {
        file.stem for file in (written.page.parent / "report").iterdir()
    }


def test_csv_and_json_are_the_results(runs, written):
    rows = list(csv.DictReader(io.StringIO((written.page.parent / "report.csv").read_text())))
    assert [(row["variant"], row["seed"]) for row in rows] == [("alone", "0"), ("alone", "1"), ("taught", "0"), ("taught", "1")]
    figures = json.loads((written.page.parent / "report.json").read_text())
    for row in rows:
        own = result(runs, row["variant"], row["seed"])["test"]
        assert {key: float(row[f"last.{key}"]) for key in own} == own
        assert float(row["seconds"]) == result(runs, row["variant"], row["seed"])["seconds"]
    variants = {one["name"]: one for one in figures["findings"]["variants"]}
    for name, variant in variants.items():
        assert variant["last"]["top1"] == [result(runs, name, seed)["test"]["top1"] for seed in (0, 1)]
    gained = [result(runs, "taught", seed)["test"]["top1"] - result(runs, "alone", seed)["test"]["top1"] for seed in (0, 1)]
    assert variants["taught"]["difference"]["values"] == pytest.approx(gained)
    course = figures["courses"]["taught"]["scores"]["top1"]
    assert course["mean"][-1] == pytest.approx(statistics.mean(variants["taught"]["last"]["top1"]))
    assert course["deviation"][-1] == pytest.approx(statistics.stdev(variants["taught"]["last"]["top1"]))


def test_classes_and_confusions_are_those_of_the_students(runs, written):
    figures = json.loads((written.page.parent / "report.json").read_text())
    run = LoadedRun(runs / "taught-seed1")
    student, counts = run.student(), torch.zeros(6, 6)
    for batch in run.data().test:
        for true, guess in zip(batch.labels.tolist(), student(batch.inputs).logits.argmax(1).tolist(), strict=True):
            counts[true, guess] += 1
    assert torch.allclose(torch.tensor(figures["confusion"]["taught"]["1"]), 100 * counts / counts.sum(1, keepdim=True))
    both = torch.tensor([figures["confusion"]["taught"][seed] for seed in ("0", "1")])
    assert torch.allclose(torch.tensor(figures["class_accuracy"]["taught"]), both.mean(0).diag())


def test_examples_are_images_that_the_teacher_gets_right_with_its_second_thoughts(runs, written):
    figures = json.loads((written.page.parent / "report.json").read_text())
    run = LoadedRun(runs / "taught-seed0")
    batches = list(run.data().test)
    labels = torch.cat([batch.labels for batch in batches])
    z = torch.cat([run.teachers()[0](batch.inputs).logits for batch in batches])
    right = {}
    for place in range(len(z)):
        if z[place].argmax() == labels[place]:
            chance = float(z[place].softmax(0).sort(descending=True).values[1])
            right.setdefault(int(labels[place]), []).append((chance, place))
    right = {label: sorted(found, reverse=True) for label, found in right.items()}
    unsure = sorted((found[0] for found in right.values()), reverse=True)[:3]
    known = {int(labels[place]) for _, place in unsure}
    medians = [right[label][len(right[label]) // 2] for label in [*sorted(right.keys() - known), *sorted(known)]]
    expected = [place for _, place in [*unsure, *[one for one in medians if one not in unsure][:3]]]
    assert [one["index"] for one in figures["examples"]] == expected
    assert [one["label"] for one in figures["examples"]] == labels[expected].tolist()


def test_a_report_tells_missing_runs_and_writes_the_rest(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "moved" / "study")  # the teacher's run lies beside the study, and stays behind
    for marker in (tmp_path / "moved" / "study").glob("*/recipe.yaml"):
        marker.write_text(marker.read_text().partition("\n")[2].replace(str(runs.parent), str(tmp_path / "moved")))  # without the digest
    (tmp_path / "moved" / "study" / "alone-seed0" / "student.safetensors").unlink()
    written = report.write([tmp_path / "moved" / "study"])
    assert any("the run that trained its teacher" in what for what in written.missing)
    page = Reader(written.page.read_text())
    assert "Left out:" in page.text and "alone, seed 0, has no result" in page.text
    assert "so its answers are not drawn" in page.text and "use: logit_kl" in page.text
    assert (written.page.parent / "report" / "learning-curves-1.png").is_file()


def test_a_report_of_one_run_by_the_command(runs, tmp_path):
    done = CliRunner().invoke(app, ["report", str(runs / "taught-seed0"), "--output", str(tmp_path / "new")])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "new" / "report.html")
    page = Reader((tmp_path / "new" / "report.html").read_text())
    assert (tmp_path / "new" / "report.tex").is_file() and not (tmp_path / "new" / "figures").exists()
    assert re.search(r"taught reaches \d+\.\d\d % top-1 on the test data after the last epoch \(one seed, so no deviation\)", page.text)
    assert "±" not in page.text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("task", "other", "different tasks have no common table (classification: {0}; other: {1})"),
        ("scores", [{"name": "mae", "title": "MAE"}], "different deciding scores have no common table (top-1: {0}; MAE: {1})"),
    ],
)
def test_runs_of_several_tasks_or_deciding_scores_have_no_report(runs, tmp_path, key, value, says):
    shutil.copytree(runs / "alone-seed0", tmp_path / "other")
    marker = tmp_path / "other" / "run.json"
    about = json.loads(marker.read_text())
    del about["sha256"]
    marker.write_text(json.dumps({**about, key: value}))
    done = CliRunner().invoke(app, ["report", str(runs / "alone-seed0"), str(tmp_path / "other")])
    says = says.format(runs / "alone-seed0", tmp_path / "other")
    assert isinstance(done.exception, RecipeError) and str(done.exception) == says
    del about[key]  # as an older kdkit wrote it
    marker.write_text(json.dumps(about))
    assert report.gather([runs / "alone-seed0", tmp_path / "other"])


def test_answers_that_are_no_classes_are_not_drawn(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Classes, "fits", lambda *_: False)
    page = Reader(report.write([runs], tmp_path).page.read_text())
    assert "Classes and confusions" not in page.text and "What the teacher knows" not in page.text
    assert "Similar layers" in page.text and "Linear CKA" in page.text and "Left out" not in page.text
    assert json.loads((tmp_path / "report.json").read_text())["confusion"] == {}


def test_an_override_that_cannot_be_is_an_error(runs, tmp_path):
    with pytest.raises(RecipeError, match="data.datset: no such key"):
        report.write([runs / "taught-seed0"], tmp_path, {"data.datset.root": "/images"})
    with pytest.raises(RecipeError, match="only `data.` keys"):
        report.write([runs / "taught-seed0"], tmp_path, {"seed": 3})


def test_a_report_of_the_same_study_from_its_file(runs, tmp_path):
    findings, home = report.gather([runs])
    assert home == runs
    findings.save(tmp_path / "study.json")
    again, home = report.gather([tmp_path])
    assert again == findings and home == tmp_path
    for folder in runs.iterdir():
        if folder.is_dir():
            shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    shutil.copy(tmp_path / "study.json", tmp_path / "elsewhere")
    gone = json.loads((tmp_path / "study.json").read_text())
    for variant in gone["variants"]:
        variant["folders"] = [folder.replace(str(runs), "/nowhere") for folder in variant["folders"]]
    del gone["sha256"]
    (tmp_path / "elsewhere" / "study.json").write_text(json.dumps(gone))
    moved, _ = report.gather([tmp_path / "elsewhere"])
    assert moved.variants[0].folders[0] == tmp_path / "elsewhere" / "alone-seed0"


def test_a_report_of_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(RunError, match="neither a study"):
        report.gather([tmp_path])


def test_findings_without_variants_are_none(tmp_path):
    Findings("s", "", "a", "", (), None, {}, {}, {}).save(tmp_path / "study.json")
    with pytest.raises(RunError, match="no variants"):
        report.gather([tmp_path])
