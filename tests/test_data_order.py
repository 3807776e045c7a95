"""Replicas of the order of rows: the same company in each batch, every row once an epoch, a Latin square."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.config import ConfigError, parse
from mtl.data.mix import Mix, Order
from mtl.output import provenance

MANY = st.lists(st.integers(1, 30), min_size=1, max_size=4)
EPOCHS = st.sampled_from(["first", "all"])


def mix(sizes: list[int], examples: int = 6, order: Order | None = None) -> Mix:
    return Mix([f"t{k}" for k in range(len(sizes))], sizes, sizes, examples, 3, order)


def draws(made: Mix, steps: int) -> list[list[tuple[int, int]]]:
    return [
        list(zip(*map(np.ndarray.tolist, made.batch(step)), strict=True)) for step in range(steps)
    ]


def rows_of(made: Mix, k: int, steps: int) -> list[int]:
    """A task's rows in the order they are drawn."""
    return [row for one in draws(made, steps) for task, row in one if task == k]


@st.composite
def orders(draw: st.DrawFn, scheme: st.SearchStrategy[str]) -> Order:
    of = draw(st.integers(1, 5))
    steps = draw(st.integers(1, 40))
    window = draw(st.integers(1, 12))
    return Order(draw(scheme), draw(st.integers(0, of - 1)), of, draw(EPOCHS), window, steps)


@settings(deadline=None)
@given(MANY, orders(st.sampled_from(["rotate", "shuffle"])))
def test_the_same_tasks_stand_in_each_batch(sizes, order):
    for step in range(12):
        one, other = mix(sizes).batch(step)[0], mix(sizes, order=order).batch(step)[0]
        assert one.tolist() == other.tolist()


@settings(deadline=None)
@given(MANY, orders(st.sampled_from(["rotate", "shuffle"])))
def test_an_epoch_of_a_task_is_every_row_once(sizes, order):
    made = mix(sizes, examples=sum(sizes), order=order)
    for step in range(3):
        assert sorted(draws(made, 3)[step]) == sorted(
            (k, row) for k, n in enumerate(sizes) for row in range(n)
        )


@settings(deadline=None)
@given(MANY, orders(st.just("batch")))
def test_whole_batches_change_places_within_the_run(sizes, order):
    one, other = draws(mix(sizes), order.steps + 3), draws(mix(sizes, order=order), order.steps + 3)
    assert Counter(map(tuple, one)) == Counter(map(tuple, other))
    assert one[order.steps :] == other[order.steps :]
    for start in range(0, order.steps, order.window):
        here = slice(start, min(start + order.window, order.steps))
        assert Counter(map(tuple, one[here])) == Counter(map(tuple, other[here]))
        if start and order.epochs == "first":
            assert one[here] == other[here]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2))
def test_rotations_are_a_latin_square(n, of, epoch):
    """Replica i's first part of an epoch, the rows from i n // K to (i + 1) n // K, is in no other's."""
    early = []
    for i in range(of):
        made = mix([n], examples=n, order=Order("rotate", i, of, "all"))
        early += draws(made, epoch + 1)[epoch][: (i + 1) * n // of - i * n // of]
    assert sorted(row for _, row in early) == list(range(n))
    if n % of == 0:
        places = [
            draws(mix([n], n, Order("rotate", i, of, "all")), epoch + 1)[epoch] for i in range(of)
        ]
        for p in range(n):
            assert len({rows[p] for rows in places}) == of


@settings(deadline=None)
@given(MANY, orders(st.sampled_from(["rotate", "shuffle", "batch"])))
def test_a_batch_depends_on_its_number_alone(sizes, order):
    made, again = mix(sizes, order=order), mix(sizes, order=order)
    backwards = [again.batch(step)[1].tolist() for step in reversed(range(12))]
    assert [made.batch(step)[1].tolist() for step in range(12)] == backwards[::-1]


@pytest.mark.parametrize("scheme", ["rotate", "shuffle", "batch"])
def test_replicas_differ_and_later_epochs_only_if_asked(scheme):
    order = Order(scheme, 0, 3, "first", window=10, steps=30)
    seen = {
        i: draws(mix([20, 40], order=replace(order, replica=i)), 30) for i in range(3)
    }  # 10 batches an epoch
    assert len({str(one[:10]) for one in seen.values()}) == 3
    assert len({str(one[10:]) for one in seen.values()}) == 1
    everywhere = draws(mix([20, 40], order=replace(order, replica=1, epochs="all")), 30)
    assert everywhere[:10] == seen[1][:10] and everywhere[10:] != seen[1][10:]


def test_the_first_rotation_is_the_one_order():
    order = Order("rotate", 0, 4, "all")
    assert draws(mix([7, 11], order=order), 9) == draws(mix([7, 11]), 9)


def test_a_replica_that_is_not_there():
    with pytest.raises(ConfigError, match="train.order.replica: found 2, wanted 0 to 1"):
        parse("""
            model: {name: x}
            tasks: {a: {train: x, validation: x, format: text}}
            train: {steps: 5, order: {scheme: rotate, replica: 2, of: 2}}
            output: x
        """)


@pytest.mark.parametrize(
    ("scheme", "grows"), [("rotate", True), ("shuffle", True), ("batch", False)]
)
def test_a_run_may_grow_where_its_order_does_not_depend_on_its_length(scheme, grows):
    order = f"order: {{scheme: {scheme}, replica: 0, of: 2}}"
    config = parse(
        "{model: {name: m}, tasks: {a: {train: x, validation: x, format: text}}, output: o, "
        f"train: {{steps: 5, {order}}}}}"
    )
    one, other = (provenance.identity(config, [], steps) for steps in (5, 9))
    assert (one["train.order"] == other["train.order"]) is grows
