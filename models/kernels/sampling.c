/* Choosing a token from each of some rows of logits; sampling.py says in which order what applies.
 *
 * Arithmetic is float64 of single operations, each rounded (no fused multiply-adds), down to the
 * exponential: so a row's shares are the same bits on every CPU, and those of plain torch. A share
 * becomes a whole number before anything is summed, so the order of summation does not matter.
 *
 * Only tokens that weigh anything are candidates, in the order of their ids. The likeliest of them are
 * found without sorting: each has a bucket, by its distance from the likeliest; counts and weights of
 * the buckets tell in which one the cut lies, and only that one is looked at again, digit by digit of
 * the logits' bits (a radix selection).
 */
#define SPREAD 28          /* what is less likely by e^28 weighs nothing, */
#define SCORED_SPREAD 32   /* and by e^32 is no part of a score */
#define BUCKETS (SPREAD * 32) /* of distances below SPREAD; those above share one more */
#define GROUP 64           /* candidates that are skipped at once */
#define TAKEN_BITS 40      /* the likeliest weighs 2^40 where one is drawn, */
#define SCORED_BITS 44     /* and 2^44 where log probabilities are asked for */
#define UNHEALTHY (-1)
#define STUCK (-2)

typedef double doubles __attribute__((vector_size(64)));
typedef int64_t longs __attribute__((vector_size(64)));
typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
typedef uint16_t shorts8 __attribute__((vector_size(16)));

/* How one row is chosen from, as sampling.py packs it. */
typedef struct {
    double temperature, top_p, min_p, repetition, frequency, presence;
    uint64_t seed, position;
    const uint32_t *allowed; /* a bit each, or NULL */
    const int32_t *bias_ids;
    const double *biases;
    const int32_t *known_ids, *counts; /* different tokens, and how often the answer has each */
    int32_t bias_count, known_count, top_k, forced; /* forced: -1 for none */
    int32_t score, likeliest; /* where its scores go, -1 for nowhere, and how many of the likeliest */
} Asked;

/* Memory of a thread for one row: first the logits of all tokens, then those of the candidates alone,
 * padded to whole groups with what cannot be. */
typedef struct {
    double *x;
    int64_t *weights;        /* of candidates */
    int32_t *ids, *places;   /* tokens of candidates; candidates of a bucket */
    uint16_t *buckets, *least; /* of candidates; the least of each group */
    int V, groups;
} Desk;

typedef struct {
    const Asked *asked;
    const float *logits;
    int64_t *tokens;
    int64_t *ids, *totals;   /* [scored, 1 + K], [scored] */
    float *values, *largest; /* [scored, 1 + K], [scored] */
    int V, K;
    _Atomic int failed;
} Choosing;

INLINE doubles eight(double x) { return (doubles){x, x, x, x, x, x, x, x}; }

/* ---- health, and the likeliest ---- */

INLINE int any(ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    longs v = (longs)mask;
    return (v[0] | v[1] | v[2] | v[3] | v[4] | v[5] | v[6] | v[7]) != 0;
#endif
}

/* The first of the largest logits, or UNHEALTHY. */
static int64_t likeliest_of(const float *x, int V, float *largest) {
    const int whole = V / LANES * LANES;
    floats top = splat(-INFINITY), bad = {};
    for (int i = 0; i < whole; i += LANES) {
        const floats v = load(x + i);
        const ints more = v > top;
        bad += v * 0.f; /* 0, but not of a NaN or an infinity */
        top = (floats)(((ints)v & more) | ((ints)top & ~more));
    }
    float most = -INFINITY, wrong = fold(bad);
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    for (int i = whole; i < V; i++) {
        wrong += x[i] * 0.f;
        most = x[i] > most ? x[i] : most;
    }
    if (wrong != 0.f) return UNHEALTHY;
    *largest = most;
    int64_t at = 0;
    while (at < whole && !any(load(x + at) == most)) at += LANES;
    while (x[at] != most) at++;
    return at;
}

/* The first of the largest of a desk, or STUCK where nothing is allowed. */
static int64_t likeliest_on(const Desk *desk, double *largest) {
    double most = -INFINITY;
    doubles top = eight(most);
    const int whole = desk->V / 8 * 8;
    for (int i = 0; i < whole; i += 8) {
        doubles v;
        memcpy(&v, desk->x + i, sizeof v);
        const longs more = v > top;
        top = (doubles)(((longs)v & more) | ((longs)top & ~more));
    }
    for (int i = 0; i < 8; i++) most = top[i] > most ? top[i] : most;
    for (int i = whole; i < desk->V; i++) most = desk->x[i] > most ? desk->x[i] : most;
    if (most == -INFINITY) return STUCK;
    *largest = most;
    int64_t at = 0;
    while (desk->x[at] != most) at++;
    return at;
}

/* ---- what the row asks for is done to its logits ---- */

static void forbid(double *x, const uint32_t *allowed, int V) {
    for (int i = 0; i < V; i += 32) {
        const uint32_t bits = allowed[i / 32];
        const int count = V - i < 32 ? V - i : 32;
        if (bits == UINT32_MAX) continue;
        for (int j = 0; j < count; j++)
            if (!(bits >> j & 1)) x[i + j] = -INFINITY;
    }
}

static void adjust(double *x, const Asked *a) {
    for (int i = 0; i < a->bias_count; i++) x[a->bias_ids[i]] += a->biases[i];
    if (a->repetition != 1)
        for (int i = 0; i < a->known_count; i++) {
            double *at = x + a->known_ids[i];
            *at = *at > 0 ? *at / a->repetition : *at * a->repetition;
        }
    if (a->frequency != 0 || a->presence != 0)
        for (int i = 0; i < a->known_count; i++)
            if (a->counts[i]) x[a->known_ids[i]] -= a->frequency * a->counts[i], x[a->known_ids[i]] -= a->presence;
}

static void lay_out(const float *logits, const Asked *a, Desk *desk) {
    for (int i = 0; i < desk->V; i++) desk->x[i] = logits[i];
    if (a->allowed) forbid(desk->x, a->allowed, desk->V);
    adjust(desk->x, a);
}

/* ---- shares ---- */

/* e^x for -SCORED_SPREAD <= x <= 0 within 2^-50; of 0 it is 1. The steps are those of shares.py. */
INLINE doubles exp_of(doubles x) {
    const doubles magic = eight(0x1.8p52); /* adding it rounds to a whole number */
    const doubles shifted = x * 0x1.71547652b82fep+0 + magic, n = shifted - magic;
    const doubles r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    doubles p = r * 2.7476779552864355e-07 + 2.7635005925865986e-06;
    p = p * r + 2.4801931856589663e-05;
    p = p * r + 0.00019841185203323114;
    p = p * r + 0.0013888888516006123;
    p = p * r + 0.008333333370891925;
    p = p * r + 0.041666666668137634;
    p = p * r + 0.16666666666611513;
    p = p * r + 0.49999999999998324;
    p = p * r * r + r + 1.0;
    return p * (doubles)(((longs)shifted - (longs)magic + 1023) << 52);
}

INLINE doubles at_least(doubles x, double least) {
    const longs below = x < least;
    return (doubles)(((longs)x & ~below) | ((longs)eight(least) & below));
}

INLINE int64_t sum_of(longs v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

/* Keep the tokens whose logit is *least* or more, in order. */
static void pick_candidates(double least, Desk *desk) {
    int n = 0, i = 0;
#if defined(__AVX512F__) && defined(__AVX512VL__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (; i + 8 <= desk->V; i += 8) {
        const __m512d x = _mm512_loadu_pd(desk->x + i);
        const __mmask8 kept = _mm512_cmp_pd_mask(x, _mm512_set1_pd(least), _CMP_GE_OQ);
        _mm512_storeu_pd(desk->x + n, _mm512_maskz_compress_pd(kept, x)); /* of what has been read */
        _mm256_storeu_si256((__m256i *)(desk->ids + n),
                            _mm256_maskz_compress_epi32(kept, _mm256_add_epi32(lanes, _mm256_set1_epi32(i))));
        n += __builtin_popcount(kept);
    }
#endif
    for (; i < desk->V; i++) {
        const double x = desk->x[i];
        desk->x[n] = x;
        desk->ids[n] = i;
        n += x >= least;
    }
    desk->groups = (n + GROUP - 1) / GROUP;
    for (; n < desk->groups * GROUP; n++) desk->x[n] = -INFINITY;
}

/* Weights and buckets of the candidates; returns what all weigh. */
static int64_t weigh_candidates(const Asked *a, double top, Desk *desk) {
    const double rate = 1 / a->temperature < 1e300 ? 1 / a->temperature : 1e300;
    longs total = {};
    for (int g = 0; g < desk->groups; g++) {
        ints8 nearest = (ints8){} + BUCKETS;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i += 8) {
            doubles x;
            memcpy(&x, desk->x + i, sizeof x);
            const doubles far = at_least((x - top) * rate, -SPREAD), share = exp_of(far);
            const ints8 bucket = __builtin_convertvector(far * (double)(-BUCKETS / SPREAD), ints8), nearer = bucket < nearest;
            const longs weight =
                __builtin_convertvector(share * (double)(1LL << TAKEN_BITS), longs) & ~(share < a->min_p);
            const shorts8 narrow = __builtin_convertvector(bucket, shorts8);
            memcpy(desk->weights + i, &weight, sizeof weight);
            memcpy(desk->buckets + i, &narrow, sizeof narrow);
            total += weight;
            nearest = (bucket & nearer) | (nearest & ~nearer);
        }
        desk->least[g] = BUCKETS;
        for (int i = 0; i < 8; i++) desk->least[g] = nearest[i] < desk->least[g] ? nearest[i] : desk->least[g];
    }
    return sum_of(total);
}

/* ---- top_k and top_p ---- */

/* What is kept: all above *least*, the first *equal* of those that are it; none is in a bucket behind
 * *bucket*. */
typedef struct {
    double least;
    int64_t equal, weight;
    int bucket;
} Cut;

typedef struct {
    int64_t count, weight;
} Bucket;

/* Whole numbers in the order of the doubles. */
INLINE uint64_t key_of(double x) {
    uint64_t bits;
    x += 0.0; /* there is but one zero */
    memcpy(&bits, &x, 8);
    return bits >> 63 ? ~bits : bits | 1ULL << 63;
}

/* Keep the likeliest while they are fewer than *limit* and what is before them weighs less than *mark*;
 * from bucket *end* on there is none of them. */
static Cut cut(Desk *desk, const Bucket *buckets, int end, int64_t limit, double mark) {
    Bucket kept = {0, 0};
    int64_t n = 0, equal = 0;
    int at = 0;
    for (; at < end && kept.count + buckets[at].count <= limit && (double)(kept.weight + buckets[at].weight) < mark; at++)
        kept = (Bucket){kept.count + buckets[at].count, kept.weight + buckets[at].weight};
    if (at == end) return (Cut){-INFINITY, 0, kept.weight, at};
    for (int g = 0; g < desk->groups; g++)
        if (desk->least[g] <= at)
            for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
                desk->places[n] = i;
                n += desk->buckets[i] == at;
            }
    for (int shift = 56; shift >= 0 && n > 1; shift -= 8) {
        Bucket digits[256] = {};
        int64_t left = 0;
        for (int64_t i = 0; i < n; i++) {
            Bucket *of = digits + (key_of(desk->x[desk->places[i]]) >> shift & 255);
            *of = (Bucket){of->count + 1, of->weight + desk->weights[desk->places[i]]};
        }
        int digit = 255; /* the cut is in one of them: the bucket does not fit as a whole */
        for (; kept.count + digits[digit].count <= limit && (double)(kept.weight + digits[digit].weight) < mark; digit--)
            kept = (Bucket){kept.count + digits[digit].count, kept.weight + digits[digit].weight};
        for (int64_t i = 0; i < n; i++) {
            const int place = desk->places[i];
            desk->places[left] = place;
            left += (key_of(desk->x[place]) >> shift & 255) == digit;
        }
        n = left;
    }
    const int first = desk->places[0];
    for (; equal < n && kept.count + equal < limit && (double)kept.weight < mark; equal++)
        kept.weight += desk->weights[first];
    return (Cut){desk->x[first], equal, kept.weight, at};
}

/* The bucket behind all that can be among the *limit* likeliest, or in the nucleus. */
static int end_of(const Asked *a, const Desk *desk, int64_t limit, int64_t total) {
    if (limit < desk->V) {
        int32_t groups[BUCKETS + 1] = {};
        for (int g = 0; g < desk->groups; g++) groups[desk->least[g]]++;
        int64_t found = 0;
        for (int at = 0; at < BUCKETS; at++)
            if ((found += groups[at]) >= limit) return at + 1;
        return BUCKETS;
    }
    /* All tokens that weigh less than this weigh, together, half of what may be left out. */
    const double light = (1 - a->top_p) * (double)total / desk->V / 2;
    const double end = light < 1 ? BUCKETS : log((double)(1LL << TAKEN_BITS) / light) * (BUCKETS / SPREAD) + 2;
    return end < BUCKETS ? (int)end : BUCKETS;
}

static Cut narrow(const Asked *a, Desk *desk, int64_t total) {
    const int64_t limit = a->top_k > 0 && a->top_k < desk->V ? a->top_k : desk->V;
    const int end = end_of(a, desk, limit, total);
    Bucket buckets[BUCKETS + 1];
    memset(buckets, 0, (end + 1) * sizeof *buckets);
    for (int g = 0; g < desk->groups; g++)
        if (desk->least[g] < end)
            for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
                Bucket *of = buckets + (desk->buckets[i] < end ? desk->buckets[i] : end);
                *of = (Bucket){of->count + 1, of->weight + desk->weights[i]};
            }
    if (limit < desk->V) total = cut(desk, buckets, end, limit, INFINITY).weight;
    return cut(desk, buckets, end, limit, a->top_p * (double)total);
}

/* ---- the draw ---- */

/* philox.py: a number in [0, 1) of 53 bits. */
static double uniform(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        const uint64_t left = 0xD2511F53ULL * c[0], right = 0xCD9E8D57ULL * c[2];
        c[0] = (uint32_t)(right >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)right;
        c[2] = (uint32_t)(left >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)left;
    }
    return ((double)(c[0] >> 5) * 0x1p26 + (double)(c[1] >> 6)) * 0x1p-53;
}

static int64_t draw(const Asked *a, double top, Desk *desk) {
    pick_candidates(top - (SPREAD + 0.5) * a->temperature, desk);
    const int64_t total = weigh_candidates(a, top, desk);
    Cut c = {-INFINITY, 0, total, BUCKETS};
    if ((a->top_k > 0 && a->top_k < desk->V) || a->top_p < 1) c = narrow(a, desk, total);
    int64_t left = (int64_t)(uniform(a->seed, a->position) * (double)c.weight);
    if (left > c.weight - 1) left = c.weight - 1; /* the product may round up to the total */
    for (int g = 0; g < desk->groups; g++) {
        if (desk->least[g] > c.bucket) continue;
        longs equal = {}, above = {};
        for (int i = g * GROUP; i < (g + 1) * GROUP; i += 8) {
            doubles x;
            longs weight;
            memcpy(&x, desk->x + i, sizeof x);
            memcpy(&weight, desk->weights + i, sizeof weight);
            equal |= x == c.least;
            above += weight & (x > c.least);
        }
        const int64_t weight = sum_of(above);
        if (weight <= left && !any((ints)equal)) {
            left -= weight;
            continue;
        }
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++)
            if (desk->x[i] > c.least || (desk->x[i] == c.least && c.equal-- > 0))
                if ((left -= desk->weights[i]) < 0) return desk->ids[i];
    }
    return UNHEALTHY; /* never: the weights of what is kept add up to more than *left* */
}

/* ---- log probabilities ---- */

/* What exp(x - largest) come to, in units of 2^-44. */
static int64_t total_of(const float *x, int V, float largest) {
    longs total = {};
    for (int i = 0; i < V; i += 8) {
        floats8 part = {};
        part -= INFINITY;
        memcpy(&part, x + i, (V - i < 8 ? V - i : 8) * sizeof(float));
        const doubles far = at_least(__builtin_convertvector(part, doubles) - (double)largest, -SCORED_SPREAD);
        total += __builtin_convertvector(exp_of(far) * (double)(1LL << SCORED_BITS), longs);
    }
    return sum_of(total);
}

/* The *count* <= V largest, the first of equals first. */
static void sort_likeliest(const float *x, int V, int count, int64_t *ids, float *values) {
    int found = 0;
    for (int i = 0; i < V; i++) {
        if (found == count) {
            while (i + LANES <= V && !any(load(x + i) > values[count - 1])) i += LANES;
            if (i == V) return;
            if (!(x[i] > values[count - 1])) continue;
        }
        int at = found < count ? found++ : count - 1;
        for (; at > 0 && x[i] > values[at - 1]; at--) {
            ids[at] = ids[at - 1];
            values[at] = values[at - 1];
        }
        ids[at] = i;
        values[at] = x[i];
    }
}

static void score_token(const Choosing *o, const Asked *a, const float *logits, int64_t token, float largest) {
    int64_t *ids = o->ids + (int64_t)a->score * (1 + o->K);
    float *values = o->values + (int64_t)a->score * (1 + o->K);
    ids[0] = token;
    values[0] = logits[token];
    o->largest[a->score] = largest;
    o->totals[a->score] = total_of(logits, o->V, largest);
    const int count = a->likeliest < o->K ? a->likeliest : o->K;
    if (count) sort_likeliest(logits, o->V, count, ids + 1, values + 1);
}

/* ---- a row ---- */

/* This thread's desk; NULL without memory. */
static int take_desk(int V, Desk *desk) {
    const size_t groups = (V + GROUP - 1) / GROUP, tokens = groups * GROUP;
    char *memory = (char *)scratch((tokens * 26 + groups * 2) / sizeof(float) + 1);
    if (!memory) return -1;
    desk->V = V;
    desk->x = (double *)memory;
    desk->weights = (int64_t *)(desk->x + tokens);
    desk->ids = (int32_t *)(desk->weights + tokens);
    desk->places = desk->ids + tokens;
    desk->buckets = (uint16_t *)(desk->places + tokens);
    desk->least = desk->buckets + tokens;
    return 0;
}

static int64_t choose_of(const Asked *a, const float *logits, int V, int64_t likeliest, float largest) {
    const int is_changed = a->allowed || a->bias_count || a->repetition != 1 || a->frequency != 0 || a->presence != 0;
    if (a->forced >= 0) return a->forced;
    if (!is_changed && a->temperature == 0) return likeliest;
    Desk desk;
    double top = largest;
    if (take_desk(V, &desk)) return INT64_MIN;
    lay_out(logits, a, &desk);
    if (is_changed) likeliest = likeliest_on(&desk, &top);
    return likeliest < 0 || a->temperature == 0 ? likeliest : draw(a, top, &desk);
}

static void choose_row(void *argument, int64_t row) {
    Choosing *o = argument;
    const Asked *a = o->asked + row;
    const float *logits = o->logits + row * o->V;
    float largest;
    int64_t token = likeliest_of(logits, o->V, &largest);
    if (token >= 0) token = choose_of(a, logits, o->V, token, largest);
    if (token == INT64_MIN) o->failed = 1;
    else if (token >= 0 && a->score >= 0) score_token(o, a, logits, token, largest);
    o->tokens[row] = token;
}

/* tokens[R] chosen from logits[R, V], UNHEALTHY or STUCK where there is none; and the scores of the rows
 * that ask for them. Returns -1 without memory. */
int cortex_choose(const Asked *asked, const float *logits, int R, int V, int64_t *tokens, int64_t *ids, float *values,
                  int64_t *totals, float *largest, int K, int threads) {
    Choosing choosing = {asked, logits, tokens, ids, totals, values, largest, V, K, 0};
    for_each(threads, R, choose_row, &choosing);
    return choosing.failed ? -1 : 0;
}
