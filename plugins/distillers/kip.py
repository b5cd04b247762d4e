"""Kernel inducing points: images and labels that a kernel ridge regression learns best from.

Nguyen, Chen, Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021,
arXiv:2011.00050, algorithm 1, with its loss, ridge, standardised images and fully connected kernel
of one hidden layer. With s the learnt images and t a batch of training images, Adam descends

    0.5 mean((K_ts (K_ss + r mean(diag K_ss) I)^-1 y_s - y_t)^2)

Differences: images are kept in the range of pixels after each step, so that they can be stored,
augmented and normalised like any others; the paper's may leave it. The convolutional kernels of
Nguyen et al., NeurIPS 2021, arXiv:2107.13034, which reach more, are not here.
"""

import torch
from pydantic import Field

import kdkit

from ._kernels import KernelOptions, Standardised, accuracy, factor, ntk, one_hot
from ._random import chosen


class KernelInducingPoints(kdkit.DataDistiller):
    """Images, and labels (M, K), that are learnt by descending the error of a kernel regression
    from them to batches of training images.
    """

    name = "kip"

    class Options(KernelOptions):
        steps: int = Field(default=500, ge=1, description="Steps of Adam.")
        lr: float = Field(default=0.04, gt=0, description="Learning rate of Adam.")
        targets: int = Field(
            default=2000, gt=0, description="Training images in a step, as many of each class."
        )
        learn_labels: bool = Field(
            default=True, description="Learn the labels too, not the images alone."
        )

    options: Options

    def distill(self, material: kdkit.Material) -> kdkit.DistilledData:
        options, classes = self.options, material.classes
        first = chosen(material, options.images_per_class)
        seen, kernel = Standardised(material.images), ntk(options.layers)
        support = seen.rows(first.images).requires_grad_()
        labels = one_hot(first.labels, classes).requires_grad_(options.learn_labels)
        learnt = [support, labels] if options.learn_labels else [support]
        optimizer = torch.optim.Adam(learnt, options.lr)
        for step in range(1, options.steps + 1):
            places = material.drawn(max(1, options.targets // classes))
            t, y = seen.rows(material.images[places]), one_hot(material.labels[places], classes)
            root = factor(kernel(support, support), options.regularization)
            guess = kernel(t, support) @ torch.cholesky_solve(labels, root)
            loss = 0.5 * (guess - y).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                support.clamp_(seen.low, seen.high)
            material.tell(step, options.steps, f"loss {loss.item():.5f}")
        images = seen.images(support.detach(), first.images.shape[1:])
        # measured as it is stored, in 256 levels
        stored = seen.rows((images * 255).round())
        test = seen.rows(material.test_images), material.test_labels
        solved, ridge = labels.detach(), options.regularization
        # what is stored sums to 1 in each row
        solved = solved - solved.mean(1, keepdim=True)
        return kdkit.DistilledData(
            images,
            solved + 1 / classes,
            {"kernel regression, test %": accuracy(kernel, stored, solved, ridge, *test)},
        )


@kdkit.hookimpl
def kdkit_distillers() -> list[type[kdkit.DataDistiller]]:
    return [KernelInducingPoints]
