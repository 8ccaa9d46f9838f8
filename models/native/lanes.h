/* The numbers that the loops of these kernels take at a time: `+ - * /` act on each lane.
 *
 * With AVX-512 there are sixteen lanes. Elsewhere there is one, and the compiler makes vectors of loops where it can.
 * The two forms differ in the last bit, and where the first rounds to bf16 it takes numbers below 2^-126 for 0, as the
 * matrix unit does.
 */
#pragma once
#include "common.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

enum { LANES = 16 };
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

static inline Lanes all(float value) { return (Lanes){0} + value; }

/* The first n lanes; none for n <= 0. */
static inline __mmask16 first_lanes(long n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* The n numbers at `from`, at most LANES, and `rest` in the lanes after them. */
static inline Lanes load(const float *from, long n, float rest) {
    return _mm512_mask_loadu_ps(all(rest), first_lanes(n), from);
}

static inline Lanes load_bf16(const bf16 *from, long n, float rest) {
    const __m256i values = _mm256_mask_loadu_epi16(_mm256_set1_epi16((short)narrow(rest)), first_lanes(n), from);
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16);
}

/* Writes the first n lanes. */
static inline void store(float *to, long n, Lanes values) {
    if (n >= LANES)
        _mm512_storeu_ps(to, values);
    else
        _mm512_mask_storeu_ps(to, first_lanes(n), values);
}

static inline void store_bf16(bf16 *to, long n, Lanes values) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(values);
    if (n >= LANES)
        _mm256_storeu_si256((__m256i *)to, rounded);
    else
        _mm256_mask_storeu_epi16(to, first_lanes(n), rounded);
}

static inline float sum_of(Lanes values) { return _mm512_reduce_add_ps(values); }

/* The greatest of the lanes; what a NaN among them gives is not defined. */
static inline float greatest_of(Lanes values) { return _mm512_reduce_max_ps(values); }

/* The greater of a and b in each lane; b where one is NaN. */
static inline Lanes greater(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }

/* e^x = 2^n e^r with |r| <= ln(2) / 2, by Taylor's polynomial of degree 7; infinite above 88.8, and 0 below -87:
 * numbers under 2^-126 cost the processor a hundred cycles each. */
static inline Lanes exponential_of(Lanes x) {
    const __mmask16 nonzero = _mm512_cmp_ps_mask(x, all(-87.0f), _CMP_NLT_UQ); /* NaN too */
    x = _mm512_min_ps(all(89.0f), x); /* x where it is NaN */
    const __m512 n = _mm512_roundscale_ps(x * 1.44269504088896341f, 0);
    const __m512 coarse = _mm512_fnmadd_ps(n, all(0.693359375f), x); /* ln 2 in two parts: the first times n is exact */
    const __m512 r = _mm512_fmadd_ps(n, all(2.12194440e-4f), coarse);
    Lanes p = all(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, all(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, all(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, all(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, all(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, all(0.5f));
    p = _mm512_fmadd_ps(p, r, all(1.0f));
    p = _mm512_fmadd_ps(p, r, all(1.0f));
    return _mm512_maskz_scalef_ps(nonzero, p, n);
}

/* 2^x for |x| <= 126, and 2^-126 below: to 2e-7, for results that are rounded to bf16. With |r| <= 1/2 the polynomial
 * of the least greatest error for 2^r is exact to 9.2e-8 before rounding. */
static inline Lanes power_of_two(Lanes x) {
    x = _mm512_max_ps(all(-126.0f), x); /* x where it is NaN */
    const __m512 n = _mm512_roundscale_ps(x, 0);
    const __m512 r = x - n;
    Lanes p = all(0.00132647273f);
    p = _mm512_fmadd_ps(p, r, all(0.00967151299f));
    p = _mm512_fmadd_ps(p, r, all(0.0555073358f));
    p = _mm512_fmadd_ps(p, r, all(0.240222424f));
    p = _mm512_fmadd_ps(p, r, all(0.693147004f));
    p = _mm512_fmadd_ps(p, r, all(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* The values whose bit is set, lane by lane from the lowest, and `rest` elsewhere. */
static inline Lanes where(uint32_t bits, Lanes values, Lanes rest) {
    return _mm512_mask_mov_ps(rest, (__mmask16)bits, values);
}

/* `values` where a > b or one of them is NaN, and `rest` elsewhere. */
static inline Lanes where_above(Lanes a, Lanes b, Lanes values, Lanes rest) {
    return _mm512_mask_mov_ps(rest, _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ), values);
}

/* Two rows of numbers as pairs of bf16, the first one in the lower half. Returns the sums of the rounded two. */
static inline Lanes store_pairs(uint32_t *to, Lanes first, Lanes second) {
    const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(second, first); /* one after the other */
    const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i order = (__m512i)(lanes | (lanes + LANES) << 16);
    const __m512i pairs = _mm512_permutexvar_epi16(order, rows), ones = _mm512_set1_epi16(0x3f80);
    _mm512_storeu_si512(to, pairs);
    return _mm512_dpbf16_ps(all(0.0f), (__m512bh)pairs, (__m512bh)ones);
}

/* 1 / x for 1 <= x < 2^127, by one step of Newton's method from 14 exact bits. */
static inline Lanes reciprocal(Lanes x) {
    const Lanes guess = _mm512_rcp14_ps(x);
    return guess * (2.0f - x * guess);
}

/* ln x for positive x: x = 2^n m with 0.75 <= m < 1.5, and the series of 2 artanh z with z = (m - 1) / (m + 1), of
 * which |z| <= 0.2 leaves out less than 4e-9. */
static inline Lanes logarithm_of(Lanes x) {
    const Lanes m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __m512 below = _mm512_getexp_ps(x); /* x = 2^below f with 1 <= f < 2, and m is half of f from 1.5 on */
    const Lanes n = _mm512_mask_add_ps(below, _mm512_cmp_ps_mask(m, all(1.0f), _CMP_LT_OQ), below, all(1.0f));
    const Lanes z = (m - 1.0f) * reciprocal(m + 1.0f), square = z * z;
    const Lanes series = 1.0f + square * (1.0f / 3 + square * (1.0f / 5 + square * (1.0f / 7 + square * (1.0f / 9))));
    return n * 0.693147180559945309f + 2.0f * z * series;
}

#else
enum { LANES = 1 };
typedef float Lanes;

static inline Lanes all(float value) { return value; }
static inline Lanes load(const float *from, long n, float rest) { return n > 0 ? *from : rest; }
static inline Lanes load_bf16(const bf16 *from, long n, float rest) { return n > 0 ? widen(*from) : rest; }
static inline void store(float *to, long n, Lanes value) {
    if (n > 0) *to = value;
}
static inline void store_bf16(bf16 *to, long n, Lanes value) {
    if (n > 0) *to = narrow(value);
}
static inline float sum_of(Lanes value) { return value; }
static inline float greatest_of(Lanes value) { return value; }
static inline Lanes greater(Lanes a, Lanes b) { return a > b ? a : b; }
static inline Lanes where(uint32_t bits, Lanes value, Lanes rest) { return bits & 1 ? value : rest; }
static inline Lanes where_above(Lanes a, Lanes b, Lanes value, Lanes rest) { return a <= b ? rest : value; }
static inline Lanes store_pairs(uint32_t *to, Lanes first, Lanes second) {
    *to = narrow(first) | (uint32_t)narrow(second) << 16;
    return widen(narrow(first)) + widen(narrow(second));
}
static inline Lanes power_of_two(Lanes x) { return exp2f(x < -126.0f ? -126.0f : x); }
static inline Lanes reciprocal(Lanes x) { return 1.0f / x; }
static inline Lanes logarithm_of(Lanes x) { return logf(x); }

static inline Lanes exponential_of(Lanes x) {
    const float e = exponential(x);
    return x < -87.0f ? 0.0f : x > 88.8f ? INFINITY : e;
}
#endif

/* 1 / (1 + e^-x); e^88 in place of what is greater. */
static inline Lanes sigmoid_of(Lanes x) { return reciprocal(1.0f + exponential_of(-greater(all(-87.0f), x))); }
