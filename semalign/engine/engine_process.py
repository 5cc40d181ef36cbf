"""The process of an engine without Ray: answers what `LocalEngine` requests over a pipe."""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection

from semalign.errors import Failed, one_line
from semalign.models.light_imports import keep_imports_light


def serve(connection: Connection) -> None:
    """Answer calls until the other process has gone."""
    engine, broken = None, None
    keep_imports_light()
    try:
        from semalign.engine.vllm_engine import Engine

        engine = Engine(*connection.recv())
    except Exception as error:
        broken = error  # the answer to the first call
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            if engine is None:
                raise Failed(f"the engine could not be started: {one_line(broken)}") from broken
            connection.send(engine.generate(*arguments))
        except Exception as error:
            error.add_note(traceback.format_exc())  # of this process, for the other's log
            connection.send(error)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
