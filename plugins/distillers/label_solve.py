"""Label solve: images of the dataset whose labels are learnt, in closed form.

Nguyen, Chen, Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021,
arXiv:2011.00050, section 3.1; after Bohdal, Yang, Hospedales, "Flexible Dataset Distillation: Learn
Labels Instead of Images", 2020, arXiv:2006.08572, who learn them by steps. With s the chosen
images, t all training images and A = K_ts (K_ss + r mean(diag K_ss) I)^-1, whose prediction is
A y_s, the labels are the least-squares solution of A y_s = y_t with its own ridge:

    y_s = (A^T A + r mean(diag A^T A) I)^-1 A^T y_t
"""

import torch
from pydantic import Field

import kdkit

from ._kernels import ROWS, KernelOptions, Standardised, accuracy, factor, ntk, one_hot
from ._random import chosen


class LabelSolve(kdkit.DataDistiller):
    """Random images of each class, whose labels (M, K) are solved for: a kernel regression from
    them predicts the labels of all training images best.
    """

    name = "label_solve"

    class Options(KernelOptions):
        targets: int | None = Field(
            default=None,
            gt=0,
            description="Number of training images whose labels are predicted (default: all).",
        )

    options: Options

    def distill(self, material: kdkit.Material) -> kdkit.DistilledData:
        options, classes = self.options, material.classes
        first = chosen(material, options.images_per_class)
        seen, kernel = Standardised(material.images), ntk(options.layers)
        support = seen.rows(first.images)
        root = factor(kernel(support, support), options.regularization)
        count = options.targets or len(material.labels)
        order = torch.randperm(len(material.labels), device=material.device)[:count]
        square = support.new_zeros(len(support), len(support))
        product = support.new_zeros(len(support), classes)
        # sums over the training images, a part at a time: K_ts of all would not fit
        parts = torch.split(order, ROWS)
        for number, places in enumerate(parts, 1):
            k = kernel(seen.rows(material.images[places]), support)
            a = torch.cholesky_solve(k.T, root).T
            square += a.T @ a
            product += a.T @ one_hot(material.labels[places], classes)
            material.tell(number, len(parts), f"parts of {ROWS:,} training images")
        labels = torch.cholesky_solve(product, factor(square, options.regularization))
        test = seen.rows(material.test_images), material.test_labels
        ridge, plain = options.regularization, one_hot(first.labels, classes)
        return kdkit.DistilledData(
            first.images,
            labels + 1 / classes,
            {
                "kernel regression, test %": accuracy(kernel, support, labels, ridge, *test),
                "with the images' own labels, test %": accuracy(
                    kernel, support, plain, ridge, *test
                ),
            },
        )


@kdkit.hookimpl
def kdkit_distillers() -> list[type[kdkit.DataDistiller]]:
    return [LabelSolve]
