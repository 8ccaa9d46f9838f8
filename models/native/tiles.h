/* Matmuls of bf16 blocks with fp32 sums, on the processor's unit for them: AMX, or the dot products of AVX-512.
 *
 * AMX multiplies tiles: A of 16 rows x 32 values, row-major; B of 32 x 16 values in *pairs*, the two values of rows 2k
 * and 2k + 1 side by side; C of 16 x 16 fp32 sums (Intel 64 and IA-32 manual, volume 2, TDPBF16PS). A left operand may
 * lie in memory as it is; a right operand is brought into `Tiles`: one tile of B after the other, all of the first 16
 * columns first. A tile is then 16 whole cache lines side by side; rows at a distance of a power of two would fall
 * into the same few sets of the cache.
 *
 * AVX-512 (AMD since Zen 4, Intel's Cooper Lake) multiplies one pair of A with 16 pairs of B, a cache line of a tile,
 * and adds to 16 sums (VDPBF16PS): the same layout serves both.
 *
 * All sizes in memory are multiples of BLOCK, padded with zeros by the callers. A product may leave out rows and terms
 * of that padding beyond a multiple of STEP.
 */
#pragma once
#include <stdlib.h>

#include "lanes.h"

enum { BLOCK = 32, TILE_PAIRS = 16 * 16 };

typedef struct {
    uint32_t *pairs; /* (columns / 16, rows / 32, 16, 16): two values each */
    long row_tiles;  /* rows / 32 */
} Tiles;

static inline long padded(long size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

/* Eight tiles of 16 rows of 64 bytes. Every kernel begins with this and ends with tiles_end. */
enum { STEP = BLOCK };

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

/* c (32, 32) = or += a (32, k) b (k, 32): two by two tiles, so that each loaded tile is used twice. b is the first
 * tile of the first 16 columns, `next` pairs before that of the other 16. */
INLINE void multiply_block(long k, const bf16 *a, long lda, const uint32_t *b, long next, float *c, long ldc,
                                  int accumulate) {
    __asm__ volatile("" ::: "memory"); /* gcc 12 does not know that a tile load reads memory */
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
    for (long i = 0; i < k; i += BLOCK, b += TILE_PAIRS) {
        _tile_loadd(4, a + i, 2 * lda);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + next, 64);
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

#elif defined(__AVX512BF16__)
static void tiles_begin(void) {}
static void tiles_end(void) {}
static inline int tiles_allowed(void) { return 1; }

enum { STEP = 8 }; /* rows: 16 of the 32 registers hold their sums, enough to hide the latency of a dot product */

/* sums (STEP, 32) += a (STEP, k) b (k, 32), all sums in registers; b and `next` as above. */
INLINE void add_products(long k, const bf16 *a, long lda, const uint32_t *b, long next, Lanes sums[2 * STEP]) {
    for (long i = 0; i < k; i += 2, b += 16) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(b), second = (__m512bh)_mm512_loadu_si512(b + next);
        for (long row = 0; row < STEP; row++) {
            int32_t both;
            memcpy(&both, a + row * lda + i, sizeof both);
            const __m512bh values = (__m512bh)_mm512_set1_epi32(both);
            sums[2 * row] = _mm512_dpbf16_ps(sums[2 * row], values, first);
            sums[2 * row + 1] = _mm512_dpbf16_ps(sums[2 * row + 1], values, second);
        }
    }
}

/* c (STEP, 32) = or += a (STEP, k) b (k, 32). */
INLINE void multiply_block(long k, const bf16 *a, long lda, const uint32_t *b, long next, float *c, long ldc,
                           int accumulate) {
    Lanes sums[2 * STEP];
    for (long row = 0; row < STEP; row++) {
        sums[2 * row] = accumulate ? _mm512_loadu_ps(c + row * ldc) : _mm512_setzero_ps();
        sums[2 * row + 1] = accumulate ? _mm512_loadu_ps(c + row * ldc + 16) : _mm512_setzero_ps();
    }
    add_products(k, a, lda, b, next, sums);
    for (long row = 0; row < STEP; row++) {
        _mm512_storeu_ps(c + row * ldc, sums[2 * row]);
        _mm512_storeu_ps(c + row * ldc + 16, sums[2 * row + 1]);
    }
}

#else
static void tiles_begin(void) {}
static void tiles_end(void) {}
static inline int tiles_allowed(void) { return 0; }

enum { STEP = BLOCK };

/* The same in plain C, for processors without the unit: correct, not fast. */
INLINE void multiply_block(long k, const bf16 *a, long lda, const uint32_t *b, long next, float *c, long ldc,
                                  int accumulate) {
    for (long row = 0; row < BLOCK; row++)
        for (long column = 0; column < BLOCK; column++) {
            const uint32_t *pairs = b + column / 16 * next + column % 16;
            float sum = accumulate ? c[row * ldc + column] : 0.0f;
            for (long i = 0; i < k; i += 2, pairs += 16)
                sum += widen(a[row * lda + i]) * widen((bf16)*pairs) +
                       widen(a[row * lda + i + 1]) * widen((bf16)(*pairs >> 16));
            c[row * ldc + column] = sum;
        }
}
#endif

/* sums (STEP, 32) = a (STEP, k) b (k, 32), for a caller that uses them at once: AVX-512 keeps them in registers. */
INLINE void multiply_lanes(long k, const bf16 *a, long lda, Tiles b, Lanes sums[STEP * BLOCK / LANES]) {
    const long next = b.row_tiles * TILE_PAIRS;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    Lanes registers[2 * STEP];
    for (long i = 0; i < 2 * STEP; i++) registers[i] = all(0.0f);
    add_products(k, a, lda, b.pairs, next, registers);
    for (long i = 0; i < 2 * STEP; i++) sums[i] = registers[i];
#else
    multiply_block(k, a, lda, b.pairs, next, (float *)sums, BLOCK, 0);
#endif
}

static inline long stepped(long size) { return (size + STEP - 1) / STEP * STEP; }

/* Memory that is used next, fetched into the cache between the blocks of a product, which hardly needs the bus. */
enum { PIECE = 256, MOST_PIECES = 1024, AT_ONCE = 4 }; /* bytes; pieces, a quarter of a 1 MiB cache; pieces per block */

typedef struct {
    const char *pieces[MOST_PIECES];
    long next, end;
} Ahead;

static inline void will_use(Ahead *ahead, const void *from, long bytes) {
    for (const char *at = from; at < (const char *)from + bytes && ahead->end < MOST_PIECES; at += PIECE)
        ahead->pieces[ahead->end++] = at;
}

static inline void fetch(Ahead *ahead) {
    for (const long end = smaller(ahead->end, ahead->next + AT_ONCE); ahead->next < end; ahead->next++)
        for (long line = 0; line < PIECE; line += 64) __builtin_prefetch(ahead->pieces[ahead->next] + line);
    if (ahead->next == ahead->end) ahead->next = ahead->end = 0;
}

/* c (m, n) = or += a (m, k) b (k, n), with the first k rows and n columns of b; lda and ldc in values of one row. Not
 * inlined: among other loops gcc 12 lacks registers for this one. */
static __attribute__((noinline)) void multiply_ahead(long m, long n, long k, const bf16 *a, long lda, Tiles b, float *c,
                                                     long ldc, int accumulate, Ahead *ahead) {
    const long next = b.row_tiles * TILE_PAIRS;
    for (long column = 0; column < n; column += BLOCK)
        for (long row = 0; row < m; row += STEP) {
            fetch(ahead);
            multiply_block(k, a + row * lda, lda, b.pairs + column / 16 * next, next, c + row * ldc + column, ldc,
                           accumulate);
        }
}

static inline void multiply(long m, long n, long k, const bf16 *a, long lda, Tiles b, float *c, long ldc,
                            int accumulate) {
    Ahead nothing;
    nothing.next = nothing.end = 0;
    multiply_ahead(m, n, k, a, lda, b, c, ldc, accumulate, &nothing);
}

/* Two bf16 values as they lie side by side in memory. */
static inline uint32_t pair(bf16 first, bf16 second) { return first | (uint32_t)second << 16; }

#ifdef __AVX512BF16__
/* Pairs of 16 values of two rows. */
static inline __m512i pairs_of_halves(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

static inline __m512i pairs_of_rows(const bf16 *first, const bf16 *second) {
    return pairs_of_halves(_mm256_loadu_si256((const void *)first), _mm256_loadu_si256((const void *)second));
}

/* Sixteen rows of sixteen pairs -> their transpose: within lanes of 128 bits first, then the lanes. */
INLINE void turn(__m512i rows[16]) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) { /* lane l of rows[4 g + i] holds column 4 l + i of the rows 4 g to 4 g + 3 */
        half[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
        half[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
        half[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
        half[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(half[i], half[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(half[i], half[8 + i], 0xdd);
        rows[4 + i] = _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0x88);
        rows[12 + i] = _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0xdd);
    }
}
#endif

/* The right operand b = source (rows, columns), whose rows are `stride` values apart. */
static inline Tiles tiles_of(long rows, long columns, const bf16 *source, long stride, uint32_t *restrict pairs) {
    for (long row = 0; row < rows; row += 2) {
        const bf16 *first = source + row * stride, *second = first + stride;
        uint32_t *to = pairs + row / 32 * TILE_PAIRS + row % 32 / 2 * 16;
        for (long column = 0; column < columns; column += 16, to += rows / 32 * TILE_PAIRS)
#ifdef __AVX512BF16__
            _mm512_storeu_si512(to, pairs_of_rows(first + column, second + column));
#else
            for (long i = 0; i < 16; i++) to[i] = pair(first[column + i], second[column + i]);
#endif
    }
    return (Tiles){pairs, rows / 32};
}

/* The right operand b = source^T (columns, rows), of source (rows, columns). */
static inline Tiles tiles_of_transpose(long rows, long columns, const bf16 *source, uint32_t *restrict pairs) {
#ifdef __AVX512BF16__
    for (long row = 0; row < rows; row += 16)
        for (long i = 0; i < columns; i += BLOCK) {
            uint32_t *to = pairs + (row / 16 * (columns / BLOCK) + i / BLOCK) * TILE_PAIRS;
            __m512i words[16];
            for (int j = 0; j < 16; j++) words[j] = _mm512_loadu_si512(source + (row + j) * columns + i);
            turn(words);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + j * 16, words[j]);
        }
#else
    for (long row = 0; row < rows; row++) {
        const bf16 *values = source + row * columns;
        uint32_t *to = pairs + row / 16 * (columns / BLOCK) * TILE_PAIRS + row % 16;
        for (long i = 0; i < columns / 2; i++) to[i * 16] = pair(values[2 * i], values[2 * i + 1]);
    }
#endif
    return (Tiles){pairs, columns / BLOCK};
}

/* source (rows, columns), its rows `from` values apart -> its transpose (columns, rows), row-major with `to` values in
 * a row. */
static inline void transpose(long rows, long columns, const bf16 *source, long from, bf16 *restrict result, long to) {
#ifdef __AVX512BF16__
    for (long row = 0; row < rows; row += BLOCK)
        for (long column = 0; column < columns; column += 16) {
            const bf16 *block = source + row * from + column;
            __m512i words[16];
            for (int j = 0; j < 16; j++, block += 2 * from) words[j] = pairs_of_rows(block, block + from);
            turn(words);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(result + (column + j) * to + row, words[j]);
        }
#else
    for (long row = 0; row < rows; row += 2) {
        const bf16 *first = source + row * from, *second = first + from;
        for (long i = 0; i < columns; i++) {
            uint32_t both = pair(first[i], second[i]);
            memcpy(result + i * to + row, &both, sizeof both);
        }
    }
#endif
}

/* factor * sums -> bf16. */
static inline void narrow_row(long columns, float factor, const float *sums, bf16 *restrict result) {
    for (long i = 0; i < columns; i += LANES)
        store_bf16(result + i, columns - i, factor * load(sums + i, columns - i, 0.0f));
}

/* fp32 source (rows, columns) -> bf16 (padded rows, padded columns), zeros around it. */
static inline void narrow_matrix(long rows, long columns, const float *source, bf16 *restrict result) {
    long width = padded(columns), height = padded(rows);
    for (long row = 0; row < rows; row++) {
        narrow_row(columns, 1.0f, source + row * columns, result + row * width);
        memset(result + row * width + columns, 0, (width - columns) * sizeof(bf16));
    }
    memset(result + rows * width, 0, (height - rows) * width * sizeof(bf16));
}

/* BLOCK values at a time, each one instruction: memcpy takes longer to find out what to do than to do it. */
static inline void copy_row(long columns, const bf16 *from, bf16 *restrict to) {
    for (; columns >= BLOCK; columns -= BLOCK, from += BLOCK, to += BLOCK) memcpy(to, from, BLOCK * sizeof(bf16));
    if (columns > 0) memcpy(to, from, columns * sizeof(bf16));
}

/* source (rows, columns), its rows `stride` apart -> result (padded rows, padded columns), zeros around it. */
static inline void pad(long rows, long columns, const bf16 *source, long stride, bf16 *restrict result) {
    if (rows < padded(rows) || columns < padded(columns))
        memset(result, 0, padded(rows) * padded(columns) * sizeof(bf16));
    for (long row = 0; row < rows; row++)
        copy_row(columns, source + row * stride, result + row * padded(columns));
}

/* The first rows and columns of padded sums, whose rows are `stride` apart -> result (rows, columns). */
static inline void unpad(long rows, long columns, const float *sums, long stride, float *restrict result) {
    for (long row = 0; row < rows; row++)
        memcpy(result + row * columns, sums + row * stride, columns * sizeof(float));
}

/* Working memory of one call of a kernel. */
enum { MOST_BLOCKS = 24 };

typedef struct {
    void *blocks[MOST_BLOCKS];
    int count, failed;
} Scratch;

/* Aligned to a cache line, with anything in it. Where the machine has no memory left: NULL, and `failed` is set. */
static void *room_for(Scratch *scratch, size_t count, size_t size) {
    size_t bytes = count * size / 64 * 64 + 64;
    void *block = scratch->count < MOST_BLOCKS ? aligned_alloc(64, bytes) : NULL;
    if (block == NULL) return scratch->failed = 1, NULL;
    return scratch->blocks[scratch->count++] = block;
}

/* The same, zeroed. */
static void *take(Scratch *scratch, size_t count, size_t size) {
    void *block = room_for(scratch, count, size);
    return block == NULL ? NULL : memset(block, 0, count * size);
}

static void release(Scratch *scratch) {
    while (scratch->count) free(scratch->blocks[--scratch->count]);
}
