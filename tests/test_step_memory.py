"""Memory of a step: what is there at once counts, and what a larger step takes is more."""

import pytest
import torch
from training import write

from kdkit import recipe
from kdkit.study.step_memory import peak_memory, step_memory

MLP = {
    "data": {"dataset": {"use": "digits"}, "train_samples": 100, "batch_size": 50},
    "student": {"model": "mlp/64"},
    "losses": [{"use": "cross_entropy"}],
    "schedule": {"use": "supervised"},
    "train": {"epochs": 1, "optimizer": {"lr": 0.1}},
    "name": "mlp",
}


def test_peak_memory_counts_what_is_there_at_once():
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB

    def run():
        value = (2 * x).exp().sum()  # a factor freed at once, and a result that is kept for backward
        value.backward()
        x.grad = None

    assert peak_memory(run) == pytest.approx(2 * 2**20, rel=0.6)
    assert peak_memory(lambda: [torch.ones(2**18) for _ in range(10)] and None) == pytest.approx(10 * 2**20, rel=0.01)
    assert peak_memory(lambda: [torch.ones(2**18).sum() for _ in range(10)] and None) == pytest.approx(2**20, rel=0.01)


def memory(folder, **changes):
    return step_memory(recipe.load(write(folder, MLP, **changes)), folder / "run")


def test_step_memory_holds_gradients_and_activations(tmp_path):
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    small = memory(tmp_path)
    assert small > 4 * parameters  # its gradients, at least
    assert memory(tmp_path, data={"batch_size": 100}) > small  # though an epoch has one step only
    images = 50 * 64 * 4
    assert small < 4 * parameters * 3 + images * 20


def test_step_memory_counts_a_teacher_too(tmp_path):
    taught = {"schedule": {"use": "offline"}, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}], "teacher": {"model": "mlp/512"}}
    assert memory(tmp_path, **taught) > memory(tmp_path) + 50 * 512 * 4 / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_memory_on_a_gpu_is_the_allocators():
    device = torch.device("cuda")
    kept = torch.ones(2**20, device=device)
    assert peak_memory(lambda: [torch.ones(2**18, device=device) for _ in range(10)] and None, device) == 10 * 2**20
    assert kept.sum() == 2**20
