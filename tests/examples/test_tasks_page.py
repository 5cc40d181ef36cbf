"""The page of task files: its examples are the shipped files, its keys those that there are."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic_core import PydanticUndefined

from semalign.config.describe import leaf_settings, yaml_text
from semalign.tasks.file import TaskFile, read_task_file

PAGE = Path("docs/tasks.md")
EXAMPLES = Path("examples/tasks")


def keys() -> str:
    """The table of keys."""
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for setting in leaf_settings(TaskFile).values():
        empty = setting.default in ("", (), None, PydanticUndefined)
        default = "" if empty or setting.required else f"`{yaml_text(setting.default)}`"
        kind = setting.type.replace("|", "or")
        lines.append(f"| `{setting.name}` | {kind} | {default} | {setting.description} |")
    return "\n".join(lines)


def test_the_examples_are_the_shipped_files() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    files = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.yaml")}
    assert sorted(blocks) == sorted(files.values())
    for name in files:
        assert read_task_file(EXAMPLES / f"{name}.yaml").name == name


def test_the_keys_are_those_of_a_task_file() -> None:
    assert keys() in PAGE.read_text(encoding="utf-8"), keys()


def test_the_data_are_what_the_script_makes(tmp_path: Path) -> None:
    script = (EXAMPLES / "make_data.py").read_text(encoding="utf-8")
    copied = tmp_path / "make_data.py"
    copied.write_text(script, encoding="utf-8")
    exec(compile(script, copied, "exec"), {"__file__": str(copied), "__name__": "__main__"})
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    kept = {path.relative_to(EXAMPLES): path.read_bytes() for path in EXAMPLES.rglob("*.jsonl")}
    assert made == kept and len(made) == 12
