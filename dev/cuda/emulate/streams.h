/* The emulated GPU: streams, whose operations run as late as CUDA allows. */
#pragma once

namespace emulate {
struct Stream;
struct Point { Stream *stream; uint64_t count; };         /* after this operation of a stream */
struct Operation {
    std::vector<Point> after;             /* of other streams */
    std::function<cudaError_t()> run;     /* empty: only waits */
};
struct Graph { std::vector<Operation> operations; };
struct Stream {
    std::deque<Operation> waiting;
    uint64_t put = 0, done = 0;           /* operations enqueued, and run */
    bool blocking = true;                 /* synchronizes with the default stream */
    Graph *capture = NULL;                /* where captured operations go */
};
struct Event { Point at; Graph *capture; timespec time; };

struct Device {
    std::recursive_mutex calls;           /* one call of the runtime at a time */
    std::vector<Stream *> streams;        /* [0] is the default stream */
    bool at_once, descending;
    bool busy;                            /* while streams run, on this thread: */
    pthread_t thread;
    char *tls;                            /* thread_local variables of this library, with shared arrays */
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

/* Runs a function that accesses device memory. Afterwards that is inaccessible again, and the thread_local
   variables of the caller are restored. */
template <class Task> cudaError_t on_device(Task task) {
    Device &d = device();
    if (sticky || d.busy) return sticky;
    one_of_ours = 0;                      /* creates them */
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

/* Runs a stream up to a point, and before each operation what it depends on. */
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
    if (stream->done == end.count) return sticky;
    return on_device([=] { return reach(end); });
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
    if (d.at_once) return synchronize(stream);
    return cudaSuccess;
}
inline cudaError_t put(Stream *stream, std::function<cudaError_t()> run) {
    return put(stream, Operation{{}, std::move(run)});
}

/* Checks the kind of a copy against its pointers, and that it stays within allocations. */
inline cudaError_t copy_check(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    const bool wants[2] = {kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
                           kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice};
    const void *address[2] = {to, from};
    const char *const direction[2] = {"to", "from"};
    for (int i = 0; i < 2; i++) {
        const Allocation *a = allocation_near(address[i]);
        char what[256];
        describe(what, sizeof what, address[i]);
        if (kind != cudaMemcpyDefault && wants[i] != (a && a->device))
            return fail(cudaErrorInvalidValue, "a copy %s %s memory was given %s", direction[i],
                        wants[i] ? "device" : "host", what);
        if (a && !holds(address[i], bytes, a->device))
            return fail(cudaErrorInvalidValue, "a copy of %zu bytes %s %s is out of bounds", bytes,
                        direction[i], what);
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
    if (pageable[1]) {                    /* read now, as in CUDA: the caller may change it at once */
        std::vector<char> staged((const char *)from, (const char *)from + bytes);
        error = put(stream, [=] { return memcpy(to, staged.data(), bytes), cudaSuccess; });
    } else {
        error = put(stream, [=] { return memmove(to, from, bytes), cudaSuccess; });
    }
    if (error == cudaSuccess && (wait || pageable[0])) return synchronize(stream);
    return error;
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
}
