"""What the other packages define, made and scored and recorded by Ray, vLLM and MLflow."""

from __future__ import annotations

import os
import sys

# Read when Ray is imported. On a busy machine its dashboard takes longer than Ray's 60 seconds; one
# that has died is noticed at once.
os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "180")


def _works_for_ray() -> bool:
    """Whether this process was started by Ray, to run our code alone."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # for its context Ray would join a cluster
        return False
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


if _works_for_ray():
    from semalign.models.light_imports import keep_imports_light

    keep_imports_light()
