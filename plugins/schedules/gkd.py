"""On-policy distillation of language models: the student learns on texts that it writes itself.

Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
ICLR 2024, arXiv:2306.13649, algorithm 1 (GKD). With probability lambda (`on_policy`) the student
writes on behind the prompts of a batch: each next token is drawn from softmax(z_s / T). Then both
networks read the texts, and a divergence of each token that was written is minimised, with no
gradient through the drawing. Otherwise they read the texts of the data. The paper's divergence is
`jsd`, without a loss on labels.

A prompt is what the data marks as one (`completion_mask`), or the first tokens of a text
(`prompt`). It does not count in texts that the student wrote; the data's own count as without this
schedule.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import kdkit

from ..tasks._tokens import COMPLETION, MASK, TOKENS, texts_of


class Gkd(kdkit.Schedule):
    """One stage: the student learns from a frozen teacher, on texts of the data or of its own.

    Losses on labels see the data's texts alone. Texts are as long as the longest of the batch, or
    end with the network's own end (`eos_token_id` of a configuration of transformers). A step costs
    a forward of the teacher and a forward and backward of the student; on texts of its own also a
    forward of the student for each token.
    """

    name = "gkd"
    scheme = "offline"
    needs_teacher = True
    tasks = frozenset({"language_model"})

    class Options(kdkit.ScheduleOptions):
        on_policy: float = Field(
            default=1.0,
            ge=0,
            le=1,
            description="lambda: probability that the student writes the texts of a batch.",
        )
        prompt: int = Field(
            default=8,
            ge=1,
            description=(
                "Tokens of each text that are given, where the data does not mark a prompt; the"
                " student writes the rest."
            ),
        )
        temperature: float = Field(
            default=1.0, gt=0, description="T at which the student draws each token."
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student, teacher = models.student(), models.teacher()
        if (longest := models.info.image_shape[0]) <= self.options.prompt:
            raise kdkit.RunError(
                f"prompt: {self.options.prompt} tokens are given, and texts have {longest} at"
                " most: the student has none to write"
            )

        def prepare(batch: kdkit.Batch) -> kdkit.Batch:
            # also where it is certain, so that what comes after draws the same numbers
            if torch.rand(()) >= self.options.on_policy:
                return batch
            with kdkit.in_eval_mode(student.module), torch.no_grad():
                return self.written(student.module, batch)

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            # of the networks, not all would know what to do with it
            shown = {k: v for k, v in texts_of(batch).items() if k != COMPLETION}
            with torch.no_grad():
                taught = teacher(shown).detach()
            return [kdkit.Lesson(student(shown), [taught])]

        yield kdkit.Stage("distill", [student], step, prepare=prepare)

    def written(self, network: torch.nn.Module, batch: kdkit.Batch) -> kdkit.Batch:
        """The batch with texts that the network wrote behind the prompts; without labels."""
        texts = texts_of(batch)
        ids, real = texts[TOKENS], texts.get(MASK, torch.ones_like(texts[TOKENS])).bool()
        own = (
            texts[COMPLETION].bool()
            if COMPLETION in texts
            else torch.arange(ids.shape[1], device=ids.device) >= self.options.prompt
        )
        # up to the first token that the network is to write; the first of all is always given
        prompt = real & (own.expand_as(real).cumsum(1) == 0)
        prompt[:, 0] = True
        ids, real = self.continued(network, ids * prompt, prompt)
        inputs = {TOKENS: ids, MASK: real.long(), COMPLETION: (real & ~prompt).long()}
        return replace(batch, inputs=inputs, labelled=0)

    def continued(
        self, network: torch.nn.Module, ids: Tensor, prompt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token ids (B, N) that begin with those of the prompts, and which of them are real."""
        takes = inspect.signature(network.forward).parameters
        # a network of transformers remembers what it has read; another one reads it again
        remembers = "past_key_values" in takes
        ends = ids.new_tensor(ends_of(network))
        memory: dict[str, Any] = {"use_cache": True} if remembers else {}
        ids, real, read = ids.clone(), prompt.clone(), 0
        given = prompt.sum(1, keepdim=True)
        # a text may be shorter than a prompt; some begin with the token that ends others
        goes_on = ~(torch.isin(ids.gather(1, given - 1), ends) & (given > 1))[:, 0]
        for place in range(int(given.min()), ids.shape[1]):
            shown = {TOKENS: ids[:, read:place], MASK: real[:, :place].long()}
            answer = network(**shown, **memory)
            if remembers:
                memory, read = {"use_cache": True, "past_key_values": answer.past_key_values}, place
            z = getattr(answer, "logits", answer)[:, -1].float() / self.options.temperature
            drawn = torch.multinomial(z.softmax(1), 1)[:, 0]
            writes = goes_on & ~prompt[:, place]
            ids[:, place] = torch.where(writes, drawn, ids[:, place])
            real[:, place] |= writes
            goes_on = goes_on & ~(writes & torch.isin(drawn, ends))
        return ids, real


def ends_of(network: torch.nn.Module) -> list[int]:
    """The token ids that end a text, as the network's configuration says."""
    said: Any = getattr(getattr(network, "config", None), "eos_token_id", None)
    return [] if said is None else [said] if isinstance(said, int) else [*said]


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Gkd]
