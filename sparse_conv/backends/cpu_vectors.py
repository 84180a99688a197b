"""The vector instructions of the CPU loops, written as LLVM intermediate code.

Numba vectorises loops, but can't be told to keep a tile of sums in registers across a
loop whose length is only known at run time. These few functions can. They know vectors
and addresses; neither convolutions nor threads.

A cell is one vector of `LANES` numbers; arrays of cells must begin at a multiple of
`VECTOR_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, extending, types
from numba.core.registry import cpu_target

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
        # 32 registers: 20 sums, and room for the operands in flight.
        return 64, 20
    if "+avx" in enabled:
        return 32, 12
    if triple.startswith(("aarch64", "arm64")):
        # A cell takes two of the 32 registers.
        return 32, 12
    return 32, 6


VECTOR_BYTES, TILE_CELLS = _choose_widths()


def lanes(itemsize: int) -> int:
    """Numbers of `itemsize` bytes in one cell."""
    return VECTOR_BYTES // itemsize


class _Vectors:
    """What the emitters below share: the element type of a call and its operations."""

    def __init__(self, context: Any, builder: _Builder, dtype: types.Type):
        self.context = context
        self.builder = builder
        self.scalar = context.get_data_type(dtype)
        self.itemsize = context.get_abi_sizeof(self.scalar)
        self.lanes = lanes(self.itemsize)
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.is_float = isinstance(dtype, types.Float)

    def data(self, array_type: types.Array, array: _Value) -> _Value:
        return self.context.make_array(array_type)(
            self.context, self.builder, array
        ).data

    def cells(self, array_type: types.Array, array: _Value, at: _Value) -> _Value:
        """Pointer to cell `at` of an array of cells."""
        pointer = self.builder.bitcast(
            self.data(array_type, array), self.type.as_pointer()
        )
        return self.builder.gep(pointer, [at])

    def zero(self) -> ir.Constant:
        element = 0.0 if self.is_float else 0
        return ir.Constant(self.type, [element] * self.lanes)

    def load_cell(self, pointer: _Value, number: int) -> _Value:
        address = self.builder.gep(pointer, [_INT64(number)])
        return self.builder.load(address, align=VECTOR_BYTES)

    def store_cell(self, value: _Value, pointer: _Value, number: int) -> None:
        address = self.builder.gep(pointer, [_INT64(number)])
        self.builder.store(value, address, align=VECTOR_BYTES)

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

    def transpose(self, rows: list[_Value]) -> list[_Value]:
        """Transposes a square of vectors, by swapping ever larger blocks."""
        rows, lane_numbers, distance = list(rows), range(self.lanes), 1
        while distance < self.lanes:
            for i in lane_numbers:
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


@intrinsic
def add_products(
    typingctx, planes, at, offsets, values, begin, end, sums, sums_at, size, fresh
):
    """Adds `values[i] * planes[at + offsets[i] + j]` for all i to `sums[sums_at + j]`.

    The products are summed by themselves, then added to what `sums` holds.

    Args:
        typingctx: Numba's.
        planes: Cells to read.
        at: Where to read, in cells (int64).
        offsets: int32, in cells.
        values: Numbers.
        begin: First entry (int64).
        end: One past the last entry; there is at least one (int64).
        sums: Cells, added to.
        sums_at: The first cell of `sums` (int64).
        size: Number of cells j, 1 to TILE_CELLS (int64).
        fresh: Whether `sums` holds nothing yet, which counts as 0 (boolean).
    """

    def codegen(context, builder, signature, args):
        kinds = signature.args
        vectors = _Vectors(context, builder, planes.dtype)
        origin = vectors.cells(kinds[0], args[0], args[1])
        offset_data = vectors.data(kinds[2], args[2])
        value_data = vectors.data(kinds[3], args[3])
        target = vectors.cells(kinds[6], args[6], args[7])

        def emit(cells: int) -> None:
            def body(number, carried):
                source = _entry_cells(vectors, origin, offset_data, number)
                value = builder.load(builder.gep(value_data, [number]))
                value = vectors.splat(value)
                return [
                    vectors.multiply_add(value, vectors.load_cell(source, j), total)
                    for j, total in enumerate(carried)
                ]

            totals = _loop(builder, args[4], args[5], [vectors.zero()] * cells, body)
            for j, total in enumerate(totals):
                held = vectors.load_cell(target, j)
                held = builder.select(args[9], vectors.zero(), held)
                vectors.store_cell(vectors.add(held, total), target, j)

        _for_each_size(builder, args[8], emit)
        return context.get_dummy_value()

    int64 = types.int64
    return (
        types.none(
            planes,
            int64,
            offsets,
            values,
            int64,
            int64,
            sums,
            int64,
            int64,
            types.boolean,
        ),
        codegen,
    )


@intrinsic
def add_correlations(
    typingctx, planes, at, offsets, begin, end, gradient, gradient_at, sums, size
):
    """Adds the sum over j of `planes[at + offsets[i] + j] * gradient[gradient_at + j]`.

    Entry i's sum is added, lane by lane, to the cell `sums[i - begin]`.

    Args:
        typingctx: Numba's.
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

    def codegen(context, builder, signature, args):
        kinds = signature.args
        vectors = _Vectors(context, builder, planes.dtype)
        origin = vectors.cells(kinds[0], args[0], args[1])
        offset_data = vectors.data(kinds[2], args[2])
        factors_at = vectors.cells(kinds[5], args[5], args[6])
        totals = vectors.cells(kinds[7], args[7], _INT64(0))

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
                target = builder.gep(totals, [builder.sub(number, args[3])])
                total = chains[0]
                for chain in chains[1:]:
                    total = vectors.add(total, chain)
                total = vectors.add(vectors.load_cell(target, 0), total)
                vectors.store_cell(total, target, 0)
                return []

            _loop(builder, args[3], args[4], [], body)

        _for_each_size(builder, args[8], emit)
        return context.get_dummy_value()

    int64 = types.int64
    return (
        types.none(planes, int64, offsets, int64, int64, gradient, int64, sums, int64),
        codegen,
    )


def _lane_pointer(
    vectors: _Vectors, data: _Value, starts: _Value, lane: int, shift: _Value,
    absent: _Value,
) -> _Value:  # fmt: skip
    """Pointer to `data[starts[lane] + shift]`, `absent` where the start is negative."""
    builder = vectors.builder
    start = builder.load(builder.gep(starts, [_INT64(lane)]))
    missing = builder.icmp_signed("<", start, _INT64(0))
    pointer = builder.gep(data, [builder.add(start, shift)])
    pointer = builder.select(missing, absent, pointer)
    return builder.bitcast(pointer, vectors.type.as_pointer())


@intrinsic
def gather_square(typingctx, source, starts, shift, zeros, target, target_at, step):
    """Transposes LANES numbers of each lane into LANES cells.

    Number i of lane l, `source[starts[l] + shift + i]`, goes to lane l of the cell
    `target[target_at + i * step]`; zeros where `starts[l]` is negative.

    Args:
        typingctx: Numba's.
        source: Any array, read flat.
        starts: (LANES,) int64.
        shift: int64.
        zeros: (LANES,) zeros.
        target: Cells.
        target_at: The first cell (int64).
        step: From one cell to the next (int64).
    """

    def codegen(context, builder, signature, args):
        kinds = signature.args
        vectors = _Vectors(context, builder, source.dtype)
        data, start_data, absent = (vectors.data(kinds[i], args[i]) for i in (0, 1, 3))
        rows = []
        for lane in range(vectors.lanes):
            pointer = _lane_pointer(vectors, data, start_data, lane, args[2], absent)
            rows.append(builder.load(pointer, align=vectors.itemsize))
        address = vectors.cells(kinds[4], args[4], args[5])
        for row in vectors.transpose(rows):
            builder.store(row, address, align=VECTOR_BYTES)
            address = builder.gep(address, [args[6]])
        return context.get_dummy_value()

    int64 = types.int64
    return types.none(source, starts, int64, zeros, target, int64, int64), codegen


@intrinsic
def scatter_square(typingctx, source, source_at, step, target, starts, shift, waste):
    """The opposite of `gather_square`: LANES cells to LANES numbers of each lane.

    Lane l of the cell `source[source_at + i * step]` goes to
    `target[starts[l] + shift + i]`, or nowhere where `starts[l]` is negative.

    Args:
        typingctx: Numba's.
        source: Cells.
        source_at: The first cell (int64).
        step: From one cell to the next (int64).
        target: Any array, written flat.
        starts: (LANES,) int64.
        shift: int64.
        waste: (LANES,) numbers, overwritten.
    """

    def codegen(context, builder, signature, args):
        kinds = signature.args
        vectors = _Vectors(context, builder, source.dtype)
        address = vectors.cells(kinds[0], args[0], args[1])
        rows = []
        for _ in range(vectors.lanes):
            rows.append(builder.load(address, align=VECTOR_BYTES))
            address = builder.gep(address, [args[2]])
        data, start_data, absent = (vectors.data(kinds[i], args[i]) for i in (3, 4, 6))
        for lane, row in enumerate(vectors.transpose(rows)):
            pointer = _lane_pointer(vectors, data, start_data, lane, args[5], absent)
            builder.store(row, pointer, align=vectors.itemsize)
        return context.get_dummy_value()

    int64 = types.int64
    return types.none(source, int64, int64, target, starts, int64, waste), codegen
