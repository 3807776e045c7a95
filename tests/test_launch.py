"""The program as a user starts it: by every launcher, to an exported model; an error of one rank, which ends all."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import runs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtl import cli, plugins, process

STEPS = ["train.steps=4", "evaluate.every=2", "checkpoint.every=null"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("launch"))


def deepspeed() -> list[str]:
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(process.free_port())]


@pytest.fixture(scope="module")
def launched(yaml) -> tuple[Path, runs.Ended]:
    output = yaml.parent / "deepspeed"
    return output, runs.launch(deepspeed(), yaml, *STEPS, f"output={output}").well()


def test_deepspeed_ends_with_a_table_and_a_model_that_generates(launched):
    output, ended = launched
    printed = [
        line for line in ended.out.splitlines() if not line.startswith("[")
    ]  # the launcher's own
    *table, exported = printed[-7:]
    assert re.fullmatch(rf"best model, of step-0000000\d: {output}/model", exported)
    assert table[0].split()[:4] == ["task", "start", "best", "at"]
    assert [line.split()[0] for line in table[2:]] == ["copy", "chat", "prose", "macro"]

    model, tokenizer = (
        auto.from_pretrained(output / "model") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompt = tokenizer("abc =", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape == (1, prompt["input_ids"].shape[1] + 5)
    before = AutoModelForCausalLM.from_pretrained(output.parent / "model")
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight), "it was trained"


def test_torchrun_gives_what_deepspeed_gives(yaml, launched):
    output = yaml.parent / "torchrun"
    runs.launch(
        ["torchrun", "--nproc_per_node", "2", "--standalone"], yaml, *STEPS, f"output={output}"
    ).well()
    assert runs.untimed(output) == runs.untimed(launched[0])


def test_plain_python_gives_the_same_losses(yaml, launched):
    """One process instead of two: the same batches, cut otherwise."""
    output = yaml.parent / "python"
    runs.launch(["python"], yaml, *STEPS, f"output={output}", more=["--local_rank=0"]).well()
    lines = [runs.untimed(run) for run in (output, launched[0])]
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        for tag in one.keys() - {"train/positions"}:  # padding is the cut's
            assert one[tag] == pytest.approx(two[tag], rel=1e-4, abs=1e-6), (one["step"], tag)


@pytest.mark.parametrize(
    "given", [["--local_rank=0"], ["--local_rank", "0"], ["--local-rank=0"], ["--local-rank", "0"]]
)
def test_what_launchers_append_is_accepted(given):
    parser = cli.parser(None, reads_config=True, is_launched=True)
    assert parser.parse_args(["--config", "x.yaml", *given]).local_rank == 0


def test_an_error_of_one_rank_ends_both_with_its_text(yaml, tmp_path):
    """In the preparation of a batch, which the ranks agree about: neither is left in a collective."""
    ended = runs.launch(
        deepspeed(),
        yaml,
        *STEPS,
        f"output={tmp_path}",
        "objective=outside:causal_lm",
        MISFORTUNE="raise batch 2 1",
    )
    assert ended.codes == [1]
    assert re.search(r"^RuntimeError: the dog ate the batch of step 2$", ended.err, re.MULTILINE)
    assert (
        "error [rank 0]: rank 1 failed: RuntimeError: the dog ate the batch of step 2" in ended.err
    )
    assert [line["step"] for line in runs.metrics(tmp_path) if "train/loss" in line] == [0, 1]
    assert ended.seconds < 0.8 * runs.TIMEOUT, "not the group's timeout"


def test_an_error_between_forward_and_backward_ends_both(yaml, tmp_path):
    """Where no agreement is asked for: the other rank loses its partner in the next collective."""
    ended = runs.train(
        yaml,
        *STEPS,
        f"output={tmp_path}",
        "objective=outside:causal_lm",
        world=2,
        MISFORTUNE="raise step 2 1",
    )
    assert ended.codes == [1, 1]
    assert "RuntimeError: the dog ate the step of step 2" in ended.err
    assert [line["step"] for line in runs.metrics(tmp_path) if "train/loss" in line] == [0, 1]


# What the README tells people to type


def commands() -> list[str]:
    """Every command line of the README, in a block or in the text, continued lines joined, comments removed."""
    text = (runs.ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    starts = re.compile(r"(?:\w+=\S+ )*(?:make|deepspeed|python|torchrun|srun) \S")
    return [line for line in lines if starts.match(line)]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_readme_exist(command):
    words = [
        word
        for word in shlex.split(command, comments=True)
        if "=" not in word or word.startswith("-")
    ]
    if "bash" in words:  # the command it is given
        words += shlex.split(words[words.index("-c") + 1])
    if words[0] == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (runs.ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= {*targets, "..."}
        return
    programs = [word for word in words if word.endswith(".py")]
    assert programs, "no program in it"
    after = words[words.index(programs[0]) + 1 :]
    source = ast.parse((runs.ROOT / programs[0]).read_text(encoding="utf-8"))
    helpers = [*(runs.ROOT / "mtl").glob("cli.py")]  # options that programs share
    known = {
        node.value for tree in (source, *(ast.parse(path.read_text()) for path in helpers)) for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
    }  # fmt: skip
    assert {word.split("=")[0] for word in after if word.startswith("--")} <= known
    for word in after:
        if word.endswith(".yaml") and "/" in word:
            assert (runs.ROOT / word).is_file(), word


def test_the_readme_has_commands():
    assert {"make train", "make test"} <= {command.split("#")[0].strip() for command in commands()}


@pytest.mark.parametrize(
    "path", sorted((runs.ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name
)
def test_every_yaml_that_ships_is_read(path):
    assert plugins.read(str(path)).output


def test_the_yaml_of_the_readme_is_read(tmp_path):
    for n, text in enumerate(
        re.findall(
            r"^```yaml\n(.*?)^```", (runs.ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
        )
    ):
        path = tmp_path / f"{n}.yaml"
        path.write_text(text)
        if re.search(r"^tasks:", text, re.MULTILINE):
            assert plugins.read(str(path)).tasks
