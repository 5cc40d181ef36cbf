"""The command `semalign`. ray_jobs/ and `python -m semalign` run the same functions."""

from semalign.cli import jobs, listing, versions, work
from semalign.cli.app import app, main

__all__ = ["app", "jobs", "listing", "main", "versions", "work"]
