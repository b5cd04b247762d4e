"""Maps whose channels have mean 0 and deviation 1."""

import torch
from torch import Tensor


def standardised(f: Tensor) -> Tensor:
    """Maps (B, C, H, W) with mean 0 and deviation 1 in each channel; channels whose deviation is
    below 1e-7 become zeros.
    """
    centred = f - f.mean((0, 2, 3), keepdim=True)
    count = f.numel() // f.shape[1]
    # a single value has no variance: 0 / 1, not 0 / 0
    variance = centred.square().sum((0, 2, 3), keepdim=True) / max(count - 1, 1)
    # clamp before the root: its slope at 0 is infinite, and `where` would turn it into NaN
    return torch.where(variance > 1e-14, centred / (1e-6 + variance.clamp_min(1e-14).sqrt()), 0.0)
