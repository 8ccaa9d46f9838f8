/* softmax(q k^T / divisor + bias) v, block of queries by block of queries: scores exist only in the cache.
 * Definition: models/softmax_attention.py, `scaled_dot_product_attention` with a mask. The log-sum-exp of every query
 * is kept and the probabilities computed again in the backward pass (Dao et al. 2022, arXiv 2205.14135).
 *
 * B sequences, H query heads of which H / H_kv share a key head, S positions, C width of a query or key, W width of a
 * value. query (B, H, S, C), key (B, H_kv, S, C), value (B, H_kv, S, W), bias (B, S, S) causal: keys after the last
 * query of a block are left out.
 */
#include "tiles.h"

static inline long larger(long a, long b) { return a > b ? a : b; }

/* The same as a right operand; `room` holds the padded rows. */
static Tiles padded_tiles(long count, long columns, const bf16 *source, bf16 *room, uint32_t *restrict pairs) {
    pad(count, columns, source, columns, room);
    return tiles_of(padded(count), padded(columns), room, padded(columns), pairs);
}

/* Its transpose as a right operand. */
static Tiles padded_tiles_of_transpose(long count, long columns, const bf16 *source, bf16 *room,
                                       uint32_t *restrict pairs) {
    pad(count, columns, source, columns, room);
    return tiles_of_transpose(padded(count), padded(columns), room, pairs);
}

/* A block of queries, from `start` on: `count` of them, which see no key after the first `valid`, padded to `end`. */
typedef struct {
    long start, count, valid, end;
} Queries;

static inline Queries queries_from(long start, long seq) {
    const long count = seq - start < BLOCK ? seq - start : BLOCK;
    return (Queries){start, count, start + count, start + BLOCK};
}

/* Products of one query with its keys -> scores, minus infinity in the padding. Returns the greatest. */
static inline float scores_row(Queries block, float scale, const bf16 *bias, float *restrict score) {
    Lanes max = all(-INFINITY);
    for (long j = 0; j < block.end; j += LANES) {
        const Lanes s = load(score + j, LANES, 0.0f) * scale + load_bf16(bias + j, block.valid - j, -INFINITY);
        store(score + j, LANES, s);
        max = greater(max, s);
    }
    return greatest_of(max);
}

/* Scores of one query -> e^(score - max). Returns the sum. */
static inline float exponential_row(long count, const float *score, float max, bf16 *restrict result) {
    Lanes sum = all(0.0f);
    for (long j = 0; j < count; j += LANES) {
        const Lanes p = exponential_of(load(score + j, LANES, 0.0f) - max);
        sum += p;
        store_bf16(result + j, LANES, p);
    }
    return sum_of(sum);
}

/* Products of one query with its keys, and the gradient of the probabilities -> these and the gradient of the scores. */
static inline void softmax_row_backward(Queries block, float scale, const bf16 *bias, float log_sum_exp,
                                        float *restrict score, const float *restrict grad,
                                        bf16 *restrict probabilities, bf16 *restrict grad_scores) {
    Lanes dot = all(0.0f);
    for (long j = 0; j < block.end; j += LANES) {
        const Lanes s = load(score + j, LANES, 0.0f) * scale + load_bf16(bias + j, block.valid - j, -INFINITY);
        const Lanes p = exponential_of(s - log_sum_exp);
        dot += p * load(grad + j, LANES, 0.0f);
        store(score + j, LANES, p);
        store_bf16(probabilities + j, LANES, p);
    }
    const float mean = sum_of(dot);
    for (long j = 0; j < block.end; j += LANES)
        store_bf16(grad_scores + j, LANES,
                   load(score + j, LANES, 0.0f) * (load(grad + j, LANES, 0.0f) - mean) * scale);
}

/* out (B, S, H, W), log_sum_exp (B, H, S). 1: no memory. */
int attention_forward(long batch, long heads, long kv_heads, long seq, long width, long value_width, float divisor,
                      const bf16 *query, const bf16 *key, const bf16 *value, const bf16 *bias, bf16 *restrict out,
                      float *restrict log_sum_exp) {
    const long s = padded(seq), c = padded(width), w = padded(value_width), group = heads / kv_heads;
    const float scale = 1.0f / divisor;
    Scratch scratch = {0};
    bf16 *room = take(&scratch, s * larger(c, w), sizeof(bf16)), *rows = take(&scratch, BLOCK * c, sizeof(bf16));
    bf16 *exponentials = take(&scratch, BLOCK * s, sizeof(bf16));
    uint32_t *key_back = take(&scratch, s * c / 2, sizeof(uint32_t)); /* of the transpose */
    uint32_t *value_pairs = take(&scratch, s * w / 2, sizeof(uint32_t));
    float *scores = take(&scratch, BLOCK * s, sizeof(float)), *result = take(&scratch, BLOCK * w, sizeof(float));
    float sums[BLOCK]; /* of the exponentials of each query */
    if (scratch.failed) return release(&scratch), 1;

    Tiles key_turned, value_tiles;
    tiles_begin();
    for (long head = 0; head < batch * heads; head++) {
        const long sequence = head / heads, kv_head = head / group;
        if (head % group == 0) {
            key_turned = padded_tiles_of_transpose(seq, width, key + kv_head * seq * width, room, key_back);
            value_tiles = padded_tiles(seq, value_width, value + kv_head * seq * value_width, room, value_pairs);
        }
        for (long start = 0; start < seq; start += BLOCK) {
            const Queries block = queries_from(start, seq);
            pad(block.count, width, query + (head * seq + start) * width, width, rows);
            multiply(BLOCK, block.end, c, rows, c, key_turned, scores, block.end, 0);
            for (long i = 0; i < block.count; i++) {
                float *score = scores + i * block.end;
                const float max = scores_row(block, scale, bias + (sequence * seq + start + i) * seq, score);
                sums[i] = exponential_row(block.end, score, max, exponentials + i * block.end);
                log_sum_exp[head * seq + start + i] = max + logf(sums[i]);
            }
            multiply(BLOCK, w, block.end, exponentials, block.end, value_tiles, result, w, 0);
            for (long i = 0; i < block.count; i++)
                narrow_row(value_width, 1.0f / sums[i], result + i * w,
                           out + ((sequence * seq + start + i) * heads + head % heads) * value_width);
        }
    }
    tiles_end();
    return release(&scratch), 0;
}

/* grad_out (B, S, H, W) -> gradients like query, key and value. 1: no memory. */
int attention_backward(long batch, long heads, long kv_heads, long seq, long width, long value_width, float divisor,
                       const bf16 *query, const bf16 *key, const bf16 *value, const bf16 *bias,
                       const float *log_sum_exp, const bf16 *grad_out, bf16 *restrict grad_query,
                       bf16 *restrict grad_key, bf16 *restrict grad_value) {
    const long s = padded(seq), c = padded(width), w = padded(value_width), group = heads / kv_heads;
    const float scale = 1.0f / divisor;
    Scratch scratch = {0};
    bf16 *room = take(&scratch, s * larger(c, w), sizeof(bf16));
    uint32_t *key_back = take(&scratch, s * c / 2, sizeof(uint32_t)); /* of the transpose, as value_back */
    uint32_t *value_back = take(&scratch, s * w / 2, sizeof(uint32_t));
    uint32_t *key_pairs = take(&scratch, s * c / 2, sizeof(uint32_t));
    bf16 *rows = take(&scratch, BLOCK * c, sizeof(bf16)), *grad_rows = take(&scratch, BLOCK * w, sizeof(bf16));
    bf16 *turned = take(&scratch, BLOCK * s, sizeof(bf16));
    bf16 *narrowed = take(&scratch, BLOCK * s, sizeof(bf16)), *grad_scores = take(&scratch, BLOCK * s, sizeof(bf16));
    uint32_t *right = take(&scratch, BLOCK * larger(c, w) / 2, sizeof(uint32_t));
    float *scores = take(&scratch, BLOCK * s, sizeof(float)), *products = take(&scratch, BLOCK * s, sizeof(float));
    float *result = take(&scratch, BLOCK * c, sizeof(float));
    float *sum_key = take(&scratch, c * s, sizeof(float)), *sum_value = take(&scratch, w * s, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    Tiles key_turned, value_turned, key_tiles;
    tiles_begin();
    for (long head = 0; head < batch * heads; head++) {
        const long sequence = head / heads, kv_head = head / group;
        if (head % group == 0) {
            const bf16 *values = value + kv_head * seq * value_width;
            value_turned = padded_tiles_of_transpose(seq, value_width, values, room, value_back);
            key_turned = padded_tiles_of_transpose(seq, width, key + kv_head * seq * width, room, key_back);
            key_tiles = tiles_of(s, c, room, c, key_pairs);
            memset(sum_key, 0, c * s * sizeof(float));
            memset(sum_value, 0, w * s * sizeof(float));
        }
        for (long start = 0; start < seq; start += BLOCK) {
            const Queries block = queries_from(start, seq);
            const long end = block.end, unused = (BLOCK - block.count) * end;
            pad(block.count, width, query + (head * seq + start) * width, width, rows);
            pad(block.count, value_width,
                grad_out + ((sequence * seq + start) * heads + head % heads) * value_width, heads * value_width,
                grad_rows);
            multiply(BLOCK, end, c, rows, c, key_turned, scores, end, 0);
            multiply(BLOCK, end, w, grad_rows, w, value_turned, products, end, 0);
            for (long i = 0; i < block.count; i++)
                softmax_row_backward(block, scale, bias + (sequence * seq + start + i) * seq,
                                     log_sum_exp[head * seq + start + i], scores + i * end, products + i * end,
                                     narrowed + i * end, grad_scores + i * end);
            memset(narrowed + block.count * end, 0, unused * sizeof(bf16));
            memset(grad_scores + block.count * end, 0, unused * sizeof(bf16));

            multiply(BLOCK, c, end, grad_scores, end, key_tiles, result, c, 0);
            for (long i = 0; i < block.count; i++)
                narrow_row(width, 1.0f, result + i * c, grad_query + (head * seq + start + i) * width);
            transpose(BLOCK, end, grad_scores, end, turned, BLOCK);
            multiply(end, c, BLOCK, turned, BLOCK, tiles_of(BLOCK, c, rows, c, right), sum_key, c, 1);
            transpose(BLOCK, end, narrowed, end, turned, BLOCK);
            multiply(end, w, BLOCK, turned, BLOCK, tiles_of(BLOCK, w, grad_rows, w, right), sum_value, w, 1);
        }
        if (head % group == group - 1) {
            for (long i = 0; i < seq; i++) {
                narrow_row(width, 1.0f, sum_key + i * c, grad_key + (kv_head * seq + i) * width);
                narrow_row(value_width, 1.0f, sum_value + i * w, grad_value + (kv_head * seq + i) * value_width);
            }
        }
    }
    tiles_end();
    return release(&scratch), 0;
}
