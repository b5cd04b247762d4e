"""Maps (B, C, H, W) pooled, resized, convolved and normalised the slow way: a window, a pixel or a kernel position at a time."""

import math

import torch


def pooled(f, size):
    """Means over windows that cover the map evenly."""
    (h, w), (rows, columns) = f.shape[2:], size
    out = [
        f[:, :, i * h // rows : math.ceil((i + 1) * h / rows), j * w // columns : math.ceil((j + 1) * w / columns)].mean((2, 3))
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(out, 2).unflatten(2, size)


def pooled_alike(f, g):
    """Both at the smaller one's height and width."""
    size = [min(a, b) for a, b in zip(f.shape[2:], g.shape[2:], strict=True)]
    return pooled(f, size), pooled(g, size)


def resized(x, size):
    """Bilinear, pixel centres at half, edges repeated."""

    def sources(inner, outer):
        for i in range(outer):
            at = max((i + 0.5) * inner / outer - 0.5, 0)
            low = math.floor(at)
            yield low, min(low + 1, inner - 1), at - low

    rows = [(1 - share) * x[:, :, low] + share * x[:, :, high] for low, high, share in sources(x.shape[2], size[0])]
    x = torch.stack(rows, 2)
    return torch.stack([(1 - share) * x[..., low] + share * x[..., high] for low, high, share in sources(x.shape[3], size[1])], 3)


def convolved(x, conv):
    """What a (transposed) convolution gives."""
    k, stride, pad, (h, w) = conv.kernel_size[0], conv.stride[0], conv.padding[0], x.shape[2:]
    if isinstance(conv, torch.nn.ConvTranspose2d):
        out = x.new_zeros(len(x), conv.out_channels, stride * (h - 1) + k, stride * (w - 1) + k)
        for i in range(k):
            for j in range(k):
                part = torch.einsum("bchw,cd->bdhw", x, conv.weight[:, :, i, j])
                out[:, :, i : i + stride * h : stride, j : j + stride * w : stride] += part
        out = out[:, :, pad : out.shape[2] - pad, pad : out.shape[3] - pad]
    else:
        rows, columns = ((n + 2 * pad - k) // stride + 1 for n in (h, w))
        padded = x.new_zeros(*x.shape[:2], h + 2 * pad, w + 2 * pad)
        padded[:, :, pad : pad + h, pad : pad + w] = x
        out = 0
        for i in range(k):
            for j in range(k):
                window = padded[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
                out = out + torch.einsum("bchw,dc->bdhw", window, conv.weight[:, :, i, j])
    return out if conv.bias is None else out + conv.bias[:, None, None]


def aligned(x, adapter):
    """What a 1x1 convolution gives, or nothing in its place."""
    return x if isinstance(adapter, torch.nn.Identity) else convolved(x, adapter)


def normalised(x, norm):
    """What a batch normalisation gives in training."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
