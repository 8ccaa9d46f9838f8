/* Output head and cross-entropy in one pass: logits exist only as blocks in the cache, never whole and never rounded.
 * Definition: models/loss.py, `cross_entropy` of the product.
 *
 * T tokens, D model width, V vocabulary; x (T, D) bf16, weight (V, D) fp32, logits = x weight^T.
 */
#include "lanes.h"
#include "tiles.h"

/* A block of logits in fp32, its gradients and the weights of its columns stay in a 2 MiB second-level cache. Its rows
 * lie a little further apart than they are long, so that they fall into different sets of the cache. */
enum { ROWS = 128, COLUMNS = 512, STRIDE = COLUMNS + BLOCK };

/* x (T, D) -> rows (padded T, padded D), which are zero; of tokens with scale 0 nothing is read, so that a broken state
 * where nothing is predicted stays without effect. No scale: 1. */
static void pad_rows(long tokens, long width, const bf16 *x, const float *scale, bf16 *restrict rows) {
    for (long row = 0; row < tokens; row++)
        if (scale == NULL || scale[row] != 0.0f)
            memcpy(rows + row * padded(width), x + row * width, width * sizeof(bf16));
}

/* The greatest of a row of logits and of `before`. */
static inline float greatest_of_row(long count, const float *logit, float before) {
    Lanes max = all(before);
    for (long j = 0; j < count; j += LANES) max = greater(max, load(logit + j, count - j, -INFINITY));
    return greatest_of(max);
}

static inline float sum_of_exponentials(long count, const float *logit, float shift) {
    Lanes sum = all(0.0f);
    for (long j = 0; j < count; j += LANES) sum += exponential_of(load(logit + j, count - j, -INFINITY) - shift);
    return sum_of(sum);
}

/* logsumexp (T) and the logit of the target (T) of every token. 1: no memory. */
int head_forward(long tokens, long width, long vocabulary, const bf16 *x, const float *weight, const int64_t *targets,
                 float *restrict log_sum_exp, float *restrict target_logit) {
    const long d = padded(width), height = padded(tokens);
    Scratch scratch = {0};
    bf16 *rows = take(&scratch, height * d, sizeof(bf16)), *narrowed = take(&scratch, COLUMNS * d, sizeof(bf16));
    uint32_t *weight_pairs = take(&scratch, COLUMNS * d / 2, sizeof(uint32_t));
    float *logits = take(&scratch, ROWS * STRIDE, sizeof(float));
    float *greatest_so_far = take(&scratch, tokens, sizeof(float)), *sums = take(&scratch, tokens, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    pad_rows(tokens, width, x, NULL, rows);
    for (long row = 0; row < tokens; row++) greatest_so_far[row] = -INFINITY;
    tiles_begin();
    for (long column = 0; column < vocabulary; column += COLUMNS) {
        long valid = vocabulary - column < COLUMNS ? vocabulary - column : COLUMNS, n = padded(valid);
        narrow_matrix(valid, width, weight + column * width, narrowed);
        const Tiles weight_turned = tiles_of_transpose(n, d, narrowed, weight_pairs);
        for (long start = 0; start < tokens; start += ROWS) {
            long count = tokens - start < ROWS ? tokens - start : ROWS;
            multiply(padded(count), n, d, rows + start * d, d, weight_turned, logits, STRIDE, 0);
            for (long i = 0; i < count; i++) {
                const float *logit = logits + i * STRIDE, old = greatest_so_far[start + i];
                const float max = greatest_of_row(valid, logit, old);
                sums[start + i] = sums[start + i] * exponential(old - max) + sum_of_exponentials(valid, logit, max);
                greatest_so_far[start + i] = max;
                long target = targets[start + i] - column;
                if (target >= 0 && target < valid) target_logit[start + i] = logit[target];
            }
        }
    }
    tiles_end();
    for (long row = 0; row < tokens; row++) log_sum_exp[row] = greatest_so_far[row] + logf(sums[row]);
    return release(&scratch), 0;
}

/* Gradients of sum over t of scale_t (logsumexp_t - target logit_t): adds to grad_x (T, D), writes grad_weight (V, D).
 * The logits are computed again: cheaper than keeping T x V of them. 1: no memory. */
int head_backward(long tokens, long width, long vocabulary, const bf16 *x, const float *weight, const int64_t *targets,
                  const float *log_sum_exp, const float *scale, float *restrict grad_x, float *restrict grad_weight) {
    const long d = padded(width), height = padded(tokens);
    Scratch scratch = {0};
    bf16 *rows = take(&scratch, height * d, sizeof(bf16)), *turned = take(&scratch, height * d, sizeof(bf16));
    bf16 *narrowed = take(&scratch, COLUMNS * d, sizeof(bf16)), *grad = take(&scratch, ROWS * STRIDE, sizeof(bf16));
    uint32_t *weight_pairs = take(&scratch, COLUMNS * d / 2, sizeof(uint32_t));
    uint32_t *weight_back = take(&scratch, COLUMNS * d / 2, sizeof(uint32_t)); /* of the transpose */
    uint32_t *right = take(&scratch, ROWS * COLUMNS / 2, sizeof(uint32_t));
    float *logits = take(&scratch, ROWS * STRIDE, sizeof(float));
    float *grad_rows = take(&scratch, height * d, sizeof(float)), *sum = take(&scratch, d * STRIDE, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    pad_rows(tokens, width, x, scale, rows);
    transpose(height, d, rows, turned, height);
    tiles_begin();
    for (long column = 0; column < vocabulary; column += COLUMNS) {
        long valid = vocabulary - column < COLUMNS ? vocabulary - column : COLUMNS, n = padded(valid);
        narrow_matrix(valid, width, weight + column * width, narrowed);
        const Tiles weight_turned = tiles_of_transpose(n, d, narrowed, weight_pairs);
        const Tiles weight_tiles = tiles_of(n, d, narrowed, d, weight_back);
        for (long start = 0; start < tokens; start += ROWS) {
            long count = tokens - start < ROWS ? tokens - start : ROWS, m = padded(count);
            multiply(m, n, d, rows + start * d, d, weight_turned, logits, STRIDE, 0);
            memset(grad, 0, m * STRIDE * sizeof(bf16));
            for (long i = 0; i < count; i++) {
                const float *logit = logits + i * STRIDE, factor = scale[start + i], shift = log_sum_exp[start + i];
                bf16 *out = grad + i * STRIDE;
                if (factor == 0.0f) continue; /* nothing is predicted here */
                for (long j = 0; j < valid; j += LANES)
                    store_bf16(out + j, LANES,
                               factor * exponential_of(load(logit + j, valid - j, -INFINITY) - shift));
                long target = targets[start + i] - column;
                if (target >= 0 && target < valid)
                    out[target] = narrow(factor * (exponential(logit[target] - shift) - 1.0f));
            }
            multiply(m, d, n, grad, STRIDE, weight_tiles, grad_rows + start * d, d, column > 0);
            multiply(d, n, m, turned + start, height, tiles_of(m, n, grad, STRIDE, right), sum, STRIDE, start > 0);
        }
        for (long j = 0; j < valid; j++)
            for (long i = 0; i < width; i++) grad_weight[(column + j) * width + i] = sum[i * STRIDE + j];
    }
    tiles_end();
    for (long row = 0; row < tokens; row++)
        for (long i = 0; i < width; i++) grad_x[row * width + i] += grad_rows[row * d + i];
    return release(&scratch), 0;
}
