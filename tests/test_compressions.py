"""Students that are quantised or pruned: what they learn, what is measured, what their files give back."""

import copy

import pytest
import torch
from test_lockstep import alone, jobs
from training import PLAIN, TINY, assert_same_run, merged, metrics, stop_and_go_on, train, weights, write

import kdkit
from kdkit.models.build import build_model
from kdkit.models.compressing import begun, finished
from kdkit.recipe import registry
from kdkit.study.lockstep import train_together

pytest.importorskip("torchao", reason="needs kdkit[quantize]")
pytest.importorskip("torch_pruning", reason="needs kdkit[prune]")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning", "FutureWarning")]

PAIR = [{"student": "stage3", "teacher": "stage3"}]
EVERY_KIND = [
    {"use": "cross_entropy"},
    {"use": "logit_kl"},
    {"use": "hint", "layers": PAIR},
    {"use": "at", "layers": PAIR},
    {"use": "rkd_distance", "layers": [{"student": "penultimate", "teacher": "penultimate"}]},
]
BEGINS = {
    **PLAIN,
    "student": {**PLAIN["teacher"], "init": {"from": "teacher"}},
    "losses": EVERY_KIND,
    "train": {**PLAIN["train"], "evaluate_every": 2},
}
AWARE, AFTER, PRUNED = {"quantize": {}}, {"quantize": {"aware": False, "calibration": 2}}, {"prune": {"share": 0.5}}
STUDENTS = {"aware": AWARE, "after": AFTER, "pruned": PRUNED, "both": {**PRUNED, **AWARE}}


def network(layers=(), model=TINY, shape=(3, 16, 16)):
    """A small network with batch norms that have seen something."""
    plugins = registry.load()
    options = plugins.models["timm"].Options(**model)
    torch.manual_seed(0)
    built = build_model(options, plugins.models["timm"](options, options.model), 6, shape, layers)
    built.module.train()
    with torch.no_grad():
        for _ in range(10):
            built.module(torch.randn(16, *shape))
    built.module.eval()
    return built


def compression(name, **options):
    kind = registry.load().compressions[name]
    return kind(kind.Options(**options))


@pytest.mark.first(1)
@pytest.mark.parametrize("student", ["pruned", "aware", "after", "both"])
def test_a_compressed_student_learns_by_any_loss_and_is_read_back(tmp_path, student):
    result = train(tmp_path, BEGINS, student=STUDENTS[student])
    file, back = weights(tmp_path / "run"), kdkit.load_student(tmp_path / "run")
    rounded = [value for value in file.values() if value.dtype == torch.int8]
    assert bool(rounded) == (student != "pruned")
    assert not any("built again" in said for said in result.warnings)
    assert result.parameters == sum(p.numel() for p in back.module.parameters()) + sum(v.numel() for v in rounded)
    whole = sum(p.numel() for p in network(model=PLAIN["teacher"], shape=(3, 8, 8)).module.parameters())
    assert (result.parameters < 0.4 * whole) == (student in ("pruned", "both"))
    from kdkit.students.loaded import LoadedRun, evaluate

    scores = next(evaluate(LoadedRun(tmp_path / "run"), device=torch.device("cpu")))
    assert scores.metrics == pytest.approx(result.test)
    assert back(torch.rand(1, 3, 8, 8)).logits.shape == (1, 6)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["aware", "both"])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, student, monkeypatch):
    changes = {"student": STUDENTS[student], "run": {"checkpoint_steps": 2}}
    train(tmp_path, BEGINS, into="whole", **changes)
    stop_and_go_on(write(tmp_path, BEGINS, **changes), tmp_path / "stopped", monkeypatch, steps=9)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_rounding_after_training_leaves_the_training_alone(tmp_path):
    train(tmp_path, BEGINS, into="float")
    train(tmp_path, BEGINS, into="int8", student=AFTER)
    steps = [[line for line in metrics(tmp_path / run) if line["kind"] == "step"] for run in ("float", "int8")]
    assert steps[0] == steps[1]
    assert (tmp_path / "int8" / "student.safetensors").stat().st_size < (tmp_path / "float" / "student.safetensors").stat().st_size


@pytest.mark.slow
def test_means_of_weights_are_taken_before_they_are_rounded(tmp_path):
    changes = {"train": {"average_best": 2, "ema": {"decay": 0.5}}, "data": {"validation": 0.3}}
    result = train(tmp_path, BEGINS, student=AWARE, **changes)
    assert not any("built again" in said for said in result.warnings)
    assert any(v.dtype == torch.int8 for v in weights(tmp_path / "run").values())


def test_hooks_see_on_the_exported_network_what_they_see_on_the_eager_one():
    layers = ["stage1", "layer2.0.act1@input", "layer3.0.downsample", "layer3.0.downsample.1", "penultimate", "layer4.0@input", "logits"]
    model = network(layers)
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        wanted = model(images)
        model.module = begun(model.module, model.input_shape, [compression("quantize")])
        model.module.eval()
        for name, flag in model.module.named_buffers():
            if name.endswith("fake_quant_enabled"):
                flag.zero_()
        found = model(images)
    assert found.features.keys() == set(layers)
    for layer in layers:
        torch.testing.assert_close(found.features[layer], wanted.features[layer], rtol=1e-4, atol=1e-4)


def test_a_step_moves_the_folded_network_as_far_as_the_one_before():
    model = network()
    images = torch.rand(5, 3, 16, 16)
    graph = begun(copy.deepcopy(model.module), model.input_shape, [compression("quantize")])
    for name, flag in graph.named_buffers():
        if name.endswith("fake_quant_enabled"):
            flag.zero_()
    for name, parameter in model.module.named_parameters():
        # gamma stays as it is
        parameter.requires_grad_(not (parameter.ndim == 1 and name.endswith("weight")))
    answers = []
    for each in (model.module, graph):
        each.eval()
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.05)
        answers.append(each(images))
        answers[-1].square().mean().backward()
        optimizer.step()
        answers.append(each(images))
    before, after, same, moved = (answer.detach() for answer in answers)
    assert (after - before).abs().max() > 0.1 * before.abs().max()
    torch.testing.assert_close(same, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer1.0.bn1@input", "layer1.0.bn2"])
def test_what_a_folded_or_overwritten_layer_gave_is_refused_not_guessed(layer):
    model = network([layer])
    model.module = begun(model.module, model.input_shape, [compression("quantize")])
    with pytest.raises(kdkit.TapError):
        model(torch.rand(2, 3, 16, 16))


def test_the_int8_network_answers_as_the_fake_quantised_one():
    compressions = [compression("quantize")]
    module = begun(network().module, (3, 16, 16), compressions)
    images = torch.rand(32, 3, 16, 16)
    with torch.no_grad():
        module.train()
        module(images)
        module.eval()
        before = copy.deepcopy(module.state_dict())
        int8 = finished(module, (3, 16, 16), compressions)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        fake, real = module(images), int8(images)
    # roundings of a half may go to either side
    assert (fake - real).abs().mean() < 0.03 * fake.abs().max()
    assert (fake.argmax(1) == real.argmax(1)).float().mean() > 0.9
    again = copy.deepcopy(int8)
    assert again.state_dict().keys() == int8.state_dict().keys()
    # the scales of a file are what the network computes with
    state = {k: v * 2 if k == "activation_scales" else v for k, v in int8.state_dict().items()}
    again.load_state_dict(state)
    with torch.no_grad():
        assert not torch.allclose(again(images), real)
        again.load_state_dict(int8.state_dict())
        assert torch.equal(again(images), real)


def test_widths_follow_from_the_options_alone():
    shapes = []
    for seed in range(2):
        module = network().module
        torch.manual_seed(seed)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        begun(module, (3, 16, 16), [compression("prune", share=0.5)])
        shapes.append({name: value.shape for name, value in module.state_dict().items()})
    assert shapes[0] == shapes[1] and shapes[0]["fc.weight"] == (6, 4)


def test_the_least_important_channels_go_and_kept_layers_stay():
    module = network().module
    with torch.no_grad():
        module.layer1[0].conv1.weight[1].zero_()
        module.layer1[0].bn1.weight[1] = module.layer1[0].bn1.bias[1] = 0
        module.layer1[0].conv2.weight[:, 1] = 0
        images = torch.rand(2, 3, 16, 16)
        wanted = module(images)
    options = {"share": 0.25, "keep": ["conv1", "layer[1-4].0.conv2", "layer[2-4].*", "layer*.downsample.*"]}
    pruned = begun(module, (3, 16, 16), [compression("prune", **options)])
    assert pruned.layer1[0].conv1.out_channels == 3
    torch.testing.assert_close(pruned(images), wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": AWARE, "train": {"precision": "bf16"}}, "student.quantize: fake quantisation is in fp32"),
        ({"student": AWARE, "train": {"compile": True}}, "leave `train.compile` out"),
        ({"student": AWARE, "losses": [{"use": "simkd", "layers": PAIR}]}, "loss 'simkd' deploys another network"),
        ({"student": {"prune": {"share": 1.5}}}, "student.prune.share"),
        ({"student": {"prune": {"share": 0.5, "keep": ["nowhere"]}}}, "there is no layer 'nowhere'"),
        ({"student": {"quantize": {"to": "int3"}}}, "student.quantize.to"),
        ({"student": {"prune": {"share": 0.5, "keep": ["*"]}}}, "no channel is removed; see `share`, `round_to` and `keep`"),
    ],
)
def test_what_cannot_be_compressed_is_told_in_one_line(tmp_path, changes, says):
    with pytest.raises(kdkit.KdkitError, match=says.replace("(", r"\(")) as error:
        kdkit.check(write(tmp_path, PLAIN, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("student", "library"), [(AWARE, "torchao"), (PRUNED, "torch_pruning")])
def test_a_missing_library_names_its_extra(tmp_path, student, library, monkeypatch):
    import importlib.util
    import sys

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(kdkit.KdkitError, match=r"pip install kdkit\[(quantize|prune)\]"):
        kdkit.check(write(tmp_path, PLAIN, student=student))


def test_a_check_notes_what_begins_with_random_weights(tmp_path):
    assert "prune begins with random weights" in str(kdkit.check(write(tmp_path, PLAIN, student=PRUNED)))
    assert "random weights: `init`" not in str(kdkit.check(write(tmp_path, BEGINS, student=PRUNED)))


@pytest.mark.slow
def test_side_by_side_as_alone(tmp_path):
    found = jobs(tmp_path, BEGINS, {name: {"student": STUDENTS[name]} for name in ("aware", "pruned")})
    train_together(found)
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["aware", "pruned"])
def test_an_exported_student_and_an_onnx_file_answer_alike(tmp_path, student):
    from kdkit.students import export_onnx
    from kdkit.students.export import export
    from kdkit.students.loaded import LoadedRun, exported_about

    train(tmp_path, merged(BEGINS, {"train": {"epochs": 1}}), student=STUDENTS[student])
    run = LoadedRun(tmp_path / "run")
    export(run, folder=tmp_path / "timm")
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(kdkit.load_student(tmp_path / "timm")(images).logits, kdkit.load_student(tmp_path / "run")(images).logits)
    assert exported_about(tmp_path / "timm")["options"].keys() >= STUDENTS[student].keys()
    if student == "aware":
        pytest.importorskip("onnxruntime", reason="needs kdkit[export]")
        told = export(run, "onnx", tmp_path / "onnx")
        assert "int8 kernels" in told.notes[-2]
        # the file of another network is still told from rounding
        module = kdkit.load_student(tmp_path / "run").module
        module.load_state_dict({k: v * 1.5 if k == "activation_scales" else v for k, v in module.state_dict().items()})
        with pytest.raises(kdkit.ModelError, match="gives other logits than torch"):
            [*export_onnx._compared(tmp_path / "onnx" / "model.onnx", module, [{"images": images}], "logits")]
