"""Softmax regression: the teacher's own classifier judges the student's features, and must judge
them as it does the teacher's.

Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021,
https://openreview.net/forum?id=ZzwDy_wiWv, section 3: L_FM and L_SR, the latter as a squared error
of logits; both are means over all elements, as in the released code. Vectors are taken as maps of
one position, as in the comparison of Chen et al., "Knowledge Distillation with the Reused Teacher
Classifier", CVPR 2022. The teacher's head is checked, not assumed, to be pooling and a linear
layer.
"""

import torch.nn.functional as F
from torch import Tensor, nn

import kdkit

from ._heads import networks


class SoftmaxRegression(kdkit.Loss):
    """Squared error of the pooled features, and of the logits that the teacher's frozen
    classifier gives for them.

    Formula: mean of (v_s - v_t)^2 + mean of (C(v_s) - z_t)^2, each over all elements, with v = the
    mean over the positions of r(f_s) or f_t

    r is a learnt 1x1 convolution, batch normalisation and ReLU; C is the teacher's classifier and
    z_t the teacher's logits. One pair of layers, the last before the classifiers: maps (B, C, H, W)
    of any sizes, tokens (B, N, D), or vectors ('penultimate').
    """

    name = "srrl"
    knowledge = "feature"
    needs_teacher_logits = True
    # the teacher's classifier judges the student's features
    needs_networks = True
    Options = kdkit.VectorOptions
    options: kdkit.VectorOptions
    connector: nn.Sequential
    classifier: nn.Linear

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        context = networks(self.options, context, "the teacher's classifier")
        ((v_s, v_t),) = self.options.pairs(student, teacher)
        layer = self.options.layers[0].teacher
        self.classifier = kdkit.pooled_head(
            context.teacher_classifier(),
            teacher.features[layer],
            teacher.logits,
            f"teacher '{layer}'",
        )
        positions(student.features[self.options.layers[0].student], student.mask)  # refuses texts
        convolution = nn.Conv2d(v_s.shape[1], v_t.shape[1], 1, bias=False)
        self.connector = nn.Sequential(convolution, kdkit.AnyBatchNorm(v_t.shape[1]), nn.ReLU())

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pair = self.options.layers[0]
        # the mean comes after the connector, whose ReLU acts at each position
        v_s = self.connector(positions(student.features[pair.student], student.mask)).mean((2, 3))
        v_t = kdkit.as_vectors(teacher.features[pair.teacher])
        # the teacher's logits are what the classifier gives for v_t, as `pooled_head` has checked
        return F.mse_loss(v_s, v_t) + F.mse_loss(self.classifier(v_s), teacher.logits)


def positions(f: Tensor, mask: Tensor | None) -> Tensor:
    """Features of any form as channels at positions, (B, C, P, Q); a vector is one position.

    Raises:
        ShapeError: texts, some of whose positions are padding.
    """
    if f.ndim == 3 and mask is not None:
        raise kdkit.ShapeError(
            f"hidden states {tuple(f.shape)} of texts have no positions that all samples have; name"
            " 'penultimate'"
        )
    if f.ndim == 3:
        return f.transpose(1, 2)[..., None]
    return f[:, :, None, None] if f.ndim == 2 else kdkit.as_map(f)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SoftmaxRegression]
