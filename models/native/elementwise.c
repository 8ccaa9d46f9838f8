/* Elementwise parts of the training step, each in one pass over memory: bf16 in and out, fp32 in between.
 *
 * Every function has a definition in plain torch beside its caller, and a test that holds the two together. Compiled by
 * models/native/__init__.py. Rows are independent and shared out among threads. Gradients of weights are sums over
 * rows: each part of PART rows makes its own, and the parts are added in order, so that their bits do not depend on the
 * number of threads.
 */
#include <stdlib.h>

#include "lanes.h"

/* Rows of a part; and the fewest numbers of an input that are worth waking other threads, which costs some 5 us: a
 * thread goes through that many in 10 us. */
enum { PART = 128, FEWEST = 1 << 15 };

/* Room for one row of sums of every part, all 0; the caller frees it. */
static float *part_sums(long rows, long width) { return calloc((rows + PART - 1) / PART * width + 1, sizeof(float)); }

/* total[i] = the sum of element i over the parts. */
static void add_parts(long rows, long width, const float *sums, float *restrict total) {
    memset(total, 0, width * sizeof(float));
    for (long start = 0; start < rows; start += PART)
        for (long i = 0; i < width; i++) total[i] += sums[start / PART * width + i];
}

/* hidden = weight * silu(gate) * up; pre holds gate and up side by side. No weights: 1. */
int swiglu_forward(long rows, long width, const bf16 *pre, const bf16 *weights, bf16 *restrict hidden) {
#pragma omp parallel for schedule(static) if (rows * width > FEWEST)
    for (long row = 0; row < rows; row++) {
        const bf16 *gates = pre + 2 * width * row, *ups = gates + width;
        const float weight = weights ? widen(weights[row]) : 1.0f;
        for (long i = 0; i < width; i += LANES) {
            const Lanes gate = load_bf16(gates + i, width - i, 0.0f), up = load_bf16(ups + i, width - i, 0.0f);
            store_bf16(hidden + width * row + i, width - i, weight * up * gate * sigmoid_of(gate));
        }
    }
    return 0;
}

/* Its backward pass. Writes hidden again, d pre, and with weights their gradients. */
int swiglu_backward(long rows, long width, const bf16 *pre, const bf16 *weights, const bf16 *grad,
                    bf16 *restrict hidden, bf16 *restrict grad_pre, bf16 *restrict grad_weights) {
#pragma omp parallel for schedule(static) if (rows * width > FEWEST)
    for (long row = 0; row < rows; row++) {
        const bf16 *gates = pre + 2 * width * row, *ups = gates + width, *grads = grad + width * row;
        bf16 *grad_gates = grad_pre + 2 * width * row, *grad_ups = grad_gates + width;
        const float weight = weights ? widen(weights[row]) : 1.0f;
        Lanes sum = all(0.0f);
#pragma GCC ivdep /* the outputs do not overlap */
        for (long i = 0; i < width; i += LANES) {
            const long n = width - i;
            const Lanes gate = load_bf16(gates + i, n, 0.0f), up = load_bf16(ups + i, n, 0.0f);
            const Lanes g = load_bf16(grads + i, n, 0.0f), d = g * weight;
            const Lanes sigmoid = sigmoid_of(gate), silu = gate * sigmoid;
            sum += g * silu * up;
            store_bf16(hidden + width * row + i, n, weight * silu * up);
            store_bf16(grad_ups + i, n, d * silu);
            store_bf16(grad_gates + i, n, d * up * (sigmoid + silu * (1.0f - sigmoid)));
        }
        if (grad_weights) grad_weights[row] = narrow(sum_of(sum));
    }
    return 0;
}

/* The sum of what is there of a gradient in fp32 and one in bf16: the other may be NULL. */
INLINE Lanes load_sum(const float *wide, const bf16 *rounded, long at, long n) {
    const Lanes sum = wide ? load(wide + at, n, 0.0f) : all(0.0f);
    return rounded ? sum + load_bf16(rounded + at, n, 0.0f) : sum;
}

/* 1 / sqrt(mean(v^2) + eps), given the sum of squares in all lanes together. */
INLINE float inverse_rms(Lanes squares, long width, float eps) { return 1.0f / sqrtf(sum_of(squares) / width + eps); }

/* out = x / sqrt(mean(x^2) + eps) * weight in fp32, keeping the factor of every row. Where out is NULL: the same in
 * `rounded`, rounded to bf16. */
int rms_norm_forward(long rows, long width, float eps, const float *x, const float *weight, float *restrict out,
                     bf16 *restrict rounded, float *restrict inverse) {
#pragma omp parallel for schedule(static) if (rows * width > FEWEST)
    for (long row = 0; row < rows; row++) {
        const float *v = x + width * row;
        Lanes squares = all(0.0f);
        for (long i = 0; i < width; i += LANES) {
            const Lanes value = load(v + i, width - i, 0.0f);
            squares += value * value;
        }
        const float factor = inverse[row] = inverse_rms(squares, width, eps);
        for (long i = 0; i < width; i += LANES) {
            const long n = width - i;
            const Lanes normed = load(v + i, n, 0.0f) * factor * load(weight + i, n, 0.0f);
            if (out) store(out + width * row + i, n, normed);
            else store_bf16(rounded + width * row + i, n, normed);
        }
    }
    return 0;
}

/* Of one row, at place `at`: grad . (weight * v), and grad * v * factor added to grad_weight. */
INLINE float norm_row_sums(long width, long at, float factor, const float *v, const float *weight, const float *grad,
                           const bf16 *rounded, float *restrict grad_weight) {
    Lanes dot = all(0.0f);
    for (long i = 0; i < width; i += LANES) {
        const long n = width - i;
        const Lanes product = load_sum(grad, rounded, at + i, n) * load(v + at + i, n, 0.0f);
        dot += product * load(weight + i, n, 0.0f);
        store(grad_weight + i, n, load(grad_weight + i, n, 0.0f) + product * factor);
    }
    return sum_of(dot);
}

/* Its backward pass; the gradient of the result is `grad` + `rounded`, of which one may be NULL. */
int rms_norm_backward(long rows, long width, const float *x, const float *weight, const float *inverse,
                      const float *grad, const bf16 *rounded, float *restrict grad_x, float *restrict grad_weight) {
    float *sums = part_sums(rows, width);
    if (!sums) return 1;
#pragma omp parallel for schedule(static) if (rows * width > FEWEST)
    for (long start = 0; start < rows; start += PART)
        for (long row = start; row < smaller(start + PART, rows); row++) {
            const float factor = inverse[row];
            const float dot =
                norm_row_sums(width, width * row, factor, x, weight, grad, rounded, sums + start / PART * width);
            const float along = dot * factor * factor * factor / width;
            for (long i = 0; i < width; i += LANES) {
                const long n = width - i, at = width * row + i;
                const Lanes scaled = load_sum(grad, rounded, at, n) * load(weight + i, n, 0.0f) * factor;
                store(grad_x + at, n, scaled - load(x + at, n, 0.0f) * along);
            }
        }
    add_parts(rows, width, sums, grad_weight);
    free(sums);
    return 0;
}

/* The sum of a residual (rows, width) and a sub-layer's update, and its norm in fp32 and in bf16, in one pass. */
int add_rms_norm_forward(long rows, long width, float eps, const float *hidden, const bf16 *update,
                         const float *weight, float *restrict total, float *restrict out, bf16 *restrict rounded,
                         float *restrict inverse) {
#pragma omp parallel for schedule(static) if (rows * width > FEWEST)
    for (long row = 0; row < rows; row++) {
        Lanes squares = all(0.0f);
        for (long i = 0; i < width; i += LANES) {
            const long n = width - i, at = width * row + i;
            const Lanes value = load(hidden + at, n, 0.0f) + load_bf16(update + at, n, 0.0f);
            store(total + at, n, value);
            squares += value * value;
        }
        const float factor = inverse[row] = inverse_rms(squares, width, eps);
        for (long i = 0; i < width; i += LANES) {
            const long n = width - i, at = width * row + i;
            const Lanes normed = load(total + at, n, 0.0f) * factor * load(weight + i, n, 0.0f);
            store(out + at, n, normed);
            store_bf16(rounded + at, n, normed);
        }
    }
    return 0;
}

/* Its backward pass: the gradient of the sum, as it is for the residual and in bf16 for the update. grad_total is what
 * reaches the sum directly; the gradient of the norm is `grad` + `rounded`, of which one may be NULL. */
int add_rms_norm_backward(long rows, long width, const float *total, const float *weight, const float *inverse,
                          const float *grad, const bf16 *rounded, const float *grad_total, float *restrict grad_hidden,
                          bf16 *restrict grad_update, float *restrict grad_weight) {
    float *sums = part_sums(rows, width);
    if (!sums) return 1;
#pragma omp parallel for schedule(static) if (rows * width > FEWEST)
    for (long start = 0; start < rows; start += PART)
        for (long row = start; row < smaller(start + PART, rows); row++) {
            const float factor = inverse[row];
            const float dot =
                norm_row_sums(width, width * row, factor, total, weight, grad, rounded, sums + start / PART * width);
            const float along = dot * factor * factor * factor / width;
            for (long i = 0; i < width; i += LANES) {
                const long n = width - i, at = width * row + i;
                const Lanes scaled = load_sum(grad, rounded, at, n) * load(weight + i, n, 0.0f) * factor;
                const Lanes d = load(grad_total + at, n, 0.0f) + scaled - load(total + at, n, 0.0f) * along;
                store(grad_hidden + at, n, d);
                store_bf16(grad_update + at, n, d);
            }
        }
    add_parts(rows, width, sums, grad_weight);
    free(sums);
    return 0;
}
