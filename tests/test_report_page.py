"""Sections as a page and as Markdown: nothing that a user wrote is markup."""

import io

from test_report import Reader

from kdkit.study.report.document import Document, Facts, Figures, Listing, Picture, Pictures, Section, Words
from kdkit.study.report.drawing import blank, png, titled
from kdkit.study.report.page import html, markdown, width

EVIL = '<script>alert("1")</script> & <b>'


def document():
    figure = blank(2, 1)
    titled(figure, "of $5 and $7_2")
    picture = Picture("drawn", png(figure), f"shows {EVIL}", wide=True)
    blocks = [
        Words(EVIL), Facts([(EVIL, "a|b")]), Figures(["a|b", EVIL], [["`x`", "*1*"], ["r", "2"]], "of *what*", marked=1),
        Pictures([picture]), Listing("folded", f"{EVIL}\n```\nname: x"), Listing("open", EVIL, folded=False),
    ]  # fmt: skip
    return Document(EVIL, EVIL, [EVIL, "second"], [Section("What?", blocks)])


def test_the_page_shows_names_letter_by_letter():
    text = html(document())
    assert "<script" not in text and "<b>" not in text
    page = Reader(text)
    assert page.text.count(EVIL) == 9  # its heading and title, question, answer, paragraph, fact, header, both listings
    assert page.images[0]["alt"] == f"shows {EVIL}" and page.images[0]["width"] == str(width(document().pictures[0].png))


def test_markdown_shows_them_likewise():
    text = markdown(document(), "report")
    lines = text.splitlines()
    assert '| a\\|b | \\<script\\>alert("1")\\</script\\> & \\<b\\> |' in lines
    assert "| \\`x\\` | \\*1\\* |" in lines and "| :-- | --: |" in lines
    assert any(line.startswith("![shows \\<script") and line.endswith("](report/drawn.png)") for line in lines)
    fenced = text[text.index("````text") :]
    assert fenced.index("\n```\n") < fenced.index("\n````\n")


def test_a_picture_of_many_colours_is_a_small_file_of_the_size_it_says():
    from PIL import Image

    content = document().pictures[0].png
    picture = Image.open(io.BytesIO(content))
    assert picture.mode == "P" and picture.size == (340, 170) and width(content) == 208
