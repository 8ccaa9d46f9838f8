/* What both passes of attention share: which keys a block of queries sees, and where transposed scores lie. */
#pragma once
#include "tiles.h"

enum { COLUMNS = BLOCK / LANES, KEYS = 64 }; /* KEYS: of which the probabilities exist at once */

/* Exponents of 2 that need no maximum subtracted: sums and products with values stay far from the ends of fp32. */
static const float MOST_EXPONENT = 60.0f, LOG2_E = 1.44269504088896341f;

/* The arguments of a call, and what follows from them; s, c and w are the padded sizes. */
typedef struct {
    long heads, kv_heads, group, seq, width, value_width, s, c, w;
    float scale;
} Shape;

static Shape shape_of(long heads, long kv_heads, long seq, long width, long value_width, float divisor) {
    return (Shape){heads, kv_heads, heads / kv_heads, seq, width, value_width,
                   padded(seq), padded(width), padded(value_width), 1.0f / divisor};
}

static inline long larger(long a, long b) { return a > b ? a : b; }

/* A block of queries, from `start` on: `count` of them. They see no key before `first` and none from `end` on, both
 * multiples of BLOCK. Bit i of seen[key] is set where query start + i sees the key. */
typedef struct {
    long start, count, first, end;
    uint32_t *seen;
} Queries;

static Queries queries_from(long start, long seq, const int64_t *ids, uint32_t *seen) {
    Queries block = {start, smaller(BLOCK, seq - start), 0, start + BLOCK, seen};
    int64_t least = ids[start], most = ids[start];
    for (long i = start; i < start + block.count; i++) {
        least = ids[i] < least ? ids[i] : least;
        most = ids[i] > most ? ids[i] : most;
    }
    while (ids[block.first] < least || ids[block.first] > most) block.first++; /* at the latest the block itself */
    block.first = block.first / BLOCK * BLOCK;
    for (long key = block.first; key < start; key++) seen[key] = ids[key] == least ? ~0u : 0;
    for (long key = start; key < block.end; key++) seen[key] = ~0u << (key - start);
    if (least == most) return block;
    for (long key = block.first; key < start + block.count; key++) {
        if (key < start) seen[key] = ~0u;
        for (long i = 0; i < block.count; i++)
            if (ids[start + i] != ids[key]) seen[key] &= ~(1u << i);
    }
    return block;
}

static inline int all_seen(const uint32_t *seen) {
    uint32_t common = ~0u;
    for (long i = 0; i < BLOCK; i++) common &= seen[i];
    return common == ~0u;
}

/* Where two rows of keys of the lanes from `column` on lie in a right operand (KEYS, BLOCK). */
static inline long place_of(long key, long column) {
    const long i = column * LANES;
    return i / 16 * (KEYS / BLOCK * TILE_PAIRS) + key / BLOCK * TILE_PAIRS + key % BLOCK / 2 * 16 + i % 16;
}

/* Columns of sums (n, BLOCK) times a factor each -> rows of `result`, of which the first `width` values count. */
static void rows_of_columns(long count, long n, long width, const float *sums, const Lanes *factor, bf16 *narrowed,
                            bf16 *turned, bf16 *restrict result, long stride) {
    for (long row = 0; row < n; row++)
        for (long i = 0; i < COLUMNS; i++) {
            const long at = row * BLOCK + i * LANES;
            store_bf16(narrowed + at, LANES, factor[i] * load(sums + at, LANES, 0.0f));
        }
    transpose(n, BLOCK, narrowed, BLOCK, turned, n);
    for (long i = 0; i < count; i++) copy_row(width, turned + i * n, result + i * stride);
}
