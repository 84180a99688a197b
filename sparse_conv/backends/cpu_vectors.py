"""The vector instructions of the CPU loops, written as LLVM intermediate code.

Numba vectorises loops, but can't be told to keep a tile of sums in registers across a
loop whose length is only known at run time. These few functions can. They know vectors
and addresses; neither convolutions nor threads.

A cell is one vector of `LANES` numbers; arrays of cells must begin at a multiple of
`VECTOR_BYTES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, extending, types
from numba.core.registry import cpu_target

from sparse_conv.backends.cpu_jobs import BLOCK_BYTES

# Their type annotations say neither that a decorated function loses its first argument
# nor which attributes the values of LLVM code have.
intrinsic: Any = extending.intrinsic
_Value = Any
_Builder = Any

_INT64 = ir.IntType(64)


def _choose_widths() -> tuple[int, int]:
    """Bytes of a vector and cells of a tile, from what Numba compiles for.

    They follow from nothing else: Numba files its compiled code under these very
    features, so that code for other widths is never loaded.
    """
    context: Any = cpu_target.target_context
    triple, _, features = context.codegen().magic_tuple()
    enabled = set(features.split(","))
    if "+avx512f" in enabled:
        # 32 registers: the sums of 10 cells, twice, and the operands in flight.
        return 64, 10
    if "+avx" in enabled:
        return 32, 12
    if triple.startswith(("aarch64", "arm64")):
        # A cell takes two of the 32 registers.
        return 32, 12
    return 32, 6


VECTOR_BYTES, TILE_CELLS = _choose_widths()

LANE_BLOCKS = VECTOR_BYTES // BLOCK_BYTES

_SCALARS = {
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
    "int32": ir.IntType(32),
}


def lanes(itemsize: int) -> int:
    """Numbers of `itemsize` bytes in one cell."""
    return VECTOR_BYTES // itemsize


class _Vectors:
    """What the emitters below share: the element type of a call and its operations."""

    def __init__(self, builder: _Builder, dtype: str):
        self.builder = builder
        self.scalar = _SCALARS[dtype]
        self.itemsize = np.dtype(dtype).itemsize
        self.lanes = lanes(self.itemsize)
        self.block_lanes = BLOCK_BYTES // self.itemsize
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.is_float = dtype.startswith("float")

    def cells(self, numbers: _Value, at: _Value) -> _Value:
        """Pointer to cell `at` of an array of cells."""
        return self.builder.gep(
            self.builder.bitcast(numbers, self.type.as_pointer()), [at]
        )

    def zero(self) -> ir.Constant:
        element = 0.0 if self.is_float else 0
        return ir.Constant(self.type, [element] * self.lanes)

    def load_cell(self, pointer: _Value, number: int) -> _Value:
        address = self.builder.gep(pointer, [_INT64(number)])
        return self.builder.load(address, align=VECTOR_BYTES)

    def store_cell(self, value: _Value, pointer: _Value, number: int) -> None:
        address = self.builder.gep(pointer, [_INT64(number)])
        self.builder.store(value, address, align=VECTOR_BYTES)

    def load_block(self, pointer: _Value, number: int, lane: _Value) -> _Value:
        """The lanes of a cell from `lane` on that make up one block."""
        pointer = self.builder.bitcast(pointer, self.scalar.as_pointer())
        place = self.builder.add(lane, _INT64(number * self.lanes))
        address = self.builder.gep(pointer, [place])
        kind = ir.VectorType(self.scalar, self.block_lanes)
        address = self.builder.bitcast(address, kind.as_pointer())
        return self.builder.load(address, align=BLOCK_BYTES)

    def join(self, a: _Value, b: _Value) -> _Value:
        """The lanes of `a`, then those of `b`."""
        return self.shuffle(a, b, range(2 * a.type.count))

    def splat(self, value: _Value) -> _Value:
        undefined = ir.Constant(self.type, ir.Undefined)
        single = self.builder.insert_element(undefined, value, ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(single, undefined, mask)

    def add(self, a: _Value, b: _Value) -> _Value:
        return self.builder.fadd(a, b) if self.is_float else self.builder.add(a, b)

    def multiply_add(self, a: _Value, b: _Value, c: _Value) -> _Value:
        """`a * b + c`, rounded once where the processor does that as fast."""
        if not self.is_float:
            return self.builder.add(self.builder.mul(a, b), c)
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.itemsize}"
        kind = ir.FunctionType(self.type, [self.type] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [a, b, c])

    def shuffle(self, a: _Value, b: _Value, places: Sequence[int]) -> _Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
        return self.builder.shuffle_vector(a, b, mask)

    def first_lanes(self, count: _Value) -> _Value:
        """A mask of the lanes below `count`."""
        builder, int32 = self.builder, ir.IntType(32)
        undefined = ir.Constant(ir.VectorType(int32, self.lanes), ir.Undefined)
        single = builder.insert_element(
            undefined, builder.trunc(count, int32), int32(0)
        )
        counts = self.shuffle(single, undefined, [0] * self.lanes)
        numbers = ir.Constant(undefined.type, list(range(self.lanes)))
        return builder.icmp_signed("<", numbers, counts)

    def masked_load(self, pointer: _Value, mask: _Value) -> _Value:
        """Loads the masked lanes; zeros in the others."""
        kind = ir.FunctionType(
            self.type, [pointer.type, ir.IntType(32), mask.type, self.type]
        )
        function = self._masked_function("load", kind)
        align = ir.IntType(32)(self.itemsize)
        return self.builder.call(function, [pointer, align, mask, self.zero()])

    def masked_store(self, value: _Value, pointer: _Value, mask: _Value) -> None:
        """Stores the masked lanes."""
        kind = ir.FunctionType(
            ir.VoidType(), [self.type, pointer.type, ir.IntType(32), mask.type]
        )
        function = self._masked_function("store", kind)
        align = ir.IntType(32)(self.itemsize)
        self.builder.call(function, [value, pointer, align, mask])

    def _masked_function(self, name: str, kind: ir.FunctionType) -> _Value:
        element = ("f" if self.is_float else "i") + str(8 * self.itemsize)
        vector = f"v{self.lanes}{element}"
        # LLVM has pointers without a type since version 15, and names them p0.
        name = f"llvm.masked.{name}.{vector}.p0"
        return cgutils.get_or_insert_function(self.builder.module, kind, name)

    def stream_store(self, value: _Value, pointer: _Value) -> None:
        """Stores to aligned memory that will not be read soon."""
        store = self.builder.store(value, pointer, align=VECTOR_BYTES)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", self.builder.module.add_metadata([one]))

    def transpose(self, rows: list[_Value]) -> list[_Value]:
        """Transposes squares that lie side by side, by swapping ever larger blocks.

        Args:
            rows: As many as the squares are wide; a power of two.
        """
        rows, lane_numbers, distance = list(rows), range(self.lanes), 1
        while distance < len(rows):
            for i in range(len(rows)):
                if i & distance:
                    continue
                a, b = rows[i], rows[i + distance]
                rows[i] = self.shuffle(a, b, [
                    j if not j & distance else self.lanes + j - distance
                    for j in lane_numbers
                ])  # fmt: skip
                rows[i + distance] = self.shuffle(a, b, [
                    j + distance if not j & distance else self.lanes + j
                    for j in lane_numbers
                ])  # fmt: skip
            distance *= 2
        return rows


class _Routine(NamedTuple):
    """A function that Numba's code calls: its arguments' kinds, and what emits it."""

    kinds: tuple[str, ...]
    emit: Callable[..., None]


_ROUTINES: dict[str, _Routine] = {}


def _routine(**kinds: str) -> Callable[[Callable[..., None]], Any]:
    """Makes a function of its own of what emits code, and lets Numba's code call it.

    Numba compiles every function anew in each function that calls it. These are
    compiled once, into a module of their own, and called by their names.

    Args:
        kinds: Each argument's: "numbers" (an array of the dtype), "table" (of int32),
            "places" (of int64), "int" (int64) or "flag" (boolean).
    """
    names = tuple(kinds.values())

    def register(emit: Callable[..., None]) -> Any:
        name = emit.__name__
        _ROUTINES[name] = _Routine(names, emit)

        def call(typingctx, *arguments):
            dtype = arguments[names.index("numbers")].dtype

            def codegen(context, builder, signature, args):
                values = [
                    context.make_array(kind)(context, builder, value).data
                    if isinstance(kind, types.Array)
                    else value
                    for kind, value in zip(signature.args, args, strict=True)
                ]
                function_type = ir.FunctionType(
                    ir.VoidType(), [value.type for value in values]
                )
                function = cgutils.get_or_insert_function(
                    builder.module, function_type, symbol(name, str(dtype))
                )
                builder.call(function, values)
                return context.get_dummy_value()

            scalars = {"int": types.int64, "flag": types.boolean}
            taken = (
                scalars.get(kind, argument)
                for kind, argument in zip(names, arguments, strict=True)
            )
            return types.none(*taken), codegen

        call.__name__ = name
        # Numba takes what the signature calls *arguments for a tuple.
        call.__signature__ = inspect.Signature(
            [
                inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                for parameter in ("typingctx", *kinds)
            ]
        )
        return extending.intrinsic(call)

    return register


def symbol(routine: str, dtype: str) -> str:
    """The name of a routine for one dtype in compiled code."""
    return f"sparse_conv_{routine}_{dtype}"


def symbols(dtype: str) -> tuple[str, ...]:
    """The names of all routines for one dtype."""
    return tuple(symbol(name, dtype) for name in _ROUTINES)


def compile_routines(dtype: str) -> bytes:
    """The object code of all routines for one dtype, for the processor that Numba's is.

    Args:
        dtype: As NumPy names it.
    """
    module = ir.Module(name=f"sparse_conv_{dtype}")
    pointers = {
        "numbers": _SCALARS[dtype].as_pointer(),
        "table": ir.IntType(32).as_pointer(),
        "places": _INT64.as_pointer(),
        "int": _INT64,
        "flag": ir.IntType(1),
    }
    for name, (kinds, emit) in _ROUTINES.items():
        kind = ir.FunctionType(ir.VoidType(), [pointers[kind] for kind in kinds])
        function = ir.Function(module, kind, symbol(name, dtype))
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        emit(_Vectors(builder, dtype), *function.args)
        builder.ret_void()
    context: Any = cpu_target.target_context
    triple, cpu, features = context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="default", codemodel="jitdefault",
        jit=True,
    )  # fmt: skip
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return machine.emit_object(parsed)


def _for_each_size(
    builder: _Builder, size: _Value, emit: Callable[[int], None]
) -> None:
    """Emits one version of the code for each size from 1 to TILE_CELLS."""
    done = builder.append_basic_block("done")
    choice = builder.switch(size, done)
    for number in range(1, TILE_CELLS + 1):
        block = builder.append_basic_block(f"cells_{number}")
        choice.add_case(_INT64(number), block)
        builder.position_at_end(block)
        emit(number)
        builder.branch(done)
    builder.position_at_end(done)


def _loop(
    builder: _Builder,
    begin: _Value,
    end: _Value,
    initial: Sequence[_Value],
    body: Callable[[_Value, list[_Value]], Sequence[_Value]],
) -> list[_Value]:
    """A loop from `begin` to `end`, at least once, that carries values along."""
    entry = builder.block
    head = builder.append_basic_block("loop")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.phi(_INT64)
    number.add_incoming(begin, entry)
    carried = [builder.phi(value.type) for value in initial]
    for phi, value in zip(carried, initial, strict=True):
        phi.add_incoming(value, entry)
    results = body(number, carried)
    following = builder.add(number, _INT64(1))
    number.add_incoming(following, builder.block)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, builder.block)
    again = builder.icmp_signed("<", following, end)
    builder.cbranch(again, head, after)
    builder.position_at_end(after)
    return list(results)


def _entry_cells(
    vectors: _Vectors, origin: _Value, offsets: _Value, number: _Value
) -> _Value:
    """Pointer to the cells that entry `number` reads: `origin` moved by its offset."""
    builder = vectors.builder
    offset = builder.load(builder.gep(offsets, [number]))
    return builder.gep(origin, [builder.sext(offset, _INT64)])


@_routine(
    planes="numbers",
    at="int",
    offsets="table",
    values="numbers",
    splits="table",
    lengths="table",
    row="int",
    outputs="int",
    block="int",
    blocks="int",
    sums="numbers",
    size="int",
    bias="numbers",
    bias_at="int",
    fresh="flag",
)
def sum_products(
    vectors,
    planes,
    at,
    offsets,
    values,
    splits,
    lengths,
    row,
    outputs,
    block,
    blocks,
    sums,
    size,
    bias,
    bias_at,
    fresh,
):
    """Adds one block of products to the sums of one tile, for some sparse rows.

    For each output o: `values[i] * planes[at + offsets[i] + j]` for all i from
    `splits[row + o, block]` to `splits[row + o, block + 1]` is added to
    `sums[j * outputs + o]`. Products are summed in chains of `lengths[row + o, block]`,
    and each chain by itself before it joins the rest.

    Args:
        vectors: Where to emit the code.
        planes: Cells to read.
        at: Where to read, in cells (int64).
        offsets: int32, in cells.
        values: Numbers.
        splits: (rows, blocks + 1) int32, flat.
        lengths: (rows, blocks) int32, flat.
        row: The first sparse row (int64).
        outputs: Number of rows, at least one (int64).
        block: int64; `blocks` is their number.
        blocks: int64.
        sums: Cells, added to.
        size: Number of cells j, 1 to TILE_CELLS (int64).
        bias: Numbers.
        bias_at: Where those of the outputs begin (int64).
        fresh: Whether `sums` holds nothing yet, which counts as the bias (boolean).
    """
    builder = vectors.builder
    origin = vectors.cells(planes, at)
    stream = _EntryStream(
        vectors, origin, offsets,
        values,
    )  # fmt: skip
    rows = _Rows(
        vectors, splits, lengths,
        blocks, row, block,
    )  # fmt: skip
    target = vectors.cells(sums, _INT64(0))
    biases = builder.gep(bias, [bias_at])

    def emit(cells: int) -> None:
        def body(output, _):
            begin, end, length = rows.bounds(output)
            first = builder.gep(target, [output])
            places = [
                builder.gep(first, [builder.mul(outputs, _INT64(j))])
                for j in range(cells)
            ]
            # Sums that hold nothing begin with the bias.
            bias_number = builder.load(builder.gep(biases, [output]))
            start = builder.select(fresh, bias_number, vectors.scalar(0))
            totals = [vectors.splat(start)] * cells
            totals = _add_chains(stream, begin, end, length, totals)
            held, store, done = (
                builder.append_basic_block(name) for name in ("held", "store", "stored")
            )
            builder.cbranch(fresh, store, held)
            builder.position_at_end(held)
            # The block's sum joins the others as a whole, or errors would grow.
            for place, total in zip(places, totals, strict=True):
                joined = vectors.add(vectors.load_cell(place, 0), total)
                vectors.store_cell(joined, place, 0)
            builder.branch(done)
            builder.position_at_end(store)
            for place, total in zip(places, totals, strict=True):
                vectors.store_cell(total, place, 0)
            builder.branch(done)
            builder.position_at_end(done)
            return []

        _loop(builder, _INT64(0), outputs, [], body)

    _for_each_size(builder, size, emit)


@dataclass(frozen=True, slots=True)
class _EntryStream:
    """Entries of sparse rows, and what they read relative to one origin."""

    vectors: _Vectors
    origin: _Value
    offsets: _Value
    values: _Value

    def products(self, begin: _Value, end: _Value, cells: int) -> list[_Value]:
        """The sums of the products of the entries from `begin` to `end`."""
        vectors, builder = self.vectors, self.vectors.builder

        def body(number, carried):
            source = _entry_cells(vectors, self.origin, self.offsets, number)
            value = vectors.splat(builder.load(builder.gep(self.values, [number])))
            return [
                vectors.multiply_add(value, vectors.load_cell(source, j), total)
                for j, total in enumerate(carried)
            ]

        return _loop(builder, begin, end, [vectors.zero()] * cells, body)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where one block of each sparse row begins, ends, and is cut into chains."""

    vectors: _Vectors
    splits: _Value
    lengths: _Value
    blocks: _Value
    row: _Value
    block: _Value

    def bounds(self, output: _Value) -> tuple[_Value, _Value, _Value]:
        """The first entry, one past the last, and the length of a chain."""
        builder = self.vectors.builder
        row = builder.add(self.row, output)
        place = builder.add(builder.mul(row, self.blocks), self.block)

        def load(table: _Value, at: _Value) -> _Value:
            return builder.sext(builder.load(builder.gep(table, [at])), _INT64)

        split = builder.add(place, row)
        end = builder.add(split, _INT64(1))
        return (
            load(self.splits, split), load(self.splits, end), load(self.lengths, place)
        )  # fmt: skip


def _add_chains(
    stream: _EntryStream,
    begin: _Value,
    end: _Value,
    length: _Value,
    totals: list[_Value],
) -> list[_Value]:
    """`totals`, and the sum of each chain of the entries from `begin` to `end`."""
    vectors, builder = stream.vectors, stream.vectors.builder
    entry = builder.block
    head = builder.append_basic_block("chains")
    chain = builder.append_basic_block("chain")
    after = builder.append_basic_block("chains_done")
    builder.branch(head)
    builder.position_at_end(head)
    start = builder.phi(_INT64)
    start.add_incoming(begin, entry)
    carried = [builder.phi(total.type) for total in totals]
    for phi, total in zip(carried, totals, strict=True):
        phi.add_incoming(total, entry)
    builder.cbranch(builder.icmp_signed("<", start, end), chain, after)
    builder.position_at_end(chain)
    stop = builder.add(start, length)
    stop = builder.select(builder.icmp_signed("<", stop, end), stop, end)
    sums = stream.products(start, stop, len(totals))
    start.add_incoming(stop, builder.block)
    for phi, total in zip(carried, sums, strict=True):
        phi.add_incoming(vectors.add(phi, total), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return list(carried)


@_routine(
    planes="numbers",
    at="int",
    offsets="table",
    begin="int",
    end="int",
    gradient="numbers",
    gradient_at="int",
    sums="numbers",
    size="int",
)
def add_correlations(
    vectors, planes, at, offsets, begin, end, gradient, gradient_at, sums, size
):
    """Adds the sum over j of `planes[at + offsets[i] + j] * gradient[gradient_at + j]`.

    Entry i's sum is added, lane by lane, to the cell `sums[i - begin]`.

    Args:
        vectors: Where to emit the code.
        planes: Cells to read.
        at: Where to read, in cells (int64).
        offsets: int32, in cells.
        begin: First entry (int64).
        end: One past the last entry; there is at least one (int64).
        gradient: Cells.
        gradient_at: The first cell of `gradient` (int64).
        sums: Cells, added to.
        size: Number of cells j, 1 to TILE_CELLS (int64).
    """
    builder = vectors.builder
    origin = vectors.cells(planes, at)
    offset_data = offsets
    factors_at = vectors.cells(gradient, gradient_at)
    totals = vectors.cells(sums, _INT64(0))

    def emit(cells: int) -> None:
        factors = [vectors.load_cell(factors_at, j) for j in range(cells)]

        def body(number, _):
            source = _entry_cells(vectors, origin, offset_data, number)
            # Three chains: enough to hide the latency, few enough registers.
            chains = [vectors.zero()] * min(3, cells)
            for j, factor in enumerate(factors):
                chain = j % len(chains)
                chains[chain] = vectors.multiply_add(
                    factor, vectors.load_cell(source, j), chains[chain]
                )
            target = builder.gep(totals, [builder.sub(number, begin)])
            total = chains[0]
            for chain in chains[1:]:
                total = vectors.add(total, chain)
            total = vectors.add(vectors.load_cell(target, 0), total)
            vectors.store_cell(total, target, 0)
            return []

        _loop(builder, begin, end, [], body)

    _for_each_size(builder, size, emit)


@_routine(
    sums="numbers",
    first="int",
    count="int",
    totals="numbers",
    at="int",
)
def add_lanes(vectors, sums, first, count, totals, at):
    """Adds the sum over the lanes of the cell `sums[first + i]` to `totals[at + i]`.

    Args:
        vectors: Where to emit the code.
        sums: Cells; all up to `first + LANES` are read, and must exist.
        first: int64.
        count: Number of cells i, at least 1; at most LANES are added (int64).
        totals: Numbers, added to.
        at: int64.
    """
    builder = vectors.builder
    source = vectors.cells(sums, first)
    rows = [vectors.load_cell(source, lane) for lane in range(vectors.lanes)]
    rows = vectors.transpose(rows)
    while len(rows) > 1:
        rows = [vectors.add(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    target = builder.bitcast(builder.gep(totals, [at]), vectors.type.as_pointer())
    mask = vectors.first_lanes(count)
    held = vectors.masked_load(target, mask)
    vectors.masked_store(vectors.add(held, rows[0]), target, mask)


class _Lanes:
    """Where one piece of memory of each lane begins; some lanes may have none."""

    def __init__(
        self, vectors: _Vectors, data: _Value, starts: _Value, shift: _Value,
        absent: _Value,
    ):  # fmt: skip
        self.vectors = vectors
        self.data = vectors.builder.gep(data, [shift])
        self.starts = starts
        self.absent = absent

    def pointer(self, lane: _Value) -> _Value:
        """Pointer to the lane's piece, `absent` where its start is negative."""
        builder = self.vectors.builder
        start = builder.load(builder.gep(self.starts, [lane]))
        missing = builder.icmp_signed("<", start, _INT64(0))
        pointer = builder.gep(self.data, [start])
        pointer = builder.select(missing, self.absent, pointer)
        return builder.bitcast(pointer, self.vectors.type.as_pointer())


def _load_rows(lanes: _Lanes, count: _Value) -> list[_Value]:
    """`count` numbers of each lane, and zeros up to a whole vector."""
    vectors, builder = lanes.vectors, lanes.vectors.builder
    pointers = [lanes.pointer(_INT64(lane)) for lane in range(vectors.lanes)]
    whole, part, after = (
        builder.append_basic_block(name) for name in ("whole", "part", "loaded")
    )
    full = builder.icmp_signed(">=", count, _INT64(vectors.lanes))
    builder.cbranch(full, whole, part)
    builder.position_at_end(whole)
    complete = [builder.load(pointer, align=vectors.itemsize) for pointer in pointers]
    builder.branch(after)
    builder.position_at_end(part)
    mask = vectors.first_lanes(count)
    partial = [vectors.masked_load(pointer, mask) for pointer in pointers]
    builder.branch(after)
    builder.position_at_end(after)
    rows = []
    for a, b in zip(complete, partial, strict=True):
        row = builder.phi(vectors.type)
        row.add_incoming(a, whole)
        row.add_incoming(b, part)
        rows.append(row)
    return rows


def _store_rows(lanes: _Lanes, rows: list[_Value], count: _Value) -> None:
    """Stores the first `count` numbers of each row to the lane's memory."""
    vectors, builder = lanes.vectors, lanes.vectors.builder
    pointers = [lanes.pointer(_INT64(lane)) for lane in range(vectors.lanes)]
    whole, part, after = (
        builder.append_basic_block(name) for name in ("whole", "part", "stored")
    )
    full = builder.icmp_signed(">=", count, _INT64(vectors.lanes))
    builder.cbranch(full, whole, part)
    builder.position_at_end(whole)
    for pointer, row in zip(pointers, rows, strict=True):
        builder.store(row, pointer, align=vectors.itemsize)
    builder.branch(after)
    builder.position_at_end(part)
    mask = vectors.first_lanes(count)
    for pointer, row in zip(pointers, rows, strict=True):
        vectors.masked_store(row, pointer, mask)
    builder.branch(after)
    builder.position_at_end(after)


@_routine(
    source="numbers",
    starts="places",
    shift="int",
    count="int",
    zeros="numbers",
    target="numbers",
    target_at="int",
    places="table",
    first="int",
)
def gather_square(
    vectors, source, starts, shift, count, zeros, target, target_at, places, first
):
    """Transposes up to LANES numbers of each lane into as many cells.

    Number i < `count` of lane l, `source[starts[l] + shift + i]`, goes to lane l of the
    cell `target[target_at + places[first + i]]`; zeros where `starts[l]` is negative.
    With `count` below LANES, the cell `target[-1]` is overwritten.

    Args:
        vectors: Where to emit the code.
        source: Any array, read flat.
        starts: (LANES,) int64.
        shift: int64.
        count: int64, at least 1.
        zeros: (LANES,) zeros.
        target: Cells.
        target_at: int64.
        places: int32, in cells; at least LANES from `first` on.
        first: int64.
    """
    builder = vectors.builder
    data, start_data, absent = source, starts, zeros
    pieces = _Lanes(vectors, data, start_data, shift, absent)
    rows = vectors.transpose(_load_rows(pieces, count))
    base = vectors.cells(target, target_at)
    waste = vectors.cells(target, _INT64(-1))
    table = builder.gep(places, [first])
    for i, row in enumerate(rows):
        place = builder.load(builder.gep(table, [_INT64(i)]))
        address = builder.gep(base, [builder.sext(place, _INT64)])
        used = builder.icmp_signed("<", _INT64(i), count)
        builder.store(row, builder.select(used, address, waste), align=VECTOR_BYTES)


@_routine(
    source="numbers",
    source_at="int",
    step="int",
    count="int",
    target="numbers",
    starts="places",
    shift="int",
    waste="numbers",
)
def scatter_square(
    vectors, source, source_at, step, count, target, starts, shift, waste
):
    """The opposite of `gather_square`: up to LANES cells to numbers of each lane.

    Lane l of the cell `source[source_at + i * step]` goes to
    `target[starts[l] + shift + i]` for i < `count`, or nowhere where `starts[l]` is
    negative. The cells up to i = LANES - 1 are read, and must exist.

    Args:
        vectors: Where to emit the code.
        source: Cells.
        source_at: The first cell (int64).
        step: From one cell to the next (int64).
        count: int64, at least 1.
        target: Any array, written flat.
        starts: (LANES,) int64.
        shift: int64.
        waste: (LANES,) numbers, aligned as cells are, overwritten.
    """
    builder = vectors.builder
    address = vectors.cells(source, source_at)
    rows = []
    for _ in range(vectors.lanes):
        rows.append(builder.load(address, align=VECTOR_BYTES))
        address = builder.gep(address, [step])
    data, start_data, absent = target, starts, waste
    pieces = _Lanes(vectors, data, start_data, shift, absent)
    _store_rows(pieces, vectors.transpose(rows), count)


@_routine(
    source="numbers",
    squares="int",
    run="int",
    pace="int",
    target="numbers",
    starts="places",
    shift="int",
    waste="numbers",
    streaming="flag",
    block="int",
)
def write_squares(
    vectors, source, squares, run, pace, target, starts, shift, waste, streaming, block
):
    """Writes one of LANE_BLOCKS blocks of lanes as `scatter_square` writes all.

    Lanes are often a multiple of 4 KiB apart. Such lines share a set of the first-level
    cache, and the processor takes longer to pass them on. So a few lanes of all squares
    are written before the next lanes, and the lines of two squares in turns: of 11x11
    kernels with 64 outputs whose lanes lay 128 KiB apart, a Zen 4 took 7 % less.

    Args:
        vectors: Where to emit the code.
        source: Cells, LANES for each square, one after the other.
        squares: Number of squares, at least 1 (int64).
        run: Squares that lie side by side in `target` (int64).
        pace: From one such run to the next (int64).
        target: Any array, written flat.
        starts: (LANES,) int64.
        shift: The first square's (int64).
        waste: (LANES,) numbers, aligned as cells are, overwritten.
        streaming: Whether to pass the caches by (boolean). All that is written must be
            aligned then.
        block: Which block of lanes (int64).
    """
    builder = vectors.builder
    stream, store, done = (
        builder.append_basic_block(name) for name in ("stream", "store", "written")
    )
    squares = _Squares(
        vectors, source, squares, run, pace, target, starts, shift, waste
    )
    lane = builder.mul(block, _INT64(vectors.block_lanes))
    builder.cbranch(streaming, stream, store)
    for begin, is_streaming in ((stream, True), (store, False)):
        builder.position_at_end(begin)
        squares.write(lane, streaming=is_streaming)
        builder.branch(done)
    builder.position_at_end(done)


@dataclass(frozen=True, slots=True)
class _Squares:
    """Squares of cells and where they go; see `write_squares`."""

    vectors: _Vectors
    source: _Value
    squares: _Value
    run: _Value
    pace: _Value
    target: _Value
    starts: _Value
    shift: _Value
    waste: _Value

    def write(self, lane: _Value, *, streaming: bool) -> None:
        """Writes one block of lanes, from `lane` on, of all squares."""
        builder, none = self.vectors.builder, _INT64(0)

        def body(number, carried):
            first = builder.shl(number, _INT64(1))
            second = builder.add(first, _INT64(1))
            place, position = carried
            next_place, position = self._following(place, position)
            pair = [(first, place), (second, next_place)]
            self._write_in_turns(pair, lane, streaming=streaming)
            return self._following(next_place, position)

        pairs = builder.lshr(self.squares, _INT64(1))
        begin = builder.block
        paired, rest, single, after = (
            builder.append_basic_block(name)
            for name in ("paired", "rest", "single", "block_written")
        )
        builder.cbranch(builder.icmp_signed(">", pairs, none), paired, rest)
        builder.position_at_end(paired)
        last, _ = _loop(builder, none, pairs, [self.shift, none], body)
        end = builder.block
        builder.branch(rest)
        builder.position_at_end(rest)
        place = builder.phi(_INT64)
        place.add_incoming(self.shift, begin)
        place.add_incoming(last, end)
        odd = builder.trunc(self.squares, ir.IntType(1))
        builder.cbranch(odd, single, after)
        builder.position_at_end(single)
        number = builder.sub(self.squares, _INT64(1))
        self._write_in_turns([(number, place)], lane, streaming=streaming)
        builder.branch(after)
        builder.position_at_end(after)

    def _following(self, place: _Value, position: _Value) -> tuple[_Value, _Value]:
        """The place of the next square, and its position in its run."""
        builder, width = self.vectors.builder, _INT64(self.vectors.lanes)
        position = builder.add(position, _INT64(1))
        ended = builder.icmp_signed("==", position, self.run)
        back = builder.mul(builder.sub(self.run, _INT64(1)), width)
        step = builder.select(ended, builder.sub(self.pace, back), width)
        position = builder.select(ended, _INT64(0), position)
        return builder.add(place, step), position

    def _write_in_turns(
        self, squares: Sequence[tuple[_Value, _Value]], lane: _Value, *, streaming: bool
    ) -> None:
        """Writes one block of lanes of some squares, given by number and place."""
        vectors, builder = self.vectors, self.vectors.builder
        width = _INT64(vectors.lanes)
        cells = [
            vectors.cells(self.source, builder.mul(number, width))
            for number, _ in squares
        ]
        pieces = [
            _Lanes(vectors, self.target, self.starts, place, self.waste)
            for _, place in squares
        ]
        rows = [_block_of_lanes(vectors, square, lane) for square in cells]
        for i in range(vectors.block_lanes):
            for row, piece in zip(rows, pieces, strict=True):
                pointer = piece.pointer(builder.add(lane, _INT64(i)))
                if streaming:
                    vectors.stream_store(row[i], pointer)
                else:
                    builder.store(row[i], pointer, align=vectors.itemsize)


def _block_of_lanes(vectors: _Vectors, cells: _Value, lane: _Value) -> list[_Value]:
    """What the lanes of a block, from `lane` on, get of a square: a vector for each.

    Blocks are loaded to where they belong, so that only their insides are left to
    transpose.
    """
    rows = []
    for i in range(vectors.block_lanes):
        blocks = [
            vectors.load_block(cells, cell, lane)
            for cell in range(i, vectors.lanes, vectors.block_lanes)
        ]
        while len(blocks) > 1:
            blocks = [
                vectors.join(a, b)
                for a, b in zip(blocks[::2], blocks[1::2], strict=True)
            ]
        rows += blocks
    return vectors.transpose(rows)


@intrinsic
def run_code(typingctx, address, planes, at, values, sums, size, bias):
    """Calls code that `cpu_baked` generated.

    Args:
        typingctx: Numba's.
        address: The code's (int64).
        planes: Cells to read.
        at: Where to read, in cells (int64).
        values: Numbers.
        sums: Cells, overwritten.
        size: Number of cells of each sum, at least 1 (int64).
        bias: Numbers.
    """

    def codegen(context, builder, signature, args):
        planes, values, sums, bias = (
            context.make_array(signature.args[i])(context, builder, args[i]).data
            for i in (1, 3, 4, 6)
        )
        width = lanes(np.dtype(str(signature.args[1].dtype)).itemsize)
        first = builder.gep(planes, [builder.mul(args[2], _INT64(width))])
        operands = [first, values, sums, args[5], bias]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in operands])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), operands)
        return context.get_dummy_value()

    return (
        types.none(types.int64, planes, types.int64, values, sums, types.int64, bias),
        codegen,
    )


@intrinsic
def finish_stores(typingctx):
    """Makes all that this thread has written visible before what it writes next.

    Memory that is written past the caches needs that.

    Args:
        typingctx: Numba's.
    """

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen
