"""Which samples of one part are test samples, where nobody says it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(gt=0, lt=1)]


def drawn(
    names: Sequence[str], share: float, classes: Sequence[Hashable] | None = None
) -> set[int]:
    """Draw a share of the samples of each class by their names: no random numbers, and an added
    sample moves few others.

    Args:
        names: of each sample.
        share: that is drawn, between 0 and 1; of two samples of a class or more, at least one is
            drawn and at least one is left.
        classes: of each sample (None: all are of one).
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place, one in enumerate(classes if classes is not None else [None] * len(names)):
        members[one].append(place)
    chosen: set[int] = set()
    for places in members.values():
        places.sort(key=lambda place: hashlib.sha256(names[place].encode()).digest())
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        chosen.update(places[:count])
    return chosen
