/* How the experts' work is cut into parts for threads, and in which order their results are added. */
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "expert_rows.h"

/* Rows of an expert that one thread takes at a time. A part has sums of its own for the gradients of the weights, so
 * there are at most MOST_PARTS more of them than experts. Constants: the sums must not depend on the threads. */
enum { PART = 1024, MOST_PARTS = 16 };

/* Rows of a part that are multiplied at a time: with the weights they fill half of a 1 MiB second-level cache. */
enum { ROWS = 256 };

/* T tokens, K experts per token, E experts, D model width, F expert width. */
typedef struct {
    long tokens, top_k, experts, width, hidden_width;
    long d, f, g;         /* D, F and 2 F, padded */
    long in, out;         /* weights of an expert: D 2F, F D */
    const bf16 *x;        /* (T, D) */
    const float *weights; /* (T, K) */
    const float *gate_up; /* (E, D, 2F) */
    const float *down;    /* (E, F, D) */
} Layer;

/* Some or all pairs (token, k) of an expert. */
typedef struct {
    long expert, first, count; /* pairs[first] to pairs[first + count] */
    long sum;                  /* 0: the first part of its expert; otherwise 1, 2, ... over all experts */
} Part;

typedef struct {
    int32_t *pairs, *tokens; /* (T K,): t K + k in the order of the experts, and t */
    Part *parts;             /* the largest first */
    long num_parts, num_sums;
} Order;

static int by_size(const void *left, const void *right) {
    const Part *a = left, *b = right;
    if (a->count != b->count) return a->count < b->count ? 1 : -1;
    return a->first != b->first ? (a->first > b->first) - (a->first < b->first) : (int)(a->expert - b->expert);
}

/* Check `scratch` before using the result. */
static Order order_of(Scratch *scratch, const Layer *layer, const int64_t *ids) {
    const long count = layer->tokens * layer->top_k, experts = layer->experts;
    const long most = count > PART * MOST_PARTS ? padded((count + MOST_PARTS - 1) / MOST_PARTS) : PART;
    long *first = take(scratch, experts + 1, sizeof(long));
    Order order = {take(scratch, count, sizeof(int32_t)), take(scratch, count, sizeof(int32_t)),
                   take(scratch, experts + count / most, sizeof(Part)), 0, 0};
    if (scratch->failed) return order;
    for (long i = 0; i < count; i++) first[ids[i] + 1]++;
    for (long e = 0; e < experts; e++) first[e + 1] += first[e];
    for (long e = 0; e < experts; e++) {
        long at = first[e];
        do { /* one part, without rows, for an idle expert */
            const long rows = smaller(most, first[e + 1] - at);
            order.parts[order.num_parts++] = (Part){e, at, rows, at == first[e] ? 0 : ++order.num_sums};
            at += rows;
        } while (at < first[e + 1]);
    }
    for (long token = 0, i = 0; token < layer->tokens; token++)
        for (long k = 0; k < layer->top_k; k++, i++) {
            const long at = first[ids[i]]++;
            order.pairs[at] = (int32_t)i;
            order.tokens[at] = (int32_t)token;
        }
    qsort(order.parts, order.num_parts, sizeof(Part), by_size);
    return order;
}

/* Rows of each step through a part: equal ones, since one of few rows costs nearly as much as one of many. */
static inline long step_of(const Part *part) {
    const long steps = (part->count + ROWS - 1) / ROWS;
    return padded((part->count + steps - 1) / steps);
}

/* The weights of the part that this thread probably takes next. */
static inline void will_use_weights(Ahead *ahead, const Layer *layer, const Order *order, const Part *part) {
    long after = part - order->parts + 1;
#ifdef _OPENMP
    after += omp_get_num_threads() - 1;
#endif
    if (after >= order->num_parts || order->parts[after].expert == part->expert) return;
    will_use(ahead, layer->gate_up + order->parts[after].expert * layer->in, layer->in * sizeof(float));
    will_use(ahead, layer->down + order->parts[after].expert * layer->out, layer->out * sizeof(float));
}

/* Rows of `bytes` bytes at the tokens' places. */
static inline void will_use_rows(Ahead *ahead, long count, const int32_t *tokens, const void *source, long bytes) {
    for (long i = 0; i < count; i++) will_use(ahead, (const char *)source + tokens[i] * bytes, bytes);
}

/* The sum over a token's experts, in the order of the parts whatever thread computes them: a finished part is added by
 * the thread that finds all before it added; no thread waits for another. */
typedef struct {
    float *out;    /* (T, D) */
    int straight;  /* one expert for every token: its results are written, or added, in their places at once */
    int add;       /* to what `out` holds */
    float **rows;  /* (parts,) of finished parts: (count, d) */
    long next;     /* part to be added */
    int busy;      /* a thread is adding */
} Results;

/* Check `scratch` before using the result. */
static Results results_of(Scratch *scratch, const Layer *layer, const Order *order, int add, float *out) {
    const int straight =
        layer->experts == 1 && layer->top_k == 1 && layer->d == layer->width && layer->tokens % BLOCK == 0;
    if (!straight && !add && !scratch->failed) memset(out, 0, layer->tokens * layer->width * sizeof(float));
    return (Results){out, straight, straight && add, take(scratch, order->num_parts, sizeof(float *)), 0, 0};
}

/* Where the results of a part go, at `rows` (count padded, d). A part whose turn it is has room for one step, which is
 * added to `out` while it is in the cache; another has room for all its rows. */
typedef struct {
    float *rows; /* NULL: no memory left */
    int turn;
} Sink;

static inline Sink sink_of(Results *results, const Layer *layer, const Order *order, const Part *part, float *step) {
    if (results->straight) return (Sink){results->out + part->first * layer->d, 0};
    int turn = 0;
#pragma omp critical
    if (!results->busy && results->next == part - order->parts) turn = results->busy = 1;
    return (Sink){turn ? step : aligned_alloc(64, (part->count + BLOCK) * layer->d * sizeof(float)), turn};
}

/* Memory for the results from row `start` of a part. */
static inline float *rows_from(Sink sink, const Layer *layer, long start) {
    return sink.turn ? sink.rows : sink.rows + start * layer->d;
}

/* Next part that this thread adds, having added `done`; num_parts: none. */
static inline long next_turn(Results *results, const Order *order, long done) {
    long next = order->num_parts;
#pragma omp critical
    {
        results->rows[done] = NULL;
        results->next = done + 1;
        if (done + 1 < next && results->rows[done + 1]) next = done + 1;
        results->busy = next < order->num_parts;
    }
    return next;
}

static void finish(Results *results, const Layer *layer, const Order *order, const Part *part, Sink sink) {
    const long last = order->num_parts;
    if (results->straight) return;
    long next = last;
    if (sink.turn) {
        next = next_turn(results, order, part - order->parts);
    } else {
#pragma omp critical
        {
            results->rows[part - order->parts] = sink.rows;
            if (!results->busy && results->next == part - order->parts) next = results->next, results->busy = 1;
        }
    }
    for (; next < last; next = next_turn(results, order, next)) {
        const Part *done = order->parts + next;
        scatter(done->count, order->tokens + done->first, layer->width, results->rows[next], results->out);
        free(results->rows[next]);
    }
}

/* Where memory ran out. */
static inline void free_unfinished(const Results *results, const Order *order) {
    for (long i = 0; i < order->num_parts; i++) free(results->rows[i]);
}
