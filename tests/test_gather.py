"""Two data-parallel processes with half of a batch each give a loss the value and the gradients of one process with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_examples import OPTIONS
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import PATIENCE, forked, task

import kdkit
from kdkit.contracts.task import serves
from kdkit.recipe import registry

LOSSES = registry.load().losses
ROWS, WORLD = 64, 2
TASK = task("classification")
GATHERING = [name for name, cls in LOSSES.items() if "gather" in cls.Options.model_fields and serves(cls.for_tasks(), TASK)]
PAIR = {"layers": [{"student": "b", "teacher": "b"}]}
CASES = {  # by name, a loss and its options
    **{name: (name, {**OPTIONS.get(name, PAIR), "gather": True}) for name in GATHERING},
    "sp, each process for itself": ("sp", PAIR),
    "kdsvd": ("kdsvd", OPTIONS["kdsvd"]),
    "hint": ("hint", {**PAIR, "adapter": "linear"}),
}


class Network(nn.Module):
    """Two tapped convolutions and a classifier."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 3, stride=2, padding=1), nn.Conv2d(width, width + 2, 3, stride=2, padding=1)
        self.classifier = nn.Linear(width + 2, 5)

    def forward(self, images):
        a = self.one(images)
        b = self.two(F.softplus(a))
        return kdkit.Outputs(self.classifier(F.softplus(b).mean((2, 3))), {"a": a, "b": b})


class Learner(nn.Module):
    """A student and a loss in one module, as the engine has them."""

    def __init__(self, student, loss):
        super().__init__()
        self.student, self.loss = student, loss

    def forward(self, teacher, batch, views):
        answer = kdkit.see(self.student, batch.inputs, views)
        return self.loss(answer, teacher, batch) + 0 * answer.logits.sum()  # every parameter has a gradient


def measure(rows, name, options):
    """Value and parameters' gradients of a loss on some rows of the batch, in fp64; data-parallel where there are several processes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(ROWS, 3, 8, 8, dtype=torch.float64, generator=generator)
    batch = kdkit.Batch(images[rows], torch.arange(ROWS)[rows] % 5, torch.arange(ROWS)[rows])
    torch.manual_seed(0)
    student, teacher, loss = Network(4).double(), Network(5).double(), LOSSES[name](LOSSES[name].Options(**options))
    views = {view: kdkit.turned(batch) for view in loss.needs_views}
    with torch.no_grad():
        wanted = kdkit.see(teacher, batch.inputs, views)
        loss.setup(kdkit.see(student, batch.inputs, views), wanted)
    learner = Learner(student, loss.double())
    wrapped = DistributedDataParallel(learner) if dist.is_initialized() else learner
    value = wrapped(wanted, batch, views)
    value.backward()
    return {"value": value.detach(), **{name: weight.grad for name, weight in learner.named_parameters()}}


def gathered(rank):
    """Rows that tell their process; each process weighs all rows in its own way."""
    x = (10.0 * rank + torch.arange(6.0).view(3, 2)).requires_grad_()
    rows = kdkit.gather(x)
    weights = torch.arange(12.0).view(6, 2) ** (rank + 1)
    (slope,) = torch.autograd.grad((rows * weights).sum(), x)
    turned = kdkit.gather(x.detach().T.contiguous().T)  # not contiguous
    return {"rows": rows.detach(), "slope": slope, "numbers": kdkit.gather(torch.tensor([rank, 7])), "turned": turned}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    rows = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    found = {case: measure(rows, *what) for case, what in CASES.items()}
    torch.save({**found, "gather": gathered(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("processes")
    processes = [forked(work, rank, str(folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def differences(parts, case):
    """How far the processes' mean is from the whole batch's result, relative to the largest entry."""
    whole = measure(slice(None), *CASES[case])
    means = {name: sum(part[case][name] for part in parts) / WORLD for name in whole}
    return {name: float((means[name] - x).abs().max() / x.abs().max().clamp_min(1e-9)) for name, x in whole.items()}


@pytest.mark.parametrize("case", [case for case in CASES if "for itself" not in case])
def test_gather_in_two_processes_gives_the_whole_batchs_value_and_gradients(parts, case):
    found = differences(parts, case)
    assert max(found.values()) < 1e-6, found
    for name in set(found) - {"value"}:
        assert torch.equal(*(part[case][name] for part in parts)), name


@pytest.mark.parametrize("name", [name for name in GATHERING if name != "irg"])
def test_gather_gives_every_process_the_same_value(parts, name):
    """But for `irg`, whose vertices are each process's own answers."""
    torch.testing.assert_close(*(part[name]["value"] for part in parts), rtol=1e-12, atol=0)


def test_without_gather_each_process_has_another_loss(parts):
    found = differences(parts, "sp, each process for itself")
    assert found["value"] > 0.01 and found["student.two.weight"] > 0.01


def test_gathered_rows_come_in_the_processes_order(parts):
    own = torch.arange(6.0).view(3, 2)
    for part in parts:
        assert torch.equal(part["gather"]["rows"], torch.cat([own, own + 10]))
        assert torch.equal(part["gather"]["turned"], torch.cat([own, own + 10]))
        assert part["gather"]["numbers"].tolist() == [0, 7, 1, 7]


def test_a_gathered_rows_gradient_is_the_sum_over_all_processes_losses(parts):
    w = torch.arange(12.0).view(6, 2)
    total = w + w**2
    assert torch.equal(torch.cat([part["gather"]["slope"] for part in parts]), total)


def test_one_process_gathers_nothing(tmp_path):
    x = torch.ones(3, 2, requires_grad=True)
    assert kdkit.gather(x) is x
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert kdkit.gather(x) is x
    finally:
        dist.destroy_process_group()
