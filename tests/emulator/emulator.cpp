// Runs CUDA functions, compiled by the host compiler, as the GPU would: the scheduler
// of blocks and threads, their memory, and the checks of every access.
//
// A request file lists tasks; each is one launch. The functions come as shared libraries
// whose every access of memory calls a routine here: compilers do so on behalf of
// ThreadSanitizer (-fsanitize=thread), whose own run-time library is not used. Each
// access is checked: is it within one array, aligned, allowed, free of races? Any error
// ends the process, with a message on stderr. Knows nothing of convolutions.
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_emulation.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

using emulation::Place;

constexpr size_t PAGE = 4096;
// Nothing lies between two arrays, so that an index too large by less is caught.
constexpr size_t GAP = size_t{1} << 20;
constexpr size_t ARENA = size_t{1} << 38;
constexpr size_t STACK = size_t{1} << 17;
constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr unsigned MAX_CLUSTER = 8;
// Races are tracked in units of the smallest element that functions store.
constexpr size_t CELL = 2;
constexpr int POISON = 0xFF;

enum class Kind { INPUT, OUTPUT, SHARED };
const char* const KIND_NAMES[] = {"input", "output", "of a block"};
const char* const COLLECTIVE_NAMES[] = {
    "__syncthreads", "__syncwarp", "a shuffle", "__ballot_sync", "the cluster"};

// One access to a cell. Time is counted in phases: one ends with every barrier of a block
// and with every cluster. Two accesses by different threads of a block are ordered if they
// lie in different phases, or if a __syncwarp of their warp (`warp_epoch`) lies between
// them; two of a cluster, if the later thread has waited for a barrier of the cluster at
// which the earlier one had not yet arrived.
struct Access {
    const void* pc;
    uint64_t phase;  // 0 where there was no access
    unsigned warp_epoch;
    unsigned arrivals;
    int thread;
};

// Two readers suffice: a writer is another thread than one of them.
struct Cell {
    Access writer, readers[2];
};

struct Region {
    std::string name;
    Kind kind;
    char* base;
    size_t bytes;
    off_t file_offset;
    Cell* cells;
};

enum class State { READY, WAITING, FINISHED };

// A copy on its way to shared memory.
struct Copy {
    uintptr_t to;
    unsigned bytes;
    char content[16];
    const void* returns;
};

struct Thread {
    ucontext_t context;
    State state;
    uint3 index;
    Place place;
    unsigned long long given, received;
    int source;
    // At the barriers of its cluster.
    unsigned arrivals, waits;
    // Batches of copies that haven't arrived; the last one is not yet complete.
    std::vector<std::vector<Copy>> copies;
};

// Where a program or library is in memory.
struct Image {
    uintptr_t base;
    size_t bytes;
};

struct Task {
    std::string library;
    dim3 grid, block;
    unsigned cluster;
    size_t shared_bytes;
    bool descending;
    std::vector<char> arguments;
    size_t pointers;
    std::vector<Region> regions;
};

using Entry = void (*)(const void*);

char* arena;
char* arena_free;
char* stacks;
std::vector<Region> regions;
std::vector<Image> images;
// Those of a cluster, one block behind the other, as are the regions of shared memory, the
// last ones of all.
std::vector<Thread> threads;
std::vector<unsigned> warp_epochs;
int block_threads;
unsigned cluster;
uint3 first_block;
// The phase of each block of the cluster, and the first one of them all.
std::vector<uint64_t> phases;
uint64_t first_phase;
int current = -1;
bool descending;
ucontext_t scheduler;
Entry entry;
const void* entry_arguments;

void say(const char* format, ...) {
    char text[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    fprintf(stderr, "emulation: %s\n", text);
}

#define FAIL(...) (say(__VA_ARGS__), fflush(stderr), _exit(3))

// Each stack has an inaccessible page below it.
char* stack_of(int number) { return stacks + number * (STACK + PAGE) + PAGE; }

// Which of the cluster's blocks a thread belongs to.
int block_of(int number) { return number / block_threads; }

// Warps don't reach from one block to the next.
int warp_of(int number) {
    const int warps = (block_threads + WARP - 1) / WARP;
    return block_of(number) * warps + number % block_threads / WARP;
}

Region& shared_of(int block) { return regions[regions.size() - cluster + block]; }

std::string thread_name(int number) {
    const uint3 i = threads[number].index;
    char text[80];
    snprintf(text, sizeof text, "thread (%u, %u, %u)", i.x, i.y, i.z);
    std::string name = text;
    if (cluster > 1) name += " of block " + std::to_string(block_of(number)) + " of the cluster";
    return name;
}

// File and line of an instruction, and of the calls that were inlined around it.
std::string location(const void* pc) {
    Dl_info library;
    if (!dladdr(pc, &library)) return "an unknown place";
    const size_t offset = static_cast<const char*>(pc) -
                          static_cast<const char*>(library.dli_fbase);
    char text[4096];
    snprintf(text, sizeof text, "addr2line -s -i -e '%s' %#zx", library.dli_fname, offset);
    FILE* lines = popen(text, "r");
    std::string found;
    while (lines && fgets(text, sizeof text, lines)) {
        text[strcspn(text, " \n")] = 0;
        found += (found.empty() ? "" : ", inlined at ") + std::string(text);
    }
    if (lines) pclose(lines);
    return found;
}

std::string place_name(const Place& place) {
    return std::string(COLLECTIVE_NAMES[place.collective]) + " at " + place.file + ":" +
           std::to_string(place.line);
}

void say_where() {
    if (current < 0) return;
    say("in %s of block (%u, %u, %u)", thread_name(current).c_str(), blockIdx.x,
        blockIdx.y, blockIdx.z);
}

std::string region_name(const Region& region) {
    return region.name + " (" + KIND_NAMES[static_cast<int>(region.kind)] + ", " +
           std::to_string(region.bytes) + " bytes)";
}

// Says where `address` lies relative to the nearest array.
void say_address(const char* address) {
    const Region* nearest = nullptr;
    long distance = static_cast<long>(GAP);
    for (const Region& region : regions) {
        const long before = region.base - address;
        const long after = address - (region.base + region.bytes) + 1;
        const long apart = std::max({before, after, 0l});
        if (apart >= distance) continue;
        nearest = &region;
        distance = apart;
    }
    if (!nearest) return;
    const long offset = address - nearest->base;
    const long over = offset - static_cast<long>(nearest->bytes);
    const std::string name = region_name(*nearest);
    if (offset < 0) say("%ld bytes before the start of %s", -offset, name.c_str());
    else if (over >= 0) say("%ld bytes after the end of %s", over, name.c_str());
    else say("%ld bytes before the end of %s", -over, name.c_str());
}

// Memory ------------------------------------------------------------------------------

size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

template <class T>
T* reserve(size_t bytes, int protection) {
    void* address = mmap(nullptr, whole_pages(bytes) + PAGE, protection,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) FAIL("no memory for %zu bytes", bytes);
    return static_cast<T*>(address);
}

// Gives `region` its memory, far from any other.
void allocate(Region& region) {
    const size_t room = whole_pages(region.bytes);
    region.base = arena_free + GAP;
    arena_free = region.base + room;
    if (arena_free + GAP > arena + ARENA) FAIL("the arrays exceed %zu bytes", ARENA);
    if (room && mprotect(region.base, room, PROT_READ | PROT_WRITE))
        FAIL("no memory for %s", region.name.c_str());
    region.cells = nullptr;
    if (region.kind != Kind::INPUT)
        region.cells =
            reserve<Cell>((region.bytes / CELL + 2) * sizeof(Cell), PROT_READ | PROT_WRITE);
}

// Outputs start poisoned. Inputs are pages of the file, which may be larger than memory.
void fill(Region& region, int data) {
    if (region.kind == Kind::OUTPUT) {
        memset(region.base, POISON, region.bytes);
    } else if (region.bytes) {
        void* mapped = mmap(region.base, region.bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED,
                            data, region.file_offset);
        if (mapped == MAP_FAILED) FAIL("can't map the data of %s", region.name.c_str());
    }
}

void write_back(const Region& region, int data) {
    size_t done = 0;
    while (done < region.bytes) {
        const ssize_t put = pwrite(data, region.base + done, region.bytes - done,
                                   region.file_offset + static_cast<off_t>(done));
        if (put <= 0) FAIL("can't write back %s", region.name.c_str());
        done += static_cast<size_t>(put);
    }
}

void release_all() {
    mmap(arena, static_cast<size_t>(arena_free - arena) + GAP, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    for (const Region& region : regions) {
        if (region.cells)
            munmap(region.cells,
                   whole_pages((region.bytes / CELL + 2) * sizeof(Cell)) + PAGE);
    }
    arena_free = arena;
    regions.clear();
}

// Races -------------------------------------------------------------------------------

// Whether what `earlier` did is visible to the running thread now, and only now.
inline bool ordered(const Access& earlier, const Region& region) {
    if (earlier.phase < first_phase)
        // Other clusters have their own shared memory, but share everything else.
        return region.kind == Kind::SHARED || earlier.phase == 0;
    if (earlier.thread == current) return true;
    const int block = block_of(current), warp = warp_of(current);
    if (block_of(earlier.thread) == block && earlier.phase < phases[block]) return true;
    if (warp_of(earlier.thread) == warp && earlier.warp_epoch < warp_epochs[warp]) return true;
    return earlier.arrivals < threads[current].waits;
}

[[noreturn]] void report_race(const Access& earlier, const char* did, const char* does,
                              const Region& region, size_t offset, const void* pc) {
    say_where();
    const std::string who = earlier.phase >= first_phase ? thread_name(earlier.thread)
                            : cluster > 1                ? "another cluster"
                                                         : "another block";
    FAIL("RACE: byte %zu of %s is %s at %s, and was %s by %s at %s, with no barrier between",
         offset, region.name.c_str(), does, location(pc).c_str(), did, who.c_str(),
         location(earlier.pc).c_str());
}

inline void note_cell(Cell& cell, const Region& region, size_t offset, bool write,
                      const void* pc) {
    const Access access{pc, phases[block_of(current)], warp_epochs[warp_of(current)],
                        threads[current].arrivals, current};
    if (!ordered(cell.writer, region))
        report_race(cell.writer, "written", write ? "written" : "read", region, offset, pc);
    if (!write) {
        cell.readers[ordered(cell.readers[0], region) ? 0 : 1] = access;
        return;
    }
    for (const Access& reader : cell.readers)
        if (!ordered(reader, region))
            report_race(reader, "read", "written", region, offset, pc);
    cell.writer = access;
}

[[noreturn]] void refuse(const char* rule, uintptr_t address, size_t bytes, bool write,
                         const void* pc) {
    say_where();
    say_address(reinterpret_cast<const char*>(address));
    FAIL("%s: %s of %zu bytes at %s", rule, write ? "write" : "read", bytes,
         location(pc).c_str());
}

// Whether the running thread's own variables, or constants of the program, lie there.
bool is_private(uintptr_t address) {
    const uintptr_t stack = reinterpret_cast<uintptr_t>(stack_of(current));
    if (address - stack < STACK) return true;
    return std::any_of(images.begin(), images.end(), [&](const Image& image) {
        return address - image.base < image.bytes;
    });
}

// Another block's shared memory is there once it is known that the block has started, and
// until it has finished.
void check_block(int block, uintptr_t address, size_t bytes, bool write, const void* pc) {
    if (block == block_of(current)) return;
    if (threads[current].waits == 0)
        refuse("BLOCK MAY NOT HAVE STARTED", address, bytes, write, pc);
    const auto first = threads.begin() + block * block_threads;
    if (std::all_of(first, first + block_threads,
                    [](const Thread& thread) { return thread.state == State::FINISHED; }))
        refuse("BLOCK HAS FINISHED", address, bytes, write, pc);
}

// Checks one access; every access of a function comes here first.
void check_access(uintptr_t address, size_t bytes, bool write, const void* returns) {
    if (current < 0) return;
    const void* pc = static_cast<const char*>(returns) - 1;
    if (address - reinterpret_cast<uintptr_t>(arena) >= ARENA) {
        if (!is_private(address)) refuse("WILD POINTER", address, bytes, write, pc);
        return;
    }
    if (bytes <= 16 && address % bytes) refuse("MISALIGNED", address, bytes, write, pc);
    // Backwards: shared memory, the last, is what most accesses are for.
    for (size_t i = regions.size(); i-- > 0;) {
        Region& region = regions[i];
        const size_t offset = address - reinterpret_cast<uintptr_t>(region.base);
        if (offset >= region.bytes || bytes > region.bytes - offset) continue;
        if (region.kind == Kind::SHARED)
            check_block(static_cast<int>(i + cluster - regions.size()), address, bytes, write,
                        pc);
        if (region.kind != Kind::INPUT) {
            for (size_t cell = offset / CELL; cell <= (offset + bytes - 1) / CELL; ++cell)
                note_cell(region.cells[cell], region, cell * CELL, write, pc);
        } else if (write) {
            refuse("WRITE TO AN INPUT", address, bytes, write, pc);
        }
        return;
    }
    refuse("OUT OF BOUNDS", address, bytes, write, pc);
}

// Threads -----------------------------------------------------------------------------

// Runs as the first frame of every thread.
void thread_main() {
    entry(entry_arguments);
    threads[current].state = State::FINISHED;
    setcontext(&scheduler);
}

void resume(int number) {
    Thread& thread = threads[number];
    current = number;
    threadIdx = thread.index;
    blockIdx = first_block;
    blockIdx.x += static_cast<unsigned>(block_of(number));
    swapcontext(&scheduler, &thread.context);
    current = -1;
}

// Gives the running thread's turn away until what it waits for has happened.
void wait_at(const Place& place) {
    Thread& thread = threads[current];
    thread.place = place;
    thread.state = State::WAITING;
    swapcontext(&thread.context, &scheduler);
}

bool same_place(const Place& a, const Place& b) {
    return a.collective == b.collective && a.line == b.line && !strcmp(a.file, b.file);
}

bool same_state(const Thread& a, const Thread& b) {
    if (a.state != b.state) return false;
    return a.state == State::FINISHED || same_place(a.place, b.place);
}

std::string state_name(int number) {
    if (threads[number].state == State::FINISHED)
        return thread_name(number) + " has finished";
    return thread_name(number) + " waits for " + place_name(threads[number].place);
}

// Fails unless the threads [first, last) have all come to the same point.
void require_same(int first, int last) {
    for (int number = first + 1; number < last; ++number) {
        if (same_state(threads[first], threads[number])) continue;
        FAIL("DIVERGENCE in block (%u, %u, %u): %s, %s", blockIdx.x, blockIdx.y,
             blockIdx.z, state_name(first).c_str(), state_name(number).c_str());
    }
}

bool waits_for_cluster(const Thread& thread) {
    return thread.state == State::WAITING && thread.place.collective == emulation::CLUSTER;
}

bool at_warp_collective(const Thread& thread) {
    return thread.state == State::WAITING && !waits_for_cluster(thread) &&
           thread.place.collective != emulation::SYNCTHREADS;
}

void exchange(int first, int last) {
    unsigned votes = 0;
    for (int number = first; number < last; ++number) {
        Thread& thread = threads[number];
        const int source = first + thread.source;
        memset(&thread.received, POISON, sizeof thread.received);
        if (source >= first && source < last) thread.received = threads[source].given;
        if (thread.given) votes |= 1u << (number - first);
    }
    const Place& place = threads[first].place;
    if (place.collective == emulation::SYNCWARP) ++warp_epochs[warp_of(first)];
    for (int number = first; number < last; ++number) {
        if (place.collective == emulation::BALLOT) threads[number].received = votes;
        threads[number].state = State::READY;
    }
}

// Runs one warp until all its lanes have finished or wait for the block or the cluster.
void run_warp(int first, int last) {
    for (;;) {
        for (int i = first; i < last; ++i) {
            const int number = descending ? first + last - 1 - i : i;
            if (threads[number].state == State::READY) resume(number);
        }
        const bool any = std::any_of(
            threads.begin() + first, threads.begin() + last, at_warp_collective);
        if (!any) return;
        require_same(first, last);
        exchange(first, last);
    }
}

void prepare_thread(int number) {
    Thread& thread = threads[number];
    const unsigned n = static_cast<unsigned>(number % block_threads);
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y,
                    n / (blockDim.x * blockDim.y)};
    thread.state = State::READY;
    thread.arrivals = thread.waits = 0;
    thread.copies.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack_of(number);
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
}

// Runs one block until all its threads have finished, or some wait for the cluster.
void run_block(int block) {
    const int first = block * block_threads, last = first + block_threads;
    const int warps = (block_threads + WARP - 1) / WARP;
    for (;;) {
        for (int i = 0; i < warps; ++i) {
            const int warp = first + (descending ? warps - 1 - i : i) * WARP;
            run_warp(warp, std::min(last, warp + WARP));
        }
        if (std::any_of(threads.begin() + first, threads.begin() + last, waits_for_cluster))
            return;
        require_same(first, last);
        ++phases[block];
        if (threads[first].state == State::FINISHED) return;
        for (int number = first; number < last; ++number)
            threads[number].state = State::READY;
    }
}

// Lets those go on who wait for a barrier of the cluster at which all have arrived that
// haven't finished. Whether there are any.
bool release_cluster() {
    unsigned arrivals = ~0u;
    for (const Thread& thread : threads)
        if (thread.state != State::FINISHED) arrivals = std::min(arrivals, thread.arrivals);
    bool any = false;
    for (Thread& thread : threads) {
        if (!waits_for_cluster(thread) || thread.waits >= arrivals) continue;
        ++thread.waits;
        thread.state = State::READY;
        any = true;
    }
    return any;
}

void run_cluster() {
    const int count = static_cast<int>(threads.size());
    for (unsigned block = 0; block < cluster; ++block)
        memset(shared_of(block).base, POISON, shared_of(block).bytes);
    for (int number = 0; number < count; ++number) prepare_thread(number);
    do {
        for (unsigned i = 0; i < cluster; ++i) run_block(descending ? cluster - 1 - i : i);
    } while (release_cluster());
    for (int number = 0; number < count; ++number)
        if (threads[number].state != State::FINISHED)
            FAIL("DIVERGENCE in the cluster: %s, and not all arrive",
                 state_name(number).c_str());
}

void run_grid(const Task& task) {
    const dim3 &grid = task.grid, &block = task.block;
    gridDim = grid;
    blockDim = block;
    cluster = task.cluster;
    if (uint64_t{block.x} * block.y * block.z - 1 >= MAX_THREADS)
        FAIL("LAUNCH: a block has 1 to %d threads, not %u x %u x %u", MAX_THREADS, block.x,
             block.y, block.z);
    if (cluster - 1 >= MAX_CLUSTER || grid.x % cluster)
        FAIL("LAUNCH: a grid consists of whole clusters of 1 to %u blocks, not %u blocks of %u",
             MAX_CLUSTER, grid.x, cluster);
    block_threads = static_cast<int>(block.x * block.y * block.z);
    threads.resize(static_cast<size_t>(block_threads) * cluster);
    warp_epochs.assign((block_threads + WARP - 1) / WARP * cluster, 0);
    first_phase = 1;
    const uint64_t clusters = uint64_t{grid.x} * grid.y * grid.z / cluster;
    for (uint64_t i = 0; i < clusters; ++i) {
        const uint64_t number = (descending ? clusters - 1 - i : i) * cluster;
        first_block = {static_cast<unsigned>(number % grid.x),
                       static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / (uint64_t{grid.x} * grid.y))};
        phases.assign(cluster, first_phase);
        run_cluster();
        first_phase = *std::max_element(phases.begin(), phases.end()) + 1;
    }
}

int add_images(dl_phdr_info* info, size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD)
            images.push_back({info->dlpi_addr + header.p_vaddr, header.p_memsz});
    }
    return 0;
}

// Requests ----------------------------------------------------------------------------

template <class T>
T symbol(void* library, const char* name) {
    void* address = dlsym(library, name);
    if (!address) FAIL("%s", dlerror());
    return reinterpret_cast<T>(address);
}

// Puts addresses in place of the numbers of arrays; 0 stays a null pointer.
void patch_pointers(Task& task) {
    for (size_t i = 0; i < task.pointers; ++i) {
        uint64_t number;
        char* word = task.arguments.data() + 8 * i;
        memcpy(&number, word, sizeof number);
        if (number > 0) memcpy(word, &regions.at(number - 1).base, sizeof number);
    }
}

void run_task(Task& task, int data) {
    void* library = dlopen(task.library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) FAIL("%s", dlerror());
    images.clear();
    dl_iterate_phdr(add_images, nullptr);
    entry = symbol<Entry>(library, "emulation_entry");
    const size_t expected =
        *symbol<const unsigned long*>(library, "emulation_argument_bytes");
    if (expected != task.arguments.size())
        FAIL("ARGUMENTS: the function's struct has %zu bytes, the launch packs %zu",
             expected, task.arguments.size());
    regions = std::move(task.regions);
    for (Region& region : regions) allocate(region);
    for (Region& region : regions)
        if (region.kind != Kind::SHARED) fill(region, data);
    patch_pointers(task);
    entry_arguments = task.arguments.data();
    descending = task.descending;
    run_grid(task);
    for (const Region& region : regions)
        if (region.kind == Kind::OUTPUT) write_back(region, data);
    release_all();
}

// Reads one task; see driver.py for the format. False at the end of the file.
bool read_task(FILE* file, Task& task) {
    char path[4096], name[64], kind;
    int descending_order;
    size_t argument_bytes, arrays;
    if (fscanf(file, " %4095[^\n]", path) != 1) return false;
    task.library = path;
    bool good =
        fscanf(file, "%u %u %u %u %u %u %u %zu %d %zu %zu %zu", &task.grid.x,
               &task.grid.y, &task.grid.z, &task.block.x, &task.block.y, &task.block.z,
               &task.cluster, &task.shared_bytes, &descending_order, &argument_bytes,
               &task.pointers, &arrays) == 12;
    task.descending = descending_order != 0;
    for (size_t i = 0; good && i < argument_bytes; ++i) {
        unsigned byte;
        good = fscanf(file, "%2x", &byte) == 1;
        task.arguments.push_back(static_cast<char>(byte));
    }
    for (size_t i = 0; good && i < arrays; ++i) {
        Region region{};
        long offset;
        good = fscanf(file, "%63s %c %zu %ld", name, &kind, &region.bytes, &offset) == 4;
        region.name = name;
        region.kind = kind == 'o' ? Kind::OUTPUT : Kind::INPUT;
        region.file_offset = offset;
        task.regions.push_back(region);
    }
    if (!good) FAIL("the request is malformed");
    Region shared{};
    shared.name = "shared memory";
    shared.kind = Kind::SHARED;
    shared.bytes = task.shared_bytes;
    task.regions.insert(task.regions.end(), task.cluster, shared);
    return true;
}

}  // namespace

// What functions call -----------------------------------------------------------------

namespace emulation {

char* shared_memory() { return shared_of(block_of(current)).base; }

int lane() { return current % block_threads % WARP; }

void meet_block(Place place) { wait_at(place); }

void arrive_at_cluster() {
    Thread& thread = threads[current];
    if (thread.arrivals++ == thread.waits) return;
    say_where();
    FAIL("CLUSTER: a thread must wait before it arrives again");
}

void wait_for_cluster(Place place) {
    const Thread& thread = threads[current];
    if (thread.arrivals == thread.waits) {
        say_where();
        FAIL("CLUSTER: a thread must arrive before it waits");
    }
    wait_at(place);
}

char* in_block(const void* own, int block) {
    const size_t offset = static_cast<const char*>(own) - shared_memory();
    if (offset >= shared_of(0).bytes || static_cast<unsigned>(block) >= cluster) {
        say_where();
        FAIL("CLUSTER: byte %zd of shared memory in block %d of %u", offset, block, cluster);
    }
    return shared_of(block).base + offset;
}

unsigned long long meet_warp(
    Place place, unsigned mask, unsigned long long given, int source) {
    const int block = block_of(current) * block_threads;
    const int first = current - lane();
    const int lanes = std::min(WARP, block + block_threads - first);
    const unsigned everyone = 0xffffffffu >> (WARP - lanes);
    if ((mask & everyone) != everyone) {
        say_where();
        FAIL("MASK %#x of %s leaves out lanes of the warp; only full masks are emulated",
             mask, place_name(place).c_str());
    }
    threads[current].given = given;
    threads[current].source = source;
    wait_at(place);
    return threads[current].received;
}

void copy_async(void* to, const void* from, unsigned bytes, bool exists) {
    const void* returns = __builtin_return_address(0);
    Copy copy{reinterpret_cast<uintptr_t>(to), bytes, {}, returns};
    if (exists) check_access(reinterpret_cast<uintptr_t>(from), bytes, false, returns);
    check_access(copy.to, bytes, true, returns);
    if (exists) memcpy(copy.content, from, bytes);
    // What was there before is lost from now on.
    memset(to, POISON, bytes);
    threads[current].copies.back().push_back(copy);
}

void commit_copies() { threads[current].copies.emplace_back(); }

void wait_for_copies(unsigned latest) {
    auto& batches = threads[current].copies;
    const size_t complete = batches.size() - 1;
    const size_t arriving = complete > latest ? complete - latest : 0;
    for (size_t i = 0; i < arriving; ++i) {
        for (const Copy& copy : batches[i]) {
            check_access(copy.to, copy.bytes, true, copy.returns);
            memcpy(reinterpret_cast<void*>(copy.to), copy.content, copy.bytes);
        }
    }
    batches.erase(batches.begin(), batches.begin() + static_cast<long>(arriving));
}

unsigned ballot(Place place, unsigned mask, bool vote) {
    return static_cast<unsigned>(meet_warp(place, mask, vote, 0));
}

}  // namespace emulation

// What the sanitizers call ------------------------------------------------------------

extern "C" {

#define HOOK(name, bytes, write)                                              \
    void __tsan_##name##bytes(uintptr_t address) {                            \
        check_access(address, bytes, write, __builtin_return_address(0));     \
    }
#define HOOKS(prefix, bytes)                                                  \
    HOOK(prefix##read, bytes, false)                                          \
    HOOK(prefix##write, bytes, true)
HOOKS(, 1)
HOOKS(, 2)
HOOKS(, 4)
HOOKS(, 8)
HOOKS(, 16)
HOOKS(unaligned_, 2)
HOOKS(unaligned_, 4)
HOOKS(unaligned_, 8)
HOOKS(unaligned_, 16)

void __tsan_read_range(uintptr_t address, size_t bytes) {
    check_access(address, bytes, false, __builtin_return_address(0));
}

void __tsan_write_range(uintptr_t address, size_t bytes) {
    check_access(address, bytes, true, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __ubsan_on_report() { say_where(); }

}  // extern "C"

// Usage: emulator REQUEST DATA
int main(int count, char** words) {
    if (count != 3) FAIL("usage: emulator REQUEST DATA");
    FILE* request = fopen(words[1], "r");
    const int data = open(words[2], O_RDWR);
    if (!request || data < 0) FAIL("can't open %s and %s", words[1], words[2]);
    arena = arena_free = reserve<char>(ARENA, PROT_NONE);
    constexpr int stack_count = MAX_THREADS * MAX_CLUSTER;
    stacks = reserve<char>(stack_count * (STACK + PAGE), PROT_READ | PROT_WRITE);
    for (int i = 0; i < stack_count; ++i)
        mprotect(stack_of(i) - PAGE, PAGE, PROT_NONE);
    for (int number = 0;; ++number) {
        Task task{};
        if (!read_task(request, task)) return 0;
        run_task(task, data);
    }
}
