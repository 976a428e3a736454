"""Pickles read as data: names come from an allow-list, nothing is imported, nothing is called.

A small machine runs the opcodes that `torch.save` writes (protocols 1 to 5) on a stack of plain
Python containers. A name outside the allow-list ends it before anything is done with the name.
Work and memory are linear in the length of the pickle: an opcode adds one object, and what a
constructor copies is counted.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

from adapterkit import strangers
from adapterkit.containers.pickle_names import (
    PLAIN_NAMES,
    Constructor,
    Record,
    RecordClass,
    Refused,
    checked_key,
)
from adapterkit.errors import FormatError, UnsafePickleError

if TYPE_CHECKING:
    from pathlib import Path

MAX_PICKLE = 64 << 20
# 25 for each of 80,000 tensors; the adapters with the most experts have as many.
MAX_OPCODES = 2_000_000
# Empty containers are a byte each in the file and up to 216 in memory.
MAX_CONTAINERS = 100_000
RESAVE = (
    "if you trust the file, load it in torch with weights_only=False, where nothing can be lost, "
    "and save its tensors with safetensors.torch.save_file"
)
_HIGHEST_PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a pickle may hold.

    Attributes:
        opcodes: steps of the machine.
        containers: dicts, lists, sets and records.
        advice: what to do about a pickle that is refused.
    """

    opcodes: int
    containers: int = MAX_CONTAINERS
    advice: str = RESAVE


def read_pickle(
    data: bytes,
    *,
    names: Mapping[tuple[str, str], object],
    persistent: Callable[[object], object],
    path: Path,
    bounds: Bounds | None = None,
) -> object:
    """Return the object that a pickle describes, made of plain containers and of what `names` give.

    The result may share containers, and a container may hold itself: the caller looks.

    Args:
        data: the pickle.
        names: (module, name) -> the object to put in its place, beside those of `PLAIN_NAMES`.
        persistent: makes an object of a persistent id; raises ValueError if it makes no sense.
        path: the file that messages name.
        bounds: the most that it may hold, if it is not what `torch.save` writes.

    Raises:
        UnsafePickleError: if the pickle names or calls anything else.
        FormatError: if it is malformed, too long, or uses an opcode that `torch.save` does not.
    """
    bounds = bounds or Bounds(MAX_OPCODES)
    if len(data) > MAX_PICKLE:
        raise FormatError(
            f"its pickle has {len(data)} bytes, the most is {MAX_PICKLE}; {bounds.advice}",
            path=path,
        )
    machine = _Machine(data, {**PLAIN_NAMES, **names}, persistent, path, bounds)
    stream = io.BytesIO(data)
    for _ in range(bounds.opcodes):
        position = stream.tell()
        try:
            if machine.step(stream):
                return machine.result(len(data) - stream.tell())
        except ValueError as error:
            raise FormatError(
                f"its pickle is malformed at byte {position}: {error}", path=path
            ) from error
    raise FormatError(
        f"its pickle has more than {bounds.opcodes} opcodes; {bounds.advice}", path=path
    )


def _argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if opcode.arg is None:
        return None
    if opcode.arg.n == pickletools.UP_TO_NEWLINE:
        # pickletools decodes escapes in such lines, which the interpreter's own machine does not.
        start = stream.tell()
        if b"\\" in stream.readline() + stream.readline():
            raise ValueError("a name holds a backslash")
        stream.seek(start)
    return opcode.arg.reader(stream)


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    __slots__ = (
        "_bounds",
        "_budget",
        "_containers",
        "_marks",
        "_memo",
        "_names",
        "_path",
        "_persistent",
        "_stack",
    )

    def __init__(
        self,
        data: bytes,
        names: Mapping[tuple[str, str], object],
        persistent: Callable[[object], object],
        path: Path,
        bounds: Bounds,
    ) -> None:
        self._bounds = bounds
        self._names = names
        self._persistent = persistent
        self._path = path
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._containers = 0
        # Repeated calls on one memoised argument would otherwise copy it any number of times.
        self._budget = 1000 + 4 * len(data)

    def step(self, stream: io.BytesIO) -> bool:
        """Run one opcode; return whether it was the last."""
        code = stream.read(1)
        if not code:
            raise ValueError("it ends without STOP")
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise ValueError(f"opcode 0x{code.hex()} does not exist")
        operation = _OPERATIONS.get(opcode.name)
        if operation is None:
            self._refuse(opcode.name, stream)
        elif opcode.name == "STOP":
            return True
        elif opcode.name == "GLOBAL":
            # pickletools takes backslashes here for escapes, Python's own loader does not.
            self._ask(*_read_name(stream))
        else:
            operation(self, _argument(opcode, stream))
        return False

    def result(self, trailing: int) -> object:
        """Return the one object left."""
        if trailing:
            raise ValueError(f"{trailing} bytes follow STOP")
        if self._marks or len(self._stack) != 1:
            raise ValueError("STOP does not leave one object")
        return self._stack[0]

    def push_literal(self, value: object) -> None:
        if isinstance(value, str) and not value.isascii():
            # A lone surrogate cannot be printed or written again; encode() is a ValueError.
            value.encode()
        self._stack.append(bytes(value) if isinstance(value, bytearray) else value)

    def ask_for_stacked(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("STACK_GLOBAL without two strings")  # noqa: TRY004  (as any bad pickle)
        self._ask(module, name)

    def call(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Constructor):
            self._unsafe(f"calls {_shown(function)}, which is no known constructor")
        if type(arguments) is not tuple:
            raise ValueError("REDUCE without a tuple of arguments")
        arguments = cast("tuple[object, ...]", arguments)
        self._budget -= sum(len(item) for item in arguments if isinstance(item, Sized))
        if self._budget < 0:
            raise ValueError("its constructors copy more than the pickle holds")
        made = function.build(arguments)
        # Not the dictionary of hooks that every tensor has, and loses again.
        if isinstance(made, set | frozenset):
            self.push_container(cast("object", made))
        else:
            self._stack.append(made)

    def load_persistent(self, _: None) -> None:
        self._stack.append(self._persistent(self._pop()))

    def make_record(self, _: None) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, RecordClass):
            self._unsafe("makes an object with NEWOBJ")
        if type(arguments) is not tuple:
            raise ValueError("NEWOBJ without a tuple of arguments")
        self.push_container(Record(kind.name, cast("tuple[object, ...]", arguments)))

    def set_state(self, _: None) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record) and target.state is None:
            target.state = state
        elif type(target) is not dict:
            # `state_dict()` hangs its `_metadata` (module versions) on the OrderedDict.
            self._unsafe(f"sets the state of {_shown(target)}")

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        _insert(self._top(), [key, value])

    def set_items(self, _: None) -> None:
        items = self._pop_mark()
        _insert(self._top(), items)

    def append(self, _: None) -> None:
        item = self._pop()
        _extend(self._top(), [item])

    def extend(self, _: None) -> None:
        items = self._pop_mark()
        _extend(self._top(), items)

    def add_items(self, _: None) -> None:
        items = self._pop_mark()
        target = self._top()
        if type(target) is not set:
            raise ValueError("ADDITEMS to something that is no set")
        cast("set[object]", target).update(map(checked_key, items))

    def mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def make_frozenset(self, _: None) -> None:
        items = self._pop_mark()
        self.push_container(frozenset(map(checked_key, items)))

    def make_tuple(self, _: None) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def take_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def push(self, value: object) -> None:
        self._stack.append(value)

    def push_container(self, value: object) -> None:
        """Push an empty container that will be filled, or not."""
        self._containers += 1
        if self._containers > self._bounds.containers:
            most, advice = self._bounds.containers, self._bounds.advice
            raise ValueError(f"it has more than {most} dicts, lists and sets; {advice}")
        self._stack.append(value)

    def remember(self, index: int) -> None:
        self._memo[index] = self._top()

    def remember_next(self, _: None) -> None:
        self._memo[len(self._memo)] = self._top()

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"memo {index} was never written")
        self._stack.append(self._memo[index])

    def check_protocol(self, version: int) -> None:
        if version > _HIGHEST_PROTOCOL:
            raise ValueError(f"protocol {version} is unknown")

    def ignore(self, _: object) -> None:
        pass

    def _ask(self, module: str, name: str) -> None:
        found = self._names.get((module, name))
        if isinstance(found, Refused):
            raise FormatError(found.reason, path=self._path)
        if found is None:
            asks = _printable(f"{module}.{name}")
            if known := strangers.pickled(asks):
                raise UnsafePickleError(f"{known}; nothing was executed", path=self._path)
            self._unsafe(f"asks for {asks}")
        self._stack.append(found)

    def _refuse(self, opcode: str, stream: io.BytesIO) -> None:
        if opcode == "INST":
            self._unsafe(f"asks for {_printable('.'.join(_read_name(stream)))}")
        if opcode in {"OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}:
            self._unsafe(f"makes an object with {opcode}")
        raise ValueError(f"opcode {opcode} is none that torch.save writes")

    def _unsafe(self, what: str) -> NoReturn:
        raise UnsafePickleError(
            f"its pickle {what}; nothing was executed; {self._bounds.advice}", path=self._path
        )

    def _top(self) -> object:
        if not self._stack:
            raise ValueError("the stack is empty")
        return self._stack[-1]

    def _pop(self) -> object:
        if not self._stack:
            raise ValueError("the stack is empty")
        return self._stack.pop()

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise ValueError("there is no mark")
        items, self._stack = self._stack, self._marks.pop()
        return items


def _read_name(stream: io.BytesIO) -> tuple[str, str]:
    lines = stream.readline(), stream.readline()
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("a name without an end")
    module, name = (line[:-1].decode() for line in lines)
    return module, name


def _insert(target: object, items: list[object]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("SETITEMS without a dict, or a key without a value")
    target = cast("dict[object, object]", target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if checked_key(key) in target:
            raise ValueError(f"key {_printable(str(key))} is given twice")
        target[key] = value


def _extend(target: object, items: list[object]) -> None:
    if type(target) is not list:
        raise ValueError("APPENDS to something that is no list")
    cast("list[object]", target).extend(items)


def _shown(value: object) -> str:
    named = isinstance(value, (Constructor, RecordClass))
    return value.name if named else f"a {type(value).__name__}"


def _printable(text: str) -> str:
    shown = text[:100].encode("unicode_escape").decode("ascii")
    return f"{shown}..." if len(text) > len(text[:100]) else shown


_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
_LITERALS = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS, _Machine.push_literal),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),  # noqa: FBT003  (a value)
    "NEWFALSE": lambda machine, _: machine.push(False),  # noqa: FBT003  (a value)
    "EMPTY_DICT": lambda machine, _: machine.push_container({}),
    "EMPTY_LIST": lambda machine, _: machine.push_container([]),
    "EMPTY_SET": lambda machine, _: machine.push_container(set[object]()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.take_tuple(1),
    "TUPLE2": lambda machine, _: machine.take_tuple(2),
    "TUPLE3": lambda machine, _: machine.take_tuple(3),
    "TUPLE": _Machine.make_tuple,
    "FROZENSET": _Machine.make_frozenset,
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.remember_next,
    "PROTO": _Machine.check_protocol,
    "FRAME": _Machine.ignore,
    "GLOBAL": _Machine.ignore,
    "STACK_GLOBAL": _Machine.ask_for_stacked,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.make_record,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.load_persistent,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.add_items,
    "STOP": _Machine.ignore,
}
