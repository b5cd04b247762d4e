"""MaskedKD: the teacher sees only the patches that the student attends to most.

Son, Ryu, Lee, Lee, "The Role of Masking for Efficient Supervised Knowledge Distillation of Vision
Transformers", ECCV 2024, arXiv:2302.10494, section 3. The student answers first. With q and k of
its last block, heads h and the class token first, the score of patch i is

    a_i = mean_h softmax_j(q_h,cls . k_h,j / sqrt(d))_i

The teacher's class token and the k patches with the largest scores, with their position embeddings,
pass through its blocks; the other patches do not. The paper keeps half of the patches. Its loss is
the recipe's: (1 - a) cross_entropy + a logit_kl.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit

KEPT = "kept"
"""Argument of a teacher's network for the numbers of the patches that it sees, (B, k)."""


class MaskedKD(kdkit.Schedule):
    """One stage: a frozen vision transformer sees the patches that the student attends to most.

    Student and teacher are vision transformers of timm with equally many patches. A step costs a
    forward and a backward of the student and a forward of the teacher, of the patches that are
    kept, an image. Answers depend on the student: they are shared with no other run, and no cache
    keeps them.
    """

    name = "maskedkd"
    scheme = "offline"
    needs_teacher = True

    class Options(kdkit.ScheduleOptions):
        keep: float = Field(
            default=0.5, gt=0, le=1, description="Share of the patches that the teacher sees."
        )
        attention: str = Field(
            default="blocks.11.attn",
            description=(
                "The student's attention layer that ranks the patches: that of its last block (11"
                " in networks of 12 blocks)."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        tap = f"{self.options.attention}.qkv"
        student, teacher = models.student(taps=[tap]), models.teacher()
        ranking: Any = student.module.get_submodule(self.options.attention)
        prefix, masking = prefix_of(student.module, "student"), Masking.of(teacher.module)

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            learning = student(batch.inputs)
            with torch.no_grad():
                scores = scores_of(learning.features[tap].detach(), ranking, prefix)
                count = max(1, round(self.options.keep * scores.shape[1]))
                masking.expected = scores.shape[1]
                taught = masked(teacher, batch.inputs, scores.topk(count, 1).indices)
            return [kdkit.Lesson(learning, [taught.detach()])]

        yield kdkit.Stage("distill", [student], step)


def scores_of(qkv: Tensor, attention: Any, prefix: int) -> Tensor:
    """Attention of the class token to each patch, (B, N), mean over the heads after the softmax.

    Args:
        qkv: output of the layer that makes queries, keys and values, (B, prefix + N, 3D).
        attention: timm's attention layer.
        prefix: number of tokens before the patches, the class token first.
    """
    rows, tokens, _ = qkv.shape
    # in fp32: half precision ranks close scores by chance
    q, k, _ = qkv.float().reshape(rows, tokens, 3, attention.num_heads, -1).unbind(2)
    q, k = attention.q_norm(q[:, 0]), attention.k_norm(k)
    shares: Tensor = (torch.einsum("bhd,bnhd->bhn", q, k) * attention.scale).softmax(2)
    return shares.mean(1)[:, prefix:]


def masked(teacher: Any, images: Any, kept: Tensor) -> kdkit.Outputs:
    """Ask a teacher with `Masking` about some patches of each image."""
    # as arguments, so that a recorded forward finds them in its memory; the numbers first, by which
    # caches tell that these are not the images of the batch
    answer: kdkit.Outputs = teacher({KEPT: kept, "x": teacher.adapt(images)})
    return answer


class Masking:
    """Lets a vision transformer go on with some patches only, where its call says which.

    Attributes:
        expected: number of patches that were ranked (None: not checked).
    """

    # a teacher that several runs share is prepared once
    _prepared: "weakref.WeakKeyDictionary[nn.Module, Masking]" = weakref.WeakKeyDictionary()

    def __init__(self, network: Any) -> None:
        self._prefix = prefix_of(network, "teacher")
        self._kept: Tensor | None = None
        self.expected: int | None = None
        network.register_forward_pre_hook(self._take, with_kwargs=True)
        # after the position embedding, before the first block
        network.patch_drop.register_forward_hook(self._drop)

    @classmethod
    def of(cls, network: nn.Module) -> "Masking":
        """Prepare a teacher's network, which otherwise answers as before.

        Raises:
            RunError: it is no such vision transformer.
        """
        if network not in cls._prepared:
            cls._prepared[network] = cls(network)
        return cls._prepared[network]

    def _take(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._kept = kwargs.pop(KEPT, None)
        return args, kwargs

    def _drop(self, layer: nn.Module, args: Any, tokens: Tensor) -> Tensor | None:
        if self._kept is None:
            return None
        patches = tokens.shape[1] - self._prefix
        if self.expected not in (None, patches):
            raise kdkit.ShapeError(
                f"maskedkd: the student has {self.expected} patches and the teacher {patches}; it"
                " needs equally many of both (`input_size`, another model)"
            )
        first = torch.arange(self._prefix, device=tokens.device).expand(len(tokens), -1)
        places = torch.cat([first, self._kept + self._prefix], 1)
        return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def prefix_of(network: Any, whose: str) -> int:
    """Number of tokens before the patches, the class token first.

    Raises:
        RunError: it is no vision transformer of timm with a class token, or its blocks need the
            places of all patches.
    """
    tokens = getattr(network, "cls_token", None) is not None and hasattr(network, "patch_drop")
    if not tokens or getattr(network, "rope", None) is not None:
        raise kdkit.RunError(
            f"maskedkd: the {whose} must be a vision transformer of timm with a class token, and"
            f" {type(network).__name__} is none"
        )
    return int(network.num_prefix_tokens)


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [MaskedKD]
