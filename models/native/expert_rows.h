/* The experts' rows and weights on their way into products and out of them. */
#pragma once
#include "tiles.h"

/* While a row is gathered the one so many further on is fetched: the processor cannot guess their places. */
enum { AHEAD = 6 };

/* Rows of source (T, D) of `count` tokens; the rest up to a multiple of BLOCK is zero. */
static inline void gather(long count, const int32_t *tokens, long width, const bf16 *source, bf16 *restrict rows) {
    const long stride = padded(width), whole = width / BLOCK * BLOCK;
    for (long i = 0; i < count; i++) {
        const bf16 *from = source + tokens[i] * width;
        bf16 *to = rows + i * stride;
        if (i + AHEAD < count)
            for (long j = 0; j < width; j += BLOCK) __builtin_prefetch(source + tokens[i + AHEAD] * width + j);
        for (long j = 0; j < whole; j += BLOCK) memcpy(to + j, from + j, BLOCK * sizeof(bf16));
        if (whole < width) memcpy(to + whole, from + whole, (width - whole) * sizeof(bf16));
    }
    memset(rows + count * stride, 0, (padded(count) - count) * stride * sizeof(bf16));
}

/* The same rows as columns of result (padded D, padded count), its rows `stride` values apart; `zeros` is a row. */
static inline void gather_turned(long count, const int32_t *tokens, long width, const bf16 *source, const bf16 *zeros,
                                 bf16 *restrict result, long stride) {
    for (long start = 0; start < count; start += BLOCK, result += BLOCK) {
        const bf16 *rows[BLOCK];
        for (long i = 0; i < BLOCK; i++) rows[i] = start + i < count ? source + tokens[start + i] * width : zeros;
#ifdef __AVX512BF16__
        for (long column = 0; column < padded(width); column += 16) {
            const __mmask16 some = first_lanes(width - column);
            __m512i words[16];
            for (int j = 0; j < 16; j++)
                words[j] = pairs_of_halves(_mm256_maskz_loadu_epi16(some, rows[2 * j] + column),
                                           _mm256_maskz_loadu_epi16(some, rows[2 * j + 1] + column));
            turn(words);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(result + (column + j) * stride, words[j]);
        }
#else
        for (long j = 0; j < padded(width); j++)
            for (long i = 0; i < BLOCK; i++) result[j * stride + i] = j < width ? rows[i][j] : 0;
#endif
    }
}

/* The right operand b = source (rows, columns) in fp32, rounded to bf16, with zeros around it. */
static inline Tiles tiles_of_floats(long rows, long columns, const float *source, uint32_t *restrict pairs) {
    const long height = padded(rows);
    for (long row = 0; row < height; row += 2) {
        const float *first = source + row * columns, *second = first + columns;
        uint32_t *to = pairs + row / 32 * TILE_PAIRS + row % 32 / 2 * 16;
        for (long column = 0; column < padded(columns); column += 16, to += height / 32 * TILE_PAIRS)
            for (long i = 0; i < 16; i += LANES) {
                const long j = column + i, n = columns - j;
                store_pairs(to + i, load(first + j, row < rows ? n : 0, 0.0f),
                            load(second + j, row + 1 < rows ? n : 0, 0.0f));
            }
    }
    return (Tiles){pairs, height / 32};
}

/* The right operand b = source^T, likewise. */
static inline Tiles tiles_of_turned_floats(long rows, long columns, const float *source, uint32_t *restrict pairs) {
    uint32_t *to = pairs;
    for (long row = 0; row < padded(rows); row += 16)
        for (long i = 0; i < padded(columns); i += BLOCK, to += TILE_PAIRS) {
#ifdef __AVX512BF16__
            __m512i words[16];
            for (int j = 0; j < 16; j++) {
                const float *from = source + (row + j) * columns + i;
                const long n = row + j < rows ? columns - i : 0;
                words[j] = (__m512i)_mm512_cvtne2ps_pbh(load(from + 16, n - 16, 0.0f), load(from, n, 0.0f));
            }
            turn(words);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + j * 16, words[j]);
#else
            for (long j = 0; j < 16; j++)
                for (long k = 0; k < BLOCK; k += 2) {
                    const float *from = source + (row + j) * columns + i + k;
                    const long n = row + j < rows ? columns - i - k : 0;
                    to[k / 2 * 16 + j] = pair(n > 0 ? narrow(from[0]) : 0, n > 1 ? narrow(from[1]) : 0);
                }
#endif
        }
    return (Tiles){pairs, padded(columns) / BLOCK};
}

/* out (T, D) += rows (count, d), each at its token. */
static inline void scatter(long count, const int32_t *tokens, long width, const float *rows, float *restrict out) {
    for (long i = 0; i < count; i++) {
        const float *from = rows + i * padded(width);
        float *to = out + tokens[i] * width;
        for (long j = 0; j < width; j += LANES) {
            const long n = width - j;
            store(to + j, n, load(to + j, n, 0.0f) + load(from + j, n, 0.0f));
        }
    }
}

/* hidden = weight * silu(gate) * up of LANES columns; pre holds gate and up side by side. */
INLINE void swiglu_lanes(long width, long j, long n, float weight, const float *sums, bf16 *restrict pre,
                         bf16 *restrict hidden) {
    const Lanes gate = load(sums + j, n, 0.0f), up = load(sums + width + j, n, 0.0f);
    store_bf16(pre + j, n, gate);
    store_bf16(pre + width + j, n, up);
    store_bf16(hidden + j, n, weight * up * gate * sigmoid_of(gate));
}

static inline void swiglu_row(long width, float weight, const float *sums, bf16 *restrict pre, bf16 *restrict hidden) {
    long j = 0;
#pragma GCC ivdep /* the outputs do not overlap */
    for (; j + LANES <= width; j += LANES) swiglu_lanes(width, j, LANES, weight, sums, pre, hidden);
    if (j < width) swiglu_lanes(width, j, width - j, weight, sums, pre, hidden);
}

/* LANES columns of the backward pass. Returns their part of the gradient of the weight. */
INLINE Lanes swiglu_lanes_backward(long width, long j, long n, float weight, const bf16 *pre, const float *grad,
                                   bf16 *restrict hidden, bf16 *restrict grad_pre) {
    const Lanes gate = load_bf16(pre + j, n, 0.0f), up = load_bf16(pre + width + j, n, 0.0f);
    const Lanes g = load(grad + j, n, 0.0f);
    const Lanes sigmoid = sigmoid_of(gate), silu = gate * sigmoid, d = g * weight, product = silu * up;
    store_bf16(hidden + j, n, weight * product);
    store_bf16(grad_pre + width + j, n, d * silu);
    store_bf16(grad_pre + j, n, d * up * (sigmoid + silu * (1.0f - sigmoid)));
    return g * product;
}

/* One row of it. Returns the gradient of the weight. */
static inline float swiglu_row_backward(long width, float weight, const bf16 *pre, const float *grad,
                                        bf16 *restrict hidden, bf16 *restrict grad_pre) {
    Lanes sum = all(0.0f);
    long j = 0;
#pragma GCC ivdep /* the outputs do not overlap */
    for (; j + LANES <= width; j += LANES)
        sum += swiglu_lanes_backward(width, j, LANES, weight, pre, grad, hidden, grad_pre);
    if (j < width) sum += swiglu_lanes_backward(width, j, width - j, weight, pre, grad, hidden, grad_pre);
    return sum_of(sum);
}
