"""Balanced losses in Hugging Face's Trainer and in TRL's SFTTrainer: a mix-in that goes before
either.

    class BalancedTrainer(Balanced, Trainer): ...

    trainer = BalancedTrainer(
        model, args, train_dataset=rows, eval_dataset={"code": ..., "math": ...},
        data_collator=..., balancer=CoBa(window=40, warmup=15), tasks=["code", "math"],
    )

The training rows have a column `task` (a name, or its place in `tasks`). Everything else is the
Trainer's.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from balancers import Balancer, Signal
from balancers.maths import whole
from mtl.distributed import comm
from mtl.integrations.loop import MEASURED_HERE, Balance
from mtl.losses.terms import Terms

logger = logging.getLogger(__name__)

IGNORED = -100  # a label that is not trained
FILE = "balancer"  # .json and .safetensors, in each checkpoint's folder


class Balanced:
    """Mix-in for a Trainer of causal language models: each task's loss is weighed by a balancer.

    The loss of an optimizer step is `sum_k w_k loss_k` with loss_k in nats per target token over
    all its micro-batches on all ranks, whatever `average_tokens_across_devices` says. The Trainer's
    logs get `<task>/loss` and `<task>/weight`, and `present_weight` where a task is absent.

    Args:
        balancer: the rule. It may read token counts, training losses and validation losses.
        tasks: K names.
        task_column: the training rows' column that says which.
        loss_weight: (K,) factors on the balancer's weights.
        probe_every: optimizer steps between validation probes, where the balancer reads any; >= 1.
            They take the rows of `eval_dataset`, which then is a mapping from each task's name to
            its rows.
        probe_groups: groups of whole rows each task's validation rows are divided into, >= 1; a
            probe reads one of them. All are read once before the first step, for their initial
            losses. A resumed run must have the same rows and groups.
        others: what the Trainer takes, by name or by position.

    Raises:
        ValueError: what cannot be weighed by task: a collator that moves or cuts tokens, a loss
            function of your own, label smoothing, torch's DataParallel, tensor, context or
            sequence parallelism, a balancer that reads gradients. On resuming, other validation
            rows or groups than the initial losses are of.
    """

    def __init__(
        self,
        *others: Any,
        balancer: Balancer,
        tasks: Sequence[str],
        task_column: str = "task",
        loss_weight: Sequence[float] | None = None,
        probe_every: int = 1,
        probe_groups: int = 8,
        **more: Any,
    ) -> None:
        self.balance = Balance(balancer, tasks, loss_weight)
        self._task_column, self._probe_every, self._probe_groups = (
            task_column,
            probe_every,
            probe_groups,
        )
        self._to_come = 0  # micro-batches of the open step that had no forward yet
        self._base: Tensor | None = None  # (K, G) float64, initial loss of each group
        self._base_of: dict[str, Any] | None = None  # the rows that they are of: `_probed`
        self._refuse_arguments()
        super().__init__(*others, **more)
        self._refuse_trainer()
        self._collate_rows: Callable = self.data_collator
        self.data_collator = self._collate
        # The loss is divided by the counts of the whole accumulated batch: no further division by
        # the number of micro-batches.
        self.loss_is_scaled_for_ga = True

    # --- the task column

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._task_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self._task_column]

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's own. Where it packs, which it does with token ids and labels only, each token's
        task is packed along.
        """
        column = self._task_column
        if not packing or column not in (dataset.column_names or ()):
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        from trl import pack_dataset

        uncut = copy(args)
        uncut.max_length = None  # packing decides about what is too long
        rows = super()._prepare_dataset(
            dataset, processing_class, uncut, False, formatting_func, dataset_name
        )
        keywords = {"column": column, "names": self.balance.holder.tasks}
        rows = rows.map(_by_token, fn_kwargs=keywords, remove_columns=rows.column_names)
        packed = pack_dataset(rows, args.max_length, args.packing_strategy)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch; where the rows name their tasks also `task` int64, (rows,), or (R,
        L) of its tokens if rows were packed or are flattened.
        """
        column, names = self._task_column, self.balance.holder.tasks
        batch = dict(
            self._collate_rows([{n: v for n, v in row.items() if n != column} for row in rows])
        )
        if all(row.get(column) is None for row in rows):
            return batch  # rows to evaluate
        if len(batch["labels"]) == len(rows) and not any(
            isinstance(row.get(column), list) for row in rows
        ):
            batch[column] = torch.tensor([_number(row.get(column), column, names) for row in rows])
            return batch
        lines = [_by_token(row, column, names) for row in rows]
        if len(batch["labels"]) == 1:  # flattened
            lines = [
                {name: [x for line in lines for x in line[name]] for name in ("input_ids", column)}
            ]
        task = torch.zeros_like(batch["input_ids"])  # 0 where padding is: no target is there
        for i, line in enumerate(lines):
            length = len(line["input_ids"])
            if len(lines) != len(task) or not torch.equal(
                batch["input_ids"][i, :length], torch.as_tensor(line["input_ids"])
            ):
                raise ValueError(
                    "the collator moved or cut tokens, which loses their tasks: use one that pads "
                    "at the end"
                )
            task[i, :length] = torch.tensor(line[column])
        batch[column] = task
        return batch

    # --- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The Trainer's; the step's micro-batches are known here, before the first forward."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._close()
            task = torch.cat([self._targets(batch)[1] for batch in batches]).to(device)
            self.balance.begin(task, **self._probe())
            self._to_come = len(batches)
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """In training the balanced loss; in evaluation the Trainer's own."""
        if not self.balance.is_open or not model.training:
            others = {name: value for name, value in inputs.items() if name != self._task_column}
            return super().compute_loss(
                model, others, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        losses, task, outputs = self._forward(model, inputs)
        loss = self.balance.loss(losses, task)
        self._to_come -= 1
        return (loss, outputs) if return_outputs else loss

    def _targets(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(R, L) bool, the positions before the target tokens, and the task of each of these (T,)
        int64.
        """
        if self._task_column not in inputs:
            raise ValueError(
                f"the rows have no column {self._task_column!r}: add it to every training row"
            )
        keep = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        keep[:, :-1] = inputs["labels"][:, 1:] != IGNORED
        task = inputs[self._task_column]
        task = (
            task.roll(-1, 1) if task.ndim == 2 else task[:, None].expand_as(keep)
        )  # of the token that is predicted
        return keep, task[keep]

    def _forward(
        self, model: torch.nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Any]:
        """Losses of the target tokens (T,) in nats, their tasks (T,), and the model's outputs."""
        keep, task = self._targets(inputs)
        rest = {
            name: value
            for name, value in inputs.items()
            if name not in ("labels", self._task_column)
        }
        bare = self.accelerator.unwrap_model(self.model)
        bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
        is_short = "logits_to_keep" in inspect.signature(type(bare).forward).parameters
        outputs = model(**rest, use_cache=False, **({"logits_to_keep": keep} if is_short else {}))
        logits = outputs.logits if is_short else outputs.logits[keep]
        return (
            F.cross_entropy(
                logits.float(), inputs["labels"][:, 1:][keep[:, :-1]], reduction="none"
            ),
            task,
            outputs,
        )

    def _close(self) -> None:
        """End the open step. Give it up if it was cut off: by a stop between micro-batches, or for
        want of memory, after which the Trainer begins anew with smaller ones.
        """
        if self.balance.is_open:
            self.balance.drop() if self._to_come > 0 else self.balance.end()
            self._to_come = 0

    def log(self, logs: dict[str, float], *others: Any, **more: Any) -> None:
        # Between micro-batches there is no loss of the step yet.
        if "loss" in logs and self._to_come <= 0:
            self._close()
            for name, loss, weight in zip(
                self.balance.holder.tasks, self.balance.losses, self.balance.weights, strict=True
            ):
                logs |= {f"{name}/loss": float(loss)} if np.isfinite(loss) else {}
                logs[f"{name}/weight"] = float(weight)
            if not np.isfinite(self.balance.losses).all():  # a task is absent
                logs["present_weight"] = self.balance.present_weight
        super().log(logs, *others, **more)

    # --- validation

    def _probe(self) -> dict[str, Any]:
        """What the balancer reads of the validation rows at this step."""
        step = self.balance.step
        if Signal.VALID_LOSS not in self.balance.holder.balancer.needs:
            return {}
        groups = self._groups()
        if self._base is None:
            self._base_of = self._probed()
            self._base = torch.stack(
                [torch.from_numpy(self._measure(group)) for group in range(groups)], 1
            )
        if step % self._probe_every:
            return {}
        group = step // self._probe_every % groups
        loss = self._base[:, group].numpy() if step == 0 else self._measure(group)
        return {
            "valid_loss": loss,
            "valid_base": self._base[:, group].numpy(),
            "valid_group": group,
        }

    def _groups(self) -> int:
        return min(
            self._probe_groups,
            *(len(self.eval_dataset[name]) for name in self.balance.holder.tasks),
        )

    def _probed(self) -> dict[str, Any]:
        """What the initial losses are of, JSON-able: the number of groups, and of each task the
        number of rows and a digest of their token ids and labels as the collator gives them.
        """
        tasks = {}
        for k, name in enumerate(self.balance.holder.tasks):
            digest, count = hashlib.sha256(), len(self.eval_dataset[name])
            for i in range(count):
                # Row by row: what padding a batch has depends on how rows are divided.
                batch = self._probe_batch(k, [i])
                for key in ("input_ids", "labels"):
                    digest.update(f"{batch[key].tolist()}".encode())
            tasks[name] = {"rows": count, "digest": digest.hexdigest()[:16]}
        return {"groups": self._groups(), "tasks": tasks}

    def _probe_batch(self, k: int, rows: Sequence[int]) -> dict[str, Any]:
        """Task k's validation rows with these numbers, collated."""
        data = self.eval_dataset[self.balance.holder.tasks[k]]
        return self._collate([{**self._kept(data[i]), self._task_column: k} for i in rows])

    def _measure(self, group: int) -> np.ndarray:
        """(K,) losses of a group of the validation rows, nats per target token. A collective; as
        many forwards on every rank.
        """
        size, names = self.args.per_device_eval_batch_size, self.balance.holder.tasks
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=self.args.device)
        # Put back below: a probe is taken before a training step's first forward.
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        for k, name in enumerate(names):
            # Every G-th row: whole rows, and the same ones each time.
            rows = range(group, len(self.eval_dataset[name]), self._groups())
            for start in range(0, len(rows), size * comm.world()):
                mine = rows[start + comm.rank() * size : start + (comm.rank() + 1) * size]
                batch = self._probe_batch(k, mine or rows[:1])
                if not mine:  # another rank's turn: a forward without targets
                    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
                with torch.no_grad(), self.compute_loss_context_manager():
                    losses, task, _ = self._forward(self.model_wrapped, self._prepare_inputs(batch))
                terms = Terms.by_task(losses, task, len(names))
                sums += torch.stack([terms.sums.double(), terms.counts.double()])
        self.model_wrapped.train(was_training)
        total, count = comm.sum_(sums).cpu().numpy()
        with np.errstate(invalid="ignore"):
            return total / count

    def _kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self._set_signature_columns_if_needed()
        is_kept = self._signature_columns if self.args.remove_unused_columns else row
        return {name: value for name, value in row.items() if name in is_kept}

    # --- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._close()
        if self.args.should_save:
            folder = (
                Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            )
            folder.mkdir(parents=True, exist_ok=True)
            state = self.balance.state_dict() | {"probe": self._base_of}
            tensors = {f"arrays.{name}": tensor for name, tensor in state.pop("arrays").items()}
            tensors |= {
                name: t
                for name, t in (("losses", state.pop("losses")), ("base", self._base))
                if t is not None
            }
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                folder / f"{FILE}.safetensors",
            )
            (folder / f"{FILE}.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"{FILE}.json"
        if not path.is_file():
            raise ValueError(
                f"{checkpoint}: no {FILE}.json, so it was saved without a balancer. Start anew, or "
                "from its model only."
            )
        state, tensors = (
            json.loads(path.read_text(encoding="utf-8")),
            load_file(path.with_suffix(".safetensors")),
        )
        arrays = {
            name.removeprefix("arrays."): t
            for name, t in tensors.items()
            if name.startswith("arrays.")
        }
        self.balance.load_state_dict({**state, "arrays": arrays, "losses": tensors.get("losses")})
        self._base = tensors.get("base")
        if self._base is not None:
            saved = state.get("probe") or {"groups": self._base.shape[1]}
            # Every rank reads the rows by itself; where one has others, all end.
            self._base_of = comm.together(lambda: self._same_probes(saved, path))

    def _same_probes(self, saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """`_probed` of this run, checked against that of a checkpoint."""
        here = self._probed()
        found, wanted = _described(here), _described(saved)
        differ = [
            f"{what}: found {found[what]}, wanted {text}"
            for what, text in wanted.items()
            if found[what] != text
        ]
        if differ:
            raise ValueError(
                f"{path}: its initial validation losses are of other rows: {'; '.join(differ)}. "
                "Resume with the eval_dataset and probe_groups of the start, or start a new run"
            )
        if "tasks" not in saved and comm.rank() == 0:
            logger.warning(
                f"{path} is of an older version and does not say which validation rows its initial "
                "losses are of: they are taken to be those of eval_dataset"
            )
        return here

    # --- what is refused

    def _refuse_arguments(self) -> None:
        name = type(self).__name__
        whole(f"{name} probe_every", self._probe_every)
        whole(f"{name} probe_groups", self._probe_groups)
        needs = self.balance.holder.balancer.needs
        if needs & ~(MEASURED_HERE | Signal.VALID_LOSS):
            raise ValueError(
                f"{name}: the balancer reads {needs}, wanted token counts, training and validation "
                "losses at most. "
                "For the others use launch/train.py, or mtl.integrations.loop.Balance in a loop of "
                "your own."
            )

    def _refuse_trainer(self) -> None:
        name, names, given = type(self).__name__, list(self.balance.holder.tasks), self.eval_dataset
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError(
                f"{name}: found compute_loss_func or label smoothing, wanted neither: the loss is "
                "the tasks' weighed."
            )
        if (
            not self.model_accepts_loss_kwargs
        ):  # older releases of transformers would divide the loss once more
            raise ValueError(
                f"{name}: found a model whose forward takes no num_items_in_batch, wanted a causal "
                "language model's."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name}: found DataParallel over {self.args.n_gpu} devices, wanted a process "
                "each: use torchrun."
            )
        sizes = {
            what: getattr(self, f"get_{what}_size", lambda: 1)() for what in ("tp", "cp", "sp")
        }
        if any(size > 1 for size in sizes.values()):
            raise ValueError(f"{name}: found parallelism {sizes}, wanted data parallelism only.")
        if Signal.VALID_LOSS in self.balance.holder.balancer.needs and (
            not isinstance(given, Mapping)
            or not set(names) <= set(given)
            or not all(len(given[n]) for n in names)
        ):
            raise ValueError(
                f"{name}: the balancer reads validation losses: eval_dataset must map each of "
                f"{names} to its rows."
            )


def _described(probed: Mapping[str, Any]) -> dict[str, str]:
    """`Balanced._probed` by what an error names; of older checkpoints the groups only."""
    rows = {
        f"rows of {name!r}": f"{each['rows']} with digest {each['digest']}"
        for name, each in probed.get("tasks", {}).items()
    }
    return {"groups": str(probed["groups"]), **rows}


def _number(task: Any, column: str, names: Sequence[str]) -> int:
    if task in names:
        return list(names).index(task)
    if isinstance(task, int | np.integer) and 0 <= task < len(names):
        return int(task)
    raise ValueError(
        f"column {column!r}: found {task!r}, wanted one of {list(names)} or its place in the list"
    )


def _by_token(row: Mapping[str, Any], column: str, names: Sequence[str]) -> dict[str, Any]:
    """A row's tokens, its labels if it has any, and each token's task, which a packed row has
    already.
    """
    task, length = row[column], len(row["input_ids"])
    tasks = task if isinstance(task, list) else [_number(task, column, names)] * length
    if len(tasks) != length:
        raise ValueError(
            f"column {column!r}: found {len(tasks)} tasks in a row of {length} tokens, wanted one "
            "for each"
        )
    return {name: row[name] for name in ("input_ids", "labels") if name in row} | {column: tasks}
