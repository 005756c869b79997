/* A step as a list of operations: recorded once per model (program.py), run by one call.
 *
 * An operation's arguments are fixed but for three counts, which the step brings: how many tokens
 * there are, how many of them have logits, and of how many sequences they are.
 */

enum { /* in the order of OPERATIONS in op.py */
    ROWS_OP, TILED_ROWS_OP, ROWS_OF_SHARE_OP, TAKE_OP, ADD_OP, LINEAR_OP, TILED_LINEAR_OP, ADD_BIAS_OP, RMS_NORM_OP,
    SILU_MULTIPLY_OP, ROTATION_OP, ROTATE_OP, STORE_OP, ATTENTION_OP,
    ROUTE_OP, EXPERTS_OP, ADD_GATED_OP, CAUSAL_CONVOLUTION_OP,
    GATED_DELTA_RULE_OP, GATED_RMS_NORM_OP, SIGMOID_MULTIPLY_OP, OPERATIONS
};

typedef union {
    int64_t i;
    const void *p;
    float f;
} Value;

typedef struct {
    int32_t code, is_sampled; /* its rows are those with logits, not all tokens */
    Value a[21];              /* without the counts and the threads */
} Op;

typedef struct {
    int32_t tokens, sampled, sequences, threads;
} Step;

#define I(n) ((int)o->a[n].i)
#define L(n) (o->a[n].i)
#define P(n) ((void *)o->a[n].p)
#define F(n) (o->a[n].f)
#define STACK(n, N, K) {I(n), I(n + 1), N, K, P(n + 2), L(n + 3)}

/* y [M, K] = rows *ids* of a matrix of *of* rows, of which the N from *first* on are here; else zeros. */
static int rows_of_share(int kind, const uint8_t *w, int64_t row_bytes, const int64_t *ids, float *y, int M,
                         int64_t N, int K, int64_t first, int64_t of, int is_tiled) {
    for (int m = 0; m < M; m++, y += K) {
        const int64_t id = ids[m] - first;
        if (ids[m] < 0 || ids[m] >= of) return -1;
        if (id < 0 || id >= N)
            memset(y, 0, K * sizeof(float));
        else if (is_tiled ? cortex_tiled_rows(kind, w, &id, y, 1, N, K) : cortex_rows(kind, w, row_bytes, &id, y, 1, N, K))
            return -1;
    }
    return 0;
}

static int run_op(const Op *o, const Step *step) {
    const int M = o->is_sampled ? step->sampled : step->tokens, T = step->threads;
    switch (o->code) {
    case ROWS_OP: return cortex_rows(I(0), P(1), L(2), P(3), P(4), M, L(5), I(6));
    case TILED_ROWS_OP: return cortex_tiled_rows(I(0), P(1), P(2), P(3), M, L(4), I(5));
    case ROWS_OF_SHARE_OP:
        return rows_of_share(I(0), P(1), L(2), P(3), P(4), M, L(5), I(6), L(7), L(8), I(9));
    case TAKE_OP: cortex_take(P(0), P(1), P(2), step->sampled, I(3)); break;
    case ADD_OP: cortex_add(P(0), P(1), P(2), M, I(3), T); break;
    case LINEAR_OP: return cortex_linear(I(0), P(1), L(2), P(3), P(4), L(5), M, I(6), I(7), T);
    case TILED_LINEAR_OP: return cortex_tiled_linear(I(0), P(1), P(2), P(3), L(4), M, I(5), I(6), T);
    case ADD_BIAS_OP: cortex_add_bias(P(0), P(1), M, I(2), T); break;
    case RMS_NORM_OP: cortex_rms_norm(P(0), L(1), P(2), P(3), M, I(4), I(5), F(6), T); break;
    case SILU_MULTIPLY_OP: cortex_silu_multiply(P(0), P(1), M, I(2), T); break;
    case ROTATION_OP: cortex_rotation(P(0), P(1), P(2), P(3), M, I(4), F(5)); break;
    case ROTATE_OP: cortex_rotate(P(0), L(1), P(2), P(3), P(4), M, I(5), I(6), I(7)); break;
    case STORE_OP: cortex_store(P(0), P(1), L(2), L(3), P(4), P(5), P(6), I(7), M, I(8), I(9)); break;
    case ATTENTION_OP:
        return cortex_attention(P(0), P(1), P(2), I(3), P(4), I(5), P(6), step->sequences, P(7), P(8), I(9),
                                I(10), I(11), F(12), T);
    case CAUSAL_CONVOLUTION_OP:
        cortex_causal_convolution(P(0), L(1), P(2), P(3), P(4), P(5), P(6), P(7), I(8), I(9), step->sequences, T);
        break;
    case GATED_DELTA_RULE_OP:
        cortex_gated_delta_rule(P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8), I(9), I(10), I(11), I(12),
                                I(13), step->sequences, T);
        break;
    case GATED_RMS_NORM_OP: cortex_gated_rms_norm(P(0), P(1), L(2), P(3), P(4), M, I(5), I(6), F(7), T); break;
    case SIGMOID_MULTIPLY_OP: cortex_sigmoid_multiply(P(0), P(1), L(2), P(3), M, I(4), T); break;
    case ROUTE_OP: return cortex_route(P(0), P(1), P(2), M, I(3), I(4), I(5), T);
    case EXPERTS_OP: {
        const int k = I(5), E = I(6), H = I(7), inner = I(8);
        const Stack gate = STACK(9, inner, H), up = STACK(13, inner, H), down = STACK(17, H, inner);
        return cortex_experts(P(0), P(1), P(2), P(3), P(4), M, k, E, &gate, &up, &down, T);
    }
    case ADD_GATED_OP: cortex_add_gated(P(0), P(1), P(2), P(3), M, I(4), T); break;
    }
    return 0;
}

#define FEW_TOKENS 4 /* so few that a step waits for its weights, not for its products */
#define MOST_AHEAD (256 << 10)

/* Have idle helpers fetch the weights of the next product after operation *i*. */
static void expect_weights(const Op *ops, int count, int i) {
    for (int n = 1; n <= count; n++) {
        const Op *o = ops + (i + n) % count;
        if (o->code != TILED_LINEAR_OP) continue;
        const int64_t bytes = (I(5) + OUTPUTS - 1) / OUTPUTS * column_bytes(I(0), I(6));
        atomic_store(&pool_ahead, P(1));
        atomic_store(&pool_ahead_bytes, bytes < MOST_AHEAD ? bytes : MOST_AHEAD);
        return;
    }
}

/* Run those from *first* to before *end* of *count* operations, which follow each other in a circle of
 * steps; where *seconds* is given, add to it the time of each kind. Returns 0, or 1 + the code of the
 * first that fails. */
int cortex_run(const Op *ops, int count, int first, int end, const Step *step, double *seconds) {
    for (int i = first; i < end; i++) {
        const int64_t began = seconds ? nanoseconds() : 0;
        if (ops[i].code == TILED_LINEAR_OP && step->tokens <= FEW_TOKENS) expect_weights(ops, count, i);
        if (run_op(ops + i, step)) return 1 + ops[i].code;
        if (seconds) seconds[ops[i].code] += (nanoseconds() - began) * 1e-9;
    }
    return 0;
}
