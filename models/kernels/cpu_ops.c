/* The operations of a decoder on a CPU, in float32, on weights in their stored block format.
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
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
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

/* ---- stored formats (ggml-common.h of llama.cpp); the numbers are shared with cpu.py ---- */

enum { F32, F16, BF16, Q4_0, Q4_1, Q8_0 };

/* Bytes fetched ahead of what is unpacked: a matrix that is in no cache then unpacks 2.4 times faster
 * (Q4_1, one core of a Sapphire Rapids guest, November 2026). */
#define AHEAD 2048

INLINE floats from_half(halves h) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)h);
#else
    words w = __builtin_convertvector(h, words), sign = (w & 0x8000) << 16;
    words magnitude = (w & 0x7fff) << 13;
    floats scaled = (floats)magnitude * splat(0x1p112f); /* exact, also for subnormals */
    words special = (words)(magnitude >= (0x7c00 << 13)) & 0x7f800000;
    return (floats)((words)scaled | special | sign);
#endif
}

INLINE float half_at(const uint8_t *p) {
    halves h = {};
    memcpy(&h, p, 2);
    return from_half(h)[0];
}

INLINE floats from_brain(halves h) {
    return (floats)(__builtin_convertvector(h, words) << 16);
}

INLINE floats from_bytes(bytes16 b) {
    return __builtin_convertvector(__builtin_convertvector(b, ints), floats);
}

/* GCC 12 widens signed bytes one by one, so they go the unsigned way. */
INLINE floats from_signed(bytes16 b) { return from_bytes(b ^ 128) - 128.f; }

INLINE void unpack_q4_0(const uint8_t *from, float *to) {
    __builtin_prefetch(from + AHEAD);
    const floats d = splat(half_at(from));
    bytes16 q;
    memcpy(&q, from + 2, sizeof q);
    store(to, (from_bytes(q & 15) - 8.f) * d);
    store(to + 16, (from_bytes(q >> 4) - 8.f) * d);
}

INLINE void unpack_q4_1(const uint8_t *from, float *to) {
    __builtin_prefetch(from + AHEAD);
    const floats d = splat(half_at(from)), m = splat(half_at(from + 2));
    bytes16 q;
    memcpy(&q, from + 4, sizeof q);
    store(to, from_bytes(q & 15) * d + m);
    store(to + 16, from_bytes(q >> 4) * d + m);
}

INLINE void unpack_q8_0(const uint8_t *from, float *to) {
    __builtin_prefetch(from + AHEAD);
    const floats d = splat(half_at(from));
    bytes16 first, second;
    memcpy(&first, from + 2, sizeof first);
    memcpy(&second, from + 18, sizeof second);
    store(to, from_signed(first) * d);
    store(to + 16, from_signed(second) * d);
}

INLINE void unpack_halves(const uint8_t *from, float *to, int K, int is_brain) {
    for (int k = 0; k < K; k += LANES) {
        __builtin_prefetch(from + 2 * k + AHEAD);
        const int n = K - k < LANES ? K - k : LANES;
        halves h = {};
        memcpy(&h, from + 2 * k, 2 * n);
        floats v = is_brain ? from_brain(h) : from_half(h);
        memcpy(to + k, &v, n * sizeof(float));
    }
}

/* One row of K weights to float32. */
static void unpack(int kind, const uint8_t *from, float *to, int K) {
    switch (kind) {
    case F32: memcpy(to, from, K * sizeof(float)); break;
    case F16: unpack_halves(from, to, K, 0); break;
    case BF16: unpack_halves(from, to, K, 1); break;
    case Q4_0: for (int k = 0; k < K; k += 32, from += 18) unpack_q4_0(from, to + k); break;
    case Q4_1: for (int k = 0; k < K; k += 32, from += 20) unpack_q4_1(from, to + k); break;
    case Q8_0: for (int k = 0; k < K; k += 32, from += 34) unpack_q8_0(from, to + k); break;
    }
}

/* y[M, K] = rows ids[M] of w[N, K], dequantised. Returns -1 if an id is no row. */
int cortex_rows(int kind, const uint8_t *w, int64_t row_bytes, const int64_t *ids, float *y, int M, int64_t N,
                int K) {
    for (int m = 0; m < M; m++) {
        if (ids[m] < 0 || ids[m] >= N) return -1;
        unpack(kind, w + ids[m] * row_bytes, y + (int64_t)m * K, K);
    }
    return 0;
}

/* ---- linear ---- */

#define TILE 4     /* outputs and rows multiplied at once, in TILE * TILE registers */
#define OUTPUTS 16 /* weight rows unpacked at once for many rows: with K = 2048, 128 KiB of L2 cache */

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

/* OUTPUTS outputs of all rows: unpacked a few at a time, so that for few rows they stay in L1. */
static void linear_item(void *argument, int64_t item) {
    Linear *o = argument;
    const int M = o->M, K = o->K, at_once = M > TILE ? OUTPUTS : TILE;
    const int end = (item + 1) * OUTPUTS < o->N ? (int)(item + 1) * OUTPUTS : o->N;
    float *tile = scratch((size_t)OUTPUTS * K);
    if (!tile) {
        o->failed = 1;
        return;
    }
    for (int n0 = (int)item * OUTPUTS; n0 < end; n0 += at_once) {
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
    for_each(threads, ((int64_t)N + OUTPUTS - 1) / OUTPUTS, linear_item, &linear);
    return linear.failed ? -1 : 0;
}

/* ---- the small ones ---- */

typedef struct {
    const float *x, *weight;
    float *y;
    int K;
    float eps;
} Rows;

static void rms_norm_row(void *argument, int64_t m) {
    const Rows *o = argument;
    const int K = o->K, whole = K / LANES * LANES;
    const float *row = o->x + m * K;
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
    Rows rows = {a, b, y, K, 0.f};
    for_each(M > 16 ? threads : 1, M, add_row, &rows);
}

/* y[M, K] = x / rms(x) * weight, row by row. */
void cortex_rms_norm(const float *x, const float *weight, float *y, int M, int K, float eps, int threads) {
    Rows rows = {x, weight, y, K, eps};
    for_each(M > 16 ? threads : 1, M, rms_norm_row, &rows);
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
    const int K = o->K;
    const float *gate = o->x + m * 2 * K, *up = gate + K;
    float *to = o->y + m * K;
    for (int k = 0; k < K; k += LANES) {
        const int n = K - k < LANES ? K - k : LANES;
        const floats v = silu_times(load_part(gate + k, n), load_part(up + k, n));
        memcpy(to + k, &v, n * sizeof(float));
    }
}

/* y[M, K] = silu(x[:, :K]) * x[:, K:]. */
void cortex_silu_multiply(const float *x, float *y, int M, int K, int threads) {
    Rows rows = {x, NULL, y, K, 0.f};
    for_each(M > 4 ? threads : 1, M, silu_multiply_row, &rows);
}

/* cos and sin [M, half] of positions times frequencies. */
void cortex_rotation(const int64_t *positions, const float *frequencies, float *cosines, float *sines, int M,
                     int half) {
    for (int m = 0; m < M; m++)
        for (int i = 0; i < half; i++) {
            const float angle = (float)positions[m] * frequencies[i];
            cosines[(int64_t)m * half + i] = cosf(angle);
            sines[(int64_t)m * half + i] = sinf(angle);
        }
}

/* y[M, heads, D] = x rotated; the heads of one token lie together in x, tokens ldx floats apart. */
void cortex_rotate(const float *x, int64_t ldx, const float *cosines, const float *sines, float *y, int M,
                   int heads, int D) {
    const int half = D / 2;
    for (int m = 0; m < M; m++) {
        const float *c = cosines + (int64_t)m * half, *s = sines + (int64_t)m * half;
        for (int h = 0; h < heads; h++) {
            const float *from = x + m * ldx + h * D;
            float *to = y + ((int64_t)m * heads + h) * D;
            for (int i = 0; i < half; i++) {
                to[i] = from[i] * c[i] - from[half + i] * s[i];
                to[half + i] = from[half + i] * c[i] + from[i] * s[i];
            }
        }
    }
}

/* ---- paged attention ---- */

#define SPAN 128     /* positions scored before their values are summed; counted from position 0 */
#define MAX_HEAD 256 /* largest head size */

/* One layer's cache [blocks, block_tokens, K, D], seen from one sequence and one key-value head. */
typedef struct {
    const float *keys, *values;
    const int32_t *blocks;
    int block_tokens;
    int64_t position_stride; /* floats from one position of a block to the next */
} View;

INLINE int64_t offset_of(const View *view, int p) {
    const int64_t slot = (int64_t)view->blocks[p / view->block_tokens] * view->block_tokens + p % view->block_tokens;
    return slot * view->position_stride;
}

INLINE floats load_any(const float *p, int n) { return n >= LANES ? load(p) : load_part(p, n); }

/* One head of one token on its way: online softmax (Milakov and Gimelshein, arXiv:1805.02867) over
 * spans of absolute positions, so that the order of its sums is its own. */
typedef struct {
    floats query[MAX_HEAD / LANES], sum[MAX_HEAD / LANES];
    float top, total;
    int visible; /* positions it sees */
} Row;

INLINE void begin_row(const int PARTS, Row *row, const float *q, int visible, int D) {
    for (int i = 0; i < PARTS; i++) {
        row->query[i] = load_any(q + i * LANES, D - i * LANES);
        row->sum[i] = (floats){};
    }
    row->top = -INFINITY;
    row->total = 0.f;
    row->visible = visible;
}

INLINE void attend_span(const int PARTS, Row *row, const View *view, int start, int D, float scale) {
    floats sum[MAX_HEAD / LANES], weights[SPAN / LANES], span_total = {};
    float *scores = (float *)weights, top = row->top;
    const int count = row->visible - start < SPAN ? row->visible - start : SPAN;
    for (int p = 0; p < count; p++) {
        const float *key = view->keys + offset_of(view, start + p);
        floats dot = {};
        for (int i = 0; i < PARTS; i++) dot = madd(row->query[i], load_any(key + i * LANES, D - i * LANES), dot);
        scores[p] = fold(dot) * scale;
        top = scores[p] > top ? scores[p] : top;
    }
    for (int p = count; p < SPAN; p++) scores[p] = -INFINITY;
    const float shrink = exp_of_negative(splat(row->top - top))[0];
    for (int i = 0; i < SPAN / LANES; i++) {
        weights[i] = exp_of_negative(weights[i] - top);
        span_total += weights[i];
    }
    for (int i = 0; i < PARTS; i++) sum[i] = row->sum[i] * shrink;
    for (int p = 0; p < count; p++) {
        const float *value = view->values + offset_of(view, start + p);
        const floats weight = splat(scores[p]);
        for (int i = 0; i < PARTS; i++) sum[i] = madd(weight, load_any(value + i * LANES, D - i * LANES), sum[i]);
    }
    for (int i = 0; i < PARTS; i++) row->sum[i] = sum[i];
    row->total = row->total * shrink + fold(span_total);
    row->top = top;
}

INLINE void end_row(const int PARTS, const Row *row, float *out, int D) {
    for (int i = 0; i < PARTS; i++) {
        const floats v = row->sum[i] / row->total;
        memcpy(out + i * LANES, &v, (D - i * LANES < LANES ? D - i * LANES : LANES) * sizeof(float));
    }
}

/* Copy k and v [T, K, D], tokens ldk floats apart, to their slots of the cache. */
void cortex_store(const float *k, const float *v, int64_t ldk, int64_t ldv, const int64_t *slots, float *keys,
                  float *values, int T, int width) {
    for (int t = 0; t < T; t++) {
        memcpy(keys + slots[t] * width, k + t * ldk, width * sizeof(float));
        memcpy(values + slots[t] * width, v + t * ldv, width * sizeof(float));
    }
}

typedef struct {
    const float *q, *keys, *values;
    const int32_t *tables, *query_starts;
    const int64_t *positions;
    float *out;
    int table_width, sequences, heads, kv_heads, D, block_tokens, heads_at_once;
    float scale;
} Attention;

#define TOKENS_AT_ONCE 8
#define ROWS_AT_ONCE 16 /* a span of keys and values, fetched once, serves so many rows */

INLINE int64_t tiles_of(const Attention *o, int s) {
    return (o->query_starts[s + 1] - o->query_starts[s] + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
}

/* Tokens [first, last) of sequence s, heads [head, head + heads) of one key-value head. */
INLINE void attend(const int PARTS, const Attention *o, int s, int64_t first, int64_t last, int head, int heads,
                   int D) {
    const int kv = head / (o->heads / o->kv_heads);
    const View view = {o->keys + (int64_t)kv * D, o->values + (int64_t)kv * D,
                       o->tables + (int64_t)s * o->table_width, o->block_tokens, (int64_t)o->kv_heads * D};
    Row rows[ROWS_AT_ONCE];
    int count = 0, longest = 0;
    for (int64_t t = first; t < last; t++)
        for (int h = head; h < head + heads; h++) {
            const int visible = (int)o->positions[t] + 1;
            begin_row(PARTS, &rows[count++], o->q + (t * o->heads + h) * D, visible, D);
            longest = visible > longest ? visible : longest;
        }
    for (int start = 0; start < longest; start += SPAN)
        for (int r = 0; r < count; r++)
            if (start < rows[r].visible) attend_span(PARTS, &rows[r], &view, start, D, o->scale);
    for (int r = 0; r < count; r++)
        end_row(PARTS, &rows[r], o->out + ((first + r / heads) * o->heads + head + r % heads) * D, D);
}

/* A tile of tokens and a few heads that share keys and values; the last tokens, which see most,
 * come first. */
static void attention_item(void *argument, int64_t item) {
    const Attention *o = argument;
    const int groups = o->heads / o->heads_at_once, head = item % groups * o->heads_at_once;
    int64_t tile = item / groups;
    int s = o->sequences - 1;
    while (tile >= tiles_of(o, s)) tile -= tiles_of(o, s--);
    const int64_t last = o->query_starts[s + 1] - tile * TOKENS_AT_ONCE, start = o->query_starts[s];
    int64_t first = last - TOKENS_AT_ONCE > start ? last - TOKENS_AT_ONCE : start;
    const int step = ROWS_AT_ONCE / o->heads_at_once;
    for (; first < last; first += step) {
        const int64_t end = first + step < last ? first + step : last;
        if (o->D == 64) attend(4, o, s, first, end, head, o->heads_at_once, 64);
        else if (o->D == 128) attend(8, o, s, first, end, head, o->heads_at_once, 128);
        else attend((o->D + LANES - 1) / LANES, o, s, first, end, head, o->heads_at_once, o->D);
    }
}

/* out[T, N, D] = causal attention of q[T, N, D] over the paged cache; token t of sequence s sees
 * positions[t] + 1 positions of it. What is computed together shares the fetching of keys and
 * values, never a sum: hence the promise. */
void cortex_attention(const float *q, const float *keys, const float *values, const int32_t *tables,
                      int table_width, const int32_t *query_starts, int sequences, const int64_t *positions,
                      float *out, int heads, int kv_heads, int D, int block_tokens, float scale, int threads) {
    Attention o = {q, keys, values, tables, query_starts, positions, out, table_width,
                   sequences, heads, kv_heads, D, block_tokens, heads / kv_heads, scale};
    int64_t tiles = 0;
    for (int s = 0; s < sequences; s++) tiles += tiles_of(&o, s);
    if (o.heads_at_once > ROWS_AT_ONCE || tiles * kv_heads < threads) o.heads_at_once = 1;
    for_each(threads, tiles * (heads / o.heads_at_once), attention_item, &o);
}
