/* The k highest of each row of scores. Definition: models/router.py, `top_k_ids`. */
#include "lanes.h"

/* The k highest of a row of scores, highest first; the lower index wins a tie. */
static inline void top_k_by_insertion(long experts, long k, const float *score, int64_t *ids) {
    long found = 0;
    for (long expert = 0; expert < experts; expert++) {
        if (found == k && !(score[expert] > score[ids[k - 1]])) continue;
        long place = found < k ? found++ : k - 1;
        for (; place > 0 && score[expert] > score[ids[place - 1]]; place--) ids[place] = ids[place - 1];
        ids[place] = expert;
    }
}

#ifdef __AVX512BF16__
/* Lanes of the scores from i on that come after (value, index) in the order of top_k; none that is NaN. */
static inline __mmask16 lanes_after(Lanes scores, long i, float value, long index) {
    const __mmask16 later = index < i ? 0xffff : index >= i + LANES - 1 ? 0 : 0xffffu << (index - i + 1);
    return _mm512_cmp_ps_mask(scores, all(value), _CMP_LT_OQ) |
           (_mm512_cmp_ps_mask(scores, all(value), _CMP_EQ_OQ) & later);
}

/* The same without branches that a processor could guess wrong: k times the next one after the last. */
static inline void top_k_row(long experts, long k, const float *score, int64_t *ids) {
    float value = INFINITY;
    long index = -1;
    for (long place = 0; place < k; place++) {
        Lanes best = all(-INFINITY);
        __mmask16 found = 0;
        for (long i = 0; i < experts; i += LANES) {
            const Lanes s = load(score + i, experts - i, NAN);
            const __mmask16 after = lanes_after(s, i, value, index);
            best = _mm512_mask_max_ps(best, after, best, s);
            found |= after;
        }
        if (!found) return top_k_by_insertion(experts, k, score, ids); /* some are NaN */
        const float next = greatest_of(best);
        for (long i = 0;; i += LANES) {
            const Lanes s = load(score + i, experts - i, NAN);
            const __mmask16 here =
                lanes_after(s, i, value, index) & _mm512_cmp_ps_mask(s, all(next), _CMP_EQ_OQ);
            if (!here) continue;
            index = ids[place] = i + __builtin_ctz(here);
            break;
        }
        value = next;
    }
}
#else
static inline void top_k_row(long experts, long k, const float *score, int64_t *ids) {
    top_k_by_insertion(experts, k, score, ids);
}
#endif

/* The same for every row of scores (rows, experts) -> ids (rows, k). */
int top_k(long rows, long experts, long k, const float *scores, int64_t *ids) {
    for (long row = 0; row < rows; row++) top_k_row(experts, k, scores + row * experts, ids + row * k);
    return 0;
}
