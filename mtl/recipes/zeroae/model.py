"""The classifier, the codes, the decoder and the adversary of ZeroAE, as one module."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from mtl.config import Config, ConfigError
from mtl.models import load as models
from mtl.models.errors import ModelError
from mtl.models.structure import blocks
from mtl.recipes.shared import adapters, exported, masked_mean
from mtl.recipes.zeroae.examples import PromptExamples, TextExamples

WEIGHTS, SETTINGS = "zeroae.safetensors", "zeroae.json"


@dataclass(frozen=True)
class Options:
    """The loader's keywords, and what the examples decide; their meaning stands there."""

    encoder: str
    scorer: str = "bi"
    codes: int = 32
    size: int = 48
    latent: int = 32
    tau: float = 0.67
    upper: float = 0.5
    dropout: float = 0.2
    classes: int = 2
    begin: int = 0  # the token in whose place the code stands


def load(
    config: Config,
    tokenizer: Any,
    examples: Sequence[Any],
    *,
    empty: bool,
    size: int = 48,
    latent: int = 32,
    tau: float = 0.67,
    upper: float = 0.5,
    dropout: float = 0.2,
) -> nn.Module:
    """The loader `zeroae`: `model.name` is the decoder; the objectives name the encoder.

    Args:
        size: numbers of a code's vector.
        latent: rank of the map from it to keys and values.
        tau: temperature of the Gumbel softmax.
        upper: share of the decoder's blocks that are trained, the last ones.
        dropout: of the two layers that find a text's code.

    Raises:
        ConfigError: an option is out of range, or the config asks for what would be ignored.
        ModelError: a model cannot be had, or an objective is missing.
    """
    pair = next((one for one in examples if isinstance(one, PromptExamples)), None)
    text = next((one for one in examples if isinstance(one, TextExamples)), None)
    if pair is None and text is None:
        where = f"{config.where('model.loader')}: model.loader"
        raise ModelError(f"{where}: found zeroae without its examples, wanted a task of "
                         "`objective: zeroae_classify` or `zeroae_generate`.")  # fmt: skip
    classes = (pair or text).classes
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # A round without a text for the classifier still needs to know it.
    scorer = pair.scorer if pair else getattr(config.objective, "scorer", "bi")
    options = Options(
        str(classes.tokenizer.name_or_path), scorer,
        text.codes if text else 1, size, latent, tau, upper, dropout, len(classes.names), begin,
    )  # fmt: skip
    _check(config, options)
    folder = exported([getattr(config.train, "from")], SETTINGS)
    if not empty and folder is not None:
        made = ZeroAE.from_pretrained(folder)
        if made.options != options:
            raise ModelError(f"{folder}: found {made.options}, wanted the config's {options}.")
        return made
    decoder = (models.skeleton if empty else models.load)(
        config, tokenizer, models.Family(AutoModelForCausalLM, causal=False)
    )
    base = {"name": config.model.name, "revision": config.model.revision}
    with torch.device("meta") if empty else nullcontext():
        return ZeroAE(decoder, _encoder(options, decoder.dtype, empty), base, options)


def _encoder(options: Options, dtype: torch.dtype, empty: bool) -> nn.Module:
    name, config = options.encoder, AutoConfig.from_pretrained(options.encoder)
    if config.is_encoder_decoder:
        raise ModelError(f"{name}: found an encoder with a decoder, wanted an encoder alone.")
    kind = AutoModelForSequenceClassification if _entails(options, config) else AutoModel
    if empty:
        return kind.from_config(config, dtype=dtype)
    return kind.from_pretrained(name, dtype=dtype)


def _entails(options: Options, config: Any) -> tuple[int, int] | None:
    """The logits of entailment and of its contrary, where the encoder is an NLI model that reads
    text and prompt as one; None: it has no such head.

    Raises:
        ModelError: its labels do not say which is which.
    """
    kinds = config.architectures or ()
    if options.scorer != "cross" or not any("SequenceClassification" in kind for kind in kinds):
        return None
    ids = {str(name).lower(): number for number, name in config.id2label.items()}
    contrary = ids.get("contradiction", ids.get("not_entailment"))
    if "entailment" not in ids or contrary is None:
        labels = ", ".join(config.id2label.values())
        raise ModelError(
            f"{options.encoder}: config.json: id2label: found {labels}, "
            "wanted entailment and contradiction (or not_entailment). Write them there, each at "
            "its number, or take an NLI model."
        )
    return ids["entailment"], contrary


def _check(config: Config, o: Options) -> None:
    problems = []
    for key in "size", "latent":
        value = getattr(o, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            wanted = "a whole number, 1 or more"
            problems.append(config.error(("model", "loader", key), repr(value), wanted))
    if not o.tau > 0:
        problems.append(config.error(("model", "loader", "tau"), repr(o.tau), "more than 0"))
    if not 0 <= o.upper <= 1:
        problems.append(config.error(("model", "loader", "upper"), repr(o.upper), "0 to 1"))
    if config.model.activation_checkpointing:
        why = "transformers ignores past keys with it, so the code would be lost without a word."
        problems.append(config.error("model.activation_checkpointing", "true", "false", why))
    problems += adapters(config, "zeroae", "`upper` says what is trained.")
    if problems:
        raise ConfigError(problems)


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is negated (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ZeroAE(nn.Module):
    """A classifier beside an autoencoder with a discrete code.

    The code stands where the decoder's first token would: one key and value in each layer, which
    begin as that token's own. So the decoder begins as the bare language model. The published form
    begins with a random key and value, which disturbs it.

    Args:
        decoder: a causal language model; its last blocks are trained.
        encoder: an encoder; all of it is trained, by the pairs alone.
        base: name and revision that the decoder is had by, for the exported folder.
        options: see there.
    """

    trained_only = True  # checkpoints hold what learns; zeroae.json names the decoder

    def __init__(
        self, decoder: nn.Module, encoder: nn.Module, base: Mapping[str, Any], options: Options
    ):
        super().__init__()
        self.base, self.options, o = dict(base), options, options
        self.decoder = decoder.requires_grad_(False)
        _, every = blocks(decoder)
        trained = round(o.upper * len(every))
        for block in list(every)[len(every) - trained :]:
            block.requires_grad_(True)
        self.encoder = encoder
        h, d = encoder.config.hidden_size, decoder.config
        self.entails = _entails(o, encoder.config)
        if o.scorer == "cross" and not self.entails:
            self.score = nn.Linear(h, 1)
        elif o.scorer == "bi":
            # sigmoid(20 cos - 6): the cosines of texts and their classes are near 0.3.
            self.scale = nn.Parameter(torch.tensor([20.0, -6.0]))
        # Those of keys and values: with grouped queries there are fewer than attention heads.
        self.heads = getattr(d, "num_key_value_heads", None) or d.num_attention_heads
        self.layers = d.num_hidden_layers
        self.width = getattr(d, "head_dim", None) or d.hidden_size // d.num_attention_heads
        layer = nn.TransformerEncoderLayer(h, 4, 4 * h, dropout=o.dropout, batch_first=True)
        self.codes = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.to_code = nn.Linear(h, o.codes)
        self.book = nn.Parameter(torch.randn(o.codes, o.size))
        self.inject = nn.Sequential(
            nn.Linear(o.size, o.latent, bias=False),
            nn.Linear(o.latent, self.layers * self.heads * self.width, bias=False),
        )
        # So the decoder begins as the bare language model: the code adds nothing yet.
        nn.init.zeros_(self.inject[1].weight)
        self.judge = nn.Sequential(
            nn.Linear(o.classes + 2 * o.size, 128), nn.ReLU(), nn.Linear(128, 1)
        )
        self.to(decoder.dtype)

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.decoder.config

    def forward(self, **inputs: Tensor) -> Any:
        """`pairs` of what a `PromptBatch` has, or `recover` of what a `TextBatch` has."""
        return self.pairs(**inputs) if "text" in inputs else self.recover(**inputs)

    def pairs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        text: Tensor,
        prompt: Tensor,
    ) -> Tensor:
        """(P,) logits that the prompt fits the text; shapes as `PromptBatch`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = token_type_ids
        if self.entails:
            logits = self.encoder(**inputs).logits[text]
            return logits[:, self.entails[0]] - logits[:, self.entails[1]]
        states = self.encoder(**inputs).last_hidden_state
        if self.options.scorer == "cross":
            return self.score(states[text, 0]).squeeze(-1)
        unit = F.normalize(masked_mean(states, attention_mask), dim=-1)
        return self.scale[0] * (unit[text] * unit[prompt]).sum(-1) + self.scale[1]

    def recover(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_ids: Tensor,
        decoder_mask: Tensor,
        at: Tensor,
        label: Tensor,
        noise: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(S, V) logits at the targets, (B,) divergences of the codes from uniform in nats, and
        (Q,) logits that two codes belong to texts of one class; shapes as `TextBatch`.
        """
        o = self.options
        logits = self.code_logits(input_ids, attention_mask)
        log_q = F.log_softmax(logits.float(), -1)
        # KL(q || uniform over m codes) = sum q log(m q).
        divergence = (log_q.exp() * (log_q + torch.tensor(float(o.codes)).log())).sum(-1)
        if self.training:  # straight through: one code forward, the softmax's gradient backward
            soft = F.softmax((logits.float() + noise) / o.tau, -1)
            hard = F.one_hot(soft.argmax(-1), o.codes)
            code = (hard - soft.detach() + soft).to(logits.dtype)
        else:
            code = F.one_hot(logits.argmax(-1), o.codes).to(logits.dtype)
        z = code @ self.book
        named = F.one_hot(label[first], o.classes).to(z.dtype)
        # The judge learns to tell, and the codes learn the opposite, in one backward pass.
        compared = torch.cat([named, Reverse.apply(z[first]), Reverse.apply(z[second])], -1)
        states = self._decode(decoder_ids, decoder_mask, z)
        # The head on target positions only: all logits would be the largest tensor here.
        words = self.decoder.get_output_embeddings()(states[at[:, 0], at[:, 1]])
        return words, divergence, self.judge(compared).squeeze(-1)

    def code_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, m) logits of the codes. The encoder gets no gradient."""
        with torch.no_grad():
            states = self._states(input_ids, attention_mask)
        read = self.codes(states, src_key_padding_mask=attention_mask == 0)
        return masked_mean(self.to_code(read), attention_mask)

    def past(self, z: Tensor) -> DynamicCache:
        """One past key and value in each layer for (B, size) code vectors: the first token's, and
        what the code adds to both.
        """
        # Without gradient: the frozen decoder's own key and value, which the code is added to.
        begin = torch.full((1, 1), self.options.begin, device=z.device)
        with torch.no_grad():
            plain = self.decoder.base_model(input_ids=begin, use_cache=True).past_key_values
        change = self.inject(z).view(len(z), self.layers, self.heads, 1, self.width)
        cache = DynamicCache()
        for i in range(self.layers):
            keys, values = plain.layers[i].keys, plain.layers[i].values  # (1, heads, 1, width)
            cache.update(keys + change[:, i], values + change[:, i], i)
        return cache

    def _decode(self, ids: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """(B, L, H) last states of the decoder after the code."""
        return self.decoder.base_model(
            input_ids=ids,
            # A one for the code, which stands at position 0.
            attention_mask=torch.cat([mask.new_ones(len(ids), 1), mask], 1),
            position_ids=torch.arange(1, 1 + ids.shape[1], device=ids.device)[None],
            past_key_values=self.past(z),
            use_cache=True,
        ).last_hidden_state

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        # An NLI model's states lie beneath its head.
        return self.encoder.base_model(input_ids=ids, attention_mask=mask).last_hidden_state

    @torch.no_grad()
    def sample(
        self,
        prompt: Sequence[int],
        codes: Tensor,
        generator: torch.Generator,
        *,
        end: int,
        top_k: int = 40,
        most: int = 32,
    ) -> list[list[int] | None]:
        """B texts of one prompt: token ids without the end; None: no end within `most`.

        Args:
            prompt: the decoder's token ids.
            codes: (B,) int64.
            generator: on the CPU; it decides every draw.
            end: the token that ends a text.
            top_k: tokens to draw from. most: tokens of a text.
        """
        device = self.book.device
        cache, made = self.past(self.book[codes]), []
        ids = torch.tensor(list(prompt), device=device).expand(len(codes), -1)
        is_done = torch.zeros(len(codes), dtype=torch.bool)
        # `most` tokens and the end.
        while len(made) <= most and not is_done.all():
            states = self.decoder.base_model(
                input_ids=ids, past_key_values=cache, use_cache=True
            ).last_hidden_state
            # On the CPU, where the generator is: the same texts on every device.
            logits = self.decoder.get_output_embeddings()(states[:, -1]).float().cpu()
            best, tokens = logits.topk(min(top_k, logits.shape[-1]))
            drawn = torch.multinomial(best.softmax(-1), 1, generator=generator)
            made.append(tokens.gather(1, drawn)[:, 0])
            is_done |= made[-1] == end
            ids = made[-1][:, None].to(device)
        rows = torch.stack(made, 1).tolist()
        return [row[: row.index(end)] if end in row else None for row in rows]

    def save_pretrained(self, folder: Any, state_dict: Mapping[str, Tensor], **_: Any) -> None:
        """Write what learns, and `zeroae.json`, which names decoder and encoder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.decoder.config.save_pretrained(folder)
        save_file(dict(state_dict), folder / WEIGHTS, metadata={"format": "pt"})
        note = {"base": self.base, "options": asdict(self.options)}
        (folder / SETTINGS).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Any) -> "ZeroAE":
        """The models that `zeroae.json` names, with what a run learned; in eval mode.

        Raises:
            ModelError: they cannot be had, or the folder is damaged.
        """
        path = Path(folder) / SETTINGS
        note = json.loads(path.read_text(encoding="utf-8"))
        base, options = note["base"], Options(**note["options"])
        with safe_open(Path(folder) / WEIGHTS, "pt") as file:
            dtype = file.get_tensor("book").dtype
        try:
            decoder = AutoModelForCausalLM.from_pretrained(
                base["name"], revision=base["revision"], dtype=dtype
            )
            encoder = _encoder(options, dtype, empty=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: found a model that cannot be had: {error}") from error
        model = cls(decoder, encoder, base, options)
        state = load_file(Path(folder) / WEIGHTS)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # Frozen parameters may be missing in the file, learned ones not.
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        if unexpected or learned & set(missing):
            raise ModelError(
                f"{folder}: {WEIGHTS} is of another version: found the unknown {unexpected[:3]}, "
                f"no {sorted(learned & set(missing))[:3]}."
            )
        return model.eval()
