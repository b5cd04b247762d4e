import copy
import gc
import weakref

import pytest
import timm
import torch
from torch import nn

import kdkit
from kdkit.models.tapped import TappedModel

X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5, **options)


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Net(nn.Module):
    """A little of everything that goes wrong; `behave` says which."""

    def __init__(self, behave=""):
        super().__init__()
        self.behave = behave
        self.unused, self.pair = nn.Linear(4, 4), Pair()
        self.bn, self.relu, self.fc = nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        x = self.bn(x)
        if self.behave == "inplace":
            x = self.relu(x)
        if self.behave == "function":
            x += 1
        if self.behave == "fail":
            raise ZeroDivisionError
        if self.behave == "repeat":
            x = self.pair(self.bn(x))[0]
        if self.behave == "set":
            return {1}
        if self.behave == "tuple":
            return self.fc(x), x
        if self.behave == "mapping":
            return {"logits": self.fc(x), "loss": None}
        return self.fc(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


R = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


def test_taps_are_usable_alone_on_any_module():
    net = tiny().eval()
    tapped = kdkit.taps(net, ["layer2", "stage3", "penultimate", "logits", "layer4.*"])
    out = tapped(X)
    assert list(out.features) == ["layer2", "stage3", "penultimate", "logits", "layer4.0"]
    assert torch.equal(out.logits, net(X))
    assert torch.equal(out.features["logits"], out.logits)
    assert torch.equal(out.features["layer2"], net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(X)))))))
    assert torch.equal(net.fc(out.features["penultimate"]), out.logits)
    out.features["layer2"].sum().backward()
    assert net.layer1[0].conv1.weight.grad is not None
    assert net.layer3[0].conv1.weight.grad is None
    assert isinstance(kdkit.taps, type(test_taps_are_usable_alone_on_any_module))  # the function, not a module


def test_tapped_model_passes_mappings_as_keyword_arguments():
    net = Net("mapping")
    assert torch.equal(kdkit.taps(net, [])({"x": R}).logits, net(R)["logits"])


def test_tap_of_an_unknown_layer_names_the_role():
    with pytest.raises(kdkit.TapError, match=r"^teacher t: there is no layer 'layer9'; did you mean"):
        TappedModel(tiny(), ["layer9"], role="teacher t")


@pytest.mark.parametrize(("behave", "instead"), [("inplace", "'relu'"), ("function", "a later layer")])
def test_tap_of_an_overwritten_output_says_what_to_tap(behave, instead):
    with pytest.raises(kdkit.TapError, match=f"the output of 'bn' is overwritten in place; tap {instead} instead"):
        kdkit.taps(Net(behave), ["bn"])(R)
    net = timm.create_model("test_resnet").eval()
    with pytest.raises(kdkit.TapError, match=r"'layer1\.0\.bn1' is overwritten in place; tap 'layer1\.0\.act1' instead"):
        kdkit.taps(net, ["layer1.0.bn1"])(X)
    with pytest.raises(kdkit.TapError, match=r"'layer1\.0\.bn2' is overwritten in place; tap 'layer1\.0' instead"):
        kdkit.taps(net, ["layer1.0.bn2"])(X)  # by `x += shortcut`


def test_in_place_layer_itself_can_be_tapped():
    assert (kdkit.taps(Net("inplace"), ["relu"])(R).features["relu"] >= 0).all()


def test_tap_of_a_layer_that_never_runs_is_an_error():
    with pytest.raises(kdkit.TapError, match="unused exist but did not run"):
        kdkit.taps(Net(), ["bn", "unused"])(R)


def test_tap_of_a_layer_that_runs_twice_gives_its_last_output():
    net = Net("repeat").eval()
    assert torch.equal(kdkit.taps(net, ["bn"])(R).features["bn"], net.bn(net.bn(R)))


def test_tap_of_an_output_that_is_not_one_tensor_is_an_error():
    with pytest.raises(kdkit.TapError, match="layer 'pair' gives tuple, not one tensor"):
        kdkit.taps(Net("repeat"), ["pair"])(R)
    with pytest.raises(kdkit.TapError, match="returns set, no tensor of logits"):
        kdkit.taps(Net("set"), ["bn"])(R)


def test_several_outputs_are_logits_and_named_taps():
    net = Net("tuple")
    first, second = net(R)
    out = kdkit.taps(net, ["logits", "output1"])(R)
    assert torch.equal(out.logits, first) and torch.equal(out.features["logits"], first) and torch.equal(out.features["output1"], second)
    with pytest.raises(kdkit.TapError, match="'output7': the network gives 2 outputs, counted from 0"):
        kdkit.taps(net, ["output7"])(R)


@pytest.mark.parametrize(
    ("behave", "layer", "error"), [("fail", "bn", ZeroDivisionError), ("repeat", "pair", kdkit.TapError), ("inplace", "bn", kdkit.TapError)]
)
def test_no_hook_of_a_tap_outlives_a_call(behave, layer, error):
    net = Net(behave)
    with pytest.raises(error):
        kdkit.taps(net, [layer])(R)
    assert hooks(net) == 0
    good = Net()
    kdkit.taps(good, ["bn", "penultimate"])(R)
    assert hooks(good) == 0


def test_taps_keep_no_tensor_between_calls():
    tapped = kdkit.taps(tiny(), ["layer1", "penultimate"])
    out = tapped(X)
    alive = [weakref.ref(value) for value in (out.logits, *out.features.values())]
    gc.disable()
    try:
        del out
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_copy_of_a_tapped_model_is_independent():
    one = kdkit.taps(tiny().eval(), ["layer2"])
    before = one(X)
    two = copy.deepcopy(one)
    for value in two.module.parameters():
        value.data.zero_()
    assert torch.equal(one(X).features["layer2"], before.features["layer2"])
    assert not two(X).features["layer2"].any()


def test_taps_work_within_inference_mode():
    with torch.inference_mode():
        assert kdkit.taps(tiny(), ["layer1"])(X).features["layer1"].shape[0] == 3


def counting(net):
    ran = []
    for name, part in net.named_children():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def test_forward_stops_behind_the_deepest_tap_with_the_same_values():
    net = tiny().eval()
    whole = kdkit.taps(net, ["layer2", "layer1"])(X)
    short = TappedModel(net, ["layer2", "layer1"], needs_logits=False, role="teacher t")
    first = short(X)
    ran = counting(net)
    second = short(X)
    assert ran[-1] == "layer2"
    for answer in (first, second):
        assert {name: value.tolist() for name, value in answer.features.items()} == {
            name: value.tolist() for name, value in whole.features.items()
        }


def test_forward_stopped_at_a_tap_has_no_logits_and_says_why():
    answer = TappedModel(tiny(), ["layer1"], needs_logits=False, role="teacher t")(X)
    for same in (answer, answer.detach(), answer.map(lambda value: value * 2)):
        assert isinstance(same, kdkit.Outputs)
        with pytest.raises(kdkit.TapError, match="teacher t: .*needs_teacher_logits = True"):
            _ = same.logits
    assert not answer.detach().features["layer1"].requires_grad
    assert "layer1" in repr(answer)


def test_forward_stops_only_after_a_tapped_layer_has_run_again():
    net = Net("repeat").eval()
    short = TappedModel(net, ["bn"], needs_logits=False)
    assert torch.equal(short(R).features["bn"], short(R).features["bn"])
    assert torch.equal(short(R).features["bn"], net.bn(net.bn(R)))


def test_model_without_taps_and_logits_runs_nothing():
    net = Net("fail")
    assert TappedModel(net, [], needs_logits=False)(R).features == {}


def test_tapped_logits_need_the_whole_forward():
    net = tiny().eval()
    short = TappedModel(net, ["logits"], needs_logits=False)
    for _ in range(2):
        assert torch.equal(short(X).features["logits"], net(X))


def test_forward_stopped_at_a_tap_swallows_no_other_error():
    net = Net()
    short = TappedModel(net, ["bn"], needs_logits=False)
    short(R)
    net.behave = "fail"
    assert "logits" not in vars(short(R))  # it stops before the fault
    net.bn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        short(R)
    assert len(net.bn._forward_hooks) == 0


def test_channels_last_changes_the_layout_of_taps_only():
    net = tiny().eval()
    expected = kdkit.taps(net, ["layer1"])(X)
    found = TappedModel(copy.deepcopy(net), ["layer1"], channels_last=True)(X)
    assert found.features["layer1"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_precision_is_that_of_the_model_and_answers_are_fp32():
    net = tiny().eval()
    expected = net(X)
    seen = []
    net.fc.register_forward_hook(lambda part, args, output: seen.append(output.dtype))
    out = TappedModel(net, ["layer1"], precision=torch.bfloat16)(X)
    assert (out.logits.dtype, out.features["layer1"].dtype, seen) == (torch.float32, torch.float32, [torch.bfloat16])
    torch.testing.assert_close(out.logits, expected, rtol=0.1, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(TappedModel(net, precision=torch.float32)(X).logits, expected)
        assert TappedModel(net)(X).logits.dtype == torch.bfloat16


def test_input_adapter_comes_before_the_network():
    net = tiny().eval()
    adapt = kdkit.NormalizationAdapter(0.0, 1.0, (0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(TappedModel(net, adapt=adapt)(X).logits, net((X - 0.5) / 0.25))


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(module, before):
    return all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class Holder(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.own = teacher, nn.Linear(1, 1)


def test_frozen_model_does_not_change():
    model = TappedModel(tiny(drop_rate=0.5)).freeze()
    before = state(model.module)
    holder = Holder(model)
    holder.train()
    assert len(list(holder.parameters())) == 2
    assert torch.equal(model(X).logits, model(X).logits)
    assert not model.module.training
    assert not model(X).logits.requires_grad
    assert same_state(model.module, before)


def test_frozen_model_in_train_mode_uses_batch_statistics():
    net = tiny(drop_rate=0.5)
    with torch.no_grad():
        net(X * 3)  # running statistics that differ from the batch's
    reference = copy.deepcopy(net).train()
    reference.drop_rate = 0.0
    model = TappedModel(net).freeze("train")
    before = state(net)
    found = model(X).logits
    assert torch.equal(found, reference(X))  # dropout is off
    assert not torch.allclose(found, copy.deepcopy(reference).eval()(X))
    assert same_state(net, before)
    assert torch.equal(copy.deepcopy(model)(X).logits, found)


def test_twin_answers_alike_without_taps():
    net, other = tiny().eval(), tiny().eval()
    model = TappedModel(net, ["layer1"], adapt=nn.Softmax(1), role="student s", channels_last=True)
    twin = model.twin()
    assert (twin.module, twin.role, twin(X).features) == (net, "student s", {})
    assert torch.equal(twin(X).logits, model(X).logits)
    assert model.twin(other).module is other


@pytest.mark.slow
@pytest.mark.parametrize("needs_logits", [True, False])
def test_compiled_with_its_taps(needs_logits):
    net = tiny().eval()
    expected = kdkit.taps(net, ["layer2", "penultimate"])(X)
    model = TappedModel(net, ["layer2", "penultimate"], needs_logits=needs_logits).compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        out = model(X)
        for name, value in expected.features.items():
            torch.testing.assert_close(out.features[name], value, rtol=1e-4, atol=1e-5)
    assert not model._store.values
    if needs_logits:
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
        (out.logits.sum() + out.features["layer2"].sum()).backward()
        assert all(value.grad is not None for value in net.layer1.parameters())
    else:
        assert "logits" not in vars(out)


def test_compiled_copy_is_independent():
    model = kdkit.taps(tiny().eval(), ["layer2"]).compile(backend="eager")
    before = model(X).features["layer2"]
    other = copy.deepcopy(model)
    for value in other.module.parameters():
        value.data.zero_()
    assert not other(X).features["layer2"].any()
    assert torch.equal(model(X).features["layer2"], before)
    assert not model._store.values
    assert not other._store.values


def test_networks_of_one_architecture_share_a_graph_and_nothing_else():
    torch._dynamo.reset()  # what other tests compiled counts too
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for _ in range(10):  # more than torch recompiles by default; an exporter may have raised that limit
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model = TappedModel(net, ["0"]).compile(backend=backend, fullgraph=True)
        for _ in range(2):
            out = model(R)
            assert torch.equal(out.features["0"], net[0](R))
            assert torch.equal(out.logits, net(R))
            assert not model._store.values  # nor does a plain call leave anything there
    assert len(graphs) == 1


def test_compiling_checks_the_taps_without_a_trace():
    net = Net()
    before = state(net)
    with pytest.raises(kdkit.TapError, match="unused exist but did not run"):
        kdkit.taps(net, ["unused"]).compile(backend="eager")(R)
    with pytest.raises(kdkit.TapError, match="tap 'relu' instead"):
        kdkit.taps(Net("inplace"), ["bn"]).compile(backend="eager")(R)
    assert net.training
    assert same_state(net, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_by_the_real_compiler():
    net = tiny().eval()
    expected = kdkit.taps(net, ["layer2", "penultimate"])(X)
    out = kdkit.taps(net, ["layer2", "penultimate"]).compile()(X)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(out.features), dict(expected.features), rtol=1e-4, atol=1e-5)


class Step(nn.Module):
    """What a training loop wraps: the network is a child, the tapped model is called."""

    def __init__(self, model):
        super().__init__()
        self.module = model.module
        self.tapped = [model]

    def forward(self, images):
        out = self.tapped[0](images)
        return out.logits, out.features["layer2"]


def test_taps_under_distributed_data_parallel(tmp_path):
    net = tiny().eval()
    expected = kdkit.taps(net, ["layer2"])(X)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Step(kdkit.taps(net, ["layer2"])))
        logits, features = wrapped(X)
        assert torch.equal(logits, expected.logits)
        assert torch.equal(features, expected.features["layer2"])
        (logits.sum() + features.sum()).backward()
        assert all(value.grad is not None for value in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_tap_of_an_activations_input_survives_overwriting(compiled):
    module = timm.create_model("resnet18", num_classes=3, layers=(1, 1, 1, 1), zero_init_last=False).eval()
    block = module.layer1[0]
    assert block.act2.inplace
    tapped = kdkit.taps(module, ["layer1.0.act2@input", "layer1"])
    images = torch.rand(2, 3, 32, 32)
    if compiled:
        tapped.compile(backend="eager")
    with torch.no_grad():
        out = tapped(images)
        x = module.maxpool(module.act1(module.bn1(module.conv1(images))))
        before = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x))))) + x
    torch.testing.assert_close(out.features["layer1.0.act2@input"], before)
    torch.testing.assert_close(out.features["layer1"], before.relu())
    assert (before < 0).any()


class LastChannels(nn.Module):
    """A map (B, H, W, C) inside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.turn = Turn()

    def forward(self, x):
        return self.turn(self.conv(x)).mean((1, 2))


class Turn(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def test_tapped_channels_come_first_whatever_the_network_does():
    tapped = kdkit.taps(LastChannels(), ["conv", "turn"])
    out = tapped(torch.rand(2, 3, 6, 6))
    assert out.features["turn"].shape == (2, 4, 6, 6) and torch.equal(out.features["turn"], out.features["conv"])
    wide = tapped(torch.rand(2, 3, 4, 7))  # conv gives (2, 4, 4, 7), which is no sign of anything here
    assert wide.features["conv"].shape == (2, 4, 4, 7)


def test_timm_says_where_channels_are():
    tapped = kdkit.taps(timm.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval(), ["stage1", "stage4"])
    with torch.no_grad():
        features = tapped(torch.rand(1, 3, 224, 224)).features
    assert features["stage1"].shape == (1, 96, 56, 56) and features["stage4"].shape == (1, 768, 7, 7)
