"""Files of users that register their own methods, strategies, objectives, maps or tasks.

They are named by the setting `plugins`, and imported in every process of a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from semalign.errors import UserError
from semalign.tasks.file import register_task_file

VARIABLE = "SEMALIGN_PLUGINS"  # how the processes of a run learn of them


def load_plugins(names: Sequence[str] | None = None) -> None:
    """Import modules by dotted name or by the path of a Python file, each once a process, and
    register the tasks of YAML files.

    Without `names`, those that the driver of this run has imported. **Raises** `UserError` for one
    that cannot be imported.
    """
    if names is None:
        names = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    for name in names:
        try:
            if name.endswith((".yaml", ".yml")):
                register_task_file(Path(name))
            elif name.endswith(".py"):
                _load_file(Path(name))
            else:
                importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"plugins: {name} cannot be imported ({error})") from error
    known = os.environ.get(VARIABLE, "").split(os.pathsep)
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*filter(None, known), *names]))


def _load_file(path: Path) -> None:
    """Import a file as a module of its stem's name."""
    loaded = sys.modules.get(path.stem)
    if loaded is not None and Path(str(loaded.__file__)).resolve() == path.resolve():
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
