"""`kdkit check` names the part of a student that nothing teaches."""

import pytest

from kdkit import recipe
from kdkit.runs import checks

RECIPE = """\
name: reached
data: {{dataset: {{use: synthetic, train: 32, test: 8, image_size: 32, num_classes: 7}}, batch_size: 8}}
student: {{model: test_resnet}}
teacher: {{model: test_resnet}}
schedule: {schedule}
losses: {losses}
train: {{epochs: 2, optimizer: {{lr: 0.1}}}}
"""
OFFLINE = "{use: offline}"
FIRST = "{use: hint, layers: [{student: layer1, teacher: layer1}]}"


def notes(tmp_path, losses, schedule=OFFLINE):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(losses=losses, schedule=schedule))
    return [note for note in checks.make(recipe.load(path)).notes if "random" not in note]


@pytest.mark.parametrize(
    ("losses", "schedule", "stays"),
    [
        (f"[{FIRST}]", OFFLINE, "layer2, layer3, layer4, fc of the student"),
        (f"[{FIRST.replace('layer1', 'layer4')}]", OFFLINE, "fc of the student"),
        (f"[{FIRST}, {{use: cross_entropy}}]", OFFLINE, None),
        (f"[{FIRST}, {{use: cross_entropy, weight: 0}}]", OFFLINE, "layer2, layer3, layer4, fc of the student"),
        (f"[{FIRST}, {{use: cross_entropy, weight: {{from: 0, to: 1, epochs: 1}}}}]", OFFLINE, None),
        ("[{use: logit_kl}]", OFFLINE, None),
        (f"[{FIRST}, {{use: logit_kl}}]", "{use: staged, stages: [{name: one, losses: [hint]}, {name: two, losses: [logit_kl]}]}", None),
    ],
)
def test_parameters_that_no_loss_reaches_are_named(tmp_path, losses, schedule, stays):
    told = [note for note in notes(tmp_path, losses, schedule) if "no loss reaches" in note]
    assert bool(told) == bool(stays) and all(note.startswith(f"no loss reaches {stays} (") for note in told)


def test_an_objective_of_weight_0_is_noted(tmp_path):
    told = notes(tmp_path, "[{use: logit_kl, weight: 0}]")
    assert told[0] == "stage 'distill' learns nothing: all its losses have weight 0"
    assert told[1].startswith("no loss reaches the student (")
