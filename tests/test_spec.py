"""Names in the YAML become callables; what does not fit is reported with its line."""

import pickle
import sys
import textwrap

import pytest

import balancers
from mtl.config import ConfigError, parse
from mtl.config.spec import Kind, check, resolve

YAML = """\
model: {name: m}
tasks:
  a: {train: a, validation: a, format: pair}
  b:
    train: b
    validation: b
    format:
      name: pair
      sep: "-"
train: {steps: 1}
output: o
balancer: Ruler
"""


class Base:
    pass


class Ruler(Base):
    def __init__(self, window: int = 200, warmup: int = 100):
        if window < 1:
            raise ValueError(f"window: found {window}, wanted at least 1")
        if warmup > window:
            raise ValueError("warmup is above window")
        self.window, self.warmup = window, warmup


class Needy(Base):
    def __init__(self, weights: list, *, scale: float):
        pass


class Other:
    pass


class Log:
    def __init__(self, output: str, steps: int, every: int = 3):
        self.got = output, steps, every


class Open:
    def __init__(self, *, every: int = 1, **rest):
        self.rest = rest


def pair(row: dict, sep: str = " ") -> str:
    return sep.join(row["pair"])


def made_by_hand(window: int = 1):
    return Ruler(window, 0) if window > 1 else Other()


NUMBER = 3
HERE = {name: f"{__name__}:{name}" for name in ("Ruler", "Needy", "Log", "Open", "pair")}
BALANCER = Kind(HERE, base=Base, build=True)
FORMAT = Kind(HERE, arguments=1)
TRACKER = Kind(HERE, keywords=("output", "steps"))


def config(line: str = "balancer: Ruler", **more):
    return parse(YAML.replace("balancer: Ruler", line), "x.yaml", **more)


def wrong(
    line: str, kind: Kind = BALANCER, allow: tuple[str, ...] = (), path: str = "balancer"
) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config(line), path, kind, allow)()
    return str(caught.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's package on the path; gives the function that writes it."""

    def write(text: str) -> str:
        folder = tmp_path / "plug"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "own.py").write_text(textwrap.dedent(text))
        return str(folder / "own.py")

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in ("plug", "plug.own"):
        sys.modules.pop(name, None)


def test_names_and_keywords():
    made = resolve(config("balancer: {name: Ruler, window: 7, warmup: 2}"), "balancer", BALANCER)()
    assert (type(made), made.window, made.warmup) == (Ruler, 7, 2)
    assert resolve(config(), "tasks.a.format", FORMAT)({"pair": ["x", "y"]}) == "x y"
    assert resolve(config(), ("tasks", "b", "format"), FORMAT)({"pair": ["x", "y"]}) == "x-y"
    log = resolve(config("trackers: [{name: Log, every: 9}]"), "trackers.0", TRACKER)(
        output="o", steps=5
    )
    assert log.got == ("o", 5, 9)
    assert resolve(config("trackers: [{name: Open, z: 9}]"), "trackers.0", TRACKER)(
        output="o", steps=5
    ).rest == {
        "output": "o",
        "steps": 5,
        "z": 9,
    }


def test_a_function_travels_to_workers():
    read = pickle.loads(pickle.dumps(resolve(config(), "tasks.b.format", FORMAT)))
    assert read({"pair": ["x", "y"]}) == "x-y"


def test_an_error_of_a_function_is_its_own():
    with pytest.raises(KeyError):
        resolve(config(), "tasks.a.format", FORMAT)({})


NAMES = "Ruler, Needy, Log, Open, pair or package.module:attribute"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            "balancer: ruler",
            f"x.yaml:12: balancer: found 'ruler', wanted {NAMES}. Did you mean Ruler?",
        ),
        ("balancer: os.path", f"x.yaml:12: balancer: found 'os.path', wanted {NAMES}."),
        ("balancer: '../x:y'", f"x.yaml:12: balancer: found '../x:y', wanted {NAMES}."),
        (
            "balancer: plug.own:Ruler",
            "x.yaml:12: balancer: found 'plug.own:Ruler', code from outside, wanted a "
            "built-in name, or code that is allowed. "
            "To let it run, add --allow-code plug to the command line.",
        ),
        (
            "balancer:\n  name: Ruler\n  windw: 3",
            "x.yaml:14: balancer.windw: found an unknown keyword, wanted one of window=200, warmup=100. Did you mean window?",
        ),
        (
            "balancer: {name: Needy, x: 1}",
            "x.yaml:12: balancer.x: found an unknown keyword, wanted one of weights, scale.\n"
            "x.yaml:12: balancer.weights: found nothing, wanted a value, which Needy has no default for.\n"
            "x.yaml:12: balancer.scale: found nothing, wanted a value, which Needy has no default for.",
        ),
        (
            "balancer:\n  name: Ruler\n  warmup: 0\n  window: 0",
            "x.yaml:15: balancer.window: Ruler refuses it: window: found 0, wanted at least 1",
        ),
        (
            "balancer:\n  name: Ruler\n  warmup: 2\n  window: 1",
            "x.yaml:12: balancer: Ruler refuses it: warmup is above window",
        ),
        (  # names one keyword in passing
            "balancer:\n  name: Ruler\n  warmup: 201",
            "x.yaml:12: balancer: Ruler refuses it: warmup is above window",
        ),
        (
            "balancer:\n  name: Ruler\n  window: x",
            "x.yaml:12: balancer: Ruler refuses it: '<' not supported between instances of 'str' and 'int'",
        ),
        (
            "balancer: Log",
            f"x.yaml:12: balancer: found '{__name__}:Log', which is not a Base, wanted a subclass of {__name__}.Base.",
        ),
        (
            "balancer: pair",
            "x.yaml:12: balancer.row: found nothing, wanted a value, which pair has no default for.",
        ),
    ],
)
def test_what_does_not_fit(line, error):
    assert wrong(line) == error


def test_an_override_is_named():
    with pytest.raises(ConfigError) as caught:
        resolve(config(overrides=["balancer.windw=3"]), "balancer", BALANCER)
    assert str(caught.value) == (
        "--set balancer.windw=3: balancer.windw: found an unknown keyword, "
        "wanted one of window=200, warmup=100. Did you mean window?"
    )


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "Rulr",
            f"found '{__name__}:Rulr', which is not there, wanted an attribute of {__name__}. Did you mean Ruler?",
        ),
        ("NUMBER", f"found '{__name__}:NUMBER', of type int, wanted a class or a function."),
        ("made_by_hand", "found made_by_hand, which made one of type Other, wanted Base."),
    ],
)
def test_code_from_outside_that_does_not_fit(name, error):
    assert (
        wrong(f"balancer: {__name__}:{name}", allow=(__name__,)) == f"x.yaml:12: balancer: {error}"
    )


def test_a_function_may_make_what_is_wanted():
    spec = f"balancer: {{name: '{__name__}:made_by_hand', window: 4}}"
    assert resolve(config(spec), "balancer", BALANCER, [__name__])().window == 4


class Around(Base):
    def __init__(self, balancer: object, floor: float = 0.0):
        if isinstance(balancer, int):
            raise ValueError(f"balancer: found {balancer}, wanted a name")
        self.balancer, self.floor = balancer, floor


AROUND = Kind({**HERE, "Around": f"{__name__}:Around"}, base=Base, build=True, inner="balancer")


def test_a_spec_within_a_spec(package):
    package(
        f"from {__name__} import Base\nclass Mine(Base):\n    def __init__(self, power=4): self.power = power"
    )
    line = "balancer:\n  name: Around\n  floor: 0.1\n  balancer:\n    name: Around\n    balancer: {name: 'plug.own:Mine', power: 2}"
    made = resolve(config(line), "balancer", AROUND, ["plug"])()
    assert made.floor == 0.1 and type(made.balancer) is Around and made.balancer.balancer.power == 2
    assert (
        type(
            resolve(
                config("balancer: {name: Around, balancer: Ruler}"), "balancer", AROUND
            )().balancer
        )
        is Ruler
    )


@pytest.mark.parametrize(
    ("inner", "error"),
    [
        (
            "{name: plug.own:Mine}",
            "x.yaml:15: balancer.balancer: found 'plug.own:Mine', code from outside, wanted a built-in name, or code that is "
            "allowed. To let it run, add --allow-code plug to the command line.",
        ),
        (
            "Rulr",
            f"x.yaml:15: balancer.balancer: found 'Rulr', wanted {NAMES.replace(' or', ', Around or')}. Did you mean Ruler?",
        ),
        (
            "{name: Ruler, windw: 3}",
            "x.yaml:15: balancer.balancer.windw: found an unknown keyword, wanted one of window=200, warmup=100. Did you mean window?",
        ),
        (
            "{name: Ruler, window: 0}",
            "x.yaml:15: balancer.balancer.window: Ruler refuses it: window: found 0, wanted at least 1",
        ),
        ("3", "x.yaml:15: balancer.balancer: Around refuses it: balancer: found 3, wanted a name"),
    ],
)
def test_what_does_not_fit_within_a_spec(inner, error):
    line = f"balancer:\n  name: Around\n  flor: 0.1\n  balancer: {inner}"
    floor = "x.yaml:14: balancer.flor: found an unknown keyword, wanted one of balancer, floor=0.0. Did you mean floor?"
    is_early = "refuses" not in error  # what a constructor says is heard when it is called
    assert wrong(line, AROUND) == (f"{floor}\n{error}" if is_early else floor)
    assert wrong(line.replace("flor", "floor"), AROUND) == error


def test_what_the_program_passes_must_fit_and_is_not_the_users():
    assert wrong("trackers: [Ruler]", TRACKER, path="trackers.0") == (
        "x.yaml:12: trackers.0: found 'Ruler', whose signature is (window: int = 200, warmup: int = 100) "
        "(got an unexpected keyword argument 'output'), wanted one that takes output=, steps=."
    )
    assert wrong("trackers: [{name: Log, steps: 3}]", TRACKER, path="trackers.0") == (
        "x.yaml:12: trackers.0.steps: found an unknown keyword, wanted one of every=3."
    )
    assert wrong("objective: {name: pair, row: 3}", FORMAT, path="objective") == (
        "x.yaml:12: objective.row: found an unknown keyword, wanted one of sep=' '."
    )
    assert wrong(
        "objective: Other", Kind({"Other": f"{__name__}:Other"}, arguments=2), path="objective"
    ) == (
        "x.yaml:12: objective: found 'Other', whose signature is () (too many positional arguments), "
        "wanted one that takes 2 arguments."
    )


def test_no_keywords_and_no_signature():
    table = {"Other": f"{__name__}:Other", "dict": "builtins:dict"}
    assert wrong("objective: {name: Other, x: 1}", Kind(table), path="objective") == (
        "x.yaml:12: objective.x: found an unknown keyword, wanted none: Other takes no keywords."
    )
    assert wrong("objective: dict", Kind(table), path="objective") == (
        "x.yaml:12: objective: found 'dict', whose signature is unknown, wanted one written in Python."
    )


def test_a_users_package_runs_only_when_allowed(package):
    package("ran = True\ndef join(row, sep=' '): return sep.join(row['pair'])")
    made = config("objective: {name: 'plug.own:join', sep: +}")
    with pytest.raises(ConfigError, match="--allow-code plug"):
        resolve(made, "objective", FORMAT, ["plu", "plug.own"])
    assert "plug" not in sys.modules
    assert resolve(made, "objective", FORMAT, ["plug"])({"pair": "ab"}) == "a+b"


def test_an_import_that_fails_is_reported_with_its_cause(package):
    file = package("import torhc")
    assert wrong("objective: plug.own:x", FORMAT, ["plug"], "objective") == (
        f"x.yaml:12: objective: found 'plug.own:x', whose import fails (ModuleNotFoundError: No module named 'torhc' "
        f"at {file}:1), wanted a module that can be imported."
    )
    assert wrong("objective: glup.own:x", FORMAT, ["glup"], "objective") == (
        "x.yaml:12: objective: found 'glup.own:x', whose import fails (ModuleNotFoundError: No module named 'glup'), "
        "wanted a module that can be imported. Is it installed, in the current directory or in PYTHONPATH?"
    )


def test_any_exception_of_an_import_is_reported(package):
    file = package("\n\n1 / 0")
    assert wrong("objective: plug.own:x", FORMAT, ["plug"], "objective") == (
        f"x.yaml:12: objective: found 'plug.own:x', whose import fails (ZeroDivisionError: division by zero "
        f"at {file}:3), wanted a module that can be imported."
    )


KINDS = {
    "balancer": BALANCER,
    "objective": Kind({}, arguments=3),
    "tasks.*.format": FORMAT,
    "trackers.*": TRACKER,
}


def test_check_reports_specs_together_with_the_rest():
    text = (
        YAML.replace("pair", "pear")
        .replace("Ruler", "{name: Ruler, window: 0}")
        .replace("steps", "stesp")
    )
    text += "trackers: [Log, {name: Open}, 3, {name: Log, evry: 1}]\n"
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml", check=check(KINDS))
    assert str(caught.value).splitlines() == [
        f"x.yaml:3: tasks.a.format: found 'pear', wanted {NAMES}. Did you mean pair?",
        "x.yaml:8: tasks.b.format: found 'pear', wanted " + NAMES + ". Did you mean pair?",
        "x.yaml:10: train.stesp: found an unknown key, wanted steps, epochs, seed, order, not_finite, spike or from. Did you mean steps?",
        "x.yaml:10: train: found neither steps nor epochs, wanted one of them. For instance train: {steps: 1000}.",
        "x.yaml:12: balancer.window: Ruler refuses it: window: found 0, wanted at least 1",
        "x.yaml:13: trackers.2: found 3, wanted a name, or a mapping with name and keywords.",
        "x.yaml:13: trackers.3: found 'Log' a second time, wanted each tracker once.",
        "x.yaml:13: trackers.3.evry: found an unknown keyword, wanted one of every=3. Did you mean every?",
    ]


def test_check_passes_what_fits():
    made = config(check=check({"balancer": BALANCER, "tasks.*.format": FORMAT}))
    assert made.balancer.name == "Ruler"


def test_every_balancer_that_ships_resolves():
    kind = Kind(balancers.METHODS, base=balancers.Balancer)
    for name in balancers.METHODS:
        try:
            resolve(config(f"balancer: {name}"), "balancer", kind)
        except ConfigError as error:  # it has no default for something, which is the only excuse
            assert "has no default for" in str(error)
    with pytest.raises(
        ConfigError, match=r"^x.yaml:12: balancer.windw: found .*Did you mean window\?$"
    ):
        config("balancer: {name: CoBa, windw: 3}", check=check({"balancer": kind}))
    with pytest.raises(ConfigError, match="^x.yaml:14: balancer.window: CoBa window: found 0"):
        resolve(config("balancer:\n  name: CoBa\n  window: 0"), "balancer", kind)()
    line = "balancer:\n  name: CoBa\n  divergence: released\n  forgetting: true"
    error = "CoBa forgetting: found true beside divergence"  # which is a keyword too
    with pytest.raises(ConfigError, match=f"^x.yaml:15: balancer.forgetting: {error}"):
        resolve(config(line), "balancer", kind)()
