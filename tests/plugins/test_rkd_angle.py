import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

RKD = registry.load().losses["rkd_angle"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((3,), (3,)), ((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5)), ((1,), (5,))]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def loss():
    return RKD(RKD.Options(layers=PAIR))


def formula(loss, student, teacher, batch):
    """Every vertex by itself, from unit differences; a side of length 0 has cosine 0 with all others."""
    n, total = len(batch.classes), 0 * student.features["a"].sum()
    for i in range(n):
        cosines = []
        for f in (student.features["a"].flatten(1), teacher.features["b"].flatten(1)):
            sides = [f[j] - f[i] for j in range(n)]
            sides = torch.stack([side / side.norm() if side.any() else 0 * side for side in sides])
            cosines.append(sides @ sides.T)
        gap = (cosines[0] - cosines[1]).abs()
        total = total + torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum()
    return total / n**3


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_is_the_formula(size, shapes):
    assert_agrees(loss(), formula, *answers(*shapes, size))


@pytest.mark.parametrize("size", [64, 80])
def test_is_the_formula_on_usual_batches(size):
    """80 samples need two chunks."""
    assert_agrees(loss(), formula, *answers((3,), (5,), size))


def test_is_the_formula_far_from_the_origin_and_with_an_outlier():
    student, teacher, batch = answers((6,), (5,), 8)
    far = kdkit.Outputs(student.logits, {"a": torch.cat([40 * student.features["a"][:1], student.features["a"][1:]]) + 300})
    assert_agrees(loss(), formula, far, teacher, batch)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-4])
def test_is_the_formula_for_close_neighbours(distance):
    """Where a Gram matrix in single precision has lost all digits."""
    student, teacher, batch = answers((16,), (5,), 6)
    f = student.features["a"]
    near = kdkit.Outputs(student.logits, {"a": torch.cat([f[:1], f[:1] + distance * f[1:2], f[2:]])})
    assert_agrees(loss(), formula, near, teacher, batch)


def test_a_right_angle_against_an_equilateral_triangle():
    """Cosines 0, 1/sqrt 2, 1/sqrt 2 against 1/2 thrice, each triplet in two orders; the other 21 of 27 agree."""
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3)
    value = loss()(kdkit.Outputs(student, {"a": student}), kdkit.Outputs(teacher, {"b": teacher}), random_batch(3))
    assert value.item() == pytest.approx((0.5**2 + 2 * (0.5**0.5 - 0.5) ** 2) / 27)


def test_neither_scale_nor_place_nor_turns_matter():
    student, teacher, batch = answers((6,), (6,), 8)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    alike = kdkit.Outputs(teacher.logits, {"b": 5 * student.features["a"] @ turn - 3})
    assert loss()(student, alike, batch).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("size", [1, 2])
def test_fewer_than_three_samples_give_nothing(size):
    student, teacher, batch = answers((3,), (5,), size)
    f = student.features["a"].requires_grad_()
    value = loss()(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and f.grad.abs().max() < 1e-6
    assert size == 2 or (value.item() == 0 and not f.grad.any())


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_have_a_bounded_gradient(dtype, rounding):
    student, teacher, batch = answers((16,), (5,), 6)
    f = student.features["a"]
    f = torch.cat([f[:1], f[:1] * (1 + rounding), f[2:]]).to(dtype).requires_grad_()
    value = loss()(kdkit.Outputs(student.logits, {"a": f}), teacher.map(lambda x: x.to(dtype)), batch)
    value.backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 10
    if not rounding:
        exact = formula(None, kdkit.Outputs(f, {"a": f.detach().double()}), teacher.map(torch.Tensor.double), batch)
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_gradient_of_a_scaled_sum_reaches_two_layers():
    """The hand-written backward multiplies by what comes from above."""
    student, teacher = random_outputs({"a": (3,), "c": (4,)}), random_outputs({"b": (5,), "d": (2,)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    slopes = []
    for chosen, weight in ((layers, 6.0), (layers[:1], 3.0), (layers[1:], 3.0)):
        learning = student.map(lambda x: x.clone().requires_grad_())
        (weight * RKD(RKD.Options(layers=chosen))(learning, teacher, random_batch())).backward()
        slopes.append({name: x.grad for name, x in learning.features.items()})
    torch.testing.assert_close(slopes[0]["a"], slopes[1]["a"])
    torch.testing.assert_close(slopes[0]["c"], slopes[2]["c"])


@pytest.mark.parametrize("shapes", SHAPES[:4])
def test_gradient(shapes):
    student, teacher, batch = answers(*shapes, 5)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss()(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


def test_refuses_a_second_derivative():
    student, teacher, batch = answers((3,), (5,), 5)
    f = student.features["a"].requires_grad_()
    value = f.sum() * loss()(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    (slope,) = torch.autograd.grad(value, f, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize(("size", "width"), [(128, 4096), (512, 8)])
def test_memory_is_that_of_a_few_gram_matrices(size, width):
    student, teacher, batch = answers((width,), (5,), size)
    f = student.features["a"].requires_grad_()
    with Largest() as largest:
        value = loss()(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
        value.backward()
    assert largest.numbers <= max(2**20, size * width) < size**2 * max(width, size) / 8
    assert value.isfinite() and f.grad.isfinite().all()


def test_a_batch_of_512_is_the_mean_of_its_vertices():
    """The naive form takes a vertex at a time here too, without gradient."""
    student, teacher, batch = answers((8,), (5,), 512)
    total = 0.0
    for i in range(512):
        sides = [torch.nn.functional.normalize((f - f[i]).double(), dim=1) for f in (student.features["a"], teacher.features["b"])]
        total += torch.nn.functional.smooth_l1_loss(*(side @ side.T for side in sides), reduction="sum").item()
    assert loss()(student, teacher, batch).item() == pytest.approx(total / 512**3, rel=1e-5)


def test_refuses_another_number_of_samples():
    student, teacher = random_outputs({"a": (3,)}), random_outputs({"b": (3,)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'b' \(4, 3\)"):
        loss().setup(student, teacher)
