"""A frozen language model with the adapter of `adapter.py` as hooks, and three heads."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from mtl.config import Config, ConfigError
from mtl.models import load as models
from mtl.models.errors import ModelError
from mtl.models.structure import blocks
from mtl.recipes.kpe.adapter import Adapter, Tied, initialize
from mtl.recipes.shared import adapters, exported, masked_mean

FEED_FORWARD = ("mlp", "ffn", "feed_forward", "output.dense")  # of a block, by its module's name
WEIGHTS, SETTINGS = "knowledge.safetensors", "kpe.json"
STARTS = ("zero", "embeddings", "states")
READS = ("text", "both")


@dataclass(frozen=True)
class Options:
    """The loader's keywords; their meaning stands there."""

    layers: int = 2
    width: int = 256
    heads: int = 8
    share: bool = True
    gate: bool = True
    attend: bool = True
    start: str = "embeddings"
    residual: bool = True
    reads: str = "text"
    dropout: float = 0.1
    length: int = 128  # tokens of the longest knowledge text


def load(
    config: Config,
    tokenizer: Any,
    examples: Sequence[Any],
    *,
    empty: bool,
    layers: int = 2,
    width: int = 256,
    heads: int = 8,
    share: bool = True,
    gate: bool = True,
    attend: bool = True,
    start: str = "embeddings",
    residual: bool = True,
    reads: str = "text",
    dropout: float = 0.1,
) -> nn.Module:
    """The loader `kpe`: anything `AutoModel` loads that is an encoder or a decoder, frozen, with an
    adapter on its last blocks. Of a folder that a run exported: what is there, with its own
    options.

    Args:
        layers: blocks that are adapted, the last ones; 0: heads only.
        width: d of the adapter.
        heads: of its attention.
        share: one adapter for all adapted blocks; false: one each.
        gate: whether a gate filters the model's states.
        attend: whether text and knowledge attend to each other.
        start: what the knowledge begins as: its embeddings (published), or the frozen model's own
            `states` of it. zero: embeddings, with an adapter whose output begins as its input.
        residual: false: the block gets the adapter's own output only, without a second share of
            its feed-forward; with `start: zero` the model begins as the frozen one, bit for bit.
        reads: whether a score reads the text's states only (published), or the knowledge's too.
        dropout: of the adapter. The frozen model's is off always.

    Raises:
        ConfigError: an option is out of range, or the config asks for what hooks make wrong.
        ModelError: the model cannot be had, or has no blocks that can be adapted.
    """
    whole = next((one for one in examples if hasattr(one, "relations")), None)
    if whole is None:
        where = f"{config.where('model.loader')}: model.loader"
        raise ModelError(f"{where}: found kpe without its examples, wanted `objective: kpe`.")
    options = Options(
        layers, width, heads, share, gate, attend, start, residual, reads, dropout, whole.length
    )
    _check(config, options)
    words = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in whole.relations]
    begin = getattr(config.train, "from"), config.model.name
    if (folder := exported(begin, SETTINGS)) is not None:
        made = Knowledgeable.from_pretrained(folder, "meta" if empty else None, words)
        _same(config, folder, made.options, options)
        return made
    make = models.skeleton if empty else models.load
    plm = make(config, tokenizer, models.Family(AutoModel, causal=False))
    base = {"name": config.model.name, "revision": config.model.revision}
    # The new parts too, not the frozen model alone.
    with torch.device("meta") if empty else nullcontext():
        try:
            return Knowledgeable(plm, base, options, words)
        except ValueError as error:
            where = f"{config.where('model.name')}: model.name"
            raise ModelError(f"{where}: found {config.model.name!r}, {error}") from error


def _check(config: Config, options: Options) -> None:
    o, problems = options, []

    def say(key: str, fits: bool, wanted: str) -> None:
        if not fits:
            path = ("model", "loader", key)
            problems.append(config.error(path, repr(getattr(o, key)), wanted))

    for key, low in ("layers", 0), ("width", 1), ("heads", 1):
        value = getattr(o, key)
        say(key, isinstance(value, int) and value >= low, f"a whole number, {low} or more")
    for key in ("share", "gate", "attend", "residual"):
        say(key, isinstance(getattr(o, key), bool), "true or false")
    say("start", o.start in STARTS, "zero, embeddings or states")
    say("reads", o.reads in READS, "text or both")
    is_share = isinstance(o.dropout, int | float) and 0 <= o.dropout < 1
    say("dropout", is_share, "0 to 1, less than 1")
    if not problems:
        say("width", o.width % o.heads == 0, f"a multiple of heads, {o.heads}")
    m, why = config.model, "The adapter is a hook, and this would run it twice in a step."
    if m.activation_checkpointing:
        problems.append(config.error("model.activation_checkpointing", "true", "false", why))
    frozen = "The model is frozen: its own adapter is all that learns."
    problems += adapters(config, "kpe", frozen)
    if problems:
        raise ConfigError(problems)


def _same(config: Config, folder: Path, there: Options, here: Options) -> None:
    """Raise ConfigError where a folder was trained with other options than the config's."""
    for key, value in asdict(there).items():
        if value != getattr(here, key):
            path = "objective" if key == "length" else ("model", "loader")
            name = "knowledge" if key == "length" else key
            found = f"{name}: {getattr(here, key)!r}"
            raise ConfigError([config.error(path, found, f"{value!r}, as {folder} was trained")])


class Knowledgeable(nn.Module):
    """The frozen model `plm`, adapters, and heads for choices, masked words and relations.

    Args:
        plm: the frozen model; its parameters get no gradient.
        base: name and revision that it is had by, for the exported folder.
        options: of the adapter.
        relations: token ids of each of R relations' words; their mean embedding is the key.

    Raises:
        ValueError: the model has no blocks that can be adapted.
    """

    trained_only = True  # checkpoints hold what learns; the base model is named in kpe.json

    def __init__(
        self,
        plm: nn.Module,
        base: Mapping[str, Any],
        options: Options,
        relations: Sequence[Sequence[int]],
    ):
        super().__init__()
        # Without a relation there is one key, which nothing is compared with.
        self.base, self.options = dict(base), options
        self.words = [list(ids) for ids in relations] or [[]]
        embedding, hooked = plm.get_input_embeddings(), _feed_forwards(plm, options.layers)
        h, o = plm.config.hidden_size, options
        if embedding.embedding_dim != h:
            raise ValueError(f"whose embeddings have {embedding.embedding_dim} numbers, wanted {h}")
        plm.config.use_cache = False
        self.plm = plm.requires_grad_(False)
        self.adapters = nn.ModuleList(
            Adapter(
                h, o.width, o.heads, o.dropout, o.gate, o.attend, o.residual,
                0.0 if o.start == "zero" else 1.0,
            )
            # No adapter at all where no block is adapted.
            for _ in range(min(1, o.layers) if o.share else o.layers)
        )  # fmt: skip
        self.position = nn.Parameter(torch.empty(o.length, h))
        read = h * (1 + (o.reads == "both"))
        # No last bias: the softmax over options does not change with it.
        self.score = nn.Sequential(nn.Linear(read, 128), nn.ReLU(), nn.Linear(128, 1, bias=False))
        self.span = nn.Sequential(nn.Linear(h, h), nn.GELU(), nn.LayerNorm(h))
        self.vocabulary = Tied(embedding)
        self.relation = nn.Linear(2 * h, h)
        for part in (self.adapters, self.score, self.span, self.relation):
            initialize(part)
        nn.init.normal_(self.position, std=0.02)
        most = max(map(len, self.words))
        padded = [[*ids, *[-1] * (most - len(ids))] for ids in self.words]
        ids = torch.tensor(padded, dtype=torch.int64).view(len(self.words), most)
        # Not saved: kpe.json has the words, and another run may have other relations.
        self.register_buffer("relation_ids", ids, persistent=False)  # (R, W), -1: padding
        self.to(plm.dtype)
        self._known: list[Tensor] | None = None  # A and the positions seen, during a forward
        # A hook finds the knowledge in `_known`: the frozen blocks pass nothing on for us.
        for number, module in enumerate(hooked):
            adapter = self.adapters[0 if o.share else number]
            module.register_forward_hook(
                lambda module, given, out, adapter=adapter: self._exchange(adapter, out)
            )

    @property
    def config(self) -> Any:
        """The frozen model's."""
        return self.plm.config

    def train(self, mode: bool = True) -> "Knowledgeable":
        """The frozen model's dropout stays off."""
        super().train(mode)
        self.plm.eval()
        return self

    def _exchange(self, adapter: nn.Module, out: Tensor) -> Tensor | None:
        if self._known is None:
            return None
        change, self._known[0] = adapter(out, *self._known)
        return out + change

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        knowledge: Tensor,
        knowledge_mask: Tensor,
        of: Tensor,
        seen: Tensor,
        at: Tensor,
        spans: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N,), logits (S, V) of masked tokens, and cosines (E, R) to the relations' keys.

        Args:
            input_ids, attention_mask: (N, T) int64, 1 = token.
            knowledge, knowledge_mask: (M, U) int64, 1 = token.
            of: (N,) int64, the knowledge text that each candidate reads.
            seen: (B,) int64, the candidate beside which an example's knowledge is read out.
            at: (S, 2) int64, example and position of each masked token.
            spans: (E, 5) int64: example, first and last + 1 of the head, the same of the tail.
        """
        embed = self.plm.get_input_embeddings()
        if self.options.start == "states":
            with torch.no_grad():  # no hook acts yet
                start = self._states(knowledge, knowledge_mask)
        else:
            start = embed(knowledge)
        # [of]: from M texts to N candidates, as each changes its own copy.
        start = (start + self.position[: knowledge.shape[1]])[of]
        both = torch.cat([attention_mask, knowledge_mask[of]], 1) > 0
        self._known = [start, both]
        try:
            states = self._states(input_ids, attention_mask)
            read = self._known[0]  # (N, U, H)
        # After an error too: a later forward of the frozen model must meet no knowledge.
        finally:
            self._known = None
        pooled = masked_mean(states, attention_mask)
        if self.options.reads == "both":
            pooled = torch.cat([pooled, masked_mean(read, knowledge_mask[of])], -1)
        beside = read[seen]  # (B, U, H)
        logits = self.vocabulary(self.span(beside[at[:, 0], at[:, 1]]))
        place = torch.arange(beside.shape[1], device=beside.device)
        head, tail = (
            masked_mean(beside[spans[:, 0]], (place >= first[:, None]) & (place < last[:, None]))
            for first, last in (spans[:, 1:3].unbind(1), spans[:, 3:5].unbind(1))
        )
        # clamp: -1 is no row of the table; the mask leaves it out.
        keys = masked_mean(embed(self.relation_ids.clamp(min=0)), self.relation_ids >= 0)
        query = self.relation(torch.cat([head, tail], -1))
        cosines = F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T
        return self.score(pooled).squeeze(-1), logits, cosines

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.plm(input_ids=ids, attention_mask=mask).last_hidden_state

    def save_pretrained(self, folder: Any, state_dict: Mapping[str, Tensor], **_: Any) -> None:
        """Write what learns, and `kpe.json`, which names the base model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.plm.config.save_pretrained(folder)
        save_file(dict(state_dict), folder / WEIGHTS, metadata={"format": "pt"})
        note = {"base": self.base, "relations": self.words, "options": asdict(self.options)}
        (folder / SETTINGS).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: Any,
        device: str | None = None,
        relations: Sequence[Sequence[int]] | None = None,
    ) -> "Knowledgeable":
        """The base model that `kpe.json` names, with what a run learned; in eval mode.

        Args:
            device: "meta": without weights.
            relations: token ids of other relations than those it was trained on.

        Raises:
            ModelError: the base model cannot be had, or the folder is damaged.
        """
        path = Path(folder) / SETTINGS
        note = json.loads(path.read_text(encoding="utf-8"))
        state, base = load_file(Path(folder) / WEIGHTS), note["base"]
        dtype = state["position"].dtype
        try:
            plm = AutoModel.from_pretrained(base["name"], revision=base["revision"], dtype=dtype)
        except (OSError, ValueError) as error:
            found = f"found the base model {base['name']!r}, which cannot be had: {error}"
            raise ModelError(f"{path}: base: {found}") from error
        words = note["relations"] if relations is None else relations
        model = cls(plm, base, Options(**note["options"]), words)
        # Not strict: the frozen model's parameters are not in the file.
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith("plm.")]
        if missing or unexpected:
            found = f"found no {missing[:3]} and the unknown {unexpected[:3]}"
            raise ModelError(f"{folder}: {WEIGHTS}: {found}: it is of another version.")
        return model.to(device).eval() if device else model.eval()


def _feed_forwards(plm: nn.Module, layers: int) -> list[nn.Module]:
    """The modules of the last blocks whose output is their feed-forward's, before the residual."""
    if plm.config.is_encoder_decoder:
        raise ValueError("an encoder with a decoder, wanted one of them alone")
    _, all_blocks = blocks(plm)
    if len(all_blocks) < layers:
        raise ValueError(f"which has {len(all_blocks)} blocks, wanted {layers} at least (layers)")
    found = []
    for block in list(all_blocks)[len(all_blocks) - layers :]:
        parts = dict(block.named_modules())
        name = next((name for name in FEED_FORWARD if name in parts), None)
        if name is None:
            have = ", ".join(n for n in parts if n and "." not in n)
            wanted = ", ".join(FEED_FORWARD)
            raise ValueError(f"whose blocks have {have}, wanted one of {wanted}")
        found.append(parts[name])
    return found
