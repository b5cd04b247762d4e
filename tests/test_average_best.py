"""The mean of the epochs that are best on validation, in memory, over stops, and in the place of the student."""

import json
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save
from test_stage_resume import kill_often, twice
from training import EVERYTHING, PLAIN, Command, assert_same_run, lines, metrics, together, train, weights, write

from kdkit import cli, recipe
from kdkit.errors import RecipeError, RunError
from kdkit.runs import checks
from kdkit.runs.best_epochs import BestEpochs
from kdkit.runs.run import Run
from kdkit.study import lockstep

CHANGES = {"data": {"validation": 16, "augment": {"flip": 0.5}}, "train": {"epochs": 5, "average_best": 2}}
AVERAGED = {**EVERYTHING, "train": {**EVERYTHING["train"], "epochs": 4, "average_best": 2}}


def bytes_of(value, count=1):
    return save({"w": torch.tensor([float(value)], dtype=torch.bfloat16), "n": torch.tensor(count)})


def names(kept):
    return sorted(path.name for path in kept.folder.iterdir())


def best(run, count):
    """The epochs that are best on validation, from the log: the earlier of two that are equally good."""
    scores = {line["epoch"]: line["validation"]["top1"] for line in metrics(run) if line["kind"] == "epoch"}
    return sorted(sorted(scores, key=lambda epoch: (-scores[epoch], epoch))[:count])


def mean_of(files):
    """The naive mean, in the files' order, of what is floating; of the rest, the first one's."""
    each = [load_file(file) for file in files]
    return {
        name: torch.stack([one[name].double() for one in each]).mean(0).float() if value.is_floating_point() else value
        for name, value in each[0].items()
    }


def test_best_epochs_are_ranked_and_averaged(tmp_path):
    kept = BestEpochs(tmp_path / "best", 3)
    for epoch, top1 in enumerate([50.0, 70.0, 60.0, 70.0, 55.0, 65.0], 1):
        if kept.offer(0, epoch, top1):
            kept.write(0, epoch, bytes_of(epoch, 10 * epoch))
    assert kept.epochs(0) == (2, 4, 6) and kept.ranked[0][0] == (2, 70.0)
    assert not kept.offer(0, 7, 65.0)  # not better than what is there
    found = kept.mean(0)
    assert found["w"].dtype == torch.bfloat16 and found["w"].item() == 4.0 and found["n"].item() == 20  # the best one's count


def test_an_epochs_weights_stay_as_long_as_a_checkpoint_names_them(tmp_path):
    kept = BestEpochs(tmp_path, 1)
    for epoch, top1 in enumerate([50.0, 60.0], 1):
        kept.offer(0, epoch, top1)
        kept.write(0, epoch, bytes_of(epoch))
        kept.tidy(for_good=False)
    assert len(names(kept)) == 2  # the checkpoint before names epoch 1
    kept.tidy(for_good=False)
    assert names(kept) == ["student1-epoch-0002.safetensors"]
    again = BestEpochs(tmp_path, 1)
    again.load({0: [(2, 60.0)]})
    again.offer(0, 3, 70.0)
    again.write(0, 3, bytes_of(3))
    again.tidy(for_good=False)
    assert len(names(again)) == 2
    again.tidy(for_good=True)
    assert names(again) == ["student1-epoch-0003.safetensors"]
    again.discard()
    assert not tmp_path.exists()


@pytest.mark.parametrize("content", [None, b"nothing"])
def test_missing_or_damaged_epoch_weights_are_one_line(tmp_path, content):
    kept = BestEpochs(tmp_path, 1)
    kept.offer(0, 4, 50.0)
    if content:
        kept.write(0, 4, content)
    with pytest.raises(RunError, match="weights of epoch 4.*are gone or damaged") as raised:
        kept.mean(0)
    assert "\n" not in str(raised.value)


@pytest.mark.first(1)
@pytest.mark.parametrize("ema", [None, {"decay": 0.7}])
def test_average_best_gives_the_mean_of_the_best_epochs(tmp_path, monkeypatch, capsys, ema):
    result = (
        train(tmp_path, **CHANGES, run={"snapshots": 1})
        if ema is None
        else train(tmp_path, data=CHANGES["data"], train={**CHANGES["train"], "ema": ema}, run={"snapshots": 1})
    )
    run = tmp_path / "run"
    epochs = best(run, 2)
    assert result.averaged == tuple(epochs) and len(names(BestEpochs(run / "best-epochs" / "stage0", 2))) == 2
    by_rank = [run / "snapshots" / "distill" / f"epoch-{epoch:04d}.safetensors" for epoch in epochs]
    expected, found = mean_of(by_rank), weights(run)
    floating = [name for name, value in found.items() if value.is_floating_point()]
    assert len(floating) > 10 and all(torch.equal(found[name], expected[name]) for name in floating)
    last = metrics(run)[-1]
    assert last["best_epochs"] == epochs
    assert result.last == {"test": last["test"], "validation": last["validation"]} and result.test != last["test"]
    monkeypatch.setattr(sys, "argv", ["kdkit", "evaluate", str(run)])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{result.test['nll']:.4f}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["kdkit", "show", str(run)])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().out
    assert f"student, test, mean of epochs {', '.join(map(str, epochs))}" in told and "student, test, last epoch" in told


def test_a_deleted_student_is_averaged_again_to_the_same_bits(tmp_path):
    result = train(tmp_path, **CHANGES)
    before = result.student.read_bytes()
    result.student.unlink()
    again = train(tmp_path, **CHANGES)
    assert again.student.read_bytes() == before and again.test == result.test and again.averaged == result.averaged


def test_average_best_measures_every_epoch(tmp_path):
    train(tmp_path, **{**CHANGES, "train": {**CHANGES["train"], "evaluate_every": 4}})
    assert all("validation" in line for line in metrics(tmp_path / "run") if line["kind"] == "epoch")


@pytest.mark.slow
def test_average_best_resumes_to_the_same_bits(tmp_path):
    path = write(tmp_path, AVERAGED)
    assert Command(tmp_path, "train", path, "--run", "whole").finish()[0] == 0
    kill_often(tmp_path, path, "run", lines(tmp_path / "whole"), 2, time.time_ns())
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    kept = [sorted(file.read_bytes() for file in (tmp_path / run / "best-epochs").rglob("*.*")) for run in ("run", "whole")]
    assert kept[0] == kept[1] and len(kept[0]) == 2


@pytest.mark.slow
def test_average_best_averages_the_last_stage_alone(tmp_path):
    found = twice(tmp_path)
    result = train(tmp_path, found, data={"validation": 12}, train={"average_best": 3})
    assert [path.name for path in (tmp_path / "run" / "best-epochs").iterdir()] == ["stage2"]
    assert result.averaged == (1,) and result.last["test"] == result.test  # it has one epoch


def test_average_best_of_several_students(tmp_path):
    """`mutual` may leave the best peer: here that is seen from the means."""
    both = {"schedule": {"use": "mutual", "result": "best"}, "teacher": None}
    result = train(tmp_path, **CHANGES, **both)
    folder = tmp_path / "run" / "best-epochs" / "stage0"
    means = [mean_of(sorted(folder.glob(f"student{number}-*"))) for number in (1, 2)]
    found = weights(tmp_path / "run")
    alike = [all(torch.equal(found[n], mean[n]) for n in found if found[n].is_floating_point()) for mean in means]
    assert sum(alike) == 1 and len(result.averaged) == 2 and len(result.peers) == 1


@pytest.mark.slow
def test_average_best_in_lockstep_is_what_it_is_alone(tmp_path):
    alone = train(tmp_path, **CHANGES, into="alone")
    files = [write(tmp_path, name=f"{i}.yaml", **CHANGES, losses=losses) for i, losses in enumerate([PLAIN["losses"], PLAIN["losses"][1:]])]
    jobs = [Run(recipe.load(file), tmp_path / file.stem) for file in files]
    results = [outcome.result for outcome in lockstep.train_together(jobs)]
    assert results[0].student.read_bytes() == alone.student.read_bytes() != results[1].student.read_bytes()
    assert results[0].averaged == alone.averaged


@pytest.mark.slow
def test_average_best_resumes_in_two_processes(tmp_path):
    path = write(tmp_path, **{**CHANGES, "train": {**CHANGES["train"], "epochs": 6}})
    commands = together(tmp_path, "train", path, "--run", "whole")
    assert [command.finish()[0] for command in commands] == [0, 0], commands[0].log.read_text()
    stopped = together(tmp_path, "train", path, "--run", "run")
    assert stopped[0].wait_for(lambda: lines(tmp_path / "run") >= 10), stopped[0].finish()
    stopped[1].send(signal.SIGTERM)
    assert [command.finish()[0] for command in stopped] == [143, 143]
    assert [command.finish()[0] for command in together(tmp_path, "train", path, "--run", "run")] == [0, 0]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["averaged"] == best(tmp_path / "run", 2)


def test_average_best_needs_validation_data(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: train.average_best: .* set `data.validation`") as raised:
        checks.make(recipe.load(write(tmp_path, train={"average_best": 3})))
    assert "\n" not in str(raised.value)


def test_average_best_left_out_changes_no_fingerprint(tmp_path):
    assert "average_best" not in recipe.load(write(tmp_path)).content()["train"] and "average_best" not in PLAIN["train"]
