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
    alignas(8) unsigned char slots[2][WARP][EXCHANGE_BYTES];
};

// A copy that a thread has asked for.
struct Copy {
    void* to;
    const void* from;
    std::size_t bytes, valid;
    unsigned group;
};

struct Thread {
    // Where it begins; from then on it goes by `place_in_code`, which costs no call of the system.
    ucontext_t context;
    jmp_buf place_in_code;
    bool has_begun;
    std::unique_ptr<unsigned char[]> stack;
    State state;
    Place place;
    unsigned warp, lane, num_exchanges;
    std::vector<Copy> copies;
    // Groups of copies that were closed.
    unsigned num_groups;
};

struct Block {
    jmp_buf scheduler;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> dynamic;
    std::vector<unsigned char> fixed;
    // By their keys, where in `fixed` they are.
    std::map<const void*, std::size_t> places;
    std::size_t num_placed;
    // Where each guard begins.
    std::vector<std::size_t> guards;
    void (*call)(void**);
    void** params;
    Thread* running;
    // Whether copies are made when they are waited for.
    bool copies_late;
};

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
    current->call(current->params);
    give_way(State::Done);
}

// Puts a thread before its first instruction.
void begin(Thread& thread, unsigned index, const Place& place) {
    if (!thread.stack) thread.stack.reset(new unsigned char[STACK_BYTES]);
    thread.place = place;
    thread.warp = index / WARP;
    thread.lane = index % WARP;
    thread.num_exchanges = 0;
    thread.copies.clear();
    thread.num_groups = 0;
    thread.state = State::Ready;
    thread.has_begun = false;
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
    const std::size_t end = std::min(block.threads.size(), first + WARP);
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
    const std::size_t count = block.threads.size();
    for (unsigned round = 1;; round++) {
        bool ran = false;
        // Another order of warps between any two barriers.
        const unsigned mixed = seed * 0x9e3779b9u + round * (seed != 0);
        for (std::size_t warp : order_of(block.warps.size(), mixed)) ran |= run_warp(block, warp * WARP, mixed);
        const auto is_done = [](const Thread& thread) { return thread.state == State::Done; };
        if (std::all_of(block.threads.begin(), block.threads.end(), is_done)) break;
        if (!release(block, 0, count, State::AtBlock) && !ran) return "threads wait at a barrier that others do not reach";
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
    return &block.fixed[place];
}
void block_barrier() { give_way(State::AtBlock); }
void warp_barrier() { give_way(State::AtWarp); }

// A lane that is still reading the last set cannot be two exchanges behind.
unsigned char (*exchange())[EXCHANGE_BYTES] {
    Thread& self = *current->running;
    return current->warps[self.warp].slots[self.num_exchanges++ % 2];
}

namespace {

void make(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(static_cast<unsigned char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

unsigned byte_of(unsigned word, unsigned idx) { return word >> (8 * idx) & 0xff; }

float half_of(unsigned word, unsigned idx) { return __uint_as_float(word >> (16 * idx) << 16); }

// A lane's parts of the two factors.
struct Factors {
    unsigned a[4], b[2];
};

// Adds this lane's part of the product to `c`. A register holds WIDTH neighbours along the inner dimension; four lanes
// share one half of it.
template <unsigned WIDTH, class Sum, class Number, class OfA, class OfB>
void multiply(Number (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], OfA of_a, OfB of_b) {
    const Shown<Factors> all({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
        Sum sum = 0;
        for (unsigned half = 0; half < 2; half++)
            for (unsigned source = 0; source < 4; source++) {
                const unsigned of_row = all.of(row % 8 * 4 + source).a[row / 8 + half * 2];
                const unsigned of_col = all.of(col * 4 + source).b[half];
                for (unsigned k = 0; k < WIDTH; k++) sum += static_cast<Sum>(of_a(of_row, k)) * of_b(of_col, k);
            }
        c[i] = static_cast<Number>(c[i] + sum);
    }
}

}  // namespace

void copy_later(void* to, const void* from, std::size_t bytes, std::size_t valid) {
    Thread& self = *current->running;
    const Copy copy = {to, from, bytes, valid, self.num_groups};
    if (current->copies_late) {
        self.copies.push_back(copy);
    } else {
        make(copy);
    }
}

void commit_copies() { current->running->num_groups++; }

void wait_for_copies(unsigned left) {
    Thread& self = *current->running;
    const auto is_due = [&](const Copy& copy) { return copy.group + left < self.num_groups; };
    for (const Copy& copy : self.copies)
        if (is_due(copy)) make(copy);
    self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), is_due), self.copies.end());
}

unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors) {
    unsigned result = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned selector = selectors >> (4 * i) & 15;
        unsigned byte = byte_of(selector & 4 ? high : low, selector & 3);
        if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}

void mma_u8_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const auto signed_byte_of = [](unsigned word, unsigned idx) { return static_cast<signed char>(byte_of(word, idx)); };
    multiply<4, int>(c, a, b, byte_of, signed_byte_of);
}

void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply<2, double>(c, a, b, half_of, half_of);
}

void add(const char* name, void (*call)(void**)) { kernels()[name] = call; }

}  // namespace emulate

// Runs a kernel; gives what is wrong, or null.
extern "C" const char* moesaic_emulate(const char* name, const unsigned* grid, const unsigned* block_size, std::size_t shared_bytes,
                                       unsigned seed, void** params) {
    using namespace emulate;
    const auto found = kernels().find(name);
    if (found == kernels().end()) return "there is no such kernel";
    const std::size_t count = static_cast<std::size_t>(block_size[0]) * block_size[1] * block_size[2];
    if (count == 0 || count > 1024) return "a block has 1 to 1024 threads";
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return "a grid has a block at least";
    Block block{};
    block.call = found->second;
    block.params = params;
    block.copies_late = seed % 2 == 1;
    block.threads.resize(count);
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
    current = nullptr;
    return fault;
}
