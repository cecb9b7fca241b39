/* The emulated GPU: Hopper's warpgroup products, on tiles of 128-byte rows in shared memory, swizzled. They
   are done as late as allowed, in wgmma_wait: before it their results are NaN. */
#pragma once
namespace emulate {
struct Wgmma { float (*d)[4]; Shared a; uint32_t a_registers[4]; Shared b; bool rows_k, add; };
struct Wgmmas {                           /* of a thread */
    std::vector<Wgmma> open;
    std::deque<std::vector<Wgmma>> groups;
    std::map<float (*)[4], std::array<float, 32>> results;     /* not yet in registers */
    bool fenced = false;
};
inline Wgmmas wgmmas[MOST_THREADS];

/* Element (row, k) of an operand whose rows begin at `rows`, which may be some columns into a tile. */
inline uint32_t swizzled(Shared rows, int row, int k) {
    const Shared at = rows + row * 128 + k * 2;
    return *(const uint16_t *)(at ^ (at >> 7 & 7) << 4);
}
inline void need_tile(Shared rows) {
    if (rows % 1024 >= 128)
        stop(cudaErrorIllegalAddress, "wgmma at %p: a tile begins at a multiple of 1024", (const void *)rows);
    if (!is_shared((const void *)(rows / 1024 * 1024), 1024))
        stop(cudaErrorIllegalAddress, "wgmma at %p, which is not in shared memory", (const void *)rows);
}

inline void issue(const Wgmma &product) {
    Wgmmas &mine = wgmmas[block.current];
    need_tile(product.b);
    if (!mine.fenced) stop(cudaErrorLaunchFailure, "wgmma without wgmma.fence before it");
    for (const Copies &copies : block.copies)
        if (copies.hidden)
            stop(cudaErrorLaunchFailure, "wgmma reads what cp.async has written, without fence.proxy.async");
    if (!mine.results.count(product.d)) {
        std::array<float, 32> &result = mine.results[product.d];
        memcpy(result.data(), product.d, sizeof result);
        memset((void *)product.d, 0xff, sizeof result);
    }
    mine.open.push_back(product);
}

/* By mma: 16 rows of d for each warp. */
inline void finish(const Wgmma &product, float result[32]) {
    const int warp = (int)(threadIdx.x / WARP % 4), group = (int)(threadIdx.x % WARP / 4);
    const int pair = (int)(threadIdx.x % 4 * 2);
    uint32_t a[4], b[2];
    memcpy(a, product.a_registers, sizeof a);
    if (!product.rows_k)
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + group + i % 2 * 8, k = pair + i / 2 * 8;
            a[i] = swizzled(product.a, row, k) | swizzled(product.a, row, k + 1) << 16;
        }
    if (!product.add) memset(result, 0, 32 * sizeof *result);
    for (int n = 0; n < 8; n++) {
        for (int i = 0; i < 2; i++) {
            const int k = pair + i * 8, column = n * 8 + group;
            if (product.rows_k)
                b[i] = swizzled(product.b, k, column) | swizzled(product.b, k + 1, column) << 16;
            else
                b[i] = swizzled(product.b, column, k) | swizzled(product.b, column, k + 1) << 16;
        }
        mma_m16n8k16_bf16(result + 4 * n, a, b);
    }
}
}

inline void wgmma_n(float d[8][4], Shared a, Shared b, int add) {
    emulate::need_tile(a);
    emulate::issue({d, a, {0, 0, 0, 0}, b, false, add != 0});
}
inline void wgmma_k(float d[8][4], const uint32_t a[4], Shared b) {
    emulate::issue({d, 0, {a[0], a[1], a[2], a[3]}, b, true, true});
}
inline void wgmma_fence(void) { emulate::wgmmas[emulate::block.current].fenced = true; }
inline void wgmma_commit(void) {
    emulate::Wgmmas &mine = emulate::wgmmas[emulate::block.current];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
    mine.fenced = false;
}
template <int N> inline void wgmma_wait(float (*)[4]) {
    emulate::Wgmmas &mine = emulate::wgmmas[emulate::block.current];
    for (; mine.groups.size() > N; mine.groups.pop_front())
        for (const emulate::Wgmma &product : mine.groups.front())
            emulate::finish(product, mine.results[product.d].data());
    std::map<float (*)[4], std::array<float, 32>> in_flight;
    for (const auto &group : mine.groups)
        for (const emulate::Wgmma &product : group) in_flight[product.d] = mine.results[product.d];
    for (const auto &result : mine.results)
        if (!in_flight.count(result.first))
            memcpy((void *)result.first, result.second.data(), 32 * sizeof(float));
    mine.results = std::move(in_flight);
}
inline void copies_visible(void) { emulate::block.copies[emulate::block.current].hidden = false; }
