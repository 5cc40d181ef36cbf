"""Values between the checker and the solution: plain data only, rebuilt as exact builtins.

An item is a tag byte, a size in decimal, a colon, and then that many bytes (of a scalar) or that
many items (of a container). Subclasses travel as their base: a namedtuple as a tuple, a Counter as
a dict, an IntEnum as an int. Types of Python's own travel by name, anything else as a number that
stands for it. Decoding runs no code of the sender and builds nothing that the message has not paid
for in bytes.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False  # as type checkers read it; importing typing would double the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MESSAGE_LIMIT = 2**24
DEPTH_LIMIT = 150
TOKEN = 8  # a question begins with that many random bytes, and its answer repeats them
_SIZE_DIGITS = 10
_HEADER = 8

# How the base value of a scalar is read and rebuilt. Hexadecimal integers have no digit limit.
_SCALARS: dict[type, tuple[bytes, Callable[[Any], bytes], Callable[..., Any]]] = {
    type(None): (b"N", lambda value: b"", lambda data: None),
    bool: (b"?", lambda value: b"1" if value else b"", bool),
    int: (b"i", lambda value: b"%x" % int.__index__(value), lambda data: int(data, 16)),
    float: (b"f", lambda value: float.__repr__(value).encode(), float),
    complex: (
        b"j",
        lambda value: f"{value.real!r} {value.imag!r}".encode(),
        lambda data: complex(*map(float, data.split(b" "))),
    ),
    str: (
        b"s",
        lambda value: str.encode(value, "utf-8", "surrogatepass"),
        lambda data: data.decode("utf-8", "surrogatepass"),
    ),
    bytes: (b"b", lambda value: bytes.__getitem__(value, slice(None)), bytes),
    bytearray: (b"a", lambda value: bytes(bytearray.__getitem__(value, slice(None))), bytearray),
}
_CONTAINERS: dict[type, tuple[bytes, Callable[[Any], Any]]] = {
    list: (b"L", list.__iter__),
    tuple: (b"T", tuple.__iter__),
    set: (b"S", set.__iter__),
    frozenset: (b"F", frozenset.__iter__),
    dict: (b"D", lambda value: (part for item in dict.items(value) for part in item)),
}
# Plain values of the standard library: the arguments that make them again.
_STANDARD: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.range": lambda v: (v.start, v.stop, v.step),
    "collections.deque": lambda v: (list(v), v.maxlen),
    "datetime.date": lambda v: (v.year, v.month, v.day),
    "datetime.datetime": lambda v: (*v.timetuple()[:6], v.microsecond),
    "datetime.timedelta": lambda v: (v.days, v.seconds, v.microseconds),
    "decimal.Decimal": lambda v: (str(v),),
    "fractions.Fraction": lambda v: (v.numerator, v.denominator),
}
_FROM_BYTES = {tag: build for tag, _, build in _SCALARS.values()}
_FROM_ITEMS = {tag: kind for kind, (tag, _) in _CONTAINERS.items()}


class WireError(ValueError):
    """A message that breaks the format."""


def encode(value: object, opaque: Callable[[object], int]) -> bytes:
    """A value as bytes; ``opaque`` gives the number of an object that is not plain data."""
    parts: list[bytes] = []
    _put(value, parts.append, opaque, DEPTH_LIMIT)
    if len(data := b"".join(parts)) > MESSAGE_LIMIT:
        raise WireError("a value is too large to leave its process")
    return data


def _put(
    value: Any, out: Callable[[bytes], None], opaque: Callable[[object], int], depth: int
) -> None:
    if not depth:
        raise RecursionError("a value is nested too deeply to leave its process")
    kind: Any = type(value)
    if kind is type and vars(builtins).get(name := value.__name__) is value:
        return out(b"C%d:%b" % (len(name), name.encode()))
    for base in kind.__mro__:
        if base in _SCALARS:
            tag, read, _ = _SCALARS[base]
            data = read(value)
            return out(b"%b%d:%b" % (tag, len(data), data))
        if base in _CONTAINERS:
            tag, items = _CONTAINERS[base]
            parts = list(items(value))
            out(b"%b%d:" % (tag, len(parts) // (2 if base is dict else 1)))
            for part in parts:
                _put(part, out, opaque, depth - 1)
            return None
    name = f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"
    if name in _STANDARD and getattr(value, "tzinfo", None) is None:
        out(b"O2:")
        _put(name, out, opaque, depth - 1)
        return _put(_STANDARD[name](value), out, opaque, depth - 1)
    data = b"%x" % opaque(value)
    return out(b"R%d:%b" % (len(data), data))


def decode(data: bytes, reference: Callable[[int], object]) -> Any:
    """The value in ``data``; ``reference`` gives the object of a number. Raises WireError."""
    try:
        value, end = _take(data, 0, reference, DEPTH_LIMIT)
    except WireError:
        raise
    except Exception as error:  # an unhashable key, a size that is no number, a date out of range
        raise WireError(type(error).__name__) from None
    if end != len(data):
        raise WireError("more than one value")
    return value


def _take(
    data: bytes, start: int, reference: Callable[[int], object], depth: int
) -> tuple[Any, int]:
    colon = data.index(b":", start, start + _SIZE_DIGITS + 2)
    tag, size, at = data[start : start + 1], int(data[start + 1 : colon]), colon + 1
    if size < 0 or not depth:
        raise WireError("a negative size" if size < 0 else "nested too deeply")
    if tag in _FROM_BYTES or tag in (b"R", b"C"):
        end = at + size
        if end > len(data):
            raise WireError("cut short")
        if tag == b"R":
            return reference(int(data[at:end], 16)), end
        if tag == b"C":
            return _builtin_type(data[at:end].decode()), end
        return _FROM_BYTES[tag](data[at:end]), end
    items = []
    for _ in range(2 * size if tag == b"D" else size):
        item, at = _take(data, at, reference, depth - 1)
        items.append(item)
    if tag == b"O":
        return _rebuild(*items), at
    if tag == b"D":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    return _FROM_ITEMS[tag](items), at


def _builtin_type(name: str) -> object:
    if not isinstance(found := vars(builtins).get(name), type):
        raise WireError("an unknown type")
    return found


def _rebuild(name: str, arguments: tuple[Any, ...]) -> object:
    if name not in _STANDARD:
        raise WireError("an unknown type")
    module, _, kind = name.partition(".")
    __import__(module)
    return getattr(sys.modules[module], kind)(*arguments)


def send(fd: int, data: bytes) -> None:
    """Write one message."""
    view = memoryview(len(data).to_bytes(_HEADER, "big") + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> bytes:
    """One message; EOFError when the other end has closed or died."""
    size = int.from_bytes(_read(fd, _HEADER), "big")
    if size > MESSAGE_LIMIT + TOKEN:
        raise WireError("too large")
    return _read(fd, size)


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (piece := os.read(fd, min(size - len(data), 2**16))):
            raise EOFError
        data += piece
    return bytes(data)
