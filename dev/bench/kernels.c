/* Times each kernel of train_gpt2.c against its bound: multiply-adds, or bytes to and from memory.

     make bench          builds and runs it after the comparison of whole steps
     ./kernels [B T]     default 4 64; the model has GPT-2 124M's shape

   Includes train_gpt2.c to call static functions, runs each seven times after a warm-up, and prints the
   median. Both peaks are measured here. Nothing passes or fails. */
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"

enum { RUNS = 7, L3 = 64 << 20 };
static double flop_ceiling, byte_ceiling;

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Runs CODE until RUNS times are there, and leaves their median, in seconds, in `median`. */
#define TIME(CODE)                                                                                           \
    double times[RUNS + 1], median;                                                                          \
    for (int run = 0; run <= RUNS; run++) {                                                                  \
        const double start = seconds();                                                                      \
        CODE;                                                                                                \
        times[run] = seconds() - start;                                                                      \
    }                                                                                                        \
    qsort(times + 1, RUNS, sizeof *times, by_size);                                                          \
    median = times[1 + RUNS / 2]

/* A row of the table: the larger of the two bounds is the one that counts. The arithmetic one is measured
   again for each row, as other people's programs come and go. */
static void row(const char *name, double median, double flops, double bytes) {
    flop_ceiling = gpt2_ceiling();
    const double by_flops = flops / flop_ceiling, by_bytes = bytes / byte_ceiling;
    const double bound = by_flops > by_bytes ? by_flops : by_bytes;
    printf("%-34s %9.3f ms %8.1f GFLOP/s %7.1f GB/s   %5.1f%% of its bound, %s\n", name, median * 1e3,
           flops / median * 1e-9, bytes / median * 1e-9, 100 * bound / median,
           by_flops > by_bytes ? "FLOPs" : "bytes");
}

/* The three products of a linear layer with N rows, IC channels in and OC out. */
static void linear(const Workspace *ws, const char *what, size_t N, size_t IC, size_t OC) {
    float *inp = alloc_floats(N * IC), *w = alloc_floats(OC * IC);
    float *out = alloc_floats(N * OC), *b = alloc_floats(OC);
    const double flops = 2.0 * (double)N * (double)IC * (double)OC;
    const double bytes = 4.0 * (double)(N * IC + OC * IC + N * OC);
    char name[64];
    {
        TIME(linear_forward(ws, out, inp, w, b, NULL, N, IC, OC));
        snprintf(name, sizeof name, "%s %zu x %zu x %zu forward", what, N, OC, IC);
        row(name, median, flops, bytes);
    }
    {
        TIME(linear_backward_input(ws, inp, out, w, N, IC, OC));
        row("  d-input", median, flops, bytes);
    }
    {
        TIME(linear_backward_weight(ws, w, b, out, inp, N, IC, OC, 1));
        row("  d-weight and d-bias", median, flops, bytes);
    }
    free(inp);
    free(w);
    free(out);
    free(b);
}

enum { C = 768, NH = 12, V = 50257, Vp = 50304 };     /* GPT-2 124M */

/* Bytes per second of reading and writing memory. */
static double measure_bandwidth(void) {
    float *source = alloc_floats(L3), *to = alloc_floats(L3);
    TIME(_Pragma("omp parallel for") for (size_t i = 0; i < L3; i++) to[i] = source[i] + 1);
    free(source);
    free(to);
    return 2.0 * 4 * L3 / median;
}

static Workspace make_workspace(size_t T) {
    Workspace ws = {.threads = omp_get_max_threads()};
    ws.scratch_floats = attention_floats(T);
    ws.pack_a = alloc_floats((size_t)ws.threads * PACK_A);
    ws.pack_b = alloc_floats((size_t)ws.threads * PACK_B);
    ws.scratch = alloc_floats((size_t)ws.threads * ws.scratch_floats);
    return ws;
}

/* Attention, layer norm and GELU of a layer. */
static void other_layers(const Workspace *ws, size_t B, size_t T) {
    const size_t N = B * T;
    const double NC_bytes = 4.0 * (double)(N * C);
    float *a = alloc_floats(N * 4 * C), *b = alloc_floats(N * 4 * C), *c = alloc_floats(N * 4 * C);
    float *w = alloc_floats(4 * C), *stats = alloc_floats(2 * N);
    const double causal = 2.0 * (double)(B * T) * (double)T * (double)C;     /* 2 products, half of T x T */
    {
        TIME(attention_forward(ws, b, a, B, 0, T, C, NH));
        row("attention forward", median, causal, 4 * NC_bytes);
    }
    {
        TIME(attention_backward(ws, c, b, a, B, T, C, NH));
        row("attention backward", median, 2.5 * causal, 7 * NC_bytes);
    }
    {
        TIME(layernorm_forward(b, stats, stats + N, a, w, w, N, C));
        row("layer norm forward", median, 8.0 * (double)(N * C), 2 * NC_bytes);
    }
    {
        TIME(layernorm_backward(c, w, w + C, b, a, w + 2 * C, stats, stats + N, N, C, 1));
        row("layer norm backward", median, 20.0 * (double)(N * C), 6 * NC_bytes);
    }
    {
        TIME(gelu(b, NULL, a, N * 4 * C));
        row("GELU forward", median, 25.0 * 4 * (double)(N * C), 8 * NC_bytes);
    }
    {
        TIME(gelu(b, c, a, N * 4 * C));
        row("GELU backward", median, 32.0 * 4 * (double)(N * C), 16 * NC_bytes);
    }
}

static void classifier(const Workspace *ws, size_t rows) {
    float *logits = alloc_floats(rows * Vp), *losses = alloc_floats(rows);
    int32_t *targets = calloc(rows, sizeof *targets);
    linear(ws, "classifier", rows, C, V);
    TIME(crossentropy(losses, logits, targets, rows, V, Vp, 1));
    row("softmax, loss and its gradient", median, 25.0 * (double)(rows * V), 8.0 * (double)(rows * V));
}

/* The gradient norm, AdamW, and generation. */
static void whole_model(void) {
    const GPT2Config config = {.max_T = 1024, .V = 50257, .L = 12, .NH = 12, .C = 768};
    GPT2 *model = gpt2_create(&config);
    const double elements = (double)model->start[GPT2_TENSORS];
    float zero = 0;
    gpt2_set(model, 0, GPT2_GRAD, 0, 1, &zero);
    {
        TIME(gpt2_set(model, 0, GPT2_GRAD, 0, 1, &zero); gpt2_grad_norm(model));
        row("gradient norm, 124M", median, 2 * elements, 4 * elements);
    }
    {
        TIME(gpt2_set(model, 0, GPT2_GRAD, 0, 1, &zero); gpt2_update(model, 1e-4, 0.9, 0.95, 1e-8, 0.1, 0));
        row("AdamW, 124M", median, 14 * elements, 28 * elements);
    }
    int32_t *tokens = calloc(1024, sizeof *tokens);
    float *logits = alloc_floats(V);
    for (int before = 16; before < 1000; before += 884) {     /* each token but the first is a single row */
        TIME(gpt2_logits(model, tokens, 1, before + run, 1, logits));
        const double cached = (double)before * 2 * C * (double)model->L;     /* keys and values */
        char name[64];
        snprintf(name, sizeof name, "a token after %d others, 124M", before);
        row(name, median, 2 * (elements + cached), 4 * (elements + cached));
    }
}

int main(int argc, char **argv) {
    size_t B = 4, T = 64;
    if (argc > 2) {
        B = strtoul(argv[1], NULL, 10);
        T = strtoul(argv[2], NULL, 10);
    }
    const size_t N = B * T;
    const Workspace ws = make_workspace(T);
    byte_ceiling = measure_bandwidth();
    flop_ceiling = gpt2_ceiling();
    printf("%s: %.1f GFLOP/s, %.1f GB/s; B %zu, T %zu\n", gpt2_device(), flop_ceiling * 1e-9,
           byte_ceiling * 1e-9, B, T);
    linear(&ws, "qkv", N, C, 3 * C);
    linear(&ws, "attproj", N, C, C);
    linear(&ws, "fc", N, C, 4 * C);
    linear(&ws, "fcproj", N, 4 * C, C);
    other_layers(&ws, B, T);
    classifier(&ws, min(N, 256));
    whole_model();
    return 0;
}
