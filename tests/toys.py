"""Tokenizers, models and task files small enough to build inside a test: no file of the repository, no download."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

M = TypeVar("M", bound=PreTrainedModel)
START, END, UNUSED = "<|start|>", "<|end|>", "<|unused|>"
CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
GENERATION_CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(chat: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes and three specials, 259 ids; eos = pad = `<|end|>`, as many real models have it.

    Args:
        chat: with a ChatML-like template (without generation tags), or without any.
        template: another Jinja template, such as GENERATION_CHAT.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, END, UNUSED])
    result = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    result.chat_template = template or (CHAT if chat else None)
    return result


def trainable(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """The model as a run trains it: in bf16 ("bf16"), with adapters ("lora"), else as it is."""
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    if kind == "lora":
        torch.manual_seed(0)
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear")
        )
    from mtl.losses import head  # here: toys also serve processes that never train

    head.install(model)
    return model


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama: 2 layers of 64, 4 heads (2 for keys), 259 ids, untied. Leaves torch's random state as it was."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    return _seeded(LlamaForCausalLM, config, seed, changes)


def tiny_gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    """A random GPT-2: 2 layers of 64, 4 heads, 259 ids, tied, no dropout (which would follow the cut of a batch)."""
    config = GPT2Config(
        vocab_size=259,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=257,
        eos_token_id=257,
        pad_token_id=257,
    )
    return _seeded(GPT2LMHeadModel, config, seed, changes)


def tiny_bert(kind: type[M] = BertModel, seed: int = 0, **changes: object) -> M:
    """A random BERT of a kind: 2 layers of 32, 2 heads, 259 ids, no dropout."""
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=257,
    )
    return _seeded(kind, config, seed, changes)


def _seeded(kind: type[M], config: object, seed: int, changes: dict[str, object]) -> M:
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


def save(model: PreTrainedModel, folder: Path | str, chat: bool = True) -> str:
    """Save model and tokenizer where `from_pretrained` loads both; returns the folder as text."""
    model.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(
    folder: Path | str, train: int = 24, validation: int = 8, seed: int = 0
) -> dict[str, dict[str, str]]:
    """Write three small tasks of unequal size and length as JSONL, one in each basic format.

    `copy` (prompt_completion, `train` rows): repeat a word. `chat` (messages, half as many): two turns about a number.
    `prose` (text, a third as many): a short rhyme. Returns the `tasks:` mapping of a config: name -> train, validation,
    format.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("abcdefgh", k=draw.randint(2, 9)))

    def copy() -> dict[str, object]:
        text = word()
        return {"prompt": f"{text} =", "completion": f" {text}"}

    def chat() -> dict[str, object]:
        n = draw.randint(1, 99)
        turns = [
            ("user", f"{n} + 1?"),
            ("assistant", f"{n + 1}"),
            ("user", "and one more?"),
            ("assistant", f"{n + 2}"),
        ]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def prose() -> dict[str, object]:
        return {"text": " ".join(word() for _ in range(draw.randint(3, 8)))}

    tasks = {}
    kinds = (
        ("copy", copy, "prompt_completion", 1),
        ("chat", chat, "messages", 2),
        ("prose", prose, "text", 3),
    )
    for name, row, form, part in kinds:
        tasks[name] = {"format": form}
        for split, rows in (("train", train), ("validation", validation)):
            path = folder / f"{name}.{split}.jsonl"
            write_rows(path, [row() for _ in range(max(1, rows // part))])
            tasks[name][split] = str(path)
    return tasks
