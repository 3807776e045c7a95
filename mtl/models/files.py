"""Files of a saved model."""

from pathlib import Path


def as_umask_says(folder: Path) -> None:
    """Give every file of a folder the mode of a new one. safetensors makes files 0600 whatever the
    umask, so others who share the folder could not read the weights.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def same_model(one: str, two: str) -> bool:
    """Whether two names are one folder, or one model of the hub."""
    paths = [Path(each).expanduser() for each in (one, two)]
    return one == two or all(p.is_dir() for p in paths) and paths[0].samefile(paths[1])
