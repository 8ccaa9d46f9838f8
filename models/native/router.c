/* DeepSeek-V3's router behind its matmul, in one pass each way: sigmoid, the chosen experts, their gate values, load,
 * balance loss and entropy. Definition: models/router.py, `Router.forward`.
 *
 * B sequences of S positions, T = B * S tokens, E experts, K chosen ones; everything in fp32.
 */
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

/* Logits of one token -> scores sigmoid(l), scores + bias, and the entropy of the scores' shares. Returns their sum.
 * With p = s / sum: -sum p ln p = ln(sum) - sum(s ln s) / sum. */
static inline float score_row(long experts, const float *logits, const float *bias, float *restrict scores,
                              float *restrict biased, double *entropy) {
    Lanes total = all(0.0f), products = all(0.0f);
    for (long i = 0; i < experts; i += LANES) {
        const long n = experts - i;
        const Lanes s = sigmoid_of(load(logits + i, n, -INFINITY)); /* next to nothing in the lanes beyond */
        store(scores + i, n, s);
        store(biased + i, n, s + load(bias + i, n, 0.0f));
        total += load(scores + i, n, 0.0f);
        products += s * logarithm_of(s);
    }
    const float sum = sum_of(total);
    *entropy += logf(sum) - sum_of(products) / sum;
    return sum;
}

/* logits (T, E), bias (E) -> scores (T, E), their sums (T), ids and weights (T, K), counts (E) of the chosen experts,
 * even (B, E): of each sequence, how many tokens have the expert among their k highest scores *without* bias,
 * share (B, E): the sum over its tokens of s / sum, and the sum over tokens of the entropy of these shares.
 * counts, even and share must be 0. biased: room for (E). */
int router_forward(long batch, long seq, long experts, long k, float scale, long normalize, const float *logits,
                   const float *bias, float *restrict scores, float *restrict sums, int64_t *ids,
                   float *restrict weights, int64_t *counts, float *restrict even, float *restrict share,
                   float *restrict biased, int64_t *unbiased_ids, float *restrict entropy) {
    double total_entropy = 0.0;
    for (long t = 0; t < batch * seq; t++) {
        const long sequence = t / seq;
        float *score = scores + t * experts, *weight = weights + t * k, chosen = 0.0f;
        int64_t *id = ids + t * k;
        sums[t] = score_row(experts, logits + t * experts, bias, score, biased, &total_entropy);
        top_k_row(experts, k, biased, id);
        for (long j = 0; j < k; j++) counts[id[j]]++, chosen += score[id[j]];
        for (long j = 0; j < k; j++) weight[j] = scale * score[id[j]] / (normalize ? chosen : 1.0f);
        top_k_row(experts, k, score, unbiased_ids);
        for (long j = 0; j < k; j++) even[sequence * experts + unbiased_ids[j]] += 1.0f;
        const float inverse = 1.0f / sums[t];
        for (long i = 0; i < experts; i += LANES) {
            float *place = share + sequence * experts + i;
            store(place, experts - i, load(place, experts - i, 0.0f) + inverse * load(score + i, experts - i, 0.0f));
        }
    }
    *entropy = (float)total_entropy;
    return 0;
}

/* grad_weights (T, K) and `pull` (B, E), the gradient of every token's s / sum -> grad_logits (T, E).
 * Through the weights: w_j = scale s_j / Z gives ds_j = scale / Z (g_j - sum_i g_i s_i / Z), without `normalize`
 * ds_j = scale g_j. Through the shares: ds_i = (p_i - sum_j p_j s_j / sum) / sum. */
int router_backward(long batch, long seq, long experts, long k, float scale, long normalize, const float *scores,
                    const float *sums, const int64_t *ids, const float *grad_weights, const float *pull,
                    float *restrict grad_logits) {
    for (long t = 0; t < batch * seq; t++) {
        const float *score = scores + t * experts, *grad = grad_weights + t * k, *p = pull + t / seq * experts;
        const int64_t *id = ids + t * k;
        float *out = grad_logits + t * experts, chosen = 0.0f, dot = 0.0f;
        Lanes along = all(0.0f);
        for (long i = 0; i < experts; i += LANES)
            along += load(p + i, experts - i, 0.0f) * load(score + i, experts - i, 0.0f);
        const float inverse = 1.0f / sums[t], mean = sum_of(along) * inverse;
        for (long i = 0; i < experts; i += LANES) {
            const long n = experts - i;
            const Lanes s = load(score + i, n, 0.0f);
            store(out + i, n, (load(p + i, n, 0.0f) - mean) * inverse * s * (1.0f - s));
        }
        for (long j = 0; j < k; j++) chosen += score[id[j]], dot += grad[j] * score[id[j]];
        for (long j = 0; j < k; j++) {
            const float s = score[id[j]];
            const float ds = normalize ? scale / chosen * (grad[j] - dot / chosen) : scale * grad[j];
            out[id[j]] += ds * s * (1.0f - s);
        }
    }
    return 0;
}
