"""Random numbers as a function of (seed, view, sample); crops and flips of whole batches.

Nothing here keeps a state, so an image looks the same in every process, in any order, on any
device. The hash is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), chained over the
numbers it depends on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WEYL = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_ALL = (1 << 64) - 1
_MANTISSA = 24  # bits that a float32 in [0, 1) holds exactly


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    return (value & _ALL) - ((value & (1 << 63)) << 1)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Return x >> places with zeros coming in from the left, as for unsigned numbers."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _hash(state: Tensor | int, value: Tensor) -> Tensor:
    """Chain one more number to a state; both int64, broadcast against each other."""
    # int64 arithmetic wraps around, as the hash requires
    # + 1: otherwise a state and a number of 0 would stay 0 through all of it
    x = (value + 1) * _signed(_WEYL) + state
    x = (x ^ _shifted(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX_2)
    return x ^ _shifted(x, 31)


def _hash_number(state: int, value: int) -> int:
    """Compute `_hash` of plain integers, as unsigned 64 bits."""
    x = (state + (value + 1) * _WEYL) & _ALL
    x = ((x ^ (x >> 30)) * _MIX_1) & _ALL
    x = ((x ^ (x >> 27)) * _MIX_2) & _ALL
    return x ^ (x >> 31)


def sample_seed(seed: int, view: int, index: int) -> int:
    """Return a sample's seed, 0 to 2^64 - 1, that `uniform` draws from; for generators."""
    return _hash_number(_hash_number(_hash_number(0, seed), view), index)


def subseed(seed: int, purpose: str) -> int:
    """Return a seed for a purpose, so that two uses of a recipe's seed are unrelated."""
    return sample_seed(seed, len(purpose), int.from_bytes(purpose.encode(), "little"))


def bits(seed: int, view: int | Tensor, index: Tensor, draws: int) -> Tensor:
    """Return 64 random bits per draw, (B, draws) int64, for samples (B,) in a view, or in (B,)."""
    first = _hash_number(0, seed)
    # one view for all samples is hashed once, on the host; both ways give the same numbers
    if isinstance(view, Tensor):
        state: Tensor | int = _hash(_signed(first), view)
    else:
        state = _signed(_hash_number(first, view))
    per_sample = _hash(state, index.to(torch.int64))
    return _hash(per_sample[:, None], torch.arange(draws, device=index.device))


def uniform(seed: int, view: int | Tensor, index: Tensor, draws: int) -> Tensor:
    """Draw numbers in [0, 1), (B, draws) float32, for samples (B,) of a view.

    The values are multiples of 2^-24 and the same on every device.
    """
    high = _shifted(bits(seed, view, index, draws), 64 - _MANTISSA)
    return high.to(torch.float32) * 2.0**-_MANTISSA


def permutation(seed: int, number: int, length: int) -> Tensor:
    """Return the order (length,) of an epoch: a permutation that depends only on (seed, number)."""
    keys = bits(subseed(seed, "order"), number, torch.arange(length), 1)[:, 0]
    # stable: equal keys must not depend on the sorting algorithm of the device
    return keys.argsort(stable=True)


def crop_flip_count(padding: int) -> int:
    """Count the pictures that `crop_flip` makes of an image: (2p + 1)^2, mirrored or not."""
    return (2 * padding + 1) ** 2 * 2


def draw_crop_flip(
    seed: int, view: int | Tensor, index: Tensor, padding: int, flip: float
) -> Tensor:
    """Draw the picture of `crop_flip_count(padding)` that each sample shows, (B,) int64.

    Args:
        seed: the run's augmentation seed.
        view: number of the view, usually the epoch; or one for each sample, (B,) int64.
        index: sample indices (B,).
        padding: pixels of padding p; the place of the crop is uniform over (2p + 1)^2.
        flip: share of the images that are mirrored, in [0, 1].

    Returns:
        (top * (2p + 1) + left) * 2 + mirrored.
    """
    places = 2 * padding + 1
    drawn = uniform(seed, view, index, 3)
    # stays below `places`: for so few places, the float32 product never rounds up
    top_left = (drawn[:, :2] * places).to(torch.int64)
    return (top_left[:, 0] * places + top_left[:, 1]) * 2 + (drawn[:, 2] < flip)


def crop_flip(images: Tensor, outcome: Tensor, padding: int) -> Tensor:
    """Pad with zeros, crop every image at its own position, mirror it or not.

    Args:
        images: (B, C, H, W), of any type.
        outcome: (B,) int64, in the numbering of `draw_crop_flip`; `padding, padding, not mirrored`
            leaves an image unchanged.
        padding: pixels of padding p on each side.

    Returns:
        (B, C, H, W) of the same type; the input is not modified.
    """
    places = 2 * padding + 1
    corner, mirrored = outcome // 2, outcome % 2
    count, channels, height, width = images.shape
    numbers = torch.arange(max(count, channels, height), device=images.device)
    if padding:
        padded = F.pad(images, (padding,) * 4)
        # a strided view: at each pixel, the run of one row's length that begins there
        pieces = padded.reshape(-1).unfold(0, width, 1)
        plane = numbers[:count, None, None] * channels + numbers[:channels, None]  # (B, C, 1)
        # (B, C, H)
        row = plane * padded.shape[2] + (corner // places)[:, None, None] + numbers[:height]
        begins = row * padded.shape[3] + (corner % places)[:, None, None]
        # gather whole rows: pixel by pixel takes twice as long
        images = pieces.index_select(0, begins.flatten()).view(images.shape)
    return torch.cat([images, images.flip(-1)]).index_select(0, numbers[:count] + count * mirrored)
