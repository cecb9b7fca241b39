/* From three loops to gemm(): C (M,N) = A (M,K) · Wᵀ with W (N,K), the forward pass of a linear layer, after
   each optimization. dev/doc/gemm.md explains them.

     make build/gemm_steps && build/gemm_steps [M N K]      default 256 2304 768: GPT-2 124M's qkv, 256 rows

   Prints medians and each step's fraction of the peak of its threads. Every result is compared with a product
   in double; the exit status is 1 if one is wrong. */
#include "timing.h"
#ifndef _OPENMP
static void omp_set_num_threads(int n) { (void)n; }
#endif

enum { RUNS = 7, FEW_ROWS = 32, CACHE_BYTES = 64 << 20 };
static size_t M = 256, N = 2304, K = 768;
static float *A, *W, *Wt, *C;             // (M,K); (N,K); its transpose (K,N), not timed; (M,N)
static double *expected;                  // (M,N)
static char *flush;                       // (CACHE_BYTES), touched to evict the matrices from the caches
static Workspace ws;
static size_t rows;                       // of the M rows, how many the current step computes
static int threads;                       // that it uses

// 1. The formula. Each multiply-add waits for the one before: the order of a sum is fixed, so no vectors.
static void three_loops(void) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += A[i * K + k] * W[j * K + k];
            C[i * N + j] = sum;
        }
}

// 2. Columns inside: neighbours are independent and vectorize, but each multiply-add loads and stores C.
static void columns_inside(void) {
    memset(C, 0, rows * N * sizeof *C);
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < K; k++) {
            float *restrict c = C + i * N;
            for (size_t j = 0; j < N; j++) c[j] += A[i * K + k] * Wt[k * N + j];
        }
}

// c (MR,NR) = a (MR,K) · b (K,NR), with unpacked A; rows of b are ldb floats apart.
static void unpacked_kernel(float *c, const float *a, const float *b, size_t ldb) {
    vf sum[MR][NV] = {{{0}}};
    for (size_t k = 0; k < K; k++, a++, b += ldb) {
        vf row[NV];
#pragma GCC unroll 8
        for (size_t j = 0; j < NV; j++) row[j] = vload(b + j * LANES, LANES);
#pragma GCC unroll 12
        for (size_t i = 0; i < MR; i++)
#pragma GCC unroll 8
            for (size_t j = 0; j < NV; j++) sum[i][j] += a[i * K] * row[j];
    }
#pragma GCC unroll 12
    for (size_t i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (size_t j = 0; j < NV; j++) vstore(c + i * N + j * LANES, sum[i][j], LANES);
}

// 3. A tile of sums stays in registers while k runs. Rows of Wᵀ are N floats apart: a page and few sets each.
static void register_tile(void) {
    for (size_t column = 0; column < N; column += NR)
        for (size_t row = 0; row < rows; row += MR) {
            const size_t i = min(row, rows - MR), j = min(column, N - NR);      // the last tile overlaps
            unpacked_kernel(C + i * N + j, A + i * K, Wt + j, N);
        }
}

// 4. NR columns of W are packed into a contiguous panel.
static void packed_panel(void) {
    float *panel = alloc_floats(K * NR);
    for (size_t column = 0; column < N; column += NR) {
        const size_t j = min(column, N - NR);
        pack(panel, W + j * K, K, 1, NR, K, NR);
        for (size_t row = 0; row < rows; row += MR) {
            const size_t i = min(row, rows - MR);
            unpacked_kernel(C + i * N + j, A + i * K, panel, NR);
        }
    }
    free(panel);
}

// 5. A is packed too, k is split: a panel of W fits L1, a block of A fits L2. 6. Threads take panels.
static void packed_blocks(void) {
    for (size_t m = 0; m < rows; m += MC)
        for (size_t k = 0; k < K; k += KC) {
            const size_t high = min(MC, rows - m), kc = min(KC, K - k);
#pragma omp parallel num_threads(threads)
            {
                float *panel = ws.pack_b + (size_t)omp_get_thread_num() * KC * NR;
#pragma omp for
                for (size_t i = 0; i < high; i += GROUP)
                    pack(ws.pack_a + i * kc, A + (m + i) * K + k, K, 1, min(GROUP, high - i), kc, MR);
#pragma omp for schedule(dynamic)
                for (size_t j = 0; j < N; j += NR) {
                    pack(panel, W + j * K + k, K, 1, min(NR, N - j), kc, NR);
                    for (size_t i = 0; i < high; i += MR) {
                        float *c = C + (m + i) * N + j;
                        const float *sum_so_far = NULL;
                        if (k > 0) sum_so_far = c;
                        tile(c, N, ws.pack_a + i * kc, panel, kc, NULL, sum_so_far, N, high - i, N - j);
                    }
                }
            }
        }
}

// 7. gemm(): prefetches the next panel; each thread finishes all k of its columns, so threads meet once.
static void the_gemm(void) {
    ws.threads = threads;
    gemm(&ws, C, N, (Matrix){A, K, 1}, (Matrix){W, 1, K}, rows, N, K, NULL, NULL);
}

// ||C - expected|| / ||expected|| in the L2 norm
static double relative_error(void) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < rows * N; i++) {
        difference += (C[i] - expected[i]) * (C[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    return sqrt(difference / norm);
}

static void make_matrices(void) {
    A = alloc_floats(M * K);
    W = alloc_floats(N * K);
    Wt = alloc_floats(K * N);
    C = alloc_floats(M * N);
    expected = alloc_bytes(M * N * sizeof *expected);
    flush = alloc_bytes(CACHE_BYTES);
    for (size_t i = 0; i < M * K; i++) A[i] = 2 * (float)uniform_at(1, i) - 1;
    for (size_t j = 0; j < N; j++)
        for (size_t k = 0; k < K; k++) {
            W[j * K + k] = 2 * (float)uniform_at(2, j * K + k) - 1;
            Wt[k * N + j] = W[j * K + k];
        }
#pragma omp parallel for
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++)
            for (size_t k = 0; k < K; k++) expected[i * N + j] += (double)A[i * K + k] * W[j * K + k];
}

typedef struct {
    const char *name;
    void (*run)(void);
    size_t rows;
    int threads;
    double ms[RUNS], percent[RUNS], error;      // for all M rows; of the peak; of the last run
} Step;

// Runs a step with cold caches and awake threads, as in training. Returns the peak measured after it, FLOP/s.
static double run_step(Step *s, int run) {
    rows = s->rows;
    threads = s->threads;
    omp_set_num_threads(threads);
    memset(C, 0xff, M * N * sizeof *C);         // NaN
#pragma omp parallel for
    for (size_t i = 0; i < CACHE_BYTES; i += 64) flush[i]++;
    const double start = seconds();
    s->run();
    const double time = (seconds() - start) * (double)M / (double)rows, peak = gpt2_ceiling();
    s->error = relative_error();
    if (run >= 0) {
        s->ms[run] = time * 1e3;
        s->percent[run] = 100 * 2.0 * (double)M * (double)N * (double)K / time / peak;
    }
    return peak;
}

int main(int argc, char **argv) {
    if (argc == 4) {
        M = strtoul(argv[1], NULL, 10);
        N = strtoul(argv[2], NULL, 10);
        K = strtoul(argv[3], NULL, 10);
    }
    if ((argc != 1 && argc != 4) || M < MR || N < NR || K < 1) {
        fprintf(stderr, "usage: %s [M N K] with M >= %d, N >= %d, K >= 1\n", argv[0], MR, NR);
        return 2;
    }
    const int all = omp_get_max_threads();
    const size_t few = min(M, FEW_ROWS);        // slow steps compute a few rows; their time is scaled
    Step steps[] = {
        {.name = "1 three loops", .run = three_loops, .rows = few, .threads = 1},
        {.name = "2 columns inside", .run = columns_inside, .rows = few, .threads = 1},
        {.name = "3 register tile", .run = register_tile, .rows = M, .threads = 1},
        {.name = "4 W packed", .run = packed_panel, .rows = M, .threads = 1},
        {.name = "5 A packed, k split", .run = packed_blocks, .rows = M, .threads = 1},
        {.name = "6 threads", .run = packed_blocks, .rows = M, .threads = all},
        {.name = "7 gemm()", .run = the_gemm, .rows = M, .threads = all},
        {.name = "  gemm(), one thread", .run = the_gemm, .rows = M, .threads = 1},
    };
    const size_t count = sizeof steps / sizeof *steps;
    ws.pack_a = alloc_floats((size_t)all * PACK_A);
    ws.pack_b = alloc_floats((size_t)all * PACK_B);
    make_matrices();

    double peak = 0;
    for (int run = -1; run < RUNS; run++)       // run -1 warms up; steps alternate
        for (Step *s = steps; s < steps + count; s++) {
            peak = fmax(peak, run_step(s, run));
            if (s->error < 1e-5) continue;      // false for NaN
            fprintf(stderr, "step %s is wrong: its relative error is %.1e\n", s->name, s->error);
            return 1;
        }

    omp_set_num_threads(all);
    printf("%s, %.1f GFLOP/s; M %zu, N %zu, K %zu\n", gpt2_device(), peak * 1e-9, M, N, K);
    printf("%-24s threads        ms   GFLOP/s   %% of its threads' peak   error\n", "step");
    for (Step *s = steps; s < steps + count; s++) {
        const double ms = median(s->ms, RUNS);
        printf("%-24s %7d %9.2f %9.1f %24.1f   %.0e\n", s->name, s->threads, ms,
               2e-6 * (double)M * (double)N * (double)K / ms, median(s->percent, RUNS), s->error);
    }
    return 0;
}
