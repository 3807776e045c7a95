"""Answers to questions and metrics of them: against loops and formulas written out by hand."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from chats import GEMMA
from distributed import run_distributed
from transformers import AutoModelForCausalLM

import runs
from mtl import build, plugins
from mtl.compare import evaluation
from mtl.config import ConfigError
from mtl.data import cache, formats
from mtl.data.encode import Encoder
from mtl.data.encoded import DataError, TaskData
from mtl.data.formats import Completion
from mtl.data.next_token import NextToken
from mtl.data.questions import Question
from mtl.data.source import open_sources
from mtl.generation import metrics
from mtl.generation.metrics import Answer, Choice, scored

NEW = 12  # tokens of an answer


def answers(*pairs: tuple[str, str], row: dict | None = None) -> list[Answer]:
    """Answers of (text, right answer)."""
    none = np.zeros(0, np.int32)
    return [
        Answer(Question(i, none, right, Completion("", right), row or {}), text)
        for i, (text, right) in enumerate(pairs)
    ]


# --- metrics


def test_exact_match_and_f1_by_hand():
    some = answers((" Paris\n", "Paris"), ("the cat, a dog", "A cat sat."), ("", "x"), ("The", "a"))
    assert metrics.exact_match(some) == [1, 0, 0, 0]
    assert metrics.exact_match(some, normalize=True) == [1, 0, 0, 1]
    # normalized: "cat dog" against "cat sat" share one of two words; nothing against nothing is right
    assert metrics.f1(some) == [1, 0.5, 0, 1]


def test_bleu_by_hand():
    found = metrics.bleu(answers(("the cat sat on the mat", "the cat sat on a mat")))
    shared = (5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)
    assert found == pytest.approx(100 * shared ** (1 / 4))
    # A corpus adds counts up, and a short text is punished: here 4 + 4 words against 4 + 6.
    two = answers(("a b c d", "a b c d"), ("a b c d", "a b c d e f"))
    assert metrics.bleu(two) == pytest.approx(100 * math.exp(1 - 10 / 8))


def test_chrf_by_hand():
    text, right = "abcd ef", "abce efg"
    text_, right_ = text.replace(" ", ""), right.replace(" ", "")
    precision, recall = [], []
    for n in range(1, 7):
        a, b = (Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (text_, right_))
        shared = (a & b).total()
        precision.append(shared / a.total())
        recall.append(shared / b.total())
    p, r = sum(precision) / 6, sum(recall) / 6
    assert metrics.chrf(answers((text, right))) == pytest.approx(100 * 5 * p * r / (4 * p + r))


def test_rouge_l_by_hand():
    # the longest common subsequence is "a c d": 3 of 4 words, and 3 of 5
    some = answers(("a b c d", "a c x d e"), ("cats", "cat"))
    assert metrics.rouge_l(some) == pytest.approx([2 * 0.75 * 0.6 / 1.35, 0])
    assert metrics.rouge_l(some, stem=True)[1] == 1


@pytest.mark.parametrize(
    ("text", "is_json"),
    [('{"a": [1, null]}', 1), (" 3\n", 1), ("{'a': 1}", 0), ("[1,]", 0), ("NaN", 0), ("", 0)]
    + [("[" * 100_000, 0), ("1" * 5000, 0)],
)
def test_json(text, is_json):
    assert metrics.valid_json(answers((text, ""))) == [is_json]
    fenced = answers((f"Sure:\n```json\n{text}\n```\nDone.", ""))
    assert metrics.valid_json(fenced) == [0]
    assert metrics.valid_json(fenced, fenced=True) == [is_json]


def test_choice_takes_the_likeliest_as_given_or_per_character():
    def one(*log_p: float) -> Answer:
        question = Question(0, np.zeros(0), " no way", Completion("", " no way"), {})
        return Answer(question, candidates=(" yes", " no way"), log_p=log_p)

    some = [one(-3, -4), one(-3, -2)]
    assert Choice()(some) == [0, 1]
    assert Choice(per="character")(some) == [1, 1]  # -3 / 3 < -4 / 6
    with pytest.raises(ValueError, match="per: found 'word', wanted null or character"):
        Choice(per="word")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({}, "choices: found None, wanted a list of two or more texts"),
        ({"choices": ["a"]}, "wanted a list of two"),
        ({"choices": ["a", "b"]}, r"found the answer ' c' for the choices \[' a', ' b'\], wanted"),
        ({"choices": ["c", "c "]}, "wanted it among them once"),
    ],
)
def test_a_row_without_its_answer_among_the_choices_is_refused(row, text):
    question = Question(0, np.zeros(0), " c", Completion("", " c"), row)
    with pytest.raises(DataError, match=text):
        Choice().candidates(question)


def test_a_metric_gives_one_score_each_or_one_number():
    two = answers(("a", "a"), ("b", "a"))
    assert scored("m", lambda some: [1, 0], two) == (0.5, [1, 0])
    assert scored("m", lambda some: 7, two) == (7, None)
    with pytest.raises(ValueError, match="metric m: gave 1 scores for 2 answers"):
        scored("m", lambda some: [1], two)


# --- generation


def test_where_a_row_was_cut_is_no_end_of_a_turn(tmp_path):
    tok, file = toys.tokenizer(), tmp_path / "a.jsonl"
    long = f"{'x' * 15}{toys.UNUSED} and the rest"
    examples = NextToken(None, 0, Encoder(tok, 20, "truncate"))

    def stops(*completions: str) -> list[str]:
        file.write_text("".join(json.dumps({"text": f"a =={one}"}) + "\n" for one in completions))
        made = cache.encode_split(
            tmp_path / "cache", open_sources(str(file)), formats.text, examples, None, "a", print
        )
        assert made.report.truncated == completions.count(long)
        assert tok.decode(made.ids(0)[-1:]) == (toys.UNUSED if long in completions else toys.END)
        data = build.Data(
            tok, [TaskData("a", made, made)], SimpleNamespace(of=[0], book=None), [examples]
        )
        return tok.convert_ids_to_tokens(sorted(build.stops(data)))

    assert stops(long, "b", "cd") == stops("b", "cd") == [toys.END]


def by_hand(model: torch.nn.Module, prompt: list[int], stops: set[int]) -> tuple[str, bool]:
    """Greedy, a row at a time, without a cache: the text, and whether it ended its turn."""
    ids, made = list(prompt), []
    while len(made) < NEW:
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
        if made[-1] in stops:
            return toys.tokenizer().decode(made[:-1], skip_special_tokens=True), True
    return toys.tokenizer().decode(made, skip_special_tokens=True), False


def log_p(model: torch.nn.Module, prompt: list[int], text: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + text])).logits[0].double()
    found = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(found[range(len(text)), text].sum())


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    """`copy`: of its 8 validation rows the model itself answers every other one right. `pick`: two
    choices. `prose` has no question.
    """
    path = runs.write(tmp_path_factory.mktemp("generate"))
    folder = path.parent
    model = toys.tiny_llama(seed=5)
    with torch.no_grad():
        model.lm_head.weight[257] += 0.35 * model.lm_head.weight[60]  # it ends a turn now and then
    toys.save(model, folder / "model")
    ids = toys.tokenizer()
    rows, picks = [], []
    for i in range(9):
        prompt = "abcdefghi"[: i + 1] + " ="
        right, _ = by_hand(model, ids(prompt)["input_ids"], {257})
        rows.append({"prompt": prompt, "completion": right if i % 2 and right else f" {i}"})
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]
        picks.append({"messages": said, "options": ["no", "yes", "perhaps"]})
    for name, some in (("copy", rows), ("pick", picks)):
        for split in ("train", "validation"):
            toys.write_rows(folder / f"{name}.{split}.jsonl", some)
    text = runs.YAML.format(folder=folder).replace("chat", "pick")
    metrics_of = {"copy": "[exact_match, chrf]", "pick": "[{name: choice, choices: options}]"}
    for name, given in metrics_of.items():
        text = text.replace(f"  {name}:\n", f"  {name}:\n    metrics: {given}\n")
    text = text.replace(
        "evaluate: {", f"evaluate: {{generate: {{max_new_tokens: {NEW}, batch: 4}}, "
    )
    path.write_text(text)
    return path


def evaluated(yaml: Path, file: Path, *overrides: str, model: Path | None = None):
    """Measures of a model, the one the YAML names by default, and the lines of its predictions."""
    config = plugins.read(str(yaml), overrides, runs.ALLOWED)
    data = evaluation.rows(config, "validation", runs.ALLOWED, asks=True)
    evaluate = evaluation.evaluator(config, data, allow_code=runs.ALLOWED, predictions=file)
    found = evaluate(model or yaml.parent / "model")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return found.measured(list(config.tasks), data.measures), lines


def test_answers_are_those_of_a_loop_without_batches_and_cache(yaml, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(yaml.parent / "model")
    found, lines = evaluated(yaml, tmp_path / "x.jsonl")
    copy, pick = ([one for one in lines if one["task"] == task] for task in ("copy", "pick"))
    assert len(copy) == len(pick) == 9
    ids = toys.tokenizer()
    for one in copy:
        wanted = by_hand(model, ids(one["prompt"])["input_ids"], {257})
        assert (one["prediction"], one["finished"]) == wanted
        assert one["scores"]["exact_match"] == (wanted[0].strip() == one["answer"].strip())
    right = sum(one["scores"]["exact_match"] for one in copy)
    assert 3 <= right < 9 and found["copy/exact_match"] == found["exact_match"] == right / 9
    assert len({one["finished"] for one in copy}) == 2  # both kinds of end are met
    assert copy[0]["row"] == f"{yaml.parent}/copy.validation.jsonl:1"

    best = []
    for one in pick:
        assert "prediction" not in one  # no text is needed
        prompt = ids(one["prompt"])["input_ids"]
        for text, nats in one["log_p"]["choice"].items():
            wanted = log_p(model, prompt, ids(text + toys.END)["input_ids"])
            assert nats == pytest.approx(wanted, rel=1e-5)
        best.append(max(one["log_p"]["choice"], key=one["log_p"]["choice"].get) == "yes")
    assert found["pick/choice"] == sum(best) / 9
    assert {key for key in found if "/" in key} == {
        "copy/exact_match", "copy/chrf", "pick/choice"
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 9])
def test_answers_do_not_depend_on_the_batch(yaml, tmp_path, batch):
    found, lines = evaluated(yaml, tmp_path / "x.jsonl")
    others, more = evaluated(yaml, tmp_path / "y.jsonl", f"evaluate.generate.batch={batch}")
    assert others == pytest.approx(found, rel=1e-9)
    assert [one.get("prediction") for one in more] == [one.get("prediction") for one in lines]


def _measure(yaml: Path, file: Path):
    return evaluated(yaml, file)


def test_two_processes_answer_as_one(yaml, tmp_path):
    found, lines = evaluated(yaml, tmp_path / "one.jsonl")
    for others, _ in run_distributed(_measure, 2, yaml, tmp_path / "two.jsonl"):
        assert others == pytest.approx(found, rel=1e-9)
    more = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [{**one, "log_p": 0} for one in more] == [{**one, "log_p": 0} for one in lines]


TRAIN = (
    "train.steps=4", "evaluate.every=2", "evaluate.generate.every=4", "evaluate.generate.rows=5",
    "evaluate.best=exact_match", "checkpoint.every=2", "checkpoint.keep=9",
)  # fmt: skip


@pytest.mark.parametrize(
    ("zero", "world", "lora"), [(2, 1, False), (3, 2, False), (3, 2, True), (1, 2, True)]
)
def test_training_answers_as_evaluation_does(yaml, tmp_path, zero, world, lora):
    """And goes on as if it had not."""
    sets = [*TRAIN, f"engine.zero={zero}", *(["model.lora={r: 2}"] if lora else [])]
    runs.train(yaml, *sets, f"output={tmp_path}/run", world=world).well()
    asked = {line["step"]: line for line in runs.metrics(tmp_path / "run") if "eval/macro" in line}
    assert [step for step, line in asked.items() if "eval/exact_match" in line] == [0, 4]
    for step in (0, 4):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}/model" if step else None
        found, _ = evaluated(yaml, tmp_path / "x.jsonl", *sets, model=folder)
        file = tmp_path / f"run/predictions/step-{step:08d}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [one["row"].rpartition(":")[2] for one in lines] == ["1", "2", "4", "6", "8"] * 2
        every = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        same = {(one["task"], one["row"]): one.get("prediction") for one in every}
        for one in lines:
            assert one.get("prediction") == same[one["task"], one["row"]]
        right = [one["scores"]["exact_match"] for one in lines if one["task"] == "copy"]
        assert asked[step]["eval/copy/exact_match"] == sum(right) / 5
        assert found.keys() == {k[5:] for k in asked[step] if k[5:] in found}
    if world == 2:
        plain = [one.replace("best=exact_match", "best=macro") for one in sets]
        plain[2] = "evaluate.generate.every=null"
        runs.train(yaml, *plain, f"output={tmp_path}/plain", world=world).well()
        losses = [
            [line["train/loss"] for line in runs.metrics(tmp_path / name) if "train/loss" in line]
            for name in ("run", "plain")
        ]
        assert losses[0] == losses[1]


def test_a_metric_picks_the_best_checkpoint(yaml, tmp_path):
    """The highest, among the passes that have answers; a lower loss does not count."""
    runs.train(yaml, *TRAIN, f"output={tmp_path}/run", "evaluate.generate.rows=null").well()
    asked = [line for line in runs.metrics(tmp_path / "run") if "eval/exact_match" in line]
    assert asked[0]["eval/exact_match"] > asked[-1]["eval/exact_match"]
    assert asked[0]["eval/macro"] > asked[-1]["eval/macro"]
    state = json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())
    assert state["run"]["best"] == {"step": 0, "value": asked[0]["eval/exact_match"]}


def test_averaged_weights_answer_too(yaml, tmp_path):
    runs.train(yaml, *TRAIN, f"output={tmp_path}/run", "average={decay: 0.5}").well()
    last = [line for line in runs.metrics(tmp_path / "run") if "eval/exact_match" in line][-1]
    assert "eval/average/copy/exact_match" in last
    assert sorted(file.name for file in (tmp_path / "run/predictions").iterdir()) == [
        "step-00000000.jsonl", "step-00000004.average.jsonl", "step-00000004.jsonl"
    ]  # fmt: skip


def test_a_turn_ends_with_the_templates_own_token(yaml, tmp_path):
    """Which is not eos."""
    tokenizer = toys.tokenizer(template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    model = toys.tiny_llama(vocab_size=260)
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    metric = "tasks.pick.metrics=[exact_match]"
    config = plugins.read(str(yaml), [f"model.name={tmp_path}/model", metric])
    data = evaluation.rows(config, "validation", asks=True)
    copy, pick = data.asking.asked
    stop, eos = tokenizer.convert_tokens_to_ids("<|stop|>"), tokenizer.eos_token_id
    assert stop != eos and pick.stops == {stop, eos} and copy.stops == {eos}


# --- what is refused


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["tasks.copy.metrics=[exact]"], "tasks.copy.metrics.0.*found 'exact', wanted exact_match"),
        (["tasks.copy.metrics=[{name: bleu, tokens: 3}]"], "tokens: found an unknown keyword"),
        (["tasks.pick.metrics=[{name: choice, per: word}]"], "per: found 'word'"),
        (["tasks.copy.metrics=[f1, f1]"], "found 'f1' a second time"),
        (["tasks.copy.metrics=[code]"], "wanted evaluate.generate.run_code: true beside it"),
        (["evaluate.generate.every=7"], "wanted a multiple of evaluate.every, 6"),
        (["evaluate.best=exact_match"], "evaluate.best: found 'exact_match'"),
        (["evaluate.generate.every=6", "evaluate.best=bleu"], "evaluate.best: found 'bleu'"),
        (["tasks.copy.metrics=[]", "tasks.pick.metrics=[]", "evaluate.generate.every=6"],
         "found 6, wanted null without tasks.<task>.metrics"),
        (["tasks.copy.metrics=['outside:elsewhere.accuracy']"], "--allow-code outside"),
    ],
)  # fmt: skip
def test_mistakes_are_told(yaml, sets, text):
    with pytest.raises(ConfigError, match=text):
        plugins.read(str(yaml), sets)


def test_a_task_without_questions_is_told(yaml):
    config = plugins.read(str(yaml), ["tasks.prose.metrics=[f1]"])
    with pytest.raises(DataError, match=r"prose\.validation\.jsonl:1: found a Text, wanted"):
        evaluation.rows(config, "validation", asks=True)


def test_a_prompt_beyond_the_models_positions_is_told(yaml, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens is 511: more than the model's 512"):
        evaluated(yaml, tmp_path / "x.jsonl", "evaluate.generate.max_new_tokens=511")
