"""Reads the PTX that nvcc writes into functions of instructions whose operands are resolved.

The language is that of NVIDIA's PTX ISA, sections 4 (syntax), 5 (state spaces) and 7 (calls), as
far as nvcc uses it for csrc/cuda. Everything else is an error that names the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """The program breaks a rule of PTX, or uses a part of it that is not known here."""


@dataclass(frozen=True, eq=False)
class Register:
    """A variable that each thread has for itself: a register, or a parameter of a .func."""

    name: str
    type: str  # such as "b32" or "pred"


@dataclass(frozen=True)
class Special:
    name: str  # such as "%tid.x"


@dataclass(frozen=True)
class Number:
    text: str


@dataclass(frozen=True)
class Symbol:
    """The address of a shared variable or of a kernel's parameter; a label; a function."""

    name: str


@dataclass(frozen=True)
class Negated:
    register: Register


@dataclass(frozen=True)
class Pair:
    """``d|p``: a result and the predicate that comes with it."""

    first: Register
    second: Register


@dataclass(frozen=True)
class Address:
    base: Register | Symbol
    offset: int


Scalar = Register | Special | Number | Symbol | Negated


@dataclass(frozen=True)
class Vector:
    elements: tuple[Scalar, ...]


Operand = Scalar | Pair | Address | Vector


@dataclass(frozen=True)
class Instruction:
    line: int
    guard: Register | None
    guard_negated: bool
    opcode: str  # with its modifiers, as written
    operands: tuple[Operand, ...]


@dataclass
class Function:
    """``parameters`` of an entry are its constants: offset and size in bytes by name."""

    name: str
    is_entry: bool
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    arguments: list[Register] = field(default_factory=list)  # of a .func
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction that follows

    @property
    def num_parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


@dataclass
class Module:
    functions: dict[str, Function] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # alignment, size in bytes


_TOKEN = re.compile(r'"[^"]*"|[.%$A-Za-z_][\w$.]*|-?\d\w*|[^\s\w]|\n')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def size_of(type_name: str) -> int:
    """Bytes of a value of a type such as "u16"; a packed "bf16x2" has two halves."""
    match = re.fullmatch(r"(?:bf|[busf])(8|16|32|64)(x2)?", type_name)
    if match is None:
        raise PtxError(f"unknown type .{type_name}")
    return _SIZES[match[1]] * (2 if match[2] else 1)


class _Parser:
    def __init__(self, text: str) -> None:
        text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
        self.tokens: list[tuple[str, int]] = []
        line = 1
        for token in _TOKEN.findall(text):
            if token == "\n":
                line += 1
            else:
                self.tokens.append((token, line))
        self.tokens.append(("", line))
        self.position = 0
        self.module = Module()
        # Of the function being read: variables by name, and numbered registers (%r<9>) by prefix.
        self.scopes: list[dict[str, Register]] = []
        self.prefixes: dict[str, tuple[str, int]] = {}
        self.function = Function("", False)

    @property
    def next(self) -> str:
        return self.tokens[self.position][0]

    @property
    def line(self) -> int:
        return self.tokens[self.position][1]

    def error(self, message: str) -> PtxError:
        return PtxError(f"line {self.line}: {message}")

    def take(self, wanted: str | None = None) -> str:
        token = self.next
        if not token or (wanted is not None and token != wanted):
            raise self.error(f"{wanted or 'more'} was expected, not {token!r}")
        self.position += 1
        return token

    def take_if(self, wanted: str) -> bool:
        if self.next != wanted:
            return False
        self.position += 1
        return True

    def take_line(self) -> Iterator[str]:
        line = self.line
        while self.next and self.line == line:
            yield self.take()

    def parse(self) -> Module:
        while self.next:
            token = self.take()
            if token in (".version", ".target", ".address_size"):
                list(self.take_line())
            elif token in (".visible", ".weak"):
                continue
            elif token == ".shared":
                name, alignment, size = self.declared_array()
                self.module.shared[name] = (alignment, size)
                self.take(";")
            elif token in (".entry", ".func"):
                self.parse_function(is_entry=token == ".entry")
            else:
                raise self.error(f"unknown directive {token}")
        return self.module

    def declared_array(self) -> tuple[str, int, int]:
        """Name, alignment and size of ``.align 8 .b8 name[40]`` or ``.b64 name``."""
        alignment = int(self.take()) if self.take_if(".align") else 0
        size = size_of(self.take()[1:])
        name = self.take()
        alignment = alignment or size
        if self.take_if("["):
            size *= int(self.take())
            self.take("]")
        return name, alignment, size

    def parse_function(self, is_entry: bool) -> None:
        self.function = function = Function(self.take(), is_entry)
        self.scopes, self.prefixes = [{}], {}
        self.take("(")
        while not self.take_if(")"):
            self.take(".param")
            if is_entry:
                name, alignment, size = self.declared_array()
                offset = -(-function.num_parameter_bytes // alignment) * alignment
                function.parameters[name] = (offset, size)
            else:
                function.arguments.append(self.declare(self.take()[1:], self.take()))
            self.take_if(",")
        while self.next in (".maxntid", ".minnctapersm"):
            list(self.take_line())
        if self.take_if(";"):
            return  # a declaration; the definition follows
        self.module.functions[function.name] = function
        self.take("{")
        while self.scopes:
            self.parse_statement()

    def declare(self, type_name: str, name: str) -> Register:
        register = Register(name, type_name)
        self.scopes[-1][name] = register
        return register

    def parse_statement(self) -> None:
        token = self.next
        if self.take_if("{"):
            self.scopes.append({})
        elif self.take_if("}"):
            self.scopes.pop()
        elif self.take_if(".pragma"):
            hint = self.take()  # to ptxas; changes no result
            if not hint.startswith(('"nounroll"', '"used_bytes_mask ')):
                raise self.error(f"unknown pragma {hint}")
            self.take(";")
        elif token in (".reg", ".param"):
            self.take()
            self.parse_registers(self.take()[1:])
        elif self.tokens[self.position + 1][0] == ":":
            self.function.labels[self.take()] = len(self.function.instructions)
            self.take(":")
        else:
            self.parse_instruction()

    def parse_registers(self, type_name: str) -> None:
        while True:
            name = self.take()
            if self.take_if("<"):
                self.prefixes[name] = (type_name, int(self.take()))
                self.take(">")
            else:
                self.declare(type_name, name)
            if not self.take_if(","):
                break
        self.take(";")

    def parse_instruction(self) -> None:
        line, guard, guard_negated = self.line, None, False
        if self.take_if("@"):
            guard_negated = self.take_if("!")
            guard = self.register(self.take())
        opcode = self.take()
        operands: list[Operand] = []
        while not self.take_if(";"):
            if self.take_if("("):  # the arguments of a call
                while not self.take_if(")"):
                    operands.append(self.operand())
                    self.take_if(",")
            else:
                operands.append(self.operand())
            self.take_if(",")
        self.function.instructions.append(
            Instruction(line, guard, guard_negated, opcode, tuple(operands))
        )

    def operand(self) -> Operand:
        if self.take_if("["):
            base = self.scalar()
            if not isinstance(base, Register | Symbol):
                raise self.error(f"{base} is no address")
            offset = int(self.take(), 0) if self.take_if("+") else 0
            self.take("]")
            return Address(base, offset)
        if self.take_if("{"):
            elements = [self.scalar()]
            while self.take_if(","):
                elements.append(self.scalar())
            self.take("}")
            return Vector(tuple(elements))
        if self.take_if("!"):
            return Negated(self.register(self.take()))
        first = self.scalar()
        if not self.take_if("|"):
            return first
        if not isinstance(first, Register):
            raise self.error(f"{first} is no register")
        return Pair(first, self.register(self.take()))

    def scalar(self) -> Scalar:
        token = self.take()
        if re.match(r"-?\d", token):
            return Number(token)
        found = self.find(token)
        if found is not None:
            return found
        return Special(token) if token.startswith("%") else Symbol(token)

    def register(self, name: str) -> Register:
        found = self.find(name)
        if found is None:
            raise self.error(f"{name} is not declared")
        return found

    def find(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        match = re.fullmatch(r"(%[a-z]+)(\d+)", name)
        if match is None or match[1] not in self.prefixes:
            return None
        type_name, count = self.prefixes[match[1]]
        if int(match[2]) >= count:
            raise self.error(f"{name} is not declared")
        self.scopes[0][name] = Register(name, type_name)
        return self.scopes[0][name]


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        PtxError: something is not known here; the message names the line.
    """
    return _Parser(text).parse()
