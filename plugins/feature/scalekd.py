"""ScaleKD: cross-attention makes maps in the form of a transformer's from the student's features,
which must do in the teacher's last stage what the teacher's own do there.

Fan, Li, Liu, Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", NeurIPS 2024,
arXiv:2411.06786, section 3. Where the released code takes the constant component out of a discrete
cosine transform and goes back, the mean over the positions is subtracted here, which is the same.
That code has learnt queries in the last stage too, which nothing reads; its windows of attention
are left out, as all of its recipes have a single one. Its two factors are those of the options, and
it adds `logit_kl` at temperature 1 with weight 0.5 beside the cross-entropy:

    - {use: scalekd, layers: [{student: stage3, teacher: stage3}, {student: stage4, teacher:
      stage4}]}
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class ScaleKD(kdkit.Loss):
    """Squared distances of normalised maps, whole and without each channel's mean, at the end of
    the teacher.

    Formula: sum over the pairs of spatial * sum of (n(x) - n(f_t))^2 + centred * sum of (n(y - mean
    y) - n(f_t - mean f_t))^2, sums over channels and positions, mean over the batch

    f_t is the teacher's last map; n divides the channels of a position by their L2 norm; the mean
    is over the positions. x and y are two projections of the student's layer, by parts of their
    own. Those of the first of two pairs pass through the teacher behind its layer, frozen, up to
    its last one. A projection is attention, sharpened by `softmax_scale`, of one query for each
    position of the teacher's map: its keys and values are a 3x3 convolution of the student's map
    (batch normalisation, ReLU) and a learnt position; layer normalisation and a network of two
    layers with a residual follow. Queries pass a linear layer and a ReLU; they are learnt in the
    first pair, and in the second what the first has made at the end of the teacher. One or two
    pairs, maps (B, C, H, W) or tokens of a square grid; a map on the teacher's side of the first.
    """

    name = "scalekd"
    knowledge = "feature"
    # the first pair's projections pass through the teacher's last stage
    needs_networks = True
    exceptions = {
        "check_reads_every_layer": (
            "of the first pair's teacher layer the place and the size count, not the values"
        ),
    }

    class Options(kdkit.MapOptions):
        spatial: kdkit.Rampable = Field(
            default=0.08, ge=0, description="Factor of the distance of whole maps."
        )
        centred: kdkit.Rampable = Field(
            default=0.06, ge=0, description="Factor of the distance without the channels' means."
        )
        heads: int = Field(
            default=8, ge=1, le=128, description="Heads of attention; must divide both widths."
        )
        softmax_scale: float = Field(
            default=5.0,
            gt=0,
            le=100,
            description="Sharpens attention: logits are multiplied by it.",
        )

    options: Options
    projectors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        pairs, layers = list(self.options.pairs(student, teacher)), self.options.layers
        if len(pairs) > 2:
            raise kdkit.ShapeError(f"it compares one or two pairs of layers, not {len(pairs)}")
        self.behind: Sequence[Callable[[Tensor], kdkit.Outputs]] = ()
        if len(pairs) == 2:
            first = teacher.features[layers[0].teacher]
            if context is None or first.ndim != 4:
                raise kdkit.ShapeError(
                    f"teacher '{layers[0].teacher}' {tuple(first.shape)} passes through the rest of"
                    " the teacher: it must be a map, and `setup` needs a context with the networks"
                )
            # a function of the teacher, which is no part of the loss
            self.behind = (context.teacher_rest(layers[0].teacher, [layers[1].teacher]),)
        refuse_heads(self.options.heads, [f_t.shape[1] for _, f_t in pairs])
        if min(f.shape[2:].numel() for both in pairs for f in both) == 1:
            raise kdkit.ShapeError(
                "a map of one position leaves attention no choice; take larger images, or finer"
                " layers"
            )
        self.projectors = nn.ModuleList(
            Projector(f_s, f_t, self.options.heads, self.options.softmax_scale, asks=number == 0)
            for number, (f_s, f_t) in enumerate(pairs)
            for _ in range(2)  # of whole maps, and of those without means
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = list(self.options.pairs(student, teacher))
        target = pairs[-1][1]
        queries: Sequence[Tensor | None] = (None, None)
        distances = []
        for number, (f_s, f_t) in enumerate(pairs):
            own = self.projectors[2 * number : 2 * number + 2]
            found = [part(f_s, query, f_t) for part, query in zip(own, queries, strict=True)]
            if number < len(self.behind):
                found = [self._at_the_end(self.behind[number](x), target) for x in found]
            distances.append(self._distance(found[0], found[1], target))
            # the second pair asks for what the first has made
            queries = found
        return torch.stack(distances).sum()

    def _at_the_end(self, answer: kdkit.Outputs, like: Tensor) -> Tensor:
        """The teacher's last layer in an answer, as a map."""
        return kdkit.as_map(answer.features[self.options.layers[-1].teacher]).reshape(like.shape)

    def _distance(self, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        whole = (directions(x) - directions(target)).square()
        rest = (directions(without_mean(y)) - directions(without_mean(target))).square()
        # sums over the map, as in the released code, which is why the factors are small
        return (self.options.spatial * whole + self.options.centred * rest).sum() / len(target)


def refuse_heads(heads: int, widths: Sequence[int]) -> None:
    """Refuse a number of heads that does not divide the widths.

    Raises:
        ShapeError: it does not.
    """
    if any(width % heads for width in widths):
        raise kdkit.ShapeError(
            f"`heads: {heads}` must divide the teacher's channels, {' and '.join(map(str, widths))}"
        )


def directions(f: Tensor) -> Tensor:
    """Maps with channels of norm 1 at each position; shorter ones than 1e-5 stay short."""
    return F.normalize(f, dim=1, eps=1e-5)


def without_mean(f: Tensor) -> Tensor:
    return f - f.mean((2, 3), keepdim=True)


class Projector(nn.Module):
    """From the student's maps to maps like the teacher's, by cross-attention.

    Args:
        f_s, f_t: a map of the student and of the teacher.
        heads: number of heads.
        scale: sharpens attention.
        asks: it has queries of its own, and is not given any.
    """

    def __init__(self, f_s: Tensor, f_t: Tensor, heads: int, scale: float, *, asks: bool) -> None:
        super().__init__()
        width, wanted = f_s.shape[1], f_t.shape[1]
        self.heads = heads
        self.scale = scale / (wanted // heads) ** 0.5
        self.queries = nn.Parameter(torch.randn(1, *f_t.shape[1:])) if asks else None
        self.positions = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, *f_s.shape[1:]), std=0.02)
        )
        # no bias, which batch normalisation would take away
        self.features = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), kdkit.AnyBatchNorm(width), nn.ReLU()
        )
        self.asked = nn.Sequential(nn.Linear(wanted, wanted), nn.ReLU(), nn.Linear(wanted, wanted))
        # no bias: the softmax over the keys would take it away
        self.key = nn.Linear(width, wanted, bias=False)
        self.value = nn.Linear(width, wanted)
        self.out = nn.Sequential(nn.Linear(wanted, wanted), nn.LayerNorm(wanted))
        self.more = nn.Sequential(
            nn.Linear(wanted, 4 * wanted), nn.ReLU(), nn.Linear(4 * wanted, wanted)
        )

    def forward(self, f: Tensor, queries: Tensor | None, like: Tensor) -> Tensor:
        """Return maps of the shape of `like`, whose values are not read."""
        queries = self.queries if self.queries is not None else queries
        assert queries is not None
        asked = self.split(self.asked(kdkit.as_tokens(queries)))
        known = kdkit.as_tokens(self.features(f) + self.positions)
        logits = self.scale * asked @ self.split(self.key(known)).transpose(2, 3)
        found = logits.softmax(3) @ self.split(self.value(known))
        tokens: Tensor = self.out(found.transpose(1, 2).flatten(2))
        tokens = tokens + self.more(tokens)
        return tokens.transpose(1, 2).reshape(like.shape)

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) by head, (B, heads, N, D / heads)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ScaleKD]
