// Blocks of coroutines.

#include "emulate.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulate {
namespace {

constexpr std::size_t STACK_BYTES = 64 << 10;
// What a block may have of static shared memory.
constexpr std::size_t SHARED_BYTES = 48 << 10;
// Bytes behind dynamic shared memory, and behind each static array, that nobody may write.
constexpr std::size_t GUARD_BYTES = 64;
// What shared memory holds before anyone wrote it: a NaN in every format.
constexpr int POISON = 0xff;

enum class State { Ready, AtWarp, AtBlock, Done };

struct Warp {
    unsigned char slots[2][WARP][SLOT_BYTES];
};

// Bytes on their way to shared memory; behind them come zeros.
struct Copy {
    void* target;
    const void* source;
    std::size_t bytes, zeros;

    void arrive() const {
        std::memcpy(target, source, bytes);
        std::memset(static_cast<unsigned char*>(target) + bytes, 0, zeros);
    }
};

struct Thread {
    // Where it begins; from then on it goes by `place_in_code`, which costs no call of the system.
    ucontext_t context;
    jmp_buf place_in_code;
    // It stays behind the end of a kernel and goes on with the next one.
    bool has_begun = false;
    std::unique_ptr<unsigned char[]> stack;
    State state;
    Place place;
    unsigned warp, lane, num_exchanges;
    // In groups; the last one is not committed.
    std::vector<std::vector<Copy>> copies;
};

struct Block {
    jmp_buf scheduler;
    // The first `num_threads` are the block's.
    std::vector<Thread> threads;
    std::size_t num_threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> dynamic;
    std::vector<unsigned char> fixed;
    // By their keys, where in `fixed` they are.
    std::map<const void*, std::size_t> places;
    std::size_t num_placed;
    // Of the static arrays, their guards apart.
    std::size_t static_bytes;
    // Where each guard begins.
    std::vector<std::size_t> guards;
    void (*call)(void**);
    void** params;
    Thread* running;
    // Whether copies arrive when they are asked for, and not when they are waited for.
    bool copies_at_once;
};

// Threads are kept for the next block: their stacks cost more than what runs on them.
thread_local Block kept;
thread_local Block* current;

void give_way(State state) {
    Thread& self = *current->running;
    self.state = state;
    if (_setjmp(self.place_in_code) == 0) _longjmp(current->scheduler, 1);
}

void go_on(Block& block, Thread& thread) {
    block.running = &thread;
    if (_setjmp(block.scheduler) != 0) return;
    if (thread.has_begun) _longjmp(thread.place_in_code, 1);
    thread.has_begun = true;
    setcontext(&thread.context);
}

void enter() {
    for (;;) {
        current->call(current->params);
        give_way(State::Done);
    }
}

// Puts a thread before its first instruction.
void begin(Thread& thread, unsigned index, const Place& place) {
    thread.place = place;
    thread.warp = index / WARP;
    thread.lane = index % WARP;
    thread.num_exchanges = 0;
    thread.copies.assign(1, {});
    thread.state = State::Ready;
    if (thread.has_begun) return;
    if (!thread.stack) thread.stack.reset(new unsigned char[STACK_BYTES]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK_BYTES;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
}

// Whether all of a range of threads are in a state; those are made ready if so.
bool release(Block& block, std::size_t first, std::size_t end, State state) {
    for (std::size_t i = first; i < end; i++)
        if (block.threads[i].state != state) return false;
    for (std::size_t i = first; i < end; i++) block.threads[i].state = State::Ready;
    return true;
}

// An order of so many threads, another one for each seed; 0 is theirs.
std::vector<std::size_t> order_of(std::size_t count, unsigned seed) {
    std::vector<std::size_t> order(count);
    for (std::size_t i = 0; i < count; i++) order[i] = i;
    for (std::size_t i = count; seed != 0 && i > 1; i--) {
        seed = seed * 1664525u + 1013904223u;
        std::swap(order[i - 1], order[(seed >> 8) % i]);
    }
    return order;
}

// Runs a warp until all of its threads wait for the block or are done; gives whether any of them went on.
bool run_warp(Block& block, std::size_t first, unsigned seed) {
    const std::size_t end = std::min(block.num_threads, first + WARP);
    bool ran = false;
    for (unsigned round = 0;; round++) {
        for (std::size_t i : order_of(end - first, seed == 0 ? 0 : seed + round)) {
            Thread& thread = block.threads[first + i];
            if (thread.state == State::Ready) {
                go_on(block, thread);
                ran = true;
            }
        }
        if (!release(block, first, end, State::AtWarp)) return ran;
    }
}

bool is_poison(const std::vector<unsigned char>& bytes, std::size_t first) {
    const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(first);
    return std::all_of(begin, begin + GUARD_BYTES, [](unsigned char byte) { return byte == POISON; });
}

const char* run(Block& block, unsigned seed) {
    const auto end = block.threads.begin() + static_cast<std::ptrdiff_t>(block.num_threads);
    for (unsigned round = 1;; round++) {
        bool ran = false;
        // Another order of warps between any two barriers.
        const unsigned mixed = seed * 0x9e3779b9u + round * (seed != 0);
        for (std::size_t warp : order_of(block.warps.size(), mixed)) ran |= run_warp(block, warp * WARP, mixed);
        const auto is_done = [](const Thread& thread) { return thread.state == State::Done; };
        if (std::all_of(block.threads.begin(), end, is_done)) break;
        if (!release(block, 0, block.num_threads, State::AtBlock) && !ran) return "threads wait at a barrier that others do not reach";
    }
    bool is_whole = is_poison(block.dynamic, block.dynamic.size() - GUARD_BYTES);
    for (std::size_t guard : block.guards) is_whole &= is_poison(block.fixed, guard);
    return is_whole ? nullptr : "a thread wrote behind the block's shared memory";
}

std::map<std::string, void (*)(void**)>& kernels() {
    static std::map<std::string, void (*)(void**)> all;
    return all;
}

}  // namespace

const Place& place() { return current->running->place; }
unsigned lane() { return current->running->lane; }
unsigned warp_size() {
    const std::size_t first = static_cast<std::size_t>(current->running->warp) * WARP;
    return static_cast<unsigned>(std::min<std::size_t>(WARP, current->num_threads - first));
}
void* dynamic_shared() { return current->dynamic.data(); }
void* static_shared(const void* key, std::size_t bytes, std::size_t alignment) {
    Block& block = *current;
    const auto known = block.places.find(key);
    if (known != block.places.end()) return &block.fixed[known->second];
    const std::size_t place = (block.num_placed + alignment - 1) / alignment * alignment;
    // More than there is fails at once, as a launch would.
    if (place + bytes + GUARD_BYTES > block.fixed.size()) std::abort();
    block.places[key] = place;
    block.guards.push_back(place + bytes);
    block.num_placed = place + bytes + GUARD_BYTES;
    block.static_bytes += bytes;
    return &block.fixed[place];
}
void block_barrier() { give_way(State::AtBlock); }
void warp_barrier() { give_way(State::AtWarp); }

// A lane that is still reading the last set cannot be two exchanges behind.
unsigned char (*exchange())[SLOT_BYTES] {
    Thread& self = *current->running;
    return current->warps[self.warp].slots[self.num_exchanges++ % 2];
}

void copy_async(void* target, const void* source, std::size_t bytes, std::size_t zeros) {
    // The instruction faults where either end is not aligned.
    const std::size_t size = bytes + zeros;
    if (reinterpret_cast<std::uintptr_t>(target) % size || reinterpret_cast<std::uintptr_t>(source) % size) std::abort();
    const Copy copy = {target, source, bytes, zeros};
    if (current->copies_at_once) return copy.arrive();
    current->running->copies.back().push_back(copy);
}

void commit_copies() { current->running->copies.emplace_back(); }

void wait_for_copies(unsigned num_left) {
    auto& groups = current->running->copies;
    // The last one is not committed, and nobody waits for it.
    while (groups.size() > num_left + 1) {
        for (const Copy& copy : groups.front()) copy.arrive();
        groups.erase(groups.begin());
    }
}

void add(const char* name, void (*call)(void**)) { kernels()[name] = call; }

}  // namespace emulate

// Static shared memory of the thread's last kernel.
extern "C" std::size_t moesaic_static_shared() { return emulate::kept.static_bytes; }

extern "C" bool moesaic_emulates(const char* name) { return emulate::kernels().count(name) != 0; }

// Runs a kernel; gives what is wrong, or null.
extern "C" const char* moesaic_emulate(const char* name, const unsigned* grid, const unsigned* block_size, std::size_t shared_bytes,
                                       unsigned seed, void** params) {
    using namespace emulate;
    const auto found = kernels().find(name);
    if (found == kernels().end()) return "there is no such kernel";
    const std::size_t count = static_cast<std::size_t>(block_size[0]) * block_size[1] * block_size[2];
    if (count == 0 || count > 1024) return "a block has 1 to 1024 threads";
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return "a grid has a block at least";
    Block& block = kept;
    block.call = found->second;
    block.params = params;
    block.copies_at_once = seed % 2 == 1;
    block.num_threads = count;
    if (block.threads.size() < count) block.threads.resize(count);
    block.warps.resize((count + WARP - 1) / WARP);
    current = &block;
    const char* fault = nullptr;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0] && fault == nullptr; x++) {
                block.dynamic.assign(shared_bytes + GUARD_BYTES, POISON);
                block.fixed.assign(SHARED_BYTES, POISON);
                block.places.clear();
                block.guards.clear();
                block.num_placed = 0;
                block.static_bytes = 0;
                for (unsigned i = 0; i < count; i++) {
                    const unsigned width = block_size[0], height = block_size[1];
                    begin(block.threads[i], i,
                          {{i % width, i / width % height, i / width / height},
                           {x, y, z},
                           {block_size[0], block_size[1], block_size[2]},
                           {grid[0], grid[1], grid[2]}});
                }
                fault = run(block, seed);
            }
    // Some may stand in the middle of the kernel that went wrong.
    if (fault != nullptr) block.threads.clear();
    current = nullptr;
    return fault;
}
