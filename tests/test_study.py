"""Studies: what is trained and what is reused, what is found, and what happens when a run fails or is stopped."""

import json
import re
import signal
import statistics
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from training import merged, write

from kdkit import cli
from kdkit.engine.evaluate import predict
from kdkit.errors import Interrupted, RecipeError, RunError
from kdkit.runs.folder import RunFolder
from kdkit.runs.networks import ModelFactory
from kdkit.runs.run import Run
from kdkit.students.loaded import LoadedRun
from kdkit.students.profile import measure
from kdkit.study import comparison as study
from kdkit.study import finder
from kdkit.study import loading as study_file
from kdkit.study import table as study_table
from kdkit.study.findings import Findings, Length

BASE = {
    "name": "base",
    "data": {"dataset": {"use": "synthetic", "image_size": 8, "train": 48, "test": 20, "num_classes": 6}, "batch_size": 8},
    "student": {"model": "mlp/8"},
    "schedule": {"use": "supervised"},
    "losses": [{"use": "cross_entropy"}],
    "train": {"epochs": 1, "optimizer": {"lr": 0.1}},
}
TEACHER = {**BASE, "name": "big", "student": {"model": "mlp/16"}}
RESPONSE = {"teacher": {"recipe": "big.yaml"}, "schedule": {"use": "offline"}, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}]}
STUDY = {"name": "s", "base": "base.yaml", "variants": {"alone": {}, "response": RESPONSE}, "seeds": 2}


@pytest.fixture
def carry_out(tmp_path, monkeypatch):
    """Carry a study out; its findings and the names of the folders that were trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdkit.study.measurements.LATENCY_RUNS", 3)
    write(tmp_path, BASE, "base.yaml")
    write(tmp_path, TEACHER, "big.yaml")
    train_together = study.train_together

    def run(*paths, **options):
        trained = []

        def counting(jobs, **more):
            outcomes = train_together(jobs, **more)
            trained.extend(outcome.job.folder.name for outcome in outcomes if outcome.result)
            return outcomes

        monkeypatch.setattr(study, "train_together", counting)
        return study.compare(study_file.load(paths, **options)), trained

    return run


@pytest.fixture
def compare(carry_out, tmp_path):
    """Carry `STUDY` out with changes."""

    def run(changes=None, **options):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(merged(STUDY, changes or {}), sort_keys=False))
        return carry_out(tmp_path / "s.yaml", **options)

    return run


def test_a_study_from_start_to_end(compare, tmp_path):
    found, trained = compare()
    assert sorted(trained) == ["alone-seed0", "alone-seed1", "response-seed0", "response-seed1"]
    assert found == Findings.load(tmp_path / "runs/s/study.json")
    alone, response = found.variants
    assert (alone.name, alone.seeds, response.seeds, found.baseline) == ("alone", (0, 1), (0, 1), "alone")
    results = {path.name: RunFolder(path).result() for variant in found.variants for path in variant.folders}
    assert response.last["top1"] == tuple(results[f"response-seed{seed}"].test["top1"] for seed in (0, 1))
    assert alone.difference is None
    assert response.difference.values == tuple(b - a for a, b in zip(alone.last["top1"], response.last["top1"], strict=True))
    assert response.cost.seconds == statistics.mean(results[f"response-seed{seed}"].seconds for seed in (0, 1))
    assert found.teacher.name == "big" and dict(found.teacher.last) == dict(results["response-seed0"].teacher)
    assert found.together["trained"] == 4 and found.together["reused"] == 0 and found.together["wall"] > 0
    assert response.about == "1 * cross_entropy + 1 * logit_kl; schedule offline"
    assert found.versions["torch"] == version("torch") and found.machine["processor"]
    assert not alone.best and not alone.failures


def test_costs_are_those_of_the_network(compare):
    found, _ = compare({"seeds": 1})
    for variant in found.variants:
        run = LoadedRun(variant.folders[0])
        known = measure(run.student(), run.info.image_shape, runs=1)
        assert (variant.cost.parameters, variant.cost.macs, variant.cost.bytes) == (known.parameters, known.macs, known.bytes)
        assert variant.cost.latency > 0 and variant.cost.memory > 4 * known.parameters and variant.cost.images_per_second > 0
    assert found.variants[1].cost.memory > found.variants[0].cost.memory


def test_a_student_without_a_teacher_is_compared_with_the_common_one(compare):
    found, _ = compare()
    for seed, folder in enumerate(found.variants[0].folders):
        assert "agreement" not in RunFolder(folder).result().test
        student, taught = LoadedRun(folder), LoadedRun(found.variants[1].folders[0])
        ours = predict(student.student(), student.data().test).logits
        theirs = predict(taught.teachers()[0], student.data().test).logits
        assert found.variants[0].last["agreement"][seed] == pytest.approx(100 * (ours.argmax(1) == theirs.argmax(1)).float().mean().item())
        assert found.variants[0].last["logit_difference"][seed] == pytest.approx((ours - theirs).abs().mean().item(), rel=1e-5)


def test_only_what_is_new_is_trained(compare, monkeypatch):
    first, _ = compare()
    again, trained = compare()
    assert trained == [] and again == first  # nothing is measured again either
    more, trained = compare({"seeds": 3})
    assert sorted(trained) == ["alone-seed2", "response-seed2"]
    assert more.together["trained"] == 6
    _, trained = compare({"seeds": 3, "variants": {"high": {"losses": [{"use": "cross_entropy", "label_smoothing": 0.1}]}}})
    assert sorted(trained) == ["high-seed0", "high-seed1", "high-seed2"]
    fewer, trained = compare({"seeds": [1]})
    assert trained == [] and fewer.variants[0].seeds == (1,)


def test_runs_of_other_studies_and_of_train_are_reused(compare, tmp_path):
    import kdkit

    kdkit.train(tmp_path / "base.yaml", folder=tmp_path / "runs/by-hand", quiet=True)
    found, trained = compare()
    assert "alone-seed0" not in trained and len(trained) == 3 and found.together["reused"] == 1
    assert found.variants[0].folders[0].name == "by-hand"
    other, trained = compare({"name": "other"})
    assert trained == [] and other.together["reused"] == 4 and other.variants[1].folders[0].parent.name == "s"


def test_a_name_that_another_recipe_has_taken(compare):
    compare({"seeds": 1})
    found, trained = compare({"seeds": 1, "variants": {"response": {"losses": [{"use": "logit_kl"}]}}})
    (folder,) = trained
    assert folder.startswith("response-seed0-") and found.variants[1].folders[0].name == folder


def test_equal_variants_are_one_training(compare):
    found, trained = compare({"seeds": 1, "variants": {"same": RESPONSE}})
    assert len(trained) == 2
    assert found.variants[1].folders == found.variants[2].folders and found.variants[2].difference == found.variants[1].difference


def test_a_run_that_fails_does_not_stop_the_others(compare, tmp_path):
    changes = {"variants": {"wild": {"train": {"optimizer": {"lr": 1e30}}}}, "allow": ["train.optimizer.lr"]}
    found, trained = compare(changes)
    wild = found.variants[2]
    assert len(trained) == 4 and wild.seeds == () and wild.cost is None and wild.last == {} and wild.difference is None
    assert set(wild.failures) == {0, 1} and all("is nan" in reason for reason in wild.failures.values())
    lines = list(study_table.caption(found))
    assert sum(line.startswith("failed: wild, seed ") for line in lines) == 2


def test_all_may_fail(compare):
    found, _ = compare(
        {
            "base": {**BASE, "train": {"epochs": 1, "optimizer": {"lr": 1e30}}},
            "variants": {
                "response": {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy", "weight": 2}]}
            },
        }
    )
    assert all(not variant.seeds and variant.failures for variant in found.variants) and found.teacher is None
    assert study_table.tables(found)


def test_unfair_variants_are_refused_before_anything_is_trained(compare, tmp_path):
    with pytest.raises(RecipeError, match="response: train.epochs: 2 \\(alone: 1\\)"):
        compare({"variants": {"response": {"train": {"epochs": 2}}}})
    assert not (tmp_path / "runs").exists()
    compare({"variants": {"response": {"train": {"epochs": 2}}}, "seeds": 1}, allow=["train.epochs"])


def test_a_variant_that_cannot_work_is_told_before_anything_is_trained(compare, tmp_path):
    hint = [{"use": "hint", "layers": [{"student": "nowhere", "teacher": "nowhere"}]}]
    with pytest.raises(RecipeError, match="nowhere.*\\(variant response\\)"):
        compare({"variants": {"response": {"losses": hint}}})
    assert not (tmp_path / "runs").exists()


def test_what_is_varied_may_differ(compare):
    found, trained = compare({"vary": {"train.optimizer.lr": [0.1, 0.2]}, "seeds": 1})
    assert len(trained) == 4 and [variant.name for variant in found.variants][1] == "alone, lr 0.2"


def test_best_on_validation_beside_the_last_epoch(compare):
    found, _ = compare({"base": merged(BASE, {"data": {"validation": 8}}), "seeds": 2})
    for variant in found.variants:
        results = [RunFolder(folder).result() for folder in variant.folders]
        assert variant.best["top1"] == tuple(result.best["test"]["top1"] for result in results)
        assert len(variant.best["agreement"]) == 2


def test_no_common_teacher_where_they_differ(compare, tmp_path):
    write(tmp_path, {**TEACHER, "student": {"model": "mlp/32"}}, "bigger.yaml")
    found, _ = compare({"variants": {"other": {**RESPONSE, "teacher": {"recipe": "bigger.yaml"}}}, "seeds": 1})
    assert found.teacher is None and "agreement" not in found.variants[0].last and "agreement" in found.variants[2].last
    assert any("each variant's own teacher" in line for line in study_table.caption(found))


def test_a_teacher_of_random_weights_is_another_with_each_seed(carry_out, tmp_path):
    random = {**RESPONSE, "teacher": {"model": "mlp/16"}}
    paths = [tmp_path / "base.yaml", write(tmp_path, {**BASE, "name": "taught", **random}, "taught.yaml")]
    assert carry_out(*paths, seeds=2)[0].teacher is None
    assert carry_out(*paths, seeds=1)[0].teacher.name == "mlp/16"


def test_a_seed_gives_every_variant_the_same_start(compare):
    """The same initial weights and the same batches in the same order, whatever is learnt from whom."""
    mutual = {"schedule": {"use": "mutual"}, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}]}
    found, _ = compare({"variants": {"mutual": mutual}})
    for seed in (0, 1):
        starts, batches = zip(*(_start(variant.folders[seed]) for variant in found.variants), strict=True)
        assert len(starts) == 3 and all(torch.equal(one, starts[0]) for one in starts)
        assert all(torch.equal(one, batches[0]) for one in batches)
    assert not torch.equal(_start(found.variants[0].folders[0])[0], starts[0])


def _start(folder):
    """A run's initial weights of the student, and the images of its first epoch, each as one row."""
    run = LoadedRun(folder)
    prepared = run.data()
    factory = ModelFactory(run.recipe, prepared.info, run._taught_by(), device=torch.device("cpu"))
    schedule = run.recipe.plugins.schedules[run.recipe.spec.schedule.use](run.recipe.spec.schedule)
    student = next(iter(schedule.stages(factory))).students[0]
    weights = torch.cat([value.flatten() for value in student.module.state_dict().values()])
    return weights, torch.cat([batch.inputs.flatten() for batch in prepared.train.epoch(0)])


TUNED = {
    "tune": {"train.optimizer.lr": [0.001, 0.1, 0.2], "train.epochs": [1, 2]},
    "tune_seeds": 1,
    "variants": {"alone": {"data": {"validation": 16}}, "response": {"data": {"validation": 16}}},
    "allow": ["data.validation"],
}


def test_a_search_chooses_by_validation_for_each_variant_alike(compare, tmp_path):
    found, trained = compare(TUNED)
    assert len(trained) == 2 * 6 + 2 * 2 and len(set(trained)) == len(trained)
    places = sorted((tmp_path / "runs/s-search").glob("*/result.json"))
    results = {place.parent.name: json.loads(place.read_text()) for place in places}
    assert len(results) == 12 and {result["seed"] for result in results.values()} == {2}  # the first seed that the study has not
    for variant in found.variants:
        own = {name: result for name, result in results.items() if name.startswith(f"{variant.name}-")}
        best = max(own, key=lambda name: own[name]["validation"]["top1"])
        assert len(own) == 6 and own[best]["validation"]["top1"] == max(variant.tuned.validation.values())
        lr, epochs = variant.tuned.values["train.optimizer.lr"], variant.tuned.values["train.epochs"]
        assert variant.tuned.validation[f"lr {lr:g}, epochs {epochs}"] == own[best]["validation"]["top1"]
        assert variant.tuned.edges == (*(["train.optimizer.lr"] if lr != 0.1 else []), "train.epochs")
        assert variant.tuned.cpu_seconds == pytest.approx(sum(result["cpu_seconds"] for result in own.values()))
        for folder in variant.folders:
            train = RunFolder(folder).recipe().spec.train
            assert (train.optimizer.lr, train.epochs) == (lr, epochs)
        assert variant.length.epochs == epochs
    assert (found.search.runs, found.search.seeds) == (12, (2,)) and found.search.keys["train.epochs"] == (1, 2)
    assert found == Findings.load(tmp_path / "runs/s/study.json")


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(compare, carry_out, monkeypatch, tmp_path):
    train = study.train_together
    monkeypatch.setattr(study, "train_together", lambda jobs, **more: train(jobs[:5], **more) and _stop())
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(merged(STUDY, TUNED), sort_keys=False))
    with pytest.raises(Interrupted, match="s-search: stopped with 5 of 12 runs finished; the same command goes on where it was"):
        study.compare(study_file.load([tmp_path / "s.yaml"]))
    monkeypatch.setattr(study, "train_together", train)
    _, trained = compare(TUNED)
    assert len(trained) == 7 + 4
    _, trained = carry_out(tmp_path / "runs/s/study.yaml")  # as it was written down
    assert trained == []


def _stop():
    raise Interrupted("saved", signal.SIGTERM)


def test_a_point_that_cannot_be_trained_is_not_chosen(compare):
    wild = {**TUNED, "tune": {"train.optimizer.lr": [1e30, 0.1]}, "variants": {"alone": {"data": {"validation": 16}}, "response": None}}
    found, _ = compare({**wild, "base": {**BASE, "data": {**BASE["data"], "validation": 16}}, "variants": {"alone": {}}, "seeds": 1})
    assert found.variants[0].tuned.point == "lr 0.1" and list(found.variants[0].tuned.validation) == ["lr 0.1"]


BY_LOSS = """
import kdkit
from kdkit_plugins.tasks.classification import Classification
from pydantic import Field

class ByLoss(Classification):
    "Classification in which another score decides."
    name = "by_loss"

    class Options(kdkit.TaskOptions):
        first: str = Field(default="nll", description="The score that decides.")

    def scores(self, info):
        return sorted(super().scores(info), key=lambda one: one.name != self.options.first)

@kdkit.hookimpl
def kdkit_tasks():
    return [ByLoss]
"""


@pytest.mark.slow
def test_of_a_score_that_is_better_lower_the_lowest_is_chosen(compare, tmp_path):
    (tmp_path / "by_loss.py").write_text(BY_LOSS)
    base = merged(BASE, {"plugins": ["by_loss.py"], "task": "by_loss", "data": {"validation": 16}})
    found, _ = compare({"base": base, "tune": {"train.optimizer.lr": [0.001, 0.1, 1.0]}, "tune_seeds": 1})
    assert found.deciding.name == "nll" and found == Findings.load(tmp_path / "runs/s/study.json")
    alone, response = found.variants
    for variant in found.variants:
        assert variant.tuned.validation[variant.tuned.point] == min(variant.tuned.validation.values())
        best = [RunFolder(folder).result().best for folder in variant.folders]
        assert variant.best["nll"] == tuple(one["test"]["nll"] for one in best)
    assert len(set(alone.tuned.validation.values())) == 3
    assert response.difference.values == tuple(b - a for a, b in zip(alone.last["nll"], response.last["nll"], strict=True))
    assert any("by NLL on validation data" in line for line in study_table.caption(found))
    (table,) = study_table.tables(found, 1000)
    assert [column.header for column in table.columns[1:4]] == ["NLL, nats ↓", "difference", "p"]


@pytest.mark.parametrize(
    ("alone", "response", "says"),
    [
        ("classification", "by_loss", "different tasks have no common table (classification: alone; by_loss: response)"),
        ("by_loss", {"use": "by_loss", "first": "top1"}, "different deciding scores have no common table (NLL: alone; top-1: response)"),
    ],
)
def test_variants_of_several_tasks_or_deciding_scores_are_refused(compare, tmp_path, alone, response, says):
    (tmp_path / "by_loss.py").write_text(BY_LOSS)
    base = merged(BASE, {"plugins": ["by_loss.py"]})
    with pytest.raises(RecipeError, match=re.escape(says)):
        compare({"base": base, "variants": {"alone": {"task": alone}, "response": {"task": response}}}, allow=["task"])
    assert not (tmp_path / "runs").exists()


def test_scores_that_recipes_name_are_columns_of_the_table(compare, tmp_path):
    found, _ = compare({"base": merged(BASE, {"metrics": ["MulticlassCohenKappa"]}), "show": ["nll", "top5"], "seeds": 1})
    results = [RunFolder(variant.folders[0]).result() for variant in found.variants]
    columns = study_file.load([tmp_path / "s.yaml"]).columns(found.scores)
    assert columns == ["nll", "top5", "MulticlassCohenKappa"]
    (table,) = study_table.tables(found, 1000, columns)
    heads = [column.header for column in table.columns]
    assert heads[heads.index("NLL, nats ↓") :][:3] == ["NLL, nats ↓", "top-5 %", "MulticlassCohenKappa"]
    told = [f"{one['MulticlassCohenKappa']:.4f}" for one in (results[1].teacher, *(result.test for result in results))]
    assert list(table.columns[heads.index("MulticlassCohenKappa")].cells) == told


@pytest.mark.parametrize(
    ("name", "hint"), [("top9", "did you mean 'top5'?"), ("MulticlassCohenKappa", "allowed: agreement, balanced_accuracy")]
)
def test_a_column_that_no_run_has_is_refused_before_anything_is_trained(compare, tmp_path, name, hint):
    with pytest.raises(RecipeError) as caught:
        compare({"show": ["loss", name]})
    line = 1 + (tmp_path / "s.yaml").read_text().splitlines().index(f"- {name}")
    assert str(caught.value).startswith(f"s.yaml:{line}: show.1: got '{name}'; {hint}") and not (tmp_path / "runs").exists()
    found, _ = compare({"show": ["loss", "kl_to_teacher"], "seeds": 1})
    with pytest.raises(RecipeError, match=f"show.1: got '{name}'"):  # of finished runs too
        compare({"show": ["loss", name], "seeds": 1})


def test_lengths_are_those_of_the_logs(compare):
    found, _ = compare({"variants": {"twice": {"schedule": {"use": "born_again", "generations": 2}}}, "seeds": 1}, allow=["steps"])
    for variant in found.variants:
        lines = [json.loads(line) for line in (variant.folders[0] / "metrics.jsonl").read_text().splitlines()]
        ends = {line["stage"]: line for line in lines if line["kind"] == "epoch"}
        steps = sum(line["step"] for line in ends.values())
        assert variant.length == Length(48, len(ends), steps, steps * 8)
    assert [variant.length.steps for variant in found.variants] == [6, 6, 12] and found.teacher.lengths == (Length(48, 1, 6, 48),)


def test_a_variant_that_trains_longer_than_the_baseline_is_refused(compare, tmp_path):
    with pytest.raises(RecipeError) as caught:
        compare({"variants": {"twice": {"schedule": {"use": "born_again", "generations": 2}}}})
    told, advice = str(caught.value).splitlines()
    place = f"s.yaml:{1 + (tmp_path / 's.yaml').read_text().splitlines().index('    schedule:')}"
    assert told.endswith(": twice: steps: 12 in all its stages, with 96 images (alone: 6, with 48)") and "s.yaml:" in place
    assert advice == (
        "a variant may not train longer than the baseline; to let them differ in this too: --allow steps (in a study file: `allow:`)"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.first(2)
@pytest.mark.parametrize("stop", [Interrupted("saved", signal.SIGTERM), signal.SIGTERM, signal.SIGINT], ids=["saved", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("place", ["check", "_train"])
def test_a_stop_says_how_to_go_on(compare, monkeypatch, stop, place):
    def stopped(*arguments):
        if isinstance(stop, Interrupted):
            raise stop
        signal.raise_signal(stop)

    with monkeypatch.context() as patch:
        patch.setattr(f"kdkit.study.comparison.{place}", stopped)
        with pytest.raises(Interrupted, match="s: stopped with 0 of 4 runs finished; the same command goes on") as caught:
            compare()
    assert caught.value.signal == (signal.SIGINT if stop == signal.SIGINT else signal.SIGTERM)
    assert compare()[0].together["trained"] == 4


def test_recipes_by_themselves(carry_out, tmp_path):
    one, two = tmp_path / "base.yaml", write(tmp_path, {**BASE, "name": "taught", **RESPONSE}, "two.yaml")
    found, trained = carry_out(one, two, seeds=1)
    assert found.name == "base-taught" and found.baseline == "base"
    assert sorted(trained) == ["base-seed0", "taught-seed0"]


def test_the_written_study_repeats_it(compare, carry_out, tmp_path):
    first, _ = compare({"vary": {"train.optimizer.lr": [0.1, 0.2]}, "seeds": 1})
    assert first.command == "kdkit compare s.yaml"
    again, trained = carry_out(tmp_path / "runs/s/study.yaml")
    assert trained == [] and replace(again, command=first.command) == first


def test_a_study_is_not_put_into_the_folder_of_a_run(compare, tmp_path):
    import kdkit

    kdkit.train(tmp_path / "base.yaml", folder=tmp_path / "runs/s", quiet=True)
    with pytest.raises(RunError, match="is the folder of a run; give the study another `name:`"):
        compare()


def test_broken_measurements_are_made_again(compare, tmp_path):
    first, _ = compare({"seeds": 1})
    (tmp_path / "runs/s/measured.json").write_text("{broken")
    again, _ = compare({"seeds": 1})
    assert again.variants[0].last == first.variants[0].last
    assert set(json.loads((tmp_path / "runs/s/measured.json").read_text())) == {
        "spent",
        "trained",
        "networks",
        "memory",
        "answers",
        "sha256",
    }


@pytest.fixture
def say(compare, capsys):
    """What `kdkit compare` says, which is told to end with a code."""

    def run(*words, code=None):
        assert cli.app(["compare", *map(str, words)], standalone_mode=False) == code
        return capsys.readouterr().out

    return run


def cells(said):
    return {name: re.split(r" {2,}", line.strip())[1:] for name, line in rows(said).items()}


def rows(said):
    """Each row by its name; of two tables, the second one's row behind the first one's."""
    found = {}
    for line in filter(str.strip, said.splitlines()):
        name = line.split("  ")[0]
        found[name] = f"{found.get(name, '')}{line}  "
    return found


def test_the_table_of_the_command(compare, say):
    _written({})
    said = say("s.yaml", "train.epochs=2")
    table = rows(said)
    assert table["alone"].count("+-") == 2 and "[" not in table["alone"]
    assert table["response"].count("+-") == 2 and " [" in table["response"] and "(x " in table["response"]
    assert "+-" not in table["teacher big"] and "Together: 4 runs trained for this study" in said and "2 seeds, mean +-" in said
    again = rows(say("s.yaml", "train.epochs=2", "--seeds", "1"))
    assert "+-" not in again["alone"] and "[" not in again["response"]
    assert cells(say("s.yaml", "train.epochs=2", "--dry", "--seeds", 3))["response"][:2] == ["seeds 0, 1", "seed 2"]
    left = "6 runs: 4 trained already, 2 to train in 1 pass (runs of a pass are side by side): 24 steps, 192 images, 96 of them with a teacher, "
    assert left + "which answers once for all runs of a pass." in say("s.yaml", "train.epochs=2", "--dry", "--seeds", 3)
    assert cells(say("s.yaml", "--dry"))["alone"] == ["seeds 0, 1", "6", "48", "1 * cross_entropy; schedule supervised"]


def test_a_failure_ends_the_command_with_code_1(compare, say):
    _written({"variants": {"wild": {"train": {"optimizer": {"lr": 1e30}}}}, "seeds": 1})
    said = say("s.yaml", "--allow", "train.optimizer", code=1)
    assert "failed: wild, seed 0: " in said and "is nan" in said and "response" in rows(said)


def test_the_loss_of_the_last_epochs(compare, say):
    _written({"show": ["loss", "late_loss", "logit_difference"], "seeds": 2})
    said = say("s.yaml", "train.epochs=4")
    found = Findings.load(Path("runs/s/study.json"))
    for variant in found.variants:
        courses = [[line["train"]["loss"] for line in RunFolder(path).metrics("epoch")] for path in variant.folders]
        assert variant.last["late_loss"] == tuple(statistics.fmean(course[1:]) for course in courses)  # 2.4 of 4, rounded up
        assert variant.last["loss"] == tuple(course[-1] for course in courses)
    for title in ("training loss, last 60 % of epochs", "mean |z_s - z_t|"):
        assert title in said
    late = found.variants[1].last["late_loss"]
    assert f"{statistics.mean(late):.3f} +- {statistics.stdev(late):.3f}" in said


def test_late_losses_are_those_of_the_last_stage(tmp_path):
    folder = RunFolder(tmp_path)
    for stage, losses in (("hints", [9.0, 9.0, 9.0]), ("labels", [5.0, 4.0, 3.0, 2.0, 1.0])):
        for epoch, value in enumerate(losses, 1):
            folder.log(kind="epoch", stage=stage, epoch=epoch, step=epoch, train={"loss": value})
    assert finder._losses(Run(None, tmp_path)) == {"loss": 1.0, "late_loss": 2.0}
    assert finder._losses(Run(None, tmp_path / "none")) == {}


def test_a_wide_table_becomes_two(compare):
    found, _ = compare({"seeds": 1})
    assert [table.row_count for table in study_table.tables(found, 200)] == [3]
    assert [table.row_count for table in study_table.tables(found, 80)] == [3, 3]
    further = ["top5", "balanced_accuracy", "macro_f1", "nll", "ece", "kl_to_teacher"]
    assert [len(table.columns) for table in study_table.tables(found, 100, further)][1:] == [7, 10]


def _written(changes):
    Path("s.yaml").write_text(yaml.safe_dump(merged(STUDY, changes), sort_keys=False))
