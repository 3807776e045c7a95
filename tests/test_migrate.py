"""MFTCoder's config and data become ours, and what trains is what MFTCoder trained."""

import json
import shutil
from pathlib import Path

import pytest
import toys

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


def test_a_preference_config_says_what_is_supported(config, tmp_path):
    with pytest.raises(ValueError, match="xxpo: found 'dpo'.*Wanted.*SFT or MFT"):
        migrate(changed(config, xxpo="dpo", beta=0.1), 2, tmp_path / "new")
