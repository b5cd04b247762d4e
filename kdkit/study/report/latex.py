"""The results of a study as a table for LaTeX."""

from __future__ import annotations

import re

from kdkit.study import intervals
from kdkit.study.findings import Findings, Variant, rank

SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "↓": r"$\downarrow$",
    "−": r"$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
}


def escaped(text: str) -> str:
    """Escape a text for LaTeX, on one line; signs that pdfLaTeX does not know become `?`."""
    known = (SIGNS.get(sign, sign) for sign in " ".join(text.split()))
    return re.sub(r"[^\x20-\x7e\xa0-\xff]", "?", "".join(known))


def table(findings: Findings) -> str:
    """Format the deciding score of each variant, the best first, and its difference to the
    baseline: mean, deviation, 95 % interval and corrected p-value. The best mean is bold.
    """
    score = findings.deciding
    ran = sorted(findings.ran, key=lambda v: -rank(score, v.last[score.name]))
    lines = [
        "% \\usepackage{booktabs}",
        f"% Test data, {' '.join(findings.moment.split())}: mean and standard deviation over the",
        "% seeds; difference to the baseline with its 95 % interval (paired t); p by Holm's",
        "% correction. Bold: the best mean on test data.",
        "\\begin{tabular}{lrrrr}",
        "\\toprule",
        f"Variant & {escaped(score.heading)} & Difference & 95\\,\\% interval & $p$ \\\\",
        "\\midrule",
        *(_row(variant, findings, bold=i == 0) for i, variant in enumerate(ran)),
    ]
    if findings.teacher and score.name in findings.teacher.last:
        of_teacher = score.number(findings.teacher.last[score.name])
        lines += ["\\midrule", f"Teacher & {of_teacher} & & & \\\\"]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _row(variant: Variant, findings: Findings, *, bold: bool) -> str:
    score, found = findings.deciding, variant.difference
    value = intervals.spread(variant.last[score.name], score.digits).replace("+-", "±")
    value = f"\\textbf{{{escaped(value)}}}" if bold else escaped(value)
    baseline = " (baseline)" if variant.name == findings.baseline else ""
    cells = [escaped(variant.name + baseline), value, "", "", ""]
    if found is not None:
        # Numbers in math mode, whose minus is as wide as its plus.
        mean, _, interval = intervals.shown(found, score.digits).partition(" ")
        cells[2:4] = f"${mean}$", f"${interval}$" if interval else ""
        cells[4] = escaped(intervals.p_value_shown(found))
    return f"{' & '.join(cells)} \\\\"
