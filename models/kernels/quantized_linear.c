/* Products with quantised weights, in whole numbers: activations take 16 bits, weights stay packed.
 *
 * A row of activations is cut into blocks of 32, as the weights are. A block x becomes whole numbers
 * q = round(x / s) with s = max |x| / 32512, so that
 *
 *     w . x  =  sum over blocks of  s * (d * sum(code * q) + m * sum(q))
 *
 * where the sums run over whole numbers: they are exact, and the same on every CPU. Blocks are added
 * in order, by fused multiply-adds. So a row's result does not depend on other rows or on threads.
 * Rounding activations to 16 bits costs 1e-5 of a logit's size (int8, as elsewhere, 1e-3).
 *
 * Weights lie in tiles of OUTPUTS rows. The tile of one block of 32 inputs holds
 *
 *     codes     8 groups of 4 inputs; in a group the four codes of output 0, of output 1, ...
 *               4 and 5 bits: two groups share 64 bytes, the even one in the low halves
 *     high      5 bits only: the fifth bits, 8 bytes a group, bit 4 * output + input
 *     d         float16, one an output
 *     m         float16, one an output; Q4_1 and Q5_1 only
 *
 * as many bytes as the OUTPUTS blocks had before; the last tile is padded with zeros.
 */
#define OUTPUTS 16
#define BLOCK 32
#define GROUPS 8 /* of 4 inputs in a block */
#define ROWS 8   /* of activations multiplied at once, each with its sums in a register */

typedef struct {
    int bits, offset, has_minimum;
} Codes;

/* What a stored code means: weight = d * (code - offset) + m. */
INLINE Codes codes_of(int kind) {
    switch (kind) {
    case Q4_0: return (Codes){4, 8, 0};
    case Q4_1: return (Codes){4, 0, 1};
    case Q5_0: return (Codes){5, 16, 0};
    case Q5_1: return (Codes){5, 0, 1};
    default: return (Codes){8, 128, 0}; /* Q8_0 */
    }
}

INLINE int tile_bytes(Codes c) {
    return OUTPUTS * (BLOCK * c.bits / 8 + 2 + 2 * c.has_minimum);
}

/* ---- packing ---- */

/* The 32 codes of one block as it is stored in the file. */
static void codes_of_block(int kind, const uint8_t *block, uint8_t *to) {
    const Codes c = codes_of(kind);
    const uint8_t *at = block + 2 + 2 * c.has_minimum;
    uint32_t high = 0;
    if (c.bits == 8) {
        for (int k = 0; k < BLOCK; k++) to[k] = at[k] ^ 128;
        return;
    }
    if (c.bits == 5) {
        memcpy(&high, at, 4);
        at += 4;
    }
    for (int k = 0; k < BLOCK; k++) {
        to[k] = k < 16 ? at[k] & 15 : at[k - 16] >> 4;
        to[k] |= (high >> k & 1) << 4;
    }
}

/* The 4-bit codes of one block to its places in a tile, eight at a time: most weights are such. The
 * bytes of the file hold inputs 0 to 15 in their low halves, 16 to 31 in their high ones. */
INLINE void pack_halves(const uint8_t *at, uint8_t *tile, int output) {
    for (int eight = 0; eight < BLOCK / 8; eight++) {
        uint64_t codes;
        memcpy(&codes, at + eight % 2 * 8, 8);
        codes = codes >> eight / 2 * 4 & 0x0f0f0f0f0f0f0f0full;
        const uint32_t pairs = (uint32_t)(codes | codes >> 28);
        memcpy(tile + eight * 64 + output * 4, &pairs, 4);
    }
}

/* Those of 5 or 8 bits. */
static void pack_codes(int kind, const uint8_t *block, uint8_t *tile, int output) {
    uint8_t codes[BLOCK], *high = tile + OUTPUTS * BLOCK / 2;
    codes_of_block(kind, block, codes);
    for (int k = 0; k < BLOCK; k++) {
        const int group = k / 4, lane = output * 4 + k % 4;
        if (codes_of(kind).bits == 8) {
            tile[group * 64 + lane] = codes[k];
        } else {
            tile[group / 2 * 64 + lane] |= (codes[k] & 15) << 4 * (group % 2);
            high[group * 8 + lane / 8] |= (codes[k] >> 4) << lane % 8;
        }
    }
}

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int64_t row_bytes;
    int kind, N, blocks;
} Packing;

static void pack_tile(void *argument, int64_t item) {
    const Packing *o = argument;
    const Codes c = codes_of(o->kind);
    const int size = tile_bytes(c), stored = size / OUTPUTS, rows = o->N - (int)item * OUTPUTS;
    uint8_t *tile = o->to + item * o->blocks * size;
    for (int b = 0; b < o->blocks; b++, tile += size) {
        memset(tile, 0, size);
        uint8_t *scales = tile + OUTPUTS * BLOCK * c.bits / 8;
        for (int r = 0; r < OUTPUTS && r < rows; r++) {
            const uint8_t *block = o->from + (item * OUTPUTS + r) * o->row_bytes + (int64_t)b * stored;
            if (c.bits == 4) {
                pack_halves(block + 2 + 2 * c.has_minimum, tile, r);
            } else {
                pack_codes(o->kind, block, tile, r);
            }
            memcpy(scales + 2 * r, block, 2);
            if (c.has_minimum) memcpy(scales + 2 * OUTPUTS + 2 * r, block + 2, 2);
        }
    }
}

/* Tiles of w[N, K], as many bytes as its rows padded to a multiple of OUTPUTS. */
void cortex_pack(int kind, const uint8_t *w, int64_t row_bytes, uint8_t *tiles, int N, int K, int threads) {
    Packing packing = {w, tiles, row_bytes, kind, N, K / BLOCK};
    for_each(threads, (N + OUTPUTS - 1) / OUTPUTS, pack_tile, &packing);
}

/* ---- activations ---- */

/* One block of activations: with VNNI as 32 high bytes and 32 low ones, 256 * high + low; else as
 * they are. */
typedef struct {
    union {
        int16_t whole[BLOCK];
        int8_t half[2][BLOCK];
    };
} Quants;

typedef struct {
    Quants *q;    /* [M, blocks] */
    float *scale; /* [M, blocks] */
    int32_t *sum; /* [M, blocks], of the whole numbers */
} Activations;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define VNNI 1
#else
#define VNNI 0
#endif

static void quantize_block(const float *x, Quants *q, float *scale, int32_t *sum) {
    floats a = load(x), b = load(x + LANES);
    const words magnitude = (words){} + 0x7fffffff;
    words top = (words)a & magnitude, other = (words)b & magnitude;
    const words less = (words)(top < other); /* without their sign, floats are in the order of their bits */
    top = (top & ~less) | (other & less);
    uint32_t most = 0;
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    float peak;
    memcpy(&peak, &most, 4);
    *scale = peak / 32512.f;
    const float by = peak > 1e-30f ? 32512.f / peak : 0.f;
    const floats magic = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to a whole number */
    ints p = (ints)(a * by + magic) - (ints)magic, r = (ints)(b * by + magic) - (ints)magic;
    int32_t total = 0;
    int16_t whole[BLOCK];
    for (int i = 0; i < LANES; i++) {
        whole[i] = (int16_t)p[i];
        whole[i + LANES] = (int16_t)r[i];
    }
    for (int i = 0; i < BLOCK; i++) total += whole[i];
    *sum = total;
    if (VNNI)
        for (int i = 0; i < BLOCK; i++) {
            q->half[0][i] = (int8_t)((whole[i] + 128) >> 8);
            q->half[1][i] = (int8_t)whole[i]; /* its low byte, as a signed one */
        }
    else
        memcpy(q->whole, whole, sizeof whole);
}

typedef struct {
    const float *x;
    Activations to;
    int blocks;
} Quantizing;

static void quantize_row(void *argument, int64_t m) {
    const Quantizing *o = argument;
    for (int b = 0; b < o->blocks; b++) {
        const int64_t at = m * o->blocks + b;
        quantize_block(o->x + at * BLOCK, o->to.q + at, o->to.scale + at, o->to.sum + at);
    }
}

/* ---- the product ---- */

typedef uint8_t bytes64 __attribute__((vector_size(64)));
typedef int16_t shorts32 __attribute__((vector_size(64)));

/* The codes of one tile of a block, a byte each: [GROUPS][OUTPUTS * 4]. */
INLINE void unpack_codes(const Codes c, const uint8_t *tile, bytes64 *codes) {
#pragma GCC unroll 8
    for (int group = 0; group < GROUPS; group++) {
        if (c.bits == 8) {
            memcpy(&codes[group], tile + group * 64, 64);
            continue;
        }
        if (group % 2 == 0) {
            bytes64 both;
            memcpy(&both, tile + group / 2 * 64, 64);
            codes[group] = both & 15;
            codes[group + 1] = (bytes64)((shorts32)both >> 4) & 15;
        }
        if (c.bits == 5) {
            uint64_t high;
            memcpy(&high, tile + OUTPUTS * BLOCK / 2 + group * 8, 8);
#if VNNI
            codes[group] |= (bytes64)_mm512_maskz_set1_epi8(high, 16);
#else
            for (int i = 0; i < 64; i++) codes[group][i] |= (high >> i & 1) << 4;
#endif
        }
    }
}

/* sum(code * q) of one block for OUTPUTS outputs. */
INLINE ints dot(const bytes64 *codes, const Quants *q) {
#if VNNI
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int group = 0; group < GROUPS; group++) {
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
    for (int group = 0; group < GROUPS; group++) {
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
    for (int group = 0; group < GROUPS; group++)
        for (int i = 0; i < 4; i++)
            for (int r = 0; r < OUTPUTS; r++)
                sum[r] += (int)codes[group][4 * r + i] * q->whole[4 * group + i];
    return sum;
#endif
}

INLINE floats halves_at(const uint8_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return from_half(h);
}

/* y[R, OUTPUTS] = R rows of activations times one column of tiles. */
INLINE void multiply_tiles(const int R, const int kind, const uint8_t *tile, int blocks, const Activations *x,
                           int64_t first, floats *to) {
    const Codes c = codes_of(kind);
    const int size = tile_bytes(c);
    floats y[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = (floats){};
    for (int b = 0; b < blocks; b++, tile += size) {
        bytes64 codes[GROUPS];
        unpack_codes(c, tile, codes);
        const uint8_t *scales = tile + OUTPUTS * BLOCK * c.bits / 8;
        const floats d = halves_at(scales);
        floats m = {};
        if (c.has_minimum) m = halves_at(scales + 2 * OUTPUTS);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int64_t at = (first + r) * blocks + b;
            const ints sum = dot(codes, x->q + at) - c.offset * x->sum[at];
            const float s = x->scale[at];
            y[r] = madd(__builtin_convertvector(sum, floats), d * s, y[r]);
            if (c.has_minimum) y[r] = madd(m, splat(s * (float)x->sum[at]), y[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) to[r] = y[r];
}

#define MULTIPLY(R)                                                                                         \
    static __attribute__((noinline)) void multiply_##R(int kind, const uint8_t *tile, int blocks,           \
                                                       const Activations *x, int64_t first, floats *y) {    \
        switch (kind) {                                                                                     \
        case Q4_0: multiply_tiles(R, Q4_0, tile, blocks, x, first, y); break;                               \
        case Q4_1: multiply_tiles(R, Q4_1, tile, blocks, x, first, y); break;                               \
        case Q5_0: multiply_tiles(R, Q5_0, tile, blocks, x, first, y); break;                               \
        case Q5_1: multiply_tiles(R, Q5_1, tile, blocks, x, first, y); break;                               \
        default: multiply_tiles(R, Q8_0, tile, blocks, x, first, y);                                        \
        }                                                                                                   \
    }
MULTIPLY(1) MULTIPLY(2) MULTIPLY(4) MULTIPLY(8)

typedef struct {
    const uint8_t *tiles;
    Activations x;
    float *y;
    int64_t ldy;
    int kind, M, N, blocks;
} Tiled;

static void tiled_item(void *argument, int64_t item) {
    const Tiled *o = argument;
    const uint8_t *tile = o->tiles + item * o->blocks * tile_bytes(codes_of(o->kind));
    const int left = o->N - (int)item * OUTPUTS, outputs = left < OUTPUTS ? left : OUTPUTS;
    for (int m = 0, rows; m < o->M; m += rows) {
        floats y[ROWS];
        const int rest = o->M - m;
        rows = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        switch (rows) {
        case 8: multiply_8(o->kind, tile, o->blocks, &o->x, m, y); break;
        case 4: multiply_4(o->kind, tile, o->blocks, &o->x, m, y); break;
        case 2: multiply_2(o->kind, tile, o->blocks, &o->x, m, y); break;
        default: multiply_1(o->kind, tile, o->blocks, &o->x, m, y);
        }
        for (int r = 0; r < rows; r++)
            memcpy(o->y + (m + r) * o->ldy + item * OUTPUTS, &y[r], outputs * sizeof(float));
    }
}

/* y[M, N] = x[M, K] W^T for tiles of W; rows of y are ldy floats apart. Returns -1 without memory. */
int cortex_tiled_linear(int kind, const uint8_t *tiles, const float *x, float *y, int64_t ldy, int M, int N,
                        int K, int threads) {
    const int blocks = K / BLOCK;
    const int64_t count = (int64_t)M * blocks;
    char *memory = (char *)scratch(count * (sizeof(Quants) + 8) / sizeof(float));
    if (!memory) return -1;
    const Activations q = {(Quants *)memory, (float *)(memory + count * sizeof(Quants)),
                           (int32_t *)(memory + count * (sizeof(Quants) + 4))};
    Quantizing quantizing = {x, q, blocks};
    for_each(M > 8 ? threads : 1, M, quantize_row, &quantizing);
    Tiled tiled = {tiles, q, y, ldy, kind, M, N, blocks};
    for_each(threads, (N + OUTPUTS - 1) / OUTPUTS, tiled_item, &tiled);
    return 0;
}

/* y[M, K] = rows ids[M] of w[N, K], dequantised from its tiles. Returns -1 if an id is no row. */
int cortex_tiled_rows(int kind, const uint8_t *tiles, const int64_t *ids, float *y, int M, int64_t N, int K) {
    const Codes c = codes_of(kind);
    const int size = tile_bytes(c);
    for (int m = 0; m < M; m++) {
        if (ids[m] < 0 || ids[m] >= N) return -1;
        const int row = ids[m] % OUTPUTS;
        const uint8_t *tile = tiles + ids[m] / OUTPUTS * (K / BLOCK) * size;
        float *to = y + (int64_t)m * K;
        for (int b = 0; b < K / BLOCK; b++, tile += size) {
            const uint8_t *scales = tile + OUTPUTS * BLOCK * c.bits / 8 + 2 * row;
            const float d = half_at(scales), least = c.has_minimum ? half_at(scales + 2 * OUTPUTS) : 0.f;
            for (int k = 0; k < BLOCK; k++) {
                const int group = k / 4, lane = row * 4 + k % 4;
                int code = tile[c.bits == 8 ? group * 64 + lane : group / 2 * 64 + lane];
                if (c.bits != 8) code = code >> 4 * (group % 2) & 15;
                if (c.bits == 5) code |= (tile[OUTPUTS * BLOCK / 2 + group * 8 + lane / 8] >> lane % 8 & 1) << 4;
                to[b * BLOCK + k] = (float)(code - c.offset) * d + least;
            }
        }
    }
    return 0;
}
