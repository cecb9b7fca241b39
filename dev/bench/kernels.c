/* Times each kernel of train_gpt2.c against its roofline bound.

     make bench                builds and runs it after bench.py
     build/kernels [B T]       default 4 64; the model has GPT-2 124M's shape

   Reports medians; passes or fails nothing. */
#include "timing.h"

enum { RUNS = 7, STREAM_FLOATS = 64 << 20 };      // timed runs, after a warm-up; more than any cache
enum { C = 768, NH = 12, V = 50257, Vp = 50304, L = 12 };
static double byte_ceiling;                       // bytes/s
static Workspace ws;

// Prints a row: the time, and the larger of its two lower bounds as a fraction of it.
static void report(const char *name, double time, double flops, double bytes) {
    const double flops_bound = flops / gpt2_ceiling();      // measured now: other programs may be running
    const double bytes_bound = bytes / byte_ceiling;
    const char *kind = "bytes";
    if (flops_bound > bytes_bound) kind = "FLOPs";
    printf("%-34s %9.3f ms %8.1f GFLOP/s %7.1f GB/s   %5.1f%% of the bound by %s\n", name, time * 1e3,
           flops / time * 1e-9, bytes / time * 1e-9, 100 * fmax(flops_bound, bytes_bound) / time, kind);
}

// Runs a statement once to warm up and RUNS times more; sets `time` to the median in seconds.
#define TIME(time, ...)                                                                                      \
    double time;                                                                                             \
    do {                                                                                                     \
        double times[RUNS + 1];                                                                              \
        for (int run = 0; run <= RUNS; run++) {                                                              \
            const double start = seconds();                                                                  \
            __VA_ARGS__;                                                                                     \
            times[run] = seconds() - start;                                                                  \
        }                                                                                                    \
        time = median(times + 1, RUNS);                                                                      \
    } while (0)

static void measure_memory(void) {
    float *from = alloc_floats(STREAM_FLOATS), *to = alloc_floats(STREAM_FLOATS);
    TIME(time, _Pragma("omp parallel for") for (size_t i = 0; i < STREAM_FLOATS; i++) to[i] = from[i] + 1);
    byte_ceiling = 2.0 * sizeof(float) * STREAM_FLOATS / time;
    free(from);
    free(to);
}

// The three products of a linear layer with N rows, IC input and OC output channels.
static void time_linear(const char *layer, size_t N, size_t IC, size_t OC) {
    float *inp = alloc_floats(N * IC), *w = alloc_floats(OC * IC), *out = alloc_floats(N * OC);
    float *bias = alloc_floats(OC);
    const double flops = 2.0 * (double)N * (double)IC * (double)OC;
    const double bytes = 4.0 * (double)(N * IC + OC * IC + N * OC);
    char name[64];
    snprintf(name, sizeof name, "%s %zu x %zu x %zu forward", layer, N, OC, IC);
    TIME(forward, linear_forward(&ws, out, inp, w, bias, NULL, N, IC, OC));
    report(name, forward, flops, bytes);
    TIME(dinp, linear_backward_input(&ws, inp, out, w, N, IC, OC));
    report("  dinp", dinp, flops, bytes);
    TIME(dweight, linear_backward_weight(&ws, w, bias, out, inp, N, IC, OC, 1));
    report("  dweight and dbias", dweight, flops, bytes);
    free(inp);
    free(w);
    free(out);
    free(bias);
}

static void time_attention(size_t B, size_t T) {
    const size_t NC = B * T * C;
    float *qkv = alloc_floats(3 * NC), *out = alloc_floats(3 * NC), *dqkv = alloc_floats(3 * NC);
    const double flops = 2.0 * (double)NC * (double)T;      // 2 products, half of T x T each
    TIME(forward, attention_forward(&ws, out, qkv, B, 0, T, C, NH));
    report("attention forward", forward, flops, 4 * 4.0 * (double)NC);
    TIME(backward, attention_backward(&ws, dqkv, out, qkv, B, T, C, NH));
    report("attention backward", backward, 2.5 * flops, 7 * 4.0 * (double)NC);
    free(qkv);
    free(out);
    free(dqkv);
}

static void time_elementwise(size_t N) {
    const double NC = (double)(N * C);
    float *a = alloc_floats(4 * N * C), *b = alloc_floats(4 * N * C), *c = alloc_floats(4 * N * C);
    float *w = alloc_floats(C), *dw = alloc_floats(C), *db = alloc_floats(C);
    float *mean = alloc_floats(N), *rstd = alloc_floats(N);
    TIME(norm, layernorm_forward(b, mean, rstd, a, w, w, N, C));
    report("layer norm forward", norm, 8 * NC, 2 * 4 * NC);
    TIME(norm_back, layernorm_backward(c, dw, db, b, a, w, mean, rstd, N, C, 1));
    report("layer norm backward", norm_back, 20 * NC, 6 * 4 * NC);
    TIME(gelu_forward, gelu(b, NULL, a, 4 * N * C));
    report("GELU forward", gelu_forward, 25 * 4 * NC, 8 * 4 * NC);
    TIME(gelu_backward, gelu(b, c, a, 4 * N * C));
    report("GELU backward", gelu_backward, 32 * 4 * NC, 16 * 4 * NC);
}

static void time_crossentropy(size_t N) {
    float *logits = alloc_floats(N * Vp), *losses = alloc_floats(N);
    int32_t *targets = alloc_bytes(N * sizeof *targets);
    TIME(time, crossentropy(losses, logits, targets, N, V, Vp, 1));
    report("softmax, loss and its gradient", time, 25.0 * (double)(N * V), 8.0 * (double)(N * V));
}

static void time_model(void) {
    const GPT2Config config = {.max_T = 1024, .V = V, .L = L, .NH = NH, .C = C};
    GPT2 *model = gpt2_create(&config);
    const double parameters = (double)model->start[GPT2_TENSORS];
    const float zero = 0;      // setting a gradient makes the model recompute the norm
    TIME(norm, gpt2_set(model, 0, GPT2_GRAD, 0, 1, &zero); gpt2_grad_norm(model));
    report("gradient norm, 124M", norm, 2 * parameters, 4 * parameters);
    TIME(adamw, gpt2_set(model, 0, GPT2_GRAD, 0, 1, &zero);
         gpt2_update(model, 1e-4, 0.9, 0.95, 1e-8, 0.1, 0));
    report("AdamW, 124M", adamw, 14 * parameters, 28 * parameters);
    int32_t *tokens = alloc_bytes(1024 * sizeof *tokens);
    float *logits = alloc_floats(V);
    const int lengths[] = {16, 900};      // one row per token, with keys and values cached
    for (size_t i = 0; i < 2; i++) {
        TIME(token, gpt2_logits(model, tokens, 1, lengths[i] + run, 1, logits));
        const double cached = 2.0 * lengths[i] * C * L;
        char name[64];
        snprintf(name, sizeof name, "one token after %d, 124M", lengths[i]);
        report(name, token, 2 * (parameters + cached), 4 * (parameters + cached));
    }
}

int main(int argc, char **argv) {
    size_t B = 4, T = 64;
    if (argc > 2) {
        B = strtoul(argv[1], NULL, 10);
        T = strtoul(argv[2], NULL, 10);
    }
    const size_t N = B * T, chunk = min(N, 256);
    ws.threads = omp_get_max_threads();
    ws.scratch_floats = attention_floats(T);
    ws.pack_a = alloc_floats((size_t)ws.threads * PACK_A);
    ws.pack_b = alloc_floats((size_t)ws.threads * PACK_B);
    ws.scratch = alloc_floats((size_t)ws.threads * ws.scratch_floats);
    measure_memory();
    printf("%s: %.1f GFLOP/s, %.1f GB/s; B %zu, T %zu\n", gpt2_device(), gpt2_ceiling() * 1e-9,
           byte_ceiling * 1e-9, B, T);
    time_linear("qkv", N, C, 3 * C);
    time_linear("attproj", N, C, C);
    time_linear("fc", N, C, 4 * C);
    time_linear("fcproj", N, 4 * C, C);
    time_linear("classifier", chunk, C, V);
    time_attention(B, T);
    time_elementwise(N);
    time_crossentropy(chunk);
    time_model();
    return 0;
}
