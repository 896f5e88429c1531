"""Petastorm's schema, read without running anything of it.

Petastorm keeps its schema as a pickle. Here a pickle is data: a small machine goes through its instructions, builds plain lists,
dicts and `Named` values, and knows no instruction that imports or calls. What else it holds is refused by name.

Source: Python's pickletools.py, the description of each opcode; Petastorm 0.13, unischema.py and codecs.py, what is pickled.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from cvdist.errors import DataError

MAX_BYTES = 16 << 20
UNISCHEMA_KEY = b"dataset-toolkit.unischema.v1"
CODECS = ("CompressedImageCodec", "CompressedNdarrayCodec", "NdarrayCodec", "ScalarCodec")
NUMPY = (
    "bool_", "bytes_", "datetime64", "dtype", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "str_", "string_",
    "uint16", "uint32", "uint64", "uint8", "unicode_",
)  # fmt: skip
SPARK = (
    "BinaryType", "BooleanType", "ByteType", "DateType", "DecimalType", "DoubleType", "FloatType", "IntegerType", "LongType",
    "ShortType", "StringType", "TimestampType",
)  # fmt: skip
ALLOWED = frozenset(
    [
        *(("petastorm.unischema", name) for name in ("Unischema", "UnischemaField")),
        *(("petastorm.codecs", name) for name in CODECS),
        *(("numpy", name) for name in NUMPY),
        *(("pyspark.sql.types", name) for name in SPARK),
        ("pyspark.serializers", "_restore"),  # how older versions of Spark have named tuples pickled
        ("collections", "OrderedDict"),
        ("decimal", "Decimal"),
        ("copy_reg", "_reconstructor"),
        ("copyreg", "_reconstructor"),
        *((module, name) for module in ("__builtin__", "builtins") for name in ("object", "tuple")),
    ]
)


@dataclasses.dataclass(eq=False, repr=False)
class Named:
    """Something of a name, made of arguments, with a state; nothing has been made in fact."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Field:
    """A column of a Petastorm data set; `codec` is None for plain values, `num_dimensions` 0 for scalars."""

    name: str
    codec: str | None
    dtype: str
    num_dimensions: int


class Mark:
    """Where a list of operands begins on the stack."""


class Machine:
    """Goes through a pickle's instructions."""

    def __init__(self, url: str) -> None:
        """Begins with an empty stack; `url` is for messages."""
        self._url = url
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Returns what the pickle describes.

        Raises:
            DataError: It asks for a name or an instruction that is not on the list.
            ValueError, LookupError, TypeError: It is no whole pickle.
        """
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                break
            if name in PUSHED:
                self._stack.append(argument)
            elif name in CONSTANTS:
                self._stack.append(CONSTANTS[name]())
            elif name not in ("PROTO", "FRAME"):
                step = STEPS.get(name)
                if step is None:
                    raise DataError(
                        f"{self._url}: its pickled schema holds the instruction {name}; expected a schema that Petastorm wrote;"
                        " do not use this data set, or write its metadata again"
                    )
                step(self, argument)
        return self._stack[-1]

    def _named(self, module: object, name: object) -> Named:
        if (module, name) not in ALLOWED:
            raise DataError(
                f"{self._url}: its pickled schema asks for {f'{module}.{name}'[:100]!a}; expected names of Petastorm's schema alone;"
                " do not use this data set, or write its metadata again"
            )
        return Named(str(name))

    def take_name(self, argument: Any) -> None:
        """GLOBAL: module and name with a space between them."""
        self._stack.append(self._named(*argument.split(" ", 1)))

    def take_name_from_stack(self, _: Any) -> None:
        """STACK_GLOBAL."""
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(
            self._named(module, name) if isinstance(module, str) and isinstance(name, str) else self._named("?", "?")
        )

    def make(self, _: Any) -> None:
        """NEWOBJ and REDUCE: something of a name and its arguments."""
        arguments, named = self._stack.pop(), self._stack.pop()
        if not isinstance(named, Named) or named.arguments or not isinstance(arguments, tuple):
            raise ValueError("nothing to make")
        if named.name == "_reconstructor":
            # Protocols 0 and 1: the class, a class that it is made from, and the values of a tuple.
            named, arguments = arguments[0], arguments[2] if isinstance(arguments[2], tuple) else ()
        elif named.name == "_restore":  # (name, fields, values)
            named, arguments = Named(arguments[0]), tuple(arguments[2])
        self._stack.append(Named(named.name, arguments))

    def build(self, _: Any) -> None:
        """BUILD: the state of what was made."""
        state = self._stack.pop()
        self._stack[-1].state = state

    def gather(self) -> list[Any]:
        """Pops the operands down to the mark."""
        operands = []
        while not isinstance(operand := self._stack.pop(), Mark):
            operands.append(operand)
        return operands[::-1]

    def make_tuple(self, count: int | None) -> None:
        """TUPLE, TUPLE1, TUPLE2, TUPLE3, EMPTY_TUPLE."""
        operands = self.gather() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self._stack.append(tuple(operands))

    def add_items(self, operands: list[Any]) -> None:
        """SETITEM and SETITEMS, on a dict or an OrderedDict."""
        target = self._stack[-1].items if isinstance(self._stack[-1], Named) else self._stack[-1]
        for key, value in zip(operands[::2], operands[1::2], strict=True):
            if not isinstance(key, str) or not isinstance(target, dict):
                raise ValueError("a key that is no text")
            target[key] = value

    def append(self, operands: list[Any]) -> None:
        """APPEND and APPENDS."""
        if not isinstance(self._stack[-1], list):
            raise ValueError("nothing to append to")
        self._stack[-1].extend(operands)

    def put(self, key: int | None) -> None:
        """PUT, BINPUT, LONG_BINPUT, MEMOIZE."""
        self._memo[len(self._memo) if key is None else key] = self._stack[-1]

    def get(self, key: int) -> None:
        """GET, BINGET, LONG_BINGET."""
        self._stack.append(self._memo[key])

    def pop(self) -> Any:
        """Takes the topmost operand."""
        return self._stack.pop()

    def push(self, value: Any) -> None:
        """Adds an operand."""
        self._stack.append(value)


# fmt: off
PUSHED = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
])
# fmt: on
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": Mark,
}
STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "GLOBAL": Machine.take_name,
    "STACK_GLOBAL": Machine.take_name_from_stack,
    "NEWOBJ": Machine.make,
    "REDUCE": Machine.make,
    "BUILD": Machine.build,
    "TUPLE": lambda machine, _: machine.make_tuple(None),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "LIST": lambda machine, _: machine.push(machine.gather()),
    "DICT": lambda machine, _: _dict(machine),
    "SETITEM": lambda machine, _: machine.add_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.add_items(machine.gather()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.gather()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
}


def _dict(machine: Machine) -> None:
    """DICT: the operands down to the mark are keys and values."""
    operands = machine.gather()
    machine.push({})
    machine.add_items(operands)


def read_unischema(data: bytes, url: str) -> list[Field]:
    """Returns the columns that a pickled Unischema describes.

    Args:
        data: The pickle.
        url: Where it was found, for messages.

    Raises:
        DataError: It is none, or asks for anything that is not part of a schema.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes")
        schema = Machine(url).run(data)
        fields = schema.state["_fields"]
        pairs = fields.items.items() if fields.items else fields.arguments[0]
        if schema.name != "Unischema":
            raise ValueError("no Unischema")
        return [_field(field) for _, field in pairs]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{url}: its pickled schema cannot be read ({type(error).__name__}: {str(error)[:100]!a}); expected one that Petastorm"
            " wrote; write its metadata again"
        ) from None


def _field(field: Named) -> Field:
    """Reads a pickled UnischemaField: name, type, shape, codec, nullable."""
    name, dtype, shape, codec = field.arguments[:4]
    if field.name != "UnischemaField" or not isinstance(name, str) or not isinstance(shape, tuple):
        raise ValueError("no UnischemaField")
    kind = dtype.arguments[0] if dtype.name == "dtype" else dtype.name
    return Field(
        name, codec.name if isinstance(codec, Named) else None, kind if isinstance(kind, str) else "?", len(shape)
    )
