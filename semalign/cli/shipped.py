"""The sweeps that semalign ships: `sweeps/` of a checkout, or where the wheel has put them."""

from __future__ import annotations

from pathlib import Path

_INSTALLED = "share/semalign/sweeps/"  # as pyproject.toml names it


def shipped_sweeps() -> dict[str, Path]:
    """The files by name, such as `pairing`."""
    checkout = Path(__file__).parents[2]
    files = sorted((checkout / "sweeps").glob("*.yaml"))
    if not files or not (checkout / "pyproject.toml").exists():
        files = _installed()
    return {file.stem: file for file in files}


def _installed() -> list[Path]:
    import importlib.metadata

    try:
        listed = importlib.metadata.files("semalign") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Path(str(file.locate())) for file in listed if _INSTALLED in file.as_posix()]
    return sorted(file.resolve() for file in found)


def find_sweep(name: str) -> Path:
    """The file of that name, or the shipped sweep: `pairing`, `pairing.yaml` and
    `sweeps/pairing.yaml` all name it where there is no such file.
    """
    file = Path(name)
    if file.exists() or file.parent not in (Path(), Path("sweeps")):
        return file
    return shipped_sweeps().get(file.stem, file)
