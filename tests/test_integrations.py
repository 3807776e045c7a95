"""Balancers in loops that are not ours give what those loops, or one plain process, would give."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_distributed
from near import near

from balancers import DWA, FAMO, CoBa, Equal, GradNorm, Static, Tokens
from mtl.distributed import comm
from mtl.integrations.loop import Balance

NAMES = ["code", "math", "law"]


def micro_batches(
    step: int, ranks: int = 1, rank: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(inputs (T, 4), labels (T,), task (T,)): four micro-batches a step of unequal size, one of them without
    targets.
    """
    made = []
    for m in range(4):
        generator = torch.Generator().manual_seed(100 * step + m)
        n = [7, 0, 3, 12][(m + step) % 4]
        made.append((
            torch.randn(n, 4, generator=generator),
            torch.randint(5, (n,), generator=generator),
            torch.randint(2 if step == 1 else 3, (n,), generator=generator),  # no third task in step 1
        ))  # fmt: skip
    return made[rank::ranks]


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 5)


def train(
    balance: Balance, steps: range, model: torch.nn.Module, ranks: int = 1, rank: int = 0
) -> list[np.ndarray]:
    """The loop of the module's docstring; gradients are averaged over ranks as DDP does. Returns the losses of each
    step.
    """
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in steps:
        batch = micro_batches(step, ranks, rank)
        balance.begin(torch.cat([task for _, _, task in batch]))
        optimizer.zero_grad()
        for inputs, labels, task in batch:
            balance.loss(F.cross_entropy(model(inputs), labels, reduction="none"), task).backward()
        for p in model.parameters():
            p.grad = comm.sum_(p.grad) / comm.world()
        optimizer.step()
        losses.append(balance.end())
    return losses


def reference(weights: np.ndarray, steps: range) -> tuple[list[np.ndarray], torch.nn.Module]:
    model = linear()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in steps:
        inputs, labels, task = (
            torch.cat(parts) for parts in zip(*micro_batches(step), strict=True)
        )
        each = F.cross_entropy(model(inputs), labels, reduction="none")
        means = [each[task == k].mean() for k in range(3)]
        optimizer.zero_grad()
        sum(w * m for w, m in zip(weights, means, strict=True) if not m.isnan()).backward()
        optimizer.step()
        losses.append(np.array([m.item() for m in means]))
    return losses, model


def test_a_plain_loop_without_a_process_group():
    model, wanted = linear(), reference(np.array([0.5, 0.3, 0.2]), range(4))
    found = train(Balance(Static({"code": 5, "math": 3, "law": 2}), NAMES), range(4), model)
    np.testing.assert_allclose(found, wanted[0], rtol=1e-6)
    assert np.isnan(found[1][2])
    near(model.weight, wanted[1].weight, units=8)


def test_without_a_task_the_others_keep_their_weights():
    """One rule in `terms.combine`, for the trainer, the loop and the mix-in: 2.8 for a loss of 5.6."""
    balance, task = Balance(Equal(), ["code", "math"]), torch.zeros(4, dtype=torch.int64)
    np.testing.assert_array_equal(balance.begin(task), [0.5, 0.5])
    assert balance.loss(torch.full((4,), 5.6), task).item() == pytest.approx(2.8, rel=1e-6)
    assert balance.present_weight == 0.5
    balance.end()
    balance.begin(torch.tensor([0, 1]))
    assert balance.present_weight == 1.0


def on_two_ranks() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    model = linear()
    losses = train(
        Balance(Static({"code": 5, "math": 3, "law": 2}), NAMES),
        range(4),
        model,
        comm.world(),
        comm.rank(),
    )
    balance = Balance(Equal(), NAMES)
    mean = balance.mean(torch.tensor([1.0 + comm.rank(), 2.0]), torch.tensor([0, comm.rank()]))
    return losses, model.weight.detach().numpy(), mean


def test_two_ranks_make_the_update_of_one():
    losses, model = reference(np.array([0.5, 0.3, 0.2]), range(4))
    for found in run_distributed(on_two_ranks, 2):
        np.testing.assert_allclose(found[0], losses, rtol=1e-6)
        near(found[1], model.weight, units=8)
        np.testing.assert_array_equal(found[2], [5 / 3, 2.0, np.nan])


def test_tokens_is_the_mean_over_tokens():
    balance = Balance(Tokens(), NAMES)
    inputs, labels, task = (torch.cat(parts) for parts in zip(*micro_batches(0), strict=True))
    weights = balance.begin(task)
    np.testing.assert_allclose(weights, np.bincount(task.numpy(), minlength=3) / len(task))
    logits = linear()(inputs)
    loss = balance.loss(F.cross_entropy(logits, labels, reduction="none"), task)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), rtol=1e-6, atol=0)


def test_saved_and_restored_it_goes_on_bit_for_bit():
    def make() -> Balance:
        return Balance(DWA(period=2), NAMES, [1, 2, 1])

    whole, model = make(), linear()
    first = train(whole, range(4), model)
    file = io.BytesIO()
    torch.save({"balance": whole.state_dict(), "model": model.state_dict()}, file)
    rest = train(whole, range(4, 8), model)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = make(), linear()
    again.load_state_dict(saved["balance"]), other.load_state_dict(saved["model"])
    assert again.step == 4 and len(first) == 4
    np.testing.assert_array_equal(train(again, range(4, 8), other), rest)
    np.testing.assert_array_equal(again.weights, whole.weights)
    assert len(set(whole.weights)) == 3, "DWA has moved"


def test_signals_the_caller_measures():
    task = torch.tensor([0, 1])
    balance = Balance(CoBa(window=4, warmup=1), NAMES[:2])
    with pytest.raises(ValueError, match="found no valid_loss at step 0, wanted it: CoBa reads it"):
        balance.begin(task)
    for step in range(6):
        balance.begin(task, valid_loss=[2.0 - 0.1 * step, 1.0 + 0.1 * step], valid_group=0)
        balance.loss(torch.ones(2), task), balance.end()
    assert abs(balance.weights[0] - balance.weights[1]) > 0.1
    with pytest.raises(
        ValueError,
        match=r"found \['gram'\]; CoBa reads \['valid_base', 'valid_group', 'valid_loss'\]",
    ):
        balance.begin(task, gram=np.eye(2))
    with pytest.raises(ValueError, match="found no gram at step 0, wanted it: GradNorm reads it"):
        Balance(GradNorm(), NAMES[:2]).begin(task)
    famo = Balance(FAMO(), NAMES[:2])
    famo.begin(task), famo.loss(torch.ones(2), task), famo.end()
    with pytest.raises(ValueError, match="found no replay_loss at step 1"):
        famo.begin(task)


def test_calls_out_of_order():
    balance, task = Balance(Equal(), NAMES), torch.tensor([0])
    with pytest.raises(ValueError, match="no step is open. Call begin"):
        balance.loss(torch.ones(1), task)
    with pytest.raises(ValueError, match="no step is open"):
        balance.end()
    balance.begin(task)
    with pytest.raises(ValueError, match="step 0 is still open. Call end"):
        balance.begin(task)
    with pytest.raises(ValueError, match="step 0 is still open. Call end"):
        balance.state_dict()


TASK = torch.tensor([0, 0, 0, 1])
SEEN = {
    "another micro-batch": ([[0, 0, 1, 1]], "found 2 of 'code', wanted 3; found 2 of 'math', "),
    "masked otherwise": ([[0, 0, 1]], "found 2 of 'code', wanted 3. Give "),
    "one twice": ([[0, 0, 0], [1], [1]], "found 2 of 'math', wanted 1. Give "),
    "one left out": ([[0, 0, 0]], "found 0 of 'math', wanted 1. Give "),
    "an absent task": ([[0, 0, 0, 1, 2]], "found 1 of 'law', wanted 0. Give "),
}


@pytest.mark.parametrize("case", SEEN)
def test_loss_sees_the_tokens_that_begin_counted(case):
    micros, message = SEEN[case]
    balance = Balance(Equal(), NAMES)
    balance.begin(TASK)
    for micro in micros:
        balance.loss(torch.ones(len(micro)), torch.tensor(micro))
    with pytest.raises(ValueError, match=f"Balance.end at step 0: .*{message}"):
        balance.end()
    # The step is given up: its numbers are not passed on.
    assert balance.losses is None and balance.step == 0
    balance.begin(TASK), balance.loss(torch.full((4,), 2.0), TASK)
    np.testing.assert_array_equal(balance.end(), [2, 2, np.nan])


@pytest.mark.parametrize("number", (-1, 3))
def test_a_task_that_is_none(number):
    balance, task = Balance(Equal(), NAMES), torch.tensor([0, number, 1, number])
    wanted = f"2 target tokens whose task is not one of 0 to 2, the places in {NAMES}".replace(
        "[", r"\["
    )
    with pytest.raises(ValueError, match=f"Balance.begin at step 0: found {wanted}"):
        balance.begin(task)
    with pytest.raises(ValueError, match=f"Balance.mean at step 0: found {wanted}"):
        balance.mean(torch.ones(4), task)
    # What begin() counted is there; the losses beside it are of no task.
    balance.begin(torch.tensor([0, 1])), balance.loss(torch.ones(4), task)
    with pytest.raises(ValueError, match=f"Balance.loss at step 0: found {wanted}"):
        balance.end()


def errors_on_two_ranks() -> tuple[list[str], np.ndarray]:
    """Rank 1 alone is wrong."""
    balance, found, wrong = Balance(Equal(), NAMES), [], comm.rank() == 1
    for counted, given in ((3 if wrong else 0, 0), (0, 3 if wrong else 0), (0, 1 if wrong else 0)):
        try:
            balance.begin(torch.tensor([counted, 1]))
            balance.loss(torch.ones(2), torch.tensor([given, 1]))
            balance.end()
        except ValueError as error:
            found.append(str(error))
    # A micro-batch that another rank takes over changes no number.
    balance.begin(torch.tensor([0] if wrong else [0, 1]))
    for task in [[]] if wrong else [[0], [0, 1]]:
        balance.loss(torch.ones(len(task)), torch.tensor(task, dtype=torch.int64))
    return found, balance.end()


def test_every_rank_hears_of_one_ranks_tokens():
    one, other = run_distributed(errors_on_two_ranks, 2)
    assert one[0] == other[0]
    for text, wanted in zip(
        one[0],
        (
            "Balance.begin at step 0: found 1 target token whose task is not one of 0 to 2",
            "Balance.loss at step 0: found 1 target token whose task is not one of 0 to 2",
            "found 1 of 'code', wanted 2; found 3 of 'math', wanted 2. Give ",
        ),
        strict=True,
    ):
        assert wanted in text
    for _, losses in (one, other):
        np.testing.assert_array_equal(losses, [1, 1, np.nan])


def test_a_step_that_is_given_up_leaves_nothing():
    def run(interrupted: bool) -> Balance:
        balance = Balance(CoBa(window=4, warmup=1), NAMES[:2])
        for step in range(6):
            valid = [2.0 - 0.1 * step, 1.0 + 0.1 * step]
            if interrupted and step == 4:
                balance.begin(TASK, valid_loss=valid, valid_group=0)
                balance.loss(torch.ones(1), TASK[:1])
                balance.drop()
                assert not balance.is_open and balance.step == 4
            balance.begin(TASK, valid_loss=valid, valid_group=0)
            balance.loss(torch.ones(4), TASK), balance.end()
        return balance

    found, wanted = run(True), run(False)
    np.testing.assert_array_equal(found.weights, wanted.weights)
    for name, array in wanted.state_dict()["arrays"].items():
        np.testing.assert_array_equal(found.state_dict()["arrays"][name], array, err_msg=name)
    with pytest.raises(ValueError, match="Balance.drop: no step is open"):
        found.drop()
