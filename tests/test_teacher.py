"""The divergence from a teacher: torch's own where all tokens are kept, its closed form above, in slices as in one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from near import near
from test_head import Largest, V, gradients, inputs, llama, lora_on_the_head

from mtl.data.collate import Teacher
from mtl.data.examples import Piece
from mtl.data.next_token import TEACHER, NextToken
from mtl.losses import head, teacher


def random_logits(seed: int, n: int, v: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("v", [2, 63, 64])
def test_where_all_tokens_are_kept_it_is_torchs_own(v):
    theirs, ours = random_logits(0, 5, v), random_logits(1, 5, v).requires_grad_()
    ids, log_p = teacher.summary(theirs)
    assert ids.shape == log_p.shape == (5, v)
    found = teacher.divergence(ours, ids, log_p)
    wanted = F.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    near(found, wanted, units=16)
    scale = torch.linspace(0.5, 2, 5)
    (mine,) = torch.autograd.grad((found * scale).sum(), ours)
    (torchs,) = torch.autograd.grad((wanted * scale).sum(), ours)
    near(mine, torchs, units=16)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])  # 30: the bucket has less than fp32's rounding
def test_above_64_tokens_the_rest_is_one_bucket(scale):
    theirs = random_logits(0, 5, 300, scale)
    ours = (theirs + random_logits(1, 5, 300, 0.5)).requires_grad_()
    ids, log_p = teacher.summary(theirs)
    assert ids.shape == (5, 64) and log_p.shape == (5, 65)
    assert torch.equal(ids[:, 0], theirs.argmax(1))

    def buckets(logits: torch.Tensor) -> torch.Tensor:
        kept = logits.double().softmax(1)
        rest = torch.ones_like(kept).scatter(1, ids, 0.0)
        return torch.cat([kept.gather(1, ids), (kept * rest).sum(1, keepdim=True)], 1)

    p, q = buckets(theirs), buckets(ours.detach())
    torch.testing.assert_close(log_p.double(), p.log(), rtol=1e-5, atol=1e-5)
    found = teacher.divergence(ours, ids, log_p)
    wanted = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), ours)
    closed = ours.detach().double().softmax(1) * (1 - p[:, 64:] / q[:, 64:])
    closed = closed.scatter(1, ids, q[:, :64] - p[:, :64])
    torch.testing.assert_close(gradient.double(), closed, rtol=1e-3, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 200), st.floats(0.01, 40))
def test_it_is_between_0_and_the_whole_divergence(seed, v, scale):
    theirs, ours = random_logits(seed, 3, v, scale), random_logits(seed + 1, 3, v, scale)
    found = teacher.divergence(ours, *teacher.summary(theirs))
    whole = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True)
    assert (found >= -1e-5).all() and (found <= whole.sum(1) * (1 + 1e-4) + 1e-4).all()
    assert (teacher.divergence(theirs, *teacher.summary(theirs)).abs() < 1e-5).all()


def test_a_token_that_neither_allows_counts_nothing():
    theirs = torch.tensor([[0.0, 1.0, -torch.inf]])
    ours = torch.tensor([[0.5, 1.0, -torch.inf]], requires_grad=True)
    found = teacher.divergence(ours, *teacher.summary(theirs))
    p, q = theirs.softmax(1)[0, :2], ours.detach().softmax(1)[0, :2]
    assert float(found.detach()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), ours)
    torch.testing.assert_close(gradient[0], torch.cat([q - p, torch.zeros(1)]))


@pytest.mark.parametrize("make", [llama, lora_on_the_head])
@pytest.mark.parametrize("rows", [1, 5, 10_000])
def test_slices_give_what_full_logits_give(rows, make, monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: rows)
    torch.manual_seed(0)
    model = make()
    rest, targets = inputs()
    n = len(targets.at)
    ids, log_p = teacher.summary(random_logits(7, n, V))
    has = torch.arange(n) % 3 == 0
    targets = targets._replace(teacher=Teacher(has, ids, log_p))
    logits = model(**rest).logits.flatten(0, 1)[targets.at]
    wanted = F.cross_entropy(logits, targets.labels, reduction="none")
    wanted = torch.where(has, teacher.divergence(logits, ids, log_p), wanted)
    head.install(model)
    found = model(**rest, targets=targets).loss
    near(found, wanted, units=16)
    ours, theirs = gradients(model, found), gradients(model, wanted)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm() and theirs.norm() > 0

    with torch.no_grad():
        answer = model(**rest, targets=targets._replace(teacher=None), summarize=True)
    kept, log_probabilities = teacher.summary(logits)
    assert answer.loss is None and torch.equal(answer.logits[0], kept)
    near(answer.logits[1], log_probabilities, units=16)


def test_no_more_logits_than_a_slice_are_ever_made(monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: 4)
    rest, targets = inputs()
    n = len(targets.at)
    ids, log_p = teacher.summary(random_logits(7, n, V)[:, :V])
    taught = Teacher(torch.ones(n, dtype=torch.bool), ids, log_p)
    model = llama()
    head.install(model)
    with Largest() as largest:
        model(**rest, targets=targets._replace(teacher=taught)).loss.sum().backward()
        with torch.no_grad():
            model(**rest, targets=targets, summarize=True)
    assert largest.rows == 4


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_has_each_teachers_word_at_its_own_targets(packed):
    def piece(ids: list[int], target: list[int], stream: int, first: int | None) -> Piece:
        columns = {"ids": np.array(ids, np.int32), "target": np.array(target, np.uint8)}
        if first is not None:
            said = first + np.arange(sum(target), dtype=np.int32)
            columns[TEACHER[0]] = said[:, None] * [1, 10]
            columns[TEACHER[1]] = (said[:, None] * [-0.5, -1, -2]).astype(np.float32)
        return Piece(stream, columns)

    pieces = [
        piece([5, 6, 7], [0, 1, 1], 0, None),
        piece([1, 2, 3, 4], [0, 1, 0, 1], 1, 3),
        piece([8, 9], [0, 1], 1, 8),
    ]
    rows = [[pieces[0], pieces[1]], [pieces[2]]] if packed else [[one] for one in pieces]
    made = NextToken(None, 0).collate(rows, packed=packed, most=0, tokens=64)
    assert made.labels.tolist() == [6, 7, 2, 4, 9]
    assert made.teacher.has.tolist() == [False, False, True, True, True]
    assert made.teacher.ids.tolist() == [[0, 0], [0, 0], [3, 30], [4, 40], [8, 80]]
    assert made.teacher.log_p[2:, 2].tolist() == [-6, -8, -16]
    assert made.teacher.ids.dtype == torch.int64 and made.to("cpu").teacher.has.sum() == 3
    plain = NextToken(None, 0).collate([[pieces[0]]], packed=packed, most=0, tokens=64)
    assert plain.teacher is None
