import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import kdkit
from kdkit.models.folding import fold_batchnorm
from kdkit.models.tapped import TappedModel


def settled(module, x):
    """The network in eval mode, with running statistics and affine values that are not their initial ones."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    with torch.no_grad():
        for _ in range(3):
            module.train()(x)
    return module.eval()


def norms(module):
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("test_resnet"),
        lambda: timm.create_model("mobilenetv2_050"),
        lambda: timm.create_model("test_efficientnet"),
        lambda: timm.create_model("tf_efficientnet_b0"),  # its convolutions pad by themselves
        lambda: torchvision.models.resnet18(num_classes=10),
    ],
    ids=["resnet", "mobilenet", "efficientnet", "same-padding", "torchvision"],
)
def test_every_batchnorm_is_folded_and_the_answer_stays(make):
    module = settled(make(), X)
    assert norms(module) > 5
    before, state_before = module(X), state(module)
    folded = fold_batchnorm(module, X)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(X), before, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in module.named_modules()} <= {name for name, _ in folded.named_modules()}  # children of BatchNormAct2d too
    shared = {value.data_ptr() for value in module.state_dict().values()} & {value.data_ptr() for value in folded.state_dict().values()}
    assert not shared - {0}
    assert all(torch.equal(value, state_before[key]) for key, value in module.state_dict().items())


def test_folding_keeps_the_tree_of_modules_for_taps():
    module = settled(timm.create_model("test_efficientnet"), X)
    folded = fold_batchnorm(module, X)
    for layer in ("bn1.act", "stage2", "penultimate"):
        torch.testing.assert_close(
            kdkit.taps(folded, [layer])(X).features[layer], kdkit.taps(module, [layer])(X).features[layer], rtol=1e-4, atol=1e-5
        )


def test_folding_in_place_changes_the_network_itself():
    module = settled(timm.create_model("test_resnet"), X)
    before = module(X)
    assert fold_batchnorm(module, X, in_place=True) is module
    assert norms(module) == 0
    torch.testing.assert_close(module(X), before, rtol=1e-4, atol=1e-5)


def test_tapped_batchnorms_are_not_folded():
    module = settled(torchvision.models.mobilenet_v2(width_mult=0.25), X)
    assert norms(fold_batchnorm(module, X)) == 0
    pair = ("features.2.conv.2", "features.2.conv.3")  # a projection, which no activation follows
    for kept in pair:
        assert norms(fold_batchnorm(module, X, keep=[kept])) == 1
        folded = fold_batchnorm(kdkit.taps(module, [kept]), X)
        assert norms(folded.module) == 1
        expected = kdkit.taps(module, [kept])(X).features[kept]
        torch.testing.assert_close(folded(X).features[kept], expected, rtol=1e-4, atol=1e-5)
    assert norms(fold_batchnorm(module, X, keep=pair)) == 1


class Twice(nn.Module):
    """The first convolution's output is read twice, the second's once."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm = nn.BatchNorm2d(3)  # registered first, run last
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, bias=False)
        self.other = nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        a = self.one(x)
        if self.how == "function":
            return self.other(self.two(self.norm(a) + a.mean()))
        if self.how == "module":
            return self.other(self.two(self.norm(a))) + self.two(a)
        return self.other(self.two(self.norm(a)))


@pytest.mark.parametrize(("how", "left"), [("function", 1), ("module", 2), ("once", 0)])
def test_an_output_that_is_read_twice_is_not_folded(how, left):
    module = settled(Twice(how), X)
    folded = fold_batchnorm(module, X)
    assert norms(folded) == left
    torch.testing.assert_close(folded(X), module(X), rtol=1e-4, atol=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "pair",
    [
        lambda: [Standardised(3, 3, 3), nn.BatchNorm2d(3)],
        lambda: [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3)],
        lambda: [nn.ConvTranspose2d(3, 3, 3), nn.BatchNorm2d(3)],
        lambda: [nn.Conv2d(3, 3, 3), Odd(3)],
        lambda: [nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)],
        lambda: [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)],
    ],
    ids=["standardised", "weight-norm", "transposed", "odd-norm", "batch-statistics", "not-adjacent"],
)
def test_what_only_looks_like_a_pair_is_not_folded(pair):
    module = nn.Sequential(*pair())
    module = settled(module, X)
    folded = fold_batchnorm(module, X)
    assert norms(folded) == 1
    torch.testing.assert_close(folded(X), module(X))


def test_shared_weights_are_not_folded():
    one, two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    two.weight = one.weight
    module = settled(nn.Sequential(one, nn.BatchNorm2d(3), two, nn.BatchNorm2d(3)), X)
    assert norms(fold_batchnorm(module, X)) == 2


class Counting(nn.Module):
    """Answers differently each time, so that no folding could be told from it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.calls = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 0

    def forward(self, x):
        self.calls += 1
        return self.bn(self.conv(x)) * self.calls


def test_folding_that_changes_the_answer_is_an_error():
    module = settled(Counting(), X)
    before = state(module)
    with pytest.raises(kdkit.ModelError, match="changes this network's answer"):
        fold_batchnorm(module, X)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_folding_of_a_tapped_model_with_adapter_and_shape():
    module = settled(timm.create_model("test_resnet", num_classes=5), X)
    adapt = kdkit.NormalizationAdapter(0.0, 1.0, (0.5,) * 3, (0.2,) * 3)
    model = TappedModel(module, ["stage1"], adapt=adapt, channels_last=True)
    model.module.train()  # a teacher that nobody has frozen yet
    numbers = torch.get_rng_state()
    folded = fold_batchnorm(model, (1, 32, 32))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert norms(folded.module) == 0
    assert not folded.module.training
    assert model.module.training
    model.freeze()
    torch.testing.assert_close(folded(X).logits, model(X).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded(X).features["stage1"], model(X).features["stage1"], rtol=1e-4, atol=1e-5)


def test_batch_statistics_cannot_be_folded():
    model = kdkit.taps(copy.deepcopy(timm.create_model("test_resnet")), []).freeze("train")
    with pytest.raises(kdkit.ModelError, match="batch statistics"):
        fold_batchnorm(model, X)
