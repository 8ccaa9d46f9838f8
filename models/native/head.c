/* Output head and cross-entropy in one pass: logits exist only as blocks in the cache, never whole and never rounded.
 * Definition: models/loss.py, `cross_entropy` of the product.
 *
 * T tokens, D model width, V vocabulary; x (T, D) bf16, weight (V, D) fp32, logits = x weight^T.
 */
#include "tiles.h"

/* A block of logits in fp32 and its gradients fill half of a 2 MiB second-level cache. */
enum { ROWS = 128, COLUMNS = 512 };

/* x (T, D) -> (padded T, padded D); x itself where there is nothing to pad. */
static const bf16 *pad_rows(long tokens, long width, const bf16 *x, bf16 *room) {
    for (long row = 0; row < tokens; row++)
        memcpy(room + row * padded(width), x + row * width, width * sizeof(bf16));
    return room;
}

/* logsumexp (T) and the logit of the target (T) of every token. 1: no memory. */
int head_forward(long tokens, long width, long vocabulary, const bf16 *x, const float *weight, const int64_t *targets,
                 float *restrict log_sum_exp, float *restrict target_logit) {
    const long d = padded(width), height = padded(tokens);
    Scratch scratch = {0};
    bf16 *room = take(&scratch, height * d, sizeof(bf16)), *narrowed = take(&scratch, COLUMNS * d, sizeof(bf16));
    uint32_t *weight_pairs = take(&scratch, COLUMNS * d / 2, sizeof(uint32_t));
    float *logits = take(&scratch, ROWS * COLUMNS, sizeof(float));
    float *greatest_so_far = take(&scratch, tokens, sizeof(float)), *sums = take(&scratch, tokens, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    const bf16 *rows = pad_rows(tokens, width, x, room);
    for (long row = 0; row < tokens; row++) greatest_so_far[row] = -INFINITY;
    tiles_begin();
    for (long column = 0; column < vocabulary; column += COLUMNS) {
        long valid = vocabulary - column < COLUMNS ? vocabulary - column : COLUMNS, n = padded(valid);
        narrow_matrix(valid, width, weight + column * width, narrowed);
        pair_columns(n, d, narrowed, weight_pairs);
        for (long start = 0; start < tokens; start += ROWS) {
            long count = tokens - start < ROWS ? tokens - start : ROWS;
            multiply(padded(count), n, d, rows + start * d, d, (bf16 *)weight_pairs, n, logits, n, 0);
            for (long i = 0; i < count; i++) {
                const float *logit = logits + i * n;
                float old = greatest_so_far[start + i], max = greatest(valid, logit), sum = 0.0f;
                max = max > old ? max : old;
                for (long j = 0; j < valid; j++) sum += exponential(logit[j] - max);
                sums[start + i] = sums[start + i] * exponential(old - max) + sum;
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
    bf16 *room = take(&scratch, height * d, sizeof(bf16)), *turned = take(&scratch, height * d, sizeof(bf16));
    bf16 *narrowed = take(&scratch, COLUMNS * d, sizeof(bf16)), *grad = take(&scratch, ROWS * COLUMNS, sizeof(bf16));
    uint32_t *weight_pairs = take(&scratch, COLUMNS * d / 2, sizeof(uint32_t));
    uint32_t *weight_back = take(&scratch, COLUMNS * d / 2, sizeof(uint32_t)); /* of the transpose */
    uint32_t *right = take(&scratch, ROWS * COLUMNS / 2, sizeof(uint32_t));
    float *logits = take(&scratch, ROWS * COLUMNS, sizeof(float));
    float *grad_rows = take(&scratch, height * d, sizeof(float)), *sum = take(&scratch, d * COLUMNS, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    const bf16 *rows = pad_rows(tokens, width, x, room);
    transpose(height, d, rows, turned, height);
    tiles_begin();
    for (long column = 0; column < vocabulary; column += COLUMNS) {
        long valid = vocabulary - column < COLUMNS ? vocabulary - column : COLUMNS, n = padded(valid);
        narrow_matrix(valid, width, weight + column * width, narrowed);
        pair_columns(n, d, narrowed, weight_pairs);
        pair_rows(n, d, narrowed, weight_back);
        for (long start = 0; start < tokens; start += ROWS) {
            long count = tokens - start < ROWS ? tokens - start : ROWS, m = padded(count);
            multiply(m, n, d, rows + start * d, d, (bf16 *)weight_pairs, n, logits, n, 0);
            memset(grad, 0, m * n * sizeof(bf16));
            for (long i = 0; i < count; i++) {
                const float *logit = logits + i * n, factor = scale[start + i], shift = log_sum_exp[start + i];
                bf16 *out = grad + i * n;
                if (factor == 0.0f) continue; /* nothing is predicted here */
                for (long j = 0; j < valid; j++) out[j] = narrow(factor * exponential(logit[j] - shift));
                long target = targets[start + i] - column;
                if (target >= 0 && target < valid)
                    out[target] = narrow(factor * (exponential(logit[target] - shift) - 1.0f));
            }
            multiply(m, d, n, grad, n, (bf16 *)weight_back, d, grad_rows + start * d, d, column > 0);
            pair_rows(m, n, grad, right);
            multiply(d, n, m, turned + start, height, (bf16 *)right, n, sum, n, start > 0);
        }
        for (long j = 0; j < valid; j++)
            for (long i = 0; i < width; i++) grad_weight[(column + j) * width + i] = sum[i * n + j];
    }
    tiles_end();
    for (long row = 0; row < tokens; row++)
        for (long i = 0; i < width; i++) grad_x[row * width + i] += grad_rows[row * d + i];
    return release(&scratch), 0;
}
