/* The operations of a Gated DeltaNet layer; what they compute is in reference_delta.py.
 *
 * A head's state S[key_dim][value_dim] is worked on in tiles of some columns, which are independent
 * of each other, and which stay in the nearest cache for a run of tokens. Tokens follow each other
 * one by one however many a step brings, so the bits of a sequence do not depend on where its steps
 * were cut, and the rule by chunks would gain nothing: beside the projections of a layer, of which
 * it is a hundredth, this reads and writes no memory but the state.
 *
 * One token needs S twice, once to ask and once to write. With a = e^g, and S as it was before,
 *
 *     answers = a S^T k        written = beta (v - answers)
 *     out = a S^T q + (q k) written        S <- a S + k written^T
 */

#define MAX_KERNEL 16  /* tokens that a convolution sees; as in config_values.py */
#define MAX_KEY_DIM 256 /* as in cpu_delta.py */
#define TILE_VECTORS 4 /* columns of a tile */
#define RUN 16         /* tokens for which a tile stays */

/* ---- convolution ---- */

typedef struct {
    const float *x, *weight;
    float *kept, *y;
    const int64_t *slots, *positions;
    const int32_t *starts;
    int64_t ldx;
    int C, kernel, blocks;
} Convolution;

/* Of one sequence some channels: n < LANES or as many as LANES, beginning at c. */
static void convolve(const Convolution *o, int s, int c, int n) {
    const int kept = o->kernel - 1, first = o->starts[s], end = o->starts[s + 1];
    float *before = o->kept + (o->slots[s] * o->C + c) * kept;
    const int is_first = o->positions[first] == 0;
    float weights[MAX_KERNEL][LANES] = {}, past[MAX_KERNEL][LANES] = {};
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= kept; j++) {
            weights[j][i] = o->weight[(int64_t)(c + i) * o->kernel + j];
            if (j < kept && !is_first) past[j][i] = before[i * kept + j];
        }
    for (int t = first; t < end; t++) {
        const floats now = load_part(o->x + t * o->ldx + c, n);
        floats sum = now * load(weights[kept]);
        for (int j = 0; j < kept; j++) sum = madd(load(past[j]), load(weights[j]), sum);
        const floats y = silu_times(sum, splat(1.f));
        memcpy(o->y + (int64_t)t * o->C + c, &y, n * sizeof(float));
        for (int j = 0; j + 1 < kept; j++) store(past[j], load(past[j + 1]));
        store(past[kept - 1], now);
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < kept; j++) before[i * kept + j] = past[j][i];
}

static void convolve_block(void *argument, int64_t item) {
    const Convolution *o = argument;
    const int s = item / o->blocks, c = item % o->blocks * TILE_VECTORS * LANES;
    const int end = c + TILE_VECTORS * LANES < o->C ? c + TILE_VECTORS * LANES : o->C;
    if (o->starts[s] == o->starts[s + 1]) return;
    for (int at = c; at < end; at += LANES) convolve(o, s, at, end - at < LANES ? end - at : LANES);
}

/* y[M, C] = silu of x convolved along each sequence; the last inputs are kept in slots. */
void cortex_causal_convolution(const float *x, int64_t ldx, const float *weight, float *kept,
                               const int64_t *slots, const int32_t *starts, const int64_t *positions, float *y,
                               int C, int kernel, int sequences, int threads) {
    const int blocks = (C + TILE_VECTORS * LANES - 1) / (TILE_VECTORS * LANES);
    Convolution all = {x, weight, kept, y, slots, positions, starts, ldx, C, kernel, blocks};
    for_each(threads, (int64_t)sequences * blocks, convolve_block, &all);
}

/* ---- the rule ---- */

typedef struct {
    const float *qkv, *ba, *rate, *bias;
    float *states, *out;
    const int64_t *slots, *positions;
    const int32_t *starts;
    int keys, values, key_dim, value_dim, is_tiled;
} Delta;

/* Some tokens of one head, as every tile of its state sees them. */
typedef struct {
    float q[RUN][MAX_KEY_DIM], k[RUN][MAX_KEY_DIM];
    float fade[RUN], beta[RUN], qk[RUN];
    const float *v;
    float *out;
    int tokens, key_dim, value_dim, ldv, ldout;
} Run;

static float inner(const float *a, const float *b, int n) {
    const int whole = n / LANES * LANES;
    floats sum = {};
    for (int i = 0; i < whole; i += LANES) sum = madd(load(a + i), load(b + i), sum);
    return fold(madd(load_part(a + whole, n - whole), load_part(b + whole, n - whole), sum));
}

static void normalise(const float *from, float *to, int n, float scale) {
    const float factor = scale / sqrtf(inner(from, from, n) + 1e-6f);
    for (int i = 0; i < n; i++) to[i] = from[i] * factor;
}

static float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

static void prepare_run(const Delta *o, int first, int head, Run *run) {
    const int group = o->values / o->keys, key = o->is_tiled ? head % o->keys : head / group;
    const int64_t channels = 2 * (int64_t)o->keys * o->key_dim + (int64_t)o->values * o->value_dim;
    for (int t = 0; t < run->tokens; t++) {
        const float *q = o->qkv + (first + t) * channels + (int64_t)key * o->key_dim;
        const float *ba = o->ba + (int64_t)(first + t) * 2 * o->values + head;
        normalise(q, run->q[t], o->key_dim, 1.f / sqrtf(o->key_dim));
        normalise(q + (int64_t)o->keys * o->key_dim, run->k[t], o->key_dim, 1.f);
        run->qk[t] = inner(run->q[t], run->k[t], o->key_dim);
        run->fade[t] = expf(o->rate[head] * softplus(ba[o->values] + o->bias[head]));
        run->beta[t] = 1.f / (1.f + expf(-ba[0]));
    }
    run->v = o->qkv + first * channels + 2 * (int64_t)o->keys * o->key_dim + (int64_t)head * o->value_dim;
    run->out = o->out + ((int64_t)first * o->values + head) * o->value_dim;
    run->ldv = channels;
    run->ldout = o->values * o->value_dim;
}

INLINE floats load_some(const float *p, int n) { return n == LANES ? load(p) : load_part(p, n); }
INLINE void store_some(float *p, floats v, int n) { memcpy(p, &v, n * sizeof(float)); }

/* A run of tokens through W vectors of columns of S, the last of which has n lanes. */
INLINE void tile_run(const Run *run, float *S, int column, const int W, const int n) {
    const int ld = run->value_dim;
    S += column;
    for (int t = 0; t < run->tokens; t++) {
        const float *q = run->q[t], *k = run->k[t], *v = run->v + (int64_t)t * run->ldv + column;
        float *out = run->out + (int64_t)t * run->ldout + column;
        const floats fade = splat(run->fade[t]), beta = splat(run->beta[t]);
        floats answers[TILE_VECTORS] = {}, asked[TILE_VECTORS] = {}, written[TILE_VECTORS];
        for (int i = 0; i < run->key_dim; i++)
            for (int w = 0; w < W; w++) {
                const floats s = load_some(S + (int64_t)i * ld + w * LANES, n);
                answers[w] = madd(s, splat(k[i]), answers[w]);
                asked[w] = madd(s, splat(q[i]), asked[w]);
            }
        for (int w = 0; w < W; w++) {
            written[w] = beta * (load_some(v + w * LANES, n) - fade * answers[w]);
            store_some(out + w * LANES, madd(splat(run->qk[t]), written[w], fade * asked[w]), n);
        }
        for (int i = 0; i < run->key_dim; i++)
            for (int w = 0; w < W; w++) {
                float *s = S + (int64_t)i * ld + w * LANES;
                store_some(s, madd(splat(k[i]), written[w], fade * load_some(s, n)), n);
            }
    }
}

static void delta_head(void *argument, int64_t item) {
    const Delta *o = argument;
    const int s = item / o->values, head = item % o->values;
    const int first = o->starts[s], end = o->starts[s + 1], columns = o->value_dim;
    const int64_t size = (int64_t)o->key_dim * columns;
    float *S = o->states + (o->slots[s] * o->values + head) * size;
    if (first == end) return;
    if (o->positions[first] == 0) memset(S, 0, size * sizeof(float));
    Run run;
    run.key_dim = o->key_dim;
    run.value_dim = columns;
    for (int at = first; at < end; at += RUN) {
        run.tokens = end - at < RUN ? end - at : RUN;
        prepare_run(o, at, head, &run);
        int column = 0;
        for (; column + TILE_VECTORS * LANES <= columns; column += TILE_VECTORS * LANES)
            tile_run(&run, S, column, TILE_VECTORS, LANES);
        for (; column + LANES <= columns; column += LANES) tile_run(&run, S, column, 1, LANES);
        if (column < columns) tile_run(&run, S, column, 1, columns - column);
    }
}

/* out[M, V, value_dim] of [q | k | v] and [b | a]; the states in slots go on. */
void cortex_gated_delta_rule(const float *qkv, const float *ba, const float *rate, const float *bias,
                             float *states, const int64_t *slots, const int32_t *starts,
                             const int64_t *positions, float *out, int keys, int values, int key_dim,
                             int value_dim, int is_tiled, int sequences, int threads) {
    Delta all = {qkv,  ba,     rate,    bias,      states,  out, slots, positions, starts,
                 keys, values, key_dim, value_dim, is_tiled};
    for_each(threads, (int64_t)sequences * values, delta_head, &all);
}

/* ---- what comes behind it ---- */

typedef struct {
    const float *x, *gate, *weight;
    float *y;
    int64_t ldg;
    int heads, D;
    float eps;
} Gated;

static void gated_rms_norm_row(void *argument, int64_t item) {
    const Gated *o = argument;
    const int D = o->D, whole = D / LANES * LANES;
    const float *x = o->x + item * D, *z = o->gate + item / o->heads * o->ldg + item % o->heads * D;
    const floats scale = splat(1.f / sqrtf(inner(x, x, D) / D + o->eps));
    float *y = o->y + item * D;
    for (int i = 0; i < D; i += LANES) {
        const int n = i < whole ? LANES : D - whole;
        const floats normed = load_some(o->weight + i, n) * (load_some(x + i, n) * scale);
        store_some(y + i, silu_times(load_some(z + i, n), normed), n);
    }
}

/* y[M, heads, D] = x / rms(x) * weight * silu(z); the heads of a token lie together in z. */
void cortex_gated_rms_norm(const float *x, const float *z, int64_t ldz, const float *weight, float *y, int M,
                           int heads, int D, float eps, int threads) {
    Gated all = {x, z, weight, y, ldz, heads, D, eps};
    for_each(M > 4 ? threads : 1, (int64_t)M * heads, gated_rms_norm_row, &all);
}

/* sigmoid(gate) * x, as silu_times does it */
INLINE floats sigmoid_times(floats gate, floats x) {
    const ints negative = gate < 0.f;
    const floats e = exp_of_negative((floats)((ints)gate | (ints)splat(-0.f)));
    const floats top = (floats)(((ints)e & negative) | ((ints)splat(1.f) & ~negative));
    return top / (1.f + e) * x;
}

static void sigmoid_multiply_row(void *argument, int64_t m) {
    const Gated *o = argument;
    const float *x = o->x + m * o->D, *gate = o->gate + m * o->ldg;
    for (int i = 0; i < o->D; i += LANES) {
        const int n = o->D - i < LANES ? o->D - i : LANES;
        store_some(o->y + m * o->D + i, sigmoid_times(load_some(gate + i, n), load_some(x + i, n)), n);
    }
}

/* y[M, K] = x * sigmoid(gate), whose rows are ldg floats apart. */
void cortex_sigmoid_multiply(const float *x, const float *gate, int64_t ldg, float *y, int M, int K,
                             int threads) {
    Gated all = {.x = x, .gate = gate, .y = y, .ldg = ldg, .D = K};
    for_each(M > 4 ? threads : 1, M, sigmoid_multiply_row, &all);
}
