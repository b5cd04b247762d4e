"""Optimizer groups and learning rates, against formulas."""

import math

import pytest
import timm
import torch
from torch import nn
from training import train, write

import kdkit
from kdkit.engine.optim import LrSchedule, build_optimizer
from kdkit.errors import RunError
from kdkit.recipe.sections import LrScheduleSpec, TrainSpec

SPE = 5  # steps per epoch


def spec(epochs=10, optimizer=None, adapters=None, **schedule):
    return TrainSpec(epochs=epochs, optimizer={"lr": 1.0, **(optimizer or {})}, adapters=adapters or {}, lr_schedule=schedule)


def rates(epochs=10, metrics=None, maximize=True, **schedule):
    """The rate of each step, and the one after the last."""
    chosen = spec(epochs, **schedule)
    optimizer = build_optimizer(chosen, nn.Linear(2, 2), nn.Identity())
    lr = LrSchedule(chosen, optimizer, epochs, SPE, maximize=maximize)
    found = []
    for step in range(epochs * SPE):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
        lr.after_step(step + 1)
        if (step + 1) % SPE == 0:
            lr.after_epoch((step + 1) // SPE, metrics[step // SPE] if metrics else 0.0)
    return found


def warmed(step, warmup_epochs, warmup_lr):
    return warmup_lr + (1 - warmup_lr) * step / (warmup_epochs * SPE)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("cooldown", [0, 3])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("constant", lambda s, total: 1.0),
        ("cosine", lambda s, total: 0.01 + 0.99 * (1 + math.cos(math.pi * s / total)) / 2),
        ("poly", lambda s, total: 0.01 + 0.99 * (1 - s / total) ** 0.5),
        ("step", lambda s, total: 0.5 ** (s // (3 * SPE))),
        ("multistep", lambda s, total: 0.5 ** ((s >= 4 * SPE) + (s >= 6 * SPE))),
    ],
)
def test_learning_rates_per_step(name, shape, warmup, cooldown):
    found = rates(
        name=name,
        warmup_epochs=warmup,
        warmup_lr=0.1,
        cooldown_epochs=cooldown,
        min_lr=0.01,
        milestones=[6, 4],
        step_epochs=3,
        decay_rate=0.5,
    )
    for step, rate in enumerate(found):
        if step < warmup * SPE:
            expected = warmed(step, warmup, 0.1)
        elif step >= (10 - cooldown) * SPE:
            expected = 0.01
        else:
            expected = shape(step, (10 - cooldown) * SPE)
        assert rate == pytest.approx(expected), step


def test_tanh_schedule_falls_from_the_rate_to_the_least():
    found = rates(name="tanh", min_lr=0.01)
    assert found[0] == pytest.approx(1, abs=0.01)
    assert all(a > b for a, b in zip(found, found[1:], strict=False))
    assert found[-1] < 0.05


def test_plateau_decays_when_the_accuracy_stays():
    accuracy = [1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    found = rates(name="plateau", metrics=accuracy, patience=1, decay_rate=0.5)[::SPE]
    assert found == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_plateau_of_a_loss_warms_up_and_cools_down():
    options = {"patience": 1, "decay_rate": 0.5, "warmup_epochs": 2, "warmup_lr": 0.0, "cooldown_epochs": 1, "min_lr": 0.125}
    found = rates(name="plateau", metrics=[3.0, 2, 2, 2, 2, 1, 1, 1, 1, 1], maximize=False, **options)
    assert found[: 2 * SPE] == pytest.approx([warmed(step, 2, 0.0) for step in range(2 * SPE)])
    assert found[2 * SPE :: SPE] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.125]


def test_plateau_keeps_its_counts():
    chosen = spec(name="plateau", patience=2, decay_rate=0.5)

    def made():
        optimizer = build_optimizer(chosen, nn.Linear(2, 2), nn.Identity())
        return optimizer, LrSchedule(chosen, optimizer, 10, SPE, maximize=True)

    optimizer, schedule = made()
    for epoch in (1, 2, 3):
        schedule.after_epoch(epoch, 50.0)
    fresh, going_on = made()
    fresh.load_state_dict(optimizer.state_dict())
    going_on.load_state_dict(schedule.state_dict())
    going_on.after_epoch(4, 50.0)
    assert fresh.param_groups[0]["lr"] == 0.5


def decayed(optimizer, module):
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if id(p) in names}


def test_norm_and_bias_are_not_decayed_unless_asked():
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    found = decayed(build_optimizer(spec(optimizer={"weight_decay": 0.1}), student, nn.Identity()), student)
    assert found == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": 0.1, "2.bias": 0}
    found = decayed(build_optimizer(spec(optimizer={"weight_decay": 0.1, "decay_norm_and_bias": True}), student, nn.Identity()), student)
    assert set(found.values()) == {0.1} and len(found) == 6


def test_weights_that_a_network_exempts_are_not_decayed():
    student = timm.create_model("test_vit", num_classes=3)
    found = decayed(build_optimizer(spec(optimizer={"weight_decay": 0.1}), student, nn.Identity()), student)
    assert found["pos_embed"] == 0 and found["blocks.0.attn.qkv.weight"] == 0.1
    assert len(found) == len(list(student.parameters()))


def test_adapters_have_a_group_of_their_own():
    student, adapters = nn.Linear(2, 2), nn.Linear(3, 3)
    chosen = spec(
        optimizer={"weight_decay": 0.1, "lr": 1.0},
        adapters={"lr": 0.25, "weight_decay": 0.5},
        name="cosine",
        warmup_epochs=1,
        warmup_lr=0.0,
    )
    optimizer = build_optimizer(chosen, student, adapters)
    schedule = LrSchedule(chosen, optimizer, 10, SPE, maximize=True)
    assert decayed(optimizer, adapters) == {"weight": 0.5, "bias": 0}
    assert decayed(optimizer, student) == {"weight": 0.1, "bias": 0}
    schedule.after_step(SPE)
    own = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert own[id(adapters.weight)] == pytest.approx(own[id(student.weight)] / 4)


def test_layer_decay_scales_the_rate_from_the_last_layer_to_the_first():
    student = timm.create_model("test_vit", num_classes=3)
    chosen = spec(optimizer={"layer_decay": 0.5}, name="constant")
    optimizer = build_optimizer(chosen, student, nn.Identity())
    LrSchedule(chosen, optimizer, 10, SPE, maximize=True)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    depth = [rate[id(block.attn.qkv.weight)] for block in student.blocks]
    assert rate[id(student.head.weight)] == 1
    assert all(b == pytest.approx(2 * a) for a, b in zip(depth, depth[1:], strict=False))
    assert rate[id(student.patch_embed.proj.weight)] == pytest.approx(depth[0] / 2)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "lion", "adopt", "rmsproptf", "nadamw"])
def test_timms_optimizers_take_a_step(name):
    student = nn.Linear(3, 2)
    before = student.weight.detach().clone()
    optimizer = build_optimizer(spec(optimizer={"name": name, "lr": 0.1}), student, nn.Identity())
    for _ in range(2):  # adopt only looks at the first gradient
        student(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, student.weight)


def test_an_unknown_optimizer_is_told_with_file_and_line(tmp_path):
    with pytest.raises(RunError, match="did you mean 'adamw'"):
        build_optimizer(spec(optimizer={"name": "adamww"}), nn.Linear(2, 2), nn.Identity())
    path = write(tmp_path, train={"optimizer": {"name": "adamww"}})
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: train.optimizer: timm has no optimizer 'adamww'; did you mean 'adamw'"):
        kdkit.check(path)
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: train.optimizer: optimizer 'adamw' cannot be made: .*bettas"):
        train(tmp_path, train={"optimizer": {"name": "adamw", "args": {"bettas": [0.9, 0.99]}}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("warmup", "cooldown", "epochs", "expected"),
    [(5, 0, 25, (5, 0)), (5, 5, 10, (5, 5)), (5, 0, 2, (1, 0)), (5, 0, 1, (0, 0)), (5, 10, 12, (2, 4)), (16, 0, 10, (5, 0))],
)
def test_a_warm_up_that_is_too_long_takes_half_of_the_stage(warmup, cooldown, epochs, expected):
    asked = LrScheduleSpec(warmup_epochs=warmup, cooldown_epochs=cooldown)
    used = asked.within(epochs)
    assert (used.warmup_epochs, used.cooldown_epochs) == expected
    told = asked.shortened("train", epochs)
    assert (told is None) == (warmup + cooldown <= epochs)
    assert told is None or told.endswith(f"of stage 'train': they are shortened to {expected[0]} + {expected[1]}")
