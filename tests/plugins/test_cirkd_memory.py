import copy
import sys
from collections import deque
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from naive_maps import convolved, normalised, resized
from naive_pixels import CLASSES, LARGER, OTHER, SAME, SMALLER, kl, label_at, masks, set_up, unit
from training import forked

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_outputs

CIRKD = registry.load().losses["cirkd_memory"]
MODULE = sys.modules[CIRKD.__module__]
ALL = {"pixels_per_image": 99, "pixel_rows": 300, "region_rows": 20, "pixel_contrast": 300 * CLASSES, "region_contrast": 20 * CLASSES}
"""Queues that remember every pixel and forget none in a test: nothing is drawn."""


def cirkd(shapes=OTHER, **options):
    return set_up(CIRKD, shapes, **{**ALL, **options})


def places_of(labels, k, size):
    return [(i, j) for i in range(size[0]) for j in range(size[1]) if label_at(labels, i, j, size) == k]


def vectors_of(f_t, batch):
    """Every pixel and every region of a batch, by class: two lists of vectors."""
    pixels, regions = [], []
    for k in range(CLASSES):
        for image, labels in zip(f_t, batch.labels, strict=True):
            own = [unit(image[:, i, j]) for i, j in places_of(labels, k, image.shape[1:])]
            pixels += own
            regions += [unit(torch.stack(own).mean(0))] if own else []
    return pixels, regions


def remembered(queue):
    """The vectors that were written to a queue."""
    rows = queue.rows[:-1].view(CLASSES, queue.length, -1)
    return [row for of_class, count in zip(rows, queue.added, strict=True) for row in of_class[:count]]


def formula(loss, student, teacher, batch):
    """Pixel by pixel, against what was remembered before and all of this batch."""
    f_t, (part,), options = teacher.features["b"], loss.parts, loss.options
    first, norm, _, last = part.projector
    f_s = resized(convolved(normalised(convolved(student.features["a"], first), norm).clamp(min=0), last), f_t.shape[2:])
    size, total, count = f_t.shape[2:], 0, 0
    both = [
        torch.stack([*remembered(queue), *new]).detach()
        for queue, new in zip((part.pixels, part.regions), vectors_of(f_t, batch), strict=True)
    ]
    for n, labels in enumerate(batch.labels):
        for i, j in [place for k in range(CLASSES) for place in places_of(labels, k, size)]:
            s, t = unit(f_s[n, :, i, j]), unit(f_t[n, :, i, j])
            terms = [kl(columns @ t / options.temperature, columns @ s / options.temperature) for columns in both]
            total, count = total + options.pixels * terms[0] + options.regions * terms[1], count + 1
    return total / count


@pytest.mark.parametrize(
    ("shapes", "options"),
    [(SAME, {}), (OTHER, {"temperature": 1.0, "pixels": 0.3}), (SMALLER, {"regions": 2.0}), (LARGER, {})],
    ids=str,
)
def test_is_the_formula(shapes, options):
    """On the second batch."""
    loss, student, teacher, batch = cirkd(shapes, **options)
    loss(student.map(lambda f: f.flip(0)), teacher.map(lambda f: -f), batch)
    assert_agrees(loss, formula, student, teacher, masks(2, seed=1))


def test_a_queue_is_a_ring_for_each_class():
    """With more than it is long, and with nothing, at once."""
    torch.manual_seed(0)
    queue, expected = MODULE.Queue(3, 5, 2), [deque(maxlen=5) for _ in range(3)]
    for count in (1, 2, 4, 3):
        vectors, is_there = torch.randn(4, 3, count, 2), torch.rand(4, 3, count) < torch.tensor([[[0.0], [0.4], [1.0]]])
        queue.add(vectors, is_there)
        for image in range(4):
            for k in range(3):
                expected[k].extend(map(tuple, vectors[image, k][is_there[image, k]].tolist()))
        for k, held in enumerate(expected):
            rows = [tuple(row) for row in queue.rows[5 * k : 5 * k + 5].tolist()]
            first = int(queue.added[k]) % 5 if queue.added[k] > 5 else 0
            assert [*rows[first:], *rows[:first]][: len(held)] == [*held]
        assert not queue.rows[-1].any()


def test_rows_are_drawn_of_all_classes_and_only_written_ones():
    queue = MODULE.Queue(3, 8, 1)
    queue.add(torch.arange(1.0, 25).view(1, 3, 8, 1), torch.arange(8) < torch.tensor([[[8], [3], [0]]]))
    torch.manual_seed(0)
    drawn = torch.zeros(8)
    for _ in range(400):
        rows, silent = queue.draw(14)  # five of each
        of_class = [row[~flag].flatten().tolist() for row, flag in zip(rows.split(5), silent.split(5), strict=True)]
        assert len({*of_class[0]}) == 5 and {*of_class[0]} <= {*range(1, 9)}
        assert sorted(of_class[1]) == [9, 10, 11] and of_class[2] == []
        drawn[[int(value) - 1 for value in of_class[0]]] += 1
    assert (drawn / 400 - 5 / 8).abs().max() < 0.1


def test_pixels_are_drawn_among_those_of_the_class():
    """All of them alike often, without repetition; also of the largest class that a mask can tell."""
    labels = torch.tensor([[254, 0, 255, 254, 0, 254, 254, 255]])
    counts = torch.zeros(1, 255, dtype=torch.long)
    counts[0, 0], counts[0, 254] = 2, 4
    torch.manual_seed(0)
    drawn = torch.zeros(8)
    for _ in range(400):
        places = MODULE.places(labels, counts, 3)[0]
        assert sorted(places[0, :2].tolist()) == [1, 4] and len({*places[254].tolist()}) == 3
        drawn[places[254]] += 1
    assert torch.equal(drawn.nonzero()[:, 0], torch.tensor([0, 3, 5, 6]))
    assert (drawn[drawn > 0] / 400 - 3 / 4).abs().max() < 0.1


def test_of_an_image_a_number_of_pixels_of_each_class_is_remembered():
    loss, student, teacher, batch = cirkd(pixels_per_image=2)
    loss(student, teacher, batch)
    (part,), (pixels, regions) = loss.parts, vectors_of(teacher.features["b"], batch)
    size = (4, 6)
    there = [[len(places_of(labels, k, size)) for k in range(CLASSES)] for labels in batch.labels]
    assert part.pixels.added.tolist() == [sum(min(image[k], 2) for image in there) for k in range(CLASSES)]
    assert part.regions.added.tolist() == [sum(image[k] > 0 for image in there) for k in range(CLASSES)]
    torch.testing.assert_close(torch.stack(remembered(part.regions)), torch.stack(regions))
    known = torch.stack(pixels)
    assert all((known - row).norm(dim=1).min() < 1e-6 for row in remembered(part.pixels))


def test_in_eval_mode_nothing_is_remembered_and_empty_queues_say_nothing():
    loss, student, teacher, batch = cirkd()
    before, f = copy.deepcopy(loss.eval().state_dict()), student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value == 0 and not f.grad.any()
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_without_a_pixel_that_counts_it_is_zero_and_nothing_is_remembered():
    loss, student, teacher, batch = cirkd()
    loss(student, teacher, batch)
    before, f = copy.deepcopy(loss.state_dict()), student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, replace(batch, labels=torch.full_like(batch.labels, 255)))
    value.backward()
    assert value == 0 and not f.grad.any()
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items() if "rows" in name or "added" in name)


def two_steps(rank, world, folder):
    """Two batches of four on `world` processes, each with random numbers of its own; what they remember."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    share, states = slice(rank * 4 // world, (rank + 1) * 4 // world), {}
    for name, count in (("all", 99), ("drawn", 1)):
        loss = cirkd(pixels_per_image=count)[0]
        torch.manual_seed(rank)
        for step in range(2):
            student, teacher = (
                random_outputs({name: shape}, size=4, seed=step, classes=CLASSES) for name, shape in zip("ab", OTHER, strict=True)
            )
            batch = masks(4, seed=step).map(lambda x: x[share])
            loss(student.map(lambda f: f[share]), teacher.map(lambda f: f[share]), batch)
        states[name] = {key: x.clone() for key, x in loss.named_buffers() if "projector" not in key}
    torch.save(states, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_remember_the_same_and_what_one_would(tmp_path):
    processes = [forked(two_steps, rank, 2, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    two_steps(0, 1, tmp_path)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name in ("all", "drawn"):
        for key, x in first[name].items():
            assert torch.equal(x, second[name][key]), (name, key)
            assert "added" not in key or torch.equal(x, one[name][key]), (name, key)
    # where all pixels are remembered, only their order is drawn
    for key in ("parts.0.pixels.rows", "parts.0.regions.rows"):
        whole, parts = (torch.stack(sorted(state["all"][key], key=torch.Tensor.tolist)) for state in (one, first))
        torch.testing.assert_close(parts, whole)


def test_refuses_a_single_position():
    with pytest.raises(kdkit.ShapeError, match="has one position"):
        cirkd(((3, 4, 4), (5, 1, 1)))
