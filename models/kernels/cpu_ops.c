/* The operations of a decoder on a CPU: activations in float32, weights in their stored block format.
 * What their bytes mean is in stored_blocks.c, products of the kind that serves are in
 * quantized_linear.c, attention is in paged_attention.c; program.c runs a whole step of them, and
 * sampling.c chooses tokens from what came of it.
 *
 * What every operation here promises: the result of one row does not depend on how many rows there
 * are, on where it stands among them, or on the number of threads. So there is one order of
 * summation, whatever the shape: sums run over LANES partial sums, lane i taking elements i,
 * i + LANES, ..., each by a fused multiply-add, and fold() adds the lanes pairwise. The file must be
 * compiled with -ffp-contract=off, so that a sum is fused where it says madd() and nowhere else, and
 * without -ffast-math. The plain-torch reference of each operation is in reference.py.
 *
 * Letters as in the architectures: M rows, N outputs, K inputs, D head size.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "thread_pool.c"

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(32)));

/* ---- vectors of sixteen ---- */

/* a * b + c, rounded once; where the CPU cannot, rounded twice, but then everywhere. */
INLINE floats madd(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    union { floats all; __m256 half[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.all;
#elif defined(__ARM_NEON)
    union { floats all; float32x4_t part[4]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 4; i++) z.part[i] = vfmaq_f32(z.part[i], x.part[i], y.part[i]);
    return z.all;
#else
    return a * b + c;
#endif
}

INLINE floats splat(float x) {
    return (floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

INLINE floats load(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, floats v) { memcpy(p, &v, sizeof v); }

/* The first n < LANES elements, zeros behind them. */
INLINE floats load_part(const float *p, int n) {
    floats v = {};
    memcpy(&v, p, n * sizeof(float));
    return v;
}

INLINE float fold(floats v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    union { floats all; eight half[2]; } a = {v};
    union { eight all; four half[2]; } b = {a.half[0] + a.half[1]};
    four c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* e^x for x <= 0 within 2 ulp (Cephes' expf); 0 below -87. */
INLINE floats exp_of_negative(floats x) {
    const floats magic = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to a whole number */
    ints vanishes = x < splat(-87.f);
    x = (floats)(((ints)x & ~vanishes) | ((ints)splat(-87.f) & vanishes));
    floats shifted = madd(x, splat(1.44269504f), magic), n = shifted - magic;
    floats r = madd(n, splat(-0.693359375f), x);
    r = madd(n, splat(2.12194440e-4f), r);
    floats p = splat(1.9875691500e-4f);
    p = madd(p, r, splat(1.3981999507e-3f));
    p = madd(p, r, splat(8.3334519073e-3f));
    p = madd(p, r, splat(4.1665795894e-2f));
    p = madd(p, r, splat(1.6666665459e-1f));
    p = madd(p, r, splat(5.0000001201e-1f));
    p = madd(p * r, r, r) + 1.f;
    ints power = ((ints)shifted - (ints)magic + 127) << 23;
    return (floats)((ints)(p * (floats)power) & ~vanishes);
}

#include "stored_blocks.c"

/* ---- linear ---- */

#define TILE 4     /* outputs and rows multiplied at once, in TILE * TILE registers */
#define AT_ONCE 16 /* weight rows unpacked at once for many rows: with K = 2048, 128 KiB of L2 cache */

/* y[m][n] = x[m] . w[n] for ROWS rows and TILE outputs; rows of w are ldw floats apart. */
INLINE void multiply(const int ROWS, const float *x, const float *w, int ldw, int K, float *y, int64_t ldy,
                     int outputs) {
    floats sum[TILE][TILE] = {};
    const int whole = K / LANES * LANES;
    for (int k = 0; k < whole; k += LANES) {
        floats xs[TILE];
        for (int m = 0; m < ROWS; m++) xs[m] = load(x + (int64_t)m * K + k);
        for (int n = 0; n < TILE; n++) {
            const floats ws = load(w + (int64_t)n * ldw + k);
            for (int m = 0; m < ROWS; m++) sum[m][n] = madd(xs[m], ws, sum[m][n]);
        }
    }
    if (whole < K)
        for (int n = 0; n < TILE; n++)
            for (int m = 0; m < ROWS; m++)
                sum[m][n] = madd(load_part(x + (int64_t)m * K + whole, K - whole),
                                 load_part(w + (int64_t)n * ldw + whole, K - whole), sum[m][n]);
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < outputs; n++) y[m * ldy + n] = fold(sum[m][n]);
}

typedef struct {
    const uint8_t *w;
    const float *x;
    float *y;
    int64_t row_bytes, ldy;
    int kind, M, N, K;
    _Atomic int failed;
} Linear;

/* A buffer of this thread that grows to the largest matrix it has met; NULL without memory. */
static float *scratch(size_t floats_wanted) {
    static _Thread_local float *buffer;
    static _Thread_local size_t size;
    if (floats_wanted > size) {
        free(buffer);
        buffer = aligned_alloc(64, (floats_wanted * sizeof(float) + 63) / 64 * 64);
        size = buffer ? floats_wanted : 0;
        if (buffer) memset(buffer, 0, floats_wanted * sizeof(float));
    }
    return buffer;
}

/* AT_ONCE outputs of all rows: unpacked a few at a time, so that for few rows they stay in L1. */
static void linear_item(void *argument, int64_t item) {
    Linear *o = argument;
    const int M = o->M, K = o->K, at_once = M > TILE ? AT_ONCE : TILE;
    const int end = (item + 1) * AT_ONCE < o->N ? (int)(item + 1) * AT_ONCE : o->N;
    float *tile = scratch((size_t)AT_ONCE * K);
    if (!tile) {
        o->failed = 1;
        return;
    }
    for (int n0 = (int)item * AT_ONCE; n0 < end; n0 += at_once) {
        const int wide = end - n0 < at_once ? end - n0 : at_once;
        for (int n = 0; n < wide; n++)
            unpack(o->kind, o->w + (n0 + n) * o->row_bytes, tile + (size_t)n * K, K);
        for (int m = 0; m < M; m += TILE)
            for (int n = 0; n < wide; n += TILE) {
                const float *xm = o->x + (int64_t)m * K, *wn = tile + (size_t)n * K;
                float *to = o->y + m * o->ldy + n0 + n;
                const int outputs = wide - n < TILE ? wide - n : TILE;
                switch (M - m) {
                case 1: multiply(1, xm, wn, K, K, to, o->ldy, outputs); break;
                case 2: multiply(2, xm, wn, K, K, to, o->ldy, outputs); break;
                case 3: multiply(3, xm, wn, K, K, to, o->ldy, outputs); break;
                default: multiply(4, xm, wn, K, K, to, o->ldy, outputs);
                }
            }
    }
}

/* y[M, N] = x[M, K] W^T; rows of y are ldy floats apart. Returns -1 without memory. */
int cortex_linear(int kind, const uint8_t *w, int64_t row_bytes, const float *x, float *y, int64_t ldy,
                  int M, int N, int K, int threads) {
    Linear linear = {w, x, y, row_bytes, ldy, kind, M, N, K, 0};
    for_each(threads, ((int64_t)N + AT_ONCE - 1) / AT_ONCE, linear_item, &linear);
    return linear.failed ? -1 : 0;
}

#include "quantized_tiles.c"

#include "quantized_linear.c"

#include "quantize.c"

/* ---- the small ones ---- */

/* y[M, K] = rows ids[M] of x; they are there. */
void cortex_take(const float *x, const int64_t *ids, float *y, int M, int K) {
    for (int m = 0; m < M; m++) memcpy(y + (int64_t)m * K, x + ids[m] * K, K * sizeof(float));
}

typedef struct {
    const float *x, *weight;
    float *y;
    int K;
    float eps;
    int64_t ldx; /* of rms_norm: floats from one token to the next, whose heads lie together */
    int heads;
} Rows;

static void rms_norm_row(void *argument, int64_t m) {
    const Rows *o = argument;
    const int K = o->K, whole = K / LANES * LANES;
    const float *row = o->x + m / o->heads * o->ldx + m % o->heads * K;
    float *to = o->y + m * K;
    floats sum = {}, tail = load_part(row + whole, K - whole);
    for (int k = 0; k < whole; k += LANES) sum = madd(load(row + k), load(row + k), sum);
    const float scale = 1.f / sqrtf(fold(madd(tail, tail, sum)) / (float)K + o->eps);
    for (int k = 0; k < K; k++) to[k] = o->weight[k] * (row[k] * scale);
}

static void add_row(void *argument, int64_t m) {
    const Rows *o = argument;
    const float *a = o->x + m * o->K, *b = o->weight + m * o->K;
    float *to = o->y + m * o->K;
    for (int k = 0; k < o->K; k++) to[k] = a[k] + b[k];
}

/* y[M, K] = a + b. */
void cortex_add(const float *a, const float *b, float *y, int M, int K, int threads) {
    Rows rows = {a, b, y, K};
    for_each(M > 16 ? threads : 1, M, add_row, &rows);
}

static void add_bias_row(void *argument, int64_t m) {
    const Rows *o = argument;
    float *to = o->y + m * o->K;
    for (int k = 0; k < o->K; k++) to[k] += o->weight[k];
}

/* y[M, N] += bias[N], row by row. */
void cortex_add_bias(float *y, const float *bias, int M, int N, int threads) {
    Rows rows = {NULL, bias, y, N};
    for_each(M > 16 ? threads : 1, M, add_bias_row, &rows);
}

/* y[M, heads, K] = x / rms(x) * weight, head by head; tokens of x are ldx floats apart. */
void cortex_rms_norm(const float *x, int64_t ldx, const float *weight, float *y, int M, int heads, int K,
                     float eps, int threads) {
    Rows rows = {x, weight, y, K, eps, ldx, heads};
    for_each(M > 16 ? threads : 1, (int64_t)M * heads, rms_norm_row, &rows);
}

INLINE floats silu_times(floats gate, floats up) {
    const ints negative = gate < 0.f;
    const floats e = exp_of_negative((floats)((ints)gate | (ints)splat(-0.f)));
    /* 1 / (1 + e^-g), written so that the exponent is never positive */
    const floats top = (floats)(((ints)e & negative) | ((ints)splat(1.f) & ~negative));
    return gate * (top / (1.f + e)) * up;
}

static void silu_multiply_row(void *argument, int64_t m) {
    const Rows *o = argument;
    const int K = o->K, whole = K / LANES * LANES;
    const float *gate = o->x + m * 2 * K, *up = gate + K;
    float *to = o->y + m * K;
    for (int k = 0; k < whole; k += LANES) store(to + k, silu_times(load(gate + k), load(up + k)));
    const floats rest = silu_times(load_part(gate + whole, K - whole), load_part(up + whole, K - whole));
    memcpy(to + whole, &rest, (K - whole) * sizeof(float));
}

/* y[M, K] = silu(x[:, :K]) * x[:, K:]. */
void cortex_silu_multiply(const float *x, float *y, int M, int K, int threads) {
    Rows rows = {x, NULL, y, K};
    for_each(M > 4 ? threads : 1, M, silu_multiply_row, &rows);
}

/* cos and sin [M, half] of positions times frequencies, times a magnitude. */
void cortex_rotation(const int64_t *positions, const float *frequencies, float *cosines, float *sines, int M,
                     int half, float magnitude) {
    for (int m = 0; m < M; m++)
        for (int i = 0; i < half; i++) {
            const float angle = (float)positions[m] * frequencies[i];
            cosines[(int64_t)m * half + i] = cosf(angle) * magnitude;
            sines[(int64_t)m * half + i] = sinf(angle) * magnitude;
        }
}

/* y[M, heads, D] = x, of each head the first two halves rotated; the heads of one token lie together in
 * x, tokens ldx floats apart. */
void cortex_rotate(const float *x, int64_t ldx, const float *cosines, const float *sines, float *y, int M,
                   int heads, int D, int half) {
    for (int m = 0; m < M; m++) {
        const float *c = cosines + (int64_t)m * half, *s = sines + (int64_t)m * half;
        for (int h = 0; h < heads; h++) {
            const float *from = x + m * ldx + h * D;
            float *to = y + ((int64_t)m * heads + h) * D;
            for (int i = 0; i < half; i++) {
                to[i] = from[i] * c[i] - from[half + i] * s[i];
                to[half + i] = from[half + i] * c[i] + from[i] * s[i];
            }
            memcpy(to + 2 * half, from + 2 * half, (D - 2 * half) * sizeof(float));
        }
    }
}

#include "experts.c"

#include "paged_attention.c"

#include "gated_delta.c"

#include "program.c"

#include "sampling.c"
