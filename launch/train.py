"""Fine-tune one model on several tasks: `deepspeed launch/train.py --config x.yaml`.

Builds everything top to bottom and runs it. Also starts under torchrun, and alone with plain
python.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    args = cli.parser(
        __doc__, reads_config=True, is_launched=True, encodes=True, resumes=True
    ).parse_args()
    process.settle()  # before torch is imported, and that after the arguments: help comes at once
    process.check_world()

    from mtl import build, plugins
    from mtl.distributed import comm, engine, rendezvous
    from mtl.output import lock
    from mtl.output.checkpoint import check_output
    from mtl.output.end import close, finish
    from mtl.train.loop import train

    config = plugins.read(args.config, args.set, args.allow_code)
    output, is_resumed = Path(config.output).expanduser(), args.resume is not False
    rendezvous.meet(config.engine.rendezvous_minutes, process.tell)
    with rendezvous.telling():
        check_output(output, is_resumed)
        # Slow and without a process group, whose collectives would time out meanwhile.
        engine.build_ops(config, process.say_on_host)
        data = build.encode(config, args.allow_code, rebuild=args.rebuild_cache)

    engine.init_process_group(config.engine.timeout_minutes, config.engine.watchdog_minutes)
    build.agree(config, {"resume": args.resume, "allow_code": args.allow_code})
    with lock.alone(output, build.say_once), process.stoppable():
        comm.on_first(lambda: check_output(output, is_resumed))  # now that nobody else writes there
        run = build.build(config, data, allow_code=args.allow_code)
        state = build.restore(run, args.resume)
        build.open_trackers(run, state, data.tasks, args.allow_code)
        try:
            train(run, state)
            run.batches.close()
            comm.on_first(lambda: finish(config, run.checkpoints, run.trackers))
        except process.Preempted:
            run.batches.close()
            comm.on_first(lambda: close(run.trackers))
            comm.leave()
            raise
    comm.leave()


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
