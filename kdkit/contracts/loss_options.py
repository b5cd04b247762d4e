"""Options of losses: which layers a loss reads, and in which form it receives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydantic import Field
from torch import Tensor

from kdkit.contracts.distributed import gather
from kdkit.contracts.features import as_map, as_tokens, as_vectors, is_padded
from kdkit.contracts.options import Options
from kdkit.contracts.records import Outputs
from kdkit.errors import ShapeError

Pairs = Iterator[tuple[Tensor, Tensor]]


class LayerPair(Options):
    """A student layer and the teacher layer that it learns from."""

    student: str = Field(
        description=(
            "Student layer: a `named_modules()` path, a glob, stage1..N, penultimate or logits."
        )
    )
    teacher: str = Field(description="Teacher layer, named in the same ways.")


class LossOptions(Options):
    """Options of a loss; subclass it as `Options` in the loss."""

    def taps(self) -> Sequence[LayerPair]:
        """List the layers that the loss reads; empty unless it is a feature or relation loss."""
        return ()

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Check whether the two outputs can be compared.

        Raises:
            ShapeError: they cannot.
        """


class ResponseOptions(LossOptions):
    """Options of a loss that compares logits over the same classes."""

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Check that both give rows (R, K) over the same K classes.

        Raises:
            ShapeError: they do not.
        """
        z_s, z_t = student.logits, teacher.logits
        if z_s.ndim != 2 or z_t.ndim != 2 or z_s.shape[1] != z_t.shape[1]:
            raise ShapeError(
                f"student logits {tuple(z_s.shape)} and teacher logits {tuple(z_t.shape)} must both"
                " be (R, K) over the same K classes; train both on one class set, or compare"
                " features instead"
            )


class FeatureOptions(LossOptions):
    """Options of a loss that compares maps, equally many tokens, or vectors.

    If one is a map and the other tokens, or the numbers of tokens differ, both are passed as maps.
    The hidden states of texts are passed as vectors, one for each real token.
    """

    layers: tuple[LayerPair, ...] = Field(
        min_length=1, description="Student/teacher layer pairs to compare."
    )

    def taps(self) -> Sequence[LayerPair]:
        return self.layers

    def pairs(self, student: Outputs, teacher: Outputs) -> Pairs:
        """Return the features of each pair, (f_s, f_t), in the form that the loss compares.

        Raises:
            ShapeError: they do not have that form.
        """
        wanted = (
            "two maps, tokens or vectors: a vector has no positions; name 'penultimate' on both"
            " sides"
        )
        return self._each(student, teacher, _alike, wanted)

    def check(self, student: Outputs, teacher: Outputs) -> None:
        # `pairs` is a generator: it raises only when it is read
        tuple(self.pairs(student, teacher))

    def _each(
        self,
        student: Outputs,
        teacher: Outputs,
        form: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        wanted: str,
    ) -> Pairs:
        for pair in self.layers:
            if pair.student not in student.features:
                raise ShapeError(
                    f"the student's answer has no layer '{pair.student}'; tapped are:"
                    f" {', '.join(student.features) or 'none'}"
                )
            f_s, f_t = student.features[pair.student], _shown(teacher, pair.teacher)
            try:
                yield form(*self._without_padding(f_s, f_t, student.mask, teacher.mask))
            # repeat the error with the names of both layers, which `form` does not know
            except ShapeError:
                raise ShapeError(
                    f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                    f" {tuple(f_t.shape)} must be {wanted}"
                ) from None

    def _without_padding(
        self, f_s: Tensor, f_t: Tensor, mask: Tensor | None, others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, N, D) as they are compared: here real tokens, (T, D).

        Raises:
            ShapeError: only one side has tokens.
        """
        padded = [is_padded(f, mask) for f in (f_s, f_t)]
        if mask is None or not any(padded):
            return f_s, f_t
        if not all(padded):
            raise ShapeError("tokens and something else")
        return f_s[mask], f_t[mask]


class MapOptions(FeatureOptions):
    """Options of a loss that compares maps; tokens of a square grid are folded to maps."""

    def pairs(self, student: Outputs, teacher: Outputs) -> Pairs:
        wanted = (
            "maps (B, C, H, W), or tokens (B, N, D) of a square grid; name layers before the"
            " pooling, such as 'stage3'"
        )
        return self._each(student, teacher, lambda s, t: (as_map(s), as_map(t)), wanted)


class TokenOptions(FeatureOptions):
    """Options of a loss that compares tokens (B, N, D); a map's positions are taken as tokens if
    the other side has the same number.
    """

    def pairs(self, student: Outputs, teacher: Outputs) -> Pairs:
        return self._each(
            student,
            teacher,
            _tokens,
            "equally many tokens (B, N, D), or maps (B, C, H, W) of as many positions",
        )


class _OneVector(FeatureOptions):
    """Options of a loss to which a text is the mean of its real tokens."""

    def _without_padding(
        self, f_s: Tensor, f_t: Tensor, mask: Tensor | None, others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # answers from a cache have no mask; they are to the same texts
        return _pooled(f_s, mask), _pooled(f_t, mask if others is None else others)


class VectorOptions(_OneVector):
    """Options of a loss that compares one vector per sample, (B, D); maps are averaged over
    positions, sequences over (real) tokens.
    """

    def pairs(self, student: Outputs, teacher: Outputs) -> Pairs:
        wanted = "vectors (B, D), maps (B, C, H, W) or tokens (B, N, D)"
        return self._each(student, teacher, lambda s, t: (as_vectors(s), as_vectors(t)), wanted)


class RelationOptions(_OneVector):
    """Options of a loss that relates a batch's samples: it reads one embedding each, (N, D)."""

    gather: bool = Field(
        default=False,
        description="Relate the samples of all processes, not of each process alone.",
    )

    def pairs(self, student: Outputs, teacher: Outputs) -> Pairs:
        """Return the embeddings (N, D) of each pair: features flattened, texts averaged.

        Raises:
            ShapeError: a layer does not give one value per sample.
        """
        wanted = (
            "of something for each sample of the batch, (B, ...); any stage or 'penultimate' does"
        )
        for e_s, e_t in self._each(student, teacher, _embeddings, wanted):
            yield (gather(e_s), gather(e_t)) if self.gather else (e_s, e_t)


def _pooled(f: Tensor, mask: Tensor | None) -> Tensor:
    return as_vectors(f, mask) if is_padded(f, mask) else f


def _shown(teacher: Outputs, layer: str) -> Tensor:
    if layer not in teacher.features:
        raise ShapeError(
            f"the answer that teaches has no layer '{layer}'; tapped are:"
            f" {', '.join(teacher.features) or 'none'}; where several teachers' answers are"
            " combined into one, say which of them this loss looks at: `teacher: NAME`"
        )
    return teacher.features[layer]


def _alike(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    # equal forms are compared as they are: folding tokens to maps would drop the class token
    if f_s.ndim == f_t.ndim and (f_s.ndim == 2 or (f_s.ndim == 3 and f_s.shape[1] == f_t.shape[1])):
        return f_s, f_t
    return as_map(f_s), as_map(f_t)


def _tokens(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    if f_s.ndim == f_t.ndim == 3 and f_s.shape[1] == f_t.shape[1]:
        return f_s, f_t
    # drop prefix tokens, which a map does not have
    t_s, t_t = (as_tokens(as_map(f)) for f in (f_s, f_t))
    if t_s.shape[1] != t_t.shape[1]:
        raise ShapeError("unequally many tokens")
    return t_s, t_t


def _embeddings(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    if f_s.ndim < 2 or f_t.ndim < 2 or len(f_s) != len(f_t):
        raise ShapeError("no embeddings")
    return f_s.flatten(1), f_t.flatten(1)
