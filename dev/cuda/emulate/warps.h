/* The emulated GPU: operations of a warp and tensor cores. */
#pragma once
namespace emulate {
inline void need_whole_warp(void **lanes, const char *name) {
    for (int i = 0; i < WARP; i++)
        if (!lanes[i]) stop(cudaErrorLaunchFailure,
                            "%s needs 32 threads, and the block's last warp has fewer", name);
}
inline void need_full_mask(unsigned mask, const char *name) {
    if (mask != 0xffffffffu) stop(cudaErrorLaunchFailure, "%s of the mask %x: emulate.h knows the full one",
                                  name, mask);
}
template <class T> struct Shuffle { T value, result; int lane; };
template <class T> void shuffle_finish(void **lanes) {
    for (int i = 0; i < WARP; i++) {
        Shuffle<T> *s = (Shuffle<T> *)lanes[i];
        if (!s) continue;
        if (s->lane < 0 || s->lane >= WARP || !lanes[s->lane])
            stop(cudaErrorLaunchFailure, "a shuffle from lane %d, which is not there", s->lane);
        s->result = ((Shuffle<T> *)lanes[s->lane])->value;
    }
}
template <class T> T shuffle(const char *name, unsigned mask, T value, int lane) {
    Shuffle<T> s = {value, value, lane};
    need_full_mask(mask, name);
    warp_operation(name, shuffle_finish<T>, &s);
    return s.result;
}
/* The source lane, or the lane itself if that is outside its group of `width` lanes. */
inline int lane_in(int lane, int width) { return lane / width == lane_id() / width ? lane : lane_id(); }

struct Vote { int predicate; unsigned result; };
inline void vote_finish(void **lanes) {
    unsigned votes = 0;
    for (int i = 0; i < WARP; i++)
        if (lanes[i] && ((Vote *)lanes[i])->predicate) votes |= 1u << i;
    for (int i = 0; i < WARP; i++)
        if (lanes[i]) ((Vote *)lanes[i])->result = votes;
}
inline unsigned vote(const char *name, unsigned mask, int predicate) {
    Vote v = {predicate, 0};
    need_full_mask(mask, name);
    warp_operation(name, vote_finish, &v);
    return v.result;
}
inline void nothing(void **) {}

/* Fragments of mma.m16n8k16 in the PTX manual, with group = lane / 4 and member = lane % 4:
     half i % 2 of a[i / 2]     A[group + 8 if i / 2 is odd][2 member + i % 2 + 8 if i >= 4]
     half i % 2 of b[i / 2]     B[2 member + i % 2 + 8 if i >= 2][group]
     d[i]                       D[group + 8 if i >= 2][2 member + i % 2] */
struct Mma { float *d; const uint32_t *a, *b; };
inline float half_of(const uint32_t *words, int i) {
    return emulate_bits<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
inline void mma_finish(void **lanes) {
    float a[16][16], b[16][8], d[16][8];
    need_whole_warp(lanes, "mma");
    for (int lane = 0; lane < WARP; lane++) {
        const Mma *m = (const Mma *)lanes[lane];
        const int group = lane / 4, member = lane % 4;
        for (int i = 0; i < 8; i++)
            a[group + 8 * (i / 2 % 2)][2 * member + i % 2 + 8 * (i / 4)] = half_of(m->a, i);
        for (int i = 0; i < 4; i++) b[2 * member + i % 2 + 8 * (i / 2)][group] = half_of(m->b, i);
        for (int i = 0; i < 4; i++) d[group + 8 * (i / 2)][2 * member + i % 2] = m->d[i];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            ((Mma *)lanes[lane])->d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

/* ldmatrix.x4: lane l passes the address of row l % 8 of the 8 × 8 matrix l / 8. Of each matrix it receives
   elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; with .trans, of column l / 4. */
struct Ldmatrix { uint32_t *r; const void *row; };
inline uint16_t matrix_element(void **lanes, int matrix, int row, int column) {
    return ((const uint16_t *)((Ldmatrix *)lanes[8 * matrix + row])->row)[column];
}
template <bool trans> void ldmatrix_finish(void **lanes) {
    need_whole_warp(lanes, "ldmatrix");
    for (int lane = 0; lane < WARP; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            const int row = lane / 4, column = 2 * (lane % 4);
            const uint32_t low = trans ? matrix_element(lanes, matrix, column, row)
                                       : matrix_element(lanes, matrix, row, column);
            const uint32_t high = trans ? matrix_element(lanes, matrix, column + 1, row)
                                        : matrix_element(lanes, matrix, row, column + 1);
            ((Ldmatrix *)lanes[lane])->r[matrix] = low | high << 16;
        }
}
inline bool is_shared(const void *p, size_t bytes) {
    const char *at = (const char *)p;
    return (at >= block.shared && at + bytes <= block.shared + block.shared_bytes) ||
           (at >= device().tls && at + bytes <= device().tls + device().tls_bytes);
}
inline void need_shared_row(const void *p, const char *name) {
    if ((uintptr_t)p % 16) stop(cudaErrorIllegalAddress, "%s at %p, which is not a multiple of 16", name, p);
    if (!is_shared(p, 16)) stop(cudaErrorIllegalAddress, "%s at %p, which is not in shared memory", name, p);
}
}

inline void __syncthreads(void) { emulate::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulate::need_full_mask(mask, "__syncwarp");
    emulate::warp_operation("__syncwarp", emulate::nothing, NULL);
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    const int first = emulate::lane_id() / width * width;
    return emulate::shuffle("__shfl_sync", mask, value, first + (lane & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = emulate::lane_in(emulate::lane_id() ^ bits, width);
    return emulate::shuffle("__shfl_xor_sync", mask, value, lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = emulate::lane_in(emulate::lane_id() + (int)by, width);
    return emulate::shuffle("__shfl_down_sync", mask, value, lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulate::vote("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
    return emulate::vote("__any_sync", mask, predicate) != 0;
}

/* d (16,8) += a (16,16) · b (16,8): bf16 products, which are exact in fp32, and sums in fp32. */
inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    emulate::Mma m = {d, a, b};
    emulate::warp_operation("mma", emulate::mma_finish, &m);
}
/* An address in shared memory, as PTX instructions take it: a number, not a pointer. */
typedef uintptr_t Shared;
inline Shared shared_address(const void *p) { return (Shared)p; }
inline void ldmatrix_x4(uint32_t r[4], Shared row) {
    emulate::Ldmatrix l = {r, (const void *)row};
    emulate::need_shared_row(l.row, "ldmatrix");
    emulate::warp_operation("ldmatrix", emulate::ldmatrix_finish<false>, &l);
}
inline void ldmatrix_x4_trans(uint32_t r[4], Shared row) {
    emulate::Ldmatrix l = {r, (const void *)row};
    emulate::need_shared_row(l.row, "ldmatrix.trans");
    emulate::warp_operation("ldmatrix.trans", emulate::ldmatrix_finish<true>, &l);
}
/* cp.async: the destination is NaN until the thread that issued the copy waits for its group. */
inline void copy_async_16(Shared to, const void *global) {
    void *shared = (void *)to;
    emulate::need_shared_row(shared, "cp.async");
    if ((uintptr_t)global % 16 || !emulate::holds(global, 16, true)) {
        char what[256];
        emulate::describe(what, sizeof what, global);
        emulate::stop(cudaErrorIllegalAddress, "cp.async of 16 bytes from %s: out of bounds or not aligned",
                      what);
    }
    memset(shared, 0xff, 16);
    emulate::block.copies[emulate::block.current].open.push_back({shared, global});
    emulate::block.copied = true;
}
inline void copy_async_commit(void) {
    emulate::Copies &mine = emulate::block.copies[emulate::block.current];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int N> inline void copy_async_wait(void) {
    emulate::Copies &mine = emulate::block.copies[emulate::block.current];
    for (; mine.groups.size() > N; mine.groups.pop_front())
        for (auto &copy : mine.groups.front()) {
            memcpy(copy.first, copy.second, 16);
            mine.hidden = true;
        }
}
