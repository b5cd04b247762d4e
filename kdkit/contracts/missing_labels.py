"""Stand-ins for labels that are not there: reading them raises an error that says why."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor

from kdkit.errors import ShapeError


class _NoLabels:
    """Stands for the labels of a dataset that has none, while a recipe is checked."""

    says: ClassVar[str] = "reads the labels of training images, and they have none"

    def __len__(self) -> int:
        return 0

    @classmethod
    def _refuse(cls, *_: Any, **__: Any) -> Any:
        raise ShapeError(cls.says)

    # operators are looked up on the class, past `__getattr__`; torch's functions ask the last one
    __getattr__ = __getitem__ = __iter__ = __add__ = __sub__ = __mul__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __torch_function__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _HiddenLabels(_NoLabels):
    """Stands for the labels of a batch in which not every sample has one."""

    says = "reads the labels of training images, and those of `data.unlabelled` have none"

    def __len__(self) -> int:
        # the number of samples is that of `Batch.index`
        return int(self._refuse())


NO_LABELS = cast("Tensor", _NoLabels())
HIDDEN_LABELS = cast("Tensor", _HiddenLabels())
