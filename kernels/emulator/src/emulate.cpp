// Blocks of coroutines.

#include "emulate.h"

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulate {
namespace {

constexpr std::size_t STACK_BYTES = 64 << 10;
// What shared memory holds before anyone wrote it: a NaN in every format.
constexpr int POISON = 0xff;

enum class State { Ready, AtWarp, AtBlock, Done };

struct Warp {
    unsigned char slots[2][WARP][8];
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
};

struct Block {
    jmp_buf scheduler;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    void (*call)(void**);
    void** params;
    Thread* running;
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

const char* run(Block& block, unsigned seed) {
    const std::size_t count = block.threads.size();
    for (unsigned round = 0;; round++) {
        bool ran = false, all_done = true;
        for (std::size_t i : order_of(count, seed == 0 ? 0 : seed + round)) {
            Thread& thread = block.threads[i];
            if (thread.state == State::Ready) {
                go_on(block, thread);
                ran = true;
            }
            all_done &= thread.state == State::Done;
        }
        if (all_done) return nullptr;
        for (std::size_t first = 0; first < count; first += WARP)
            ran |= release(block, first, std::min(count, first + WARP), State::AtWarp);
        ran |= release(block, 0, count, State::AtBlock);
        if (!ran) return "threads wait at a barrier that others do not reach";
    }
}

std::map<std::string, void (*)(void**)>& kernels() {
    static std::map<std::string, void (*)(void**)> all;
    return all;
}

}  // namespace

const Place& place() { return current->running->place; }
unsigned lane() { return current->running->lane; }
void* dynamic_shared() { return current->shared.data(); }
void block_barrier() { give_way(State::AtBlock); }
void warp_barrier() { give_way(State::AtWarp); }

// A lane that is still reading the last set cannot be two exchanges behind.
unsigned char (*exchange())[8] {
    Thread& self = *current->running;
    return current->warps[self.warp].slots[self.num_exchanges++ % 2];
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
    Block block{};
    block.call = found->second;
    block.params = params;
    block.threads.resize(count);
    block.warps.resize((count + WARP - 1) / WARP);
    current = &block;
    const char* fault = nullptr;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0] && fault == nullptr; x++) {
                block.shared.assign(shared_bytes, POISON);
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
