"""SemAlign, the paper's method (section 4)."""

from __future__ import annotations

from semalign.config.jobs import Config
from semalign.methods.method import register_method
from semalign.methods.paired import Paired


class SemAlign(Paired):
    """Train the paired layers on the teacher's outputs and on the answers (Eq. 5)."""

    def run_name(self, config: Config) -> str:
        return config.pairing.strategy


register_method("semalign", SemAlign())
