"""Fine-tune one model on several tasks: `deepspeed launch/train.py --config x.yaml`.

Builds everything top to bottom and runs it. Also starts under torchrun, and alone with plain python.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import process
from mtl.cli import options

process.settle()  # before torch is imported

import torch

from mtl import comm, engine, gram, model, packing, plugins, provenance, report, trackers
from mtl.checkpoint import Checkpoints, RunState, check_output, write_json
from mtl.data.batches import TrainBatches
from mtl.data.cache import prepare
from mtl.data.encode import load_tokenizer
from mtl.data.plan import cut_for, layout_for, mix_for, probe_every, steps_of
from mtl.export import export
from mtl.run import Parts, run
from mtl.spec import resolve


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in `output`")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers append it
    return parser.parse_args()


def main() -> None:
    args = arguments()
    config = plugins.read(args.config, args.set, args.allow_code)
    names, output = list(config.tasks), Path(config.output).expanduser()
    check_output(output, args.resume)

    # Slow and without a process group, whose collectives would time out meanwhile.
    engine.build_ops(config, lambda text: process.is_first_on_host() and print(text, file=sys.stderr, flush=True))
    tokenizer = load_tokenizer(config.model, config.where("model.name"))
    tasks = prepare(config, tokenizer, plugins.formats(config, args.allow_code))

    engine.init_process_group(config.engine.timeout_minutes)
    rank, world = comm.rank(), comm.world()

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    identity = provenance.identity(config, tasks)
    comm.same(json.dumps(identity, sort_keys=True), "configuration or data")
    mix = mix_for(config, tasks)
    steps = steps_of(config, mix)
    for task, share in zip(tasks, mix.shares, strict=True):
        say(f"{task.name}: {share:.1%} of the examples")
        for split, data in (("train", task.train), ("validation", task.validation)):
            say("\n".join(f"  {split}: {line}" for line in data.problems()))

    torch.manual_seed(config.train.seed)  # new parameters (LoRA): the same on every rank
    trained = engine.Engine(model.load(config, tokenizer), config, model.optimizer(config), say)
    packed = packing.decide(config, trained, len(tokenizer), say)
    pad_id = tokenizer.pad_token_id or 0
    batches = TrainBatches(tasks, mix, layout_for(config, tasks, world, rank, pad_id, packed, config.batch.tokens))
    eval_tokens = config.evaluate.tokens or config.batch.tokens
    eval_layout = layout_for(config, tasks, world, rank, pad_id, packed, eval_tokens)
    cut, wanted = cut_for(config, tasks, eval_layout), config.evaluate.probe.groups
    if cut.groups < wanted:
        say(f"evaluate.probe.groups: {cut.groups}, not {wanted}: the smallest task has no rows for more groups of this size")

    holder = plugins.holder(config, args.allow_code)
    comm.same(json.dumps(holder.state_dict()["meta"], sort_keys=True), "balancer")  # what it needs is measured by all
    differentiated = gram.supply(holder.balancer.needs, trained.module, config)
    layout = {"processes": world, "zero": engine.zero_stage(config)}
    checkpoints = Checkpoints(output, config.checkpoint.keep, identity, tokenizer, layout, say)
    state = RunState()
    if args.resume:
        found = comm.together(checkpoints.latest)
        comm.same(str(found and found.name), "newest checkpoint")
        if found:
            state = checkpoints.load(trained, holder)
        else:
            comm.together(checkpoints.check_beginning)
        say(f"resuming from {found}" if found else f"--resume: no complete checkpoint in {output}; starting at step 0")

    def begin() -> list[trackers.Tracker]:
        if rank > 0:
            return []
        output.mkdir(parents=True, exist_ok=True)
        name = f"run.resumed-{state.step:08d}.json" if state.step else "run.json"
        write_json(output / name, provenance.record(config, tasks, steps, world, identity))
        trackers.cut_metrics(output, state.metrics_bytes)
        settings = {"output": output, "steps": steps, "start": state.step}
        paths = [("trackers", str(i)) for i in range(len(config.trackers))]
        sinks = [resolve(config, path, plugins.TRACKER, args.allow_code)(**settings) for path in paths]
        if not any(isinstance(sink, trackers.Jsonl) for sink in sinks):  # always: the table below and resume read it
            sinks.append(trackers.Jsonl(**settings))
        return sinks

    def end() -> None:
        for sink in sinks:
            sink.close()
        if rank == 0:
            print(report.table(report.read(output)), flush=True)
        if rank == 0 and config.export.which != "none":
            source = checkpoints.exported(config.export.which)
            print(f"{config.export.which} model, of {source.name}: {export(source, output / 'model', config.export.dtype)}")

    sinks = comm.together(begin)
    objective = resolve(config, "objective", plugins.OBJECTIVE, args.allow_code)
    every = probe_every(config, cut)
    parts = Parts(config, names, steps, trained, objective, holder, batches, cut, checkpoints, sinks, differentiated, every)
    run(parts, state)
    batches.close()
    comm.together(end)
    comm.leave()


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
