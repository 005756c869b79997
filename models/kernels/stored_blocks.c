/* What the bytes of stored weights mean; quantization.py draws the blocks, blocks.py is the reference.
 *
 * A code stands for  weight = scale * (code - offset) + minimum  where every run of 16 or 32 elements
 * has its scale and, in some types, its minimum. A block of 32 has one of each, float16. In a block of
 * 256 they are small whole numbers times the block's d and m. In the two curved types the code is a
 * place on a curve first, and the curve says how much.
 */

enum { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS, FP8 };

/* Bytes fetched ahead of what is unpacked: a matrix that is in no cache then unpacks 2.4 times faster
 * (Q4_1, one core of a Sapphire Rapids guest, November 2026). */
#define AHEAD 2048

#define BLOCK 32           /* inputs that activations share a scale for */
#define SUPER 256          /* elements of the largest block */
#define FP8_ELEMENTS 128   /* of an FP8 block, */
#define FP8_BYTES 132      /* which begins with its scale in float32 */

enum { HALVES_ONLY, NIBBLES, SIX_BITS, BYTES }; /* how the scales of runs are stored */

typedef struct {
    int elements;    /* of a block */
    int low, high;   /* bits of a code: 8, 4 or 2 low ones, and 0, 1 or 2 above them */
    int run;         /* elements that share a scale */
    int scales;      /* how it is stored */
    int has_minimum;
    int offset;      /* of a code, or of its place on the curve */
    int is_curved;
    int d;           /* where in the block d is, and m behind it */
} Format;

INLINE Format format_of(int kind) {
    switch (kind) {
    case Q4_0: return (Format){32, 4, 0, 32, HALVES_ONLY, 0, 8, 0, 0};
    case Q4_1: return (Format){32, 4, 0, 32, HALVES_ONLY, 1, 0, 0, 0};
    case Q5_0: return (Format){32, 4, 1, 32, HALVES_ONLY, 0, 16, 0, 0};
    case Q5_1: return (Format){32, 4, 1, 32, HALVES_ONLY, 1, 0, 0, 0};
    case IQ4_NL: return (Format){32, 4, 0, 32, HALVES_ONLY, 0, 128, 1, 0};
    case Q2_K: return (Format){256, 2, 0, 16, NIBBLES, 1, 0, 0, 80};
    case Q3_K: return (Format){256, 2, 1, 16, SIX_BITS, 0, 4, 0, 108};
    case Q4_K: return (Format){256, 4, 0, 32, SIX_BITS, 1, 0, 0, 0};
    case Q5_K: return (Format){256, 4, 1, 32, SIX_BITS, 1, 0, 0, 0};
    case Q6_K: return (Format){256, 4, 2, 16, BYTES, 0, 32, 0, 208};
    case IQ4_XS: return (Format){256, 4, 0, 32, SIX_BITS, 0, 128, 1, 0};
    default: return (Format){32, 8, 0, 32, HALVES_ONLY, 0, 128, 0, 0}; /* Q8_0 */
    }
}

/* Small numbers of a block's scales and minima: bytes, or of six bits. */
INLINE int numbers_of(Format f) {
    return f.scales == HALVES_ONLY ? 0 : f.elements / f.run * (f.scales == SIX_BITS ? 1 + f.has_minimum : 1);
}

INLINE int scale_bytes(Format f) {
    const int numbers = numbers_of(f);
    return (f.scales == SIX_BITS ? numbers * 6 / 8 : numbers) + 2 + 2 * f.has_minimum;
}

INLINE int block_bytes(Format f) { return f.elements * (f.low + f.high) / 8 + scale_bytes(f); }

/* What the codes of IQ4_NL and IQ4_XS stand for, and 128. */
static const uint8_t curve[16] __attribute__((aligned(16))) = {1,   24,  45,  63,  79,  93,  106, 118,
                                                               129, 141, 153, 166, 181, 197, 217, 241};

/* ---- numbers of two bytes ---- */

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

INLINE floats halves_at(const uint8_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return from_half(h);
}

INLINE float half_at(const uint8_t *p) {
    halves h = {};
    memcpy(&h, p, 2);
    return from_half(h)[0];
}

INLINE floats from_brain(halves h) {
    return (floats)(__builtin_convertvector(h, words) << 16);
}

/* GCC 12 widens bytes in memory one by one, so it is told how. */
INLINE floats from_bytes(bytes16 b) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)b));
#else
    return __builtin_convertvector(__builtin_convertvector(b, ints), floats);
#endif
}

/* Sixteen float8 as floats 2^-8 as large, exactly: but for its bias a float8 is the upper half of a
 * float16. The two that are no number become 480: see pack_fp8 and unpack_fp8. */
INLINE floats from_float8(bytes16 b) {
    const halves wide = __builtin_convertvector(b, halves);
    return from_half((wide & 127) << 7 | (wide & 128) << 8);
}

/* ---- codes ---- */

/* Fields of *bits* out of runs of bytes: the lowest fields of all bytes of a run are the first. */
INLINE void fields(const uint8_t *from, int bytes, int bits, int run, int shift, uint8_t *to) {
    for (int first = 0; first < bytes; first += run)
        for (int place = 0; place < 8; place += bits, to += run)
            for (int i = 0; i < run; i++)
                to[i] = (shift ? to[i] : 0) | (from[first + i] >> place & ((1 << bits) - 1)) << shift;
}

/* 16 for each of sixteen elements whose bit is set in two bytes, lowest bit first. */
INLINE bytes16 fifth_bits(const uint8_t *p) {
#if defined(__AVX512VL__) && defined(__AVX512BW__)
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return (bytes16)_mm_maskz_set1_epi8(bits, 16);
#else
    const bytes16 place = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8_t a = p[0], b = p[1];
    const bytes16 spread = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
    return (bytes16)((spread & place) == place) & 16;
#endif
}

/* The codes of one block, in order. */
INLINE void codes_of_block(int kind, const uint8_t *block, uint8_t *to) {
    const Format f = format_of(kind);
    const uint8_t *at = block + 2 + 2 * f.has_minimum; /* of a block of 32 */
    switch (kind) {
    case Q2_K: fields(block + 16, 64, 2, 32, 0, to); break;
    case Q3_K: fields(block + 32, 64, 2, 32, 0, to), fields(block, 32, 1, 32, 2, to); break;
    case Q4_K: fields(block + 16, 128, 4, 32, 0, to); break;
    case Q5_K: fields(block + 48, 128, 4, 32, 0, to), fields(block + 16, 32, 1, 32, 4, to); break;
    case Q6_K: fields(block, 128, 4, 64, 0, to), fields(block + 128, 64, 2, 32, 4, to); break;
    case IQ4_XS: fields(block + 8, 128, 4, 16, 0, to); break;
    case Q8_0:
        for (int k = 0; k < BLOCK; k++) to[k] = at[k] ^ 128;
        break;
    default:
        fields(at + (f.high ? 4 : 0), 16, 4, 16, 0, to);
        for (int half = 0; f.high && half < 2; half++) {
            bytes16 codes;
            memcpy(&codes, to + 16 * half, 16);
            codes |= fifth_bits(at + 2 * half);
            memcpy(to + 16 * half, &codes, 16);
        }
    }
}

/* ---- scales ---- */

/* The small number *i* of a block. Where there are minima of six bits, they are the odd ones. */
INLINE int number_of_block(int kind, const uint8_t *block, int i) {
    switch (kind) {
    case Q2_K: return block[i];
    case Q3_K: return (block[96 + i % 8] >> i / 8 * 4 & 15) | (block[104 + i % 4] >> i / 4 * 2 & 3) << 4;
    case Q6_K: return (int8_t)block[192 + i];
    case IQ4_XS: return (block[4 + i / 2] >> i % 2 * 4 & 15) | (block[2 + i / 4] >> i % 4 * 2 & 3) << 4;
    default: { /* Q4_K, Q5_K: the last four have two bits in the bytes of the first four */
        const uint8_t *at = block + 4 + i % 2 * 4;
        const int place = i / 2;
        return place < 4 ? at[place] & 63
                         : (block[8 + place] >> i % 2 * 4 & 15) | at[place - 4] >> 6 << 4;
    }
    }
}

typedef struct {
    float scale, minimum;
} Affine;

/* The scale and the minimum of one run of a block. */
INLINE Affine affine_of_run(int kind, const uint8_t *block, int run) {
    const Format f = format_of(kind);
    const float d = half_at(block + f.d), m = f.has_minimum ? half_at(block + f.d + 2) : 0.f;
    const int places = f.scales == SIX_BITS ? 1 + f.has_minimum : 1;
    if (f.scales == HALVES_ONLY) return (Affine){d, m};
    const int number = number_of_block(kind, block, run * places);
    if (f.scales == NIBBLES) return (Affine){d * (float)(number & 15), -(m * (float)(number >> 4))};
    if (f.scales == BYTES) return (Affine){d * (float)number, 0.f};
    if (!f.has_minimum) return (Affine){d * (float)(number - 32), 0.f};
    return (Affine){d * (float)number, -(m * (float)number_of_block(kind, block, run * places + 1))};
}

/* ---- rows to float32 ---- */

INLINE void unpack_blocks(int kind, const uint8_t *from, float *to, int K) {
    const Format f = format_of(kind);
    for (int k = 0; k < K; k += f.elements, from += block_bytes(f)) {
        uint8_t codes[SUPER];
        for (int line = 0; line < block_bytes(f); line += 64) __builtin_prefetch(from + AHEAD + line);
        codes_of_block(kind, from, codes);
        for (int run = 0; run < f.elements / f.run; run++) {
            const Affine affine = affine_of_run(kind, from, run);
            for (int i = run * f.run; i < (run + 1) * f.run; i += LANES) {
                bytes16 b;
                if (f.is_curved)
                    for (int j = 0; j < LANES; j++) b[j] = curve[codes[i + j]];
                else
                    memcpy(&b, codes + i, sizeof b);
                const floats value = (from_bytes(b) - (float)f.offset) * affine.scale;
                store(to + k + i, f.has_minimum ? value + affine.minimum : value);
            }
        }
    }
}

static void unpack_fp8(const uint8_t *from, float *to, int K) {
    for (int k = 0; k < K; k += FP8_ELEMENTS, from += FP8_BYTES) {
        float scale;
        memcpy(&scale, from, 4);
        for (int i = 0; i < FP8_ELEMENTS; i += LANES) {
            bytes16 b;
            memcpy(&b, from + 4 + i, sizeof b);
            __builtin_prefetch(from + 4 + i + AHEAD);
            const words nan = __builtin_convertvector((b & 127) == 127, words) != 0;
            const floats value = from_float8(b) * splat(256.f) * scale;
            store(to + k + i, (floats)((words)value | (nan & 0x7fc00000)));
        }
    }
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

#define UNPACK(kind) case kind: unpack_blocks(kind, from, to, K); break

/* One row of K weights to float32. */
static void unpack(int kind, const uint8_t *from, float *to, int K) {
    switch (kind) {
    case F32: memcpy(to, from, K * sizeof(float)); break;
    case F16: unpack_halves(from, to, K, 0); break;
    case BF16: unpack_halves(from, to, K, 1); break;
    case FP8: unpack_fp8(from, to, K); break;
    UNPACK(Q4_0); UNPACK(Q4_1); UNPACK(Q5_0); UNPACK(Q5_1); UNPACK(Q8_0); UNPACK(IQ4_NL);
    UNPACK(Q2_K); UNPACK(Q3_K); UNPACK(Q4_K); UNPACK(Q5_K); UNPACK(Q6_K); UNPACK(IQ4_XS);
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
