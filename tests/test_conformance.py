"""Every registered loss keeps every promise, and every check of the suite catches a loss that breaks its own."""

import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from loss_examples import OPTIONS
from pydantic import Field
from torch import nn

import kdkit
from kdkit import registry, testing
from kdkit.testing import LOSS_CHECKS, assert_agrees, check_loss, random_batch, random_outputs

LOSSES = registry.load().losses


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_every_promise(name, check):
    check(LOSSES[name], **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_says_its_formula_and_source(name):
    cls = LOSSES[name]
    assert re.search(r"^Formula: \S", inspect.getdoc(cls), re.MULTILINE)
    source = r'[^"]*"[^"]+"[^"]*(arXiv:\d{4}\.\d{4,5}|doi:10\.\d{4,}/\w|https://\w)'  # of the first paper, not of a later one
    _, _, paper = inspect.getdoc(inspect.getmodule(cls)).partition("\n\n")
    assert re.match(source, " ".join(paper.split()))


class Good(kdkit.Loss):
    """Distance of a linear map of the student's vectors to the teacher's, with an average that it remembers."""

    name = "good"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        scale: float = Field(default=1.0, description="Multiplies the value.")

    def setup(self, student, teacher, context=None):
        for f_s, f_t in self.options.pairs(student, teacher):
            if f_s.ndim != 2 or f_t.ndim != 2:
                raise kdkit.ShapeError(f"good: {tuple(f_s.shape)} and {tuple(f_t.shape)} must be vectors")
            self.adapter = nn.Linear(f_s.shape[1], f_t.shape[1])
            self.register_buffer("average", torch.zeros(f_t.shape[1]))

    def guess(self, f_s):
        return self.adapter(f_s)

    def forward(self, student, teacher, batch):
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        value = self.options.scale * F.mse_loss(self.guess(f_s), f_t - self.average)
        self.average = 0.9 * self.average + 0.1 * f_t.mean(0)
        return value


def test_a_good_loss_passes():
    check_loss(Good, scale=2.0)


class Undescribed(Good):
    """An option lacks its description."""

    class Options(Good.Options):
        margin: float = 1.0


class Crashing(Good):
    """Compares without a look at the shapes."""

    def setup(self, student, teacher, context=None):
        for f_s, f_t in [(student.features["a"], teacher.features["a"])]:
            self.adapter = nn.Linear(f_s.shape[1], f_t.shape[1])
            self.register_buffer("average", torch.zeros(f_t.shape[1]))

    def forward(self, student, teacher, batch):
        return F.mse_loss(self.guess(student.features["a"]), teacher.features["a"] - self.average)


class Careless(Good):
    """Lets setup itself fail."""

    def setup(self, student, teacher, context=None):
        for f_s, f_t in [(student.features["a"], teacher.features["a"])]:
            self.adapter = nn.Linear(f_s.shape[1], f_t.shape[1])
            self.register_buffer("average", torch.zeros(f_t.shape[1]))

    def forward(self, student, teacher, batch):
        return student.features["a"].mean() - teacher.features["a"].mean()


class Silent(Good):
    """Refuses without a word."""

    def setup(self, student, teacher, context=None):
        try:
            super().setup(student, teacher, context)
        except kdkit.ShapeError:
            raise kdkit.ShapeError from None


class PerSample(Good):
    """Forgets to reduce."""

    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch) * torch.ones(len(batch.labels))


class InDouble(Good):
    """Changes the type."""

    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch).double()


class Detached(Good):
    """Cuts the student off."""

    def guess(self, f_s):
        return self.adapter(f_s.detach())


class Graphless(Good):
    """Computes without a gradient at all."""

    @torch.no_grad()
    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch)


class Swapped(kdkit.Loss):
    """Takes the teacher for the student."""

    name = "swapped"
    knowledge = "response"

    def forward(self, student, teacher, batch):
        return F.mse_loss(teacher.logits, student.logits.detach()) + 0 * student.logits.sum()


class InAList(Good):
    """Keeps its adapter where torch does not see it."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.hidden = [nn.Linear(self.adapter.out_features, self.adapter.out_features)]

    def guess(self, f_s):
        return self.hidden[0](self.adapter(f_s))


class Unused(Good):
    """Has a part that nothing depends on."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.spare = nn.Linear(2, 2)


class HoldsTheTeacher(Good):
    """Makes the teacher's network its own."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.teacher = context.teacher


class TeachesTheTeacher(Good):
    """Switches the teacher's gradient on."""

    def forward(self, student, teacher, batch):
        return super().forward(student, teacher.map(lambda x: x.requires_grad_()), batch)


class Lazy(Good):
    """Leaves the adapter's size to the first batch."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.adapter = nn.LazyLinear(self.adapter.out_features)


class Late(Good):
    """Builds a part in forward."""

    def guess(self, f_s):
        if "late" not in dict(self.named_modules()):
            torch.manual_seed(0)
            self.late = nn.Linear(self.adapter.out_features, self.adapter.out_features)
        return self.late(self.adapter(f_s))


class Writing(Good):
    """Normalises its input in place."""

    def forward(self, student, teacher, batch):
        for x in teacher.features.values():
            x.sub_(x.mean(0))
        return super().forward(student, teacher, batch)


class Drawing(Good):
    """Draws from a generator of its own."""

    generator = torch.Generator().manual_seed(0)

    def guess(self, f_s):
        return self.adapter(f_s) + torch.randn(len(f_s), 1, generator=Drawing.generator)


class FirstCounts(Good):
    """Weighs the samples by their place."""

    def guess(self, f_s):
        return self.adapter(f_s) * torch.linspace(1, 2, len(f_s))[:, None]


class NanAtOne(Good):
    """Divides by the deviation over the batch."""

    def guess(self, f_s):
        return self.adapter((f_s - f_s.mean(0)) / (f_s - f_s.mean(0)).square().sum().sqrt())


class RaisesAtOne(Good):
    """Cannot take a batch of one."""

    def guess(self, f_s):
        return F.batch_norm(self.adapter(f_s), None, None, training=True)


class Steep(Good):
    """Divides by a norm that is only just kept from 0."""

    def guess(self, f_s):
        return self.adapter(F.normalize(f_s))


class Rounding(Good):
    """Amplifies what rounding changes."""

    def guess(self, f_s):
        return self.adapter(f_s * (f_s * 1e4).detach().cos())


class OnlyIndices(kdkit.Loss):
    """Believes that labels are indices."""

    name = "only_indices"
    knowledge = "response"

    def forward(self, student, teacher, batch):
        return -student.logits.log_softmax(1).gather(1, batch.labels[:, None]).mean()


class Forgetful(Good):
    """Remembers outside its state."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.calls = 0

    def guess(self, f_s):
        self.calls += 1
        return self.adapter(f_s) * self.calls


class Uncopyable(Good):
    """Keeps a tensor of the probe's graph."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.kept = self.adapter(next(iter(student.features.values()))).sum()


class ReadsTheTeacher(kdkit.Loss):
    """Says that it needs labels alone, and reads a teacher."""

    name = "reads_the_teacher"
    knowledge = "labels"

    def forward(self, student, teacher, batch):
        return F.mse_loss(student.logits, teacher.logits)


class Picky(Good):
    """Refuses everything."""

    def setup(self, student, teacher, context=None):
        raise kdkit.ShapeError("nothing is good enough")


class AlsoPadding(Good):
    """Averages over all tokens of a text."""

    def forward(self, student, teacher, batch):
        pair = self.options.layers[0]
        return super().forward(student, teacher, batch) + student.features[pair.student].square().mean()


BROKEN = {
    Undescribed: ("check_is_documented", "option 'margin' lacks"),
    Crashing: ("check_refuses_by_shape_error", "a map and a vector: forward raises RuntimeError: .*; setup must refuse"),
    Careless: ("check_refuses_by_shape_error", "features without a dimension: setup raises IndexError, not kdkit.ShapeError"),
    Silent: ("check_refuses_by_shape_error", "the ShapeError says nothing"),
    Picky: ("check_is_a_finite_scalar", "refuses every form.*nothing is good enough"),
    PerSample: ("check_is_a_finite_scalar", r"must be a scalar, not torch.Size\(\[6\]\)"),
    InDouble: ("check_is_a_finite_scalar", "the value is torch.float64"),
    Graphless: ("check_is_a_finite_scalar", "the value has no gradient"),
    Detached: ("check_teaches_the_student", "no gradient reaches the student's 'a'"),
    Swapped: ("check_teaches_the_student", "no gradient reaches the student's 'logits'"),
    InAList: ("check_adapters_learn", r"a tensor \[\(10,.*\)\] learns but is not among parameters"),
    Unused: ("check_adapters_learn", r"no gradient reaches its parameters \['spare.weight', 'spare.bias'\]"),
    HoldsTheTeacher: ("check_leaves_the_teacher_alone", "submodule"),
    TeachesTheTeacher: ("check_leaves_the_teacher_alone", "gradient of the teacher"),
    Lazy: ("check_is_complete_after_setup", r"\['adapter.weight', 'adapter.bias'\] has no shape"),
    Late: ("check_is_complete_after_setup", r"forward creates \['late.bias', 'late.weight'\]"),
    Writing: ("check_leaves_its_inputs_alone", "writes into its inputs: teacher's a"),
    Drawing: ("check_is_deterministic", "torch's global generator"),
    FirstCounts: ("check_ignores_the_order_of_samples", "shuffling the batch turns"),
    NanAtOne: ("check_takes_a_batch_of_one", "a batch of one: the value is nan"),
    RaisesAtOne: ("check_takes_a_batch_of_one", "a batch of one: forward raises ValueError"),
    Steep: ("check_survives_degenerate_inputs", "a row of zeros: the gradient for the student's 'a' reaches .* above 1e"),
    Rounding: ("check_takes_rounded_inputs", "rounded to bf16: the value is"),
    OnlyIndices: ("check_takes_mixed_labels", r"labels as shares \(B, K\): forward raises RuntimeError"),
    Forgetful: ("check_is_restored_from_its_state", "must be a buffer"),
    Uncopyable: ("check_is_a_finite_scalar", "copy.deepcopy fails after setup"),
    AlsoPadding: ("check_ignores_padding", "other numbers in the padding turn the value from"),
    ReadsTheTeacher: ("check_is_a_finite_scalar", "forward raises PluginError: .*no teacher to read"),
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_broken_loss_is_caught(cls):
    check, says = BROKEN[cls]
    with pytest.raises(AssertionError, match=says):
        getattr(testing, check)(cls)
    with pytest.raises(AssertionError, match=f"(?m)^{check}: .*{says}"):
        check_loss(cls)


def test_every_check_has_a_loss_that_fails_it():
    assert {check.__name__ for check in LOSS_CHECKS} == {check for check, _ in BROKEN.values()}


def test_one_line_says_each_broken_promise():
    with pytest.raises(AssertionError) as caught:
        check_loss(InDouble)
    assert [line.split(":")[:2] for line in str(caught.value).splitlines()] == [["check_is_a_finite_scalar", " good"]]


def vectors(seed):
    return random_outputs({"a": (3,)}, seed=seed)


def mean_of_squares(loss, student, teacher, batch):
    return (((student.features["a"] @ loss.adapter.weight.T + loss.adapter.bias) - teacher.features["a"]) ** 2).mean()


def test_a_second_derivation_agrees():
    loss = Good(Good.Options(layers=[{"student": "a", "teacher": "a"}]))
    loss.setup(vectors(0), vectors(1))
    before = copy.deepcopy(loss.state_dict())
    assert_agrees(loss, mean_of_squares, vectors(0), vectors(1), random_batch())
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        (lambda *answers: mean_of_squares(*answers) * (1 + 1e-5), "the value is off by"),
        (lambda loss, s, t, b: mean_of_squares(loss, s, t, b) + s.logits.sum() - s.logits.sum().detach(), "gradient for logits is off"),
        (
            lambda loss, *a: mean_of_squares(loss, *a) + 1e-3 * (loss.adapter.bias.sum() - loss.adapter.bias.sum().detach()),
            "adapter.bias is off",
        ),
    ],
    ids=["value", "gradient", "adapter"],
)
def test_a_second_derivation_that_differs_is_told(formula, says):
    loss = Good(Good.Options(layers=[{"student": "a", "teacher": "a"}]))
    loss.setup(vectors(0), vectors(1))
    with pytest.raises(AssertionError, match=says):
        assert_agrees(loss, formula, vectors(0), vectors(1), random_batch())
