/* Elementwise parts of the training step, each in one pass over memory: bf16 in and out, fp32 in between.
 *
 * Every function has a definition in plain torch beside its caller, and a test that holds the two together. Compiled by
 * models/native/__init__.py. Loops over a row's elements are written so that the compiler makes vectors of them.
 */
#include "lanes.h"

/* hidden = weight * silu(gate) * up; pre holds gate and up side by side. No weights: 1. */
int swiglu_forward(long rows, long width, const bf16 *pre, const bf16 *weights, bf16 *restrict hidden) {
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

/* out = x / sqrt(mean(x^2) + eps) * weight in fp32, keeping the factor of every row. Where out is NULL: the same rounded
 * to bf16, in `rounded`. */
int rms_norm_forward(long rows, long width, float eps, const float *x, const float *weight, float *restrict out,
                     bf16 *restrict rounded, float *restrict inverse) {
    for (long row = 0; row < rows; row++) {
        const float *v = x + width * row;
        float sum = 0.0f;
        for (long i = 0; i < width; i++) sum += v[i] * v[i];
        float factor = 1.0f / sqrtf(sum / width + eps);
        inverse[row] = factor;
        if (out != NULL)
            for (long i = 0; i < width; i++) out[width * row + i] = v[i] * factor * weight[i];
        else
            for (long i = 0; i < width; i++) rounded[width * row + i] = narrow(v[i] * factor * weight[i]);
    }
    return 0;
}

INLINE void rms_norm_row_backward(long width, float factor, const float *v, const float *weight, const float *g,
                                  float *restrict grad_x, float *restrict grad_weight) {
    float dot = 0.0f;
    for (long i = 0; i < width; i++) {
        dot += g[i] * weight[i] * v[i];
        grad_weight[i] += g[i] * v[i] * factor;
    }
    const float along = dot * factor * factor * factor / width;
    for (long i = 0; i < width; i++) grad_x[i] = g[i] * weight[i] * factor - v[i] * along;
}

/* Its backward pass, from a gradient in fp32 or, where that is NULL, in bf16. grad_weight must start at 0; room: (width). */
int rms_norm_backward(long rows, long width, const float *x, const float *weight, const float *inverse,
                      const float *grad, const bf16 *rounded, float *restrict room, float *restrict grad_x,
                      float *restrict grad_weight) {
    for (long row = 0; row < rows; row++) {
        const long at = width * row;
        if (grad == NULL)
            for (long i = 0; i < width; i++) room[i] = widen(rounded[at + i]);
        rms_norm_row_backward(width, inverse[row], x + at, weight, grad == NULL ? room : grad + at, grad_x + at,
                              grad_weight);
    }
    return 0;
}

/* The sum of a residual (rows, width) and a sub-layer's update, and the norm of the sum, in one pass. */
int add_rms_norm_forward(long rows, long width, float eps, const float *hidden, const bf16 *update,
                         const float *weight, float *restrict total, float *restrict out, float *restrict inverse) {
    for (long row = 0; row < rows; row++) {
        float *v = total + width * row, sum = 0.0f;
        for (long i = 0; i < width; i++) {
            v[i] = hidden[width * row + i] + widen(update[width * row + i]);
            sum += v[i] * v[i];
        }
        float factor = 1.0f / sqrtf(sum / width + eps);
        inverse[row] = factor;
        for (long i = 0; i < width; i++) out[width * row + i] = v[i] * factor * weight[i];
    }
    return 0;
}

/* Its backward pass: the gradient of the sum, as it is for the residual and in bf16 for the update; grad_total is what
 * reaches the sum directly. grad_weight must start at 0. */
int add_rms_norm_backward(long rows, long width, const float *total, const float *weight, const float *inverse,
                          const float *grad, const float *grad_total, float *restrict grad_hidden,
                          bf16 *restrict grad_update, float *restrict grad_weight) {
    for (long row = 0; row < rows; row++) {
        const float *v = total + width * row, *g = grad + width * row, *direct = grad_total + width * row;
        float factor = inverse[row], dot = 0.0f;
        for (long i = 0; i < width; i++) {
            dot += g[i] * weight[i] * v[i];
            grad_weight[i] += g[i] * v[i] * factor;
        }
        float along = dot * factor * factor * factor / width;
        for (long i = 0; i < width; i++) {
            float d = direct[i] + g[i] * weight[i] * factor - v[i] * along;
            grad_hidden[width * row + i] = d;
            grad_update[width * row + i] = narrow(d);
        }
    }
    return 0;
}

/* One head of one position: optional RMSNorm, then rotation of the pairs (i, i + half). */
INLINE float turn_head(long half, float eps, const bf16 *x, const float *weight, const float *cos, const float *sin,
                       bf16 *restrict out) {
    float factor = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (long i = 0; i < 2 * half; i++) sum += widen(x[i]) * widen(x[i]);
        factor = 1.0f / sqrtf(sum / (2 * half) + eps);
    }
    for (long i = 0; i < half; i++) {
        float a = widen(x[i]) * factor, b = widen(x[half + i]) * factor;
        if (weight) a *= weight[i], b *= weight[half + i];
        out[i] = narrow(a * cos[i] - b * sin[i]);
        out[half + i] = narrow(b * cos[i] + a * sin[i]);
    }
    return factor;
}

/* heads (B, S, H + 2 H_kv, C) -> turned query (B, H, S, C), turned key and plain value (B, H_kv, S, C).
 * cos and sin are (S, C), sin without sign in its second half. No norm weights: no norm. */
INLINE void split_forward(long half, long batch, long seq, long num_heads, long num_kv, long width, float eps,
                          const bf16 *heads, const float *query_weight, const float *key_weight, const float *cos,
                          const float *sin, bf16 *query, bf16 *key, bf16 *value, float *inverse) {
    long all = num_heads + 2 * num_kv;
    for (long b = 0; b < batch; b++)
        for (long s = 0; s < seq; s++) {
            const bf16 *x = heads + (b * seq + s) * all * width;
            float *factor = inverse + (b * seq + s) * (num_heads + num_kv);
            const float *c = cos + s * width, *d = sin + s * width + half;
            for (long h = 0; h < num_heads; h++)
                factor[h] = turn_head(half, eps, x + h * width, query_weight, c, d,
                                      query + ((b * num_heads + h) * seq + s) * width);
            for (long h = 0; h < num_kv; h++) {
                long place = ((b * num_kv + h) * seq + s) * width;
                factor[num_heads + h] =
                    turn_head(half, eps, x + (num_heads + h) * width, key_weight, c, d, key + place);
                memcpy(value + place, x + (num_heads + num_kv + h) * width, width * sizeof(bf16));
            }
        }
}

/* The usual head width as a constant, so that its short loops become straight code: 2 times faster. */
int split_heads_forward(long batch, long seq, long num_heads, long num_kv, long width, float eps, const bf16 *heads,
                        const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                        bf16 *query, bf16 *key, bf16 *value, float *inverse) {
    if (width == 32)
        split_forward(16, batch, seq, num_heads, num_kv, 32, eps, heads, query_weight, key_weight, cos, sin, query,
                      key, value, inverse);
    else
        split_forward(width / 2, batch, seq, num_heads, num_kv, width, eps, heads, query_weight, key_weight, cos, sin,
                      query, key, value, inverse);
    return 0;
}

/* Gradient through turn_head; adds to grad_weight where there is one. */
INLINE void turn_head_back(long half, float factor, const bf16 *x, const float *weight, const float *cos,
                           const float *sin, const bf16 *grad, bf16 *restrict grad_x, float *restrict grad_weight) {
    float dot = 0.0f, turned[2 * half];
    for (long i = 0; i < half; i++) {
        float a = widen(grad[i]), b = widen(grad[half + i]);
        turned[i] = a * cos[i] + b * sin[i];
        turned[half + i] = b * cos[i] - a * sin[i];
    }
    if (!weight) {
        for (long i = 0; i < 2 * half; i++) grad_x[i] = narrow(turned[i]);
        return;
    }
    for (long i = 0; i < 2 * half; i++) {
        float v = widen(x[i]);
        grad_weight[i] += turned[i] * v * factor;
        dot += turned[i] * weight[i] * v;
    }
    float along = dot * factor * factor * factor / (2 * half);
    for (long i = 0; i < 2 * half; i++)
        grad_x[i] = narrow(turned[i] * weight[i] * factor - widen(x[i]) * along);
}

/* Backward pass of split_heads_forward; the norms' gradients must start at 0. */
INLINE void split_backward(long half, long batch, long seq, long num_heads, long num_kv, long width, const bf16 *heads,
                           const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                           const float *inverse, const bf16 *grad_query, const bf16 *grad_key, const bf16 *grad_value,
                           bf16 *grad_heads, float *grad_query_weight, float *grad_key_weight) {
    long all = num_heads + 2 * num_kv;
    for (long b = 0; b < batch; b++)
        for (long s = 0; s < seq; s++) {
            const bf16 *x = heads + (b * seq + s) * all * width;
            bf16 *out = grad_heads + (b * seq + s) * all * width;
            const float *factor = inverse + (b * seq + s) * (num_heads + num_kv);
            const float *c = cos + s * width, *d = sin + s * width + half;
            for (long h = 0; h < num_heads; h++)
                turn_head_back(half, factor[h], x + h * width, query_weight, c, d,
                               grad_query + ((b * num_heads + h) * seq + s) * width, out + h * width,
                               grad_query_weight);
            for (long h = 0; h < num_kv; h++) {
                long place = ((b * num_kv + h) * seq + s) * width, head = (num_heads + h) * width;
                turn_head_back(half, factor[num_heads + h], x + head, key_weight, c, d, grad_key + place,
                               out + head, grad_key_weight);
                memcpy(out + (num_heads + num_kv + h) * width, grad_value + place, width * sizeof(bf16));
            }
        }
}

int split_heads_backward(long batch, long seq, long num_heads, long num_kv, long width, const bf16 *heads,
                         const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                         const float *inverse, const bf16 *grad_query, const bf16 *grad_key, const bf16 *grad_value,
                         bf16 *grad_heads, float *grad_query_weight, float *grad_key_weight) {
    if (width == 32)
        split_backward(16, batch, seq, num_heads, num_kv, 32, heads, query_weight, key_weight, cos, sin, inverse,
                       grad_query, grad_key, grad_value, grad_heads, grad_query_weight, grad_key_weight);
    else
        split_backward(width / 2, batch, seq, num_heads, num_kv, width, heads, query_weight, key_weight, cos, sin,
                       inverse, grad_query, grad_key, grad_value, grad_heads, grad_query_weight, grad_key_weight);
    return 0;
}
