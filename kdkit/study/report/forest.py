"""Differences of a study's variants to any one of them, with intervals: the figure that answers its
question.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kdkit.contracts.task import ScoreInfo
from kdkit.students.curves import COLORS, INK
from kdkit.study import intervals, sentences
from kdkit.study.findings import Findings, Variant
from kdkit.study.report.document import Against, Bar, Forest, Picture
from kdkit.study.report.drawing import GREY, WIDTH, blank, labels, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of an interval, in medians of their lengths: few seeds have intervals beside which nothing is
# seen.
LONGEST = 4.0
STYLES = {  # colour, marker, its filling
    "better": (COLORS[0], "o", COLORS[0]),
    "worse": (COLORS[3], "D", COLORS[3]),
    "inconclusive": (GREY, "o", "#ffffff"),
}


def forest(findings: Findings) -> Forest | None:
    """Build the figure; None if no variant shares a seed with the baseline."""
    names = [findings.baseline, *(v.name for v in findings.ran if v.name != findings.baseline)]
    found = [against(findings, name) for name in names]
    if not found[0].bars:
        return None
    score = findings.deciding
    unit = f", {score.difference_unit}" if score.difference_unit else ""
    tested = any(bar.interval for bar in found[0].bars)
    caption = (
        "Dot: mean difference over the seeds; line: 95 % interval, paired t. Filled: better or"
        " worse at 5 % after Holm's correction for the number of variants; hollow: inconclusive."
        if tested
        else "One seed, so that the differences have no intervals."
    )
    if len(names) > 2:
        caption += " Corrected for the comparisons with one variant, not for choosing that one."
    alt = f"Differences in {score.title} to {findings.baseline}{unit}. " + "; ".join(
        f"{bar.name} {bar.text}" for bar in found[0].bars
    )
    return Forest(
        f"Differences in test {score.title}{unit}",
        [one for one in found if one.bars],
        caption,
        [Picture("differences", drawn(found[0], score), alt)],
    )


def against(findings: Findings, name: str) -> Against:
    """Compare all variants with that one, the best first."""
    score = findings.deciding
    seen = intervals.with_differences(replace(findings, baseline=name), bootstrap=False)
    ordered = sorted(
        (v for v in seen.variants if v.difference and all(map(math.isfinite, v.difference.values))),
        key=lambda v: score.rank(-statistics.fmean(v.difference.values)) if v.difference else 0,
    )
    bars = [_bar(v, score) for v in ordered]
    return Against(
        name,
        sentences.verdicts(seen) or "",
        bars,
        _ticks(bars),
        "right" if score.higher_is_better else "left",
    )


def _bar(variant: Variant, score: ScoreInfo) -> Bar:
    found = variant.difference
    assert found is not None
    verdict = found.verdict(score)
    p = intervals.p_value_shown(found)
    told = f", {verdict}, p {p if p.startswith('<') else f'= {p}'}" if p else ""
    return Bar(
        variant.name,
        variant.about,
        statistics.fmean(found.values),
        (found.t.low, found.t.high) if found.t else None,
        verdict,
        f"{intervals.shown(found, score.digits).replace('-', '−')}{told}",
    )


def _ticks(bars: Sequence[Bar]) -> Sequence[float]:
    """Choose the ticks of an axis that holds 0, all means, and intervals of usual length."""
    from matplotlib.ticker import MaxNLocator

    reach = [
        max(abs(bar.mean), *map(abs, bar.interval or (bar.mean,)))
        for bar in bars  # from 0
    ]
    most = LONGEST * statistics.median(reach) if reach else 0.0
    ends = [0.0, *(bar.mean for bar in bars)]
    ends += [min(max(end, -most), most) for bar in bars for end in bar.interval or ()]
    low, high = min(ends), max(ends)
    if low == high:  # all differences are 0
        low, high = -1.0, 1.0
    margin = 0.04 * (high - low)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low - margin, high + margin)
    return [float(tick) for tick in ticks]


def drawn(found: Against, score: ScoreInfo) -> Figure:
    """Draw the differences for a paper."""
    height = 0.75 + 0.24 * len(found.bars)
    figure = blank(1.45 * WIDTH, height)
    axes = figure.subplots()
    short = labels([bar.name for bar in found.bars])
    low, high = found.ticks[0], found.ticks[-1]
    axes.set_xlim(low, high)
    axes.set_ylim(len(found.bars) - 0.4, -0.6)
    axes.axvline(0, color=INK, linewidth=0.9)
    for row, bar in enumerate(found.bars):
        color, marker, filling = STYLES[bar.verdict]
        if bar.interval:
            axes.plot(bar.interval, (row, row), color=color, linewidth=1.8, solid_capstyle="butt")
        axes.plot(bar.mean, row, marker, color=color, markerfacecolor=filling, markersize=6)
        axes.annotate(
            bar.text.partition(", ")[0] if not bar.interval else bar.text.partition("]")[0] + "]",
            (1.02, row),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=INK,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(found.bars)), [plain(short[bar.name]) for bar in found.bars])
    axes.set_xticks(list(found.ticks))
    axes.tick_params(colors=INK, labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    unit = f", {score.difference_unit}" if score.difference_unit else ""
    side = "better →" if found.better == "right" else "← better"
    name = labels([found.name])[found.name]
    axes.set_xlabel(plain(f"{score.title} minus that of {name}{unit}   ({side})"), color=INK)
    return figure
