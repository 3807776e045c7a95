"""From an MFTCoder training config and its data to a YAML and data files of ours."""

from pathlib import Path

from mtl.config import dump, parse
from mtl.migrate.given import Migration, read
from mtl.migrate.rows import tasks_of, write_task
from mtl.migrate.settings import settings, template


def migrate(path: Path, world: int, out: Path) -> list[str]:
    """Write the YAML, the template and the data into `out`. Returns what there is to say, a line
    each.
    """
    migration = Migration(read(path), world, out)
    tasks = {
        name: write_task(name, folder, migration)
        for name, folder in tasks_of(migration["data_paths"]).items()
    }
    text = dump(settings(migration, tasks))
    parse(text, str(out / "config.yaml"))  # what we write is what we read
    (out / "chat_template.jinja").write_text(template(migration), encoding="utf-8")
    (out / "config.yaml").write_text(f"# Migrated from {path}.\n{text}", encoding="utf-8")
    return migration.notes
