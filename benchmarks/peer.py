"""A peer, measured: TRL's SFTTrainer or DPOTrainer, or transformers' Trainer, on rows that
`ours.py --rows` wrote.

    python benchmarks/peer.py settings.json                a contender (see turns.py)

Runs in the peers' own environment and imports nothing of this project. Settings, all of them
required:

    model      folder
    rows       file: [step][row] -> {input_ids, labels}, or for pairs {prompt_ids, chosen_ids,
               rejected_ids}
    trainer    "sft" (TRL's SFTTrainer), "dpo" (TRL's DPOTrainer), "full_logits" (transformers'
               Trainer, padded) or "flattening" (the same with DataCollatorWithFlattening: the rows
               of a step one after another in one row)
    attention  attn_implementation, or null for transformers' choice
    arguments  keywords of SFTConfig, DPOConfig or TrainingArguments
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from turns import Turns


class Steps(TrainerCallback):
    """Answers at the end of each optimizer step with the loss and the target tokens that the
    trainer itself computed.
    """

    def __init__(self, turns: Turns):
        self.turns, self.loss, self.tokens = turns, torch.zeros(()), 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.step(float(self.loss), self.tokens)
        self.loss, self.tokens = torch.zeros(()), 0


def counted(kind: type, steps: Steps) -> type:
    """The trainer's class, with what goes through its `training_step` written down."""

    class Counted(kind):
        def training_step(
            self, model: Any, inputs: dict[str, Any], *args: Any, **keywords: Any
        ) -> torch.Tensor:
            steps.tokens += counted_of(inputs)
            loss = super().training_step(model, inputs, *args, **keywords)
            steps.loss += (
                loss.detach().cpu()
            )  # already divided by the target tokens of all micro-batches
            return loss

    return Counted


def counted_of(inputs: dict[str, Any]) -> int:
    """Target tokens of a batch; pairs of a batch of pairs."""
    if "labels" not in inputs:
        return len(inputs["input_ids"]) // 2
    return int((inputs["labels"][:, 1:] != -100).sum())


def dpo_trainer() -> type:
    import trl

    class Encoded(trl.DPOTrainer):
        """Takes rows that are encoded already."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    return Encoded


def isolation(trainer: Any) -> float:
    """How much the last sequence's logits of a batch change when its first token does, where
    another sequence owns it.

    Relative to the largest logit; 0 if packed sequences do not see each other, and where rows are
    padded.
    """
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = {
        name: value
        for name, value in inputs.items()
        if name != "labels" and name != "num_items_in_batch"
    }
    model = trainer.model.eval()
    starts = (
        (inputs["position_ids"][0] == 0).nonzero().flatten()
        if "position_ids" in inputs
        else torch.zeros(1)
    )
    if len(starts) < 2:
        return 0.0
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0, 0] += 1
        after = model(**inputs, use_cache=False).logits
    model.train()
    last = slice(int(starts[-1]), None)
    return float((before - after)[0, last].abs().max() / before.abs().max())


def build(settings: dict[str, Any], turns: Turns) -> Any:
    """The trainer, ready to train."""
    steps = json.loads(Path(settings["rows"]).read_text())
    dataset = Dataset.from_list([row for step in steps for row in step])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation=settings["attention"]
    )
    callback = Steps(turns)
    if settings["trainer"] == "sft":
        import trl

        arguments = trl.SFTConfig(**settings["arguments"])
        kind, more = trl.SFTTrainer, {}
    elif settings["trainer"] == "dpo":
        import trl

        arguments = trl.DPOConfig(**settings["arguments"])
        kind, more = dpo_trainer(), {}
    else:
        arguments = transformers.TrainingArguments(**settings["arguments"])
        collators = {
            "full_logits": lambda: transformers.DataCollatorForSeq2Seq(tokenizer),
            "flattening": lambda: transformers.DataCollatorWithFlattening(),
        }
        kind, more = transformers.Trainer, {"data_collator": collators[settings["trainer"]]()}
    return counted(kind, callback)(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
        **more,
    )


def run(settings: dict[str, Any], turns: Turns) -> None:
    """Train until the driver has had enough."""
    trainer = build(settings, turns)
    packed = trainer.train_dataset
    turns.ready(
        isolation=isolation(trainer),
        rows=len(packed),
        rows_a_step=trainer.args.per_device_train_batch_size
        * trainer.args.gradient_accumulation_steps,
        tokens=(
            sum(sum(label != -100 for label in labels[1:]) for labels in packed["labels"])
            if "labels" in packed.column_names
            else len(packed)
        ),
        parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )
    trainer.train()


def main() -> None:
    turns = Turns()
    transformers.logging.set_verbosity_error()
    run(json.loads(Path(sys.argv[1]).read_text()), turns)


if __name__ == "__main__":
    main()
