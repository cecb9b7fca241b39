/* The emulated GPU: CUDA's types, vectors, bf16 and launch syntax. */
#pragma once
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
/* Where the thread_local variables of this library are: see shared_fill. */
#define __shared__ static thread_local
#define SHARED(type, name) type *name = (type *)emulate::block.shared
#define LAUNCH(kernel, grid, threads, shared, stream, ...) \
    emulate::launch(#kernel, kernel, grid, threads, shared, stream, ##__VA_ARGS__)

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

template <class T> T __ldcs(const T *p) { return *p; }
template <class T> void __stcs(T *p, T value) { *p = value; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class To, class From> To emulate_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
    To to;
    memcpy((void *)&to, (const void *)&from, sizeof to);
    return to;
}

/* bf16: the upper half of an fp32, rounded to the nearest, ties to even. */
struct alignas(2) __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) {
        const uint32_t wide = emulate_bits<uint32_t>(value);
        bits = value != value ? 0x7fff : (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    operator float() const { return emulate_bits<float>((uint32_t)bits << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {(float)v.x, (float)v.y}; }

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9, cudaErrorNotReady = 600, cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719, cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
