/* The routed experts of a whole MoE layer in one pass: tokens are gathered, multiplied, weighted and summed back
 * without leaving the cache. Definition: models/expert_kernels.py, `swiglu_loop` between `dispatch` and `combine`.
 *
 *     out_t = sum over the experts e of t of  w_te * down_e( silu(gate_e(x_t)) * up_e(x_t) )
 *
 * T tokens, K experts per token, E experts, D model width, F expert width. The master weights are read in fp32 and
 * their gradients written in fp32: no copy of them in bf16 is ever kept.
 */
#include "tiles.h"

enum { ROWS = 128 }; /* of one expert at a time: with its weights they fill half of a 2 MiB second-level cache */

/* Pairs (token, k) in the order of their experts: pairs[first[e]] to pairs[first[e + 1]] are those of e. */
typedef struct {
    long *first;
    int32_t *pairs;
} Order;

/* Check `scratch` before using the result. */
static Order sort_by_expert(Scratch *scratch, long count, long experts, const int64_t *ids) {
    long *first = take(scratch, experts + 1, sizeof(long));
    int32_t *pairs = take(scratch, count, sizeof(int32_t));
    if (scratch->failed) return (Order){NULL, NULL};
    for (long i = 0; i < count; i++) first[ids[i] + 1]++;
    for (long e = 0; e < experts; e++) first[e + 1] += first[e];
    for (long i = 0; i < count; i++) pairs[first[ids[i]]++] = (int32_t)i;
    for (long e = experts; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
    return (Order){first, pairs};
}

/* Rows of source (T, D) for `count` pairs; the rest up to a multiple of BLOCK is zero. Returns the padded count. */
static long gather(long count, long top_k, const int32_t *pairs, long width, const bf16 *source, bf16 *restrict rows) {
    long stride = padded(width);
    for (long i = 0; i < count; i++) memcpy(rows + i * stride, source + pairs[i] / top_k * width, width * sizeof(bf16));
    memset(rows + count * stride, 0, (padded(count) - count) * stride * sizeof(bf16));
    return padded(count);
}

/* result (T, D) = or += rows, each at its token. */
static void scatter(long count, long top_k, const int32_t *pairs, long width, const float *rows, int add,
                    float *restrict result) {
    for (long i = 0; i < count; i++) {
        const float *row = rows + i * padded(width);
        float *out = result + pairs[i] / top_k * width;
        if (add)
            for (long j = 0; j < width; j++) out[j] += row[j];
        else
            memcpy(out, row, width * sizeof(float));
    }
}

/* hidden = weight * silu(gate) * up of one row; pre holds gate and up side by side. */
static inline void swiglu_row(long width, float weight, const bf16 *pre, bf16 *restrict hidden) {
    for (long j = 0; j < width; j += LANES) {
        const Lanes gate = load_bf16(pre + j, width - j, 0.0f), up = load_bf16(pre + width + j, width - j, 0.0f);
        store_bf16(hidden + j, width - j, weight * up * gate * sigmoid_of(gate));
    }
}

/* One row of the backward pass. Returns the gradient of the weight. */
static inline float swiglu_row_backward(long width, float weight, const bf16 *pre, const float *grad,
                                        bf16 *restrict hidden, bf16 *restrict grad_pre) {
    Lanes sum = all(0.0f);
#pragma GCC ivdep /* the outputs do not overlap */
    for (long j = 0; j < width; j += LANES) {
        const long n = width - j;
        const Lanes gate = load_bf16(pre + j, n, 0.0f), up = load_bf16(pre + width + j, n, 0.0f);
        const Lanes g = load(grad + j, n, 0.0f);
        const Lanes sigmoid = sigmoid_of(gate), silu = gate * sigmoid, d = g * weight;
        sum += g * silu * up;
        store_bf16(hidden + j, n, weight * silu * up);
        store_bf16(grad_pre + width + j, n, d * silu);
        store_bf16(grad_pre + j, n, d * up * (sigmoid + silu * (1.0f - sigmoid)));
    }
    return sum_of(sum);
}

/* x (T, D), ids and weights (T, K), gate_up (E, D, 2F), down (E, F, D); adds to out (T, D), or writes it where K = 1 and
 * `add` is 0. Writes pre (T K, 2F) bf16, gate and up of every pair in the order of the experts, for the backward pass: to
 * compute them again costs a quarter of its products. 1: no memory. */
int experts_forward(long tokens, long top_k, long experts, long width, long hidden_width, const bf16 *x,
                    const int64_t *ids, const float *weights, const float *gate_up, const float *down,
                    long add, float *restrict out, bf16 *restrict pre) {
    const long d = padded(width), f = padded(hidden_width), g = padded(2 * hidden_width);
    Scratch scratch = {0};
    const Order order = sort_by_expert(&scratch, tokens * top_k, experts, ids);
    bf16 *narrowed = take(&scratch, d * g > f * d ? d * g : f * d, sizeof(bf16));
    uint32_t *gate_up_pairs = take(&scratch, d * g / 2, sizeof(uint32_t));
    uint32_t *down_pairs = take(&scratch, f * d / 2, sizeof(uint32_t));
    bf16 *rows = take(&scratch, ROWS * d, sizeof(bf16)), *hidden = take(&scratch, ROWS * f, sizeof(bf16));
    float *sums = take(&scratch, ROWS * g, sizeof(float)), *result = take(&scratch, ROWS * d, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    tiles_begin();
    for (long e = 0; e < experts; e++) {
        const long begin = order.first[e], end = order.first[e + 1];
        if (begin == end) continue;
        narrow_matrix(width, 2 * hidden_width, gate_up + e * width * 2 * hidden_width, narrowed);
        const Tiles gate_up_tiles = tiles_of(d, g, narrowed, g, gate_up_pairs);
        narrow_matrix(hidden_width, width, down + e * hidden_width * width, narrowed);
        const Tiles down_tiles = tiles_of(f, d, narrowed, d, down_pairs);
        for (long start = begin; start < end; start += ROWS) {
            const long count = end - start < ROWS ? end - start : ROWS;
            const int32_t *chunk = order.pairs + start;
            gather(count, top_k, chunk, width, x, rows);
            multiply(stepped(count), g, d, rows, d, gate_up_tiles, sums, g, 0);
            for (long i = 0; i < count; i++) {
                bf16 *kept = pre + (start + i) * 2 * hidden_width;
                narrow_row(2 * hidden_width, 1.0f, sums + i * g, kept);
                swiglu_row(hidden_width, weights[chunk[i]], kept, hidden + i * f);
            }
            multiply(stepped(count), d, f, hidden, f, down_tiles, result, d, 0);
            scatter(count, top_k, chunk, width, result, add, out);
        }
    }
    tiles_end();
    return release(&scratch), 0;
}

/* grad (T, D) of out. Adds to grad_x (T, D), or writes it, as in the forward pass; writes grad_weights (T, K),
 * grad_gate_up and grad_down. 1: no memory. */
int experts_backward(long tokens, long top_k, long experts, long width, long hidden_width, const bf16 *x,
                     const int64_t *ids, const float *weights, const float *gate_up, const float *down, const bf16 *pre,
                     const bf16 *grad, long add, float *restrict grad_x, float *restrict grad_weights,
                     float *restrict grad_gate_up, float *restrict grad_down) {
    const long d = padded(width), f = padded(hidden_width), g = padded(2 * hidden_width);
    Scratch scratch = {0};
    const Order order = sort_by_expert(&scratch, tokens * top_k, experts, ids);
    bf16 *narrowed = take(&scratch, d * g > f * d ? d * g : f * d, sizeof(bf16));
    uint32_t *gate_up_back = take(&scratch, d * g / 2, sizeof(uint32_t)); /* of the transpose */
    uint32_t *down_back = take(&scratch, f * d / 2, sizeof(uint32_t));
    /* rows and row gradients of a chunk, then hidden layer and gradient of what comes before it */
    bf16 *rows = take(&scratch, ROWS * d, sizeof(bf16)), *grad_rows = take(&scratch, ROWS * d, sizeof(bf16));
    bf16 *hidden = take(&scratch, ROWS * f, sizeof(bf16)), *grad_pre = take(&scratch, ROWS * g, sizeof(bf16));
    bf16 *turned = take(&scratch, ROWS * (d > f ? d : f), sizeof(bf16));
    uint32_t *right = take(&scratch, ROWS * (d > g ? d : g) / 2, sizeof(uint32_t));
    float *result = take(&scratch, ROWS * (d > f ? d : f), sizeof(float));
    const int exact = d == width && f == hidden_width && g == 2 * hidden_width; /* sums need no room of their own */
    float *room_gate_up = take(&scratch, exact ? 0 : d * g, sizeof(float));
    float *room_down = take(&scratch, exact ? 0 : f * d, sizeof(float));
    if (scratch.failed) return release(&scratch), 1;

    tiles_begin();
    for (long e = 0; e < experts; e++) {
        float *grad_in = grad_gate_up + e * width * 2 * hidden_width, *grad_out = grad_down + e * hidden_width * width;
        const long begin = order.first[e], end = order.first[e + 1];
        if (begin == end) {
            memset(grad_in, 0, width * 2 * hidden_width * sizeof(float));
            memset(grad_out, 0, hidden_width * width * sizeof(float));
            continue;
        }
        float *sum_gate_up = exact ? grad_in : room_gate_up, *sum_down = exact ? grad_out : room_down;
        narrow_matrix(width, 2 * hidden_width, gate_up + e * width * 2 * hidden_width, narrowed);
        const Tiles gate_up_turned = tiles_of_transpose(d, g, narrowed, gate_up_back);
        narrow_matrix(hidden_width, width, down + e * hidden_width * width, narrowed);
        const Tiles down_turned = tiles_of_transpose(f, d, narrowed, down_back);
        for (long start = begin; start < end; start += ROWS) {
            const long count = end - start < ROWS ? end - start : ROWS, more = start > begin;
            const int32_t *chunk = order.pairs + start;
            const long height = gather(count, top_k, chunk, width, x, rows);
            gather(count, top_k, chunk, width, grad, grad_rows);
            multiply(stepped(count), f, d, grad_rows, d, down_turned, result, f, 0);
            for (long i = 0; i < count; i++)
                grad_weights[chunk[i]] =
                    swiglu_row_backward(hidden_width, weights[chunk[i]], pre + (start + i) * 2 * hidden_width,
                                        result + i * f, hidden + i * f, grad_pre + i * g);
            memset(hidden + count * f, 0, (height - count) * f * sizeof(bf16));
            memset(grad_pre + count * g, 0, (height - count) * g * sizeof(bf16));
            multiply(stepped(count), d, g, grad_pre, g, gate_up_turned, result, d, 0);
            scatter(count, top_k, chunk, width, result, add, grad_x);
            transpose(height, d, rows, d, turned, height);
            multiply(d, g, stepped(count), turned, height, tiles_of(height, g, grad_pre, g, right), sum_gate_up, g, more);
            transpose(height, f, hidden, f, turned, height);
            multiply(f, d, stepped(count), turned, height, tiles_of(height, d, grad_rows, d, right), sum_down, d, more);
        }
        if (exact) continue;
        unpad(width, 2 * hidden_width, sum_gate_up, g, grad_in);
        unpad(hidden_width, width, sum_down, d, grad_out);
    }
    tiles_end();
    return release(&scratch), 0;
}

/* Whether the matrix unit may be used; asks for it. */
int matrix_unit(void) { return tiles_allowed(); }

/* Whether the loops of these kernels can run in more than one thread. */
int several_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
