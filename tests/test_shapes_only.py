"""Operations on the meta device whose results are remembered give what torch would."""

import pytest
import torch
from torch.nn import functional as F

from kdkit.runs.shapes_only import IN_PLACE, ShapesOnly

IMAGES, WIDTH = (4, 3, 5, 5), torch.ones(3, device="meta")
COUNTS = torch.empty(3, dtype=torch.long, device="meta")
KERNELS = torch.empty(6, 3, 3, 3, device="meta")
OPERATIONS = {
    "batch norm": lambda x: F.batch_norm(x, WIDTH, WIDTH, WIDTH, WIDTH, training=True),
    "batch norm in eval mode": lambda x: F.batch_norm(x, WIDTH, WIDTH, WIDTH, WIDTH),
    "batch norm without gradients": torch.no_grad()(lambda x: F.batch_norm(x, WIDTH, WIDTH)),
    "layer norm": lambda x: F.layer_norm(x, x.shape[2:]),
    "relu": F.relu,
    "first weights": lambda x: torch.empty_like(x).normal_().uniform_().clamp_(-1, 1).relu_() + x.new_empty(1).fill_(2).zero_(),
    "convolution": lambda x: F.conv2d(x, KERNELS.to(x.dtype), stride=2, padding=1),
    "linear": lambda x: F.linear(x, torch.empty(7, 5, device="meta", dtype=x.dtype)),
    "an equal number of another type": lambda x: [COUNTS * 2, COUNTS * 2.0][1],
    "views and lists": lambda x: torch.cat([x.transpose(1, 2), *x.transpose(1, 2).split(1)]),
    "two results": lambda x: x.float().topk(2).values,
    "new numbers": lambda x: torch.arange(5, device="meta") + torch.zeros(5, device="meta") + x,
}


def facts(tensors):
    return [(tuple(each.shape), each.stride(), each.dtype, each.device.type) for each in tensors]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_like_those_of_torch(name, precision, layout):
    found = []
    for quick in (False, True, True):  # the second one remembers
        saved = []
        x = torch.empty(IMAGES, device="meta", dtype=precision).to(memory_format=layout).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            if quick:
                with ShapesOnly():
                    y = OPERATIONS[name](x)
            else:
                y = OPERATIONS[name](x)
        if y.grad_fn is not None:
            y.sum().backward()
        found.append((facts([y, *saved]), y.requires_grad, x.grad is not None and facts([x.grad])))
    assert found[0] == found[1] == found[2]


MISFITS = {
    "batch norm": lambda: torch.nn.BatchNorm2d(4),
    "batch norm in eval mode": lambda: torch.nn.BatchNorm2d(4).eval(),
    "layer norm": lambda: torch.nn.LayerNorm(4),
    "layer norm of maps": lambda: torch.nn.LayerNorm((4, 5)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_other_widths_are_refused_as_by_torch(name):
    with torch.device("meta"), ShapesOnly(), pytest.raises(RuntimeError, match=r"expected input|should contain"):
        MISFITS[name]()(torch.empty(IMAGES))


def test_what_works_in_place_is_tried():
    seen = set()

    class Listening(ShapesOnly):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Listening():
        OPERATIONS["first weights"](torch.empty(IMAGES, device="meta"))
    assert seen >= IN_PLACE, IN_PLACE - seen


def test_results_are_new_tensors():
    x = torch.empty(IMAGES, device="meta")
    with ShapesOnly():
        first, again = F.relu(x), F.relu(x)
    first.resize_(1)
    assert again.shape == x.shape


def test_numbers_are_computed():
    x = torch.randn(IMAGES)
    with ShapesOnly():
        assert torch.equal(F.relu(x), x.clamp_min(0))
