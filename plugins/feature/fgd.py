"""Focal and global distillation: objects and background weigh alike whatever their sizes, pixels
and channels as much as the teacher attends to them; beside it, how each pixel relates to the whole.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv:2111.11837,
section 3. Weights and temperature are those of the released recipes for RetinaNet; for FCOS they
have 0.0016, 0.0008, 0.0008 and 0.000008 with a temperature of 0.8, for Faster R-CNN 0.00005,
0.000025, 0.00005 and 0.0000005. Other than in the released code, a box covers the pixels that it
touches (there one more at the right and below), and the attention pooling has no bias, which its
softmax would take away.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ..tasks import _boxes as boxes
from ._pyramid import PYRAMID


class FocalAndGlobal(kdkit.Loss):
    """Squared error of features, weighted by objects and the teacher's attention; the error of the
    attention itself; and the squared error of features with their global context.

    Formula: alpha * E_fg + beta * E_bg + gamma * E_att + lambda * E_global, each a sum over
    channels and pixels, mean over the batch, then a sum over the layer pairs, with

    E_fg, E_bg = m * A_t * a_t * (r(f_s) - f_t)^2, m = 1 / the number of pixels of the box that a
    pixel lies in (of the smallest one), or of the background; E_att = |A_s - A_t| + |a_s - a_t|
    with A = H W softmax over pixels of mean_c |f| / T, and a = C softmax over channels of mean_ij
    |f| / T; E_global = (G_s(r(f_s)) - G_t(f_t))^2 with G(f) = f + W_2 ReLU(LN(W_1 sum_j
    softmax_j(w f_j) f_j))

    Maps (B, C, H, W) of a pyramid, beside targets (B, M, 6) as in task `detection`; boxes that do
    not count are background. r is a 1x1 convolution where the channels differ, and a bilinear
    resize where the sizes do. Both G are learnt, and begin as the identity.
    """

    name = "fgd"
    knowledge = "feature"
    tasks = frozenset({"detection"})

    class Options(kdkit.MapOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            default=PYRAMID,
            min_length=1,
            description=(
                "Student/teacher maps to compare (default: all maps of torchvision's feature"
                " pyramid)."
            ),
        )
        temperature: kdkit.Rampable = Field(
            default=0.5, gt=0, description="T: how evenly attention is spread; 0.8 for FCOS."
        )
        foreground: float = Field(default=1e-3, ge=0, description="alpha, the weight of objects.")
        background: float = Field(
            default=5e-4, ge=0, description="beta, the weight of the background."
        )
        attention: float = Field(
            default=5e-4, ge=0, description="gamma, the weight of the error of attention."
        )
        relation: float = Field(
            default=5e-6, ge=0, description="lambda, the weight of the global relation."
        )

    options: Options
    aligns: nn.ModuleList
    contexts: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.aligns, self.contexts = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            self.aligns.append(kdkit.aligned(f_s, f_t))
            self.contexts.append(nn.ModuleList([GlobalContext(f_t) for _ in (f_s, f_t)]))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        assert isinstance(batch.inputs, Tensor)
        value = student.logits.new_zeros(())
        for align, contexts, (f_s, f_t) in zip(
            self.aligns, self.contexts, self.options.pairs(student, teacher), strict=True
        ):
            f_s = kdkit.resized(align(f_s), f_t.shape[2:])
            of_pixels = pixel_weights(batch.labels, batch.inputs.shape[-2:], f_t)
            error = self._focal(f_s, f_t, *of_pixels) + self._global(f_s, f_t, contexts)
            value = value + error / len(f_t)
        return value

    def _focal(self, f_s: Tensor, f_t: Tensor, objects: Tensor, rest: Tensor) -> Tensor:
        """The error of features, and of attention, summed over the batch."""
        pixels_s, channels_s = attention(f_s, self.options.temperature)
        pixels_t, channels_t = attention(f_t, self.options.temperature)
        shares = self.options.foreground * objects + self.options.background * rest
        features = (shares * pixels_t * channels_t * (f_s - f_t).square()).sum()
        gaps = (pixels_s - pixels_t).abs().sum() + (channels_s - channels_t).abs().sum()
        return features + self.options.attention * gaps

    def _global(self, f_s: Tensor, f_t: Tensor, contexts: nn.Module) -> Tensor:
        of_student, of_teacher = contexts.children()
        gap: Tensor = of_student(f_s) - of_teacher(f_t)
        return self.options.relation * gap.square().sum()


class GlobalContext(nn.Module):
    """Adds what the whole map says to each pixel: the block of Cao et al., "GCNet: Non-Local
    Networks Meet Squeeze-Excitation Networks and Beyond", ICCV workshops 2019, arXiv:1904.11492.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        channels, positions = like.shape[1], like.shape[2] * like.shape[3]
        inner = max(channels // 2, 1)
        # a single pixel has the share 1, whatever a layer says
        self.weigh = nn.Conv2d(channels, 1, 1, bias=False) if positions > 1 else None
        self.transform = nn.Sequential(
            nn.Linear(channels, inner), nn.LayerNorm(inner), nn.ReLU(), nn.Linear(inner, channels)
        )
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, f: Tensor) -> Tensor:
        shares = 1.0 if self.weigh is None else self.weigh(f).flatten(2).softmax(2)
        pooled = (f.flatten(2) * shares).sum(2)
        added: Tensor = self.transform(pooled)
        return f + added[:, :, None, None]


def attention(f: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Attention to pixels (B, 1, H, W), and to channels (B, C, 1, 1), each with the mean 1."""
    of_pixels = f.abs().mean(1).flatten(1)
    of_channels = f.abs().mean((2, 3))
    pixels, channels = (x.shape[1] * (x / temperature).softmax(1) for x in (of_pixels, of_channels))
    return pixels.view(len(f), 1, *f.shape[2:]), channels[:, :, None, None]


def pixel_weights(targets: Tensor, size: Sequence[int], f: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh the pixels of maps: of objects, and of the background, (B, 1, H, W) each.

    Args:
        targets: (B, M, 6), as of task `detection`.
        size: (H, W) of the images.
        f: maps (B, C, H, W).

    Raises:
        ShapeError: the targets are no boxes.
    """
    targets, counts = boxes.counted(targets)
    x0, y0, x1, y1 = targets.to(f)[..., boxes.BOX, None].unbind(2)
    across, columns = covered(x0, x1, size[1], f.shape[3])
    down, rows = covered(y0, y1, size[0], f.shape[2])
    inside = down[..., :, None] & across[..., None, :] & counts[..., None, None]
    area = (rows * columns)[..., None]
    objects = (inside / area).amax(1, keepdim=True)
    rest = (objects == 0).to(f)
    return objects, rest / rest.sum((2, 3), keepdim=True).clamp_min(1)


def covered(first: Tensor, last: Tensor, length: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Find the pixels (B, M, P) of a map's side that boxes touch, and their number (B, M, 1).

    Args:
        first: where the boxes begin, (B, M, 1), in pixels of the image.
        last: where they end.
        length: of the image's side, pixels.
        pixels: of the map's side.
    """
    start, end = (first * pixels / length).floor(), (last * pixels / length).ceil()
    places = torch.arange(pixels, device=first.device)
    return (places >= start) & (places < end), (end - start).clamp_min(1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [FocalAndGlobal]
