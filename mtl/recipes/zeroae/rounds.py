"""ZeroAE's rounds: score the pool, choose texts, write new ones, train on the files.

    OUT/validation.jsonl        texts with the class that the untrained model takes them for
    OUT/round-00/pseudo.jsonl   texts that are sure of their class, kept for good
                 selected.jsonl texts for the generator alone
                 generated.jsonl   what the generator wrote, this round's and earlier ones'
                 scores.npz      what the model found before the round
                 round.json      counts, thresholds, the files' SHA-256
                 x.yaml, run/    the run on them
    OUT/predictions.jsonl       at the end: {"text", "label", "p"} of every text of the pool
    OUT/gold.json               then, of files with labels: accuracy, and what each round had right

No label of a text is read anywhere. A round is whole when its round.json is; a run that was killed
goes on by `--resume`. So the same call again goes on where it was.

Where we differ from the paper: it selects uncertain texts in each batch, we once a round, because
the texts of a step must be known before its forward. And a round's generated texts come from the
generator as the last round left it.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

import mtl
from mtl import plugins
from mtl.config import Config
from mtl.data.encode import load_tokenizer
from mtl.recipes.zeroae.baselines import Floats, softmax, without_prior
from mtl.recipes.zeroae.examples import PromptExamples, TextExamples, padded, pairs
from mtl.recipes.zeroae.measures import by_round, numbered, probe, read
from mtl.recipes.zeroae.model import ZeroAE

FILES = {"pseudo": "pseudo", "generated": "generated", "recon": "selected"}  # task -> its rows
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Plan:
    """What the rounds do.

    Attributes:
        rounds: how many runs there are.
        p, gap: a text is sure of its class where it leads the second by `gap` once each class's
            mean score over the pool is taken off, or where its probability is above `p` and its
            class is the same both ways.
        share: at most this share of the pool becomes sure in a round, over all classes alike.
        select: least texts that the generator gets in a round.
        generate: texts to write for each class in a round; 0: none.
        replay: rounds whose written texts are used.
        codes: whether the generator is given codes of the class's texts; false: any code.
        uncertain: whether the generator gets the texts that are not sure; false: sure ones alone.
    """

    rounds: int = 6
    p: float = 0.9
    gap: float = 0.5
    share: float = 0.1
    select: int = 128
    generate: int = 16
    replay: int = 3
    codes: bool = True
    uncertain: bool = True


def sure(
    scores: Floats, free: NDArray[np.bool_], *, p: float, gap: float, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Texts that become sure in a round, and their classes: at most `most` of a class, those with
    the largest lead first.

    Args:
        scores: (U, C) logits.
        free: (U,), texts that are not sure yet.
    """
    chance, level = softmax(scores), softmax(without_prior(scores))
    ordered = np.sort(level, 1)
    lead, first = ordered[:, -1] - ordered[:, -2], level.argmax(1)
    # A class that is likely for every text may be this one's by chance alone.
    likely = (chance.max(1) > p) & (chance.argmax(1) == first)
    fits = free & (likely | (lead > gap))
    rows = [
        mine[np.argsort(-lead[mine], kind="stable")[:most]]
        for mine in (np.flatnonzero(fits & (first == c)) for c in range(scores.shape[1]))
    ]
    found = np.concatenate(rows)
    return found, first[found]


def select(scores: Floats, least: int) -> tuple[NDArray[np.int64], float]:
    """Texts for the generator, and the threshold: 0.9, lowered by 0.02 until at least `least` texts
    have a probability so high; 0.01 at the lowest.
    """
    best = softmax(scores).max(1)
    # 45 steps of 0.02 lead from 0.9 to 0; the last threshold is 0.01.
    for step in range(46):
        threshold = max(0.01, round(0.9 - 0.02 * step, 2))
        rows = np.flatnonzero(best >= threshold)
        if len(rows) >= least:
            break
    return rows, threshold


def clean(made: Sequence[str | None], pool: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """The written texts that are used, each once, and what became of the rest: shares of those
    without an end or empty, found in the pool, and doubled; and distinct-2, the share of their
    word pairs that are different ones.
    """
    plain = {_words(text) for text in pool}
    texts = [text.strip() for text in made if text and text.strip()]
    copied = [text for text in texts if _words(text) in plain]
    own = [text for text in texts if _words(text) not in plain]
    # Texts that differ in case or spaces are one; the last of them is kept.
    kept = list({_words(text): text for text in own}.values())
    grams = [gram for text in kept for gram in zip(text.split(), text.split()[1:], strict=False)]
    n = max(1, len(made))
    return kept, {
        "lost": 1 - len(texts) / n,
        "copied": len(copied) / n,
        "doubled": (len(own) - len(kept)) / n,
        "distinct_2": len(set(grams)) / max(1, len(grams)),
    }


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def classify(
    config_path: str, sets: Sequence[str], pool: Path, valid: Path, plan: Plan, out: Path,
    train: Sequence[str], gold: Sequence[Path] = (),
) -> Iterator[str]:  # fmt: skip
    """Do the rounds, write `out`/predictions.jsonl, and score what has labels; lines to print.

    Args:
        pool, valid: JSONL rows with a text; no other key is read.
        gold: files of {"text", "label"} rows, opened after the predictions are written.

    Raises:
        ValueError: a row without a text, no such file, a label that is no class; and as `go`.
    """
    for path in pool, valid, *gold:  # now, not after hours
        if not path.is_file():
            raise ValueError(f"{path}: found no such file, wanted JSON Lines.")
    texts = _texts(pool)
    last = go(config_path, texts, _texts(valid), plan, out, train, sets)
    base = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
    # A count of 1 for each, so that no task is left out: nothing is trained here.
    config = plugins.read(str(_yaml(out, base, out, dict.fromkeys(FILES, 1), None)), sets)
    model, reader = _ready(mtl.load(last)), Reader(config)
    names = reader.classes.names
    chance = softmax(reader.scores(model, texts))
    rows = [
        {"text": text, "label": names[row.argmax()], "p": round(float(row.max()), 4)}
        for text, row in zip(texts, chance, strict=True)
    ]
    _write(out / "predictions.jsonl", rows)
    yield f"predictions: {out / 'predictions.jsonl'}"
    guessed = {row["text"]: row["label"] for row in rows}
    told: dict[str, Any] = {"accuracy": {}, "rounds": []}
    truth: dict[str, str] = {}
    for path in gold:
        labelled = read(path)
        if odd := [
            row
            for row in labelled
            if row.get("label") not in names or not isinstance(row.get("text"), str)
        ]:
            wanted = f"a text, and a label of {', '.join(names)}"
            raise ValueError(f"{path}: found {str(odd[0])[:60]}, wanted {wanted}.")
        if fresh := [row["text"] for row in labelled if row["text"] not in guessed]:
            found = reader.scores(model, fresh).argmax(1)
            guessed |= {text: names[c] for text, c in zip(fresh, found, strict=True)}
        right = [guessed[row["text"]] == row["label"] for row in labelled]
        told["accuracy"][str(path)] = float(np.mean(right))
        yield f"accuracy on {path}: {np.mean(right):.4f} of {len(right)} texts"
        truth |= {row["text"]: row["label"] for row in labelled}
    if truth.keys() & set(texts):
        told["rounds"] = by_round(out, plan.rounds, texts, names, truth)
    for note in told["rounds"]:
        shares = (
            (key, value) for key, value in note.items() if key != "round" and value is not None
        )
        yield f"round {note['round']}: " + ", ".join(f"{key} {value:.4f}" for key, value in shares)
    if gold:
        (out / "gold.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _texts(path: Path) -> list[str]:
    found = []
    for number, row in numbered(path):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}:{number}: found {str(row)[:60]}, wanted a row with a text.")
        found.append(text)
    return found


def go(
    config_path: str, pool: Sequence[str], valid: Sequence[str], plan: Plan, out: Path,
    train: Sequence[str], sets: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Do the rounds that are not done; the folder of the last model.

    Args:
        config_path: the experiment; its tasks are some of `pseudo`, `generated` and `recon`.
        pool: the unlabelled texts. valid: others, for the validation rows.
        train: the command that trains, to which `--config x.yaml --resume` is added.
        sets: overrides of the config.

    Raises:
        ValueError: a round has no row to train on, or `out` has rounds of another call.
        CalledProcessError: a run failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
    # More rounds of the same kind may be asked for later.
    same = [base, list(sets), list(pool), list(valid), asdict(replace(plan, rounds=0))]
    key = hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()
    for number in range(plan.rounds):
        folder = out / f"round-{number:02d}"
        run, note = folder / "run", folder / "round.json"
        # Written last, by renaming: with it all files of the round are there.
        if not note.is_file():
            folder.mkdir(exist_ok=True)
            _write_round(base, sets, pool, valid, plan, out, number, key)
            # The run needs the memory that scoring took.
            torch.cuda.empty_cache()
        elif (had := json.loads(note.read_text(encoding="utf-8")).get("key")) != key:
            what = "other texts, another configuration or other switches"
            if had is None:
                what = "an earlier version, which does not say what it was made of"
            raise ValueError(
                f"{note}: found a round of {what}. Give another --out, or move this one away."
            )
        if not (run / "model" / "zeroae.json").is_file():
            given = [part for one in sets for part in ("--set", one)]
            command = [*train, "--config", str(folder / "x.yaml"), "--resume", *given]
            subprocess.run(command, check=True)
    return out / f"round-{plan.rounds - 1:02d}" / "run" / "model"


class Reader:
    """The experiment's two sides, as the model reads them."""

    def __init__(self, config: Config):
        tokenizer = load_tokenizer(config.model, config.where("model.name"))
        goals = plugins.objectives(config)
        made = [each.examples(goals.book, tokenizer, config) for each in goals.each]
        self.pair = next(one for one in made if isinstance(one, PromptExamples))
        self.text = next((one for one in made if isinstance(one, TextExamples)), None)
        self.classes = self.pair.classes
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        limits = {"truncation": True, "max_length": self.pair.max_length}
        limits |= self.pair.specials[0].options
        return self.classes.tokenizer(text, verbose=False, **limits)["input_ids"]

    @torch.no_grad()
    def scores(self, model: ZeroAE, texts: Sequence[str], size: int = 64) -> Floats:
        """(U, C) logits that a class's prompt fits a text."""
        c, found = len(self.classes.names), []
        # `cross` reads a row for each pair, `bi` for each text.
        step = size if self.pair.scorer == "bi" else max(1, size // c)
        for at in range(0, len(texts), step):
            ids = [self.ids(text) for text in texts[at : at + step]]
            of, classes = np.divmod(np.arange(len(ids) * c), c)
            arrays = pairs(ids, of, classes, self.classes, self.pair.scorer)
            found.append(model.pairs(*_tensors(arrays, model)).view(-1, c))
        return torch.cat(found).double().cpu().numpy()

    @torch.no_grad()
    def codes(self, model: ZeroAE, texts: Sequence[str], size: int = 64) -> NDArray[np.int64]:
        """(U,) codes of the texts."""
        found = [np.zeros(0, np.int64)]
        for at in range(0, len(texts), size):
            arrays = padded([self.ids(t) for t in texts[at : at + size]], self.classes.pad_id)
            logits = model.code_logits(*_tensors(arrays, model))
            found.append(logits.argmax(-1).cpu().numpy())
        return np.concatenate(found)

    def write(
        self, model: ZeroAE, label: int, codes: NDArray[np.int64], seed: int
    ) -> list[str | None]:
        """A text of the class for each code; None: it had no end."""
        assert self.text is not None
        rows = model.sample(
            self.text.prompt(label), *_tensors([codes], model),
            torch.Generator().manual_seed(seed), end=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return [None if row is None else self.tokenizer.decode(row) for row in rows]


def _ready(model: ZeroAE) -> ZeroAE:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _tensors(arrays: Iterable[np.ndarray], model: ZeroAE) -> list[torch.Tensor]:
    return [torch.from_numpy(each).to(model.book.device) for each in arrays]


def _write_round(
    base: Mapping[str, Any], sets: Sequence[str], pool: Sequence[str], valid: Sequence[str],
    plan: Plan, out: Path, number: int, key: str,
) -> None:  # fmt: skip
    """Write a round's files and its YAML. The model that it needs is let go of at the end."""
    folder, before = out / f"round-{number:02d}", out / f"round-{number - 1:02d}"
    config = plugins.read(str(_yaml(folder, base, out, dict.fromkeys(FILES, 1), None)), sets)
    reader = Reader(config)
    names, seed = reader.classes.names, config.train.seed
    if number:
        model = _ready(mtl.load(before / "run" / "model"))
        earlier = read(before / "pseudo.jsonl")
    else:
        # The new parts are random: the same call again must give the same round.
        torch.manual_seed(seed)
        both = [e for e in (reader.pair, reader.text) if e]
        model = _ready(plugins.loader(config)(config, reader.tokenizer, both, empty=False))
        earlier = []
        guessed = reader.scores(model, valid).argmax(1)
        rows = [{"text": t, "label": names[c]} for t, c in zip(valid, guessed, strict=True)]
        _write(out / "validation.jsonl", rows)
    scores = reader.scores(model, pool)
    known = {row["text"] for row in earlier}
    free = np.array([text not in known for text in pool])
    most = max(1, int(plan.share * len(pool) / len(names)))
    rows, classes = sure(scores, free, p=plan.p, gap=plan.gap, most=most)
    fresh = [{"text": pool[i], "label": names[c]} for i, c in zip(rows, classes, strict=True)]
    note: dict[str, Any] = {"round": number, "key": key, "plan": asdict(plan), "sure": len(fresh)}
    chosen, note["threshold"] = select(scores, plan.select)
    if not plan.uncertain:
        chosen = np.array(sorted({*rows, *np.flatnonzero(~free)}), np.int64)
    taken = scores[chosen].argmax(1)
    picked = [{"text": pool[i], "label": names[c]} for i, c in zip(chosen, taken, strict=True)]
    made: Rows = []
    codes = np.zeros(0, np.int64)
    if number and reader.text is not None:
        codes = reader.codes(model, [pool[i] for i in chosen])
        if len(codes) > 1:
            # By the class that a text is taken for: labels are not here.
            note["code_probe"], note["code_chance"] = probe(codes, taken)
    if len(codes) and plan.generate:
        made, told = _generate(reader, model, pool, codes, taken, plan, seed * 1000 + number)
        note |= told
        made += [
            row
            for i in range(max(1, number - plan.replay + 1), number)
            for row in read(out / f"round-{i:02d}" / "new.jsonl")
        ]
    np.savez(folder / "scores.npz", scores=scores, chosen=chosen, codes=codes)
    # This round's own come first in `made`; later rounds read them as their replay.
    _write(folder / "new.jsonl", made[: note.get("written", 0)])
    files = {"pseudo": [*earlier, *fresh], "selected": picked, "generated": made}
    for name, each in files.items():
        _write(folder / f"{name}.jsonl", each)
    counts = {task: len(files[name]) for task, name in FILES.items()}
    start = before / "run" / "model" if number else None
    _yaml(folder, base, out, counts, start)
    paths = [folder / f"{name}.jsonl" for name in files]
    note["sha256"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    note["rows"] = {name: len(each) for name, each in files.items()}
    temporary = folder / ".round.json"
    temporary.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    temporary.rename(folder / "round.json")


def _generate(
    reader: Reader, model: ZeroAE, pool: Sequence[str], codes: NDArray[np.int64],
    taken: NDArray[np.int64], plan: Plan, seed: int,
) -> tuple[Rows, dict[str, Any]]:  # fmt: skip
    """Written rows of each class, and what is told of them."""
    draw = np.random.default_rng(seed)
    rows, made = [], []
    for label, name in enumerate(reader.classes.names):
        # At most a hundred of a class, as the paper's memory; here the pool's last.
        memory = codes[taken == label][-100:]
        if not len(memory) or not plan.codes:
            memory = np.arange(model.options.codes)
        texts = reader.write(model, label, draw.choice(memory, plan.generate), seed + label)
        made += [(text, name) for text in texts]
    kept, told = clean([text for text, _ in made], pool)
    # The same text may have been written for two classes: the first one has it.
    wanted = set(kept)
    for text, name in made:
        if text and (text := text.strip()) in wanted:
            wanted.discard(text)
            rows.append({"text": text, "label": name})
    return rows, {"written": len(rows), **told}


def _yaml(
    folder: Path, base: Mapping[str, Any], out: Path, counts: Mapping[str, int], start: Path | None
) -> Path:
    """The round's own YAML: the experiment without tasks that have no row, on the round's files."""
    config = json.loads(json.dumps(base))  # aliases become copies
    if other := sorted(config["tasks"].keys() - FILES.keys()):
        raise ValueError(f"tasks: found {', '.join(other)}, wanted some of {', '.join(FILES)}.")
    tasks = {name: task for name, task in config["tasks"].items() if counts.get(name)}
    if not tasks:
        raise ValueError(f"{folder}: found no row to train on: lower --p, --gap or raise --share.")
    for name, task in tasks.items():
        task["train"] = str(folder / f"{FILES[name]}.jsonl")
        task["validation"] = str(out / "validation.jsonl")
    config["tasks"], config["output"] = tasks, str(folder / "run")
    parts = config["balancer"].get("parts") if isinstance(config.get("balancer"), dict) else None
    if parts is not None:
        # A part all of whose tasks are left out goes too.
        left = {part: [t for t in each if t in tasks] for part, each in parts.items()}
        config["balancer"]["parts"] = {part: each for part, each in left.items() if each}
    if start is not None:
        config.setdefault("train", {})["from"] = str(start)
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
