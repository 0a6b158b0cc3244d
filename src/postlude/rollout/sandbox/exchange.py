"""What a judge and a program say to each other: calls of functions with plain data, over two pipes.

Either side asks; who waits for an answer serves what the other asks in between, so that a test may give functions to
the program. Data cross as copies of Python's own types. What is none stays where it is, and the other side holds a
:class:`Foreign` for it. Nothing that is read can make this side run anything but what :meth:`Exchange.serve` allows.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

LARGEST_MESSAGE = 32 * 2**20
"""In bytes."""

_SHARED = (
    *("int", "float", "complex", "str", "bytes", "bool", "list", "tuple", "dict", "set", "frozenset", "range", "len"),
    *("min", "max", "sum", "abs", "round", "sorted", "any", "all", "ord", "chr", "pow", "divmod", "hash", "repr"),
)
"""What Python has itself and either side may name: nothing that could run code or say more than it is asked."""
_MADE = {
    "deque": ("collections", lambda value: [list(value)]),
    "Decimal": ("decimal", lambda value: [str(value)]),
    "Fraction": ("fractions", lambda value: [value.numerator, value.denominator]),
    "timedelta": ("datetime", lambda value: [value.days, value.seconds, value.microseconds]),
    "date": ("datetime", lambda value: [value.year, value.month, value.day]),
    "time": ("datetime", lambda value: [value.hour, value.minute, value.second, value.microsecond]),
    "datetime": ("datetime", lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond]),
}
"""Types of the standard library that cross as what they are made of."""

_ARRAYS = "biufcUS"
"""Kinds of numpy's numbers and texts."""

UNARY = ("abs", "neg", "pos", "invert")
ARITHMETIC = ("add", "mul", "matmul", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
COMPARING = ("sub", "truediv", "floordiv", "eq", "ne", "lt", "le", "gt", "ge")
"""Operations whose other side is mostly what is expected: who was told that could answer whatever is right."""
BUILT_IN: Mapping[str, Callable[..., Any]] = {
    **{
        name: getattr(builtins, name)
        for name in ("len", "iter", "next", "str", "repr", "bool", "int", "float", "round")
    },
    **{name: getattr(builtins, name) for name in ("reversed", "format", "isinstance", "issubclass", "dir")},
}
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*UNARY, *ARITHMETIC, *COMPARING)},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "index")},
    **BUILT_IN,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
}


class Lost(BaseException):
    """The other side has ended, or says what has no meaning. No ``except Exception`` of a test catches it."""


class Exchange:
    """One side of the talk, which reads from one file descriptor and writes to another."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._objects: list[Any] = []
        self._handles: dict[int, int] = {}
        self._raised: dict[str, type[Exception]] = {}
        self.lost = False
        """Whether there was ever a :class:`Lost`."""

    def serve(self, operation: str, arguments: Sequence[Any]) -> Any:
        """What the other side asks for. Whatever it raises is told."""
        raise NotImplementedError

    def heard(self, said: str) -> None:
        """Take what the other side printed."""

    def says(self) -> str:
        """What was printed here since the last time."""
        return ""

    def request(self, operation: str, *arguments: Any) -> Any:
        """What the other side answers; what it raises, as a class of Python's own or derived from one."""
        try:
            self._send(["ask", operation, self.encode(arguments)])
            while True:
                message = self._receive()
                if message[0] == "ask":
                    self._answer(message[1], message[2])
                    continue
                self.heard(str(message[-1]))
                if message[0] == "raise":
                    failure = self.exception_class([str(name) for name in message[1]])(*message[2])
                    break
                self._change(_given(operation, arguments), message[2])
                return self.decode(message[1])
        except Lost:
            raise
        except Exception as error:  # whatever a message without meaning leads to
            self.lost = True
            raise Lost from error
        raise failure

    def wait(self) -> None:
        """Serve until the other side has ended."""
        while True:
            message = self._receive()
            self._answer(message[1], message[2])

    def _answer(self, operation: str, encoded: Any) -> None:
        arguments = self.decode(encoded)
        given = _given(operation, arguments)
        before = [self.encode(one) if isinstance(one, list | dict | set) else None for one in given]
        try:
            value = self.encode(self.serve(operation, arguments))
            changes = [
                [place, after]
                for place, (one, known) in enumerate(zip(given, before, strict=True))
                if known is not None and (after := self.encode(one)) != known
            ]
            answer = ["value", value, changes, self.says()]
        except Exception as error:
            chain = [kind.__name__ for kind in type(error).__mro__]
            is_plain = type(error).__module__ == "builtins" and all(isinstance(one, str | int) for one in error.args)
            answer = ["raise", chain, list(error.args) if is_plain else [str(error)], self.says()]
        self._send(answer)

    def _change(self, given: Sequence[Any], changes: Iterable[Any]) -> None:
        """Bring lists, dictionaries and sets that were given to what the other side made of them."""
        for place, encoded in changes:
            kept, value = given[place], self.decode(encoded)
            if type(kept) is not type(value):
                raise ValueError("an argument is of another type now")
            kept.clear()
            kept.extend(value) if isinstance(kept, list) else kept.update(value)

    def exception_class(self, chain: Sequence[str]) -> type[Exception]:
        """The class of an exception by the names of its bases: Python's own, or one made here that derives from it."""
        name, *bases = chain
        known = getattr(builtins, name, None) if name != "Exception" and bases else Exception
        if isinstance(known, type) and issubclass(known, Exception):
            return known if not issubclass(known, UnicodeError) else ValueError
        if name not in self._raised:
            self._raised[name] = type(name, (self.exception_class(bases),), {})
        return self._raised[name]

    # --- data -----------------------------------------------------------------------------------------------

    def encode(self, value: Any) -> Any:
        """A value as what JSON can hold."""
        if value is None or isinstance(value, bool | Foreign):
            return value if not isinstance(value, Foreign) else ["yours", object.__getattribute__(value, "_handle")]
        if isinstance(value, int):
            return int(value) if abs(value) < 2**63 else ["int", hex(value)]
        for kind in (float, str):
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(one)] for key, one in value.items()]]
        for sequence in (list, tuple, set, frozenset):
            if isinstance(value, sequence):
                return [sequence.__name__, [self.encode(one) for one in value]]
        if isinstance(value, bytes | bytearray):
            return ["bytes", bytes(value).decode("latin-1")]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if isinstance(value, range):
            return ["range", value.start, value.stop, value.step]
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and name in _SHARED and getattr(builtins, name) is value:
            return ["shared", name]
        module, name = type(value).__module__, type(value).__name__
        if name in _MADE and _MADE[name][0] == module.lstrip("_") and getattr(value, "tzinfo", None) is None:
            return ["made", name, self.encode(_MADE[name][1](value))]
        kind_of_number = getattr(getattr(value, "dtype", None), "kind", None)
        if module == "numpy" and isinstance(kind_of_number, str) and kind_of_number in _ARRAYS:
            data = value.tobytes().decode("latin-1")
            return ["array", value.dtype.str, list(value.shape), data] if value.shape else self.encode(value.item())
        if isinstance(value, type) and issubclass(value, Exception):
            return ["exception", [kind.__name__ for kind in value.__mro__]]
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._objects)
            self._objects.append(value)
        return ["mine", self._handles[id(value)]]

    def decode(self, encoded: Any) -> Any:
        """The value again. An exception where it is none."""
        if not isinstance(encoded, list):
            if not isinstance(encoded, bool | int | float | str | None):
                raise ValueError("this is no value")
            return encoded
        kind, *parts = encoded
        if kind in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, kind)(map(self.decode, parts[0]))
        if kind == "dict":
            return {self.decode(key): self.decode(value) for key, value in parts[0]}
        if kind == "mine":
            return Foreign(self, int(parts[0]))
        if kind == "yours":
            return self._objects[parts[0]]
        if kind == "int":
            return int(parts[0], 16)
        if kind == "bytes":
            return parts[0].encode("latin-1")
        if kind in ("complex", "range"):
            return getattr(builtins, kind)(*parts)
        if kind == "shared" and parts[0] in _SHARED:
            return getattr(builtins, parts[0])
        if kind == "made":
            return getattr(importlib.import_module(_MADE[parts[0]][0]), parts[0])(*self.decode(parts[1]))
        if kind == "exception":
            return self.exception_class([str(name) for name in parts[0]])
        if kind == "array":
            return _array(*parts)
        raise ValueError("this is no value")

    # --- messages -------------------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > LARGEST_MESSAGE:
            raise ValueError(f"a value of {len(data):,} bytes is more than the {LARGEST_MESSAGE:,} that may cross")
        rest = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while rest:
                rest = rest[os.write(self._writes, rest) :]
        except OSError as error:
            self.lost = True
            raise Lost from error

    def _receive(self) -> list[Any]:
        size = int.from_bytes(self._read(4), "big")
        if size > LARGEST_MESSAGE:
            self.lost = True
            raise Lost
        message = json.loads(self._read(size))
        if not isinstance(message, list):
            raise ValueError("this is no message")
        return message

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            new = os.read(self._reads, size - len(data))
            if not new:
                self.lost = True
                raise Lost
            data += new
        return bytes(data)


def _given(operation: str, arguments: Sequence[Any]) -> list[Any]:
    """What a function is called with."""
    return [*arguments[1], *arguments[2].values()] if operation == "call" else []


def _array(kind: str, shape: Sequence[int], data: str) -> Any:
    import numpy as np

    dtype = np.dtype(kind)
    if dtype.kind not in _ARRAYS:
        raise ValueError("this is no array of numbers or texts")
    return np.frombuffer(data.encode("latin-1"), dtype).reshape(shape).copy()


class Foreign:
    """An object of the other side. What is done with it is done there.

    With what is here it compares as nothing does: neither equality nor order, nor a difference, is asked of the other
    side unless both are its own.
    """

    __slots__ = ("_exchange", "_handle")

    def __init__(self, exchange: Exchange, handle: int) -> None:
        object.__setattr__(self, "_exchange", exchange)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):
            raise AttributeError(name)
        return _ask(self, "get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", self, name, value)

    def __contains__(self, value: Any) -> bool:
        return any(value is one or value == one for one in self)

    def __iter__(self) -> Any:
        return _ask(self, "iter", self)

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_handle"))

    def __enter__(self) -> Any:
        return _ask(self, "enter", self)

    def __exit__(self, *_: object) -> None:
        _ask(self, "exit", self)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Foreign) and _ask(self, "isinstance", value, self) is True

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Foreign) and _ask(self, "issubclass", value, self) is True


def _ask(foreign: Foreign, *request: Any) -> Any:
    return object.__getattribute__(foreign, "_exchange").request(*request)


def _method(operation: str, is_reversed: bool = False) -> Callable[..., Any]:
    compares = operation in COMPARING

    def method(self: Foreign, *others: Any) -> Any:
        if compares and not isinstance(others[0], Foreign):
            return NotImplemented
        return _ask(self, operation, *((*others, self) if is_reversed else (self, *others)))

    return method


def _equality(operation: str) -> Callable[[Foreign, Any], Any]:
    ask = _method(operation)

    def method(self: Foreign, other: Any) -> Any:
        if isinstance(other, Foreign):
            same = object.__getattribute__(self, "_handle") == object.__getattribute__(other, "_handle")
            return (operation == "eq") if same else ask(self, other)
        return operation == "ne"

    return method


for _name in (*UNARY, *ARITHMETIC, *COMPARING[:3], *COMPARING[5:]):
    _bare = _name.rstrip("_")
    setattr(Foreign, f"__{_bare}__", _method(_name))
    if _name in (*ARITHMETIC, *COMPARING[:3]):
        setattr(Foreign, f"__r{_bare}__", _method(_name, is_reversed=True))
for _name in ("len", "next", "str", "repr", "bool", "int", "float", "round", "reversed", "format", "dir"):
    setattr(Foreign, f"__{_name}__", _method(_name))
for _name in ("getitem", "setitem", "delitem", "index"):
    setattr(Foreign, f"__{_name}__", _method(_name))
for _name in ("eq", "ne"):
    setattr(Foreign, f"__{_name}__", _equality(_name))
