"""A pickle run on descriptions of its values, before anybody runs it on values.

A pickle that names nothing but harmless classes still harms whoever loads it. A key that is nested too deeply overflows
the stack when it is hashed, and one of pairs (t, t) takes twice as long for each. Calls copy what a few bytes name, and
can do so any number of times. So the machine follows the opcodes as an unpickler does. Of each value it keeps the kind,
the depth, and how many bytes would spell it with everything that it repeats written out, and it refuses what takes more
than the size of the pickle explains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dora_fx.files.pickle_opcodes import opcodes
from dora_fx.files.regular_file import UnsafeFileError, shortened

_DEEPEST = 100
# Picklers write a value once and name it after that; a name has few bytes, and stands for some hundred in real files.
_MOST_REPEATED, _ALWAYS_ALLOWED = 32, 1 << 20
# Larger integers have the hashes of smaller ones, and a dict of such keys takes the square of its size.
_LARGEST_KEY = 2**61 - 2

_PLAIN = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"})
_INTEGERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1"})
_TEXTS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"})
_BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})
_KEYS = frozenset({"text", "integer", "plain"})


@dataclass(eq=False, slots=True)
class Described:
    """What the machine knows of a value.

    Attributes:
        kind: integer, text, bytes, plain, tuple, list, dict, class, or a name that a format's own calls give.
        content: an integer, a text, the name of a class; the parts of a tuple; the keys of a dict; of a list, whether
            all of it could be keys.
        depth: of values in it.
        span: the bytes that spell it, with what it repeats.
        is_held: whether another value has it; from then on it no longer changes, so that none holds itself.
    """

    kind: str
    content: Any = None
    depth: int = 0
    span: int = 1
    is_held: bool = False


class PickleMachine(ABC):
    """Runs one pickle; a format says what its classes are, and what calling them gives."""

    def __init__(self, data: bytes, where: str, known: frozenset[str]) -> None:
        """Take the bytes of a pickle, where they come from, for messages, and the names of the opcodes to accept."""
        self.where = where
        self._data, self._known = data, known
        self._stack: list[Described] = []
        self._marks: list[int] = []
        self._memo: dict[int, Described] = {}
        self._most = _ALWAYS_ALLOWED + _MOST_REPEATED * len(data)
        self._called = 0

    @abstractmethod
    def named(self, module: str, name: str) -> Described:
        """The class of a name; raises UnsafeFileError for one that is not expected in such a file."""

    @abstractmethod
    def called(self, name: Any, arguments: Sequence[Described]) -> Described:
        """The result of calling a class by the name that `named` gave it; depth and span are not yet known."""

    @abstractmethod
    def built(self, found: Described, state: Described) -> None:
        """Check the state that a value is given."""

    def persistent(self, found: Described) -> Described:
        """The value that the reader of the file gives for one that the pickle names."""
        raise self.unexpected(found, "no values from outside it")

    def is_key(self, found: Described) -> bool:
        """Tell whether a value can be a key: it is hashed in a time that its own bytes explain."""
        return found.kind in _KEYS and not (found.kind == "integer" and abs(found.content) > _LARGEST_KEY)

    def run(self) -> Described:
        """Follow the pickle to its end, and return what is known of its value.

        Raises:
            UnsafeFileError: it is damaged, names what it should not, or would take more than its own size explains.
        """
        try:
            for name, argument in opcodes(self._data, self.where):
                if name not in self._known:
                    raise UnsafeFileError(
                        f"{self.where}: found the opcode {name} in its pickle, expected those that such files have"
                    )
                self._step(name, argument)
            return self._stack[-1]
        except (IndexError, KeyError) as error:
            raise UnsafeFileError(f"{self.where}: found no whole pickle (a value is missing)") from error

    def unexpected(self, found: Described, expected: str) -> UnsafeFileError:
        shown = shortened(found.content) if found.kind in ("integer", "text") else f"a {found.kind}"
        return UnsafeFileError(f"{self.where}: found {shown} in its pickle, expected {expected}")

    def _step(self, name: str, argument: Any) -> None:
        if name in _TEXTS or name in _BYTES:
            self._stack.append(Described("text" if name in _TEXTS else "bytes", argument, span=1 + len(argument)))
        elif name in _INTEGERS:
            self._stack.append(Described("integer", argument, span=1 + argument.bit_length() // 8))
        elif name in _PLAIN:
            self._stack.append(Described("plain"))
        elif name in _EMPTY:
            self._stack.append(Described(*_EMPTY[name]()))
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)

    def _popped(self, count: int) -> list[Described]:
        """The last values of the stack, off it; none from before the last mark."""
        begin = len(self._stack) - count
        if begin < (self._marks[-1] if self._marks else 0):
            raise IndexError
        parts = self._stack[begin:]
        del self._stack[begin:]
        return parts

    def _since_mark(self) -> list[Described]:
        begin = self._marks.pop()
        parts = self._stack[begin:]
        del self._stack[begin:]
        return parts

    def _hold(self, holder: Described, parts: Sequence[Described]) -> None:
        for part in parts:
            part.is_held = True
        if holder.is_held:
            raise self.unexpected(holder, "values that do not change any more, since others hold them")
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

    def _tuple(self, parts: list[Described]) -> None:
        found = Described("tuple", parts)
        self._hold(found, parts)
        self._stack.append(found)

    def _extend(self, parts: list[Described]) -> None:
        found = self._stack[-1]
        if found.kind != "list":
            raise self.unexpected(found, "a list to append to")
        found.content = found.content and all(self.is_key(part) for part in parts)
        self._hold(found, parts)

    def _set_items(self, parts: list[Described]) -> None:
        found, keys = self._stack[-1], parts[::2]
        if found.kind != "dict" or len(parts) % 2:
            raise self.unexpected(found, "a dict to fill, with a value for each key")
        for key in keys:
            if not self.is_key(key):
                raise self.unexpected(key, "text or integers as the keys of a dict")
        found.content.extend(key.content for key in keys)
        self._hold(found, parts)

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
        self._called += arguments.span
        self._at_most(self._called)
        result = self.called(function.content, arguments.content)
        result.depth, result.span = max(result.depth, arguments.depth), result.span + arguments.span
        self._stack.append(result)

    def _persistent(self, _: Any) -> None:
        (found,) = self._popped(1)
        self._stack.append(self.persistent(found))

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
