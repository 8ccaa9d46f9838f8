/* Matmuls of bf16 blocks with fp32 sums, on the AMX unit of the processor where it has one.
 *
 * The unit multiplies tiles: A of 16 rows x 32 values, row-major; B of 32 x 16 values in *pairs*, the two values of
 * rows 2k and 2k + 1 side by side; C of 16 x 16 fp32 sums (Intel 64 and IA-32 manual, volume 2, TDPBF16PS). A matrix in
 * pairs, written (rows / 2, columns, 2) below, is therefore what every right operand must be brought into.
 *
 * All sizes are multiples of BLOCK; callers pad with zeros.
 */
#pragma once
#include <stdlib.h>

#include "common.h"

enum { BLOCK = 32 };

static inline long padded(long size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Eight tiles of 16 rows of 64 bytes. Every kernel begins with this and ends with tiles_end. */
static void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
}

static void tiles_end(void) { _tile_release(); }

/* Linux lets a process use the unit's large registers only after it asked (Documentation/arch/x86/xstate.rst). */
static inline int tiles_allowed(void) {
    const long request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* c (32, 32) = or += a (32, k) b (k, 32): two by two tiles, so that each loaded tile is used twice. */
static inline void multiply_block(long k, const bf16 *a, long lda, const bf16 *b, long ldb, float *c, long ldc,
                                  int accumulate) {
    if (accumulate) {
        _tile_loadd(0, c, 4 * ldc);
        _tile_loadd(1, c + 16, 4 * ldc);
        _tile_loadd(2, c + 16 * ldc, 4 * ldc);
        _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < k; i += BLOCK) {
        const bf16 *pairs = b + i * ldb;
        _tile_loadd(4, a + i, 2 * lda);
        _tile_loadd(6, pairs, 4 * ldb);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pairs + 32, 4 * ldb);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + i, 2 * lda);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * ldc);
    _tile_stored(1, c + 16, 4 * ldc);
    _tile_stored(2, c + 16 * ldc, 4 * ldc);
    _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
}

#else
static void tiles_begin(void) {}
static void tiles_end(void) {}
static inline int tiles_allowed(void) { return 0; }

/* The same in plain C, for processors without the unit: correct, not fast. */
static inline void multiply_block(long k, const bf16 *a, long lda, const bf16 *b, long ldb, float *c, long ldc,
                                  int accumulate) {
    for (long row = 0; row < BLOCK; row++)
        for (long column = 0; column < BLOCK; column++) {
            float sum = accumulate ? c[row * ldc + column] : 0.0f;
            for (long i = 0; i < k; i++)
                sum += widen(a[row * lda + i]) * widen(b[(i / 2 * ldb + column) * 2 + i % 2]);
            c[row * ldc + column] = sum;
        }
}
#endif

/* c (m, n) = or += a (m, k) b (k, n); b in pairs, lda, ldb and ldc in values of one row. */
static void multiply(long m, long n, long k, const bf16 *a, long lda, const bf16 *b, long ldb, float *c, long ldc,
                     int accumulate) {
    for (long column = 0; column < n; column += BLOCK)
        for (long row = 0; row < m; row += BLOCK)
            multiply_block(k, a + row * lda, lda, b + 2 * column, ldb, c + row * ldc + column, ldc, accumulate);
}

/* Two bf16 values as they lie side by side in memory. */
static inline uint32_t pair(bf16 first, bf16 second) { return first | (uint32_t)second << 16; }

/* source (rows, columns) -> the same in pairs; rows even. */
static void pair_rows(long rows, long columns, const bf16 *source, uint32_t *restrict pairs) {
    for (long row = 0; row < rows; row += 2) {
        const bf16 *first = source + row * columns, *second = first + columns;
        for (long i = 0; i < columns; i++) pairs[row / 2 * columns + i] = pair(first[i], second[i]);
    }
}

/* source (rows, columns) -> its transpose (columns, rows), row-major with `stride` values in a row; rows even. */
static void transpose(long rows, long columns, const bf16 *source, bf16 *restrict result, long stride) {
    for (long row = 0; row < rows; row += 2) {
        const bf16 *first = source + row * columns, *second = first + columns;
        for (long i = 0; i < columns; i++) {
            uint32_t both = pair(first[i], second[i]);
            memcpy(result + i * stride + row, &both, sizeof both);
        }
    }
}

/* fp32 source (rows, columns) -> bf16 (padded rows, padded columns), zeros around it. */
static inline void narrow_matrix(long rows, long columns, const float *source, bf16 *restrict result) {
    long width = padded(columns), height = padded(rows);
    for (long row = 0; row < rows; row++) {
        for (long i = 0; i < columns; i++) result[row * width + i] = narrow(source[row * columns + i]);
        memset(result + row * width + columns, 0, (width - columns) * sizeof(bf16));
    }
    memset(result + rows * width, 0, (height - rows) * width * sizeof(bf16));
}

/* source (rows, columns) -> its transpose in pairs (columns / 2, rows, 2): the right operand of x source^T. */
static void pair_columns(long rows, long columns, const bf16 *source, uint32_t *restrict pairs) {
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < columns; i += 2)
            pairs[i / 2 * rows + row] = pair(source[row * columns + i], source[row * columns + i + 1]);
}

/* Working memory of one call of a kernel. */
typedef struct {
    void *blocks[16];
    int count, failed;
} Scratch;

/* Zeroed, aligned to a cache line. Where the machine has no memory left: NULL, and `failed` is set. */
static void *take(Scratch *scratch, size_t count, size_t size) {
    size_t bytes = (count * size + 63) / 64 * 64;
    void *block = aligned_alloc(64, bytes);
    if (block == NULL) return scratch->failed = 1, NULL;
    scratch->blocks[scratch->count++] = block;
    return memset(block, 0, bytes);
}

static void release(Scratch *scratch) {
    while (scratch->count) free(scratch->blocks[--scratch->count]);
}
