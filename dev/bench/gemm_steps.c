/* From three loops to gemm(): C (M,N) = A (M,K) · Wᵀ with W (N,K), the forward pass of a linear layer, in
   steps. dev/doc/gemm.md explains them.

     gcc -O3 -march=native -fno-math-errno -fopenmp -std=gnu11 -o gemm_steps dev/bench/gemm_steps.c -lm
     ./gemm_steps [M N K]     default 256 2304 768: GPT-2 124M's qkv layer with 256 rows

   The steps alternate; a figure is the median of its rounds, and the peak of its threads is measured after
   each. Threads are awake and no matrix is cached when a step starts, as in training. Each result is compared
   with a product in double: the exit status is 1 if one is wrong. */
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"
#ifndef _OPENMP
static void omp_set_num_threads(int n) { (void)n; }
#endif

enum { TURNS = 7, FEW = 32, CACHES = 64 << 20 };
static size_t M = 256, N = 2304, K = 768;
static float *A, *W, *Wt, *C;             /* (M,K), (N,K), its transpose (K,N), (M,N) */
static double *right;                     /* (M,N) */
static char *others;                      /* (CACHES), to drive the matrices out */
static Workspace ws;
static size_t rows;                       /* for the step that runs: how many of the M rows it does, */
static int threads;                       /* and with how many threads */

/* 1. The formula. A sum keeps its order, so that it cannot be vectorised: each multiply-add waits for the one
   before. */
static void three_loops(void) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += A[i * K + k] * W[j * K + k];
            C[i * N + j] = sum;
        }
}

/* 2. The loop over columns inside: neighbours do not depend on each other, and fill vectors. But a multiply-
   add loads a vector of Wᵀ and one of C, and stores it. Wᵀ comes free of charge, here and in step 3. */
static void columns_inside(void) {
    memset(C, 0, rows * N * sizeof *C);
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < K; k++) {
            float *restrict c = C + i * N;
            for (size_t j = 0; j < N; j++) c[j] += A[i * K + k] * Wt[k * N + j];
        }
}

/* c (MR,NR) = a (MR,K) · b (K,NR): the kernel's loop with A as it lies in memory; rows of b are ldb apart. */
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

/* 3. A tile of sums stays in registers while k runs. The rows of Wᵀ lie N floats apart: each in a page of its
   own, and what a tile uses of them in few sets of the caches. The last tile overlaps the one before. */
static void register_tile(void) {
    for (size_t column = 0; column < N; column += NR)
        for (size_t row = 0; row < rows; row += MR) {
            const size_t i = min(row, rows - MR), j = min(column, N - NR);
            unpacked_kernel(C + i * N + j, A + i * K, Wt + j, N);
        }
}

/* 4. The same with NR columns copied to where they lie side by side, now from W itself. */
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

/* 5. A packed too, and k in pieces: a panel of W stays in L1, the block of A in L2 if M is small.
   6. Threads take panels. */
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
                        tile(c, N, ws.pack_a + i * kc, panel, kc, NULL, k ? c : NULL, N, high - i, N - j);
                    }
                }
            }
        }
}

/* 7. What the model calls: the next panel is fetched while this one is used, and a thread goes through k with
   its columns before it takes others, so that the threads meet once and not for each piece of k. */
static void the_gemm(void) {
    ws.threads = threads;
    gemm(&ws, C, N, (Matrix){A, K, 1}, (Matrix){W, 1, K}, rows, N, K, NULL, NULL);
}

/* The relative error of what a step did: L2 norm of the difference over that of the product in double. */
static double error(void) {
    double off = 0, all = 0;
    for (size_t i = 0; i < rows * N; i++) {
        off += (C[i] - right[i]) * (C[i] - right[i]);
        all += right[i] * right[i];
    }
    return sqrt(off / all);
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double values[TURNS]) {
    qsort(values, TURNS, sizeof *values, by_size);
    return values[TURNS / 2];
}

static void operands(void) {
    A = alloc_floats(M * K), W = alloc_floats(N * K), Wt = alloc_floats(K * N), C = alloc_floats(M * N);
    right = alloc_bytes(M * N * sizeof *right), others = alloc_bytes(CACHES);
    for (size_t i = 0; i < M * K; i++) A[i] = 2 * (float)uniform_at(1, i) - 1;
    for (size_t j = 0; j < N; j++)
        for (size_t k = 0; k < K; k++) Wt[k * N + j] = W[j * K + k] = 2 * (float)uniform_at(2, j * K + k) - 1;
#pragma omp parallel for
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++)
            for (size_t k = 0; k < K; k++) right[i * N + j] += (double)A[i * K + k] * W[j * K + k];
}

int main(int argc, char **argv) {
    size_t *sizes[] = {&M, &N, &K};
    for (int i = 1; argc == 4 && i < argc; i++) *sizes[i - 1] = strtoul(argv[i], NULL, 10);
    if ((argc != 1 && argc != 4) || M < MR || N < NR || K < 1) {
        fprintf(stderr, "usage: %s [M N K], M at least %d, N at least %d, K at least 1\n", argv[0], MR, NR);
        return 2;
    }
    const int all = omp_get_max_threads();
    const struct { const char *name; void (*run)(void); size_t rows; int threads; } steps[] = {
        {"1 three loops", three_loops, min(M, FEW), 1},           /* slow: a few rows, and the time scaled */
        {"2 columns inside", columns_inside, min(M, FEW), 1},
        {"3 a tile in registers", register_tile, M, 1},
        {"4 W packed", packed_panel, M, 1},
        {"5 A packed, k in pieces", packed_blocks, M, 1},
        {"6 threads", packed_blocks, M, all},
        {"7 each its own A: gemm()", the_gemm, M, all},
        {"  gemm(), one thread", the_gemm, M, 1},
    };
    enum { STEPS = sizeof steps / sizeof *steps };
    double ms[STEPS][TURNS], share[STEPS][TURNS], off[STEPS], best = 0;
    const double flops = 2.0 * (double)M * (double)N * (double)K;
    ws.pack_a = alloc_floats((size_t)all * PACK_A);
    ws.pack_b = alloc_floats((size_t)all * PACK_B);
    operands();

    for (int turn = -1; turn < TURNS; turn++)                     /* turn -1 warms up */
        for (int s = 0; s < STEPS; s++) {
            rows = steps[s].rows;
            threads = steps[s].threads;
            omp_set_num_threads(threads);
            memset(C, 0xff, M * N * sizeof *C);                   /* NaN */
#pragma omp parallel for
            for (size_t i = 0; i < CACHES; i += 64) others[i]++;
            const double start = seconds();
            steps[s].run();
            const double took = (seconds() - start) * (double)M / (double)rows, ceiling = gpt2_ceiling();
            best = fmax(best, ceiling);
            off[s] = error();
            if (!(off[s] < 1e-5)) {
                fprintf(stderr, "step %s is wrong: its relative error is %.1e\n", steps[s].name, off[s]);
                return 1;
            }
            if (turn < 0) continue;
            ms[s][turn] = took * 1e3;
            share[s][turn] = 100 * flops / took / ceiling;
        }

    omp_set_num_threads(all);
    printf("%s, %.1f GFLOP/s; (%zu,%zu) = (%zu,%zu) · (%zu,%zu)\n", gpt2_device(), best * 1e-9, M, N, M, K, K,
           N);
    printf("%-30s threads        ms   GFLOP/s   %% of its threads' ceiling   error\n", "step");
    for (int s = 0; s < STEPS; s++) {
        const double time = median(ms[s]);
        printf("%-30s %7d %9.2f %9.1f %27.1f   %.0e\n", steps[s].name, steps[s].threads, time,
               flops / time * 1e-6, median(share[s]), off[s]);
    }
    return 0;
}
