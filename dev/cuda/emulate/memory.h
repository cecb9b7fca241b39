/* The emulated GPU: device memory between guard pages, inaccessible to the host except in copies. */
#pragma once
namespace emulate {
inline char sentence[1024];               /* about the latest error, `said` */
inline cudaError_t said, sticky, latest;  /* sticky: of a kernel; latest: for cudaGetLastError */

__attribute__((format(printf, 2, 3)))
inline cudaError_t fail(cudaError_t error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    return said = latest = error;
}

/* A cudaMalloc: whole pages with the bytes at their end (rounded up to 256, the alignment of CUDA), between
   two inaccessible pages. The rest of the pages is 0xff unless a kernel was out of bounds. */
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
inline std::map<const char *, Allocation> &allocations() {      /* by page; freed ones stay, for messages */
    static auto *map = new std::map<const char *, Allocation>;
    return *map;
}
inline size_t memory_used;
inline size_t memory_size() {
    const char *given = getenv("GPT2_EMULATE_MEMORY");
    if (!given) return (size_t)4 << 30;
    return strtoull(given, NULL, 10);
}

/* The allocation, guard pages included, that contains the address, or NULL. */
inline const Allocation *allocation_near(const void *address) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    auto after = allocations().upper_bound((const char *)address + page);
    if (after == allocations().begin()) return NULL;
    const Allocation *a = &std::prev(after)->second;
    if ((const char *)address >= a->pages + a->page_bytes + page) return NULL;
    return a;
}
/* The live allocation that contains all these bytes, or NULL. */
inline const Allocation *holds(const void *address, size_t bytes, bool device) {
    const Allocation *a = allocation_near(address);
    const char *p = (const char *)address;
    if (!a || !a->live || a->device != device || p < a->start) return NULL;
    if (bytes > (size_t)(a->end() - a->start) || p > a->end() - bytes) return NULL;
    return a;
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
    madvise(a.pages, inside, MADV_HUGEPAGE);      /* for speed: whole page tables change at once */
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
    a->live = false;                      /* addresses are not reused: a late access faults */
    madvise(a->pages, a->page_bytes, MADV_DONTNEED);
    mprotect(a->pages, a->page_bytes, PROT_NONE);
    return cudaSuccess;
}

/* Makes device memory accessible while the device runs. */
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
}
