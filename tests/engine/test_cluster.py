"""A cluster of one's own: guarded by a token, and nothing of it left in the home directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
import ray
from semalign.engine.cluster import cluster_resources, connect
with connect(None, num_cpus=1):
    print(ray.get(ray.remote(lambda: 40 + 2).remote()), cluster_resources()["CPU"])
    print(os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
"""


def test_a_local_cluster_has_a_token_of_its_own(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**clean, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["42 1.0", "token 64"], done.stderr
    assert not (tmp_path / ".ray").exists()
