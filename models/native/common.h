/* bf16 numbers and the exponential, for every kernel of this folder. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

/* Into every caller, whatever its size: a constant width there becomes a constant here. */
#define INLINE static inline __attribute__((always_inline))

static inline long smaller(long a, long b) { return a < b ? a : b; }

static inline float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bf16)rounded;
}

/* e^x = 2^n e^r with |r| <= ln(2) / 2; Taylor's polynomial of degree 7 is exact to fp32 there. NaN stays NaN. The two
 * fused steps cannot be merged into one, which would lose what ln 2 has beyond the first part. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = fmaf(n, -0.693359375f, x); /* ln 2 in two parts: the first times n is exact */
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)(n == n ? n : 0.0f) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}
