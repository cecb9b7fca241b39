/* GPT-2 training on a CPU, in fp32, with a C compiler and nothing else.

     make                                      builds ./train_gpt2 and libgpt2.so from this file
     ./train_gpt2 -e d12 -i 'train_*.bin' -j 'val_*.bin' -o run
     ./train_gpt2 --help                       lists every flag

   What it is: the whole of GPT-2 (Radford et al. 2019) with its backward pass, AdamW, and the files that a
   run reads and writes. What it refuses to be: a tensor library, an autograd, a tokenizer (text becomes
   tokens in train_gpt2.py). To be read from top to bottom:

     1. The C API      what the driver, the tests and main() may call; documented here and nowhere else
     2. The model      vectors, matrix product, layers forward and backward, GPT-2, AdamW
     3. The host half  model files, token shards, schedule, sampling, checkpoints, check against a reference
     4. main           the command line

   The host half reaches the model only through the API, so that another model half (CUDA) can stand in for
   section 2: -DGPT2_NO_MODEL leaves that out, -DGPT2_NO_MAIN section 4; -DGPT2_API_ONLY stops after section
   1. */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

/* ===========================================================================================================
   1. The C API
   A function that can fail returns 0 or a pointer on success, -1 or NULL on failure, and gpt2_error() then
   has one sentence about it (per thread, until the thread's next failure). Nothing here prints or exits.
   Arrays belong to the caller. Sizes: B sequences (batch) of T positions (time), C channels, NH heads, L
   layers, V tokens in the vocabulary, Vp = V rounded up to a multiple of 128 (the rows that wte has in memory
   and file).
   ======================================================================================================== */
#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)
typedef struct GPT2 GPT2;                 /* parameters, gradients, moments, activations */
typedef struct {
    int32_t max_T, V, L, NH, C;
} GPT2Config;
enum { GPT2_PARAM, GPT2_GRAD, GPT2_MOMENT1, GPT2_MOMENT2 };     /* the kinds of a tensor */
enum { GPT2_TENSORS = 16 };

const char *gpt2_error(void);

/* --- the model (section 2) --- */

GPT2 *gpt2_create(const GPT2Config *config);     /* all parameters 0; see gpt2_init, gpt2_load */
void gpt2_free(GPT2 *model);                     /* this one and its like allow NULL */
void gpt2_config(const GPT2 *model, GPT2Config *out);

/* Copies `count` elements from `first` on of a tensor (an index of gpt2_tensor) of a kind, out or in. */
int gpt2_get(GPT2 *model, int tensor, int kind, int64_t first, int64_t count, float *out);
int gpt2_set(GPT2 *model, int tensor, int kind, int64_t first, int64_t count, const float *in);

/* Runs the model on x (B,T). With targets y (B,T), *loss becomes the mean cross-entropy in nats per token.
   grad_scale 0 only evaluates. Otherwise the gradient of grad_scale · loss is to be *added* to the gradients:
   its classifier part here (the logits exist only a chunk at a time and are not made twice), the rest by the
   gpt2_backward that must follow. To accumulate n micro-batches, give each the scale 1/n. */
int gpt2_forward(GPT2 *model, const int32_t *x, const int32_t *y, int B, int T, float grad_scale,
                 float *loss);
int gpt2_backward(GPT2 *model);
void gpt2_zero_grad(GPT2 *model);

/* Logits of every position, out (B,T,V); with last_only of each sequence's last position, out (B,V). */
int gpt2_logits(GPT2 *model, const int32_t *x, int B, int T, int last_only, float *out);

/* One AdamW step (Loshchilov & Hutter 2019, algorithm 2): gradients clipped to a global norm of max_norm (0:
   not), moments corrected by the number of updates, decay of the 2-D tensors. Then the gradients are 0. */
int gpt2_update(GPT2 *model, double lr, double beta1, double beta2, double eps, double decay,
                double max_norm);
float gpt2_grad_norm(GPT2 *model);               /* global L2 norm before clipping; NaN on failure */
int64_t gpt2_updates(const GPT2 *model);
void gpt2_set_updates(GPT2 *model, int64_t updates);

const char *gpt2_device(void);                   /* "CPU, 2 threads, 8 floats a vector" */
double gpt2_ceiling(void);                       /* FLOP/s that no step can exceed, measured in about 0.1 s */

/* --- the host half (section 3) --- */

/* Tensor 0…15 in file order: wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb
   lnfw lnfb. Returns its number of elements (-1 for a bad index), its name and its shape, L first where it
   has layers, 0 for dimensions that it has not; either may be NULL. */
int64_t gpt2_tensor(const GPT2Config *config, int index, const char **name, int64_t shape[3]);
enum { GPT2_DECAYED = 1 | 1 << 1 | 1 << 4 | 1 << 6 | 1 << 10 | 1 << 12 };     /* bit i: tensor i decays */
int64_t gpt2_parameters(const GPT2Config *config);                 /* without padding */
double gpt2_flops_per_token(const GPT2Config *config, int T);      /* of a training step: 6 P + 6 L T C */
int gpt2_config_check(const GPT2Config *config);                   /* can a model have this shape? */
int gpt2_descriptor(const char *text, GPT2Config *out);            /* "d12": V 50257, max_T 1024 */

int gpt2_init(GPT2 *model, uint64_t seed);       /* as GPT-2: N(0, 0.02), residual projections / sqrt(2 L) */
GPT2 *gpt2_load(const char *path);               /* model file, version 3 (fp32) or 5 (bf16) */
int gpt2_save(GPT2 *model, const char *path, int version);

/* Batches of B rows of T tokens and their successors, from the shards that a glob matches, in the names'
   order. A row never crosses shards; what a shard has after its last whole batch is skipped. With shuffle
   every epoch takes the shards in another order, and of each the rows in another order from another offset.
   */
typedef struct GPT2Loader GPT2Loader;
GPT2Loader *gpt2_loader_open(const char *pattern, int B, int T, int V, int shuffle, uint64_t seed);
void gpt2_loader_close(GPT2Loader *loader);
int gpt2_loader_next(GPT2Loader *loader, int32_t *x, int32_t *y);     /* (B,T) each; never ends */
void gpt2_loader_reset(GPT2Loader *loader);      /* to the first batch */
/* Of all shards: their number, their tokens, the batches in an unshuffled epoch; each may be NULL. */
void gpt2_loader_size(const GPT2Loader *loader, int64_t *shards, int64_t *tokens, int64_t *batches);

/* Mean loss of the loader's first `batches` batches, or of an epoch's if that has fewer. */
int gpt2_evaluate(GPT2 *model, GPT2Loader *loader, int64_t batches, float *loss);

/* Learning rate of a step of 0…steps-1: warm-up from lr/warmup, then "cosine", "linear", "constant", or "wsd"
   (constant, decay with the square root in the last fifth), down to final_frac · lr. -1 on failure. */
float gpt2_lr(const char *schedule, int64_t step, int64_t steps, int64_t warmup, float lr, float final_frac);

/* The token after `tokens`, of which the last max_T count. temperature 0 takes the likeliest, top_k 0 allows
   all. *rng is the sampler's state. -1 on failure. */
int gpt2_next(GPT2 *model, const int32_t *tokens, int64_t n, float temperature, int top_k, uint64_t *rng);

/* Decode table: token i is bytes[at[i] + 1 …], bytes[at[i]] of them; `end` ends a text, -1 if none does. */
typedef struct {
    int32_t V, end;
    int64_t *at;
    unsigned char *bytes;
} GPT2Tokenizer;
GPT2Tokenizer *gpt2_tokenizer_load(const char *path);
void gpt2_tokenizer_free(GPT2Tokenizer *tokenizer);

/* What a run remembers beyond model and loader; zeroed for a fresh one. */
enum { GPT2_WINDOW = 128 };
typedef struct {
    int64_t step;                         /* training steps done */
    uint64_t rng;                         /* the sampler's */
    int64_t seen[2];                      /* values put into each window so far */
    double window[2][GPT2_WINDOW];        /* 0: losses, 1: gradient norms */
} GPT2Progress;

/* z-score of a value against a full window (NaN before it is full), then its place in the window. */
double gpt2_zscore(GPT2Progress *progress, int window, double value);

/* model_%08d.bin, state_%08d_00000.bin and, when they are whole, DONE_%08d. Then the checkpoint that is keep
   · every steps older goes, unless keep is 0 or its step a multiple of major (0: none). loader may be NULL.
   */
int gpt2_checkpoint(const char *dir, GPT2 *model, const GPT2Loader *loader, const GPT2Progress *progress,
                    int64_t every, int64_t keep, int64_t major);
int64_t gpt2_newest(const char *dir);            /* step of the newest whole checkpoint, -1: none */
/* Moments, loader position and progress of a checkpoint, for the model that gpt2_load got from it. */
int gpt2_restore(const char *dir, int64_t step, GPT2 *model, GPT2Loader *loader, GPT2Progress *progress);

/* Holds logits, loss and the 16 gradients against a saved reference; a row is ok if its relative error is
   within the tolerance. Returns how many rows are not. */
enum { GPT2_DIFFS = GPT2_TENSORS + 2 };
typedef struct {
    char name[16];
    double max_abs, relative;             /* max |ours - theirs|; L2 norm of the difference / of theirs */
    int32_t ok, padding;
} GPT2Diff;
int gpt2_check(GPT2 *model, const char *reference, double tolerance, GPT2Diff rows[GPT2_DIFFS]);
#pragma GCC visibility pop
int gpt2_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));     /* returns -1 */
#ifdef __cplusplus
}
#endif

#ifndef GPT2_API_ONLY
#include <dirent.h>
#include <errno.h>
#include <glob.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

typedef long long wide;                   /* what %lld prints */
static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

#ifndef GPT2_NO_MODEL
/* === 2. The model ======================================================================================= */

/* --- Vectors -----------------------------------------------------------------------------------------------
   One source for every processor: GCC's and Clang's vector extension with the width of the target's
   registers. Loads and stores go through memcpy, which compiles to one unaligned move and takes part of a
   vector at an edge. */
#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4                           /* SSE2, NEON; elsewhere the compiler splits it as it must */
#endif
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float v4 __attribute__((vector_size(16)));
#define SPLAT(x) ((x) - (vf){0})

/* The first min(n, LANES) floats at p, the other lanes `fill`. */
static inline vf vload_fill(const float *p, size_t n, float fill) {
    vf v = SPLAT(fill);
    n >= LANES ? memcpy(&v, p, sizeof v) : memcpy(&v, p, n * sizeof *p);
    return v;
}

static inline vf vload(const float *p, size_t n) { return vload_fill(p, n, 0); }

static inline void vstore(float *p, vf v, size_t n) {
    n >= LANES ? memcpy(p, &v, sizeof v) : memcpy(p, &v, n * sizeof *p);
}

static inline vf vselect(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
static inline vf vmax(vf a, vf b) { return vselect(a > b, a, b); }

/* Sum of the lanes, always in the same order, and the largest. */
static inline float vsum(vf v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

static inline float vtop(vf v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

/* e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor series of e^r, whose ninth term is
   below half an ulp, times 2^n put together from its bits. Adding 1.5·2^23 rounds to an integer and leaves it
   in the low bits. ln 2 is taken off in two parts, the first with so few bits that n times it is exact (Cody
   & Waite 1980). Below -88 the result is 0, above 88 it stays at e^88; NaN stays NaN. */
static inline vf vexp(vf x) {
    const float magic = 12582912.0f;
    x = vselect(x < -88.0f, SPLAT(-88.0f), x);
    x = vselect(x > 88.0f, SPLAT(88.0f), x);
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    static const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    vf series = SPLAT(1.0f / 5040);
#pragma GCC unroll 8
    for (int i = 0; i < 7; i++) series = series * r + factors[i];
    vu power = ((vu)shifted + 127) << 23;
    return series * (vf)power;
}

/* --- Matrix product ----------------------------------------------------------------------------------------
   C = A·B after Goto & van de Geijn (2008, "Anatomy of High-Performance Matrix Multiplication"). A tile of MR
   × NR results stays in registers while k runs; a step of k takes MR values of A and NR of B, so both are
   first packed into panels in which these lie side by side: A in panels of MR rows, B in panels of NR columns.

     registers   MR × NV sums, NV vectors of B, a broadcast of A: 6 × 2 fill 16 registers, 12 × 2 fill 32
     L1          a panel of B: KC × NR floats are three quarters of 32 KiB, packed by the thread that uses it
     L2 and L3   a block of A: MC × KB floats at most, packed by all threads, and read once for every panel

   Rows and columns have strides, so that one function serves the three products of a linear layer. NR columns
   of C are a thread's unit of work; a sum over k runs in the same order whoever takes it, so that the bits do
   not depend on the threads. A tile at an edge is computed whole, in a buffer. dev/doc/gemm.md has figures. */
enum {
    NV = 2,
    NR = NV * LANES,
#if defined(__aarch64__) || LANES == 16
    MR = 12,
#else
    MR = 6,
#endif
    KC = 6144 / NR,
    KB = 4 * KC,
    MC = 1056,
    GROUP = 48,                           /* rows of A that a thread packs at a time: whole cache lines */
};

typedef struct {
    const float *p;
    size_t row, col;                      /* element (i, j) is p[i * row + j * col]; row or col is 1 */
} Matrix;

static Matrix from(Matrix m, size_t row, size_t col) {
    return (Matrix){m.p + row * m.row + col * m.col, m.row, m.col};
}

typedef struct {
    int threads;
    float *pack_a;                        /* (MC, KB) */
    float *pack_b;                        /* (threads, KC, NR) */
    float *own;                           /* (threads, own_floats) for attention */
    size_t own_floats;
} Workspace;

/* Four lines of four floats, transposed: dst[k * step + line] = src[line * stride + k]. */
#ifdef __clang__
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t v4i __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif
static inline void transpose4(float *dst, size_t step, const float *src, size_t stride) {
    v4 a, b, c, d;
    memcpy(&a, src, sizeof a);
    memcpy(&b, src + stride, sizeof b);
    memcpy(&c, src + 2 * stride, sizeof c);
    memcpy(&d, src + 3 * stride, sizeof d);
    v4 ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
    v4 cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
    a = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5), b = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    c = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5), d = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
    memcpy(dst, &a, sizeof a);
    memcpy(dst + step, &b, sizeof b);
    memcpy(dst + 2 * step, &c, sizeof c);
    memcpy(dst + 3 * step, &d, sizeof d);
}

/* Packs `lines` lines of kc floats into panels of R: dst[panel][k][r] = src[(panel * R + r) * line + k *
   step], 0 where there is no line. Inlined, so that R is a constant. */
static inline __attribute__((always_inline))
void pack(float *dst, const float *src, size_t line, size_t step, size_t lines, size_t kc, size_t R) {
    size_t first = 0;
    if (line == 1)
        for (size_t group; first + R <= lines; first += group) {
            group = first + GROUP <= lines ? GROUP : R;
            for (size_t k = 0; k < kc; k++)
                for (size_t r = 0; r < group; r += R)
                    memcpy(dst + (first + r) * kc + k * R, src + k * step + first + r, R * sizeof *dst);
        }
    for (; first < lines; first += R) {
        const float *s = src + first * line;
        float *d = dst + first * kc;
        const size_t n = min(R, lines - first), fours = step == 1 && n >= 4 ? n : 0;
        if (n < R) memset(d, 0, R * kc * sizeof *d);
        for (size_t at = 0; at < fours; at += 4) {
            size_t r = min(at, n - 4), k = 0;     /* the last four lines may be in two fours */
            for (; k + 4 <= kc; k += 4) transpose4(d + k * R + r, R, s + r * line + k, line);
            for (; k < kc; k++)
                for (size_t i = r; i < r + 4; i++) d[k * R + i] = s[i * line + k];
        }
        for (size_t r = fours; r < n; r++)
            for (size_t k = 0; k < kc; k++) d[k * R + r] = s[r * line + k * step];
    }
}

/* The hot loop: c (MR,NR) = a (kc,MR)ᵀ · b (kc,NR), plus c itself if add, plus a row of bias if not NULL. The
   loops over constants are unrolled, so that the sums stay in registers; c is fetched while they run. */
static inline void kernel(float *c, size_t ldc, const float *a, const float *b, size_t kc, const float *bias,
                          int add) {
    vf sum[MR][NV] = {{{0}}};
    for (size_t i = 0; i < MR; i++) __builtin_prefetch(c + i * ldc, 1);
    for (size_t k = 0; k < kc; k++, a += MR, b += NR) {
        vf row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) row[j] = vload(b + j * LANES, LANES);
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) sum[i][j] += a[i] * row[j];
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            float *to = c + (size_t)i * ldc + j * LANES;
            if (add) sum[i][j] += vload(to, LANES);
            if (bias) sum[i][j] += vload(bias + j * LANES, LANES);
            vstore(to, sum[i][j], LANES);
        }
}

/* The same for a tile of which C has only M rows and N columns. */
static void kernel_at_edge(float *c, size_t ldc, const float *a, const float *b, size_t kc, const float *bias,
                           int add, size_t M, size_t N) {
    float tile[MR * NR];
    kernel(tile, NR, a, b, kc, NULL, 0);
    for (size_t i = 0; i < min(MR, M); i++)
        for (size_t j = 0; j < min(NR, N); j++) {
            const float before = (add ? c[i * ldc + j] : 0) + (bias ? bias[j] : 0);
            c[i * ldc + j] = before + tile[i * NR + j];
        }
}

/* Asks for a part of the cache lines of a panel of B. With few rows the use of a panel is so short that
   waiting for the next one took 5 to 9 % of the time (256 rows, 768 channels). */
static inline void prefetch(Matrix b, size_t kc, size_t part, size_t parts) {
    const size_t lines = kc * NR / 16;
    for (size_t i = lines * part / parts; i < lines * (part + 1) / parts; i++) {
        const size_t k = b.col == 1 ? i / (NR / 16) : i / NR * 16, j = b.col == 1 ? i % (NR / 16) * 16 : i % NR;
        __builtin_prefetch(from(b, k, j).p);
    }
}

/* The size of pieces of n, multiples of unit and about `most` at most, as even as can be. */
static size_t even_pieces(size_t n, size_t most, size_t unit) {
    const size_t pieces = (n + most - 1) / most;
    return round_up((n + pieces - 1) / pieces, unit);
}

/* A thread's share of gemm. *taken counts the units that threads took, of all blocks: a thread takes the next
   one before it starts on one, and so one more than it does. */
static void gemm_share(const Workspace *ws, size_t thread, size_t *taken, float *c, size_t ldc, Matrix a,
                       Matrix b, size_t M, size_t N, size_t K, const float *bias, int add) {
    const size_t threads = (size_t)ws->threads, units = (N + NR - 1) / NR;
    const size_t mc = even_pieces(M, MC, MR), kc = even_pieces(K, KC, 1), kb = KB / KC * kc;
    float *panel = ws->pack_b + thread * KC * NR;
    size_t before = 0;                    /* units taken in earlier blocks */
    for (size_t m = 0; m < M; m += mc)
        for (size_t k = 0; k < K; k += kb, before += units + threads) {
            const size_t rows = min(mc, M - m), depth = min(kb, K - k), high = round_up(rows, MR);
            for (size_t i = thread * GROUP; i < rows; i += threads * GROUP)
                for (size_t l = 0; l < depth; l += kc) {
                    const size_t terms = min(kc, depth - l);
                    pack(ws->pack_a + l * high + i * terms, from(a, m + i, k + l).p, a.row, a.col,
                         min(GROUP, rows - i), terms, MR);
                }
            if (threads > 1) {
#pragma omp barrier
            }
            size_t next, unit = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED) - before;
            for (; unit < units; unit = next) {
                next = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED) - before;
                const size_t j = unit * NR, columns = min(NR, N - j);
                for (size_t l = 0; l < depth; l += kc) {
                    const size_t terms = min(kc, depth - l);
                    const int adds = add || k + l > 0, more = l + kc < depth;
                    const float *pack_a = ws->pack_a + l * high, *row = bias && k + l == 0 ? bias + j : NULL;
                    const Matrix coming = more ? from(b, k + l + kc, j) : from(b, k, min(next, units - 1) * NR);
                    pack(panel, from(b, k + l, j).p, b.col, b.row, columns, terms, NR);
                    for (size_t i = 0; i < rows; i += MR, pack_a += MR * terms) {
                        float *to = c + (m + i) * ldc + j;
                        prefetch(coming, terms, i / MR, high / MR);
                        if (i + MR <= rows && columns == NR)
                            kernel(to, ldc, pack_a, panel, terms, row, adds);
                        else
                            kernel_at_edge(to, ldc, pack_a, panel, terms, row, adds, rows - i, columns);
                    }
                }
            }
            if (threads > 1) {
#pragma omp barrier
            }
        }
}

/* c (M,N), rows ldc apart, = a (M,K) · b (K,N), plus c itself if add, plus a row of bias (N) if not NULL. */
static void gemm(const Workspace *ws, float *c, size_t ldc, Matrix a, Matrix b, size_t M, size_t N, size_t K,
                 const float *bias, int add) {
    size_t taken = 0;
    if (ws->threads == 1)                 /* attention: a parallel region of one would cost 1 µs */
        gemm_share(ws, 0, &taken, c, ldc, a, b, M, N, K, bias, add);
    else
#pragma omp parallel num_threads(ws->threads)
        gemm_share(ws, (size_t)omp_get_thread_num(), &taken, c, ldc, a, b, M, N, K, bias, add);
}

/* --- Layers ------------------------------------------------------------------------------------------------
   Pure functions over plain arrays: outputs first, dimensions last, N = B·T rows. A backward function adds to
   the gradients of parameters if `add`, and overwrites them if not. */

/* out (B,T,C) = wte[x] + wpe[t] */
static void encoder_forward(float *out, const int32_t *x, const float *wte, const float *wpe, size_t B,
                            size_t T, size_t C) {
#pragma omp parallel for
    for (size_t n = 0; n < B * T; n++)
        for (size_t c = 0; c < C; c++)
            out[n * C + c] = wte[(size_t)x[n] * C + c] + wpe[n % T * C + c];
}

/* Always adds: to dwte (Vp,C), where the classifier was first, and to T rows of dwpe (max_T,C). Rows of the
   same token meet, so threads share out the columns. */
static void encoder_backward(float *dwte, float *dwpe, const float *dout, const int32_t *x, size_t B,
                             size_t T, size_t C) {
    enum { COLUMNS = 64 };
#pragma omp parallel for
    for (size_t first = 0; first < C; first += COLUMNS)
        for (size_t n = 0; n < B * T; n++)
            for (size_t c = first; c < min(first + COLUMNS, C); c++) {
                dwte[(size_t)x[n] * C + c] += dout[n * C + c];
                dwpe[n % T * C + c] += dout[n * C + c];
            }
}

/* db (C) = Σ dout over rows and, unless inp is NULL, dw (C) = Σ dout · (inp - mean) · rstd. Partial sums of
   ROWS rows: the error of a sum in order grows with its length. */
static void column_sums(float *db, float *dw, const float *dout, const float *inp, const float *mean,
                        const float *rstd, size_t N, size_t C, int add) {
    enum { ROWS = 64 };
#pragma omp parallel for
    for (size_t c = 0; c < C; c += LANES) {
        vf sum_b = add ? vload(db + c, C - c) : SPLAT(0),
           sum_w = add && inp ? vload(dw + c, C - c) : SPLAT(0);
        for (size_t first = 0; first < N; first += ROWS) {
            vf part_b = {0}, part_w = {0};
            for (size_t n = first; n < min(first + ROWS, N); n++) {
                vf d = vload(dout + n * C + c, C - c);
                part_b += d;
                if (inp) part_w += d * ((vload(inp + n * C + c, C - c) - mean[n]) * rstd[n]);
            }
            sum_b += part_b;
            sum_w += part_w;
        }
        vstore(db + c, sum_b, C - c);
        if (inp) vstore(dw + c, sum_w, C - c);
    }
}

/* out (N,C) = (inp - mean) · rstd · w + b, over the C channels of a row (Ba, Kiros & Hinton 2016); mean and
   rstd
   = 1 / √(variance + ε), (N) each, are kept for the backward pass */
static void layernorm_forward(float *out, float *mean, float *rstd, const float *inp, const float *w,
                              const float *b, size_t N, size_t C) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *x = inp + n * C;
        vf sum = {0}, squares = {0};
        for (size_t c = 0; c < C; c += LANES) sum += vload(x + c, C - c);
        mean[n] = vsum(sum) / (float)C;
        for (size_t c = 0; c < C; c += LANES) {
            vf centred = vload_fill(x + c, C - c, mean[n]) - mean[n];
            squares += centred * centred;
        }
        rstd[n] = 1.0f / sqrtf(vsum(squares) / (float)C + 1e-5f);
        for (size_t c = 0; c < C; c += LANES) {
            vf norm = (vload(x + c, C - c) - mean[n]) * rstd[n];
            vstore(out + n * C + c, norm * vload(w + c, C - c) + vload(b + c, C - c), C - c);
        }
    }
}

/* With norm = (inp - mean) · rstd and g = w · dout: dinp += rstd · (g - mean(g) - norm · mean(g · norm)) */
static void layernorm_backward(float *dinp, float *dw, float *db, const float *dout, const float *inp,
                               const float *w, const float *mean, const float *rstd, size_t N, size_t C,
                               int add) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *x = inp + n * C, *d = dout + n * C;
        vf sum_g = {0}, sum_g_norm = {0};
        for (size_t c = 0; c < C; c += LANES) {
            vf g = vload(w + c, C - c) * vload(d + c, C - c);
            sum_g += g;
            sum_g_norm += g * ((vload(x + c, C - c) - mean[n]) * rstd[n]);
        }
        float mean_g = vsum(sum_g) / (float)C, mean_g_norm = vsum(sum_g_norm) / (float)C;
        for (size_t c = 0; c < C; c += LANES) {
            vf g = vload(w + c, C - c) * vload(d + c, C - c),
               norm = (vload(x + c, C - c) - mean[n]) * rstd[n];
            vf old = vload(dinp + n * C + c, C - c);
            vstore(dinp + n * C + c, old + (g - mean_g - norm * mean_g_norm) * rstd[n], C - c);
        }
    }
    column_sums(db, dw, dout, inp, mean, rstd, N, C, add);
}

/* out (N,OC) = inp (N,C) · wᵀ + b, with w (OC,C); plus what out holds (the residual stream) if add */
static void linear_forward(const Workspace *ws, float *out, const float *inp, const float *w, const float *b,
                           size_t N, size_t C, size_t OC, int add) {
    gemm(ws, out, OC, (Matrix){inp, C, 1}, (Matrix){w, 1, C}, N, OC, C, b, add);
}

/* dinp (N,C) = dout (N,OC) · w */
static void linear_backward_input(const Workspace *ws, float *dinp, const float *dout, const float *w,
                                  size_t N, size_t C, size_t OC) {
    gemm(ws, dinp, C, (Matrix){dout, OC, 1}, (Matrix){w, C, 1}, N, C, OC, NULL, 0);
}

/* dw (OC,C) = doutᵀ · inp, db (OC) = Σ dout over rows */
static void linear_backward_weight(const Workspace *ws, float *dw, float *db, const float *dout,
                                   const float *inp, size_t N, size_t C, size_t OC, int add) {
    gemm(ws, dw, C, (Matrix){dout, 1, OC}, (Matrix){inp, C, 1}, OC, C, N, NULL, add);
    column_sums(db, NULL, dout, NULL, NULL, NULL, N, OC, add);
}

/* GELU (Hendrycks & Gimpel 2016) in the tanh form, x/2 · (1 + tanh u) with u = √(2/π) (x + 0.044715 x³). As 1
   + tanh u = 2 σ(2u), σ the logistic function, it is x σ(2u), and its derivative σ + x σ (1 - σ) 2u': no
   tanh, and no cosh that overflows. */
static inline vf gelu_sigma(vf x) {
    vf twice_u = x * (1.59576912f + 0.0713548163f * x * x);
    return 1.0f / (1.0f + vexp(-twice_u));
}

static void gelu_forward(float *out, const float *inp, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i += LANES) {
        vf x = vload(inp + i, n - i);
        vstore(out + i, x * gelu_sigma(x), n - i);
    }
}

/* dx (n) *= the derivative at inp; out (n) = GELU of inp once more, which the weight gradient needs now */
static void gelu_backward(float *dx, float *out, const float *inp, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i += LANES) {
        vf x = vload(inp + i, n - i), sigma = gelu_sigma(x);
        vf slope = 1.59576912f + 3 * 0.0713548163f * x * x;
        vstore(out + i, x * sigma, n - i);
        vstore(dx + i, vload(dx + i, n - i) * (sigma + x * sigma * (1.0f - sigma) * slope), n - i);
    }
}

/* Makes a row of n logits share · softmax(factor · row), and returns log Σ exp(factor · row). */
static float softmax(float *row, size_t n, float factor, float share) {
    vf tops = SPLAT(-INFINITY), sums = {0};
    for (size_t i = 0; i < n; i += LANES) tops = vmax(vload_fill(row + i, n - i, -INFINITY), tops);
    const float top = vtop(tops) * factor;
    for (size_t i = 0; i < n; i += LANES) {
        const vf e = vexp(vload_fill(row + i, n - i, -INFINITY) * factor - top);
        vstore(row + i, e, n - i);
        sums += e;
    }
    const float sum = vsum(sums);
    for (size_t i = 0; i < n; i += LANES) vstore(row + i, vload(row + i, n - i) * (share / sum), n - i);
    return top + logf(sum);
}

/* losses (N) = -log softmax(logits)[target], for rows of V logits, Vp apart, which become scale times their
   gradient, softmax - one-hot. */
static void crossentropy(float *losses, float *logits, const int32_t *targets, size_t N, size_t V, size_t Vp,
                         float scale) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        float *row = logits + n * Vp, target = row[targets[n]];
        losses[n] = softmax(row, V, 1, scale) - target;
        row[targets[n]] -= scale;
    }
}

/* --- Attention ---------------------------------------------------------------------------------------------
   out = softmax(q·kᵀ / √hs)·v for each head, of hs = C / NH channels, where a query sees the keys up to its
   own. A head is one thread's, and goes through QUERIES rows of the scores at a time, so that there is no T ×
   T matrix; backward makes them again. A strip stays in L2, and needs no online softmax as it has all keys of
   its queries. */
enum { QUERIES = 96 };

/* What a thread has for itself: two strips of scores, and room to pack another or its queries. */
static size_t attention_floats(size_t T, size_t hs) { return QUERIES * (2 * T + round_up(T + hs, MR)); }

static Workspace attention_workspace(const Workspace *ws, size_t T) {
    const size_t thread = (size_t)omp_get_thread_num();
    float *own = ws->own + thread * ws->own_floats;
    return (Workspace){1, own + 2 * QUERIES * T, ws->pack_b + thread * KC * NR, own, 0};
}

/* p (rows,T): the softmax of the scores of queries q … q + rows of one head, qkv (T,3C) */
static void attention_scores(const Workspace *ws, float *p, const float *qkv, size_t q, size_t rows, size_t T,
                             size_t C, size_t hs) {
    const Matrix queries = {qkv + q * 3 * C, 3 * C, 1}, keys_t = {qkv + C, 1, 3 * C};
    gemm(ws, p, T, queries, keys_t, rows, q + rows, hs, NULL, 0);
    for (size_t i = 0; i < rows; i++) {
        softmax(p + i * T, q + i + 1, 1 / sqrtf((float)hs), 1);
        memset(p + i * T + q + i + 1, 0, (rows - i - 1) * sizeof *p);
    }
}

/* out (B,T,C) from qkv (B,T,3C) */
static void attention_forward(const Workspace *ws, float *out, const float *qkv, size_t B, size_t T, size_t C,
                              size_t NH) {
    const size_t hs = C / NH;
#pragma omp parallel for schedule(dynamic) num_threads(ws->threads)
    for (size_t head = 0; head < B * NH; head++) {
        const float *mine = qkv + head / NH * T * 3 * C + head % NH * hs;
        const Workspace own = attention_workspace(ws, T);
        float *p = own.own;
        for (size_t q = 0; q < T; q += QUERIES) {
            const size_t rows = min(QUERIES, T - q);
            attention_scores(&own, p, mine, q, rows, T, C, hs);
            gemm(&own, out + (head / NH * T + q) * C + head % NH * hs, C, (Matrix){p, T, 1},
                 (Matrix){mine + 2 * C, 3 * C, 1}, rows, hs, q + rows, NULL, 0);
        }
    }
}

/* dqkv (B,T,3C) from dout (B,T,C) and qkv. With P the softmax of the scores S, dP = dout·vᵀ and, for each
   row, dS = P · (dP - Σ P dP) / √hs: dv = Pᵀ·dout, dq = dS·k, dk = dSᵀ·q. */
static void attention_backward(const Workspace *ws, float *dqkv, const float *dout, const float *qkv,
                               size_t B, size_t T, size_t C, size_t NH) {
    const size_t hs = C / NH;
#pragma omp parallel for schedule(dynamic) num_threads(ws->threads)
    for (size_t head = 0; head < B * NH; head++) {
        const size_t at = head / NH * T * C + head % NH * hs, at3 = head / NH * T * 3 * C + head % NH * hs;
        const Workspace own = attention_workspace(ws, T);
        float *p = own.own, *ds = p + QUERIES * T;
        float *dq = dqkv + at3, *dk = dq + C, *dv = dk + C;
        for (size_t q = 0; q < T; q += QUERIES) {
            const size_t rows = min(QUERIES, T - q), keys = q + rows;
            const Matrix douts = {dout + at + q * C, C, 1};
            attention_scores(&own, p, qkv + at3, q, rows, T, C, hs);
            gemm(&own, ds, T, douts, (Matrix){qkv + at3 + 2 * C, 1, 3 * C}, rows, keys, hs, NULL, 0);
            for (size_t i = 0; i < rows; i++) {
                const float *P = p + i * T;
                float *S = ds + i * T;
                vf sums = {0};
                for (size_t j = 0; j < keys; j += LANES)
                    sums += vload(P + j, keys - j) * vload(S + j, keys - j);
                const float sum = vsum(sums), factor = 1 / sqrtf((float)hs);
                for (size_t j = 0; j < keys; j += LANES)
                    vstore(S + j, vload(P + j, keys - j) * (vload(S + j, keys - j) - sum) * factor, keys - j);
            }
            for (size_t t = q; t < keys; t++) {     /* the keys that these queries are the first to see */
                memset(dk + t * 3 * C, 0, hs * sizeof *dk);
                memset(dv + t * 3 * C, 0, hs * sizeof *dv);
            }
            gemm(&own, dq + q * 3 * C, 3 * C, (Matrix){ds, T, 1}, (Matrix){qkv + at3 + C, 3 * C, 1}, rows, hs,
                 keys, NULL, 0);
            gemm(&own, dk, 3 * C, (Matrix){ds, 1, T}, (Matrix){qkv + at3 + q * 3 * C, 3 * C, 1}, keys, hs,
                 rows, NULL, 1);
            gemm(&own, dv, 3 * C, (Matrix){p, 1, T}, douts, keys, hs, rows, NULL, 1);
        }
    }
}

/* --- GPT-2 ---------------------------------------------------------------------------------------------- */
typedef union {
    struct {
        float *wte;                       /* (Vp, C), also the classifier's weights */
        float *wpe;                       /* (max_T, C) */
        float *ln1w, *ln1b;               /* (L, C) from here to fcprojb: a layer after another */
        float *qkvw, *qkvb;               /* (L, 3C, C), (L, 3C) */
        float *attprojw, *attprojb;       /* (L, C, C), (L, C) */
        float *ln2w, *ln2b;               /* (L, C) */
        float *fcw, *fcb;                 /* (L, 4C, C), (L, 4C) */
        float *fcprojw, *fcprojb;         /* (L, C, 4C), (L, C) */
        float *lnfw, *lnfb;               /* (C) */
    };
    float *all[GPT2_TENSORS];
} Tensors;

/* The first LAYERED are kept for the backward pass, a layer after another. Outputs of layer norm and GELU are
   cheap to make again and not kept. */
enum { LAYERED = 9, ACTIVATIONS = 23 };
typedef union {
    struct {
        float *ln1_mean, *ln1_rstd;       /* (L, B, T) */
        float *qkv;                       /* (L, B, T, 3C) */
        float *att;                       /* (L, B, T, C) */
        float *residual2;                 /* (L, B, T, C) the residual stream between attention and MLP */
        float *ln2_mean, *ln2_rstd;       /* (L, B, T) */
        float *fc;                        /* (L, B, T, 4C) before GELU */
        float *residual1;                 /* (L, B, T, C) the residual stream before a block … */
        float *residual_last;             /* (B, T, C) … and after the last; has to come next */
        float *lnf_mean, *lnf_rstd;       /* (B, T) */
        float *losses, *x;                /* (B, T); x are the inputs, as int32 */
        float *ln, *gelu;                 /* (B, T, C), (B, T, 4C) output of a layer norm, of GELU */
        float *logits;                    /* (chunk, Vp) */
        float *dresidual, *dln;           /* (B, T, C) gradients of residual stream, of ln */
        float *dwide;                     /* (B, T, 4C) gradient of fc, or of qkv */
        float *pack_a, *pack_b, *own;     /* see Workspace */
    };
    float *all[ACTIVATIONS];
} Activations;

struct GPT2 {
    GPT2Config config;
    size_t C, NH, L, V, Vp;
    float *memory[4];                     /* of each kind; NULL until needed */
    size_t count;                         /* floats in each */
    int64_t updates;
    int grads_empty;                      /* gradients count as 0: the next backward pass overwrites them */
    int backward_due;                     /* gpt2_forward has added the classifier's part of a gradient */
    float norm;                           /* of the gradients, NaN if not known */
    size_t B, T, chunk, layers;           /* of the activations; chunk rows at a time are classified */
    size_t act_size[ACTIVATIONS];         /* floats of each activation, in a layer */
    float *act_memory;
    size_t act_count;                     /* floats there */
    Workspace ws;
};

/* n floats, 0, beginning with a cache line. */
static float *floats(size_t n) {
    float *p = n < SIZE_MAX / 8 ? aligned_alloc(64, round_up(n * sizeof *p, 64)) : NULL;
    if (p)
        memset(p, 0, n * sizeof *p);
    else
        gpt2_fail("no memory for %.0f MB; use a smaller model, batch or sequence", (double)n * 4e-6);
    return p;
}

/* The memory of a kind, made when it is first asked for. */
static float *memory_of(GPT2 *m, int kind) {
    if (!m->memory[kind]) m->memory[kind] = floats(m->count);
    return m->memory[kind];
}

/* The tensors of a kind, and the activations, those of the blocks from layer l on. */
static Tensors tensors_at(const GPT2 *m, int kind, size_t l) {
    Tensors t;
    float *next = m->memory[kind];
    for (int i = 0; i < GPT2_TENSORS; i++) {
        const size_t n = (size_t)gpt2_tensor(&m->config, i, NULL, NULL);
        t.all[i] = next + (i >= 2 && i < 14 ? l * (n / m->L) : 0);
        next += n;
    }
    return t;
}

static Activations acts_at(const GPT2 *m, size_t l) {
    Activations a;
    float *next = m->act_memory;
    for (int i = 0; i < ACTIVATIONS; i++) {
        a.all[i] = next + (i < LAYERED ? l * m->act_size[i] : 0);
        next += (i < LAYERED ? m->layers : 1) * m->act_size[i];
    }
    return a;
}

/* Lays out the activations for B × T tokens: to train, or to evaluate with one layer's place for all. */
static int acts_layout(GPT2 *m, size_t B, size_t T, int train) {
    const size_t N = B * T, BTC = N * m->C, G = train ? BTC : 0, threads = (size_t)m->ws.threads;
    size_t total = 0;
    if ((double)N * (double)m->C * (double)m->L > 1e15)
        return gpt2_fail("a batch of %zu x %zu tokens fits no memory; use a smaller one", B, T);
    m->B = B;
    m->T = T;
    m->layers = train ? m->L : 1;
    m->chunk = even_pieces(N, ((size_t)1 << 24) / m->Vp + 1, MR);     /* logits: about 64 MB at most */
    m->ws.own_floats = round_up(attention_floats(T, m->C / m->NH), 16);
    const size_t sizes[] = {
        N, N, 3 * BTC, BTC, BTC, N, N, 4 * BTC, BTC,         /* ln1_mean … residual1 */
        BTC, N, N, N, N, BTC, 4 * BTC, m->chunk * m->Vp,     /* residual_last … logits */
        G, G, 4 * G, (size_t)MC * KB, threads * KC * NR, threads * m->ws.own_floats,
    };
    _Static_assert(sizeof sizes == ACTIVATIONS * sizeof *sizes &&
                       sizeof(Activations) == ACTIVATIONS * sizeof(float *),
                   "one size for each activation");
    for (int i = 0; i < ACTIVATIONS; i++) {
        m->act_size[i] = round_up(sizes[i], 16);
        total += (i < LAYERED ? m->layers : 1) * m->act_size[i];
    }
    if (total > m->act_count) {
        free(m->act_memory);
        m->act_memory = floats(total);
        m->act_count = m->act_memory ? total : 0;
    }
    if (!m->act_memory) return -1;
    const Activations a = acts_at(m, 0);
    m->ws.pack_a = a.pack_a;
    m->ws.pack_b = a.pack_b;
    m->ws.own = a.own;
    return 0;
}

GPT2 *gpt2_create(const GPT2Config *config) {
    GPT2 *m = gpt2_config_check(config) ? NULL : calloc(1, sizeof *m);
    if (!m) return NULL;
    m->config = *config;
    m->C = (size_t)config->C;
    m->NH = (size_t)config->NH;
    m->L = (size_t)config->L;
    m->V = (size_t)config->V;
    m->Vp = round_up(m->V, 128);
    for (int i = 0; i < GPT2_TENSORS; i++) m->count += (size_t)gpt2_tensor(config, i, NULL, NULL);
    m->ws.threads = omp_get_max_threads();
    gpt2_zero_grad(m);
    if (memory_of(m, GPT2_PARAM)) return m;
    gpt2_free(m);
    return NULL;
}

void gpt2_free(GPT2 *m) {
    for (int kind = 0; m && kind < 4; kind++) free(m->memory[kind]);
    if (m) free(m->act_memory);
    free(m);
}

void gpt2_config(const GPT2 *m, GPT2Config *out) { *out = m->config; }

/* Gradients that count as 0 become 0. */
static void grads_fill(GPT2 *m) {
    if (m->grads_empty && !m->backward_due)
        memset(m->memory[GPT2_GRAD], 0, m->count * sizeof(float));
}

/* Elements first … first + count of a tensor, or NULL. */
static float *tensor_part(GPT2 *m, int tensor, int kind, int64_t first, int64_t count) {
    const int64_t size = gpt2_tensor(&m->config, tensor, NULL, NULL);
    if (size < 0) return NULL;
    if (kind < GPT2_PARAM || kind > GPT2_MOMENT2 || first < 0 || count < 0 || first > size - count) {
        gpt2_fail("elements %lld + %lld of tensor %d, kind %d, were asked for; it has %lld, in kinds 0 to 3",
                  (wide)first, (wide)count, tensor, kind, (wide)size);
        return NULL;
    }
    if (!memory_of(m, kind)) return NULL;
    if (kind == GPT2_GRAD) grads_fill(m);
    return tensors_at(m, kind, 0).all[tensor] + first;
}

int gpt2_get(GPT2 *m, int tensor, int kind, int64_t first, int64_t count, float *out) {
    const float *part = tensor_part(m, tensor, kind, first, count);
    if (part) memcpy(out, part, (size_t)count * sizeof *out);
    return part ? 0 : -1;
}

int gpt2_set(GPT2 *m, int tensor, int kind, int64_t first, int64_t count, const float *in) {
    float *part = tensor_part(m, tensor, kind, first, count);
    if (part) memcpy(part, in, (size_t)count * sizeof *in);
    if (part && kind == GPT2_GRAD) {
        m->grads_empty = 0;
        m->norm = NAN;
    }
    return part ? 0 : -1;
}

static int tokens_check(const GPT2 *m, const char *what, const int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.V)
            return gpt2_fail("token %zu of %s is %d, expected 0 to %d: it is of another vocabulary", i, what,
                             tokens[i], m->config.V - 1);
    return 0;
}

/* Embedding, blocks and the last layer norm, whose output is left in the activation ln. */
static int forward_blocks(GPT2 *m, const int32_t *x, int batch, int length, int train) {
    if (batch < 1 || length < 1 || length > m->config.max_T)
        return gpt2_fail("batch is %d x %d tokens, expected sequences of 1 to %d, the model's context", batch,
                         length, m->config.max_T);
    if (m->backward_due && !m->grads_empty)
        return gpt2_fail("a gradient is half added; call gpt2_backward after gpt2_forward");
    m->backward_due = 0;
    const size_t B = (size_t)batch, T = (size_t)length, N = B * T, C = m->C;
    if (tokens_check(m, "x", x, N) || acts_layout(m, B, T, train)) return -1;
    const Workspace *ws = &m->ws;
    const Tensors first = tensors_at(m, GPT2_PARAM, 0);
    memcpy(acts_at(m, 0).x, x, N * sizeof *x);
    encoder_forward(acts_at(m, 0).residual1, x, first.wte, first.wpe, B, T, C);
    for (size_t l = 0; l < m->L; l++) {
        const Tensors p = tensors_at(m, GPT2_PARAM, l);
        const Activations a = acts_at(m, train ? l : 0);
        float *next = acts_at(m, train ? l + 1 : 0).residual1;
        layernorm_forward(a.ln, a.ln1_mean, a.ln1_rstd, a.residual1, p.ln1w, p.ln1b, N, C);
        linear_forward(ws, a.qkv, a.ln, p.qkvw, p.qkvb, N, C, 3 * C, 0);
        attention_forward(ws, a.att, a.qkv, B, T, C, m->NH);
        memcpy(a.residual2, a.residual1, N * C * sizeof *next);
        linear_forward(ws, a.residual2, a.att, p.attprojw, p.attprojb, N, C, C, 1);
        layernorm_forward(a.ln, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b, N, C);
        linear_forward(ws, a.fc, a.ln, p.fcw, p.fcb, N, C, 4 * C, 0);
        gelu_forward(a.gelu, a.fc, N * 4 * C);
        memcpy(next, a.residual2, N * C * sizeof *next);
        linear_forward(ws, next, a.gelu, p.fcprojw, p.fcprojb, N, 4 * C, C, 1);
    }
    const Activations a = acts_at(m, train ? m->L : 0);
    layernorm_forward(a.ln, a.lnf_mean, a.lnf_rstd, a.residual1, first.lnfw, first.lnfb, N, C);
    return 0;
}

int gpt2_forward(GPT2 *m, const int32_t *x, const int32_t *y, int B, int T, float grad_scale, float *loss) {
    const int train = grad_scale != 0;
    if ((train && !memory_of(m, GPT2_GRAD)) || forward_blocks(m, x, B, T, train) ||
        tokens_check(m, "y", y, m->B * m->T))
        return -1;
    const size_t N = m->B * m->T, C = m->C, V = m->V, Vp = m->Vp;
    const float *wte = m->memory[GPT2_PARAM];
    float *dwte = m->memory[GPT2_GRAD];
    const Activations a = acts_at(m, 0);
    for (size_t n = 0; n < N; n += m->chunk) {
        const size_t rows = min(m->chunk, N - n);
        const Matrix ln = {a.ln + n * C, C, 1};
        gemm(&m->ws, a.logits, Vp, ln, (Matrix){wte, 1, C}, rows, V, C, NULL, 0);
        crossentropy(a.losses + n, a.logits, y + n, rows, V, Vp, grad_scale / (float)N);
        if (!train) continue;
        gemm(&m->ws, a.dln + n * C, C, (Matrix){a.logits, Vp, 1}, (Matrix){wte, C, 1}, rows, C, V, NULL, 0);
        gemm(&m->ws, dwte, C, (Matrix){a.logits, 1, Vp}, ln, V, C, rows, NULL, n > 0 || !m->grads_empty);
    }
    double sum = 0;
    for (size_t n = 0; n < N; n++) sum += a.losses[n];
    *loss = (float)(sum / (double)N);
    m->backward_due = train;
    m->norm = train ? NAN : m->norm;
    return 0;
}

int gpt2_backward(GPT2 *m) {
    if (!m->backward_due)
        return gpt2_fail("gpt2_backward needs a gpt2_forward with a gradient scale before it, one for each");
    const Workspace *ws = &m->ws;
    const size_t B = m->B, T = m->T, N = B * T, C = m->C;
    const int add = !m->grads_empty;
    const Tensors params = tensors_at(m, GPT2_PARAM, 0), grads = tensors_at(m, GPT2_GRAD, 0);
    const Activations last = acts_at(m, m->L);
    float *dresidual = last.dresidual, *dln = last.dln, *dwide = last.dwide;
    memset(dresidual, 0, N * C * sizeof *dresidual);
    layernorm_backward(dresidual, grads.lnfw, grads.lnfb, dln, last.residual1, params.lnfw, last.lnf_mean,
                       last.lnf_rstd, N, C, add);
    for (size_t l = m->L; l-- > 0;) {
        const Tensors p = tensors_at(m, GPT2_PARAM, l), g = tensors_at(m, GPT2_GRAD, l);
        const Activations a = acts_at(m, l);
        linear_backward_input(ws, dwide, dresidual, p.fcprojw, N, 4 * C, C);
        gelu_backward(dwide, a.gelu, a.fc, N * 4 * C);
        linear_backward_weight(ws, g.fcprojw, g.fcprojb, dresidual, a.gelu, N, 4 * C, C, add);
        layernorm_forward(a.ln, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b, N, C);
        linear_backward_weight(ws, g.fcw, g.fcb, dwide, a.ln, N, C, 4 * C, add);
        linear_backward_input(ws, dln, dwide, p.fcw, N, C, 4 * C);
        layernorm_backward(dresidual, g.ln2w, g.ln2b, dln, a.residual2, p.ln2w, a.ln2_mean, a.ln2_rstd, N, C,
                           add);

        linear_backward_weight(ws, g.attprojw, g.attprojb, dresidual, a.att, N, C, C, add);
        linear_backward_input(ws, dln, dresidual, p.attprojw, N, C, C);
        attention_backward(ws, dwide, dln, a.qkv, B, T, C, m->NH);
        layernorm_forward(a.ln, a.ln1_mean, a.ln1_rstd, a.residual1, p.ln1w, p.ln1b, N, C);
        linear_backward_weight(ws, g.qkvw, g.qkvb, dwide, a.ln, N, C, 3 * C, add);
        linear_backward_input(ws, dln, dwide, p.qkvw, N, C, 3 * C);
        layernorm_backward(dresidual, g.ln1w, g.ln1b, dln, a.residual1, p.ln1w, a.ln1_mean, a.ln1_rstd, N, C,
                           add);
    }
    if (!add) memset(grads.wpe, 0, (size_t)m->config.max_T * C * sizeof *grads.wpe);
    encoder_backward(grads.wte, grads.wpe, dresidual, (const int32_t *)last.x, B, T, C);
    m->grads_empty = 0;
    m->backward_due = 0;
    return 0;
}

void gpt2_zero_grad(GPT2 *m) {
    m->grads_empty = 1;
    m->backward_due = 0;
    m->norm = NAN;
}

int gpt2_logits(GPT2 *m, const int32_t *x, int B, int T, int last_only, float *out) {
    if (forward_blocks(m, x, B, T, 0)) return -1;
    const size_t every = last_only ? m->T : 1;
    gemm(&m->ws, out, m->V, (Matrix){acts_at(m, 0).ln + (every - 1) * m->C, every * m->C, 1},
         (Matrix){m->memory[GPT2_PARAM], 1, m->C}, m->B * m->T / every, m->V, m->C, NULL, 0);
    return 0;
}

/* --- AdamW -------------------------------------------------------------------------------------------------
   Shared out in pieces of a fixed size: neither a sum nor the end of a vector loop depends on the threads. */
enum { PIECE = 1 << 14 };

float gpt2_grad_norm(GPT2 *m) {
    const size_t pieces = (m->count + PIECE - 1) / PIECE;
    double sum = 0, *squares = NULL;
    if (isnan(m->norm) && memory_of(m, GPT2_GRAD)) squares = malloc(pieces * sizeof *squares);
    if (!squares) return m->norm;
    grads_fill(m);
    const float *g = m->memory[GPT2_GRAD];
#pragma omp parallel for
    for (size_t i = 0; i < pieces; i++) {
        vf part = {0};
        for (size_t k = i * PIECE; k < min((i + 1) * PIECE, m->count); k += LANES) {
            vf v = vload(g + k, m->count - k);
            part += v * v;
        }
        squares[i] = vsum(part);
    }
    for (size_t i = 0; i < pieces; i++) sum += squares[i];
    free(squares);
    return m->norm = (float)sqrt(sum);
}

int gpt2_update(GPT2 *m, double lr, double beta1, double beta2, double eps, double decay, double max_norm) {
    if (m->backward_due)
        return gpt2_fail("gpt2_update came between gpt2_forward and gpt2_backward; call gpt2_backward first");
    const float *g = memory_of(m, GPT2_GRAD);
    float *p = m->memory[GPT2_PARAM], *m1 = memory_of(m, GPT2_MOMENT1), *m2 = memory_of(m, GPT2_MOMENT2);
    if (!g || !m1 || !m2) return -1;
    grads_fill(m);
    const double norm = max_norm > 0 ? gpt2_grad_norm(m) : 0;
    m->updates++;
    const double correct1 = 1 - pow(beta1, (double)m->updates), correct2 = 1 - pow(beta2, (double)m->updates);
    const float clip = (float)(norm > max_norm ? max_norm / norm : 1);
    const float keep1 = (float)beta1, add1 = (float)(1 - beta1), epsilon = (float)eps;
    const float keep2 = (float)beta2, add2 = (float)(1 - beta2);
    const float rate = (float)(lr / correct1), scale2 = (float)(1 / correct2);
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const size_t n = (size_t)gpt2_tensor(&m->config, t, NULL, NULL);
        const float keep = (float)(GPT2_DECAYED >> t & 1 ? 1 - lr * decay : 1);
#pragma omp parallel for
        for (size_t first = 0; first < n; first += PIECE)
#pragma omp simd
            for (size_t i = first; i < min(first + PIECE, n); i++) {
                const float grad = g[i] * clip;
                m1[i] = keep1 * m1[i] + add1 * grad;
                m2[i] = keep2 * m2[i] + add2 * grad * grad;
                p[i] = keep * p[i] - rate * m1[i] / (sqrtf(m2[i] * scale2) + epsilon);
            }
        p += n, g += n, m1 += n, m2 += n;
    }
    gpt2_zero_grad(m);
    return 0;
}

int64_t gpt2_updates(const GPT2 *m) { return m->updates; }
void gpt2_set_updates(GPT2 *m, int64_t updates) { m->updates = updates; }

/* --- The machine ---------------------------------------------------------------------------------------- */
const char *gpt2_device(void) {
    static _Thread_local char text[64];
    snprintf(text, sizeof text, "CPU, %d threads, %d floats a vector", omp_get_max_threads(), LANES);
    return text;
}

/* Multiply-adds in independent chains, enough to hide the latency of one; the best of some short runs. */
double gpt2_ceiling(void) {
    enum { CHAINS = 12, ROUNDS = 400000, RUNS = 12 };
    double best = 0, sink = 0;
    for (int run = 0; run < RUNS; run++) {
        const double start = seconds();
        const int threads = omp_get_max_threads();
#pragma omp parallel for reduction(+ : sink)
        for (int thread = 0; thread < threads; thread++) {
            vf chain[CHAINS], a = SPLAT(1.0000001f + (float)run * 1e-9f), b = SPLAT(1e-9f);
            for (int i = 0; i < CHAINS; i++) chain[i] = SPLAT((float)i);
            for (int round = 0; round < ROUNDS; round++)
#pragma GCC unroll 12
                for (int i = 0; i < CHAINS; i++) chain[i] = a * chain[i] + b;
            for (int i = 0; i < CHAINS; i++) sink += chain[i][0];
        }
        best = fmax(best, 2.0 * LANES * CHAINS * ROUNDS * threads / (seconds() - start));
    }
    return sink > 0 ? best : 0;           /* sink is used, so that the loops are not dropped */
}
#endif /* GPT2_NO_MODEL */

#ifndef GPT2_NO_HOST
/* === 3. The host half =================================================================================== */
static _Thread_local char error_text[1024] = "no error";

int gpt2_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    return -1;
}

const char *gpt2_error(void) { return error_text; }

static void *memory(size_t bytes) {
    void *p = calloc(bytes + 1, 1);
    if (!p) gpt2_fail("no memory for %zu bytes", bytes);
    return p;
}

/* --- Shapes and first values ---------------------------------------------------------------------------- */
int64_t gpt2_tensor(const GPT2Config *config, int index, const char **name, int64_t shape[3]) {
    const int64_t T = config->max_T, L = config->L, C = config->C, Vp = (config->V + 127LL) / 128 * 128;
    const struct {
        const char *name;
        int64_t shape[3];
    } table[] = {
        {"wte", {Vp, C}},         {"wpe", {T, C}},        {"ln1w", {L, C}},         {"ln1b", {L, C}},
        {"qkvw", {L, 3 * C, C}},  {"qkvb", {L, 3 * C}},   {"attprojw", {L, C, C}},  {"attprojb", {L, C}},
        {"ln2w", {L, C}},         {"ln2b", {L, C}},       {"fcw", {L, 4 * C, C}},   {"fcb", {L, 4 * C}},
        {"fcprojw", {L, C, 4 * C}}, {"fcprojb", {L, C}},  {"lnfw", {C}},            {"lnfb", {C}},
    };
    if (index < 0 || index >= GPT2_TENSORS)
        return gpt2_fail("tensor %d was asked for, expected 0 to %d", index, GPT2_TENSORS - 1);
    const int64_t *s = table[index].shape;
    if (name) *name = table[index].name;
    if (shape) memcpy(shape, s, sizeof table[index].shape);
    return s[0] * (s[1] ? s[1] : 1) * (s[2] ? s[2] : 1);
}

/* Elements of all tensors, with padding. */
static int64_t tensors_size(const GPT2Config *config) {
    int64_t total = 0;
    for (int i = 0; i < GPT2_TENSORS; i++) total += gpt2_tensor(config, i, NULL, NULL);
    return total;
}

int64_t gpt2_parameters(const GPT2Config *c) {
    return tensors_size(c) - (128 - c->V % 128) % 128 * (int64_t)c->C;
}

double gpt2_flops_per_token(const GPT2Config *c, int T) {
    return 6.0 * (double)gpt2_parameters(c) + 6.0 * c->L * (double)T * c->C;
}

int gpt2_config_check(const GPT2Config *c) {     /* bounds that keep every product of sizes below 2^63 */
    if (c->max_T < 1 || c->V < 1 || c->L < 1 || c->NH < 1 || c->C < 1 || c->C % c->NH || c->max_T > 1 << 24 ||
        c->V > 1 << 24 || c->L > 1 << 12 || c->C > 1 << 16)
        return gpt2_fail("model has context %d, V %d, L %d, NH %d, C %d, expected 1 or more each, C a "
                         "multiple of NH and at most 65536, L at most 4096", c->max_T, c->V, c->L, c->NH,
                         c->C);
    return 0;
}

int gpt2_descriptor(const char *text, GPT2Config *out) {
    static const int table[][3] = {{2, 128, 2},    {4, 256, 4},    {6, 384, 6},   {12, 768, 12},
                                   {24, 1024, 16}, {36, 1280, 20}, {48, 1600, 25}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        char name[8];
        snprintf(name, sizeof name, "d%d", table[i][0]);
        *out = (GPT2Config){.max_T = 1024, .V = 50257, .L = table[i][0], .NH = table[i][2], .C = table[i][1]};
        if (!strcmp(text, name)) return 0;
    }
    return gpt2_fail("model descriptor is '%s', expected d2, d4, d6, d12, d24, d36 or d48", text);
}

/* A random number for each (key, counter), by the mixing function of SplitMix64 (Steele, Lea & Flood 2014).
   There is no state to save, and it does not matter who draws first. */
static uint64_t random_at(uint64_t key, uint64_t counter) {
    uint64_t z = key * 0xD1342543DE82EF95u + (counter + 1) * 0x9E3779B97F4A7C15u;
    for (int round = 0; round < 2; round++) {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
    }
    return z;
}

static double uniform_at(uint64_t key, uint64_t at) { return (double)(random_at(key, at) >> 11) * 0x1p-53; }

enum { BUFFER = 1 << 18 };                /* floats that pass between a file and a model at a time */

int gpt2_init(GPT2 *model, uint64_t seed) {
    GPT2Config config;
    gpt2_config(model, &config);
    float *buffer = memory(BUFFER * sizeof *buffer);
    int failed = !buffer;
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const char *name;
        const int64_t n = gpt2_tensor(&config, t, &name, NULL), real = t ? n : (int64_t)config.V * config.C;
        const float constant = name[0] == 'l' && strchr(name, 'w');     /* layer norm's weights are 1 */
        const double deviation = strstr(name, "proj") ? 0.02 / sqrt(2.0 * config.L) : 0.02;
        for (int64_t first = 0; first < n && !failed; first += BUFFER) {
            const int64_t count = n - first < BUFFER ? n - first : BUFFER;
#pragma omp parallel for
            for (int64_t i = 0; i < count; i++) {
                const uint64_t at = ((uint64_t)t << 56) + 2 * (uint64_t)(first + i);
                buffer[i] = constant;
                if (GPT2_DECAYED >> t & 1 && first + i < real)     /* a matrix: Box & Muller (1958) */
                    buffer[i] = (float)(deviation * sqrt(-2 * log(1 - uniform_at(seed, at))) *
                                        cos(6.283185307179586 * uniform_at(seed, at + 1)));
            }
            failed = gpt2_set(model, t, GPT2_PARAM, first, count, buffer);
        }
    }
    free(buffer);
    return failed ? -1 : 0;
}

/* --- Files: 256 int32, little-endian, the first a magic number, the second a version; then the data ----- */
enum {
    MAGIC_MODEL = 20240326,
    MAGIC_REFERENCE,
    MAGIC_TABLE,
    MAGIC_TOKENS = 20240520,
    MAGIC_STATE = 20260601
};

typedef struct {
    FILE *f;
    const char *path;
    int64_t size;
    int32_t header[256];
} File;

/* Opens a file for reading and takes its header, which must have this magic number. */
static int file_open(File *in, const char *path, const char *what, int magic) {
    struct stat info;
    *in = (File){.path = path};
    if (stat(path, &info) || (S_ISREG(info.st_mode) && !(in->f = fopen(path, "rb"))))
        return gpt2_fail("%s '%s' cannot be opened: %s", what, path, strerror(errno));
    if (!in->f) return gpt2_fail("%s '%s' is not a regular file", what, path);
    in->size = info.st_size;
    if (fread(in->header, sizeof in->header, 1, in->f) == 1 && in->header[0] == magic) return 0;
    fclose(in->f);
    return gpt2_fail("%s '%s' has %lld bytes and begins with the number %d, expected a header of 1024 bytes "
                     "and %d there", what, path, (wide)in->size, in->header[0], magic);
}

static int file_read(File *in, void *out, size_t bytes) {
    if (fread(out, 1, bytes, in->f) == bytes) return 0;
    return gpt2_fail("'%s' cannot be read: %s", in->path,
                     ferror(in->f) ? strerror(errno) : "it ends too early");
}

/* All tensors of a kind from a file or (writing) to it, as fp32 or as bf16, which is the upper half of a
   float. */
static int tensors_copy(GPT2 *model, int kind, File *file, int bf16, int writing) {
    GPT2Config config;
    gpt2_config(model, &config);
    uint32_t *bits = memory(BUFFER * sizeof *bits);
    uint16_t *halves = memory(BUFFER * sizeof *halves);
    int failed = !bits || !halves;
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const int64_t n = gpt2_tensor(&config, t, NULL, NULL);
        for (int64_t first = 0; first < n && !failed; first += BUFFER) {
            const int64_t count = n - first < BUFFER ? n - first : BUFFER;
            const size_t bytes = (size_t)count * (bf16 ? 2 : 4);
            void *data = bf16 ? (void *)halves : (void *)bits;
            failed = writing ? gpt2_get(model, t, kind, first, count, (float *)bits)
                             : file_read(file, data, bytes);
            for (int64_t i = 0; bf16 && i < count; i++)
                if (!writing)
                    bits[i] = (uint32_t)halves[i] << 16;
                else if ((bits[i] & 0x7FFFFFFF) > 0x7F800000)      /* NaN stays NaN */
                    halves[i] = (uint16_t)(bits[i] >> 16 | 64);
                else                      /* to the nearest, ties to even */
                    halves[i] = (uint16_t)((bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16);
            if (!failed)
                failed = writing ? fwrite(data, 1, bytes, file->f) != bytes
                                 : gpt2_set(model, t, kind, first, count, (float *)bits);
        }
    }
    free(bits);
    free(halves);
    return failed ? -1 : 0;
}

/* Header, extra bytes, and the tensors of kinds from … to. The file gets its name when it is whole and on
   disk. */
static int file_write(const char *path, const int32_t header[256], const void *extra, size_t bytes,
                      GPT2 *model, int from, int to, int bf16) {
    char temporary[4096];
    int failed = snprintf(temporary, sizeof temporary, "%s.tmp", path) >= (int)sizeof temporary;
    File out = {.f = failed ? NULL : fopen(temporary, "wb")};
    if (!out.f) return gpt2_fail("'%s' cannot be written: %s", path, strerror(errno));
    failed = fwrite(header, 1024, 1, out.f) != 1 || fwrite(extra, 1, bytes, out.f) != bytes;
    for (int kind = from; kind <= to && !failed; kind++)
        failed = tensors_copy(model, kind, &out, bf16, 1);
    failed = failed || fflush(out.f) || fsync(fileno(out.f));
    failed = fclose(out.f) || failed || rename(temporary, path);
    if (failed) {
        gpt2_fail("'%s' could not be written: %s", path, strerror(errno));
        unlink(temporary);
    }
    return failed ? -1 : 0;
}

int gpt2_save(GPT2 *model, const char *path, int version) {
    GPT2Config c;
    gpt2_config(model, &c);
    if (version != 3 && version != 5)
        return gpt2_fail("model version is %d, expected 3 (fp32) or 5 (bf16)", version);
    const int32_t header[256] = {MAGIC_MODEL, version, c.max_T, c.V, c.L, c.NH, c.C, (c.V + 127) / 128 * 128};
    return file_write(path, header, "", 0, model, GPT2_PARAM, GPT2_PARAM, version == 5);
}

GPT2 *gpt2_load(const char *path) {
    File in;
    GPT2 *model = NULL;
    if (file_open(&in, path, "model", MAGIC_MODEL)) return NULL;
    const int32_t *h = in.header, bf16 = h[1] == 5;
    const GPT2Config c = {h[2], h[3], h[4], h[5], h[6]};
    if ((!bf16 && h[1] != 3) || gpt2_config_check(&c) || in.size != 1024 + tensors_size(&c) * (bf16 ? 2 : 4))
        gpt2_fail("model '%s' has version %d, context %d, V %d, L %d, NH %d, C %d and %lld bytes, expected "
                  "version 3 or 5, a shape that can be, and the bytes that it needs", path, h[1], h[2], h[3],
                  h[4], h[5], h[6], (wide)in.size);
    else if ((model = gpt2_create(&c)) && tensors_copy(model, GPT2_PARAM, &in, bf16, 0)) {
        gpt2_free(model);
        model = NULL;
    }
    fclose(in.f);
    return model;
}

/* --- Loader --------------------------------------------------------------------------------------------- */
typedef struct {
    int64_t epoch, shard, row;            /* the next row: of which epoch, of which of its shards, which */
    int64_t T, tokens;                    /* with the seed: what this position is valid for */
    uint64_t seed;
} Position;

struct GPT2Loader {
    glob_t files;
    int64_t *sizes;                       /* tokens in each file */
    int B, V, shuffle;
    Position at;
    uint16_t *row;                        /* (T + 1) */
};

/* Where i goes in a random permutation of 0…n-1: a Feistel network of four rounds on the smallest even number
   of bits that hold n, repeated until it lands below n (Black & Rogaway 2002). */
static uint64_t permuted(uint64_t i, uint64_t n, uint64_t key) {
    int half = 1;
    while (n > (uint64_t)1 << 2 * half) half++;
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    do
        for (uint64_t round = 0; round < 4; round++) {
            const uint64_t right = i & mask;
            i = right << half | ((i >> half ^ random_at(key + round, right)) & mask);
        }
    while (i >= n);
    return i;
}

/* Opens a shard and returns its number of tokens, or -1. */
static int64_t shard_open(File *in, const char *path) {
    if (file_open(in, path, "token shard", MAGIC_TOKENS)) return -1;
    if (in->header[1] == 1 && in->header[2] >= 0 && in->size == 1024 + 2 * (int64_t)in->header[2])
        return in->header[2];
    fclose(in->f);
    return gpt2_fail("token shard '%s' has version %d, %d tokens, %lld bytes, expected version 1 and 1024 "
                     "bytes and 2 a token", path, in->header[1], in->header[2], (wide)in->size);
}

void gpt2_loader_close(GPT2Loader *l) {
    if (!l) return;
    globfree(&l->files);
    free(l->sizes);
    free(l->row);
    free(l);
}

GPT2Loader *gpt2_loader_open(const char *pattern, int B, int T, int V, int shuffle, uint64_t seed) {
    File in;
    int64_t batches = 0;
    GPT2Loader *l = memory(sizeof *l);
    if (!l) return NULL;
    *l = (GPT2Loader){.B = B, .V = V, .shuffle = shuffle, .at = {.T = T, .seed = seed}};
    int failed = B < 1 || T < 1 || V < 1;
    if (failed)
        gpt2_fail("loader has B %d, T %d, V %d, expected at least 1 each", B, T, V);
    else if ((failed = glob(pattern, 0, NULL, &l->files)))
        gpt2_fail("no token shards match '%s'; make some with: python3 train_gpt2.py prepare", pattern);
    else
        failed = !(l->sizes = memory(l->files.gl_pathc * sizeof *l->sizes)) ||
                 !(l->row = memory(((size_t)T + 1) * sizeof *l->row));
    for (size_t i = 0; !failed && i < l->files.gl_pathc; i++) {
        l->sizes[i] = shard_open(&in, l->files.gl_pathv[i]);
        l->at.tokens += l->sizes[i];
        failed = l->sizes[i] < 0 || fclose(in.f);
    }
    gpt2_loader_size(l, NULL, NULL, failed ? NULL : &batches);
    if (batches) return l;
    if (!failed)
        gpt2_fail("the shards '%s' have %lld tokens, expected B T + 1 = %lld or more in one; use a smaller "
                  "batch", pattern, (wide)l->at.tokens, (wide)B * T + 1);
    gpt2_loader_close(l);
    return NULL;
}

void gpt2_loader_size(const GPT2Loader *l, int64_t *shards, int64_t *tokens, int64_t *batches) {
    if (shards) *shards = (int64_t)l->files.gl_pathc;
    if (tokens) *tokens = l->at.tokens;
    if (batches) *batches = 0;
    for (size_t i = 0; batches && i < l->files.gl_pathc; i++)
        *batches += l->sizes[i] > 0 ? (l->sizes[i] - 1) / (l->at.T * l->B) : 0;
}

void gpt2_loader_reset(GPT2Loader *l) { l->at.epoch = l->at.shard = l->at.row = 0; }

int gpt2_loader_next(GPT2Loader *l, int32_t *x, int32_t *y) {
    File in;
    const int64_t T = l->at.T, shards = (int64_t)l->files.gl_pathc;
    uint64_t file, key;
    int64_t offset, rows;
    for (;; l->at.shard++, l->at.row = 0) {     /* until a shard has B rows more */
        l->at.epoch += l->at.shard / shards;
        l->at.shard %= shards;
        file = (uint64_t)l->at.shard;
        key = random_at(l->at.seed, (uint64_t)l->at.epoch);
        file = l->shuffle ? permuted(file, (uint64_t)shards, key) : file;
        key = random_at(key, file);
        offset = l->shuffle ? (int64_t)(key % (uint64_t)T) : 0;
        if (l->sizes[file] - 1 - offset < T * l->B)
            offset = 0;                   /* a small shard keeps its only batch */
        rows = (l->sizes[file] - 1 - offset) / T;
        if (l->at.row + l->B <= rows) break;
    }
    const int64_t tokens = shard_open(&in, l->files.gl_pathv[file]);
    int failed = tokens < 0;
    if (!failed && tokens != l->sizes[file])
        failed = gpt2_fail("token shard '%s' has %lld tokens, it had %lld: it changed during the run",
                           in.path, (wide)tokens, (wide)l->sizes[file]);
    for (int b = 0; b < l->B && !failed; b++) {
        const uint64_t row = (uint64_t)l->at.row + (uint64_t)b;
        const int64_t first = offset + T * (int64_t)(l->shuffle ? permuted(row, (uint64_t)rows, key) : row);
        failed = fseeko(in.f, 1024 + 2 * first, SEEK_SET) || file_read(&in, l->row, 2 * ((size_t)T + 1));
        for (int64_t t = 0; t <= T && !failed; t++) {
            if (l->row[t] >= l->V)
                failed = gpt2_fail("token %lld of '%s' is %d, expected less than V, %d: another vocabulary's",
                                   (wide)(first + t), in.path, l->row[t], l->V);
            if (t < T) x[b * T + t] = l->row[t];
            if (t > 0) y[b * T + t - 1] = l->row[t];
        }
    }
    l->at.row += failed ? 0 : l->B;
    if (tokens >= 0) fclose(in.f);
    return failed ? -1 : 0;
}

/* --- Evaluation, schedule, sampling --------------------------------------------------------------------- */
int gpt2_evaluate(GPT2 *model, GPT2Loader *l, int64_t batches, float *loss) {
    const size_t N = (size_t)l->B * (size_t)l->at.T;
    int64_t all;
    int32_t *x = memory(2 * N * sizeof *x);
    int failed = !x;
    double sum = 0;
    gpt2_loader_size(l, NULL, NULL, &all);
    batches = batches < all ? batches : all;
    gpt2_loader_reset(l);
    for (int64_t i = 0; i < batches && !failed; i++) {
        failed = gpt2_loader_next(l, x, x + N) || gpt2_forward(model, x, x + N, l->B, (int)l->at.T, 0, loss);
        sum += *loss;
    }
    free(x);
    *loss = (float)(sum / (double)batches);
    return failed ? -1 : 0;
}

float gpt2_lr(const char *schedule, int64_t step, int64_t steps, int64_t warmup, float lr, float final_frac) {
    const double done = (double)(step - warmup) / fmax(1, (double)(steps - warmup));     /* since warm-up */
    const double late = fmax(0, 5.0 * (double)step / (double)steps - 4);     /* of the last fifth */
    double left = 1;                      /* of the decay */
    if (!strcmp(schedule, "cosine"))
        left = 0.5 * (1 + cos(3.141592653589793 * done));
    else if (!strcmp(schedule, "linear"))
        left = 1 - done;
    else if (!strcmp(schedule, "wsd"))
        left = 1 - sqrt(late);
    else if (strcmp(schedule, "constant"))
        return (float)gpt2_fail("schedule is '%s', expected cosine, linear, constant or wsd", schedule);
    if (step < warmup) return (float)((double)lr * (double)(step + 1) / (double)warmup);
    return (float)(lr * (final_frac + (1.0 - final_frac) * left));
}

static int descending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

int gpt2_next(GPT2 *model, const int32_t *tokens, int64_t n, float temperature, int top_k, uint64_t *rng) {
    GPT2Config config;
    gpt2_config(model, &config);
    const int V = config.V, T = (int)(n < config.max_T ? n : config.max_T);
    float *logits = memory(2 * (size_t)V * sizeof *logits), *sorted = logits + V;
    if (!logits || gpt2_logits(model, tokens + (n - T), 1, T, 1, logits)) {
        free(logits);
        return -1;
    }
    memcpy(sorted, logits, (size_t)V * sizeof *sorted);
    qsort(sorted, (size_t)V, sizeof *sorted, descending);
    const float least = temperature > 0 ? sorted[(top_k > 0 && top_k < V ? top_k : V) - 1] : sorted[0];
    const double top = sorted[0], scale = temperature > 0 ? 1 / (double)temperature : 1;
    double sum = 0;
    for (int i = 0; i < V; i++) sum += logits[i] >= least ? exp((logits[i] - top) * scale) : 0;
    double draw = sum * uniform_at(0, (*rng)++);
    int token = isnan(sum) || sum == 0 ? gpt2_fail("the model's logits are not numbers: it has diverged") : 0;
    for (int i = 0; i < V && draw >= 0; i++)
        if (logits[i] >= least) {         /* the token in whose share of the sum the draw falls */
            draw -= exp((logits[i] - top) * scale);
            token = i;
        }
    free(logits);
    return token;
}

GPT2Tokenizer *gpt2_tokenizer_load(const char *path) {
    File in;
    if (file_open(&in, path, "tokenizer", MAGIC_TABLE)) return NULL;
    const int64_t size = in.size - 1024, V = in.header[2];
    GPT2Tokenizer *t = memory(sizeof *t);
    int failed = !t || in.header[1] != 2 || V < 1 || V > size || !(t->bytes = memory((size_t)size)) ||
                 !(t->at = memory((size_t)V * sizeof *t->at)) || file_read(&in, t->bytes, (size_t)size);
    int64_t at = 0;
    for (int64_t i = 0; i < V && !failed; i++) {
        t->at[i] = at;
        at += 1 + t->bytes[at < size ? at : 0];
        failed = at > size;
    }
    fclose(in.f);
    if (failed) {
        gpt2_fail("tokenizer '%s' has version %d, %lld tokens, %lld bytes, expected version 2 and a length "
                  "byte and as many bytes for each token", path, in.header[1], (wide)V, (wide)size);
        gpt2_tokenizer_free(t);
        return NULL;
    }
    t->V = (int32_t)V;
    t->end = in.header[3] >= 0 && in.header[3] < V ? in.header[3] : -1;
    return t;
}

void gpt2_tokenizer_free(GPT2Tokenizer *t) {
    if (!t) return;
    free(t->bytes);
    free(t->at);
    free(t);
}

/* --- Progress and checkpoints --------------------------------------------------------------------------- */
double gpt2_zscore(GPT2Progress *p, int window, double value) {
    double *values = p->window[window], mean = 0, variance = 0;
    for (int i = 0; i < GPT2_WINDOW; i++) mean += values[i] / GPT2_WINDOW;
    for (int i = 0; i < GPT2_WINDOW; i++)
        variance += (values[i] - mean) * (values[i] - mean) / GPT2_WINDOW;
    values[p->seen[window]++ % GPT2_WINDOW] = value;
    return p->seen[window] <= GPT2_WINDOW ? NAN : variance > 0 ? (value - mean) / sqrt(variance) : 0;
}

typedef struct {                          /* what a state file has between its header and the moments */
    GPT2Progress progress;
    Position position;
    int64_t updates;
} State;

/* The three files of a checkpoint, in the order in which they are written. */
enum { MODEL_FILE, STATE_FILE, DONE_FILE };
static int run_path(char path[4096], const char *dir, int which, int64_t step) {
    static const char *formats[] = {"%s/model_%08lld.bin", "%s/state_%08lld_00000.bin", "%s/DONE_%08lld"};
    return snprintf(path, 4096, formats[which], dir, (wide)step) < 4096 ? 0
                                                                        : gpt2_fail("'%s': too long", dir);
}

int gpt2_checkpoint(const char *dir, GPT2 *model, const GPT2Loader *loader, const GPT2Progress *progress,
                    int64_t every, int64_t keep, int64_t major) {
    char path[4096];
    GPT2Config c;
    gpt2_config(model, &c);
    const State state = {*progress, loader ? loader->at : (Position){0}, gpt2_updates(model)};
    const int32_t header[256] = {MAGIC_STATE, 1, c.max_T, c.V, c.L, c.NH, c.C};
    const int64_t step = progress->step, old = step - keep * every;
    if (run_path(path, dir, MODEL_FILE, step) || gpt2_save(model, path, 3) ||
        run_path(path, dir, STATE_FILE, step) ||
        file_write(path, header, &state, sizeof state, model, GPT2_MOMENT1, GPT2_MOMENT2, 0) ||
        run_path(path, dir, DONE_FILE, step) || file_write(path, header, "", 0, NULL, 0, -1, 0))
        return -1;
    const int stays = keep <= 0 || old <= 0 || old >= step || (major > 0 && old % major == 0);
    for (int which = DONE_FILE; which >= MODEL_FILE && !stays; which--)
        if (!run_path(path, dir, which, old)) unlink(path);
    return 0;
}

int64_t gpt2_newest(const char *dir) {
    long long newest = -1, step;
    struct dirent *entry;
    DIR *d = opendir(dir);
    while (d && (entry = readdir(d))) {
        char rest;
        if (sscanf(entry->d_name, "DONE_%8lld%c", &step, &rest) == 1 && step > newest)
            newest = step;
    }
    if (d) closedir(d);
    return newest;
}

int gpt2_restore(const char *dir, int64_t step, GPT2 *model, GPT2Loader *loader, GPT2Progress *progress) {
    char path[4096];
    File in;
    State state;
    GPT2Config c;
    gpt2_config(model, &c);
    if (run_path(path, dir, STATE_FILE, step) || file_open(&in, path, "training state", MAGIC_STATE))
        return -1;
    int failed = file_read(&in, &state, sizeof state);
    const Position *was = &state.position, *now = loader ? &loader->at : was;
    if (!failed && (in.header[1] != 1 || memcmp(in.header + 2, &c, sizeof c) ||
                    in.size != 1024 + (int64_t)sizeof state + 8 * tensors_size(&c)))
        failed = gpt2_fail("training state '%s' has version %d and %lld bytes and does not fit the model "
                           "beside it", path, in.header[1], (wide)in.size);
    if (!failed && (was->T != now->T || was->tokens != now->tokens || was->seed != now->seed))
        failed = gpt2_fail("training state '%s' is of a run with T %lld, %lld tokens, seed %llu, this one "
                           "has %lld, %lld, %llu; resume with the same data and settings", path, (wide)was->T,
                           (wide)was->tokens, (unsigned long long)was->seed, (wide)now->T, (wide)now->tokens,
                           (unsigned long long)now->seed);
    for (int kind = GPT2_MOMENT1; kind <= GPT2_MOMENT2 && !failed; kind++)
        failed = tensors_copy(model, kind, &in, 0, 0);
    fclose(in.f);
    if (failed) return -1;
    if (loader) loader->at = state.position;
    *progress = state.progress;
    gpt2_set_updates(model, state.updates);
    return 0;
}

/* --- Check against a reference -------------------------------------------------------------------------- */
static void diff_add(GPT2Diff *row, double squares[2], const float *ours, const float *theirs, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)ours[i] - theirs[i]);
        row->max_abs = d <= row->max_abs ? row->max_abs : d;     /* NaN too */
        squares[0] += d * d;
        squares[1] += (double)theirs[i] * theirs[i];
    }
}

int gpt2_check(GPT2 *model, const char *path, double tolerance, GPT2Diff rows[GPT2_DIFFS]) {
    File in;
    GPT2Config config;
    gpt2_config(model, &config);
    if (file_open(&in, path, "reference", MAGIC_REFERENCE)) return -1;
    const int64_t B = in.header[2], T = in.header[3], N = B * T, V = config.V;
    const int fits = in.header[1] == 2 && B > 0 && T > 0 && N <= in.size / V &&
                     in.size == 1024 + 4 * (N * (2 + V) + 1 + tensors_size(&config));
    const size_t logits = fits ? (size_t)(N * V) : 0, most = (logits + BUFFER) * sizeof(float);
    int32_t *x = memory(fits ? 2 * (size_t)N * sizeof *x : 0);
    float *ours = memory(most), *theirs = memory(most), loss[2];
    double squares[GPT2_DIFFS][2] = {{0}};
    int failed = !x || !ours || !theirs, wrong = 0;
    if (!fits)
        failed = gpt2_fail("reference '%s' has version %d, B %d, T %d, %lld bytes and does not fit the model",
                           path, in.header[1], in.header[2], in.header[3], (wide)in.size);
    memset(rows, 0, GPT2_DIFFS * sizeof *rows);
    gpt2_zero_grad(model);
    failed = failed || file_read(&in, x, 2 * (size_t)N * sizeof *x) ||
             gpt2_logits(model, x, (int)B, (int)T, 0, ours) ||
             file_read(&in, theirs, logits * sizeof *theirs) || file_read(&in, &loss[1], sizeof *loss) ||
             gpt2_forward(model, x, x + N, (int)B, (int)T, 1, &loss[0]) || gpt2_backward(model);
    diff_add(&rows[0], squares[0], ours, theirs, failed ? 0 : N * V);
    diff_add(&rows[1], squares[1], &loss[0], &loss[1], failed ? 0 : 1);
    for (int i = 0; i < GPT2_DIFFS; i++) {
        const char *name = i ? "loss" : "logits";
        const int64_t n = i < 2 ? 0 : gpt2_tensor(&config, i - 2, &name, NULL);
        for (int64_t first = 0; first < n && !failed; first += BUFFER) {
            const int64_t count = n - first < BUFFER ? n - first : BUFFER;
            failed = gpt2_get(model, i - 2, GPT2_GRAD, first, count, ours) ||
                     file_read(&in, theirs, (size_t)count * sizeof *theirs);
            diff_add(&rows[i], squares[i], ours, theirs, failed ? 0 : count);
        }
        snprintf(rows[i].name, sizeof rows->name, "%s", name);
        rows[i].relative = sqrt(squares[i][0] / (squares[i][1] > 0 ? squares[i][1] : 1));
        rows[i].ok = rows[i].relative <= tolerance;
        wrong += !rows[i].ok;
    }
    gpt2_zero_grad(model);
    fclose(in.f);
    free(x);
    free(ours);
    free(theirs);
    return failed ? -1 : wrong;
}
#endif /* GPT2_NO_HOST */

#ifndef GPT2_NO_MAIN
/* === 4. main ==============================================================================================
   The flags are karpathy/llm.c's, so that its launch scripts work with the binary's name changed. */
enum { TEXT, WHOLE, REAL, GPU };
static struct {
    const char *name, *value;
    int kind, least;                      /* least: of a number */
    const char *help;
} flags[] = {
    {"-i", "dev/data/tinyshakespeare/tiny_shakespeare_train.bin", TEXT, 0, "training shards, a glob"},
    {"-j", "dev/data/tinyshakespeare/tiny_shakespeare_val.bin", TEXT, 0, "validation shards, a glob"},
    {"-e", "d12", TEXT, 0, "model file, or from scratch d2 d4 d6 d12 d24 d36 d48 (d12 is GPT-2 124M)"},
    {"-o", "", TEXT, 0, "run directory for main.log and checkpoints"},
    {"-n", "0", WHOLE, 0, "checkpoint every so many steps and at the end, 0: never"},
    {"-nk", "0", WHOLE, 0, "checkpoints to keep, 0: all"},
    {"-nm", "0", WHOLE, 0, "checkpoints of every so many steps are never deleted"},
    {"-y", "0", WHOLE, 0, "1: resume from the newest checkpoint in the run directory"},
    {"-b", "4", WHOLE, 1, "B, sequences in a micro-batch"},
    {"-t", "1024", WHOLE, 1, "T, tokens in a sequence"},
    {"-d", "0", WHOLE, 0, "tokens in a whole batch, a multiple of B T; 0: B T"},
    {"-x", "-1", WHOLE, -1, "steps, -1: one epoch"},
    {"-k", "cosine", TEXT, 0, "learning-rate schedule: cosine linear constant wsd"},
    {"-l", "3e-4", REAL, 0, "learning rate"},
    {"-u", "0", WHOLE, 0, "warm-up steps"},
    {"-q", "1", REAL, 0, "final learning rate, a fraction of -l"},
    {"-c", "0", REAL, 0, "weight decay"},
    {"-sl", "0", REAL, 0, "skip steps whose loss has a z-score over this, 0: none"},
    {"-sg", "0", REAL, 0, "skip steps whose gradient norm has a z-score over this, 0: none"},
    {"-v", "20", WHOLE, 0, "validate every so many steps"},
    {"-m", "20", WHOLE, 1, "validation batches at most"},
    {"-s", "20", WHOLE, 0, "sample every so many steps"},
    {"-g", "64", WHOLE, 0, "tokens in a sample"},
    {"-h", "0", WHOLE, 0, "1: HellaSwag (not yet built)"},
    {"-a", "0", WHOLE, 0, "1: overfit one batch"},
    {"--check", "", TEXT, 0, "compare the model of -e with this saved reference, and stop"},
    {"-f", "", GPU, 0, ""}, {"-w", "", GPU, 0, ""}, {"-ge", "", GPU, 0, ""}, {"-z", "", GPU, 0, ""},
    {"-r", "", GPU, 0, ""}, {"-lg", "", GPU, 0, "with -f -w -ge -z -r: for GPUs only, ignored"},
};
enum { FLAGS = sizeof flags / sizeof *flags };

static int flag_find(const char *name) {
    int i = 0;
    while (i < FLAGS && strcmp(flags[i].name, name)) i++;
    return i;
}

static const char *text(const char *name) { return flags[flag_find(name)].value; }
static double real(const char *name) { return strtod(text(name), NULL); }
static wide whole(const char *name) { return (wide)real(name); }

/* Ends the program for a mistake in the flags; the other one if the library failed. */
static void usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "train_gpt2: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "; see ./train_gpt2 --help\n");
    exit(2);
}

static void must(int ok) {
    if (ok) return;
    fprintf(stderr, "train_gpt2: %s\n", gpt2_error());
    exit(1);
}

static void parse(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--help")) {
        printf("Trains GPT-2, or checks a model: ./train_gpt2 [FLAG VALUE]...\n");
        for (int i = 0; i < FLAGS; i++)
            if (*flags[i].help) printf("  %-8s %s [%s]\n", flags[i].name, flags[i].help, flags[i].value);
        exit(0);
    }
    for (int i = 1; i < argc; i += 2) {
        const int k = flag_find(argv[i]);
        if (k == FLAGS) usage("%s is not a flag", argv[i]);
        if (i + 1 == argc) usage("%s needs a value", argv[i]);
        char *end;
        const double value = strtod(argv[i + 1], &end);
        const int number = end != argv[i + 1] && !*end && value >= flags[k].least && isfinite(value);
        const int is_whole = number && value == floor(value) && value < 1e15;
        if (flags[k].kind == GPU) fprintf(stderr, "train_gpt2: %s is for GPUs only and ignored\n", argv[i]);
        if ((flags[k].kind == REAL && !number) || (flags[k].kind == WHOLE && !is_whole))
            usage("%s is '%s', expected a %snumber from %d on", argv[i], argv[i + 1],
                  flags[k].kind == WHOLE ? "whole " : "", flags[k].least);
        flags[k].value = argv[i + 1];
    }
}

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    interrupted = 1;
    signal(number, SIG_DFL);              /* the second time, quit at once */
}

/* The decode table: the run's, the one beside the shards, or llm.c's in the working directory; or NULL. */
static GPT2Tokenizer *tokenizer_find(void) {
    char paths[3][4096] = {"", "", "gpt2_tokenizer.bin"};
    const char *shards = text("-i"), *slash = strrchr(shards, '/');
    snprintf(paths[0], sizeof *paths, "%s/tokenizer.bin", text("-o"));
    snprintf(paths[1], sizeof *paths, "%.*stokenizer.bin", slash ? (int)(slash - shards) + 1 : 0, shards);
    int i = 0;
    while (i < 3 && access(paths[i], F_OK)) i++;
    GPT2Tokenizer *tokenizer = i < 3 ? gpt2_tokenizer_load(paths[i]) : NULL;
    must(i == 3 || tokenizer);
    return tokenizer;
}

static void sample(GPT2 *model, const GPT2Tokenizer *t, GPT2Progress *progress, int32_t start, wide length) {
    int32_t *tokens = memory((size_t)(length + 1) * sizeof *tokens);
    must(tokens != NULL);
    tokens[0] = start;
    printf("---\n");
    for (wide i = 0; i < length && !interrupted; i++) {
        const int token = tokens[i + 1] = gpt2_next(model, tokens, i + 1, 1, 0, &progress->rng);
        must(token >= 0);
        if (t && token < t->V)
            fwrite(t->bytes + t->at[token] + 1, 1, t->bytes[t->at[token]], stdout);
        else
            printf("%d ", token);
        fflush(stdout);
    }
    printf("\n---\n");
    free(tokens);
}

static int check(void) {
    GPT2 *model = gpt2_load(text("-e"));
    GPT2Diff rows[GPT2_DIFFS], *r = rows;
    const int wrong = model ? gpt2_check(model, text("--check"), 1e-5, rows) : -1;
    must(wrong >= 0);
    printf("%-10s %14s %14s\n", "", "max abs error", "relative error");
    for (; r < rows + GPT2_DIFFS; r++)
        printf("%-10s %14.3e %14.3e  %s\n", r->name, r->max_abs, r->relative, r->ok ? "ok" : "NOT OK");
    printf("%s: %d of %d rows are within 1e-05\n", wrong ? "NOT OK" : "OK", GPT2_DIFFS - wrong, GPT2_DIFFS);
    gpt2_free(model);
    return wrong > 0;
}

/* The model to begin with: from the run's newest checkpoint, from a file, or from scratch. */
static GPT2 *model_find(int64_t newest, const GPT2Tokenizer *tokenizer, uint64_t seed) {
    char path[4096];
    const char *what = text("-e");
    GPT2Config config;
    if (newest >= 0) return run_path(path, text("-o"), MODEL_FILE, newest) ? NULL : gpt2_load(path);
    if (what[0] != 'd' || strspn(what + 1, "0123456789") != strlen(what + 1)) return gpt2_load(what);
    if (gpt2_descriptor(what, &config)) return NULL;
    config.V = tokenizer ? tokenizer->V : config.V;
    GPT2 *model = gpt2_create(&config);
    return model && !gpt2_init(model, seed) ? model : NULL;
}

int main(int argc, char **argv) {
    /* GCC's threads spin for milliseconds at each barrier: another busy program then slows a step tenfold.
       They take another count only from the environment, and before main. If exec fails, so be it. */
    const int set = getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY");
    char *self = set ? NULL : realpath("/proc/self/exe", NULL);
    if (self && !setenv("GOMP_SPINCOUNT", "10000", 1)) execv(self, argv);
    free(self);
    parse(argc, argv);
    if (*text("--check")) return check();
    const uint64_t seed = 42;
    const int B = (int)min((size_t)whole("-b"), 1 << 24), T = (int)min((size_t)whole("-t"), 1 << 24);
    const wide BT = (wide)B * T, total = whole("-d") ? whole("-d") : BT, micro_batches = total / BT;
    const wide every = whole("-n");
    const char *out = text("-o");
    if (total % BT) usage("-d is %s, expected a multiple of -b times -t, %lld", text("-d"), BT);
    if ((every || whole("-y")) && !*out) usage("-n and -y need a run directory, -o DIR");
    if (gpt2_lr(text("-k"), 0, 1, 0, 1, 1) < 0) usage("-k: %s", gpt2_error());
    if (whole("-h")) fprintf(stderr, "train_gpt2: HellaSwag (-h 1) is not built yet, the run goes without\n");

    GPT2Config config;
    GPT2Progress progress = {.rng = seed};
    GPT2Tokenizer *tokenizer = tokenizer_find();
    const wide newest = whole("-y") ? gpt2_newest(out) : -1;
    GPT2 *model = model_find(newest, tokenizer, seed);
    must(model != NULL);
    gpt2_config(model, &config);
    GPT2Loader *loader = gpt2_loader_open(text("-i"), B, T, config.V, !whole("-a"), seed), *val = NULL;
    must(loader != NULL);
    if (access(text("-j"), R_OK) && !strncmp(text("-j"), "dev/data/", 9))
        printf("no validation: there is no '%s'; name shards with -j\n", text("-j"));
    else
        must((val = gpt2_loader_open(text("-j"), B, T, config.V, 0, seed)) != NULL);
    must(newest < 0 || !gpt2_restore(out, newest, model, loader, &progress));
    char path[4096];
    FILE *log = NULL;
    snprintf(path, sizeof path, "%s/main.log", out);
    if (*out && (!mkdir(out, 0777) || errno == EEXIST)) log = fopen(path, newest >= 0 ? "a" : "w");
    must(!*out || log || gpt2_fail("run directory '%s' cannot be written: %s", out, strerror(errno)) == 0);

    int64_t shards, tokens;
    gpt2_loader_size(loader, &shards, &tokens, NULL);
    const wide steps = whole("-x") >= 0 ? whole("-x") : tokens / total, begin = progress.step;
    const int32_t end = tokenizer && tokenizer->end >= 0 ? tokenizer->end : config.V - 1;
    const double ceiling = gpt2_ceiling(), flops = gpt2_flops_per_token(&config, T), began = seconds();
    int32_t *x = memory(2 * (size_t)BT * sizeof *x);
    must(x != NULL);
    printf("%s, %.0f GFLOP/s at most\n", gpt2_device(), ceiling * 1e-9);
    printf("L %d, NH %d, C %d, V %d, context %d: %.1fM parameters; %s\n", config.L, config.NH, config.C,
           config.V, config.max_T, (double)gpt2_parameters(&config) * 1e-6,
           newest >= 0 ? "resumed" : text("-e"));
    printf("%lld tokens in %lld shards; steps %lld to %lld of %lld tokens, %lld micro-batches of %d x %d\n",
           (wide)tokens, (wide)shards, begin, steps, total, micro_batches, B, T);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    for (wide step = begin;; step++) {
        const int last = step >= steps;
        const int due = every && step != newest && (last || (step && step % every == 0));
        float loss;
        if (due || (interrupted && *out))
            must(!gpt2_checkpoint(out, model, loader, &progress, every, whole("-nk"), whole("-nm")));
        if (interrupted) break;
        if (val && (last || (whole("-v") && step % whole("-v") == 0))) {
            must(!gpt2_evaluate(model, val, whole("-m"), &loss));
            printf("val loss %.4f\n", loss);
            if (log) fprintf(log, "s:%lld tel:%.4f\n", step, loss);
        }
        if (whole("-g") && (last || (whole("-s") && step && step % whole("-s") == 0)))
            sample(model, tokenizer, &progress, config.V == 256 ? '\n' : end, whole("-g"));
        if (last) break;

        const double tick = seconds();
        double mean = 0;
        for (wide micro = 0; micro < micro_batches; micro++) {
            if (whole("-a")) gpt2_loader_reset(loader);
            must(!gpt2_loader_next(loader, x, x + BT));
            must(!gpt2_forward(model, x, x + BT, B, T, 1.0f / (float)micro_batches, &loss));
            must(!gpt2_backward(model));
            mean += (double)loss / (double)micro_batches;
        }
        const float lr = gpt2_lr(text("-k"), step, steps, whole("-u"), (float)real("-l"), (float)real("-q"));
        const double norm = gpt2_grad_norm(model), most_loss = real("-sl"), most_norm = real("-sg");
        const double z_loss = gpt2_zscore(&progress, 0, mean), z_norm = gpt2_zscore(&progress, 1, norm);
        const int skip = (most_loss > 0 && z_loss > most_loss) || (most_norm > 0 && z_norm > most_norm);
        if (!isfinite(mean) || !isfinite(norm))
            must(!gpt2_fail("step %lld has loss %f and gradient norm %f: it diverged; use a lower learning "
                            "rate", step, mean, norm));
        must(skip || !gpt2_update(model, lr, 0.9, 0.95, 1e-8, real("-c"), 1));
        gpt2_zero_grad(model);
        progress.step = step + 1;
        const double took = seconds() - tick, left = (seconds() - began) / (double)(step + 1 - begin);
        printf("step %lld/%lld | loss %.6f | lr %.2e | norm %.4f | %.0f ms | %.0f tok/s | ", step + 1, steps,
               mean, lr, norm, took * 1e3, (double)total / took);
        printf("%.0f%% of ceiling | %.0f s left%s\n", 100 * flops * (double)total / took / ceiling,
               left * (double)(steps - step - 1), skip ? " | an outlier, skipped" : "");
        fflush(stdout);
        if (log) fprintf(log, "s:%lld trl:%.4f lr:%.6f norm:%.2f\n", step, mean, lr, norm);
        if (log) fflush(log);
    }
    if (interrupted)
        printf("interrupted after step %lld; %s\n", (wide)progress.step,
               *out ? "the same command with -y 1 resumes" : "without -o nothing was saved");
    if (log) fclose(log);
    free(x);
    gpt2_loader_close(loader);
    gpt2_loader_close(val);
    gpt2_tokenizer_free(tokenizer);
    gpt2_free(model);
    return interrupted ? 130 : 0;
}
#endif /* GPT2_NO_MAIN */
#endif /* GPT2_API_ONLY */
