"""SemAlign, the paper's method (section 4)."""

from __future__ import annotations

from semalign.methods.method import register_method
from semalign.methods.paired import Paired


class SemAlign(Paired):
    """Train the paired layers to output what the teacher's do, and to predict the answer (Eq. 5)."""


register_method("semalign", SemAlign())
