"""The contract over every method, the holder's refusals, and the simple balancers' values."""

import subprocess
import sys

import numpy as np
import pytest
from contract import CHECKS, NAMES

import balancers
from balancers import (
    DWA,
    FAMO,
    GLS,
    LBTW,
    METHODS,
    RLW,
    Apart,
    Balancer,
    Bounded,
    CoBa,
    Equal,
    FAMOValid,
    GradNorm,
    GradNormValid,
    Grouped,
    Holder,
    LBTWValid,
    MetaWeighting,
    Scheduled,
    Signal,
    Signals,
    Static,
    Tokens,
    TorchJD,
    Uncertainty,
)


def parts(tasks):
    """The tasks in two parts, or as many as there are tasks for."""
    pair = [task for task in tasks if task in ("code", "law")]
    rest = [task for task in tasks if task not in pair]
    return {name: members for name, members in (("pair", pair), ("rest", rest)) if members}


MAKE = {
    "CoBa": lambda tasks: CoBa(window=20, warmup=10),
    "CoBa signed": lambda tasks: CoBa(window=20, warmup=10, divergence="signed"),
    "CoBa released": lambda tasks: CoBa(window=20, warmup=10, divergence="released"),
    "CoBa panel": lambda tasks: CoBa(window=20, warmup=10, slope="panel", gate=1.0),
    "CoBa forgetting": lambda tasks: CoBa(window=20, warmup=10, gate=1.0, forgetting=True),
    "CoBa default window": lambda tasks: CoBa(warmup=10),
    "CoBa short": lambda tasks: CoBa(window=1, warmup=1),
    "Apart": lambda tasks: Apart(CoBa(window=20, warmup=10), parts(tasks)),
    "Apart gradients": lambda tasks: Apart("GradNorm", parts(tasks)),
    "Apart scaled": lambda tasks: Apart("GLS", parts(tasks), dict.fromkeys(parts(tasks), 2)),
    "Bounded": lambda tasks: Bounded(
        CoBa(window=20, warmup=10), floor=0.1, ceiling=1.0 if len(tasks) == 1 else 0.6
    ),
    "Bounded scaled": lambda tasks: Bounded("GLS", floor=0.2),
    "DWA": lambda tasks: DWA(period=10),
    "FAMO": lambda tasks: FAMO(),
    "FAMO cheap": lambda tasks: FAMO(replay=False),
    "FAMOValid": lambda tasks: FAMOValid(),
    "GLS": lambda tasks: GLS(),
    "GradNorm": lambda tasks: GradNorm(),
    "GradNormValid": lambda tasks: GradNormValid(),
    "Grouped": lambda tasks: Grouped(
        CoBa(window=20, warmup=10), {"pair": [t for t in tasks if t in ("code", "law")]}
    ),
    "Grouped gradients": lambda tasks: Grouped(
        "GradNorm", {"pair": [t for t in tasks if t in ("code", "law")]}
    ),
    "LBTW": lambda tasks: LBTW(epoch=40),
    "LBTWValid": lambda tasks: LBTWValid(),
    "MetaWeighting": lambda tasks: MetaWeighting(),
    "RLW": lambda tasks: RLW(seed=3),
    "Scheduled": lambda tasks: Scheduled(
        CoBa(window=20, warmup=10), warmup=20, blend=0.7, freeze=110
    ),
    "Scheduled scaled": lambda tasks: Scheduled("Uncertainty", warmup=20, blend=0.5),
    "Equal": lambda tasks: Equal(),
    "Static": lambda tasks: Static({task: 1.0 + NAMES.index(task) for task in tasks}),
    "TorchJD AlignedMTL": lambda tasks: TorchJD("AlignedMTL"),
    "TorchJD CAGrad": lambda tasks: TorchJD("CAGrad"),
    "TorchJD IMTLG": lambda tasks: TorchJD("IMTLG"),
    "TorchJD MGDA": lambda tasks: TorchJD("MGDA"),
    "TorchJD NashMTL": lambda tasks: TorchJD("NashMTL", {"optim_niter": 2}),
    "TorchJD PCGrad": lambda tasks: TorchJD("PCGrad", seed=3),
    "TorchJD UPGrad": lambda tasks: TorchJD("UPGrad"),
    "Uncertainty": lambda tasks: Uncertainty(),
    "Tokens": lambda tasks: Tokens(),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "name",  # NashMTL solves for a quarter of a second at every Gramian
    [
        pytest.param(name, marks=pytest.mark.slow) if name.endswith("NashMTL") else name
        for name in MAKE
    ],
)
def test_contract(name, check):
    if (name, check.__name__) == ("TorchJD PCGrad", "check_permutation"):
        return  # projects in a random order of the tasks, so it is equivariant in distribution only
    check(MAKE[name])


def test_every_method_in_the_table_is_under_the_contract():
    assert METHODS.keys() == {name.split()[0] for name in MAKE}


@pytest.mark.parametrize("name", METHODS)
def test_table_names_classes(name):
    method = getattr(balancers, name)
    assert issubclass(method, Balancer)
    assert f"{method.__module__}:{method.__name__}" == METHODS[name]
    assert name in balancers.__all__


def test_import_needs_numpy_only():
    code = "import sys, balancers; balancers.CoBa; print(sorted({'torch', 'torchjd', 'pydantic'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


def test_unknown_method():
    with pytest.raises(AttributeError, match="no attribute 'Cuba'; the methods are .*CoBa"):
        balancers.Cuba  # noqa: B018


# --- values


def test_tokens_is_the_token_mean():
    weights = Holder(Tokens(), ["a", "b", "c"]).update(Signals(step=0, tokens=[30, 0, 10]))
    np.testing.assert_array_equal(weights, [0.75, 0, 0.25])
    np.testing.assert_array_equal(
        Holder(Tokens(), ["a", "b"]).update(Signals(step=0, tokens=[0, 0])), [0.5, 0.5]
    )
    with pytest.raises(ValueError, match="Tokens at step 3: found no token counts"):
        Holder(Tokens(), ["a", "b"]).update(Signals(step=3))


def test_static_in_order_and_by_name():
    np.testing.assert_allclose(
        Holder(Static([3, 1]), ["a", "b"]).update(Signals(step=0)), [0.75, 0.25]
    )
    np.testing.assert_allclose(
        Holder(Static({"b": 1, "a": 3}), ["a", "b"]).update(Signals(step=0)), [0.75, 0.25]
    )


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1, -1], "wanted finite numbers >= 0"),
        ([0, 0], "not all 0"),
        ([1, 2, 3], "found 3 of them, wanted one for each of 2"),
        ({"a": 1, "c": 1}, r"found tasks \['a', 'c'\], wanted exactly \['a', 'b'\]"),
    ],
)
def test_static_refuses(weights, text):
    with pytest.raises(ValueError, match=text):
        Holder(Static(weights), ["a", "b"])


# --- the holder


class Given(Balancer):
    """Hands out what it was given."""

    needs = Signal.NONE

    def __init__(self, weights):
        self.given = weights

    def init(self, k):
        return {"count": np.array(0)}

    def update(self, state, signals):
        return {"count": state["count"] + 1}, np.array(self.given, np.float64), {}

    def settings(self):
        return {}


class Scaled(Given):
    sums_to_one = False


class Signed(Scaled):
    non_negative = False


class Forgetful(Given):
    def update(self, state, signals):
        return {"count": None}, np.array(self.given), {}


def test_holder_refuses_a_state_that_no_checkpoint_can_hold():
    with pytest.raises(
        ValueError, match=r"Forgetful at step 0: .*'count': object \(\), before \w+ \(\)"
    ):
        Holder(Forgetful([1.0]), ["a"]).update(Signals(step=0))


class Returns(Balancer):
    """Hands out what it was given, whatever that is."""

    needs = Signal.NONE

    def __init__(self, returned: object) -> None:
        self.returned = returned

    def init(self, k):
        return {"seen": np.zeros((0, k)), "count": np.zeros((), np.int64)}

    def update(self, state, signals):
        return self.returned


FINE = {"seen": np.zeros((5, 2)), "count": np.int64(1)}
HALVES = np.array([0.5, 0.5])


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, r"update returned \(NoneType\), wanted a tuple"),
        ((FINE, HALVES), r"update returned \(dict, ndarray\), wanted a tuple"),
        ((FINE, HALVES, None), r"update returned \(dict, ndarray, NoneType\)"),
        ((HALVES, FINE, {}), r"update returned \(ndarray, dict, dict\)"),
        (({**FINE, "count": 1.5}, HALVES, {}), r"'count': float64 \(\), before int64 \(\)"),
        (({**FINE, "new": 1}, HALVES, {}), r"'new': int64 \(\), before absent"),
        (({"seen": FINE["seen"]}, HALVES, {}), r"'count': absent, before int64 \(\)"),
        (({**FINE, "seen": np.zeros((5, 3))}, HALVES, {}), r"float64 \(n, 3\), before float64 \(n, 2\)"),
        ((FINE, HALVES, {"why": np.ones(3)}), r"explain\['why'\] of float64 \(3,\), wanted"),
        ((FINE, HALVES, {"why": "because"}), r"explain\['why'\] of <U7 \(\), wanted"),
    ],
)  # fmt: skip
def test_what_a_balancer_returns_is_checked_at_each_update(returned, text):
    """Before anything is taken over: the holder's state can still be saved."""
    held = Holder(Returns((FINE, HALVES, {"why": HALVES})), ["a", "b"])
    held.update(Signals(step=0))
    before = held.state_dict()["arrays"]
    held.balancer.returned = returned
    with pytest.raises(ValueError, match=f"test_balancers:Returns at step 1: .*{text}"):
        held.update(Signals(step=1))
    assert all((held.state_dict()["arrays"][name] == each).all() for name, each in before.items())


def test_loss_weight_keeps_the_sum():
    held = Holder(Given([0.5, 0.25, 0.25]), ["a", "b", "c"], loss_weight=[1, 2, 4])
    np.testing.assert_allclose(held.weights, np.array([1, 2, 4]) / 7)
    np.testing.assert_allclose(held.update(Signals(step=0)), np.array([0.5, 0.5, 1]) / 2)
    held = Holder(Scaled([2, 3]), ["a", "b"], loss_weight=[1, 3])
    np.testing.assert_allclose(held.update(Signals(step=0)), np.array([2, 9]) * 5 / 11)
    np.testing.assert_array_equal(
        Holder(Scaled([0, 0]), ["a", "b"]).update(Signals(step=0)), [0, 0]
    )


def test_loss_weight_keeps_the_sum_of_sizes_where_weights_have_both_signs():
    """With that of the weights, 0.01, they would grow sixty times."""
    held = Holder(Signed([1.0, -0.99]), ["a", "b"], loss_weight=[1, 2])
    expected = np.array([1, -1.98]) * 1.99 / 2.98
    np.testing.assert_allclose(held.update(Signals(step=0)), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([0.5, np.nan], "found weights {'a': 0.5, 'b': nan}, wanted finite numbers >= 0"),
        ([1.5, -0.5], "wanted finite numbers >= 0"),
        ([0.5, 0.6], "with sum 1.1, wanted sum 1"),
        ([1.0], r"found weights of float64 \(1,\), wanted a float64 array of \(2,\)"),
    ],
)
def test_holder_refuses_weights(weights, text):
    with pytest.raises(ValueError, match=rf"test_balancers:Given at step 4: .*{text}"):
        Holder(Given(weights), ["a", "b"]).update(Signals(step=4))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"valid_loss": [1, 2, 3]}, r"valid_loss at step 4: found shape \(3,\), wanted \(2,\)"),
        ({"gram": [1, 2]}, r"gram at step 4: found shape \(2,\), wanted \(2, 2\)"),
        (
            {"train_loss": [1, np.inf]},
            r"train_loss at step 4, task 'b': found inf, wanted a finite .* >= 0, or nan",
        ),
        ({"valid_loss": [-1, 1]}, r"valid_loss at step 4, task 'a': found -1.0"),
        (
            {"tokens": [-1, 1]},
            r"tokens at step 4, task 'a': found -1.0, wanted a finite number >= 0;",
        ),
        ({"tokens": [1, np.nan]}, r"tokens at step 4, task 'b': found nan"),
        (
            {"gram": [[1, 0], [np.nan, 1]]},
            r"gram at step 4, task 'b': found nan, wanted a finite number;",
        ),
        ({"step": -1}, r"step: found -1"),
    ],
)
def test_holder_refuses_signals(fields, text):
    with pytest.raises(ValueError, match=rf"Signals\.{text}"):
        Holder(Equal(), ["a", "b"]).update(Signals(**{"step": 4, **fields}))


@pytest.mark.parametrize(
    ("tasks", "loss_weight", "text"),
    [
        ([], None, r"tasks: found \[\], wanted at least one name, each only once"),
        (["a", "a"], None, r"tasks: found \['a', 'a'\], wanted at least one name, each only once"),
        (["a"], [0], r"loss_weight: found \[0\], wanted 1 finite numbers > 0 for \['a'\]"),
        (["a"], [np.inf], r"loss_weight: found \[inf\], wanted 1 finite numbers > 0 for \['a'\]"),
        (["a"], [1, 2], r"loss_weight: found \[1, 2\], wanted 1 finite numbers > 0 for \['a'\]"),
    ],
)
def test_holder_refuses_tasks_and_loss_weights(tasks, loss_weight, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Holder(Equal(), tasks, loss_weight)


@pytest.mark.parametrize(
    ("balancer", "tasks", "loss_weight", "text"),
    [
        (
            Equal(),
            ["a", "b"],
            None,
            "method: saved 'balancers.coba:CoBa', here 'balancers.equal:Equal'",
        ),
        (CoBa(window=7), ["a", "b"], None, "settings: saved {'window': 5.*here {'window': 7"),
        (CoBa(window=5), ["b", "a"], None, r"tasks: saved \['a', 'b'\], here \['b', 'a'\]"),
        (CoBa(window=5), ["a", "b"], [1, 2], r"loss_weight: saved \[1.0, 1.0\], here \[1.0, 2.0\]"),
    ],
)
def test_holder_refuses_another_runs_state(balancer, tasks, loss_weight, text):
    saved = Holder(CoBa(window=5), ["a", "b"]).state_dict()
    with pytest.raises(ValueError, match=text):
        Holder(balancer, tasks, loss_weight).load_state_dict(saved)


def test_holder_refuses_damaged_state():
    held = Holder(CoBa(), ["a", "b"])
    saved = held.state_dict()
    del saved["arrays"]["state.history"]
    with pytest.raises(ValueError, match="found arrays .*wanted .*state.history"):
        held.load_state_dict(saved)


def test_saved_state_is_a_copy():
    held = Holder(CoBa(window=4, warmup=1), ["a", "b"])
    for step in range(20):
        held.update(Signals(step=step, valid_loss=[1 / (1 + step), 1]))
    saved = held.state_dict()
    before = {name: array.copy() for name, array in saved["arrays"].items()}
    held.update(Signals(step=20, valid_loss=[3, 3]))
    for name, array in before.items():
        np.testing.assert_array_equal(saved["arrays"][name], array)


def test_settings_that_json_cannot_hold_are_refused():
    class Odd(Equal):
        def __init__(self):
            self.rule = min

    with pytest.raises(ValueError, match="found a builtin_function_or_method, wanted numbers"):
        Holder(Odd(), ["a"])
