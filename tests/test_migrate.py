"""MFTCoder's config and data become ours, and what trains is what MFTCoder trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import toys

from mtl import build, plugins
from mtl.config import load
from mtl.data.encode import Encoder
from mtl.data.formats import messages
from mtl.data.source import open_source
from mtl.migrate.mftcoder import migrate
from mtl.migrate.rows import convert

CHAT = {
    "id": 0,
    "chat_rounds": [
        {"role": "system", "content": "be brief"},
        {"role": "human", "content": "1+1?"},
        {"role": "bot", "content": "2"},
        {"role": "human", "content": "+1?"},
        {"role": "bot", "content": "3"},
    ],
}
PAIR = {"instruction": "say a", "output": "a"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The released CoBa config's keys, its paths filled in."""
    for name, row in (("math", CHAT), ("code-helper", PAIR)):
        (tmp_path / name).mkdir()
        rows = [
            json.dumps(row | {"id": i, "input": "x"} | ({"output": f"a{i}"} if row is PAIR else {}))
            for i in range(20)
        ]
        if row is CHAT:
            rows = [line.replace("1+1?", f"{i}+1?") for i, line in enumerate(rows)]
        (tmp_path / name / "part.jsonl").write_text("\n".join(rows) + "\n\n")
    path = tmp_path / "coba.json"
    path.write_text(
        json.dumps(
            {
                "data_paths": f"[{tmp_path}/math,{tmp_path}/code-helper]",
                "output_dir": "out",
                "tb_dir": "tb",
                "pretrained_model_path": "m",
                "model_type": "llama",
                "load_raw_dataset": True,
                "data_split": "90,10,0",
                "padding_mode": "padding",
                "tokenize_mode": "sft",
                "weighted_loss_mode": "coba",
                "coba_warmup_steps": 7,
                "coba_history_length": 30,
                "coba_tau": 5,
                "coba_update_interval": 2,
                "seq_length": 64,
                "seed": 1,
                "peft_type": "qlora",
                "quantization": "4bit",
                "lora_rank": 96,
                "learning_rate": 5e-5,
                "min_lr": 5e-6,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 3,
                "num_train_epochs": 4,
                "num_warmup_steps": 0.5,
                "saving_limit": None,
                "attn_implementation": "sdpa",
            }
        )
    )
    return path


def changed(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_the_config(config, tmp_path):
    notes = migrate(config, 2, tmp_path / "new")
    ours = load(tmp_path / "new" / "config.yaml")
    assert list(ours.tasks) == ["math", "code-helper"]
    assert ours.balancer.name == "CoBa" and ours.balancer.keywords == {
        "window": 30,
        "warmup": 7,
        "tau": 5.0,
    }
    assert ours.batch.examples == 12 and ours.batch.tokens == 128 and ours.batch.max_length == 64
    assert ours.train.epochs == 4 and ours.schedule.warmup == 6, "half of ceil(4 * 36 / 12) steps"
    assert ours.schedule.floor == pytest.approx(0.1)
    assert (
        ours.model.lora.r == 96
        and ours.model.attention == "sdpa"
        and not ours.model.allow_remote_code
    )
    assert ours.evaluate.probe.every == 2 and ours.evaluate.patience.evaluations == 5
    assert ours.model.quantize == "nf4", "peft_type: qlora"
    assert any("tb_dir: left out" in line for line in notes)


def test_the_data_is_split_without_overlap(config, tmp_path):
    migrate(config, 2, tmp_path / "new")
    for name in ("math", "code-helper"):
        train, valid = (
            (tmp_path / "new" / "data" / f"{name}.{split}.jsonl").read_text().splitlines()
            for split in ("train", "validation")
        )
        assert (len(train), len(valid)) == (18, 2) and len({*train, *valid}) == 20


def test_a_conversation_trains_what_mftcoder_trains(config, tmp_path):
    """By its rules: the assistant's content, a line break and the end of sequence; nothing else."""
    migrate(config, 2, tmp_path / "new")
    tokenizer = toys.tokenizer(template=(tmp_path / "new" / "chat_template.jinja").read_text())
    row = convert(CHAT, "here").row
    tokens, end = Encoder(tokenizer, 512, "error")(messages(row)), toys.END
    assert tokenizer.decode(tokens.ids) == (
        f"<s>system\nbe brief\n<s>human\n1+1?\n<s>bot\n2\n{end}\n<s>human\n+1?\n<s>bot\n3\n{end}"
    )
    assert tokenizer.decode(tokens.ids[tokens.target]) == f"2\n{end}3\n{end}"


@pytest.mark.parametrize(
    "row, form",
    [
        (PAIR, "messages"),
        ({"question": "q", "answer": "a", "system": "s"}, "messages"),
        ({"text": "t"}, "text"),
        (CHAT, "messages"),
    ],
)
def test_rows(row, form):
    found, ours, _ = convert(row, "here")
    assert found == form and (form == "text" or ours["messages"][-1]["role"] == "assistant")


@pytest.mark.parametrize(
    "mode, weights, wanted",
    [
        ("case3", None, "Equal"),
        ("case1", None, "Tokens"),
        ("case3", "[0.25, 0.75]", {"name": "Static", "weights": [0.25, 0.75]}),
    ],
)
def test_loss_modes(config, tmp_path, mode, weights, wanted):
    migrate(changed(config, weighted_loss_mode=mode, task_weights=weights), 2, tmp_path / "new")
    assert load(tmp_path / "new" / "config.yaml").resolved()["balancer"] == wanted


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"coba_warmup_step": 3}, "coba.json: coba_warmup_step: found an unknown key"),
        (
            {"pretrained_model_path": "$MODEL_NAME_OR_PATH"},
            r"pretrained_model_path: found '\$MODEL_NAME_OR_PATH', wanted the value itself",
        ),
        ({"data_paths": "[/nowhere]"}, "data_paths: found /nowhere, wanted a folder"),
        ({"weighted_loss_mode": "case9"}, "weighted_loss_mode: found 'case9'"),
        ({"data_split": "100,0,0"}, "leaves none for validation"),
    ],
)
def test_what_cannot_be_migrated(config, tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        migrate(changed(config, **changes), 2, tmp_path / "new")


def test_an_unknown_row_is_named(config, tmp_path):
    with (tmp_path / "math" / "part.jsonl").open("a") as file:
        file.write('{"quest": "x"}\n')
    with pytest.raises(
        ValueError, match=r"part\.jsonl:22: found the keys quest, wanted chat_rounds"
    ):
        migrate(config, 2, tmp_path / "new")


@pytest.mark.parametrize("peft, lora, quantize", [("lora", True, None), (None, False, None)])
def test_only_qlora_is_quantized(config, tmp_path, peft, lora, quantize):
    """Whatever `quantization` says: MFTCoder sets it from `peft_type`."""
    notes = migrate(changed(config, peft_type=peft), 2, tmp_path / "new")
    ours = load(tmp_path / "new" / "config.yaml")
    assert (ours.model.lora is not None, ours.model.quantize) == (lora, quantize)
    assert "quantization: left out: MFTCoder quantizes with peft_type qlora only" in notes


def chat(question: str, answer: str) -> dict:
    turns = [{"role": "human", "content": question}, {"role": "bot", "content": answer}]
    return {"chat_rounds": turns}


def migrated(out: Path, task: str) -> list[dict]:
    """A task's rows of both sides, as this package reads them."""
    files = [out / "data" / f"{task}.{side}.jsonl" for side in ("train", "validation")]
    return [row.value for file in files for row in open_source(str(file)).rows()]


def test_text_with_line_breaks_of_unicode_and_a_byte_order_mark(config, tmp_path):
    """U+2028, U+2029 and U+0085 stand raw within JSON strings; a file may begin with U+FEFF."""
    rows = [chat(f"q{i}\u2028second\u2029line", f"a{i}\x85z") for i in range(20)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "math" / "part.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    config.write_text("\ufeff" + config.read_text(), encoding="utf-8")
    migrate(config, 2, tmp_path / "new")
    found = {
        tuple(turn["content"] for turn in row["messages"])
        for row in migrated(tmp_path / "new", "math")
    }
    assert found == {(f"q{i}\u2028second\u2029line", f"a{i}\x85z") for i in range(20)}


def test_folders_that_differ_beyond_ascii_stay_apart(config, tmp_path):
    for name in ("数学", "代码"):
        shutil.copytree(tmp_path / "math", tmp_path / name)
    migrate(
        changed(config, data_paths=[f"{tmp_path}/数学", f"{tmp_path}/代码"]), 2, tmp_path / "new"
    )
    assert list(load(tmp_path / "new" / "config.yaml").tasks) == ["u6570u5b66", "u4ee3u7801"]


def test_hidden_files_are_left_out_by_name(config, tmp_path):
    (tmp_path / "math" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\xff")
    notes = migrate(config, 2, tmp_path / "new")
    assert "task math: left out, by their names: .DS_Store" in notes
    assert len(migrated(tmp_path / "new", "math")) == 20
    (tmp_path / "math" / "part.bin").write_bytes(b"\0\xff")
    with pytest.raises(ValueError, match=r"part\.bin:1: found bytes that are not UTF-8"):
        migrate(config, 2, tmp_path / "other")


def test_the_older_self_paced_keys_have_no_effect(config, tmp_path):
    keys = ("interval", "history_length", "sample_valid_num", "scale_factor")
    older = {f"selfpaced_{key}": 1 for key in keys}
    notes = migrate(changed(config, weighted_loss_mode="selfpaced", **older), 2, tmp_path / "new")
    assert {key for key in older if any(f"{key}: left out: " in note for note in notes)} == {*older}
    assert load(tmp_path / "new" / "config.yaml").balancer.name == "Equal"


@pytest.mark.parametrize(
    "row, question",
    [
        ({"instruction": "add", "input": "1+1", "output": "2"}, "add\n1+1"),
        ({"instruction": "add", "input": "1+1", "response": "2"}, "add\n1+1"),
        ({"instruction": "add", "input": "", "output": "2"}, "add"),
        ({"input": "1+1", "output": "2"}, "1+1"),
    ],
)
def test_instruction_and_input_make_the_question_together(row, question):
    assert convert(row, "here").row["messages"][0] == {"role": "user", "content": question}


def test_what_is_read_otherwise_or_not_at_all_is_counted(config, tmp_path):
    notes = migrate(config, 2, tmp_path / "new")
    assert any(
        note.startswith("task code-helper: in 20 rows instruction and input") for note in notes
    )
    assert "task math: keys that nothing reads: id (20 rows), input (20 rows)" in notes


# --- preferences


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair(i: int, **changes: object) -> dict:
    chat = [turn("system", "be brief"), turn("user", f"{i}+1?"), turn("assistant", "2")]
    chat.append(turn("human", "+1?"))
    sides = {"chosen": [*chat, turn("bot", f"{i + 2}")], "rejected": [*chat, turn("bot", "no")]}
    return {**sides, "source": "sums", **changes}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """The released DPO config's keys, its paths filled in; 20 pairs in two files, 12 and 8."""
    rows = [json.dumps(pair(i)) + "\n" for i in range(20)]
    (tmp_path / "one.jsonl").write_text("".join(rows[:12]))
    (tmp_path / "two.jsonl").write_text("".join(rows[12:]))
    toys.save(toys.tiny_llama(), tmp_path / "model")
    given = {
        "xxpo": "dpo", "data_paths": [f"{tmp_path}/one.jsonl", f"{tmp_path}/two.jsonl"],
        "output_dir": f"{tmp_path}/run", "tb_dir": "tb",
        "pretrained_model_path": f"{tmp_path}/model", "model_type": "llama", "data_split": "90,10",
        "attn_implementation": "sdpa", "beta": 0.2, "rpo_alpha": 0.5, "peft_type": "lora",
        "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "tokenizer_type": "AutoTokenizer", "dataset_num_proc": 1, "learning_rate": 5e-7,
        "weight_decay": 0.01, "gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine",
        "warmup_steps": 2, "num_train_epochs": 2, "seed": 1105, "max_prompt_length": 64,
        "max_length": 128, "logging_steps": 20, "save_steps": 500, "eval_steps": 4,
        "epoch_checkpointing": False, "saving_limit": 5,
    }  # fmt: skip
    path = tmp_path / "dpo.json"
    path.write_text(json.dumps(given))
    return path


def test_a_preference_config(pairs, tmp_path):
    notes = migrate(pairs, 2, tmp_path / "new")
    ours = load(tmp_path / "new" / "config.yaml")
    assert list(ours.tasks) == ["preference", "chosen"]
    assert ours.tasks["preference"].objective.keywords == {"loss": "sigmoid", "beta": 0.2}
    assert ours.tasks["chosen"].of == ("preference",) and ours.tasks["chosen"].loss == "sft"
    assert ours.balancer.name == "Static" and ours.balancer.keywords == {"weights": [1.0, 0.5]}
    assert ours.batch.examples == 6 and ours.batch.tokens == 256 and ours.batch.max_length == 128
    assert ours.train.epochs == 2 and ours.train.seed == 1105
    assert ours.schedule.warmup == 2 and ours.schedule.floor == ours.optimizer.weight_decay == 0.0
    assert ours.model.lora.r == 4 and ours.model.lora.dropout == 0.0
    assert ours.evaluate.every == 4
    assert ours.checkpoint.every == 500 and ours.checkpoint.keep == 5
    left_out = {note.split(":")[0] for note in notes if ": left out: " in note}
    assert left_out == {
        "tb_dir", "model_type", "tokenizer_type", "per_device_eval_batch_size", "dataset_num_proc",
        "weight_decay", "logging_steps", "epoch_checkpointing", "lora_dropout",
    }  # fmt: skip
    assert any("longer pairs than 128 tokens are dropped" in note for note in notes)
    assert "task preference: keys that nothing reads: source (20 rows)" in notes
    files = f"{tmp_path}/one.jsonl, {tmp_path}/two.jsonl"
    split = f"18 rows to train on, 2 for validation (and test) of {files}"
    assert f"task preference: {split}" in notes
    answers = {row["chosen"] for row in migrated(tmp_path / "new", "preference")}
    assert answers == {f"{i + 2}" for i in range(20)}


def test_a_pair_is_laid_out_as_mftcoder_does(pairs, tmp_path):
    """By its rules: the prompt in its template, then the answer and the end token at once."""
    migrate(pairs, 2, tmp_path / "new")
    config = plugins.read(str(tmp_path / "new" / "config.yaml"), ["model.lora=null"])
    data = build.encode(config, say=lambda text: None)
    split = data.tasks[0].train
    row, end = split.columns(0), toys.END
    tokenizer = toys.tokenizer()
    texts = [tokenizer.decode(row[side]) for side in ("chosen", "rejected")]
    i = int(texts[0].split("<s>user\n")[1].split("+1?")[0])
    start = f"<s>system\nbe brief\n<s>user\n{i}+1?\n<s>assistant\n2\n{end}\n<s>user\n+1?\n"
    answers = f"{i + 2}{end}", f"no{end}"
    assert texts == [f"{start}<s>assistant\n{answer}" for answer in answers]
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        assert tokenizer.decode(row[side][row[f"{side}_target"] > 0]) == answer


def test_a_migrated_preference_config_checks_clean_and_trains(pairs, tmp_path):
    """A checked config could start; this one is started too."""
    migrate(pairs, 1, tmp_path / "new")
    yaml, cache = tmp_path / "new" / "config.yaml", f"cache={tmp_path}/cache"
    check = [sys.executable, str(runs.ROOT / "launch" / "check.py"), "--config", str(yaml)]
    ended = subprocess.run([*check, "--set", cache], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for kept in ("preference (train): 18 of 18 rows kept", "(validation): 2 of 2 rows kept"):
        assert kept in ended.stdout, ended.stdout
    runs.train(yaml, cache, "train.epochs=null", "train.steps=2").well()
    first = {}
    for line in runs.metrics(tmp_path / "run"):
        first |= line if line["step"] == 0 else {}
    assert first["eval/preference/loss"] == pytest.approx(np.log(2), rel=1e-3)
    assert first["train/chosen/weight"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"xxpo": "orpo"}, {"loss": "orpo", "beta": 0.2}),
        ({"rpo_alpha": None, "beta": 0.4}, {"loss": "sigmoid", "beta": 0.4}),
    ],
)
def test_losses_without_a_token_loss_of_their_own(pairs, tmp_path, changes, found):
    migrate(changed(pairs, **changes), 2, tmp_path / "new")
    ours = load(tmp_path / "new" / "config.yaml")
    assert list(ours.tasks) == ["preference"] and ours.balancer.name == "Equal"
    assert ours.tasks["preference"].objective.keywords == found


def test_the_end_of_a_preference_run(pairs, tmp_path):
    migrate(changed(pairs, max_steps=40, warmup_steps=0.1), 2, tmp_path / "new")
    ours = load(tmp_path / "new" / "config.yaml")
    assert ours.train.steps == 40 and ours.schedule.warmup == 4


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"xxpo": "kto"}, "xxpo: found 'kto', wanted dpo or orpo"),
        ({"coba_tau": 5}, "coba_tau: found an unknown key, wanted one of MFTCoder's xxpo/xxpo_arg"),
        ({"data_paths": "[/nowhere.jsonl]"}, "found /nowhere.jsonl, wanted a JSONL file of pairs"),
        ({"max_length": None}, "max_length: found null"),
    ],
)
def test_what_of_a_preference_config_cannot_be_migrated(pairs, tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        migrate(changed(pairs, **changes), 2, tmp_path / "new")


@pytest.mark.parametrize(
    "row, error",
    [
        (
            pair(0, rejected=[turn("user", "?"), turn("bot", "no")]),
            "found another prompt in reject",
        ),
        (pair(0, chosen="2"), "chosen: found 2, wanted a chat of two turns"),
        (pair(0, rejected=[turn("bot", "no"), turn("user", "?")]), "rejected: found user last"),
        (pair(0, chosen=[turn("user", "?"), turn("tool", "1")]), "chosen: found the turn"),
        ({"chosen": pair(0)["chosen"]}, "rejected: found None"),
    ],
)
def test_what_is_no_pair_of_mftcoders_is_named(pairs, tmp_path, row, error):
    with (tmp_path / "two.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"two\.jsonl:9: {error}"):
        migrate(pairs, 2, tmp_path / "new")
