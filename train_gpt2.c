/* GPT-2 training on a CPU, in fp32, with nothing but a C compiler.

     make                                      builds ./train_gpt2 and libgpt2.so from this file
     ./train_gpt2 -e d12 -i 'train_*.bin' -j 'val_*.bin' -o run
     ./train_gpt2 --help                       lists every flag

   GPT-2 (Radford et al. 2019), forward and backward, AdamW, and the files of a run. train_gpt2.py encodes
   text.

     1. The C API      what the driver, the tests and main() call
     2. The model      layers, attention, GPT-2, AdamW, matrix product
     3. The host code  model files, token shards, schedule, sampling, checkpoints, comparison with a reference
     4. main           the command line

   The host code calls the model only through the API, so train_gpt2.cu can replace it. -DGPT2_NO_MODEL
   leaves out section 2, -DGPT2_NO_MAIN section 4; -DGPT2_API_ONLY stops after section 1. */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

/* ===========================================================================================================
   1. The C API
   Functions return 0 or a pointer; on failure -1 or NULL, and gpt2_error() explains it in a sentence (per
   thread). None prints or exits. The caller owns arrays.
   B sequences of T positions, C channels, NH heads, L layers, vocabulary size V; wte has Vp rows, V rounded
   up to a multiple of 128.
   ======================================================================================================== */
#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)
#define GPT2_VERSION "1.0.0"
/* Raised whenever a signature, a struct or the meaning of an argument below changes: train_gpt2.py rejects a
   library of another version, which it would call with the wrong types. */
enum { GPT2_API_VERSION = 2 };
typedef struct GPT2 GPT2;                 /* parameters, gradients, moments, activations */
typedef struct { int32_t max_T, V, L, NH, C; } GPT2Config;
/* The tensors in file order. */
enum { GPT2_WTE, GPT2_WPE,
       GPT2_LN1W, GPT2_LN1B, GPT2_QKVW, GPT2_QKVB, GPT2_ATTPROJW, GPT2_ATTPROJB,
       GPT2_LN2W, GPT2_LN2B, GPT2_FCW, GPT2_FCB, GPT2_FCPROJW, GPT2_FCPROJB,
       GPT2_LNFW, GPT2_LNFB, GPT2_TENSORS };
static inline int gpt2_is_stacked(int tensor) {     /* has the layers as its first dimension */
    return tensor >= GPT2_LN1W && tensor <= GPT2_FCPROJB;
}
enum { GPT2_DIFFS = GPT2_TENSORS + 2, GPT2_WINDOW = 128 };
enum { GPT2_PARAM, GPT2_GRAD, GPT2_MOMENT1, GPT2_MOMENT2 };     /* the kinds of a tensor */
const char *gpt2_error(void);
const char *gpt2_version(void);
int gpt2_api_version(void);                      /* GPT2_API_VERSION when the library was built */
/* What makes checkpoints less safe, such as a file system without fsync, in a sentence (per thread), or "".
   Reading it clears it. */
const char *gpt2_warning(void);

/* --- the model (section 2) --- */
GPT2 *gpt2_create(const GPT2Config *config);     /* all parameters 0; see gpt2_init, gpt2_load */
/* The same, but maps fp32 parameters from byte 1024 of an open file, privately: changes stay in memory. Reads
   them where the file system cannot map files. Truncating the file would end the process, so files are always
   replaced. */
GPT2 *gpt2_create_mapped(const GPT2Config *config, int file);
void gpt2_free(GPT2 *model);                     /* NULL is allowed, as for the other free functions */
/* GPU only. "-r" 0, 1, 2: recompute nothing, GELU, or layer norm too; more if memory is short. "-w" 0: no
   fp32 master weights, stochastic rounding to bf16. */
int gpt2_option(GPT2 *model, const char *name, int value);
GPT2Config gpt2_config(const GPT2 *model);
/* Copy elements first … first + count - 1 of a tensor (GPT2_WTE…) of a kind. */
int gpt2_get(GPT2 *model, int tensor, int kind, int64_t first, int64_t count, float *out);
int gpt2_set(GPT2 *model, int tensor, int kind, int64_t first, int64_t count, const float *in);

/* x and targets y are (B,T); *loss is the mean cross-entropy in nats per token. Unless grad_scale is 0,
   gpt2_backward must follow; both add to the gradients of grad_scale · loss. Use 1/n for n micro-batches. */
int gpt2_forward(GPT2 *m, const int32_t *x, const int32_t *y, int B, int T, float grad_scale, float *loss);
int gpt2_backward(GPT2 *model);
const float *gpt2_losses(GPT2 *model);           /* (B,T), of the tokens of the last gpt2_forward, or NULL */
void gpt2_zero_grad(GPT2 *model);

/* Logits, out (B,T,V), or with last_only those of the last position, (B,V). With last_only and B = 1 keys and
   values are cached: another call with the same prefix computes only the new tokens. */
int gpt2_logits(GPT2 *model, const int32_t *x, int B, int T, int last_only, float *out);

/* One AdamW step (Loshchilov & Hutter 2019, algorithm 2), then zeroes the gradients. Clips their global norm
   to max_norm unless 0; decays 2-D tensors. Fails, changing nothing, if the norm is infinite or NaN, lr is
   1e10 or more, a beta is not from 0 to below 1, or eps is 0 as a float or less. */
int gpt2_update(GPT2 *m, double lr, double beta1, double beta2, double eps, double decay, double max_norm);
float gpt2_grad_norm(GPT2 *model);               /* global L2 norm before clipping; NaN on failure */
int64_t *gpt2_updates(GPT2 *model);              /* number of updates, for the bias correction of moments */
const char *gpt2_device(void);                   /* "CPU, 2 threads, 8 floats per vector" */
double gpt2_ceiling(void);                       /* peak FLOP/s of this machine, measured in about 0.1 s */

/* --- the host code (section 3) --- */
/* Number of elements of a tensor, -1 for a bad index. name ("wte") and shape (L first if stacked, 0 where
   there is no dimension) may be NULL. */
int64_t gpt2_tensor(const GPT2Config *config, int index, const char **name, int64_t shape[3]);
enum { GPT2_DECAYED = 1 << GPT2_WTE | 1 << GPT2_WPE | 1 << GPT2_QKVW | 1 << GPT2_ATTPROJW | 1 << GPT2_FCW |
                      1 << GPT2_FCPROJW };       /* bit i: tensor i has weight decay */
int64_t gpt2_parameters(const GPT2Config *config);                 /* without padding */
double gpt2_flops_per_token(const GPT2Config *config, int T);      /* of a training step: 6 P + 6 L T C */
int gpt2_config_check(const GPT2Config *config);                   /* is the shape valid? */
int gpt2_descriptor(const char *text, GPT2Config *out);            /* "d12": V 50257, max_T 1024 */
int gpt2_init(GPT2 *model, uint64_t seed);       /* as GPT-2: N(0, 0.02), residual projections / sqrt(2 L) */
GPT2 *gpt2_load(const char *path);               /* model file, version 3 (fp32) or 5 (bf16); verifies the */
int gpt2_save(GPT2 *model, const char *path, int version);     /* checksum, if there is one */

/* Batches of B sequences of T tokens from the shards that a glob matches, or several globs with '\n' between
   them, in order of names and each file once. No sequence crosses shards; an incomplete last batch of a shard
   is skipped. With shuffle each epoch has a new order of shards and of sequences, and a new offset. */
typedef struct GPT2Loader GPT2Loader;
GPT2Loader *gpt2_loader_open(const char *globs, int B, int T, int V, int shuffle, uint64_t seed);
void gpt2_loader_close(GPT2Loader *loader);
const int32_t *gpt2_loader_next(GPT2Loader *loader);     /* x (B,T), then y (B,T), until the next call */
void gpt2_loader_reset(GPT2Loader *loader);      /* to the first batch */
typedef struct { int64_t shards, tokens, batches; } GPT2Size;     /* batches in an unshuffled epoch */
GPT2Size gpt2_loader_size(const GPT2Loader *loader);
/* What a position in the data depends on. Fingerprint of the shards in order: sizes, and up to 16 blocks of
   4 KiB of each, evenly spaced (all of a shard of up to 64 KiB). */
typedef struct { int64_t T, tokens; uint64_t seed, fingerprint; } GPT2Data;
GPT2Data gpt2_loader_data(const GPT2Loader *loader);

/* Mean loss of the first `batches` batches, at most all. */
int gpt2_evaluate(GPT2 *model, GPT2Loader *loader, int64_t batches, float *loss);

/* HellaSwag (Zellers et al. 2019), `count` examples from `first` on: adds those answered correctly by the sum
   of the losses to right[0], by their mean to right[1]. Returns the number of examples in the file. */
int64_t gpt2_hellaswag(GPT2 *model, const char *path, int64_t first, int64_t count, int64_t right[2]);

/* Learning rate of step 0…steps-1: linear warm-up, then "cosine", "linear", "constant" or "wsd" (square-root
   decay in the last fifth), down to final_frac · lr. -1 on failure. */
float gpt2_lr(const char *schedule, int64_t step, int64_t steps, int64_t warmup, float lr, float final_frac);

/* Samples the next token; temperature 0 is greedy, top_k 0 allows all tokens, top_p is nucleus sampling;
   *rng is the state. Only ids with a nonzero byte in allowed (V) are sampled; NULL: all. Beyond max_T the
   first tokens are dropped, max_T / 2 at a time, so that caching works. -1 on failure. */
int gpt2_next(GPT2 *model, const int32_t *tokens, int64_t n, float temperature, int top_k, float top_p,
              const uint8_t *allowed, uint64_t *rng);

/* Decode table: token i is bytes[at[i] + 1 …], bytes[at[i]] of them; `end` is end-of-text, or -1. */
typedef struct { int32_t V, end; int64_t *at; unsigned char *bytes; } GPT2Tokenizer;
GPT2Tokenizer *gpt2_tokenizer_load(const char *path);
void gpt2_tokenizer_free(GPT2Tokenizer *tokenizer);

/* State of a run besides model and loader; zeroed for a new one. */
typedef struct {
    int64_t step;                         /* training steps done */
    uint64_t rng;                         /* of the sampler */
    int64_t seen[2];                      /* values put into each window so far */
    double window[2][GPT2_WINDOW];        /* 0: losses, 1: gradient norms */
} GPT2Progress;
/* z-score of a value, NaN until the window is full; then adds a finite value to it. */
double gpt2_zscore(GPT2Progress *progress, int window, double value);

/* Writes model_%08d.bin, state_%08d_00000.bin and, once both are on disk, DONE_%08d. Then removes the
   checkpoint keep · every steps before, unless keep is 0 or its step a multiple of major. loader may be
   NULL. After a failure this checkpoint has no files; what only makes it less safe is a gpt2_warning. */
int gpt2_checkpoint(const char *dir, GPT2 *model, const GPT2Loader *loader, const GPT2Progress *progress,
                    int64_t every, int64_t keep, int64_t major);
int64_t gpt2_newest(const char *dir);      /* step of the newest complete checkpoint; -1: none, -2: failure */
int64_t gpt2_newest_before(const char *dir, int64_t step);         /* the newest of those before a step */
/* Verifies the files of a checkpoint, their checksums included. *data is its loader's, zeroes without one. */
int gpt2_verify(const char *dir, int64_t step, GPT2Data *data);
/* Restores moments, loader and progress of a checkpoint whose model gpt2_load has loaded. */
int gpt2_restore(const char *dir, int64_t step, GPT2 *model, GPT2Loader *loader, GPT2Progress *progress);

/* Compares logits, loss and the 16 gradients with a saved reference. A row is ok if the L2 norm of the
   difference over that of the reference is within the tolerance. Returns how many are not. */
typedef struct { char name[16]; double max_abs, relative; int32_t ok, padding; } GPT2Diff;
int gpt2_check(GPT2 *model, const char *reference, double tolerance, GPT2Diff rows[GPT2_DIFFS]);
#pragma GCC visibility pop
int gpt2_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));     /* sets gpt2_error: -1 */
#ifdef __cplusplus
}
#endif

#ifndef GPT2_API_ONLY
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

#ifndef GPT2_NO_MODEL
/* === 2. The model ======================================================================================= */

/* --- Vectors -----------------------------------------------------------------------------------------------
   The vector extension, as wide as the target's registers: one source for every processor. */
#if defined(LANES)                        /* given: any of the three widths runs on any processor */
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else                                     /* SSE2, NEON, or neither */
#define LANES 4
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float v4 __attribute__((vector_size(16)));
#define SPLAT(x) ((x) - (vf){0})

/* Loads min(n, LANES) floats, and `fill` into the other lanes. memcpy is one unaligned move. */
static inline vf vload_fill(const float *p, size_t n, float fill) {
    vf v = SPLAT(fill);
    if (n >= LANES) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, n * sizeof *p);
    return v;
}
static inline vf vload(const float *p, size_t n) { return vload_fill(p, n, 0); }
static inline void vstore(float *p, vf v, size_t n) {
    if (n >= LANES) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, n * sizeof *p);
}

static inline vf vselect(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
static inline vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
static inline vf vsquare(vf v) { return v * v; }

static inline float vsum(vf v) {          /* in a fixed order */
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}
static inline float vtop(vf v) {          /* the largest lane */
    float top = v[0];
    for (int i = 1; i < LANES; i++)
        if (v[i] > top) top = v[i];
    return top;
}

/* e^x to about 1 ulp, with x = n ln 2 + r and |r| <= ln 2 / 2; 0 below -88, e^88 above 88; NaN stays NaN. */
static inline vf vexp(vf x) {
    const float magic = 12582912.0f;      /* 1.5 · 2^23: adding it rounds to an integer in the low bits */
    x = vselect(x < -88.0f, SPLAT(-88.0f), vselect(x > 88.0f, SPLAT(88.0f), x));
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;     /* ln 2 in two parts (Cody & Waite 1980) */
    static const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    vf series = SPLAT(1.0f / 5040);       /* Taylor series of e^r; the next term is below half an ulp */
#pragma GCC unroll 8
    for (int i = 0; i < 7; i++) series = series * r + factors[i];
    return series * (vf)(((vu)shifted + 127) << 23);     /* 2^n */
}

/* The size of equal pieces of n, a multiple of unit and at most about `most`. */
static size_t even_size(size_t n, size_t most, size_t unit) {
    const size_t pieces = (n + most - 1) / most;
    return round_up((n + pieces - 1) / pieces, unit);
}

/* --- Matrix product, declared ------------------------------------------------------------------------------
   Defined at the end of this section. Row and column strides let it serve all products of a linear layer. */
typedef struct { const float *p; size_t row, col; } Matrix;     /* p[i * row + j * col]; row or col is 1 */
static Matrix transposed(Matrix m) { return (Matrix){m.p, m.col, m.row}; }
static Matrix submatrix(Matrix m, size_t row, size_t col) {     /* from that element on */
    return (Matrix){m.p + row * m.row + col * m.col, m.row, m.col};
}

#if LANES == 16                           /* MR rows x NV vectors of C in registers; KC steps of k in L1 */
enum { MR = 8, NV = 3, KC = 96 };
#elif defined(__aarch64__)
enum { MR = 12, NV = 2, KC = 384 };
#else
enum { MR = 6, NV = 2, KC = 1536 / LANES };
#endif
enum { NR = NV * LANES, MC = 1056 };      /* columns of a panel of B; rows of a band of A */
enum { PACK_A = 1056 * MC, PACK_B = (KC + MC) * NR };     /* floats of buffers per thread */

typedef struct {
    int threads;
    float *pack_a, *pack_b;               /* (threads, PACK_A), (threads, PACK_B) */
    float *scratch;                       /* (threads, scratch_floats), for attention */
    size_t scratch_floats;
} Workspace;

/* c (M,N) = a (M,K) · b (K,N) + bias (N) + add (M,N), the last two unless NULL. Rows of c and of add
   are ldc apart; add may be c. */
static void gemm(const Workspace *ws, float *c, size_t ldc, Matrix a, Matrix b, size_t M, size_t N, size_t K,
                 const float *bias, const float *add);

/* --- Layers ------------------------------------------------------------------------------------------------
   Outputs first, dimensions last; N = B·T rows. With `add` a backward function accumulates gradients of
   parameters, otherwise it overwrites them. dev/doc/layers.md derives them all. */

/* Token and position embedding. */
static void encoder_forward(float *out,                            /* (N,C) = wte[x] + wpe[t] */
                            const int32_t *x, const float *wte, const float *wpe,
                            size_t N, size_t T, size_t C) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c++) out[n * C + c] = wte[(size_t)x[n] * C + c] + wpe[n % T * C + c];
}

/* Always accumulates: the classifier has written to dwte before. */
static void encoder_backward(float *dwte, float *dwpe,             /* (Vp,C), (max_T,C) */
                             const float *dout, const int32_t *x, size_t N, size_t T, size_t C) {
    enum { COLUMNS = 64 };                /* threads split the columns, since rows of equal tokens collide */
#pragma omp parallel for
    for (size_t first = 0; first < C; first += COLUMNS)
        for (size_t n = 0; n < N; n++)
            for (size_t c = first; c < min(first + COLUMNS, C); c++) {
                dwte[(size_t)x[n] * C + c] += dout[n * C + c];
                dwpe[n % T * C + c] += dout[n * C + c];
            }
}

/* Sums over rows, for the gradients of biases and of ln weights. */
static void column_sums(float *db, float *dw,                      /* (C) Σ dout, (C) Σ dout · norm or NULL */
                        const float *dout, const float *inp, const float *mean, const float *rstd,
                        size_t N, size_t C, int add) {
    enum { ROWS = 64 };                   /* partial sums: the error of one long sum would grow with N */
#pragma omp parallel for
    for (size_t c = 0; c < C; c += LANES) {
        vf sum_b = {0}, sum_w = {0};
        for (size_t first = 0; first < N; first += ROWS) {
            vf part_b = {0}, part_w = {0};
            for (size_t n = first; n < min(first + ROWS, N); n++) {
                vf d = vload(dout + n * C + c, C - c);
                part_b += d;
                if (dw) part_w += d * ((vload(inp + n * C + c, C - c) - mean[n]) * rstd[n]);
            }
            sum_b += part_b;
            sum_w += part_w;
        }
        if (add) sum_b += vload(db + c, C - c);
        vstore(db + c, sum_b, C - c);
        if (!dw) continue;
        if (add) sum_w += vload(dw + c, C - c);
        vstore(dw + c, sum_w, C - c);
    }
}

/* Layer normalization over the channels (Ba, Kiros & Hinton 2016): norm = (inp - mean) · rstd. */
static void layernorm_forward(float *out, float *mean, float *rstd,     /* (N,C) = norm · w + b; (N); (N) */
                              const float *inp, const float *w, const float *b, size_t N, size_t C) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *x = inp + n * C;
        vf sum = {0}, squares = {0};
        for (size_t c = 0; c < C; c += LANES) sum += vload(x + c, C - c);
        mean[n] = vsum(sum) / (float)C;
        for (size_t c = 0; c < C; c += LANES) squares += vsquare(vload_fill(x + c, C - c, mean[n]) - mean[n]);
        rstd[n] = 1.0f / sqrtf(vsum(squares) / (float)C + 1e-5f);
        for (size_t c = 0; c < C; c += LANES) {
            vf norm = (vload(x + c, C - c) - mean[n]) * rstd[n];
            vstore(out + n * C + c, norm * vload(w + c, C - c) + vload(b + c, C - c), C - c);
        }
    }
}

/* With g = w · dout: dinp += rstd · (g - mean(g) - norm · mean(g · norm)). */
static void layernorm_backward(float *dinp, float *dw, float *db,       /* (N,C), (C), (C) */
                               const float *dout, const float *inp, const float *w, const float *mean,
                               const float *rstd, size_t N, size_t C, int add) {
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
            vf g = vload(w + c, C - c) * vload(d + c, C - c), old = vload(dinp + n * C + c, C - c);
            vf norm = (vload(x + c, C - c) - mean[n]) * rstd[n];
            vstore(dinp + n * C + c, old + (g - mean_g - norm * mean_g_norm) * rstd[n], C - c);
        }
    }
    column_sums(db, dw, dout, inp, mean, rstd, N, C, add);
}

/* Linear layer with w (OC,C), and the residual stream (N,OC) added unless that is NULL. */
static void linear_forward(const Workspace *ws, float *out,        /* (N,OC) = inp (N,C)·wᵀ + b + residual */
                           const float *inp, const float *w, const float *b, const float *residual,
                           size_t N, size_t C, size_t OC) {
    gemm(ws, out, OC, (Matrix){inp, C, 1}, (Matrix){w, 1, C}, N, OC, C, b, residual);
}
static void linear_backward_input(const Workspace *ws, float *dinp,     /* (N,C) = dout (N,OC) · w */
                                  const float *dout, const float *w, size_t N, size_t C, size_t OC) {
    gemm(ws, dinp, C, (Matrix){dout, OC, 1}, (Matrix){w, C, 1}, N, C, OC, NULL, NULL);
}
static void linear_backward_weight(const Workspace *ws, float *dw,     /* (OC,C) = doutᵀ · inp */
                                   float *db,                          /* (OC) = Σ dout over rows */
                                   const float *dout, const float *inp, size_t N, size_t C, size_t OC,
                                   int add) {
    gemm(ws, dw, C, (Matrix){dout, 1, OC}, (Matrix){inp, C, 1}, OC, C, N, NULL, add ? dw : NULL);
    column_sums(db, NULL, dout, NULL, NULL, NULL, N, OC, add);
}

/* GELU in the tanh form (Hendrycks & Gimpel 2016): x/2 · (1 + tanh u) = x · σ(2u), with σ the logistic
   function and u = √(2/π) (x + 0.044715 x³). Unless dx is NULL, dx *= the derivative at inp. */
static void gelu(float *out, float *dx, const float *inp, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i += LANES) {
        vf x = vload(inp + i, n - i), twice_u = x * (1.59576912f + 0.0713548163f * x * x);
        vf sigma = 1.0f / (1.0f + vexp(-twice_u)), slope = 1.59576912f + 3 * 0.0713548163f * x * x;
        vstore(out + i, x * sigma, n - i);
        if (dx) vstore(dx + i, vload(dx + i, n - i) * (sigma + x * sigma * (1.0f - sigma) * slope), n - i);
    }
}

/* Replaces a row of n logits by scale · softmax(factor · row). Returns log Σ exp(factor · row). */
static float softmax(float *row, size_t n, float factor, float scale) {
    vf tops = SPLAT(-INFINITY), sums = {0};
    for (size_t i = 0; i < n; i += LANES) tops = vmax(vload_fill(row + i, n - i, -INFINITY), tops);
    const float top = vtop(tops) * factor;
    for (size_t i = 0; i < n; i += LANES) {
        const vf e = vexp(vload_fill(row + i, n - i, -INFINITY) * factor - top);
        vstore(row + i, e, n - i);
        sums += e;
    }
    const float sum = vsum(sums);
    for (size_t i = 0; i < n; i += LANES) vstore(row + i, vload(row + i, n - i) * (scale / sum), n - i);
    return top + logf(sum);
}

/* Replaces dp (n), the gradient of probabilities p (n), by factor · that of the logits: p · (dp - Σ p dp). */
static void softmax_backward(float *dp, const float *p, size_t n, float factor) {
    vf sums = {0};
    for (size_t i = 0; i < n; i += LANES) sums += vload(p + i, n - i) * vload(dp + i, n - i);
    const float sum = vsum(sums);
    for (size_t i = 0; i < n; i += LANES)
        vstore(dp + i, vload(p + i, n - i) * (vload(dp + i, n - i) - sum) * factor, n - i);
}

/* Cross-entropy, forward and backward: rows of V logits, Vp apart, become scale · (softmax - one-hot(y)). */
static void crossentropy(float *losses, float *logits,             /* (N) = -log softmax(logits)[y]; (N,Vp) */
                         const int32_t *y, size_t N, size_t V, size_t Vp, float scale) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        float *row = logits + n * Vp, target = row[y[n]];
        losses[n] = softmax(row, V, 1, scale) - target;
        row[y[n]] -= scale;
    }
}

/* --- Attention ---------------------------------------------------------------------------------------------
   Causal: out = softmax(q·kᵀ / √hs)·v for each head of hs = C / NH channels. A thread computes a head in
   strips of QUERIES rows of scores, which fit L2, never a T × T matrix; the backward pass recomputes them. */
enum { QUERIES = 96 };

static size_t attention_floats(size_t T) { return 2 * QUERIES * T; }     /* scratch: two strips of scores */

/* The part of a workspace for the current thread. */
static Workspace thread_workspace(const Workspace *ws) {
    const size_t i = (size_t)omp_get_thread_num();
    float *scratch = ws->scratch + i * ws->scratch_floats;
    return (Workspace){1, ws->pack_a + i * PACK_A, ws->pack_b + i * PACK_B, scratch, 0};
}

/* p (rows,T): the probabilities of queries q … q + rows - 1, softmax(factor · q·kᵀ), 0 for later keys. */
static void attention_scores(const Workspace *ws, float *p, Matrix Q, Matrix K, size_t q, size_t rows,
                             size_t T, size_t hs, float factor) {
    gemm(ws, p, T, submatrix(Q, q, 0), transposed(K), rows, q + rows, hs, NULL, NULL);
    for (size_t i = 0; i < rows; i++) {
        softmax(p + i * T, q + i + 1, factor, 1);
        memset(p + i * T + q + i + 1, 0, (rows - i - 1) * sizeof *p);
    }
}

/* With B = 1, only the positions from `first` on are computed (generation). */
static void attention_forward(const Workspace *ws, float *out,     /* (B,T,C), or (T - first,C) */
                              const float *qkv,                    /* (B,T,3C) */
                              size_t B, size_t first, size_t T, size_t C, size_t NH) {
    const size_t hs = C / NH;
#pragma omp parallel for schedule(dynamic) num_threads(ws->threads)
    for (size_t head = 0; head < B * NH; head++) {
        const size_t b = head / NH, channel = head % NH * hs;
        const Matrix Q = {qkv + b * T * 3 * C + channel, 3 * C, 1}, K = submatrix(Q, 0, C);
        const Matrix V = submatrix(Q, 0, 2 * C);
        const Workspace own = thread_workspace(ws);
        for (size_t q = first; q < T; q += QUERIES) {
            const size_t rows = min(QUERIES, T - q);
            attention_scores(&own, own.scratch, Q, K, q, rows, T, hs, 1 / sqrtf((float)hs));
            const Matrix P = {own.scratch, T, 1};
            float *out_rows = out + (b * T + q - first) * C + channel;
            gemm(&own, out_rows, C, P, V, rows, hs, q + rows, NULL, NULL);
        }
    }
}

/* With P the probabilities and S the scores: dP = dout·vᵀ, dv = Pᵀ·dout, dq = dS·k, dk = dSᵀ·q. */
static void attention_backward(const Workspace *ws, float *dqkv,   /* (B,T,3C) */
                               const float *dout, const float *qkv,     /* (B,T,C), (B,T,3C) */
                               size_t B, size_t T, size_t C, size_t NH) {
    const size_t hs = C / NH, C3 = 3 * C;
    const float factor = 1 / sqrtf((float)hs);
#pragma omp parallel for schedule(dynamic) num_threads(ws->threads)
    for (size_t head = 0; head < B * NH; head++) {
        const size_t b = head / NH, channel = head % NH * hs;
        const Matrix Q = {qkv + b * T * C3 + channel, C3, 1}, K = submatrix(Q, 0, C);
        const Matrix V = submatrix(Q, 0, 2 * C), O = {dout + b * T * C + channel, C, 1};
        const Workspace own = thread_workspace(ws);
        float *p = own.scratch, *ds = p + QUERIES * T;
        float *dq = dqkv + b * T * C3 + channel, *dk = dq + C, *dv = dk + C;
        /* The last strip comes first: its queries see all keys, so it can overwrite dk and dv. */
        for (size_t strip = (T + QUERIES - 1) / QUERIES; strip-- > 0;) {
            const size_t q = strip * QUERIES, rows = min(QUERIES, T - q), keys = q + rows;
            const int last = keys == T;
            const Matrix P = {p, T, 1}, S = {ds, T, 1};
            attention_scores(&own, p, Q, K, q, rows, T, hs, factor);
            gemm(&own, ds, T, submatrix(O, q, 0), transposed(V), rows, keys, hs, NULL, NULL);
            for (size_t i = 0; i < rows; i++) softmax_backward(ds + i * T, p + i * T, keys, factor);
            gemm(&own, dq + q * C3, C3, S, K, rows, hs, keys, NULL, NULL);
            gemm(&own, dk, C3, transposed(S), submatrix(Q, q, 0), keys, hs, rows, NULL, last ? NULL : dk);
            gemm(&own, dv, C3, transposed(P), submatrix(O, q, 0), keys, hs, rows, NULL, last ? NULL : dv);
        }
    }
}

/* --- GPT-2 ---------------------------------------------------------------------------------------------- */
typedef union {                           /* pointers to the tensors of a kind */
    struct {
        float *wte, *wpe;                 /* (Vp, C), also of the classifier; (max_T, C) */
        float *ln1w, *ln1b;               /* (L, C) from here to fcprojb: stacked over layers */
        float *qkvw, *qkvb;               /* (L, 3C, C), (L, 3C) */
        float *attprojw, *attprojb;       /* (L, C, C), (L, C) */
        float *ln2w, *ln2b;               /* (L, C) */
        float *fcw, *fcb;                 /* (L, 4C, C), (L, 4C) */
        float *fcprojw, *fcprojb;         /* (L, C, 4C), (L, C) */
        float *lnfw, *lnfb;               /* (C) */
    };
    float *all[GPT2_TENSORS];
} Tensors;

enum { ACTIVATIONS = 18 };
typedef union {                           /* pointers to the activations, with N = B · T */
    struct {
        float *losses, *x, *mean, *rstd;  /* (N): x is int32; mean and rstd of the last layer norm */
        float *ln, *gelu;                 /* (N, C), (N, 4C) outputs of the last layer norm and GELU */
        float *logits;                    /* (chunk, Vp) */
        float *dresidual, *dln, *dhidden; /* gradients: (N, C); (N, C) of ln; (N, 4C) of fc or qkv */
        float *pack_a, *pack_b, *scratch; /* see Workspace */
        float *residual1, *residual2;     /* (N, C) the residual stream before attention, before the MLP */
        float *att, *fc, *qkv;            /* (N, C), (N, 4C) before GELU, (N, 3C) */
    };
    float *all[ACTIVATIONS];
} Activations;
_Static_assert(sizeof(Activations) == ACTIVATIONS * sizeof(float *), "ACTIVATIONS is their number");
#define INDEX_OF(activation) (offsetof(Activations, activation) / sizeof(float *))

/* What a forward pass is for: the first activation that each layer keeps; those before are shared. The
   backward pass recomputes layer norm and GELU, which is cheap. */
enum { TRAIN = INDEX_OF(residual1), GENERATE = INDEX_OF(qkv), EVALUATE = ACTIVATIONS };

struct GPT2 {
    GPT2Config config;
    size_t C, NH, L, V, Vp;
    float *memory[4];                     /* of each kind of tensor; NULL until needed */
    void *mapped;                         /* the mapped model file that holds the parameters, or NULL */
    size_t start[GPT2_TENSORS + 1];       /* of each tensor in a memory, and the end */
    int64_t updates;
    int grads_zero;                       /* gradients count as 0: the next backward pass overwrites them */
    int backward_due;                     /* the gradient of the classifier is added, those of blocks not */
    float norm;                           /* of the gradients, NaN if unknown */
    size_t B, T, chunk;                   /* of the last forward pass; chunk: rows per classifier call */
    size_t cached;                        /* leading tokens of x whose keys and values are in qkv */
    int purpose;                          /* TRAIN, GENERATE or EVALUATE */
    size_t act_start[ACTIVATIONS + 1];    /* of each activation of layer 0, and the end */
    size_t act_stride;                    /* from one layer to the next */
    float *act_memory;
    size_t act_count;                     /* floats there */
    Workspace ws;
};

static float *alloc_floats(size_t n) {    /* zeroed, aligned to a cache line */
    float *p = NULL;
    if (n < SIZE_MAX / 8) p = aligned_alloc(64, round_up(n * sizeof *p, 64));
    if (p) return memset(p, 0, n * sizeof *p);
    gpt2_fail("no memory for %.0f MB; reduce the model, the batch size or the sequence length",
              (double)n * 4e-6);
    return NULL;
}

static float *memory_of(GPT2 *m, int kind) {     /* allocated on first use */
    if (!m->memory[kind]) m->memory[kind] = alloc_floats(m->start[GPT2_TENSORS]);
    return m->memory[kind];
}

/* The tensors of a kind, of stacked ones layer l. */
static Tensors tensors(const GPT2 *m, int kind, size_t l) {
    Tensors t;
    for (int i = 0; i < GPT2_TENSORS; i++) {
        t.all[i] = m->memory[kind] + m->start[i];
        if (gpt2_is_stacked(i)) t.all[i] += l * ((m->start[i + 1] - m->start[i]) / m->L);
    }
    return t;
}

/* The activations of layer l, and the shared ones. */
static Activations activations(const GPT2 *m, size_t l) {
    Activations a;
    for (int i = 0; i < ACTIVATIONS; i++) {
        a.all[i] = m->act_memory + m->act_start[i];
        if (i >= m->purpose) a.all[i] += l * m->act_stride;
    }
    return a;
}

/* Lays out the activations for B × T tokens and a purpose, and allocates them. */
static int layout_activations(GPT2 *m, size_t B, size_t T, int purpose) {
    const size_t N = B * T, C = m->C, threads = (size_t)m->ws.threads, train = purpose == TRAIN;
    if ((double)N * (double)C * (double)m->L > 1e15)
        return gpt2_fail("a batch of %zu x %zu tokens does not fit into memory; reduce it", B, T);
    m->purpose = purpose;
    m->chunk = even_size(N, ((size_t)1 << 24) / m->Vp + 1, MR);     /* at most about 64 MB of logits */
    m->ws.scratch_floats = round_up(attention_floats(T), 16);
    const size_t sizes[ACTIVATIONS] = {
        [INDEX_OF(losses)] = N, [INDEX_OF(x)] = N, [INDEX_OF(mean)] = N, [INDEX_OF(rstd)] = N,
        [INDEX_OF(ln)] = N * C, [INDEX_OF(gelu)] = N * 4 * C, [INDEX_OF(logits)] = m->chunk * m->Vp,
        [INDEX_OF(dresidual)] = train * N * C, [INDEX_OF(dln)] = train * N * C,
        [INDEX_OF(dhidden)] = train * N * 4 * C,
        [INDEX_OF(pack_a)] = threads * PACK_A, [INDEX_OF(pack_b)] = threads * PACK_B,
        [INDEX_OF(scratch)] = threads * m->ws.scratch_floats,
        [INDEX_OF(residual1)] = N * C, [INDEX_OF(residual2)] = N * C,
        [INDEX_OF(att)] = N * C, [INDEX_OF(fc)] = N * 4 * C, [INDEX_OF(qkv)] = N * 3 * C,
    };
    for (int i = 0; i < ACTIVATIONS; i++) m->act_start[i + 1] = m->act_start[i] + round_up(sizes[i], 16);
    m->act_stride = m->act_start[ACTIVATIONS] - m->act_start[purpose];
    size_t total = m->act_start[ACTIVATIONS] + (m->L - 1) * m->act_stride;
    if (train) total += N * C;            /* residual1 after the last layer */
    if (total > m->act_count) {
        free(m->act_memory);
        m->act_memory = alloc_floats(total);
        m->act_count = 0;
        if (m->act_memory) m->act_count = total;
    }
    if (!m->act_memory) return -1;
    const Activations a = activations(m, 0);
    m->ws.pack_a = a.pack_a;
    m->ws.pack_b = a.pack_b;
    m->ws.scratch = a.scratch;
    return 0;
}

static size_t mapped_bytes(const GPT2 *m) { return 1024 + m->start[GPT2_TENSORS] * sizeof(float); }

GPT2 *gpt2_create(const GPT2Config *config) { return gpt2_create_mapped(config, -1); }

/* Reads the parameters of an open model file. */
static int params_read(GPT2 *m, int file) {
    const size_t size = m->start[GPT2_TENSORS] * sizeof(float);
    char *data = (char *)memory_of(m, GPT2_PARAM);
    if (!data) return -1;
    for (size_t done = 0; done < size;) {
        const ssize_t n = pread(file, data + done, size - done, (off_t)(1024 + done));
        if (n < 0) return gpt2_fail("cannot be read: %s", strerror(errno));
        if (n == 0) return gpt2_fail("cannot be read: it ends early");
        done += (size_t)n;
    }
    return 0;
}

GPT2 *gpt2_create_mapped(const GPT2Config *config, int file) {
    if (gpt2_config_check(config)) return NULL;
    GPT2 *m = (GPT2 *)alloc_floats(sizeof *m / sizeof(float) + 1);
    if (!m) return NULL;
    *m = (GPT2){.config = *config, .C = (size_t)config->C, .NH = (size_t)config->NH, .L = (size_t)config->L,
                .V = (size_t)config->V, .Vp = round_up((size_t)config->V, 128), .grads_zero = 1, .norm = NAN,
                .ws.threads = omp_get_max_threads()};
    for (int i = 0; i < GPT2_TENSORS; i++)
        m->start[i + 1] = m->start[i] + (size_t)gpt2_tensor(config, i, NULL, NULL);
    if (file >= 0) {
        void *at = mmap(NULL, mapped_bytes(m), PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
        if (at == MAP_FAILED) {           /* no memory, or the file system has no mmap */
            if (!params_read(m, file)) return m;
        } else {
            m->mapped = at;
            m->memory[GPT2_PARAM] = (float *)at + 256;
            return m;
        }
    } else if (memory_of(m, GPT2_PARAM)) {
        return m;
    }
    gpt2_free(m);
    return NULL;
}

void gpt2_free(GPT2 *m) {
    if (!m) return;
    if (m->mapped) {
        munmap(m->mapped, mapped_bytes(m));
        m->memory[GPT2_PARAM] = NULL;
    }
    for (int kind = 0; kind < 4; kind++) free(m->memory[kind]);
    free(m->act_memory);
    free(m);
}

GPT2Config gpt2_config(const GPT2 *m) { return m->config; }
int gpt2_option(GPT2 *m, const char *name, int value) {
    (void)m;
    (void)value;
    return gpt2_fail("%s is for GPUs only", name);
}
int64_t *gpt2_updates(GPT2 *m) { return &m->updates; }
void gpt2_zero_grad(GPT2 *m) {
    m->grads_zero = 1;
    m->backward_due = 0;
    m->norm = NAN;
}

/* The memory of a kind, after zeroing gradients that only count as 0. NULL between forward and backward. */
static float *readable_memory(GPT2 *m, int kind) {
    if (kind == GPT2_GRAD && m->backward_due) {
        gpt2_fail("the gradients are incomplete: call gpt2_backward after gpt2_forward");
        return NULL;
    }
    float *memory = memory_of(m, kind);
    if (memory && kind == GPT2_GRAD && m->grads_zero)
        memset(memory, 0, m->start[GPT2_TENSORS] * sizeof *memory);
    return memory;
}

/* Copies a part of a tensor to `out`, or from `in`; the other is NULL. */
static int tensor_copy(GPT2 *m, int t, int kind, int64_t first, int64_t count, float *out, const float *in) {
    const int64_t size = gpt2_tensor(&m->config, t, NULL, NULL);
    if (size < 0) return -1;
    if (kind < GPT2_PARAM || kind > GPT2_MOMENT2 || first < 0 || count < 0 || first > size - count)
        return gpt2_fail("elements %lld + %lld of kind %d of tensor %d requested, expected %lld elements in "
                         "kinds 0 to 3", (long long)first, (long long)count, kind, t, (long long)size);
    float *memory = readable_memory(m, kind);
    if (!memory) return -1;
    float *part = memory + m->start[t] + first;
    if (out) memcpy(out, part, (size_t)count * sizeof *out);
    if (!in) return 0;
    memcpy(part, in, (size_t)count * sizeof *in);
    if (kind == GPT2_PARAM) m->cached = 0;
    if (kind == GPT2_GRAD) {
        m->grads_zero = 0;
        m->norm = NAN;
    }
    return 0;
}

int gpt2_get(GPT2 *m, int tensor, int kind, int64_t first, int64_t count, float *out) {
    return tensor_copy(m, tensor, kind, first, count, out, NULL);
}
int gpt2_set(GPT2 *m, int tensor, int kind, int64_t first, int64_t count, const float *in) {
    return tensor_copy(m, tensor, kind, first, count, NULL, in);
}

static int tokens_check(const GPT2 *m, const char *what, const int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.V)
            return gpt2_fail("token %zu of %s is %d, expected 0 to %zu", i, what, tokens[i], m->V - 1);
    return 0;
}

/* Checks x (B,T) and allocates its activations. Returns the first token that is not cached, -1 on failure. */
static int64_t forward_begin(GPT2 *m, const int32_t *x, int B, int T, int purpose) {
    if (B < 1 || T < 1 || T > m->config.max_T)
        return gpt2_fail("batch is %d x %d tokens, expected sequences of 1 to %d, the model's context", B, T,
                         m->config.max_T);
    if (m->backward_due && !m->grads_zero)
        return gpt2_fail("the gradients are incomplete: call gpt2_backward after gpt2_forward");
    m->backward_due = 0;
    m->B = (size_t)B;
    m->T = (size_t)T;
    if (purpose != GENERATE) m->cached = 0;
    if (tokens_check(m, "x", x, m->B * m->T)) return -1;
    int room = T;
    if (purpose == GENERATE) room = m->config.max_T;
    if (!m->cached && layout_activations(m, m->B, (size_t)room, purpose)) return -1;
    int32_t *known = (int32_t *)activations(m, 0).x;
    int64_t first = 0;
    while (first + 1 < T && first < (int64_t)m->cached && x[first] == known[first]) first++;
    memcpy(known, x, m->B * m->T * sizeof *x);
    return first;
}

/* Embedding, blocks and the last layer norm, into the activation ln. Returns its rows, -1 on failure. */
static int64_t forward_blocks(GPT2 *m, const int32_t *x, int B, int T, int purpose) {
    const int64_t begin = forward_begin(m, x, B, T, purpose);
    if (begin < 0) return -1;
    const Workspace *ws = &m->ws;
    const size_t first = (size_t)begin, N = m->B * m->T - first, C = m->C;
    Tensors p = tensors(m, GPT2_PARAM, 0);
    Activations a = activations(m, 0);
    encoder_forward(a.residual1, x + first, p.wte, p.wpe + first * C, N, m->T, C);
    for (size_t l = 0; l < m->L; l++) {
        p = tensors(m, GPT2_PARAM, l);
        a = activations(m, l);
        float *next_residual = activations(m, l + 1).residual1;

        layernorm_forward(a.ln, a.mean, a.rstd, a.residual1, p.ln1w, p.ln1b, N, C);
        linear_forward(ws, a.qkv + first * 3 * C, a.ln, p.qkvw, p.qkvb, NULL, N, C, 3 * C);
        attention_forward(ws, a.att, a.qkv, m->B, first, m->T, C, m->NH);
        linear_forward(ws, a.residual2, a.att, p.attprojw, p.attprojb, a.residual1, N, C, C);

        layernorm_forward(a.ln, a.mean, a.rstd, a.residual2, p.ln2w, p.ln2b, N, C);
        linear_forward(ws, a.fc, a.ln, p.fcw, p.fcb, NULL, N, C, 4 * C);
        gelu(a.gelu, NULL, a.fc, N * 4 * C);
        linear_forward(ws, next_residual, a.gelu, p.fcprojw, p.fcprojb, a.residual2, N, 4 * C, C);
    }
    layernorm_forward(a.ln, a.mean, a.rstd, activations(m, m->L).residual1, p.lnfw, p.lnfb, N, C);
    m->cached = 0;
    if (purpose == GENERATE) m->cached = m->T;
    return (int64_t)N;
}

int gpt2_forward(GPT2 *m, const int32_t *x, const int32_t *y, int B, int T, float grad_scale, float *loss) {
    const int train = grad_scale != 0;
    if (train && !memory_of(m, GPT2_GRAD)) return -1;
    if (forward_blocks(m, x, B, T, train ? TRAIN : EVALUATE) < 0) return -1;
    if (tokens_check(m, "y", y, m->B * m->T)) return -1;
    const size_t N = m->B * m->T, C = m->C, V = m->V, Vp = m->Vp;
    const Matrix wte = {m->memory[GPT2_PARAM], C, 1};
    const Activations a = activations(m, 0);
    for (size_t n = 0; n < N; n += m->chunk) {     /* the classifier, a chunk of rows at a time */
        const size_t rows = min(m->chunk, N - n);
        const Matrix ln = {a.ln + n * C, C, 1}, logits = {a.logits, Vp, 1};
        gemm(&m->ws, a.logits, Vp, ln, transposed(wte), rows, V, C, NULL, NULL);
        crossentropy(a.losses + n, a.logits, y + n, rows, V, Vp, grad_scale / (float)N);
        if (!train) continue;
        float *dwte = m->memory[GPT2_GRAD];
        const int overwrite = n == 0 && m->grads_zero;
        gemm(&m->ws, a.dln + n * C, C, logits, wte, rows, C, V, NULL, NULL);
        gemm(&m->ws, dwte, C, transposed(logits), ln, V, C, rows, NULL, overwrite ? NULL : dwte);
    }
    double sum = 0;
    for (size_t n = 0; n < N; n++) sum += a.losses[n];
    *loss = (float)(sum / (double)N);
    m->backward_due = train;
    if (train) m->norm = NAN;
    return 0;
}

int gpt2_backward(GPT2 *m) {
    if (!m->backward_due)
        return gpt2_fail("gpt2_backward must follow a gpt2_forward with a gradient scale, once for each");
    const Workspace *ws = &m->ws;
    const size_t N = m->B * m->T, C = m->C;
    const int add = !m->grads_zero;
    Tensors p = tensors(m, GPT2_PARAM, 0), g = tensors(m, GPT2_GRAD, 0);
    Activations a = activations(m, m->L);
    float *dx = a.dresidual, *dln = a.dln, *dhidden = a.dhidden;
    memset(dx, 0, N * C * sizeof *dx);
    layernorm_backward(dx, g.lnfw, g.lnfb, dln, a.residual1, p.lnfw, a.mean, a.rstd, N, C, add);
    for (size_t l = m->L; l-- > 0;) {
        p = tensors(m, GPT2_PARAM, l);
        g = tensors(m, GPT2_GRAD, l);
        a = activations(m, l);

        linear_backward_input(ws, dhidden, dx, p.fcprojw, N, 4 * C, C);
        gelu(a.gelu, dhidden, a.fc, N * 4 * C);
        linear_backward_weight(ws, g.fcprojw, g.fcprojb, dx, a.gelu, N, 4 * C, C, add);
        layernorm_forward(a.ln, a.mean, a.rstd, a.residual2, p.ln2w, p.ln2b, N, C);     /* recomputed */
        linear_backward_weight(ws, g.fcw, g.fcb, dhidden, a.ln, N, C, 4 * C, add);
        linear_backward_input(ws, dln, dhidden, p.fcw, N, C, 4 * C);
        layernorm_backward(dx, g.ln2w, g.ln2b, dln, a.residual2, p.ln2w, a.mean, a.rstd, N, C, add);

        linear_backward_weight(ws, g.attprojw, g.attprojb, dx, a.att, N, C, C, add);
        linear_backward_input(ws, dln, dx, p.attprojw, N, C, C);
        attention_backward(ws, dhidden, dln, a.qkv, m->B, m->T, C, m->NH);
        layernorm_forward(a.ln, a.mean, a.rstd, a.residual1, p.ln1w, p.ln1b, N, C);     /* recomputed */
        linear_backward_weight(ws, g.qkvw, g.qkvb, dhidden, a.ln, N, C, 3 * C, add);
        linear_backward_input(ws, dln, dhidden, p.qkvw, N, C, 3 * C);
        layernorm_backward(dx, g.ln1w, g.ln1b, dln, a.residual1, p.ln1w, a.mean, a.rstd, N, C, add);
    }
    if (!add) memset(g.wpe, 0, (size_t)m->config.max_T * C * sizeof *g.wpe);
    encoder_backward(g.wte, g.wpe, dx, (const int32_t *)a.x, N, m->T, C);
    m->grads_zero = m->backward_due = 0;
    return 0;
}

int gpt2_logits(GPT2 *m, const int32_t *x, int B, int T, int last_only, float *out) {
    const int64_t rows = forward_blocks(m, x, B, T, last_only && B == 1 ? GENERATE : EVALUATE);
    if (rows < 0) return -1;
    size_t every = 1;                     /* of the rows: all, or the last of each sequence */
    if (last_only) every = (size_t)rows / m->B;
    const size_t C = m->C;
    const Matrix ln = {activations(m, 0).ln + (every - 1) * C, every * C, 1};
    const Matrix wte = {m->memory[GPT2_PARAM], C, 1};
    gemm(&m->ws, out, m->V, ln, transposed(wte), (size_t)rows / every, m->V, C, NULL, NULL);
    return 0;
}

const float *gpt2_losses(GPT2 *m) {
    if (!m->act_memory) return NULL;
    return activations(m, 0).losses;
}

/* --- AdamW -------------------------------------------------------------------------------------------------
   Threads take pieces of a fixed size, so that no sum depends on their number. */
enum { PIECE = 1 << 14, PARTS = 256 };

float gpt2_grad_norm(GPT2 *m) {
    if (!isnan(m->norm)) return m->norm;
    const float *g = readable_memory(m, GPT2_GRAD);
    if (!g) return NAN;
    const size_t count = m->start[GPT2_TENSORS];
    double sum = 0, squares[PARTS] = {0};
#pragma omp parallel for
    for (size_t i = 0; i < PARTS; i++)    /* a part is every PARTS-th piece */
        for (size_t first = i * PIECE; first < count; first += PARTS * PIECE) {
            vf lanes = {0};
            for (size_t k = first; k < min(first + PIECE, count); k += LANES)
                lanes += vsquare(vload(g + k, count - k));
            squares[i] += vsum(lanes);
        }
    for (size_t i = 0; i < PARTS; i++) sum += squares[i];
    m->norm = (float)sqrt(sum);
    return m->norm;
}

int gpt2_update(GPT2 *m, double lr, double beta1, double beta2, double eps, double decay, double max_norm) {
    const float *g = readable_memory(m, GPT2_GRAD);
    float *p = m->memory[GPT2_PARAM], *m1 = memory_of(m, GPT2_MOMENT1), *m2 = memory_of(m, GPT2_MOMENT2);
    if (!g || !m1 || !m2) return -1;
    const double norm = gpt2_grad_norm(m), n = (double)m->updates + 1;
    if (!(isfinite(norm) && fabs(lr) < 1e10))
        return gpt2_fail("gradient norm %f, learning rate %g: training diverged; lower the learning rate",
                         norm, lr);
    if (!(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1 && (float)eps > 0))
        return gpt2_fail("beta1 is %g, beta2 %g, eps %g, expected betas from 0 to below 1 and an eps above 0",
                         beta1, beta2, eps);
    m->updates++;
    const float epsilon = (float)eps;
    float clip = 1;
    if (max_norm > 0 && norm > max_norm) clip = (float)(max_norm / norm);
    const float keep1 = (float)beta1, add1 = (float)(1 - beta1), rate = (float)(lr / (1 - pow(beta1, n)));
    const float keep2 = (float)beta2, add2 = (float)(1 - beta2), scale2 = (float)(1 / (1 - pow(beta2, n)));
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const size_t end = m->start[t + 1];
        float keep = 1;                   /* weight decay */
        if (GPT2_DECAYED >> t & 1) keep = (float)(1 - lr * decay);
#pragma omp parallel for
        for (size_t first = m->start[t]; first < end; first += PIECE)
#pragma omp simd
            for (size_t i = first; i < min(first + PIECE, end); i++) {
                const float grad = g[i] * clip;
                m1[i] = keep1 * m1[i] + add1 * grad;
                m2[i] = keep2 * m2[i] + add2 * grad * grad;
                p[i] = keep * p[i] - rate * m1[i] / (sqrtf(m2[i] * scale2) + epsilon);
            }
    }
    gpt2_zero_grad(m);
    m->cached = 0;
    return 0;
}

/* --- Matrix product, defined -------------------------------------------------------------------------------
   C = A·B after Goto & van de Geijn (2008). A tile of MR × NR sums stays in registers while k runs. Panels of
   MR rows of A and of NR columns of B are packed in the order of reading:

     registers   MR × NV sums, NV vectors of B, a broadcast of A: 6 × 2 fill 16 registers, 8 × 3 fill 32
     L1          a panel of B, KC × NR floats
     L2          the sums so far of NR columns of C
     L2 and L3   a band of A, at most PACK_A floats

   Threads take NR columns of a band at a time. Each sum over k has a fixed order, so the bits do not depend
   on the number of threads. See dev/doc/gemm.md. */
enum { MIN_BAND = 264, BANDS = 64 };      /* least rows of a band, if there are as many; bands at a time */
enum { GROUP = 48 };                      /* rows of A packed at a time: whole cache lines */

static inline void transpose(v4 x[4]) {   /* by shuffles; element by element packing B took 5% of the time */
    for (int round = 0; round < 2; round++) {
        const v4 a = x[0], b = x[1], c = x[2], d = x[3];
        x[0] = (v4){a[0], c[0], a[1], c[1]};
        x[1] = (v4){a[2], c[2], a[3], c[3]};
        x[2] = (v4){b[0], d[0], b[1], d[1]};
        x[3] = (v4){b[2], d[2], b[3], d[3]};
    }
}

/* Packs adjacent lines (line == 1), whole panels only. Returns the lines done. */
static inline __attribute__((always_inline))
size_t pack_adjacent(float *dst, const float *src, size_t step, size_t lines, size_t kc, size_t R) {
    size_t first = 0, group;
    for (; first + R <= lines; first += group) {
        group = R;
        if (first + GROUP <= lines) group = GROUP;
        for (size_t k = 0; k < kc; k++)
            for (size_t r = 0; r < group; r += R)
                memcpy(dst + (first + r) * kc + k * R, src + k * step + first + r, R * sizeof *dst);
    }
    return first;
}

/* Packs `lines` lines of kc floats into panels of R, dst[panel][k][r] = src[(panel * R + r) * line + k *
   step], and 0 where there is no line. Inlined, so that R is a constant. */
static inline __attribute__((always_inline))
void pack(float *dst, const float *src, size_t line, size_t step, size_t lines, size_t kc, size_t R) {
    size_t first = 0;
    const size_t kc4 = kc / 4 * 4;
    if (line == 1) first = pack_adjacent(dst, src, step, lines, kc, R);
    for (; first < lines; first += R) {
        const float *s = src + first * line;
        float *d = dst + first * kc;
        const size_t n = min(R, lines - first);
        size_t by_four = 0;               /* lines packed four at a time */
        if (step == 1 && n >= 4) by_four = n;
        if (n < R) memset(d, 0, R * kc * sizeof *d);
        for (size_t at = 0; at < by_four; at += 4) {
            const size_t r = min(at, n - 4);     /* the last four may overlap the four before */
            for (size_t k = 0; k < kc4; k += 4) {
                v4 x[4];
                for (int i = 0; i < 4; i++) memcpy(x + i, s + (r + i) * line + k, sizeof *x);
                transpose(x);
                for (int i = 0; i < 4; i++) memcpy(d + (k + i) * R + r, x + i, sizeof *x);
            }
        }
        for (size_t r = 0; r < n; r++) {
            size_t k = 0;
            if (r < by_four) k = kc4;
            for (; k < kc; k++) d[k * R + r] = s[r * line + k * step];
        }
    }
}

/* The hot loop: c (MR,N) = a (kc,MR)ᵀ · b (kc,NR) + bias (N) + add (MR,N), the last two unless NULL; N is
   `vectors` vectors, a constant, so that the sums stay in registers. */
static inline __attribute__((always_inline))
void kernel(float *c, size_t ldc, const float *a, const float *b, size_t kc, const float *bias,
            const float *add, size_t ldadd, int vectors) {
    vf sum[MR][NV] = {{{0}}};
    for (size_t k = 0; k < kc; k++, a += MR, b += NR) {
        vf row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            if (j < vectors) row[j] = vload(b + j * LANES, LANES);
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++)
                if (j < vectors) sum[i][j] += a[i] * row[j];
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            if (j >= vectors) continue;
            vf result = sum[i][j];
            if (add) result += vload(add + i * ldadd + j * LANES, LANES);
            if (bias) result += vload(bias + j * LANES, LANES);
            vstore(c + i * ldc + j * LANES, result, LANES);
        }
}

/* The same for a tile with M rows and N columns left; one that ends inside a vector goes through a buffer. */
static void tile(float *c, size_t ldc, const float *a, const float *b, size_t kc, const float *bias,
                 const float *add, size_t ldadd, size_t M, size_t N) {
    float buffer[MR * NR], *out = c;
    const float *out_bias = bias, *out_add = add;
    size_t ldout = ldc;
    const int direct = M >= MR && (N >= NR || N % LANES == 0);
    if (!direct) {
        out = buffer;
        out_bias = out_add = NULL;
        ldout = NR;
    }
    if (N > NR - LANES) kernel(out, ldout, a, b, kc, out_bias, out_add, ldadd, NV);
    else if (N > LANES) kernel(out, ldout, a, b, kc, out_bias, out_add, ldadd, NV - 1);
    else kernel(out, ldout, a, b, kc, out_bias, out_add, ldadd, 1);
    if (direct) return;
    for (size_t i = 0; i < min(MR, M); i++)
        for (size_t j = 0; j < min(NR, N); j++) {
            float extra = 0;
            if (add) extra = add[i * ldadd + j];
            if (bias) extra += bias[j];
            c[i * ldc + j] = extra + buffer[i * NR + j];
        }
}

/* Prefetches part `part` of `parts` of the next panel of B. Waiting for it took 4% of the time with 256 rows,
   10% with 64. */
static inline void prefetch(Matrix b, size_t kc, size_t part, size_t parts) {
    const size_t lines = kc * NR / 16;    /* cache lines */
    for (size_t i = lines * part / parts; i < lines * (part + 1) / parts; i++) {
        size_t k = i / NR * 16, j = i % NR;
        if (b.col == 1) {
            k = i * 16 / NR;
            j = i * 16 % NR;
        }
        __builtin_prefetch(submatrix(b, k, j).p);
    }
}

typedef struct {                          /* c (M,N) = a (M,K) · b (K,N) + bias (N) + add (M,N), see gemm */
    float *c;
    size_t ldc, M, N, K, mc, kc;          /* bands of mc rows, kc steps of k at a time */
    Matrix a, b;
    const float *bias, *add;
} Product;

/* One panel of B, from column j on, times the packed band of A that starts at row m. */
static inline __attribute__((always_inline))
void band_times_panel(Product p, const float *pack_a, float *panel, size_t m, size_t rows, size_t j,
                      size_t j_next) {
    const size_t high = round_up(rows, MR), columns = min(NR, p.N - j);
    float *sums = panel + KC * NR;        /* (rows,NR) of the steps of k so far, in L2 */
    for (size_t k = 0; k < p.K; k += p.kc) {
        const size_t terms = min(p.kc, p.K - k);
        const int last = k + p.kc >= p.K;
        Matrix next = submatrix(p.b, k + p.kc, j);     /* to prefetch */
        if (last) next = submatrix(p.b, 0, j_next);
        pack(panel, submatrix(p.b, k, j).p, p.b.col, p.b.row, columns, terms, NR);
        for (size_t i = 0; i < rows; i += MR) {
            const size_t at = (m + i) * p.ldc + j;
            float *sum = sums + i * NR, *out = sum;
            const float *bias = NULL, *add = NULL;
            size_t ldout = NR, ldadd = p.ldc;
            if (k > 0) {
                add = sum;
                ldadd = NR;
            } else {                      /* the first step adds what the caller gave */
                if (p.bias) bias = p.bias + j;
                if (p.add) add = p.add + at;
            }
            if (last) {
                out = p.c + at;
                ldout = p.ldc;
            }
            prefetch(next, terms, i / MR, high / MR);
            tile(out, ldout, pack_a + k * high + i * terms, panel, terms, bias, add, ldadd, rows - i,
                 columns);
        }
    }
}

/* A thread packs a band of A, then takes panels of B; taken[band] counts them. Threads start at distant bands
   and, with many rows, rarely share one. */
static void gemm_share(const Workspace *ws, size_t thread, size_t *taken, Product p) {
    const size_t bands = (p.M + p.mc - 1) / p.mc, panels = (p.N + NR - 1) / NR, kc = p.kc;
    float *pack_a = ws->pack_a + thread * PACK_A, *panel = ws->pack_b + thread * PACK_B;
    for (size_t n = 0; n < bands; n++) {
        const size_t band = (thread * bands / (size_t)ws->threads + n) % bands, m = band * p.mc;
        const size_t rows = min(p.mc, p.M - m), high = round_up(rows, MR);
        size_t next, unit = __atomic_fetch_add(taken + band, 1, __ATOMIC_RELAXED);
        for (size_t k = 0; k < p.K && unit < panels; k += kc)
            for (size_t i = 0; i < rows; i += GROUP)
                pack(pack_a + k * high + i * min(kc, p.K - k), submatrix(p.a, m + i, k).p, p.a.row, p.a.col,
                     min(GROUP, rows - i), min(kc, p.K - k), MR);
        for (; unit < panels; unit = next) {
            next = __atomic_fetch_add(taken + band, 1, __ATOMIC_RELAXED);     /* before, to prefetch it */
            band_times_panel(p, pack_a, panel, m, rows, unit * NR, min(next, panels - 1) * NR);
        }
    }
}

/* gemm of one row, as in generation, at the speed of memory; packing took 2.5 times as long. By dot products
   where columns of B are contiguous, else by vectors of columns. */
static void gemm_row(const Workspace *ws, float *c, const float *a, Matrix b, size_t N, size_t K,
                     const float *bias, const float *add) {
    enum { CHAINS = 4, AHEAD = 16 };      /* chains hide the latency of an addition; rows to prefetch ahead */
    (void)ws;                             /* unused without OpenMP */
    const int contiguous = b.row == 1;
    size_t step = CHAINS * LANES;
    if (contiguous) step = 1;
#pragma omp parallel for num_threads(ws->threads) if (ws->threads > 1)
    for (size_t j = 0; j < N; j += step) {
        const float *p = b.p + j * b.col;
        vf sum[CHAINS] = {{0}};
        if (contiguous) {
            for (size_t k = 0; k < min(K, 128); k += 16) __builtin_prefetch(p + AHEAD * b.col + k);
            for (size_t k = 0; k < K; k += CHAINS * LANES)
                for (size_t i = 0, at = k; i < CHAINS && at < K; i++, at += LANES)
                    sum[i] += vload(a + at, K - at) * vload(p + at, K - at);
            sum[0] = (vf){vsum(sum[0] + sum[1] + (sum[2] + sum[3]))};
        } else {
            for (size_t k = 0; k < K; k++, p += b.row)
                for (size_t i = 0; i < CHAINS && j + i * LANES < N; i++) {
                    __builtin_prefetch(p + AHEAD * b.row + i * LANES);
                    sum[i] += a[k] * vload(p + i * LANES, N - j - i * LANES);
                }
        }
        for (size_t i = 0; i < min(step, N - j); i++) {
            float value = sum[i / LANES][i % LANES];
            if (bias) value += bias[j + i];
            if (add) value += add[j + i];
            c[j + i] = value;
        }
    }
}

static void gemm(const Workspace *ws, float *c, size_t ldc, Matrix a, Matrix b, size_t M, size_t N, size_t K,
                 const float *bias, const float *add) {
    if (M == 1 && a.col == 1) {
        gemm_row(ws, c, a.p, b, N, K, bias, add);
        return;
    }
    size_t most = MIN_BAND;               /* rows of a band */
    if (M / (size_t)ws->threads + 1 > MIN_BAND) most = min(M / (size_t)ws->threads + 1, MC);
    const size_t mc = even_size(M, round_up(most, MR), MR), kc = even_size(K, KC, 1);
    const size_t K_at_once = PACK_A / mc / kc * kc;     /* a band of A fits its buffer */
    for (size_t k = 0; k < K; k += K_at_once) {
        for (size_t m = 0; m < M; m += BANDS * mc) {
            size_t taken[BANDS] = {0};
            Product p = {c + m * ldc, ldc, min(BANDS * mc, M - m), N, min(K_at_once, K - k), mc, kc,
                         submatrix(a, m, k), submatrix(b, k, 0), bias, NULL};
            if (add) p.add = add + m * ldc;
            if (ws->threads == 1) {       /* attention: a parallel region would cost 1 µs */
                gemm_share(ws, 0, taken, p);
                continue;
            }
#pragma omp parallel num_threads(ws->threads)
            gemm_share(ws, (size_t)omp_get_thread_num(), taken, p);
        }
        bias = NULL;                      /* the next steps of k add to c */
        add = c;
    }
}

/* --- The machine ---------------------------------------------------------------------------------------- */
const char *gpt2_device(void) {
    static _Thread_local char text[64];
    const int threads = omp_get_max_threads();
    snprintf(text, sizeof text, "CPU, %d thread%s, %d floats per vector", threads, threads == 1 ? "" : "s",
             LANES);
    return text;
}

/* Multiply-adds in independent chains, enough to hide the latency of one; the best of some short runs. */
double gpt2_ceiling(void) {
    enum { CHAINS = 12, ROUNDS = 400000, RUNS = 12 };
    double best = 0, sink = 0;            /* sink is used, so that the loops are not optimized away */
    for (int run = 0; run < RUNS; run++) {
        const double start = seconds();
#pragma omp parallel for reduction(+ : sink)
        for (int thread = 0; thread < omp_get_max_threads(); thread++) {
            vf chain[CHAINS] = {{0}}, a = SPLAT(1.0000001f + (float)run * 1e-9f);
            for (int round = 0; round < ROUNDS; round++)
#pragma GCC unroll 12
                for (int i = 0; i < CHAINS; i++) chain[i] = a * chain[i] + 1e-9f * (float)i;
            for (int i = 0; i < CHAINS; i++) sink += chain[i][0];
        }
        best = fmax(best, 2.0 * LANES * CHAINS * ROUNDS * omp_get_max_threads() / (seconds() - start));
    }
    if (!(sink > 0)) return 0;
    return best;
}
#endif /* GPT2_NO_MODEL */

/* === 3. The host code =================================================================================== */
static _Thread_local char error_text[1024] = "no error";
const char *gpt2_error(void) { return error_text; }
const char *gpt2_version(void) { return GPT2_VERSION; }
int gpt2_api_version(void) { return GPT2_API_VERSION; }

static _Thread_local char warning_text[sizeof error_text], warning_shown[sizeof error_text];
const char *gpt2_warning(void) {
    memcpy(warning_shown, warning_text, sizeof warning_shown);
    *warning_text = 0;
    return warning_shown;
}

int gpt2_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    return -1;
}

static const char *plural(long long n) { return n == 1 ? "" : "s"; }

static int fail_in(const char *what, const char *name) {     /* puts the place before the sentence */
    char why[sizeof error_text];
    memcpy(why, error_text, sizeof why);
    return gpt2_fail("%s '%s': %s", what, name, why);
}

static void *alloc_bytes(size_t bytes) {  /* zeroed; one byte more, so that 0 bytes are no failure */
    void *p = calloc(bytes + 1, 1);
    if (!p) gpt2_fail("no memory for %zu byte%s", bytes, plural((long long)bytes));
    return p;
}

/* --- Shapes and initial values -------------------------------------------------------------------------- */
int64_t gpt2_tensor(const GPT2Config *config, int index, const char **name, int64_t shape[3]) {
    const int64_t T = config->max_T, L = config->L, C = config->C, Vp = (config->V + 127LL) / 128 * 128;
    const struct { const char *name; int64_t shape[3]; } table[] = {
        {"wte", {Vp, C}},           {"wpe", {T, C}},      {"ln1w", {L, C}},        {"ln1b", {L, C}},
        {"qkvw", {L, 3 * C, C}},    {"qkvb", {L, 3 * C}}, {"attprojw", {L, C, C}}, {"attprojb", {L, C}},
        {"ln2w", {L, C}},           {"ln2b", {L, C}},     {"fcw", {L, 4 * C, C}},  {"fcb", {L, 4 * C}},
        {"fcprojw", {L, C, 4 * C}}, {"fcprojb", {L, C}},  {"lnfw", {C}},           {"lnfb", {C}},
    };
    if (index < 0 || index >= GPT2_TENSORS)
        return gpt2_fail("tensor %d was requested, expected 0 to %d", index, GPT2_TENSORS - 1);
    const int64_t *s = table[index].shape;
    if (name) *name = table[index].name;
    if (shape) memcpy(shape, s, sizeof table[index].shape);
    int64_t elements = s[0];
    for (int i = 1; i < 3; i++)
        if (s[i]) elements *= s[i];
    return elements;
}

static int64_t tensors_size(const GPT2Config *c) {     /* elements of all tensors, with padding */
    int64_t total = 0;
    for (int i = 0; i < GPT2_TENSORS; i++) total += gpt2_tensor(c, i, NULL, NULL);
    return total;
}
int64_t gpt2_parameters(const GPT2Config *c) {
    return tensors_size(c) - (127 - (c->V + 127) % 128) * (int64_t)c->C;
}
double gpt2_flops_per_token(const GPT2Config *c, int T) {
    return 6.0 * (double)gpt2_parameters(c) + 6.0 * c->L * (double)T * c->C;
}

int gpt2_config_check(const GPT2Config *c) {     /* bounds that keep every product of sizes below 2^63 */
    if (c->max_T >= 1 && c->V >= 1 && c->L >= 1 && c->NH >= 1 && c->C >= 1 && c->C % c->NH == 0 &&
        c->max_T <= 1 << 24 && c->V <= 1 << 24 && c->L <= 1 << 12 && c->C <= 1 << 16)
        return 0;
    return gpt2_fail("model has context %d, V %d, L %d, NH %d, C %d, expected at least 1 each, C a multiple "
                     "of NH, L up to 4096, C up to 65536", c->max_T, c->V, c->L, c->NH, c->C);
}

int gpt2_descriptor(const char *text, GPT2Config *out) {     /* heads of 64 channels */
    static const char *names[] = {"d2", "d4", "d6", "d12", "d24", "d36", "d48"};
    static const int layers[] = {2, 4, 6, 12, 24, 36, 48}, heads[] = {2, 4, 6, 12, 16, 20, 25};
    for (int i = 0; i < 7; i++) {
        *out = (GPT2Config){.max_T = 1024, .V = 50257, .L = layers[i], .NH = heads[i], .C = 64 * heads[i]};
        if (!strcmp(text, names[i])) return 0;
    }
    return gpt2_fail("model descriptor is '%s', expected d2, d4, d6, d12, d24, d36 or d48", text);
}

/* A random number for each (key, counter), without a state: the mixing function of SplitMix64 (Steele, Lea &
   Flood 2014). */
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

static double normal_at(double deviation, uint64_t key, uint64_t at) {     /* Box & Muller (1958) */
    const double radius = deviation * sqrt(-2 * log(1 - uniform_at(key, at)));
    return radius * cos(6.283185307179586 * uniform_at(key, at + 1));
}

enum { PIECE_SIZE = 1 << 20 };            /* elements generated, read or written at a time */

/* Initial values of elements first … first + count - 1 of tensor t, of which only the first `used` are
   random. */
static void initial_values(float *values, uint64_t seed, int t, const char *name, int L, int64_t first,
                           int64_t count, int64_t used) {
    const int random = GPT2_DECAYED >> t & 1;     /* the 2-D tensors */
    double deviation = 0.02;
    if (strstr(name, "proj")) deviation = 0.02 / sqrt(2.0 * L);     /* the residual projections */
    const float constant = name[0] == 'l' && strchr(name, 'w');     /* ln weights are 1 */
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) {
        const uint64_t at = ((uint64_t)t << 56) + 2 * (uint64_t)(first + i);
        values[i] = constant;
        if (random && first + i < used) values[i] = (float)normal_at(deviation, seed, at);
    }
}

int gpt2_init(GPT2 *model, uint64_t seed) {
    const GPT2Config c = gpt2_config(model);
    float *values = alloc_bytes(PIECE_SIZE * sizeof *values);
    int failed = !values;
    for (int t = 0; t < GPT2_TENSORS && !failed; t++) {
        const char *name;
        const int64_t n = gpt2_tensor(&c, t, &name, NULL);
        int64_t used = n;
        if (t == GPT2_WTE) used = (int64_t)c.V * c.C;     /* padding rows are 0 */
        for (int64_t first = 0, count; first < n && !failed; first += count) {
            count = (int64_t)min(PIECE_SIZE, (size_t)(n - first));
            initial_values(values, seed, t, name, c.L, first, count, used);
            failed = gpt2_set(model, t, GPT2_PARAM, first, count, values);
        }
    }
    free(values);
    return failed ? -1 : 0;
}

/* --- Files: 256 int32, little-endian: a magic number, a version, … and a checksum; then the data -------- */
enum { MAGIC_MODEL = 20240326, MAGIC_REFERENCE, MAGIC_TABLE, MAGIC_SHARD = 20240520,
       MAGIC_CHOICE = 20240522, MAGIC_STATE = 20260601 };
typedef struct {
    FILE *f;
    const char *what, *path;              /* for messages: "model", its path */
    long long size;
    struct timespec changed;
    int32_t header[256];
} File;
typedef char Path[8192];                  /* longer than systems allow, so a truncated one is rejected */

/* Whether a file system lacks a feature, by the error of flock or fsync; other errors are failures. */
static int is_unsupported(int error) {
    return error == ENOSYS || error == ENOLCK || error == EOPNOTSUPP || error == ENOTSUP || error == ENODEV ||
           error == EBADF || error == EINVAL;
}

/* Flushes an open file to the disk, where the file system can. */
static int disk_flush(int file) {
    if (!fsync(file)) return 0;
    if (!is_unsupported(errno)) return -1;
    snprintf(warning_text, sizeof warning_text, "the file system cannot flush files to the disk (fsync: %s), "
             "so a power failure may damage them", strerror(errno));
    return 0;
}

/* Closes a file. After a failure, puts the file before the sentence about it and returns -1. */
static int file_close(File *in, int failed) {
    if (in->f) fclose(in->f);
    if (failed) return fail_in(in->what, in->path);
    return 0;
}

static int read_failed(FILE *f) {
    if (ferror(f)) return gpt2_fail("cannot be read: %s", strerror(errno));
    return gpt2_fail("cannot be read: it ends early");
}

static int file_read(File *in, void *out, size_t bytes) {
    if (fread(out, 1, bytes, in->f) == bytes) return 0;
    return read_failed(in->f);
}

/* The checksum is in the last 8 bytes of the header, which it skips; other programs have 0 there. Four lanes
   hide the latency of a multiplication; the shift lets high bits reach low ones. */
static int file_sum(FILE *f, uint64_t *sum) {
    enum { SUMS = 4, WORDS = 1 << 16 };
    uint64_t sums[SUMS] = {0}, *words = alloc_bytes(WORDS * sizeof *words);
    struct stat info;
    size_t at = 0;
    if (!words) return -1;
    rewind(f);
    for (size_t n; (n = fread(words, 1, WORDS * sizeof *words, f)) > 0; at += n) {
        memset((char *)words + n, 0, round_up(n, sizeof sums) - n);
        if (!at) words[127] = 0;
        for (size_t i = 0; i * sizeof *words < n; i += SUMS)
            for (size_t k = 0; k < SUMS; k++) {
                sums[k] = (sums[k] ^ words[i + k]) * 0x9E3779B97F4A7C15u;
                sums[k] ^= sums[k] >> 32;
            }
    }
    free(words);
    *sum = 1;
    for (size_t k = 0; k < SUMS; k++) *sum = random_at(*sum, sums[k]);
    if (!fstat(fileno(f), &info) && at == (size_t)info.st_size && !fseek(f, 1024, SEEK_SET)) return 0;
    return read_failed(f);
}

static int file_verify(File *in) {        /* its checksum, if it has one */
    uint64_t saved, sum;
    memcpy(&saved, in->header + 254, sizeof saved);
    if (!saved) return 0;
    if (file_sum(in->f, &sum)) return -1;
    if (sum == saved) return 0;
    return gpt2_fail("damaged: its checksum is wrong; use a copy, or an older checkpoint (remove the DONE "
                     "file of this one)");
}

/* Opens a regular file for reading, and reads and checks its header. */
static int file_open(File *in, const char *path, const char *what, int magic) {
    struct stat info;
    *in = (File){.what = what, .path = path};
    if (stat(path, &info)) return file_close(in, gpt2_fail("cannot be opened: %s", strerror(errno)));
    if (!S_ISREG(info.st_mode)) return file_close(in, gpt2_fail("not a regular file"));
    in->f = fopen(path, "rb");
    if (!in->f) return file_close(in, gpt2_fail("cannot be opened: %s", strerror(errno)));
    if (fread(in->header, sizeof in->header, 1, in->f) != 1 || in->header[0] != magic)
        return file_close(in, gpt2_fail("%lld byte%s, beginning with %d, expected 1024 or more and %d",
                                        (long long)info.st_size, plural(info.st_size), in->header[0], magic));
    in->size = info.st_size;
    in->changed = info.st_mtim;
    if (file_verify(in)) return file_close(in, -1);
    return 0;
}

/* bf16 is the upper half of a float: to nearest, ties to even; NaN stays NaN. */
static uint16_t bf16_of(uint32_t bits) {
    const uint32_t nan = (bits & 0x7FFFFFFF) > 0x7F800000, odd = bits >> 16 & 1;
    if (nan) return (uint16_t)((bits | 1 << 22) >> 16);
    return (uint16_t)((bits + 0x7FFF + odd) >> 16);
}

/* Reads or writes all tensors of a kind, as fp32 or bf16. */
static int tensors_copy(GPT2 *model, int kind, File *file, int bf16, int writing) {
    const GPT2Config c = gpt2_config(model);
    const size_t most = min(PIECE_SIZE, (size_t)tensors_size(&c));
    uint32_t *bits = alloc_bytes(most * (sizeof *bits + sizeof(uint16_t)));     /* of floats, then bf16 */
    if (!bits) return -1;
    uint16_t *halves = (uint16_t *)(bits + most);
    void *data = bits;
    size_t size = sizeof *bits;           /* of an element in the file */
    if (bf16) {
        data = halves;
        size = sizeof *halves;
    }
    int failed = 0;
    for (int t = 0; t < GPT2_TENSORS && !failed; t++) {
        const int64_t n = gpt2_tensor(&c, t, NULL, NULL);
        for (int64_t first = 0, count; first < n && !failed; first += count) {
            count = (int64_t)min(most, (size_t)(n - first));
            const size_t bytes = (size_t)count * size;
            if (writing) {
                failed = gpt2_get(model, t, kind, first, count, (float *)bits);
                for (int64_t i = 0; bf16 && i < count; i++) halves[i] = bf16_of(bits[i]);
                failed = failed || fwrite(data, 1, bytes, file->f) != bytes;
            } else {
                failed = file_read(file, data, bytes);
                for (int64_t i = 0; bf16 && i < count; i++) bits[i] = (uint32_t)halves[i] << 16;
                failed = failed || gpt2_set(model, t, kind, first, count, (float *)bits);
            }
        }
    }
    free(bits);
    return failed ? -1 : 0;
}

/* Writes header, extra bytes and the tensors of kinds from … to; atomically, and to the disk. */
static int file_write(const char *path, const int32_t header[256], const void *extra, size_t bytes,
                      GPT2 *model, int from, int to, int bf16) {
    char temporary[sizeof(Path) + 4];
    uint64_t sum;
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    File out = {.f = fopen(temporary, "w+b")};
    if (!out.f) return gpt2_fail("'%s' cannot be written: %s", path, strerror(errno));
    int failed = fwrite(header, 1024, 1, out.f) != 1 || fwrite(extra, 1, bytes, out.f) != bytes;
    for (; from <= to && !failed; from++) failed = tensors_copy(model, from, &out, bf16, 1);
    failed = failed || file_sum(out.f, &sum) || fseek(out.f, 1024 - sizeof sum, SEEK_SET) ||
             fwrite(&sum, sizeof sum, 1, out.f) != 1 || fflush(out.f) || disk_flush(fileno(out.f));
    if (!(fclose(out.f) || failed || rename(temporary, path))) return 0;
    gpt2_fail("'%s' cannot be written: %s", path, strerror(errno));
    unlink(temporary);
    return -1;
}

int gpt2_save(GPT2 *model, const char *path, int version) {
    const GPT2Config c = gpt2_config(model);
    const int32_t header[256] = {MAGIC_MODEL, version, c.max_T, c.V, c.L, c.NH, c.C, (c.V + 127) / 128 * 128};
    if (version == 3 || version == 5)
        return file_write(path, header, "", 0, model, GPT2_PARAM, GPT2_PARAM, version == 5);
    return gpt2_fail("model version is %d, expected 3 (fp32) or 5 (bf16)", version);
}

/* Reads the shape in a model file's header, and compares the file's size with it. */
static int model_shape(const File *in, GPT2Config *c) {
    const int32_t *h = in->header, version = h[1];
    *c = (GPT2Config){h[2], h[3], h[4], h[5], h[6]};
    int bytes = 4;                        /* of an element */
    if (version == 5) bytes = 2;
    if (gpt2_config_check(c)) return -1;
    if ((version == 3 || version == 5) && in->size == 1024 + tensors_size(c) * bytes) return 0;
    return gpt2_fail("version %d, context %d, V %d, L %d, NH %d, C %d, %lld bytes, expected version 3 or 5 "
                     "and the size of this shape", version, h[2], h[3], h[4], h[5], h[6], in->size);
}

GPT2 *gpt2_load(const char *path) {
    File in;
    GPT2Config c;
    if (file_open(&in, path, "model", MAGIC_MODEL)) return NULL;
    const int version = in.header[1];
    int failed = model_shape(&in, &c);
    GPT2 *model = NULL;
    if (!failed && version == 3) model = gpt2_create_mapped(&c, fileno(in.f));
    if (!failed && version == 5) {
        model = gpt2_create(&c);
        failed = model && tensors_copy(model, GPT2_PARAM, &in, 1, 0);
    }
    if (!file_close(&in, failed || !model)) return model;
    gpt2_free(model);
    return NULL;
}

/* --- Tokenizer table ------------------------------------------------------------------------------------ */
GPT2Tokenizer *gpt2_tokenizer_load(const char *path) {
    File in;
    if (file_open(&in, path, "tokenizer", MAGIC_TABLE)) return NULL;
    const long long V = in.header[2], end = in.header[3], size = in.size - 1024;
    long long i = 0, at = 0;              /* the next token, and where it begins */
    const int fits = in.header[1] == 2 && V > 0 && V <= size;
    GPT2Tokenizer *t = NULL;
    int failed = 0;
    if (fits) {
        t = alloc_bytes(sizeof *t + (size_t)V * sizeof *t->at + (size_t)size);     /* its arrays follow it */
        failed = !t;
    }
    if (t) {
        *t = (GPT2Tokenizer){.V = (int32_t)V, .end = -1, .at = (int64_t *)(t + 1)};
        if (end >= 0 && end < V) t->end = (int32_t)end;
        t->bytes = (unsigned char *)(t->at + V);
        failed = file_read(&in, t->bytes, (size_t)size);
        for (; !failed && i < V && at < size; at += 1 + t->bytes[at]) t->at[i++] = at;
    }
    if (!failed && (!fits || i < V || at != size))
        failed = gpt2_fail("version %d, %lld token%s, %lld byte%s, expected version 2, and a length and its "
                           "bytes for each token", in.header[1], V, plural(V), size, plural(size));
    if (!file_close(&in, failed)) return t;
    free(t);
    return NULL;
}

void gpt2_tokenizer_free(GPT2Tokenizer *t) { free(t); }

/* --- Loader --------------------------------------------------------------------------------------------- */
typedef struct {
    uint64_t epoch, shard, row;           /* of the next sequence; shard and row in the order of the epoch */
    uint64_t T, tokens, seed;             /* for which this position is valid */
} Position;

typedef struct { int64_t tokens; struct timespec changed; } Shard;     /* as first opened */

struct GPT2Loader {
    glob_t files;
    char **paths;                         /* of the shards: those in files, sorted and without duplicates */
    Shard *shards;                        /* of each path */
    GPT2Size size;
    int B, V, shuffle;
    Position at;
    uint64_t fingerprint;
    uint16_t *row;                        /* (T + 1) */
    int32_t *x;                           /* (2, B, T) */
};

/* The place of i in a random permutation of 0…n-1; key 0 is the identity. A Feistel network of four rounds,
   repeated until the result is below n (Black & Rogaway 2002). */
static uint64_t permuted(uint64_t i, uint64_t n, uint64_t key) {
    int half = 1;
    while (n > (uint64_t)1 << 2 * half) half++;
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    do
        for (uint64_t round = 0; key && round < 4; round++) {
            const uint64_t right = i & mask;
            i = right << half | ((i >> half ^ random_at(key + round, right)) & mask);
        }
    while (i >= n);
    return i;
}

/* Opens a shard, which must not have changed since it was first opened; `was` without tokens is filled in. */
static int shard_open(File *in, const char *path, Shard *was) {
    if (file_open(in, path, "token shard", MAGIC_SHARD)) return -1;
    const long long version = in->header[1], n = in->header[2];
    if (version != 1 || n < 0 || in->size != 1024 + 2 * n)
        return file_close(in, gpt2_fail("version %lld, %lld token%s, %lld bytes, expected version 1, and 2 "
                                        "bytes per token after 1024", version, n, plural(n), in->size));
    if (!was->tokens) *was = (Shard){n, in->changed};
    if (was->tokens == n && !memcmp(&was->changed, &in->changed, sizeof in->changed)) return 0;
    return file_close(in, gpt2_fail("changed while in use: %lld token%s, previously %lld; restore it, and "
                                    "resume", n, plural(n), (long long)was->tokens));
}

/* Adds a shard of n tokens to a fingerprint; see GPT2Data. */
static int shard_fingerprint(File *in, int64_t n, uint64_t *sum) {
    enum { BLOCKS = 16, WORDS = 512 };
    uint64_t words[WORDS];
    const size_t size = min(sizeof words, 2 * (size_t)n);
    *sum = random_at(*sum, (uint64_t)n);
    for (int64_t block = 0; block < BLOCKS; block++) {
        memset(words, 0, sizeof words);
        if (fseeko(in->f, (off_t)(1024 + (2 * n - (int64_t)size) * block / (BLOCKS - 1)), SEEK_SET))
            return read_failed(in->f);
        if (file_read(in, words, size)) return -1;
        for (int i = 0; i < WORDS; i++) {
            *sum = (*sum ^ words[i]) * 0x9E3779B97F4A7C15u;
            *sum ^= *sum >> 32;
        }
    }
    return 0;
}

void gpt2_loader_close(GPT2Loader *l) {
    if (!l) return;
    globfree(&l->files);
    free(l->paths);
    free(l->shards);
    free(l->row);
    free(l->x);
    free(l);
}

static int path_order(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* The paths that the globs match, one glob per line. */
static int loader_glob(GPT2Loader *l, const char *globs) {
    const size_t size = strlen(globs) + 1;
    char *lines = alloc_bytes(size), *rest = NULL, *line = NULL;
    int failed = 0, flags = 0;
    if (!lines) return -1;
    memcpy(lines, globs, size);
    for (line = strtok_r(lines, "\n", &rest); line && !failed; line = strtok_r(NULL, "\n", &rest)) {
        if (glob(line, flags, NULL, &l->files))
            failed = gpt2_fail("no token shards match '%s'; make some: python3 train_gpt2.py prepare", line);
        flags = GLOB_APPEND;
    }
    free(lines);
    const size_t found = l->files.gl_pathc;
    if (!failed && !found) failed = gpt2_fail("no token shards match '': it is no glob");
    if (failed || !(l->paths = alloc_bytes((found + 1) * sizeof *l->paths))) return -1;
    for (size_t i = 0; i < found; i++) l->paths[i] = l->files.gl_pathv[i];
    qsort(l->paths, found, sizeof *l->paths, path_order);
    size_t n = 0;
    for (size_t i = 0; i < found; i++)
        if (!n || strcmp(l->paths[n - 1], l->paths[i])) l->paths[n++] = l->paths[i];
    l->size.shards = (int64_t)n;
    return 0;
}

/* Finds the shards, and opens each for its number of tokens. */
static int loader_find(GPT2Loader *l, const char *globs) {
    const long long BT = (long long)l->B * (long long)l->at.T;
    if (loader_glob(l, globs)) return -1;
    l->shards = alloc_bytes((size_t)l->size.shards * sizeof *l->shards);
    l->row = alloc_bytes((l->at.T + 1) * sizeof *l->row);
    l->x = alloc_bytes(2 * (size_t)BT * sizeof *l->x);
    if (!l->shards || !l->row || !l->x) return -1;
    for (int64_t i = 0; i < l->size.shards; i++) {
        File in;
        if (shard_open(&in, l->paths[i], &l->shards[i])) return -1;
        const int64_t n = l->shards[i].tokens;
        if (file_close(&in, shard_fingerprint(&in, n, &l->fingerprint))) return -1;
        l->size.tokens += n;
        if (n) l->size.batches += (n - 1) / BT;
    }
    l->at.tokens = (uint64_t)l->size.tokens;
    if (l->size.batches) return 0;
    return gpt2_fail("the shards '%.*s' have %lld token%s, expected at least B T + 1 = %lld in one; reduce "
                     "the batch size or the sequence length", (int)strcspn(globs, "\n"), globs,
                     (long long)l->size.tokens, plural(l->size.tokens), BT + 1);
}

GPT2Loader *gpt2_loader_open(const char *globs, int B, int T, int V, int shuffle, uint64_t seed) {
    GPT2Loader *l = alloc_bytes(sizeof *l);
    if (!l) return NULL;
    *l = (GPT2Loader){.B = B, .V = V, .shuffle = shuffle, .at = {.T = (uint64_t)T, .seed = seed},
                      .fingerprint = 1};
    if (B < 1 || T < 1 || V < 1) gpt2_fail("loader has B %d, T %d, V %d, expected at least 1 each", B, T, V);
    else if (!loader_find(l, globs)) return l;
    gpt2_loader_close(l);
    return NULL;
}

GPT2Size gpt2_loader_size(const GPT2Loader *l) { return l->size; }
GPT2Data gpt2_loader_data(const GPT2Loader *l) {
    return (GPT2Data){(int64_t)l->at.T, l->size.tokens, l->at.seed, l->fingerprint};
}
void gpt2_loader_reset(GPT2Loader *l) { l->at.epoch = l->at.shard = l->at.row = 0; }

typedef struct { uint64_t file, key, offset, rows; } Place;     /* a shard, in the order of the epoch */

/* The shard of the next batch: moves on until one has B sequences left. */
static Place loader_place(GPT2Loader *l) {
    Position *at = &l->at;
    const uint64_t B = (uint64_t)l->B, T = at->T, shards = (uint64_t)l->size.shards;
    for (;; at->shard++, at->row = 0) {
        Place p = {0};
        at->epoch += at->shard / shards;
        at->shard %= shards;
        if (l->shuffle) p.key = random_at(at->seed, at->epoch);
        p.file = permuted(at->shard, shards, p.key);
        if (l->shuffle) p.key = random_at(p.key, p.file);
        const uint64_t size = (uint64_t)l->shards[p.file].tokens;
        if (size > p.key % T + B * T) p.offset = p.key % T;     /* a small shard keeps its only batch */
        if (size) p.rows = (size - 1 - p.offset) / T;
        if (B <= p.rows && at->row <= p.rows - B) return p;
    }
}

const int32_t *gpt2_loader_next(GPT2Loader *l) {
    const Place p = loader_place(l);
    const uint64_t B = (uint64_t)l->B, T = l->at.T;
    int32_t *x = l->x, *y = l->x + B * T;
    File in;
    int failed = 0;
    if (shard_open(&in, l->paths[p.file], &l->shards[p.file])) return NULL;
    for (uint64_t b = 0; b < B && !failed; b++) {
        const uint64_t first = p.offset + T * permuted(l->at.row + b, p.rows, p.key);
        if (fseeko(in.f, (off_t)(1024 + 2 * first), SEEK_SET)) failed = read_failed(in.f);
        else failed = file_read(&in, l->row, 2 * (T + 1));
        for (uint64_t t = 0; t <= T && !failed; t++)
            if (l->row[t] >= l->V)
                failed = gpt2_fail("token %lld is %d, expected less than V = %d; the shard has another "
                                   "vocabulary",
                                   (long long)(first + t), l->row[t], l->V);
        for (uint64_t t = 0; t < T; t++) {
            x[b * T + t] = l->row[t];
            y[b * T + t] = l->row[t + 1];
        }
    }
    if (file_close(&in, failed)) return NULL;
    l->at.row += B;
    return x;
}

/* --- Schedule and z-score ------------------------------------------------------------------------------- */
float gpt2_lr(const char *schedule, int64_t step, int64_t steps, int64_t warmup, float lr, float final_frac) {
    const double done = (double)(step - warmup) / fmax(1, (double)(steps - warmup));     /* since warm-up */
    double left = 1;                      /* of what decays */
    if (!strcmp(schedule, "cosine")) left = 0.5 * (1 + cos(3.141592653589793 * done));
    else if (!strcmp(schedule, "linear")) left = 1 - done;
    else if (!strcmp(schedule, "wsd")) left = 1 - sqrt(fmax(0, 5.0 * (double)step / (double)steps - 4));
    else if (strcmp(schedule, "constant"))
        return (float)gpt2_fail("schedule is '%s', expected cosine, linear, constant or wsd", schedule);
    if (step < warmup) return (float)((double)lr * (double)(step + 1) / (double)warmup);
    return (float)(lr * (final_frac + (1.0 - final_frac) * left));
}

double gpt2_zscore(GPT2Progress *p, int window, double value) {
    double *values = p->window[window], n = GPT2_WINDOW, mean = 0, variance = 0;
    if (!isfinite(value)) return NAN;
    for (int i = 0; i < GPT2_WINDOW; i++) mean += values[i] / n;
    for (int i = 0; i < GPT2_WINDOW; i++) variance += (values[i] - mean) * (values[i] - mean) / n;
    values[p->seen[window]++ % GPT2_WINDOW] = value;
    if (p->seen[window] <= GPT2_WINDOW) return NAN;
    if (variance > 0) return (value - mean) / sqrt(variance);
    return 0;
}

/* --- Evaluation and HellaSwag --------------------------------------------------------------------------- */
int gpt2_evaluate(GPT2 *model, GPT2Loader *l, int64_t batches, float *loss) {
    if (batches > l->size.batches) batches = l->size.batches;
    double sum = 0;
    gpt2_loader_reset(l);
    for (int64_t i = 0; i < batches; i++) {
        const int32_t *x = gpt2_loader_next(l);
        if (!x || gpt2_forward(model, x, x + (size_t)l->B * l->at.T, l->B, (int)l->at.T, 0, loss)) return -1;
        sum += *loss;
    }
    *loss = (float)(sum / (double)batches);
    return 0;
}

/* An example is a list of uint16: 65535, its bytes, its index, the label, CHOICES, then length and tokens of
   the context and of each completion. */
enum { CHOICES = 4, EXAMPLE_HEADER = 6 };

/* Finds where the completions of an example of `size` uint16 begin, at their lengths; begin[CHOICES] is the
   end. Returns the longest length, -1 on failure. */
static int64_t find_completions(const uint16_t *e, size_t size, size_t max_T, size_t begin[CHOICES + 1]) {
    const size_t context = e[5];
    size_t longest = 0;
    int bad = !context || e[4] != CHOICES || e[3] >= CHOICES;
    begin[0] = EXAMPLE_HEADER + context;
    for (size_t i = 0; i < CHOICES && !bad; i++) {
        size_t length = 0;
        if (begin[i] < size) length = e[begin[i]];
        begin[i + 1] = begin[i] + 1 + length;
        if (length > longest) longest = length;
        bad = !length || begin[i + 1] > size || length > max_T;
    }
    if (bad) return gpt2_fail("expected a context and 4 completions of 1 to %zu tokens", max_T);
    return (int64_t)longest;
}

/* Adds 1 to right[0] if the label has the lowest sum of losses, to right[1] if the lowest mean. x has room
   for 2 · CHOICES · max_T tokens. */
static int score_example(GPT2 *model, const uint16_t *e, size_t size, int32_t *x, int64_t right[2]) {
    const size_t max_T = (size_t)gpt2_config(model).max_T, context = e[5];
    size_t begin[CHOICES + 1];
    const int64_t longest = find_completions(e, size, max_T, begin);
    if (longest < 0) return -1;
    const size_t kept = min(context, max_T + 1 - (size_t)longest);     /* the end of the context */
    const size_t T = kept + (size_t)longest - 1;
    for (size_t i = 0; i < CHOICES; i++)
        for (size_t t = 0; t <= T; t++) {
            size_t at = begin[i] + 1 + t - kept;
            if (t < kept) at = EXAMPLE_HEADER + context - kept + t;
            int32_t token = 0;            /* padding */
            if (at < begin[i + 1]) token = e[at];
            if (t < T) x[i * T + t] = token;
            if (t > 0) x[(CHOICES + i) * T + t - 1] = token;
        }
    float loss;
    if (gpt2_forward(model, x, x + CHOICES * T, CHOICES, (int)T, 0, &loss)) return -1;
    double least[2] = {INFINITY, INFINITY};
    size_t best[2] = {0};
    for (size_t i = 0; i < CHOICES; i++) {
        double sum = 0;
        const size_t length = e[begin[i]];
        for (size_t t = kept - 1; t < kept - 1 + length; t++) sum += gpt2_losses(model)[i * T + t];
        const double score[2] = {sum, sum / (double)length};
        for (int k = 0; k < 2; k++) {
            if (!(score[k] < least[k])) continue;
            least[k] = score[k];
            best[k] = i;
        }
    }
    for (int k = 0; k < 2; k++) right[k] += best[k] == e[3];
    return 0;
}

int64_t gpt2_hellaswag(GPT2 *model, const char *path, int64_t first, int64_t count, int64_t right[2]) {
    File in;
    if (file_open(&in, path, "HellaSwag file", MAGIC_CHOICE)) return -1;
    const size_t bytes = (size_t)in.size - 1024, max_T = (size_t)gpt2_config(model).max_T;
    const int64_t examples = in.header[2];
    uint16_t *e = alloc_bytes(bytes + 2 * EXAMPLE_HEADER);     /* room for a truncated header */
    int32_t *x = alloc_bytes(2 * CHOICES * max_T * sizeof *x);
    int failed = !e || !x || file_read(&in, e, bytes);
    if (!failed && (in.header[1] != 1 || examples < 0))
        failed = gpt2_fail("version %d, %lld example%s, expected version 1, 0 or more", in.header[1],
                           (long long)examples, plural(examples));
    size_t at = 0, size = 0;              /* in uint16 */
    for (int64_t i = 0; i < examples && i < first + count && !failed; i++, at += size) {
        char number[24];
        snprintf(number, sizeof number, "%lld", (long long)i);
        size = e[at + 1] / 2;
        if (e[at] != 65535 || size < EXAMPLE_HEADER || 2 * (at + size) > bytes)
            failed = gpt2_fail("missing or truncated");
        else if (i >= first) failed = score_example(model, e + at, size, x, right);
        if (failed) fail_in("example", number);
    }
    if (!failed && first + count >= examples && 2 * at < bytes)
        failed = gpt2_fail("it continues after its %lld example%s", (long long)examples, plural(examples));
    free(e);
    free(x);
    return file_close(&in, failed) ? -1 : examples;
}

/* --- Sampling ------------------------------------------------------------------------------------------- */
typedef struct { double number, sum; } Mass;     /* of the weights of at least some value */
static Mass mass_from(const float *weights, size_t n, float least) {
    double number = 0, sum = 0;
#pragma omp simd reduction(+ : number, sum)
    for (size_t i = 0; i < n; i++) {
        number += weights[i] >= least;
        sum += weights[i] >= least ? weights[i] : 0;
    }
    return (Mass){number, sum};
}

/* The largest value that at least `number` weights, with a sum of at least `sum`, reach. Bit by bit, since
   non-negative floats are ordered as their bits: sorting 50257 weights took a fifth of the time. */
static float least_weight(const float *weights, size_t n, double number, double sum) {
    union { uint32_t bits; float value; } least = {0}, higher;
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        higher.bits = least.bits | bit;
        const Mass mass = mass_from(weights, n, higher.value);
        if (mass.number >= number && mass.sum >= sum) least = higher;
    }
    return least.value;
}

/* Draws an index from softmax(logits / temperature), limited to top_k and top_p. Overwrites the logits. */
static int draw_token(float *logits, size_t V, int top, float temperature, int top_k, float top_p,
                      uint64_t *rng) {
    const double highest = logits[top];
    float *weights = logits, least = 0;
    for (size_t i = 0; i < V; i++) weights[i] = (float)exp((logits[i] - highest) / (double)temperature);
    if (top_k > 0) least = least_weight(weights, V, fmin(top_k, (double)V), 0);
    const double nucleus = top_p * mass_from(weights, V, least).sum;
    if (top_p < 1) least = fmaxf(least, least_weight(weights, V, 1, nucleus));
    double draw = mass_from(weights, V, least).sum * uniform_at(0, (*rng)++);
    for (size_t i = 0; i < V && draw >= 0; i++) {
        if (weights[i] < least || weights[i] == 0) continue;     /* 0: not allowed */
        draw -= weights[i];
        top = (int)i;
    }
    return top;
}

int gpt2_next(GPT2 *model, const int32_t *tokens, int64_t n, float temperature, int top_k, float top_p,
              const uint8_t *allowed, uint64_t *rng) {
    const GPT2Config c = gpt2_config(model);
    size_t excess = 0, unit = 1;
    if (n > c.max_T) excess = (size_t)(n - c.max_T);
    if (c.max_T > 1) unit = (size_t)c.max_T / 2;
    const int64_t first = (int64_t)round_up(excess, unit);
    float *logits = alloc_bytes((size_t)c.V * sizeof *logits);
    if (!logits || gpt2_logits(model, tokens + first, 1, (int)(n - first), 1, logits)) {
        free(logits);
        return -1;
    }
    for (int i = 0; i < c.V && allowed; i++)
        if (!allowed[i]) logits[i] = -INFINITY;
    int token = 0;
    for (int i = 1; i < c.V; i++)
        if (logits[i] > logits[token]) token = i;
    if (temperature > 0) token = draw_token(logits, (size_t)c.V, token, temperature, top_k, top_p, rng);
    const int diverged = !isfinite(logits[token]);
    free(logits);
    if (diverged) return gpt2_fail("the model's logits are NaN or infinite: its training diverged");
    return token;
}

/* --- Checkpoints ---------------------------------------------------------------------------------------- */
typedef struct { GPT2Progress progress; Position position; int64_t updates; } State;     /* then moments */
enum { FINGERPRINT = 8 };                 /* its place in the header; 0 in files of earlier versions */

enum { MODEL_FILE, STATE_FILE, DONE_FILE };     /* of a checkpoint, in the order of writing */
static const char *run_path(Path path, const char *dir, int which, int64_t step) {
    static const char *formats[] = {"%s/model_%08lld.bin", "%s/state_%08lld_00000.bin", "%s/DONE_%08lld"};
    snprintf(path, sizeof(Path), formats[which], dir, (long long)step);
    return path;
}

static void checkpoint_remove(const char *dir, int64_t step) {     /* DONE first: then it is incomplete */
    Path path;
    for (int which = DONE_FILE; which >= MODEL_FILE; which--) unlink(run_path(path, dir, which, step));
}

/* Flushes a directory, with which renames reach the disk. */
static int directory_flush(const char *dir) {
    DIR *d = opendir(dir);
    const int failed = !d || disk_flush(dirfd(d));
    if (failed) gpt2_fail("'%s' cannot be written: %s", dir, strerror(errno));
    if (d) closedir(d);
    return failed;
}

int gpt2_checkpoint(const char *dir, GPT2 *model, const GPT2Loader *loader, const GPT2Progress *progress,
                    int64_t every, int64_t keep, int64_t major) {
    Path path;
    const GPT2Config c = gpt2_config(model);
    State state = {.progress = *progress, .updates = *gpt2_updates(model)};
    if (loader) state.position = loader->at;
    int32_t header[256] = {MAGIC_STATE, 1, c.max_T, c.V, c.L, c.NH, c.C};
    if (loader) memcpy(header + FINGERPRINT, &loader->fingerprint, sizeof loader->fingerprint);
    const int64_t step = progress->step, old = step - keep * every;
    unlink(run_path(path, dir, DONE_FILE, step));     /* of another run, whose files are replaced */
    int failed = gpt2_save(model, run_path(path, dir, MODEL_FILE, step), 3);
    run_path(path, dir, STATE_FILE, step);
    failed = failed || file_write(path, header, &state, sizeof state, model, GPT2_MOMENT1, GPT2_MOMENT2, 0) ||
             directory_flush(dir);
    run_path(path, dir, DONE_FILE, step);
    failed = failed || file_write(path, header, "", 0, NULL, 0, -1, 0);
    if (failed) {
        checkpoint_remove(dir, step);
        return -1;
    }
    if (directory_flush(dir)) {           /* this checkpoint is complete and stays, and so do older ones */
        snprintf(warning_text, sizeof warning_text, "%s", error_text);
        return 0;
    }
    if (keep > 0 && old > 0 && old < step && !(major > 0 && old % major == 0)) checkpoint_remove(dir, old);
    return 0;
}

int64_t gpt2_newest_before(const char *dir, int64_t before) {
    long long newest = -1, step;
    char rest;
    DIR *d = opendir(dir);
    if (!d && errno != ENOENT) {
        gpt2_fail("run directory '%s' cannot be read: %s", dir, strerror(errno));
        return -2;
    }
    for (struct dirent *entry; d && (entry = readdir(d));)
        if (sscanf(entry->d_name, "DONE_%8lld%c", &step, &rest) == 1 && step > newest && step < before)
            newest = step;
    if (d) closedir(d);
    return newest;
}

int64_t gpt2_newest(const char *dir) { return gpt2_newest_before(dir, INT64_MAX); }

/* Opens the state of a checkpoint of a model of shape c, and reads all but the moments. */
static int state_open(File *in, const char *path, const GPT2Config *c, State *state, GPT2Data *data) {
    if (file_open(in, path, "training state", MAGIC_STATE)) return -1;
    const int fits = in->header[1] == 1 && !memcmp(in->header + 2, c, sizeof *c) &&
                     in->size == 1024 + (long long)sizeof *state + 8 * tensors_size(c);
    if (!fits) return file_close(in, gpt2_fail("of another model, expected that of the checkpoint"));
    if (file_read(in, state, sizeof *state)) return file_close(in, -1);
    const GPT2Progress *p = &state->progress;
    if ((uint64_t)(p->step | p->seen[0] | p->seen[1] | state->updates) >> 62)
        return file_close(in, gpt2_fail("step %lld, losses %lld, norms %lld, updates %lld, expected each "
                                        "from 0 to 2^62", (long long)p->step, (long long)p->seen[0],
                                        (long long)p->seen[1], (long long)state->updates));
    const Position *at = &state->position;
    *data = (GPT2Data){.T = (int64_t)at->T, .tokens = (int64_t)at->tokens, .seed = at->seed};
    memcpy(&data->fingerprint, in->header + FINGERPRINT, sizeof data->fingerprint);
    return 0;
}

static int compare_data(const GPT2Data *was, const GPT2Data *now) {
    if (was->T != now->T || was->tokens != now->tokens || was->seed != now->seed)
        return gpt2_fail("of this model, T %lld, %lld tokens, seed %lld, expected this model, %lld, %lld, "
                         "%lld; resume with the same settings", (long long)was->T, (long long)was->tokens,
                         (long long)was->seed, (long long)now->T, (long long)now->tokens,
                         (long long)now->seed);
    if (!was->fingerprint || was->fingerprint == now->fingerprint) return 0;
    return gpt2_fail("of other tokens, although as many; resume with the same shards");
}

int gpt2_verify(const char *dir, int64_t step, GPT2Data *data) {
    Path path;
    File in;
    State state;
    GPT2Config c;
    if (file_open(&in, run_path(path, dir, MODEL_FILE, step), "model", MAGIC_MODEL)) return -1;
    if (file_close(&in, model_shape(&in, &c))) return -1;
    if (state_open(&in, run_path(path, dir, STATE_FILE, step), &c, &state, data)) return -1;
    return file_close(&in, 0);
}

int gpt2_restore(const char *dir, int64_t step, GPT2 *model, GPT2Loader *loader, GPT2Progress *progress) {
    Path path;
    File in;
    State state;
    GPT2Data was;
    const GPT2Config c = gpt2_config(model);
    if (state_open(&in, run_path(path, dir, STATE_FILE, step), &c, &state, &was)) return -1;
    int failed = 0;
    if (loader) {
        const GPT2Data now = gpt2_loader_data(loader);
        failed = compare_data(&was, &now);
    }
    for (int kind = GPT2_MOMENT1; kind <= GPT2_MOMENT2 && !failed; kind++)
        failed = tensors_copy(model, kind, &in, 0, 0);
    if (file_close(&in, failed)) return -1;
    if (loader) loader->at = state.position;
    *progress = state.progress;
    *gpt2_updates(model) = state.updates;
    return 0;
}

/* --- Comparison with a reference ------------------------------------------------------------------------ */
enum { LOGITS_ROW, LOSS_ROW, GRAD_ROWS };     /* the rows of a comparison: then a gradient each */

/* Computes a row: logits, the loss (and with it all gradients), or a gradient. x: x (B,T), then y (B,T). */
static int compute_row(GPT2 *model, int row, const int32_t *x, int B, int T, int64_t n, float *out) {
    if (row == LOGITS_ROW) return gpt2_logits(model, x, B, T, 0, out);
    if (row == LOSS_ROW)
        return gpt2_forward(model, x, x + (size_t)B * (size_t)T, B, T, 1, out) || gpt2_backward(model);
    return gpt2_get(model, row - GRAD_ROWS, GPT2_GRAD, 0, n, out);
}

static void compare(GPT2Diff *row, const float *values, const float *reference, int64_t n, double tolerance) {
    double difference = 0, norm = 0;      /* squared */
    for (int64_t k = 0; k < n; k++) {
        const double d = fabs((double)values[k] - reference[k]);
        if (!(d <= row->max_abs)) row->max_abs = d;     /* NaN too */
        difference += d * d;
        norm += (double)reference[k] * reference[k];
    }
    if (norm == 0) norm = 1;              /* then the error is absolute */
    row->relative = sqrt(difference / norm);
    row->ok = row->relative <= tolerance;
}

int gpt2_check(GPT2 *model, const char *path, double tolerance, GPT2Diff rows[GPT2_DIFFS]) {
    File in;
    const GPT2Config c = gpt2_config(model);
    if (file_open(&in, path, "reference", MAGIC_REFERENCE)) return -1;
    const int B = in.header[2], T = in.header[3];
    const int64_t N = (int64_t)B * T, V = c.V;
    if (in.header[1] != 2 || B < 1 || T < 1 || T > c.max_T || N > in.size / V ||
        in.size != 1024 + 4 * (N * (2 + V) + 1 + tensors_size(&c)))
        return file_close(&in, gpt2_fail("version %d, B %d, T %d, %lld bytes do not fit the model",
                                         in.header[1], B, T, in.size));
    int32_t *x = alloc_bytes(2 * (size_t)N * sizeof *x);
    int wrong = 0, failed = !x || file_read(&in, x, 2 * (size_t)N * sizeof *x);
    gpt2_zero_grad(model);
    for (int i = 0; i < GPT2_DIFFS && !failed; i++) {
        const char *name = "logits";
        int64_t n = N * V;
        if (i == LOSS_ROW) {
            name = "loss";
            n = 1;
        } else if (i >= GRAD_ROWS) {
            n = gpt2_tensor(&c, i - GRAD_ROWS, &name, NULL);
        }
        rows[i] = (GPT2Diff){.ok = 0};
        snprintf(rows[i].name, sizeof rows[i].name, "%s", name);
        float *values = alloc_bytes(2 * (size_t)n * sizeof *values);     /* model, then reference */
        failed = !values || file_read(&in, values + n, (size_t)n * sizeof *values) ||
                 compute_row(model, i, x, B, T, n, values);
        if (!failed) compare(&rows[i], values, values + n, n, tolerance);
        wrong += !rows[i].ok;
        free(values);
    }
    gpt2_zero_grad(model);
    free(x);
    return file_close(&in, failed) ? -1 : wrong;
}

#ifndef GPT2_NO_MAIN
/* === 4. main ==============================================================================================
   Flags and log as in karpathy/llm.c. */
enum { SEED = 42 };                       /* of initial values, shuffling and samples */
#define HELLASWAG "dev/data/hellaswag/hellaswag_val.bin"
static struct {
    const char *train_shards, *val_shards, *model, *out, *schedule, *check;
    long long checkpoint_every, keep, keep_every, resume;
    long long B, T, total_batch, steps, warmup, skip_nonfinite, overfit;
    long long val_every, val_batches, sample_every, sample_tokens, hellaswag;
    double lr, final_lr_frac, beta1, beta2, eps, weight_decay, grad_clip, skip_loss, skip_norm, tolerance;
} settings;

enum { TEXT, GPU_OPTION, INTEGER, REAL };     /* kinds of values */
static struct { const char *name, *value; int kind, least; void *target; const char *help; } flags[] = {
    {"-i", "dev/data/tinyshakespeare/tiny_shakespeare_train.bin", TEXT, 0, &settings.train_shards,
     "training shards, a quoted glob"},
    {"-j", "", TEXT, 0, &settings.val_shards, "validation shards, a quoted glob"},
    {"-e", "d12", TEXT, 0, &settings.model,
     "model file, or a new model: d2 d4 d6 d12 d24 d36 d48 (d12 is GPT-2 124M)"},
    {"-o", "", TEXT, 0, &settings.out, "run directory for main.log and checkpoints"},
    {"-n", "0", INTEGER, 0, &settings.checkpoint_every, "steps between checkpoints, and one at the end; 0 "
                                                        "for none"},
    {"-nk", "0", INTEGER, 0, &settings.keep, "number of checkpoints to keep; 0 for all"},
    {"-nm", "0", INTEGER, 0, &settings.keep_every, "never delete checkpoints at multiples of this step"},
    {"-y", "0", INTEGER, 0, &settings.resume, "1 resumes from the newest checkpoint in the run directory"},
    {"-b", "4", INTEGER, 1, &settings.B, "micro-batch size B, in sequences"},
    {"-t", "1024", INTEGER, 1, &settings.T, "sequence length T, in tokens"},
    {"-d", "0", INTEGER, 0, &settings.total_batch,
     "tokens per optimizer step, by gradient accumulation; 0 for B times T"},
    {"-x", "-1", INTEGER, -1, &settings.steps, "optimizer steps; -1 for one epoch"},
    {"-k", "cosine", TEXT, 0, &settings.schedule, "learning-rate schedule: cosine linear constant wsd"},
    {"-l", "3e-4", REAL, 0, &settings.lr, "peak learning rate"},
    {"-u", "0", INTEGER, 0, &settings.warmup, "linear warm-up steps"},
    {"-q", "1", REAL, 0, &settings.final_lr_frac, "final learning rate as a fraction of the peak"},
    {"-b1", "0.9", REAL, 0, &settings.beta1, "AdamW's decay rate of the mean gradient"},
    {"-b2", "0.95", REAL, 0, &settings.beta2, "AdamW's decay rate of the mean squared gradient"},
    {"-ep", "1e-08", REAL, 0, &settings.eps, "AdamW's epsilon"},
    {"-c", "0", REAL, 0, &settings.weight_decay, "weight decay"},
    {"-gc", "1", REAL, 0, &settings.grad_clip, "maximum gradient norm (clipping); 0 for none"},
    {"-sl", "0", REAL, 0, &settings.skip_loss, "skip steps whose loss has a z-score above this; 0 for none"},
    {"-sg", "0", REAL, 0, &settings.skip_norm, "skip steps whose gradient norm has a z-score above this; 0 "
                                               "for none"},
    {"-sn", "0", INTEGER, 0, &settings.skip_nonfinite,
     "skip up to N consecutive steps with a NaN or infinite loss or gradient"},
    {"-v", "20", INTEGER, 0, &settings.val_every, "steps between validations; 0 for one at the end"},
    {"-m", "20", INTEGER, 1, &settings.val_batches, "maximum number of validation batches"},
    {"-s", "20", INTEGER, 0, &settings.sample_every, "steps between samples; 0 for one at the end"},
    {"-g", "64", INTEGER, 0, &settings.sample_tokens, "tokens per sample; 0 for no samples"},
    {"-a", "0", INTEGER, 0, &settings.overfit, "1 overfits a single batch"},
    {"--check", "", TEXT, 0, &settings.check, "compare the model of -e with this saved reference, and exit"},
    {"--tolerance", "1e-05", REAL, 0, &settings.tolerance, "maximum relative error of --check; about 1e-2 "
                                                           "for bf16"},
    {"-h", "0", INTEGER, 0, &settings.hellaswag,
     "1 evaluates HellaSwag at each validation, from " HELLASWAG "; N > 1 its first N examples"},
    {"-f", "", GPU_OPTION, 0, NULL, "GPU only, ignored"},
    {"-w", "", GPU_OPTION, 0, NULL, "GPU: 0 trains bf16 parameters without fp32 master weights"},
    {"-ge", "", GPU_OPTION, 0, NULL, "GPU only, ignored"},
    {"-z", "", GPU_OPTION, 0, NULL, "GPU only, ignored"},
    {"-r", "", GPU_OPTION, 0, NULL, "GPU: the backward pass recomputes GELU (1), and layer norm too (2)"},
    {"-lg", "", GPU_OPTION, 0, NULL, "GPU only, ignored"},
};
enum { FLAGS = sizeof flags / sizeof *flags };

/* Ends the program after a failure: with status 2 while the flags are parsed, then with 1. */
static int exit_status = 2;
static void check_ok(int ok) {
    if (ok) return;
    fprintf(stderr, "train_gpt2: %s%s\n", gpt2_error(), exit_status == 2 ? "; see ./train_gpt2 --help" : "");
    exit(exit_status);
}
#define die(...) check_ok(!gpt2_fail(__VA_ARGS__))

static void print_help(void) {
    printf("Trains GPT-2, or compares a model with a reference: ./train_gpt2 [FLAG VALUE]...\n");
    for (int i = 0; i < FLAGS; i++) printf("  %-11s %s [%s]\n", flags[i].name, flags[i].help, flags[i].value);
    printf("  %-11s print the version and exit\n", "--version");
    printf("\nA step's line has its loss in nats per token, learning rate, gradient norm before clipping, "
           "time,\ntokens/s, MFU (model FLOPs utilization: the model's arithmetic per second, without "
           "recomputation, as a\nshare of the peak that is measured at the start), and the time left.\n");
    exit(0);
}

/* Sets the target of a flag. */
static void set_flag(int i, const char *value) {
    const int kind = flags[i].kind;
    flags[i].value = value;
    if (kind == GPU_OPTION) return;
    if (kind == TEXT) {
        *(const char **)flags[i].target = value;
        return;
    }
    char *end;
    const double x = strtod(value, &end);
    const int is_number = end != value && !*end && isfinite(x) && x >= flags[i].least;
    const int is_integer = is_number && x == floor(x) && x < 0x1p31;
    if (kind == REAL && is_number) *(double *)flags[i].target = x;
    else if (kind == INTEGER && is_integer) *(long long *)flags[i].target = (long long)x;
    else die("%s is '%s', expected %s from %d", flags[i].name, value,
             kind == INTEGER ? "an integer below 2^31" : "a number", flags[i].least);
}

static void parse_flags(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--help")) print_help();
    if (argc == 2 && !strcmp(argv[1], "--version")) {
        printf("train_gpt2 %s\n", gpt2_version());
        exit(0);
    }
    for (int i = 0; i < FLAGS; i++) set_flag(i, flags[i].value);     /* the defaults */
    for (int i = 1; i < argc; i += 2) {
        int k = 0;
        while (k < FLAGS && strcmp(flags[k].name, argv[i])) k++;
        if (k == FLAGS) die("%s is not a flag", argv[i]);
        if (!argv[i + 1]) die("%s needs a value", argv[i]);
        set_flag(k, argv[i + 1]);
    }
    const long long BT = settings.B * settings.T;
    if (settings.total_batch % BT)
        die("-d is %lld, expected a multiple of -b times -t, %lld", settings.total_batch, BT);
    if (!settings.total_batch) settings.total_batch = BT;
    if (!*settings.out && (settings.checkpoint_every || settings.resume))
        die("-n and -y need a run directory, -o DIR");
    if (settings.hellaswag && access(HELLASWAG, R_OK))
        die("-h needs " HELLASWAG ", which is missing; download it: python3 dev/data/fetch.py hellaswag");
    check_ok(gpt2_lr(settings.schedule, 0, 1, 0, 1, 1) >= 0);
    if (settings.beta1 >= 1) die("-b1 is %g, expected less than 1", settings.beta1);
    if (settings.beta2 >= 1) die("-b2 is %g, expected less than 1", settings.beta2);
    if (settings.eps < 1e-30) die("-ep is %g, expected at least 1e-30", settings.eps);
    exit_status = 1;
}

typedef struct {
    GPT2 *model;
    GPT2Tokenizer *tokenizer;             /* NULL: samples are token ids */
    GPT2Loader *train, *val;              /* val may be NULL */
    GPT2Progress progress;
    FILE *log;
    long long saved;                      /* step of the newest checkpoint, -1: none */
    int finished;                         /* all steps and the last validation are done */
    long long steps, first, nonfinite;    /* steps in all, the first of this process, consecutive bad ones */
    double peak, flops, began;            /* FLOP/s of the machine, FLOPs of a step, start in seconds */
} Run;

static volatile sig_atomic_t interrupted;
static void on_signal(int number) {
    interrupted = 1;
    signal(number, SIG_DFL);              /* the second one quits */
}

static void watch_signals(void) {
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN);     /* as nohup wants it */
    signal(SIGPIPE, SIG_IGN);             /* an error of write, as is */
    signal(SIGXFSZ, SIG_IGN);             /* a file at its size limit */
}

/* Opens what is closed of stdin, stdout and stderr, so that no file of the run takes their place. */
static void open_standard_files(void) {
    int file = 0;
    while (file >= 0 && file <= STDERR_FILENO) file = open("/dev/null", O_RDWR);
    if (file > STDERR_FILENO) close(file);
}

/* Flushes stdout. If its reader or terminal is gone, the run ends as by SIGTERM. */
static void flush_output(void) {
    if (interrupted || !fflush(stdout) || (errno != EPIPE && errno != EIO)) return;
    interrupted = 1;
    fprintf(stderr, "train_gpt2: stdout was closed (%s), so the run ends after this step\n", strerror(errno));
}

/* What takes long is shown on stderr: in the first second, then after every four without another line. */
static const char *volatile task;
static volatile sig_atomic_t task_begun;  /* in seconds */
static void on_alarm(int number) {        /* async-signal-safe */
    (void)number;
    const int saved_errno = errno, spent = (int)seconds() - task_begun;
    char line[80];
    const size_t n = strlen(task);
    memcpy(line, task, n);
    memcpy(line + n, " | 00:00\n", 9);
    line[n + 3] += (char)(spent / 600 % 10);
    line[n + 4] += (char)(spent / 60 % 10);
    line[n + 6] += (char)(spent % 60 / 10);
    line[n + 7] += (char)(spent % 10);
    const ssize_t written = write(2, line, n + 9);
    (void)written;                        /* whether anybody sees it or not */
    errno = saved_errno;
}

/* Shows the task after these milliseconds and then every four seconds; 0: never. Flushes what was printed. */
static void show_task_after(int ms) {
    flush_output();
    setitimer(ITIMER_REAL, &(struct itimerval){{4, 0}, {ms / 1000, ms % 1000 * 1000}}, NULL);
}

/* Names what begins. step: -1 for none. */
static void begin(const char *what, long long step) {
    static char texts[2][64];             /* one for the handler while the other is written */
    char *text = texts[task == texts[0]];
    snprintf(text, sizeof *texts, "%s", what);
    if (step >= 0) snprintf(text, sizeof *texts, "step %lld: %s", step, what);
    task = text;
    task_begun = (int)seconds();
}

/* Whether -e names a new model, such as d12, and not a file. */
static int is_descriptor(const char *name) {
    return name[0] == 'd' && strspn(name + 1, "0123456789") == strlen(name + 1);
}

/* Length of the folder of a path, with the slash. */
static int folder_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? (int)(slash - path) + 1 : 0;
}

/* The decode table of the run, beside the model or the shards, or in the working directory as for llm.c; or
   NULL. */
static GPT2Tokenizer *find_tokenizer(void) {
    Path paths[4] = {"", "", "", "gpt2_tokenizer.bin"};
    const char *files[] = {settings.model, settings.train_shards};
    snprintf(paths[0], sizeof(Path), "%s/tokenizer.bin", settings.out);
    for (int i = 0; i < 2; i++)
        if (!is_descriptor(files[i]))
            snprintf(paths[1 + i], sizeof(Path), "%.*stokenizer.bin", folder_length(files[i]), files[i]);
    for (int i = 0; i < 4; i++) {
        if (!*paths[i] || access(paths[i], F_OK)) continue;
        GPT2Tokenizer *tokenizer = gpt2_tokenizer_load(paths[i]);
        check_ok(tokenizer != NULL);
        return tokenizer;
    }
    return NULL;
}

/* The initial model: the newest checkpoint of the run, a model file, or a new model. */
static GPT2 *find_model(long long newest, const GPT2Tokenizer *tokenizer, uint64_t seed) {
    GPT2Config c;
    const char *name = settings.model;
    if (newest >= 0) return gpt2_load(run_path((Path){0}, settings.out, MODEL_FILE, newest));
    if (!is_descriptor(name)) return gpt2_load(name);
    if (gpt2_descriptor(name, &c)) return NULL;
    if (tokenizer) c.V = tokenizer->V;
    GPT2 *model = gpt2_create(&c);
    if (!model || gpt2_init(model, seed)) return NULL;
    return model;
}

static void set_gpu_options(GPT2 *model) {
    for (int i = 0; i < FLAGS; i++) {
        const char *name = flags[i].name, *value = flags[i].value;
        if (flags[i].kind == GPU_OPTION && *value && gpt2_option(model, name, atoi(value)))
            fprintf(stderr, "train_gpt2: %s is ignored: %s\n", name, gpt2_error());
    }
}

static void remove_empty_run(void) { rmdir(settings.out); }

/* Creates the run directory if it is missing, and locks it until the process ends. A process that fails
   before it has a file removes the directory that it made. */
static void lock_run(void) {
    const char *out = settings.out;
    struct stat locked, now;
    if (!*out) return;
    const int made = !mkdir(out, 0777);
    const int lock = open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock < 0) die("run directory '%s' cannot be read: %s", out, strerror(errno));
    int taken = 0;
    if (flock(lock, LOCK_EX | LOCK_NB)) {
        taken = errno == EWOULDBLOCK;
        const char *why = strerror(errno);
        if (!taken && !is_unsupported(errno)) die("run directory '%s' cannot be locked: %s", out, why);
        if (!taken)
            fprintf(stderr, "train_gpt2: '%s' is on a file system without locks (%s); take care that no "
                    "other run uses this directory\n", out, why);
    }
    if (!taken && !fstat(lock, &locked))  /* a failed start may have removed it in the meantime */
        taken = stat(out, &now) || locked.st_ino != now.st_ino;
    if (taken) die("run directory '%s' is in use by another run; choose another -o", out);
    if (made) atexit(remove_empty_run);
}

static float scheduled_lr(const Run *run, long long step) {
    return gpt2_lr(settings.schedule, step, run->steps, settings.warmup, (float)settings.lr,
                   (float)settings.final_lr_frac);
}

/* The newest undamaged checkpoint of the run directory, whose data it fills in; -1 if there is none. */
static long long find_checkpoint(GPT2Data *data) {
    char damage[sizeof error_text] = "";
    const long long newest = gpt2_newest(settings.out);
    long long step = newest;
    check_ok(newest >= -1);
    while (step >= 0 && gpt2_verify(settings.out, step, data)) {
        if (!*damage) snprintf(damage, sizeof damage, "%s", gpt2_error());
        step = gpt2_newest_before(settings.out, step);
    }
    if (step < newest && step < 0) die("%s", damage);
    if (step < newest)
        fprintf(stderr, "train_gpt2: the checkpoint of step %lld is resumed instead of %lld: %s\n", step,
                newest, damage);
    return step;
}

/* A run resumes with the data that it was trained on. */
static void check_data(const GPT2Data *was, const GPT2Data *now) {
    const char *out = settings.out;
    if (!was->T) return;                  /* saved without a loader */
    if (was->T != now->T)
        die("-t is %lld, expected %lld, the sequence length of the run in '%s'", (long long)now->T,
            (long long)was->T, out);
    if (was->tokens != now->tokens)
        die("-i has %lld tokens, expected the %lld that the run in '%s' is trained on; for other data start "
            "a new run with -e MODEL", (long long)now->tokens, (long long)was->tokens, out);
    if (was->fingerprint && was->fingerprint != now->fingerprint)
        die("-i has other tokens than the run in '%s' is trained on, although as many; restore them, or "
            "start a new run with -e MODEL", out);
    if (was->seed != now->seed)
        die("the run in '%s' has seed %lld, expected %lld; resume it with train_gpt2.py --resume", out,
            (long long)was->seed, (long long)now->seed);
}

/* What main.log has about a step: the learning rate that led to it (or -1), and whether it was validated. */
static double logged_lr(long long step, int *validated) {
    Path path;
    char line[256];
    double lr = -1, value;
    long long at;
    snprintf(path, sizeof path, "%s/main.log", settings.out);
    FILE *log = fopen(path, "r");
    while (log && fgets(line, sizeof line, log)) {
        if (sscanf(line, "s:%lld trl:%*f lr:%lf", &at, &value) == 2 && at == step - 1) lr = value;
        if (sscanf(line, "s:%lld tel:%lf", &at, &value) == 2 && at == step) *validated = 1;
    }
    if (log) fclose(log);
    return lr;
}

/* A new run would leave the best model of another one beside its own checkpoints. */
static void check_new(void) {
    Path path;
    snprintf(path, sizeof path, "%s/best.bin", settings.out);
    if (*settings.out && !access(path, F_OK))
        die("'%s' is of another run; resume that with -y 1, remove it, or choose another -o", path);
    snprintf(path, sizeof path, "%s/metrics.jsonl", settings.out);
    if (*settings.out) unlink(path);      /* its log, as main.log is emptied */
}

static FILE *open_log(int append) {
    const char *out = settings.out;
    Path path = "/dev/null";
    if (*out) snprintf(path, sizeof path, "%s/main.log", out);
    FILE *log = fopen(path, append ? "a" : "w");
    if (!log) die("run directory '%s' cannot be written: %s", out, strerror(errno));
    return log;
}

/* A text as JSON. Bytes beyond ASCII become lone surrogates, as surrogateescape in Python has them. */
static void write_text(FILE *out, const char *text, size_t n) {
    for (const unsigned char *p = (const unsigned char *)text; p < (const unsigned char *)text + n; p++) {
        if (*p >= 0x80) fprintf(out, "\\udc%02x", *p);
        else if (*p < 0x20 || strchr("\"\\", *p)) fprintf(out, "\\u%04x", *p);
        else fputc(*p, out);
    }
}

/* Globs, one per line, as a JSON list of absolute globs. */
static void write_globs(FILE *out, const char *name, const char *globs) {
    Path cwd = "";
    const char *separator = "";
    fprintf(out, " \"%s\": [", name);
    for (size_t n; *globs; globs += n + (globs[n] != 0), separator = ", ") {
        n = strcspn(globs, "\n");
        fprintf(out, "%s\"", separator);
        if (*globs != '/' && getcwd(cwd, sizeof cwd)) {
            for (const char *p = cwd; *p; p++) {
                const int special = strchr("*?[", *p) != NULL;     /* in a glob, [*] is a plain * */
                if (special) fputc('[', out);
                write_text(out, p, 1);
                if (special) fputc(']', out);
            }
            fputc('/', out);
        }
        write_text(out, globs, n);
        fputs("\"", out);
    }
    fprintf(out, "],\n");
}

static void write_val_shards(FILE *out, const Run *run) {
    fprintf(out, " \"val_shards\": [");
    for (int64_t i = 0; run->val && i < run->val->size.shards; i++) {
        const char *name = run->val->paths[i] + folder_length(run->val->paths[i]);
        fprintf(out, "%s\"", i ? ", " : "");
        write_text(out, name, strlen(name));
        fputs("\"", out);
    }
    fprintf(out, "],\n");
}

/* Ends the program if the same -j matches other shards than when run.json was written: one may be missing. */
static void check_val_shards(const Run *run) {
    Path path;
    char *now = NULL, *line = NULL;
    size_t size = 0, n = 0;
    int same_glob = 0;
    snprintf(path, sizeof path, "%s/run.json", settings.out);
    FILE *in = fopen(path, "r"), *out = open_memstream(&now, &size);
    if (in && out) {
        write_globs(out, "val_data", settings.val_shards);
        write_val_shards(out, run);
        fflush(out);
    }
    while (in && out && getline(&line, &n, in) > 0) {
        const size_t length = strlen(line);
        if (!strncmp(line, now, length)) same_glob = 1;
        else if (same_glob && !strncmp(line, " \"val_shards\": [", 16) && !strstr(now, line))
            die("-j '%s' matches other validation shards than before, expected%.*s; restore them",
                settings.val_shards, (int)strcspn(line + 14, "]") + 1, line + 14);
    }
    if (in) fclose(in);
    if (out) fclose(out);
    free(now);
    free(line);
}

/* Restores the checkpoint at run->saved. Reports a change of the learning rate. */
static void restore(Run *run, const GPT2Data *was) {
    const GPT2Data now = gpt2_loader_data(run->train);
    check_data(was, &now);
    check_ok(!gpt2_restore(settings.out, run->saved, run->model, run->train, &run->progress));
    check_val_shards(run);
    const long long step = run->progress.step;
    if (step > run->steps)
        die("the run in '%s' has done %lld steps, more than -x, %lld; give a larger one", settings.out, step,
            run->steps);
    int validated = !run->val;
    const double lr = logged_lr(step, &validated);
    run->finished = step == run->steps && validated;
    const double expected = (double)scheduled_lr(run, step - 1);
    if (lr >= 0 && step < run->steps && fabs(lr - expected) > 6e-7)     /* the log has 6 decimals */
        printf("learning rate: %.2e in step %lld, %.2e in the next, since the schedule is now %s over %lld "
               "steps with a peak of %.2e\n", lr, step, (double)scheduled_lr(run, step), settings.schedule,
               run->steps, settings.lr);
}

static Run open_run(void) {
    const uint64_t seed = SEED;
    const int B = (int)settings.B, T = (int)settings.T;
    Run run = {.progress.rng = seed, .saved = -1};
    GPT2Data was = {0};
    lock_run();
    if (settings.resume) run.saved = find_checkpoint(&was);
    begin("creating or loading the model", -1);
    run.tokenizer = find_tokenizer();
    run.model = find_model(run.saved, run.tokenizer, seed);
    check_ok(run.model != NULL);
    set_gpu_options(run.model);
    const GPT2Config c = gpt2_config(run.model);
    if (run.tokenizer && run.tokenizer->V > c.V)
        die("the run's tokenizer.bin has %d token%s, expected at most the model's %d; remove or replace it",
            run.tokenizer->V, plural(run.tokenizer->V), c.V);
    if (T > c.max_T) die("-t is %d, expected at most the model's context, %d", T, c.max_T);
    begin("opening the shards", -1);
    run.train = gpt2_loader_open(settings.train_shards, B, T, c.V, !settings.overfit, seed);
    check_ok(run.train != NULL);
    if (*settings.val_shards) {
        run.val = gpt2_loader_open(settings.val_shards, B, T, c.V, 0, seed);
        check_ok(run.val != NULL);
    }
    run.steps = settings.steps;
    if (run.steps < 0) run.steps = gpt2_loader_size(run.train).tokens / settings.total_batch;
    if (run.saved >= 0) begin("loading the training state", -1);
    if (run.saved >= 0) restore(&run, &was);
    else check_new();
    run.log = open_log(run.saved >= 0);
    run.first = run.progress.step;
    begin("measuring the peak", -1);
    run.peak = gpt2_ceiling();
    run.flops = gpt2_flops_per_token(&c, T) * (double)settings.total_batch;
    return run;
}

static void write_run_json(const Run *run, FILE *out) {
    const GPT2Config c = gpt2_config(run->model);
    long long val_every = settings.val_every;
    if (!val_every && run->steps) val_every = run->steps;     /* here 0 is one at the end, there it is none */
    const struct { const char *name; long long value; } integers[] = {
        {"layers", c.L}, {"heads", c.NH}, {"channels", c.C}, {"context", c.max_T},
        {"batch_size", settings.B}, {"seq_len", settings.T}, {"total_batch_size", settings.total_batch},
        {"steps", run->steps}, {"warmup", settings.warmup}, {"skip_nonfinite", settings.skip_nonfinite},
        {"seed", SEED}, {"val_every", val_every}, {"val_batches", settings.val_batches},
        {"sample_every", settings.sample_every}, {"sample_tokens", settings.sample_tokens},
        {"checkpoint_every", settings.checkpoint_every}, {"keep", settings.keep},
        {"keep_every", settings.keep_every}};
    const struct { const char *name; double value; } reals[] = {
        {"lr", settings.lr}, {"final_lr_frac", settings.final_lr_frac},
        {"beta1", settings.beta1}, {"beta2", settings.beta2}, {"eps", settings.eps},
        {"weight_decay", settings.weight_decay}, {"grad_clip", settings.grad_clip},
        {"skip_loss_z", settings.skip_loss}, {"skip_grad_z", settings.skip_norm}};
    fprintf(out, "{\n");
    write_globs(out, "data", settings.train_shards);
    write_globs(out, "val_data", settings.val_shards);
    write_val_shards(out, run);
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++)
        fprintf(out, " \"%s\": %lld,\n", integers[i].name, integers[i].value);
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        fprintf(out, " \"%s\": %.17g,\n", reals[i].name, reals[i].value);
    fprintf(out, " \"overfit\": %s,\n \"init\": \"", settings.overfit ? "true" : "false");
    if (is_descriptor(settings.model)) fprintf(out, "scratch");
    else write_text(out, settings.model, strlen(settings.model));
    fprintf(out, "\",\n \"schedule\": \"%s\"\n}\n", settings.schedule);
}

/* Leaves the settings in the run directory as train_gpt2.py does, which then resumes the run with them. */
static void save_settings(const Run *run) {
    Path path, temporary;
    if (!*settings.out) return;
    snprintf(path, sizeof path, "%s/run.json", settings.out);
    snprintf(temporary, sizeof temporary, "%s/run.json.tmp", settings.out);
    FILE *out = fopen(temporary, "w");
    int failed = !out;
    if (out) {
        write_run_json(run, out);
        failed = fflush(out) || disk_flush(fileno(out));
        failed = fclose(out) || failed || rename(temporary, path);
    }
    if (failed) die("'%s' cannot be written: %s", path, strerror(errno));
}

static void close_run(Run *run) {
    fclose(run->log);
    gpt2_loader_close(run->train);
    gpt2_loader_close(run->val);
    gpt2_tokenizer_free(run->tokenizer);
    gpt2_free(run->model);
}

static void print_summary(const Run *run) {
    const GPT2Config c = gpt2_config(run->model);
    const GPT2Size data = gpt2_loader_size(run->train);
    printf("%s, %.0f GFLOP/s peak; L %d, NH %d, C %d, V %d, context %d: %.1fM parameters\n", gpt2_device(),
           run->peak * 1e-9, c.L, c.NH, c.C, c.V, c.max_T, (double)gpt2_parameters(&c) * 1e-6);
    const long long total = settings.total_batch, micro_batches = total / (settings.B * settings.T);
    printf("%s; %lld token%s, %lld shard%s; steps %lld to %lld of %lld token%s, %lld micro-batch%s of %lld x "
           "%lld\n",
           run->saved >= 0 ? "resumed" : settings.model, (long long)data.tokens, plural(data.tokens),
           (long long)data.shards, plural(data.shards), run->first, run->steps, total, plural(total),
           micro_batches, micro_batches == 1 ? "" : "es", settings.B, settings.T);
    flush_output();
}

static void sample(Run *run) {
    show_task_after(0);                   /* its tokens are seen */
    const GPT2Tokenizer *t = run->tokenizer;
    const int V = gpt2_config(run->model).V;
    int32_t *tokens = alloc_bytes((size_t)(settings.sample_tokens + 1) * sizeof *tokens);
    uint8_t *allowed = alloc_bytes((size_t)V);     /* ids that have a token */
    check_ok(tokens != NULL && allowed != NULL);
    for (int i = 0; i < V; i++) allowed[i] = !t || (i < t->V && t->bytes[t->at[i]] > 0);
    tokens[0] = V - 1;                    /* end-of-text, as far as is known */
    if (t && t->end >= 0) tokens[0] = t->end;
    if (V == 256) tokens[0] = '\n';       /* bytes: a model of a single text has never seen end-of-text */
    printf("---\n");
    for (long long n = 1; n <= settings.sample_tokens && !interrupted; n++) {
        const int token = gpt2_next(run->model, tokens, n, 1, 0, 1, allowed, &run->progress.rng);
        check_ok(token >= 0);
        tokens[n] = token;
        if (t) fwrite(t->bytes + t->at[token] + 1, 1, t->bytes[t->at[token]], stdout);
        else printf("%d ", token);
        flush_output();
    }
    printf("\n---\n");
    show_task_after(4000);
    free(tokens);
    free(allowed);
}

/* Validation loss and HellaSwag accuracy, where requested. */
static void validate(Run *run, long long step) {
    float loss;
    begin("validation", step);
    if (run->val) {
        check_ok(!gpt2_evaluate(run->model, run->val, settings.val_batches, &loss));
        printf("val loss %.4f\n", loss);
        show_task_after(4000);
        fprintf(run->log, "s:%lld tel:%.4f\n", step, loss);
    }
    if (settings.hellaswag) {
        begin("HellaSwag", step);
        int64_t right[2] = {0}, count = INT32_MAX;
        if (settings.hellaswag > 1) count = settings.hellaswag;
        const int64_t examples = gpt2_hellaswag(run->model, HELLASWAG, 0, count, right);
        check_ok(examples >= 0);
        const double n = (double)min((size_t)count, (size_t)examples);
        printf("HellaSwag accuracy %.4f, by the mean over tokens %.4f\n", (double)right[0] / n,
               (double)right[1] / n);
        flush_output();
        fprintf(run->log, "s:%lld eval:%.4f\n", step, (double)right[1] / n);
    }
}

/* Saves a checkpoint, unless this step has one. A failure ends the run only if it is ending anyway. */
static void save(Run *run, long long step) {
    if (step == run->saved) return;
    begin("saving", step);
    if (!gpt2_checkpoint(settings.out, run->model, run->train, &run->progress, settings.checkpoint_every,
                         settings.keep, settings.keep_every)) {
        static int warned;
        const char *warning = gpt2_warning();
        if (*warning && !warned++) fprintf(stderr, "train_gpt2: %s\n", warning);
        run->saved = step;
        return;
    }
    check_ok(!interrupted && step < run->steps);
    fprintf(stderr, "train_gpt2: no checkpoint of step %lld: %s\n", step, gpt2_error());
}

/* Forward and backward over all micro-batches. Returns the mean loss. */
static double accumulate_gradients(Run *run) {
    const int B = (int)settings.B, T = (int)settings.T;
    const long long micro_batches = settings.total_batch / (settings.B * settings.T);
    double mean = 0;
    for (long long micro = 0; micro < micro_batches; micro++) {
        float loss;
        if (settings.overfit) gpt2_loader_reset(run->train);
        const int32_t *x = gpt2_loader_next(run->train);
        check_ok(x != NULL);
        const int32_t *y = x + (size_t)B * (size_t)T;
        check_ok(!gpt2_forward(run->model, x, y, B, T, 1.0f / (float)micro_batches, &loss));
        check_ok(!gpt2_backward(run->model));
        mean += (double)loss / (double)micro_batches;
    }
    return mean;
}

/* Why the update of this step is skipped, or "". Too many NaN or infinite steps end the run. */
static const char *reason_to_skip(Run *run, long long step, double loss, double norm) {
    const double z_loss = gpt2_zscore(&run->progress, 0, loss), z_norm = gpt2_zscore(&run->progress, 1, norm);
    if (!isfinite(loss + norm)) {
        if (run->nonfinite++ >= settings.skip_nonfinite)
            die("step %lld has loss %f and gradient norm %f: training diverged; lower -l", step, loss, norm);
        return " | NaN or infinite, skipped";
    }
    run->nonfinite = 0;
    if (settings.skip_loss > 0 && z_loss > settings.skip_loss) return " | outlier, skipped";
    if (settings.skip_norm > 0 && z_norm > settings.skip_norm) return " | outlier, skipped";
    return "";
}

static void update(Run *run, float lr) {
    check_ok(!gpt2_update(run->model, lr, settings.beta1, settings.beta2, settings.eps, settings.weight_decay,
                          settings.grad_clip));
}

static void train_step(Run *run, long long step) {
    begin("training", step + 1);
    const double start = seconds();
    const double loss = accumulate_gradients(run);
    const double norm = gpt2_grad_norm(run->model);
    const float lr = scheduled_lr(run, step);
    const char *skipped = reason_to_skip(run, step, loss, norm);
    if (!*skipped) update(run, lr);
    gpt2_zero_grad(run->model);
    run->progress.step = step + 1;

    const double took = seconds() - start, mean = (seconds() - run->began) / (double)(step + 1 - run->first);
    printf("step %lld/%lld | loss %.6f | lr %.2e | norm %.4f | %.0f ms | %.0f tok/s | %.0f%% MFU | %.0f "
           "s left%s\n",
           step + 1, run->steps, loss, lr, norm, took * 1e3, (double)settings.total_batch / took,
           100 * run->flops / took / run->peak, mean * (double)(run->steps - step - 1), skipped);
    fprintf(run->log, "s:%lld trl:%.4f lr:%.6f norm:%.2f\n", step, loss, lr, norm);
    fflush(run->log);
    show_task_after(4000);
}

static int due(long long every, long long step) { return every && step && step % every == 0; }

/* Step n begins with what is due after n steps: a checkpoint (first, so that a resumed run repeats the rest),
   validation, a sample. train() in train_gpt2.py makes the same calls. */
static void train(Run *run) {
    show_task_after(4000);
    run->began = seconds();
    for (long long step = run->first;; step++) {
        const int last = step >= run->steps;
        if (settings.checkpoint_every && (last || due(settings.checkpoint_every, step))) save(run, step);
        if (interrupted) break;
        const int first_validation = step == 0 && settings.val_every;
        if (last || first_validation || due(settings.val_every, step)) validate(run, step);
        const uint64_t rng = run->progress.rng;
        if (settings.sample_tokens && (last || due(settings.sample_every, step))) sample(run);
        if (interrupted) {
            run->progress.rng = rng;      /* the resumed run repeats this sample */
            break;
        }
        if (last) return;
        train_step(run, step);
    }
    if (*settings.out) save(run, run->progress.step);
}

/* Threads of GCC spin for milliseconds at each barrier: a step takes ten times as long while another program
   is busy. Only the environment before main can change that. If exec fails, they keep spinning. */
static void spin_less(char **argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    if (!setenv("GOMP_SPINCOUNT", "10000", 1)) execv("/proc/self/exe", argv);
}

static int check_command(void) {
    GPT2Diff rows[GPT2_DIFFS];
    begin("comparing", -1);
    GPT2 *model = gpt2_load(settings.model);
    check_ok(model != NULL);
    const int wrong = gpt2_check(model, settings.check, settings.tolerance, rows);
    check_ok(wrong >= 0);
    printf("%-10s %14s %14s\n", "", "max abs error", "relative error");
    for (GPT2Diff *r = rows; r < rows + GPT2_DIFFS; r++)
        printf("%-10s %14.3e %14.3e  %s\n", r->name, r->max_abs, r->relative, r->ok ? "ok" : "NOT OK");
    printf("%s: %d of %d rows are within %g\n", wrong ? "NOT OK" : "OK", GPT2_DIFFS - wrong, GPT2_DIFFS,
           settings.tolerance);
    gpt2_free(model);
    return wrong > 0;
}

int main(int argc, char **argv) {
    open_standard_files();
    spin_less(argv);
    parse_flags(argc, argv);
    begin("starting", -1);
    signal(SIGALRM, on_alarm);
    show_task_after(700);
    if (*settings.check) return check_command();

    Run run = open_run();
    if (run.finished) {
        printf("finished: the run in '%s' has done its %lld steps; to train its model further, start a new "
               "run with -e %s/model_%08lld.bin and a lower learning rate, -l\n", settings.out, run.steps,
               settings.out, run.saved);
        close_run(&run);
        return 0;
    }
    watch_signals();
    print_summary(&run);
    save_settings(&run);
    train(&run);
    const int stopped = interrupted;      /* a later signal has not stopped anything */
    if (stopped)
        fprintf(ferror(stdout) ? stderr : stdout, "interrupted after step %lld; %s\n",
                (long long)run.progress.step,
                *settings.out ? "the same command with -y 1 resumes" : "without -o nothing was saved");
    close_run(&run);
    return stopped ? 130 : 0;
}
#endif /* GPT2_NO_MAIN */
#endif /* GPT2_API_ONLY */
