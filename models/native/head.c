/* Output head and cross-entropy in one pass: logits exist only for a few tokens at a time, in the cache, and never
 * rounded. Definition: models/loss.py, `cross_entropy` of the product.
 *
 * T tokens, D model width, V vocabulary; x (T, D) bf16, weight (V, D) fp32, logits = x weight^T.
 */
#include "tiles.h"

/* Columns of a block of gradients: with their weights they stay in a second-level cache of 1 MiB. */
enum { COLUMNS = 512 };

/* x (T, D) -> rows (padded T, padded D), which are zero. Of tokens with scale 0 nothing is read, so that a broken state
 * where nothing is predicted stays without effect. */
static void pad_rows(long tokens, long width, const bf16 *x, const float *scale, bf16 *restrict rows) {
    for (long row = 0; row < tokens; row++)
        if (scale[row] != 0.0f) memcpy(rows + row * padded(width), x + row * width, width * sizeof(bf16));
}

/* The greatest of a row of logits. */
static inline float greatest_of_row(long count, const float *logit) {
    Lanes max = all(-INFINITY);
    for (long j = 0; j < count; j += LANES) max = greater(max, load(logit + j, count - j, -INFINITY));
    return greatest_of(max);
}

/* logit -> e^(logit - shift), 0 in the padding. Returns the sum. */
static inline float exponential_row(long count, float shift, float *restrict logit) {
    Lanes sum = all(0.0f);
    for (long j = 0; j < padded(count); j += LANES) {
        const Lanes e = exponential_of(load(logit + j, count - j, -INFINITY) - shift);
        store(logit + j, LANES, e);
        sum += e;
    }
    return sum_of(sum);
}

/* Tokens whose logits are there at once. Few, so that the logits stay in the second-level cache: 1 MiB of them; but the
 * sums of the weights' gradients pass through memory once for all of these tokens, so not fewer than that is worth. */
static inline long tokens_at_once(long columns) {
    enum { MOST_LOGITS = 1 << 18, MOST = 128, LEAST = 64 };
    const long fitting = MOST_LOGITS / columns / BLOCK * BLOCK;
    return fitting < LEAST ? MOST : smaller(fitting, MOST);
}

/* Logsumexp (T) and the logit of the target (T) of every token; and, unless grad_x is NULL, the gradients of the sum
 * over t of scale_t (logsumexp_t - target logit_t): writes grad_x (T, D) and grad_weight (V, D). They are made here, and
 * not when the backward pass asks for them, because the logits are here. 1: no memory. */
int head(long tokens, long width, long vocabulary, const bf16 *x, const float *weight, const int64_t *targets,
         const float *scale, float *restrict log_sum_exp, float *restrict target_logit, float *restrict grad_x,
         float *restrict grad_weight) {
    const long d = padded(width), v = padded(vocabulary), height = padded(tokens), rows = tokens_at_once(v);
    const long stride = v + BLOCK; /* rows at a distance of a power of two would fall into the same sets of the cache */
    const long grad = grad_x != NULL;
    Scratch scratch = {0};
    bf16 *x_rows = take(&scratch, height * d, sizeof(bf16)), *narrowed = take(&scratch, COLUMNS * d, sizeof(bf16));
    uint32_t *turned_pairs = take(&scratch, v * d / 2, sizeof(uint32_t)); /* of the transpose of the weights */
    uint32_t *weight_pairs = take(&scratch, grad * v * d / 2, sizeof(uint32_t));
    float *logits = take(&scratch, rows * stride, sizeof(float)), *sums = take(&scratch, rows, sizeof(float));
    bf16 *grads = take(&scratch, grad * rows * COLUMNS, sizeof(bf16));
    bf16 *grads_turned = take(&scratch, grad * rows * COLUMNS, sizeof(bf16));
    uint32_t *x_pairs = take(&scratch, grad * rows * d / 2, sizeof(uint32_t));
    float *sum_x = take(&scratch, grad * rows * d, sizeof(float));
    float *sum_weight = take(&scratch, grad * v * d, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    pad_rows(tokens, width, x, scale, x_rows);
    for (long column = 0; column < vocabulary; column += COLUMNS) {
        const long n = smaller(COLUMNS, v - column);
        narrow_matrix(smaller(COLUMNS, vocabulary - column), width, weight + column * width, narrowed);
        tiles_of_transpose(n, d, narrowed, turned_pairs + column * d / 2);
        if (grad) tiles_of(n, d, narrowed, d, weight_pairs + column * d / 2);
    }
    tiles_begin();
    for (long start = 0; start < tokens; start += rows) {
        const long count = smaller(rows, tokens - start), m = padded(count);
        const bf16 *chunk = x_rows + start * d;
        multiply(m, v, d, chunk, d, (Tiles){turned_pairs, d / BLOCK}, logits, stride, 0);
        for (long i = 0; i < count; i++) {
            float *logit = logits + i * stride;
            const int64_t target = targets[start + i];
            const float max = greatest_of_row(vocabulary, logit);
            if (target >= 0 && target < vocabulary) target_logit[start + i] = logit[target];
            sums[i] = exponential_row(vocabulary, max, logit);
            log_sum_exp[start + i] = max + logf(sums[i]);
        }
        if (!grad) continue;
        const Tiles x_tiles = tiles_of(m, d, chunk, d, x_pairs);
        for (long column = 0; column < v; column += COLUMNS) {
            const long n = smaller(COLUMNS, v - column);
            memset(grads + count * n, 0, (m - count) * n * sizeof(bf16));
            for (long i = 0; i < count; i++) {
                const float *e = logits + i * stride + column, factor = scale[start + i];
                const int64_t target = targets[start + i] - column;
                if (factor == 0.0f) { /* nothing is predicted here, and e may hold anything */
                    memset(grads + i * n, 0, n * sizeof(bf16));
                    continue;
                }
                for (long j = 0; j < n; j += LANES)
                    store_bf16(grads + i * n + j, LANES, load(e + j, LANES, 0.0f) * (factor / sums[i]));
                if (target >= 0 && target < n) grads[i * n + target] = narrow(factor * (e[target] / sums[i] - 1.0f));
            }
            multiply(m, d, n, grads, n, (Tiles){weight_pairs + column * d / 2, n / BLOCK}, sum_x, d, column > 0);
            transpose(m, n, grads, n, grads_turned, m);
            multiply(n, d, m, grads_turned, m, x_tiles, sum_weight + column * d, d, start > 0);
        }
        unpad(count, width, sum_x, d, grad_x + start * width);
    }
    tiles_end();
    if (grad) unpad(vocabulary, width, sum_weight, d, grad_weight);
    return release(&scratch), 0;
}
