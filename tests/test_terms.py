"""The loss formula, the objective, the schedule and the collectives without a group: closed forms and properties."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from mtl.data.collate import collate
from mtl.distributed import comm
from mtl.losses import head
from mtl.losses.causal_lm import causal_lm
from mtl.losses.objective import check_terms
from mtl.losses.terms import Terms, combine
from mtl.train.schedule import lr
from mtl.train.step import GlobalBatch, NonFinite, fetch, train_step

K = 4
token = st.tuples(st.floats(2**-7, 20, width=32), st.integers(0, K - 1))
weights_of_all = st.lists(st.floats(0, 100), min_size=K, max_size=K)


def terms_of(tokens: list[tuple[float, int]], k: int = K) -> Terms:
    losses = torch.tensor([loss for loss, _ in tokens], dtype=torch.float32)
    return Terms.by_task(losses, torch.tensor([task for _, task in tokens], dtype=torch.int64), k)


def global_loss(tokens: list[tuple[float, int]], weights: list[float]) -> float:
    own = [[loss for loss, task in tokens if task == k] for k in range(K)]
    return sum(w * sum(mine) / len(mine) for w, mine in zip(weights, own, strict=True) if mine)


def test_terms_by_hand():
    terms = terms_of([(1.0, 0), (2.0, 2), (0.5, 0)], k=3)
    assert terms.sums.tolist() == [1.5, 0.0, 2.0] and terms.counts.tolist() == [2, 0, 1]
    assert terms.sums.dtype == torch.float32 and terms.counts.dtype == torch.int64


def test_combine_by_hand():
    terms = terms_of([(1.0, 0), (2.0, 2), (0.5, 0)], k=3)
    weights, counts = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([4, 0, 2])
    loss = combine(terms, weights, counts, world=2)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(2 * (0.5 * 1.5 / 4 + 0.2 * 2.0 / 2))


def test_combine_has_the_gradient_of_the_formula():
    losses = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    terms = Terms.by_task(losses, torch.tensor([0, 2, 0]), 3)
    combine(
        terms, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([4, 0, 2]), world=2
    ).backward()
    np.testing.assert_allclose(
        losses.grad.numpy(), [2 * 0.5 / 4, 2 * 0.2 / 2, 2 * 0.5 / 4], rtol=1e-6
    )


@given(st.lists(st.tuples(token, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), weights_of_all,
       st.integers(1, 4), st.integers(1, 4))  # fmt: skip
def test_no_cut_changes_the_loss(tokens, weights, world, micros):
    """Summed over micro-batches and averaged over ranks, whatever token lies where, the parts give the global loss."""
    everything = [t for t, _, _ in tokens]
    counts = terms_of(everything).counts
    w = torch.tensor(weights, dtype=torch.float64)
    total = 0.0
    for rank in range(world):
        for micro in range(micros):
            mine = [t for t, r, m in tokens if r % world == rank and m % micros == micro]
            total += combine(terms_of(mine), w, counts, world).item() / world
    assert total == pytest.approx(global_loss(everything, weights), rel=1e-5, abs=1e-9)


@given(st.lists(token, min_size=1, max_size=30), weights_of_all, st.permutations(range(K)))
def test_renaming_tasks_changes_nothing(tokens, weights, order):
    """Task k becomes order[k]: sums, counts and weights go along, the loss stays."""
    terms, renamed = terms_of(tokens), terms_of([(loss, order[task]) for loss, task in tokens])
    assert torch.equal(renamed.sums[list(order)], terms.sums) and torch.equal(
        renamed.counts[list(order)], terms.counts
    )
    moved = torch.empty(K, dtype=torch.float64)
    moved[list(order)] = torch.tensor(weights, dtype=torch.float64)
    one = combine(terms, torch.tensor(weights, dtype=torch.float64), terms.counts, 1)
    assert combine(renamed, moved, renamed.counts, 1).item() == pytest.approx(
        one.item(), rel=1e-5, abs=1e-9
    )


@given(st.lists(token, min_size=1, max_size=30))
def test_weights_in_proportion_to_tokens_give_the_token_mean(tokens):
    terms = terms_of(tokens)
    loss = combine(terms, terms.counts / terms.counts.sum().double(), terms.counts, 1)
    assert loss.item() == pytest.approx(sum(loss for loss, _ in tokens) / len(tokens), rel=1e-5)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_one_tasks_nan_stays_its_own(value):
    terms = terms_of([(1.0, 0), (value, 1), (2.0, 2)])
    assert terms.sums[[0, 2, 3]].tolist() == [1.0, 2.0, 0.0] and not terms.sums[1].isfinite()


@pytest.mark.parametrize("weight", (math.nan, math.inf))
def test_a_task_that_is_absent_contributes_nothing_whatever_its_weight(weight):
    terms = terms_of([(3.0, 0)])
    loss = combine(
        terms,
        torch.tensor([1.0, weight, 0.5, 0.5], dtype=torch.float64),
        torch.tensor([3, 0, 0, 7]),
        1,
    )
    assert loss.item() == 1.0


# --- the objective


class Table(torch.nn.Embedding):
    def forward(self, ids):
        return BaseModelOutput(super().forward(ids))


class Bigram(PreTrainedModel):
    """Logits of the next token from the present one alone: the decoder looks up a row of logits, the head passes it on."""

    config_class = PretrainedConfig

    def __init__(self, vocabulary: int):
        super().__init__(PretrainedConfig(vocab_size=vocabulary, hidden_size=vocabulary))
        self.decoder = Table(vocabulary, vocabulary, dtype=torch.bfloat16)

    def forward(self, *, input_ids, position_ids, attention_mask, use_cache):
        assert not use_cache and position_ids.shape == input_ids.shape
        return CausalLMOutput(logits=self.decoder(input_ids).last_hidden_state)


def bigram(vocabulary: int) -> Bigram:
    torch.manual_seed(0)
    model = Bigram(vocabulary)
    head.install(model)
    return model


@pytest.mark.parametrize("rows", (1, 2, 100))
@pytest.mark.parametrize("packed", (False, True))
def test_causal_lm_is_the_negative_log_probability_of_each_target(packed, rows, monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: rows)
    pieces = [
        (np.array([1, 2, 3, 4]), np.array([False, True, False, True]), 1),
        (np.array([5, 0]), np.array([False, True]), 0),
        (np.array([4, 4, 2]), np.array([False, False, True]), 1),
    ]
    model = bigram(6)
    terms = causal_lm(
        model, collate([pieces[:2], pieces[2:]] if packed else [[p] for p in pieces], 0, packed), 3
    )
    log_p = (
        model.decoder.weight.detach().double().log_softmax(-1)
    )  # bf16 logits, but the loss in fp32
    np.testing.assert_allclose(
        terms.sums.tolist(),
        [-log_p[5, 0], -(log_p[1, 2] + log_p[3, 4] + log_p[4, 2]), 0.0],
        rtol=1e-6,
    )
    assert terms.counts.tolist() == [1, 3, 0] and terms.sums.dtype == torch.float32


def test_a_micro_batch_without_targets_still_reaches_the_head():
    """At ZeRO 3 a rank that skipped the head would leave the others waiting for its part of it."""
    model = bigram(6)
    terms = causal_lm(model, collate([], 0, packed=False), 2)
    combine(terms, torch.ones(2, dtype=torch.float64), torch.tensor([5, 3]), 1).backward()
    found = model.decoder.weight.grad
    assert terms.sums.tolist() == [0, 0] and found is not None and not found.any()


def test_a_penalty_is_averaged_over_micro_batches_by_their_target_tokens():
    cells = [terms_of([(1.0, 0)] * 3), terms_of([(1.0, 1)]), terms_of([])]
    values = [
        torch.tensor(x, requires_grad=True) for x in (2.0, 10.0, math.nan)
    ]  # no token, no part in it
    weights, counts = torch.full((K,), 0.25, dtype=torch.float64), torch.tensor([3, 1, 0, 0])
    loss = sum(
        combine(Terms(cell.sums, cell.counts, {"router_loss": value}), weights, counts, 2)
        for cell, value in zip(cells, values, strict=True)
    )
    assert loss.item() / 2 == pytest.approx(0.25 * 1 + 0.25 * 1 + (3 * 2 + 1 * 10) / 4)
    loss.backward()
    assert [float(value.grad) for value in values] == pytest.approx([2 * 0.75, 2 * 0.25, 0.0])


class Still:
    """An engine that does nothing."""

    device, world = torch.device("cpu"), 1

    def train(self) -> None: ...

    def forward(self) -> None: ...

    def backward(self, loss: torch.Tensor, last: bool) -> None: ...

    def step(self, lr: float, drop: bool) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("sums", "penalty", "bad"),
    [
        ((4.0, 9.0), 0.5, None),
        ((math.inf, 9.0), 0.5, ("router (inf)", ("router",))),
        ((4.0, 9.0), math.inf, ("router (inf)", ())),
    ],
)
def test_a_task_may_be_called_as_a_penalty_is(sums, penalty, bad):
    """It is the task's rows that are named, not those of a penalty, which has none."""

    def objective(forward, micro, k: int) -> Terms:
        counts = torch.tensor([2, 3])
        return Terms(torch.tensor(sums), counts, {"router": torch.tensor(penalty)})

    micro = SimpleNamespace(to=lambda device: None)
    batch = GlobalBatch([micro, micro], torch.tensor([4, 6]), 10)
    args = Still(), objective, batch, np.ones(2), 0.1, ["router", "b"]
    if bad is None:
        report = train_step(*args)
        assert report.losses.tolist() == [2.0, 3.0] and report.penalties == {"router": 0.5}
        return
    with pytest.raises(NonFinite) as found:
        train_step(*args)
    assert (found.value.what, found.value.tasks) == (
        f"the loss of {bad[0]} is not finite", bad[1],
    )  # fmt: skip


def test_ranks_add_penalties_in_one_order():
    """Whichever comes first in a rank's micro-batches."""

    def objective(forward, micro, k: int) -> Terms:
        penalties = {name: torch.tensor(x) for name, x in micro.items()}
        return Terms(torch.ones(2), torch.tensor([1, 1]), penalties)

    class Micro(dict):
        def to(self, device):
            return self

    one, other = Micro(a=1.0), Micro(b=2.0)
    for micros in [one, other], [other, one]:
        batch = GlobalBatch(micros, torch.tensor([2, 2]), 10)
        report = train_step(Still(), objective, batch, np.ones(2), 0.1, ["x", "y"])
        assert list(report.penalties.items()) == [("a", 0.5), ("b", 1.0)]


# --- the schedule


def rates(steps: int, **settings) -> list[float]:
    return [lr(step, peak=2.0, steps=steps, **settings) for step in range(steps)]


def test_schedules_by_hand():
    assert rates(5, name="constant") == [2.0] * 5
    assert rates(5, name="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates(5, name="linear", floor=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])
    assert rates(5, name="cosine") == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0]
    )
    assert rates(6, name="linear", warmup=2) == pytest.approx([1.0, 2.0, 2.0, 4 / 3, 2 / 3, 0.0])
    assert rates(1, name="cosine") == [2.0] and rates(2, name="cosine", warmup=1) == [2.0, 2.0]


@given(
    st.integers(1, 60),
    st.integers(0, 70),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 1),
)
def test_schedules_rise_then_fall_to_the_floor(steps, warmup, name, floor):
    found = rates(steps, name=name, warmup=warmup, floor=floor)
    rising, falling = found[:warmup], found[warmup:]
    assert (
        all(rate > 0 for rate in rising)
        and rising == sorted(rising)
        and falling == sorted(falling, reverse=True)
    )
    assert max(found) <= 2.0 and all(rate >= 2.0 * floor - 1e-12 for rate in falling)
    if warmup <= steps:
        assert warmup == 0 or found[warmup - 1] == 2.0
    if warmup < steps:
        assert falling[0] == pytest.approx(2.0)
    if name != "constant" and steps - warmup > 1:
        assert falling[-1] == pytest.approx(2.0 * floor)


# --- collectives where there is no group


def test_without_a_group_collectives_are_the_identity():
    tensor = torch.tensor([1.0, 2.0])
    assert (comm.rank(), comm.world(), comm.active()) == (0, 1, False)
    assert (
        comm.sum_(tensor) is tensor
        and comm.broadcast_(tensor) is tensor
        and tensor.tolist() == [1.0, 2.0]
    )
    assert comm.together(lambda: 7) == 7
    with pytest.raises(KeyError, match="row 7"):
        comm.together(lambda: {}["row 7"])


def test_fetch_counts_targets_and_positions():
    rows = [
        (np.arange(5), np.array([False, True, True, False, True]), 2),
        (np.arange(3), np.array([False, False, True]), 0),
    ]
    batch = fetch(lambda: [collate([[row] for row in rows], 0, False), collate([], 0, False)], 3)
    assert batch.tokens.tolist() == [1, 0, 3] and batch.tokens.dtype == torch.int64
    assert batch.positions == 2 * 4 + 2 and len(batch.micros) == 2


SUMS, COUNTS = torch.ones(2), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (SUMS, "returned Tensor, wanted mtl.losses.terms.Terms"),
        (
            Terms(torch.ones(1), COUNTS),
            r"Terms.sums is torch.float32 \(1,\), wanted .* shape \(2,\)",
        ),
        (Terms(torch.ones(2, 1), COUNTS), r"Terms.sums is torch.float32 \(2, 1\)"),
        (Terms(COUNTS, COUNTS), "Terms.sums is torch.int64"),
        (Terms(SUMS, SUMS), r"Terms.counts is torch.float32 \(2,\), wanted a tensor \(int64\)"),
        (Terms(SUMS, 2), "Terms.counts is int"),
        (
            Terms(SUMS, COUNTS, {"router": SUMS}),
            r"Terms.penalties\['router'\] is torch.float32 \(2,\)",
        ),
        (
            Terms(SUMS, COUNTS, {}, {"entropy": torch.ones(2, 2)}),
            r"Terms.measures has 'entropy', wanted names of its attribute `measures`: 'accuracy'",
        ),
        (
            Terms(SUMS, COUNTS, {}, {"accuracy": torch.ones(1, 2)}),
            r"Terms.measures\['accuracy'\] is torch.float32 \(1, 2\), wanted .* \(2, m\)",
        ),
        (Terms(SUMS, COUNTS, {}, {"accuracy": SUMS}), r"Terms.measures\['accuracy'\] is"),
        (Terms(SUMS, COUNTS, {}, {"accuracy": 0.5}), r"Terms.measures\['accuracy'\] is float"),
    ],
)
def test_an_objective_returns_terms_of_all_tasks(returned, text):
    with pytest.raises(ValueError, match=f"objective mine: {text}"):
        check_terms(returned, 2, "mine", ["accuracy"])
    measures = {"accuracy": torch.ones(2, 3, dtype=torch.int64)}
    fine = Terms(SUMS, COUNTS, {"router": torch.ones(())}, measures)
    assert check_terms(fine, 2, "mine", ["accuracy", "another"]) is fine
