"""Searches by successive halving: who goes on, from where, by which data, and what is told."""

import contextlib
import io
import json
import signal

import pytest
import torch
import yaml
from training import PLAIN, Command, assert_same_run, merged, write

import kdkit
from kdkit import cli, recipe
from kdkit.errors import Interrupted, RecipeError, RunError
from kdkit.runs.folder import RunFolder
from kdkit.runs.run import Run
from kdkit.study import loading, search, search_plan, search_table
from kdkit.study.lockstep import train_together
from kdkit.study.plan import trainings
from kdkit.study.report import output, sections
from kdkit.study.spec import HalvingSpec

BASE = {
    "name": "base",
    "data": {
        "dataset": {"use": "synthetic", "image_size": 8, "train": 72, "test": 20, "num_classes": 6},
        "batch_size": 8,
        "validation": 24,
    },
    "student": {"model": "mlp/8"},
    "teacher": {"model": "mlp/16"},
    "schedule": {"use": "offline"},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}],
    "train": {"epochs": 4, "optimizer": {"lr": 0.1}},
}
SEARCH = {
    "name": "s",
    "base": "base.yaml",
    "vary": {"losses.logit_kl.weight": [0.5, 2], "train.optimizer.lr": [0.001, 0.1]},
    "search": {"eta": 2, "rungs": 2},
    "tune_seeds": 1,
    "seeds": 1,
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Read `SEARCH` with changes, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, BASE, "base.yaml")

    def read(changes=None, overrides=None, **options):
        content = merged(SEARCH, changes or {})
        content["vary"] = (changes or {}).get("vary", SEARCH["vary"])
        (tmp_path / "s.yaml").write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return search_plan.load(tmp_path / "s.yaml", overrides, **options)

    return read


def epochs(folder):
    return RunFolder(folder).metrics("epoch")


def rungs(candidates, epochs, every=1, warmup=0, **halving):
    made = search_plan.plan(candidates, epochs, HalvingSpec(**halving), warmup=warmup, every=every)
    return [(one.epochs, one.candidates) for one in made]


def test_each_rung_has_fewer_candidates_and_more_epochs():
    assert rungs(27, 100) == [(12, 27), (34, 9), (100, 3)]
    assert rungs(27, 100, every=4) == [(12, 27), (36, 9), (100, 3)]  # scores are measured there
    assert rungs(27, 100, warmup=10) == [(20, 27), (40, 9), (100, 3)]  # on top of the warm-up
    assert rungs(4, 4, warmup=2) == [(3, 4), (4, 2)]
    assert rungs(16, 81, eta=2, rungs=4) == [(11, 16), (21, 8), (41, 4), (81, 2)]
    assert rungs(5, 9) == [(1, 5), (3, 2), (9, 2)]  # two are trained to their ends
    assert rungs(4, 2, rungs=5) == [(1, 4), (2, 2)]  # no rung below an epoch
    assert rungs(2, 9, rungs=1) == [(9, 2)]


@pytest.mark.parametrize("count", [9, 18, 27, 90])
def test_rungs_cost_at_most_a_third_of_the_grid(count):
    cost, before = 0, 0
    for epochs, candidates in rungs(count, 81):
        cost, before = cost + (epochs - before) * candidates, epochs
    assert cost * 3 <= count * 81


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("changes", "pauses"),
    # in its first epochs, again where it is, and at the end of a stage and inside the next
    [({}, (1, 3, 3)), ({"schedule": {"use": "born_again", "generations": 2}, "teacher": None, "train": {"epochs": 2}}, (1, 2, 3))],
    ids=["offline", "stages"],
)
def test_a_run_that_paused_ends_with_the_bits_of_one_that_did_not(tmp_path, changes, pauses):
    # few checkpoints: a pause makes its own
    path = write(tmp_path, {**merged(BASE, changes), "run": {"log_steps": 1, "checkpoint_epochs": 3}})
    alone = kdkit.train(path, folder=tmp_path / "alone", quiet=True).folder
    job = Run(recipe.load(path), tmp_path / "paused")
    for until in pauses:
        (outcome,) = train_together([job], until=until)
        assert (outcome.reason, outcome.result) == (None, None)
        assert len(epochs(job.folder)) == until
    train_together([job])
    assert_same_run(alone, job.folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """`kdkit search` from start to end: the search, what it found, what it printed."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr("kdkit.study.measurements.LATENCY_RUNS", 3)
        write(folder, BASE, "base.yaml")
        write(folder, SEARCH, "s.yaml")
        cli.app(["search", "s.yaml", "--dry"], standalone_mode=False)
        assert not (folder / "runs").exists()
        cli.app(["search", "s.yaml"], standalone_mode=False)
        wanted = search_plan.load(folder / "s.yaml")
        yield wanted, search.Halved.load(folder / "runs/s/search.json"), printed.getvalue()


def test_the_best_on_validation_go_on_from_where_they_were(done):
    wanted, found, _ = done
    assert [len(rung.scores) for rung in found.rungs] == [4, 2]
    runs = {each.variant: each.folder for each in trainings(wanted.study)}
    assert {name: len(epochs(run)) for name, run in runs.items()} == {name: 4 if name in found.rungs[0].kept else 2 for name in runs}
    for rung, last in zip(found.rungs, (1, 3), strict=True):
        assert rung.scores == {name: epochs(runs[name])[last]["validation"]["top1"] for name in rung.scores}
        best = sorted(rung.scores.values())[-len(rung.kept) :]
        assert sorted(rung.scores[name] for name in rung.kept) == best
    steps = (72 - 24) // 8
    assert (found.steps, found.whole) == (steps * (4 * 2 + 2 * 2), steps * 4 * 4)


def test_the_winner_is_a_recipe(done):
    wanted, found, _ = done
    winner = recipe.load(wanted.path / "winner.yaml")
    assert winner.content() == wanted.study.variants[found.winner].content() and winner.spec.name == "s-winner"


def test_the_command_tells_what_it_would_do_what_it_tried_and_what_the_winner_is_worth(done):
    wanted, found, printed = done
    assert "seed 1 search, seed 0 measure the winner." in printed
    assert printed.count("72 steps, 75% of the 96 of the full grid.") == 2 and f"Chosen: {found.winner}." in printed
    assert found.command == "kdkit search s.yaml"
    study = json.loads((wanted.path / "study.json").read_text())
    assert [(variant["name"], variant["seeds"]) for variant in study["variants"]] == [("as written", [0]), (found.winner, [0])]


def test_the_report_has_a_section(done):
    wanted, found, _ = done
    words, table = sections._search(sections.Material(None, {}, {}, None, found))
    assert f"Chosen: {found.winner}" in words.text and "was not searched" in words.text
    assert [row[0] for row in table.rows][0] == found.winner and len(table.rows) == 4 and table.rows[3][2] == ""


@pytest.mark.slow
def test_the_report_command_shows_it(done):
    wanted, found, _ = done
    home = output.write([wanted.path]).page.parent
    assert "## Search" in (home / "report.md").read_text()
    assert json.loads((home / "report.json").read_text())["search"]["winner"] == found.winner


def test_a_search_that_was_stopped_goes_on(load, monkeypatch):
    wanted, trained = load(), []
    plain = search.train_together

    def stops(jobs, **more):
        if len(trained) == 1:
            raise Interrupted("saved", signal.SIGTERM)
        trained.append(len(jobs))
        return plain(jobs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(search, "train_together", stops)
        with pytest.raises(Interrupted, match="s: stopped in rung 2 of 2; the same command goes on where it was"):
            search.search(wanted)
    monkeypatch.setattr(search, "train_together", lambda jobs, **more: (trained.append(len(jobs)), plain(jobs, **more))[1])
    found = search.search(wanted)
    assert trained == [4, 2]
    # nothing is trained again, and test data choose nothing
    plain_epochs = search._epochs
    monkeypatch.setattr(search, "_epochs", lambda run: ((count, {**line, "test": None}) for count, line in plain_epochs(run)))
    assert search.search(wanted) == found and trained == [4, 2]


def test_a_candidate_that_fails_drops_out_and_of_equal_ones_the_first_is_chosen(load):
    # rates too small to change an answer
    found = search.search(load({"vary": {"train.optimizer.lr": [1e30, 1e-12, 2e-12, 3e-12]}}))
    first, second = found.rungs
    assert list(first.failures) == ["lr 1e+30"] and len({*first.scores.values()}) == 1
    assert (first.kept, second.kept) == (("lr 1e-12", "lr 2e-12"), ("lr 1e-12",))
    assert ["lr 1e+30", "failed", "", ""] in search_table.rows(found)
    assert any(line.startswith("Failed: lr 1e+30: stage ") for line in search_table.sentences(found))


def test_without_a_candidate_that_works_there_is_no_winner(load):
    with pytest.raises(RunError, match="s: no candidate could be trained with every seed: stage"):
        search.search(load({"vary": {"train.optimizer.lr": [1e30, 2e30]}}))


def test_its_seeds_are_not_those_that_measure(load):
    for changes, options, seeds in [
        ({"seeds": 3, "tune_seeds": 2}, {}, ((3, 4), (0, 1, 2))),
        ({"seeds": 3, "tune_seeds": 2}, {"confirm": 5}, ((3, 4), (0, 1, 2, 5, 6))),  # the same search
        ({"seeds": [7], "tune_seeds": [0]}, {}, ((0,), (7,))),
        ({"seeds": [7], "tune_seeds": [0]}, {"confirm": 2}, ((0,), (1, 2))),
        ({}, {"confirm": 0}, ((1,), ())),
    ]:
        wanted = load(changes, **options)
        assert (wanted.study.seeds, wanted.confirm) == seeds


def test_the_winner_is_compared_with_the_base_as_it_is_written(load):
    wanted = load()
    final = wanted.final("weight 2, lr 0.001")
    assert list(final.variants) == ["as written", "weight 2, lr 0.001"] and final.baseline == "as written"
    assert final.variants["as written"].spec.losses[1].weight == 1
    alone = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
    wanted = load({"variants": {"alone": alone, "taught": {}}})
    assert (wanted.baseline, len(wanted.study.variants)) == ("alone", 2 + 4)
    wanted = load({"vary": {"losses.logit_kl.weight": [1, 2], "train.optimizer.lr": [0.1]}})
    assert list(wanted.final("weight 1, lr 0.1").variants) == ["as written"]  # nothing to compare


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": {"extends": "base.yaml", "data": {"validation": None}}}, r"s.yaml:\d+: vary: the search chooses on validation data; set `data.validation`"),
        ({"vary": {"train.epochs": [1, 2]}}, r"s.yaml:\d+: vary.train.epochs: a rung of a search is a number of epochs"),
        ({"tune": {"train.optimizer.lr": [1]}, "vary": None, "variants": {"one": {}, "two": {}}}, "s.yaml:.*: tune: a search halves what `vary` makes"),
        ({"vary": {"losses.logit_kl.weight": [1], "train.optimizer.lr": [0.1]}}, "there is a single candidate; nothing to search"),
        ({"tune_seeds": [0]}, "tune_seeds: 0 is one of the study's own seeds"),
        ({"search": {"eta": 1}}, r"s.yaml:\d+: search.eta: .*2"),
        ({"vary": {"train.optimizer.lr": {"from": 1, "to": 0.1, "draws": 2}}}, "`from` has to be below `to`"),
        ({"vary": {"train.optimizer.lr": {"from": 0, "to": 0.1, "draws": 2, "scale": "log"}}}, "a range on a log scale begins above 0"),
        ({"vary": {"train.optimizer.lr": {"from": 0, "to": 0.1, "drawn": 2}}}, "s.yaml:.*: vary.train.optimizer.lr.draw"),
        ({"vary": {"train.optimizer.lr": 0.1}}, "s.yaml:.*: vary.train.optimizer.lr: .*list"),
        (
            {"vary": {"losses.logit_kl.weight": {"from": 0, "to": 1, "draws": 2}, "train.optimizer.lr": {"from": 0, "to": 0.1, "draws": 3}}},
            "s.yaml:.*: vary.train.optimizer.lr: 3 draws, but 2 of losses.logit_kl.weight; ranges are drawn together",
        ),
        ({"vary": {"losses.logit_kl.weight": {"from": -2, "to": -1, "draws": 2}}}, r"s.yaml:\d+: losses.1.weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_told_in_a_line(load, changes, says):
    with pytest.raises(RecipeError, match=says):
        load(changes)


def test_a_recipe_is_no_search(load, tmp_path):
    load()
    with pytest.raises(RecipeError, match="base.yaml: a search takes a study file, with `vary:`"):
        search_plan.load(tmp_path / "base.yaml")


def test_candidates_of_other_lengths_have_no_rungs_in_common(load):
    stages = {"teacher": None, "schedule": {"use": "born_again", "generations": 2}}
    wanted = load(
        {"variants": {"twice": stages, "once": {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}}}
    )
    with pytest.raises(RecipeError, match=r"all candidates need the same number of epochs, as a rung is one: once.* has 4, twice.* has 8"):
        wanted.check()


def test_ranges_are_drawn_together_and_always_alike(load):
    changes = {
        "vary": {
            "losses.logit_kl.weight": {"from": 0.1, "to": 10, "scale": "log", "draws": 4},
            "train.optimizer.lr": {"from": 0.0, "to": 0.4, "draws": 4},
            "losses.logit_kl.temperature": [1, 4],
        }
    }
    variants = load(changes).study.variants
    assert list(variants) == list(load(changes).study.variants) and len(variants) == 4 * 2
    specs = [one.spec for one in variants.values()]
    weights = sorted({spec.losses[1].weight for spec in specs})
    assert len(weights) == 4
    # one in each quarter of the range, on its scale
    assert [int((torch.tensor(value).log10() + 1) * 2) for value in weights] == [0, 1, 2, 3]
    assert sorted(int(rate * 10) for rate in {spec.train.optimizer.lr for spec in specs}) == [0, 1, 2, 3]
    assert len({(spec.losses[1].weight, spec.train.optimizer.lr) for spec in specs}) == 4


def test_a_comparison_takes_ranges_too(load, tmp_path):
    load({"vary": {"losses.logit_kl.weight": {"from": 1, "to": 2, "draws": 3}}})
    assert len(loading.load([tmp_path / "s.yaml"]).variants) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_search_goes_on_with_the_same_bits(load, tmp_path, number):
    base = merged(PLAIN, {"data": {"validation": 16, "augment": {"flip": 0.5}}, "train": {"epochs": 12}})
    write(tmp_path, base, "base.yaml")
    wanted = load({"search": {"eta": 2, "rungs": 3}})
    command = Command(tmp_path, "search", "s.yaml", "--confirm", "0")
    logged = tmp_path / "runs/s-search"
    # in the second rung
    command.wait_for(lambda: sum(path.read_text().count('"epoch"') for path in logged.glob("*/metrics.jsonl")) > 4 * 3 * (4 + 2))
    command.send(number)
    code, said = command.finish()
    assert code == (128 + number if number == signal.SIGTERM else -number) and not (tmp_path / "runs/s/search.json").exists()
    assert number == signal.SIGKILL or "the same command goes on where it was" in said
    found = search.search(wanted)
    (tmp_path / "runs").rename(tmp_path / "stopped")
    assert search.search(wanted) == found
    ended = [path.parent for path in logged.glob("*/result.json")]
    assert len(ended) == 2
    for run in ended:
        assert_same_run(run, tmp_path / "stopped" / run.relative_to(tmp_path / "runs"))
