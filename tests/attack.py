"""What tries to break a run, many times over: `make attack KIND=kill`. CI runs a few of each.

config: mutated configs are a clean error or valid. kill: SIGKILL at random moments, until the run is done; then it is the run
that nobody killed, bit for bit. corrupt: every file of a checkpoint with a bit flipped, cut, emptied, made longer, removed;
each is found and named. disk: the disk fills up at a random moment; the run ends in words and goes on when there is room.
"""

import argparse
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attack_config
import attack_files
import runs

from mtl.output import manifest

TRIES = {"config": 10_000, "kill": 50, "corrupt": 20, "disk": 50}
STEPS, SAVES = 12, (4, 8, 12)
SETTINGS = ["objective=outside:causal_lm", "checkpoint={every: 4, keep: 2}", "evaluate.every=6"]


def whole(yaml: Path) -> Path:
    """The run that nothing happens to."""
    output = yaml.parent / "whole"
    runs.train(yaml, *SETTINGS, f"output={output}", world=2).well()
    return output


def kill(yaml: Path, unharmed: Path, rng: random.Random) -> str:
    """Kill and resume a run until it is done. Returns how often, or what went wrong."""
    output = yaml.parent / "killed"
    for kills in range(40):
        where = rng.choice(["step", "step", "batch", "shards", "model", "pointer", "prune"])
        at = rng.randrange(STEPS) if where in ("step", "batch") else rng.choice(SAVES)
        strange = f"kill {where} {at} {rng.choice(['0', '1', 'all'])}"
        settings = [*SETTINGS, f"output={output}"]
        ended = runs.train(yaml, *settings, world=2, resume=kills > 0, MISFORTUNE=strange)
        if not any(ended.codes):
            found = difference(output, unharmed)
            shutil.rmtree(output)
            return found or f"{kills} kills"
        if -9 not in ended.codes:
            return f"bad: {strange}: exit codes {ended.codes}\n{ended.err}"
    return "bad: 40 kills, and not done"


def disk(yaml: Path, unharmed: Path, rng: random.Random, small: Path) -> str:
    """Fill the disk of a run but for some bytes, then make room. Returns what happened."""
    output, room = small / "run", rng.randrange(4_000_000)
    at, settings = rng.randrange(STEPS), [*SETTINGS, f"output={output}"]
    strange = {"MISFORTUNE": f"fill step {at} 0", "FILL": str(small), "ROOM": str(room)}
    ended = runs.train(yaml, *settings, world=2, **strange)
    if any(ended.codes):
        told = "cannot be written: No space left on device" in ended.err
        if ended.codes != [1, 1] or "Traceback" in ended.err or not told:
            return f"bad: {room} bytes at step {at}: exit codes {ended.codes}\n{ended.err}"
    (small / "ballast").unlink()
    again = runs.train(yaml, *settings, world=2, resume=True)
    found = f"bad: {again.err}" if any(again.codes) else difference(output, unharmed)
    shutil.rmtree(output)
    return found or ("ended in words" if any(ended.codes) else "had room enough")


def difference(output: Path, unharmed: Path) -> str:
    """Between two finished runs; empty where there is none."""
    if runs.untimed(output) != runs.untimed(unharmed):
        return "bad: other numbers in metrics.jsonl"
    models = [(one / "model/model.safetensors").read_bytes() for one in (output, unharmed)]
    return "" if models[0] == models[1] else "bad: another model"


HARM = {
    "a bit flipped": attack_files.flip,
    "cut": lambda content, rng: content[: rng.randrange(1, max(2, len(content)))],
    "emptied": lambda content, rng: b"",
    "made longer": lambda content, rng: content + b"\0",
    "removed": lambda content, rng: None,
}


@contextmanager
def harmed(path: Path, how: str, rng: random.Random) -> Iterator[None]:
    """Within, a file is not what it was."""
    before = path.read_bytes()
    content = HARM[how](before, rng)
    path.unlink() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def corrupt(checkpoint: Path, rng: random.Random) -> Counter:
    """Harm every file of a sealed folder in every way. Counts what was found: each is to be named."""
    outcomes: Counter = Counter()
    for name in [*manifest.names(checkpoint), manifest.NAME]:
        for how in HARM:
            if how in ("a bit flipped", "cut") and len((checkpoint / name).read_bytes()) < 2:
                continue
            with harmed(checkpoint / name, how, rng):
                found = manifest.damage(checkpoint)
                is_whole = manifest.is_whole(checkpoint, "checkpoint")
            named = [line for line in found if line.startswith(f"{checkpoint / name}: ")]
            if name == manifest.NAME:
                is_found = bool(found) or not is_whole
            else:
                is_found = len(named) == len(found) == 1
            outcomes["found" if is_found else f"bad: {name} {how}: {found}"] += 1
    return outcomes


def resume_harmed(yaml: Path, unharmed: Path, rng: random.Random) -> str:
    """One file of the newest checkpoint harmed, and the run resumed: it ends, and names the file."""
    checkpoint = unharmed / "checkpoints" / f"step-{STEPS:08d}"
    name, how = rng.choice(manifest.names(checkpoint)), rng.choice(list(HARM))
    with harmed(checkpoint / name, how, rng):
        ended = runs.train(yaml, *SETTINGS, f"output={unharmed}", world=2, resume=True)
    named = f"{checkpoint / name}: " in ended.err and "--resume=8" in ended.err
    is_told = ended.codes == [1, 1] and named and "Traceback" not in ended.err
    return f"{how}: told" if is_told else f"bad: {name} {how}: {ended.codes}\n{ended.err}"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 24 MB. Only root can make it, and not in every container.

    Raises:
        PermissionError: this process cannot.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("a small file system needs root, and a container that may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(TRIES))
    parser.add_argument("--tries", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, tries = random.Random(args.seed), args.tries or TRIES[args.kind]
    if args.kind == "config":
        outcomes, bad = attack_config.attack(tries, args.seed)
        outcomes += Counter({f"bad: {text}": 1 for text in bad})
    else:
        outcomes = Counter()
        with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
            yaml = runs.write(Path(folder))
            unharmed = whole(yaml)
            if args.kind == "corrupt":
                outcomes += corrupt(unharmed / f"checkpoints/step-{STEPS:08d}", rng)
            attempt = {"kill": kill, "corrupt": resume_harmed, "disk": disk}[args.kind]
            with ExitStack() as stack:
                if args.kind == "disk":
                    small = stack.enter_context(small_disk(Path(folder) / "small"))
                    attempt = functools.partial(disk, small=small)
                for _ in range(tries):
                    outcomes[attempt(yaml, unharmed, rng)] += 1
    bad = [text for text in outcomes if text.startswith("bad: ")]
    for text, times in outcomes.most_common():
        print(f"{times:6,} {text[:3000]}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
