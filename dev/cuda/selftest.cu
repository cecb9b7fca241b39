/* Tests of the emulated GPU: small kernels with known results, and mistakes that it must detect.

     build/emulated/selftest NAME        prints "ok", or one sentence; test_gpu.py runs them all

   Compiled with nvcc (dev/cuda/on_gpu.sh does), those of `results` run on a GPU and compare the emulation of
   mma and ldmatrix with the hardware. */
#ifdef __CUDACC__
#include "../../train_gpt2.cu"            /* for mma and the other instructions, and LAUNCH */
#endif
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utility>
#include <vector>

static void say(const char *text) {
    puts(text);
    fflush(stdout);
}
static void wrong(const char *what) {
    printf("wrong: %s\n", what);
    exit(1);
}
static void must(cudaError_t error) {
    if (error) wrong(cudaGetErrorString(error));
}
static uint32_t rng = 1;
static float noise(void) {                /* -1 … 1 */
    rng = rng * 1664525u + 1013904223u;
    return (float)(int32_t)rng / 2147483648.0f;
}
template <class T> static T *on_device(const T *values, size_t n) {
    T *p;
    must(cudaMalloc(&p, n * sizeof *p));
    if (values) must(cudaMemcpy(p, values, n * sizeof *p, cudaMemcpyHostToDevice));
    return p;
}
template <class T> static std::vector<T> from_device(const T *p, size_t n) {
    std::vector<T> values(n);
    must(cudaMemcpy(values.data(), p, n * sizeof *p, cudaMemcpyDeviceToHost));
    return values;
}

/* --- Results --- */
enum { WAYS = 10 };
__global__ void warps_kernel(int *out) {  /* (64, WAYS) */
    const int t = threadIdx.x + blockDim.x * threadIdx.y, lane = t % 32;
    const unsigned all = 0xffffffffu;
    out += t * WAYS;
    out[0] = __shfl_xor_sync(all, t, 5);
    out[1] = __shfl_sync(all, t, 7);
    out[2] = __shfl_down_sync(all, t, 3);
    out[3] = (int)__ballot_sync(all, lane % 3 == 0);
    out[4] = __any_sync(all, t == 40);
    out[5] = __shfl_sync(all, t, 9, 8);
    out[6] = __shfl_xor_sync(all, t, 1, 8);
    float x = (float)t;
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(all, x, step);
    out[7] = (int)x;
    __syncwarp();
    out[8] = (int)(threadIdx.x * 100 + threadIdx.y);
    out[9] = __shfl_down_sync(all, t, 3, 8);
}
static void warps(void) {
    int *p = on_device<int>(NULL, 64 * WAYS);
    LAUNCH(warps_kernel, 1, dim3(16, 4), 0, 0, p);
    std::vector<int> out = from_device(p, 64 * WAYS);
    for (int t = 0; t < 64; t++) {
        const int lane = t % 32, first = t - lane, eight = t - t % 8;
        int down = t + 3, down_in_eight = t + 3;     /* past the end a lane keeps its own value */
        if (lane + 3 >= 32) down = t;
        if (t % 8 + 3 >= 8) down_in_eight = t;
        const int expected[WAYS] = {t ^ 5, first + 7, down, 0x49249249, t >= 32, eight + 1, t ^ 1,
                                    32 * first + 496, t % 16 * 100 + t / 16, down_in_eight};
        for (int i = 0; i < WAYS; i++)
            if (out[t * WAYS + i] != expected[i]) {
                printf("thread %d, way %d: %d, expected %d\n", t, i, out[t * WAYS + i], expected[i]);
                exit(1);
            }
    }
}

__global__ void reverse_kernel(float *p, int rounds) {     /* 256 of each block */
    __shared__ float mine[256];
    SHARED(float, other);
    p += blockIdx.x * 256;
    for (int round = 0; round < rounds; round++) {
        mine[threadIdx.x] = p[threadIdx.x];
        __syncthreads();
        other[threadIdx.x] = mine[255 - threadIdx.x] + 1;
        __syncthreads();
        p[threadIdx.x] = other[threadIdx.x];
    }
}
static void barriers(void) {
    std::vector<float> in(512);
    for (int i = 0; i < 512; i++) in[i] = (float)i;
    float *p = on_device(in.data(), 512);
    LAUNCH(reverse_kernel, 2, 256, 256 * sizeof(float), 0, p, 3);
    std::vector<float> out = from_device(p, 512);
    for (int i = 0; i < 512; i++)
        if (out[i] != (float)(i / 256 * 256 + 255 - i % 256 + 3)) wrong("barriers");
}

/* d (16,8) = c + a (16,16) bᵀ (8,16) with fragments by definition, d2 with those of ldmatrix, which are also
   copied to ld. */
__global__ void mma_kernel(float *d, float *d2, uint32_t *ld, const float *c, const __nv_bfloat16 *a,
                           const __nv_bfloat16 *b) {
    __shared__ __align__(16) __nv_bfloat16 sa[16][24], sb[16][24];
    const int lane = threadIdx.x, group = lane / 4, member = lane % 4;
    for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) sb[i / 16][i % 16] = b[i];
    for (int i = lane; i < 128; i += 32) sb[8 + i / 16][i % 16] = b[i];
    __syncwarp();
    uint32_t fa[4], fb[2];
    __nv_bfloat16 *ha = (__nv_bfloat16 *)fa, *hb = (__nv_bfloat16 *)fb;
    for (int i = 0; i < 8; i++) ha[i] = a[(group + i / 2 % 2 * 8) * 16 + member * 2 + i % 2 + i / 4 * 8];
    for (int i = 0; i < 4; i++) hb[i] = b[group * 16 + member * 2 + i % 2 + i / 2 * 8];
    float acc[4], acc2[4];
    for (int i = 0; i < 4; i++) acc[i] = acc2[i] = c[(group + i / 2 * 8) * 8 + member * 2 + i % 2];
    mma_m16n8k16_bf16(acc, fa, fb);
    uint32_t la[4], lb[4], lt[4];
    ldmatrix_x4(la, shared_address(&sa[lane % 16][lane / 16 * 8]));
    ldmatrix_x4(lb, shared_address(&sb[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]));
    mma_m16n8k16_bf16(acc2, la, lb);
    ldmatrix_x4_trans(lt, shared_address(&sa[lane % 16][lane / 16 * 8]));
    for (int i = 0; i < 4; i++) {
        d[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = acc[i];
        d2[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = acc2[i];
        ld[lane * 8 + i] = la[i];
        ld[lane * 8 + 4 + i] = lt[i];
    }
}
static void mma(void) {
    std::vector<__nv_bfloat16> a(256), b(128);
    std::vector<float> c(128);
    for (auto &x : a) x = __float2bfloat16_rn(noise());
    for (auto &x : b) x = __float2bfloat16_rn(noise());
    for (auto &x : c) x = noise();
    float *d = on_device<float>(NULL, 128), *d2 = on_device<float>(NULL, 128);
    uint32_t *ld = on_device<uint32_t>(NULL, 256);
    LAUNCH(mma_kernel, 1, 32, 0, 0, d, d2, ld, on_device(c.data(), 128), on_device(a.data(), 256),
           on_device(b.data(), 128));
    std::vector<float> out = from_device(d, 128), out2 = from_device(d2, 128);
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            double sum = c[row * 8 + column];
            for (int k = 0; k < 16; k++)
                sum += (double)__bfloat162float(a[row * 16 + k]) * __bfloat162float(b[column * 16 + k]);
            if (fabs(out[row * 8 + column] - sum) > 2e-6) wrong("mma with its fragments");
            if (fabs(out2[row * 8 + column] - sum) > 2e-6) wrong("mma with those of ldmatrix");
        }
    std::vector<uint32_t> got = from_device(ld, 256);
    const __nv_bfloat16 *halves = (const __nv_bfloat16 *)got.data();
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++)
            for (int i = 0; i < 2; i++) {
                const int row = m % 2 * 8, column = m / 2 * 8;
                if (__bfloat162float(halves[lane * 16 + m * 2 + i]) !=
                    __bfloat162float(a[(row + lane / 4) * 16 + column + lane % 4 * 2 + i])) wrong("ldmatrix");
                if (__bfloat162float(halves[lane * 16 + 8 + m * 2 + i]) !=
                    __bfloat162float(a[(row + lane % 4 * 2 + i) * 16 + column + lane / 4]))
                    wrong("ldmatrix.trans");
            }
}

/* Each thread copies 4 values in each of two groups, waits for all groups but `left`, and reads them. */
template <int left> __global__ void async_kernel(float *out, const float *in) {
    SHARED(float, shared);
    float *mine = shared + threadIdx.x * 8;
    for (int group = 0; group < 2; group++) {
        copy_async_16(shared_address(mine + 4 * group), in + threadIdx.x * 8 + 4 * group);
        copy_async_commit();
    }
    copy_async_wait<left>();
    __syncthreads();
    for (int i = 0; i < 8; i++) out[threadIdx.x * 8 + i] = mine[i];
}
static std::vector<float> async(int left) {
    std::vector<float> in(512);
    for (int i = 0; i < 512; i++) in[i] = (float)i;
    float *p = on_device(in.data(), 512), *q = on_device<float>(NULL, 512);
    if (left == 0) LAUNCH((async_kernel<0>), 1, 64, 2048, 0, q, p);
    if (left == 1) LAUNCH((async_kernel<1>), 1, 64, 2048, 0, q, p);
    if (left == 2) LAUNCH((async_kernel<2>), 1, 64, 2048, 0, q, p);
    return from_device(q, 512);
}
static void copies(void) {
    std::vector<float> out = async(0);
    for (int i = 0; i < 512; i++)
        if (out[i] != (float)i) wrong("cp.async");
}

/* cuBLASLt compared with float64: D = op(A) op(B) + beta C with an epilogue, in a batch. */
struct Product {
    cudaDataType_t type;
    bool transpose_a, transpose_b;
    int batch;
    float beta;
    int epilogue;                         /* bits: 4 bias, 32 GELU, 64 its gradient, 128 aux */
    static const int M = 24, N = 17, K = 75;
    int rows[3], cols[3], ld[3];          /* of A, B, and C and D, which share memory */
    std::vector<float> host[3], bias, aux;
    void *device[3], *bias_device, *aux_device;
};

static float round_to(cudaDataType_t type, float x) {
    if (type == CUDA_R_32F) return x;
    return __bfloat162float(__float2bfloat16_rn(x));
}

static void *upload(cudaDataType_t type, const std::vector<float> &values) {
    if (type == CUDA_R_32F) return on_device(values.data(), values.size());
    std::vector<__nv_bfloat16> small(values.size());
    for (size_t i = 0; i < values.size(); i++) small[i] = __float2bfloat16_rn(values[i]);
    return on_device(small.data(), small.size());
}

static std::vector<float> download(cudaDataType_t type, const void *device, size_t n) {
    if (type == CUDA_R_32F) return from_device((const float *)device, n);
    std::vector<float> wide(n);
    const std::vector<__nv_bfloat16> small = from_device((const __nv_bfloat16 *)device, n);
    for (size_t i = 0; i < n; i++) wide[i] = __bfloat162float(small[i]);
    return wide;
}

static void *random_operand(const Product &p, std::vector<float> &values, size_t n) {
    values.resize(n);
    for (float &x : values) x = round_to(p.type, noise());
    return upload(p.type, values);
}

static void make_operands(Product &p) {
    int rows[3] = {p.M, p.K, p.M}, cols[3] = {p.K, p.N, p.N};
    if (p.transpose_a) std::swap(rows[0], cols[0]);
    if (p.transpose_b) std::swap(rows[1], cols[1]);
    for (int i = 0; i < 3; i++) {
        p.rows[i] = rows[i];
        p.cols[i] = cols[i];
        p.ld[i] = rows[i] + 8 - rows[i] % 8;
        p.device[i] = random_operand(p, p.host[i], (size_t)p.ld[i] * cols[i] * p.batch);
    }
    p.bias_device = random_operand(p, p.bias, p.M);
    p.aux_device = random_operand(p, p.aux, p.M * p.N);
}

static int describe(const Product &p, cublasLtMatmulDesc_t *desc) {
    const cublasOperation_t operation[2] = {CUBLAS_OP_N, CUBLAS_OP_T};
    const cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)p.epilogue;
    const int64_t aux_ld = p.M;
    int bad = cublasLtMatmulDescCreate(desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    auto set = [&](cublasLtMatmulDescAttributes_t attribute, const void *value, size_t size) {
        bad |= cublasLtMatmulDescSetAttribute(*desc, attribute, value, size);
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, &operation[p.transpose_a], sizeof *operation);
    set(CUBLASLT_MATMUL_DESC_TRANSB, &operation[p.transpose_b], sizeof *operation);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (p.epilogue & 4) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias_device, sizeof(void *));
    if (p.epilogue & 128) {
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p.aux_device, sizeof(void *));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld);
    }
    return bad;
}

static void run_product(const Product &p) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t layout[3];
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    const float one = 1;
    int found = 0, bad = cublasLtCreate(&handle) | describe(p, &desc);
    for (int i = 0; i < 3; i++) {
        const int64_t stride = (int64_t)p.ld[i] * p.cols[i];
        bad |= cublasLtMatrixLayoutCreate(&layout[i], p.type, p.rows[i], p.cols[i], p.ld[i]);
        bad |= cublasLtMatrixLayoutSetAttribute(layout[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &p.batch,
                                                sizeof p.batch);
        bad |= cublasLtMatrixLayoutSetAttribute(layout[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                &stride, sizeof stride);
    }
    bad |= cublasLtMatmulPreferenceCreate(&preference);
    bad |= cublasLtMatmulAlgoGetHeuristic(handle, desc, layout[0], layout[1], layout[2], layout[2],
                                          preference, 1, &result, &found);
    if (bad || !found) wrong("the set-up of cuBLASLt");
    if (cublasLtMatmul(handle, desc, &one, p.device[0], layout[0], p.device[1], layout[1], &p.beta,
                       p.device[2], layout[2], p.device[2], layout[2], &result.algo, NULL, 0, 0))
        wrong("cublasLtMatmul");
}

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

static double gelu_derivative(double x) {
    const double h = 1e-5;
    return (gelu(x + h) - gelu(x - h)) / (2 * h);
}

/* op(A) op(B) + beta C + bias, at (row, col) of product b */
static double exact_sum(const Product &p, int b, int row, int col) {
    auto at = [&](int matrix, int r, int c, bool transposed) {
        if (transposed) std::swap(r, c);
        return (double)p.host[matrix][((size_t)b * p.cols[matrix] + c) * p.ld[matrix] + r];
    };
    double sum = p.beta * at(2, row, col, false);
    for (int k = 0; k < p.K; k++) sum += at(0, row, k, p.transpose_a) * at(1, k, col, p.transpose_b);
    if (p.epilogue & 4) sum += p.bias[row];
    return sum;
}

static void compare_product(const Product &p) {
    const std::vector<float> out = download(p.type, p.device[2], p.host[2].size());
    const std::vector<float> aux_out = download(p.type, p.aux_device, p.aux.size());
    for (int b = 0; b < p.batch; b++)
        for (int row = 0; row < p.M; row++)
            for (int col = 0; col < p.N; col++) {
                const double sum = exact_sum(p, b, row, col);
                double expected = sum, limit = 2e-5;
                if (p.epilogue & 32) expected = gelu(sum);
                if (p.epilogue & 64) expected = sum * gelu_derivative(p.aux[col * p.M + row]);
                if (p.type == CUDA_R_16BF) limit = 0.03 + 0.005 * fabs(expected);
                if (fabs(out[((size_t)b * p.N + col) * p.ld[2] + row] - expected) > limit) wrong("a product");
                if (p.epilogue & 32 && fabs(aux_out[col * p.M + row] - sum) > limit)
                    wrong("an auxiliary matrix");
            }
}

static void one_product(cudaDataType_t type, bool transpose_a, bool transpose_b, int batch, float beta,
                        int epilogue) {
    Product p;
    p.type = type;
    p.transpose_a = transpose_a;
    p.transpose_b = transpose_b;
    p.batch = batch;
    p.beta = beta;
    p.epilogue = epilogue;
    make_operands(p);
    run_product(p);
    compare_product(p);
}
static void matmul(void) {
    for (cudaDataType_t type : {CUDA_R_32F, CUDA_R_16BF}) {
        one_product(type, false, false, 1, 0, 1);
        one_product(type, true, false, 3, 0, 1);
        one_product(type, false, true, 1, 1, 1);
        one_product(type, true, true, 1, 0, 1);
    }
    for (int epilogue : {4, 164, 192}) one_product(CUDA_R_16BF, true, false, 1, 0, epilogue);
}

/* A captured stream is launched twice. */
__global__ void add_kernel(float *p, float x) { p[threadIdx.x] += x; }
static void graphs(void) {
    std::vector<float> zero(32);
    float *p = on_device(zero.data(), 32);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    must(cudaStreamCreate(&stream));
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    LAUNCH(add_kernel, 1, 32, 0, stream, p, 1.0f);
    LAUNCH(add_kernel, 1, 32, 0, stream, p, 2.0f);
    must(cudaStreamEndCapture(stream, &graph));
    must(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 2; i++) must(cudaGraphLaunch(exec, stream));
    must(cudaStreamSynchronize(stream));
    if (from_device(p, 32)[31] != 6) wrong("a graph");
}

static void results(void) {
    warps();
    barriers();
    mma();
    copies();
    matmul();
    graphs();
    say("ok");
}

#ifndef __CUDACC__
/* --- Mistakes --- */
/* Runs pending operations and prints the error. */
static void finish(void) {
    const cudaError_t first = cudaGetLastError(), error = first ? first : cudaDeviceSynchronize();
    say(error ? cudaGetErrorString(error) : "ok");
}
static void no_wait(void) {               /* reads two groups after waiting for one or none */
    int missing[3];
    for (int left = 0; left < 3; left++) {
        missing[left] = 0;
        for (float x : async(left)) missing[left] += x != x;
    }
    printf("NaN: %d %d %d\n", missing[0], missing[1], missing[2]);
}

/* Each thread adds the values of its neighbours, with or without a barrier between write and read. */
__global__ void race_kernel(float *out, int barrier) {
    __shared__ float shared[64];
    shared[threadIdx.x] = 1;
    __syncthreads();
    shared[threadIdx.x] = (float)threadIdx.x;
    if (barrier) __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
static void race(int barrier) {
    float *p = on_device<float>(NULL, 64);
    LAUNCH(race_kernel, 1, 64, 0, 0, p, barrier);
    for (float x : from_device(p, 64)) printf("%g ", x);
    say("");
}
static void no_barrier(void) { race(0); }
static void with_barrier(void) { race(1); }

__global__ void half_barrier_kernel(void) {
    if (threadIdx.x < 32) __syncthreads();
}
static void half_barrier(void) {
    LAUNCH(half_barrier_kernel, 1, 64, 0, 0);
    finish();
}
__global__ void half_shuffle_kernel(int *out) {
    if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
static void half_shuffle(void) {
    LAUNCH(half_shuffle_kernel, 1, 32, 0, 0, on_device<int>(NULL, 32));
    finish();
}
__global__ void crossed_kernel(void) {
    if (threadIdx.x % 2) __syncwarp();
    else __syncthreads();
    if (threadIdx.x % 2) __syncthreads();
    else __syncwarp();
}
static void crossed(void) {
    LAUNCH(crossed_kernel, 1, 32, 0, 0);
    finish();
}
__global__ void mixed_kernel(int *out) {
    out[threadIdx.x] = threadIdx.x < 16 ? __any_sync(0xffffffffu, 1) : __shfl_sync(0xffffffffu, 1, 0);
}
static void mixed(void) {
    LAUNCH(mixed_kernel, 1, 32, 0, 0, on_device<int>(NULL, 32));
    finish();
}

/* Reads, or with `write` writes, a T at p + `at` bytes. */
template <class T> __global__ void touch_kernel(float *p, long long at, int write) {
    T *q = (T *)((char *)p + at);
    if (write) *(volatile T *)q = 1;
    else (void)*(volatile T *)q;
}
static void touch(size_t n, long long at, int write) {
    LAUNCH((touch_kernel<float>), 1, 1, 0, 0, on_device<float>(NULL, n), at, write);
    finish();
}
static void past_end(void) { touch(1024, 4096, 0); }
static void before(void) { touch(1024, -4, 0); }
static void beside(void) { touch(1000, 4000, 1); }     /* before the guard page */
static void freed(void) {
    float *p = on_device<float>(NULL, 64);
    must(cudaFree(p));
    LAUNCH((touch_kernel<float>), 1, 1, 0, 0, p, 0LL, 0);
    finish();
}
__global__ void vector_kernel(float *p) { ((float4 *)(p + 1))[0] = ((float4 *)p)[1]; }
static void misaligned(void) {
    LAUNCH(vector_kernel, 1, 1, 0, 0, on_device<float>(NULL, 64));
    finish();
}
__global__ void shared_end_kernel(float *out) {
    SHARED(float, shared);
    out[threadIdx.x] = shared[threadIdx.x + 1];
}
static void shared_end(void) {
    LAUNCH(shared_end_kernel, 1, 64, 64 * sizeof(float), 0, on_device<float>(NULL, 64));
    finish();
}
/* Shared memory is NaN at the start of every block. */
__global__ void fresh_kernel(float *out) {
    __shared__ float fixed[32];
    SHARED(float, shared);
    out[blockIdx.x * 32 + threadIdx.x] = fixed[threadIdx.x] + shared[threadIdx.x];
    fixed[threadIdx.x] = shared[threadIdx.x] = 1;
}
static void fresh(void) {
    float *p = on_device<float>(NULL, 128), *q = on_device<float>(NULL, 128);
    int numbers = 0;
    LAUNCH(fresh_kernel, 4, 32, 32 * sizeof(float), 0, p);
    for (float x : from_device(p, 128)) numbers += x == x;
    for (float x : from_device(q, 128)) numbers += x == x;
    printf("numbers: %d\n", numbers);
}

static void host_reads(void) {
    float *p = on_device<float>(NULL, 64);
    printf("%g\n", *(volatile float *)p);
}
static void host_writes(void) {
    float *p = on_device<float>(NULL, 64);
    LAUNCH((touch_kernel<float>), 1, 1, 0, 0, p, 0LL, 1);
    must(cudaDeviceSynchronize());        /* a kernel may; the host may not, even after it */
    *(volatile float *)p = 1;
}
static void host_pointer(void) {
    std::vector<float> host(64);
    LAUNCH((touch_kernel<float>), 1, 1, 0, 0, host.data(), 0LL, 0);
    finish();
}
struct Pair { int n, m; const float *p; };
__global__ void struct_kernel(Pair pair) { (void)pair; }
static void host_pointer_in_struct(void) {
    std::vector<float> host(64);
    const Pair pair = {3, 1024, host.data()};
    LAUNCH(struct_kernel, 1, 1, 0, 0, pair);
    finish();
}
static void wrong_way(void) {
    float host[64];
    say(cudaMemcpy(host, on_device<float>(NULL, 64), sizeof host, cudaMemcpyHostToDevice)
            ? cudaGetErrorString(cudaGetLastError()) : "ok");
}
static void long_copy(void) {
    float host[65];
    say(cudaMemcpy(on_device<float>(NULL, 64), host, sizeof host, cudaMemcpyHostToDevice)
            ? cudaGetErrorString(cudaGetLastError()) : "ok");
}

/* Changes pinned memory before its upload is complete, or reads it before a download is complete. */
static void no_synchronize(void) {
    float *pinned, *back, *p = on_device<float>(NULL, 1);
    cudaStream_t stream;
    must(cudaStreamCreate(&stream));
    must(cudaMallocHost(&pinned, sizeof *pinned));
    must(cudaMallocHost(&back, sizeof *back));
    *pinned = 1;
    must(cudaMemcpyAsync(p, pinned, sizeof *p, cudaMemcpyHostToDevice, stream));
    *pinned = 2;
    must(cudaMemcpyAsync(back, p, sizeof *p, cudaMemcpyDeviceToHost, stream));
    printf("%s ", *back != *back ? "NaN" : "a number");
    must(cudaStreamSynchronize(stream));
    printf("%g\n", *back);
}
/* A stream reads what another one uploads, with or without an event between them. */
static void streams(int with_event) {
    float *pinned, *p = on_device<float>(NULL, 1), *q = on_device<float>(NULL, 1);
    cudaStream_t upload, compute;
    cudaEvent_t event;
    must(cudaStreamCreate(&upload));
    must(cudaStreamCreate(&compute));
    must(cudaEventCreate(&event));
    must(cudaMallocHost(&pinned, sizeof *pinned));
    *pinned = 1;
    must(cudaMemcpyAsync(p, pinned, sizeof *p, cudaMemcpyHostToDevice, upload));
    must(cudaEventRecord(event, upload));
    if (with_event) must(cudaStreamWaitEvent(compute, event, 0));
    must(cudaMemcpyAsync(q, p, sizeof *p, cudaMemcpyDeviceToDevice, compute));
    must(cudaMemcpyAsync(pinned, q, sizeof *p, cudaMemcpyDeviceToHost, compute));
    must(cudaStreamSynchronize(compute));
    puts(*pinned == 1 ? "a number" : "NaN");
}
static void no_event(void) { streams(0); }
static void with_event(void) { streams(1); }

static void no_memory(void) {
    char *p;
    say(cudaMalloc(&p, (size_t)1 << 60) ? cudaGetErrorString(cudaGetLastError()) : "ok");
}
static void large_block(void) {
    LAUNCH(half_barrier_kernel, 1, 1025, 0, 0);
    finish();
}
static void much_shared(void) {
    LAUNCH(shared_end_kernel, 1, 32, 50 * 1024, 0, on_device<float>(NULL, 64));
    finish();
}
/* A product whose D, by its leading dimension, exceeds the allocation; and three that cuBLASLt lacks. */
static void matmul_mistakes(void) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t square, wide, short_ld;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found;
    float *p = on_device<float>(NULL, 70), one = 1, zero = 0;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatrixLayoutCreate(&square, CUDA_R_32F, 8, 8, 8);
    cublasLtMatrixLayoutCreate(&wide, CUDA_R_32F, 8, 8, 9);
    cublasLtMatrixLayoutCreate(&short_ld, CUDA_R_32F, 8, 8, 7);
    cublasLtMatmulPreferenceCreate(&preference);
    if (cublasLtMatmul(handle, desc, &one, p, square, p, square, &zero, p, wide, p, wide, NULL, NULL, 0, 0))
        say(cudaGetErrorString(cudaGetLastError()));
    if (cublasLtMatmulAlgoGetHeuristic(handle, desc, square, square, short_ld, short_ld, preference, 1,
                                       &result, &found))
        say(cudaGetErrorString(cudaGetLastError()));
    cublasLtMatmulAlgoGetHeuristic(handle, desc, square, square, square, square, preference, 1, &result,
                                   &found);
    if (cublasLtMatmul(handle, desc, &one, p + 1, square, p, square, &zero, p, square, p, square,
                       &result.algo, NULL, 0, 0))
        say(cudaGetErrorString(cudaGetLastError()));
    const int64_t ld = 12;
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DGELU;
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld, sizeof ld);
    if (cublasLtMatmulAlgoGetHeuristic(handle, desc, square, square, square, square, preference, 1, &result,
                                       &found))
        say(cudaGetErrorString(cudaGetLastError()));
    if (cublasLtMatmulDescSetAttribute(desc, (cublasLtMatmulDescAttributes_t)27, &ld, sizeof ld))
        say(cudaGetErrorString(cudaGetLastError()));
}

static const struct { const char *name; void (*run)(void); } mistakes[] = {
#define MISTAKE(name) {#name, name}
    MISTAKE(no_wait), MISTAKE(no_barrier), MISTAKE(with_barrier), MISTAKE(half_barrier),
        MISTAKE(half_shuffle),
    MISTAKE(crossed), MISTAKE(mixed), MISTAKE(past_end), MISTAKE(before), MISTAKE(beside), MISTAKE(freed),
    MISTAKE(misaligned), MISTAKE(shared_end), MISTAKE(fresh), MISTAKE(host_reads), MISTAKE(host_writes),
    MISTAKE(host_pointer), MISTAKE(host_pointer_in_struct), MISTAKE(wrong_way), MISTAKE(long_copy),
    MISTAKE(no_synchronize), MISTAKE(no_event), MISTAKE(with_event), MISTAKE(no_memory), MISTAKE(large_block),
    MISTAKE(much_shared), MISTAKE(matmul_mistakes),
};
#endif

#ifdef __CUDACC__
/* Products of ones by the plans of train_gpt2.cu: every element is exactly K, or, in bf16, K rounded. With
   split-K, a missing tail or partial sums in bf16 would show. */
__global__ void ones_kernel(floatX *out, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) from_float(out + i, 1);
}
template <class D>
static void ones(Blas *blas, const floatX *one, size_t M, size_t N, size_t K, int ta, int tb) {
    std::vector<D> zeros(M * N);
    D *d = on_device(zeros.data(), M * N), expected;
    from_float(&expected, (float)K);
    gpu_failed = 0;
    if (!gemm(blas, d, N, Matrix{one, ta ? M : K, ta}, Matrix{one, tb ? K : N, tb}, M, N, K)) {
        fprintf(stderr, "%zu x %zu x %zu (%d, %d): %s\n", M, N, K, ta, tb, gpt2_error());
        exit(1);
    }
    must(cudaStreamSynchronize(blas->stream));
    for (const D &value : from_device(d, M * N))
        if (to_float(value) != to_float(expected)) {
            fprintf(stderr, "%zu x %zu x %zu (%d, %d): %g, expected %g\n", M, N, K, ta, tb,
                    (double)to_float(value), (double)to_float(expected));
            exit(1);
        }
    must(cudaFree(d));
}
static void products(void) {
    const size_t most = (size_t)65536 * 768;
    const struct { size_t M, N, K; } shapes[] = {     /* of steps of 124M, and with a tail in K */
        {768, 768, 65536}, {2304, 768, 4096}, {4096, 3072, 768}, {1024, 768, 3072}, {64, 768, 50304},
        {128, 128, 4097}, {65, 129, 1001}, {768, 768, 1016}, {768, 3072, 4104}, {256, 256, 65528},
        {7, 9, 333},
    };
    GPT2 *m = new GPT2();
    if (device_open(m)) wrong(gpt2_error());
    floatX *one = (floatX *)device_memory(most * sizeof *one, m->stream);
    LAUNCH(ones_kernel, blocks(most, 256), 256, 0, m->stream, one, most);
    for (const auto &s : shapes)
        for (int way = 0; way < 3; way++) {     /* d-input, d-weight, forward */
            ones<float>(&m->blas, one, s.M, s.N, s.K, way == 1, way == 2);
            ones<floatX>(&m->blas, one, s.M, s.N, s.K, way == 1, way == 2);
        }
    puts("ok");
}
#endif

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "results";
    if (!strcmp(name, "results")) return results(), 0;
#ifdef __CUDACC__
    if (!strcmp(name, "products")) return products(), 0;
#else
    for (const auto &mistake : mistakes)
        if (!strcmp(name, mistake.name)) return mistake.run(), 0;
#endif
    printf("selftest: there is no test %s\n", name);
    return 2;
}
