/* The emulated GPU: cuBLASLt as plain loops, with products and sums in fp32. Rejects
   what the manual forbids. */
#pragma once
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4, CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4, CUBLASLT_EPILOGUE_DGELU = 64 | 128
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7, CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};
enum cublasLtReductionScheme_t {
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4, CUBLASLT_REDUCTION_SCHEME_MASK = 7
};
namespace emulate {
struct Handle { int unused; };
struct MatmulDesc {
    cublasOperation_t transa = CUBLAS_OP_N, transb = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void *bias = NULL;
    void *aux = NULL;
    int64_t aux_ld = 0;
    int bias_type = -1;                   /* -1: the type of D */
};
struct Layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batch = 1;
    int64_t stride = 0;
};
struct Preference {
    size_t workspace = 0;
    uint32_t align[4] = {256, 256, 256, 256}, reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
};
}
typedef emulate::Handle *cublasLtHandle_t;
typedef emulate::MatmulDesc *cublasLtMatmulDesc_t;
typedef emulate::Layout *cublasLtMatrixLayout_t;
typedef emulate::Preference *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };        /* the alignments that it needs, 1, reductions */
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};

namespace emulate {
__attribute__((format(printf, 2, 3)))
inline cublasStatus_t reject(cublasStatus_t status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    said = latest = cudaErrorInvalidValue;        /* for cudaGetErrorString */
    return status;
}
inline size_t size_of(int type) { return type == CUDA_R_16BF ? 2 : 4; }
inline float load(const void *p, size_t i, int type) {
    if (type == CUDA_R_16BF) return (float)((const __nv_bfloat16 *)p)[i];
    return ((const float *)p)[i];
}
inline void store(void *p, size_t i, int type, float value) {
    if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)p)[i] = value;
    else
        ((float *)p)[i] = value;
}
inline float gelu(float x) {
    return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}
inline float gelu_slope(float x) {
    const float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

struct Operand { size_t rows, cols, row_step, col_step; };     /* op(A) or op(B), in elements */
inline Operand operand(const Layout &l, int operation) {
    if (operation == CUBLAS_OP_N) return {(size_t)l.rows, (size_t)l.cols, 1, (size_t)l.ld};
    return {(size_t)l.cols, (size_t)l.rows, (size_t)l.ld, 1};
}
inline int bias_type(const MatmulDesc &desc, const Layout &d) {
    if (desc.bias_type < 0) return d.type;
    return desc.bias_type;
}

struct Matmul {
    MatmulDesc desc;
    Layout a, b, c, d;
    float alpha, beta;
    const void *A, *B, *C;
    void *D;
    uint64_t reductions;
};

/* D = alpha op(A) op(B) + beta C, then the epilogue; all in column-major order. Partial sums of 64 products
   limit the rounding error; they are added in the type of D where the preference allows it, as by split-K. */
inline void matmul_run(const Matmul &m) {
    const size_t M = m.d.rows, N = m.d.cols, part = 64;
    const Operand op_a = operand(m.a, m.desc.transa), op_b = operand(m.b, m.desc.transb);
    const size_t K = op_a.cols;
    const int epilogue = m.desc.epilogue, type_of_bias = bias_type(m.desc, m.d);
    const int exact_parts = m.reductions == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const int in_type_of_d = m.d.type == CUDA_R_16BF && !exact_parts;
    std::vector<float> a(K * M), total(M), sum(M);
    for (size_t batch = 0; batch < (size_t)m.d.batch; batch++) {
        const char *A = (const char *)m.A + batch * m.a.stride * size_of(m.a.type);
        const char *B = (const char *)m.B + batch * m.b.stride * size_of(m.b.type);
        const char *C = (const char *)m.C + batch * m.c.stride * size_of(m.c.type);
        char *D = (char *)m.D + batch * m.d.stride * size_of(m.d.type);
        for (size_t k = 0; k < K; k++)
            for (size_t i = 0; i < M; i++)
                a[k * M + i] = load(A, i * op_a.row_step + k * op_a.col_step, m.a.type);
        for (size_t j = 0; j < N; j++) {
            std::fill(total.begin(), total.end(), 0.0f);
            for (size_t first = 0; first < K; first += part) {
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (size_t k = first; k < K && k < first + part; k++) {
                    const float factor = load(B, k * op_b.row_step + j * op_b.col_step, m.b.type);
                    const float *column = &a[k * M];
                    for (size_t i = 0; i < M; i++) sum[i] += column[i] * factor;
                }
                for (size_t i = 0; i < M; i++) {
                    total[i] += sum[i];
                    if (in_type_of_d) total[i] = (float)__nv_bfloat16(total[i]);
                }
            }
            for (size_t i = 0; i < M; i++) {
                float value = m.alpha * total[i];
                if (m.beta != 0) value += m.beta * load(C, i + j * m.c.ld, m.c.type);
                if (epilogue & CUBLASLT_EPILOGUE_BIAS) value += load(m.desc.bias, i, type_of_bias);
                if (epilogue == CUBLASLT_EPILOGUE_DGELU)
                    value *= gelu_slope(load(m.desc.aux, i + j * m.desc.aux_ld, m.d.type));
                else if (epilogue & 128)
                    store(m.desc.aux, i + j * m.desc.aux_ld, m.d.type, value);
                if (epilogue & CUBLASLT_EPILOGUE_GELU) value = gelu(value);
                store(D, i + j * m.d.ld, m.d.type, value);
            }
        }
    }
}

/* Whether shapes, types and epilogue match; the heuristic has no pointers. */
inline cublasStatus_t matmul_shapes(const MatmulDesc &desc, const Layout &a, const Layout &b, const Layout &c,
                                    const Layout &d) {
    typedef long long unsigned number;
    const Operand op_a = operand(a, desc.transa), op_b = operand(b, desc.transb);
    const number M = op_a.rows, K = op_a.cols, L = op_b.rows, N = op_b.cols;
    if (K != L || d.rows != M || d.cols != N || c.rows != M || c.cols != N || !M || !N || !K)
        return reject(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul: op(A) is %llu x %llu, op(B) %llu x %llu, "
                      "C %llu x %llu, D %llu x %llu", M, K, L, N, (number)c.rows, (number)c.cols,
                      (number)d.rows, (number)d.cols);
    for (const Layout *l : {&a, &b, &c, &d}) {
        if (l->ld < (int64_t)l->rows)
            return reject(CUBLAS_STATUS_INVALID_VALUE,
                          "cublasLtMatmul: a leading dimension of %lld for %lld rows",
                          (long long)l->ld, (long long)l->rows);
        if (l->batch < 1 || l->batch != d.batch)
            return reject(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul: batches of %d and %d", l->batch,
                          d.batch);
    }
    if (d.batch > 1 && (uint64_t)d.stride < (uint64_t)d.ld * (d.cols - 1) + d.rows)
        return reject(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul: the matrices of D's batch overlap");
    if (a.type != b.type || c.type != d.type || (a.type == CUDA_R_32F && d.type != CUDA_R_32F))
        return reject(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul: types %d, %d, %d, %d", a.type, b.type,
                      c.type, d.type);
    if (desc.epilogue & 128 && (desc.aux_ld < (int64_t)d.rows || desc.aux_ld % 8 || d.batch > 1))
        return reject(CUBLAS_STATUS_NOT_SUPPORTED,
                      "cublasLtMatmul: EPILOGUE_AUX_LD is %lld for %lld rows; it must be a "
                      "multiple of 8, and the batch 1", (long long)desc.aux_ld, (long long)d.rows);
    if (desc.epilogue & CUBLASLT_EPILOGUE_BIAS && desc.bias_type >= 0 && desc.bias_type != d.type &&
        !(a.type == CUDA_R_16BF && desc.bias_type == CUDA_R_16BF))
        return reject(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul: a bias of type %d with D of type %d",
                      desc.bias_type, d.type);
    return CUBLAS_STATUS_SUCCESS;
}
inline size_t layout_bytes(const Layout &l) {
    const size_t one = (l.cols - 1) * (size_t)l.ld + l.rows;
    return (one + (size_t)(l.batch - 1) * (size_t)l.stride) * size_of(l.type);
}
inline cublasStatus_t need_device(const char *what, const void *p, size_t bytes) {
    char found[256];
    if (holds(p, bytes, true)) return CUBLAS_STATUS_SUCCESS;
    describe(found, sizeof found, p);
    return reject(CUBLAS_STATUS_EXECUTION_FAILED, "cublasLtMatmul: %s, %zu bytes, is out of bounds at %s",
                  what, bytes, found);
}
template <class T> cublasStatus_t take(T *to, const void *from, size_t bytes) {
    if (bytes != sizeof *to)
        return reject(CUBLAS_STATUS_INVALID_VALUE, "an attribute of %zu bytes was given %zu", sizeof *to,
                      bytes);
    memcpy(to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
}

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *out) {
    *out = new emulate::Handle();
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
        return emulate::reject(CUBLAS_STATUS_NOT_SUPPORTED,
                               "emulate.h computes in fp32 (CUBLAS_COMPUTE_32F)");
    return *out = new emulate::MatmulDesc, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t which,
                                                     const void *value, size_t bytes) {
    int32_t number = 0;
    switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return emulate::take(&d->transa, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return emulate::take(&d->transb, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return emulate::take(&d->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return emulate::take(&d->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return emulate::take(&d->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return emulate::take(&d->aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        if (emulate::take(&number, value, bytes)) return CUBLAS_STATUS_INVALID_VALUE;
        for (int known : {1, 4, 32, 36, 160, 164, 192})
            if (number == known) return d->epilogue = (cublasLtEpilogue_t)number, CUBLAS_STATUS_SUCCESS;
        break;
    default: break;
    }
    return emulate::reject(CUBLAS_STATUS_NOT_SUPPORTED,
                           "emulate.h has no matmul attribute %d with the value %d", which, number);
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
    if (type != CUDA_R_32F && type != CUDA_R_16BF)
        return emulate::reject(CUBLAS_STATUS_NOT_SUPPORTED, "emulate.h has no matrices of type %d", type);
    return *out = new emulate::Layout{type, rows, cols, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                       cublasLtMatrixLayoutAttribute_t which,
                                                       const void *value, size_t bytes) {
    switch (which) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return emulate::take(&l->batch, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return emulate::take(&l->stride, value, bytes);
    }
    return emulate::reject(CUBLAS_STATUS_NOT_SUPPORTED, "emulate.h has no layout attribute %d", which);
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    return *out = new emulate::Preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t which,
                                                           const void *value, size_t bytes) {
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return emulate::take(&p->workspace, value, bytes);
    if (which == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
        return emulate::take(&p->reductions, value, bytes);
    if (which >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
        which <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
        return emulate::take(&p->align[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
    return emulate::reject(CUBLAS_STATUS_NOT_SUPPORTED, "emulate.h has no preference %d", which);
}
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t p, int wanted,
                                                     cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 0;
    for (const emulate::Stream *stream : emulate::device().streams)     /* as some versions do */
        if (stream->capture) return emulate::reject(CUBLAS_STATUS_NOT_SUPPORTED, "a graph is being captured");
    const cublasStatus_t status = emulate::matmul_shapes(*desc, *a, *b, *c, *d);
    if (status || wanted < 1) return status;
    memset((void *)results, 0, sizeof *results);
    for (int i = 0; i < 4; i++) results->algo.data[i] = p->align[i];
    results->algo.data[4] = 1;
    results->algo.data[5] = p->reductions;
    return *found = 1, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                                     const void *A, cublasLtMatrixLayout_t a,
                                     const void *B, cublasLtMatrixLayout_t b, const void *beta,
                                     const void *C, cublasLtMatrixLayout_t c,
                                     void *D, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo,
                                     void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(emulate::device().calls);
    emulate::Matmul m = {*desc, *a, *b, *c, *d, *(const float *)alpha, *(const float *)beta,
                         A, B, C, D, CUBLASLT_REDUCTION_SCHEME_MASK};
    if (algo) m.reductions = algo->data[5];
    const void *address[4] = {A, B, C, D};
    const emulate::Layout *layout[4] = {a, b, c, d};
    const char *const names[4] = {"A", "B", "C", "D"};
    cublasStatus_t status = emulate::matmul_shapes(*desc, *a, *b, *c, *d);
    for (int i = 0; i < 4 && !status; i++) {
        const size_t align = algo ? algo->data[i] : 16;
        if (i == 2 && m.beta == 0 && !C) continue;
        status = emulate::need_device(names[i], address[i], emulate::layout_bytes(*layout[i]));
        if (!status && (uintptr_t)address[i] % align)
            status = emulate::reject(CUBLAS_STATUS_INVALID_VALUE,
                                     "cublasLtMatmul: %s is at %p, but the algorithm was "
                                     "chosen for a multiple of %zu", names[i], address[i], align);
    }
    if (!status && algo && algo->data[4] != 1)
        status = emulate::reject(CUBLAS_STATUS_INVALID_VALUE,
                                 "cublasLtMatmul: the algorithm is from no heuristic");
    if (!status && workspace_bytes)
        status = emulate::need_device("the workspace", workspace, workspace_bytes);
    if (!status && desc->epilogue & CUBLASLT_EPILOGUE_BIAS)
        status = emulate::need_device("the bias", desc->bias,
                                      d->rows * emulate::size_of(emulate::bias_type(*desc, *d)));
    if (!status && desc->epilogue & 128)
        status = emulate::need_device("the auxiliary matrix", desc->aux,
                                      ((d->cols - 1) * (size_t)desc->aux_ld +
                                      d->rows) * emulate::size_of(d->type));
    if (status) return status;
    const cudaError_t error = emulate::put(emulate::find(stream), [=] {
        emulate::matmul_run(m);
        return cudaSuccess;
    });
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
