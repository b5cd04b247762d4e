"""Steps of every task, balance and compressed student are recorded, or the reason is told."""

import pytest
import small_language
import small_texts
import test_balances
import test_compressions
import test_detection_runs
import test_task_none
import test_tasks_of_numbers
from test_capture import compare
from training import PLAIN, merged, write

FUSED = {"device": "cpu", "optimizer": {"args": {"fused": True}}}
BALANCED = {**PLAIN, "losses": test_balances.LOSSES}
READS = "the host reads a value of the device"
# of segmentation in test_dense_losses.py and test_segmentation.py
RECIPES = {
    "multilabel": (test_tasks_of_numbers.TASKS["multilabel"], None),
    "regression": (test_tasks_of_numbers.TASKS["regression"], None),
    "none": (test_task_none.SPEC, None),
    "detection": (test_detection_runs.RECIPE, READS),
    "texts": (small_texts, READS),
    "language model": (small_language, READS),
    **{f"balance {name}": (merged(BALANCED, changes), None) for name, changes in test_balances.BALANCES.items()},
    **{f"student {name}": (merged(test_compressions.BEGINS, {"student": one}), None) for name, one in test_compressions.STUDENTS.items()},
}
ON_CPU = {f"student {name}" for name, one in test_compressions.STUDENTS.items() if "quantize" in one}
EPOCHS = 6  # so that the smaller last batch is recorded too


def prepared(name, folder, train):
    """A recipe of the table, with its data, and the reason that is to be told."""
    content, reason = RECIPES[name]
    if content in (small_texts, small_language):
        content = content.recipe(content.lay_out(folder))
    elif name == "detection":
        test_detection_runs.lay_out(folder)
    (folder / "spots.py").write_text(test_tasks_of_numbers.PLUGIN)
    return write(folder, merged(content, {"train": {"epochs": EPOCHS, **train}})), reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.first(1)
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_recorded_or_the_reason_is_told(name, tmp_path):
    path, reason = prepared(name, tmp_path, FUSED)
    reasons = compare(path)
    assert bool(reasons) == bool(reason) and all(reason in one for one in reasons)
