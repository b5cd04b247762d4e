import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from training import forked, train

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

CRD = registry.load().losses["crd"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((6,), (6,)), ((6,), (10,)), ((6, 4, 4), (10, 2, 2)), ((9, 6), (10, 4, 4))]


def crd(student=(6,), teacher=(10,), size=6, labels=None, layers=PAIR, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = CRD(CRD.Options(layers=layers, **{"negatives": 8, "size": 4, **options}))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    labels = torch.arange(70) % 5 if labels is None else labels
    torch.manual_seed(0)
    loss.setup(f_s, f_t, context(labels))
    return loss, f_s, f_t, random_batch(size)


def context(labels):
    return kdkit.Context(torch.nn.Identity(), torch.nn.Identity(), 5, len(labels), labels)


def drawn_by_row(self, own):
    """What `draw` gives, for each image from a seed of its own, so that it hangs neither on the batch nor on earlier draws."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for row in own:
            torch.manual_seed(int(row))
            rows.append(draw(self, row[None]))
    return torch.cat(rows)


draw = CRD.draw


@pytest.fixture
def same_draws(monkeypatch):
    monkeypatch.setattr(CRD, "draw", drawn_by_row)


def embedding(layer, f):
    f = f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))
    v = f @ layer.weight.T + layer.bias
    return v / (v**2).sum(1, keepdim=True).sqrt()


def formula(loss, student, teacher, batch):
    """Image by image, negative by negative; Z is a constant by definition."""
    own, (part,) = loss.rows[batch.index], loss.parts
    negatives, count = loss.draw(own), len(part.student_memory)
    v_s, v_t = embedding(part.student, student.features["a"]), embedding(part.teacher, teacher.features["b"])
    total = 0
    for v, memory, known in ((v_s, part.teacher_memory, part.partition[0]), (v_t, part.student_memory, part.partition[1])):
        scores = []
        for i in range(len(v)):
            rows = [own[i], *negatives[i]]
            scores.append(torch.stack([(v[i] * memory[row] / loss.options.temperature).sum().exp() for row in rows]))
        z = count * (known.exp() if known else torch.cat(scores).mean()).detach()
        noise = loss.options.negatives / count
        for row in scores:
            p = row / z
            total = total - (p[0] / (p[0] + noise)).log() - (noise / (p[1:] + noise)).log().sum()
    return total / len(batch.index)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(same_draws, size, shapes):
    assert_agrees(*with_formula(crd(*shapes, size=size)))


def test_is_the_formula_on_a_usual_batch(same_draws):
    assert_agrees(*with_formula(crd(size=64, negatives=20, temperature=0.2)))


def test_is_the_formula_later_on(same_draws):
    """With memories that have seen something, and the first batch's Z."""
    loss, student, teacher, batch = crd()
    loss(student.map(lambda x: x.flip(0)), teacher, batch)
    assert_agrees(loss, formula, student, teacher, batch)


def with_formula(case):
    loss, student, teacher, batch = case
    return loss, formula, student, teacher, batch


def test_gradient(same_draws):
    """Z, a constant by definition, is that of an earlier batch; in eval mode the memories stay."""
    loss, student, teacher, batch = crd(size=3)
    loss(student, teacher, batch)
    loss, teacher = loss.double().eval(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: 3 * loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_remembers_the_embeddings_after_scoring():
    loss, student, teacher, batch = crd(momentum=0.25)
    (part,), before = loss.parts, copy.deepcopy(loss.parts[0])
    value = loss(student.map(lambda x: x.requires_grad_()), teacher, batch)
    for now, old, layer, f in (
        (part.student_memory, before.student_memory, part.student, student.features["a"]),
        (part.teacher_memory, before.teacher_memory, part.teacher, teacher.features["b"]),
    ):
        expected = old.clone()
        for i, row in enumerate(loss.rows[batch.index]):
            mixed = 0.25 * old[row] + 0.75 * embedding(layer, f)[i].detach()
            expected[row] = mixed / mixed.norm()
        torch.testing.assert_close(now, expected)
        assert not now.requires_grad and (now != old).any(1).sum() == len(batch.index)
    value.backward()  # the memories have changed since; the slope is that of before


def test_of_an_image_that_is_there_twice_the_last_one_is_remembered():
    loss, student, teacher, batch = crd()
    twice = kdkit.Batch(batch.inputs, batch.labels, torch.tensor([7, 3, 7, 7, 9, 3]))
    reference = copy.deepcopy(loss)
    loss(student, teacher, twice)
    last = [3, 5, 4]
    reference(student.map(lambda x: x[last]), teacher.map(lambda x: x[last]), kdkit.Batch(batch.inputs, batch.labels, twice.index[last]))
    torch.testing.assert_close(loss.parts[0].student_memory, reference.parts[0].student_memory)
    torch.testing.assert_close(loss.parts[0].teacher_memory, reference.parts[0].teacher_memory)


def test_the_partition_is_that_of_the_first_batch():
    loss, student, teacher, batch = crd()
    loss(student, teacher, batch)
    first = loss.parts[0].partition.clone()
    loss(student.map(lambda x: 2 * x + 1), teacher, batch)
    assert first.all() and torch.equal(loss.parts[0].partition, first)


def test_in_eval_mode_nothing_is_remembered():
    loss, student, teacher, batch = crd()
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(student, teacher, batch)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_negatives_are_the_images_of_other_classes_alike_often():
    labels = torch.tensor([2, -1, 0, 0, 3, -1, 2, 2, 0, 3, 3, -1])  # no image of class 1
    loss, *_ = crd(labels=labels, negatives=20000)
    index = torch.tensor([2, 6, 4])
    image = {int(row): number for number, row in enumerate(loss.rows) if row >= 0}
    torch.manual_seed(0)
    for own, rows in zip(index, loss.draw(loss.rows[index]), strict=True):
        counts = rows.bincount(minlength=9)
        chosen = {image[row] for row in range(9) if counts[row]}
        assert chosen == {i for i, label in enumerate(labels) if label >= 0 and label != labels[own]}
        assert counts[counts > 0].double() / 20000 == pytest.approx(1 / 6, rel=0.1)


def test_memories_have_a_row_for_each_image_that_is_trained_on():
    loss, *_ = crd(labels=torch.tensor([0, -1, 1, 0, -1, 1]), size=4)
    assert loss.parts[0].student_memory.shape == (4, 4) and sorted(loss.rows.tolist()) == [-1, -1, 0, 1, 2, 3]


def test_memories_have_unit_length_in_the_mean():
    memory = crd(labels=torch.arange(4000) % 5, size=4, negatives=1)[0].parts[0].teacher_memory
    assert memory.square().sum(1).mean().item() == pytest.approx(1, rel=0.05) and memory.abs().max() <= math.sqrt(3 / 4)


def test_several_pairs_are_averaged(same_draws):
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    student, teacher = random_outputs({"a": (3, 4, 4), "c": (6,)}), random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    both = CRD(CRD.Options(layers=layers, negatives=8, size=4))
    both.setup(student, teacher, context(torch.arange(70) % 5))
    alone = []
    for i, layer in enumerate(layers):
        one = CRD(CRD.Options(layers=[layer], negatives=8, size=4))
        one.setup(student, teacher, context(torch.arange(70) % 5))
        one.parts[0].load_state_dict(both.parts[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_is_finite_at_any_temperature(temperature):
    loss, student, teacher, batch = crd(temperature=temperature)
    f = student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_row_of_a_memory_is_gathered_for_a_negative():
    loss, student, teacher, batch = crd(labels=torch.arange(300) % 5, negatives=200, size=16)
    with Largest() as largest:
        loss(student.map(lambda x: x.requires_grad_()), teacher, batch).backward()
    assert largest.numbers == 300 * 16  # a memory; rows of it for each negative would be 6 * 200 * 16


def test_refuses_what_it_cannot_number():
    student, teacher = random_outputs({"a": (6,)}), random_outputs({"b": (10,)})
    loss = CRD(CRD.Options(layers=PAIR))
    with pytest.raises(kdkit.ShapeError, match="numbered images, not of a stream"):
        loss.setup(student, teacher)
    with pytest.raises(kdkit.ShapeError, match="numbered images, not of a stream"):
        loss.setup(student, teacher, context(torch.empty(0, dtype=torch.long)))
    with pytest.raises(kdkit.ShapeError, match="all 3 training images are of one class"):
        loss.setup(student, teacher, context(torch.tensor([2, -1, 2, 2])))


def test_trains_beside_images_that_are_set_aside(tmp_path):
    layers = [{"student": "penultimate", "teacher": "penultimate"}]
    losses = [{"use": "cross_entropy"}, {"use": "crd", "weight": 0.8, "negatives": 16, "layers": layers}]
    result = train(tmp_path, losses=losses, data={"validation": 12})
    assert not [warning for warning in result.warnings if "crd" in warning]


def two_steps(rank, world, folder):
    """Two batches of eight on `world` processes; what each comes to, averaged as a data-parallel trainer does."""
    torch.set_num_threads(1)
    CRD.draw = drawn_by_row
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    loss, *_ = crd(labels=torch.arange(40) % 5)
    share, found = slice(rank * 8 // world, (rank + 1) * 8 // world), {}
    for step in range(2):
        student, teacher = (random_outputs({name: shape}, size=8, seed=step) for name, shape in (("a", (6,)), ("b", (10,))))
        index = torch.tensor([[3, 9, 12, 4, 9, 0, 1, 3], [5, 9, 9, 3, 7, 8, 2, 4]])[step]  # some in both processes
        f = student.features["a"][share].clone().requires_grad_()
        batch = kdkit.Batch(torch.zeros(len(f), 1), torch.zeros(len(f), dtype=torch.long), index[share])
        value = loss(kdkit.Outputs(student.logits[share], {"a": f}), teacher.map(lambda x: x[share]), batch)
        loss.zero_grad()
        value.backward()
        found |= {f"value {step}": value.detach(), f"slope {step}": f.grad}
        found |= {f"{name} {step}": parameter.grad.clone() for name, parameter in loss.named_parameters()}
        found |= {f"{name} {step}": buffer.clone() for name, buffer in loss.parts.named_buffers()}
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    processes = [forked(two_steps, rank, 2, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    original = CRD.draw
    try:
        two_steps(0, 1, tmp_path)
    finally:
        CRD.draw = original
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, whole in one.items():
        if name.startswith("slope"):
            parts = torch.cat([first[name], second[name]]) / 2
        elif "memory" in name or "partition" in name:
            assert torch.equal(first[name], second[name])
            parts = first[name]
        else:
            parts = (first[name] + second[name]) / 2
        torch.testing.assert_close(parts, whole, msg=lambda text, name=name: f"{name}: {text}")
