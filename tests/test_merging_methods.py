"""Merging methods on small tensors: closed forms, frequencies of the draws, identities."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from near import near
from scipy import stats

from mtl.config import ConfigError
from mtl.merging.average import average
from mtl.merging.average_norm import average_norm
from mtl.merging.candidates import Candidates
from mtl.merging.dare import dare
from mtl.merging.methods import METHODS, named
from mtl.merging.model_stock import model_stock
from mtl.merging.piece import MergeError, TensorPiece
from mtl.merging.report import count
from mtl.merging.search import search
from mtl.merging.select import select, unit_of
from mtl.merging.soup import soup
from mtl.merging.task_arithmetic import task_arithmetic
from mtl.merging.ties import ties

TENSORWISE = [average, average_norm, dare, model_stock, select, task_arithmetic, ties]


def piece(base, *deltas, name: str = "a.weight", seed: int = 0, dtype=torch.float32) -> TensorPiece:
    base = torch.as_tensor(base, dtype=dtype)
    return TensorPiece(name, base, [base + torch.as_tensor(d, dtype=dtype) for d in deltas], seed)


def drift(k: int, n: int = 4096, dtype=torch.float32, seed: int = 0) -> TensorPiece:
    """K deltas of 1e-4 on weights of 0.02: bf16 loses part of them."""
    random = torch.Generator().manual_seed(seed)
    base = (torch.randn(n // 64, 64, generator=random) * 0.02).to(dtype)
    noise = [torch.randn(base.shape, generator=random) * 1e-4 for _ in range(k)]
    return TensorPiece("a.weight", base, [(base.float() + each).to(dtype) for each in noise])


def close(found: torch.Tensor, wanted) -> None:
    near(found.float(), wanted, units=2)  # the models are in fp32


# --- closed forms


def test_average():
    close(average(piece([1.0, 2.0], [1.0, 0.0], [3.0, -2.0])), [3.0, 1.0])
    close(average(piece([1.0, 2.0], [1.0, 0.0], [3.0, -2.0]), weights=[3, 1]), [2.5, 1.5])


def test_average_norm_has_the_mean_length():
    # Lengths 3 and 4 at a right angle: the mean is (1.5, 2) of length 2.5, and becomes 3.5 long.
    close(average_norm(piece([1.0, 1.0], [3.0, 0.0], [0.0, 4.0])), [1 + 2.1, 1 + 2.8])
    close(average_norm(piece([1.0], [1.0], [-1.0])), [1.0])


def test_task_arithmetic():
    p = piece([1.0, 2.0], [1.0, 0.0], [3.0, -2.0])
    close(task_arithmetic(p), [5.0, 0.0])
    close(task_arithmetic(p, scale=0.5, weights=[1, -1]), [0.0, 3.0])


def test_ties():
    # Two of four stay of each: (4, -3, 0, 0) and (-1, 0, 5, 0)... the sign of 4 - 1 is elected.
    p = piece([0.0] * 4, [4.0, -3.0, 1.0, 0.5], [-2.0, 0.1, 5.0, 0.2])
    close(ties(p, density=0.5), [4.0, -3.0, 5.0, 0.0])
    close(ties(p, density=1.0), [4.0, -3.0, 3.0, 0.35])
    close(ties(p, density=1.0, weights=[1, 3]), [-2.0, -3.0, 4.0, (0.5 + 0.6) / 4])
    close(ties(p, density=0.5, scale=2.0), [8.0, -6.0, 10.0, 0.0])


def test_model_stock():
    # cos = 1/2: t = 2 * 0.5 / 1.5 = 2/3.
    half = math.sqrt(3) / 2
    close(model_stock(piece([0.0, 0.0], [1.0, 0.0], [0.5, half])), [0.5, half / 3])
    close(model_stock(piece([1.0, 1.0], [1.0, 0.0], [0.0, 1.0])), [1.0, 1.0])  # right angle: t = 0


def test_dare_keeps_and_rescales():
    p = piece(torch.zeros(40_000), torch.ones(40_000), torch.full((40_000,), 2.0))
    found = dare(p, drop=0.75)
    values, counts = found.unique(return_counts=True)
    assert values.tolist() == [0.0, 2.0, 4.0, 6.0]  # nothing, 1 / 2 / 0.25, 2 / 2 / 0.25, both
    wanted = np.array([0.75 * 0.75, 0.25 * 0.75, 0.75 * 0.25, 0.25 * 0.25]) * 40_000
    assert stats.chisquare(counts.numpy(), wanted).pvalue > 1e-4
    assert float(dare(p, drop=0.75, rescale=False).max()) == 1.5


# --- selection


@pytest.mark.parametrize("weights", [None, [1, 1, 2], [0, 1, 3]])
def test_selection_frequencies(weights):
    p = piece(torch.zeros(60_000), *(torch.full((60_000,), i + 1.0) for i in range(3)))
    counts = np.bincount(select(p, weights=weights).int().numpy(), minlength=4)[1:]
    wanted = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1]) * 60_000
    assert counts[wanted == 0].sum() == 0
    assert stats.chisquare(counts[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_draws_of_coordinates_tensors_and_seeds_are_independent():
    def drawn(name: str, seed: int) -> np.ndarray:
        p = piece(torch.zeros(30_000), *(torch.full((30_000,), i + 1.0) for i in range(3)))
        return select(TensorPiece(name, p.base, p.models, seed)).int().numpy() - 1

    first = drawn("a.weight", 0)
    others = [first[1:], drawn("b.weight", 0), drawn("a.weight", 1)]
    for other in others:
        table = np.zeros((3, 3))
        np.add.at(table, (first[: len(other)], other), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-4
    assert np.array_equal(first, drawn("a.weight", 0))


def test_granularity():
    p = piece(torch.zeros(64, 8), *(torch.full((64, 8), i + 1.0) for i in range(2)))
    rows = select(p, granularity="row")
    assert all(len(row.unique()) == 1 for row in rows) and len(rows.unique()) == 2
    assert len(select(p, granularity="tensor").unique()) == 1
    values = {
        unit: {
            select(TensorPiece(f"m.layers.{i}.{part}.weight", p.base, p.models), granularity=unit)[0, 0]
            .item()
            for part in ("q.lora_A", "q.lora_B")
        }
        for unit in ("module", "layer")
        for i in (3,)
    }  # fmt: skip
    assert all(len(found) == 1 for found in values.values())
    assert unit_of("m.layers.3.q.lora_A.weight", "module") == "m.layers.3.q"
    assert unit_of("m.layers.3.q.weight", "module") == unit_of("m.layers.3.q.bias", "module")
    assert unit_of("m.layers.3.q.weight", "layer") == "m.layers.3"
    assert unit_of("lm_head.weight", "layer") == "lm_head.weight"


def test_exhaustive_resampling_draws_among_those_that_changed():
    n = 30_000
    deltas = [torch.full((n,), i + 1.0) for i in range(3)]
    deltas[1][: n // 2] = 0
    for each in deltas:
        each[-10:] = 0
    found = select(piece(torch.zeros(n), *deltas), resample="exhaustive").int().numpy()
    assert (found[-10:] == 0).all() and (found[:-10] > 0).all()
    first = np.bincount(found[: n // 2], minlength=4)[1:]
    assert first[1] == 0 and stats.binomtest(int(first[0]), n // 2).pvalue > 1e-4


def test_rounds_of_resampling_halve_what_is_left():
    """One of two is zero everywhere: 1/2 of the entries, after r rounds 1 / 2 ** (r + 1)."""
    p = piece(torch.zeros(40_000), torch.zeros(40_000), torch.ones(40_000))
    for rounds in (0, 1, 3):
        zeros = int((select(p, resample=rounds) == 0).sum())
        assert stats.binomtest(zeros, 40_000, 0.5 ** (rounds + 1)).pvalue > 1e-4


def test_resampling_does_nothing_in_fp32_and_something_in_bf16():
    for resample in (1, "exhaustive"):
        plain = drift(4)
        assert torch.equal(select(plain), select(plain, resample=resample))
        stored = drift(4, dtype=torch.bfloat16)
        drawn, again = select(stored), select(stored, resample=resample)
        zeros = [float((each == stored.base).float().mean()) for each in (drawn, again)]
        assert zeros[0] > 0.2 and zeros[1] < 0.7 * zeros[0]


def test_averaging_shortens_and_selection_does_not():
    random = torch.Generator().manual_seed(0)
    common, base = torch.randn(200, 500, generator=random), torch.zeros(200, 500)
    own = [torch.randn(200, 500, generator=random) for _ in range(4)]
    p = piece(base, *(math.sqrt(0.3) * common + math.sqrt(0.7) * each for each in own))
    ratios = {f.__name__: count(p, f(p)).figures()["norm_ratio"] for f in (average, select)}
    assert ratios["average"] == pytest.approx(math.sqrt(0.3 + 0.7 / 4), abs=5e-3)  # 0.69
    assert ratios["select"] == pytest.approx(1, abs=5e-3)
    assert count(p, average_norm(p)).figures()["norm_ratio"] == pytest.approx(1, abs=1e-5)


# --- identities


def exact(method, p: TensorPiece) -> torch.Tensor:
    """With the settings at which a method changes nothing, in the stored type."""
    settings = {"dare": {"drop": 0.0}, "ties": {"density": 1.0}}.get(method.__name__, {})
    return method(p, **settings).to(p.base.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", TENSORWISE)
def test_one_model_is_itself_bit_for_bit(method, dtype):
    p = drift(1, dtype=dtype)
    assert torch.equal(exact(method, p), p.models[0])


@pytest.mark.parametrize("method", [m for m in TENSORWISE if m is not task_arithmetic])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_are_themselves_bit_for_bit(method, dtype):
    p = drift(1, dtype=dtype)
    assert torch.equal(exact(method, TensorPiece(p.name, p.base, [p.models[0]] * 3)), p.models[0])


@given(seed=st.integers(0, 1000), k=st.integers(1, 4), shape=st.sampled_from([(), (0,), (3,), (2, 3), (2, 3, 2)]))  # fmt: skip
def test_any_shape(seed, k, shape):
    random = torch.Generator().manual_seed(seed)
    base, *models = (torch.randn(shape, generator=random) for _ in range(k + 1))
    for method in TENSORWISE:
        found = method(TensorPiece("x", base, models, seed))
        assert found.shape == base.shape and torch.isfinite(found).all()
    for unit in ("element", "row", "tensor"):
        found = select(
            TensorPiece("x", base, models, seed), granularity=unit, resample="exhaustive"
        )
        assert found.shape == base.shape
        assert torch.stack([found == m for m in models]).any(0).all()


# --- choosers


def bowl(best: list[float]):
    """A loss that is lowest at some weights, and answers as an evaluation does."""

    class Found:
        def __init__(self, w):
            self.value = float(((np.array(w) - best) ** 2).sum())

        def group(self, g: int) -> np.ndarray:
            assert g == 0, "the other half reports"
            return np.array([self.value, self.value])

    return Found


def test_soup_takes_what_helps():
    assert soup(Candidates(3, bowl([0.5, 0.5, 0.0]))) == [0.5, 0.5, 0.0]
    assert soup(Candidates(3, bowl([0.0, 1.0, 0.0]))) == [0.0, 1.0, 0.0]


def test_search_finds_weights_between():
    tried = []
    candidates = Candidates(3, lambda w: tried.append(w) or bowl([0.6, 0.3, 0.1])(w))
    found = search(candidates, rounds=12)
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    assert np.abs(np.array(found) - [0.6, 0.3, 0.1]).max() < 0.03
    assert len(tried) <= 4 + 12 * 6 and len(tried) == len({tuple(np.round(w, 9)) for w in tried})


@pytest.mark.parametrize("step", [0, 1, 1.5])
def test_a_search_goes_a_part_of_the_way(step):
    with pytest.raises(MergeError, match=f"step: found {step}, wanted a part of the way"):
        search(Candidates(2, bowl([0.5, 0.5])), step=step)


@pytest.mark.parametrize("method", [soup, search])
def test_a_loss_that_is_not_finite_ends_the_choice(method):
    with pytest.raises(MergeError, match=r"loss of nan with the weights .* broken"):
        method(Candidates(2, bowl([float("nan"), 0.0])))


# --- names


def test_every_method_of_the_table_is_found():
    for name in METHODS:
        assert named(name).func.__name__ == name


def test_settings_are_yaml_and_bound():
    method = named("ties", ["density=0.3", "weights=[1, 2]"])
    assert method.keywords == {"density": 0.3, "weights": [1, 2]}


def test_a_method_of_ones_own_may_take_any_setting(tmp_path, monkeypatch):
    (tmp_path / "my_merge.py").write_text("def mean(piece, **settings):\n    return piece.base\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert named("my_merge:mean", ["scale=2"], ["my_merge"]).keywords == {"scale": 2}


@pytest.mark.parametrize(
    "name, settings, text",
    [
        ("tie", [], "Did you mean ties?"),
        ("ties", ["densty=1"], "Did you mean density?"),
        ("nowhere.x:y", [], "--allow-code nowhere"),
        ("dare", ["drop=abc"], 'method.drop: found "abc", wanted a number'),
        ("dare", ["drop=true"], "method.drop: found true, wanted a number"),
        ("search", ["rounds=1.5"], "method.rounds: found 1.5, wanted a whole number"),
    ],
)
def test_wrong_names_are_refused(name, settings, text):
    with pytest.raises(ConfigError, match=text):
        named(name, settings)


@pytest.mark.parametrize(
    "method, settings, text",
    [
        (average, {"weights": [1]}, r"weights: found \[1\], wanted 2"),
        (average, {"weights": [1, -1]}, "wanted numbers >= 0"),
        (ties, {"density": 0}, "density: found 0"),
        (ties, {"weights": [1, -1]}, "wanted numbers >= 0"),
        (ties, {"weights": [0, 0]}, "not all 0"),
        (dare, {"drop": 1}, "drop: found 1"),
        (select, {"granularity": "column"}, "granularity: found 'column'"),
        (select, {"resample": "often"}, "resample: found 'often'"),
        (select, {"resample": 1, "granularity": "layer"}, "wanted none"),
    ],
)
def test_wrong_settings_are_refused(method, settings, text):
    with pytest.raises(MergeError, match=text):
        functools.partial(method, **settings)(piece([1.0], [1.0], [2.0]))


def test_report_counts():
    p = piece([1.0, 1.0, 1.0, 2.0], [1.0, 0.0, 2.0, 0.0], [-1.0, 0.0, 2.0, 1.0])
    found = count(p, torch.tensor([1.0, 1.0, 3.0, 2.0])).figures()
    assert found["zero_fraction"] == [0.5, 0.25] and found["zero_fraction_merged"] == 0.75
    assert found["sign_conflicts"] == 0.25
    assert found["cosine"] == pytest.approx((-1 + 4) / math.sqrt(5 * 6), rel=1e-5)
    assert found["norm_ratio"] == pytest.approx(2 / ((5**0.5 + 6**0.5) / 2), rel=1e-5)
    assert found["drift"][0] == pytest.approx(math.sqrt(5 / 7), rel=1e-5)
