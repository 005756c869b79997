/* A mixture of experts: choosing them, and computing those that were chosen together.
 *
 * Every token goes through k of E experts. The T * k pairs (token, expert) are sorted by expert, so that
 * the rows of one expert lie together and its weights are read once:
 *
 *     starts[e], starts[e + 1]     the places of expert e's rows, in the order of their tokens
 *     place[t * k + j]             where the row of token t for its j-th expert is
 *
 *     rows[T k, H] -> gate and up [T k, 2 I] -> silu(gate) * up [T k, I] -> down, over rows [T k, H]
 *     y[t] = weight[t, 0] * rows[place[t, 0]] + weight[t, 1] * rows[place[t, 1]] + ...
 *
 * An item of a product's loop is OUTPUTS outputs of one expert for all of its rows. As a row's product
 * depends on no other row, and each token's sum has the order of its own choices, neither the company of
 * a token nor the number of threads changes a bit.
 */

/* ---- which ---- */

typedef struct {
    const float *logits;
    int64_t *ids;
    float *weights;
    int E, k, is_normalised;
    _Atomic int failed;
} Routing;

static void route_row(void *argument, int64_t m) {
    Routing *o = argument;
    const float *x = o->logits + m * o->E;
    float *share = scratch(o->E), most = x[0], sum = 0.f, chosen = 0.f;
    if (!share) {
        o->failed = 1;
        return;
    }
    for (int e = 1; e < o->E; e++) most = x[e] > most ? x[e] : most;
    for (int e = 0; e < o->E; e++) sum += share[e] = expf(x[e] - most);
    for (int j = 0; j < o->k; j++) {
        int best = -1;
        for (int e = 0; e < o->E; e++) /* no number is less than 0: it can be chosen, but only once */
            if (!(share[e] < 0.f) && (best < 0 || share[e] > share[best])) best = e;
        o->ids[m * o->k + j] = best;
        o->weights[m * o->k + j] = share[best] / sum;
        chosen += share[best] / sum;
        share[best] = -1.f;
    }
    for (int j = 0; o->is_normalised && j < o->k; j++) o->weights[m * o->k + j] /= chosen;
}

/* The k largest shares of softmax(logits[M, E]), the largest first; returns -1 without memory. */
int cortex_route(const float *logits, int64_t *ids, float *weights, int M, int E, int k, int is_normalised,
                 int threads) {
    Routing routing = {logits, ids, weights, E, k, is_normalised, 0};
    for_each(M > 16 ? threads : 1, M, route_row, &routing);
    return routing.failed ? -1 : 0;
}

/* ---- sorting ---- */

typedef struct {
    int *starts; /* [E + 1] */
    int *place;  /* [T * k] */
    int *active; /* [E], experts that have rows */
    int count;   /* of them */
} Order;

/* Returns -1 if an id is no expert. */
static int sort_by_expert(const int64_t *ids, int64_t pairs, int E, Order *order) {
    memset(order->starts, 0, (E + 1) * sizeof(int));
    for (int64_t i = 0; i < pairs; i++) {
        if (ids[i] < 0 || ids[i] >= E) return -1;
        order->starts[ids[i] + 1]++;
    }
    order->count = 0;
    for (int e = 0; e < E; e++) {
        if (order->starts[e + 1]) order->active[order->count++] = e;
        order->starts[e + 1] += order->starts[e];
    }
    for (int64_t i = 0; i < pairs; i++) order->place[i] = order->starts[ids[i]]++;
    for (int e = E; e > 0; e--) order->starts[e] = order->starts[e - 1]; /* each ended as its successor's */
    order->starts[0] = 0;
    return 0;
}

/* ---- products ---- */

/* The matrices [N, K] of all experts, one after the other; an expert's tiles are whole ones. */
typedef struct {
    int kind, is_tiled, N, K;
    const uint8_t *data;
    int64_t row_bytes;
} Stack;

typedef struct {
    const Stack *stacks; /* of the same inputs, their outputs side by side; of one kind, all in tiles or none */
    int count, tiles;    /* OUTPUTS outputs of one expert, in all stacks */
    const Order *order;
    Activations x;
    float *y;
    int64_t ldy;
    _Atomic int failed;
} Grouped;

static void grouped_item(void *argument, int64_t item) {
    Grouped *o = argument;
    const int expert = o->order->active[item / o->tiles];
    const int first = o->order->starts[expert], M = o->order->starts[expert + 1] - first;
    const Stack *w = o->stacks;
    float *y = o->y + first * o->ldy;
    int tile = item % o->tiles;
    for (; tile >= (w->N + OUTPUTS - 1) / OUTPUTS; w++) {
        tile -= (w->N + OUTPUTS - 1) / OUTPUTS;
        y += w->N;
    }
    const uint8_t *data = w->data + (int64_t)expert * w->N * w->row_bytes;
    if (w->is_tiled) {
        multiply_column(w->kind, data + tile * column_bytes(w->kind, w->K), w->K, &o->x, first, M,
                        y + tile * OUTPUTS, o->ldy, OUTPUTS);
        return;
    }
    const float *x = o->x.x + (int64_t)first * w->K;
    Linear linear = {data, x, y, w->row_bytes, o->ldy, w->kind, M, w->N, w->K, 0};
    linear_item(&linear, tile);
    if (linear.failed) o->failed = 1;
}

/* y[rows, N of all stacks] = x[rows, K] times the stacks' matrices of each row's expert; rows of y are
 * ldy floats apart. Returns -1 without memory. */
static int multiply_grouped(const Stack *stacks, int count, const Order *order, const float *x, float *y,
                            int64_t ldy, int threads) {
    Grouped o = {stacks, count, 0, order, {x}, y, ldy, 0};
    const int M = order->starts[order->active[order->count - 1] + 1];
    for (int i = 0; i < count; i++) o.tiles += (stacks[i].N + OUTPUTS - 1) / OUTPUTS;
    if (stacks->is_tiled && activate(stacks->kind, x, M, stacks->K, threads, &o.x)) return -1;
    for_each(threads, (int64_t)order->count * o.tiles, grouped_item, &o);
    return o.failed ? -1 : 0;
}

/* ---- the whole ---- */

typedef struct {
    const float *x, *weights;
    float *rows, *y;
    const int *place;
    int k, H;
} Spreading;

static void spread_row(void *argument, int64_t m) {
    const Spreading *o = argument;
    for (int j = 0; j < o->k; j++)
        memcpy(o->rows + (int64_t)o->place[m * o->k + j] * o->H, o->x + m * o->H, o->H * sizeof(float));
}

static void gather_row(void *argument, int64_t m) {
    const Spreading *o = argument;
    float *y = o->y + m * o->H;
    for (int j = 0; j < o->k; j++) {
        const float weight = o->weights[m * o->k + j];
        const float *row = o->rows + (int64_t)o->place[m * o->k + j] * o->H;
        for (int h = 0; h < o->H; h++) y[h] = (j ? y[h] : 0.f) + weight * row[h];
    }
}

/* y[M, H] = x[M, H] through its experts. *work* has M * k * (H + 3 I + 1) floats and 2 E + 1 more.
 * Returns -1 without memory or for an id that is no expert. */
int cortex_experts(const float *x, const int64_t *ids, const float *weights, float *work, float *y, int M, int k,
                   int E, const Stack *gate, const Stack *up, const Stack *down, int threads) {
    const int H = gate->K, I = gate->N;
    const int64_t pairs = (int64_t)M * k;
    if (!M) return 0;
    float *rows = work, *both = rows + pairs * H, *inner = both + pairs * 2 * I;
    int *numbers = (int *)(inner + pairs * I);
    Order order = {numbers, numbers + 2 * E + 1, numbers + E + 1, 0};
    if (sort_by_expert(ids, pairs, E, &order)) return -1;
    Spreading spreading = {x, weights, rows, y, order.place, k, H};
    for_each(M > 16 ? threads : 1, M, spread_row, &spreading);
    const Stack stacks[2] = {*gate, *up};
    const int at_once = gate->kind == up->kind && gate->is_tiled == up->is_tiled ? 2 : 1;
    for (int i = 0; i < 2; i += at_once)
        if (multiply_grouped(stacks + i, at_once, &order, rows, both + i * I, 2 * I, threads)) return -1;
    cortex_silu_multiply(both, inner, pairs, I, threads);
    if (multiply_grouped(down, 1, &order, inner, rows, H, threads)) return -1;
    for_each(M > 16 ? threads : 1, M, gather_row, &spreading);
    return 0;
}

typedef struct {
    const float *x, *y, *gate;
    float *to;
    int K;
} Gating;

static void add_gated_row(void *argument, int64_t m) {
    const Gating *o = argument;
    const float share = 1.f / (1.f + expf(-o->gate[m]));
    for (int k = 0; k < o->K; k++) o->to[m * o->K + k] = o->x[m * o->K + k] + share * o->y[m * o->K + k];
}

/* to[M, K] = x + sigmoid(gate[M]) * y. */
void cortex_add_gated(const float *x, const float *y, const float *gate, float *to, int M, int K, int threads) {
    Gating gating = {x, y, gate, to, K};
    for_each(M > 16 ? threads : 1, M, add_gated_row, &gating);
}
