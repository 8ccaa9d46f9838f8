/* From the projection of an attention layer to its heads: norm, rotation and the change of layout in one pass each way.
 *
 * heads (B, S, H + 2 H_kv, C) hold queries, keys and values; turned queries are (B, H, S, C), turned keys and plain
 * values (B, H_kv, S, C). cos and sin are (S, C), sin without sign in its second half. No norm weights: no norm.
 * Threads share the parts of PART positions that sequences are cut into. The gradients of the norms are summed by part,
 * and the parts added in order, so that their bits do not depend on the number of threads.
 */
#include <stdlib.h>

#include "lanes.h"

enum { PART = 64 }; /* positions */

/* One head of one position: optional RMSNorm, then rotation of the pairs (i, i + half). Returns the norm's factor. */
INLINE float turn_head(long width, float eps, const bf16 *x, const float *weight, const float *cos, const float *sin,
                       bf16 *restrict out) {
    const long half = width / 2;
    float factor = 1.0f;
    if (weight) {
        Lanes squares = all(0.0f);
        for (long i = 0; i < width; i += LANES) {
            const Lanes value = load_bf16(x + i, width - i, 0.0f);
            squares += value * value;
        }
        factor = 1.0f / sqrtf(sum_of(squares) / width + eps);
    }
    for (long i = 0; i < half; i += LANES) {
        const long n = half - i;
        Lanes a = load_bf16(x + i, n, 0.0f) * factor, b = load_bf16(x + half + i, n, 0.0f) * factor;
        if (weight) a *= load(weight + i, n, 0.0f), b *= load(weight + half + i, n, 0.0f);
        const Lanes c = load(cos + i, n, 0.0f), s = load(sin + half + i, n, 0.0f);
        store_bf16(out + i, n, a * c - b * s);
        store_bf16(out + half + i, n, b * c + a * s);
    }
    return factor;
}

/* `count` positions of one sequence; the pointers are at the first of them. */
INLINE void split_part(long width, long count, long seq, long num_heads, long num_kv, float eps, const bf16 *heads,
                       const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                       bf16 *query, bf16 *key, bf16 *value, float *inverse) {
    const long turned = num_heads + num_kv, stride = (turned + num_kv) * width;
    for (long s = 0; s < count; s++) {
        for (long h = 0; h < turned; h++) {
            bf16 *to = h < num_heads ? query + h * seq * width : key + (h - num_heads) * seq * width;
            inverse[s * turned + h] =
                turn_head(width, eps, heads + s * stride + h * width, h < num_heads ? query_weight : key_weight,
                          cos + s * width, sin + s * width, to + s * width);
        }
        for (long h = 0; h < num_kv; h++)
            memcpy(value + (h * seq + s) * width, heads + s * stride + (turned + h) * width, width * sizeof(bf16));
    }
}

/* The usual head width as a constant, so that its short loops become straight code: 2 times faster. */
int split_heads_forward(long batch, long seq, long num_heads, long num_kv, long width, float eps, const bf16 *heads,
                        const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                        bf16 *query, bf16 *key, bf16 *value, float *inverse) {
    const long parts = (seq + PART - 1) / PART;
#pragma omp parallel for collapse(2) schedule(static) if (batch * parts > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            const long s = part * PART, count = smaller(PART, seq - s), at = b * seq + s;
            const bf16 *x = heads + at * (num_heads + 2 * num_kv) * width;
            const float *c = cos + s * width, *d = sin + s * width;
            float *factors = inverse + at * (num_heads + num_kv);
            bf16 *q = query + (b * num_heads * seq + s) * width;
            bf16 *k = key + (b * num_kv * seq + s) * width, *v = value + (b * num_kv * seq + s) * width;
            if (width == 32)
                split_part(32, count, seq, num_heads, num_kv, eps, x, query_weight, key_weight, c, d, q, k, v, factors);
            else
                split_part(width, count, seq, num_heads, num_kv, eps, x, query_weight, key_weight, c, d, q, k, v,
                           factors);
        }
    return 0;
}

/* The gradient of the lanes i and half + i of a head before its rotation. */
INLINE void turn_back(long half, long i, const bf16 *grad, const float *cos, const float *sin, Lanes *a, Lanes *b) {
    const long n = half - i;
    const Lanes c = load(cos + i, n, 0.0f), s = load(sin + half + i, n, 0.0f);
    const Lanes grad_a = load_bf16(grad + i, n, 0.0f), grad_b = load_bf16(grad + half + i, n, 0.0f);
    *a = grad_a * c + grad_b * s;
    *b = grad_b * c - grad_a * s;
}

/* Gradient through turn_head; adds to grad_weight where there is a norm. */
INLINE void turn_head_back(long width, float factor, const bf16 *x, const float *weight, const float *cos,
                           const float *sin, const bf16 *grad, bf16 *restrict grad_x, float *restrict grad_weight) {
    const long half = width / 2;
    Lanes a, b, dots = all(0.0f);
    for (long i = 0; weight && i < half; i += LANES) {
        const long n = half - i;
        turn_back(half, i, grad, cos, sin, &a, &b);
        a *= load_bf16(x + i, n, 0.0f), b *= load_bf16(x + half + i, n, 0.0f);
        store(grad_weight + i, n, load(grad_weight + i, n, 0.0f) + a * factor);
        store(grad_weight + half + i, n, load(grad_weight + half + i, n, 0.0f) + b * factor);
        dots += a * load(weight + i, n, 0.0f) + b * load(weight + half + i, n, 0.0f);
    }
    const float along = weight ? sum_of(dots) * factor * factor * factor / width : 0.0f;
    for (long i = 0; i < half; i += LANES) {
        const long n = half - i;
        turn_back(half, i, grad, cos, sin, &a, &b);
        if (weight) {
            a = a * load(weight + i, n, 0.0f) * factor - load_bf16(x + i, n, 0.0f) * along;
            b = b * load(weight + half + i, n, 0.0f) * factor - load_bf16(x + half + i, n, 0.0f) * along;
        }
        store_bf16(grad_x + i, n, a);
        store_bf16(grad_x + half + i, n, b);
    }
}

/* Backward pass of split_part; grad_weights: that of the queries' norm, then that of the keys'. */
INLINE void split_part_back(long width, long count, long seq, long num_heads, long num_kv, const bf16 *heads,
                            const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                            const float *inverse, const bf16 *grad_query, const bf16 *grad_key, const bf16 *grad_value,
                            bf16 *grad_heads, float *grad_weights) {
    const long turned = num_heads + num_kv, stride = (turned + num_kv) * width;
    for (long s = 0; s < count; s++) {
        for (long h = 0; h < turned; h++) {
            const bf16 *from = h < num_heads ? grad_query + h * seq * width : grad_key + (h - num_heads) * seq * width;
            turn_head_back(width, inverse[s * turned + h], heads + s * stride + h * width,
                           h < num_heads ? query_weight : key_weight, cos + s * width, sin + s * width,
                           from + s * width, grad_heads + s * stride + h * width,
                           grad_weights + (h < num_heads ? 0 : width));
        }
        for (long h = 0; h < num_kv; h++)
            memcpy(grad_heads + s * stride + (turned + h) * width, grad_value + (h * seq + s) * width,
                   width * sizeof(bf16));
    }
}

/* Backward pass of split_heads_forward; gradients of norms that are not there are NULL. */
int split_heads_backward(long batch, long seq, long num_heads, long num_kv, long width, const bf16 *heads,
                         const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                         const float *inverse, const bf16 *grad_query, const bf16 *grad_key, const bf16 *grad_value,
                         bf16 *grad_heads, float *grad_query_weight, float *grad_key_weight) {
    const long parts = (seq + PART - 1) / PART;
    float *sums = calloc(batch * parts * 2 * width + 1, sizeof(float)); /* of every part: queries, then keys */
    if (!sums) return 1;
#pragma omp parallel for collapse(2) schedule(static) if (batch * parts > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            const long s = part * PART, count = smaller(PART, seq - s), at = b * seq + s;
            const long place = at * (num_heads + 2 * num_kv) * width;
            const float *c = cos + s * width, *d = sin + s * width, *factors = inverse + at * (num_heads + num_kv);
            const bf16 *q = grad_query + (b * num_heads * seq + s) * width;
            const bf16 *k = grad_key + (b * num_kv * seq + s) * width, *v = grad_value + (b * num_kv * seq + s) * width;
            float *grad_weights = sums + (b * parts + part) * 2 * width;
            if (width == 32)
                split_part_back(32, count, seq, num_heads, num_kv, heads + place, query_weight, key_weight, c, d,
                                factors, q, k, v, grad_heads + place, grad_weights);
            else
                split_part_back(width, count, seq, num_heads, num_kv, heads + place, query_weight, key_weight, c, d,
                                factors, q, k, v, grad_heads + place, grad_weights);
        }
    for (long i = 0; i < 2 * width; i++) {
        float *total = i < width ? grad_query_weight : grad_key_weight, sum = 0.0f;
        for (long part = 0; part < batch * parts; part++) sum += sums[part * 2 * width + i];
        if (total) total[i % width] = sum;
    }
    free(sums);
    return 0;
}
