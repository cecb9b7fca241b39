/* GPT-2 training on an NVIDIA GPU (Ampere, sm_80, or later), with nothing but the CUDA toolkit.

     make cuda                    builds ./train_gpt2cu and libgpt2cu.so from this file and train_gpt2.c
     make cuda FP32=1             the same in fp32, for verification (..._fp32)

   Implements the C API of train_gpt2.c, whose host code is compiled without its model.

     1. The device     errors, launches, vectors of 16 bytes, sums over a warp and a block
     2. Matrix product, declared
     3. Layers         embedding, layer norm, GELU, classifier, column sums
     4. Attention      plain kernels for any head size and fp32; flash attention on tensor cores
     5. GPT-2          memory, forward, backward, logits
     6. AdamW
     7. Matrix product, defined

   Parameters, activations and their gradients are floatX: bf16, or float with -DGPT2_FP32; everything else is
   fp32. No sum depends on the order of blocks: results are reproducible bit for bit. See dev/doc/cuda.md. */

#undef _GNU_SOURCE                       /* C++ compilers have it defined */
#define GPT2_API_ONLY
#include "train_gpt2.c"
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <new>
#include <stdio.h>
#include <string.h>
#include <type_traits>
#include <unistd.h>
#include <utility>

/* === 1. The device ====================================================================================== */
#ifdef GPT2_FP32
typedef float floatX;
#define FLOATX_NAME "fp32"
static const cudaDataType_t FLOATX_TYPE = CUDA_R_32F;
#else
typedef __nv_bfloat16 floatX;
#define FLOATX_NAME "bf16"
static const cudaDataType_t FLOATX_TYPE = CUDA_R_16BF;
#endif
enum { WIDTH = 16 / sizeof(floatX), WARP = 32 };     /* elements in 16 bytes, threads */

static size_t min_of(size_t a, size_t b) { return a < b ? a : b; }
static size_t ceil_div(size_t n, size_t unit) { return (n + unit - 1) / unit; }
static unsigned blocks(size_t n, size_t each) { return (unsigned)ceil_div(n, each); }
static size_t round_to(size_t n, size_t unit) { return ceil_div(n, unit) * unit; }

/* Whether a GPU call failed since the current API function started; gpt2_error() has the first failure. */
static thread_local int gpu_failed;

static int gpu_ok(cudaError_t error) {
    if (error == cudaSuccess) return 1;
    cudaGetLastError();                   /* clears it, where that is possible */
    if (!gpu_failed) gpt2_fail("the GPU failed: %s", cudaGetErrorString(error));
    gpu_failed = 1;
    return 0;
}

static int blas_ok(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return 1;
    if (!gpu_failed) gpt2_fail("cuBLASLt failed with status %d", (int)status);
    gpu_failed = 1;
    return 0;
}

static void api_begin(void) { gpu_failed = 0; }
static int api_status(void) { return -gpu_failed; }

/* The emulated GPU and dev/cuda/profile.cu define these differently. */
#ifndef LAUNCH
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    (kernel<<<grid, block, shared, stream>>>(__VA_ARGS__), (void)gpu_ok(cudaGetLastError()))
#endif
#ifndef SHARED
#define SHARED(type, name) \
    extern __shared__ __align__(1024) uint4 shared_memory[]; \
    type *name = (type *)shared_memory
#endif

/* Launches a kernel for vectors of WIDTH elements, or of one where a size is not a multiple of WIDTH. */
#define LAUNCH_VECTORIZED(vectorized, kernel, grid, block, shared, stream, ...) do { \
    if (vectorized) LAUNCH((kernel<WIDTH>), grid, block, shared, stream, __VA_ARGS__); \
    else LAUNCH((kernel<1>), grid, block, shared, stream, __VA_ARGS__); \
} while (0)

__device__ static inline float to_float(float x) { return x; }
__device__ static inline void from_float(float *p, float x) { *p = x; }
#ifndef GPT2_FP32
__device__ static inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ static inline void from_float(__nv_bfloat16 *p, float x) { *p = __float2bfloat16_rn(x); }
#endif

/* Loads V elements as floats, and stores them: 16 bytes at a time, or 8, or one element. */
template <int V, typename X> using Raw =
    std::conditional_t<V * sizeof(X) >= 16, uint4, std::conditional_t<V * sizeof(X) == 8, uint2, X>>;
template <int V, typename X> __device__ static inline void load(float v[V], const X *p) {
    constexpr int each = sizeof(Raw<V, X>) / sizeof(X);
    X x[each];
#pragma unroll
    for (int k = 0; k < V; k += each) {
        const Raw<V, X> raw = *(const Raw<V, X> *)(p + k);
        memcpy(x, &raw, sizeof raw);
#pragma unroll
        for (int i = 0; i < each; i++) v[k + i] = to_float(x[i]);
    }
}
template <int V, typename X> __device__ static inline void store(X *p, const float v[V]) {
    constexpr int each = sizeof(Raw<V, X>) / sizeof(X);
    X x[each];
    Raw<V, X> raw;
#pragma unroll
    for (int k = 0; k < V; k += each) {
#pragma unroll
        for (int i = 0; i < each; i++) from_float(x + i, v[k + i]);
        memcpy(&raw, x, sizeof raw);
        *(Raw<V, X> *)(p + k) = raw;
    }
}

/* Sum or maximum over groups of LANES threads of a warp, in a fixed order; all of them get it. */
template <int LANES, int MAX> __device__ static inline float reduce(float x) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
        if (MAX) x = fmaxf(x, other);
        else x += other;
    }
    return x;
}

/* The same over a block of whole warps. */
template <int MAX> __device__ static float block_reduce(float x) {
    __shared__ float parts[WARP];
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = reduce<WARP, MAX>(x);
    if (lane == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    if (MAX) x = -INFINITY;
    if (lane < warps) x = parts[lane];
    x = reduce<WARP, MAX>(x);
    __syncthreads();                      /* before parts is reused */
    return x;
}

/* === 2. Matrix product, declared ========================================================================
   By cuBLASLt, defined in section 7: cuBLASLt chooses an algorithm for each shape, and a plan keeps it. */
typedef struct {                          /* of a product; plans are found by it */
    int64_t M, N, K, ld_a, ld_b, ld_d;    /* D (M,N) = A (M,K) · B (K,N), all row-major */
    int32_t transposed_a, transposed_b;   /* A is given as (K,M), B as (N,K) */
    int32_t epilogue, alignment;          /* alignment of the pointers in bytes */
    int32_t type_d, add;                  /* D is fp32 or floatX; C is added */
} Shape;

typedef struct {                          /* how cuBLASLt computes it */
    Shape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;       /* of D and C */
    cublasLtMatmulAlgo_t algorithm;
} Plan;
enum { PLANS = 64, WORKSPACE = 32 << 20 };

typedef struct {
    cublasLtHandle_t handle;
    cudaStream_t stream;
    void *workspace;
    Plan plans[PLANS];
    int count;                            /* plans so far; the 65th replaces the first */
    int capturing;                        /* a graph: some cuBLASLt versions cannot plan then */
} Blas;

typedef struct { const floatX *data; size_t ld; int transposed; } Matrix;     /* ld: from row to row */

/* The epilogue: what is done to D before it is written. */
typedef struct {
    cublasLtEpilogue_t epilogue;
    const floatX *bias;                   /* (N), with BIAS and GELU_AUX_BIAS */
    floatX *aux;                          /* as D: what GELU gets, written by GELU_AUX_BIAS, read by DGELU */
    const void *add;                      /* as D, may be D: is added, with DEFAULT and BIAS */
} After;

/* D (M,N), rows ld_d apart, = A (M,K) · B (K,N) and the epilogue. Returns 0, with nothing done, if cuBLASLt
   does not support it; without a GELU in the epilogue that is a failure. */
template <typename D> static int gemm(Blas *blas, D *d, size_t ld_d, Matrix a, Matrix b, size_t M, size_t N,
                                      size_t K, After after = {CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, NULL});
static void plan_free(Plan *plan);

/* === 3. Layers ==========================================================================================
   Rows are the N = B T tokens. A warp takes a row, each lane WIDTH channels of every 32 WIDTH; a second pass
   over the row reads L1. */
enum { ROW_WARPS = 8 };                   /* warps in a block of such a kernel */

/* out (N,C) = wte[x] + wpe[n mod T] */
template <int V>
__global__ void encoder_forward_kernel(floatX *__restrict__ out, const int32_t *__restrict__ x,
                                       const floatX *__restrict__ wte, const floatX *__restrict__ wpe,
                                       size_t N, int T, int C) {
    const size_t n = blockIdx.x * (size_t)ROW_WARPS + threadIdx.x / WARP;
    if (n >= N) return;
    const floatX *token = wte + (size_t)x[n] * C, *position = wpe + n % T * C;
    for (int c = threadIdx.x % WARP * V; c < C; c += WARP * V) {
        float a[V], b[V];
        load<V>(a, token + c);
        load<V>(b, position + c);
        for (int i = 0; i < V; i++) a[i] += b[i];
        store<V>(out + n * C + c, a);
    }
}

/* dwpe (T,C) = (or +=) Σ over sequences of dout (B,T,C) */
template <int V>
__global__ void dwpe_kernel(float *__restrict__ dwpe, const floatX *__restrict__ dout, int B, int T, int C,
                            int add) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V, TC = (size_t)T * C;
    if (i >= TC) return;
    float sum[V] = {0}, d[V];
    if (add) load<V>(sum, dwpe + i);
    for (int b = 0; b < B; b++) {
        load<V>(d, dout + b * TC + i);
        for (int k = 0; k < V; k++) sum[k] += d[k];
    }
    store<V>(dwpe + i, sum);
}

/* dwte in two stages. The host sorts positions by token and cuts them into segments of SEGMENT_ROWS at most,
   so that blocks share a frequent token. First the sum of each segment, parts (segments, C)… */
enum { SEGMENT_ROWS = 32 };
template <int V>
__global__ void dwte_parts_kernel(float *__restrict__ parts, const floatX *__restrict__ dout,
                                  const int32_t *__restrict__ order, const int32_t *__restrict__ segments,
                                  int C) {
    const int segment = blockIdx.x, first = segments[segment], end = segments[segment + 1];
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        float sum[V] = {0}, d[V];
        for (int i = first; i < end; i++) {
            load<V>(d, dout + (size_t)order[i] * C + c);
            for (int k = 0; k < V; k++) sum[k] += d[k];
        }
        store<V>(parts + (size_t)segment * C + c, sum);
    }
}
/* … then of each token, added to what the classifier has written. */
template <int V>
__global__ void dwte_kernel(float *__restrict__ dwte, const float *__restrict__ parts,
                            const int32_t *__restrict__ tokens, const int32_t *__restrict__ first_segment,
                            int C) {
    const int first = first_segment[blockIdx.x], end = first_segment[blockIdx.x + 1];
    float *row = dwte + (size_t)tokens[blockIdx.x] * C;
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        float sum[V], part[V];
        load<V>(sum, row + c);
        for (int i = first; i < end; i++) {
            load<V>(part, parts + (size_t)i * C + c);
            for (int k = 0; k < V; k++) sum[k] += part[k];
        }
        store<V>(row + c, sum);
    }
}

/* out (N,C) = (inp - mean) · rstd · w + b; mean (N) and rstd (N) are written, or read if known. */
template <int V>
__global__ void layernorm_forward_kernel(floatX *__restrict__ out, float *__restrict__ mean,
                                         float *__restrict__ rstd, const floatX *__restrict__ inp,
                                         const floatX *__restrict__ w, const floatX *__restrict__ b, size_t N,
                                         int C, int known) {
    const size_t n = blockIdx.x * (size_t)ROW_WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (n >= N) return;
    const floatX *x = inp + n * C;
    float m, s, v[V], scale[V], shift[V];
    if (known) {
        m = mean[n];
        s = rstd[n];
    } else {
        float sum = 0, squares = 0;
        for (int c = lane * V; c < C; c += WARP * V) {
            load<V>(v, x + c);
            for (int i = 0; i < V; i++) sum += v[i];
        }
        m = reduce<WARP, 0>(sum) / C;
        for (int c = lane * V; c < C; c += WARP * V) {
            load<V>(v, x + c);
            for (int i = 0; i < V; i++) squares += (v[i] - m) * (v[i] - m);
        }
        s = 1.0f / sqrtf(reduce<WARP, 0>(squares) / C + 1e-5f);
        if (lane == 0) {
            mean[n] = m;
            rstd[n] = s;
        }
    }
    for (int c = lane * V; c < C; c += WARP * V) {
        load<V>(v, x + c);
        load<V>(scale, w + c);
        load<V>(shift, b + c);
        for (int i = 0; i < V; i++) v[i] = (v[i] - m) * s * scale[i] + shift[i];
        store<V>(out + n * C + c, v);
    }
}

/* With norm = (inp - mean) · rstd and g = w · dout: dinp = rstd · (g - mean(g) - norm · mean(g · norm)),
   accumulated if `add`. sums (blocks, 2, C): db and dw over the rows of a block. */
template <int V>
__global__ void layernorm_backward_kernel(floatX *__restrict__ dinp, float *__restrict__ sums,
                                          const floatX *__restrict__ dout, const floatX *__restrict__ inp,
                                          const floatX *__restrict__ w, const float *__restrict__ mean,
                                          const float *__restrict__ rstd, size_t N, int C, int add) {
    SHARED(float, shared);                /* (warps, 2, C) */
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
    float *db = shared + (size_t)warp * 2 * C, *dw = db + C;
    for (int c = lane; c < 2 * C; c += WARP) db[c] = 0;
    __syncwarp();
    for (size_t n = blockIdx.x * (size_t)warps + warp; n < N; n += gridDim.x * (size_t)warps) {
        const floatX *x = inp + n * C, *d = dout + n * C;
        const float m = mean[n], s = rstd[n];
        float sum_g = 0, sum_g_norm = 0, xv[V], dv[V], wv[V], b[V], a[V];
        for (int c = lane * V; c < C; c += WARP * V) {
            load<V>(xv, x + c);
            load<V>(dv, d + c);
            load<V>(wv, w + c);
            load<V>(b, db + c);
            load<V>(a, dw + c);
            for (int i = 0; i < V; i++) {
                const float norm = (xv[i] - m) * s, g = wv[i] * dv[i];
                sum_g += g;
                sum_g_norm += g * norm;
                b[i] += dv[i];
                a[i] += dv[i] * norm;
            }
            store<V>(db + c, b);
            store<V>(dw + c, a);
        }
        const float mean_g = reduce<WARP, 0>(sum_g) / C, mean_g_norm = reduce<WARP, 0>(sum_g_norm) / C;
        for (int c = lane * V; c < C; c += WARP * V) {
            load<V>(xv, x + c);
            load<V>(dv, d + c);
            load<V>(wv, w + c);
            float old[V] = {0};
            if (add) load<V>(old, dinp + n * C + c);
            for (int i = 0; i < V; i++)
                old[i] += (wv[i] * dv[i] - mean_g - (xv[i] - m) * s * mean_g_norm) * s;
            store<V>(dinp + n * C + c, old);
        }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < 2 * C; c += blockDim.x) {
        float sum = 0;
        for (int k = 0; k < warps; k++) sum += shared[(size_t)k * 2 * C + c];
        sums[(size_t)blockIdx.x * 2 * C + c] = sum;
    }
}

/* sums (blocks of rows, OC) of the columns of dout (N,OC). */
enum { COLUMN_THREADS = 32, COLUMN_ROWS = 8 };
template <int V>
__global__ void column_sums_kernel(float *__restrict__ sums, const floatX *__restrict__ dout, size_t N,
                                   int OC) {
    __shared__ float shared[COLUMN_ROWS][COLUMN_THREADS * V];
    const int column = threadIdx.x, c = (blockIdx.x * COLUMN_THREADS + column) * V;
    float sum[V] = {0}, d[V];
    const size_t end = c < OC ? N : 0;
#pragma unroll 4
    for (size_t n = blockIdx.y * (size_t)COLUMN_ROWS + threadIdx.y; n < end;
         n += gridDim.y * (size_t)COLUMN_ROWS) {
        load<V>(d, dout + n * OC + c);
        for (int i = 0; i < V; i++) sum[i] += d[i];
    }
    for (int i = 0; i < V; i++) shared[threadIdx.y][column * V + i] = sum[i];
    __syncthreads();
    if (threadIdx.y || c >= OC) return;
    for (int k = 1; k < COLUMN_ROWS; k++)
        for (int i = 0; i < V; i++) sum[i] += shared[k][column * V + i];
    store<V>(sums + (size_t)blockIdx.y * OC + c, sum);
}

/* The second stage: db (C) = Σ over rows of sums (rows, C), or db and dw of sums (rows, 2, C); accumulated if
   `add`. Eight loads of a thread are in flight: one at a time took 13 µs a launch instead of 3 (H200). */
enum { TOTAL_ROWS = 32 };
__global__ void column_total_kernel(float *__restrict__ db, float *__restrict__ dw,
                                    const float *__restrict__ sums, int rows, int C, int add) {
    __shared__ float shared[TOTAL_ROWS][COLUMN_THREADS];
    const int width = dw ? 2 * C : C, c = blockIdx.x * COLUMN_THREADS + threadIdx.x;
    float sum = 0;
    if (c < width) {
#pragma unroll 8
        for (int row = threadIdx.y; row < rows; row += TOTAL_ROWS) sum += sums[(size_t)row * width + c];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= width) return;
#pragma unroll
    for (int k = 1; k < TOTAL_ROWS; k++) sum += shared[k][threadIdx.x];
    float *out = c < C ? db + c : dw + c - C;
    if (add) sum += *out;
    *out = sum;
}

/* GELU, where cuBLASLt cannot fuse it, and for recomputation. out (n) = GELU(inp), or with
   dx, dx times the derivative; out may be dx. */
template <int V> __global__ void gelu_kernel(floatX *out, const floatX *dx, const floatX *inp, size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= n) return;
    float x[V], d[V];
    load<V>(x, inp + at);
    if (dx) load<V>(d, dx + at);
    for (int i = 0; i < V; i++) {
        const float twice_u = x[i] * (1.59576912f + 0.0713548163f * x[i] * x[i]);
        const float slope = 1.59576912f + 3 * 0.0713548163f * x[i] * x[i];
        const float sigma = 1.0f / (1.0f + expf(-twice_u));
        if (dx) x[i] = d[i] * (sigma + x[i] * sigma * (1.0f - sigma) * slope);
        else x[i] *= sigma;
    }
    store<V>(out + at, x);
}

#define LOG2E 1.44269504f                 /* e^x = 2^(x log₂e), one instruction */

/* losses (rows) = -log softmax(logits)[y]. Unless scale is 0, rows of V logits, Vp apart, become scale ·
   (softmax - one-hot), and the padding 0. One block per row, which it reads twice. */
__global__ void crossentropy_kernel(float *losses, floatX *logits, const int32_t *y, int V, int Vp,
                                    float scale) {
    floatX *row = logits + blockIdx.x * (size_t)Vp;
    const int target = y[blockIdx.x];
    const float target_logit = to_float(row[target]);
    float top = -INFINITY, sum = 0, v[WIDTH];
    for (int c = threadIdx.x * WIDTH; c < V; c += blockDim.x * WIDTH) {
        load<WIDTH>(v, row + c);
        if (c + WIDTH > V)
            for (int i = 0; i < WIDTH; i++)
                if (c + i >= V) v[i] = -INFINITY;
        float higher = top;
        for (int i = 0; i < WIDTH; i++) higher = fmaxf(higher, v[i]);
        if (higher > top) sum *= exp2f((top - higher) * LOG2E);
        top = higher;
        for (int i = 0; i < WIDTH; i++) sum += exp2f((v[i] - top) * LOG2E);
    }
    const float highest = block_reduce<1>(top);
    if (top > -INFINITY) sum *= exp2f((top - highest) * LOG2E);     /* else it is 0 */
    sum = block_reduce<0>(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = highest + logf(sum) - target_logit;
    if (scale == 0) return;
    const float factor = scale / sum;
    for (int c = threadIdx.x * WIDTH; c < Vp; c += blockDim.x * WIDTH) {
        load<WIDTH>(v, row + c);
        for (int i = 0; i < WIDTH; i++) v[i] = exp2f((v[i] - highest) * LOG2E) * factor;
        if (c + WIDTH > V || (c <= target && target < c + WIDTH))
            for (int i = 0; i < WIDTH; i++) {
                if (c + i == target) v[i] -= scale;
                if (c + i >= V) v[i] = 0;
            }
        store<WIDTH>(row + c, v);
    }
}

/* === 4. Attention =======================================================================================
   Causal: out = softmax(q·kᵀ / √hs)·v for each head of hs = C / NH channels; qkv is (B,T,3,NH,hs). In base 2,
   with s = q·k log₂e / √hs, the softmax is 2^s / Σ 2^s, and the backward pass recomputes p = 2^(s - lse) from
   lse (B,NH,T) = log₂ Σ 2^s. With delta (B,NH,T) = Σ dout · out: ds = p · (dout·v - delta), dq = ds·k / √hs,
   dk = dsᵀ·q / √hs, dv = pᵀ·dout. */

/* --- Plain kernels: any head size, fp32 or bf16; one warp per query (or key) ---------------------------- */
enum { PLAIN_WARPS = 4 };
static size_t plain_shared(int warps, int hs) {
    return (size_t)warps * (2 * (size_t)hs + 2 * WARP) * sizeof(float);
}

__device__ static inline float dot(const floatX *a, const floatX *b, int n) {
    float sum = 0, x[WIDTH], y[WIDTH];
    if (n % WIDTH)
        for (int i = 0; i < n; i++) sum += to_float(a[i]) * to_float(b[i]);
    else
        for (int i = 0; i < n; i += WIDTH) {     /* heads are aligned */
            load<WIDTH>(x, a + i);
            load<WIDTH>(y, b + i);
            for (int k = 0; k < WIDTH; k++) sum += x[k] * y[k];
        }
    return sum;
}

/* out (B, T - first, C) and lse of the queries from `first` on. Each lane scores a key, then each lane adds
   the values of 32 keys for some channels, with an online softmax (Milakov & Gimelshein 2018). */
__global__ void attention_plain_forward_kernel(floatX *out, float *lse, const floatX *qkv, int first, int T,
                                               int C, int NH) {
    SHARED(float, shared);                /* (warps): sums of hs channels, 32 weights */
    const int hs = C / NH, warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tiles = (T - first + warps - 1) / warps, t = first + blockIdx.x % tiles * warps + warp;
    const size_t pair = blockIdx.x / tiles, h = pair % NH, b = pair / NH;
    if (t >= T) return;
    float *sums = shared + warp * (2 * hs + 2 * WARP), *weights = sums + hs;
    const floatX *head = qkv + b * T * 3 * C + h * hs, *q = head + (size_t)t * 3 * C;
    const float factor = LOG2E / sqrtf((float)hs);
    float top = -INFINITY, total = 0;
    for (int c = lane; c < hs; c += WARP) sums[c] = 0;
    for (int from = 0; from <= t; from += WARP) {
        const int key = from + lane, keys = min(t + 1 - from, (int)WARP);
        float score = -INFINITY;
        if (key <= t) score = factor * dot(q, head + (size_t)key * 3 * C + C, hs);
        const float higher = fmaxf(top, reduce<WARP, 1>(score)), rescale = exp2f(top - higher);
        const float weight = exp2f(score - higher);
        total = total * rescale + reduce<WARP, 0>(weight);
        top = higher;
        weights[lane] = weight;
        __syncwarp();
        for (int c = lane; c < hs; c += WARP) {
            const floatX *v = head + (size_t)from * 3 * C + 2 * C + c;
            float sum = sums[c] * rescale;
            for (int k = 0; k < keys; k++) sum += weights[k] * to_float(v[(size_t)k * 3 * C]);
            sums[c] = sum;
        }
        __syncwarp();
    }
    floatX *o = out + (b * (T - first) + t - first) * C + h * hs;
    for (int c = lane; c < hs; c += WARP) from_float(o + c, sums[c] / total);
    if (lane == 0) lse[pair * T + t] = top + log2f(total);
}

/* delta (B,NH,T), one warp per row of a head */
__global__ void attention_delta_kernel(float *__restrict__ delta, const floatX *__restrict__ dout,
                                       const floatX *__restrict__ out, size_t rows, int T, int C, int NH) {
    const size_t row = blockIdx.x * (size_t)ROW_WARPS + threadIdx.x / WARP;     /* of (B,T,NH) */
    if (row >= rows) return;
    const int hs = C / NH, h = row % NH, t = row / NH % T;
    const size_t b = row / NH / T;
    float sum = 0;
    for (int c = threadIdx.x % WARP; c < hs; c += WARP)
        sum += to_float(dout[row * hs + c]) * to_float(out[row * hs + c]);
    sum = reduce<WARP, 0>(sum);
    if (threadIdx.x % WARP == 0) delta[(b * NH + h) * T + t] = sum;
}

/* dq of a query: each lane computes ds of a key, then the warp adds ds · k of 32 keys. */
__global__ void attention_plain_dq_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv,
                                          const float *lse, const float *delta, int T, int C, int NH) {
    SHARED(float, shared);                /* (warps): sums of hs channels, 32 ds */
    const int hs = C / NH, warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tiles = (T + warps - 1) / warps, t = blockIdx.x % tiles * warps + warp;
    const size_t pair = blockIdx.x / tiles, h = pair % NH, b = pair / NH;
    if (t >= T) return;
    float *sums = shared + warp * (2 * hs + 2 * WARP), *ds = sums + hs;
    const size_t at = b * T * 3 * C + h * hs, row = pair * T + t;
    const floatX *head = qkv + at, *q = head + (size_t)t * 3 * C, *d = dout + (b * T + t) * C + h * hs;
    const float factor = 1 / sqrtf((float)hs);
    for (int c = lane; c < hs; c += WARP) sums[c] = 0;
    for (int from = 0; from <= t; from += WARP) {
        const int key = from + lane, keys = min(t + 1 - from, (int)WARP);
        const floatX *k = head + (size_t)key * 3 * C + C;
        ds[lane] = 0;
        if (key <= t) {
            const float p = exp2f(factor * LOG2E * dot(q, k, hs) - lse[row]);
            ds[lane] = p * (dot(d, k + C, hs) - delta[row]) * factor;
        }
        __syncwarp();
        for (int c = lane; c < hs; c += WARP) {
            float sum = sums[c];
            for (int i = 0; i < keys; i++) sum += ds[i] * to_float(head[(size_t)(from + i) * 3 * C + C + c]);
            sums[c] = sum;
        }
        __syncwarp();
    }
    for (int c = lane; c < hs; c += WARP) from_float(dqkv + at + (size_t)t * 3 * C + c, sums[c]);
}

/* dk and dv of a key: each lane computes p and ds of a query, then the warp adds p · dout and ds · q. */
__global__ void attention_plain_dkdv_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv,
                                            const float *lse, const float *delta, int T, int C, int NH) {
    SHARED(float, shared);                /* (warps): sums of 2 hs channels, 32 p, 32 ds */
    const int hs = C / NH, warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tiles = (T + warps - 1) / warps, t = blockIdx.x % tiles * warps + warp;
    const size_t pair = blockIdx.x / tiles, h = pair % NH, b = pair / NH;
    if (t >= T) return;
    float *dk = shared + warp * (2 * hs + 2 * WARP), *dv = dk + hs, *p = dv + hs, *ds = p + WARP;
    const size_t at = b * T * 3 * C + h * hs;
    const floatX *head = qkv + at, *k = head + (size_t)t * 3 * C + C, *d = dout + b * T * C + h * hs;
    const float factor = 1 / sqrtf((float)hs);
    for (int c = lane; c < hs; c += WARP) dk[c] = dv[c] = 0;
    for (int from = t; from < T; from += WARP) {
        const int query = from + lane, queries = min(T - from, (int)WARP);
        const size_t row = pair * T + query;
        p[lane] = ds[lane] = 0;
        if (query < T) {
            p[lane] = exp2f(factor * LOG2E * dot(head + (size_t)query * 3 * C, k, hs) - lse[row]);
            ds[lane] = p[lane] * (dot(d + (size_t)query * C, k + C, hs) - delta[row]) * factor;
        }
        __syncwarp();
        for (int c = lane; c < hs; c += WARP) {
            float sum_k = dk[c], sum_v = dv[c];
            for (int i = 0; i < queries; i++) {
                sum_k += ds[i] * to_float(head[(size_t)(from + i) * 3 * C + c]);
                sum_v += p[i] * to_float(d[(size_t)(from + i) * C + c]);
            }
            dk[c] = sum_k;
            dv[c] = sum_v;
        }
        __syncwarp();
    }
    floatX *out = dqkv + at + (size_t)t * 3 * C + C;
    for (int c = lane; c < hs; c += WARP) {
        from_float(out + c, dk[c]);
        from_float(out + C + c, dv[c]);
    }
}

/* --- Flash attention on tensor cores: bf16, heads of 64 channels (Dao 2023, "FlashAttention-2") -----------
   A block of four warps takes 128 queries (for dk and dv: keys) of a head, 32 per warp, and loops over tiles
   of 64 keys (queries) in shared memory, prefetching the next. Scores, P and sums stay in registers.
   On Hopper (sm_90a) wgmma multiplies, with operands in shared memory: the four warps, a warpgroup, take 64
   queries together, 16 per warp. Several small blocks per SM, which are not in step, overlap products with
   softmax: 128 rows in two warpgroups took 1.2 times as long for dk and dv (H200). */
#ifndef GPT2_FP32
#if defined __CUDA_ARCH_FEAT_SM90_ALL || defined GPT2_EMULATE_HOPPER
#define HOPPER 1
enum { WARP_TILES = 1, GROUP_WARPS = 4, DQ_KEYS = 64, DKDV_QUERIES = 64 };
enum { FORWARD_BLOCKS = 4, DQ_BLOCKS = 4, DKDV_BLOCKS = 2 };     /* per SM, which limits registers */
#else
#define HOPPER 0
enum { WARP_TILES = 2, GROUP_WARPS = 1, DQ_KEYS = 16, DKDV_QUERIES = 32 };
enum { FORWARD_BLOCKS = 1, DQ_BLOCKS = 1, DKDV_BLOCKS = 1 };
#endif
enum { HS = 64, TILE = 64, STEPS = HS / 16, FLASH_WARPS = 4, FLASH_THREADS = FLASH_WARPS * WARP };
enum { WARP_ROWS = 16 * WARP_TILES, GROUP_ROWS = WARP_ROWS * GROUP_WARPS };     /* multiplied together */
enum { BLOCK_ROWS = WARP_ROWS * FLASH_WARPS, ROW_BYTES = HS * 2, BLOCK_BYTES = BLOCK_ROWS * ROW_BYTES };
enum { TILE_BYTES = TILE * ROW_BYTES, STAGE_BYTES = 2 * TILE_BYTES };
enum { ROW_VALUES = 16 * TILE };          /* bytes of two stages of lse and delta */
typedef __nv_bfloat16 bf16;
#define FLASH_KERNEL(blocks) __global__ __launch_bounds__(FLASH_THREADS, blocks) void
#ifdef __CUDACC__
__constant__ int flash_block_rows = BLOCK_ROWS;     /* of this GPU's code; the host's may be different */
#endif

#ifdef __CUDACC__                         /* the emulated GPU has its own */
typedef uint32_t Shared;                  /* an address in shared memory */
__device__ static inline Shared shared_address(const void *p) { return (Shared)__cvta_generic_to_shared(p); }
/* d (16,8) += a (16,16) · b (16,8). With g = lane / 4 and t = lane % 4, a thread has (row, 2 columns) of a at
   (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); (2 rows, column) of b at (2t, g), (2t + 8, g); d at (g,
   2t), (g + 8, 2t). */
[[maybe_unused]]
__device__ static inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Loads four 8 × 8 matrices: lanes 8 i … 8 i + 7 have the row addresses of the i-th; each lane gets elements
   2 (lane % 4) and the next of row (or, transposed, column) lane / 4. */
__device__ static inline void ldmatrix_x4(uint32_t r[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
[[maybe_unused]]
__device__ static inline void ldmatrix_x4_trans(uint32_t r[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
/* Asynchronous copies of 16 bytes to shared memory, bypassing registers and L1, in groups. */
__device__ static inline void copy_async_16(Shared to, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(global) : "memory");
}
__device__ static inline void copy_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ static inline void copy_async_wait(void) {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
#if HOPPER
/* Describes 64 rows of a swizzled tile to wgmma: address, the 1024 bytes from eight rows to the next, and the
   swizzle of 128 bytes (PTX ISA, "Matrix descriptor"). */
__device__ static inline uint64_t descriptor(Shared rows) {
    const uint64_t address = rows >> 4 & 0x3FFF, stride = 1024 >> 4, swizzle = 1;
    return address | (uint64_t)1 << 16 | stride << 32 | swizzle << 62;
}
#define FOUR(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ALL(d) FOUR(d, 0), FOUR(d, 1), FOUR(d, 2), FOUR(d, 3), FOUR(d, 4), FOUR(d, 5), FOUR(d, 6), FOUR(d, 7)
#define WGMMA(add) "{ .reg .pred add; setp.ne.b32 add, %" add ", 0; " \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, " \
    "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
    "%31}, "
/* Starts d (64,64) = or += a (64,16) · b (16,64), both in shared memory; b is stored by rows n. A warp has 16
   rows of d, distributed as by mma. */
__device__ static inline void wgmma_n(float d[8][4], Shared a, Shared b, int add) {
    asm volatile(WGMMA("34") "%32, %33, add, 1, 1, 0, 0; }" : ALL(d)
                 : "l"(descriptor(a)), "l"(descriptor(b)), "r"(add));
}
/* The same with a in registers, as for mma; b is stored by rows k. */
__device__ static inline void wgmma_k(float d[8][4], const uint32_t a[4], Shared b) {
    asm volatile(WGMMA("37") "{%32, %33, %34, %35}, %36, add, 1, 1, 1; }" : ALL(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(1));
}
__device__ static inline void wgmma_fence(void) {     /* after writes to registers */
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ static inline void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits until only the newest N groups are in flight; no use of d moves before it. */
template <int N> __device__ static inline void wgmma_wait(float d[8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i / 4][i % 4]) :: "memory");
}
__device__ static inline void copies_visible(void) {     /* what this thread has copied, to wgmma */
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif
#endif

/* A tile has rows of 64 bf16, eight pieces of 16 bytes, swizzled to piece ^ row % 8: the same piece of eight
   rows is in different banks. */
__device__ static inline bf16 *piece_at(bf16 *tile, int row, int piece) {
    return tile + row * HS + (piece ^ (row & 7)) * 8;
}

/* Starts copying ROWS rows of a head, from `first` on, to a tile. Rows after T - 1 repeat it, so they are
   finite. The rows of a thread are 16 apart and have the same swizzle. */
template <int ROWS> __device__ static inline
void tile_load(bf16 *tile, const bf16 *head, unsigned stride, int first, int T) {
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const Shared to = shared_address(piece_at(tile, row, piece));
    head += piece * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += FLASH_THREADS / 8)
        copy_async_16(to + i * ROW_BYTES, head + (size_t)(unsigned)min(first + row + i, T - 1) * stride);
}

/* The same for tile number `tile` of two heads, into one of two stages of two tiles. */
__device__ static inline
void stage_load(bf16 *stages, int tile, const bf16 *one, unsigned one_stride, const bf16 *other,
                unsigned other_stride, int T) {
    bf16 *stage = stages + tile % 2 * 2 * TILE * HS;
    tile_load<TILE>(stage, one, one_stride, tile * TILE, T);
    tile_load<TILE>(stage + TILE * HS, other, other_stride, tile * TILE, T);
}

/* Waits for all copies, and for all threads to be done with what they replace next. */
__device__ static inline void tiles_arrive(void) {
    copy_async_wait<0>();
#if HOPPER
    copies_visible();
#endif
    __syncthreads();
}

/* For ldmatrix: the address of a lane's row of 16, and of its half of 16 channels; see rows_a. */
__device__ static inline Shared lane_rows(bf16 *tile) {
    const int lane = threadIdx.x % WARP;
    return __shfl_sync(0xFFFFFFFFu, shared_address(piece_at(tile, lane % 16, lane / 16)), lane);
}
__device__ static inline Shared at_step(Shared address, int step) { return address ^ step * 32; }

/* Loads 16 channels of the rows of a warp as A. */
__device__ static inline void load_a(uint32_t a[WARP_TILES][4], Shared rows) {
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++) ldmatrix_x4(a[m], rows + m * 16 * ROW_BYTES);
}

/* Two floats as bf16 in a word, and back; and 16 columns of sums as A of the next product. */
__device__ static inline uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}
__device__ static inline float2 unpack(uint32_t bits) {
    __nv_bfloat162 both;
    memcpy(&both, &bits, sizeof bits);
    return __bfloat1622float2(both);
}
template <int N> __device__ static inline
void pack_a(uint32_t a[WARP_TILES][4], const float d[WARP_TILES][N][4], int n) {
#pragma unroll
    for (int i = 0; i < WARP_TILES * 4; i++) {
        const float *pair = d[i / 4][n + i / 2 % 2] + i % 2 * 2;
        a[i / 4][i % 4] = pack(pair[0], pair[1]);
    }
}

#if HOPPER
/* Operands are 64 rows in shared memory, by their address. Tiles begin at multiples of 1024 bytes, so their
   swizzle is the hardware's. Products run while other instructions do, until products_wait. */
__device__ static inline Shared rows_a(bf16 *tile) { return shared_address(tile); }
__device__ static inline Shared rows_n(bf16 *tile) { return shared_address(tile); }
__device__ static inline Shared rows_k(bf16 *tile) { return shared_address(tile); }
typedef Shared Operand;                   /* A (64 rows, 64 channels) */
__device__ static inline void load_operand(Operand &a, Shared rows) { a = rows; }

/* d (64,64) = a · bᵀ over 64 channels */
__device__ static inline void scores(float d[1][8][4], Shared a, Shared rows) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) wgmma_n(d[0], a + step * 32, rows + step * 32, step > 0);
    wgmma_commit();
}
/* d (64, 64 channels) += p (64,64) · b */
__device__ static inline void weighted(float d[1][8][4], const float p[1][8][4], Shared rows) {
    uint32_t a[TILE / 16][1][4];
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) pack_a(a[step], p, step * 2);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) wgmma_k(d[0], a[step][0], rows + step * 16 * ROW_BYTES);
    wgmma_commit();
}
template <int N> __device__ static inline void products_wait(float d[1][8][4]) { wgmma_wait<N>(d[0]); }
#else
/* Addresses of operands: 16 × 16 of A, or two 16 × 8 of B (k, n), stored by rows n (K in q·kᵀ) or by rows k
   (V in p·v). A step of 16 channels flips two bits, because of the swizzle. Recomputed for each operand they
   were a third of all instructions; the shuffle of a lane with itself prevents that. */
__device__ static inline Shared rows_a(bf16 *tile) {
    const int lane = threadIdx.x % WARP;
    return __shfl_sync(0xFFFFFFFFu, shared_address(piece_at(tile, lane % 16, lane / 16)), lane);
}
__device__ static inline Shared rows_k(bf16 *tile) { return rows_a(tile); }
__device__ static inline Shared rows_n(bf16 *tile) {
    const int lane = threadIdx.x % WARP, row = lane % 8 + lane / 16 * 8;
    return __shfl_sync(0xFFFFFFFFu, shared_address(piece_at(tile, row, lane / 8 % 2)), lane);
}
template <int N, int M> __device__ static inline void products_wait(float (*)[M][4]) {}     /* mma is done */

/* d (WARP_ROWS, 8 N), columns 8 n … 8 n + 15, += a · B, with B stored by rows n or by rows k. */
template <int N> __device__ static inline
void multiply(float d[WARP_TILES][N][4], int n, const uint32_t a[WARP_TILES][4], Shared rows, int by_rows_k) {
    uint32_t b[4];
    if (by_rows_k) ldmatrix_x4_trans(b, rows);
    else ldmatrix_x4(b, rows);
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++) {
        mma_m16n8k16_bf16(d[m][n], a[m], b);
        mma_m16n8k16_bf16(d[m][n + 1], a[m], b + 2);
    }
}

struct Operand { uint32_t a[STEPS][WARP_TILES][4]; };     /* A (group rows, 64 channels), in registers */
__device__ static inline void load_operand(Operand &o, Shared rows) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) load_a(o.a[step], at_step(rows, step));
}
/* d (group rows, 8 N) = a · bᵀ over 64 channels; a in registers, or loaded step by step */
template <int N> __device__ static inline
void scores(float d[WARP_TILES][N][4], const Operand &a, Shared rows) {
    memset(d, 0, sizeof(float) * WARP_TILES * N * 4);
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int n = 0; n < N; n += 2)
            multiply(d, n, a.a[step], at_step(rows, step) + n * 8 * ROW_BYTES, 0);
}
template <int N> __device__ static inline
void scores(float d[WARP_TILES][N][4], Shared a_rows, Shared rows) {
    memset(d, 0, sizeof(float) * WARP_TILES * N * 4);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint32_t a[WARP_TILES][4];
        load_a(a, at_step(a_rows, step));
#pragma unroll
        for (int n = 0; n < N; n += 2) multiply(d, n, a, at_step(rows, step) + n * 8 * ROW_BYTES, 0);
    }
}
/* d (group rows, 64 channels) += p (group rows, 8 N) · b */
template <int N> __device__ static inline
void weighted(float d[WARP_TILES][8][4], const float p[WARP_TILES][N][4], Shared rows) {
#pragma unroll
    for (int step = 0; step < N / 2; step++) {
        uint32_t a[WARP_TILES][4];
        pack_a(a, p, step * 2);
#pragma unroll
        for (int n = 0; n < 8; n += 2) multiply(d, n, a, at_step(rows, n / 2) + step * 16 * ROW_BYTES, 1);
    }
}
#endif

/* Writes 16 × 64 sums of a warp, times a factor per half, to rows first … of a head; through 16 rows of a
   tile, for 16-byte stores. */
__device__ static inline void store_rows(bf16 *head, size_t stride, int first, int T, bf16 *tile, int row,
                                         const float sums[8][4], float upper, float lower) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const uint32_t high = pack(sums[n][0] * upper, sums[n][1] * upper);
        const uint32_t low = pack(sums[n][2] * lower, sums[n][3] * lower);
        memcpy(piece_at(tile, row + g, n) + 2 * t, &high, 4);
        memcpy(piece_at(tile, row + g + 8, n) + 2 * t, &low, 4);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * 8; i += WARP)
        if (first + i / 8 < T)
            *(uint4 *)(head + (first + i / 8) * stride + i % 8 * 8) =
                *(uint4 *)piece_at(tile, row + i / 8, i % 8);
}

/* Masks scores s (WARP_ROWS, 8 N) of a query and a later key; the first column is `ahead` of the first row.
   sign -1: keys are the rows. */
template <int N> __device__ static inline void mask(float s[WARP_TILES][N][4], int ahead, int sign) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < WARP_TILES * N * 4; i++) {
        const int row = i / (4 * N) * 16 + lane / 4 + i / 2 % 2 * 8;
        const int column = i / 4 % N * 8 + lane % 4 * 2 + i % 2;
        if ((ahead + column - row) * sign > 0) s[i / (4 * N)][i / 4 % N][i % 4] = -INFINITY;
    }
}

/* out (B,T,C), lse (B,NH,T). Blocks of later queries, which have more keys, come first. */
FLASH_KERNEL(FORWARD_BLOCKS)
flash_forward_kernel(bf16 *out, float *lse, const bf16 *qkv, int T, int C, int NH) {
    SHARED(bf16, shared);                 /* queries; two stages of keys, then values */
    bf16 *queries = shared, *stages = shared + BLOCK_ROWS * HS;
    const int blocks = (T + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int first = (blocks - 1 - blockIdx.x % blocks) * BLOCK_ROWS;
    const size_t pair = blockIdx.x / blocks, h = pair % NH, b = pair / NH;
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_ROWS;
    const int last = (min(first + BLOCK_ROWS, T) - 1) / TILE;
    const unsigned stride = 3 * C;
    const bf16 *q = qkv + b * T * stride + h * HS, *k = q + C, *v = k + C;
    const int group_row = threadIdx.x / (GROUP_WARPS * WARP) * GROUP_ROWS;
    const Shared query_rows = rows_a(queries) + group_row * ROW_BYTES;
    const Shared stage_n = rows_n(stages), stage_k = rows_k(stages) + TILE_BYTES;
    const float factor = LOG2E / 8;       /* √HS is 8 */
    tile_load<BLOCK_ROWS>(queries, q, stride, first, T);
    stage_load(stages, 0, k, stride, v, stride, T);
    copy_async_commit();
    float sums[WARP_TILES][8][4] = {}, top[WARP_TILES][2], total[WARP_TILES][2] = {};
    Operand q_rows;
    for (int i = 0; i < WARP_TILES * 2; i++) top[i / 2][i % 2] = -INFINITY;
    tiles_arrive();
    load_operand(q_rows, query_rows);
    for (int tile = 0; tile <= last; tile++) {
        const Shared keys = stage_n + tile % 2 * STAGE_BYTES, values = stage_k + tile % 2 * STAGE_BYTES;
        tiles_arrive();                  /* the tile is here, and the other stage no longer in use */
        if (tile < last) stage_load(stages, tile + 1, k, stride, v, stride, T);
        copy_async_commit();
        const int ahead = tile * TILE - first - warp_row;     /* of the first key to the first query */
        if (tile * TILE - first - group_row >= GROUP_ROWS) continue;     /* no query of the group sees them */
        float s[WARP_TILES][8][4];
        scores(s, q_rows, keys);
        products_wait<0>(s);
        if (ahead + TILE > 0) mask(s, ahead, 1);
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
            float rescale[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = -INFINITY;
#pragma unroll
                for (int i = 0; i < 16; i++) highest = fmaxf(highest, s[m][i / 2][half * 2 + i % 2]);
                const float higher = fmaxf(top[m][half], reduce<4, 1>(highest) * factor);
                rescale[half] = exp2f(top[m][half] - higher);
                top[m][half] = higher;
                total[m][half] *= rescale[half];
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    float *score = &s[m][i / 2][half * 2 + i % 2];
                    *score = exp2f(*score * factor - higher);
                    total[m][half] += *score;
                }
            }
            if (__any_sync(0xFFFFFFFFu, rescale[0] * rescale[1] < 1))     /* rarely, after the first tiles */
#pragma unroll
                for (int i = 0; i < 32; i++) sums[m][i / 4][i % 4] *= rescale[i / 2 % 2];
        }
        weighted(sums, s, values);
        products_wait<0>(sums);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++) {
        const int row = first + warp_row + m * 16, query = row + lane / 4;
        const float upper = reduce<4, 0>(total[m][0]), lower = reduce<4, 0>(total[m][1]);
        float *row_lse = lse + pair * T;
        if (lane % 4 == 0 && query < T) row_lse[query] = top[m][0] + log2f(upper);
        if (lane % 4 == 0 && query + 8 < T) row_lse[query + 8] = top[m][1] + log2f(lower);
        store_rows(out + b * T * C + h * HS, C, row, T, queries, warp_row + m * 16, sums[m], 1 / upper,
                   1 / lower);
    }
}

/* dq and, before it, delta, with blocks and tiles as in the forward pass; 16 keys at a time. */
FLASH_KERNEL(DQ_BLOCKS)
flash_dq_kernel(bf16 *dqkv, float *delta, const bf16 *dout, const bf16 *out, const bf16 *qkv,
                const float *lse, int T, int C, int NH) {
    SHARED(bf16, shared);                 /* queries, dout, out; two stages of keys, then values */
    bf16 *queries = shared, *douts = queries + BLOCK_ROWS * HS, *outs = douts + BLOCK_ROWS * HS;
    bf16 *stages = outs + BLOCK_ROWS * HS;
    const int blocks = (T + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int first = (blocks - 1 - blockIdx.x % blocks) * BLOCK_ROWS;
    const size_t pair = blockIdx.x / blocks, h = pair % NH, b = pair / NH;
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_ROWS;
    const int last = (min(first + BLOCK_ROWS, T) - 1) / TILE;
    const unsigned stride = 3 * C;
    const size_t head = b * T * stride + h * HS, out_head = b * T * C + h * HS;
    const bf16 *k = qkv + head + C, *v = k + C;
    const int group_row = threadIdx.x / (GROUP_WARPS * WARP) * GROUP_ROWS;
    const Shared query_rows = rows_a(queries) + group_row * ROW_BYTES;
    const Shared stage_n = rows_n(stages), stage_k = rows_k(stages);
    const float factor = LOG2E / 8;
    tile_load<BLOCK_ROWS>(queries, qkv + head, stride, first, T);
    tile_load<BLOCK_ROWS>(douts, dout + out_head, C, first, T);
    tile_load<BLOCK_ROWS>(outs, out + out_head, C, first, T);
    stage_load(stages, 0, k, stride, v, stride, T);
    copy_async_commit();
    float row_lse[WARP_TILES][2], row_delta[WARP_TILES][2] = {};
    Operand q_rows, dout_rows;
    tiles_arrive();
    const Shared warp_rows = lane_rows(douts) + warp_row * ROW_BYTES;
    load_operand(q_rows, query_rows);
    load_operand(dout_rows, query_rows + BLOCK_BYTES);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint32_t o[WARP_TILES][4], d[WARP_TILES][4];
        load_a(d, at_step(warp_rows, step));
        load_a(o, at_step(warp_rows, step) + BLOCK_BYTES);
#pragma unroll
        for (int i = 0; i < WARP_TILES * 4; i++) {     /* i % 2 is the half */
            const float2 x = unpack(o[i / 4][i % 4]), dx = unpack(d[i / 4][i % 4]);
            row_delta[i / 4][i % 2] += x.x * dx.x + x.y * dx.y;
        }
    }
#pragma unroll
    for (int i = 0; i < WARP_TILES * 2; i++) {
        const int query = first + warp_row + i / 2 * 16 + lane / 4 + i % 2 * 8;
        const size_t row = pair * T + query;
        row_lse[i / 2][i % 2] = query < T ? lse[row] : INFINITY;     /* p becomes 0 */
        row_delta[i / 2][i % 2] = reduce<4, 0>(row_delta[i / 2][i % 2]);
        if (lane % 4 == 0 && query < T) delta[row] = row_delta[i / 2][i % 2];
    }
    float sums[WARP_TILES][8][4] = {};
    for (int tile = 0; tile <= last; tile++) {
        tiles_arrive();
        if (tile < last) stage_load(stages, tile + 1, k, stride, v, stride, T);
        copy_async_commit();
#pragma unroll 1
        for (int part = 0; part < TILE; part += DQ_KEYS) {     /* unrolled, it would spill registers */
            const int ahead = tile * TILE + part - first - warp_row;
            if (tile * TILE + part - first - group_row >= GROUP_ROWS) break;     /* only later keys follow */
            const Shared at = tile % 2 * STAGE_BYTES + part * ROW_BYTES, keys = stage_n + at;
            float s[WARP_TILES][DQ_KEYS / 8][4], dp[WARP_TILES][DQ_KEYS / 8][4];
            scores(s, q_rows, keys);
            scores(dp, dout_rows, keys + TILE_BYTES);     /* values */
            products_wait<1>(s);
            if (ahead + DQ_KEYS > 0) mask(s, ahead, 1);
#pragma unroll
            for (int i = 0; i < WARP_TILES * DQ_KEYS / 2; i++) {
                float *score = &s[i / (DQ_KEYS / 2)][i / 4 % (DQ_KEYS / 8)][i % 4];
                *score = exp2f(*score * factor - row_lse[i / (DQ_KEYS / 2)][i / 2 % 2]);
            }
            products_wait<0>(dp);
#pragma unroll
            for (int i = 0; i < WARP_TILES * DQ_KEYS / 2; i++) {
                const int m = i / (DQ_KEYS / 2), n = i / 4 % (DQ_KEYS / 8);
                s[m][n][i % 4] *= dp[m][n][i % 4] - row_delta[m][i / 2 % 2];
            }
            weighted(sums, s, stage_k + at);
            products_wait<0>(sums);
        }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++)
        store_rows(dqkv + (k - qkv) - C, stride, first + warp_row + m * 16, T, queries, warp_row + m * 16,
                   sums[m], 0.125f, 0.125f);
}

/* dk and dv, from all queries that attend to the keys, 32 at a time. The scores are transposed (keys by
   queries), so they are A of both products. Keys and values are reloaded each time: registers are full. */
FLASH_KERNEL(DKDV_BLOCKS)
flash_dkdv_kernel(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float *lse, const float *delta,
                  int T, int C, int NH) {
    SHARED(bf16, shared);                 /* keys, values; two stages of queries, dout; of lse, delta */
    bf16 *keys = shared, *values = keys + BLOCK_ROWS * HS, *stages = values + BLOCK_ROWS * HS;
    float *rows = (float *)(stages + 4 * TILE * HS);
    const int blocks = (T + BLOCK_ROWS - 1) / BLOCK_ROWS, first = blockIdx.x % blocks * BLOCK_ROWS;
    const size_t pair = blockIdx.x / blocks, h = pair % NH, b = pair / NH;
    const int thread = threadIdx.x, lane = thread % WARP, warp_row = thread / WARP * WARP_ROWS;
    const int first_tile = first / TILE, last = (T - 1) / TILE;
    const unsigned stride = 3 * C;
    const size_t head = b * T * stride + h * HS;
    const bf16 *q = qkv + head, *o = dout + b * T * C + h * HS;
    const int group_row = thread / (GROUP_WARPS * WARP) * GROUP_ROWS;
    const Shared stage_n = rows_n(stages), stage_k = rows_k(stages);
    const Shared key_rows = stage_k + (group_row - 2 * BLOCK_ROWS) * ROW_BYTES;     /* before the stages */
    const float factor = LOG2E / 8, *row_source = (thread < TILE ? lse : delta) + pair * T;
    const float row_none = thread < TILE ? INFINITY : 0;     /* where there is no query, p becomes 0 */
    int query = first_tile * TILE + thread % TILE;
    tile_load<BLOCK_ROWS>(keys, q + C, stride, first, T);
    tile_load<BLOCK_ROWS>(values, q + 2 * C, stride, first, T);
    stage_load(stages, first_tile, q, stride, o, C, T);
    copy_async_commit();
    rows[first_tile % 2 * 2 * TILE + thread] = query < T ? row_source[query] : row_none;
    float dk[WARP_TILES][8][4] = {}, dv[WARP_TILES][8][4] = {};
    for (int tile = first_tile; tile <= last; tile++) {
        query += TILE;
        const float next_row = query < T ? row_source[query] : row_none;
        tiles_arrive();
        if (tile < last) stage_load(stages, tile + 1, q, stride, o, C, T);
        copy_async_commit();
#pragma unroll 1
        for (int part = 0; part < TILE; part += DKDV_QUERIES) {
            const int ahead = tile * TILE + part - first - warp_row;     /* of queries to keys */
            if (tile * TILE + part - first - group_row + DKDV_QUERIES <= 0) continue;     /* keys are later */
            const Shared at = tile % 2 * STAGE_BYTES + part * ROW_BYTES;
            const float *part_lse = rows + tile % 2 * 2 * TILE + part, *part_delta = part_lse + TILE;
            float s[WARP_TILES][DKDV_QUERIES / 8][4], dp[WARP_TILES][DKDV_QUERIES / 8][4];
            scores(s, key_rows, stage_n + at);
            scores(dp, key_rows + BLOCK_BYTES, stage_n + at + TILE_BYTES);     /* values, dout */
            products_wait<1>(s);
            if (ahead < WARP_ROWS) mask(s, ahead, -1);
#pragma unroll
            for (int i = 0; i < WARP_TILES * DKDV_QUERIES / 2; i++) {
                const int n = i / 4 % (DKDV_QUERIES / 8), column = n * 8 + lane % 4 * 2 + i % 2;
                float *score = &s[i / (DKDV_QUERIES / 2)][n][i % 4];
                *score = exp2f(*score * factor - part_lse[column]);
            }
            weighted(dv, s, stage_k + at + TILE_BYTES);
            products_wait<1>(dp);
#pragma unroll
            for (int i = 0; i < WARP_TILES * DKDV_QUERIES / 2; i++) {
                const int m = i / (DKDV_QUERIES / 2), n = i / 4 % (DKDV_QUERIES / 8);
                const int column = n * 8 + lane % 4 * 2 + i % 2;
                dp[m][n][i % 4] = s[m][n][i % 4] * (dp[m][n][i % 4] - part_delta[column]);
            }
            weighted(dk, dp, stage_k + at);
            products_wait<0>(dv);
            products_wait<0>(dk);
        }
        rows[(tile + 1) % 2 * 2 * TILE + thread] = next_row;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++) {
        const int row = warp_row + m * 16;
        store_rows(dqkv + (q - qkv) + C, stride, first + row, T, keys, row, dk[m], 0.125f, 0.125f);
        store_rows(dqkv + (q - qkv) + 2 * C, stride, first + row, T, values, row, dv[m], 1, 1);
    }
}
#endif

/* === 5. GPT-2 =========================================================================================== */
template <typename X> union TensorsOf {
    struct {
        X *wte, *wpe;                     /* (Vp, C), also of the classifier; (max_T, C) */
        X *ln1w, *ln1b;                   /* (L, C) from here to fcprojb: stacked over layers */
        X *qkvw, *qkvb;                   /* (L, 3C, C), (L, 3C) */
        X *attprojw, *attprojb;           /* (L, C, C), (L, C) */
        X *ln2w, *ln2b;                   /* (L, C) */
        X *fcw, *fcb;                     /* (L, 4C, C), (L, 4C) */
        X *fcprojw, *fcprojb;             /* (L, C, 4C), (L, C) */
        X *lnfw, *lnfb;                   /* (C) */
    };
    X *all[GPT2_TENSORS];
};

/* Each activation exists once for all layers, or once per layer; residual1 also after the last layer. */
enum Purpose { EVALUATE, GENERATE, TRAIN };
enum { ACTIVATIONS = 24 };
typedef union {
    struct {
        int32_t *batch;                   /* what the host sends: see Batch */
        float *losses, *meanf, *rstdf;    /* (B,T) */
        floatX *lnf, *logits;             /* (B,T,C) output of the last layer norm; (chunk, Vp) */
        floatX *dresidual, *dln, *dhidden;  /* gradients: (B,T,C); (B,T,C) of ln, att; (B,T,4C) of fc, qkv */
        float *delta, *sums;              /* (B,NH,T), see attention; partial sums of blocks */
        floatX *residual1, *residual2;    /* (B,T,C) the residual stream before attention, before MLP */
        floatX *ln1, *ln2, *gelu;         /* (B,T,C), (B,T,C), (B,T,4C): stored or recomputed */
        floatX *qkv, *att, *fc;           /* (B,T,3C), (B,T,C), (B,T,4C) before GELU */
        float *mean1, *rstd1, *mean2, *rstd2;     /* (B,T) */
        float *lse;                       /* (B,NH,T) */
    };
    char *all[ACTIVATIONS];
} Activations;
static_assert(sizeof(Activations) == ACTIVATIONS * sizeof(char *), "ACTIVATIONS is their number");
#define INDEX_OF(activation) (offsetof(Activations, activation) / sizeof(char *))

/* A batch on its way to the GPU, N = B T elements each; the last four for the embedding gradient. */
typedef struct {
    int32_t *x, *y;
    int32_t *order;                       /* positions, sorted by token */
    int32_t *segments;                    /* + 1: where each begins in order, and the end */
    int32_t *tokens;                      /* those that occur */
    int32_t *first_segment;               /* + 1: of each of these, and the end */
} Batch;
static size_t batch_bytes(size_t N) { return (6 * N + 2) * sizeof(int32_t); }
static Batch batch_at(int32_t *p, size_t N) {
    return Batch{p, p + N, p + 2 * N, p + 3 * N, p + 4 * N + 1, p + 5 * N + 1};
}

/* A pass as a CUDA graph: one launch instead of hundreds, valid for the same key. */
typedef struct {
    void (*pass)(GPT2 *model);
    size_t B, T;
    const void *act_memory, *grads, *params;
    int train, grads_zero, recompute;
    float scale;
} GraphKey;
typedef struct { GraphKey key; cudaGraphExec_t made; } Graph;
enum { GRAPHS = 6 };

struct GPT2 {
    GPT2Config config;
    size_t C, NH, L, V, Vp;
    floatX *params;                       /* as kernels read them; in fp32, memory[GPT2_PARAM] */
    float *memory[4];                     /* of each kind, fp32; NULL until needed; [0]: masters */
    size_t start[GPT2_TENSORS + 1];       /* of each tensor in a memory, aligned, and the end */
    int64_t updates;
    int grads_zero;                      /* gradients count as 0: the next backward pass overwrites them */
    int backward_due;                     /* the gradient of the classifier is added, those of blocks not */
    float norm;                           /* of the gradients, NaN if unknown */
    int recompute;                        /* 0: nothing, 1: GELU, 2: GELU and layer norm */
    int bf16_only;                       /* no masters: bf16 with stochastic rounding */
    int gelu_unfused;                    /* cuBLASLt does not support the fusion */
    int train;                            /* the forward pass is for the gradient of scale · loss */
    float scale;
    size_t B, T, chunk;                   /* of the last forward pass; chunk: rows of logits at a time */
    size_t cached;                        /* leading tokens of host.x with keys and values in qkv */
    size_t act_start[ACTIVATIONS], act_stride[ACTIVATIONS];     /* in bytes; to the next layer */
    char *act_memory;
    size_t act_bytes;
    Batch host;                           /* pinned */
    int32_t *host_memory;
    float *host_losses;                   /* pinned */
    size_t host_rows;                     /* capacity of these and of staging, in tokens */
    int32_t *staging;                     /* on the GPU: the next batch, while one is in use */
    int segments, tokens;                 /* of the batch, see Batch */
    int32_t *token_counts;                /* (V) */
    Graph graphs[GRAPHS];
    int next_graph;
    int sms;                              /* multiprocessors of the GPU */
    unsigned flash_rows;                  /* of a block of flash attention, as compiled for this GPU */
    size_t max_shared;                   /* bytes of shared memory that a block can have */
    cudaStream_t stream, upload;
    cudaEvent_t uploaded, classified;
    Blas blas;
};

/* --- Memory --------------------------------------------------------------------------------------------- */
static void *device_memory(size_t bytes, cudaStream_t stream) {      /* 0 */
    void *p = NULL;
    if (cudaMalloc(&p, bytes + !bytes) != cudaSuccess) {     /* at least 1 */
        cudaGetLastError();
        gpt2_fail("no memory for %.0f MB; reduce the model, the batch size or the sequence length",
                  (double)bytes * 1e-6);
        return NULL;
    }
    if (gpu_ok(cudaMemsetAsync(p, 0, bytes, stream))) return p;
    cudaFree(p);
    return NULL;
}

static float *memory_of(GPT2 *m, int kind) {     /* allocated on first use */
    if (!m->memory[kind]) m->memory[kind] = (float *)device_memory(m->start[GPT2_TENSORS] * 4, m->stream);
    return m->memory[kind];
}

/* The tensors in a memory, of stacked ones layer l. */
template <typename X> static TensorsOf<X> tensors(const GPT2 *m, X *memory, size_t l) {
    TensorsOf<X> t;
    for (int i = 0; i < GPT2_TENSORS; i++) {
        t.all[i] = memory + m->start[i];
        if (gpt2_is_stacked(i)) t.all[i] += l * ((size_t)gpt2_tensor(&m->config, i, NULL, NULL) / m->L);
    }
    return t;
}
static Activations activations(const GPT2 *m, size_t l) {
    Activations a;
    for (int i = 0; i < ACTIVATIONS; i++) a.all[i] = m->act_memory + m->act_start[i] + l * m->act_stride[i];
    return a;
}

/* Rows of logits per chunk: even chunks of about this many bytes. */
#ifndef GPT2_LOGITS_BYTES
#define GPT2_LOGITS_BYTES (2.0 * (1 << 30))
#endif
static size_t chunk_rows(size_t N, size_t row_bytes) {
    const size_t most = (size_t)(GPT2_LOGITS_BYTES / (double)row_bytes) + 1;
    return min_of(N, round_to(ceil_div(N, ceil_div(N, most)), 16));
}

/* Places the activations for B × T tokens. Returns their bytes. */
static size_t place_activations(GPT2 *m, size_t B, size_t T, Purpose purpose) {
    const size_t N = B * T, BTC = N * m->C * sizeof(floatX), BT = N * sizeof(float), heads = BT * m->NH;
    const size_t train = purpose == TRAIN, L = m->L;
    size_t each = 1, ln = 1, gelu = 1, qkv_layers = L, stream_layers = 1;     /* copies of activations */
    if (train) {
        each = L;
        stream_layers = L + 1;
    }
    if (m->recompute < 2) ln = each;
    if (m->recompute < 1) gelu = each;
    if (purpose == EVALUATE) qkv_layers = 1;
    const size_t sums = (4 * (size_t)m->sms + 1) * 4 * m->C * sizeof(float);
    size_t logit = sizeof(float);         /* fp32 for gpt2_logits */
    if (train) logit = sizeof(floatX);
    m->chunk = 1;
    if (purpose != GENERATE) m->chunk = chunk_rows(N, m->Vp * logit);
    const struct { size_t activation, bytes, layers; } sizes[] = {
        {INDEX_OF(batch), batch_bytes(N), 1}, {INDEX_OF(losses), BT, 1},
        {INDEX_OF(meanf), BT, 1}, {INDEX_OF(rstdf), BT, 1}, {INDEX_OF(lnf), BTC, 1},
        {INDEX_OF(logits), m->chunk * m->Vp * logit, 1},
        {INDEX_OF(dresidual), train * BTC, 1}, {INDEX_OF(dln), train * BTC, 1},
        {INDEX_OF(dhidden), train * 4 * BTC, 1},
        {INDEX_OF(delta), train * heads, 1}, {INDEX_OF(sums), train * sums, 1},
        {INDEX_OF(residual1), BTC, stream_layers}, {INDEX_OF(residual2), BTC, each},
        {INDEX_OF(ln1), BTC, ln}, {INDEX_OF(ln2), BTC, ln}, {INDEX_OF(gelu), 4 * BTC, gelu},
        {INDEX_OF(qkv), 3 * BTC, qkv_layers}, {INDEX_OF(att), BTC, each}, {INDEX_OF(fc), 4 * BTC, each},
        {INDEX_OF(mean1), BT, each}, {INDEX_OF(rstd1), BT, each},
        {INDEX_OF(mean2), BT, each}, {INDEX_OF(rstd2), BT, each}, {INDEX_OF(lse), heads, each},
    };
    static_assert(sizeof sizes / sizeof *sizes == ACTIVATIONS, "a size for each activation");
    size_t at = 0;
    for (const auto &size : sizes) {
        const size_t bytes = round_to(size.bytes, 256);
        m->act_start[size.activation] = at;
        m->act_stride[size.activation] = bytes * (size.layers > 1);
        at += bytes * size.layers;
    }
    return at;
}

/* Allocates the activations; increases recomputation until they fit. */
static int layout_activations(GPT2 *m, size_t B, size_t T, Purpose purpose) {
    if ((double)B * (double)T * (double)m->C * (double)m->L > 1e15)
        return gpt2_fail("a batch of %zu x %zu tokens does not fit into memory; reduce it", B, T);
    size_t free_bytes = 0, gpu_bytes, total = place_activations(m, B, T, purpose);
    const size_t moments = !m->memory[GPT2_MOMENT1] + !m->memory[GPT2_MOMENT2];     /* not yet allocated */
    const size_t later = (purpose == TRAIN) * moments * m->start[GPT2_TENSORS] * sizeof(float);
    if (total > m->act_bytes) {
        cudaFree(m->act_memory);
        m->act_memory = NULL;
        m->act_bytes = 0;
        if (!gpu_ok(cudaMemGetInfo(&free_bytes, &gpu_bytes))) return -1;
        for (;; m->recompute++) {         /* kernels and graphs need some memory on first use */
            const int last = purpose != TRAIN || m->recompute == 2;
            total = place_activations(m, B, T, purpose);
            if (last || total + later + min_of(free_bytes / 16, 512 << 20) <= free_bytes)
                m->act_memory = (char *)device_memory(total, m->stream);
            if (m->act_memory || last) break;
        }
        if (m->act_memory) m->act_bytes = total;
    }
    if (!m->act_memory) return -1;
    if (B * T <= m->host_rows) return 0;
    cudaFree(m->staging);
    cudaFreeHost(m->host_memory);
    cudaFreeHost(m->host_losses);
    m->host_memory = NULL;
    m->host_losses = NULL;
    m->host_rows = 0;
    m->staging = (int32_t *)device_memory(batch_bytes(B * T), m->stream);
    if (!m->staging || !gpu_ok(cudaStreamSynchronize(m->stream)) ||     /* zeroed before the upload */
        !gpu_ok(cudaMallocHost((void **)&m->host_memory, batch_bytes(B * T))) ||
        !gpu_ok(cudaMallocHost((void **)&m->host_losses, B * T * sizeof(float)))) return -1;
    memset(m->host_losses, 0, B * T * sizeof(float));
    m->host_rows = B * T;
    return 0;
}

/* --- Making and freeing --------------------------------------------------------------------------------- */
GPT2 *gpt2_create(const GPT2Config *config) { return gpt2_create_mapped(config, -1); }

/* Streams, events and cuBLASLt. */
static int device_open(GPT2 *m) {
    int count = 0, device = 0;
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        cudaGetLastError();
        return gpt2_fail("no GPU found (%s); use the CPU library",
                         error ? cudaGetErrorString(error) : "the CUDA driver has none");
    }
    if (!gpu_ok(cudaGetDevice(&device)) || !gpu_ok(cudaGetDeviceProperties(&properties, device))) return -1;
    if (properties.major < 8)
        return gpt2_fail("the GPU '%s' has compute capability %d.%d, expected 8.0 or more", properties.name,
                         properties.major, properties.minor);
    m->sms = properties.multiProcessorCount;
    m->max_shared = properties.sharedMemPerBlockOptin;
    if (plain_shared(1, (int)m->C) > m->max_shared)
        return gpt2_fail("model has C %zu, expected at most %zu, which this GPU's shared memory allows", m->C,
                         (m->max_shared / sizeof(float) - 2 * WARP) / 2);
    const void *kernels[] = {             /* may use more than 48 KB of shared memory */
        (const void *)layernorm_backward_kernel<1>, (const void *)layernorm_backward_kernel<WIDTH>,
        (const void *)attention_plain_forward_kernel, (const void *)attention_plain_dq_kernel,
        (const void *)attention_plain_dkdv_kernel,
#ifndef GPT2_FP32
        (const void *)flash_forward_kernel, (const void *)flash_dq_kernel, (const void *)flash_dkdv_kernel,
#endif
    };
    for (const void *kernel : kernels)
        if (!gpu_ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)m->max_shared))) return -1;
#ifndef GPT2_FP32
    m->flash_rows = BLOCK_ROWS;
#ifdef __CUDACC__
    if (!gpu_ok(cudaMemcpyFromSymbol(&m->flash_rows, flash_block_rows, sizeof(int)))) return -1;
#endif
#endif
    if (!gpu_ok(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking)) ||
        !gpu_ok(cudaStreamCreateWithFlags(&m->upload, cudaStreamNonBlocking)) ||
        !gpu_ok(cudaEventCreate(&m->uploaded)) || !gpu_ok(cudaEventCreate(&m->classified)) ||
        !blas_ok(cublasLtCreate(&m->blas.handle))) return -1;
    m->blas.stream = m->stream;
    m->blas.workspace = device_memory(WORKSPACE, m->stream);
    return -!m->blas.workspace;
}

/* Reads the parameters of an open model file. */
static int params_read(GPT2 *m, int file) {
    const size_t most = 1 << 20;
    float *piece = new (std::nothrow) float[most];
    off_t at = 1024;
    if (!piece) return gpt2_fail("no memory for %zu bytes", most * sizeof *piece);
    int failed = 0;
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const int64_t size = gpt2_tensor(&m->config, t, NULL, NULL);
        for (int64_t first = 0, count; first < size && !failed; first += count) {
            count = (int64_t)min_of(most, (size_t)(size - first));
            const ssize_t bytes = (ssize_t)count * (ssize_t)sizeof *piece;
            if (pread(file, piece, (size_t)bytes, at) != bytes)
                failed = gpt2_fail("the model's file ends early");
            failed = failed || gpt2_set(m, t, GPT2_PARAM, first, count, piece);
            at += bytes;
        }
    }
    delete[] piece;
    return failed;
}

GPT2 *gpt2_create_mapped(const GPT2Config *config, int file) {
    api_begin();
    if (gpt2_config_check(config)) return NULL;
    GPT2 *m = new (std::nothrow) GPT2();
    int32_t *counts = new (std::nothrow) int32_t[(size_t)config->V];
    if (!m || !counts) {
        gpt2_fail("no memory for a model");
        delete[] counts;
        delete m;
        return NULL;
    }
    m->config = *config;
    m->C = (size_t)config->C;
    m->NH = (size_t)config->NH;
    m->L = (size_t)config->L;
    m->V = (size_t)config->V;
    m->Vp = round_to(m->V, 128);
    m->grads_zero = 1;
    m->norm = NAN;
    m->token_counts = counts;
    for (int i = 0; i < GPT2_TENSORS; i++)
        m->start[i + 1] = m->start[i] + round_to((size_t)gpt2_tensor(config, i, NULL, NULL), 64);
    if (!device_open(m) && memory_of(m, GPT2_PARAM)) {
        m->params = (floatX *)m->memory[GPT2_PARAM];
        if (sizeof(floatX) != sizeof(float))
            m->params = (floatX *)device_memory(m->start[GPT2_TENSORS] * sizeof(floatX), m->stream);
        if (m->params && (file < 0 || !params_read(m, file))) return m;
    }
    gpt2_free(m);
    return NULL;
}

void gpt2_free(GPT2 *m) {
    if (!m) return;
    if (m->stream) cudaStreamSynchronize(m->stream);
    for (int i = 0; i < GRAPHS; i++)
        if (m->graphs[i].made) cudaGraphExecDestroy(m->graphs[i].made);
    for (int i = 0; i < PLANS; i++) plan_free(&m->blas.plans[i]);
    if (m->blas.handle) cublasLtDestroy(m->blas.handle);
    if ((void *)m->params != (void *)m->memory[GPT2_PARAM]) cudaFree(m->params);
    for (int kind = 0; kind < 4; kind++) cudaFree(m->memory[kind]);
    cudaFree(m->act_memory);
    cudaFree(m->blas.workspace);
    cudaFree(m->staging);
    cudaFreeHost(m->host_memory);
    cudaFreeHost(m->host_losses);
    if (m->uploaded) cudaEventDestroy(m->uploaded);
    if (m->classified) cudaEventDestroy(m->classified);
    if (m->upload) cudaStreamDestroy(m->upload);
    if (m->stream) cudaStreamDestroy(m->stream);
    cudaGetLastError();
    delete[] m->token_counts;
    delete m;
}

GPT2Config gpt2_config(const GPT2 *m) { return m->config; }
int64_t *gpt2_updates(GPT2 *m) { return &m->updates; }
void gpt2_zero_grad(GPT2 *m) {
    m->grads_zero = 1;
    m->backward_due = 0;
    m->norm = NAN;
}
const float *gpt2_losses(GPT2 *m) { return m->host_losses; }

/* --- Tensors in and out --------------------------------------------------------------------------------- */
template <typename To, typename From>
__global__ void convert_kernel(To *__restrict__ out, const From *__restrict__ in, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) from_float(out + i, to_float(in[i]));
}
template <typename To, typename From> static void convert(GPT2 *m, To *out, const From *in, size_t n) {
    if (n) LAUNCH((convert_kernel<To, From>), blocks(n, 256), 256, 0, m->stream, out, in, n);
}

/* The memory of a kind with its true values; NULL while gradients are incomplete. */
static float *readable_memory(GPT2 *m, int kind) {
    const int grads = kind == GPT2_GRAD;
    if (grads && m->backward_due) {
        gpt2_fail("the gradients are incomplete: call gpt2_backward after gpt2_forward");
        return NULL;
    }
    float *memory = memory_of(m, kind);
    if (memory && grads && m->grads_zero &&
        !gpu_ok(cudaMemsetAsync(memory, 0, m->start[GPT2_TENSORS] * sizeof *memory, m->stream))) return NULL;
    return memory;
}

/* Copies bf16-only parameters through a piece of fp32. */
static int bf16_copy(GPT2 *m, size_t at, size_t count, float *out, const float *in) {
    const size_t most = min_of(count, 1 << 20);
    float *piece = (float *)device_memory(most * sizeof *piece, m->stream);
    for (size_t i = 0, n; piece && i < count && !gpu_failed; i += n) {
        n = min_of(most, count - i);
        if (in) gpu_ok(cudaMemcpyAsync(piece, in + i, n * sizeof *in, cudaMemcpyHostToDevice, m->stream));
        if (in) convert(m, m->params + at + i, piece, n);
        else convert(m, piece, m->params + at + i, n);
        if (out) gpu_ok(cudaMemcpyAsync(out + i, piece, n * sizeof *out, cudaMemcpyDeviceToHost, m->stream));
        gpu_ok(cudaStreamSynchronize(m->stream));
    }
    cudaFree(piece);
    if (!piece) return -1;
    return api_status();
}

/* Adds fp32 master weights, initialized from the parameters, or removes them. */
static int set_masters(GPT2 *m, int wanted) {
    const size_t count = m->start[GPT2_TENSORS];
    if (sizeof(floatX) == sizeof(float) || wanted != m->bf16_only) return 0;
    m->bf16_only = 0;
    if (wanted && !memory_of(m, GPT2_PARAM)) m->bf16_only = 1;
    if (wanted && !m->bf16_only)
        convert(m, m->memory[GPT2_PARAM], m->params, count);
    if (wanted && m->bf16_only) return -1;
    if (wanted) return api_status();
    gpu_ok(cudaStreamSynchronize(m->stream));
    gpu_ok(cudaFree(m->memory[GPT2_PARAM]));
    m->memory[GPT2_PARAM] = NULL;
    m->bf16_only = 1;
    return api_status();
}

int gpt2_option(GPT2 *m, const char *name, int value) {
    const int recompute = !strcmp(name, "-r"), most = 1 + recompute;
    api_begin();
    if (!recompute && strcmp(name, "-w")) return gpt2_fail("%s has no effect with this program", name);
    if (value < 0 || value > most) return gpt2_fail("%s is %d, expected 0 to %d", name, value, most);
    if (m->backward_due) return gpt2_fail("%s cannot change between gpt2_forward and gpt2_backward", name);
    m->cached = 0;
    if (!recompute) return set_masters(m, value);
    m->recompute = value;
    return 0;
}

/* Copies a part of a tensor to `out`, or from `in`; the other is NULL. */
static int tensor_copy(GPT2 *m, int t, int kind, int64_t first, int64_t count, float *out, const float *in) {
    api_begin();
    const int64_t size = gpt2_tensor(&m->config, t, NULL, NULL);
    if (size < 0) return -1;
    if (kind < GPT2_PARAM || kind > GPT2_MOMENT2 || first < 0 || count < 0 || first > size - count)
        return gpt2_fail("elements %lld + %lld of kind %d of tensor %d requested, expected %lld elements in "
                         "kinds 0 to 3", (long long)first, (long long)count, kind, t, (long long)size);
    if (in && kind == GPT2_PARAM) m->cached = 0;
    const size_t at = m->start[t] + (size_t)first, n = (size_t)count;
    if (kind == GPT2_PARAM && m->bf16_only) return bf16_copy(m, at, n, out, in);
    float *memory = readable_memory(m, kind);
    if (!memory) return -1;
    float *part = memory + at;
    if (out) gpu_ok(cudaMemcpyAsync(out, part, n * sizeof *out, cudaMemcpyDeviceToHost, m->stream));
    if (in) gpu_ok(cudaMemcpyAsync(part, in, n * sizeof *in, cudaMemcpyHostToDevice, m->stream));
    if (in && kind == GPT2_PARAM && (void *)m->params != (void *)memory)
        convert(m, m->params + at, part, n);
    if (in && kind == GPT2_GRAD) {
        m->grads_zero = 0;
        m->norm = NAN;
    }
    gpu_ok(cudaStreamSynchronize(m->stream));
    return api_status();
}

int gpt2_get(GPT2 *m, int tensor, int kind, int64_t first, int64_t count, float *out) {
    return tensor_copy(m, tensor, kind, first, count, out, NULL);
}
int gpt2_set(GPT2 *m, int tensor, int kind, int64_t first, int64_t count, const float *in) {
    return tensor_copy(m, tensor, kind, first, count, NULL, in);
}

/* --- Layers, launched ----------------------------------------------------------------------------------- */
static int is_vectorized(size_t C) { return C % WIDTH == 0; }

static void layernorm_forward(GPT2 *m, floatX *out, float *mean, float *rstd, const floatX *inp,
                              const floatX *w, const floatX *b, size_t N, int known) {
    LAUNCH_VECTORIZED(is_vectorized(m->C), layernorm_forward_kernel, blocks(N, ROW_WARPS), ROW_WARPS * WARP,
                      0, m->stream, out, mean, rstd, inp, w, b, N, (int)m->C, known);
}

static void column_total(GPT2 *m, float *db, float *dw, size_t rows, size_t C, int add) {
    size_t width = C;
    if (dw) width += C;
    LAUNCH(column_total_kernel, blocks(width, COLUMN_THREADS), dim3(COLUMN_THREADS, TOTAL_ROWS), 0, m->stream,
           db, dw, activations(m, 0).sums, (int)rows, (int)C, add);
}

/* dx (N,C) = or += what layernorm_backward_kernel says; dw, db (C) */
static void layernorm_backward(GPT2 *m, floatX *dx, float *dw, float *db, const floatX *dout,
                               const floatX *inp, const floatX *w, const float *mean, const float *rstd,
                               size_t N, int add_dx) {
    const size_t C = m->C, warp_bytes = 2 * C * sizeof(float);
    const size_t warps = min_of(ROW_WARPS, m->max_shared / warp_bytes);
    const size_t grid = min_of(blocks(N, warps), 4 * (size_t)m->sms);
    float *sums = activations(m, 0).sums;
    LAUNCH_VECTORIZED(is_vectorized(C), layernorm_backward_kernel, (unsigned)grid, (unsigned)warps * WARP,
                warps * warp_bytes, m->stream, dx, sums, dout, inp, w, mean, rstd, N, (int)C, add_dx);
    column_total(m, db, dw, grid, C, !m->grads_zero);
}

/* With w (OC,C): out (N,OC) = inp (N,C) · wᵀ + b + residual, unless that is NULL. Backward: dinp = dout · w,
   dw = doutᵀ · inp, db = Σ dout over rows. */
static void linear_forward(GPT2 *m, floatX *out, const floatX *inp, const floatX *w, const floatX *b,
                           const floatX *residual, size_t N, size_t C, size_t OC) {
    gemm(&m->blas, out, OC, Matrix{inp, C, 0}, Matrix{w, C, 1}, N, OC, C,
         After{CUBLASLT_EPILOGUE_BIAS, b, NULL, residual});
}
static void linear_backward_input(GPT2 *m, floatX *dinp, const floatX *dout, const floatX *w, size_t N,
                                  size_t C, size_t OC) {
    gemm(&m->blas, dinp, C, Matrix{dout, OC, 0}, Matrix{w, C, 0}, N, C, OC);
}
static void linear_backward_weight(GPT2 *m, float *dw, float *db, const floatX *dout, const floatX *inp,
                                   size_t N, size_t C, size_t OC) {
    const int vectorized = is_vectorized(OC), add = !m->grads_zero;
    const unsigned across = blocks(OC, COLUMN_THREADS * (vectorized ? WIDTH : 1));
    const unsigned down = (unsigned)min_of(blocks(N, COLUMN_ROWS), 1 + 8 * (size_t)m->sms / (across + 2));
    float *sums = activations(m, 0).sums;
    gemm(&m->blas, dw, C, Matrix{dout, OC, 1}, Matrix{inp, C, 0}, OC, C, N,
         After{CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, add ? dw : NULL});
    LAUNCH_VECTORIZED(vectorized, column_sums_kernel, dim3(across, down), dim3(COLUMN_THREADS, COLUMN_ROWS),
                      0, m->stream, sums, dout, N, (int)OC);
    column_total(m, db, NULL, down, OC, add);
}

/* Whether cuBLASLt can fuse GELU: only for whole vectors, not in fp32. */
static int gelu_fused(const GPT2 *m) { return sizeof(floatX) == 2 && m->C % 8 == 0 && !m->gelu_unfused; }

static void gelu(GPT2 *m, floatX *out, const floatX *dx, const floatX *inp, size_t n) {
    const int vectorized = is_vectorized(n);
    LAUNCH_VECTORIZED(vectorized, gelu_kernel, blocks(n, 256 * (vectorized ? WIDTH : 1)), 256, 0, m->stream,
                      out, dx, inp, n);
}

/* fc (N,4C) = ln (N,C) · fcwᵀ + fcb and its GELU; backward, dfc (N,4C) = dout (N,C) · fcprojw · dGELU(fc) */
static void fc_forward(GPT2 *m, floatX *out, floatX *fc, const floatX *ln, const floatX *w, const floatX *b,
                       size_t N) {
    const size_t C = m->C;
    if (gelu_fused(m) && gemm(&m->blas, out, 4 * C, Matrix{ln, C, 0}, Matrix{w, C, 1}, N, 4 * C, C,
                              After{CUBLASLT_EPILOGUE_GELU_AUX_BIAS, b, fc, NULL})) return;
    m->gelu_unfused = 1;
    linear_forward(m, fc, ln, w, b, NULL, N, C, 4 * C);
    gelu(m, out, NULL, fc, N * 4 * C);
}
static void fcproj_backward_input(GPT2 *m, floatX *dfc, const floatX *dout, const floatX *w, floatX *fc,
                                  size_t N) {
    const size_t C = m->C;
    if (gelu_fused(m) && gemm(&m->blas, dfc, 4 * C, Matrix{dout, C, 0}, Matrix{w, 4 * C, 0}, N, 4 * C, C,
                              After{CUBLASLT_EPILOGUE_DGELU, NULL, fc, NULL})) return;
    m->gelu_unfused = 1;
    linear_backward_input(m, dfc, dout, w, N, 4 * C, C);
    gelu(m, dfc, dfc, fc, N * 4 * C);
}

static int plain_warps(const GPT2 *m, int hs) {
    if (plain_shared(PLAIN_WARPS, hs) <= m->max_shared) return PLAIN_WARPS;
    return 1;
}
static void attention_forward(GPT2 *m, floatX *out, float *lse, const floatX *qkv, size_t first) {
    const int T = (int)m->T, C = (int)m->C, NH = (int)m->NH, warps = plain_warps(m, C / NH);
    const unsigned heads = (unsigned)(m->B * m->NH);
#ifndef GPT2_FP32
    if (C == NH * HS && first == 0) {
        LAUNCH(flash_forward_kernel, blocks(m->T, m->flash_rows) * heads, FLASH_THREADS,
               m->flash_rows * ROW_BYTES + 2 * STAGE_BYTES, m->stream, out, lse, qkv, T, C, NH);
        return;
    }
#endif
    LAUNCH(attention_plain_forward_kernel, blocks(m->T - first, warps) * heads, warps * WARP,
           plain_shared(warps, C / NH), m->stream, out, lse, qkv, (int)first, T, C, NH);
}
static void attention_backward(GPT2 *m, floatX *dqkv, float *delta, const floatX *dout, const floatX *out,
                               const floatX *qkv, const float *lse) {
    const int T = (int)m->T, C = (int)m->C, NH = (int)m->NH, warps = plain_warps(m, C / NH);
    const unsigned heads = (unsigned)(m->B * m->NH);
#ifndef GPT2_FP32
    if (C == NH * HS) {
        const unsigned grid = blocks(m->T, m->flash_rows) * heads, rows = m->flash_rows * ROW_BYTES;
        LAUNCH(flash_dq_kernel, grid, FLASH_THREADS, 3 * rows + 2 * STAGE_BYTES, m->stream, dqkv, delta, dout,
               out, qkv, lse, T, C, NH);
        LAUNCH(flash_dkdv_kernel, grid, FLASH_THREADS, 2 * rows + 2 * STAGE_BYTES + ROW_VALUES, m->stream,
               dqkv, dout, qkv, lse, delta, T, C, NH);
        return;
    }
#endif
    const unsigned grid = blocks(m->T, warps) * heads;
    const size_t rows = m->B * m->T * m->NH;
    LAUNCH(attention_delta_kernel, blocks(rows, ROW_WARPS), ROW_WARPS * WARP, 0, m->stream, delta, dout, out,
           rows, T, C, NH);
    LAUNCH(attention_plain_dq_kernel, grid, warps * WARP, plain_shared(warps, C / NH), m->stream, dqkv, dout,
           qkv, lse, delta, T, C, NH);
    LAUNCH(attention_plain_dkdv_kernel, grid, warps * WARP, plain_shared(warps, C / NH), m->stream, dqkv,
           dout, qkv, lse, delta, T, C, NH);
}

/* --- Passes --------------------------------------------------------------------------------------------- */
/* Launches a pass: first kernel by kernel, then captured into a graph, then as that graph; kernel by kernel
   again if capturing fails or plans were replaced. */
static void run(GPT2 *m, void (*pass)(GPT2 *)) {
    GraphKey key;
    memset(&key, 0, sizeof key);          /* the padding too: keys are compared by their bytes */
    key.pass = pass;
    key.B = m->B;
    key.T = m->T;
    key.act_memory = m->act_memory;
    key.grads = m->memory[GPT2_GRAD];
    key.params = m->params;
    key.train = m->train;
    key.grads_zero = m->grads_zero;
    key.recompute = m->recompute;
    key.scale = m->scale;
    Graph *graph = m->graphs;
    while (graph < m->graphs + GRAPHS && memcmp(&graph->key, &key, sizeof key)) graph++;
    if (graph == m->graphs + GRAPHS) {    /* a new key */
        graph = &m->graphs[m->next_graph++ % GRAPHS];
        if (graph->made) cudaGraphExecDestroy(graph->made);
        graph->made = NULL;
        memcpy(&graph->key, &key, sizeof key);
        pass(m);
        return;
    }
    cudaGraph_t captured = NULL;
    const int unfused = m->gelu_unfused;
    if (!graph->made && !gpu_failed && !cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeThreadLocal)) {
        m->blas.capturing = 1;
        pass(m);
        m->blas.capturing = 0;
        if (cudaStreamEndCapture(m->stream, &captured) == cudaSuccess) {
            if (gpu_failed || cudaGraphInstantiate(&graph->made, captured, 0)) graph->made = NULL;
            cudaGraphDestroy(captured);
        }
        if (!graph->made) {               /* kernel by kernel it may work */
            gpu_failed = 0;
            m->gelu_unfused = unfused;
        }
    }
    if (graph->made) {
        gpu_ok(cudaGraphLaunch(graph->made, m->stream));
    } else {
        cudaGetLastError();
        pass(m);
    }
}

static int tokens_check(const GPT2 *m, const char *what, const int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.V)
            return gpt2_fail("token %zu of %s is %d, expected 0 to %zu", i, what, tokens[i], m->V - 1);
    return 0;
}

/* Sorts the positions of a batch by token and cuts them into segments, see dwte_parts_kernel. */
static void batch_sort(GPT2 *m, size_t N) {
    const Batch b = m->host;
    int32_t *next = m->token_counts;
    memset(next, 0, m->V * sizeof *next);
    for (size_t n = 0; n < N; n++) next[b.x[n]]++;
    int32_t at = 0;
    m->segments = m->tokens = 0;
    for (size_t v = 0; v < m->V; v++) {
        const int32_t end = at + next[v];
        next[v] = at;
        if (end == at) continue;
        b.tokens[m->tokens] = (int32_t)v;
        b.first_segment[m->tokens++] = m->segments;
        for (; at < end; at += SEGMENT_ROWS) b.segments[m->segments++] = at;
        at = end;
    }
    b.segments[m->segments] = (int32_t)N;
    b.first_segment[m->tokens] = m->segments;
    for (size_t n = 0; n < N; n++) b.order[next[b.x[n]]++] = (int32_t)n;
}

/* Uploads a batch; only the stream waits for the end of the previous one. y NULL: only x. */
static void batch_send(GPT2 *m, const int32_t *x, const int32_t *y, size_t N) {
    m->host = batch_at(m->host_memory, N);
    memcpy(m->host.x, x, N * sizeof *x);
    if (y) memcpy(m->host.y, y, N * sizeof *y);
    if (m->train) batch_sort(m, N);
    size_t bytes = N * sizeof *x;
    if (y) bytes *= 2;
    if (m->train) bytes = batch_bytes(N);
    gpu_ok(cudaMemcpyAsync(m->staging, m->host_memory, bytes, cudaMemcpyHostToDevice, m->upload));
    gpu_ok(cudaEventRecord(m->uploaded, m->upload));
    gpu_ok(cudaStreamWaitEvent(m->stream, m->uploaded, 0));
    gpu_ok(cudaMemcpyAsync(activations(m, 0).batch, m->staging, bytes, cudaMemcpyDeviceToDevice, m->stream));
}

/* Embedding, blocks and the last layer norm of the positions from `first` on; earlier keys and values are
   cached. */
static void forward_blocks(GPT2 *m, size_t first) {
    const size_t C = m->C, N = m->B * m->T - first;
    Activations a = activations(m, 0);
    TensorsOf<floatX> p = tensors(m, m->params, 0);
    LAUNCH_VECTORIZED(is_vectorized(C), encoder_forward_kernel, blocks(N, ROW_WARPS), ROW_WARPS * WARP, 0,
                m->stream, a.residual1, a.batch + first, p.wte, p.wpe + first * C, N, (int)m->T, (int)C);
    for (size_t l = 0; l < m->L; l++) {
        p = tensors(m, m->params, l);
        a = activations(m, l);
        layernorm_forward(m, a.ln1, a.mean1, a.rstd1, a.residual1, p.ln1w, p.ln1b, N, 0);
        linear_forward(m, a.qkv + first * 3 * C, a.ln1, p.qkvw, p.qkvb, NULL, N, C, 3 * C);
        attention_forward(m, a.att, a.lse, a.qkv, first);
        linear_forward(m, a.residual2, a.att, p.attprojw, p.attprojb, a.residual1, N, C, C);
        layernorm_forward(m, a.ln2, a.mean2, a.rstd2, a.residual2, p.ln2w, p.ln2b, N, 0);
        fc_forward(m, a.gelu, a.fc, a.ln2, p.fcw, p.fcb, N);
        floatX *next_residual = activations(m, l + 1).residual1;
        linear_forward(m, next_residual, a.gelu, p.fcprojw, p.fcprojb, a.residual2, N, 4 * C, C);
    }
    layernorm_forward(m, a.lnf, a.meanf, a.rstdf, activations(m, m->L).residual1, p.lnfw, p.lnfb, N, 0);
}

/* Logits of a chunk of rows, from n on, and their losses; in training the logits become their gradient. */
static void classify(GPT2 *m, size_t n) {
    const size_t C = m->C, Vp = m->Vp, rows = min_of(m->chunk, m->B * m->T - n);
    const Activations a = activations(m, 0);
    /* The maximum, so that the two rows resident on an SM stay in L1. */
    const unsigned threads = (unsigned)min_of(1024, round_to(Vp / WIDTH, WARP));
    gemm(&m->blas, a.logits, Vp, Matrix{a.lnf + n * C, C, 0}, Matrix{m->params, C, 1}, rows, Vp, C);
    LAUNCH(crossentropy_kernel, (unsigned)rows, threads, 0, m->stream, a.losses + n, a.logits,
           batch_at(a.batch, m->B * m->T).y + n, (int)m->V, (int)Vp, m->train ? m->scale : 0);
}
/* dln and dwte from the gradient of a chunk of logits. */
static void classify_backward(GPT2 *m, size_t n) {
    const size_t C = m->C, Vp = m->Vp, rows = min_of(m->chunk, m->B * m->T - n);
    const Activations a = activations(m, 0);
    float *dwte = m->memory[GPT2_GRAD];
    gemm(&m->blas, a.dln + n * C, C, Matrix{a.logits, Vp, 0}, Matrix{m->params, C, 0}, rows, C, Vp);
    gemm(&m->blas, dwte, C, Matrix{a.logits, Vp, 1}, Matrix{a.lnf + n * C, C, 0}, Vp, C, rows,
         After{CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, n || !m->grads_zero ? dwte : NULL});
}

static size_t last_chunk(const GPT2 *m) { return (m->B * m->T - 1) / m->chunk * m->chunk; }

/* The forward pass up to the losses; the gradient of the last chunk is queued after their copy. */
static void forward_pass(GPT2 *m) {
    forward_blocks(m, 0);
    for (size_t n = 0; n < m->B * m->T; n += m->chunk) {
        classify(m, n);
        if (m->train && n != last_chunk(m)) classify_backward(m, n);
    }
}

/* Checks the batch and makes room for its activations. */
static int pass_begin(GPT2 *m, const int32_t *x, const int32_t *y, int batch, int length, Purpose purpose) {
    if (batch < 1 || length < 1 || length > m->config.max_T)
        return gpt2_fail("batch is %d x %d tokens, expected sequences of 1 to %d, the model's context", batch,
                         length, m->config.max_T);
    if (m->backward_due && !m->grads_zero)
        return gpt2_fail("the gradients are incomplete: call gpt2_backward after gpt2_forward");
    const size_t B = (size_t)batch, T = (size_t)length;
    m->backward_due = 0;
    m->B = B;
    m->T = T;
    m->train = purpose == TRAIN;
    if (purpose != GENERATE) m->cached = 0;
    if (tokens_check(m, "x", x, B * T) || (y && tokens_check(m, "y", y, B * T))) return -1;
    if (m->cached) return 0;
    size_t room = T;
    if (purpose == GENERATE) room = (size_t)m->config.max_T;
    return layout_activations(m, B, room, purpose);
}

int gpt2_forward(GPT2 *m, const int32_t *x, const int32_t *y, int B, int T, float grad_scale, float *loss) {
    const int train = grad_scale != 0;
    api_begin();
    if ((train && !memory_of(m, GPT2_GRAD)) || pass_begin(m, x, y, B, T, train ? TRAIN : EVALUATE)) return -1;
    const size_t N = m->B * m->T;
    m->scale = grad_scale / (float)N;
    batch_send(m, x, y, N);
    run(m, forward_pass);
    gpu_ok(cudaMemcpyAsync(m->host_losses, activations(m, 0).losses, N * sizeof(float),
                           cudaMemcpyDeviceToHost, m->stream));
    gpu_ok(cudaEventRecord(m->classified, m->stream));
    if (train) classify_backward(m, last_chunk(m));     /* while the losses are copied */
    gpu_ok(cudaEventSynchronize(m->classified));
    if (api_status()) return -1;
    double sum = 0;
    for (size_t n = 0; n < N; n++) sum += m->host_losses[n];
    *loss = (float)(sum / (double)N);
    m->backward_due = train;
    if (train) m->norm = NAN;
    return 0;
}

static void backward_pass(GPT2 *m) {
    const size_t N = m->B * m->T, C = m->C;
    Activations a = activations(m, m->L);
    TensorsOf<floatX> p = tensors(m, m->params, 0);
    TensorsOf<float> g = tensors(m, m->memory[GPT2_GRAD], 0);
    floatX *dx = a.dresidual, *dln = a.dln, *dhidden = a.dhidden;
    layernorm_backward(m, dx, g.lnfw, g.lnfb, dln, a.residual1, p.lnfw, a.meanf, a.rstdf, N, 0);
    for (size_t l = m->L; l-- > 0;) {
        p = tensors(m, m->params, l);
        g = tensors(m, m->memory[GPT2_GRAD], l);
        a = activations(m, l);
        if (m->recompute >= 1) gelu(m, a.gelu, NULL, a.fc, N * 4 * C);
        linear_backward_weight(m, g.fcprojw, g.fcprojb, dx, a.gelu, N, 4 * C, C);
        fcproj_backward_input(m, dhidden, dx, p.fcprojw, a.fc, N);
        if (m->recompute >= 2)
            layernorm_forward(m, a.ln2, a.mean2, a.rstd2, a.residual2, p.ln2w, p.ln2b, N, 1);
        linear_backward_weight(m, g.fcw, g.fcb, dhidden, a.ln2, N, C, 4 * C);
        linear_backward_input(m, dln, dhidden, p.fcw, N, C, 4 * C);
        layernorm_backward(m, dx, g.ln2w, g.ln2b, dln, a.residual2, p.ln2w, a.mean2, a.rstd2, N, 1);

        linear_backward_weight(m, g.attprojw, g.attprojb, dx, a.att, N, C, C);
        linear_backward_input(m, dln, dx, p.attprojw, N, C, C);
        attention_backward(m, dhidden, a.delta, dln, a.att, a.qkv, a.lse);
        if (m->recompute >= 2)
            layernorm_forward(m, a.ln1, a.mean1, a.rstd1, a.residual1, p.ln1w, p.ln1b, N, 1);
        linear_backward_weight(m, g.qkvw, g.qkvb, dhidden, a.ln1, N, C, 3 * C);
        linear_backward_input(m, dln, dhidden, p.qkvw, N, C, 3 * C);
        layernorm_backward(m, dx, g.ln1w, g.ln1b, dln, a.residual1, p.ln1w, a.mean1, a.rstd1, N, 1);
    }
}

/* The embedding gradients; not in the graph, since grids depend on the tokens. dhidden is free by now and
   takes the sums of segments. */
static void encoder_backward(GPT2 *m) {
    const size_t C = m->C, T = m->T, N = m->B * T, V = is_vectorized(C) ? WIDTH : 1;
    const Activations a = activations(m, 0);
    const TensorsOf<float> g = tensors(m, m->memory[GPT2_GRAD], 0);
    const Batch b = batch_at(a.batch, N);
    const unsigned threads = (unsigned)min_of(128, round_to(ceil_div(C, V), WARP));
    float *parts = (float *)a.dhidden;
    const size_t rest = ((size_t)m->config.max_T - T) * C * sizeof(float);
    if (m->grads_zero && rest) gpu_ok(cudaMemsetAsync(g.wpe + T * C, 0, rest, m->stream));
    LAUNCH_VECTORIZED(V > 1, dwpe_kernel, blocks(T * C, 128 * V), 128, 0, m->stream, g.wpe, a.dresidual,
                      (int)m->B, (int)T, (int)C, !m->grads_zero);
    LAUNCH_VECTORIZED(V > 1, dwte_parts_kernel, (unsigned)m->segments, threads, 0, m->stream, parts,
                      a.dresidual, b.order, b.segments, (int)C);
    LAUNCH_VECTORIZED(V > 1, dwte_kernel, (unsigned)m->tokens, threads, 0, m->stream, g.wte, parts, b.tokens,
                b.first_segment, (int)C);
}

int gpt2_backward(GPT2 *m) {
    if (!m->backward_due)
        return gpt2_fail("gpt2_backward must follow a gpt2_forward with a gradient scale, once for each");
    api_begin();
    run(m, backward_pass);
    encoder_backward(m);
    m->grads_zero = m->backward_due = 0;
    return api_status();
}

int gpt2_logits(GPT2 *m, const int32_t *x, int B, int T, int last_only, float *out) {
    const int generate = last_only && B == 1;
    api_begin();
    if (pass_begin(m, x, NULL, B, T, generate ? GENERATE : EVALUATE)) return -1;
    const size_t N = m->B * m->T, C = m->C, V = m->V;
    size_t first = 0, every = 1;          /* of the rows: all, or the last of each sequence */
    if (last_only) every = m->T;
    while (first + 1 < m->T && first < m->cached && x[first] == m->host.x[first]) first++;
    m->cached = 0;                        /* in case of failure */
    batch_send(m, x, NULL, N);
    forward_blocks(m, first);
    const Activations a = activations(m, 0);
    for (size_t n = 0, rows; n < N / every && !gpu_failed; n += rows) {
        rows = min_of(m->chunk, N / every - n);
        const floatX *ln = a.lnf + ((n + 1) * every - 1 - first) * C;
        size_t apart = C;                 /* of one row: the same plan at every position */
        if (rows > 1) apart = every * C;
        gemm(&m->blas, (float *)a.logits, V, Matrix{ln, apart, 0}, Matrix{m->params, C, 1}, rows, V, C);
        gpu_ok(cudaMemcpyAsync(out + n * V, a.logits, rows * V * sizeof *out, cudaMemcpyDeviceToHost,
                               m->stream));
    }
    gpu_ok(cudaStreamSynchronize(m->stream));
    if (api_status()) return -1;
    if (generate) m->cached = m->T;
    return 0;
}

/* === 6. AdamW =========================================================================================== */
enum { NORM_BLOCKS = 1024, NORM_THREADS = 256 };

/* squares (blocks): the sum of squares of each block */
__global__ void norm_kernel(double *__restrict__ squares, const float *__restrict__ g, size_t n) {
    __shared__ double shared[NORM_THREADS];
    double sum = 0;
    const size_t step = (size_t)gridDim.x * NORM_THREADS * 4;
    for (size_t i = ((size_t)blockIdx.x * NORM_THREADS + threadIdx.x) * 4; i < n; i += step) {
        float v[4];
        load<4>(v, g + i);
        sum += v[0] * v[0] + v[1] * v[1] + (v[2] * v[2] + v[3] * v[3]);
    }
    shared[threadIdx.x] = sum;
    for (int half = NORM_THREADS / 2; half; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) squares[blockIdx.x] = shared[0];
}

float gpt2_grad_norm(GPT2 *m) {
    api_begin();
    if (!isnan(m->norm)) return m->norm;
    const float *g = readable_memory(m, GPT2_GRAD);
    const size_t count = m->start[GPT2_TENSORS];
    const size_t grid = min_of(NORM_BLOCKS, ceil_div(count, 4 * NORM_THREADS));
    double squares[NORM_BLOCKS], sum = 0;
    if (!g) return NAN;
    double *parts = (double *)m->blas.workspace;     /* free: no product is running */
    LAUNCH(norm_kernel, (unsigned)grid, NORM_THREADS, 0, m->stream, parts, g, count);
    gpu_ok(cudaMemcpyAsync(squares, parts, grid * sizeof *squares, cudaMemcpyDeviceToHost, m->stream));
    gpu_ok(cudaStreamSynchronize(m->stream));
    if (api_status()) return NAN;
    for (size_t i = 0; i < grid; i++) sum += squares[i];
    m->norm = (float)sqrt(sum);
    return m->norm;
}

typedef struct {
    size_t start[GPT2_TENSORS + 1];       /* of the tensors; those in GPT2_DECAYED are multiplied by keep */
    float clip, keep, keep1, add1, keep2, add2, rate, scale2, epsilon;
    uint32_t seed;
} Step;

/* A random number for each x ("lowbias32" by Wellons). */
__device__ static inline uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* Stochastic rounding to bf16: adds a random number to the lower half of the bits. */
__device__ static inline float round_stochastically(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int finite = (bits & 0x7F800000) != 0x7F800000;
    if (finite) bits += random & 0xFFFF;
    bits &= 0xFFFF0000;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* All tensors at once, four elements per thread. masters or params may be NULL. */
__global__ void adamw_kernel(float *__restrict__ masters, floatX *__restrict__ params,
                             float *__restrict__ moment1, float *__restrict__ moment2,
                             const float *__restrict__ grads, Step s) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at >= s.start[GPT2_TENSORS]) return;
    int decayed = 0;
#pragma unroll
    for (int t = 0; t < GPT2_TENSORS; t++)
        if (at >= s.start[t]) decayed = GPT2_DECAYED >> t & 1;
    const uint32_t seed = hash(s.seed + (uint32_t)(at >> 32));
    float p[4], g[4], m1[4], m2[4];
    if (masters) load<4>(p, masters + at);
    else load<4>(p, params + at);
    load<4>(g, grads + at);
    load<4>(m1, moment1 + at);
    load<4>(m2, moment2 + at);
    for (int i = 0; i < 4; i++) {
        const float grad = g[i] * s.clip;
        m1[i] = s.keep1 * m1[i] + s.add1 * grad;
        m2[i] = s.keep2 * m2[i] + s.add2 * grad * grad;
        if (decayed) p[i] *= s.keep;
        p[i] -= s.rate * m1[i] / (sqrtf(m2[i] * s.scale2) + s.epsilon);
        if (!masters) p[i] = round_stochastically(p[i], hash(hash((uint32_t)(at + i)) ^ seed));
    }
    store<4>(moment1 + at, m1);
    store<4>(moment2 + at, m2);
    if (masters) store<4>(masters + at, p);
    if (params) store<4>(params + at, p);
}

int gpt2_update(GPT2 *m, double lr, double beta1, double beta2, double eps, double decay, double max_norm) {
    api_begin();
    const float *g = readable_memory(m, GPT2_GRAD);
    if (!g) return -1;
    float *m1 = memory_of(m, GPT2_MOMENT1), *m2 = memory_of(m, GPT2_MOMENT2);
    if (!m1 || !m2) return -1;
    const double norm = gpt2_grad_norm(m), n = (double)m->updates + 1;
    if (api_status()) return -1;
    if (!(isfinite(norm) && fabs(lr) < 1e10))
        return gpt2_fail("gradient norm %f, learning rate %g: training diverged; lower the learning rate",
                         norm, lr);
    if (!(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1 && (float)eps > 0))
        return gpt2_fail("beta1 is %g, beta2 %g, eps %g, expected betas from 0 to below 1 and an eps above 0",
                         beta1, beta2, eps);
    m->updates++;
    Step s = {};
    memcpy(s.start, m->start, sizeof s.start);
    s.clip = 1;
    if (max_norm > 0 && norm > max_norm) s.clip = (float)(max_norm / norm);
    s.keep = (float)(1 - lr * decay);
    s.keep1 = (float)beta1;
    s.add1 = (float)(1 - beta1);
    s.rate = (float)(lr / (1 - pow(beta1, n)));
    s.keep2 = (float)beta2;
    s.add2 = (float)(1 - beta2);
    s.scale2 = (float)(1 / (1 - pow(beta2, n)));
    s.epsilon = (float)eps;
    s.seed = (uint32_t)m->updates * 0x9E3779B9u;
    float *masters = m->memory[GPT2_PARAM];
    floatX *params = m->params;
    if ((void *)params == (void *)masters) params = NULL;
    LAUNCH(adamw_kernel, blocks(m->start[GPT2_TENSORS], 4 * 256), 256, 0, m->stream, masters, params, m1, m2,
           g, s);
    gpt2_zero_grad(m);
    m->cached = 0;
    return api_status();
}

/* --- The machine ---------------------------------------------------------------------------------------- */
const char *gpt2_device(void) {
    static thread_local char text[320];
    cudaDeviceProp gpu;
    int device = 0, count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count || cudaGetDevice(&device) != cudaSuccess ||
        cudaGetDeviceProperties(&gpu, device) != cudaSuccess) {
        cudaGetLastError();
        return "no GPU";
    }
    snprintf(text, sizeof text, "%s, %d SMs, %s", gpu.name, gpu.multiProcessorCount, FLOATX_NAME);
    return text;
}

__global__ void noise_kernel(floatX *out, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) from_float(out + i, (float)hash((uint32_t)i) * 0x1p-31f - 1);
}

/* The best rate of square products of growing size. */
double gpt2_ceiling(void) {
    enum { SMALLEST = 128, LARGEST = 8192, RUNS = 16 };
    double best = 0;
    float took = 0;                       /* ms */
    api_begin();
    GPT2 *m = new (std::nothrow) GPT2();
    if (m && !device_open(m))
        for (size_t n = SMALLEST; n <= LARGEST && took < 20 && !gpu_failed; n *= 2) {
            floatX *a = (floatX *)device_memory(3 * n * n * sizeof *a, m->stream), *b = a + n * n;
            floatX *d = b + n * n;
            if (!a) break;
            LAUNCH(noise_kernel, blocks(2 * n * n, 256), 256, 0, m->stream, a, 2 * n * n);
            for (int run = -1; run < RUNS; run++) {     /* the first one finds an algorithm */
                if (run == 0) gpu_ok(cudaEventRecord(m->uploaded, m->stream));
                gemm(&m->blas, d, n, Matrix{a, n, 0}, Matrix{b, n, 1}, n, n, n);
            }
            gpu_ok(cudaEventRecord(m->classified, m->stream));
            gpu_ok(cudaEventSynchronize(m->classified));
            if (gpu_ok(cudaEventElapsedTime(&took, m->uploaded, m->classified)) && took > 0)
                best = fmax(best, 2.0 * (double)(n * n * n) * RUNS / (took * 1e-3));
            cudaFree(a);
        }
    gpt2_free(m);
    return best;
}

/* === 7. Matrix product, defined =========================================================================
   cuBLASLt counts by columns: our row-major D (M,N) is its D (N,M), and D = A·B its D = B·A. */
static void plan_free(Plan *plan) {
    if (plan->operation) cublasLtMatmulDescDestroy(plan->operation);
    if (plan->a) cublasLtMatrixLayoutDestroy(plan->a);
    if (plan->b) cublasLtMatrixLayoutDestroy(plan->b);
    if (plan->d) cublasLtMatrixLayoutDestroy(plan->d);
    *plan = Plan();
}

#define SET_OPERATION(plan, what, value) \
    blas_ok(cublasLtMatmulDescSetAttribute((plan)->operation, CUBLASLT_MATMUL_DESC_##what, &(value), \
                                           sizeof(value)))

/* Sets what the epilogue reads or writes besides D; NULL for none. */
static int plan_point(Plan *plan, const floatX *bias, const floatX *aux) {
    return (!bias || SET_OPERATION(plan, BIAS_POINTER, bias)) &&
           (!aux || SET_OPERATION(plan, EPILOGUE_AUX_POINTER, aux));
}

/* Describes the product, and finds the best algorithm. Returns 0 if there is none. */
static int plan_make(Blas *blas, Plan *plan, const Shape *s, const floatX *bias, const floatX *aux) {
    const cublasOperation_t ops[] = {CUBLAS_OP_N, CUBLAS_OP_T};
    const cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)s->epilogue;
    const cudaDataType_t type_d = (cudaDataType_t)s->type_d;
    const size_t workspace = WORKSPACE;
    const uint32_t align = (uint32_t)s->alignment;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;     /* partial sums are never bf16 */
    plan_free(plan);
    plan->shape = *s;
    int ok = blas_ok(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F)) &&
             SET_OPERATION(plan, TRANSA, ops[s->transposed_b]) &&
             SET_OPERATION(plan, TRANSB, ops[s->transposed_a]) && SET_OPERATION(plan, EPILOGUE, epilogue);
    ok = ok && (!aux || SET_OPERATION(plan, EPILOGUE_AUX_LD, s->ld_d)) &&
         (!bias || SET_OPERATION(plan, BIAS_DATA_TYPE, FLOATX_TYPE)) && plan_point(plan, bias, aux);
    uint64_t a[] = {(uint64_t)s->N, (uint64_t)s->K}, b[] = {(uint64_t)s->K, (uint64_t)s->M};
    if (s->transposed_b) std::swap(a[0], a[1]);
    if (s->transposed_a) std::swap(b[0], b[1]);
    ok = ok && blas_ok(cublasLtMatrixLayoutCreate(&plan->a, FLOATX_TYPE, a[0], a[1], s->ld_b)) &&
         blas_ok(cublasLtMatrixLayoutCreate(&plan->b, FLOATX_TYPE, b[0], b[1], s->ld_a)) &&
         blas_ok(cublasLtMatrixLayoutCreate(&plan->d, type_d, s->N, s->M, s->ld_d));
    cublasLtMatmulPreference_t preference = NULL;
    ok = ok && blas_ok(cublasLtMatmulPreferenceCreate(&preference)) &&
         blas_ok(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &workspace, sizeof workspace)) &&
         blas_ok(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &reduction, sizeof reduction));
    const int first = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    for (int i = first; i < first + 4; i++)     /* of A, B, C, D */
        ok = ok && blas_ok(cublasLtMatmulPreferenceSetAttribute(
                       preference, (cublasLtMatmulPreferenceAttributes_t)i, &align, sizeof align));
    cublasLtMatmulHeuristicResult_t best = {};
    int found = 0;
    ok = ok && cublasLtMatmulAlgoGetHeuristic(blas->handle, plan->operation, plan->a, plan->b, plan->d,
                                              plan->d, preference, 1, &best, &found) == CUBLAS_STATUS_SUCCESS;
    if (preference) cublasLtMatmulPreferenceDestroy(preference);
    plan->algorithm = best.algo;
    if (ok && found && best.state == CUBLAS_STATUS_SUCCESS) return 1;
    plan_free(plan);
    return 0;
}

/* The plan of a product, created on first use; NULL if there is none or during a capture. */
static Plan *plan_find(Blas *blas, const Shape *shape, const floatX *bias, const floatX *aux) {
    for (int i = 0; i < PLANS && i < blas->count; i++)
        if (!memcmp(&blas->plans[i].shape, shape, sizeof *shape)) return &blas->plans[i];
    Plan *plan = &blas->plans[blas->count % PLANS];
    if (blas->capturing || !plan_make(blas, plan, shape, bias, aux)) return NULL;
    blas->count++;
    return plan;
}

template <typename D> static int gemm(Blas *blas, D *d, size_t ld_d, Matrix a, Matrix b, size_t M, size_t N,
                                      size_t K, After after) {
    const void *c = d;
    if (after.add) c = after.add;
    const uintptr_t pointers = (uintptr_t)d | (uintptr_t)a.data | (uintptr_t)b.data | (uintptr_t)c |
                               (uintptr_t)after.bias;
    const float one = 1, beta = after.add != NULL;
    Shape shape;
    memset(&shape, 0, sizeof shape);      /* the padding too: shapes are compared by their bytes */
    shape.M = (int64_t)M;
    shape.N = (int64_t)N;
    shape.K = (int64_t)K;
    shape.ld_a = (int64_t)a.ld;
    shape.ld_b = (int64_t)b.ld;
    shape.ld_d = (int64_t)ld_d;
    shape.transposed_a = a.transposed;
    shape.transposed_b = b.transposed;
    shape.epilogue = after.epilogue;
    shape.alignment = pointers % 16 ? (int)sizeof(floatX) : 16;
    shape.type_d = sizeof(D) == 4 ? CUDA_R_32F : FLOATX_TYPE;
    shape.add = after.add != NULL;
    Plan *plan = plan_find(blas, &shape, after.bias, after.aux);
    if (!plan && after.aux) return 0;
    if (!plan) return blas_ok(CUBLAS_STATUS_NOT_SUPPORTED);
    if (!plan_point(plan, after.bias, after.aux)) return 0;
    const cublasStatus_t status = cublasLtMatmul(
        blas->handle, plan->operation, &one, b.data, plan->a, a.data, plan->b, &beta, c, plan->d, d, plan->d,
        &plan->algorithm, blas->workspace, WORKSPACE, blas->stream);
    if (after.aux) return status == CUBLAS_STATUS_SUCCESS;
    return blas_ok(status);
}
