"""Abstract interpretation of a pickle: runs its opcodes on summaries of values, before it is loaded.

A pickle of harmless classes alone can still do harm. Hashing a key that is nested too deeply overflows the stack, and
hashing nested pairs (t, t) takes time exponential in the depth. A few bytes can name a large value again and again, and
each call may copy it. So the machine follows the opcodes as an unpickler does. For each value it keeps the kind, the
depth, and the number of bytes that the value would take if everything that it repeats were written out. A pickle that
expands far beyond its own size is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dora_fx.files.message_text import shortened
from dora_fx.files.pickle_opcodes import opcodes
from dora_fx.files.regular_file import UnsafeFileError

_DEEPEST = 100
# A pickler writes a value once and refers to it after that. In real files a reference of a few bytes stands for some
# hundred.
_MOST_REPEATED, _ALWAYS_ALLOWED = 32, 1 << 20
# Larger integers share their hashes with smaller ones, and filling a dict of such keys takes quadratic time.
_LARGEST_KEY = 2**61 - 2

_PLAIN = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"})
_INTEGERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1"})
_TEXTS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"})
_BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})
_KEYS = frozenset({"text", "integer", "plain"})


@dataclass(eq=False, slots=True)
class AbstractValue:
    """The machine's summary of a value.

    Attributes:
        kind: integer, text, bytes, plain, tuple, list, dict, class, or a kind that a format's own calls return.
        content: the value of an integer or a text; the name of a class; the parts of a tuple; the keys of a dict; for a
            list, whether all its elements could be keys.
        depth: of nested values.
        span: bytes that the value takes with all repetitions written out.
        is_held: whether another value holds it. Then it may not change any more, so that no value can hold itself.
    """

    kind: str
    content: Any = None
    depth: int = 0
    span: int = 1
    is_held: bool = False


class PickleMachine(ABC):
    """Runs one pickle. A subclass per file format defines the allowed classes and the results of calling them."""

    def __init__(self, data: bytes, where: str, known: frozenset[str]) -> None:
        """Take the bytes of a pickle, the name of its file for messages, and the names of the allowed opcodes."""
        self.where = where
        self._data, self._known = data, known
        self._stack: list[AbstractValue] = []
        self._marks: list[int] = []
        self._memo: dict[int, AbstractValue] = {}
        self._most = _ALWAYS_ALLOWED + _MOST_REPEATED * len(data)
        self._called = 0

    @abstractmethod
    def named(self, module: str, name: str) -> AbstractValue:
        """Resolve a class by its name; raise UnsafeFileError for a class that is not allowed in such a file."""

    @abstractmethod
    def called(self, name: Any, arguments: Sequence[AbstractValue]) -> AbstractValue:
        """Return the result of calling a class, by the name that `named` gave it; the machine sets depth and span."""

    @abstractmethod
    def built(self, value: AbstractValue, state: AbstractValue) -> None:
        """Check the state that is set on a value."""

    def persistent(self, value: AbstractValue) -> AbstractValue:
        """Resolve a persistent id, by which the pickle names a value outside it."""
        raise self.unexpected(value, "no persistent ids")

    def is_key(self, value: AbstractValue) -> bool:
        """Return whether a value may be a key: hashing it takes time in proportion to its own bytes."""
        return value.kind in _KEYS and not (value.kind == "integer" and abs(value.content) > _LARGEST_KEY)

    def run(self) -> AbstractValue:
        """Follow the pickle to its end; return the summary of its value.

        Raises:
            UnsafeFileError: the pickle is damaged, names a class that is not allowed, or expands far beyond its size.
        """
        try:
            for name, argument in opcodes(self._data, self.where):
                if name not in self._known:
                    raise UnsafeFileError(
                        f"{self.where}: found the opcode {name} in its pickle, expected those of such files"
                    )
                self._step(name, argument)
            return self._stack[-1]
        except (IndexError, KeyError) as error:
            raise UnsafeFileError(f"{self.where}: found no whole pickle (a value is missing)") from error

    def unexpected(self, value: AbstractValue, expected: str) -> UnsafeFileError:
        shown = shortened(value.content) if value.kind in ("integer", "text") else f"a {value.kind}"
        return UnsafeFileError(f"{self.where}: found {shown} in its pickle, expected {expected}")

    def _step(self, name: str, argument: Any) -> None:
        if name in _TEXTS or name in _BYTES:
            self._stack.append(AbstractValue("text" if name in _TEXTS else "bytes", argument, span=1 + len(argument)))
        elif name in _INTEGERS:
            self._stack.append(AbstractValue("integer", argument, span=1 + argument.bit_length() // 8))
        elif name in _PLAIN:
            self._stack.append(AbstractValue("plain"))
        elif name in _EMPTY:
            self._stack.append(AbstractValue(*_EMPTY[name]()))
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)

    def _popped(self, count: int) -> list[AbstractValue]:
        """Pop the last values of the stack, but none from before the last mark."""
        begin = len(self._stack) - count
        if begin < (self._marks[-1] if self._marks else 0):
            raise IndexError
        parts = self._stack[begin:]
        del self._stack[begin:]
        return parts

    def _since_mark(self) -> list[AbstractValue]:
        begin = self._marks.pop()
        parts = self._stack[begin:]
        del self._stack[begin:]
        return parts

    def _hold(self, holder: AbstractValue, parts: Sequence[AbstractValue]) -> None:
        for part in parts:
            part.is_held = True
        if holder.is_held:
            raise self.unexpected(holder, "no change of a value that another value holds")
        for part in parts:
            holder.depth = max(holder.depth, 1 + part.depth)
            holder.span += part.span
        if holder.depth > _DEEPEST:
            raise UnsafeFileError(f"{self.where}: found values nested too deeply in its pickle")
        self._at_most(holder.span)

    def _at_most(self, span: int) -> None:
        if span > self._most:
            raise UnsafeFileError(
                f"{self.where}: found values in its pickle that repeat others to more than {self._most:,} bytes"
            )

    def _put(self, place: Any) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _get(self, place: Any) -> None:
        self._stack.append(self._memo[place])

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, parts: list[AbstractValue]) -> None:
        value = AbstractValue("tuple", parts)
        self._hold(value, parts)
        self._stack.append(value)

    def _extend(self, parts: list[AbstractValue]) -> None:
        value = self._stack[-1]
        if value.kind != "list":
            raise self.unexpected(value, "a list to append to")
        value.content = value.content and all(self.is_key(part) for part in parts)
        self._hold(value, parts)

    def _set_items(self, parts: list[AbstractValue]) -> None:
        value, keys = self._stack[-1], parts[::2]
        if value.kind != "dict" or len(parts) % 2:
            raise self.unexpected(value, "a dict to fill, with a value for each key")
        for key in keys:
            if not self.is_key(key):
                raise self.unexpected(key, "text or integers as the keys of a dict")
        value.content.extend(key.content for key in keys)
        self._hold(value, parts)

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self.named(module, name))

    def _stack_global(self, _: Any) -> None:
        module, name = self._popped(2)
        if (module.kind, name.kind) != ("text", "text"):
            raise self.unexpected(name, "the name of a class")
        self._stack.append(self.named(module.content, name.content))

    def _call(self, _: Any) -> None:
        function, arguments = self._popped(2)
        if function.kind != "class" or arguments.kind != "tuple":
            raise self.unexpected(function, "a class to call, with a tuple of arguments")
        # Each call may copy its arguments, so their sizes add up over the whole pickle.
        self._called += arguments.span
        self._at_most(self._called)
        result = self.called(function.content, arguments.content)
        result.depth, result.span = max(result.depth, arguments.depth), result.span + arguments.span
        self._stack.append(result)

    def _persistent(self, _: Any) -> None:
        (value,) = self._popped(1)
        self._stack.append(self.persistent(value))

    def _build(self, _: Any) -> None:
        (state,) = self._popped(1)
        self.built(self._stack[-1], state)
        self._hold(self._stack[-1], [state])


_EMPTY: dict[str, Callable[[], tuple[str, Any]]] = {
    "EMPTY_TUPLE": lambda: ("tuple", []),
    "EMPTY_LIST": lambda: ("list", True),
    "EMPTY_DICT": lambda: ("dict", []),
}
_HANDLERS: dict[str, Callable[[PickleMachine, Any], None]] = {
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), PickleMachine._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), PickleMachine._get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), PickleMachine._call),
    "MARK": PickleMachine._mark,
    "TUPLE": lambda machine, _: machine._tuple(machine._since_mark()),
    "TUPLE1": lambda machine, _: machine._tuple(machine._popped(1)),
    "TUPLE2": lambda machine, _: machine._tuple(machine._popped(2)),
    "TUPLE3": lambda machine, _: machine._tuple(machine._popped(3)),
    "APPEND": lambda machine, _: machine._extend(machine._popped(1)),
    "APPENDS": lambda machine, _: machine._extend(machine._since_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._popped(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._since_mark()),
    "GLOBAL": PickleMachine._global,
    "STACK_GLOBAL": PickleMachine._stack_global,
    "BINPERSID": PickleMachine._persistent,
    "BUILD": PickleMachine._build,
}
