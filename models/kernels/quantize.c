/* Floats to stored blocks, a row at a time; the same bits as quantize.py, whose functions say why. */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The nearest float16, even of two; infinite from 65520 on. */
INLINE void put_half(float x, uint8_t *to) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffff;
    uint32_t half = 0x7c00;
    if (magnitude < bits_of(0x1p-14f))
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* the sum is rounded to 2^-24 */
    else if (magnitude < bits_of(65536.f))
        half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    half |= bits_of(x) >> 16 & 0x8000;
    memcpy(to, &half, 2);
}

/* The nearest float8 (e4m3fn) of a number up to 448, even of two. */
INLINE uint8_t float8_of(float x) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffff;
    const uint32_t small = bits_of(float_of(magnitude) + 16384.f) - bits_of(16384.f); /* rounded to 2^-9 */
    const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
    const uint32_t code = magnitude < bits_of(0x1p-6f) ? small : normal < 126 ? normal : 126;
    return (uint8_t)(code | (bits_of(x) >> 24 & 128));
}

INLINE float inverse_of(float scale) {
    const float inverse = 1.f / scale;
    return (bits_of(inverse) & 0x7fffffff) < 0x7f800000 ? inverse : 0.f;
}

INLINE float largest(const float *x, int count) {
    uint32_t most = 0;
    for (int k = 0; k < count; k++) {
        const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff; /* in the order of the numbers */
        most = magnitude > most ? magnitude : most;
    }
    return float_of(most);
}

/* The first of the numbers farthest from zero, with its sign. */
INLINE float farthest(const float *x) {
    const float most = largest(x, BLOCK);
    int k = 0;
    while (k < BLOCK - 1 && fabsf(x[k]) != most) k++;
    return x[k];
}

/* Codes of 4 bits or 5: (x - least) * inverse + shift, cut to what they hold. */
INLINE void put_codes(const float *x, float least, float inverse, float shift, int bits, uint8_t *to) {
    const float top = (float)((1 << bits) - 1);
    uint8_t codes[BLOCK];
    for (int k = 0; k < BLOCK; k++) {
        float code = (x[k] - least) * inverse + shift;
        code = code > 0.f ? code : 0.f;
        codes[k] = (uint8_t)(int)(code < top ? code : top);
    }
    if (bits == 5) {
        uint32_t high = 0;
        for (int k = 0; k < BLOCK; k++) high |= (uint32_t)(codes[k] >> 4) << k;
        memcpy(to, &high, 4);
        to += 4;
    }
    for (int k = 0; k < BLOCK / 2; k++) to[k] = (codes[k] & 15) | codes[k + BLOCK / 2] << 4;
}

INLINE void quantize_symmetric(const float *x, int bits, uint8_t *to) {
    const int steps = 1 << (bits - 1);
    const float scale = farthest(x) / (float)-steps;
    put_half(scale, to);
    put_codes(x, 0.f, inverse_of(scale), (float)steps + 0.5f, bits, to + 2);
}

INLINE void quantize_range(const float *x, int bits, uint8_t *to) {
    float least = x[0], most = x[0];
    for (int k = 1; k < BLOCK; k++) {
        least = x[k] < least ? x[k] : least;
        most = x[k] > most ? x[k] : most;
    }
    least += 0.f; /* no negative zero */
    const float scale = (most + 0.f - least) / (float)((1 << bits) - 1);
    put_half(scale, to);
    put_half(least, to + 2);
    put_codes(x, least, inverse_of(scale), 0.5f, bits, to + 4);
}

static void quantize_bytes(const float *x, uint8_t *to) {
    const float scale = largest(x, BLOCK) / 127.f, inverse = inverse_of(scale);
    put_half(scale, to);
    for (int k = 0; k < BLOCK; k++) {
        const float scaled = x[k] * inverse, size = fabsf(scaled);
        const int whole = (int)size, up = size - (float)whole >= 0.5f;
        to[2 + k] = (uint8_t)(scaled < 0.f ? -(whole + up) : whole + up);
    }
}

static void quantize_fp8(const float *x, uint8_t *to) {
    const float scale = largest(x, FP8_ELEMENTS) / 448.f, inverse = inverse_of(scale);
    memcpy(to, &scale, 4);
    for (int k = 0; k < FP8_ELEMENTS; k++) to[4 + k] = float8_of(x[k] * inverse);
}

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int64_t from_bytes, to_bytes; /* of a row */
    int from_kind, kind, K;
    _Atomic int failed;
} QuantizingWeights;

static void quantize_weights_row(void *argument, int64_t m) {
    QuantizingWeights *o = argument;
    float *row = scratch(o->K);
    uint8_t *to = o->to + m * o->to_bytes;
    if (!row) {
        o->failed = 1;
        return;
    }
    unpack(o->from_kind, o->from + m * o->from_bytes, row, o->K);
    const int elements = o->kind == FP8 ? FP8_ELEMENTS : BLOCK;
    const int64_t bytes = o->to_bytes / (o->K / elements);
    for (const float *x = row; x < row + o->K; x += elements, to += bytes) switch (o->kind) {
        case Q4_0: quantize_symmetric(x, 4, to); break;
        case Q5_0: quantize_symmetric(x, 5, to); break;
        case Q4_1: quantize_range(x, 4, to); break;
        case Q5_1: quantize_range(x, 5, to); break;
        case FP8: quantize_fp8(x, to); break;
        default: quantize_bytes(x, to);
        }
}

/* to[M] rows of *kind* from rows of K floats of *from_kind*, which lie together as the others do.
 * Returns -1 without memory. */
int cortex_quantize(int from_kind, const uint8_t *from, int kind, uint8_t *to, int64_t to_bytes, int M, int K,
                    int threads) {
    const int64_t from_bytes = (int64_t)K * (from_kind == F32 ? 4 : 2);
    QuantizingWeights weights = {from, to, from_bytes, to_bytes, from_kind, kind, K, 0};
    for_each(threads, M, quantize_weights_row, &weights);
    return weights.failed ? -1 : 0;
}
