"""The notebook of the tutorial runs from its first cell to its last."""

import json
import re
from pathlib import Path

import pytest
from test_docs import carry_out

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs/tutorial/first-study.ipynb"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of the kernel, not of kdkit
def test_it_runs_in_jupyter(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(nbformat.read(NOTEBOOK, 4), timeout=3000, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/first_study/report.html").is_file()


@pytest.mark.slow
def test_its_cells_do_what_they_say(tmp_path, monkeypatch, capsys):
    """As in Jupyter, with one epoch: files are written, commands and code run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known: dict = {}
    for text in cells("code"):
        if text.startswith("%%writefile "):
            first, rest = text.split("\n", 1)
            Path(first.split()[1]).write_text(rest)
        elif text.startswith("!"):
            carry_out(text[1:])
            for path in tmp_path.rglob("*.yaml"):  # copied just now
                path.write_text(re.sub(r"\bepochs: \d+", "epochs: 1", re.sub(r"seeds: 3", "seeds: 1", path.read_text())))
        else:
            exec(compile(text, str(NOTEBOOK), "exec"), known)
    assert (tmp_path / "runs/first_study/report.html").is_file()
    assert "top-1" in capsys.readouterr().out


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(cells("markdown"))):
        assert (NOTEBOOK.parent / link).is_file(), link
