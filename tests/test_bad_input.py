"""What is wrong with a run is reported before it starts: what, where, and what to do. Nothing that lies there is touched."""

import json
import shutil
from pathlib import Path

import pytest
import runs

from mtl import build, plugins
from mtl.config import ConfigError
from mtl.data.encoded import DataError
from mtl.distributed import engine
from mtl.distributed.ds_config import ds_config
from mtl.output import manifest
from mtl.output.checkpoint import CheckpointError, check_output


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def finished(yaml) -> Path:
    """A run of 4 steps."""
    output = yaml.parent / "finished"
    runs.train(yaml, *FOUR, f"output={output}").well()
    return output


FOUR = ["train.steps=4", "evaluate.every=100"]


def error_of(yaml: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plugins.read(str(yaml), overrides)
    return str(caught.value)


# The YAML


def with_line(yaml: Path, folder: Path, old: str, new: str) -> tuple[Path, str]:
    """A copy of the YAML with a line changed, and `file:line` of that line."""
    text = yaml.read_text()
    assert text.count(old) == 1
    path = folder / "bad.yaml"
    path.write_text(text.replace(old, new))
    return (
        path,
        f"{path}:{text[: text.index(old)].count(chr(10)) + new[: len(new) - len(new.lstrip())].count(chr(10)) + 1}",
    )


WRONG = {
    "unknown key": ("batch: {examples: 6,", "batch: {example: 6,", "batch.example: found an unknown key, wanted ", "Did you mean examples?"),
    "wrong type": ("train: {steps: 12}", "train: {steps: twelve}", "train.steps: found 'twelve', wanted a whole number >= 1", ""),
    "unknown balancer": ("{name: CoBa,", "{name: Koba,", "balancer.name: found 'Koba', wanted ", "Did you mean CoBa?"),
    "balancer's keyword": ("window: 5,", "windows: 5,", "balancer.windows: found an unknown keyword, wanted one of window=None", "Did you mean window?"),
    "balancer's value": ("window: 5,", "window: 0,", "balancer.window: CoBa window: found 0, wanted ", ""),
    "balancer's tasks": ("{name: CoBa, window: 5, warmup: 3}", "{name: Static, weights: [1, 2]}", "balancer: Static weights: found 2 of them, wanted one for each of 3 tasks", ""),
    "unknown tracker": ("engine: {zero: 2,", "trackers: [console, jsonn]\nengine: {zero: 2,", "trackers.1: found 'jsonn', wanted ", "Did you mean jsonl?"),
    "unknown format": ("format: text", "format: txt", "tasks.prose.format: found 'txt', wanted ", "Did you mean text?"),
    "role": ("format: messages", "format: {name: messages, roles: {human: usr}}", "tasks.chat.format.roles.human: found 'usr', wanted one of system, developer, user, assistant, tool", "Did you mean user?"),
    "roles": ("format: messages", "format: {name: messages, roles: [human]}", "tasks.chat.format.roles: found a list ('human'), wanted a mapping of names to roles", ""),
    "what may be dropped": ("format: messages", "format: {name: messages, may_drop: [reasoning, systm]}", "tasks.chat.format.may_drop: found 'systm', wanted some of reasoning, system, user,", "Did you mean system?"),
    "objective's value": ("mix: {shares: equal}", "objective: {name: preference, loss: null}\nmix: {shares: equal}", "objective.loss: ", "found None, wanted "),
    "code from outside": ("format: text", "format: elsewhere:rows", "tasks.prose.format: found 'elsewhere:rows', code from outside", "add --allow-code elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_the_yaml(yaml, tmp_path, case):
    old, new, *texts = WRONG[case]
    path, where = with_line(yaml, tmp_path, old, new)
    error = error_of(path)
    assert error.startswith(f"{where}: ") and len(error.splitlines()) == 1, error
    key, _, rest = texts[0].partition(":")
    assert (
        error.startswith(f"{where}: {key.removesuffix('.name')}")
        and rest in error
        and texts[1] in error
    ), error


def test_everything_that_is_wrong_is_said_at_once_and_the_exit_code_is_not_0(yaml, tmp_path):
    path, where = with_line(yaml, tmp_path, "window: 5,", "windows: 5,")
    ended = runs.train(
        path, "train.steps=-1", "tasks.copy.format=nothing", f"output={tmp_path}/run", world=2
    )
    assert ended.codes == [1, 1]
    full, rank_1 = (part for part in ended.err.split("error") if part.strip())
    assert f"{where}: balancer.windows: found an unknown keyword" in full
    assert "--set train.steps: train.steps: found -1, wanted a whole number >= 1" in full.replace(
        "=-1:", ":"
    )
    assert "found 'nothing', wanted" in full
    assert rank_1.startswith(" [rank 1]: ") and "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_no_such_yaml(tmp_path):
    ended = runs.train(tmp_path / "x.yml")
    assert (
        ended.codes == [1]
        and f"{tmp_path}/x.yml: found no such file, wanted a YAML config." in ended.err
    )


# DeepSpeed's keys beside ours


@pytest.mark.parametrize(
    "override, key, ours",
    [
        ("gradient_clipping=0.5", "optimizer.clip", "1.0"),
        ("zero_optimization.stage=3", "engine.zero", "2"),
        ("bf16.enabled=true", "model.precision", "False"),
        ("train_batch_size=8", "batch.examples", "1"),
        ("gradient_accumulation_steps=4", "batch.tokens", "1"),
        ("zero_optimization.offload_optimizer={device: nvme}", None, None),
        ("optimizer={type: Adam, params: {lr: 1.0}}", "optimizer", "none"),
    ],
)
def test_a_deepspeed_key_that_contradicts_ours_names_both_places(yaml, override, key, ours):
    config = plugins.read(
        str(yaml),
        [f"engine.deepspeed.{override}", *["engine.offload.optimizer=cpu"] * (key is None)],
    )
    with pytest.raises(ConfigError) as caught:
        ds_config(config, 1, "cpu")
    name = override.partition("=")[0]
    error = str(caught.value)
    assert (
        f"--set engine.deepspeed.{name}" in error
        and f"engine.deepspeed.{name}" in error.partition(": ")[2]
    )
    if key is None:
        assert "engine.offload.optimizer at --set engine.offload.optimizer" in error
    elif key == "optimizer":
        assert "wanted none, because `optimizer` decides" in error
    else:
        assert f"wanted {ours}. {key} at {yaml}" in error


@pytest.mark.parametrize(
    "which, key", [("offload_optimizer", "optimizer"), ("offload_param", "parameters")]
)
def test_offloading_is_asked_for_in_our_yaml(yaml, which, key):
    """Its checks, its build step and the memory estimate read it there."""
    config = plugins.read(
        str(yaml), [f"engine.deepspeed.zero_optimization.{which}={{device: cpu}}"]
    )
    with pytest.raises(
        ConfigError, match=f"{which}.device: found 'cpu', wanted 'none'.*engine.offload.{key}"
    ):
        ds_config(config, 1, "cpu")
    agreed = plugins.read(
        str(yaml), [f"engine.deepspeed.zero_optimization.{which}={{device: none}}"]
    )
    assert which not in ds_config(agreed, 1, "cpu")["zero_optimization"]


@pytest.mark.parametrize(
    "override", ["gradient_clipping=1.0", "gradient_clipping=auto", "zero_optimization.stage=2"]
)
def test_a_deepspeed_key_that_agrees_with_ours_is_fine(yaml, override):
    config = plugins.read(
        str(yaml),
        [
            f"engine.deepspeed.{override}",
            "engine.deepspeed.zero_optimization.reduce_bucket_size=1000",
        ],
    )
    written = ds_config(config, 1, "cpu")
    assert written["gradient_clipping"] == 1.0 and written["zero_optimization"]["stage"] == 2
    assert written["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize(
    "key, meant",
    [
        ("gradient_cliping", "gradient_clipping"),
        ("activation_checkpointing.cpu_checkpointin", "cpu_checkpointing"),
        ("zero_optimization.reduce_bucket_sise", "reduce_bucket_size"),
        ("zero_optimization.offload_optimizer.ration", "ratio"),
    ],
)
def test_a_key_that_deepspeed_does_not_know_names_the_nearest(yaml, key, meant):
    asked = [f"engine.deepspeed.{key}=1", "engine.offload.optimizer=cpu"]
    with pytest.raises(ConfigError) as caught:
        ds_config(plugins.read(str(yaml), asked), 1, "cpu")
    name = key.rpartition(".")[2]
    assert str(caught.value) == (
        f"--set engine.deepspeed.{key}=1: engine.deepspeed.{key}: found the key '{name}', wanted "
        f"a key that DeepSpeed knows. Did you mean {meant}?"
    )


def test_a_value_that_deepspeed_refuses_names_its_place(yaml):
    key = "engine.deepspeed.zero_optimization.reduce_bucket_size"
    with pytest.raises(ConfigError, match=f"{key}: found 'many', wanted what DeepSpeed takes"):
        ds_config(plugins.read(str(yaml), [f"{key}=many"]), 1, "cpu")


# As Hugging Face's examples have it, indented with tabs
DS_CONFIG = """\
{
\t"bf16": {"enabled": "auto"},
\t"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
\t"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
\t"zero_optimization": {
\t\t"stage": 2,
\t\t"reduce_bucket_size": 5e6,
\t\t"overlap_comm": true
\t},
\t"gradient_clipping": "auto",
\t"train_batch_size": "auto"
}
"""


@pytest.fixture
def ds_json(yaml, tmp_path, monkeypatch) -> tuple[Path, str]:
    """A YAML that names a DeepSpeed configuration, which lies in the current directory, and that line's place."""
    (tmp_path / "ds.json").write_text(DS_CONFIG)
    monkeypatch.chdir(tmp_path)
    return with_line(
        yaml,
        tmp_path,
        "deepspeed: {zero_optimization: {stage3_param_persistence_threshold: 0}}",
        "deepspeed: ds.json",
    )


def test_a_deepspeed_json_stands_for_the_mapping(ds_json):
    path, where = ds_json
    config = plugins.read(str(path), ["engine.deepspeed.zero_optimization.allgather_bucket_size=7"])
    written = ds_config(config, 1, "cpu")
    assert (
        written["zero_optimization"]["reduce_bucket_size"] == 5e6
        and written["zero_optimization"]["overlap_comm"] is True
    )
    assert written["zero_optimization"]["allgather_bucket_size"] == 7
    assert '"auto"' not in json.dumps(written) and not {"optimizer", "scheduler"} & written.keys()
    assert config.where("engine.deepspeed") == where
    assert config.where("engine.deepspeed.zero_optimization.stage") == "ds.json:6"
    assert config.resolved()["engine"]["deepspeed"]["bf16"] == {"enabled": "auto"}, (
        "the run's own YAML needs no other file"
    )
    assert plugins.read(str(path), ["engine.deepspeed={}"]).engine.deepspeed == {}
    assert plugins.read(
        str(path), ["engine.deepspeed={}", "engine.deepspeed=ds.json"]
    ).engine.deepspeed == config.engine.deepspeed | {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True}
    }


def test_a_deepspeed_json_that_contradicts_names_both_lines(ds_json):
    path, where = ds_json
    with pytest.raises(ConfigError) as caught:
        ds_config(plugins.read(str(path), ["engine.zero=3", "optimizer.clip=0.5"]), 1, "cpu")
    key = "engine.deepspeed.zero_optimization.stage"
    assert (
        str(caught.value)
        == f"ds.json:6: {key}: found 2, wanted 3. engine.zero at --set engine.zero=3 makes it so; leave this key out."
    )
    Path("ds.json").write_text(DS_CONFIG.replace('"stage": 2', '"stage": 1'))
    with pytest.raises(ConfigError) as caught:
        ds_config(plugins.read(str(path)), 1, "cpu")
    assert (
        str(caught.value)
        == f"ds.json:6: {key}: found 1, wanted 2. engine.zero at {where} makes it so; leave this key out."
    )


@pytest.mark.parametrize(
    "content, found",
    [
        (
            None,
            "'ds.json', which cannot be read (No such file or directory), wanted a file with a JSON object. Paths start at ",
        ),
        (
            DS_CONFIG.replace('"bf16":', '"bf16"'),
            "text that is not JSON (ds.json:2: Expecting ':' delimiter, column 9), wanted ",
        ),
        ('{"a": NaN}', "text that is not JSON (ds.json: NaN is not a number in JSON), wanted "),
        ("[1]", "a list (1) in ds.json, wanted a file with a JSON object."),
        ("", "text that is not JSON (ds.json:1: Expecting value, column 1), wanted "),
    ],
)
def test_a_deepspeed_json_that_cannot_be_read(ds_json, content, found):
    path, where = ds_json
    Path("ds.json").unlink() if content is None else Path("ds.json").write_text(content)
    errors = error_of(path, "train.steps=0").splitlines()
    assert len(errors) == 2 and errors[0].startswith(f"{where}: engine.deepspeed: found {found}"), (
        errors
    )
    assert errors[1].startswith("--set train.steps=0: train.steps: found 0")


def test_a_key_twice_in_a_deepspeed_json(ds_json):
    Path("ds.json").write_text('{\n"a": {"b": 1,\n"b": 2}\n}')
    assert (
        error_of(ds_json[0])
        == "ds.json:3: engine.deepspeed.a.b: found the key a second time (first: ds.json:2), wanted it once."
    )


# Offloading


@pytest.mark.parametrize(
    "settings, text",
    [
        (
            "zero: 0, offload: {optimizer: cpu}",
            "engine.offload.optimizer: found cpu, wanted none at engine.zero 0. It needs zero 1.",
        ),
        (
            "zero: 2, offload: {optimizer: nvme, nvme_path: /x}",
            "engine.offload.optimizer: found nvme, wanted none at engine.zero 2. It needs zero 3.",
        ),
        (
            "zero: 2, offload: {parameters: cpu}",
            "engine.offload.parameters: found cpu, wanted none at engine.zero 2. It needs zero 3.",
        ),
        (
            "zero: 3, offload: {parameters: nvme}",
            "engine.offload.nvme_path: found nothing, wanted a path. engine.offload.parameters: nvme needs it.",
        ),
    ],
)
def test_what_a_stage_cannot_offload(yaml, tmp_path, settings, text):
    path, where = with_line(
        yaml,
        tmp_path,
        "zero: 2, deepspeed: {zero_optimization: {stage3_param_persistence_threshold: 0}}",
        settings,
    )
    assert error_of(path) == f"{where}: {text}"


@pytest.mark.parametrize(
    "compatible, reason", [(False, "no libaio, or no compiler"), (True, "no ninja")]
)
def test_an_op_that_cannot_be_built_is_said_first(yaml, tmp_path, monkeypatch, compatible, reason):
    class Builder:
        def is_compatible(self, verbose):
            return compatible

        def load(self, verbose):
            raise RuntimeError("Unable to load\nno ninja")

    monkeypatch.setattr(
        type(engine.get_accelerator()), "create_op_builder", lambda self, name: Builder()
    )
    settings = "zero: 3, offload: {parameters: nvme, nvme_path: /x}"
    path, where = with_line(
        yaml,
        tmp_path,
        "zero: 2, deepspeed: {zero_optimization: {stage3_param_persistence_threshold: 0}}",
        settings,
    )
    said = []
    with pytest.raises(ConfigError) as caught:
        engine.build_ops(plugins.read(str(path)), said.append)
    error = str(caught.value)
    assert error.startswith(
        f"{where}: engine.offload.parameters: found nvme, but DeepSpeed's async_io op does not build ({reason})"
    )
    assert "apt-get install libaio-dev" in error and len(said) == compatible
    engine.build_ops(plugins.read(str(yaml)), said.append)  # nothing is offloaded


# The model and the data


def prepared(yaml: Path, *overrides: str):
    config = plugins.read(str(yaml), overrides)
    return build.encode(config, say=lambda text: None).tasks


def test_a_model_that_is_not_there(yaml, tmp_path):
    ended = runs.train(yaml, f"model.name={tmp_path}/none", f"output={tmp_path}/run")
    assert (
        ended.codes == [1]
        and f"model.name: found no tokenizer of '{tmp_path}/none'" in ended.err
        and not (tmp_path / "run").exists()
    )


def test_files_that_are_not_there_are_all_named(yaml, tmp_path):
    overrides = [
        f"tasks.copy.train={tmp_path}/a.jsonl",
        f"tasks.prose.validation={tmp_path}/b.jsonl",
    ]
    ended = runs.train(yaml, *overrides, f"output={tmp_path}/run")
    assert ended.codes == [1] and not (tmp_path / "run").exists()
    for key, name in ("copy.train", "a"), ("prose.validation", "b"):
        assert (
            f"tasks.{key}: nothing found under '{tmp_path}/{name}.jsonl', tried the file or folder"
            in ended.err
        )


def test_an_empty_task(yaml, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError) as caught:
        prepared(yaml, f"tasks.chat.validation={tmp_path}/empty.jsonl")
    assert "tasks.chat.validation: found no usable row\n  0 of 0 rows kept" in str(caught.value)


def test_a_task_whose_targets_are_all_masked(yaml, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "5 + 1?"}]}] * 5
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = runs.train(yaml, f"tasks.chat.train={path}", f"output={tmp_path}/run")
    assert ended.codes == [1] and not (tmp_path / "run").exists()
    assert "tasks.chat.train: found no usable row" in ended.err
    assert "5 rows dropped: no target" in ended.err and f"{path}:1: " in ended.err


def test_rows_that_cannot_be_read_are_reported_and_the_run_goes_on(yaml, tmp_path):
    path = tmp_path / "damaged.jsonl"
    good = Path(yaml.parent / "copy.train.jsonl").read_text().splitlines()
    path.write_text(
        "\n".join(
            [
                good[0],
                '{"prompt": "a',
                *good[1:],
                '{"prompt": "a"}',
                '{"prompt": "a", "completion": ""}',
            ]
        )
        + "\n"
    )
    ended = runs.train(yaml, *FOUR, f"tasks.copy.train={path}", f"output={tmp_path}/run").well()
    report = [
        line.strip()
        for line in ended.err.partition("copy: ")[2].partition("chat: ")[0].splitlines()
    ]
    assert f"train: {len(good)} of {len(good) + 3} rows kept" in "\n".join(report)
    assert [line.removeprefix("train: ") for line in report if "dropped" in line] == [
        "1 row dropped: missing key", "1 row dropped: no target", "1 row dropped: unreadable",
    ]  # fmt: skip
    assert any(f"{path}:2: not JSON" in line for line in report)
    assert any(f"{path}:{len(good) + 2}: " in line and "completion" in line for line in report)


# On top of what lies there


def test_a_run_does_not_start_on_another(yaml, finished):
    before = runs.contents(finished)
    ended = runs.train(yaml, *FOUR, f"output={finished}", world=2)
    assert ended.codes == [1, 1]
    assert (
        f"error: output: {finished} already holds a run. Add --resume to go on with it, or choose another"
        in ended.err
    )
    assert runs.contents(finished) == before


def test_an_output_folder_that_holds_something_else_is_fine(tmp_path):
    (tmp_path / "notes.txt").touch()
    check_output(tmp_path, resume=False)
    manifest.mark(tmp_path, "run")
    (tmp_path / "metrics.jsonl").touch()
    check_output(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="already holds a run"):
        check_output(tmp_path, resume=False)


def other_tasks(yaml: Path, folder: Path) -> Path:
    path = folder / "x.yaml"
    path.write_text(yaml.read_text().replace("  prose:\n", "  verse:\n"))
    return path


def other_data(yaml: Path, folder: Path) -> Path:
    name = "prose.train.jsonl"
    (folder / name).write_text((yaml.parent / name).read_text() + '{"text": "one more"}\n')
    path = folder / "x.yaml"
    path.write_text(yaml.read_text().replace(f"{yaml.parent}/{name}", f"{folder}/{name}"))
    return path


CHANGES = {
    "tasks": (
        other_tasks,
        [],
        "  tasks: checkpoint ['copy', 'chat', 'prose'], now ['copy', 'chat', 'verse']",
    ),
    "data": (other_data, [], "  tasks.prose.train (content): checkpoint '"),
    "balancer": (
        None,
        ["balancer=Equal"],
        "method: saved 'balancers.coba:CoBa', here 'balancers.equal:Equal'",
    ),
    "balancer's settings": (
        None,
        ["balancer.window=6"],
        "Resume with what was saved, or start a new run",
    ),
    "loss weight": (
        None,
        ["tasks.copy.loss_weight=2.0"],
        "loss_weight: saved [1.0, 1.0, 1.0], here [2.0, 1.0, 1.0]",
    ),
    "seed": (
        None,
        ["train.seed=1"],
        "  train.seed: checkpoint 0, now 1",
    ),
    "batch": (None, ["batch.examples=7"], "  batch.examples: checkpoint 6, now 7"),
    "learning rate": (None, ["optimizer.lr=0.1"], "  optimizer: checkpoint {"),
    "adapters": (None, ["model.lora.r=4"], "  model.lora: checkpoint None, now {"),
    "judge": (None, ["evaluate.best=worst"], "  evaluate.best: checkpoint 'macro', now 'worst'"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_does_not_go_on_as_another(yaml, finished, tmp_path, case):
    change, overrides, text = CHANGES[case]
    other = change(yaml, tmp_path) if change else yaml
    before = runs.contents(finished)
    ended = runs.train(other, *FOUR, *overrides, f"output={finished}", resume=True)
    assert set(ended.codes) == {1} and text in ended.err, ended.err
    assert "Traceback" not in ended.err
    assert runs.contents(finished) == before


def test_shares_cannot_change_when_a_run_goes_on(yaml, tmp_path):
    """They decide which rows are drawn next."""
    output = tmp_path / "run"
    explicit = ["mix.shares=explicit", "tasks.copy.share=1", "tasks.chat.share=1"]
    runs.train(yaml, *FOUR, *explicit, "tasks.prose.share=1", f"output={output}").well()
    before = runs.contents(output)
    ended = runs.train(
        yaml, *FOUR, *explicit, "tasks.prose.share=2", f"output={output}", resume=True
    )
    assert ended.codes == [1] and "tasks.prose.share: checkpoint 1.0, now 2.0" in ended.err
    assert runs.contents(output) == before


@pytest.mark.parametrize("missing", ["state.json", "state.safetensors", "engine", "."])
def test_a_checkpoint_that_is_not_whole(yaml, finished, tmp_path, missing):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    folder = output / "checkpoints" / (output / "checkpoints" / "latest").read_text()
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    before = runs.contents(output)
    ended = runs.train(yaml, *FOUR, f"output={output}", resume=True)
    assert ended.codes == [1] and str(folder / missing) in ended.err
    assert runs.contents(output) == before
