/* Times each kernel of a training step on a GPU against its bound: FLOPs, or bytes to and from memory.

     make bench                                     where there is a GPU, after whole steps
     make build/cuda/profile && build/cuda/profile d12 64 1024      a descriptor or a model file, B, T

   Includes train_gpt2.cu and records an event before and after every launch, so it times the step itself,
   without tools such as nsys or ncu. Both peaks are measured here, by a large copy and by square
   products. Medians of five steps. Steps are launched kernel by kernel, without CUDA graphs, and an event
   takes about a microsecond: with small batches the sum exceeds a real step. dev/doc/cuda.md derives the
   bounds. */
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

/* --- Launches, each between two events ------------------------------------------------------------------ */
struct Span {
    std::string name;
    double flops, bytes;                  /* of a product; for kernels see kernel_bounds */
    cudaEvent_t begin, end;               /* created once, reused in the next step */
};
static std::vector<Span> spans;
static size_t spans_used;

static void span_begin(const std::string &name, double flops, double bytes, cudaStream_t stream) {
    if (spans_used == spans.size()) {
        spans.push_back(Span());
        cudaEventCreate(&spans.back().begin);
        cudaEventCreate(&spans.back().end);
    }
    Span &span = spans[spans_used];
    span.name = name, span.flops = flops, span.bytes = bytes;
    cudaEventRecord(span.begin, stream);
}
static void span_end(cudaStream_t stream) { cudaEventRecord(spans[spans_used++].end, stream); }

/* "(kernel<WIDTH>)" and "kernel" are "kernel". */
static std::string kernel_name(const std::string &text) {
    const size_t first = text[0] == '(';
    return text.substr(first, text.find('<') - first);
}

/* Replaces cublasLtMatmul. Of the products of a linear layer, forward has w transposed, d-weight dout. */
template <class Shape, class... Arguments>
static cublasStatus_t timed_product(const Shape &s, double element, cudaStream_t stream,
                                    Arguments... arguments) {
    const double M = (double)s.M, N = (double)s.N, K = (double)s.K;
    double d_element = s.type_d == CUDA_R_32F ? 4 : 2, aux_element = 0;
    if (s.add) d_element *= 2;            /* reads D too */
    if (s.epilogue & 128) aux_element = element;     /* in every epilogue with an auxiliary matrix */
    const char *role = "d-input";
    if (s.transposed_a) role = "d-weight";
    if (s.transposed_b) role = "forward";
    char name[96];
    snprintf(name, sizeof name, "%.0f x %.0f x %.0f %s", M, N, K, role);
    span_begin(name, 2 * M * N * K, element * (M * K + K * N) + (d_element + aux_element) * M * N, stream);
    const cublasStatus_t status = cublasLtMatmul(arguments...);
    span_end(stream);
    return status;
}

#ifdef __CUDACC__
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    (span_begin(kernel_name(#kernel), 0, 0, stream), kernel<<<grid, block, shared, stream>>>(__VA_ARGS__), \
     span_end(stream), (void)gpu_ok(cudaGetLastError()))
#else
#undef LAUNCH
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    (span_begin(kernel_name(#kernel), 0, 0, stream), \
     emulate::launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__), span_end(stream))
#endif
#define cublasLtMatmul(...) timed_product(plan->shape, sizeof(floatX), blas->stream, __VA_ARGS__)
#include "../../train_gpt2.cu"

/* --- Bounds --------------------------------------------------------------------------------------------- */
struct Bound { double flops, bytes; };    /* of all calls of a kernel in a step */

static std::map<std::string, Bound> kernel_bounds(const GPT2 *m) {
    const double N = (double)(m->B * m->T), L = (double)m->L, C = (double)m->C, NC = N * C * sizeof(floatX);
    const double P = (double)m->start[GPT2_TENSORS], Vp = (double)m->Vp, fp32 = sizeof(float);
    const double scores = N * ((double)m->T + 1) * C * L;     /* FLOPs of one product, half of T × T */
    const double parts = (double)m->segments * C * fp32, rows = (double)m->tokens * C * fp32;
    const double norms = 2 * L + 1, ln_blocks = fmin(ceil_div(m->B * m->T, ROW_WARPS), 4.0 * m->sms);
    double gelus = 0, recomputed_norms = 0;     /* N·C·s bytes per layer; layer norms */
    if (!gelu_fused(m)) gelus += 20;
    if (m->recompute >= 1) gelus += 8;
    if (m->recompute >= 2) recomputed_norms = 2 * L;
    double bf16 = 0;                      /* of a bf16 parameter beside its master */
    if (sizeof(floatX) < sizeof(float)) bf16 = sizeof(floatX);
    return {
        {"encoder_forward_kernel", {0, 3 * NC}},
        {"layernorm_forward_kernel", {0, 2 * NC * (norms + recomputed_norms)}},
        {"gelu_kernel", {0, gelus * NC * L}},
        {"attention_plain_forward_kernel", {2 * scores, 4 * NC * L}},
        {"flash_forward_kernel", {2 * scores, 4 * NC * L}},
        {"crossentropy_kernel", {0, 2 * N * Vp * sizeof(floatX)}},
        {"layernorm_backward_kernel", {0, 4 * NC * norms - NC}},     /* the first does not accumulate */
        {"column_sums_kernel", {0, 9 * NC * L}},
        {"column_total_kernel", {0, norms * ln_blocks * 2 * C * fp32}},     /* biases need less */
        {"attention_delta_kernel", {0, 2 * NC * L}},
        {"attention_plain_dq_kernel", {3 * scores, 5 * NC * L}},
        {"flash_dq_kernel", {3 * scores, 6 * NC * L}},
        {"attention_plain_dkdv_kernel", {4 * scores, 6 * NC * L}},
        {"flash_dkdv_kernel", {4 * scores, 6 * NC * L}},
        {"dwpe_kernel", {0, NC + (double)m->T * C * fp32}},
        {"dwte_parts_kernel", {0, NC + parts}},
        {"dwte_kernel", {0, parts + 2 * rows}},
        {"norm_kernel", {0, P * fp32}},
        {"adamw_kernel", {0, P * (7 * fp32 + bf16)}},
    };
}

/* Bytes per second, read and written, of a copy of a quarter of the free memory, at most 2 GB. */
static double copy_ceiling(const GPT2 *m) {
    size_t unused = 0, all;
    float best = 0, ms = 0;
    cudaMemGetInfo(&unused, &all);
    const size_t bytes = min_of(unused / 8, (size_t)1 << 30);
    char *p = (char *)device_memory(2 * bytes, m->stream);
    for (int run = 0; p && run < 8; run++) {
        cudaEventRecord(m->uploaded, m->stream);
        cudaMemcpyAsync(p, p + bytes, bytes, cudaMemcpyDeviceToDevice, m->stream);
        cudaEventRecord(m->classified, m->stream);
        cudaEventSynchronize(m->classified);
        cudaEventElapsedTime(&ms, m->uploaded, m->classified);
        if (ms > 0 && (best == 0 || ms < best)) best = ms;
    }
    cudaFree(p);
    if (best == 0) return NAN;
    return 2.0 * (double)bytes / (best * 1e-3);
}

/* --- Steps ---------------------------------------------------------------------------------------------- */
static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

/* A step on random tokens, without graphs. */
static int step(GPT2 *m, int B, int T, uint32_t *random) {
    std::vector<int32_t> x((size_t)B * T), y(x.size());
    float loss;
    for (size_t i = 0; i < x.size(); i++) {
        *random = *random * 1664525 + 1013904223;
        x[i] = (int32_t)((*random >> 8) % (uint32_t)m->V);
        y[(i + x.size() - 1) % x.size()] = x[i];
    }
    for (Graph &graph : m->graphs) graph = Graph();
    spans_used = 0;
    if (gpt2_forward(m, x.data(), y.data(), B, T, 1, &loss) || gpt2_backward(m)) return -1;
    return gpt2_update(m, 1e-4, 0.9, 0.95, 1e-8, 0.1, 1);
}

struct Row { int calls; double flops, bytes; std::vector<double> ms; };

/* Times the kernels of some steps after a warm-up; whole: ms of each step. */
static int measure(GPT2 *m, int B, int T, std::map<std::string, Row> &rows, std::vector<double> &whole) {
    enum { WARM = 2, STEPS = 5 };
    uint32_t random = 1;
    for (int run = -WARM; run < STEPS; run++) {
        float ms = 0;
        if (step(m, B, T, &random)) return -1;
        cudaStreamSynchronize(m->stream);
        if (run < 0) continue;
        cudaEventElapsedTime(&ms, spans[0].begin, spans[spans_used - 1].end);
        whole.push_back(ms);
        for (auto &row : rows) row.second = Row{0, 0, 0, row.second.ms};
        for (size_t i = 0; i < spans_used; i++) {
            Row &row = rows[spans[i].name];
            cudaEventElapsedTime(&ms, spans[i].begin, spans[i].end);
            if (row.calls++ == 0) row.ms.push_back(0);
            row.ms.back() += ms;
            row.flops += spans[i].flops;
            row.bytes += spans[i].bytes;
        }
    }
    return 0;
}

/* Prints a row with its bound. Returns its ms. */
static double print_row(const std::string &name, const Row &row, double step_ms, double flop_ceiling,
                        double byte_ceiling) {
    const double ms = median(row.ms);
    const double by_flops = row.flops / flop_ceiling, by_bytes = row.bytes / byte_ceiling;
    const char *bound = "bytes";
    if (by_flops > by_bytes) bound = "FLOPs";
    if (row.flops + row.bytes == 0) bound = "?";
    printf("%-36s %5d %9.3f %6.1f%% %10.1f %8.0f %6.1f%% %s\n", name.c_str(), row.calls, ms,
           100 * ms / step_ms, row.flops / ms * 1e-9, row.bytes / ms * 1e-6,
           1e5 * fmax(by_flops, by_bytes) / ms, bound);
    return ms;
}

static void print_table(const GPT2 *m, std::map<std::string, Row> &rows, double step_ms, double flop_ceiling,
                        double byte_ceiling) {
    double sum = 0;
    for (const auto &bound : kernel_bounds(m)) {
        const auto found = rows.find(bound.first);
        if (found == rows.end()) continue;
        found->second.flops = bound.second.flops;
        found->second.bytes = bound.second.bytes;
    }
    printf("%-36s %5s %9s %7s %10s %8s  of its bound\n", "", "calls", "ms", "of step", "TFLOP/s", "GB/s");
    std::vector<std::pair<double, std::string>> order;
    for (const auto &row : rows) order.push_back({-median(row.second.ms), row.first});
    std::sort(order.begin(), order.end());
    for (const auto &entry : order)
        sum += print_row(entry.second, rows[entry.second], step_ms, flop_ceiling, byte_ceiling);
    printf("%-36s %5zu %9.3f %6.1f%%   the rest of %.3f ms: copies, gaps, events, the host\n", "all kernels",
           spans_used, sum, 100 * sum / step_ms, step_ms);
}

int main(int argc, char **argv) {
    const char *name = "d12";
    int B = 64, T = 1024;
    if (argc == 4) {
        name = argv[1];
        B = atoi(argv[2]);
        T = atoi(argv[3]);
    }
    GPT2Config config;
    GPT2 *m = NULL;
    if (argc != 1 && argc != 4) gpt2_fail("usage: profile [DESCRIPTOR|MODEL.bin B T]");
    else if (gpt2_descriptor(name, &config)) m = gpt2_load(name);
    else m = gpt2_create(&config);
    std::map<std::string, Row> rows;
    std::vector<double> whole;
    if (!m || gpt2_init(m, 1) || measure(m, B, T, rows, whole)) {
        fprintf(stderr, "profile: %s\n", gpt2_error());
        gpt2_free(m);
        return 1;
    }
    const double byte_ceiling = copy_ceiling(m), flop_ceiling = gpt2_ceiling();
    printf("%s: %.0f TFLOP/s, %.0f GB/s; %s, B %d, T %d, -r %d\n", gpt2_device(), flop_ceiling * 1e-12,
           byte_ceiling * 1e-9, name, B, T, m->recompute);
    print_table(m, rows, median(whole), flop_ceiling, byte_ceiling);
    gpt2_free(m);
    return 0;
}
