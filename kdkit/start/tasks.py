"""What new recipes and studies of a task begin with; one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGE = "{student: $student_stage, teacher: $teacher_stage}"
PENULTIMATE = "{student: penultimate, teacher: penultimate}"
LOGITS = "{student: logits, teacher: logits}"
PYRAMID = "{student: backbone.fpn.layer_blocks.*, teacher: backbone.fpn.layer_blocks.*}"
CROPS = "  timm_augment: {scale: [0.3, 1.0], flip: 0.5, color_jitter: 0.3}"
TOGETHER = "  joint_augment: {scale: [0.7, 1.4], flip: 0.5, color_jitter: 0.2}"
RKD = (
    f"{{use: rkd_distance, weight: 25, layers: [{PENULTIMATE}]}},"
    f" {{use: rkd_angle, weight: 50, layers: [{PENULTIMATE}]}}"
)


@dataclass(frozen=True)
class Beginning:
    """The defaults of a task.

    Attributes:
        label_loss: the loss on labels, as a recipe says it.
        losses: by kind of knowledge, the losses of a study's variant; `$student_stage` stands for
            the last stage of that network.
        network: the section of a network; `$backbone` is what the user names.
        size: `data.image_size`.
        batch: `data.batch_size`.
        augmentation: a line of the `data` section.
        layers: for a loss that compares layers, the pair it begins with.
        teacher, student: names of networks.
        epochs: of the student and of its teacher.
        lr: AdamW's learning rate.
    """

    label_loss: str
    losses: Mapping[str, str]
    network: str = "{model: $backbone, pretrained: $pretrained}"
    size: str = "224"
    batch: int = 32
    augmentation: str = CROPS
    layers: str = STAGE
    teacher: str = "resnet50"
    student: str = "mobilenetv3_small_100"
    epochs: int = 30
    lr: str = "0.001"


TASKS: Mapping[str, Beginning] = {
    "classification": Beginning(
        "{use: cross_entropy}",
        {
            "response": "{use: logit_kl, temperature: 4}",
            "feature": f"{{use: hint, layers: [{STAGE}]}}",
            "relation": RKD,
        },
    ),
    "multilabel": Beginning(
        "{use: bce}",
        {
            "response": "{use: mld}",
            "feature": f"{{use: hint, layers: [{STAGE}]}}",
            "relation": RKD,
        },
    ),
    "regression": Beginning(
        "{use: smooth_l1, beta: 0.1}",
        {
            "response": "{use: attentive_imitation}",
            "feature": f"{{use: hint, layers: [{STAGE}]}}",
            "relation": RKD,
        },
        # only colours: crops and flips would move what the numbers may mean
        augmentation=("  timm_augment: {scale: [1, 1], ratio: [1, 1], flip: 0, color_jitter: 0.3}"),
    ),
    "segmentation": Beginning(
        "{use: cross_entropy}",
        {
            "response": "{use: logit_kl, temperature: 1}",
            "feature": f"{{use: cwd, weight: 3, layers: [{LOGITS}]}}",
            "relation": f"{{use: skd_pairwise, layers: [{STAGE}]}}",
        },
        network="{model: smp/deeplabv3plus, encoder: $backbone, pretrained: $pretrained}",
        size="[256, 384]",
        batch=8,
        augmentation=TOGETHER,
    ),
    "detection": Beginning(
        "{use: detector}",
        {
            "response": "{use: pseudo_labels}",
            "feature": f"{{use: hint, layers: [{PYRAMID}]}}",
            "relation": f"{{use: skd_pairwise, layers: [{PYRAMID}]}}",
        },
        network="{model: detector/fcos, backbone: $backbone, width: 128, pretrained: $pretrained}",
        size="[480, 640]",
        batch=8,
        augmentation=TOGETHER,
        layers=PYRAMID,
    ),
    "text_classification": Beginning(
        "{use: cross_entropy}",
        {
            "response": "{use: logit_kl, temperature: 2}",
            "feature": f"{{use: hint, layers: [{STAGE}]}}",
            "relation": RKD,
        },
        network="{model: $backbone, pretrained: $pretrained}",
        size="",
        augmentation="",
        teacher="hf/bert-base-uncased",
        student="hf/distilbert-base-uncased",
        epochs=4,
        lr="5e-5",
    ),
}
"""By the task's name."""

TASK = "classification"
TEXTS = "text_classification"
