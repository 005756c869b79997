/* Products with float8 weights: in float32, unpacked on the way; activations stay as they are.
 *
 * One block of 128 inputs at a time, and of it each half: two sums an output, over the even inputs and
 * over the odd ones. The four are added and multiplied with the block's scale, in the same order for any
 * number of rows.
 */
#define HALF_FP8 (FP8_ELEMENTS / 2)

/* Two inputs of OUTPUTS outputs, 2^-8 as large. */
INLINE void unpack_two(const uint8_t *at, floats *even, floats *odd) {
#if defined(__AVX512BW__)
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at));
    const __m512i both = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xbfff));
    *even = (floats)_mm512_cvtph_ps(_mm512_castsi512_si256(both));
    *odd = (floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
#else
    bytes16 first, second;
    memcpy(&first, at, sizeof first);
    memcpy(&second, at + OUTPUTS, sizeof second);
    *even = from_float8(first);
    *odd = from_float8(second);
#endif
}

INLINE floats scale_of_fp8(const uint8_t *tile) {
    return load((const float *)(tile + FP8_ELEMENTS * OUTPUTS)) * splat(256.f);
}

static floats multiply_fp8_row(const uint8_t *tile, int K, const float *x) {
    floats y = {};
    for (int b = 0; b < K; b += FP8_ELEMENTS, tile += OUTPUTS * FP8_BYTES) {
        floats even[2] = {}, odd[2] = {};
        for (int k = 0; k < HALF_FP8; k += 2)
            for (int half = 0; half < 2; half++) {
                const int at = half * HALF_FP8 + k;
                floats first, second;
                unpack_two(tile + at * OUTPUTS, &first, &second);
                even[half] = madd(first, splat(x[b + at]), even[half]);
                odd[half] = madd(second, splat(x[b + at + 1]), odd[half]);
            }
        y = madd((even[0] + odd[0]) + (even[1] + odd[1]), scale_of_fp8(tile), y);
    }
    return y;
}

/* even + odd of half a tile, which *w* are the unpacked codes of, times R rows K floats apart. */
INLINE void sum_half(const int R, const floats *w, const float *x, int K, floats *to) {
    floats even[ROWS], odd[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) even[r] = odd[r] = (floats){};
    for (int k = 0; k < HALF_FP8; k += 2) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            even[r] = madd(w[k], splat(x[(int64_t)r * K + k]), even[r]);
            odd[r] = madd(w[k + 1], splat(x[(int64_t)r * K + k + 1]), odd[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) to[r] = even[r] + odd[r];
}

/* y[R, OUTPUTS] += R rows times one tile. */
INLINE void add_fp8(const int R, const floats *w, const uint8_t *tile, const float *x, int K, floats *y) {
    floats first[ROWS], second[ROWS];
    sum_half(R, w, x, K, first);
    sum_half(R, w + HALF_FP8, x + HALF_FP8, K, second);
    for (int r = 0; r < R; r++) y[r] = madd(first[r] + second[r], scale_of_fp8(tile), y[r]);
}

static void multiply_fp8_rows(const uint8_t *tile, int K, const float *x, int M, floats *y) {
    floats w[FP8_ELEMENTS];
    for (int b = 0; b < K; b += FP8_ELEMENTS, tile += OUTPUTS * FP8_BYTES) {
        for (int k = 0; k < FP8_ELEMENTS; k += 2) unpack_two(tile + k * OUTPUTS, &w[k], &w[k + 1]);
        for (int m = 0, rows; m < M; m += rows) {
            const float *at = x + (int64_t)m * K + b;
            rows = rows_at_once(M - m);
            switch (rows) {
            case 8: add_fp8(8, w, tile, at, K, y + m); break;
            case 4: add_fp8(4, w, tile, at, K, y + m); break;
            case 2: add_fp8(2, w, tile, at, K, y + m); break;
            default: add_fp8(1, w, tile, at, K, y + m);
            }
        }
    }
}

#define SUMS 64 /* of rows that share what was unpacked */

/* y[M, outputs] = M rows x[M, K] times one column of tiles; rows of y are ldy floats apart. */
static void multiply_fp8(const uint8_t *tiles, int K, const float *x, int M, float *y, int64_t ldy,
                         int outputs) {
    for (int m = 0; m < M; m += SUMS) {
        const int rows = M - m < SUMS ? M - m : SUMS;
        floats sums[SUMS];
        memset(sums, 0, rows * sizeof(floats));
        if (rows == 1)
            sums[0] = multiply_fp8_row(tiles, K, x + (int64_t)m * K);
        else
            multiply_fp8_rows(tiles, K, x + (int64_t)m * K, rows, sums);
        put_sums(sums, rows, y + m * ldy, ldy, outputs);
    }
}
