"""A chain of assistants between teacher and student."""

import pytest
import torch
import torch.nn.functional as F
from training import PLAIN, TINY, Command, assert_same_run, lines, merged, metrics, together, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.engine.accelerator import build_accelerator
from kdkit.randomness import reseed
from kdkit.recipe import registry
from kdkit.runs import opening
from kdkit.runs.checkpoints import Checkpoints
from kdkit.runs.networks import ModelFactory
from kdkit.testing import random_batch, random_outputs

Assistants = registry.load().schedules["assistants"]
MLPS = {
    **PLAIN,
    "name": "chain",
    "student": {"model": "mlp/6"},
    "teacher": {"model": "mlp/24"},
    "schedule": {"use": "assistants", "assistants": [{"model": "mlp/16"}, {"model": "mlp/10"}]},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 1}],
    "train": {"epochs": 2, "optimizer": {"name": "momentum", "lr": 0.1}, "lr_schedule": {"name": "constant"}},
}


def taught(**options):
    """Who teaches in each stage, by number: 0 is the teacher, 1 the first assistant."""

    class Fake:
        def __init__(self, number):
            self.number, self.frozen, self.answered = number, False, 0

        def freeze(self):
            self.frozen = True
            return self

        def __call__(self, inputs):
            assert torch.is_grad_enabled() != (self.frozen or self.number == 0)
            return random_outputs(size=len(inputs), seed=self.number).map(lambda x: x.requires_grad_())

    class Fakes:
        made = 0

        def student(self, options=None):
            self.made += 1
            return Fake(99 if options is None else options)

        def teacher(self):
            return Fake(0)

    schedule = Assistants(
        Assistants.Options.model_construct(**{"dense": False, "drop": 0.0, "epochs": None, "assistants": (1, 2), **options})
    )
    for stage in schedule.stages(Fakes()):
        (lesson,) = stage.step(random_batch(3))
        assert lesson.student.logits.requires_grad and not any(answer.logits.requires_grad for answer in lesson.teachers)
        known = {number: random_outputs(size=3, seed=number).logits for number in range(3)}
        numbers = [n for answer in lesson.teachers for n, z in known.items() if torch.equal(z, answer.logits)]
        assert stage.teachers[0].number == numbers[0]
        yield stage.name, stage.students[0].number, numbers, stage.training.epochs


def test_each_assistant_teaches_the_next():
    assert list(taught(epochs=7)) == [("assistant_1", 1, [0], 7), ("assistant_2", 2, [1], 7), ("student", 99, [2], None)]


def test_dense_all_before_it_teach():
    assert [(name, numbers) for name, _, numbers, _ in taught(dense=True)] == [
        ("assistant_1", [0]), ("assistant_2", [0, 1]), ("student", [0, 1, 2])
    ]  # fmt: skip


def test_dropped_assistants_are_never_all():
    schedule = Assistants(Assistants.Options(assistants=({"model": "a"},), dense=True, drop=0.8))
    torch.manual_seed(0)
    draws = torch.stack([schedule.kept(3, torch.device("cpu")) for _ in range(500)])
    assert set(draws.flatten().tolist()) == {0, 1} and bool((draws.sum(1) >= 1).all())
    wanted = 0.2 + 0.8**3 / 3  # kept by itself, or as the one that stays
    assert all(abs(float(share) - wanted) < 0.07 for share in draws.mean(0))
    assert schedule.kept(1, torch.device("cpu")) is None


def test_drop_is_for_several_teachers():
    with pytest.raises(ValueError, match="set `dense: true`"):
        Assistants.Options(assistants=({"model": "a"},), drop=0.5)


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"dense": True, "drop": 0.5}, {"epochs": 1}])
def test_the_chain_is_plain_torch_code_in_a_row(tmp_path, options):
    path = write(tmp_path, MLPS, schedule={**MLPS["schedule"], **options})
    kdkit.train(path, folder=tmp_path / "run", quiet=True)
    loaded = recipe.load(path)
    accelerator = build_accelerator(loaded.spec.train)
    prepared = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, prepared.info, {}, device=accelerator.device)
    student, *earlier = factory.student(), factory.teacher()
    chain = [factory.student(assistant) for assistant in loaded.spec.schedule.assistants]
    for number, learner in enumerate([*chain, student], 1):
        name, epochs = (f"assistant_{number}", options.get("epochs", 2)) if learner is not student else ("student", 2)
        optimizer, step = torch.optim.SGD(learner.module.parameters(), lr=0.1, momentum=0.9), 0
        for epoch in range(epochs):
            for batch in prepared.train.epoch(epoch):
                by = earlier if options.get("dense") else earlier[-1:]
                reseed(0, name, step, 0)
                draws = torch.ones(len(by))
                if options.get("drop") and len(by) > 1:
                    draws = torch.rand(len(by), device=batch.labels.device).cpu()
                by = [model for model, draw in zip(by, draws, strict=True) if draw >= 0.5 or draw == draws.max()]
                z = learner(batch.inputs).logits
                targets = [model(batch.inputs).logits.softmax(1).detach() for model in by]
                soft = sum(((p * (p.log() - z.log_softmax(1))).sum(1).mean() for p in targets), start=z.new_zeros(())) / len(by)
                optimizer.zero_grad()
                (F.cross_entropy(z, batch.labels) + soft).backward()
                optimizer.step()
                step += 1
        earlier.append(learner)
    for key, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(student.module.state_dict()[key].cpu(), value, rtol=1e-4, atol=1e-6)


def watched(monkeypatch):
    """Collects what is frozen when a stage begins: roles and weights."""
    found, watch = [], ModelFactory.watch

    def watching(self, but=()):
        watch(self, but)
        found.append([{k: v.cpu().clone() for k, v in model.module.state_dict().items()} for model in self._frozen._digests])

    monkeypatch.setattr(ModelFactory, "watch", watching)
    return found


@pytest.mark.parametrize("ema", [None, {"decay": 0.6}])
def test_an_assistant_teaches_as_it_was_measured(tmp_path, monkeypatch, ema):
    found = watched(monkeypatch)
    train(tmp_path, MLPS, train={"ema": ema})
    assert [len(frozen) for frozen in found] == [1, 2, 3]
    first = [next(iter(frozen[1].values())) for frozen in found[1:]]
    assert torch.equal(*first)
    saved, _ = Checkpoints(tmp_path / "run" / "checkpoints").load_newest("stage0")
    raw = {key.removeprefix("students.0."): value for key, value in saved["trainer"]["learner"].items() if key.startswith("students.0.")}
    measured = saved["trainer"]["averages"][0] or raw
    assert all(torch.equal(value, measured[key]) for key, value in found[2][1].items())
    assert (ema is None) == all(torch.equal(value, raw[key]) for key, value in found[2][1].items())


def test_layers_by_alias_of_backbones_of_all_kinds(tmp_path):
    changes = {
        "losses": [*PLAIN["losses"], {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage4"}]}],
        "schedule": {"use": "assistants", "dense": False, "assistants": [{**TINY, "args": {**TINY["args"], "channels": [6, 6, 8, 12]}}]},
        "train": {"epochs": 1},
    }
    train(tmp_path, PLAIN, **changes)
    epochs = [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert [line["stage"] for line in epochs] == ["assistant_1", "student"] and all(line["train"]["hint"] > 0 for line in epochs)
    with pytest.raises(kdkit.RecipeError, match=r"teacher layer 'stage4' is \(16, 1, 1\) in one teacher, \(12, 1, 1\) in another"):
        kdkit.check(write(tmp_path, PLAIN, **merged(changes, {"schedule": {"dense": True}})))


def test_a_loss_reads_the_network_of_who_teaches(tmp_path):
    """The classifier is the assistant's in the student's stage, whose width is another than the teacher's."""
    wide = {**TINY, "args": {**TINY["args"], "channels": [6, 6, 8, 12]}}
    losses = [{"use": "srrl", "layers": [{"student": "stage4", "teacher": "stage4"}]}]
    changes = {"losses": losses, "schedule": {"use": "assistants", "assistants": [wide]}, "train": {"epochs": 1}}
    train(tmp_path, PLAIN, data={"dataset": {"image_size": 32}}, **changes)
    saved, _ = Checkpoints(tmp_path / "run" / "checkpoints").load_newest("stage1")
    assert saved["trainer"]["learner"]["objectives.0.losses.srrl.classifier.weight"].shape == (6, 12)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"assistants": [{"model": "mlpp/16"}]}, "schedule.assistants.0.model: no model source is called 'mlpp'; did you mean 'mlp'?"),
        ({"assistants": [{"model": "mlp/1x"}]}, "schedule.assistants.0.model: "),
        ({"assistants": [{"model": "mlp/16", "stem": "small"}]}, "schedule.assistants.0.stem: no such key"),
        ({"assistants": []}, "needs at least 1"),
        ({"drop": 0.5}, "set `dense: true`"),
    ],
)
def test_mistakes_name_the_assistant(tmp_path, changes, says):
    with pytest.raises(kdkit.RecipeError) as caught:
        kdkit.check(write(tmp_path, MLPS, schedule=changes))
    assert says in str(caught.value) and "recipe.yaml:" in str(caught.value)


def test_a_layer_that_an_assistant_lacks_is_told_with_its_place(tmp_path):
    hint = {"use": "hint", "layers": [{"student": "layer1", "teacher": "layer2.0"}]}
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: schedule.assistants.0.model: .*layer2"):
        kdkit.check(write(tmp_path, MLPS, teacher={"model": "mlp/24-12"}, student={"model": "mlp/6-6"}, losses=[hint]))


def test_an_assistant_that_is_only_a_part_cannot_teach(tmp_path):
    changes = {
        "losses": [{"use": "simkd", "layers": [{"student": "stage4", "teacher": "stage4"}]}],
        "data": {"dataset": {"image_size": 32}},
    }
    with pytest.raises(kdkit.RecipeError, match=r"schedule: student.*part of another network, Deployed, so that it cannot teach"):
        kdkit.check(write(tmp_path, PLAIN, schedule={"use": "assistants", "assistants": [TINY]}, **changes))


TAMPERING = '''
import torch
import kdkit


class Tampering(kdkit.Schedule):
    """Changes a student that it has frozen."""

    name = "tampering"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models):
        first, second = models.student(), models.student()
        yield kdkit.Stage("first", [first], kdkit.teach(first, by=[models.teacher()]))
        taught = first.freeze()

        @torch.no_grad()
        def tamper():
            next(taught.module.parameters()).add_(1e-3)

        yield kdkit.Stage("second", [second], kdkit.teach(second, by=[taught]), after_step=tamper, buffers={buffers})


@kdkit.hookimpl
def kdkit_schedules():
    return [Tampering]
'''


def test_a_frozen_student_must_stay_as_it_is_but_where_a_stage_says_so(tmp_path):
    tampering = {**MLPS, "schedule": {"use": "tampering"}, "plugins": ["tampering.py"]}
    (tmp_path / "tampering.py").write_text(TAMPERING.replace("{buffers}", "[]"))
    with pytest.raises(kdkit.RunError, match="student.* is frozen, yet its parameters or buffers have changed"):
        train(tmp_path, tampering)
    (tmp_path / "tampering.py").write_text(TAMPERING.replace("{buffers}", "[taught]"))
    train(tmp_path, tampering, into="allowed")


@pytest.mark.slow
def test_killed_between_and_inside_stages_it_ends_with_the_same_bits(tmp_path):
    changes = {"schedule": {"dense": True, "drop": 0.3}, "train": {"ema": {"decay": 0.6}}, "run": {"checkpoint_steps": 4}}
    path = write(tmp_path, merged(MLPS, changes))
    assert Command(tmp_path, "train", path, "--run", "whole").finish()[0] == 0
    for wanted in (16, 31):
        command = Command(tmp_path, "train", path, "--run", "run")
        if not command.wait_for(lambda wanted=wanted: lines(tmp_path / "run") >= wanted):
            break
        command.process.kill()
        command.process.join()
    code, log = Command(tmp_path, "train", path, "--run", "run").finish()
    assert code == 0, log
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    path = write(tmp_path, MLPS, schedule={"dense": True}, train={"ema": {"decay": 0.6}})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    one, two = (weights(tmp_path / run) for run in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)
