"""Students that begin with layers of their teachers."""

import pytest
import timm
import torch
from torch import nn
from training import PLAIN, TINY, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.errors import ModelError, RecipeError
from kdkit.models.inheritance import inherit
from kdkit.runs import checks
from kdkit.students.loaded import LoadedRun

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "num_classes": 6}


def vit(depth, **others):
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **{**VIT, **others})


def test_init_from_a_teacher_takes_blocks_and_all_else_that_fits():
    teacher, student = vit(5), vit(3)
    copied = inherit(student, teacher, [0, 2, 4])
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert set(copied) == set(ours)
    for name, value in ours.items():
        path = name.split(".")
        other = ".".join(["blocks", str(2 * int(path[1])), *path[2:]]) if path[0] == "blocks" else name
        assert torch.equal(value, theirs[other]), name


def test_init_takes_a_block_twice_and_in_another_order():
    teacher, student = vit(3), vit(3)
    inherit(student, teacher, [2, 0, 2])
    weight = "attn.qkv.weight"
    assert [
        torch.equal(student.blocks[i].get_parameter(weight), teacher.blocks[j].get_parameter(weight)) for i, j in ((0, 2), (1, 0), (2, 2))
    ] == [True] * 3


def test_init_without_layers_goes_by_names_and_shapes():
    teacher, student = vit(3), vit(2, num_classes=4)
    head = student.head.weight.clone()
    copied = inherit(student, teacher)
    assert torch.equal(student.blocks[1].attn.qkv.weight, teacher.blocks[1].attn.qkv.weight)
    assert torch.equal(student.head.weight, head) and "head.weight" not in copied


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "says"),
    [
        (lambda: vit(2), lambda: vit(4), [0, 1, 3], r"layers: names 3 of the teacher's, the student has 2 \('blocks'\)"),
        (lambda: vit(2), lambda: vit(4), [0, 4], r"layers: 4 is none of the teacher's 4 \('blocks'\), which are numbered from 0"),
        (lambda: vit(2, embed_dim=12), lambda: vit(4), [0, 1], "no tensor of the teacher's blocks has the name and the shape"),
        (lambda: nn.Linear(2, 2), lambda: vit(4), [0, 1], "the student has no 'blocks'"),
        (lambda: vit(2), lambda: nn.Linear(2, 2), [0, 1], "of which the teacher has none; leave `layers` out"),
        (lambda: nn.Linear(3, 2), lambda: nn.Linear(2, 3), None, "no tensor of the teacher has the name and the shape"),
    ],
    ids=["other number", "no such block", "other width", "no blocks", "no row", "nothing fits"],
)
def test_init_that_cannot_work_is_told(student, teacher, layers, says):
    with pytest.raises(ModelError, match=says):
        inherit(student(), teacher(), layers)


def test_init_refuses_an_ambiguous_row_of_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))) for _ in "ab")

    with pytest.raises(ModelError, match=r"several \(a, b\)"):
        inherit(Two(), Two(), [0, 1, 2])


def test_a_recipe_s_student_begins_with_inherited_layers(tmp_path):
    """With a learning rate of next to nothing, what it ends with is what it began with; the teacher's folded layers are not taken."""
    teacher = train(
        tmp_path,
        {**PLAIN, "name": "teacher", "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]},
        "teacher",
    )
    changes = {
        "teacher": {**TINY, "checkpoint": str(teacher.student), "fold_batchnorm": True},
        "student": {**TINY, "init": {"from": "teacher"}},
        "train": {"epochs": 1, "optimizer": {"lr": 1e-12}},
    }
    begun = train(tmp_path, {**PLAIN, **changes}, "student")
    ours, theirs = weights(begun.folder), weights(teacher.folder)
    assert all(
        torch.allclose(value, theirs[name], atol=1e-6)
        for name, value in ours.items()
        if "running" not in name and "num_batches" not in name
    )
    assert LoadedRun(begun.folder).student() is not None and kdkit.load_student(begun.folder) is not None


ALONE = {**PLAIN, "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
FROM_TEACHER = {**TINY, "init": {"from": "teacher"}}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({**ALONE, "student": FROM_TEACHER}, "student.init.from: there is no such teacher; the recipe has none"),
        ({**PLAIN, "teacher": FROM_TEACHER}, "teacher.init: no such key"),
        ({**PLAIN, "student": {**FROM_TEACHER, "init": {"from": "teacher", "layers": [0]}}}, "student.init: `layers` are numbers in a row"),
    ],
    ids=["without a teacher", "of a teacher", "without blocks"],
)
def test_a_recipe_with_an_impossible_init_is_told(tmp_path, changed, says):
    with pytest.raises(RecipeError, match=says):
        checks.make(recipe.load(write(tmp_path, changed)))
