/* softmax(q k^T / sqrt(C) + bias) v, block of queries by block of queries: scores exist only in the cache.
 * Definition: models/attention.py, `scaled_dot_product_attention` with a mask. The log-sum-exp of every query is kept
 * and the probabilities computed again in the backward pass (Dao et al. 2022, arXiv 2205.14135).
 *
 * B sequences, H query heads of which H / H_kv share a key head, S positions, C head width. query (B, H, S, C), key and
 * value (B, H_kv, S, C), bias (B, S, S) causal: keys after the last query of a block are left out.
 */
#include "tiles.h"

/* source (count, columns), rows `stride` apart -> result (padded count, padded columns), zeros around it. */
static void pad(long count, long columns, const bf16 *source, long stride, bf16 *restrict result) {
    memset(result, 0, padded(count) * padded(columns) * sizeof(bf16));
    for (long row = 0; row < count; row++)
        memcpy(result + row * padded(columns), source + row * stride, columns * sizeof(bf16));
}

/* Scores of one query to the keys before `end` -> scaled, biased, and minus infinity in the padding after `valid`. */
static inline void mask_scores(long valid, long end, float scale, const bf16 *bias, float *restrict scores) {
    for (long i = 0; i < valid; i++) scores[i] = scores[i] * scale + widen(bias[i]);
    for (long i = valid; i < end; i++) scores[i] = -INFINITY;
}

/* e^(score - shift), exactly 0 for a masked key. */
static inline float probability(float score, float shift) {
    return score == -INFINITY ? 0.0f : exponential(score - shift);
}

/* out (B, S, H, C), log_sum_exp (B, H, S). 1: no memory. */
int attention_forward(long batch, long heads, long kv_heads, long seq, long width, const bf16 *query, const bf16 *key,
                      const bf16 *value, const bf16 *bias, bf16 *restrict out, float *restrict log_sum_exp) {
    const long s = padded(seq), c = padded(width), group = heads / kv_heads;
    const float scale = 1.0f / sqrtf((float)width);
    Scratch scratch = {0};
    bf16 *room = take(&scratch, s * c, sizeof(bf16)), *rows = take(&scratch, BLOCK * c, sizeof(bf16));
    bf16 *probabilities = take(&scratch, BLOCK * s, sizeof(bf16));
    uint32_t *key_back = take(&scratch, s * c / 2, sizeof(uint32_t)); /* of the transpose */
    uint32_t *value_pairs = take(&scratch, s * c / 2, sizeof(uint32_t));
    float *scores = take(&scratch, BLOCK * s, sizeof(float)), *result = take(&scratch, BLOCK * c, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    Tiles key_turned, value_tiles;
    tiles_begin();
    for (long head = 0; head < batch * heads; head++) {
        const long sequence = head / heads, kv_head = head / group;
        if (head % group == 0) {
            pad(seq, width, key + kv_head * seq * width, width, room);
            key_turned = tiles_of_transpose(s, c, room, key_back);
            pad(seq, width, value + kv_head * seq * width, width, room);
            value_tiles = tiles_of(s, c, room, c, value_pairs);
        }
        for (long start = 0; start < seq; start += BLOCK) {
            const long count = seq - start < BLOCK ? seq - start : BLOCK, end = start + BLOCK;
            const long valid = start + count;
            pad(count, width, query + (head * seq + start) * width, width, rows);
            multiply(BLOCK, end, c, rows, c, key_turned, scores, end, 0);
            for (long i = 0; i < count; i++) {
                float *score = scores + i * end, sum = 0.0f;
                mask_scores(valid, end, scale, bias + (sequence * seq + start + i) * seq, score);
                const float max = greatest(end, score);
                for (long j = 0; j < end; j++) sum += score[j] = probability(score[j], max);
                const float factor = 1.0f / sum;
                for (long j = 0; j < end; j++) probabilities[i * end + j] = narrow(score[j] * factor);
                log_sum_exp[head * seq + start + i] = max + logf(sum);
            }
            multiply(BLOCK, c, end, probabilities, end, value_tiles, result, c, 0);
            for (long i = 0; i < count; i++) {
                bf16 *to = out + ((sequence * seq + start + i) * heads + head % heads) * width;
                for (long j = 0; j < width; j++) to[j] = narrow(result[i * c + j]);
            }
        }
    }
    tiles_end();
    return release(&scratch), 0;
}

/* Sums (C, S) of a transposed gradient -> bf16 (S, C). */
static void narrow_transposed(long seq, long width, const float *sums, bf16 *restrict result) {
    for (long row = 0; row < seq; row++)
        for (long i = 0; i < width; i++) result[row * width + i] = narrow(sums[i * padded(seq) + row]);
}

/* grad_out (B, S, H, C) -> gradients like query, key and value. 1: no memory. */
int attention_backward(long batch, long heads, long kv_heads, long seq, long width, const bf16 *query, const bf16 *key,
                       const bf16 *value, const bf16 *bias, const float *log_sum_exp, const bf16 *grad_out,
                       bf16 *restrict grad_query, bf16 *restrict grad_key, bf16 *restrict grad_value) {
    const long s = padded(seq), c = padded(width), group = heads / kv_heads;
    const float scale = 1.0f / sqrtf((float)width);
    Scratch scratch = {0};
    bf16 *room = take(&scratch, s * c, sizeof(bf16));
    uint32_t *key_back = take(&scratch, s * c / 2, sizeof(uint32_t)); /* of the transpose, as value_back */
    uint32_t *value_back = take(&scratch, s * c / 2, sizeof(uint32_t));
    uint32_t *key_pairs = take(&scratch, s * c / 2, sizeof(uint32_t));
    bf16 *rows = take(&scratch, BLOCK * c, sizeof(bf16)), *grad_rows = take(&scratch, BLOCK * c, sizeof(bf16));
    bf16 *turned = take(&scratch, BLOCK * c, sizeof(bf16));
    bf16 *narrowed = take(&scratch, 2 * BLOCK * s, sizeof(bf16)), *grad_scores = narrowed + BLOCK * s;
    uint32_t *right = take(&scratch, BLOCK * s / 2, sizeof(uint32_t));
    float *scores = take(&scratch, BLOCK * s, sizeof(float)), *products = take(&scratch, BLOCK * s, sizeof(float));
    float *result = take(&scratch, BLOCK * c, sizeof(float));
    float *sum_key = take(&scratch, c * s, sizeof(float)), *sum_value = take(&scratch, c * s, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    Tiles key_turned, value_turned, key_tiles;
    tiles_begin();
    for (long head = 0; head < batch * heads; head++) {
        const long sequence = head / heads, kv_head = head / group;
        if (head % group == 0) {
            pad(seq, width, value + kv_head * seq * width, width, room);
            value_turned = tiles_of_transpose(s, c, room, value_back);
            pad(seq, width, key + kv_head * seq * width, width, room);
            key_turned = tiles_of_transpose(s, c, room, key_back);
            key_tiles = tiles_of(s, c, room, c, key_pairs);
            memset(sum_key, 0, c * s * sizeof(float));
            memset(sum_value, 0, c * s * sizeof(float));
        }
        for (long start = 0; start < seq; start += BLOCK) {
            const long count = seq - start < BLOCK ? seq - start : BLOCK, end = start + BLOCK;
            const long valid = start + count;
            pad(count, width, query + (head * seq + start) * width, width, rows);
            pad(count, width, grad_out + ((sequence * seq + start) * heads + head % heads) * width, heads * width,
                grad_rows);
            multiply(BLOCK, end, c, rows, c, key_turned, scores, end, 0);
            multiply(BLOCK, end, c, grad_rows, c, value_turned, products, end, 0);
            for (long i = 0; i < count; i++) {
                float *score = scores + i * end, *product = products + i * end, dot = 0.0f;
                const float shift = log_sum_exp[head * seq + start + i];
                mask_scores(valid, end, scale, bias + (sequence * seq + start + i) * seq, score);
                for (long j = 0; j < end; j++) {
                    float p = probability(score[j], shift);
                    narrowed[i * end + j] = narrow(p);
                    dot += p * product[j];
                    score[j] = p;
                }
                for (long j = 0; j < end; j++)
                    grad_scores[i * end + j] = narrow(score[j] * (product[j] - dot) * scale);
            }
            memset(narrowed + count * end, 0, (BLOCK - count) * end * sizeof(bf16));
            memset(grad_scores + count * end, 0, (BLOCK - count) * end * sizeof(bf16));

            multiply(BLOCK, c, end, grad_scores, end, key_tiles, result, c, 0);
            for (long i = 0; i < count; i++)
                for (long j = 0; j < width; j++)
                    grad_query[(head * seq + start + i) * width + j] = narrow(result[i * c + j]);
            transpose(BLOCK, c, rows, turned, BLOCK);
            multiply(c, end, BLOCK, turned, BLOCK, tiles_of(BLOCK, end, grad_scores, end, right), sum_key, s, 1);
            transpose(BLOCK, c, grad_rows, turned, BLOCK);
            multiply(c, end, BLOCK, turned, BLOCK, tiles_of(BLOCK, end, narrowed, end, right), sum_value, s, 1);
        }
        if (head % group == group - 1) {
            narrow_transposed(seq, width, sum_key, grad_key + kv_head * seq * width);
            narrow_transposed(seq, width, sum_value, grad_value + kv_head * seq * width);
        }
    }
    tiles_end();
    return release(&scratch), 0;
}
