"""Function-consistent features (FCFD): the student's features must do in the teacher's later layers
what the teacher's do there, and the teacher's in the student's.

Liu, Kan, Shan, Chen, "Function-Consistent Feature Distillation", ICLR 2023,
https://openreview.net/forum?id=pgHNOcxEdRI, section 3. The released code draws two of the mixed
paths for each batch; here all are computed, and each counts as often as it would be drawn. There
the teacher's batch normalisations use the batch's statistics on mixed paths, and keep some for each
path; here the teacher stays as it is, and the student's keep none. Beside it, that code has a
cross-entropy and `logit_kl`, each of weight 1; on CIFAR-100 `features` rises to 5 over 20 epochs
(ResNet56 to ResNet20: to 0.02), `mixed` is 1 (WRN: 0.2) and T is 4 (ShuffleNets: 8):

    - {use: fcfd, features: {from: 0.25, to: 5, epochs: 19}, layers: [{student: stage1, teacher:
      stage1}, {student: stage2, teacher: stage2}, {student: stage3, teacher: stage3}]}
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class FunctionConsistent(kdkit.Loss):
    """Squared errors of the teacher's maps, guessed from the student's and by mixed paths, and
    divergence of the mixed paths' predictions.

    Formula: features * sum over layers k of [d_k(b_k(f_s,k)) + share * sum over i < k of d_k(x_ik)]
    + mixed * share * sum over mixed paths of T^2 * KL(softmax(z_t / T) || softmax(z / T)), mean
    over the batch, in nats

    b_k is a learnt bridge to the teacher's map f_t,k: a 3x3 convolution (of stride 2 from twice the
    size, 4x4 transposed from half of it, else resized), batch normalisation and, with `rectified`,
    a leaky ReLU. x_ik is the teacher's layer k on top of b_i(f_s,i), and z the logits of such a
    path, or of one from the teacher's layer i by another bridge into the student's layers behind.
    d_k(x) = mean of (x - f_t,k)^2 over all elements; at the last layer also that of the positions'
    means of ReLU(x) and ReLU(f_t,k). share = `paths` / number of mixed paths, at most 1. Gradients
    pass through the frozen teacher. `layers`: two pairs or more, from shallow to deep, of maps (B,
    C, H, W). The student's own divergence from the teacher is not in it.
    """

    name = "fcfd"
    knowledge = "feature"
    needs_teacher_logits = True
    # mixed paths run through both
    needs_networks = True

    class Options(kdkit.MapOptions):
        features: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the squared errors."
        )
        mixed: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the mixed paths' divergences."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens both predictions."
        )
        direction: Literal["both", "to_teacher", "to_student"] = Field(
            default="both",
            description="Where mixed paths end: in the teacher, in the student, or some in each.",
        )
        paths: int = Field(
            default=2, ge=1, le=64, description="How many of the mixed paths count, on average."
        )
        rectified: bool = Field(
            default=True, description="The layers stand behind a ReLU: so do bridges, a leaky one."
        )

    options: Options
    bridges: nn.ModuleList
    back: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        if context is None:
            raise kdkit.ShapeError(
                "it runs both networks from a layer on: give `setup` a context with the networks"
            )
        pairs = self._maps(student, teacher)
        if len(pairs) < 2:
            raise kdkit.ShapeError("mixed paths pass from one layer to the next: name two or more")
        if student.logits.shape != teacher.logits.shape:
            raise kdkit.ShapeError(
                f"student logits {tuple(student.logits.shape)} and teacher logits"
                f" {tuple(teacher.logits.shape)} must be over the same K classes; train both on one"
                " class set"
            )
        ends = range(len(pairs) - 1)
        direction, rectified = self.options.direction, self.options.rectified
        self.bridges = nn.ModuleList(bridge(f_s, f_t, rectified) for f_s, f_t in pairs)
        self.back = nn.ModuleList(
            bridge(f_t, f_s, rectified) for f_s, f_t in pairs[:-1] if direction != "to_teacher"
        )
        ours, theirs = ([getattr(p, side) for p in self.options.layers] for side in SIDES)
        # functions of the networks, which are no parts of the loss
        self.in_teacher = [
            context.teacher_rest(theirs[k], theirs[k + 1 :])
            for k in ends
            if direction != "to_student"
        ]
        self.in_student = [context.student_rest(ours[k]) for k in ends if len(self.back)]

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, pairs = self.options, self._maps(student, teacher)
        targets = [f_t for _, f_t in pairs]
        guesses = [build(f_s, f_t) for build, (f_s, f_t) in zip(self.bridges, pairs, strict=True)]
        distance = torch.stack([*self._errors(guesses, targets)]).sum()
        errors, logits = self._paths_in_teacher(guesses, targets)
        logits += self._paths_in_student(pairs)
        share = min(o.paths / len(logits), 1.0)
        mixed = sum(errors, start=0 * distance)
        divergence = torch.stack([self._divergence(z, teacher.logits) for z in logits]).sum()
        value: Tensor = o.features * (distance + share * mixed) + o.mixed * share * divergence
        return value

    def _paths_in_teacher(
        self, guesses: list[Tensor], targets: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Errors and logits of the mixed paths that end in the teacher."""
        errors: list[Tensor] = []
        logits: list[Tensor] = []
        for k, run in enumerate(self.in_teacher):
            answer = run(guesses[k])
            maps = [answer.features[pair.teacher] for pair in self.options.layers[k + 1 :]]
            errors += self._errors(maps, targets[k + 1 :])
            logits.append(answer.logits)
        return errors, logits

    def _paths_in_student(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Logits of the mixed paths that end in the student."""
        # not strict: nothing comes behind the last pair
        ways = zip(self.back, self.in_student, pairs, strict=False)
        return [run(build(f_t, f_s)).logits for build, run, (f_s, f_t) in ways]

    def _maps(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> list[tuple[Tensor, Tensor]]:
        """The pairs of maps.

        Raises:
            ShapeError: a layer gives something else, such as tokens, of which a map is only a part.
        """
        maps = list(self.options.pairs(student, teacher))
        for pair in self.options.layers:
            f_s, f_t = student.features[pair.student], teacher.features[pair.teacher]
            if f_s.ndim != 4 or f_t.ndim != 4:
                raise kdkit.ShapeError(
                    f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                    f" {tuple(f_t.shape)} must be maps (B, C, H, W), which pass from one network to"
                    " the other; name stages of convolutional networks"
                )
        return maps

    def _errors(self, guesses: list[Tensor], targets: list[Tensor]) -> Iterator[Tensor]:
        """Yield the squared error of each map, and that of the means of the last."""
        for guess, target in zip(guesses, targets, strict=True):
            yield F.mse_loss(guess, target)
        guess, target = (f[-1].relu().mean((2, 3)) for f in (guesses, targets))
        yield F.mse_loss(guess, target)

    def _divergence(self, z: Tensor, z_t: Tensor) -> Tensor:
        t = self.options.temperature
        log_p, log_q = F.log_softmax(z / t, dim=1), F.log_softmax(z_t / t, dim=1)
        return t**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


SIDES = ("student", "teacher")


class Bridge(nn.Module):
    """From maps of one network to those of the other, in channels and size."""

    def __init__(self, convolution: nn.Module, channels: int, rectified: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution, kdkit.AnyBatchNorm(channels))
        if rectified:
            self.layers.append(nn.LeakyReLU(0.1))

    def forward(self, f: Tensor, like: Tensor) -> Tensor:
        return kdkit.resized(self.layers(f), like.shape[2:])


def bridge(f: Tensor, wanted: Tensor, rectified: bool) -> Bridge:
    """Make a bridge between maps of these shapes."""
    channels = (f.shape[1], wanted.shape[1])
    sizes = list(zip(f.shape[2:], wanted.shape[2:], strict=True))
    # without bias, which batch normalisation would take away
    convolution: nn.Conv2d | nn.ConvTranspose2d
    if all(2 * own == other for own, other in sizes):
        convolution = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, bias=False)
    else:
        stride = 2 if all((own + 1) // 2 == other and own > 1 for own, other in sizes) else 1
        convolution = nn.Conv2d(*channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return Bridge(convolution, channels[1], rectified)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [FunctionConsistent]
