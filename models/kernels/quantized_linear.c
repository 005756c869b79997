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
#define ROWS 8  /* of activations multiplied at once, each with its sums in a register */
#define SUMS 64 /* of rows that share what was unpacked */

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

/* What belongs to it: its scale s, and the sums of its whole numbers. */
typedef struct {
    float scale;
    int32_t sum[3];    /* of the first 16, of the others, of all */
    float weighted[3]; /* these times the scale */
    int32_t unused;
} Sums;

typedef struct {
    const float *x; /* [M, K] */
    Quants *q;      /* [M, stride]; not for float8 */
    Sums *sums;     /* the same */
    int64_t stride; /* blocks from one row to the next: odd, or rows meet in one set of the cache */
} Activations;

static void quantize_block(const float *x, Quants *q, Sums *to) {
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
    int32_t first = 0, second = 0;
    int16_t whole[BLOCK];
    for (int i = 0; i < LANES; i++) {
        whole[i] = (int16_t)p[i];
        whole[i + LANES] = (int16_t)r[i];
    }
    for (int i = 0; i < LANES; i++) first += whole[i];
    for (int i = 0; i < LANES; i++) second += whole[i + LANES];
    const int32_t total = first + second;
    *to = (Sums){scale, {first, second, total}, {scale * first, scale * second, scale * total}};
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
    int blocks;
} Quantizing;

static void quantize_row(void *argument, int64_t m) {
    const Quantizing *o = argument;
    for (int b = 0; b < o->blocks; b++) {
        const int64_t at = m * o->to.stride + b;
        quantize_block(o->to.x + (m * o->blocks + b) * BLOCK, o->to.q + at, o->to.sums + at);
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
    Quantizing quantizing = {*to, K / BLOCK};
    for_each(M > 8 ? threads : 1, M, quantize_row, &quantizing);
    return 0;
}

/* ---- the product ---- */

/* start + sum(code * q) over some groups of a block, for OUTPUTS outputs. */
INLINE ints dot_groups(const bytes64 *codes, const Quants *q, const int first, const int end, int start) {
    const ints from = (ints){} + start;
#if VNNI
    __m512i high = _mm512_setzero_si512(), low = (__m512i)from;
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
    return sum.all + from;
#else
    ints sum = from;
    for (int group = first; group < end; group++)
        for (int i = 0; i < 4; i++)
            for (int r = 0; r < OUTPUTS; r++)
                sum[r] += (int)codes[group][4 * r + i] * q->whole[4 * group + i];
    return sum;
#endif
}

/* What a panel's codes mean: of its one run or its two. */
typedef struct {
    int runs, has_minimum, offset;
} Meaning;

INLINE Meaning meaning_of(Format f) { return (Meaning){BLOCK / f.run, f.has_minimum, f.offset}; }

/* y + what one block of inputs gives. */
INLINE floats add_block(const Meaning f, const bytes64 *codes, const Affines *affines, const Quants *q,
                        const Sums *sums, floats y) {
#pragma GCC unroll 2
    for (int run = 0; run < f.runs; run++) {
        const int which = f.runs == 2 ? run : 2;
        const int first = run * GROUPS / f.runs, end = (run + 1) * GROUPS / f.runs;
        const ints whole = dot_groups(codes, q, first, end, -f.offset * sums->sum[which]);
        y = madd(__builtin_convertvector(whole, floats), affines[run].scale * sums->scale, y);
        if (f.has_minimum) y = madd(affines[run].minimum, splat(sums->weighted[which]), y);
    }
    return y;
}

/* ---- one row: unpacked in registers ---- */

INLINE floats multiply_tiles(const int kind, const uint8_t *tile, int K, const Activations *x, int64_t row) {
    const Format f = format_of(kind);
    const int64_t end = row * x->stride + K / BLOCK;
    floats y = {};
    for (int64_t at = row * x->stride; at < end; tile += tile_bytes(f)) {
        const Scales scales = scales_of(f, tile);
#pragma GCC unroll 1
        for (int p = 0; p < panels_of(f); p++, at++) {
            bytes64 codes[GROUPS];
            Affines affines[2];
            unpack_panel(f, tile, &scales, p, codes, affines);
            y = add_block(meaning_of(f), codes, affines, x->q + at, x->sums + at, y);
        }
    }
    return y;
}

#define MULTIPLY(kind) case kind: return multiply_tiles(kind, tiles, K, x, row)

static floats multiply_row(int kind, const uint8_t *tiles, int K, const Activations *x, int64_t row) {
    switch (kind) {
    MULTIPLY(Q4_0); MULTIPLY(Q4_1); MULTIPLY(Q5_0); MULTIPLY(Q5_1); MULTIPLY(IQ4_NL); MULTIPLY(Q2_K);
    MULTIPLY(Q3_K); MULTIPLY(Q4_K); MULTIPLY(Q5_K); MULTIPLY(Q6_K); MULTIPLY(IQ4_XS);
    default: return multiply_tiles(Q8_0, tiles, K, x, row);
    }
}

/* ---- many rows: unpacked once for all of them, PANELS panels at a time ---- */

#define PANELS 8

typedef struct {
    bytes64 codes[PANELS][GROUPS];
    Affines affines[PANELS][2];
} Chunk;

INLINE void unpack_tiles(const int kind, const uint8_t *tile, int panels, Chunk *to) {
    const Format f = format_of(kind);
    for (int at = 0; at < panels; tile += tile_bytes(f)) {
        const Scales scales = scales_of(f, tile);
        for (int p = 0; p < panels_of(f); p++, at++)
            unpack_panel(f, tile, &scales, p, to->codes[at], to->affines[at]);
    }
}

#define UNPACK_TILES(kind) case kind: unpack_tiles(kind, tiles, panels, to); break

static void unpack_chunk(int kind, const uint8_t *tiles, int panels, Chunk *to) {
    switch (kind) {
    UNPACK_TILES(Q4_0); UNPACK_TILES(Q4_1); UNPACK_TILES(Q5_0); UNPACK_TILES(Q5_1); UNPACK_TILES(Q8_0);
    UNPACK_TILES(IQ4_NL); UNPACK_TILES(Q2_K); UNPACK_TILES(Q3_K); UNPACK_TILES(Q4_K); UNPACK_TILES(Q5_K);
    UNPACK_TILES(Q6_K); UNPACK_TILES(IQ4_XS);
    }
}

/* y[R, OUTPUTS] += a chunk times R rows, whose blocks are *stride* apart. */
INLINE void add_rows(const int R, const Meaning f, const Chunk *w, int panels, const Quants *q, const Sums *sums,
                     int64_t stride, floats *to) {
    floats y[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = to[r];
#pragma GCC unroll 1
    for (int p = 0; p < panels; p++) {
        bytes64 codes[GROUPS];
#pragma GCC unroll 8
        for (int group = 0; group < GROUPS; group++) codes[group] = w->codes[p][group];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            y[r] = add_block(f, codes, w->affines[p], q + r * stride + p, sums + r * stride + p, y[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) to[r] = y[r];
}

#define ADD_ROWS(R)                                                                                         \
    static __attribute__((noinline)) void add_rows_##R(Meaning f, const Chunk *w, int panels,               \
                                                       const Quants *q, const Sums *sums, int64_t stride,   \
                                                       floats *y) {                                         \
        switch (2 * (f.runs - 1) + f.has_minimum) {                                                         \
        case 0: add_rows(R, (Meaning){1, 0, f.offset}, w, panels, q, sums, stride, y); break;               \
        case 1: add_rows(R, (Meaning){1, 1, 0}, w, panels, q, sums, stride, y); break;                      \
        case 2: add_rows(R, (Meaning){2, 0, f.offset}, w, panels, q, sums, stride, y); break;               \
        default: add_rows(R, (Meaning){2, 1, 0}, w, panels, q, sums, stride, y);                            \
        }                                                                                                   \
    }
ADD_ROWS(1) ADD_ROWS(2) ADD_ROWS(4) ADD_ROWS(8)

static void multiply_rows(int kind, const uint8_t *tiles, int K, const Activations *x, int64_t first, int M,
                          floats *y) {
    const Format f = format_of(kind);
    const int64_t blocks = K / BLOCK;
    Chunk chunk;
    for (int b = 0; b < blocks; b += PANELS) {
        const int panels = blocks - b < PANELS ? blocks - b : PANELS;
        unpack_chunk(kind, tiles + b / panels_of(f) * (int64_t)tile_bytes(f), panels, &chunk);
        for (int m = 0, rows; m < M; m += rows) {
            const int64_t at = (first + m) * x->stride + b;
            rows = rows_at_once(M - m);
            switch (rows) {
            case 8: add_rows_8(meaning_of(f), &chunk, panels, x->q + at, x->sums + at, x->stride, y + m); break;
            case 4: add_rows_4(meaning_of(f), &chunk, panels, x->q + at, x->sums + at, x->stride, y + m); break;
            case 2: add_rows_2(meaning_of(f), &chunk, panels, x->q + at, x->sums + at, x->stride, y + m); break;
            default: add_rows_1(meaning_of(f), &chunk, panels, x->q + at, x->sums + at, x->stride, y + m);
            }
        }
    }
}

#include "fp8_linear.c"

/* ---- the whole ---- */

/* y[M, outputs] = rows *first* to first + M of the activations times one column of tiles, of which the
 * first *outputs* are wanted; rows of y are ldy floats apart. */
static void multiply_column(int kind, const uint8_t *tiles, int K, const Activations *x, int64_t first, int M,
                            float *y, int64_t ldy, int outputs) {
    for (int m = 0; m < M; m += SUMS) {
        const int rows = M - m < SUMS ? M - m : SUMS;
        floats sums[SUMS];
        memset(sums, 0, rows * sizeof(floats));
        if (kind == FP8)
            multiply_fp8(tiles, K, x->x + (first + m) * K, rows, sums);
        else if (rows == 1)
            sums[0] = multiply_row(kind, tiles, K, x, first + m);
        else
            multiply_rows(kind, tiles, K, x, first + m, rows, sums);
        for (int r = 0; r < rows; r++) memcpy(y + (m + r) * ldy, &sums[r], outputs * sizeof(float));
    }
}

typedef struct {
    const uint8_t *tiles;
    Activations x;
    float *y;
    int64_t ldy;
    int kind, M, N, K;
} Tiled;

static void tiled_item(void *argument, int64_t item) {
    const Tiled *o = argument;
    const int left = o->N - (int)item * OUTPUTS, outputs = left < OUTPUTS ? left : OUTPUTS;
    multiply_column(o->kind, o->tiles + item * column_bytes(o->kind, o->K), o->K, &o->x, 0, o->M,
                    o->y + item * OUTPUTS, o->ldy, outputs);
}

/* y[M, N] = x[M, K] W^T for tiles of W; rows of y are ldy floats apart. Returns -1 without memory. */
int cortex_tiled_linear(int kind, const uint8_t *tiles, const float *x, float *y, int64_t ldy, int M, int N,
                        int K, int threads) {
    Tiled tiled = {tiles, {}, y, ldy, kind, M, N, K};
    if (activate(kind, x, M, K, threads, &tiled.x)) return -1;
    for_each(threads, (N + OUTPUTS - 1) / OUTPUTS, tiled_item, &tiled);
    return 0;
}
