/* Output head and cross-entropy in one pass: logits exist for a block of tokens and words at a time, in the cache, and
 * are never rounded. Definition: models/loss.py, `cross_entropy` of the product.
 *
 * T tokens, D model width, V vocabulary; x (T, D) bf16, weight (V, D) fp32, logits l = x weight^T. The others are taken
 * relative to the target's: with e_j = exp(l_j - l_target) and r the sum of e_j over all words but the target,
 *
 *     nats = ln(1 + r),    d nats / d l_j = e_j / (1 + r),    d nats / d l_target = -r / (1 + r)
 *
 * without any difference of near numbers. The target's part of the gradients is added in fp32, those of the other words
 * are products of bf16. They are made here, and not when the backward pass asks for them, because the exponentials are
 * here: those of one chunk of tokens, which every group of words makes for its part and then adds to its weights'
 * gradients. Groups are as many on every machine, so that sums over words have one order with any number of threads.
 */
#include "tiles.h"

/* Tokens of a chunk, words of a block, groups of blocks. A block of logits is 256 KiB and one of weights 128 KiB: both
 * stay in a second-level cache of 1 MiB. More tokens would spoil that, fewer move the sums of the weights' gradients
 * through memory more often. */
enum { ROWS = 128, COLUMNS = 512, GROUPS = 8, LOGITS = COLUMNS + 16 };

/* What all threads read. d and v are D and V padded. */
typedef struct {
    long width, vocabulary, d, v, ignored;
    const bf16 *x; /* (T, D) */
    const float *weight;
    const int64_t *targets;   /* (T) */
    uint32_t *turned, *plain; /* weights by blocks of words: their transpose, for logits; themselves, for grad_x */
    bf16 *rows;               /* (padded T, d): x, 0 where nothing is predicted */
    float *target;            /* (padded T): the logit of the target, 0 where there is none */
    bf16 *exponentials;       /* of the chunk, by blocks of words, (ROWS, words of the block) each */
    float *sum_weight;        /* (v, d) */
} Head;

/* What each group gives to sums over all words. Two of these take turns: while one thread makes those of the next
 * chunk, others may still read the last. */
typedef struct {
    float sums[GROUPS][ROWS]; /* of e; or greatest logits */
    float *sum_x;             /* (GROUPS, ROWS, d): sum_j e_j weight_j */
} Parts;

/* One thread's view of a chunk of tokens. */
typedef struct {
    long start, count, rows; /* rows: count padded */
    float shift[ROWS], r[ROWS], nats[ROWS], share[ROWS], pull[ROWS]; /* share = 1 / (1 + r), pull = -r / (1 + r) or 0 */
    float *logits;                                       /* (ROWS, LOGITS) */
    bf16 *scaled, *transposed;                           /* (ROWS, d): x / (1 + r); (COLUMNS, ROWS) */
    uint32_t *pairs;                                     /* x / (1 + r) as a right operand */
} Chunk;

typedef struct {
    long first, end;
} Words;

static inline Words words_of(const Head *h, long group) {
    const long blocks = (h->v + COLUMNS - 1) / COLUMNS, each = (blocks + GROUPS - 1) / GROUPS * COLUMNS;
    return (Words){smaller(group * each, h->v), smaller((group + 1) * each, h->v)};
}

static inline int in_vocabulary(const Head *h, int64_t target) { return target >= 0 && target < h->vocabulary; }

/* The two forms of the weights of one block of words. */
static void pack_weights(const Head *h, long column, bf16 *narrowed) {
    const long n = smaller(COLUMNS, h->v - column), d = h->d;
    narrow_matrix(smaller(COLUMNS, h->vocabulary - column), h->width, h->weight + column * h->width, narrowed);
    tiles_of_transpose(n, d, narrowed, h->turned + column * d / 2);
    if (h->plain) tiles_of(n, d, narrowed, d, h->plain + column * d / 2);
}

/* Weights of a word from one on, rounded as for the matrix unit. */
static inline Lanes rounded_weights(const Head *h, int64_t word, long from) {
    bf16 rounded[LANES];
    store_bf16(rounded, LANES, load(h->weight + word * h->width + from, h->width - from, 0.0f));
    return load_bf16(rounded, LANES, 0.0f);
}

/* Token t: its row and the logit of its target. Where nothing is predicted nothing is read: a broken state there stays
 * without effect. */
static void begin_row(const Head *h, long tokens, long t) {
    const int64_t target = t < tokens ? h->targets[t] : h->ignored;
    const bf16 *x = h->x + t * h->width;
    Lanes sum = all(0.0f);
    memset(h->rows + t * h->d, 0, h->d * sizeof(bf16));
    if (target != h->ignored) memcpy(h->rows + t * h->d, x, h->width * sizeof(bf16));
    if (target != h->ignored && in_vocabulary(h, target))
        for (long j = 0; j < h->width; j += LANES)
            sum += rounded_weights(h, target, j) * load_bf16(x + j, h->width - j, 0.0f);
    h->target[t] = sum_of(sum);
}

/* Logits of the chunk and the n words from `column` on. */
static void logits_of(const Head *h, const Chunk *c, long column, long n) {
    const Tiles tiles = {h->turned + column * h->d / 2, h->d / BLOCK};
    multiply(c->rows, n, h->d, h->rows + c->start * h->d, h->d, tiles, c->logits, LOGITS, 0);
}

/* e^(logit - shift) of one row, 0 in the padding and where the logit is minus infinity. Returns their sum. */
static inline float exponential_row(long count, long n, float shift, const float *logit, bf16 *restrict result) {
    Lanes sum = all(0.0f);
    for (long j = 0; j < n; j += LANES) {
        const Lanes e = exponential_of(load(logit + j, count - j, -INFINITY) - shift);
        store_bf16(result + j, LANES, e);
        sum += e;
    }
    return sum_of(sum);
}

/* One group's exponentials but those of the targets, their sums and, where gradients are wanted, sum_j e_j weight_j. */
static void exponentials_of(const Head *h, const Chunk *c, long group, Parts *parts) {
    const Words words = words_of(h, group);
    float *r = parts->sums[group];
    for (long i = 0; i < c->rows; i++) r[i] = 0.0f;
    for (long column = words.first; column < words.end; column += COLUMNS) {
        const long n = smaller(COLUMNS, h->v - column);
        bf16 *e = h->exponentials + column * ROWS;
        logits_of(h, c, column, n);
        for (long i = 0; i < c->rows; i++) {
            float *logit = c->logits + i * LOGITS;
            const int64_t place = i < c->count ? h->targets[c->start + i] - column : -1;
            if (place >= 0 && place < n) logit[place] = -INFINITY;
            r[i] += exponential_row(h->vocabulary - column, n, c->shift[i], logit, e + i * n);
        }
        if (!h->plain) continue;
        const Tiles tiles = {h->plain + column * h->d / 2, n / BLOCK};
        multiply(c->rows, h->d, n, e, n, tiles, parts->sum_x + group * ROWS * h->d, h->d, column > words.first);
    }
}

/* One group's greatest logit of each row. */
static void greatest_logits(const Head *h, const Chunk *c, long group, Parts *parts) {
    const Words words = words_of(h, group);
    float *greatest = parts->sums[group];
    for (long i = 0; i < c->rows; i++) greatest[i] = -INFINITY;
    for (long column = words.first; column < words.end; column += COLUMNS) {
        logits_of(h, c, column, smaller(COLUMNS, h->v - column));
        for (long i = 0; i < c->rows; i++) {
            Lanes most = all(greatest[i]);
            for (long j = 0; j < smaller(COLUMNS, h->vocabulary - column); j += LANES)
                most = greater(most, load(c->logits + i * LOGITS + j, h->vocabulary - column - j, -INFINITY));
            greatest[i] = greatest_of(most);
        }
    }
}

/* Adds the groups' sums. Returns whether they are small enough: beyond 1e20 a target is so improbable that x / (1 + r)
 * would leave the range of bf16; and NaN is not small. */
static int add_sums(Chunk *c, const Parts *parts) {
    int within = 1;
    for (long i = 0; i < c->count; i++) {
        c->r[i] = 0.0f;
        for (long group = 0; group < GROUPS; group++) c->r[i] += parts->sums[group][i];
        within &= c->r[i] < 1e20f;
    }
    return within;
}

/* The greatest logit of all groups as the shift in place of the target's. */
static void shift_to_greatest(Chunk *c, const Parts *parts) {
    for (long i = 0; i < c->rows; i++) {
        c->shift[i] = parts->sums[0][i];
        for (long group = 1; group < GROUPS; group++)
            if (parts->sums[group][i] > c->shift[i]) c->shift[i] = parts->sums[group][i];
    }
}

/* The exponentials of a chunk and their sums, in all threads together. */
static void exponentials_of_chunk(const Head *h, Chunk *c, Parts *parts) {
    memcpy(c->shift, h->target + c->start, c->rows * sizeof(float));
#pragma omp for schedule(static)
    for (long group = 0; group < GROUPS; group++) exponentials_of(h, c, group, parts);
    if (add_sums(c, parts)) return;
#pragma omp barrier /* all threads have read the sums and come to the same conclusion */
#pragma omp for schedule(static)
    for (long group = 0; group < GROUPS; group++) greatest_logits(h, c, group, parts);
    shift_to_greatest(c, parts);
#pragma omp barrier
#pragma omp for schedule(static)
    for (long group = 0; group < GROUPS; group++) exponentials_of(h, c, group, parts);
    add_sums(c, parts);
}

/* r -> nats of token i of the chunk, its share and its pull. */
static void finish_sum(const Head *h, Chunk *c, long i) {
    const int64_t target = h->targets[c->start + i];
    const int ignored = target == h->ignored, known = in_vocabulary(h, target);
    const float moved = c->shift[i] - h->target[c->start + i], one = expf(-moved);
    c->share[i] = 1.0f / (one + c->r[i]);
    c->pull[i] = known && !ignored ? -c->share[i] * c->r[i] : 0.0f;
    c->nats[i] = ignored ? 0.0f : !known ? NAN : moved == 0.0f ? log1pf(c->r[i]) : logf(one + c->r[i]) + moved;
}

/* grad_x (D) of token i of the chunk. */
static void finish_row(const Head *h, const Chunk *c, long i, const Parts *parts, float *restrict grad_x) {
    const int64_t target = h->targets[c->start + i];
    for (long j = 0; j < h->width; j += LANES) {
        Lanes sum = all(0.0f);
        for (long group = 0; group < GROUPS && words_of(h, group).first < h->v; group++)
            sum += load(parts->sum_x + (group * ROWS + i) * h->d + j, LANES, 0.0f);
        sum *= c->share[i];
        if (c->pull[i] != 0.0f) sum += c->pull[i] * rounded_weights(h, target, j);
        store(grad_x + j, h->width - j, target == h->ignored ? all(0.0f) : sum);
    }
}

/* x / (1 + r) of the chunk as a right operand. */
static Tiles scaled_rows(const Head *h, const Chunk *c) {
    const bf16 *x = h->rows + c->start * h->d;
    for (long i = 0; i < c->rows; i++)
        for (long j = 0; j < h->d; j += LANES)
            store_bf16(c->scaled + i * h->d + j, LANES,
                       (i < c->count ? c->share[i] : 0.0f) * load_bf16(x + i * h->d + j, LANES, 0.0f));
    return tiles_of(c->rows, h->d, c->scaled, h->d, c->pairs);
}

/* What the chunk gives to the weights of one group. */
static void add_to_weights(const Head *h, const Chunk *c, long group, Tiles scaled) {
    const Words words = words_of(h, group);
    for (long column = words.first; column < words.end; column += COLUMNS) {
        const long n = smaller(COLUMNS, h->v - column);
        transpose(c->rows, n, h->exponentials + column * ROWS, n, c->transposed, c->rows);
        multiply(n, h->d, c->rows, c->transposed, c->rows, scaled, h->sum_weight + column * h->d, h->d, c->start > 0);
    }
    for (long i = 0; i < c->count; i++) {
        const int64_t target = h->targets[c->start + i];
        if (c->pull[i] == 0.0f || target < words.first || target >= words.end) continue;
        const bf16 *x = h->rows + (c->start + i) * h->d;
        float *sum = h->sum_weight + target * h->d;
        for (long j = 0; j < h->d; j += LANES)
            store(sum + j, LANES, load(sum + j, LANES, 0.0f) + c->pull[i] * load_bf16(x + j, LANES, 0.0f));
    }
}

/* Nats and gradients of all tokens: every thread of a team runs this, and they share the loops. Nobody waits for others
 * but before the sums of all groups are added. */
static void run(const Head *h, long tokens, Chunk *c, Parts *both, float *restrict nats, float *restrict grad_x) {
#pragma omp for schedule(static)
    for (long column = 0; column < h->v; column += COLUMNS) pack_weights(h, column, c->transposed);
#pragma omp for schedule(static)
    for (long t = 0; t < padded(tokens); t++) begin_row(h, tokens, t);
    for (long chunk = 0; chunk * ROWS < tokens; chunk++) {
        Parts *parts = both + chunk % 2;
        c->start = chunk * ROWS;
        c->count = smaller(ROWS, tokens - c->start), c->rows = padded(c->count);
        exponentials_of_chunk(h, c, parts);
        for (long i = 0; i < c->count; i++) finish_sum(h, c, i);
#pragma omp for schedule(static) nowait
        for (long i = 0; i < c->count; i++) {
            nats[c->start + i] = c->nats[i];
            if (h->plain) finish_row(h, c, i, parts, grad_x + (c->start + i) * h->width);
        }
        if (!h->plain) continue;
        const Tiles scaled = scaled_rows(h, c);
#pragma omp for schedule(static) nowait /* each thread has the exponentials of the same groups as above in its cache */
        for (long group = 0; group < GROUPS; group++) add_to_weights(h, c, group, scaled);
    }
}

/* Nats (T): logsumexp of a token's logits minus that of its target, 0 where the target is `ignored`, NaN where it is no
 * word. Unless grad_x is NULL, the gradients of their sum too: grad_x (T, D) and grad_weight (V, D). 1: no memory. */
int head(long tokens, long width, long vocabulary, const bf16 *x, const float *weight, const int64_t *targets,
         long ignored, float *restrict nats, float *restrict grad_x, float *restrict grad_weight) {
    const long d = padded(width), v = padded(vocabulary), grad = grad_x != NULL;
    const int exact = d == width && v == vocabulary; /* sums need no room of their own */
    Scratch shared = {0};
    Head h = {width, vocabulary, d, v, ignored, x, weight, targets};
    h.turned = room_for(&shared, v * d / 2, sizeof(uint32_t));
    h.plain = grad ? room_for(&shared, v * d / 2, sizeof(uint32_t)) : NULL;
    h.rows = room_for(&shared, padded(tokens) * d, sizeof(bf16));
    h.target = room_for(&shared, padded(tokens), sizeof(float));
    h.exponentials = room_for(&shared, ROWS * v, sizeof(bf16));
    h.sum_weight = exact ? grad_weight : room_for(&shared, grad * v * d, sizeof(float));
    Parts *parts = room_for(&shared, 2, sizeof(Parts));
    float *sum_x = room_for(&shared, 2 * grad * GROUPS * ROWS * d, sizeof(float));
    if (shared.failed) return release(&shared), 1;
    parts[0].sum_x = sum_x, parts[1].sum_x = sum_x + grad * GROUPS * ROWS * d;

#pragma omp parallel
    {
        Scratch own = {0};
        Chunk c = {.logits = room_for(&own, ROWS * LOGITS, sizeof(float)),
                   .scaled = room_for(&own, ROWS * d, sizeof(bf16)),
                   .transposed = room_for(&own, COLUMNS * (d > ROWS ? d : ROWS), sizeof(bf16)),
                   .pairs = room_for(&own, ROWS * d / 2, sizeof(uint32_t))};
        if (own.failed) {
#pragma omp atomic write
            shared.failed = 1;
        }
#pragma omp barrier
        if (!shared.failed) {
            tiles_begin();
            run(&h, tokens, &c, parts, nats, grad_x);
            tiles_end();
        }
        release(&own);
    }
    if (!shared.failed && grad && !exact) unpad(vocabulary, width, h.sum_weight, d, grad_weight);
    const int failed = shared.failed;
    return release(&shared), failed;
}
