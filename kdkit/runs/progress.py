"""Shows the progress of a training run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from kdkit.contracts.task import ScoreInfo
from kdkit.terminal import Terminal

# seconds between updates of a live bar: reading the losses synchronises with the device
REFRESH = 0.25


# A status that wraps would make the bar jump.
class _Free(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], overflow="ellipsis", no_wrap=True)


class Seldom:
    """Passes a text on if none was passed for some seconds: signs of life in a log that stays
    short.
    """

    def __init__(self, say: Callable[[str], None], seconds: float = 10.0) -> None:
        self._say, self._seconds = say, seconds
        self._last = time.monotonic()

    @property
    def since(self) -> float:
        """Seconds since the last text."""
        return time.monotonic() - self._last

    @property
    def due(self) -> bool:
        """Whether a text would be passed on."""
        return self.since >= self._seconds

    def __call__(self, text: str) -> None:
        if self.due:
            self._say(text)
            self._last = time.monotonic()


class Reporter:
    """Prints the events of a run; `quiet` prints warnings only, and passes the lines of epochs to
    `instead`.
    """

    def __init__(
        self, *, quiet: bool = False, instead: Callable[[str], None] = lambda _: None
    ) -> None:
        self.console = Terminal(soft_wrap=True)
        self.quiet, self._instead = quiet, instead
        self._progress: Progress | None = None
        self._shown = 0.0
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def distilling(self, done: int, of: int, value: str) -> None:
        """Show a step of `kdkit distill-data`, some twenty times in all."""
        if done == of or done % max(1, of // 20) == 0:
            self.say(f"step {done:,}/{of:,}  {value}")

    def warn(self, text: str) -> None:
        """Print a warning once, and store it for the result."""
        # Some are found in every epoch.
        if text not in self.warnings:
            self.warnings.append(text)
            self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def training(self, label: str, steps: int, done: int) -> Iterator[None]:
        """Show a bar while a stage of `steps` steps is trained, `done` of them already."""
        # In a file or pipe a bar would be a line for each update.
        if self.quiet or not self.console.is_terminal:
            yield
            return
        percentage = TextColumn("{task.percentage:>3.0f}%")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            percentage,
            TimeRemainingColumn(),
            _Free(),
        )
        # Transient: the bar gives way to the lines of epochs.
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._progress.add_task(label, total=steps, completed=done, status="")
            try:
                yield
            finally:
                self._progress = None

    def due(self) -> bool:
        """Check whether a live bar needs new numbers."""
        return self._progress is not None and time.monotonic() - self._shown > REFRESH

    def step(
        self, done: int, epoch: str, terms: Mapping[str, float], lr: float, images_per_second: float
    ) -> None:
        """Update the bar."""
        if self._progress is not None:
            self._shown = time.monotonic()
            status = f"{epoch}  {_terms(terms)}  lr {lr:.2g}  {images_per_second:,.0f} samples/s"
            self._progress.update(self._progress.task_ids[0], completed=done, status=status)

    def epoch(
        self,
        label: str,
        terms: Mapping[str, float],
        lr: float,
        images_per_second: float,
        scores: Sequence[tuple[ScoreInfo, float]],
        left: float,
    ) -> None:
        """Print one line for a finished epoch."""
        test = ", ".join(f"{score.title} {score.text(value)}" for score, value in scores)
        parts = [label, _terms(terms), *([f"test {test}"] if test else [])]
        parts += [f"lr {lr:.2g}", f"{images_per_second:,.0f} samples/s", f"{clock(left)} left"]
        if self.quiet:
            self._instead("  ".join(parts))
        self.say(_filled(parts, self.console.width if self.console.is_terminal else None))


def _filled(parts: Sequence[str], width: int | None) -> str:
    """Join the parts on one line, or on several, broken between parts, if the terminal is
    narrower.
    """
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}  {part}"
        if width is None or len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(f"    {part}")
    return "\n".join(lines)


def _terms(terms: Mapping[str, float]) -> str:
    """Format `loss 1.2 = cross_entropy 0.3 (0.03) + hint 1.17`: each term unweighted, and weighted
    in brackets if that differs.
    """
    shown = []
    for name in terms:
        # Told in front, and in brackets.
        if name == "loss" or name.endswith(".weighted"):
            continue
        value, weighted = f"{terms[name]:.3g}", f"{terms[f'{name}.weighted']:.3g}"
        shown.append(f"{name} {value}" if value == weighted else f"{name} {value} ({weighted})")
    return f"loss {terms.get('loss', 0.0):.3g} = {' + '.join(shown)}"


def clock(seconds: float) -> str:
    """Format a time as hours, minutes and seconds: `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
