/* CUDA on the CPU, for tests: with this, train_gpt2.cu compiles as C++ for the host, and runs there.

     make emulated                    build/emulated/libgpt2cu.so, the product's library on no GPU
     g++ -x c++ -std=c++17 -DGPT2_EMULATE -Idev/cuda/include ... train_gpt2.cu -lpthread

   include/ has files of the names of the CUDA toolkit's headers, and each includes this one. What it is: the
   part of CUDA that train_gpt2.cu uses, with its meaning taken at its strictest:

     threads       The threads of a block are fibers, one at a time, each up to the next __syncthreads, or
                   shuffle or other operation of its warp. One that not all threads reach is an error.
     memory        The host cannot touch device memory, since outside of kernels and copies it is not mapped;
                   a kernel's pointer to host memory is refused; guard pages lie around every allocation.
                   Fresh memory of the device, pinned, and shared is NaN, the latter before each block.
     time          What is put into a stream runs as late as CUDA allows, when something waits for it, and
                   cp.async copies at its wait: who reads without waiting reads NaN, or what was there before.
     cuBLASLt      Plain loops, products and sums in fp32; what the manual forbids is refused.

   What it refuses to be: a simulator of a GPU. It has no timing, no caches, no memory model; blocks run one
   after another, so that it finds no race between blocks. A race inside a block it can find: in descending
   order (below) another thread is first, and where a __syncthreads is missing, results then differ. A missing
   __syncwarp is hidden by a shuffle in its place, which here orders memory as well, and on a GPU does not.

     GPT2_EMULATE_ORDER=descending    threads of a block run from the last to the first
     GPT2_EMULATE_STREAMS=at-once     streams run as early as CUDA allows
     GPT2_EMULATE_MEMORY=BYTES        the device's memory (4 GiB)

   An error has a sentence, which cudaGetErrorString returns. A kernel's error stays, as in CUDA: every later
   call returns it, until cudaDeviceReset. Host code that touches device memory ends the process, with a
   sentence on standard error.

   Read on: 1. types, 2. memory, 3. streams, 4. blocks and threads, 5. warps and tensor cores, 6. cuBLASLt. */
#pragma once
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

/* === 1. Types =========================================================================================== */
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
/* The library's thread_local variables can be found, to be NaN before each block: see shared_fill. */
#define __shared__ static thread_local
#define SHARED(type, name) type *name = (type *)emulate::block.shared
#define LAUNCH(kernel, grid, threads, shared, stream, ...) \
    emulate::launch(#kernel, kernel, grid, threads, shared, stream, ##__VA_ARGS__)

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

template <class T> T __ldcs(const T *p) { return *p; }
template <class T> void __stcs(T *p, T value) { *p = value; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class To, class From> To emulate_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
    To to;
    memcpy((void *)&to, (const void *)&from, sizeof to);
    return to;
}

/* bf16: the upper half of an fp32, rounded to the nearest, ties to even. */
struct alignas(2) __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) {
        const uint32_t wide = emulate_bits<uint32_t>(value);
        bits = value != value ? 0x7fff : (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    operator float() const { return emulate_bits<float>((uint32_t)bits << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {(float)v.x, (float)v.y}; }

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9, cudaErrorNotReady = 600, cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719, cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;

namespace emulate {
/* === 2. Memory ========================================================================================== */
inline char sentence[1024];               /* about the latest error, `said` */
inline cudaError_t said, sticky, latest;  /* sticky: a kernel's; latest: cudaGetLastError's */

__attribute__((format(printf, 2, 3)))
inline cudaError_t fail(cudaError_t error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    return said = latest = error;
}

/* What cudaMalloc gave: whole pages, the bytes at their end (rounded up to 256, CUDA's alignment), a page
   that can never be touched on either side. What the pages hold besides stays 0xff, or a kernel was out of
   bounds. */
struct Allocation {
    char *start, *pages;
    size_t bytes, page_bytes;
    bool device, live;
    char *end() const { return start + bytes; }
    bool intact() const {
        for (const char *p = pages; p < start; p++)
            if (*p != (char)0xff) return false;
        for (const char *p = end(); p < pages + page_bytes; p++)
            if (*p != (char)0xff) return false;
        return true;
    }
};
inline std::map<const char *, Allocation> &allocations() {      /* by pages; freed ones stay, for messages */
    static auto *map = new std::map<const char *, Allocation>;
    return *map;
}
inline size_t memory_used;
inline size_t memory_size() {
    const char *given = getenv("GPT2_EMULATE_MEMORY");
    return given ? strtoull(given, NULL, 10) : (size_t)4 << 30;
}

/* The allocation with guard pages around it that the address is in, or NULL. */
inline const Allocation *allocation_near(const void *address) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    auto after = allocations().upper_bound((const char *)address + page);
    if (after == allocations().begin()) return NULL;
    const Allocation *a = &std::prev(after)->second;
    return (const char *)address < a->pages + a->page_bytes + page ? a : NULL;
}
/* The live allocation that holds all these bytes, or NULL. */
inline const Allocation *holds(const void *address, size_t bytes, bool device) {
    const Allocation *a = allocation_near(address);
    const char *p = (const char *)address;
    return a && a->live && a->device == device && p >= a->start && bytes <= (size_t)(a->end() - a->start) &&
           p <= a->end() - bytes ? a : NULL;
}
inline void describe(char *out, size_t size, const void *address) {
    const Allocation *a = allocation_near(address);
    if (a) {
        snprintf(out, size, "%p, which is byte %lld of %s of %zu bytes%s", address,
                 (long long)((const char *)address - a->start),
                 a->device ? "a device allocation" : "a pinned allocation", a->bytes,
                 a->live ? "" : " that was freed");
    } else {
        snprintf(out, size, "%p, which is in no device allocation", address);
    }
}

inline cudaError_t allocate(void **out, size_t bytes, bool device) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), rounded = (bytes + 255) / 256 * 256;
    const size_t inside = (rounded + page - 1) / page * page;
    *out = NULL;
    if (bytes == 0) return cudaSuccess;
    if (device && bytes > memory_size() - memory_used)
        return fail(cudaErrorMemoryAllocation, "out of memory: %zu bytes wanted, %zu of %zu are free", bytes,
                    memory_size() - memory_used, memory_size());
    char *p = (char *)mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0);
    if (p == MAP_FAILED || mprotect(p + page, inside, PROT_READ | PROT_WRITE))
        return fail(cudaErrorMemoryAllocation, "out of memory: %zu bytes wanted", bytes);
    const Allocation a = {p + page + inside - rounded, p + page, bytes, inside, device, true};
    madvise(a.pages, inside, MADV_HUGEPAGE);      /* only for speed: whole tables of pages change at once */
    memset(a.pages, 0xff, inside);
    if (device) {
        memory_used += bytes;
        mprotect(a.pages, inside, PROT_NONE);
    }
    allocations()[a.pages] = a;
    *out = a.start;
    return cudaSuccess;
}
inline cudaError_t release(void *address, bool device) {
    if (!address) return cudaSuccess;
    Allocation *a = (Allocation *)holds(address, 1, device);
    if (!a || a->start != address) {
        char what[256];
        describe(what, sizeof what, address);
        return fail(cudaErrorInvalidValue, "%s was asked to free %s", device ? "cudaFree" : "cudaFreeHost",
                    what);
    }
    if (device) memory_used -= a->bytes;
    a->live = false;                      /* its addresses are not used again: a late access faults */
    madvise(a->pages, a->page_bytes, MADV_DONTNEED);
    mprotect(a->pages, a->page_bytes, PROT_NONE);
    return cudaSuccess;
}

/* Maps device memory for the time that the device runs. */
inline void device_memory(int protection) {
    for (auto &entry : allocations())
        if (entry.second.device && entry.second.live)
            mprotect(entry.second.pages, entry.second.page_bytes, protection);
}
inline cudaError_t check_surroundings(void) {
    for (auto &entry : allocations())
        if (entry.second.live && !entry.second.intact())
            return fail(cudaErrorIllegalAddress,
                        "something was written beside an allocation of %zu bytes, less than "
                        "a page away: a kernel before this is out of bounds", entry.second.bytes);
    return cudaSuccess;
}

/* === 3. Streams ========================================================================================= */
struct Stream;
struct Point { Stream *stream; uint64_t count; };         /* after so many operations of a stream */
struct Operation {
    std::vector<Point> after;             /* of other streams */
    std::function<cudaError_t()> run;     /* empty: only waits */
};
struct Graph { std::vector<Operation> operations; };
struct Stream {
    std::deque<Operation> waiting;
    uint64_t put = 0, done = 0;           /* operations that were put in, and that were run */
    bool blocking = true;                 /* in order with the default stream */
    Graph *capture = NULL;                /* what is put in goes here */
};
struct Event { Point at; Graph *capture; timespec time; };

struct Device {
    std::recursive_mutex calls;           /* one call of the runtime at a time */
    std::vector<Stream *> streams;        /* [0] is the default stream */
    bool at_once, descending;
    bool busy;                            /* running what streams hold, on this thread: */
    pthread_t thread;
    char *tls;                            /* the thread's own variables of this library, shared arrays too */
    size_t tls_bytes;
};
inline thread_local char one_of_ours;
inline void watch_faults(void);
inline void fault_stack(void);

inline Device &device() {
    static Device *d = NULL;
    if (!d) {
        const char *order = getenv("GPT2_EMULATE_ORDER"), *streams = getenv("GPT2_EMULATE_STREAMS");
        d = new Device();
        d->descending = order && !strcmp(order, "descending");
        d->at_once = streams && !strcmp(streams, "at-once");
        d->streams.push_back(new Stream);
        watch_faults();
    }
    return *d;
}
inline int tls_find(struct dl_phdr_info *info, size_t, void *) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        char *tls = (char *)info->dlpi_tls_data;
        const size_t bytes = info->dlpi_phdr[i].p_memsz;
        if (info->dlpi_phdr[i].p_type == PT_TLS && tls && &one_of_ours >= tls && &one_of_ours < tls + bytes) {
            device().tls = tls;
            device().tls_bytes = bytes;
            return 1;
        }
    }
    return 0;
}

/* Runs something for which device memory is there; afterwards, it is not, and the caller's thread_local
   variables are what they were. */
template <class Task> cudaError_t on_device(Task task) {
    Device &d = device();
    if (sticky || d.busy) return sticky;
    one_of_ours = 0;                      /* so that they exist */
    dl_iterate_phdr(tls_find, NULL);
    const std::vector<char> before(d.tls, d.tls + d.tls_bytes);
    d.busy = true;
    d.thread = pthread_self();
    fault_stack();
    device_memory(PROT_READ | PROT_WRITE);
    cudaError_t result = task();
    if (result == cudaSuccess) result = check_surroundings();
    device_memory(PROT_NONE);
    d.busy = false;
    memcpy(d.tls, before.data(), d.tls_bytes);
    if (result != cudaSuccess) sticky = result;
    return result;
}

inline Stream *find(Stream *stream) { return stream ? stream : device().streams[0]; }

/* Runs a stream up to a point, and first what each operation has to wait for. */
inline cudaError_t reach(Point point) {
    while (point.stream->done < point.count) {
        Operation operation = std::move(point.stream->waiting.front());
        point.stream->waiting.pop_front();
        point.stream->done++;
        cudaError_t error = cudaSuccess;
        for (Point before : operation.after)
            if (error == cudaSuccess) error = reach(before);
        if (error == cudaSuccess && operation.run) error = operation.run();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
inline cudaError_t synchronize(Stream *stream) {
    if (stream->capture)
        return fail(cudaErrorStreamCaptureUnsupported,
                    "a stream that is being captured cannot be waited for");
    const Point end = {stream, stream->put};
    return stream->done == end.count ? sticky : on_device([=] { return reach(end); });
}
inline cudaError_t put(Stream *stream, Operation operation) {
    Device &d = device();
    if (sticky) return sticky;
    if (stream->capture) {
        stream->capture->operations.push_back(std::move(operation));
        return cudaSuccess;
    }
    for (Stream *other : d.streams)
        if (other != stream && other->blocking && stream->blocking &&
            (other == d.streams[0] || stream == d.streams[0]) && other->done < other->put)
            operation.after.push_back({other, other->put});
    stream->waiting.push_back(std::move(operation));
    stream->put++;
    return d.at_once ? synchronize(stream) : cudaSuccess;
}
inline cudaError_t put(Stream *stream, std::function<cudaError_t()> run) {
    return put(stream, Operation{{}, std::move(run)});
}

/* Is the kind of a copy that of its pointers, and is all of it in allocations? */
inline cudaError_t copy_check(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    const bool wants[2] = {kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
                           kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice};
    const void *address[2] = {to, from};
    for (int i = 0; i < 2; i++) {
        const Allocation *a = allocation_near(address[i]);
        char what[256];
        describe(what, sizeof what, address[i]);
        if (kind != cudaMemcpyDefault && wants[i] != (a && a->device))
            return fail(cudaErrorInvalidValue, "a copy %s %s memory was given %s", i ? "from" : "to",
                        wants[i] ? "device" : "host", what);
        if (a && !holds(address[i], bytes, a->device))
            return fail(cudaErrorInvalidValue, "a copy of %zu bytes %s %s is out of bounds", bytes,
                        i ? "from" : "to", what);
    }
    return cudaSuccess;
}
inline cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, Stream *stream,
                        bool wait) {
    std::lock_guard<std::recursive_mutex> lock(device().calls);
    if (bytes == 0 || sticky) return sticky;
    if (cudaError_t error = copy_check(to, from, bytes, kind)) return error;
    const bool pageable[2] = {!allocation_near(to), !allocation_near(from)};
    cudaError_t error;
    if (pageable[1]) {                    /* taken now, as CUDA does: the caller may change it at once */
        std::vector<char> staged((const char *)from, (const char *)from + bytes);
        error = put(stream, [=] { return memcpy(to, staged.data(), bytes), cudaSuccess; });
    } else {
        error = put(stream, [=] { return memmove(to, from, bytes), cudaSuccess; });
    }
    return error == cudaSuccess && (wait || pageable[0]) ? synchronize(stream) : error;
}
inline cudaError_t fill(void *at, int value, size_t bytes, Stream *stream) {
    std::lock_guard<std::recursive_mutex> lock(device().calls);
    char what[256];
    if (bytes == 0 || sticky) return sticky;
    if (!holds(at, bytes, true)) {
        describe(what, sizeof what, at);
        return fail(cudaErrorInvalidValue, "a memset of %zu bytes at %s is out of bounds", bytes, what);
    }
    return put(stream, [=] { return memset(at, value, bytes), cudaSuccess; });
}

/* === 4. Blocks and threads ==============================================================================
   A fiber is a stack. It begins a thread of the block, and when that ends, the next one that has not begun:
   threads that meet no barrier all run on one fiber, without a switch. At a barrier the thread's fiber goes
   to sleep and another runs: one that woke up, else a fresh one. Slots count the threads in the order in
   which they run, warp by warp. */
extern "C" __attribute__((visibility("hidden"))) void emulate_switch(void **from, void *to);
#if defined(__x86_64__)
__asm__(".text\n.p2align 4\n.hidden emulate_switch\n.globl emulate_switch\n.type emulate_switch,@function\n"
        "emulate_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
        ".size emulate_switch,.-emulate_switch\n");
enum { SWITCH_WORDS = 8, SWITCH_ENTRY = 6 };      /* saved words, and which one is the address to return to */
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
#if defined(__SANITIZE_ADDRESS__)                 /* gcc's AddressSanitizer wants to know of other stacks */
extern "C" void __sanitizer_start_switch_fiber(void **, const void *, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void *, const void **, size_t *);
#endif
struct Copies { std::vector<std::pair<void *, const void *>> open; std::deque<decltype(open)> groups; };

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
    uint32_t busy;                        /* warps that have a thread which can run */
    uint32_t exists[WARP], ready[WARP];   /* threads of a warp: there at all; can run */
    uint32_t waits[WARP];                 /* at an operation of the warp */
    void (*operation[WARP])(void **);
    const char *name[WARP];
    void *brought[WARP][WARP];            /* to the warp's operation, by lane; NULL where there is none */
    const char *state[MOST_THREADS];      /* for messages: where the thread waits, by slot; NULL: runs */
    uint3 index[MOST_THREADS];            /* threadIdx by slot */
    Fiber *fiber[MOST_THREADS];           /* of threads that have begun and not ended, by slot */
    Copies copies[MOST_THREADS];          /* of cp.async, by slot */
    bool copied;                          /* is there any? */
    std::vector<Fiber *> *idle, *all;
    Fiber *running, host;
    size_t host_stack;                    /* its size, if that has to be known */
    cudaError_t error;
};
inline Block block;
inline int thread_of(int slot) { return block.descending ? block.slots - 1 - slot : slot; }
inline int lane_id(void) { return (block.descending ? ~block.current : block.current) & (WARP - 1); }
inline void become(int slot) {
    block.current = slot;
    threadIdx = block.index[slot];
}

/* Leaves the running fiber, until another one comes back to it. */
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

/* Ends the kernel with an error, from within a thread of it. */
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
        const uint32_t after = block.busy & ~((2u << warp) - 1);
        warp = __builtin_ctz(after ? after : block.busy);
        ready = later = block.ready[warp];
    }
    const int lane = __builtin_ctz(later ? later : ready);
    block.ready[warp] &= ~(1u << lane);
    if (!block.ready[warp]) block.busy &= ~(1u << warp);
    return warp * WARP + lane;
}
inline void fiber_main(void);
inline void fiber_prepare(Fiber *fiber) {
    void **top = (void **)(fiber->stack + STACK - 4096 - 16) - SWITCH_WORDS;
    top -= (size_t)fiber->stack / STACK % 32 * 16;        /* their hot parts in different sets of the cache */
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
        if (next >= 0 && !block.fiber[next]) {            /* not begun: here and now */
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
    const uint32_t me = warp == block.current / WARP ? 1u << block.current % WARP : 0;
    block.ready[warp] = block.exists[warp] & ~me;
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

/* An operation of a whole warp. Each lane brings a struct of its own; when the last one comes, `finish` gets
   all 32 (NULL where a block is no whole number of warps) and leaves the results in them. */
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

/* Shared memory is NaN at first. Static shared arrays are thread_local variables; all of these are filled. */
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
    if (block.error) {                    /* the last kernel stopped half-way: its fibers start anew */
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

/* Is a kernel's argument a pointer to memory that a device has not? Structs are looked through for pointers:
   what could be one, and is mapped, and is no device or pinned memory, is taken for one. */
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
    const size_t n = (size_t)threads.x * threads.y * threads.z, allowed = shared_allowed().count(function)
                     ? shared_allowed()[function] : 48 * 1024;
    if (n == 0 || n > MOST_THREADS || threads.z > 64)
        return fail(cudaErrorInvalidConfiguration,
                    "kernel %s: a block of (%u, %u, %u) threads: 1 to 1024 can be had",
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

/* --- Faults: a kernel's become an error; the host's own, in device memory, end the process --- */
inline struct sigaction other_handlers[NSIG];
inline void on_fault(int number, siginfo_t *info, void *context) {
    Device &d = device();
    char what[256];
    const bool in_kernel = d.busy && pthread_equal(pthread_self(), d.thread) && block.running &&
                           block.running != &block.host;
    if (in_kernel) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, number);
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        const char *fiber = block.running->stack, *address = (const char *)info->si_addr;
        if (address >= fiber && address < fiber + STACK)
            stop(cudaErrorIllegalAddress, "its stack of %d KiB is full", STACK / 1024);
        if (address >= block.shared - MOST_SHARED && address < block.shared + block.shared_bytes + 4096)
            stop(cudaErrorIllegalAddress,
                 "it is out of bounds at byte %lld of %zu bytes of dynamic shared memory",
                 (long long)(address - block.shared), block.shared_bytes);
        describe(what, sizeof what, address);
        stop(cudaErrorIllegalAddress, "it is out of bounds or not aligned at %s", what);
    }
    const Allocation *a = allocation_near(info->si_addr);
    if (a && a->device) {
        describe(what, sizeof what, info->si_addr);
        dprintf(2, "emulate.h: the host touched %s: a copy is missing\n", what);
        signal(number, SIG_DFL);
        return;                           /* and the access faults again */
    }
    const struct sigaction *other = &other_handlers[number];
    if (other->sa_flags & SA_SIGINFO) {
        other->sa_sigaction(number, info, context);
    } else if (other->sa_handler != SIG_DFL && other->sa_handler != SIG_IGN) {
        other->sa_handler(number);
    } else {
        signal(number, SIG_DFL);
    }
}
inline void watch_faults(void) {
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGSEGV, SIGBUS}) sigaction(number, &ours, &other_handlers[number]);
}
/* A stack for on_fault: a fiber's may be what is full. */
inline void fault_stack(void) {
    stack_t stack;
    sigaltstack(NULL, &stack);
    if (!(stack.ss_flags & SS_DISABLE)) return;
    memset(&stack, 0, sizeof stack);
    stack.ss_size = 64 * 1024;
    stack.ss_sp = malloc(stack.ss_size);
    sigaltstack(&stack, NULL);
}
}

typedef emulate::Stream *cudaStream_t;
typedef emulate::Event *cudaEvent_t;
typedef emulate::Graph *cudaGraph_t;
typedef emulate::Graph *cudaGraphExec_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int multiProcessorCount, major, minor, maxThreadsPerMultiProcessor, maxThreadsPerBlock, warpSize,
        l2CacheSize;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
                         cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                             cudaStreamCaptureModeRelaxed };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };

#define EMULATE_CALL std::lock_guard<std::recursive_mutex> emulate_lock(emulate::device().calls); \
    if (emulate::sticky) return emulate::sticky
inline const char *cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    return error == emulate::said ? emulate::sentence : "an earlier error";
}
inline cudaError_t cudaPeekAtLastError(void) { return emulate::sticky ? emulate::sticky : emulate::latest; }
inline cudaError_t cudaGetLastError(void) {
    const cudaError_t error = cudaPeekAtLastError();
    if (!emulate::sticky) emulate::latest = cudaSuccess;
    return error;
}
inline cudaError_t cudaDeviceReset(void) {
    for (emulate::Stream *stream : emulate::device().streams) {
        stream->waiting.clear();
        stream->done = stream->put;
    }
    return emulate::sticky = emulate::latest = cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int *index) {
    *index = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int) {
    memset(out, 0, sizeof *out);
    strcpy(out->name, "emulated GPU");
    out->totalGlobalMem = emulate::memory_size();
    out->sharedMemPerBlock = 48 * 1024;
    out->sharedMemPerBlockOptin = 163 * 1024;             /* sm_80's */
    out->sharedMemPerMultiprocessor = 164 * 1024;
    out->multiProcessorCount = 3;
    out->major = 8;
    out->maxThreadsPerMultiProcessor = 2048;
    out->maxThreadsPerBlock = 1024;
    out->warpSize = 32;
    out->l2CacheSize = 1 << 20;
    return cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T **out, size_t bytes) {
    EMULATE_CALL;
    return emulate::allocate((void **)out, bytes, true);
}
template <class T> cudaError_t cudaMallocHost(T **out, size_t bytes) {
    EMULATE_CALL;
    return emulate::allocate((void **)out, bytes, false);
}
inline cudaError_t cudaDeviceSynchronize(void) {
    EMULATE_CALL;
    cudaError_t error = cudaSuccess;
    for (emulate::Stream *stream : emulate::device().streams)
        if (error == cudaSuccess) error = emulate::synchronize(stream);
    return error;
}
inline cudaError_t cudaFree(void *p) {    /* waits for the device, as CUDA's does */
    EMULATE_CALL;
    const cudaError_t error = p ? cudaDeviceSynchronize() : cudaSuccess;
    return error ? error : emulate::release(p, true);
}
inline cudaError_t cudaFreeHost(void *p) {
    EMULATE_CALL;
    const cudaError_t error = p ? cudaDeviceSynchronize() : cudaSuccess;
    return error ? error : emulate::release(p, false);
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return emulate::copy(to, from, bytes, kind, emulate::find(NULL), true);
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = NULL) {
    return emulate::copy(to, from, bytes, kind, emulate::find(stream), false);
}
inline cudaError_t cudaMemset(void *at, int value, size_t bytes) {
    return emulate::fill(at, value, bytes, emulate::find(NULL));
}
inline cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream = NULL) {
    return emulate::fill(at, value, bytes, emulate::find(stream));
}
inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    EMULATE_CALL;
    *total = emulate::memory_size();
    *unused = *total - emulate::memory_used;
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    EMULATE_CALL;
    *out = new emulate::Stream;
    (*out)->blocking = !(flags & cudaStreamNonBlocking);
    emulate::device().streams.push_back(*out);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithFlags(out, 0); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMULATE_CALL;
    return emulate::synchronize(emulate::find(stream));
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
    EMULATE_CALL;
    *out = new emulate::Event();
    (*out)->at.stream = emulate::find(NULL);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  /* a stream may yet use it */
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = NULL) {
    EMULATE_CALL;
    stream = emulate::find(stream);
    event->capture = stream->capture;
    if (stream->capture) return cudaSuccess;
    const cudaError_t error = emulate::put(stream, [=] {
        clock_gettime(CLOCK_MONOTONIC, &event->time);
        return cudaSuccess;
    });
    event->at = {stream, stream->put};
    return error;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EMULATE_CALL;
    const emulate::Point at = event->at;
    return at.stream->done >= at.count ? cudaSuccess : emulate::on_device([=] { return emulate::reach(at); });
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    EMULATE_CALL;
    for (cudaEvent_t event : {from, to})
        if (event->at.stream->done < event->at.count)
            return emulate::fail(cudaErrorNotReady, "an event that was not yet reached has no time");
    *ms = (float)(to->time.tv_sec - from->time.tv_sec) * 1e3f;
    *ms += (float)(to->time.tv_nsec - from->time.tv_nsec) * 1e-6f;
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    EMULATE_CALL;
    stream = emulate::find(stream);
    if (event->capture) {                 /* the stream joins what is being captured */
        stream->capture = event->capture;
        return cudaSuccess;
    }
    return emulate::put(stream, emulate::Operation{{event->at}, {}});
}
template <class K> cudaError_t cudaFuncSetAttribute(K *kernel, cudaFuncAttribute which, int value) {
    EMULATE_CALL;
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > 163 * 1024)
        return emulate::fail(cudaErrorInvalidValue, "%d bytes of shared memory: a block can have up to %d",
                             value, 163 * 1024);
    emulate::shared_allowed()[(const void *)kernel] = (size_t)value;
    return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    EMULATE_CALL;
    if (!stream || stream->capture)
        return emulate::fail(cudaErrorStreamCaptureUnsupported,
                             "the default stream, or one that is being captured, "
                             "cannot be captured");
    stream->capture = new emulate::Graph;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    EMULATE_CALL;
    *out = stream->capture;
    if (!*out) return emulate::fail(cudaErrorInvalidValue, "the stream is not being captured");
    for (emulate::Stream *other : emulate::device().streams)
        if (other->capture == *out) other->capture = NULL;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long = 0) {
    EMULATE_CALL;
    *out = new emulate::Graph(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    EMULATE_CALL;
    for (const emulate::Operation &operation : graph->operations) {
        emulate::Operation again;         /* what it waited for was in the graph, in this order */
        again.run = operation.run;
        if (cudaError_t error = emulate::put(emulate::find(stream), again)) return error;
    }
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}

/* === 5. Warps and tensor cores ========================================================================== */
namespace emulate {
inline void need_whole_warp(void **lanes, const char *name) {
    for (int i = 0; i < WARP; i++)
        if (!lanes[i]) stop(cudaErrorLaunchFailure,
                            "%s needs 32 threads, and the block's last warp has fewer", name);
}
inline void need_full_mask(unsigned mask, const char *name) {
    if (mask != 0xffffffffu) stop(cudaErrorLaunchFailure, "%s of the mask %x: emulate.h knows the full one",
                                  name, mask);
}
template <class T> struct Shuffle { T value, result; int lane; };
template <class T> void shuffle_finish(void **lanes) {
    for (int i = 0; i < WARP; i++) {
        Shuffle<T> *s = (Shuffle<T> *)lanes[i];
        if (!s) continue;
        if (s->lane < 0 || s->lane >= WARP || !lanes[s->lane])
            stop(cudaErrorLaunchFailure, "a shuffle from lane %d, which is not there", s->lane);
        s->result = ((Shuffle<T> *)lanes[s->lane])->value;
    }
}
template <class T> T shuffle(const char *name, unsigned mask, T value, int lane) {
    Shuffle<T> s = {value, value, lane};
    need_full_mask(mask, name);
    warp_operation(name, shuffle_finish<T>, &s);
    return s.result;
}
/* The lane that is asked for, or the own one if that is not in the group of `width` lanes. */
inline int lane_in(int lane, int width) { return lane / width == lane_id() / width ? lane : lane_id(); }

struct Vote { int predicate; unsigned result; };
inline void vote_finish(void **lanes) {
    unsigned votes = 0;
    for (int i = 0; i < WARP; i++)
        if (lanes[i] && ((Vote *)lanes[i])->predicate) votes |= 1u << i;
    for (int i = 0; i < WARP; i++)
        if (lanes[i]) ((Vote *)lanes[i])->result = votes;
}
inline unsigned vote(const char *name, unsigned mask, int predicate) {
    Vote v = {predicate, 0};
    need_full_mask(mask, name);
    warp_operation(name, vote_finish, &v);
    return v.result;
}
inline void nothing(void **) {}

/* The fragments of mma.m16n8k16 as the PTX manual has them: of a lane, group = lane / 4, member = lane % 4;
   a[i / 2] has in its halves (i % 2) A[group + 8 if i / 2 is odd][2 member + i % 2 + 8 if i >= 4]; b likewise
   B[2 member + i % 2 + 8 if i >= 2][group]; d[i] is D[group + 8 if i >= 2][2 member + i % 2]. */
struct Mma { float *d; const uint32_t *a, *b; };
inline float half_of(const uint32_t *words, int i) {
    return emulate_bits<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
inline void mma_finish(void **lanes) {
    float a[16][16], b[16][8], d[16][8];
    need_whole_warp(lanes, "mma");
    for (int lane = 0; lane < WARP; lane++) {
        const Mma *m = (const Mma *)lanes[lane];
        const int group = lane / 4, member = lane % 4;
        for (int i = 0; i < 8; i++)
            a[group + 8 * (i / 2 % 2)][2 * member + i % 2 + 8 * (i / 4)] = half_of(m->a, i);
        for (int i = 0; i < 4; i++) b[2 * member + i % 2 + 8 * (i / 2)][group] = half_of(m->b, i);
        for (int i = 0; i < 4; i++) d[group + 8 * (i / 2)][2 * member + i % 2] = m->d[i];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            ((Mma *)lanes[lane])->d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

/* ldmatrix.x4: lane l has the address of row l % 8 of the 8 × 8 matrix l / 8. Of each matrix, it gets the
   elements 2 (l % 4) and the next one of row l / 4; with .trans, of column l / 4. */
struct Ldmatrix { uint32_t *r; const void *row; };
inline uint16_t matrix_element(void **lanes, int matrix, int row, int column) {
    return ((const uint16_t *)((Ldmatrix *)lanes[8 * matrix + row])->row)[column];
}
template <bool trans> void ldmatrix_finish(void **lanes) {
    need_whole_warp(lanes, "ldmatrix");
    for (int lane = 0; lane < WARP; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            const int row = lane / 4, column = 2 * (lane % 4);
            const uint32_t low = trans ? matrix_element(lanes, matrix, column, row)
                                       : matrix_element(lanes, matrix, row, column);
            const uint32_t high = trans ? matrix_element(lanes, matrix, column + 1, row)
                                        : matrix_element(lanes, matrix, row, column + 1);
            ((Ldmatrix *)lanes[lane])->r[matrix] = low | high << 16;
        }
}
inline bool is_shared(const void *p, size_t bytes) {
    const char *at = (const char *)p;
    return (at >= block.shared && at + bytes <= block.shared + block.shared_bytes) ||
           (at >= device().tls && at + bytes <= device().tls + device().tls_bytes);
}
inline void need_shared_row(const void *p, const char *name) {
    if ((uintptr_t)p % 16) stop(cudaErrorIllegalAddress, "%s at %p, which is not a multiple of 16", name, p);
    if (!is_shared(p, 16)) stop(cudaErrorIllegalAddress, "%s at %p, which is not in shared memory", name, p);
}
}

inline void __syncthreads(void) { emulate::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulate::need_full_mask(mask, "__syncwarp");
    emulate::warp_operation("__syncwarp", emulate::nothing, NULL);
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    const int first = emulate::lane_id() / width * width;
    return emulate::shuffle("__shfl_sync", mask, value, first + (lane & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = emulate::lane_in(emulate::lane_id() ^ bits, width);
    return emulate::shuffle("__shfl_xor_sync", mask, value, lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = emulate::lane_in(emulate::lane_id() + (int)by, width);
    return emulate::shuffle("__shfl_down_sync", mask, value, lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulate::vote("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
    return emulate::vote("__any_sync", mask, predicate) != 0;
}

/* d (16,8) += a (16,16) · b (16,8): bf16 products, which are exact in fp32, and sums in fp32. */
inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    emulate::Mma m = {d, a, b};
    emulate::warp_operation("mma", emulate::mma_finish, &m);
}
/* An address in shared memory: a number, which instructions of PTX take, and not a pointer */
typedef uintptr_t Shared;
inline Shared shared_address(const void *p) { return (Shared)p; }
inline void ldmatrix_x4(uint32_t r[4], Shared row) {
    emulate::Ldmatrix l = {r, (const void *)row};
    emulate::need_shared_row(l.row, "ldmatrix");
    emulate::warp_operation("ldmatrix", emulate::ldmatrix_finish<false>, &l);
}
inline void ldmatrix_x4_trans(uint32_t r[4], Shared row) {
    emulate::Ldmatrix l = {r, (const void *)row};
    emulate::need_shared_row(l.row, "ldmatrix.trans");
    emulate::warp_operation("ldmatrix.trans", emulate::ldmatrix_finish<true>, &l);
}
/* cp.async: the destination is NaN until the copy's group is waited for, by the thread that issued it. */
inline void copy_async_16(Shared to, const void *global) {
    void *shared = (void *)to;
    emulate::need_shared_row(shared, "cp.async");
    if ((uintptr_t)global % 16 || !emulate::holds(global, 16, true)) {
        char what[256];
        emulate::describe(what, sizeof what, global);
        emulate::stop(cudaErrorIllegalAddress, "cp.async of 16 bytes from %s: out of bounds or not aligned",
                      what);
    }
    memset(shared, 0xff, 16);
    emulate::block.copies[emulate::block.current].open.push_back({shared, global});
    emulate::block.copied = true;
}
inline void copy_async_commit(void) {
    emulate::Copies &mine = emulate::block.copies[emulate::block.current];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int N> inline void copy_async_wait(void) {
    emulate::Copies &mine = emulate::block.copies[emulate::block.current];
    for (; mine.groups.size() > N; mine.groups.pop_front())
        for (auto &copy : mine.groups.front()) memcpy(copy.first, copy.second, 16);
}

/* === 6. cuBLASLt ======================================================================================== */
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4, CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4, CUBLASLT_EPILOGUE_DGELU = 64 | 128
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7, CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};
namespace emulate {
struct Handle { int unused; };
struct MatmulDesc {
    cublasOperation_t transa = CUBLAS_OP_N, transb = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void *bias = NULL;
    void *aux = NULL;
    int64_t aux_ld = 0;
    int bias_type = -1;                   /* -1: D's */
};
struct Layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batch = 1;
    int64_t stride = 0;
};
struct Preference { size_t workspace = 0; uint32_t align[4] = {256, 256, 256, 256}; };
}
typedef emulate::Handle *cublasLtHandle_t;
typedef emulate::MatmulDesc *cublasLtMatmulDesc_t;
typedef emulate::Layout *cublasLtMatrixLayout_t;
typedef emulate::Preference *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };        /* here: the alignments that it needs, and 1 */
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};

namespace emulate {
__attribute__((format(printf, 2, 3)))
inline cublasStatus_t refuse(cublasStatus_t status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    said = latest = cudaErrorInvalidValue;        /* so that cudaGetErrorString has the sentence */
    return status;
}
inline size_t size_of(int type) { return type == CUDA_R_16BF ? 2 : 4; }
inline float load(const void *p, size_t i, int type) {
    return type == CUDA_R_16BF ? (float)((const __nv_bfloat16 *)p)[i] : ((const float *)p)[i];
}
inline void store(void *p, size_t i, int type, float value) {
    if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)p)[i] = value;
    else
        ((float *)p)[i] = value;
}
inline float gelu(float x) {
    return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}
inline float gelu_slope(float x) {
    const float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

struct Matmul { MatmulDesc desc; Layout a, b, c, d; float alpha, beta; const void *A, *B, *C; void *D; };

/* D = alpha op(A) op(B) + beta C, then the epilogue; all column by column. A sum takes 64 products at a time,
   as an error grows with the length of a sum and not with the number of its parts. */
inline void matmul_run(const Matmul &m) {
    const size_t M = m.d.rows, N = m.d.cols, part = 64;
    const bool a_plain = m.desc.transa == CUBLAS_OP_N, b_plain = m.desc.transb == CUBLAS_OP_N;
    const size_t K = a_plain ? m.a.cols : m.a.rows;
    const size_t a_m = a_plain ? 1 : m.a.ld, a_k = a_plain ? m.a.ld : 1;
    const size_t b_k = b_plain ? 1 : m.b.ld, b_n = b_plain ? m.b.ld : 1;
    const int epilogue = m.desc.epilogue, bias_type = m.desc.bias_type < 0 ? m.d.type : m.desc.bias_type;
    std::vector<float> a(K * M), total(M), sum(M);
    for (size_t batch = 0; batch < (size_t)m.d.batch; batch++) {
        const char *A = (const char *)m.A + batch * m.a.stride * size_of(m.a.type);
        const char *B = (const char *)m.B + batch * m.b.stride * size_of(m.b.type);
        const char *C = (const char *)m.C + batch * m.c.stride * size_of(m.c.type);
        char *D = (char *)m.D + batch * m.d.stride * size_of(m.d.type);
        for (size_t k = 0; k < K; k++)
            for (size_t i = 0; i < M; i++) a[k * M + i] = load(A, i * a_m + k * a_k, m.a.type);
        for (size_t j = 0; j < N; j++) {
            std::fill(total.begin(), total.end(), 0.0f);
            for (size_t first = 0; first < K; first += part) {
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (size_t k = first; k < K && k < first + part; k++) {
                    const float factor = load(B, k * b_k + j * b_n, m.b.type), *column = &a[k * M];
                    for (size_t i = 0; i < M; i++) sum[i] += column[i] * factor;
                }
                for (size_t i = 0; i < M; i++) total[i] += sum[i];
            }
            for (size_t i = 0; i < M; i++) {
                float value = m.alpha * total[i];
                if (m.beta != 0) value += m.beta * load(C, i + j * m.c.ld, m.c.type);
                if (epilogue & CUBLASLT_EPILOGUE_BIAS) value += load(m.desc.bias, i, bias_type);
                if (epilogue == CUBLASLT_EPILOGUE_DGELU)
                    value *= gelu_slope(load(m.desc.aux, i + j * m.desc.aux_ld, m.d.type));
                else if (epilogue & 128)
                    store(m.desc.aux, i + j * m.desc.aux_ld, m.d.type, value);
                if (epilogue & CUBLASLT_EPILOGUE_GELU) value = gelu(value);
                store(D, i + j * m.d.ld, m.d.type, value);
            }
        }
    }
}

/* What the heuristic finds out without the pointers: do shapes, types and epilogue go together? */
inline cublasStatus_t matmul_shapes(const MatmulDesc &desc, const Layout &a, const Layout &b, const Layout &c,
                                    const Layout &d) {
    typedef long long unsigned number;
    const bool a_plain = desc.transa == CUBLAS_OP_N, b_plain = desc.transb == CUBLAS_OP_N;
    const number M = a_plain ? a.rows : a.cols, K = a_plain ? a.cols : a.rows;
    const number N = b_plain ? b.cols : b.rows, L = b_plain ? b.rows : b.cols;
    if (K != L || d.rows != M || d.cols != N || c.rows != M || c.cols != N || !M || !N || !K)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul: op(A) is %llu x %llu, op(B) %llu x %llu, "
                      "C %llu x %llu, D %llu x %llu", M, K, L, N, (number)c.rows, (number)c.cols,
                      (number)d.rows, (number)d.cols);
    for (const Layout *l : {&a, &b, &c, &d}) {
        if (l->ld < (int64_t)l->rows)
            return refuse(CUBLAS_STATUS_INVALID_VALUE,
                          "cublasLtMatmul: a leading dimension of %lld for %lld rows",
                          (long long)l->ld, (long long)l->rows);
        if (l->batch < 1 || l->batch != d.batch)
            return refuse(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul: batches of %d and %d", l->batch,
                          d.batch);
    }
    if (d.batch > 1 && (uint64_t)d.stride < (uint64_t)d.ld * (d.cols - 1) + d.rows)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul: the matrices of D's batch overlap");
    if (a.type != b.type || c.type != d.type || (a.type == CUDA_R_32F && d.type != CUDA_R_32F))
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul: types %d, %d, %d, %d", a.type, b.type,
                      c.type, d.type);
    if (desc.epilogue & 128 && (desc.aux_ld < (int64_t)d.rows || desc.aux_ld % 8 || d.batch > 1))
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED,
                      "cublasLtMatmul: EPILOGUE_AUX_LD is %lld for %lld rows; it must be a "
                      "multiple of 8, and the batch 1", (long long)desc.aux_ld, (long long)d.rows);
    if (desc.epilogue & CUBLASLT_EPILOGUE_BIAS && desc.bias_type >= 0 && desc.bias_type != d.type &&
        !(a.type == CUDA_R_16BF && desc.bias_type == CUDA_R_16BF))
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul: a bias of type %d with D of type %d",
                      desc.bias_type, d.type);
    return CUBLAS_STATUS_SUCCESS;
}
inline size_t layout_bytes(const Layout &l) {
    const size_t one = (l.cols - 1) * (size_t)l.ld + l.rows;
    return (one + (size_t)(l.batch - 1) * (size_t)l.stride) * size_of(l.type);
}
inline cublasStatus_t need_device(const char *what, const void *p, size_t bytes) {
    char found[256];
    if (holds(p, bytes, true)) return CUBLAS_STATUS_SUCCESS;
    describe(found, sizeof found, p);
    return refuse(CUBLAS_STATUS_EXECUTION_FAILED, "cublasLtMatmul: %s, %zu bytes, is out of bounds at %s",
                  what, bytes, found);
}
template <class T> cublasStatus_t take(T *to, const void *from, size_t bytes) {
    if (bytes != sizeof *to)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of %zu bytes was given %zu", sizeof *to,
                      bytes);
    memcpy(to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
}

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *out) {
    *out = new emulate::Handle();
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
        return emulate::refuse(CUBLAS_STATUS_NOT_SUPPORTED,
                               "emulate.h computes in fp32 (CUBLAS_COMPUTE_32F)");
    return *out = new emulate::MatmulDesc, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t which,
                                                     const void *value, size_t bytes) {
    int32_t number = 0;
    switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return emulate::take(&d->transa, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return emulate::take(&d->transb, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return emulate::take(&d->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return emulate::take(&d->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return emulate::take(&d->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return emulate::take(&d->aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        if (emulate::take(&number, value, bytes)) return CUBLAS_STATUS_INVALID_VALUE;
        for (int known : {1, 4, 32, 36, 160, 164, 192})
            if (number == known) return d->epilogue = (cublasLtEpilogue_t)number, CUBLAS_STATUS_SUCCESS;
        break;
    default: break;
    }
    return emulate::refuse(CUBLAS_STATUS_NOT_SUPPORTED,
                           "emulate.h has no matmul attribute %d with the value %d", which, number);
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
    if (type != CUDA_R_32F && type != CUDA_R_16BF)
        return emulate::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "emulate.h has no matrices of type %d", type);
    return *out = new emulate::Layout{type, rows, cols, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                       cublasLtMatrixLayoutAttribute_t which,
                                                       const void *value, size_t bytes) {
    switch (which) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return emulate::take(&l->batch, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return emulate::take(&l->stride, value, bytes);
    }
    return emulate::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "emulate.h has no layout attribute %d", which);
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    return *out = new emulate::Preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t which,
                                                           const void *value, size_t bytes) {
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return emulate::take(&p->workspace, value, bytes);
    if (which >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
        which <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
        return emulate::take(&p->align[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
    return emulate::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "emulate.h has no preference %d", which);
}
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t p, int wanted,
                                                     cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 0;
    for (const emulate::Stream *stream : emulate::device().streams)     /* as some versions do */
        if (stream->capture) return emulate::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a graph is being captured");
    const cublasStatus_t status = emulate::matmul_shapes(*desc, *a, *b, *c, *d);
    if (status || wanted < 1) return status;
    memset((void *)results, 0, sizeof *results);
    for (int i = 0; i < 4; i++) results->algo.data[i] = p->align[i];
    results->algo.data[4] = 1;
    return *found = 1, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                                     const void *A, cublasLtMatrixLayout_t a,
                                     const void *B, cublasLtMatrixLayout_t b, const void *beta,
                                     const void *C, cublasLtMatrixLayout_t c,
                                     void *D, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo,
                                     void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(emulate::device().calls);
    const emulate::Matmul m = {*desc, *a, *b, *c, *d, *(const float *)alpha, *(const float *)beta,
                               A, B, C, D};
    const void *address[4] = {A, B, C, D};
    const emulate::Layout *layout[4] = {a, b, c, d};
    const char *const names[4] = {"A", "B", "C", "D"};
    cublasStatus_t status = emulate::matmul_shapes(*desc, *a, *b, *c, *d);
    for (int i = 0; i < 4 && !status; i++) {
        const size_t align = algo ? algo->data[i] : 16;
        if (i == 2 && m.beta == 0 && !C) continue;
        status = emulate::need_device(names[i], address[i], emulate::layout_bytes(*layout[i]));
        if (!status && (uintptr_t)address[i] % align)
            status = emulate::refuse(CUBLAS_STATUS_INVALID_VALUE,
                                     "cublasLtMatmul: %s is at %p, but the algorithm was "
                                     "chosen for a multiple of %zu", names[i], address[i], align);
    }
    if (!status && algo && algo->data[4] != 1)
        status = emulate::refuse(CUBLAS_STATUS_INVALID_VALUE,
                                 "cublasLtMatmul: the algorithm is from no heuristic");
    if (!status && workspace_bytes)
        status = emulate::need_device("the workspace", workspace, workspace_bytes);
    if (!status && desc->epilogue & CUBLASLT_EPILOGUE_BIAS)
        status = emulate::need_device("the bias", desc->bias, d->rows * emulate::size_of(
                                      desc->bias_type < 0 ? d->type : desc->bias_type));
    if (!status && desc->epilogue & 128)
        status = emulate::need_device("the auxiliary matrix", desc->aux,
                                      ((d->cols - 1) * (size_t)desc->aux_ld +
                                      d->rows) * emulate::size_of(d->type));
    if (status) return status;
    return emulate::put(emulate::find(stream), [=] { return emulate::matmul_run(m), cudaSuccess; })
               ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
