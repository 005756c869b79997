/* Quantised weights in the order in which products read them: the same bits, in as many bytes.
 *
 * A tile holds one block of each of OUTPUTS rows. First come the codes, 32 inputs at a time (a panel):
 *
 *     low    8 groups of 4 inputs; in a group the four codes of output 0, of output 1, ..., 64 bytes.
 *            Codes of 4 bits: two groups share 64 bytes, of 2 bits: four; the first in the lowest bits
 *     high   what codes have above these; 2 bits as there, 1 bit: 8 bytes a group, bit 4 * output + input
 *
 * and behind all panels the scales, of each for every output:
 *
 *     small numbers   bytes, one a run; or of six bits: their four low ones, the first half of the
 *                     numbers beside the second in a byte, then their two high ones, quarter by quarter
 *     d, then m       float16
 *
 * A tile of FP8 holds 128 inputs, 16 bytes each, and then the scales, float32. The last tile of a
 * matrix is padded with zeros.
 */
#define OUTPUTS 16
#define GROUPS 8 /* of 4 inputs in a panel */

INLINE int panel_bytes(Format f) { return OUTPUTS * BLOCK * (f.low + f.high) / 8; }

INLINE int panels_of(Format f) { return f.elements / BLOCK; }

INLINE int tile_bytes(Format f) { return OUTPUTS * block_bytes(f); }

/* Bytes of the tiles of OUTPUTS rows of K inputs. */
INLINE int64_t column_bytes(int kind, int K) {
    if (kind == FP8) return (int64_t)K / FP8_ELEMENTS * OUTPUTS * FP8_BYTES;
    return (int64_t)K / format_of(kind).elements * tile_bytes(format_of(kind));
}

#define NUMBERS 16 /* small ones, the most that a block has */

/* ---- packing ---- */

/* The 32 codes of one output to their places in a panel of zeros, four at a time. */
INLINE void pack_codes(Format f, const uint8_t *codes, uint8_t *panel, int output) {
    const int shared = 8 / f.low; /* groups that share 64 bytes */
    const uint32_t mask = (f.low == 8 ? 255 : (1 << f.low) - 1) * 0x01010101u;
    uint8_t *high = panel + OUTPUTS * BLOCK * f.low / 8;
    uint32_t four[GROUPS], low[GROUPS] = {}, twos[GROUPS / 4] = {};
    memcpy(four, codes, BLOCK);
    for (int g = 0; g < GROUPS; g++) {
        low[g / shared] |= (four[g] & mask) << f.low * (g % shared);
        const uint32_t above = four[g] >> f.low % 8; /* of 8 bits, none are */
        if (f.high == 2) twos[g / 4] |= (above & 0x03030303) << 2 * (g % 4);
        if (f.high == 1) /* gathers the lowest bits of four bytes */
            high[g * 8 + output / 2] |= ((above & 0x01010101) * 0x01020408 >> 24 & 15) << output % 2 * 4;
    }
    for (int g = 0; g < GROUPS / shared; g++) memcpy(panel + g * 64 + output * 4, &low[g], 4);
    for (int g = 0; f.high == 2 && g < 2; g++) memcpy(high + g * 64 + output * 4, &twos[g], 4);
}

/* The same for a block of 32 with codes of 4 bits or 5, as it is stored: bytes hold inputs 0 to 15 in
 * their low halves, 16 to 31 in their high ones, and the fifth bits are in a row before them. */
INLINE void pack_nibbles(Format f, const uint8_t *at, uint8_t *panel, int output) {
    if (f.high) {
        uint8_t *high = panel + OUTPUTS * BLOCK / 2;
        uint32_t bits;
        memcpy(&bits, at, 4);
        at += 4;
        for (int g = 0; g < GROUPS; g++) high[g * 8 + output / 2] |= (bits >> 4 * g & 15) << output % 2 * 4;
    }
    for (int eight = 0; eight < BLOCK / 8; eight++) {
        uint64_t codes;
        memcpy(&codes, at + eight % 2 * 8, 8);
        codes = codes >> eight / 2 * 4 & 0x0f0f0f0f0f0f0f0full;
        const uint32_t pairs = (uint32_t)(codes | codes >> 28);
        memcpy(panel + eight * 64 + output * 4, &pairs, 4);
    }
}

INLINE void pack_scales(int kind, const uint8_t *block, uint8_t *scales, int output) {
    const Format f = format_of(kind);
    const int count = numbers_of(f), half = count / 2, quarter = count / 4;
    uint8_t numbers[NUMBERS], *at = scales + output;
    for (int i = 0; i < count; i++) numbers[i] = (uint8_t)number_of_block(kind, block, i);
    for (int i = 0; f.scales != SIX_BITS && i < count; i++) at[i * OUTPUTS] = numbers[i];
    for (int i = 0; f.scales == SIX_BITS && i < half; i++)
        at[i * OUTPUTS] = (numbers[i] & 15) | numbers[half + i] << 4;
    for (int i = 0; f.scales == SIX_BITS && i < quarter; i++)
        at[(half + i) * OUTPUTS] = numbers[i] >> 4 | numbers[quarter + i] >> 4 << 2 |
                                   numbers[half + i] >> 4 << 4 | numbers[half + quarter + i] >> 4 << 6;
    uint8_t *d = scales + OUTPUTS * (scale_bytes(f) - 2 - 2 * f.has_minimum) + 2 * output;
    memcpy(d, block + f.d, 2);
    if (f.has_minimum) memcpy(d + 2 * OUTPUTS, block + f.d + 2, 2);
}

INLINE void pack_block(int kind, const uint8_t *block, uint8_t *tile, int output) {
    const Format f = format_of(kind);
    if (f.low == 4 && f.elements == BLOCK) {
        pack_nibbles(f, block + 2 + 2 * f.has_minimum, tile, output);
    } else {
        uint8_t codes[SUPER];
        codes_of_block(kind, block, codes);
        for (int p = 0; p < panels_of(f); p++)
            pack_codes(f, codes + p * BLOCK, tile + p * panel_bytes(f), output);
    }
    pack_scales(kind, block, tile + panels_of(f) * panel_bytes(f), output);
}

/* The product reads float8 that are no number as if they were 480; so the scale of their block becomes
 * no number here, and with it what comes of the block. */
static void pack_fp8(const uint8_t *block, uint8_t *tile, int output) {
    int is_nan = 0;
    for (int k = 0; k < FP8_ELEMENTS; k++) {
        is_nan |= (block[4 + k] & 127) == 127;
        tile[k * OUTPUTS + output] = block[4 + k];
    }
    const float nan = NAN;
    memcpy(tile + FP8_ELEMENTS * OUTPUTS + 4 * output, is_nan ? (const uint8_t *)&nan : block, 4);
}

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int64_t row_bytes;
    int kind, N, K;
} Packing;

#define PACK(kind) case kind: pack_block(kind, block, tile, row); break

static void pack_one(int kind, const uint8_t *block, uint8_t *tile, int row) {
    switch (kind) {
    case FP8: pack_fp8(block, tile, row); break;
    PACK(Q4_0); PACK(Q4_1); PACK(Q5_0); PACK(Q5_1); PACK(Q8_0); PACK(IQ4_NL);
    PACK(Q2_K); PACK(Q3_K); PACK(Q4_K); PACK(Q5_K); PACK(Q6_K); PACK(IQ4_XS);
    }
}

static void pack_column(void *argument, int64_t item) {
    const Packing *o = argument;
    const int elements = o->kind == FP8 ? FP8_ELEMENTS : format_of(o->kind).elements;
    const int64_t bytes = column_bytes(o->kind, o->K), tile = bytes / (o->K / elements);
    uint8_t *to = o->to + item * bytes;
    for (int b = 0; b < o->K / elements; b++, to += tile) {
        memset(to, 0, tile);
        for (int row = 0; row < OUTPUTS && item * OUTPUTS + row < o->N; row++)
            pack_one(o->kind, o->from + (item * OUTPUTS + row) * o->row_bytes + b * (tile / OUTPUTS), to, row);
    }
}

/* Tiles of w[N, K], as many bytes as its rows padded to a multiple of OUTPUTS. */
void cortex_pack(int kind, const uint8_t *w, int64_t row_bytes, uint8_t *tiles, int N, int K, int threads) {
    Packing packing = {w, tiles, row_bytes, kind, N, K};
    for_each(threads, (N + OUTPUTS - 1) / OUTPUTS, pack_column, &packing);
}

/* ---- reading ---- */

typedef uint8_t bytes64 __attribute__((vector_size(64)));
typedef int16_t shorts32 __attribute__((vector_size(64)));
typedef uint16_t pairs8 __attribute__((vector_size(16)));

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define VNNI 1
#else
#define VNNI 0
#endif

INLINE bytes64 load64(const uint8_t *p) {
    bytes64 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE bytes64 on_curve(bytes64 codes) {
#if VNNI
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)curve));
    return (bytes64)_mm512_shuffle_epi8(table, (__m512i)codes);
#elif defined(__SSSE3__)
    union { bytes64 all; __m128i part[4]; } at = {codes};
    for (int i = 0; i < 4; i++) at.part[i] = _mm_shuffle_epi8(_mm_load_si128((const __m128i *)curve), at.part[i]);
    return at.all;
#elif defined(__aarch64__)
    union { bytes64 all; uint8x16_t part[4]; } at = {codes};
    for (int i = 0; i < 4; i++) at.part[i] = vqtbl1q_u8(vld1q_u8(curve), at.part[i]);
    return at.all;
#else
    for (int i = 0; i < 64; i++) codes[i] = curve[codes[i]];
    return codes;
#endif
}

/* The codes of one panel, a byte each: [GROUPS][OUTPUTS * 4]. */
INLINE void unpack_codes(const Format f, const uint8_t *panel, bytes64 *codes) {
    const uint8_t *high = panel + OUTPUTS * BLOCK * f.low / 8;
    const int shared = 8 / f.low;
#pragma GCC unroll 8
    for (int group = 0; group < GROUPS; group++) {
        const shorts32 low = (shorts32)load64(panel + group / shared * 64);
        codes[group] = (bytes64)(low >> f.low * (group % shared));
        if (f.low < 8) codes[group] &= (uint8_t)((1 << f.low) - 1);
        if (f.is_curved) codes[group] = on_curve(codes[group]);
        if (f.high == 2) {
            const shorts32 above = (shorts32)load64(high + group / 4 * 64);
            const int right = 2 * (group % 4) - f.low;
            codes[group] |= (bytes64)(right < 0 ? above << -right : above >> right) & (uint8_t)(3 << f.low);
        }
        if (f.high == 1) {
            uint64_t bits;
            memcpy(&bits, high + group * 8, 8);
#if VNNI
            codes[group] |= (bytes64)_mm512_maskz_set1_epi8(bits, 1 << f.low);
#else
            for (int i = 0; i < 64; i++) codes[group][i] |= (bits >> i & 1) << f.low;
#endif
        }
    }
}

typedef struct {
    floats d, m;
    bytes16 numbers[NUMBERS]; /* of each output */
} Scales;

/* All scales of a tile. */
INLINE Scales scales_of(const Format f, const uint8_t *tile) {
    const uint8_t *at = tile + panels_of(f) * panel_bytes(f), *d = at + OUTPUTS * (scale_bytes(f) - 2);
    const int count = numbers_of(f);
    Scales scales;
    if (f.has_minimum) scales.m = halves_at(d), d -= 2 * OUTPUTS;
    scales.d = halves_at(d);
    if (f.scales != SIX_BITS) {
        memcpy(scales.numbers, at, count * OUTPUTS);
        return scales;
    }
    const int quarter = count / 4 * OUTPUTS;
    const uint8_t *low = at, *high = at + 2 * quarter;
    uint8_t *to = (uint8_t *)scales.numbers;
    for (int i = 0; i < quarter; i++) {
        to[i] = (low[i] & 15) | (high[i] << 4 & 48);
        to[quarter + i] = (low[quarter + i] & 15) | (high[i] << 2 & 48);
        to[2 * quarter + i] = low[i] >> 4 | (high[i] & 48);
        to[3 * quarter + i] = low[quarter + i] >> 4 | (high[i] >> 2 & 48);
    }
    return scales;
}

typedef struct {
    floats scale, minimum;
} Affines;

/* Scale and minimum of each output for a run. */
INLINE Affines affines_of(const Format f, const Scales *scales, int run) {
    if (f.scales == HALVES_ONLY) return (Affines){scales->d, f.has_minimum ? scales->m : (floats){}};
    const int place = f.scales == SIX_BITS && f.has_minimum ? 2 * run : run;
    bytes16 number = scales->numbers[place], least = {};
    if (f.scales == SIX_BITS) least = scales->numbers[place + f.has_minimum];
    if (f.scales == NIBBLES) least = (bytes16)((pairs8)number >> 4) & 15, number &= 15;
    if (f.scales == BYTES) number ^= 128; /* they are signed */
    const float offset = f.scales == BYTES ? 128.f : f.scales == SIX_BITS && !f.has_minimum ? 32.f : 0.f;
    const floats scale = scales->d * (from_bytes(number) - offset);
    return (Affines){scale, f.has_minimum ? -(scales->m * from_bytes(least)) : (floats){}};
}

/* Codes and affines of one panel of a tile. */
INLINE void unpack_panel(const Format f, const uint8_t *tile, const Scales *scales, int panel, bytes64 *codes,
                         Affines *affines) {
    unpack_codes(f, tile + panel * panel_bytes(f), codes);
    for (int run = 0; run < BLOCK / f.run; run++)
        affines[run] = affines_of(f, scales, panel * (BLOCK / f.run) + run);
}

/* ---- rows ---- */

/* Four codes of one output. */
INLINE uint32_t codes_at(const Format f, const uint8_t *panel, int group, int output) {
    const uint8_t *high = panel + OUTPUTS * BLOCK * f.low / 8;
    const int shared = 8 / f.low;
    uint32_t codes, above;
    memcpy(&codes, panel + group / shared * 64 + output * 4, 4);
    if (f.low < 8) codes = codes >> f.low * (group % shared) & ((1 << f.low) - 1) * 0x01010101u;
    if (f.high == 2) {
        memcpy(&above, high + group / 4 * 64 + output * 4, 4);
        codes |= (above >> 2 * (group % 4) & 0x03030303) << f.low;
    }
    if (f.high == 1) { /* spreads four bits over four bytes */
        above = high[group * 8 + output / 2] >> output % 2 * 4 & 15;
        codes |= (above * 0x00204081 & 0x01010101) << f.low;
    }
    return codes;
}

INLINE void unpack_row(int kind, const uint8_t *tile, int output, float *to, int K) {
    const Format f = format_of(kind);
    for (int k = 0; k < K; tile += tile_bytes(f)) {
        const Scales scales = scales_of(f, tile);
        for (int run = 0; run < f.elements / f.run; run++) {
            const Affines affines = affines_of(f, &scales, run);
            const float scale = affines.scale[output], minimum = affines.minimum[output];
            const uint8_t *panel = tile + run * f.run / BLOCK * panel_bytes(f);
            for (int i = 0; i < f.run; i += 4) {
                const uint32_t codes = codes_at(f, panel, (run * f.run + i) % BLOCK / 4, output);
                for (int j = 0; j < 4; j++, k++) {
                    const uint8_t code = codes >> 8 * j;
                    to[k] = (float)((f.is_curved ? curve[code] : code) - f.offset) * scale;
                    if (f.has_minimum) to[k] += minimum;
                }
            }
        }
    }
}

static void unpack_fp8_row(const uint8_t *tile, int output, float *to, int K) {
    for (int k = 0; k < K; k += FP8_ELEMENTS, tile += OUTPUTS * FP8_BYTES) {
        float scale;
        memcpy(&scale, tile + FP8_ELEMENTS * OUTPUTS + 4 * output, 4);
        for (int i = 0; i < FP8_ELEMENTS; i += LANES) {
            bytes16 b;
            for (int j = 0; j < LANES; j++) b[j] = tile[(i + j) * OUTPUTS + output];
            store(to + k + i, from_float8(b) * splat(256.f) * scale);
        }
    }
}

#define UNPACK_ROW(kind) case kind: unpack_row(kind, tile, output, to, K); break

static void unpack_tiled(int kind, const uint8_t *tile, int output, float *to, int K) {
    switch (kind) {
    case FP8: unpack_fp8_row(tile, output, to, K); break;
    UNPACK_ROW(Q4_0); UNPACK_ROW(Q4_1); UNPACK_ROW(Q5_0); UNPACK_ROW(Q5_1); UNPACK_ROW(Q8_0);
    UNPACK_ROW(IQ4_NL); UNPACK_ROW(Q2_K); UNPACK_ROW(Q3_K); UNPACK_ROW(Q4_K); UNPACK_ROW(Q5_K);
    UNPACK_ROW(Q6_K); UNPACK_ROW(IQ4_XS);
    }
}

/* y[M, K] = rows ids[M] of w[N, K], dequantised from its tiles. Returns -1 if an id is no row. */
int cortex_tiled_rows(int kind, const uint8_t *tiles, const int64_t *ids, float *y, int M, int64_t N, int K) {
    for (int m = 0; m < M; m++) {
        if (ids[m] < 0 || ids[m] >= N) return -1;
        const uint8_t *column = tiles + ids[m] / OUTPUTS * column_bytes(kind, K);
        unpack_tiled(kind, column, ids[m] % OUTPUTS, y + (int64_t)m * K, K);
    }
    return 0;
}
