/* softmax(q k^T / divisor, masked) v, block of queries by block of queries: scores exist only in the cache.
 * Definition: models/softmax_attention.py, `scaled_dot_product_attention` with a mask. One number per query is kept and
 * the probabilities computed again in the backward pass (Dao et al. 2022, arXiv 2205.14135).
 *
 * B sequences, H query heads of which H / H_kv share a key head, S positions, C width of a query or key, W width of a
 * value. query (B, H, S, C), key (B, H_kv, S, C), value (B, H_kv, S, W), ids (B, S): position t sees s <= t of its id.
 *
 * All scores are transposed, (keys, queries): a lane is a query, so that nothing is added or compared across lanes, and
 * two rows of probabilities are pairs of the right operand of the next product as they come.
 */
#include "attention.h"

/* Of the exponentials of every query over the keys: their sum, that of the rounded ones, which are multiplied with the
 * values and make an exact mean of them, and the greatest exponent. */
typedef struct {
    Lanes exact[COLUMNS], rounded[COLUMNS], most[COLUMNS];
} Sums;

/* BLOCK keys from `at` on and a block of queries -> 2^(factor * product - reference) as right operand; adds to the sums
 * over keys, to those of the rounded numbers, and keeps the greatest exponents.
 * Without `masked` every query sees every key. */
INLINE void exponentials(long c, const bf16 *key, Tiles query, float factor, const Lanes *reference, int masked,
                         const uint32_t *seen, Sums *sums, uint32_t *pairs, long at) {
    Sums s = *sums; /* in registers */
    for (long row = 0; row < BLOCK; row += STEP) {
        Lanes score[STEP * COLUMNS];
        multiply_lanes(c, key + row * c, c, query, score);
#pragma GCC unroll 8
        for (long i = 0; i < STEP; i += 2)
            for (long column = 0; column < COLUMNS; column++) {
                Lanes p[2];
                for (long j = 0; j < 2; j++) {
                    const Lanes x = score[(i + j) * COLUMNS + column] * factor - reference[column];
                    const uint32_t bits = masked ? seen[row + i + j] >> column * LANES : ~0u;
                    s.most[column] = greater(s.most[column], masked ? where(bits, x, all(-INFINITY)) : x);
                    p[j] = masked ? where(bits, power_of_two(x), all(0.0f)) : power_of_two(x);
                    s.exact[column] += p[j];
                }
                s.rounded[column] += store_pairs(pairs + place_of(at + row + i, column), p[0], p[1]);
            }
    }
    *sums = s;
}

/* Working memory of one thread: keys (S, C) and values (W, S) of one head, and a block of queries. */
typedef struct {
    Scratch scratch;
    bf16 *key, *rows, *value_turned, *narrowed, *turned;
    uint32_t *query_pairs, *pairs, *seen;
    float *result; /* (W, BLOCK) */
    Lanes *reference;
    Sums *sums;
} Forward;

static Forward forward_memory(Shape z) {
    Forward f = {.scratch = {{0}}};
    f.key = take(&f.scratch, z.s * z.c, sizeof(bf16));
    f.rows = take(&f.scratch, larger(z.s * z.w, BLOCK * z.c), sizeof(bf16));
    f.value_turned = take(&f.scratch, z.w * (z.s + BLOCK), sizeof(bf16));
    f.narrowed = take(&f.scratch, z.w * BLOCK, sizeof(bf16));
    f.turned = take(&f.scratch, z.w * BLOCK, sizeof(bf16));
    f.query_pairs = take(&f.scratch, z.c * BLOCK / 2, sizeof(uint32_t));
    f.pairs = take(&f.scratch, KEYS * BLOCK / 2, sizeof(uint32_t));
    f.seen = take(&f.scratch, z.s, sizeof(uint32_t));
    f.result = take(&f.scratch, z.w * BLOCK, sizeof(float));
    f.reference = take(&f.scratch, COLUMNS, sizeof(Lanes));
    f.sums = take(&f.scratch, 1, sizeof(Sums));
    return f;
}

/* result (W, queries) = V^T 2^(factor * K Q^T - reference), with the sums over keys and the greatest exponents. */
static void sum_values(const Forward *f, Shape z, Queries block, Tiles query) {
    const Tiles probabilities = {f->pairs, KEYS / BLOCK};
    const float factor = z.scale * LOG2_E;
    for (long i = 0; i < COLUMNS; i++) f->sums->exact[i] = f->sums->rounded[i] = all(0.0f);
    for (long i = 0; i < COLUMNS; i++) f->sums->most[i] = all(-INFINITY);
    for (long key = block.first; key < block.end; key += KEYS) {
        const long count = smaller(KEYS, block.end - key);
        for (long at = 0; at < count; at += BLOCK) {
            const bf16 *keys = f->key + (key + at) * z.c;
            const uint32_t *seen = block.seen + key + at;
            if (all_seen(seen))
                exponentials(z.c, keys, query, factor, f->reference, 0, NULL, f->sums, f->pairs, at);
            else
                exponentials(z.c, keys, query, factor, f->reference, 1, seen, f->sums, f->pairs, at);
        }
        multiply(z.w, BLOCK, count, f->value_turned + key, z.s + BLOCK, probabilities, f->result, BLOCK,
                 key > block.first);
    }
}

/* The same with a reference that keeps all numbers in the range of fp32: 0 if that does, else the greatest exponent. */
static void sum_values_in_range(const Forward *f, Shape z, Queries block, Tiles query) {
    Lanes furthest = all(0.0f);
    for (long i = 0; i < COLUMNS; i++) f->reference[i] = all(0.0f);
    sum_values(f, z, block, query);
    for (long i = 0; i < COLUMNS; i++) furthest = greater(furthest, greater(f->sums->most[i], -f->sums->most[i]));
    if (greatest_of(furthest) <= MOST_EXPONENT) return;
    for (long i = 0; i < COLUMNS; i++) f->reference[i] = f->sums->most[i];
    sum_values(f, z, block, query);
}

/* All queries of one sequence that share a key head. */
static void attend(const Forward *f, Shape z, const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *ids,
                   bf16 *out, float *log_sums) {
    pad(z.seq, z.width, key, z.width, f->key);
    pad(z.seq, z.value_width, value, z.value_width, f->rows);
    transpose(z.s, z.w, f->rows, z.w, f->value_turned, z.s + BLOCK);
    for (long start = 0; start < z.seq; start += BLOCK) {
        const Queries block = queries_from(start, z.seq, ids, f->seen);
        for (long head = 0; head < z.group; head++) {
            pad(block.count, z.width, query + (head * z.seq + start) * z.width, z.width, f->rows);
            sum_values_in_range(f, z, block, tiles_of_transpose(BLOCK, z.c, f->rows, f->query_pairs));
            for (long i = 0; i < COLUMNS; i++) {
                store(log_sums + head * z.seq + start + i * LANES, block.count - i * LANES,
                      f->reference[i] + LOG2_E * logarithm_of(f->sums->exact[i]));
                f->sums->rounded[i] = 1.0f / f->sums->rounded[i];
            }
            rows_of_columns(block.count, z.w, z.value_width, f->result, f->sums->rounded, f->narrowed, f->turned,
                            out + (start * z.heads + head) * z.value_width, z.heads * z.value_width);
        }
    }
}

/* out (B, S, H, W), log_sums (B, H, S): log2 of the sum of 2^(score * log2 e). 1: no memory. */
int attention_forward(long batch, long heads, long kv_heads, long seq, long width, long value_width, float divisor,
                      const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *ids, bf16 *restrict out,
                      float *restrict log_sums) {
    const Shape z = shape_of(heads, kv_heads, seq, width, value_width, divisor);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Forward f = forward_memory(z);
        failed = f.scratch.failed;
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (long part = 0; part < batch * kv_heads; part++) {
            if (failed) continue;
            const long sequence = part / kv_heads, head = part % kv_heads * z.group;
            attend(&f, z, query + part * z.group * seq * width, key + part * seq * width,
                   value + part * seq * value_width, ids + sequence * seq,
                   out + (sequence * seq * heads + head) * value_width, log_sums + part * z.group * seq);
        }
        tiles_end();
        release(&f.scratch);
    }
    return failed;
}
