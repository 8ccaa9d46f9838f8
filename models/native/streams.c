/* Residual streams (models/hyper_connections.py) in fp32: their mappings, and reading, mixing and writing them.
 *
 * The mappings of BLOCK tokens are computed at a time, one token in each place of a Row, because those of one token are
 * too few to fill a vector. `raw` holds the projections phi x of the streams before their norm: 2 n + n^2 a token.
 * Threads share blocks and tokens. Gradients of gates and biases are summed by parts of PART tokens, which are added in
 * order, so that their bits do not depend on the number of threads.
 */
#include <stdlib.h>

#include "lanes.h"

enum { BLOCK = 16, MOST_STREAMS = 8, MOST_MAPPINGS = MOST_STREAMS * (MOST_STREAMS + 2) };
enum { PART = 128 }; /* tokens: whole blocks, and fewer are not worth waking other threads */
typedef float Row[BLOCK];

/* Places of the n entries of column or row `group` in an n x n matrix: first and distance. */
INLINE long first_of(long columns, long group, long n) { return columns ? group : group * n; }
INLINE long distance_of(long columns, long n) { return columns ? n : 1; }

/* m = m - log(sum(e^m)) over every column or row. */
INLINE void log_softmax(long n, long columns, Row *m) {
    for (long group = 0; group < n; group++) {
        Row *v = m + first_of(columns, group, n), top, sum = {0};
        const long step = distance_of(columns, n);
        memcpy(top, v[0], sizeof(Row));
        for (long k = 1; k < n; k++)
            for (long t = 0; t < BLOCK; t++) top[t] = v[k * step][t] > top[t] ? v[k * step][t] : top[t];
        for (long k = 0; k < n; k++)
            for (long t = 0; t < BLOCK; t++) sum[t] += exponential(v[k * step][t] - top[t]);
        for (long t = 0; t < BLOCK; t++) top[t] += logf(sum[t]);
        for (long k = 0; k < n; k++)
            for (long t = 0; t < BLOCK; t++) v[k * step][t] -= top[t];
    }
}

INLINE void exponentials(long count, Row *m) {
    for (long k = 0; k < count; k++)
        for (long t = 0; t < BLOCK; t++) m[k][t] = exponential(m[k][t]);
}

/* Logits m -> Sinkhorn's matrix m. Keeps the first column softmax, if asked, and the sums of all later half steps. */
INLINE void sinkhorn(long n, long iterations, Row *m, Row *first, Row *sums) {
    log_softmax(n, 1, m);
    if (first) {
        memcpy(first, m, n * n * sizeof(Row));
        exponentials(n * n, first);
    }
    log_softmax(n, 0, m);
    exponentials(n * n, m);
    for (long half = 0; half < 2 * (iterations - 1); half++)
        for (long group = 0; group < n; group++) {
            const long columns = half % 2 == 0, step = distance_of(columns, n);
            Row *v = m + first_of(columns, group, n), sum = {0}, factor;
            for (long k = 0; k < n; k++)
                for (long t = 0; t < BLOCK; t++) sum[t] += v[k * step][t];
            for (long t = 0; t < BLOCK; t++) factor[t] = 1.0f / sum[t];
            for (long k = 0; k < n; k++)
                for (long t = 0; t < BLOCK; t++) v[k * step][t] *= factor[t];
            if (sums) memcpy(sums[half * n + group], sum, sizeof(Row));
        }
}

/* Gradient g of the matrix m -> gradient of the logits; m is taken back step by step. */
INLINE void sinkhorn_back(long n, long iterations, Row *m, const Row *first, const Row *sums, Row *g) {
    for (long half = 2 * (iterations - 1) - 1; half >= 0; half--)
        for (long group = 0; group < n; group++) {
            const long columns = half % 2 == 0, step = distance_of(columns, n), place = first_of(columns, group, n);
            const float *sum = sums[half * n + group];
            Row dot = {0}, factor;
            for (long k = place; k < place + n * step; k += step)
                for (long t = 0; t < BLOCK; t++) dot[t] += g[k][t] * m[k][t];
            for (long t = 0; t < BLOCK; t++) factor[t] = 1.0f / sum[t];
            for (long k = place; k < place + n * step; k += step)
                for (long t = 0; t < BLOCK; t++) {
                    g[k][t] = (g[k][t] - dot[t]) * factor[t];
                    m[k][t] *= sum[t];
                }
        }
    for (long i = 0; i < n; i++) { /* through the first softmax of rows */
        Row dot = {0};
        for (long k = i * n; k < i * n + n; k++)
            for (long t = 0; t < BLOCK; t++) dot[t] += g[k][t] * m[k][t];
        for (long k = i * n; k < i * n + n; k++)
            for (long t = 0; t < BLOCK; t++) g[k][t] = (g[k][t] - dot[t]) * m[k][t];
    }
    for (long j = 0; j < n; j++) { /* and the first log-softmax of columns */
        Row sum = {0};
        for (long k = j; k < n * n; k += n)
            for (long t = 0; t < BLOCK; t++) sum[t] += g[k][t];
        for (long k = j; k < n * n; k += n)
            for (long t = 0; t < BLOCK; t++) g[k][t] -= first[k][t] * sum[t];
    }
}

/* Of a block's `count` tokens: out[m][t] = rows[t][m], and 0 in the places without a token. */
INLINE void gather(long count, long width, const float *rows, Row *out) {
    memset(out, 0, width * sizeof(Row));
    for (long t = 0; t < count; t++)
        for (long m = 0; m < width; m++) out[m][t] = rows[t * width + m];
}

INLINE void scatter(long count, long width, const Row *from, float *rows) {
    for (long t = 0; t < count; t++)
        for (long m = 0; m < width; m++) rows[t * width + m] = from[m][t];
}

/* Which of the gates belongs to mapping m: that of H_pre, H_post or H_res. */
INLINE long gate_of(long n, long m) { return m < n ? 0 : m < 2 * n ? 1 : 2; }

/* raw -> sigmoids of the first 2 n mappings and logits of the n^2 others: gate * raw * inverse + bias before. */
INLINE void squash(long n, const float *gates, const float *bias, const float *inverse, Row *z) {
    for (long m = 0; m < 2 * n + n * n; m++) {
        const float gate = gates[gate_of(n, m)], shift = bias[m];
        for (long t = 0; t < BLOCK; t++) z[m][t] = gate * z[m][t] * inverse[t] + shift;
        if (m < 2 * n)
            for (long t = 0; t < BLOCK; t++) z[m][t] = 1.0f / (1.0f + exponential(-z[m][t]));
    }
}

/* The tokens start .. start + count - 1, a block. */
INLINE void read_block(long n, long start, long count, long width, long iterations, float eps, const float *x,
                       const float *raw, const float *gates, const float *bias, float *out, float *inverse, float *post,
                       float *res) {
    const long maps = 2 * n + n * n;
    Row z[MOST_MAPPINGS], factor = {0};
    for (long t = 0; t < count; t++) {
        const float *v = x + (start + t) * n * width;
        Lanes sum = all(0.0f);
        for (long d = 0; d < n * width; d += LANES) {
            const Lanes value = load(v + d, n * width - d, 0.0f);
            sum += value * value;
        }
        inverse[start + t] = factor[t] = 1.0f / sqrtf(sum_of(sum) / (n * width) + eps);
    }
    gather(count, maps, raw + start * maps, z);
    squash(n, gates, bias, factor, z);
    for (long m = n; m < 2 * n; m++)
        for (long t = 0; t < BLOCK; t++) z[m][t] *= 2.0f;
    sinkhorn(n, iterations, z + 2 * n, 0, 0);
    scatter(count, n, z + n, post + start * n);
    scatter(count, n * n, z + 2 * n, res + start * n * n);
    for (long t = 0; t < count; t++) {
        const float *v = x + (start + t) * n * width;
        for (long d = 0; d < width; d += LANES) {
            Lanes sum = all(0.0f);
            for (long j = 0; j < n; j++) sum += z[j][t] * load(v + j * width + d, width - d, 0.0f);
            store(out + (start + t) * width + d, width - d, sum);
        }
    }
}

/* out = H_pre x (T, D); post = H_post (T, n); res = H_res (T, n, n); inverse: of the root mean square, (T). */
int streams_read_forward(long n, long tokens, long width, long iterations, float eps, const float *x, const float *raw,
                         const float *gates, const float *bias, float *out, float *inverse, float *post, float *res) {
#pragma omp parallel for schedule(static) if (tokens > PART)
    for (long start = 0; start < tokens; start += BLOCK) {
        const long count = smaller(BLOCK, tokens - start);
        if (n == 4) /* the usual number as a constant, so that its short loops become straight code */
            read_block(4, start, count, width, iterations, eps, x, raw, gates, bias, out, inverse, post, res);
        else
            read_block(n, start, count, width, iterations, eps, x, raw, gates, bias, out, inverse, post, res);
    }
    return 0;
}

/* Tokens of one part, up to `last`; totals: its sums for the gates and then the biases; sums: working memory. */
INLINE void read_part_backward(long n, long first_token, long last, long width, long iterations, const float *x,
                               const float *raw, const float *gates, const float *bias, const float *inverse,
                               const float *grad_out, const float *grad_post, const float *grad_res, float *grad_x,
                               float *grad_raw, float *totals, Row *sums) {
    const long maps = 2 * n + n * n;
    Row all_bias[MOST_MAPPINGS] = {{0}}, all_gates[3] = {{0}};
    for (long start = first_token; start < last; start += BLOCK) {
        const long count = smaller(BLOCK, last - start);
        Row z[MOST_MAPPINGS], g[MOST_MAPPINGS], first[MOST_STREAMS * MOST_STREAMS], before[MOST_MAPPINGS];
        Row factor = {0}, pre[MOST_STREAMS], along = {0};
        memcpy(factor, inverse + start, count * sizeof(float));
        gather(count, maps, raw + start * maps, before);
        memcpy(z, before, maps * sizeof(Row));
        squash(n, gates, bias, factor, z);
        memcpy(pre, z, n * sizeof(Row));
        sinkhorn(n, iterations, z + 2 * n, first, sums);
        memset(g, 0, n * sizeof(Row));
        for (long t = 0; t < count; t++)
            for (long j = 0; j < n; j++) {
                const float *v = x + ((start + t) * n + j) * width, *from = grad_out + (start + t) * width;
                Lanes sum = all(0.0f);
                for (long d = 0; d < width; d += LANES)
                    sum += load(v + d, width - d, 0.0f) * load(from + d, width - d, 0.0f);
                g[j][t] = sum_of(sum);
            }
        gather(count, n, grad_post + start * n, g + n);
        gather(count, n * n, grad_res + start * n * n, g + 2 * n);
        for (long m = 0; m < 2 * n; m++)
            for (long t = 0; t < BLOCK; t++) g[m][t] *= (m < n ? 1.0f : 2.0f) * z[m][t] * (1.0f - z[m][t]);
        sinkhorn_back(n, iterations, z + 2 * n, (const Row *)first, (const Row *)sums, g + 2 * n);
        for (long m = 0; m < maps; m++) {
            const long gate = gate_of(n, m);
            for (long t = 0; t < BLOCK; t++) {
                all_bias[m][t] += g[m][t];
                all_gates[gate][t] += g[m][t] * before[m][t] * factor[t];
                along[t] += g[m][t] * gates[gate] * before[m][t];
                g[m][t] *= gates[gate] * factor[t];
            }
        }
        scatter(count, maps, (const Row *)g, grad_raw + start * maps);
        for (long t = 0; t < count; t++) {
            /* of the norm: d inverse / d x = -inverse^3 x / (n D) */
            const float back = -along[t] * factor[t] * factor[t] * factor[t] / (n * width);
            for (long j = 0; j < n; j++) {
                const float *v = x + ((start + t) * n + j) * width, *from = grad_out + (start + t) * width;
                float *to = grad_x + ((start + t) * n + j) * width;
                for (long d = 0; d < width; d += LANES)
                    store(to + d, width - d,
                          pre[j][t] * load(from + d, width - d, 0.0f) + back * load(v + d, width - d, 0.0f));
            }
        }
    }
    for (long gate = 0; gate < 3; gate++)
        for (long t = 0; t < BLOCK; t++) totals[gate] += all_gates[gate][t];
    for (long m = 0; m < maps; m++)
        for (long t = 0; t < BLOCK; t++) totals[3 + m] += all_bias[m][t];
}

/* Its backward pass but for the projection: grad_x lacks phi^T grad_raw. */
int streams_read_backward(long n, long tokens, long width, long iterations, const float *x, const float *raw,
                          const float *gates, const float *bias, const float *inverse, const float *grad_out,
                          const float *grad_post, const float *grad_res, float *grad_x, float *grad_raw,
                          float *grad_gates, float *grad_bias) {
    const long totals = 3 + 2 * n + n * n;
    int failed = 0;
    float *of_parts = calloc((tokens + PART - 1) / PART * totals + 1, sizeof(float));
    if (!of_parts) return 1;
#pragma omp parallel for schedule(static) if (tokens > PART)
    for (long start = 0; start < tokens; start += PART) {
        const long last = smaller(start + PART, tokens);
        float *of_part = of_parts + start / PART * totals;
        Row *sums = malloc(2 * iterations * n * sizeof(Row));
        if (!sums) {
#pragma omp atomic write
            failed = 1;
        } else if (n == 4)
            read_part_backward(4, start, last, width, iterations, x, raw, gates, bias, inverse, grad_out, grad_post,
                               grad_res, grad_x, grad_raw, of_part, sums);
        else
            read_part_backward(n, start, last, width, iterations, x, raw, gates, bias, inverse, grad_out, grad_post,
                               grad_res, grad_x, grad_raw, of_part, sums);
        free(sums);
    }
    for (long i = 0; i < totals; i++) {
        float sum = 0.0f;
        for (long start = 0; start < tokens; start += PART) sum += of_parts[start / PART * totals + i];
        *(i < 3 ? grad_gates + i : grad_bias + i - 3) = sum;
    }
    free(of_parts);
    return failed;
}

/* Token t. */
INLINE void write_token(long n, long t, long width, const float *x, const float *update, const float *post,
                        const float *res, float *restrict out) {
    const float *v = x + t * n * width, *p = post + t * n, *r = res + t * n * n;
    for (long d = 0; d < width; d += LANES) {
        const long rest = width - d;
        const Lanes f = load(update + t * width + d, rest, 0.0f);
        Lanes streams[MOST_STREAMS];
        for (long j = 0; j < n; j++) streams[j] = load(v + j * width + d, rest, 0.0f);
        for (long i = 0; i < n; i++) {
            Lanes sum = p[i] * f;
            for (long j = 0; j < n; j++) sum += r[i * n + j] * streams[j];
            store(out + (t * n + i) * width + d, rest, sum);
        }
    }
}

/* out = H_res x + H_post^T update. */
int streams_write_forward(long n, long tokens, long width, const float *x, const float *update, const float *post,
                          const float *res, float *restrict out) {
#pragma omp parallel for schedule(static) if (tokens > PART)
    for (long t = 0; t < tokens; t++)
        if (n == 4)
            write_token(4, t, width, x, update, post, res, out);
        else
            write_token(n, t, width, x, update, post, res, out);
    return 0;
}

INLINE void write_token_backward(long n, long t, long width, const float *x, const float *update, const float *post,
                                 const float *res, const float *grad, float *restrict grad_x,
                                 float *restrict grad_update, float *restrict grad_post, float *restrict grad_res) {
    const float *v = x + t * n * width, *p = post + t * n, *r = res + t * n * n, *g = grad + t * n * width;
    Lanes posts[MOST_STREAMS], mixes[MOST_STREAMS * MOST_STREAMS];
    for (long i = 0; i < n; i++) posts[i] = all(0.0f);
    for (long k = 0; k < n * n; k++) mixes[k] = all(0.0f);
    for (long d = 0; d < width; d += LANES) {
        const long rest = width - d;
        const Lanes f = load(update + t * width + d, rest, 0.0f);
        Lanes grads[MOST_STREAMS], sum = all(0.0f);
        for (long i = 0; i < n; i++) {
            grads[i] = load(g + i * width + d, rest, 0.0f);
            sum += p[i] * grads[i];
            posts[i] += f * grads[i];
        }
        store(grad_update + t * width + d, rest, sum);
        for (long j = 0; j < n; j++) {
            const Lanes stream = load(v + j * width + d, rest, 0.0f);
            Lanes mixed = all(0.0f);
            for (long i = 0; i < n; i++) {
                mixed += r[i * n + j] * grads[i];
                mixes[i * n + j] += stream * grads[i];
            }
            store(grad_x + (t * n + j) * width + d, rest, mixed);
        }
    }
    for (long i = 0; i < n; i++) grad_post[t * n + i] = sum_of(posts[i]);
    for (long k = 0; k < n * n; k++) grad_res[t * n * n + k] = sum_of(mixes[k]);
}

/* Its backward pass. */
int streams_write_backward(long n, long tokens, long width, const float *x, const float *update, const float *post,
                           const float *res, const float *grad, float *restrict grad_x, float *restrict grad_update,
                           float *restrict grad_post, float *restrict grad_res) {
#pragma omp parallel for schedule(static) if (tokens > PART)
    for (long t = 0; t < tokens; t++)
        if (n == 4)
            write_token_backward(4, t, width, x, update, post, res, grad, grad_x, grad_update, grad_post, grad_res);
        else
            write_token_backward(n, t, width, x, update, post, res, grad, grad_x, grad_update, grad_post, grad_res);
    return 0;
}
