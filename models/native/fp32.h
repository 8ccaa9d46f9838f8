/* Matmuls in fp32 of small matrices that lie in the cache, ROWS x WIDTH sums at a time in registers. */
#pragma once
#include "lanes.h"

enum { ROWS = 8, WIDTH = 32, COLUMNS = WIDTH / LANES }; /* 16 registers of AVX-512, which hide the latency of a sum */

/* Factors in fp32: a (m, k) at a[row * row_step + i * step], b (k, n) with `stride` numbers in a row. */
typedef struct {
    const float *a;
    long row_step, step;
    const float *b;
    long stride;
} Factors;

/* The first `rows` rows of out (rows, n) = or += a b, and of their columns at most WIDTH; all sums in registers. */
INLINE void multiply_rows_fp32(const long rows, long n, long k, Factors f, float *restrict out, long to,
                               int accumulate) {
    Lanes sums[ROWS * COLUMNS];
    for (long row = 0; row < rows; row++)
        for (long j = 0; j < COLUMNS; j++)
            sums[row * COLUMNS + j] =
                accumulate ? load(out + row * to + j * LANES, n - j * LANES, 0.0f) : all(0.0f);
    for (long i = 0; i < k; i++) {
        Lanes right[COLUMNS];
        for (long j = 0; j < COLUMNS; j++) right[j] = load(f.b + i * f.stride + j * LANES, n - j * LANES, 0.0f);
        for (long row = 0; row < rows; row++)
            for (long j = 0; j < COLUMNS; j++)
                sums[row * COLUMNS + j] += all(f.a[row * f.row_step + i * f.step]) * right[j];
    }
    for (long row = 0; row < rows; row++)
        for (long j = 0; j < COLUMNS; j++)
            store(out + row * to + j * LANES, n - j * LANES, sums[row * COLUMNS + j]);
}

/* All rows of out (m, n), and of their columns at most WIDTH. */
INLINE void multiply_columns_fp32(long m, long n, long k, Factors f, float *restrict out, long to, int accumulate) {
    long row = 0;
    for (; row + ROWS <= m; row += ROWS, f.a += ROWS * f.row_step)
        multiply_rows_fp32(ROWS, n, k, f, out + row * to, to, accumulate);
    for (; row < m; row++, f.a += f.row_step) multiply_rows_fp32(1, n, k, f, out + row * to, to, accumulate);
}

/* out (m, n) = or += a b, with `to` numbers in a row of out. */
static void multiply_fp32(long m, long n, long k, Factors f, float *restrict out, long to, int accumulate) {
    for (; n >= WIDTH; n -= WIDTH, f.b += WIDTH, out += WIDTH)
        multiply_columns_fp32(m, WIDTH, k, f, out, to, accumulate); /* known to the compiler: no masks */
    if (n > 0) multiply_columns_fp32(m, n, k, f, out, to, accumulate);
}
