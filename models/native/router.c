/* DeepSeek-V3's router with its matmul, in one pass each way: sigmoid, the chosen experts, their gate values, load,
 * balance loss and entropy. Definition: models/router.py, `Router.forward`.
 *
 * B sequences of S positions, T = B * S tokens, D their width, E experts, K chosen ones; everything in fp32. A
 * sequence is cut into blocks of TOKENS, the last one filled up; in a block the scores are (E, TOKENS), so that a lane
 * is a token and nothing is compared across lanes.
 */
#include "fp32.h"
#include "tiles.h"

enum { TOKENS = WIDTH };

/* x (count, D) -> its transpose (D, TOKENS), zeros in the columns that are left. */
static void turn_tokens(long count, long width, const float *x, float *restrict turned) {
#ifdef __AVX512BF16__
    for (long token = 0; token < TOKENS; token += 16)
        for (long i = 0; i < width; i += 16) {
            __m512i rows[16];
            for (long j = 0; j < 16; j++)
                rows[j] = (__m512i)load(x + (token + j) * width + i, token + j < count ? width - i : 0, 0.0f);
            turn(rows);
            for (long j = 0; j < smaller(16, width - i); j++)
                store(turned + (i + j) * TOKENS + token, LANES, (Lanes)rows[j]);
        }
#else
    for (long i = 0; i < width; i++)
        for (long token = 0; token < TOKENS; token++)
            turned[i * TOKENS + token] = token < count ? x[token * width + i] : 0.0f;
#endif
}

/* Scores (E, TOKENS) -> of every token the K highest of score + bias, highest first; the lower expert wins a tie. The
 * experts are numbers in fp32. Each expert moves those below its place down by one. */
INLINE void top_k_lanes(long experts, long k, const float *score, const float *bias, Lanes *values, Lanes *ids) {
    for (long j = 0; j < k; j++) values[j] = all(-INFINITY), ids[j] = all(0.0f);
    for (long expert = 0; expert < experts; expert++) {
        Lanes x = load(score + expert * TOKENS, LANES, 0.0f), id = all((float)expert);
        if (bias) x += bias[expert];
        for (long j = k - 1; j > 0; j--) {
            const Lanes value = where_above(x, values[j], x, values[j]), there = where_above(x, values[j], id, ids[j]);
            ids[j] = where_above(x, values[j - 1], ids[j - 1], there);
            values[j] = where_above(x, values[j - 1], values[j - 1], value);
        }
        ids[0] = where_above(x, values[0], id, ids[0]);
        values[0] = where_above(x, values[0], x, values[0]);
    }
}

/* The same for all tokens of a block -> ids (K, TOKENS). `room` (2 K, LANES). */
static void top_k_block(long experts, long k, const float *score, const float *bias, Lanes *room,
                        float *restrict ids) {
    for (long column = 0; column < COLUMNS; column++) {
        if (k == 4) { /* the usual number: all in registers */
            Lanes values[4], found[4];
            top_k_lanes(experts, 4, score + column * LANES, bias, values, found);
            for (long j = 0; j < k; j++) store(ids + j * TOKENS + column * LANES, LANES, found[j]);
        } else {
            top_k_lanes(experts, k, score + column * LANES, bias, room, room + k);
            for (long j = 0; j < k; j++) store(ids + j * TOKENS + column * LANES, LANES, room[k + j]);
        }
    }
}

/* Tokens (D, TOKENS) of a block -> scores (E, TOKENS), their sums, infinite after `count`; adds to `share` (E, LANES)
 * and returns the sum of the entropies. With p = s / sum: -sum p ln p = ln(sum) - sum(s ln s) / sum. */
static double score_block(long count, long width, long experts, const float *weight, const float *turned,
                          float *restrict scores, float *restrict sums, Lanes *restrict share) {
    Lanes total[COLUMNS], products[COLUMNS];
    for (long j = 0; j < COLUMNS; j++) total[j] = products[j] = all(0.0f);
    multiply_fp32(experts, TOKENS, width, (Factors){weight, width, 1, turned, TOKENS}, scores, TOKENS, 0);
    for (long expert = 0; expert < experts; expert++)
        for (long j = 0; j < COLUMNS; j++) {
            float *place = scores + expert * TOKENS + j * LANES;
            const Lanes s = sigmoid_of(load(place, LANES, 0.0f));
            store(place, LANES, s);
            total[j] += s;
            products[j] += s * logarithm_of(s);
        }
    double entropy = 0.0;
    Lanes inverse[COLUMNS];
    for (long j = 0; j < COLUMNS; j++) {
        const long n = count - j * LANES;
        float each[LANES];
        store(each, LANES, logarithm_of(total[j]) - products[j] / total[j]);
        for (long i = 0; i < smaller(LANES, n); i++) entropy += each[i];
        store(sums + j * LANES, LANES, all(INFINITY));
        store(sums + j * LANES, n, total[j]);
        inverse[j] = 1.0f / load(sums + j * LANES, LANES, 0.0f);
    }
    for (long expert = 0; expert < experts; expert++)
        for (long j = 0; j < COLUMNS; j++)
            share[expert] += inverse[j] * load(scores + expert * TOKENS + j * LANES, LANES, 0.0f);
    return entropy;
}

/* Sizes and settings of a call; `blocks` of TOKENS in a sequence. */
typedef struct {
    long seq, width, experts, k, normalize, blocks;
    float scale;
} Shape;

/* The experts of `count` tokens (K, TOKENS) -> ids and weights (count, K), and how often each was chosen. */
static void weigh(Shape z, long count, const float *scores, const float *chosen, int64_t *restrict ids,
                  float *restrict weights, int64_t *restrict counts) {
    for (long t = 0; t < count; t++, ids += z.k, weights += z.k) {
        float sum = 0.0f;
        for (long j = 0; j < z.k; j++) {
            ids[j] = (int64_t)chosen[j * TOKENS + t];
            weights[j] = scores[ids[j] * TOKENS + t];
            sum += weights[j];
            counts[ids[j]]++;
        }
        for (long j = 0; j < z.k; j++) weights[j] *= z.normalize ? z.scale / sum : z.scale;
    }
}

/* x (T, D), weight (E, D), bias (E) -> scores (B, S / TOKENS, E, TOKENS), their sums (B, S / TOKENS, TOKENS), ids and
 * weights (T, K), and of each sequence: counts (B, E) of the chosen experts, even (B, E): how many tokens have the
 * expert among their k highest scores *without* bias, share (B, E): the sum over its tokens of s / sum, and the sum
 * over tokens of the entropy of these shares (B). counts and even must be 0. 1: no memory. */
int router_forward(long batch, long seq, long width, long experts, long k, float scale, long normalize, const float *x,
                   const float *weight, const float *bias, float *restrict scores, float *restrict sums, int64_t *ids,
                   float *restrict weights, int64_t *counts, float *restrict even, float *restrict share,
                   double *restrict entropy) {
    const Shape z = {seq, width, experts, k, normalize, (seq + TOKENS - 1) / TOKENS, scale};
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch scratch = {0};
        float *turned = take(&scratch, width * TOKENS, sizeof(float));
        float *chosen = take(&scratch, k * TOKENS, sizeof(float));
        Lanes *room = take(&scratch, 2 * k, sizeof(Lanes)), *shares = take(&scratch, experts, sizeof(Lanes));
        failed = scratch.failed;
#pragma omp for schedule(static)
        for (long sequence = 0; sequence < batch; sequence++) {
            if (failed) continue;
            memset(shares, 0, experts * sizeof(Lanes));
            entropy[sequence] = 0.0;
            for (long block = 0; block < z.blocks; block++) {
                const long count = smaller(TOKENS, seq - block * TOKENS), at = sequence * z.blocks + block;
                const long token = sequence * seq + block * TOKENS;
                float *score = scores + at * experts * TOKENS;
                turn_tokens(count, width, x + token * width, turned);
                entropy[sequence] +=
                    score_block(count, width, experts, weight, turned, score, sums + at * TOKENS, shares);
                top_k_block(experts, k, score, bias, room, chosen);
                weigh(z, count, score, chosen, ids + token * k, weights + token * k, counts + sequence * experts);
                top_k_block(experts, k, score, NULL, room, chosen);
                for (long j = 0; j < k; j++)
                    for (long t = 0; t < count; t++) even[sequence * experts + (long)chosen[j * TOKENS + t]] += 1.0f;
            }
            for (long i = 0; i < experts; i++) share[sequence * experts + i] = sum_of(shares[i]);
        }
        release(&scratch);
    }
    return failed;
}

/* Gradients of the logits (E, TOKENS) of a block of `count` tokens, 0 in what fills it up.
 * Through the weights: w_j = scale s_j / Z gives ds_j = scale / Z (g_j - sum_i g_i s_i / Z), without `normalize`
 * ds_j = scale g_j. Through the shares: ds_i = (p_i - sum_j p_j s_j / sum) / sum. */
static void logits_backward(Shape z, long count, const float *scores, const float *sums, const int64_t *ids,
                            const float *grad_weights, const float *pull, float *restrict out) {
    for (long at = 0; at < TOKENS; at += LANES) {
        Lanes along = all(0.0f);
        const Lanes inverse = 1.0f / load(sums + at, LANES, 0.0f);
        for (long i = 0; i < z.experts; i++) along += pull[i] * load(scores + i * TOKENS + at, LANES, 0.0f);
        for (long i = 0; i < z.experts; i++) {
            const Lanes s = load(scores + i * TOKENS + at, LANES, 0.0f);
            store(out + i * TOKENS + at, LANES, (pull[i] - along * inverse) * inverse * s * (1.0f - s));
        }
    }
    for (long t = 0; t < count; t++, ids += z.k, grad_weights += z.k) {
        float chosen = 0.0f, dot = 0.0f;
        for (long j = 0; j < z.k; j++) {
            const float s = scores[ids[j] * TOKENS + t];
            chosen += s, dot += grad_weights[j] * s;
        }
        for (long j = 0; j < z.k; j++) {
            const float s = scores[ids[j] * TOKENS + t], g = grad_weights[j];
            out[ids[j] * TOKENS + t] += z.scale * (z.normalize ? (g - dot / chosen) / chosen : g) * s * (1.0f - s);
        }
    }
}

/* grad_weights (T, K) and `pull` (B, E), the gradient of every token's s / sum -> grad_x (T, D), grad_weight (E, D).
 * parts (B, E, D): the sums of each sequence. 1: no memory. */
int router_backward(long batch, long seq, long width, long experts, long k, float scale, long normalize, const float *x,
                    const float *weight, const float *scores, const float *sums, const int64_t *ids,
                    const float *grad_weights, const float *pull, float *restrict grad_x, float *restrict grad_weight,
                    float *restrict parts) {
    const Shape z = {seq, width, experts, k, normalize, (seq + TOKENS - 1) / TOKENS, scale};
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch scratch = {0};
        float *grad = take(&scratch, experts * TOKENS, sizeof(float));
        failed = scratch.failed;
#pragma omp for schedule(static)
        for (long sequence = 0; sequence < batch; sequence++)
            for (long block = 0; block < z.blocks && !failed; block++) {
                const long count = smaller(TOKENS, seq - block * TOKENS), at = sequence * z.blocks + block;
                const long token = sequence * seq + block * TOKENS;
                logits_backward(z, count, scores + at * experts * TOKENS, sums + at * TOKENS, ids + token * k,
                                grad_weights + token * k, pull + sequence * experts, grad);
                multiply_fp32(count, width, experts, (Factors){grad, 1, TOKENS, weight, width}, grad_x + token * width,
                              width, 0);
                multiply_fp32(experts, width, count, (Factors){grad, TOKENS, 1, x + token * width, width},
                              parts + sequence * experts * width, width, block > 0);
            }
#pragma omp for schedule(static)
        for (long i = 0; i < experts * width; i++) {
            float sum = 0.0f;
            for (long sequence = 0; sequence < batch; sequence++) sum += parts[sequence * experts * width + i];
            grad_weight[i] = sum;
        }
        release(&scratch);
    }
    return failed;
}
