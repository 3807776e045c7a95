"""The examples run, and learn."""

import os
import subprocess
import sys

import pytest
from distributed import run_distributed
from forks import ROOT

CALLS = {
    "plain": "import plain; b = plain.main(30)",
    "with_accelerate": "import with_accelerate; b = with_accelerate.main(30, cpu=True)",
    "with_lightning": (
        "import tempfile, with_lightning as e, torch; d = tempfile.mkdtemp()\n"
        "quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=d)\n"
        "m = e.main(30, **quiet); b = m.balance; m.trainer.save_checkpoint(d + '/x.ckpt')\n"
        "again = e.Multitask(); again.on_load_checkpoint(torch.load(d + '/x.ckpt', weights_only=True))\n"
        "assert again.balance.step == 30 and (again.balance.weights == b.weights).all()"
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_example(name):
    check = "assert b.step == 30 and b.losses.min() < 4 and abs(b.weights[0] - b.weights[1]) > 1e-3, vars(b)"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{CALLS[name]}\n{check}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


def on_two_ranks() -> tuple[list[float], list[float]]:
    sys.path.insert(0, str(ROOT / "examples"))
    import with_accelerate

    balance = with_accelerate.main(20, cpu=True)
    return balance.weights.tolist(), balance.losses.tolist()


def test_accelerate_on_two_processes():
    one, other = run_distributed(on_two_ranks, 2)
    assert one == other and abs(one[0][0] - one[0][1]) > 1e-3
