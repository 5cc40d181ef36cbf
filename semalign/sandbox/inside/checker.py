"""The trusted side of the sandbox: runs the tests on values from the solution's process.

Nothing that the generated code made lives here: its values arrive as exact builtins, its other
objects as a Remote, which equals only itself. A message that breaks the protocol, and the end of
the solution's process, end the run where the tests cannot catch it.
"""

from __future__ import annotations

import builtins
import os
import sys

from semalign.sandbox.inside.wire import TOKEN, WireError, decode, encode, receive, send

TYPE_CHECKING = False  # as type checkers read it; importing typing would double the start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn


class Remote:
    """An object of the solution's process; only its calls, attributes and items are its own."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional: object, **named: object) -> Any:
        return self._ask("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no protocol of Python's is the solution's to answer
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        items = self._ask("iter", self)
        while item := self._ask("next", items):
            yield item[0]


class Peer:
    """The solution's process as the checker sees it: questions out, answers in."""

    def __init__(self, questions: int, answers: int, fatal: Callable[[str], NoReturn]) -> None:
        self.questions, self.answers, self.fatal = questions, answers, fatal
        self.remotes: dict[int, Remote] = {}

    def ask(self, *question: object) -> Any:
        """The value that the solution's process returns; an exception there is raised here."""
        token = os.urandom(TOKEN)
        data = encode(question, self._number)
        try:
            send(self.questions, token + data)
            answer = receive(self.answers)
            if answer[:TOKEN] != token:
                raise WireError("an answer without a question")
            kind, *content = decode(answer[TOKEN:], self._remote)
            if kind == "value" and len(content) == 1:
                return content[0]
            error = _exception(kind, *content)
        except (EOFError, OSError):
            self.fatal("ended before its tests")
        except Exception as problem:
            self.fatal(f"broke the sandbox's protocol: {problem}")
        raise error

    def _number(self, value: object) -> int:
        if type(value) is not Remote:
            raise TypeError(f"a {type(value).__name__} cannot enter the solution's process")
        return value._number

    def _remote(self, number: int) -> Remote:
        return self.remotes.setdefault(number, Remote(self.ask, number))


def _exception(kind: str, names: list[str], text: str) -> Exception:
    """The builtin exception nearest to the solution's own."""
    if (kind, type(names), type(text)) != ("raise", list, str):
        raise WireError("an answer of no known kind")
    for name in names:
        found = vars(builtins).get(name)
        if isinstance(found, type) and issubclass(found, Exception):
            try:
                return found(text if name == names[0] else f"{names[0]}: {text}".rstrip(": "))
            except TypeError:  # such as UnicodeDecodeError, which needs more than a text
                break
    return RuntimeError(f"{names[0]}: {text}".rstrip(": ") if names else text)


class Names(dict):
    """The globals of the tests: each name is found when it is first looked up."""

    def __init__(self, context: str, entry: tuple[str, ...], ask: Callable[..., Any]) -> None:
        super().__init__(__builtins__=vars(builtins))
        self._context = compile(context, "context", "exec", dont_inherit=True)
        self._entry, self._ask, self._pending = frozenset(entry), ask, True

    def __missing__(self, name: str) -> Any:
        if self._pending and name in self._context.co_names and name not in self._entry:
            return self._from_context(name)
        if name in self._entry:
            return self._from_solution(name)
        if name in vars(builtins):
            return vars(builtins)[name]
        if name in sys.stdlib_module_names:
            self[name] = __import__(name)
            return self[name]
        if name.startswith("__"):
            raise KeyError(name)
        return self._from_solution(name)

    def _from_context(self, name: str) -> Any:
        """Run the context when it is first needed: most tests need nothing of it."""
        self._pending, known = False, dict(self)
        exec(self._context, self)
        for entry in self._entry:
            self.pop(entry, None)
        self.update(known)
        return self[name]

    def _from_solution(self, name: str) -> Any:
        if not (found := self._ask("name", name)):
            raise NameError(f"name '{name}' is not defined")
        self[name] = found[0]
        return self[name]


def run_tests(request: dict[str, Any], questions: int, answers: int, channel: int) -> None:
    """Run the tests, which raise when the solution is wrong, then send the secret."""

    def fatal(reason: str) -> NoReturn:
        _report(channel, reason)
        os._exit(0)

    try:
        peer = Peer(questions, answers, fatal)
        peer.ask("load")
        code = compile(request["tests"], "tests", "exec", dont_inherit=True)
        exec(code, Names(request["context"], request["entry"], peer.ask))
    except BaseException as error:
        return _report(channel, f"{type(error).__name__}: {error}")
    os.write(channel, request["secret"].encode() + b"\n")


def _report(channel: int, text: str) -> None:
    line = text.encode("utf-8", "backslashreplace").split(b"\n")[0][:200]
    os.write(channel, b"error " + line + b"\n")
