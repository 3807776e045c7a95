"""The YAML: what is read as what, what is refused in which words, overrides, and the documents made from the schema."""

import copy
import functools
import json
import math
import operator
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtl.config import ConfigError, dump, load, parse, reference
from mtl.config import schema as config
from mtl.config.document import Document, show

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = """\
model: {name: m}
tasks:
  define: {train: a.jsonl, validation: b.jsonl, format: text}
  v1.5: {train: [a.jsonl, c.jsonl], validation: b.jsonl, format: {name: text, column: body}}
train: {steps: 10}
output: runs/x
"""


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml", overrides)
    return str(caught.value).splitlines()


def with_(line: str) -> str:
    """The minimal config with one more line, its seventh."""
    return MINIMAL + line + "\n"


NOT = "wanted YAML 1.2."


# Reading YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+.inf", math.inf),
        ("-.INF", -math.inf),
        ("0", 0),
        ("-3", -3),
        ("+7", 7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("none", "none"),
        ("None", "None"),
        ("2024-01-31", "2024-01-31"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("017.5e", "017.5e"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("=", "="),
        ("tRUE", "tRUE"),
        ("-0o7", "-0o7"),
        ("e5", "e5"),
        (".", "."),
        ("[1, a]", [1, "a"]),
        ("{1: no}", {"1": "no"}),
    ],
)
def test_yaml_1_2_core_schema(text, value):
    document = Document(f"key: {text}")
    assert document.problems == []
    assert repr(document.data) == repr({"key": value})


def test_nan_is_a_number():
    assert math.isnan(Document("key: .nan").data["key"])


@pytest.mark.parametrize(
    ("value", "held"),
    [("5%", 0.05), ("12.5 %", 0.125), ("0.05", 0.05), ("12", 12), ("a", ("a",)), ("[a]", ("a",))],
)
def test_validation_is_rows_or_a_part_of_the_training_rows(value, held):
    config = parse(MINIMAL, "x.yaml", ["tasks.define.validation=" + value])
    assert config.tasks["define"].validation == held


@pytest.mark.parametrize("value", ["0", "-1", "150%", "0%", "1.5", "true", "[]"])
def test_a_part_of_the_training_rows_is_some_of_them(value):
    with pytest.raises(ConfigError, match="wanted a file, .* or a part of train such as 5%"):
        parse(MINIMAL, "x.yaml", ["tasks.define.validation=" + value])


def test_merge_keys_and_anchors_keep_their_lines_and_share_nothing():
    document = Document(
        "base: &b {x: 1, y: [1]}\nmore: &m {y: 2, z: 3}\na:\n  <<: *b\n  x: 5\nc: {<<: [*b, *m]}\nd: *b\n"
    )
    assert document.data["a"] == {"x": 5, "y": [1]}
    assert document.data["c"] == {"x": 1, "y": [1], "z": 3}
    assert document.data["d"] is not document.data["base"]
    assert [str(document.place(path)) for path in ("a.x", "a.y", "c.z", "d", "d.x")] == [
        "config:5",
        "config:1",
        "config:2",
        "config:7",
        "config:1",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: 1\nb: 2\na: 3",
            "x.yaml:3: a: found the key a second time (first: x.yaml:1), wanted it once.",
        ),
        (
            "t: {1: a, '1': b}",
            "x.yaml:1: t.1: found the key a second time (first: x.yaml:1), wanted it once.",
        ),
        (
            "a: [1\nb: 2",
            "x.yaml:2: found text that is not YAML (expected ',' or ']', but got ':', column 2), "
            + NOT,
        ),
        (
            "a:\n\tb: 1",
            "x.yaml:2: found text that is not YAML (found character '\\t' that cannot start any token, "
            "column 1), wanted YAML 1.2. Indent with spaces.",
        ),
        (
            "a: 1\n---\nb: 2",
            "x.yaml:2: found text that is not YAML (but found another document, column 1), " + NOT,
        ),
        (
            "a: *b",
            "x.yaml:1: found text that is not YAML (found undefined alias 'b', column 4), wanted YAML 1.2.",
        ),
        (
            "a: \x00",
            "x.yaml: found text that is not YAML (unacceptable character #x0000: special characters are "
            "not allowed), wanted YAML 1.2.",
        ),
        (
            "a: &b [*b]",
            "x.yaml:1: a.0: found an alias of a mapping or list it stands in, wanted plain values.",
        ),
        ("a: &b {<<: *b}", "x.yaml:1: a: found << of something else, wanted << of mappings."),
        ("a: 1\n[b]: 2", "x.yaml:2: found a key that is a mapping or a list, wanted text."),
        (
            "a: !!python/object/apply:os.getcwd []",
            "x.yaml:1: a: found the tag !!python/object/apply:os.getcwd, wanted plain values. Remove the tag.",
        ),
        ("a: !!int x", "x.yaml:1: a: found the tag !!int, wanted plain values. Remove the tag."),
        ("a: !mine 1", "x.yaml:1: a: found the tag !mine, wanted plain values. Remove the tag."),
        ("", "x.yaml: found an empty file, wanted a mapping of keys to values."),
        ("# only this", "x.yaml: found an empty file, wanted a mapping of keys to values."),
        ("\n- a\n- b", "x.yaml:2: found a list ('a', 'b'), wanted a mapping of keys to values."),
        ("3", "x.yaml:1: found 3, wanted a mapping of keys to values."),
    ],
)
def test_what_cannot_be_read(text, line):
    assert [str(problem) for problem in Document(text, "x.yaml").problems] == [line]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (1e-05, "1e-05"),
        ("a\nb", r"'a\nb'"),
        ("x" * 61, "'" + "x" * 57 + "'..."),
        ([1, "a", [], {}], "a list (1, 'a', a list (empty), a mapping (empty))"),
        ([1] * 6, "a list (1, 1, 1, 1, 1, ...)"),
        ({"a": 1, "b.c": 2, "d\n": 3}, r'a mapping (a, "b.c", "d\n")'),
    ],
)
def test_values_are_shown_on_one_short_line(value, shown):
    assert show(value) == shown


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load(missing)
    assert str(caught.value) == (
        f"{missing}: found no such file, wanted a YAML config. Paths start at the current directory, {os.getcwd()}."
    )
    with pytest.raises(
        ConfigError, match="found an unreadable file .Is a directory., wanted a YAML config.$"
    ):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(
        ConfigError,
        match="latin.yaml: found bytes that are not UTF-8 .*byte 3.*, wanted UTF-8 text.$",
    ):
        load(tmp_path / "latin.yaml")


def test_byte_order_mark(tmp_path):
    (tmp_path / "x.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load(tmp_path / "x.yaml").output == "runs/x"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=4))
@example(
    {
        "a": "1e-4",
        "b": "no",
        "c": "0o17",
        "<<": "=",
        "d": "010",
        "e": "2024-01-31",
        "": "~",
        "1": ".inf",
    }
)
def test_what_is_dumped_is_read_back(data):
    document = Document(dump(data))
    assert document.problems == []
    assert repr(document.data) == repr(data)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii")), st.text(st.characters(codec="ascii")), max_size=4
    )
)
def test_other_readers_read_dumped_text_as_text(data):
    assert yaml.safe_load(dump(data)) == data


# The schema


def test_defaults_and_types():
    made = parse(MINIMAL)
    assert list(made.tasks) == ["define", "v1.5"]
    assert made.tasks["define"].train == ("a.jsonl",)
    assert made.tasks["v1.5"].train == ("a.jsonl", "c.jsonl")
    assert (made.tasks["v1.5"].format.name, made.tasks["v1.5"].format.keywords) == (
        "text",
        {"column": "body"},
    )
    assert (made.balancer.name, made.balancer.keywords) == ("CoBa", {})
    assert [tracker.name for tracker in made.trackers] == ["console", "jsonl"]
    assert (
        made.batch.packing == "auto"
        and made.evaluate.probe.groups == 12
        and made.model.lora is None
    )
    clip = parse(with_("optimizer: {lr: 1, clip: null}")).optimizer
    assert (clip.lr, type(clip.lr), clip.clip) == (1.0, float, None)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse(MINIMAL).batch.tokens = 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            "bath: {}",
            "bath: found an unknown key, wanted model, tasks, mix, batch, train, optimizer, schedule, balancer, "
            "gram, objective, average, evaluate, checkpoint, export, output, engine, trackers or cache. Did you mean batch?",
        ),
        (
            "sequence_len: 2048",
            "sequence_len: found a key of another framework, wanted batch.max_length.",
        ),
        (
            "mix: {lr: 1}",
            "mix.lr: found an unknown key, wanted shares, temperature, follow, every or floor. Did you mean optimizer.lr?",
        ),
        (
            "mix: {xyz: 1}",
            "mix.xyz: found an unknown key, wanted shares, temperature, follow, every or floor.",
        ),
        (
            "batch: {tokens: '4096'}",
            "batch.tokens: found '4096', wanted a whole number >= 1. Remove the quotes.",
        ),
        ("batch: {tokens: many}", "batch.tokens: found 'many', wanted a whole number >= 1."),
        ("batch: {tokens: 4096.0}", "batch.tokens: found 4096.0, wanted a whole number >= 1."),
        ("batch: {tokens: true}", "batch.tokens: found true, wanted a whole number >= 1."),
        ("batch: {tokens: null}", "batch.tokens: found null, wanted a whole number >= 1."),
        (
            "batch: {packing: yes}",
            "batch.packing: found 'yes', wanted auto, true or false. YAML 1.2 has true and false only, without quotes.",
        ),
        ("batch: {packing: 1}", "batch.packing: found 1, wanted auto, true or false."),
        (
            "batch: {too_long: trunc}",
            "batch.too_long: found 'trunc', wanted drop, truncate or error. Did you mean truncate?",
        ),
        ("batch: 3", "batch: found 3, wanted a mapping."),
        ("optimizer: {lr: 0}", "optimizer.lr: found 0, wanted a number > 0 and <= 1000.0."),
        ("optimizer: {lr: .nan}", "optimizer.lr: found nan, wanted a number > 0 and <= 1000.0."),
        ("optimizer: {eps: .inf}", "optimizer.eps: found inf, wanted a number > 0."),
        ("optimizer: {clip: 0}", "optimizer.clip: found 0, wanted a number > 0 or null."),
        (
            "optimizer: {betas: [0.9]}",
            "optimizer.betas: found a list (0.9), wanted a list of 2, each a number >= 0 and < 1.",
        ),
        (
            "optimizer: {betas: [0.9, 1]}",
            "optimizer.betas.1: found 1, wanted a number >= 0 and < 1.",
        ),
        (
            "optimizer: {betas: [1, 2, 3]}",
            "optimizer.betas: found a list (1, 2, 3), wanted a list of 2, each a number >= 0 and < 1.",
        ),
        (
            "optimizer: {momentum: 0.9}",
            "optimizer.momentum: found 0.9, wanted 0 with adamw. It is SGD's; AdamW's first moment is betas.",
        ),
        ("schedule: {warmup: -1}", "schedule.warmup: found -1, wanted a whole number >= 0."),
        ("schedule: {floor: 1.5}", "schedule.floor: found 1.5, wanted a number >= 0 and <= 1."),
        ("balancer: {window: 3}", "balancer.name: found nothing, wanted a name."),
        ("balancer: 3", "balancer: found 3, wanted a name, or a mapping with name and keywords."),
        (
            "trackers: console",
            "trackers: found 'console', wanted a list, each item a name, or a mapping with name and keywords.",
        ),
        (
            "trackers: [console, 3]",
            "trackers.1: found 3, wanted a name, or a mapping with name and keywords.",
        ),
        ("engine: {zero: 4}", "engine.zero: found 4, wanted a whole number >= 0 and <= 3."),
        (
            "engine: {offload: {optimizer: null}}",
            "engine.offload.optimizer: found null, wanted none, cpu or nvme.",
        ),
        (
            "engine: {offload: {optimizer: cpu}, zero: 0}",
            "engine.offload.optimizer: found cpu, wanted none at engine.zero 0. It needs zero 1.",
        ),
        (
            "engine: {offload: {parameters: nvme}, zero: 3}",
            "engine.offload.nvme_path: found nothing, wanted a path. engine.offload.parameters: nvme needs it.",
        ),
        (
            "evaluate: {best: defin}",
            "evaluate.best: found 'defin', wanted macro, token, worst, log, define or v1.5. Did you mean define?",
        ),
        (
            "evaluate: {tokens: 512}",
            "evaluate.tokens: found 512, wanted at least batch.max_length, 1024.",
        ),
        (
            "batch: {tokens: 512}",
            "batch.max_length: found 1024, wanted at most batch.tokens, 512. A micro-batch holds whole examples.",
        ),
        (
            "batch: {row_length: 512}",
            "batch.row_length: found 512, wanted batch.max_length to batch.tokens, 1024 to 4096.",
        ),
        (
            "mix: {shares: temperature}",
            "mix.temperature: found nothing, wanted a number > 0. mix.shares: temperature needs it.",
        ),
        (
            "mix: {temperature: 2}",
            "mix.temperature: found 2, wanted nothing. It has no meaning with mix.shares: proportional.",
        ),
        (
            "gram: {params: adapter}",
            "gram.params: found adapter, wanted all, last_layer or a regular expression. Adapters need model.lora, which is not given.",
        ),
        (
            "gram: {params: 'a['}",
            "gram.params: found 'a[', wanted all, last_layer, adapter or a regular expression. "
            "As one: unterminated character set at position 1.",
        ),
        (
            "evaluate: {patience: {}}",
            "evaluate.patience: found neither evaluations nor from, wanted one of them. For instance evaluations: 2.",
        ),
        (
            "checkpoint: {best: false}",
            "export.which: found best, wanted last, average or none. With checkpoint.best: false no best checkpoint is kept.",
        ),
    ],
)
def test_one_wrong_line(line, error):
    found = errors(with_(line))
    where = (
        "x.yaml:1" if error.startswith("export.") else "x.yaml:7"
    )  # of a key not given: what is above it
    assert found == [f"{where}: {error}"]


def test_evaluation_holds_the_rows_of_training():
    found = errors(with_("batch: {max_length: 2048}\nevaluate: {tokens: 1024}"))
    assert found == [
        "x.yaml:8: evaluate.tokens: found 1024, wanted at least batch.max_length, 2048."
    ]
    parse(with_("batch: {max_length: 2048}\nevaluate: {tokens: 2048}"))
    # Packed rows of evaluation are as long as its tokens at most.
    parse(with_("batch: {row_length: 2048}\nevaluate: {tokens: 1024}"))


@pytest.mark.parametrize(
    ("task", "error"),
    [
        (
            "a b: {train: a, validation: b, format: text}",
            "tasks.\"a b\": found the name 'a b', wanted letters, digits, _ . -. Rename the task.",
        ),
        (
            "macro: {train: a, validation: b, format: text}",
            "tasks.macro: found the name 'macro', wanted none of macro, token, worst, log, average, ., ... Rename the task.",
        ),
        (
            "a: {train: a, format: text}",
            "tasks.a.validation: found nothing, wanted a file, folder or hub name, or a list of them, or a part of train such as 5%.",
        ),
        (
            "a: {train: [], validation: b, format: text}",
            "tasks.a.train: found a list (empty), wanted a file, folder or hub name, or a list of them.",
        ),
        (
            "a: {train: [3], validation: b, format: text}",
            "tasks.a.train.0: found 3, wanted text. Put it in quotes.",
        ),
        (
            "a: {train: a, validation: b, format: text, cap: 0}",
            "tasks.a.cap: found 0, wanted a whole number >= 1 or null.",
        ),
        (
            "a: {train: a, validation: b, format: text, share: 2}",
            "tasks.a.share: found 2, wanted nothing. It has no meaning with mix.shares: proportional.",
        ),
        ("a:", "tasks.a: found null, wanted a mapping."),
        ("3", "tasks: found 3, wanted a mapping from tasks' names to tasks."),
        ("{}", "tasks: found a mapping (empty), wanted a mapping from tasks' names to tasks."),
    ],
)
def test_one_wrong_task(task, error):
    where = "x.yaml:4" if error.startswith("tasks.") else "x.yaml:3"
    assert errors(f"model: {{name: m}}\noutput: o\ntasks:\n  {task}\ntrain: {{steps: 1}}") == [
        f"{where}: {error}"
    ]


def test_every_task_needs_its_share():
    text = MINIMAL.replace("define: {", "define: {share: 0.5, ")
    assert (
        parse(text + "mix: {shares: explicit}", "x.yaml", ["tasks.v1.5.share=1"])
        .tasks["v1.5"]
        .share
        == 1.0
    )
    assert errors(text + "mix: {shares: explicit}") == [
        'x.yaml:4: tasks."v1.5".share: found nothing, wanted a number > 0. With mix.shares: explicit every task needs share.'
    ]
    assert errors(text + "mix: {shares: epochs}") == [
        "x.yaml:3: tasks.define.share: found 0.5, wanted nothing. It has no meaning with mix.shares: epochs.",
        "x.yaml:3: tasks.define.epochs: found nothing, wanted a number > 0. With mix.shares: epochs every task needs epochs.",
        'x.yaml:4: tasks."v1.5".epochs: found nothing, wanted a number > 0. With mix.shares: epochs every task needs epochs.',
    ]


@pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_a_flash_kernel_packs_one_row_a_micro_batch(kernel):
    text = MINIMAL.replace("name: m", f"name: m, attention: {kernel}")
    assert errors(text + "batch: {row_length: 2048}") == [
        f"x.yaml:7: batch.row_length: found 2048, wanted null with model.attention: {kernel}. "
        "This kernel tells packed examples apart only where a micro-batch is one row."
    ]
    for batch in ("row_length: 4096", "row_length: 2048, packing: false"):
        parse(text + f"batch: {{{batch}}}")


def test_exactly_one_of_steps_and_epochs():
    assert errors(MINIMAL.replace("steps: 10", "seed: 1")) == [
        "x.yaml:5: train: found neither steps nor epochs, wanted one of them. For instance train: {steps: 1000}."
    ]
    assert errors(MINIMAL.replace("steps: 10", "steps: 10, epochs: 2")) == [
        "x.yaml:5: train.epochs: found steps 10 and epochs 2, wanted one of them. Delete the other."
    ]


def test_everything_at_once_in_the_order_of_the_file():
    text = """\
model: {nam: m, lora: {r: 0, target_modules: all}}
tasks:
  define:
    train: a.jsonl
    train: b.jsonl
    format: {nme: text}
    share: 1
  a/b: {train: a, validation: b, format: text, loss_weight: -1}
batch: {max_length: 5000, packing: on}
evaluate: {best: marco}
"""
    assert errors(text, "batch.examples=none", "optimizer.lr", "mix.shares=equal") == [
        "x.yaml:1: model.name: found nothing, wanted text.",
        "x.yaml:1: model.lora.r: found 0, wanted a whole number >= 1.",
        "x.yaml:1: model.lora.target_modules: found 'all', wanted all-linear or a list, each item text.",
        "x.yaml:1: model.nam: found an unknown key, wanted name, revision, loader, allow_remote_code, attention, precision, "
        "activation_checkpointing, compile, loss_kernel, chat_template, lora, adapter or quantize. Did you mean name?",
        "x.yaml:1: output: found nothing, wanted a path.",
        "x.yaml:1: train: found neither steps nor epochs, wanted one of them. For instance train: {steps: 1000}.",
        "x.yaml:3: tasks.define.validation: found nothing, wanted a file, folder or hub name, or a list of them, or a part of train such as 5%.",
        "x.yaml:5: tasks.define.train: found the key a second time (first: x.yaml:4), wanted it once.",
        "x.yaml:6: tasks.define.format.name: found nothing, wanted a name.",
        "x.yaml:7: tasks.define.share: found 1, wanted nothing. It has no meaning with mix.shares: equal.",
        "x.yaml:8: tasks.a/b: found the name 'a/b', wanted letters, digits, _ . -. Rename the task.",
        "x.yaml:8: tasks.a/b.loss_weight: found -1, wanted a number > 0.",
        "x.yaml:9: batch.packing: found 'on', wanted auto, true or false. YAML 1.2 has true and false only, without quotes.",
        "x.yaml:9: batch.max_length: found 5000, wanted at most batch.tokens, 4096. A micro-batch holds whole examples.",
        "x.yaml:10: evaluate.best: found 'marco', wanted macro, token, worst, log, define or a/b. Did you mean macro?",
        "--set optimizer.lr: found text of another form, wanted KEY=VALUE. Write --set train.steps=10.",
        "--set batch.examples=none: batch.examples: found 'none', wanted a whole number >= 1.",
    ]


def test_a_problem_in_reading_hides_no_other():
    assert errors(
        with_("batch: {tokens: 5000, tokens: 1, tokens: 2, examples: 0}\nmix: !x 1"), "a", "b"
    ) == [
        "x.yaml:7: batch.tokens: found the key a second time (first: x.yaml:7), wanted it once.",
        "x.yaml:7: batch.tokens: found the key a second time (first: x.yaml:7), wanted it once.",
        "x.yaml:7: batch.examples: found 0, wanted a whole number >= 1.",
        "x.yaml:8: mix: found the tag !x, wanted plain values. Remove the tag.",
        "--set a: found text of another form, wanted KEY=VALUE. Write --set train.steps=10.",
        "--set b: found text of another form, wanted KEY=VALUE. Write --set train.steps=10.",
    ]


# Overrides


def test_a_part_of_what_a_text_stands_for_is_overridden():
    adapter = {"path": "a/b", "merge": True, "other_base": False}
    text = MINIMAL.replace("model: {name: m}", "model: {name: m, adapter: a/b}")
    assert (
        parse(text, "x.yaml", ["model.adapter.merge=true"]).resolved()["model"]["adapter"]
        == adapter
    )
    found = parse(MINIMAL, "x.yaml", ["balancer=CoBa", "balancer.window=9"]).balancer
    assert (found.name, found.keywords) == ("CoBa", {"window": 9})


def test_overrides():
    made = parse(
        MINIMAL,
        "x.yaml",
        [
            "train.steps=3",
            "optimizer.lr=1e-3",
            "tasks.v1.5.cap=7",
            'tasks."v2.0"={train: a, validation: b, format: text}',
            "model.lora.r=4",
            "balancer={name: CoBa, window: 9}",
            "balancer.window=5",
            "tasks.define.format.column=x",
            "trackers=[jsonl, console]",
            "trackers.1=tensorboard",
            "optimizer.clip=",
            "output=a=b",
            "train.steps=4",
            "engine.deepspeed.zero_optimization.stage=2",
        ],
    )
    assert made.train.steps == 4
    assert made.optimizer.lr == 1e-3 and made.optimizer.clip is None
    assert made.tasks["v1.5"].cap == 7 and list(made.tasks) == ["define", "v1.5", "v2.0"]
    assert made.model.lora.r == 4
    assert made.balancer.keywords == {"window": 5}
    assert (made.tasks["define"].format.name, made.tasks["define"].format.keywords) == (
        "text",
        {"column": "x"},
    )
    assert [tracker.name for tracker in made.trackers] == ["jsonl", "tensorboard"]
    assert made.output == "a=b"
    assert made.engine.deepspeed == {"zero_optimization": {"stage": 2}}
    assert made.where("train.steps") == "--set train.steps=4"
    assert made.where("tasks.v1.5.cap") == "--set tasks.v1.5.cap=7"
    assert made.where("tasks.v1.5.train") == "x.yaml:4"
    assert made.where("balancer.window") == "--set balancer.window=5"
    assert (
        made.where(("tasks", "v2.0", "train"))
        == '--set tasks."v2.0"={train: a, validation: b, format: text}'
    )


@pytest.mark.parametrize(
    ("override", "error"),
    [
        (
            "train.stepz=1",
            "train.stepz: found an unknown key, wanted steps, epochs, seed, order, not_finite, spike or from. Did you mean steps?",
        ),
        (
            "train.steps=[1",
            "found text that is not YAML (expected ',' or ']', but got '<stream end>', column 3), "
            + NOT,
        ),
        (
            "train.steps",
            "found text of another form, wanted KEY=VALUE. Write --set train.steps=10.",
        ),
        ("=3", "found text of another form, wanted KEY=VALUE. Write --set train.steps=10."),
        (
            "train.steps.x=1",
            "train.steps.x: found 10 at train.steps, wanted a mapping or a list there.",
        ),
        (
            "tasks.v1.5.train.2=x",
            'tasks."v1.5".train.2: found item 2 of a list of 2, wanted one that is there, counted from 0.',
        ),
        (
            "mix={shares: equal, shares: equal}",
            "mix.shares: found the key a second time (first: --set mix={shares: equal, shares: equal}), wanted it once.",
        ),
    ],
)
def test_wrong_overrides(override, error):
    assert errors(MINIMAL, override) == [f"--set {override}: {error}"]


def test_the_longest_name_wins_unless_quoted():
    text = MINIMAL.replace("v1.5", "define.train")
    assert parse(text, "x.yaml", ["tasks.define.train.cap=3"]).tasks["define.train"].cap == 3
    assert parse(text, "x.yaml", ['tasks."define".train=new']).tasks["define"].train == ("new",)


# Where a key stands, and what comes of a config


def test_where():
    made = parse(
        MINIMAL + "engine:\n  deepspeed:\n    zero_optimization:\n      stage: 2\n", "x.yaml"
    )
    assert made.where("engine.deepspeed.zero_optimization.stage") == "x.yaml:10"
    assert made.where("tasks.v1.5.format.column") == "x.yaml:4"
    assert made.where(("tasks", "v1.5", "train", 1)) == "x.yaml:4"
    assert made.where("engine.zero") == "x.yaml:7"
    assert made.where("batch.tokens") == "x.yaml:1"
    assert made.get("tasks.v1.5.train.1") == "c.jsonl"
    assert made.get("batch.tokens") == 4096
    assert made.error(("tasks", "v1.5", "train"), "0 rows", "at least one", "Look at c.jsonl.") == (
        'x.yaml:4: tasks."v1.5".train: found 0 rows, wanted at least one. Look at c.jsonl.'
    )
    assert (
        config.Config(model={"name": "m"}, tasks=made.tasks, output="o").where("output") == "config"
    )


names = st.lists(
    st.from_regex(r"\A[A-Za-z0-9_.-]{1,6}\Z").filter(lambda name: name not in config.RESERVED),
    min_size=1,
    unique=True,
)
rare = st.none() | st.floats(0.01, 100)


@settings(deadline=None)
@given(
    lr=st.floats(1e-12, 1e3),
    clip=rare,
    weight=st.integers(1, 5) | st.floats(0.1, 5),
    names=names,
    keywords=st.dictionaries(st.text().filter(lambda key: key != "name"), plain, max_size=3),
    free=plain.filter(lambda value: "inf" not in repr(value)),  # which DeepSpeed is not given
)
def test_a_resolved_config_is_the_same_config(lr, clip, weight, names, keywords, free):
    task = {"train": "a", "validation": ["b", "c"], "format": "text", "loss_weight": weight}
    data = {
        "model": {"name": "m", "lora": {}},
        "tasks": dict.fromkeys(names, task),
        "train": {"epochs": 0.5},
        "output": "o",
        "optimizer": {"lr": lr, "clip": clip},
        "balancer": {"name": "B", **keywords},
        "engine": {"deepspeed": {"x": free}},
    }
    made = parse(dump(data))
    assert (
        list(made.tasks) == names and made.optimizer.lr == lr and made.balancer.keywords == keywords
    )
    again = parse(dump(made.resolved()))
    assert repr(again.resolved()) == repr(made.resolved())


def leaves(data, above=()):
    yield above
    for key, value in (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    ):
        yield from leaves(value, (*above, key))


FULL = parse(
    MINIMAL, "x", ["model.lora={target_modules: [q]}", "engine.deepspeed={a: [1]}"]
).resolved()


@settings(deadline=None)
@given(st.data())
def test_whatever_stands_at_a_key_is_taken_or_refused_in_words(data):
    path = data.draw(st.sampled_from([path for path in leaves(FULL) if path]))
    document = copy.deepcopy(FULL)
    *above, last = path
    functools.reduce(operator.getitem, above, document)[last] = data.draw(plain)
    try:
        parse(dump(document), "x.yaml")
    except ConfigError as error:
        for line in str(error).splitlines():
            assert re.fullmatch(r"x\.yaml:\d+: .+: found .+, wanted .+[.?]", line)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab:- \n[]{}&*<!'\"#,?|>%@`\t1.e")))
def test_any_text_is_read_or_refused(text):
    document = Document(text)
    assert isinstance(document.data, dict) or document.problems


def test_resolved_holds_every_key():
    resolved = parse(MINIMAL).resolved()
    assert list(resolved) == list(config.Config.model_fields)
    probe = {"every": None, "groups": 12, "examples": "batch"}
    assert resolved["evaluate"] == {
        "every": 100,
        "tokens": None,
        "best": "macro",
        "probe": probe,
        "generate": {
            "every": None,
            "rows": 64,
            "max_new_tokens": 256,
            "batch": 16,
            "run_code": False,
        },
        "patience": None,
    }
    assert resolved["balancer"] == "CoBa" and resolved["tasks"]["v1.5"]["format"] == {
        "name": "text",
        "column": "body",
    }
    assert resolved["optimizer"]["betas"] == [0.9, 0.999]


# Documents made from the schema


def test_docs_are_up_to_date():
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == reference.markdown(), (
        "run python -m mtl.config.reference"
    )
    schema = json.loads((ROOT / "docs/config.schema.json").read_text(encoding="utf-8"))
    assert schema == reference.json_schema(), "run python -m mtl.config.reference"


def test_every_key_has_a_meaning_and_the_schema_is_closed():
    from mtl.config.words import fields

    assert [keys for keys, _, field in fields(config.Config) if not field.description] == []
    assert reference.json_schema()["properties"]["tasks"]["additionalProperties"] is False
    definitions = reference.json_schema()["$defs"]
    assert {
        name
        for name, schema in definitions.items()
        if schema.get("anyOf", [schema])[-1].get("additionalProperties") is not False
    } == {"Spec"}
    assert [branch["type"] for branch in definitions["Spec"]["anyOf"]] == ["string", "object"]


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("trackers.0=tensorboard", "trackers", ["tensorboard", "jsonl"]),
        ("trackers.0.every=5", "trackers", [{"name": "console", "every": 5}, "jsonl"]),
        ("optimizer.betas.1=0.95", "optimizer.betas", [0.9, 0.95]),
    ],
)
def test_an_item_of_a_list_that_the_yaml_leaves_out_is_set_in_its_default(override, key, value):
    minimal = """\
model: {name: m}
tasks: {a: {train: a.jsonl, validation: b.jsonl, format: text}}
batch: {examples: 1, tokens: 2048}
train: {steps: 1}
optimizer: {lr: 1.0e-3}
output: run
"""
    found = parse(minimal, overrides=[override]).resolved()
    for part in key.split("."):
        found = found[part]
    assert found == value
    with pytest.raises(ConfigError, match="trackers.2: found item 2 of a list of 2"):
        parse(minimal, overrides=["trackers.2=tensorboard"])
