/* Causal attention over a paged cache.
 *
 * A block of the cache has LANES positions. One layer's keys lie as [blocks][kv heads][D][LANES], so
 * that a product with sixteen keys needs no sum across lanes; its values as [blocks][kv heads][LANES][D].
 * Elements are float16, or float32 where that was asked for; what does not fit into float16 becomes its
 * largest number.
 *
 * The softmax of a row goes over spans of SPAN positions, counted from position 0: each yields its
 * largest score, the sum of its weights and of its weighted values, and they are merged in order
 * (online softmax: Milakov and Gimelshein, arXiv:1805.02867). Rows, which are heads of tokens, share
 * the fetching of keys and values, and threads may take a span each (split-K); the order of a row's
 * sums is its own in all cases.
 */
#define SPAN 256
#define SPAN_BLOCKS (SPAN / LANES)
#define MAX_HEAD 256    /* largest head size */
#define MAX_ROWS 16     /* rows that share a span */
#define TOKENS_AT_ONCE 8
#define VALUES_AHEAD 2 /* blocks */
#define SPANS_AT_ONCE 64 /* of each thread, before they are merged: 1 MiB of states */

/* ---- float16 ---- */

INLINE halves to_half(floats v) {
    const floats most = splat(65504.f);
    const ints over = v > most, under = v < -most; /* neither for a NaN, which stays one */
    v = (floats)(((ints)v & ~(over | under)) | ((ints)most & over) | ((ints)-most & under));
#if defined(__AVX512F__)
    return (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    halves h;
    for (int i = 0; i < LANES; i++) {
        uint32_t bits;
        float x = v[i];
        memcpy(&bits, &x, 4);
        const uint32_t sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) h[i] = (uint16_t)(sign | 0x7e00);
        else if (bits < 0x38800000) { /* subnormal: adding 1/2 shifts it into place and rounds */
            memcpy(&x, &bits, 4);
            x += 0.5f;
            memcpy(&bits, &x, 4);
            h[i] = (uint16_t)(sign | (bits - 0x3f000000));
        } else h[i] = (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
    }
    return h;
#endif
}

/* *n* <= LANES elements of the cache from element *at* on, zeros behind them. */
INLINE floats cached(const int HALF, const void *from, int64_t at, int n) {
    if (!HALF) return n == LANES ? load((const float *)from + at) : load_part((const float *)from + at, n);
    halves h = {};
    if (n == LANES) memcpy(&h, (const uint16_t *)from + at, sizeof h);
    else memcpy(&h, (const uint16_t *)from + at, n * sizeof(uint16_t));
    return from_half(h);
}

/* ---- the cache ---- */

typedef struct {
    void *keys, *values;
    int kv_heads, D, is_half;
} Cache;

/* Copy k and v [T, kv heads, D], tokens ldk and ldv floats apart, to their slots. */
void cortex_store(const float *k, const float *v, int64_t ldk, int64_t ldv, const int64_t *slots, void *keys,
                  void *values, int is_half, int T, int kv_heads, int D) {
    for (int t = 0; t < T; t++)
        for (int h = 0; h < kv_heads; h++) {
            const int64_t block = (slots[t] / LANES * kv_heads + h) * D * LANES, at = slots[t] % LANES;
            for (int i = 0; i < D; i += LANES) {
                const int n = D - i < LANES ? D - i : LANES;
                const floats key = load_part(k + t * ldk + h * D + i, n), value = load_part(v + t * ldv + h * D + i, n);
                const int64_t value_at = block + at * D + i;
                if (is_half) {
                    const halves half_key = to_half(key), half_value = to_half(value);
                    for (int j = 0; j < n; j++) ((uint16_t *)keys)[block + (i + j) * LANES + at] = half_key[j];
                    memcpy((uint16_t *)values + value_at, &half_value, n * sizeof(uint16_t));
                } else {
                    for (int j = 0; j < n; j++) ((float *)keys)[block + (i + j) * LANES + at] = key[j];
                    memcpy((float *)values + value_at, &value, n * sizeof(float));
                }
            }
        }
}

/* ---- one span ---- */

/* What a span, or several merged, have come to for one row. */
typedef struct {
    float top, total;
    float sum[MAX_HEAD];
} State;

typedef struct {
    const float *q;
    Cache cache;
    const int32_t *tables, *query_starts;
    const int64_t *positions;
    float *out;
    int table_width, sequences, heads, heads_at_once, tokens_at_once;
    float scale;
    /* Where spans are shared among threads, so many at a time, from the first of them on: */
    int first, spans;
    State *states; /* [tasks, 1 + spans, MAX_ROWS]; before the spans stands what they are merged into */
} Attention;

/* Rows of one sequence and one key-value head: heads [head, head + heads_at_once) of tokens
 * [first, last). */
typedef struct {
    _Alignas(64) float q[MAX_HEAD * MAX_ROWS]; /* [D][count] */
    int visible[MAX_ROWS];                     /* positions that the row sees */
    int count, longest;
    const int32_t *blocks;
    int kv;
} Rows16;

INLINE int64_t block_at(const Attention *o, const Rows16 *rows, int block) {
    return ((int64_t)rows->blocks[block] * o->cache.kv_heads + rows->kv) * o->cache.D * LANES;
}

/* Where in the cache a block of the rows' head is, or the last one that they see, for a prefetch: each
 * is a page of its own, where the CPU does not foresee what comes next. Fetched into the L2 cache, a
 * context that is in no cache is read about twice as fast (two cores, AVX-512, November 2026). */
INLINE const char *ahead(const int HALF, const Attention *o, const Rows16 *rows, const void *from, int block) {
    const int last = (rows->longest - 1) / LANES;
    return (const char *)from + block_at(o, rows, block < last ? block : last) * (HALF ? 2 : 4);
}

#define FETCH(at) __builtin_prefetch(at, 0, 2)

/* Scores of R rows against NB blocks from *block* on; those behind the last are the last again. */
INLINE void score(const int R, const int NB, const int HALF, const Attention *o, const Rows16 *rows, int block,
                  int last, float (*scores)[SPAN], int at) {
    const int64_t step = LANES * (HALF ? 2 : 4);
    const char *next[8];
    int64_t from[8];
    floats sum[MAX_ROWS][8];
#pragma GCC unroll 16
    for (int b = 0; b < NB; b++) {
        from[b] = block_at(o, rows, block + b < last ? block + b : last);
        next[b] = ahead(HALF, o, rows, o->cache.keys, block + NB + b);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) sum[r][b] = (floats){};
    for (int d = 0; d < o->cache.D; d++) {
        const float *q = rows->q + d * R;
        floats key[8];
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            FETCH(next[b] + d * step);
            key[b] = cached(HALF, o->cache.keys, from[b] + d * LANES, LANES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int b = 0; b < NB; b++) sum[r][b] = madd(splat(q[r]), key[b], sum[r][b]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) store(scores[r] + at + b * LANES, sum[r][b] * o->scale);
}

/* Weighted values of R rows: PARTS vectors of the head from element *i* on, or what is left of one. */
INLINE void weigh(const int R, const int PARTS, const int WHOLE, const int HALF, const Attention *o, const Rows16 *rows, int start,
                  int count, float (*weights)[SPAN], int i, State *states) {
    const int D = o->cache.D;
    const int64_t size = HALF ? 2 : 4;
    const char *next = NULL;
    int64_t from = 0;
    floats sum[MAX_ROWS][4];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int j = 0; j < PARTS; j++) sum[r][j] = (floats){};
    for (int p = 0; p < count; p++) {
        if (p % LANES == 0) {
            from = block_at(o, rows, (start + p) / LANES) + i;
            next = ahead(HALF, o, rows, o->cache.values, (start + p) / LANES + VALUES_AHEAD) + i * size;
        }
        floats value[4];
#pragma GCC unroll 16
        for (int j = 0; j < PARTS; j++) {
            FETCH(next + j * LANES * size);
            value[j] = cached(HALF, o->cache.values, from + j * LANES, WHOLE ? LANES : D - i);
        }
        from += D;
        next += D * size;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int j = 0; j < PARTS; j++) sum[r][j] = madd(splat(weights[r][p]), value[j], sum[r][j]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int j = 0; j < PARTS; j++) store(states[r].sum + i + j * LANES, sum[r][j]);
}

/* Hide scores from position *seen* on, and return the largest of the others: a NaN if there is one,
 * -INFINITY if there are none. */
static float mask(float *scores, int blocks, int seen) {
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats top = splat(-INFINITY);
    for (int b = 0; b < blocks; b++) {
        floats v = load(scores + b * LANES);
        if ((b + 1) * LANES > seen) {
            const ints visible = lanes + b * LANES < seen;
            v = (floats)(((ints)v & visible) | ((ints)splat(-INFINITY) & ~visible));
            store(scores + b * LANES, v);
        }
        const ints more = v > top | v != v;
        top = (floats)(((ints)v & more) | ((ints)top & ~more));
    }
    float most = top[0];
    for (int i = 1; i < LANES; i++) most = top[i] > most || top[i] != top[i] ? top[i] : most;
    return most;
}

/* Scores to weights, 1 for that of *top*; return their sum. */
static float weights_of(float *scores, int blocks, float top) {
    floats total = {};
    if (top == -INFINITY) memset(scores, 0, blocks * LANES * sizeof(float));
    else
        for (int b = 0; b < blocks; b++) {
            const floats weight = exp_of_negative(load(scores + b * LANES) - top);
            store(scores + b * LANES, weight);
            total += weight;
        }
    return fold(total);
}

/* One span of R rows into fresh states. */
INLINE void attend(const int R, const int HALF, const Attention *o, const Rows16 *rows, int start, State *states) {
    const int NB = R <= 2 ? 8 : R <= 4 ? 4 : R <= 8 ? 2 : 1, PARTS = R <= 4 ? 4 : R <= 8 ? 2 : 1;
    _Alignas(64) float scores[MAX_ROWS][SPAN];
    const int count = rows->longest - start < SPAN ? rows->longest - start : SPAN;
    const int first = start / LANES, last = (start + count - 1) / LANES;
    for (int b = 0; b <= last - first; b += NB) score(R, NB, HALF, o, rows, first + b, last, scores, b * LANES);
    const int blocks = last - first + 1;
    for (int r = 0; r < R; r++) {
        states[r].top = mask(scores[r], blocks, rows->visible[r] - start);
        states[r].total = weights_of(scores[r], blocks, states[r].top);
    }
    int i = 0;
    for (; i + PARTS * LANES <= o->cache.D; i += PARTS * LANES)
        weigh(R, PARTS, 1, HALF, o, rows, start, count, scores, i, states);
    for (; i + LANES <= o->cache.D; i += LANES) weigh(R, 1, 1, HALF, o, rows, start, count, scores, i, states);
    if (i < o->cache.D) weigh(R, 1, 0, HALF, o, rows, start, count, scores, i, states);
}

typedef void Attend(const Attention *, const Rows16 *, int, State *);
#define ATTEND(R)                                                                                           \
    static __attribute__((noinline)) void attend_half_##R(const Attention *o, const Rows16 *rows, int start, \
                                                          State *states) {                                  \
        attend(R, 1, o, rows, start, states);                                                               \
    }                                                                                                       \
    static __attribute__((noinline)) void attend_float_##R(const Attention *o, const Rows16 *rows, int start, \
                                                           State *states) {                                 \
        attend(R, 0, o, rows, start, states);                                                               \
    }
ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4) ATTEND(5) ATTEND(6) ATTEND(7) ATTEND(8)
ATTEND(9) ATTEND(10) ATTEND(11) ATTEND(12) ATTEND(13) ATTEND(14) ATTEND(15) ATTEND(16)
#define BOTH(R) {attend_float_##R, attend_half_##R}
static Attend *const ATTENDS[MAX_ROWS + 1][2] = {
    {0},     BOTH(1), BOTH(2),  BOTH(3),  BOTH(4),  BOTH(5),  BOTH(6),  BOTH(7),  BOTH(8),
    BOTH(9), BOTH(10), BOTH(11), BOTH(12), BOTH(13), BOTH(14), BOTH(15), BOTH(16),
};

/* The later of two neighbouring spans joins the earlier ones. */
INLINE void merge(State *all, const State *span, int D) {
    if (span->top == -INFINITY) return;
    const float top = span->top > all->top || span->top != span->top ? span->top : all->top;
    const float before = exp_of_negative(splat(all->top - top))[0], now = exp_of_negative(splat(span->top - top))[0];
    for (int i = 0; i < D; i += LANES)
        store(all->sum + i, madd(load(all->sum + i), splat(before), load(span->sum + i) * now));
    all->total = all->total * before + span->total * now;
    all->top = top;
}

static void begin(State *all) {
    memset(all, 0, sizeof *all);
    all->top = -INFINITY;
}

static void finish(const State *all, float *out, int D) {
    for (int i = 0; i < D; i++) out[i] = all->sum[i] / all->total;
}

/* ---- all of them ---- */

INLINE int64_t tasks_of(const Attention *o, int s) {
    return (o->query_starts[s + 1] - o->query_starts[s] + o->tokens_at_once - 1) / o->tokens_at_once;
}

/* Find the rows of *task*, and return where their outputs begin; the last tokens, which see most, come
 * first. */
static int64_t rows_of(const Attention *o, int64_t task, Rows16 *rows) {
    const int groups = o->heads / o->heads_at_once, head = task % groups * o->heads_at_once;
    int64_t tile = task / groups;
    int s = o->sequences - 1;
    while (tile >= tasks_of(o, s)) tile -= tasks_of(o, s--);
    const int64_t last = o->query_starts[s + 1] - tile * o->tokens_at_once, start = o->query_starts[s];
    const int64_t first = last - o->tokens_at_once > start ? last - o->tokens_at_once : start;
    rows->longest = (int)o->positions[last - 1] + 1;
    rows->kv = head / (o->heads / o->cache.kv_heads);
    rows->blocks = o->tables + (int64_t)s * o->table_width;
    rows->count = (int)(last - first) * o->heads_at_once;
    for (int r = 0; r < rows->count; r++) {
        const int64_t t = first + r / o->heads_at_once;
        const float *q = o->q + (t * o->heads + head + r % o->heads_at_once) * o->cache.D;
        rows->visible[r] = (int)o->positions[t] + 1;
        for (int d = 0; d < o->cache.D; d++) rows->q[d * rows->count + r] = q[d];
    }
    return (first * o->heads + head) * o->cache.D;
}

/* Row r of a task has its output here, given the first row's. */
INLINE float *out_of(const Attention *o, int64_t at, int r) {
    const int token = r / o->heads_at_once, head = r % o->heads_at_once;
    return o->out + at + ((int64_t)token * o->heads + head) * o->cache.D;
}

/* All spans of a task, one after the other. */
static void attention_task(void *argument, int64_t task) {
    const Attention *o = argument;
    Rows16 rows;
    State all[MAX_ROWS], span[MAX_ROWS];
    const int64_t at = rows_of(o, task, &rows);
    for (int r = 0; r < rows.count; r++) begin(&all[r]);
    for (int start = 0; start < rows.longest; start += SPAN) {
        ATTENDS[rows.count][o->cache.is_half](o, &rows, start, span);
        for (int r = 0; r < rows.count; r++) merge(&all[r], &span[r], o->cache.D);
    }
    for (int r = 0; r < rows.count; r++) finish(&all[r], out_of(o, at, r), o->cache.D);
}

/* Where the states of a task begin. */
INLINE State *states_of(const Attention *o, int64_t task) { return o->states + task * (1 + o->spans) * MAX_ROWS; }

/* One span of a task. */
static void attention_span(void *argument, int64_t item) {
    const Attention *o = argument;
    Rows16 rows;
    rows_of(o, item / o->spans, &rows);
    const int n = item % o->spans, start = (o->first + n) * SPAN;
    if (start < rows.longest)
        ATTENDS[rows.count][o->cache.is_half](o, &rows, start, states_of(o, item / o->spans) + (1 + n) * MAX_ROWS);
}

/* The spans of a task, merged into those before them. */
static void attention_merge(void *argument, int64_t task) {
    const Attention *o = argument;
    Rows16 rows;
    const int64_t at = rows_of(o, task, &rows);
    if (o->first * SPAN >= rows.longest) return;
    for (int r = 0; r < rows.count; r++) {
        State *all = states_of(o, task) + r;
        if (!o->first) begin(all);
        for (int n = 0; n < o->spans && (o->first + n) * SPAN < rows.longest; n++)
            merge(all, all + (1 + n) * MAX_ROWS, o->cache.D);
        if ((o->first + o->spans) * SPAN >= rows.longest) finish(all, out_of(o, at, r), o->cache.D);
    }
}

/* out[T, N, D] = causal attention of q[T, N, D] over one layer's cache; token t of sequence s sees
 * positions[t] + 1 positions of it. Returns -1 without memory. */
int cortex_attention(const float *q, const void *keys, const void *values, int is_half, const int32_t *tables,
                     int table_width, const int32_t *query_starts, int sequences, const int64_t *positions,
                     float *out, int heads, int kv_heads, int D, float scale, int threads) {
    const int group = heads / kv_heads, heads_at_once = group <= MAX_ROWS ? group : 1;
    Attention o = {q, {(void *)keys, (void *)values, kv_heads, D, is_half}, tables, query_starts, positions, out,
                   table_width, sequences, heads, heads_at_once, MAX_ROWS / heads_at_once, scale};
    int64_t tasks = 0, longest = 0;
    for (int s = 0; s < sequences; s++) {
        const int64_t visible = query_starts[s + 1] > query_starts[s] ? positions[query_starts[s + 1] - 1] + 1 : 0;
        tasks += tasks_of(&o, s);
        longest = visible > longest ? visible : longest;
    }
    tasks *= heads / heads_at_once;
    const int spans = (int)((longest + SPAN - 1) / SPAN);
    if (spans < 2 || tasks >= 8 * threads) {
        for_each(threads, tasks, attention_task, &o);
        return 0;
    }
    const int at_once = (int)(SPANS_AT_ONCE * threads / tasks);
    o.spans = spans < at_once ? spans : at_once;
    o.states = (State *)scratch(tasks * (1 + o.spans) * MAX_ROWS * sizeof(State) / sizeof(float));
    if (!o.states) return -1;
    for (; o.first < spans; o.first += o.spans) {
        for_each(threads, tasks * o.spans, attention_span, &o);
        for_each(1, tasks, attention_merge, &o);
    }
    return 0;
}
