"""The hostile side of the sandbox: runs the generated code and answers the checker's questions.

The generated code can change anything in this process: the answers below can become wrong, and a
wrong answer fails the tests like a wrong result. The tests and the secret are not here.
"""

from __future__ import annotations

import os

from semalign.sandbox.inside.wire import TOKEN, decode, encode, receive, send

TYPE_CHECKING = False  # as type checkers read it; importing typing would double the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Solution:
    """The globals of the generated code, and the objects that the checker knows by number."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.names: dict[str, Any] = {}
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}  # by identity; ``objects`` keeps each object alive

    def number(self, value: object) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def answer(self, question: bytes) -> bytes:
        verb, *operands = decode(question, self.objects.__getitem__)
        try:
            return encode(("value", _VERBS[verb](self, *operands)), self.number)
        except (SystemExit, KeyboardInterrupt):
            os._exit(0)
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return encode(("raise", kinds, _text(error)), self.number)

    def load(self) -> None:
        exec(compile(self.source, "solution", "exec", dont_inherit=True), self.names)

    def name(self, name: str) -> tuple[Any, ...]:
        return (self.names[name],) if name in self.names else ()

    def call(self, target: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> object:
        return target(*positional, **named)

    def next(self, target: Any) -> tuple[Any, ...]:
        for item in target:
            return (item,)
        return ()


_VERBS: dict[str, Callable[..., object]] = {
    "load": Solution.load,
    "name": Solution.name,
    "call": Solution.call,
    "get": lambda self, target, name: getattr(target, name),
    "set": lambda self, target, name, value: setattr(target, name, value),
    "iter": lambda self, target: iter(target),
    "next": Solution.next,
}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""  # the exception is the program's own and may not even have a text


def serve_solution(source: str, questions: int, answers: int) -> None:
    """Answer questions until the checker has ended."""
    solution = Solution(source)
    while True:
        message = receive(questions)
        send(answers, message[:TOKEN] + solution.answer(message[TOKEN:]))
