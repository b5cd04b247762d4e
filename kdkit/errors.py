"""Everything kdkit raises on purpose; each message is one line per problem and says what to do.

KdkitError
  RecipeError   the recipe is wrong: file:line, key, what, did you mean, allowed
  PluginError   a plugin is wrong: names the plugin and its file
  TapError      a layer to observe is missing, did not run, or was overwritten
  ShapeError    a loss cannot compare these tensors: names both shapes and what would help
  DataError     a dataset's files are missing or unreadable
  ModelError    a model cannot be built
    CheckpointError  its weights cannot be read, or do not fit
  RunError      a run cannot go on: foreign folder, non-finite loss, broken checkpoint
    Interrupted   stopped by a signal after saving; the message says how to go on
"""

import difflib
from collections.abc import Iterable


class KdkitError(Exception):
    """Base of every error kdkit raises on purpose."""


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


class RunError(KdkitError):
    """A run that cannot start or go on."""


class Interrupted(RunError):
    """A run that a signal stopped, after it was saved; `signal` is its number."""

    def __init__(self, says: str, signal: int) -> None:
        super().__init__(says)
        self.signal = signal


def suggest(word: str, allowed: Iterable[str], limit: int = 40) -> str:
    """Say which name was probably meant and which exist: `did you mean 'x'? allowed: x, y`."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"{hint}allowed: {', '.join(names[:limit])}{more}"
