"""What `mtl doctor` prints, what it refuses, and that its processes talk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtl.check import doctor
from mtl.models import accelerate

ROOT = Path(__file__).resolve().parent.parent


def test_processes_talk_and_are_measured():
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--processes", "2"]
    # Tests that run a program in this process leave a rank behind.
    launched = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    plain = {name: value for name, value in os.environ.items() if name not in launched}
    ended = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    *told, last = ended.stdout.splitlines()
    assert [line.split()[0] for line in told[:5]] == [
        "host", "cores", "devices", "variables", "python",
    ]  # fmt: skip
    assert re.fullmatch(r"bf16 +a matrix product takes \d+\.\d times as long as in fp32", told[-1])
    assert re.fullmatch(r"deepspeed +\S+ +>=0\.19\.8", next(x for x in told if "deepspeed" in x))
    found = re.fullmatch(
        r"2 processes on 1 host over gloo: one number summed in (\d+) µs, "
        r"64 MiB in (\d+) ms \((\d+\.\d\d) GiB/s of each process\)",
        last,
    )
    assert found, last
    # each sends half of the other's sum and gets half of its own: the tensor's size in all
    milliseconds, rate = int(found[2]), float(found[3])
    assert rate * milliseconds == pytest.approx(62.5, abs=0.5 * rate + 0.005 * milliseconds + 0.1)


def test_what_bf16_costs_is_told_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(accelerate, "bf16_over_fp32", lambda: 97.44)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    told = "bf16        a matrix product takes 97.4 times as long as in fp32"
    assert doctor.speed() == [told]
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert doctor.speed() == []


def test_what_is_here_is_not_refused():
    doctor.check()


@pytest.mark.parametrize("package, found", [("deepspeed", "0.19.7"), ("peft", None)])
def test_a_version_known_to_be_wrong_is_refused(monkeypatch, package, found):
    real = doctor._found
    monkeypatch.setattr(doctor, "_found", lambda name: found if name == package else real(name))
    with pytest.raises(doctor.DoctorError) as error:
        doctor.check()
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  {package}: found {found or 'none'}, wanted >=0.")
    assert f"pip install '{package}>=0." in line


def test_a_torch_that_does_not_see_the_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(doctor, "_cards", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    with pytest.raises(doctor.DoctorError, match="found none of the 4 GPUs that nvidia-smi lists"):
        doctor.check()


def test_a_checkout_that_is_not_installed_reads_its_own_list(monkeypatch):
    installed = {str(one) for one in doctor._wanted()}

    def absent(name):
        raise doctor.PackageNotFoundError

    monkeypatch.setattr(doctor, "requires", absent)
    assert {str(one) for one in doctor._wanted()} == installed


def test_the_rank_that_fails_is_named():
    code = "import os, sys; sys.exit(3 * int(os.environ['RANK']))"
    with pytest.raises(doctor.DoctorError, match=r"2 processes cannot talk.*: rank 1 \(code 3\)"):
        doctor.start(2, [sys.executable, "-c", code])
