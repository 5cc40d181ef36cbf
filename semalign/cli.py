"""From a command line to a configuration, and from an error to one line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from semalign.config import Config, resolve
from semalign.errors import Diverged, UserError

USAGE = """usage: python ray_jobs/transfer.py [--plan] [file.yaml ...] [key=value ...]

  --plan       say what would happen, and stop; loads no weights
  file.yaml    configuration; later files win
  key=value    dotted override, e.g. pairing.strategy=interpolated loss.alpha=0.3
"""


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The configuration, and whether only a plan is wanted."""
    words = [word for word in arguments if word != "--plan"]
    for word in words:
        if word.startswith("-"):
            raise UserError(f"{word}: unknown option; expected --plan, --help, a file or key=value")
    files = [word for word in words if "=" not in word]
    return resolve(files, [word for word in words if "=" in word]), len(words) < len(arguments)


def main(
    arguments: Sequence[str], *, run: Callable[[Config], object], plan: Callable[[Config], object]
) -> int:
    """Exit status: 0 done, 1 the run failed, 2 bad input."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    try:
        config, only_plan = parse(arguments)
        (plan if only_plan else run)(config)
    except UserError as error:
        # raised in another process, it comes wrapped with that process's traceback
        print(f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
