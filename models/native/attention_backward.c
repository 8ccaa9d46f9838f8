/* The backward pass of attention.c: scores and their gradients are transposed there too. */
#include "attention.h"

/* Working memory of one thread: keys (S, C), also transposed, values (S, W), and the sums of their gradients; a block
 * of queries of every head of the group, below each other. */
typedef struct {
    Scratch scratch;
    bf16 *key, *key_turned, *value, *query, *grad_out, *out, *probabilities, *grad_scores, *narrowed, *turned;
    uint32_t *query_turned, *grad_turned, *query_pairs, *grad_pairs, *score_pairs, *seen;
    float *sum_key, *sum_value, *result; /* result (heads of the group, C, BLOCK) */
    Lanes *log_sum, *mean, *scale;       /* of every head of the group, and one factor for all */
} Backward;

static Backward backward_memory(Shape z) {
    Backward b = {.scratch = {{0}}};
    const long rows = z.group * BLOCK;
    b.key = take(&b.scratch, z.s * z.c, sizeof(bf16));
    b.key_turned = take(&b.scratch, z.c * (z.s + BLOCK), sizeof(bf16));
    b.value = take(&b.scratch, z.s * z.w, sizeof(bf16));
    b.query = take(&b.scratch, rows * z.c, sizeof(bf16));
    b.grad_out = take(&b.scratch, rows * z.w, sizeof(bf16));
    b.out = take(&b.scratch, BLOCK * z.w, sizeof(bf16));
    b.probabilities = take(&b.scratch, KEYS * rows, sizeof(bf16));
    b.grad_scores = take(&b.scratch, KEYS * rows, sizeof(bf16));
    b.narrowed = take(&b.scratch, z.c * BLOCK, sizeof(bf16));
    b.turned = take(&b.scratch, z.c * BLOCK, sizeof(bf16));
    b.query_turned = take(&b.scratch, rows * z.c / 2, sizeof(uint32_t));
    b.grad_turned = take(&b.scratch, rows * z.w / 2, sizeof(uint32_t));
    b.query_pairs = take(&b.scratch, rows * z.c / 2, sizeof(uint32_t));
    b.grad_pairs = take(&b.scratch, rows * z.w / 2, sizeof(uint32_t));
    b.score_pairs = take(&b.scratch, KEYS * BLOCK / 2, sizeof(uint32_t));
    b.seen = take(&b.scratch, z.s, sizeof(uint32_t));
    b.sum_key = take(&b.scratch, z.s * z.c, sizeof(float));
    b.sum_value = take(&b.scratch, z.s * z.w, sizeof(float));
    b.result = take(&b.scratch, rows * z.c, sizeof(float));
    b.log_sum = take(&b.scratch, (2 * z.group + 1) * COLUMNS, sizeof(Lanes));
    b.mean = b.log_sum + z.group * COLUMNS, b.scale = b.mean + z.group * COLUMNS;
    return b;
}

/* BLOCK keys and values and a block of queries -> their probabilities p and the gradients of the scores without their
 * scale, p (dp - mean): both as rows of keys, `stride` values apart, the latter also as right operand from `at` on. */
INLINE void gradients(long c, long w, const bf16 *key, const bf16 *value, Tiles query, Tiles grad_out, float factor,
                      const Lanes *log_sum, const Lanes *mean, int masked, const uint32_t *seen,
                      bf16 *probabilities, bf16 *grad_scores, long stride, uint32_t *pairs, long at) {
    for (long row = 0; row < BLOCK; row += STEP) {
        Lanes p[STEP * COLUMNS], dp[STEP * COLUMNS];
        multiply_lanes(c, key + row * c, c, query, p);
#pragma GCC unroll 8
        for (long i = 0; i < STEP; i++)
            for (long column = 0; column < COLUMNS; column++) {
                Lanes *x = p + i * COLUMNS + column;
                *x = power_of_two(*x * factor - log_sum[column]);
                if (masked) *x = where(seen[row + i] >> column * LANES, *x, all(0.0f));
                store_bf16(probabilities + (row + i) * stride + column * LANES, LANES, *x);
            }
        multiply_lanes(w, value + row * w, w, grad_out, dp);
#pragma GCC unroll 8
        for (long i = 0; i < STEP; i += 2)
            for (long column = 0; column < COLUMNS; column++) {
                const long place = i * COLUMNS + column;
                const Lanes first = p[place] * (dp[place] - mean[column]);
                const Lanes second = p[place + COLUMNS] * (dp[place + COLUMNS] - mean[column]);
                store_bf16(grad_scores + (row + i) * stride + column * LANES, LANES, first);
                store_bf16(grad_scores + (row + i + 1) * stride + column * LANES, LANES, second);
                store_pairs(pairs + place_of(at + row + i, column), first, second);
            }
    }
}

/* The block of queries of one head of the group: operands, log-sums, and the mean of dp over p, which is dO O. */
static void load_queries(const Backward *b, Shape z, Queries block, long head, const bf16 *query, const bf16 *out,
                         const bf16 *grad_out, const float *log_sums) {
    bf16 *rows = b->query + head * BLOCK * z.c, *grad_rows = b->grad_out + head * BLOCK * z.w;
    float *log_sum = (float *)(b->log_sum + head * COLUMNS), *mean = (float *)(b->mean + head * COLUMNS);
    pad(block.count, z.width, query + block.start * z.width, z.width, rows);
    pad(block.count, z.value_width, grad_out + block.start * z.heads * z.value_width, z.heads * z.value_width,
        grad_rows);
    pad(block.count, z.value_width, out + block.start * z.heads * z.value_width, z.heads * z.value_width, b->out);
    tiles_of_transpose(BLOCK, z.c, rows, b->query_turned + head * BLOCK * z.c / 2);
    const Tiles turned = tiles_of_transpose(BLOCK, z.w, grad_rows, b->grad_turned + head * BLOCK * z.w / 2);
    for (long row = 0; row < BLOCK; row += STEP) {
        Lanes products[STEP * COLUMNS]; /* in the order of dp, which a query with a single key makes an exact 0 */
        multiply_lanes(z.w, b->out + row * z.w, z.w, turned, products);
        for (long i = 0; i < STEP; i++) mean[row + i] = ((float *)products)[i * BLOCK + row + i];
    }
    memset(log_sum, 0, BLOCK * sizeof(float));
    memcpy(log_sum, log_sums + block.start, block.count * sizeof(float));
}

/* Gradients of a block of queries of every head of the group; adds to those of keys and values. */
static void block_backward(const Backward *b, Shape z, Queries block) {
    const long rows = z.group * BLOCK;
    const Tiles queries = tiles_of(rows, z.c, b->query, z.c, b->query_pairs);
    const Tiles grads = tiles_of(rows, z.w, b->grad_out, z.w, b->grad_pairs);
    const Tiles grad_scores = {b->score_pairs, KEYS / BLOCK};
    const float factor = z.scale * LOG2_E;
    for (long key = block.first; key < block.end; key += KEYS) {
        const long count = smaller(KEYS, block.end - key);
        for (long head = 0; head < z.group; head++) {
            const Tiles query = {b->query_turned + head * BLOCK * z.c / 2, z.c / BLOCK};
            const Tiles grad = {b->grad_turned + head * BLOCK * z.w / 2, z.w / BLOCK};
            const Lanes *log_sum = b->log_sum + head * COLUMNS, *mean = b->mean + head * COLUMNS;
            for (long at = 0; at < count; at += BLOCK) {
                const bf16 *keys = b->key + (key + at) * z.c, *values = b->value + (key + at) * z.w;
                const uint32_t *seen = block.seen + key + at;
                bf16 *p = b->probabilities + at * rows + head * BLOCK, *d = b->grad_scores + at * rows + head * BLOCK;
                if (all_seen(seen))
                    gradients(z.c, z.w, keys, values, query, grad, factor, log_sum, mean, 0, NULL, p, d, rows,
                              b->score_pairs, at);
                else
                    gradients(z.c, z.w, keys, values, query, grad, factor, log_sum, mean, 1, seen, p, d, rows,
                              b->score_pairs, at);
            }
            multiply(z.c, BLOCK, count, b->key_turned + key, z.s + BLOCK, grad_scores, b->result + head * z.c * BLOCK,
                     BLOCK, key > block.first);
        }
        multiply(count, z.w, rows, b->probabilities, rows, grads, b->sum_value + key * z.w, z.w, 1);
        multiply(count, z.c, rows, b->grad_scores, rows, queries, b->sum_key + key * z.c, z.c, 1);
    }
}

/* All queries of one sequence that share a key head. */
static void attend_backward(const Backward *b, Shape z, const bf16 *query, const bf16 *key, const bf16 *value,
                            const int64_t *ids, const bf16 *out, const float *log_sums, const bf16 *grad_out,
                            bf16 *grad_query, bf16 *grad_key, bf16 *grad_value) {
    pad(z.seq, z.width, key, z.width, b->key);
    pad(z.seq, z.value_width, value, z.value_width, b->value);
    transpose(z.s, z.c, b->key, z.c, b->key_turned, z.s + BLOCK);
    memset(b->sum_key, 0, z.s * z.c * sizeof(float));
    memset(b->sum_value, 0, z.s * z.w * sizeof(float));
    for (long i = 0; i < COLUMNS; i++) b->scale[i] = all(z.scale);
    for (long start = 0; start < z.seq; start += BLOCK) {
        const Queries block = queries_from(start, z.seq, ids, b->seen);
        for (long head = 0; head < z.group; head++)
            load_queries(b, z, block, head, query + head * z.seq * z.width, out + head * z.value_width,
                         grad_out + head * z.value_width, log_sums + head * z.seq);
        block_backward(b, z, block);
        for (long head = 0; head < z.group; head++)
            rows_of_columns(block.count, z.c, z.width, b->result + head * z.c * BLOCK, b->scale, b->narrowed, b->turned,
                            grad_query + (head * z.seq + start) * z.width, z.width);
    }
    for (long i = 0; i < z.seq; i++) {
        narrow_row(z.width, z.scale, b->sum_key + i * z.c, grad_key + i * z.width);
        narrow_row(z.value_width, 1.0f, b->sum_value + i * z.w, grad_value + i * z.value_width);
    }
}

/* out of the forward pass and grad_out (B, S, H, W) -> gradients like query, key and value. 1: no memory. */
int attention_backward(long batch, long heads, long kv_heads, long seq, long width, long value_width, float divisor,
                       const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *ids, const bf16 *out,
                       const float *log_sums, const bf16 *grad_out, bf16 *restrict grad_query,
                       bf16 *restrict grad_key, bf16 *restrict grad_value) {
    const Shape z = shape_of(heads, kv_heads, seq, width, value_width, divisor);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Backward b = backward_memory(z);
        failed = b.scratch.failed;
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (long part = 0; part < batch * kv_heads; part++) {
            if (failed) continue;
            const long sequence = part / kv_heads, head = part % kv_heads * z.group;
            const long queries = part * z.group * seq * width, outs = (sequence * seq * heads + head) * value_width;
            const long keys = part * seq * width, values = part * seq * value_width;
            attend_backward(&b, z, query + queries, key + keys, value + values, ids + sequence * seq, out + outs,
                            log_sums + part * z.group * seq, grad_out + outs, grad_query + queries, grad_key + keys,
                            grad_value + values);
        }
        tiles_end();
        release(&b.scratch);
    }
    return failed;
}
