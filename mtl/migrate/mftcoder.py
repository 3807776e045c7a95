"""From an MFTCoder training config and its data to a YAML and data files of ours."""

from pathlib import Path

from mtl.config import dump, parse
from mtl.migrate import preference
from mtl.migrate.given import PREFERENCE, Migration, read
from mtl.migrate.rows import tasks_of, write_task
from mtl.migrate.settings import settings, template


def migrate(path: Path, world: int, out: Path) -> list[str]:
    """Write the YAML, the template and the data into `out`. Returns what there is to say, a line
    each.
    """
    migration = Migration(read(path), world, out)
    if migration.keys is PREFERENCE:
        content, layout = preference.settings(migration), preference.TEMPLATE
    else:
        tasks = {
            name: write_task(name, folder, migration)
            for name, folder in tasks_of(migration["data_paths"]).items()
        }
        content, layout = settings(migration, tasks), template(migration)
    text = dump(content)
    parse(text, str(out / "config.yaml"))  # what we write is what we read
    (out / "chat_template.jinja").write_text(layout, encoding="utf-8")
    (out / "config.yaml").write_text(f"# Migrated from {path}.\n{text}", encoding="utf-8")
    return migration.notes
