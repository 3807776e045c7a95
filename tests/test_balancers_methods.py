"""Each method against a closed form or against TorchJD's implementation of the same paper, run side by side."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torchjd import aggregation, scalarization

from balancers import (
    DWA,
    FAMO,
    GLS,
    LBTW,
    RLW,
    FAMOValid,
    GradNorm,
    GradNormValid,
    Holder,
    LBTWValid,
    MetaWeighting,
    Signals,
    TorchJD,
    Uncertainty,
)
from balancers.maths import adam_init, adam_step
from balancers.metaweighting import min_norm, to_simplex


def losses(steps, k=3, seed=0):
    """(steps, K) noisy falling losses."""
    rng = np.random.default_rng(seed)
    rate = np.linspace(0.01, 0.1, k)
    return (
        (0.3 + np.exp(-rate * np.arange(steps)[:, None]))
        * rng.uniform(0.9, 1.1, (steps, k))
        * np.arange(1, k + 1)
    )


def run(balancer, signals, k=3):
    state, weights, explained = balancer.init(k), [], []
    for each in signals:
        state, now, explain = balancer.update(state, each)
        weights.append(now)
        explained.append(explain)
    return np.array(weights), explained


def gradient(scalarizer, values):
    """(K,) derivative of a scalarization: the weights that it amounts to."""
    leaf = torch.tensor(values, requires_grad=True)
    scalarizer(leaf).backward()
    return leaf.grad.numpy()


# --- from losses


def test_dwa_is_torchjds():
    train, reference = losses(50), scalarization.DWA(temperature=2.0)
    weights, _ = run(
        DWA(period=10), [Signals(step=t + 1, train_loss=row) for t, row in enumerate(train)]
    )
    for t, row in enumerate(train):
        want = gradient(reference, row)  # this call also counts the row into the period's mean
        if t % 10 == 9:
            reference.step()
            want = gradient(
                reference, row
            )  # ours has seen the whole period at the start of the next update
            reference._loss_sum, reference._n_batches = None, 0
        np.testing.assert_allclose(weights[t], want / 3, atol=1e-12)


def test_dwa_keeps_the_mean_of_a_task_absent_for_a_period():
    rows = [[4, 4], [2, 2], [1, np.nan]]
    weights, explained = run(
        DWA(period=1), [Signals(step=t + 1, train_loss=r) for t, r in enumerate(rows)], 2
    )
    np.testing.assert_allclose(explained[-1]["rate"], [0.5, 1.0])
    np.testing.assert_allclose(weights[-1], np.exp([0.25, 0.5]) / np.exp([0.25, 0.5]).sum())


def test_uncertainty_is_torchjds_under_adam():
    reference = scalarization.UW(3).double()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.025)
    weights, explained = run(
        Uncertainty(), [Signals(step=0)] + [Signals(1, train_loss=row) for row in losses(80)]
    )
    np.testing.assert_array_equal(weights[0], [0.5, 0.5, 0.5])
    for row, now, explain in zip(losses(80), weights[1:], explained[1:], strict=True):
        optimizer.zero_grad()
        reference(torch.tensor(row)).backward()
        optimizer.step()
        np.testing.assert_allclose(now, gradient(reference, row), rtol=1e-9)
        np.testing.assert_allclose(explain["log_variance"], reference.log_var.detach(), atol=1e-12)


def test_uncertainty_tends_to_half_of_the_inverse_loss():
    weights, _ = run(Uncertainty(lr=0.1), [Signals(1, train_loss=[0.5, 2.0, 4.0])] * 2000)
    np.testing.assert_allclose(weights[-1], 0.5 / np.array([0.5, 2, 4]), rtol=1e-4)


def test_gls_is_the_gradient_of_the_geometric_mean():
    train = losses(5)
    weights, _ = run(
        GLS(), [Signals(step=0)] + [Signals(step=t + 1, train_loss=r) for t, r in enumerate(train)]
    )
    np.testing.assert_array_equal(weights[0], [1 / 3] * 3)
    for row, now in zip(train, weights[1:], strict=True):
        np.testing.assert_allclose(now, gradient(scalarization.GeometricMean(), row), rtol=1e-12)
    assert np.isfinite(run(GLS(), [Signals(1, train_loss=[0, 1, np.nan])])[0]).all()


def test_lbtw_closed_form_with_a_new_base_every_epoch():
    rows = np.array([[4.0, 1.0], [2.0, 1.0], [1.0, 0.64], [1.0, 1.0]])
    weights, explained = run(
        LBTW(epoch=3), [Signals(step=t + 1, train_loss=r) for t, r in enumerate(rows)], 2
    )
    ratios = np.array([[1, 1], [0.5, 1], [0.25, 0.64], [1, 1]])
    np.testing.assert_allclose([each["ratio"] for each in explained], ratios)
    np.testing.assert_allclose(
        weights, np.sqrt(ratios) / np.sqrt(ratios).sum(axis=1, keepdims=True)
    )
    never, _ = run(
        LBTW(alpha=1.0), [Signals(step=t + 1, train_loss=r) for t, r in enumerate(rows)], 2
    )
    np.testing.assert_allclose(never[-1], [0.25 / 1.25, 1 / 1.25])


def test_lbtw_on_validation_losses_honors_the_base():
    signals = Signals(step=0, valid_loss=[1.0, 1.0], valid_base=[4.0, np.nan])
    np.testing.assert_allclose(run(LBTWValid(), [signals], 2)[0][0], [1 / 3, 2 / 3])


def test_lbtw_on_validation_losses_takes_its_base_again_every_epoch():
    rows = np.array([[4.0, 1.0], [2.0, 1.0], [1.0, 0.5]])
    signals = [Signals(step=t, valid_loss=r, valid_base=[4.0, 1.0]) for t, r in enumerate(rows)]
    _, explained = run(LBTWValid(epoch=2), signals, 2)
    ratios = [[1, 1], [0.5, 1], [1, 1]]
    np.testing.assert_allclose([each["ratio"] for each in explained], ratios)


def test_famo_is_torchjds():
    before, after = losses(60, seed=1), losses(60, seed=2)
    reference = scalarization.FAMO(3).double()
    signals = [Signals(step=t + 1, train_loss=before[t], replay_loss=after[t]) for t in range(60)]
    weights, explained = run(FAMO(), signals)
    for t in range(60):
        reference(torch.tensor(before[t]))
        reference.update(torch.tensor(after[t]))
        np.testing.assert_allclose(explained[t]["z"], reference._w.detach().softmax(0), atol=1e-12)
        np.testing.assert_allclose(weights[t], gradient(reference, after[t]), atol=1e-12)


@pytest.mark.parametrize(
    ("balancer", "field"), [(FAMO(replay=False), "train_loss"), (FAMOValid(), "valid_loss")]
)
def test_famo_without_replay_reads_consecutive_losses(balancer, field):
    rows, reference = losses(60), scalarization.FAMO(3).double()
    _, explained = run(balancer, [Signals(t, **{field: row}) for t, row in enumerate(rows)])
    for t in range(1, 60):
        reference(torch.tensor(rows[t - 1]))
        reference.update(torch.tensor(rows[t]))
        np.testing.assert_allclose(explained[t]["z"], reference._w.detach().softmax(0), atol=1e-12)


def test_famo_on_validation_losses_reads_ratios_to_the_probes_own_base():
    base = losses(20, seed=5)
    plain, a = run(FAMOValid(), [Signals(t, valid_loss=r) for t, r in enumerate(losses(20))])
    paired, b = run(
        FAMOValid(),
        [Signals(t, valid_loss=r * base[t], valid_base=base[t]) for t, r in enumerate(losses(20))],
    )
    np.testing.assert_allclose([e["z"] for e in b], [e["z"] for e in a], atol=1e-7)


def test_adam_is_torchs_and_leaves_absent_entries_alone():
    rng, state = np.random.default_rng(0), adam_init(3)
    point, leaf = np.zeros(3), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=0.1)
    for grad in rng.normal(size=(50, 3)):
        point = point - 0.1 * adam_step(state, grad, np.ones(3, bool))
        leaf.grad = torch.tensor(grad)
        optimizer.step()
        np.testing.assert_allclose(point, leaf.detach(), atol=1e-12)
    before = {name: array.copy() for name, array in state.items()}
    assert (adam_step(state, np.ones(3), np.array([True, False, False]))[1:] == 0).all()
    assert all(
        (state[name][1:] == before[name][1:]).all() and state[name][0] != before[name][0]
        for name in before
    )


# --- at random


def test_rlw_draws_standard_normals():
    weights, _ = run(RLW(), [Signals(step=t) for t in range(20000)])
    logs = np.log(weights)
    # softmax leaves only differences of the normals: they have variance 2 and a kurtosis of 3.
    for difference in (logs[:, 0] - logs[:, 1], logs[:, 1] - logs[:, 2]):
        assert abs(difference.mean()) < 4 * np.sqrt(2 / 20000)
        assert abs(difference.var() - 2) < 4 * 2 * np.sqrt(2 / 20000)
        assert abs((difference**4).mean() / difference.var() ** 2 - 3) < 4 * np.sqrt(24 / 20000)
        assert abs(np.corrcoef(difference[1:], difference[:-1])[0, 1]) < 4 / np.sqrt(20000)
    assert abs(np.corrcoef(logs[:, 0] - logs[:, 1], logs[:, 1] - logs[:, 2])[0, 1] + 0.5) < 0.03


def test_rlw_follows_its_seed():
    first, again, other = (
        Holder(RLW(seed), ["a", "b"]).update(Signals(step=0)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    with pytest.raises(ValueError, match="RLW seed: found 1.5"):
        RLW(1.5)


# --- from gradients


def test_gradnorm_step_is_the_derivative_of_its_loss():
    rng, balancer = np.random.default_rng(0), GradNorm()
    state, first = balancer.init(3), None
    weights = torch.ones(3, dtype=torch.float64)
    for step in range(30):
        loss = rng.uniform(1, 2, 3)
        first = loss if first is None else first
        jacobian = rng.normal(size=(3, 5)) * [[1], [3], [0.5]]
        state, now, explain = balancer.update(
            state, Signals(step, train_loss=loss, gram=jacobian @ jacobian.T)
        )

        norm = torch.tensor(np.linalg.norm(jacobian, axis=1))
        leaf = weights.clone().requires_grad_()
        rate = torch.tensor(loss / first)
        target = ((leaf * norm).mean() * (rate / rate.mean()) ** 1.5).detach()
        (leaf * norm - target).abs().sum().backward()
        weights = (weights - 0.025 * leaf.grad / norm.mean()).clamp(min=0)
        weights = 3 * weights / weights.sum()
        np.testing.assert_allclose(now, weights / 3, atol=1e-12)
        np.testing.assert_allclose(explain["norm"], norm)
        np.testing.assert_allclose(explain["target"], target)


@pytest.mark.parametrize(
    ("balancer", "field"), [(GradNorm(), "train_loss"), (GradNormValid(), "valid_loss")]
)
def test_gradnorm_gives_the_slower_task_more(balancer, field):
    rows = [[4.0, 4.0]] + [[4.0, 2.0]] * 20
    weights, _ = run(
        balancer, [Signals(t, gram=np.eye(2), **{field: r}) for t, r in enumerate(rows)], 2
    )
    assert weights[-1][0] > 0.6


def test_gradnorm_evens_out_norms():
    gram = np.diag([1.0, 4.0, 16.0])
    weights, _ = run(
        GradNorm(lr=0.002), [Signals(t, train_loss=[1, 1, 1], gram=gram) for t in range(3000)]
    )
    np.testing.assert_allclose(weights[-1], np.array([4, 2, 1]) / 7, atol=0.005)


def test_metaweighting_moves_along_the_common_descent_of_the_validation_losses():
    train, valid = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0], [1.0, 1.0]])
    gram = (
        valid @ train.T
    )  # rows (3, 0) and (1, 2): the point of their segment nearest to 0 is (1.5, 1.5)
    weights, explained = run(MetaWeighting(eta=0.1), [Signals(0, valid_gram=gram)], 2)
    np.testing.assert_allclose(explained[0]["descent"], [0.5, 0.5], atol=1e-7)
    np.testing.assert_allclose(weights[0], [0.5, 0.5], atol=1e-7)
    # Both validation losses fall with task 1 only: all weight goes there.
    weights, _ = run(
        MetaWeighting(eta=0.1), [Signals(t, valid_gram=[[-1, 2], [0, 1]]) for t in range(20)], 2
    )
    np.testing.assert_array_equal(weights[-1], [0, 1])


def test_metaweighting_leaves_the_weight_of_a_task_that_is_not_in_the_batch():
    both, alone = np.array([[-1.0, 2], [0, 1]]), np.zeros((3, 3))
    alone[:2, :2] = both  # the third task has rows for validation and none in the batch
    alone[2, :2] = [3, 0.5]
    weights, explained = run(MetaWeighting(eta=0.1), [Signals(0, valid_gram=alone)], 3)
    assert weights[0][2] == 1 / 3 and weights[0].sum() == pytest.approx(1, abs=1e-15)
    assert explained[0]["descent"][2] == 0 and abs(weights[0][0] - 1 / 3) > 0.01
    only, _ = run(MetaWeighting(eta=0.1), [Signals(0, valid_gram=np.diag([0.0, 0, 1]))], 3)
    np.testing.assert_allclose(only[0], np.full(3, 1 / 3), atol=1e-15)


def test_metaweighting_gradient_is_that_of_a_look_ahead():
    rng = np.random.default_rng(0)
    center_train, center_valid, theta = (
        rng.normal(size=(3, 6)),
        rng.normal(size=(3, 6)),
        rng.normal(size=6),
    )

    def valid(w: np.ndarray, j: int) -> float:
        return 0.5 * np.sum((theta - 1e-4 * w @ (theta - center_train) - center_valid[j]) ** 2)

    gram = (theta - center_valid) @ (theta - center_train).T
    for j in range(3):
        for i in range(3):
            by_hand = (valid(np.eye(3)[i], j) - valid(np.zeros(3), j)) / 1e-4
            np.testing.assert_allclose(by_hand, -gram[j, i], rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_min_norm_satisfies_its_optimality_conditions(k):
    rng = np.random.default_rng(k)
    for rank in (1, k, 2 * k):
        rows = rng.normal(size=(k, rank)) + 0.5
        gram = rows @ rows.T
        point = min_norm(gram)
        assert (point >= 0).all() and abs(point.sum() - 1) < 1e-12
        assert point @ gram @ point - (gram @ point).min() < 1e-10 * gram.max()


def test_simplex_projection():
    np.testing.assert_allclose(to_simplex(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])
    np.testing.assert_allclose(to_simplex(np.array([0.6, 0.6, -1.0])), [0.5, 0.5, 0])
    np.testing.assert_allclose(to_simplex(np.array([5.0, 1.0])), [1, 0])


# --- through TorchJD

PAPER = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # the example of TorchJD's documentation


@pytest.mark.parametrize(
    ("method", "aggregation_of"),
    [
        ("UPGrad", [0.2929, 1.9004, 1.9004]),
        ("MGDA", [0.0, 1.0, 1.0]),
        ("PCGrad", [0.5848, 3.8012, 3.8012]),
        ("CAGrad", [0.1835, 1.2041, 1.2041]),
        ("IMTLG", [0.0767, 1.0, 1.0]),
        ("AlignedMTL", [0.2133, 0.9673, 0.9673]),
    ],
)
def test_torchjd_reproduces_its_published_example(method, aggregation_of):
    balancer = TorchJD(method, {"c": 0.5} if method == "CAGrad" else None)
    weights, _ = run(balancer, [Signals(0, gram=PAPER @ PAPER.T)], 2)
    np.testing.assert_allclose(weights[0] @ PAPER, aggregation_of, atol=1.1e-4)


@pytest.mark.parametrize("method", ["AlignedMTL", "CAGrad", "IMTLG", "MGDA", "NashMTL", "UPGrad"])
def test_torchjd_gives_its_aggregators_update(method):
    jacobian = np.random.default_rng(1).normal(size=(3, 6)) * [[1], [2], [0.3]]
    jacobian /= np.sqrt((jacobian**2).sum(axis=1).mean())
    more = {"CAGrad": {"c": 0.5}, "NashMTL": {"n_tasks": 3}}.get(method, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are solving a parameterized problem")
        want = getattr(aggregation, method)(**more)(torch.tensor(jacobian)).numpy()
    weights, _ = run(TorchJD(method), [Signals(0, gram=jacobian @ jacobian.T)], 3)
    np.testing.assert_allclose(weights[0] @ jacobian, want, atol=1e-6)


def test_torchjd_leaves_torchs_random_numbers_alone():
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    run(TorchJD("PCGrad"), [Signals(0, gram=np.eye(3))])
    assert torch.equal(torch.rand(3), want)


def test_torchjd_absent_task_gets_the_mean_and_takes_no_part():
    gram = np.zeros((3, 3))
    gram[:2, :2] = PAPER @ PAPER.T
    weights, _ = run(TorchJD("UPGrad"), [Signals(0, gram=gram), Signals(1)])
    np.testing.assert_allclose(weights[0], [1.1109, 0.7894, (1.1109 + 0.7894) / 2], atol=1e-4)
    np.testing.assert_array_equal(weights[1], weights[0])


def test_torchjd_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(
        ValueError, match=r'TorchJD UPGrad: a package is missing .*pip install "torchjd\[full\]'
    ):
        TorchJD("UPGrad")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: TorchJD("Upgrad"),
            "TorchJD method: found 'Upgrad', wanted one of AlignedMTL, CAGrad",
        ),
        (
            lambda: TorchJD("MGDA", {"eps": 1}),
            r"TorchJD options: found {'eps': 1}, wanted keywords of MGDAWeighting",
        ),
        (lambda: TorchJD("PCGrad", seed=-1), "TorchJD seed: found -1"),
        (lambda: DWA(period=0), "DWA period: found 0"),
        (lambda: DWA(temperature=0), "DWA temperature: found 0"),
        (lambda: Uncertainty(lr=-1), "Uncertainty lr: found -1"),
        (lambda: LBTW(alpha=0), "LBTW alpha: found 0"),
        (lambda: LBTWValid(epoch=0), "LBTWValid epoch: found 0"),
        (lambda: FAMO(lr=0), "FAMO lr: found 0"),
        (lambda: FAMOValid(weight_decay=-1), "FAMOValid weight_decay: found -1"),
        (lambda: FAMO(replay=1), "FAMO replay: found 1, wanted true or false"),
        (lambda: GradNorm(alpha=-1.5), "GradNorm alpha: found -1.5"),
        (lambda: GradNormValid(lr=0), "GradNormValid lr: found 0"),
        (lambda: MetaWeighting(eta=0), "MetaWeighting eta: found 0"),
    ],
)
def test_settings_out_of_range(make, text):
    with pytest.raises(ValueError, match=text):
        make()
