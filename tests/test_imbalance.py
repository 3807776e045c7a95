"""What the order leaves behind: an effect that was put in is found, and none where there is none."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import toys

from mtl.data.batches import Layout
from mtl.data.encoded import Encoded
from mtl.data.mix import Mix, Order
from mtl.losses import head
from mtl.losses.causal_lm import causal_lm
from mtl.train import imbalance
from mtl.train.imbalance import _ranks, measure, places, row_losses


def replicas(scheme: str, of: int, sizes: list[int], epochs: str = "first") -> list[Mix]:
    steps = -(-sum(sizes) // 4)
    return [
        Mix([f"t{k}" for k in range(len(sizes))], sizes, sizes, 4, 0,
            Order(scheme, i, of, epochs, steps, steps))
        for i in range(of)
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["rotate", "shuffle", "batch"])
def test_places_are_those_of_the_first_epoch(scheme):
    for mix in replicas(scheme, 3, [12, 20]):
        for n, found in zip(mix.sizes, places(mix, 8), strict=True):
            np.testing.assert_allclose(np.sort(found), np.arange(n) / n)
        seen = [row for step in range(8) for k, row in zip(*mix.batch(step), strict=True) if k == 1]
        np.testing.assert_array_equal(np.argsort(places(mix, 8)[1]), seen)


def test_a_row_that_is_never_drawn_has_no_place():
    (found,) = places(Mix(["a"], [8], [1], 2, 0), 3)
    assert np.isnan(found).sum() == 2


def test_rotations_move_every_row_by_the_same_part():
    one, other = (places(mix, 4)[0] for mix in replicas("rotate", 2, [16]))
    np.testing.assert_allclose((one - other) % 1, 0.5)


def test_an_effect_that_was_put_in_is_found():
    """l_m(i) = difficulty(i) + 0.2 place: centred by row over 4 rotations, the difficulty is gone."""
    where = [places(mix, 100)[0] for mix in replicas("rotate", 4, [400])]
    difficulty = np.random.default_rng(0).gamma(2.0, 1.0, 400)
    losses = [difficulty + 0.2 * place for place in where]
    found = measure(losses, where, parts=4)
    np.testing.assert_allclose(found.curve, [-0.075, -0.025, 0.025, 0.075], atol=1e-12)
    assert found.spread == pytest.approx(0.15 / np.mean(losses), rel=1e-9)
    assert found.interval[0] < found.spread < found.interval[1] and found.spearman > 0.9
    merged = measure([difficulty + 0.1], where[:1], np.mean(losses, axis=0), parts=4)
    assert merged.spread == pytest.approx(0, abs=1e-12)


def test_none_is_found_where_there_is_none():
    rng = np.random.default_rng(1)
    where = [places(mix, 100)[0] for mix in replicas("shuffle", 4, [400])]
    found = measure([rng.normal(3, 0.1, 400) for _ in where], where)
    assert abs(found.spearman) < 0.06 and found.spread < 0.03


def test_one_run_alone_cannot_be_centred():
    with pytest.raises(ValueError, match="found one run, wanted several replicas"):
        measure([np.ones(4)], [np.arange(4) / 4])


def test_ranks_share_ties():
    assert _ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_of_each_row(packed, monkeypatch):
    """As one example at a time has it, however rows are laid out."""
    monkeypatch.setattr(imbalance, "AT_ONCE", 4)
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 258, n).astype(np.int32), rng.random(n) < 0.5) for n in range(4, 14)]
    for _, target in rows:
        target[0], target[-1] = False, True
    module = toys.tiny_llama()
    head.install(module)
    engine = SimpleNamespace(device=torch.device("cpu"), evaluate=module, eval=module.eval)
    layout = Layout(1, 0, 48, 257, packed, 24 if packed else None)
    found = row_losses(engine, causal_lm, Encoded.of(rows), layout)
    plain = toys.tiny_llama().eval()
    with torch.no_grad():
        wanted = [
            float(reference.example_loss(plain, ids, target)) / target.sum() for ids, target in rows
        ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
