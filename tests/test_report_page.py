"""Sections as a page and as Markdown: nothing that a user wrote is markup; pages of few and many variants."""

import io
import itertools
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import Reader

from kdkit.contracts.task import ScoreInfo
from kdkit.study import intervals
from kdkit.study.findings import Cost, Findings, Length, Teacher, Variant
from kdkit.study.report import latex, sections
from kdkit.study.report.document import Document, Facts, Figures, Listing, Picture, Pictures, Section, Words
from kdkit.study.report.drawing import blank, inline, paper, png, titled
from kdkit.study.report.forest import against, forest
from kdkit.study.report.mean_curves import Course, Courses
from kdkit.study.report.page import PIXELS, html, markdown
from kdkit.study.report.predictions import Answers
from kdkit.study.report.sections import Material

EVIL = '<script>alert("1")</script> & <b>'
LARGEST = 3 * 2**20


def document():
    figure = blank(2, 1)
    titled(figure, "of $5 and $7_2 <b>")
    blocks = [
        Words(EVIL), Facts([(EVIL, "a|b")]), Figures(["a|b", EVIL], [["`x`", "*1*"], ["r", "2"]], "of *what*", marked=1),
        Pictures(EVIL, [Picture("drawn", figure, f"shows {EVIL}", wide=True), Picture("photo", blank(2, 1), "pixels", photo=True)], EVIL),
        Listing("folded", f"{EVIL}\n```\nname: x"), Listing("open", EVIL, folded=False),
    ]  # fmt: skip
    return Document(EVIL, EVIL, [EVIL, "second"], [Section("What?", blocks)])


def test_the_page_shows_names_letter_by_letter():
    text = html(document())
    assert "<script" not in text and "<b>" not in text
    page = Reader(text)
    # its heading and title, question, answer, paragraph, fact, header, figure's title and caption, both listings
    assert page.text.count(EVIL) == 11
    assert page.drawings[0]["aria-label"] == f"shows {EVIL}" and page.drawings[0]["width"] == str(2 * PIXELS)
    assert [one["alt"] for one in page.images] == ["pixels"] and "of $5 and $7_2 <b>" in page.text


def test_markdown_shows_them_likewise():
    text = markdown(document(), "report")
    lines = text.splitlines()
    assert '| a\\|b | \\<script\\>alert("1")\\</script\\> & \\<b\\> |' in lines
    assert "| \\`x\\` | \\*1\\* |" in lines and "| :-- | --: |" in lines
    assert any(line.startswith("![shows \\<script") and line.endswith("](report/drawn.png)") for line in lines)
    assert any(line.startswith("**Figure 1. ") for line in lines)
    fenced = text[text.index("````text") :]
    assert fenced.index("\n```\n") < fenced.index("\n````\n")


def test_a_picture_of_many_colours_is_a_small_file():
    from PIL import Image

    picture = Image.open(io.BytesIO(png(next(document().pictures).figure)))
    assert picture.mode == "P" and picture.size == (340, 170)


def test_a_picture_on_the_page_takes_its_colours_and_letters_from_it():
    figure = blank(2, 1)
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color="#0072B2", label="#0072b2")
    axes.text(1, 3, "#0072b2")
    element = inline(figure, "one")
    assert "var(--line0)" in element and ">#0072b2<" in element  # a name is no colour
    assert "<style" not in element and "DejaVu" not in element
    ids = [set(re.findall(r'id="([^"]+)"', inline(figure, name))) for name in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]
    assert all(paper(figure, "one", form) == paper(figure, "one", form) for form in ("pdf", "svg", "png"))
    assert paper(figure, "one", "pdf").startswith(b"%PDF")


SCORE = ScoreInfo(name="top1", title="top-1", unit="%")
KL = ScoreInfo(name="kl/to|teacher", title="KL", unit="nats", higher_is_better=False, meaning="KL (a/b)")
COST = Cost(3, 4, 2**20, 1000, 1234, 5_000_000, 2048, 0.001)


def material(count, *, spread=1.0, seeds=3, score=SCORE, long=False):
    """A study of so many variants, whose scores differ by about `spread`."""
    chance = random.Random(0)
    names = ["alone", *(f"{'a_rather_long_name_of_a_' if long else ''}variant_{i}" for i in range(1, count))]
    variants, courses = [], {}
    for i, name in enumerate(names):
        level = 80 + spread * i
        last = tuple(level + spread * chance.gauss(0, 0.3) for _ in range(seeds))
        folders = tuple(Path(f"{name}-seed{seed}") for seed in range(seeds))
        length = Length(100, 10, 40, 1000)
        variants.append(
            Variant(name, f"1 * cross_entropy + {i} * kd", tuple(range(seeds)), folders, {score.name: last}, {}, None, COST, length=length)
        )
        epochs = tuple(range(1, 11 + 5 * (i == 1 and long)))
        line = Course(epochs, tuple(level - 60 * spread / x**2 for x in epochs), (0.5 * spread,) * len(epochs))
        down = Course(epochs, tuple(spread / x**3 for x in epochs), (spread,) * len(epochs))
        courses[name] = Courses(
            {score.name: line, KL.name: down}, {"loss": down, "a": down, "b": down}, [(0.0, "main")], len(epochs), seeds
        )
    teacher = Teacher("big", {score.name: 99.0}, 99, 10_000_000, 4096, 0.004)
    found = Findings("study_1", "Which?", "alone", "", tuple(variants), teacher, {}, {}, {}, scores=(score,), agreement=(KL,))
    return Material(intervals.with_differences(found, bootstrap=False), courses, {}, Answers())


PAGES = {
    "three": material(3), "seven": material(7), "twenty": material(20, long=True), "all equal": material(4, spread=0.0),
    "one seed": material(4, seeds=1), "less is better": material(4, score=replace(SCORE, higher_is_better=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_any_size_is_whole(name):
    made = sections.document(PAGES[name])
    text = html(made)
    page = Reader(text)
    names = [v.name for v in PAGES[name].findings.variants]
    assert len(text) < LARGEST
    # every figure has a number, and a link to it
    assert list(made.drawn) == list(range(1, len(made.drawn) + 1))
    assert all(f"#figure-{number}" in page.links and f"figure-{number}" in page.ids for number in made.drawn)
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert len(page.ids) == len(set(page.ids))
    # the first figure has every variant against every other one
    assert made.drawn[1].kind == "forest" and [one.name for one in made.drawn[1].against][0] == "alone"
    assert all(sorted(bar.name for bar in one.bars) == sorted(set(names) - {one.name}) for one in made.drawn[1].against)
    places = [float(value) for value in re.findall(r"(?:left|width):([\d.]+)%", text)]
    assert places and all(0 <= place <= 100 for place in places)
    # what is fixed in width can be scrolled, or shrinks
    assert all(one["style"] == "min-width:0px" for one in page.drawings)
    assert all(re.fullmatch(r"[a-z0-9-]+", one.name) for one in made.pictures)
    # drawings are well-formed, and no other colours than the page's are in their lines
    for element in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(element.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
    assert not re.search(r"#(?!figure)[0-9a-f]{6}\b", re.sub(r"<style>.*?</style>|#[mph][0-9a-f]+", "", text, flags=re.S))


def test_every_pair_is_compared_as_if_one_were_the_baseline():
    found = PAGES["seven"].findings
    for one, other in itertools.permutations(found.variants, 2):
        bar = next(bar for bar in against(found, one.name).bars if bar.name == other.name)
        values = [a - b for a, b in zip(other.last["top1"], one.last["top1"], strict=True)]
        expected = intervals.t_interval(values)
        assert bar.mean == pytest.approx(sum(values) / 3) and bar.interval == pytest.approx((expected.low, expected.high))
    means = [bar.mean for bar in against(found, "alone").bars]
    assert means == sorted(means, reverse=True) and against(found, "alone").better == "right"
    less = PAGES["less is better"].findings
    means = [bar.mean for bar in against(less, "alone").bars]
    assert means == sorted(means) and against(less, "alone").better == "left"
    assert {bar.verdict for bar in against(less, "alone").bars} <= {"worse", "inconclusive"}


def test_a_study_of_one_variant_or_of_no_common_seed_has_no_differences():
    assert forest(material(1).findings) is None
    found = material(2).findings
    apart = replace(found.variants[1], seeds=(7, 8, 9))
    assert forest(replace(found, variants=(found.variants[0], apart))) is None


def test_a_long_interval_does_not_squeeze_the_others():
    found = PAGES["seven"].findings
    wild = replace(found.variants[3], last={"top1": (0.0, 80.0, 160.0)})
    made = against(replace(found, variants=(*found.variants[:3], wild, *found.variants[4:])), "alone")
    bar = next(bar for bar in made.bars if bar.name == wild.name)
    assert made.ticks[0] > bar.interval[0] and made.ticks[-1] < bar.interval[1] and made.place(bar.interval[1]) == 100


def test_variants_are_told_the_best_first_with_those_that_failed_at_the_end():
    study = material(4)
    failed = replace(study.findings.variants[0], seeds=(), folders=(), last={}, cost=None, failures={0: "NaN"})
    found = replace(study.findings, variants=(failed, *study.findings.variants[1:]))
    table = next(s for s in sections.document(replace(study, findings=found)).sections if s.title == "Results").blocks[0]
    assert [row[0] for row in table.rows] == ["variant_3", "variant_2", "variant_1", "alone (baseline)", "teacher: big"]


def test_a_latex_table_has_every_variant_with_its_signs_escaped():
    found = PAGES["three"].findings
    named = replace(found.variants[1], name=r"50 %_of & {a}\b~^$#")
    text = latex.table(replace(found, variants=(found.variants[0], named, found.variants[2])))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [re.sub(r"\\&", "", row).count("&") for row in rows] == [4] * 5
    assert r"50 \%\_of \& \{a\}\textbackslash{}b\textasciitilde{}\textasciicircum{}\$\# &" in text
    assert text.count(r"\textbf{") == 1 and rows[1].startswith(r"variant\_2 & \textbf{") and r"alone (baseline) &" in text
    assert r"top-1 \%" in rows[0] and rows[-1] == r"Teacher & 99.00 & & & \\" and text.isascii()
    assert re.search(r"& \$\+[\d.]+\$ & \$\[-?[\d.]+, [\d.]+\]\$ &", rows[1])
    for line in (r"\begin{tabular}{lrrrr}", r"\toprule", r"\bottomrule", r"\end{tabular}"):
        assert line in text.splitlines()
