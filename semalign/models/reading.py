"""The boundary between what libraries raise over other people's files and the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from semalign.errors import Failed, UserError, one_line

_LONGEST = 300  # characters of a library's message, which may list every tensor


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within the context every exception of a library becomes one `UserError` line: what, and why.

    Our own errors and a lack of memory pass: neither is a fault of the files.
    """
    try:
        yield
    except (UserError, Failed, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        named = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        reason = one_line(named or type(error).__name__, limit=_LONGEST)
        raise UserError(f"{what}: {reason}") from error
