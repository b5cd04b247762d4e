"""A network up to a layer: what it gives there, with the network's own parameters."""

import pytest
import torch
from torch import nn

import kdkit


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return net.eval()


@pytest.mark.parametrize(("layer", "depth"), [("0", 1), ("1", 2), ("2", 3), ("2@input", 2), ("penultimate", 5)])
def test_backbone_gives_what_the_layer_gives(layer, depth):
    net, images = network(), torch.rand(2, 3, 8, 8)
    assert torch.equal(kdkit.Backbone(net, layer)(images), net[:depth](images))


def test_backbone_shares_parameters_and_buffers_but_no_modules():
    net = network()
    backbone = kdkit.Backbone(net, "2")
    shared = {id(value) for value in (*backbone.parameters(), *backbone.buffers())}
    assert shared == {id(value) for value in (*net[:5].parameters(), *net[:5].buffers())}
    assert not {id(part) for part in backbone.modules()} & {id(part) for part in net.modules()}
    backbone.train()
    backbone(torch.rand(2, 3, 8, 8))
    assert net[1].num_batches_tracked == 1 and not net.training


def test_backbone_leaves_out_the_classifier_of_the_copy_alone():
    net = network()
    backbone = kdkit.Backbone(net, "2", num_classes=5)
    assert isinstance(backbone.network[5], nn.Identity) and isinstance(net[5], nn.Linear)


def test_gradients_of_a_backbone_reach_the_network():
    net = network()
    kdkit.Backbone(net, "2")(torch.rand(2, 3, 8, 8)).sum().backward()
    assert net[0].weight.grad.any() and net[5].weight.grad is None


def test_a_failed_forward_of_a_backbone_leaves_nothing_behind():
    backbone = kdkit.Backbone(network(), "2")
    with pytest.raises(RuntimeError):
        backbone(torch.rand(2, 7, 8, 8))
    assert not backbone._store.open and not backbone._store.values


@pytest.mark.parametrize(("layer", "net"), [("9", network()), ("0", nn.Sequential(nn.Conv2d(3, 4, 3)))])
def test_backbone_refuses_a_layer_that_is_not_there(layer, net):
    with pytest.raises(kdkit.TapError):
        kdkit.Backbone(net, layer)
