/* From the projection of an attention layer to its heads: norm, rotation and the change of layout in one pass each way.
 *
 * heads (B, S, H + 2 H_kv, C) hold queries, keys and values; turned queries are (B, H, S, C), turned keys and plain values
 * (B, H_kv, S, C). cos and sin are (S, C), sin without sign in its second half. No norm weights: no norm. Positions are
 * shared out among threads in parts of PART; the gradients of the norms are summed by part, and the parts added in order.
 */
#include <stdlib.h>

#include "lanes.h"

enum { PART = 128 }; /* positions */

typedef struct {
    long batch, seq, num_heads, num_kv, width;
} Shape;

/* Where head h of the queries or keys of position `at`, counted over all sequences, stands in (B, heads, S, C). */
INLINE long place_of(Shape s, long at, long heads, long h) {
    return ((at / s.seq * heads + h) * s.seq + at % s.seq) * s.width;
}

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
        const Lanes c = load(cos + i, n, 0.0f), s = load(sin + i, n, 0.0f);
        store_bf16(out + i, n, a * c - b * s);
        store_bf16(out + half + i, n, b * c + a * s);
    }
    return factor;
}

INLINE void split_forward(Shape shape, float eps, const bf16 *heads, const float *query_weight, const float *key_weight,
                          const float *cos, const float *sin, bf16 *query, bf16 *key, bf16 *value, float *inverse) {
    const long width = shape.width, num_heads = shape.num_heads, num_kv = shape.num_kv;
    const long positions = shape.batch * shape.seq;
#pragma omp parallel for schedule(static) if (positions > PART)
    for (long at = 0; at < positions; at++) {
        const bf16 *x = heads + at * (num_heads + 2 * num_kv) * width;
        float *factor = inverse + at * (num_heads + num_kv);
        const float *c = cos + at % shape.seq * width, *s = sin + at % shape.seq * width + width / 2;
        for (long h = 0; h < num_heads; h++)
            factor[h] =
                turn_head(width, eps, x + h * width, query_weight, c, s, query + place_of(shape, at, num_heads, h));
        for (long h = 0; h < num_kv; h++) {
            const long place = place_of(shape, at, num_kv, h);
            factor[num_heads + h] =
                turn_head(width, eps, x + (num_heads + h) * width, key_weight, c, s, key + place);
            memcpy(value + place, x + (num_heads + num_kv + h) * width, width * sizeof(bf16));
        }
    }
}

/* The usual head width as a constant, so that its short loops become straight code. */
int split_heads_forward(long batch, long seq, long num_heads, long num_kv, long width, float eps, const bf16 *heads,
                        const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                        bf16 *query, bf16 *key, bf16 *value, float *inverse) {
    const Shape shape = {batch, seq, num_heads, num_kv, width}, usual = {batch, seq, num_heads, num_kv, 32};
    if (width == 32)
        split_forward(usual, eps, heads, query_weight, key_weight, cos, sin, query, key, value, inverse);
    else
        split_forward(shape, eps, heads, query_weight, key_weight, cos, sin, query, key, value, inverse);
    return 0;
}

/* The gradient of the pair of lanes i and half + i before the rotation. */
INLINE void turn_back(long half, long i, const bf16 *grad, const float *cos, const float *sin, Lanes *a, Lanes *b) {
    const long n = half - i;
    const Lanes c = load(cos + i, n, 0.0f), s = load(sin + i, n, 0.0f);
    const Lanes grad_a = load_bf16(grad + i, n, 0.0f), grad_b = load_bf16(grad + half + i, n, 0.0f);
    *a = grad_a * c + grad_b * s;
    *b = grad_b * c - grad_a * s;
}

/* Gradient through turn_head; adds to grad_weight where there is one. */
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

/* Positions start to end; grad_weights: of the queries' norm, then of the keys'. */
INLINE void split_part_backward(Shape shape, long start, long end, const bf16 *heads, const float *query_weight,
                                const float *key_weight, const float *cos, const float *sin, const float *inverse,
                                const bf16 *grad_query, const bf16 *grad_key, const bf16 *grad_value, bf16 *grad_heads,
                                float *restrict grad_weights) {
    const long width = shape.width, num_heads = shape.num_heads, num_kv = shape.num_kv;
    for (long at = start; at < end; at++) {
        const bf16 *x = heads + at * (num_heads + 2 * num_kv) * width;
        bf16 *out = grad_heads + at * (num_heads + 2 * num_kv) * width;
        const float *factor = inverse + at * (num_heads + num_kv);
        const float *c = cos + at % shape.seq * width, *s = sin + at % shape.seq * width + width / 2;
        for (long h = 0; h < num_heads; h++)
            turn_head_back(width, factor[h], x + h * width, query_weight, c, s,
                           grad_query + place_of(shape, at, num_heads, h), out + h * width, grad_weights);
        for (long h = 0; h < num_kv; h++) {
            const long place = place_of(shape, at, num_kv, h), head = (num_heads + h) * width;
            turn_head_back(width, factor[num_heads + h], x + head, key_weight, c, s, grad_key + place, out + head,
                           grad_weights + width);
            memcpy(out + head + num_kv * width, grad_value + place, width * sizeof(bf16));
        }
    }
}

/* Backward pass of split_heads_forward; gradients of norms that are not there are NULL. */
int split_heads_backward(long batch, long seq, long num_heads, long num_kv, long width, const bf16 *heads,
                         const float *query_weight, const float *key_weight, const float *cos, const float *sin,
                         const float *inverse, const bf16 *grad_query, const bf16 *grad_key, const bf16 *grad_value,
                         bf16 *grad_heads, float *grad_query_weight, float *grad_key_weight) {
    const Shape shape = {batch, seq, num_heads, num_kv, width}, usual = {batch, seq, num_heads, num_kv, 32};
    const long positions = batch * seq, parts = (positions + PART - 1) / PART;
    float *sums = calloc(parts * 2 * width + 1, sizeof(float));
    if (!sums) return 1;
#pragma omp parallel for schedule(static) if (parts > 1)
    for (long part = 0; part < parts; part++) {
        const long start = part * PART, end = part + 1 < parts ? start + PART : positions;
        if (width == 32)
            split_part_backward(usual, start, end, heads, query_weight, key_weight, cos, sin, inverse, grad_query,
                                grad_key, grad_value, grad_heads, sums + part * 2 * 32);
        else
            split_part_backward(shape, start, end, heads, query_weight, key_weight, cos, sin, inverse, grad_query,
                                grad_key, grad_value, grad_heads, sums + part * 2 * width);
    }
    for (long i = 0; i < width; i++) {
        float of_query = 0.0f, of_key = 0.0f;
        for (long part = 0; part < parts; part++) {
            of_query += sums[part * 2 * width + i];
            of_key += sums[part * 2 * width + width + i];
        }
        if (grad_query_weight) grad_query_weight[i] = of_query;
        if (grad_key_weight) grad_key_weight[i] = of_key;
    }
    free(sums);
    return 0;
}
