"""The errors that kdkit raises on purpose: one line per problem, each with a way out.

KdkitError
  RecipeError   the recipe is wrong: file:line, key, what, did you mean, allowed
  PluginError   a plugin is wrong: names the plugin and its file
  TapError      a layer to observe is missing, did not run, or was overwritten
  ShapeError    a loss cannot compare these tensors: names both shapes and what would help
  DataError     a dataset's files are missing or unreadable
  ModelError    a model cannot be built
    CheckpointError  its weights cannot be read, or do not fit
    InputError       it cannot see of a sample what it is to see
  RunError      a run cannot go on: foreign folder, non-finite loss, broken checkpoint
    DamagedFile   a file of a run, study, cache or export is not what was written
    Interrupted   stopped by a signal after saving; the message says how to go on
    BusyError     another process is at work in the folder
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

LONGEST_LINE = 2000
"""Maximum number of characters in a line of a message."""
MOST_NAMES = 20
"""Maximum number of allowed names in a message."""


class KdkitError(Exception):
    """Base of every error kdkit raises on purpose.

    Its text is safe to print: control sequences for a terminal are escaped, and a line is never
    longer than `LONGEST_LINE`.
    """

    def __str__(self) -> str:
        return "\n".join(one_line(line) for line in super().__str__().split("\n"))


class RecipeError(KdkitError):
    """A problem of the recipe file, or several, one a line."""


class PluginError(KdkitError):
    """A plugin that cannot be loaded, or that breaks its contract."""


class TapError(KdkitError):
    """A layer that cannot be observed."""


class ShapeError(KdkitError):
    """Tensors that a loss cannot compare."""


class DataError(KdkitError):
    """A dataset that cannot be read."""


class ModelError(KdkitError):
    """A model that cannot be built or loaded."""


class CheckpointError(ModelError):
    """A file of weights that cannot be read or does not fit the network."""


class InputError(ModelError):
    """A network's `input` that the samples do not have."""


class RunError(KdkitError):
    """A run that cannot start or go on."""


class DamagedFile(RunError):
    """A file at `path` that is not what was written: cut short, changed, another's."""

    def __init__(self, path: Path, what: str, way_out: str) -> None:
        super().__init__(f"{path}: is damaged: {what}; {way_out}")
        self.path, self.what = path, what


class Interrupted(RunError):
    """A run that a signal stopped, after it was saved; `signal` is its number."""

    def __init__(self, says: str, signal: int) -> None:
        super().__init__(says)
        self.signal = signal


class BusyError(RunError):
    """A folder in which another process is at work."""


def one_line(text: str) -> str:
    """Make a text safe to print in one line: control characters become escapes such as `\n`."""
    plain = text if text.isprintable() else "".join(map(_escaped, text))
    return shorten(plain, LONGEST_LINE)


def shorten(text: str, limit: int = 80) -> str:
    """Leave out the middle of a text that is longer than `limit`."""
    if len(text) <= limit:
        return text
    end = limit // 4
    # 5: the characters of " ... "
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def shown(value: object) -> str:
    """Format a value for messages: its `repr` in one short line."""
    return shorten(one_line(repr(value)))


def dotted(location: Iterable[object]) -> str:
    """Format a place in a recipe as `key.path`, in one line."""
    return ".".join(shorten(one_line(str(step))) for step in location)


def suggest(word: str, allowed: Iterable[str], meant: Sequence[str] = ()) -> str:
    """Suggest the most similar name and list the existing ones: `did you mean 'x'? allowed: x, y`.

    Names that begin with the word come before those with a similar spelling; a `meant` name from
    the caller comes before both. Of more than `MOST_NAMES`, the most similar ones are listed.
    """
    names = sorted(set(allowed))
    # cut off, because SequenceMatcher's time grows with the square of the length
    lowered = word[:100].lower()
    if not names:
        return "there is none"
    near = sorted(
        names,
        key=lambda name: difflib.SequenceMatcher(None, lowered, name.lower()).ratio(),
        reverse=True,
    )
    # one letter begins too many names to be a hint
    begin = [name for name in names if len(lowered) > 1 and name.lower().startswith(lowered)]
    spelt = {name.lower(): name for name in names}
    like = [spelt[name] for name in difflib.get_close_matches(lowered, spelt, n=1, cutoff=0.5)]
    close = meant or begin[:4] or like
    hint = f"did you mean {either(close)}? " if close else ""
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMES else ""
    return f"{hint}allowed: {', '.join(sorted(near[:MOST_NAMES]))}{more}"


def either(names: Sequence[str]) -> str:
    """Join words as `'a'`, `'a' or 'b'`, `'a', 'b' or 'c'`."""
    *most, last = (f"'{name}'" for name in names)
    return f"{', '.join(most)} or {last}" if most else last


def cause(error: BaseException, limit: int | None = None) -> str:
    """Format another library's error as its type and its message, in one line; `limit` is the
    maximum number of characters of the message.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
