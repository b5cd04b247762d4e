import dataclasses
import functools

import pytest
import torch
from pydantic import ValidationError

import kdkit
from kdkit.testing import random_batch, random_outputs


class TestBatch:
    def test_classes_of_index_labels(self):
        assert random_batch(3).classes.tolist() == [0, 1, 2]

    def test_classes_of_mixed_labels_are_the_largest_share(self):
        shares = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.4, 0.6]])
        assert dataclasses.replace(random_batch(2), labels=shares).classes.tolist() == [1, 2]

    def test_does_not_change(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            random_batch().labels = torch.zeros(6)


class TestOutputs:
    def test_map_changes_every_tensor_and_keeps_the_names(self):
        outputs = random_outputs({"a": (3,), "b": (2, 4, 4)})
        halved = outputs.map(lambda x: x / 2)
        assert list(halved.features) == ["a", "b"]
        assert torch.equal(halved.logits * 2, outputs.logits) and torch.equal(halved.features["b"] * 2, outputs.features["b"])

    def test_detach_gives_constants_that_share_memory(self):
        outputs = random_outputs({"a": (3,)}).map(lambda x: x.requires_grad_())
        constant = outputs.detach()
        assert not constant.logits.requires_grad and not constant.features["a"].requires_grad
        assert constant.logits.data_ptr() == outputs.logits.data_ptr()

    def test_features_may_be_left_out(self):
        assert kdkit.Outputs(torch.zeros(1, 2)).features == {}


class TestFeatureOptions:
    def test_pairs_come_in_the_order_of_the_layers(self):
        options = kdkit.FeatureOptions(layers=[{"student": "b", "teacher": "c"}, {"student": "a", "teacher": "c"}])
        student, teacher = random_outputs({"a": (3,), "b": (2,)}), random_outputs({"c": (5,)}, seed=1)
        assert [(s.shape[1], t.shape[1]) for s, t in options.pairs(student, teacher)] == [(2, 5), (3, 5)]

    def test_taps_of_loss_options_are_their_layers(self):
        options = kdkit.FeatureOptions(layers=[{"student": "b", "teacher": "c"}])
        assert [(pair.student, pair.teacher) for pair in options.taps()] == [("b", "c")]
        assert kdkit.LossOptions().taps() == ()

    @pytest.mark.parametrize("layers", [[], [{"student": "a"}], [{"student": "a", "teacher": "b", "weight": 1}]])
    def test_refuses(self, layers):
        with pytest.raises(ValidationError):
            kdkit.FeatureOptions(layers=layers)


class TestLoss:
    def test_needs_a_forward(self):
        with pytest.raises(TypeError, match="forward"):
            kdkit.Loss(kdkit.LossOptions())

    def test_keeps_its_options_and_needs_no_setup(self):
        class Nothing(kdkit.Loss):
            def forward(self, student, teacher, batch):
                return 0 * student.logits.sum()

        loss = Nothing(kdkit.LossOptions())
        loss.setup(random_outputs(), random_outputs())
        assert loss.options == kdkit.LossOptions() and not list(loss.parameters()) and not loss.needs_teacher_logits


class TestStage:
    def test_stage_uses_all_losses_and_epochs_by_default(self):
        stage = kdkit.Stage("train", [], lambda batch: [])
        assert (stage.data, stage.training) == (kdkit.StageData(1, None), kdkit.StageTraining(None, None, None, None))
        assert (list(stage.buffers), stage.after_step(), stage.after_epoch(kdkit.Moment(1, 3))) == ([], None, None)

    def test_keywords_of_its_own_fill_the_records(self):
        data = {"views": 2, "arrange": kdkit.by_class(2)}
        train = {"losses": [], "epochs": 3, "lr": 0.1, "train": ["student"]}
        stage = kdkit.Stage("train", [], lambda batch: [], **data, **train)
        assert (stage.data, stage.training) == (kdkit.StageData(**data), kdkit.StageTraining(**train))
        stage = kdkit.Stage("train", [], lambda batch: [], training=kdkit.StageTraining(epochs=3), lr=0.1)
        assert stage.training == kdkit.StageTraining(epochs=3, lr=0.1)

    def test_does_not_change_but_has_changed_copies(self):
        stage = kdkit.Stage("train", [], lambda batch, moment: [batch, moment], epochs=3)
        with pytest.raises(dataclasses.FrozenInstanceError):
            stage.name = "other"
        other = dataclasses.replace(stage, name="other", data=kdkit.StageData(2))
        assert (other.name, other.data.views, other.training.epochs) == ("other", 2, 3)
        assert other.step(0, kdkit.Moment(1, 3)) == [0, kdkit.Moment(1, 3)]

    def test_a_schedule_needs_stages(self):
        with pytest.raises(TypeError, match="stages"):
            kdkit.Schedule(kdkit.ScheduleOptions())


class Hooks:
    """Hooks of every kind, which say what they were given."""

    def __call__(self, batch, moment):
        return batch, moment

    def plain(self, batch):
        return batch

    def told(self, batch, moment):
        return batch, moment

    @staticmethod
    def beside(scale, batch, moment):
        return batch, moment


def keyword_only(batch, *, moment):
    return batch, moment


def after_another(batch, scale=2, moment=None):
    return batch, moment


def with_default(batch, scale=2):
    assert scale == 2
    return batch


@functools.wraps(Hooks.beside)
def wrapped(*args):
    return Hooks.beside(*args)


class TestMoment:
    NOW = kdkit.Moment(epoch=2, step=7)

    @pytest.mark.parametrize(
        "step",
        [
            Hooks(),
            Hooks().told,
            functools.partial(Hooks.beside, 2),
            functools.partial(wrapped, 2),
            lambda batch, moment: (batch, moment),
            lambda batch, now: (batch, now),
            keyword_only,
            after_another,
        ],
    )
    def test_a_step_that_asks_is_told(self, step):
        stage = kdkit.Stage("train", [], step)
        assert stage.step("batch", self.NOW) == ("batch", self.NOW)
        assert stage.step("batch") == ("batch", kdkit.Moment(0, 0))

    @pytest.mark.parametrize(
        "step",
        [Hooks().plain, functools.partial(Hooks.plain, 2), lambda batch: batch, lambda *args, **options: args[-1], with_default, str],
    )
    def test_a_step_that_does_not_ask_is_not_told(self, step):
        stage = kdkit.Stage("train", [], step)
        assert stage.step("batch", self.NOW) == stage.step("batch") == "batch"

    @pytest.mark.parametrize("name", ["after_step", "after_epoch"])
    def test_hooks_are_told_if_they_ask(self, name):
        seen = []
        asking = [seen.append, lambda moment: seen.append(moment), lambda *, moment=None: seen.append(moment)]
        for hook in asking:
            getattr(kdkit.Stage("train", [], lambda batch: [], **{name: hook}), name)(self.NOW)
        assert seen == [self.NOW] * 3
        for hook in (seen.clear, lambda: None, lambda count=1: seen.extend([count]), torch.zeros(()).zero_):
            getattr(kdkit.Stage("train", [], lambda batch: [], **{name: hook}), name)(self.NOW)
        assert seen == [1]


class TestTeach:
    @staticmethod
    def model(weight):
        return lambda inputs: kdkit.Outputs(inputs.flatten(1) @ weight)

    def test_teach_gives_gradients_to_the_student_alone(self):
        weights = [torch.randn(192, 5, requires_grad=True) for _ in range(3)]
        student, *teachers = map(self.model, weights)
        (lesson,) = kdkit.teach(student, by=teachers)(random_batch())
        assert lesson.student.logits.requires_grad and len(lesson.teachers) == 2
        assert not any(teacher.logits.requires_grad for teacher in lesson.teachers)
        torch.testing.assert_close(lesson.teachers[1].logits, random_batch().inputs.flatten(1) @ weights[2].detach())

    def test_teach_without_teachers_gives_the_student_alone(self):
        (lesson,) = kdkit.teach(self.model(torch.eye(192)))(random_batch())
        assert list(lesson.teachers) == []

    def test_gradients_are_recorded_again_after_the_teachers(self):
        kdkit.teach(self.model(torch.eye(192)), by=[self.model(torch.eye(192))])(random_batch())
        assert torch.is_grad_enabled()


class TestViews:
    def test_images_turn_by_quarters_angle_by_angle(self):
        images = torch.rand(2, 3, 4, 4)
        turned = kdkit.turned(kdkit.Batch(images, torch.zeros(2), torch.zeros(2)))
        assert turned.shape == (6, 3, 4, 4)
        for i, quarters in enumerate((1, 2, 3)):
            for j in range(2):
                assert torch.equal(turned[2 * i + j], images[j].rot90(quarters, (1, 2)))

    def test_a_model_answers_images_and_views_in_one_forward(self):
        calls = []

        def model(images):
            calls.append(images)
            return kdkit.Outputs(images.flatten(1), {"a": images})

        images = torch.rand(2, 3, 4, 4)
        answer = kdkit.see(model, images, {"turned": images.flip(2).repeat(3, 1, 1, 1), "dark": images / 2})
        (shown,) = calls
        assert shown.shape == (10, 3, 4, 4)
        assert torch.equal(answer.features["a"], images) and torch.equal(answer.logits, images.flatten(1))
        assert torch.equal(answer.views["turned"].features["a"], images.flip(2).repeat(3, 1, 1, 1))
        assert torch.equal(answer.views["dark"].features["a"], images / 2)

    def test_views_are_mapped_too(self):
        answer = kdkit.Outputs(torch.ones(1, 2), views={"dark": kdkit.Outputs(torch.ones(1, 2))})
        assert answer.map(lambda x: 3 * x).views["dark"].logits.tolist() == [[3, 3]]

    def test_teachers_answer_views_as_constants(self):
        weight = torch.ones((), requires_grad=True)

        def model(images):
            return kdkit.Outputs(weight * images.flatten(1))

        (lesson,) = kdkit.teach(model, [model], {"turned": kdkit.turned})(kdkit.testing.random_batch(2))
        assert lesson.student.views["turned"].logits.requires_grad
        assert not lesson.teachers[0].views["turned"].logits.requires_grad
