/* Products with quantised weights, in whole numbers: activations take 16 bits, weights stay packed.
 *
 * A row of activations is cut into blocks of 32. A block x becomes whole numbers q = round(x / s) with
 * s = max |x| / 32512, so that
 *
 *     w . x  =  sum over runs of  s * (scale * sum((code - offset) * q) + minimum * sum(q))
 *
 * where the inner sums run over whole numbers: they are exact, and the same on every CPU. Runs, of 32
 * inputs or of 16, are added in order, by fused multiply-adds. So a row's result does not depend on
 * other rows or on threads. Rounding activations to 16 bits costs 1e-5 of a logit's size (int8, as
 * elsewhere, 1e-3).
 *
 * Float8 are no whole numbers: fp8_linear.c multiplies with them.
 */
#define ROWS 8 /* of activations multiplied at once, each with its sums in a register */

INLINE int rows_at_once(int rest) { return rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1; }

/* ---- activations ---- */

/* One block of activations: with VNNI as 32 high bytes and 32 low ones, 256 * high + low; else as
 * they are. */
typedef struct {
    union {
        int16_t whole[BLOCK];
        int8_t half[2][BLOCK];
    };
} Quants;

/* What belongs to it: its scale s, and the sums of its whole numbers, of all and, where weights
 * have runs of 16, of the first 16. */
typedef struct {
    float scale;
    int32_t all, first;
} Sums;

typedef struct {
    const float *x; /* [M, K] */
    Quants *q;      /* [M, stride]; not for float8 */
    Sums *sums;     /* the same */
    int64_t stride; /* blocks from one row to the next: odd, or rows meet in one set of the cache */
} Activations;

static void quantize_block(const float *x, int has_halves, Quants *q, Sums *to) {
    floats a = load(x), b = load(x + LANES);
    const words magnitude = (words){} + 0x7fffffff;
    words top = (words)a & magnitude, other = (words)b & magnitude;
    const words less = (words)(top < other); /* without their sign, floats are in the order of their bits */
    top = (top & ~less) | (other & less);
    uint32_t most = 0;
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    float peak;
    memcpy(&peak, &most, 4);
    const float scale = peak / 32512.f;
    const float by = peak > 1e-30f ? 32512.f / peak : 0.f;
    const floats magic = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to a whole number */
    ints p = (ints)(a * by + magic) - (ints)magic, r = (ints)(b * by + magic) - (ints)magic;
    int32_t all = 0, first = 0;
    int16_t whole[BLOCK];
    for (int i = 0; i < LANES; i++) {
        whole[i] = (int16_t)p[i];
        whole[i + LANES] = (int16_t)r[i];
    }
    for (int i = 0; i < BLOCK; i++) all += whole[i];
    if (has_halves)
        for (int i = 0; i < LANES; i++) first += whole[i];
    *to = (Sums){scale, all, first};
    if (VNNI)
        for (int i = 0; i < BLOCK; i++) {
            q->half[0][i] = (int8_t)((whole[i] + 128) >> 8);
            q->half[1][i] = (int8_t)whole[i]; /* its low byte, as a signed one */
        }
    else
        memcpy(q->whole, whole, sizeof whole);
}

typedef struct {
    Activations to;
    int blocks, has_halves;
} Quantizing;

static void quantize_row(void *argument, int64_t m) {
    const Quantizing *o = argument;
    for (int b = 0; b < o->blocks; b++) {
        const int64_t at = m * o->to.stride + b;
        quantize_block(o->to.x + (m * o->blocks + b) * BLOCK, o->has_halves, o->to.q + at, o->to.sums + at);
    }
}

/* Rows x[M, K] as products with *kind* take them, in memory of this thread until its next product;
 * -1 without memory. */
static int activate(int kind, const float *x, int M, int K, int threads, Activations *to) {
    const int64_t stride = K / BLOCK | 1, count = M * stride;
    *to = (Activations){x, NULL, NULL, stride};
    if (kind == FP8) return 0;
    char *memory = (char *)scratch(count * (sizeof(Quants) + sizeof(Sums)) / sizeof(float));
    if (!memory) return -1;
    to->q = (Quants *)memory;
    to->sums = (Sums *)(to->q + count);
    Quantizing quantizing = {*to, K / BLOCK, format_of(kind).run < BLOCK};
    for_each(M > 8 ? threads : 1, M, quantize_row, &quantizing);
    return 0;
}

/* ---- the product ---- */

/* sum(code * q) over some groups of a block, for OUTPUTS outputs. */
INLINE ints dot_groups(const bytes64 *codes, const Quants *q, const int first, const int end) {
#if VNNI
    __m512i high = _mm512_setzero_si512(), low = high;
#pragma GCC unroll 8
    for (int group = first; group < end; group++) {
        int32_t h, l;
        memcpy(&h, q->half[0] + 4 * group, 4);
        memcpy(&l, q->half[1] + 4 * group, 4);
        high = _mm512_dpbusd_epi32(high, (__m512i)codes[group], _mm512_set1_epi32(h));
        low = _mm512_dpbusd_epi32(low, (__m512i)codes[group], _mm512_set1_epi32(l));
    }
    return (ints)_mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
#elif defined(__AVX2__)
    union { ints all; __m128i part[4]; } sum;
    __m256i pairs[4] = {};
    for (int group = first; group < end; group++) {
        int64_t four;
        memcpy(&four, q->whole + 4 * group, 8);
        const __m256i by = _mm256_set1_epi64x(four);
        const uint8_t *at = (const uint8_t *)&codes[group];
        for (int i = 0; i < 4; i++) {
            const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(at + 16 * i)));
            pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(wide, by));
        }
    }
    for (int i = 0; i < 4; i++)
        sum.part[i] = _mm_hadd_epi32(_mm256_castsi256_si128(pairs[i]), _mm256_extracti128_si256(pairs[i], 1));
    return sum.all;
#else
    ints sum = {};
    for (int group = first; group < end; group++)
        for (int i = 0; i < 4; i++)
            for (int r = 0; r < OUTPUTS; r++)
                sum[r] += (int)codes[group][4 * r + i] * q->whole[4 * group + i];
    return sum;
#endif
}

/* y + what one block of inputs gives. */
INLINE floats add_block(const Format f, const bytes64 *codes, const Affines *affines, const Quants *q,
                        const Sums *sums, floats y) {
#pragma GCC unroll 2
    for (int run = 0; run < BLOCK / f.run; run++) {
        const int first = run * f.run / 4, end = first + f.run / 4;
        const int32_t sum = f.run == BLOCK ? sums->all : run ? sums->all - sums->first : sums->first;
        const ints whole = dot_groups(codes, q, first, end) - f.offset * sum;
        y = madd(__builtin_convertvector(whole, floats), affines[run].scale * sums->scale, y);
        if (f.has_minimum) y = madd(affines[run].minimum, splat(sums->scale * (float)sum), y);
    }
    return y;
}

/* y[R, OUTPUTS] = R rows of activations from *first* on times one column of tiles, whose codes are
 * unpacked in registers: again for every ROWS rows, which costs less than to store them. */
INLINE void multiply_tiles(const int R, const int kind, const uint8_t *tile, int K, const Activations *x,
                           int64_t first, floats *to) {
    const Format f = format_of(kind);
    const int64_t stride = x->stride, end = first * stride + K / BLOCK;
    floats y[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = (floats){};
    for (int64_t at = first * stride; at < end; tile += tile_bytes(f)) {
        const Scales scales = scales_of(f, tile);
#pragma GCC unroll 1
        for (int p = 0; p < panels_of(f); p++, at++) {
            bytes64 codes[GROUPS];
            Affines affines[2];
            unpack_panel(f, tile, &scales, p, codes, affines);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                y[r] = add_block(f, codes, affines, x->q + at + r * stride, x->sums + at + r * stride, y[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) to[r] = y[r];
}

#define MULTIPLY(R, kind) case kind: multiply_tiles(R, kind, tiles, K, x, first, y); break

#define MULTIPLY_ALL(R)                                                                                     \
    static __attribute__((noinline)) void multiply_##R(int kind, const uint8_t *tiles, int K,               \
                                                       const Activations *x, int64_t first, floats *y) {    \
        switch (kind) {                                                                                     \
        MULTIPLY(R, Q4_0); MULTIPLY(R, Q4_1); MULTIPLY(R, Q5_0); MULTIPLY(R, Q5_1); MULTIPLY(R, Q8_0);      \
        MULTIPLY(R, IQ4_NL); MULTIPLY(R, Q2_K); MULTIPLY(R, Q3_K); MULTIPLY(R, Q4_K); MULTIPLY(R, Q5_K);    \
        MULTIPLY(R, Q6_K); MULTIPLY(R, IQ4_XS);                                                             \
        }                                                                                                   \
    }
MULTIPLY_ALL(1) MULTIPLY_ALL(2) MULTIPLY_ALL(4) MULTIPLY_ALL(8)

/* y[rows, outputs] of sums, its rows ldy floats apart. */
INLINE void put_sums(const floats *sums, int rows, float *y, int64_t ldy, int outputs) {
    for (int r = 0; r < rows; r++) memcpy(y + r * ldy, &sums[r], outputs * sizeof(float));
}

#include "fp8_linear.c"

/* ---- the whole ---- */

/* y[M, outputs] = rows *first* to first + M of the activations times one column of tiles, of which the
 * first *outputs* are wanted; rows of y are ldy floats apart. */
static void multiply_column(int kind, const uint8_t *tiles, int K, const Activations *x, int64_t first, int M,
                            float *y, int64_t ldy, int outputs) {
    if (kind == FP8) {
        multiply_fp8(tiles, K, x->x + first * K, M, y, ldy, outputs);
        return;
    }
    for (int m = 0, rows; m < M; m += rows) {
        floats sums[ROWS];
        rows = rows_at_once(M - m);
        switch (rows) {
        case 8: multiply_8(kind, tiles, K, x, first + m, sums); break;
        case 4: multiply_4(kind, tiles, K, x, first + m, sums); break;
        case 2: multiply_2(kind, tiles, K, x, first + m, sums); break;
        default: multiply_1(kind, tiles, K, x, first + m, sums);
        }
        put_sums(sums, rows, y + m * ldy, ldy, outputs);
    }
}

typedef struct {
    const uint8_t *tiles;
    Activations x;
    float *y;
    int64_t ldy, column_bytes;
    int kind, M, N, K;
} Tiled;

static void tiled_item(void *argument, int64_t item) {
    const Tiled *o = argument;
    const int left = o->N - (int)item * OUTPUTS, outputs = left < OUTPUTS ? left : OUTPUTS;
    multiply_column(o->kind, o->tiles + item * o->column_bytes, o->K, &o->x, 0, o->M, o->y + item * OUTPUTS, o->ldy, outputs);
}

/* y[M, N] = x[M, K] W^T for tiles of W; rows of y are ldy floats apart. Returns -1 without memory. */
int cortex_tiled_linear(int kind, const uint8_t *tiles, const float *x, float *y, int64_t ldy, int M, int N,
                        int K, int threads) {
    Tiled tiled = {tiles, {}, y, ldy, column_bytes(kind, K), kind, M, N, K};
    if (!M) return 0; /* no memory is wanted then, and so none found */
    if (activate(kind, x, M, K, threads, &tiled.x)) return -1;
    for_each(threads, (N + OUTPUTS - 1) / OUTPUTS, tiled_item, &tiled);
    return 0;
}
