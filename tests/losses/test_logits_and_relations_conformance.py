"""What every logit and relation loss promises: one set of tests over all of them."""

import pytest
import torch

from understudy.errors import ModelError
from understudy.losses.class_priors import class_prior, class_prior_table
from understudy.losses.contrast import ContrastMemory, crd
from understudy.losses.logits import dist, dkd, kl, mse_logits, standardized_kl, top_k_kl
from understudy.losses.relations import (
    correlation_congruence,
    pkt,
    rkd,
    similarity_preserving,
)

WIDTH = 6


def labels_of(rows):
    return torch.arange(len(rows)) * 5 % WIDTH


def priors(student, teacher):
    table = class_prior_table(teacher, labels_of(teacher), num_classes=WIDTH, temperature=2.0)
    return class_prior(student, table, labels_of(student), temperature=2.0)


def top_three(student, teacher):
    values, indices = teacher.topk(min(3, teacher.shape[1]), dim=1)
    return top_k_kl(student, values, indices, temperature=2.0)


def contrast(student, teacher):
    torch.manual_seed(11)
    memory = ContrastMemory(20, WIDTH, num_negatives=12)
    memory.log_mean_student.fill_(1.0)
    memory.log_mean_teacher.fill_(2.0)
    return crd(student, teacher, torch.arange(len(student)) * 2, memory, update=False)


LOGIT_LOSSES = {
    "kl": lambda s, t: kl(s, t, temperature=3.0),
    "dkd": lambda s, t: dkd(s, t, labels_of(s)),
    "dist": lambda s, t: dist(s, t, temperature=2.0),
    "standardized_kl": standardized_kl,
    "mse_logits": mse_logits,
    "class_prior": priors,
    "top_k_kl": top_three,
}
RELATION_LOSSES = {
    "similarity_preserving": similarity_preserving,
    "rkd": rkd,
    "pkt": pkt,
    "correlation_congruence": correlation_congruence,
}
LOSSES = {**LOGIT_LOSSES, **RELATION_LOSSES, "crd": contrast}
# Neither compares the student with the teacher's output of the same image alone.
NOT_ZERO_BETWEEN_EQUALS = {"class_prior", "crd"}


def rows(num_rows, seed, scale=2.0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator, dtype=torch.float64) * scale


def loss_and_gradient(name, student, teacher):
    student = student.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.shape == ()
    assert loss.isfinite()
    assert gradient.isfinite().all()
    return loss, gradient


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss(name):
    student, teacher = rows(5, 0).requires_grad_(), rows(5, 1)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), (student,))


@pytest.mark.parametrize("name", LOSSES)
def test_zero_between_equals_and_positive_otherwise(name):
    teacher = rows(5, 2)
    assert LOSSES[name](rows(5, 3), teacher) > 1e-3
    if name not in NOT_ZERO_BETWEEN_EQUALS:
        loss, gradient = loss_and_gradient(name, teacher, teacher)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"crd"}))
def test_the_teacher_gets_no_gradient(name):
    teacher = rows(4, 4).requires_grad_()
    LOSSES[name](rows(4, 5).requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = rows(5, 6).to(dtype), rows(5, 7).to(dtype)
    expected, _ = loss_and_gradient(name, student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = loss_and_gradient(name, student, teacher)
        in_float32, _ = loss_and_gradient(name, student.float(), teacher.float())
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(loss, expected)
    assert torch.equal(in_float32, expected)
    exact, _ = loss_and_gradient(name, student.double(), teacher.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_the_smallest_batches(name, num_rows):
    loss_and_gradient(name, rows(num_rows, 8).float(), rows(num_rows, 9).float())
    if name in {"similarity_preserving", "pkt", "correlation_congruence", "rkd"} and num_rows == 1:
        loss, gradient = loss_and_gradient(name, rows(1, 8), rows(1, 9))
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-12


EXTREMES = {
    "huge": torch.tensor([[1e4, -1e4, 0, 3, 2, 1]]).repeat(4, 1)
    * torch.tensor([[1], [-1], [1], [2]]),
    "zeros": torch.zeros(4, WIDTH),
    "one constant": torch.full((4, WIDTH), 1e4),
    "a constant each": torch.tensor([[0.1], [0.2], [-3.3], [1e4]]).repeat(1, WIDTH),
    "the same image": rows(1, 10).float().repeat(4, 1),
    "tiny": rows(4, 11, scale=1e-20).float(),
    "large": rows(4, 11, scale=1e6).float(),
    "largest of float16": torch.eye(WIDTH)[:4] * 65504,
    "usual": rows(4, 12).float(),
}


@pytest.mark.parametrize("student", EXTREMES)
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_values_give_finite_losses_and_gradients(name, student):
    for teacher in EXTREMES.values():
        _, gradient = loss_and_gradient(name, EXTREMES[student], teacher)
        # Constants have no direction; rounding must not give them a steep one.
        if name in {"dist", "standardized_kl"} and "constant" in student:
            assert not gradient.any()


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_logits_of_other_classes_are_refused(name):
    with pytest.raises(ModelError, match=r"\(3, 7\)") as caught:
        LOGIT_LOSSES[name](torch.zeros(3, 7), torch.zeros(4, WIDTH))
    assert "(4, 6)" in str(caught.value) or "(4, 3)" in str(caught.value) or name == "class_prior"


@pytest.mark.parametrize("name", [*RELATION_LOSSES, "crd"])
def test_other_batch_sizes_are_refused(name):
    with pytest.raises(ModelError, match=r"\(3, 6\).*\(4, 6\)"):
        LOSSES[name](torch.zeros(3, WIDTH), torch.zeros(4, WIDTH))


@pytest.mark.parametrize("name", RELATION_LOSSES)
def test_relations_take_other_widths_and_maps(name):
    student, teacher = rows(5, 13), rows(5, 14, width=24)
    flat = RELATION_LOSSES[name](student, teacher)
    maps = RELATION_LOSSES[name](student.view(5, 3, 2), teacher.view(5, 6, 2, 2))
    assert torch.equal(flat, maps)
    with pytest.raises(ModelError, match=r"\(5,\).*\(5, 24\)"):
        RELATION_LOSSES[name](torch.zeros(5), teacher)


@pytest.mark.parametrize("name", RELATION_LOSSES)
def test_relations_ignore_scale_and_the_order_of_images(name):
    student, teacher = rows(6, 15), rows(6, 16)
    loss = RELATION_LOSSES[name](student, teacher).item()
    assert RELATION_LOSSES[name](student * 1e3, teacher / 7).item() == pytest.approx(loss, rel=1e-9)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert RELATION_LOSSES[name](student[order], teacher[order]).item() == pytest.approx(loss)
    rotation, _ = torch.linalg.qr(rows(WIDTH, 17))
    assert RELATION_LOSSES[name](student @ rotation, teacher).item() == pytest.approx(loss)
