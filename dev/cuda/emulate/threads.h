/* The emulated GPU: blocks and threads.

   A fiber is a stack. It runs a thread of the block to its end, then the next one that has not started, so
   threads without a barrier all run on one fiber, without a switch. At a barrier the fiber sleeps, and
   another one runs: one that was woken, else a new one. Slots number the threads in the order in which they
   run, warp by warp. */
#pragma once

namespace emulate {
extern "C" __attribute__((visibility("hidden"))) void emulate_switch(void **from, void *to);
#if defined(__x86_64__)
__asm__(".text\n.p2align 4\n.hidden emulate_switch\n.globl emulate_switch\n.type emulate_switch,@function\n"
        "emulate_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
        ".size emulate_switch,.-emulate_switch\n");
enum { SWITCH_WORDS = 8, SWITCH_ENTRY = 6 };      /* saved words; index of the return address */
#elif defined(__aarch64__)
__asm__(".text\n.p2align 4\n.hidden emulate_switch\n.globl emulate_switch\n.type emulate_switch,@function\n"
        "emulate_switch:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
        "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x2, sp\nstr x2, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
        "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n"
        ".size emulate_switch,.-emulate_switch\n");
enum { SWITCH_WORDS = 20, SWITCH_ENTRY = 11 };
#else
#error "emulate.h changes stacks on x86-64 and aarch64 only: add emulate_switch for this processor"
#endif

enum { WARP = 32, MOST_THREADS = 1024, MOST_SHARED = 227 * 1024, STACK = 256 * 1024 };
struct Fiber { void *sp; char *stack; };
#if defined(__SANITIZE_ADDRESS__)                 /* AddressSanitizer of GCC must know the other stacks */
extern "C" void __sanitizer_start_switch_fiber(void **, const void *, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void *, const void **, size_t *);
#endif
struct Copies {
    std::vector<std::pair<void *, const void *>> open;
    std::deque<decltype(open)> groups;
    bool hidden = false;                  /* from wgmma, until copies_visible */
};

struct Block {
    const char *kernel;
    void (*call)(void *);                 /* the kernel with its arguments */
    void *arguments;
    char *shared;                         /* dynamic shared memory, its end at a guard page */
    size_t shared_bytes;
    int threads, slots, warps;            /* slots: threads rounded up to whole warps */
    int current;                          /* slot of the running thread */
    bool descending;                      /* the last slot is thread 0 */
    int at_barrier, ended;
    uint32_t busy;                        /* warps with a thread that can run */
    uint32_t exists[WARP], ready[WARP];   /* threads of a warp: existing; able to run */
    uint32_t waits[WARP];                 /* waiting at an operation of the warp */
    void (*operation[WARP])(void **);
    const char *name[WARP];
    void *brought[WARP][WARP];            /* arguments of the operation, by lane; NULL: no thread */
    const char *state[MOST_THREADS];      /* for messages: where the thread waits, by slot; NULL: it runs */
    uint3 index[MOST_THREADS];            /* threadIdx by slot */
    Fiber *fiber[MOST_THREADS];           /* of running threads, by slot */
    Copies copies[MOST_THREADS];          /* of cp.async, by slot */
    bool copied;                          /* is there any? */
    std::vector<Fiber *> *idle, *all;
    Fiber *running, host;
    size_t host_stack;                    /* its size, where needed */
    cudaError_t error;
};
inline Block block;
inline int thread_of(int slot) {
    if (block.descending) return block.slots - 1 - slot;
    return slot;
}
inline int lane_id(void) { return thread_of(block.current) & (WARP - 1); }
inline void become(int slot) {
    block.current = slot;
    threadIdx = block.index[slot];
}

/* Leaves the running fiber until another one switches back to it. */
inline void switch_to(Fiber *to) {
    Fiber *from = block.running;
    block.running = to;
#if defined(__SANITIZE_ADDRESS__)
    void *frames = NULL;
    __sanitizer_start_switch_fiber(&frames, to->stack, to == &block.host ? block.host_stack : (size_t)STACK);
    emulate_switch(&from->sp, to->sp);
    __sanitizer_finish_switch_fiber(frames, NULL, NULL);
#else
    emulate_switch(&from->sp, to->sp);
#endif
}

/* Ends the kernel with an error, from within one of its threads. */
__attribute__((format(printf, 2, 3), noreturn))
inline void stop(cudaError_t error, const char *format, ...) {
    char what[512];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    block.error = fail(error, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s", block.kernel,
                       blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    switch_to(&block.host);
    __builtin_unreachable();
}
__attribute__((noreturn)) inline void stop_deadlock(void) {
    int waiting = -1, other = -1;
    for (int slot = 0; slot < block.slots; slot++)
        if (block.state[slot] && strcmp(block.state[slot], "its end")) waiting = slot;
    for (int slot = 0; slot < block.slots; slot++)
        if (block.state[slot] && strcmp(block.state[slot], block.state[waiting])) other = slot;
    become(waiting);
    stop(cudaErrorLaunchFailure,
         "deadlock: it waits at %s, which not all threads of its %s reach: thread %d is at %s",
         block.state[waiting], strcmp(block.state[waiting], "__syncthreads") ? "warp" : "block",
         other < 0 ? -1 : thread_of(other), other < 0 ? "?" : block.state[other]);
}

/* A thread that can run: of the same warp if there is one, in the order of slots. -1: none. */
inline int pick(void) {
    int warp = block.current / WARP;
    uint32_t ready = block.ready[warp], later = ready & ~((2u << block.current % WARP) - 1);
    if (!ready) {
        if (!block.busy) return -1;
        uint32_t after = block.busy & ~((2u << warp) - 1);
        if (!after) after = block.busy;
        warp = __builtin_ctz(after);
        ready = later = block.ready[warp];
    }
    if (!later) later = ready;
    const int lane = __builtin_ctz(later);
    block.ready[warp] &= ~(1u << lane);
    if (!block.ready[warp]) block.busy &= ~(1u << warp);
    return warp * WARP + lane;
}
inline void fiber_main(void);
inline void fiber_prepare(Fiber *fiber) {
    void **top = (void **)(fiber->stack + STACK - 4096 - 16) - SWITCH_WORDS;
    top -= (size_t)fiber->stack / STACK % 32 * 16;        /* tops of stacks in different cache sets */
    memset(top, 0, SWITCH_WORDS * sizeof *top);
    top[SWITCH_ENTRY] = (void *)fiber_main;
    fiber->sp = top;
}
inline Fiber *fiber_take(void) {
    if (block.idle->empty()) {
        Fiber *fiber = new Fiber;
        void *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0);
        if (stack == MAP_FAILED) abort();
        fiber->stack = (char *)stack;
        mprotect(stack, 4096, PROT_NONE);
        fiber_prepare(fiber);
        block.all->push_back(fiber);
        return fiber;
    }
    Fiber *fiber = block.idle->back();
    block.idle->pop_back();
    return fiber;
}
inline void go(int slot) {
    become(slot);
    if (!block.fiber[slot]) block.fiber[slot] = fiber_take();
    switch_to(block.fiber[slot]);
}
inline void fiber_main(void) {
#if defined(__SANITIZE_ADDRESS__)
    const void *from;
    size_t bytes;
    __sanitizer_finish_switch_fiber(NULL, &from, &bytes);
    if (!block.host_stack) {              /* the first fiber comes from the host */
        block.host.stack = (char *)from;
        block.host_stack = bytes;
    }
#endif
    for (;;) {
        block.call(block.arguments);
        block.ended++;
        block.state[block.current] = "its end";
        block.fiber[block.current] = NULL;
        const int next = pick();
        if (next < 0 && block.ended < block.threads) stop_deadlock();
        if (next >= 0 && !block.fiber[next]) {            /* not started: runs here */
            block.fiber[next] = block.running;
            become(next);
            continue;
        }
        block.idle->push_back(block.running);
        if (next >= 0) {
            go(next);
        } else {
            switch_to(&block.host);
        }
    }
}

/* A thread waits, and others run. */
inline void sleep_at(const char *where) {
    const int slot = block.current;
    block.state[slot] = where;
    const int next = pick();
    if (next < 0) stop_deadlock();
    go(next);
    block.state[slot] = NULL;
}
inline void wake(int warp) {
    block.ready[warp] = block.exists[warp];
    if (warp == block.current / WARP) block.ready[warp] &= ~(1u << block.current % WARP);
    if (block.ready[warp]) block.busy |= 1u << warp;
}
inline void barrier(void) {
    if (++block.at_barrier < block.threads) {
        sleep_at("__syncthreads");
        return;
    }
    block.at_barrier = 0;
    for (int warp = 0; warp < block.warps; warp++) wake(warp);
}

/* An operation of a whole warp. Each lane passes a struct; when the last one has arrived, `finish` gets all
   32 (NULL in an incomplete warp) and stores the results in them. */
inline void warp_operation(const char *name, void (*finish)(void **), void *mine) {
    const int warp = block.current / WARP, lane = block.current % WARP;
    if (block.waits[warp] && (block.operation[warp] != finish || block.name[warp] != name))
        stop(cudaErrorLaunchFailure, "it is at %s while other threads of its warp are at %s", name,
             block.name[warp]);
    block.operation[warp] = finish;
    block.name[warp] = name;
    block.brought[warp][lane_id()] = mine;
    block.waits[warp] |= 1u << lane;
    if (block.waits[warp] != block.exists[warp]) {
        sleep_at(name);
        return;
    }
    finish(block.brought[warp]);
    block.waits[warp] = 0;
    wake(warp);
}

/* Fills shared memory with NaN. Static shared arrays are thread_local variables, which are all filled. */
inline void shared_fill(void) {
    memset(device().tls, 0xff, device().tls_bytes);
    memset(block.shared, 0xff, block.shared_bytes);
}

inline cudaError_t run_grid(const char *kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                            void (*call)(void *), void *arguments) {
    static char *shared_end = NULL;
    if (!shared_end) {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (MOST_SHARED + page - 1) / page * page;
        void *p = mmap(NULL, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) abort();
        shared_end = (char *)p + bytes;
        mprotect(shared_end, page, PROT_NONE);
        block.idle = new std::vector<Fiber *>;
        block.all = new std::vector<Fiber *>;
    }
    if (block.error) {                    /* the last kernel was aborted: start with new fibers */
        *block.idle = *block.all;
        for (Fiber *fiber : *block.all) fiber_prepare(fiber);
    }
    block.kernel = kernel;
    block.call = call;
    block.arguments = arguments;
    block.error = cudaSuccess;
    block.shared_bytes = (shared_bytes + 15) / 16 * 16;
    block.shared = shared_end - block.shared_bytes;
    block.threads = (int)(threads.x * threads.y * threads.z);
    block.warps = (block.threads + WARP - 1) / WARP;
    block.slots = block.warps * WARP;
    block.descending = device().descending;
    memset(block.exists, 0, sizeof block.exists);
    memset(block.brought, 0, sizeof block.brought);
    for (int slot = 0; slot < block.slots; slot++) {
        const unsigned t = (unsigned)thread_of(slot);
        block.index[slot] = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
        if ((int)t < block.threads) block.exists[slot / WARP] |= 1u << slot % WARP;
    }
    gridDim = grid;
    blockDim = threads;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                shared_fill();
                memcpy(block.ready, block.exists, sizeof block.ready);
                memset(block.waits, 0, sizeof block.waits);
                memset(block.state, 0, (size_t)block.slots * sizeof *block.state);
                memset(block.fiber, 0, (size_t)block.slots * sizeof *block.fiber);
                if (block.copied)
                    for (Copies &copies : block.copies) copies = Copies();
                block.copied = false;
                block.at_barrier = block.ended = 0;
                block.busy = block.warps == 32 ? 0xffffffff : (1u << block.warps) - 1;
                block.current = 0;
                block.running = &block.host;
                block.ready[0] &= ~(1u << __builtin_ctz(block.exists[0]));
                if (!block.ready[0]) block.busy &= ~1u;
                go(__builtin_ctz(block.exists[0]));
                if (block.error) return block.error;
            }
    return cudaSuccess;
}

inline std::map<const void *, size_t> &shared_allowed() {         /* by kernel, after cudaFuncSetAttribute */
    static auto *map = new std::map<const void *, size_t>;
    return *map;
}

/* Whether an argument of a kernel points to host memory. In a struct, any word that is a mapped address and
   not in device or pinned memory counts. */
inline bool host_pointer(const void *argument, size_t bytes, const void **found) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i + sizeof(void *) <= bytes; i += sizeof(void *)) {
        uintptr_t value;
        unsigned char resident;
        memcpy(&value, (const char *)argument + i, sizeof value);
        if (value >> 48 || value < (uintptr_t)1 << 24 || allocation_near((void *)value)) continue;
        if (mincore((void *)(value & ~(page - 1)), 1, &resident)) continue;
        *found = (void *)value;
        return true;
    }
    return false;
}

inline cudaError_t launch_check(const char *kernel, const void *function, dim3 grid, dim3 threads,
                                size_t shared) {
    const size_t n = (size_t)threads.x * threads.y * threads.z;
    size_t allowed = 48 * 1024;
    if (shared_allowed().count(function)) allowed = shared_allowed()[function];
    if (n == 0 || n > MOST_THREADS || threads.z > 64)
        return fail(cudaErrorInvalidConfiguration,
                    "kernel %s: a block of (%u, %u, %u) threads; 1 to 1024 are possible",
                    kernel, threads.x, threads.y, threads.z);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        return fail(cudaErrorInvalidConfiguration, "kernel %s: a grid of (%u, %u, %u) blocks", kernel,
                    grid.x, grid.y, grid.z);
    if (shared > allowed)
        return fail(cudaErrorInvalidValue, "kernel %s: %zu bytes of shared memory, %zu are allowed "
                    "(cudaFuncSetAttribute)", kernel, shared, allowed);
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
void launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
            Stream *stream, Arguments &&...arguments) {
    typedef std::tuple<void (*)(Parameters...), std::decay_t<Parameters>...> Call;
    std::lock_guard<std::recursive_mutex> lock(device().calls);
    if (sticky || launch_check(name, (const void *)kernel, grid, threads, shared)) return;
    Call call(kernel, std::forward<Arguments>(arguments)...);
    const void *host = NULL;
    std::apply([&](auto, auto &...argument) {
        (void)(... || host_pointer(&argument, sizeof argument, &host));
    }, call);
    if (host) {
        fail(cudaErrorIllegalAddress,
             "kernel %s was given %p, which is host memory: a device cannot reach it", name, host);
        sticky = latest;
        return;
    }
    put(find(stream), [=]() mutable {
        return run_grid(name, grid, threads, shared, [](void *packed) {
            std::apply([](auto function, auto &...argument) { function(argument...); }, *(Call *)packed);
        }, &call);
    });
}
}
