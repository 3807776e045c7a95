"""From a name to a module.

A loader is one function, `loader(config, tokenizer, examples, *, empty)`.

It loads the model in the training dtype, and adds adapters and checkpointing where the config asks.
It returns a module with `save_pretrained(folder, state_dict=...)`.

`examples` has one `Examples` of each objective. They may tell what the model needs to know, such as
a classifier's labels. `empty` asks for a module on the meta device, without weights, for `check`.
Of a module with `trained_only = True`, the trained parameters alone are saved.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from mtl.config import Config
from mtl.models import load
from mtl.models.errors import ModelError

LOADERS = {
    "causal_lm": "mtl.models.loaders:causal_lm",
    "sequence_classification": "mtl.models.loaders:sequence_classification",
    "kpe": "mtl.recipes.kpe.model:load",
    "zeroae": "mtl.recipes.zeroae.model:load",
}
PLAIN = ("causal_lm", "sequence_classification")  # a class of transformers opens what they save


class Loader(Protocol):
    def __call__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        *,
        empty: bool,
    ) -> nn.Module: ...


def causal_lm(
    config: Config, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any], *, empty: bool
) -> nn.Module:
    """Anything `AutoModelForCausalLM` loads, its head run on target positions only.

    Raises:
        ModelError: the model cannot be loaded, or cannot be trained on target positions only.
    """
    if empty:
        return load.skeleton(config, tokenizer)
    return load.load(config, tokenizer)


def sequence_classification(
    config: Config, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any], *, empty: bool
) -> nn.Module:
    """Anything `AutoModelForSequenceClassification` loads, with one logit for each task's labels.

    The label names come from the objective `classification`; `config.id2label` has them as
    `task: label` where there are several tasks.

    Raises:
        ModelError: the model cannot be loaded, or no objective has labels.
    """
    labels = next((one.labels for one in examples if getattr(one, "labels", None)), None)
    if labels is None:
        raise ModelError(
            f"{config.where('model.loader')}: model.loader: found sequence_classification without "
            "an objective that has labels, wanted `objective: classification`."
        )
    names = [
        label if len(labels) == 1 else f"{task}: {label}"
        for task, each in labels.items()
        for label in each
    ]
    settings = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "pad_token_id": tokenizer.pad_token_id,
    }
    # A classifier's head of another size is made new: it had other labels.
    family = load.Family(
        AutoModelForSequenceClassification, False, settings, {"ignore_mismatched_sizes": True}
    )
    make = load.skeleton if empty else load.load
    return make(config, tokenizer, family)
