import copy

import pytest
import timm
import torch
from kdkit_plugins.schedules import maskedkd
from test_capture import compare
from test_lockstep import alone, count, jobs
from test_stage_resume import interrupt_at
from training import PLAIN, assert_same_run, merged, train, write

import kdkit
from kdkit.errors import RecipeError
from kdkit.models import tapped
from kdkit.study.lockstep import train_together

VIT = {
    "model": "vit_tiny_patch16_224",
    "args": {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3},
}
TEACHER = merged(VIT, {"args": {"embed_dim": 16, "num_heads": 2}})
MASKED = {"schedule": {"use": "maskedkd", "attention": "blocks.1.attn"}}
BASE = {**PLAIN, "student": VIT, "teacher": TEACHER, **MASKED}


def network(**arguments):
    torch.manual_seed(0)
    return timm.create_model(VIT["model"], num_classes=5, **{**VIT["args"], **arguments}).eval()


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}, {"reg_tokens": 2}])
def test_patches_are_ranked_by_the_attention_of_the_class_token(arguments):
    student = network(**arguments)
    attention = student.blocks[1].attn
    attention.fused_attn, seen = False, []
    attention.attn_drop.register_forward_hook(lambda layer, args, output: seen.append(output))
    prefix = maskedkd.prefix_of(student, "student")
    qkv = kdkit.taps(student, ["blocks.1.attn.qkv"])(images()).features["blocks.1.attn.qkv"]
    found = maskedkd.scores_of(qkv, attention, prefix)
    torch.testing.assert_close(found, seen[0][:, :, 0].mean(1)[:, prefix:])
    assert found.shape == (3, 16)


def by_hand(vit, x, kept):
    tokens = vit._pos_embed(vit.patch_embed(x))
    rows = [torch.cat([row[: vit.num_prefix_tokens], row[vit.num_prefix_tokens :][own]]) for row, own in zip(tokens, kept, strict=True)]
    return vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(torch.stack(rows)))))


@pytest.mark.parametrize("arguments", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"class_token": True, "global_pool": "avg"}])
def test_a_teacher_answers_from_the_kept_patches_alone(arguments):
    plain, teacher = network(**arguments), kdkit.taps(network(**arguments), [])
    maskedkd.Masking.of(teacher.module)
    assert maskedkd.Masking.of(teacher.module) is maskedkd.Masking.of(teacher.module)
    kept = torch.tensor([[1, 5, 9], [0, 15, 2], [7, 8, 3]])
    with torch.no_grad():
        torch.testing.assert_close(maskedkd.masked(teacher, images(), kept).logits, by_hand(plain, images(), kept))
        everything = torch.arange(16).expand(3, -1)
        torch.testing.assert_close(maskedkd.masked(teacher, images(), everything).logits, plain(images()))
        torch.testing.assert_close(teacher(images()).logits, plain(images()))  # as before where it is not told
    changed = images()
    changed[0, :, :2, :2] += 1  # patch 0, which only the second image's teacher sees
    changed[1, :, :2, :2] += 1
    before, after = (maskedkd.masked(teacher, shown, kept).logits for shown in (images(), changed))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.slow
def test_runs_that_share_a_teacher_end_as_alone(tmp_path):
    base = {**BASE, "train": {**BASE["train"], "epochs": 1}}
    found = jobs(tmp_path, base, {"quarter": {"schedule": {"keep": 0.25}}})
    found += jobs(tmp_path, {**base, "schedule": {"use": "offline"}}, {"whole": {}})
    with pytest.MonkeyPatch.context() as patch:
        answered = count(patch, tapped.TappedModel, "forward")
        train_together(found)
    asked = [(model.module, inputs[maskedkd.KEPT]) for model, inputs in answered if isinstance(inputs, dict)]
    asked = [(module, kept) for module, kept in asked if kept.device.type != "meta"]
    assert len({id(module) for module, _ in asked}) == 1 and len(asked) >= 6
    assert all(len(set(row)) == 4 for _, kept in asked for row in kept.tolist())  # a quarter of 16 patches
    for job in found:
        assert_same_run(alone(tmp_path, job), job.folder)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    train(tmp_path, BASE, into="whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, BASE)
    train(tmp_path, BASE)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_recorded_step_masks_anew(tmp_path):
    base = merged(BASE, {"data": {"dataset": {"train": 32}}, "train": {"device": "cpu", "optimizer": {"args": {"fused": True}}}})
    assert not compare(write(tmp_path, base))


REFUSED = {
    "another network": ({"teacher": PLAIN["teacher"]}, "maskedkd: the teacher must be a vision transformer of timm"),
    "other patches": ({"teacher": merged(TEACHER, {"args": {"patch_size": 4}})}, "the student has 16 patches and the teacher 4"),
    "a cache": ({"teacher": {**TEACHER, "cache": {"views": 1}}}, "is shown other samples than those of the batch"),
    "another layer": ({"schedule": {"use": "maskedkd"}}, "there is no layer 'blocks.11.attn.qkv'"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_masked_is_refused_in_a_line(tmp_path, changes, says):
    with pytest.raises(RecipeError) as error:
        kdkit.check(write(tmp_path, {**copy.deepcopy(BASE), **changes}))
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1
