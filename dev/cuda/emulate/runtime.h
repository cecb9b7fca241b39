/* The emulated GPU: faults and the CUDA runtime API. */
#pragma once

namespace emulate {
/* --- Faults: in a kernel, a CUDA error; a device address used by the host ends the process --- */
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
        return;                           /* the access faults again, and ends the process */
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
/* A stack for on_fault: the stack of a fiber may have overflowed. */
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
inline cudaError_t cudaPeekAtLastError(void) {
    if (emulate::sticky) return emulate::sticky;
    return emulate::latest;
}
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
    out->sharedMemPerBlockOptin = 163 * 1024;             /* of sm_80 */
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
inline cudaError_t cudaFree(void *p) {    /* waits for the device, as in CUDA */
    EMULATE_CALL;
    const cudaError_t error = p ? cudaDeviceSynchronize() : cudaSuccess;
    if (error) return error;
    return emulate::release(p, true);
}
inline cudaError_t cudaFreeHost(void *p) {
    EMULATE_CALL;
    const cudaError_t error = p ? cudaDeviceSynchronize() : cudaSuccess;
    if (error) return error;
    return emulate::release(p, false);
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
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  /* a stream may still use it */
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
    if (at.stream->done >= at.count) return cudaSuccess;
    return emulate::on_device([=] { return emulate::reach(at); });
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
    if (event->capture) {                 /* the stream joins the capture */
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
        emulate::Operation again;         /* the graph has its dependencies, in this order */
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
