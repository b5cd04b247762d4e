"""What networks cost, counted by hand, and timed in turns."""

import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import kdkit
from kdkit import cli
from kdkit.models.tapped import TappedModel
from kdkit.students import cost_table, profile
from kdkit.students.profile import Latency, Profile, measure, measure_together
from kdkit.units import hundredths


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))


class Noting(nn.Module):
    """Notes who was called, and takes its time."""

    def __init__(self, name, notes, seconds=0.0):
        super().__init__()
        self.name, self.notes, self.seconds = name, notes, seconds
        self.fc = nn.Linear(12, 2)

    def forward(self, images):
        self.notes.append((self.name, len(images)))
        time.sleep(self.seconds)
        return self.fc(images.flatten(1))


def test_profile_costs_are_those_counted_by_hand(tmp_path):
    module = small()
    found = measure(TappedModel(module), (3, 8, 8), runs=2)
    assert found.parameters == (3 * 4 * 9 + 4) + (4 + 4) + (256 * 5 + 5)
    assert found.macs == 8 * 8 * 4 * 3 * 9 + 256 * 5
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    assert found.bytes == (tmp_path / "net.safetensors").stat().st_size


def test_latency_percentiles_are_nearest_ranks():
    timed = Latency(4, tuple(float(i) for i in range(1, 201)))
    assert [timed.percentile(p) for p in (50, 90, 99, 100)] == [100, 180, 198, 200]
    assert Latency(1, (7.0,)).percentile(50) == Latency(1, (7.0,)).percentile(99) == 7.0
    assert timed.throughput == pytest.approx(4 / 100.5)


def test_models_are_timed_in_turns():
    notes = []
    models = [(TappedModel(Noting(name, notes)), (3, 2, 2)) for name in "ab"]
    found = measure_together(models, (1, 6), runs=8)
    assert [[(t.batch, len(t.seconds)) for t in p.latencies] for p in found] == [[(1, 8), (6, 8)]] * 2
    for batch in (1, 6):
        calls = [name for name, size in notes if size == batch][-2 * (8 + profile.WARM_UP) :]
        pairs = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
        assert pairs == [{"a", "b"}] * (8 + profile.WARM_UP)
        assert {tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)} == {("a", "b"), ("b", "a")}  # each is first by turns


def test_the_slower_model_is_found_slower():
    slow, quick = (TappedModel(Noting(name, [], seconds)) for name, seconds in (("slow", 0.01), ("quick", 0.0)))
    first, second = measure_together([(slow, (3, 2, 2)), (quick, (3, 2, 2))], runs=5)
    assert first.latencies[0].percentile(50) >= 0.01 > second.latencies[0].percentile(50)
    assert second.latencies[0].throughput > first.latencies[0].throughput


def test_profile_is_limited_in_time_but_times_some_answers():
    found = measure(TappedModel(Noting("slow", [], 0.002)), (3, 2, 2), runs=10_000, seconds=0.0)
    assert len(found.latencies[0].seconds) == profile.MIN_RUNS


def test_a_profiled_model_is_as_it_was():
    module = small()
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure(TappedModel(module), (3, 8, 8), runs=2)
    assert module.training and module[0].training and not module[1].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_profile_of_images_that_do_not_fit_is_told():
    with pytest.raises(kdkit.ModelError, match=r"cannot take images \(1, 8, 8\)"):
        measure(TappedModel(small()), (1, 8, 8), runs=1)


def test_profile_restores_the_number_of_threads():
    before = torch.get_num_threads()
    with profile.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.00"), (1234.5, "1,234.50"), (0.731, "0.73"), (0.1, "0.10"), (0.0994, "0.099"), (0.00421, "0.0042"), (2e-7, "0.00000020")],
)
def test_small_numbers_keep_two_digits(number, text):
    assert hundredths(number) == text


def test_profile_table_shows_each_quantity_and_how_it_compares():
    one, two = (Profile(n * 1000, n * 2_000_000, n * 10, (Latency(1, (n / 1000,)),)) for n in (4, 1))
    shown = cost_table.table(["big", "small"], [one, two])
    cells = [list(column.cells) for column in shown.columns]
    assert [c.header for c in shown.columns] == ["", "big", "small"]
    rows = {str(title): (str(one), str(two)) for title, one, two in zip(*cells, strict=True)}
    assert rows["parameters"][0] == "4,000" and rows["parameters"][1].startswith("1,000 ") and "x 0.25" in rows["parameters"][1]
    assert rows["multiply-accumulates per image"][0] == "8.00 M"
    assert rows["batch 1: p50, ms"][0] == "4.00" and "x 4" in rows["batch 1: images/s"][1]


def run_cli(monkeypatch, *words):
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a student with a teacher four times as wide."""
    folder = tmp_path_factory.mktemp("profiled")
    (folder / "r.yaml").write_text(
        "{name: r, data: {dataset: {use: digits}, train_samples: 64}, student: {model: mlp/8}, teacher: {model: mlp/32}, "
        "schedule: {use: offline}, losses: [{use: logit_kl}], train: {epochs: 1, optimizer: {lr: 0.1}, device: cpu}}"
    )
    return kdkit.train(folder / "r.yaml", folder=folder / "r", quiet=True).folder


def test_profile_of_a_run_s_student_beside_its_teacher(run, monkeypatch, capsys):
    assert run_cli(monkeypatch, "profile", run, "mlp/64", "--batch", 3, "--runs", 2, "--threads", 1, "--cpu") == 0
    out = capsys.readouterr().out
    assert "images (1, 8, 8), on cpu, 1 threads" in out
    assert out.splitlines()[1].split() == ["r:", "teacher", "r:", "student", "mlp/64"]
    counts = [64 * n + n + 10 * n + 10 for n in (32, 8, 64)]
    words = next(line for line in out.splitlines() if line.startswith("parameters")).split()
    assert [words[1], words[2], words[5]] == [f"{n:,}" for n in counts]
    assert "batch 3: p99, ms" in out and "batch 1: images/s" in out


def test_profile_of_named_models_takes_size_and_classes():
    first, second = cost_table.subjects(["mlp/4", "timm/resnet18"], "3,32,32", 7, torch.device("cpu"))
    assert first.model(torch.rand(1, 3, 32, 32)).logits.shape == (1, 7)
    assert second.shape == (3, 32, 32) and second.model.module.num_classes == 7


@pytest.mark.parametrize(("words", "says"), [
    (["no/such"], "no/such: no such run folder, and no model source is called 'no'"),
    (["resnet1x"], "timm has no model 'resnet1x'; did you mean"),
    (["mlp/4", "--size", "3,3"], "--size: '3,3' is not of the form C,H,W"),
    (["python/Net"], "python/Net: needs options that only a recipe can give: file: this key is required"),
])  # fmt: skip
def test_profile_of_a_wrong_word_is_one_line(words, says, monkeypatch, capsys):
    assert run_cli(monkeypatch, "profile", *words) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_profile_of_a_folder_that_is_no_run_is_told(tmp_path, monkeypatch, capsys):
    assert run_cli(monkeypatch, "profile", tmp_path) == 2
    assert "no run folder" in capsys.readouterr().err
