"""Shapes of the layers that a loss is tried on: the student's and the teacher's, without the
batch.
"""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]
CLASSES = 5
NO_LAYERS: tuple[Shape, Shape] = ((), ())

FORMS: Mapping[str, tuple[Shape, Shape]] = {
    "maps of one shape": ((6, 8, 8), (6, 8, 8)),
    "maps of other channels": ((6, 8, 8), (10, 8, 8)),
    "maps of half the size": ((6, 8, 8), (10, 4, 4)),
    "maps of twice the size": ((6, 4, 4), (10, 8, 8)),
    "maps of a third of the size": ((6, 9, 9), (10, 3, 3)),
    "maps of one pixel": ((6, 1, 1), (10, 1, 1)),
    "tokens": ((9, 6), (9, 10)),
    "tokens and a map": ((17, 6), (10, 4, 4)),
    "a map and tokens": ((6, 8, 8), (16, 10)),
    "other numbers of tokens": ((10, 6), (16, 10)),
    "vectors": ((6,), (10,)),
}

# no loss can compare these
MISFITS: Mapping[str, tuple[Shape, Shape]] = {
    "a map and a vector": ((6, 8, 8), (10,)),
    "tokens of no square grid and a map": ((15, 6), (10, 3, 3)),
    "features without a dimension": ((), ()),
}


def shapes_of(form: str) -> tuple[Shape, Shape]:
    """Look up the shapes of a form; a loss that reads no layers has none."""
    return FORMS.get(form, NO_LAYERS)
