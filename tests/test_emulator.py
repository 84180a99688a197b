"""The emulator computes what CUDA does, and reports what CUDA forbids."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from sparse_conv.launch import Launch
from tests.emulator import ORDERS, EmulationError, Task, run, run_tasks

POINTERS = ("read", "write")
STRUCT = """
struct Arguments {
    const float* read;
    float* write;
    int n;
    int extra;
};
"""


def toy(
    body: str,
    *,
    n: int = 0,
    grid=(1, 1, 1),
    block=(64, 1, 1),
    shared_mem_bytes=0,
    cluster=1,
):
    """A launch of a toy function, and its text; the body starts at toy.cu:1."""
    text = f"""{STRUCT}
extern "C" __global__ void toy(Arguments arguments) {{
    const float* read = arguments.read;
    float* write = arguments.write;
    const int n = arguments.n;
    const int t = threadIdx.x;
#line 1 "toy.cu"
{body}
}}
"""
    constants = struct.pack("ii", n, 0)
    launch = Launch(
        "toy", (), grid, block, shared_mem_bytes, POINTERS, constants, cluster=cluster
    )
    return launch, text


def run_toy(body: str, read: np.ndarray | None, size: int, **options) -> np.ndarray:
    """Runs a toy in both orders and returns its `size` outputs, which must agree."""
    launch, text = toy(body, **options)
    arrays = {"read": read, "write": np.empty(size, np.float32)}
    tasks = [Task(launch, arrays, ("write",), text, order) for order in ORDERS]
    ascending, descending = run_tasks(tasks)
    np.testing.assert_array_equal(
        ascending["write"].view(np.int32), descending["write"].view(np.int32)
    )
    return ascending["write"]


def floats(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


REVERSE = """SHARED_MEMORY(memory);
float* tile = (float*)memory;
tile[t] = read[blockIdx.x * blockDim.x + t];
__syncthreads();
write[blockIdx.x * blockDim.x + t] = tile[blockDim.x - 1 - t];
"""


def test_blocks_share_memory_through_barriers():
    written = run_toy(
        REVERSE, floats(192), 192, grid=(3, 1, 1), shared_mem_bytes=64 * 4
    )
    np.testing.assert_array_equal(written, floats(192).reshape(3, 64)[:, ::-1].ravel())


def test_indices_run_over_all_dimensions():
    body = """const int row = threadIdx.z * blockDim.y + threadIdx.y;
const int thread = row * blockDim.x + t;
const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
write[block * 24 + thread] = block * 24 + thread;"""
    written = run_toy(body, None, 60 * 24, grid=(3, 4, 5), block=(2, 3, 4))
    np.testing.assert_array_equal(written, floats(60 * 24))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("__shfl_sync(~0u, t, 5)", lambda lane: np.full(32, 5)),
        ("__shfl_sync(~0u, t, lane + 1, 8)", lambda lane: (lane & 24) + (lane + 1) % 8),
        ("__shfl_down_sync(~0u, t, 3)", lambda lane: lane + 3 * (lane < 29)),
        ("__shfl_up_sync(~0u, t, 3)", lambda lane: lane - 3 * (lane >= 3)),
        ("__shfl_xor_sync(~0u, (double)t, 9)", lambda lane: lane ^ 9),
        ("__shfl_xor_sync(~0u, (float)t, 16, 8)", lambda lane: lane % 16),
        ("__popc(__ballot_sync(~0u, t % 3 == 0))", lambda lane: np.full(32, 11)),
        ("__ffs(__ballot_sync(~0u, t > 4))", lambda lane: np.full(32, 6)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_warp_collectives_follow_the_definition(expression, expected):
    body = f"const int lane = t % 32; write[lane] = {expression} + 0 * lane;"
    written = run_toy(body, None, 32, block=(32, 1, 1))
    np.testing.assert_array_equal(written, expected(np.arange(32)))


def test_warps_exchange_within_themselves():
    written = run_toy("write[t] = __shfl_sync(~0u, t, 1);", None, 64)
    np.testing.assert_array_equal(written, np.repeat([1.0, 33.0], 32))


def test_memory_is_poisoned_before_each_block():
    body = """SHARED_MEMORY(memory);
float* tile = (float*)memory;
write[blockIdx.x * 64 + t] = tile[t];
tile[t] = 1;"""
    written = run_toy(body, None, 130, grid=(2, 1, 1), shared_mem_bytes=256)
    np.testing.assert_array_equal(written.view(np.int32), np.full(130, -1))


def test_half_is_converted_with_rounding_to_even():
    numbers = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 6e-8, -0.0, np.inf])
    numbers = np.resize(numbers, 64).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16).astype(np.float32)
    body = "write[t] = half_to_float(float_to_half(read[t]));"
    np.testing.assert_array_equal(run_toy(body, numbers, 64), expected)


def test_an_array_may_be_null_or_empty():
    body = "write[t] = read == nullptr ? 1 : 2;"
    np.testing.assert_array_equal(run_toy(body, None, 64), np.full(64, 1))
    np.testing.assert_array_equal(run_toy(body, floats(0), 64), np.full(64, 2))


SUM_OF_WARP = """SHARED_MEMORY(memory);
float* tile = (float*)memory;
tile[t] = read[t];
__syncwarp();
for (int apart = 16; apart > 0; apart /= 2) {
    const float other = tile[t ^ apart];
    __syncwarp();
    tile[t] += other;
    __syncwarp();
}
write[t] = tile[t];"""


def test_a_warp_shares_memory_through_its_own_barriers():
    written = run_toy(SUM_OF_WARP, floats(64), 64, shared_mem_bytes=256)
    sums = floats(64).reshape(2, 32).sum(1)
    np.testing.assert_array_equal(written, np.repeat(sums, 32))


# Each block reads what the next one of its cluster has written.
EXCHANGE = """SHARED_MEMORY(memory);
float* own = (float*)memory + t;
*own = read[blockIdx.x * blockDim.x + t];
arrive_at_cluster();
wait_for_cluster();
const int next = (blockIdx.x + 1) % 2;
const float other = *in_block(own, next);
arrive_at_cluster();
write[blockIdx.x * blockDim.x + t] = other;
wait_for_cluster();"""
IN_CLUSTER = {"grid": (2, 1, 1), "shared_mem_bytes": 256, "cluster": 2}


def test_blocks_of_a_cluster_read_each_other():
    options = IN_CLUSTER | {"grid": (6, 1, 1)}
    written = run_toy(EXCHANGE, floats(384), 384, **options)
    expected = floats(384).reshape(3, 2, 64)[:, ::-1].ravel()
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("arrive_at_cluster();\nwait_for_cluster();\n", "MAY NOT HAVE STARTED"),
        ("\nwait_for_cluster();", "BLOCK HAS FINISHED"),
    ],
)
def test_each_barrier_of_a_cluster_is_needed(left_out, message, order):
    first, last = EXCHANGE.rsplit(left_out, 1)
    launch, text = toy(first + last, **IN_CLUSTER)
    arrays = {"read": floats(128), "write": np.empty(128, np.float32)}
    with pytest.raises(EmulationError, match=message):
        run(launch, arrays, outputs=["write"], text=text, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_what_follows_an_arrival_is_not_ordered_by_it(order):
    body = EXCHANGE.replace("arrive_at_cluster();\nwrite", "*own = 0;\nwrite")
    body = body.replace("\nwait_for_cluster();", "", 1).replace(
        "const float", "wait_for_cluster();\narrive_at_cluster();\nconst float"
    )
    launch, text = toy(body, **IN_CLUSTER)
    arrays = {"read": floats(128), "write": np.empty(128, np.float32)}
    with pytest.raises(EmulationError, match=r"RACE.*shared memory.*toy\.cu"):
        run(launch, arrays, outputs=["write"], text=text, order=order)


# Each: the body, what the message must say, further options.
FORBIDDEN = {
    "read_after_the_end": (
        "write[t] = read[t + 1];",
        [
            "0 bytes after the end of read (input, 256 bytes)",
            "OUT OF BOUNDS: read of 4 bytes at toy.cu:1",
        ],
        {},
    ),
    "read_before_the_start": (
        "\nwrite[t] = read[t - 1];",
        ["4 bytes before the start of read (input", "toy.cu:2"],
        {},
    ),
    "read_far_after_the_end": (
        "write[t] = read[t + 100000];",
        ["after the end of read"],
        {},
    ),
    "write_after_the_end": (
        "write[t + (t == 63)] = 0;",
        ["0 bytes after the end of write (output", "thread (63, 0, 0)"],
        {},
    ),
    "shared_memory_after_the_end": (
        "SHARED_MEMORY(memory); ((float*)memory)[t] = 0;",
        ["0 bytes after the end of shared memory (of a block, 252 bytes)"],
        {"shared_mem_bytes": 252},
    ),
    "shared_memory_without_any": (
        "SHARED_MEMORY(memory); memory[t] = 0;",
        ["after the end of shared memory"],
        {},
    ),
    "local_array_after_the_end": (
        "volatile float own[4]; for (int i = 0; i <= n; ++i) own[i] = i;",
        ["out of bounds", "toy.cu:1"],
        {"n": 4},
    ),
    "write_to_an_input": (
        "((float*)read)[0] = 1;",
        ["WRITE TO AN INPUT", "toy.cu:1"],
        {},
    ),
    "null_pointer": (
        "write[t] = ((float*)nullptr)[t];",
        ["WILD POINTER: read of 4 bytes at toy.cu:1"],
        {},
    ),
    "misaligned_vector": (
        "write[t] = ((float2*)((char*)read + 2))->x;",
        ["MISALIGNED: read of 4 bytes", "toy.cu:1"],
        {},
    ),
    "int_overflow": (
        "write[t] = n * (t + 1);",
        ["signed integer overflow", "toy.cu:1", "in thread"],
        {"n": 2**30},
    ),
    "barrier_that_some_skip": (
        "if (t < 63) __syncthreads();",
        ["DIVERGENCE", "__syncthreads at toy.cu:1", "thread (63, 0, 0) has finished"],
        {},
    ),
    "two_different_barriers": (
        "if (t < 32) __syncthreads();\nelse __syncthreads();",
        ["DIVERGENCE", "toy.cu:1", "toy.cu:2"],
        {},
    ),
    "shuffle_that_some_lanes_skip": (
        "if (t != 40) write[t] = __shfl_sync(~0u, t, 0);",
        ["DIVERGENCE", "a shuffle at toy.cu:1", "thread (40, 0, 0) has finished"],
        {},
    ),
    "warp_barrier_within_a_branch": (
        "if (t % 2) __syncwarp();\n__syncthreads();",
        ["DIVERGENCE", "__syncwarp at toy.cu:1", "__syncthreads at toy.cu:2"],
        {},
    ),
    "partial_mask": (
        "write[t] = __shfl_sync(1u, t, 0);",
        ["MASK 0x1", "only full masks are emulated"],
        {},
    ),
    "two_blocks_write_one_place": (
        "if (t == 0)\nwrite[0] = 5;",
        ["RACE", "byte 0 of write", "toy.cu:2", "by another block"],
        {"grid": (2, 1, 1)},
    ),
    "two_threads_write_one_place": (
        "write[t / 2] = 5;",
        ["RACE", "thread (0, 0, 0)", "thread (1, 0, 0)"],
        {},
    ),
    "thread_limit": ("", ["LAUNCH", "1024"], {"block": (1025, 1, 1)}),
    "part_of_a_cluster": (
        "", ["LAUNCH", "3 blocks of 2"], {"grid": (3, 1, 1), "cluster": 2}
    ),
    "cluster_limit": (
        "", ["LAUNCH", "16 blocks of 16"], {"grid": (16, 1, 1), "cluster": 16}
    ),
    "two_arrivals": (
        "arrive_at_cluster(); arrive_at_cluster();",
        ["CLUSTER: a thread must wait before it arrives again"],
        IN_CLUSTER,
    ),
    "no_arrival": (
        "wait_for_cluster();",
        ["CLUSTER: a thread must arrive before it waits"],
        IN_CLUSTER,
    ),
    "not_all_arrive": (
        "if (t > 5) __syncthreads();\n"
        "else { arrive_at_cluster(); wait_for_cluster(); }",
        ["DIVERGENCE in the cluster", "not all arrive"],
        IN_CLUSTER,
    ),
    "no_such_block": (
        "SHARED_MEMORY(memory); in_block(memory, 2);",
        ["CLUSTER: byte 0 of shared memory in block 2 of 2"],
        IN_CLUSTER,
    ),
    "a_block_that_may_not_have_started": (
        "SHARED_MEMORY(memory);\n*in_block(memory + t, 1 - blockIdx.x) = 0;",
        ["BLOCK MAY NOT HAVE STARTED", "toy.cu:2", "of block 0 of the cluster"],
        IN_CLUSTER,
    ),
    "two_clusters_write_one_place": (
        "if (t + blockIdx.x % 2 == 0)\nwrite[0] = 5;",
        ["RACE", "byte 0 of write", "toy.cu:2", "by another cluster"],
        IN_CLUSTER | {"grid": (4, 1, 1)},
    ),
    "two_blocks_of_a_cluster_write_one_place": (
        "if (t == 0)\nwrite[0] = 5;",
        ["RACE", "byte 0 of write", "toy.cu:2", "of block 0 of the cluster"],
        IN_CLUSTER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_is_forbidden_is_reported(case):
    body, expected, options = FORBIDDEN[case]
    launch, text = toy(body, **options)
    arrays = {"read": floats(64), "write": np.empty(64, np.float32)}
    with pytest.raises(EmulationError) as error:
        run(launch, arrays, outputs=["write"], text=text)
    for words in expected:
        assert words in str(error.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("number", range(3))
def test_each_barrier_of_a_warp_is_needed(number, order):
    parts = SUM_OF_WARP.split("__syncwarp();")
    without = (
        "__syncwarp();".join(parts[: number + 1])
        + ";"
        + "__syncwarp();".join(parts[number + 1 :])
    )
    launch, text = toy(without, shared_mem_bytes=256)
    arrays = {"read": floats(64), "write": np.empty(64, np.float32)}
    with pytest.raises(EmulationError, match=r"RACE.*shared memory"):
        run(launch, arrays, outputs=["write"], text=text, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_block_barrier_is_a_race(order):
    launch, text = toy(REVERSE.replace("__syncthreads();", ""), shared_mem_bytes=256)
    arrays = {"read": floats(64), "write": np.empty(64, np.float32)}
    with pytest.raises(EmulationError, match=r"RACE.*toy\.cu:[35],.*toy\.cu:[35],"):
        run(launch, arrays, outputs=["write"], text=text, order=order)


def test_the_next_round_needs_a_barrier_too():
    body = """SHARED_MEMORY(memory);
float* tile = (float*)memory;
float sum = 0;
for (int round = 0; round < 2; ++round) {
    tile[t] = read[t];
    __syncthreads();
    sum += tile[63 - t];
}
write[t] = sum;"""
    launch, text = toy(body, shared_mem_bytes=256)
    arrays = {"read": floats(64), "write": np.empty(64, np.float32)}
    with pytest.raises(EmulationError, match=r"RACE.*toy\.cu:7.*toy\.cu:5"):
        run(launch, arrays, outputs=["write"], text=text)


def test_the_argument_struct_must_have_the_packed_size():
    launch, text = toy("")
    longer = Launch("toy", (), (1, 1, 1), (1, 1, 1), 0, POINTERS, bytes(16))
    assert launch.constants != longer.constants
    with pytest.raises(EmulationError, match="24 bytes, the launch packs 32"):
        run(longer, {}, outputs=[], text=text)


def test_text_that_does_not_compile_is_reported_at_its_line():
    launch, text = toy("\n\noops();")
    with pytest.raises(EmulationError, match=r"toy\.cu:3.*oops"):
        run(launch, {}, outputs=[], text=text)


def test_defines_reach_the_text():
    launch, text = toy("write[t] = VALUE;")
    arrays = {"write": np.empty(64, np.float32)}
    for value in (1, 2):
        other = Launch("toy", (("VALUE", f"{value}"),), (1, 1, 1), (64, 1, 1), 0,
                       POINTERS, launch.constants)  # fmt: skip
        written = run(other, arrays, outputs=["write"], text=text)["write"]
        np.testing.assert_array_equal(written, np.full(64, value))


def test_an_unknown_array_is_refused():
    launch, text = toy("")
    with pytest.raises(ValueError, match="Received: \\['other'\\]"):
        run(launch, {"other": floats(1)}, outputs=[], text=text)


COPY = """SHARED_MEMORY(memory);
float* tile = (float*)memory;
for (int batch = 0; batch < 2; ++batch) {
    copy_async<16>(tile + 4 * (64 * batch + t), read + 4 * (64 * batch + t), true);
    commit_copies();
}
%s
for (int i = 0; i < 4; ++i) {
    write[4 * t + i] = tile[4 * t + i];
    write[256 + 4 * t + i] = tile[256 + 4 * t + i];
}
"""


def test_a_copy_arrives_when_its_batch_is_waited_for():
    read = floats(512)
    memory = {"shared_mem_bytes": 2048}
    both = run_toy(COPY % "wait_for_copies<0>();", read, 512, **memory)
    np.testing.assert_array_equal(both, read)
    first = run_toy(COPY % "wait_for_copies<1>();", read, 512, **memory)
    np.testing.assert_array_equal(first[:256], read[:256])
    assert np.isnan(first[256:]).all()
    assert np.isnan(run_toy(COPY % "", read, 512, **memory)).all()


def test_a_copy_must_be_aligned_and_inside():
    memory = {"shared_mem_bytes": 2048}
    with pytest.raises(EmulationError, match="OUT OF BOUNDS"):
        run_toy(COPY % "", floats(511), 512, **memory)
    odd = COPY.replace("(tile + 4", "(tile + 1 + 4")
    with pytest.raises(EmulationError, match="MISALIGNED"):
        run_toy(odd % "", floats(512), 512, **memory)
