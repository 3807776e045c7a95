"""Trackers of other libraries: each is called as its own interface wants, by way of accelerate. The libraries are stubs."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import PartialState

from mtl import plugins
from mtl.config import ConfigError, parse
from mtl.config.spec import check, resolve
from mtl.output import trackers

LIBRARIES = ("wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")
YAML = """\
model: {{name: m}}
tasks: {{a: {{train: a.jsonl, validation: b.jsonl, format: text}}}}
batch: {{examples: 1, tokens: 2048}}
train: {{steps: 1}}
optimizer: {{lr: 1.0e-3}}
output: runs/first
trackers: [{tracker}]
"""


class Calls(list):
    """What was called, by name, with the arguments given."""

    def __call__(self, name, returns=None):
        def called(*arguments, **keywords):
            self.append((name, arguments, keywords))
            return returns

        return called


def stub(calls: Calls, library: str) -> ModuleType:
    """As much of a library as accelerate uses, with the library's own names."""
    module = ModuleType(library)
    module.__spec__ = importlib.machinery.ModuleSpec(library, None)
    log, end = calls("log"), calls("end")
    match library:
        case "wandb" | "trackio" | "swanlab":
            module.init = calls("start", SimpleNamespace(log=log, finish=end))

            class Config(dict):
                def update(self, values, allow_val_change):
                    calls.append(("config", (values,), {}))

            module.config = Config()
        case "mlflow":
            limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
            module.utils = SimpleNamespace(validation=limits)
            module.search_experiments = lambda filter_string: []
            module.create_experiment = lambda name, **_: name
            module.start_run, module.log_params = calls("start"), calls("config")
            module.log_metrics, module.end_run = log, end
        case "comet_ml":
            module.__version__ = "3.50.0"
            writer = SimpleNamespace(set_step=lambda step: None, log_metric=log, end=end)
            writer.log_parameters = calls("config")
            module.start = calls("start", writer)
        case "clearml":
            task = SimpleNamespace(connect_configuration=calls("config"), close=end)
            task.get_logger = lambda: SimpleNamespace(
                report_scalar=log, report_single_value=calls("single")
            )
            module.Task = SimpleNamespace(
                current_task=lambda: None, init=calls("start", task), running_locally=lambda: True
            )
    return module


@pytest.fixture
def calls(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of a group that another test was in
        monkeypatch.delenv(name, raising=False)
    yield Calls()
    PartialState._reset_state()


def opened(tracker: str, output, **settings):
    config = parse(YAML.format(tracker=tracker))
    made = resolve(config, ("trackers", "0"), plugins.TRACKER)
    return made(output=output, steps=3, start=0, **settings)


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_gets_project_run_config_and_numbers(library, calls, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, stub(calls, library))
    (tmp_path / "first").mkdir()
    resolved = parse(YAML.format(tracker=library)).resolved()
    (tmp_path / "first" / "run.json").write_text(json.dumps({"config": resolved}))
    tracker = opened(f"{{name: {library}, project: mine}}", tmp_path / "first")
    tracker.log(2, {"eval/a/loss": 1.5, "train/grad_norm": float("nan")})
    tracker.say("nothing")
    tracker.close()
    names = [name for name, _, _ in calls]
    assert names == ["start", "config", "log", "end"]
    start, config, log, _ = [(arguments, keywords) for _, arguments, keywords in calls]
    assert "mine" in str(start)
    assert library == "comet_ml" or "first" in start[1].values(), "the run has the folder's name"
    settings = {
        k: v
        for values in (*config[0], config[1])
        if isinstance(values, dict)
        for k, v in values.items()
    }
    assert settings["model.name"] == "m" and settings["optimizer.lr"] == 1e-3
    assert "loss" in str(log) and "1.5" in str(log) and "2" in str(log) and "nan" not in str(log)


def test_a_library_gets_the_settings_of_the_newest_start(calls, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", stub(calls, "wandb"))
    for name, rate in (("run", 1), ("run.resumed-00000020", 3), ("run.resumed-00000004", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"config": {"optimizer.lr": rate}}))
    opened("wandb", tmp_path)
    (config,) = (arguments for name, arguments, _ in calls if name == "config")
    assert config == ({"optimizer.lr": 3},)


def test_a_librarys_own_keywords_reach_it(calls, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", stub(calls, "wandb"))
    opened("{name: wandb, entity: us, tags: [a]}", tmp_path)
    assert calls == [
        ("start", (), {"project": "coba-mtl", "name": tmp_path.name, "entity": "us", "tags": ["a"]})
    ]


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_that_is_missing_says_what_to_install(library, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {library.replace('_', '-')}"):
        opened(library, tmp_path)


def test_a_name_that_is_close_is_suggested():
    with pytest.raises(ConfigError, match="Did you mean wandb?"):
        parse(YAML.format(tracker="wandbb"), check=check(plugins.KINDS))
