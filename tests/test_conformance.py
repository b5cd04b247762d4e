"""Every registered loss keeps every promise, and every check of the suite catches a loss that breaks its own."""

import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from loss_examples import ON_DETECTORS, OPTIONS
from pydantic import Field
from torch import nn

import kdkit
from kdkit import testing
from kdkit.recipe import registry
from kdkit.testing import LOSS_CHECKS, assert_agrees, check_loss, random_batch, random_outputs

LOSSES = registry.load().losses


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ON_DETECTORS])
def test_every_loss_keeps_every_promise(name):
    cls = LOSSES[name]
    report = check_loss(cls, **OPTIONS.get(name, {}))
    assert len(report.kept) + len(cls.exceptions) == len(LOSS_CHECKS)


EXCEPTIONS = [(name, check) for name, cls in LOSSES.items() for check in cls.exceptions]


@pytest.mark.parametrize(("name", "check"), EXCEPTIONS, ids="-".join)
def test_an_exception_is_declared_only_where_it_is_needed(name, check):
    with pytest.raises(AssertionError):
        getattr(testing, check).__wrapped__(LOSSES[name], **OPTIONS.get(name, {}))


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
        pairs = list(self.options.pairs(student, teacher))
        if len(pairs) > 1:
            raise kdkit.ShapeError(f"good: compares one pair of layers, not {len(pairs)}")
        for f_s, f_t in pairs:
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


class Kind(kdkit.Loss):
    """Divergence of the two predictions.

    Formula: KL(softmax(z_t / T) || softmax(z_s / T)) * scale, mean over the batch
    """

    name = "kind"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        temperature: float = Field(default=2.0, gt=0, description="T.")
        scale: float = Field(default=1.0, ge=0, description="Multiplies the value.")

    def logits(self, outputs):
        return outputs.logits / self.options.temperature

    def forward(self, student, teacher, batch):
        log_p, log_q = self.logits(student).log_softmax(1), self.logits(teacher).log_softmax(1)
        return self.options.scale * self.reduce(F.kl_div(log_p, log_q, reduction="none", log_target=True))

    def reduce(self, terms):
        return terms.sum(1).mean()


def kl(loss, student, teacher, batch):
    """The formula of `Kind`, term by term."""
    t, total = loss.options.temperature, 0
    for z_s, z_t in zip(student.logits / t, teacher.logits / t, strict=True):
        p, q = z_s.exp() / z_s.exp().sum(), z_t.exp() / z_t.exp().sum()
        total = total + (q * (q.log() - p.log())).sum()
    return loss.options.scale * total / len(student.logits)


def test_a_report_says_what_the_checks_do_not_cover(capsys):
    report = check_loss(Kind)
    assert report.not_verified == (testing.FORMULA,) and len(report.kept) == len(LOSS_CHECKS)
    assert str(report).splitlines()[0] == f"kind: {len(LOSS_CHECKS)} checks passed" and str(report) in capsys.readouterr().out
    assert check_loss(Kind, reference=kl, temperature=3.0).not_verified == ()


class SumOverTheBatch(Kind):
    """Formula: KL, mean over the batch."""

    def reduce(self, terms):
        return terms.sum()


class MeanOverAll(Kind):
    """Formula: KL(softmax(z_t) || softmax(z_s)), mean over the batch."""

    def reduce(self, terms):
        return terms.mean()


class PerClass(Kind):
    """Formula: KL(softmax(z_t) || softmax(z_s)), mean over the batch: of each class the mean over samples, and of those a mean."""

    def reduce(self, terms):
        return terms.mean(0).mean()


class SumOfMaps(Good):
    """Formula: (adapter(f_s) - f_t)^2, mean over the batch."""

    def setup(self, student, teacher, context=None):
        for f_s, f_t in self.options.pairs(student, teacher):
            if f_s.shape != f_t.shape or f_s.ndim != 4:
                raise kdkit.ShapeError("sum_of_maps: no maps of one shape")

    def forward(self, student, teacher, batch):
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        return self.options.scale * (f_s - f_t).square().sum() / len(f_s)


class SumOfRelations(Good):
    """Compares how samples relate, and adds over all pairs of them."""

    knowledge = "relation"
    Options = kdkit.RelationOptions

    def setup(self, student, teacher, context=None):
        self.options.check(student, teacher)

    def forward(self, student, teacher, batch):
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        return (f_s @ f_s.T - f_t @ f_t.T).square().sum()


class Reversed(Kind):
    """Formula: KL(softmax(z_t / T) || softmax(z_s / T)), mean over the batch."""

    def forward(self, student, teacher, batch):
        log_p, log_q = self.logits(student).log_softmax(1), self.logits(teacher).log_softmax(1)
        return self.options.scale * self.reduce(F.kl_div(log_q, log_p, reduction="none", log_target=True))


class Tempered(Kind):
    """Multiplies by T^2, which its formula does not."""

    def reduce(self, terms):
        return self.options.temperature**2 * super().reduce(terms)


class Idle(Kind):
    """Formula: KL; an option that nothing reads."""

    class Options(Kind.Options):
        margin: float = Field(default=1.0, ge=0, description="Nothing.")


class Boundless(Kind):
    """Formula: KL; T may be 0."""

    class Options(Kind.Options):
        temperature: float = Field(default=2.0, description="T.")


class FirstPairOnly(Good):
    """Compares the first pair of layers alone."""

    def forward(self, student, teacher, batch):
        f_s, f_t = next(iter(self.options.pairs(student, teacher)))
        return self.options.scale * F.mse_loss(self.adapter(f_s), f_t)

    def setup(self, student, teacher, context=None):
        f_s, f_t = next(iter(self.options.pairs(student, teacher)))
        if f_s.ndim != 2 or f_t.ndim != 2:
            raise kdkit.ShapeError("no vectors")
        self.adapter = nn.Linear(f_s.shape[1], f_t.shape[1])


class LayersOfOneSide(Good):
    """Takes the student's layers by the names of the teacher's, which are the same as long as there is one default pair."""

    Options = kdkit.FeatureOptions

    def setup(self, student, teacher, context=None):
        for pair in self.options.layers:
            if student.features[pair.teacher].shape != teacher.features[pair.teacher].shape:
                raise kdkit.ShapeError("not alike")

    def forward(self, student, teacher, batch):
        return sum(F.mse_loss(student.features[pair.teacher], teacher.features[pair.teacher]) for pair in self.options.layers)


class IgnoresATeacherLayer(Good):
    """Compares every student layer with the first one of the teacher."""

    def setup(self, student, teacher, context=None):
        pairs = list(self.options.pairs(student, teacher))
        if pairs[0][0].ndim != 2:
            raise kdkit.ShapeError("no vectors")
        self.adapters = nn.ModuleList(nn.Linear(f_s.shape[1], f_t.shape[1]) for f_s, f_t in pairs)

    def forward(self, student, teacher, batch):
        pairs = list(self.options.pairs(student, teacher))
        errors = [F.mse_loss(adapter(f_s), pairs[0][1]) for adapter, (f_s, _) in zip(self.adapters, pairs, strict=True)]
        return self.options.scale * sum(errors)


class IgnoresTheTeacher(Kind):
    """Formula: sum of squares of the student's logits, mean over the batch and the classes."""

    def forward(self, student, teacher, batch):
        return self.options.scale * self.logits(student).square().mean()


class WritesIndex(Kind):
    """Formula: KL; counts the samples on."""

    def forward(self, student, teacher, batch):
        batch.index.add_(1)
        return super().forward(student, teacher, batch)


class AddsAFeature(Kind):
    """Formula: KL; keeps something where the next loss will find it."""

    def forward(self, student, teacher, batch):
        student.features["mine"] = student.logits
        return super().forward(student, teacher, batch)


class DrawsAndCounts(Good):
    """Weighs the samples by their place, behind a dropout."""

    def guess(self, f_s):
        return self.adapter(f_s) * torch.linspace(1, 2, len(f_s))[:, None] * (torch.rand(len(f_s), 1) > 0.3)


class Doubling(Kind):
    """Formula: KL; computed in fp64."""

    def logits(self, outputs):
        return super().logits(outputs).double().log_softmax(1)

    def reduce(self, terms):
        return super().reduce(terms).float()


class TopFive(Kind):
    """Formula: KL; over the five largest classes."""

    def logits(self, outputs):
        return super().logits(outputs).topk(5, 1).values


class KeepsTheGraph(Good):
    """Compares with what the step before gave, gradient included."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.before = 0.0

    def guess(self, f_s):
        now = self.adapter(f_s)
        before, self.before = self.before, now.mean()
        return now + 0.1 * before


class OnTheProcessor(Good):
    """Makes a constant without a device."""

    def guess(self, f_s):
        return self.adapter(f_s) * torch.full((len(f_s), 1), 2.0)


class HeldOnTheProcessor(Good):
    """Keeps a constant that does not move with the loss."""

    def setup(self, student, teacher, context=None):
        super().setup(student, teacher, context)
        self.factors = torch.full((self.adapter.out_features,), 2.0)

    def guess(self, f_s):
        return self.adapter(f_s) * self.factors


class Looping(Kind):
    """Formula: KL; sample by sample."""

    def reduce(self, terms):
        return torch.stack([row.sum() for row in terms]).mean()


class HalfDetached(Kind):
    """Formula: KL; half of the classes get no gradient."""

    def logits(self, outputs):
        z = super().logits(outputs)
        return torch.cat([z[:, :2], z[:, 2:].detach()], 1)


class HalfTheGradient(Kind):
    """Formula: KL; half of it detached."""

    def forward(self, student, teacher, batch):
        value = super().forward(student, teacher, batch)
        return (value + value.detach()) / 2


class HalfTheBatch(Kind):
    """Formula: KL; of the first half of the batch."""

    def reduce(self, terms):
        return super().reduce(terms[: (len(terms) + 1) // 2])


class UnknownException(Kind):
    """Formula: KL; is excused from what nobody asks."""

    exceptions = {"check_nothing": "because"}


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
    OnlyIndices: ("check_takes_mixed_labels", "labels as shares: forward raises RuntimeError"),
    Forgetful: ("check_is_restored_from_its_state", "must be a buffer"),
    Uncopyable: ("check_is_a_finite_scalar", "copy.deepcopy fails after setup"),
    AlsoPadding: ("check_ignores_padding", "other numbers in the padding turn the value from"),
    UnknownException: ("check_is_documented", "exceptions: there is no 'check_nothing'"),
    SumOverTheBatch: ("check_averages_over_the_batch", "with each sample twice the value is"),
    SumOfRelations: ("check_averages_over_the_batch", "with each sample twice the value is"),
    MeanOverAll: ("check_says_its_reduction", "twice as many classes the value is 0.50 .* nothing of a mean over them"),
    PerClass: ("check_says_its_reduction", "twice as many classes the value is 0.50 .* nothing of a mean over them"),
    SumOfMaps: ("check_says_its_reduction", "twice as many positions the value is 2.00 .* nothing of a sum"),
    Idle: ("check_every_option_has_an_effect", "option 'margin' changes nothing; tried 2.0"),
    Boundless: ("check_options_are_bounded", "not finite, and `temperature` may be 0: bound it"),
    FirstPairOnly: ("check_reads_every_layer", "no gradient reaches the student's 'c'"),
    LayersOfOneSide: ("check_reads_every_layer", "setup raises KeyError"),
    IgnoresATeacherLayer: ("check_reads_every_layer", "the teacher's 'd' change neither"),
    IgnoresTheTeacher: ("check_reads_every_layer", "the teacher's 'logits' change neither"),
    WritesIndex: ("check_leaves_its_inputs_alone", "writes into its inputs: index"),
    AddsAFeature: ("check_leaves_its_inputs_alone", "writes into its inputs: student's mine"),
    DrawsAndCounts: ("check_ignores_the_order_of_samples", "shuffling the batch turns"),
    Doubling: ("check_stays_in_its_type", "makes fp64 tensors of fp32 ones"),
    TopFive: ("check_takes_two_classes", "forward raises RuntimeError"),
    KeepsTheGraph: ("check_keeps_no_graph", "keeps the graph of a step, in 'before'"),
    OnTheProcessor: ("check_works_on_any_device", "mixes devices"),
    HeldOnTheProcessor: ("check_works_on_any_device", "mixes devices"),
    Looping: ("check_does_not_loop_over_the_batch", "operations for 6 samples, .* for 12"),
    HalfDetached: ("check_teaches_every_part", "no gradient reaches 3 of 5 classes"),
    HalfTheBatch: ("check_teaches_every_part", "no gradient reaches 3 of 6 samples"),
    HalfTheGradient: ("check_the_gradient_is_that_of_the_value", "off by 50% .* detached"),
    ReadsTheTeacher: ("check_is_a_finite_scalar", "forward raises PluginError: .*no teacher to read"),
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_broken_loss_is_caught(cls):
    check, says = BROKEN[cls]
    with pytest.raises(AssertionError, match=says):
        getattr(testing, check)(cls)


@pytest.mark.parametrize("cls", [Undescribed, SumOverTheBatch, OnTheProcessor], ids=lambda cls: cls.__name__)
def test_check_loss_asks_for_every_promise(cls):
    check, says = BROKEN[cls]
    with pytest.raises(AssertionError, match=f"(?m)^{check}: .*{says}"):
        check_loss(cls)


BY_REFERENCE = [Reversed, Tempered, MeanOverAll, PerClass, SumOverTheBatch, HalfTheBatch]


@pytest.mark.parametrize("cls", BY_REFERENCE, ids=lambda cls: cls.__name__)
def test_a_wrong_formula_is_caught_by_a_reference(cls):
    with pytest.raises(AssertionError, match="(?m)^reference: on logits: kind: the value is off by"):
        check_loss(cls, reference=kl)


@pytest.mark.parametrize("cls", [Reversed, Tempered], ids=lambda cls: cls.__name__)
def test_a_report_says_that_only_a_reference_verifies_the_formula(cls):
    assert testing.FORMULA in check_loss(cls).not_verified


def test_a_reference_may_leave_forms_out_but_not_all():
    def refuses(*_):
        raise kdkit.ShapeError("no")

    with pytest.raises(AssertionError, match="refuses every form"):
        check_loss(Kind, reference=refuses)


def test_every_check_has_a_loss_that_fails_it():
    assert {check.__name__ for check in LOSS_CHECKS} == {check for check, _ in BROKEN.values()}


def test_check_loss_has_one_line_for_each_broken_promise():
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
