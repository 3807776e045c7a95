"""Bad configs: a few hundred of `make attack`, and what a first attack found."""

import pytest
from attack_config import BASE, TEXTS, attack

from mtl.config import ConfigError, parse
from mtl.config.document import BRACKETS, MOST, Document, _Loader


def test_each_of_some_hundred_mutated_configs_is_a_clean_error_or_valid():
    counts, bad = attack(200, limit=20)
    assert not bad, "\n".join(bad[:3])
    assert counts["valid"] > 3 and counts["refused"] > 150, "the attack is one"


@pytest.mark.parametrize("text", TEXTS[-2:])
def test_an_alias_bomb_is_found_before_it_goes_off(text):
    """258 bytes took 7 s and 409 MB."""
    with pytest.raises(ConfigError, match="20,000 values and more, aliases read out, wanted fewer"):
        parse(BASE + text)
    assert Document(BASE + text)._count < MOST + 100


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 3000])
def test_too_deep_is_an_error_of_ours(text):
    with pytest.raises(ConfigError, match="hundreds of levels deep"):
        parse(text)
    with pytest.raises(ConfigError, match="hundreds of levels deep"):
        parse(BASE, overrides=[f"balancer.x={text}"])
    with pytest.raises(ConfigError, match="too deep in others, wanted at most 50 levels"):
        parse(BASE, overrides=["balancer.x=" + "[" * 60 + "]" * 60])


def test_reading_ends_where_too_many_brackets_are_open(monkeypatch):
    """1,000 brackets took a second: the scanner looks at all that are open at each next token."""
    tokens, fetch = [], _Loader.fetch_more_tokens
    monkeypatch.setattr(_Loader, "fetch_more_tokens", lambda self: tokens.append(fetch(self)))
    with pytest.raises(ConfigError, match="hundreds of levels deep"):
        parse("[" * 1000)
    assert len(tokens) <= BRACKETS + 5


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optimizer.lr=1e300", "optimizer.lr: found 1e+300, wanted a number > 0 and <= 1000"),
        ("schedule.warmup=13", "schedule.warmup: found 13, wanted at most train.steps, 12"),
        ("train.steps=1000000000000000000000", "wanted a whole number >= 1 and < 100000000"),
        ("trackers=[jsonl, {name: jsonl}]", "'jsonl' a second time, wanted each tracker once"),
        ("output=/", "output: found '/', wanted a folder of the run's own"),
        ("output=/etc/..", "output: found '/etc/..', wanted a folder of the run's own"),
        ("output=~", "output: found null, wanted a path"),
        ('output="~/"', "wanted a folder of the run's own"),
        ("mix={shares: temperature, temperature: 1e-300}", "wanted a number >= 0.05"),
        ("engine.timeout_minutes=1e300", "wanted a number > 0 and <= 10080"),
        ("engine.deepspeed.x=.nan", "engine.deepspeed.x: found nan, wanted a finite number"),
        ("engine.deepspeed.x=[{y: -.inf}]", "deepspeed.x.0.y: found -inf, wanted a finite number"),
    ],
)
def test_nonsense_is_refused(override, text):
    with pytest.raises(ConfigError) as found:
        parse(BASE, overrides=[override])
    assert text in str(found.value)
