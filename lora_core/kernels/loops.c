/* The passes of Prodigy and AdamW over flat parameters, called by kernels/loops.py.

   Numerics of kernels/steps.py; gradients are read at autograd's addresses. The part below is
   compiled twice, for float and for double.
   gradients   an address for each parameter, 0 where it has none
   geometry    three numbers for each parameter: start in the flat arrays, elements, start in the
               arrays of every stride-th element (p0 and s) */
#ifndef REAL
#include <math.h>
#include <stdint.h>
#define CHUNK 1024 /* elements: six arrays of them stay in a first-level cache of 32 KB */
#define LANES 16   /* sums side by side, so that they fill vectors and their order is fixed */
#define REAL float
#define NAMED(name) name##_float32
#define ROOT sqrtf
#include "loops.c"
#undef REAL
#undef NAMED
#undef ROOT
#define REAL double
#define NAMED(name) name##_float64
#define ROOT sqrt
#include "loops.c"
#else

/* Updates s of n elements and adds to the lanes of the two sums <g, p0 - p> and |s|_1. */
static inline void NAMED(estimate)(int64_t n, int64_t stride, const REAL *restrict g,
                                   const REAL *restrict p, const REAL *restrict p0,
                                   REAL *restrict s, REAL unscale, REAL coupled, REAL keep,
                                   REAL weight, double *restrict inner, double *restrict size) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            const int64_t at = (i + j) * stride;
            const REAL x = g[at] * unscale + coupled * p[at];
            const REAL y = s[i + j] * keep + x * weight;
            s[i + j] = y;
            inner[j] += (double)x * (double)(p0[i + j] - p[at]);
            size[j] += (double)(y < 0 ? -y : y);
        }
    for (; i < n; i++) {
        const REAL x = g[i * stride] * unscale + coupled * p[i * stride];
        const REAL y = s[i] * keep + x * weight;
        s[i] = y;
        inner[0] += (double)x * (double)(p0[i] - p[i * stride]);
        size[0] += (double)(y < 0 ? -y : y);
    }
}

/* Updates Prodigy's moments and s, and adds <g, p0 - p> and |s|_1 to `sums`. m may be NULL.
   numbers: 1 / grad_scale, coupled decay, beta3, weight of g in s, d, beta1, beta2 */
void NAMED(prodigy_reduce)(int64_t parameters, const int64_t *gradients, const int64_t *geometry,
                           const REAL *restrict p, const REAL *restrict p0, REAL *restrict m,
                           REAL *restrict v, REAL *restrict s, int64_t stride,
                           const double *numbers, double *sums) {
    const REAL unscale = numbers[0], coupled = numbers[1], keep = numbers[2], weight = numbers[3];
    const REAL d = numbers[4];
    const REAL beta1 = numbers[5], rest1 = 1 - numbers[5];
    const REAL beta2 = numbers[6], rest2 = 1 - numbers[6];
    double inner[LANES] = {0}, size[LANES] = {0};
    for (int64_t t = 0; t < parameters; t++) {
        const REAL *restrict g = (const REAL *)gradients[t];
        const int64_t count = g ? geometry[3 * t + 1] : 0, chunk = CHUNK * stride;
        for (int64_t a = 0; a < count; a += chunk) {
            const int64_t n = count - a < chunk ? count - a : chunk;
            const int64_t at = geometry[3 * t] + a, first = geometry[3 * t + 2] + a / stride;
            const REAL *restrict here = g + a;
            if (stride == 1)
                NAMED(estimate)(n, 1, here, p + at, p0 + first, s + first,
                                unscale, coupled, keep, weight, inner, size);
            else
                NAMED(estimate)((n + stride - 1) / stride, stride, here, p + at, p0 + first,
                                s + first, unscale, coupled, keep, weight, inner, size);
            for (int64_t i = 0; i < n; i++) {
                const REAL x = (here[i] * unscale + coupled * p[at + i]) * d;
                if (m) m[at + i] = m[at + i] * beta1 + x * rest1;
                v[at + i] = v[at + i] * beta2 + x * x * rest2;
            }
        }
    }
    for (int j = 0; j < LANES; j++) {
        sums[0] += inner[j];
        sums[1] += size[j];
    }
}

/* Updates Prodigy's parameters; without m from the gradient.
   numbers: 1 / grad_scale, coupled decay, -rate * decoupled decay, -rate / d, 1 / d, eps */
void NAMED(prodigy_update)(int64_t parameters, const int64_t *gradients, const int64_t *geometry,
                           REAL *restrict p, const REAL *restrict m, const REAL *restrict v,
                           const double *numbers) {
    const REAL unscale = numbers[0], coupled = numbers[1], decay = numbers[2], rate = numbers[3];
    const REAL by_d = numbers[4], eps = numbers[5];
    for (int64_t t = 0; t < parameters; t++) {
        const REAL *restrict g = (const REAL *)gradients[t];
        const int64_t start = geometry[3 * t], end = g ? start + geometry[3 * t + 1] : start;
        if (m)
            for (int64_t i = start; i < end; i++)
                p[i] += decay * p[i] + rate * (m[i] / (ROOT(v[i]) * by_d + eps));
        else
            for (int64_t i = start; i < end; i++) {
                const REAL x = g[i - start] * unscale + coupled * p[i];
                p[i] += decay * p[i] + rate * (x / (ROOT(v[i]) * by_d + eps));
            }
    }
}

/* AdamW's step; the step count of each parameter with a gradient grows by 1.
   numbers: 1 / grad_scale, lr, beta1, beta2, eps, weight decay */
void NAMED(adamw)(int64_t parameters, const int64_t *gradients, const int64_t *geometry,
                  REAL *restrict p, REAL *restrict m, REAL *restrict v, float *steps,
                  const double *numbers) {
    const REAL unscale = numbers[0], shrink = 1 - numbers[1] * numbers[5];
    const REAL rest1 = 1 - numbers[2], beta2 = numbers[3], rest2 = 1 - numbers[3];
    const REAL eps = numbers[4];
    for (int64_t t = 0; t < parameters; t++) {
        const REAL *restrict g = (const REAL *)gradients[t];
        if (!g) continue;
        const double k = ++steps[t];
        const REAL rate = numbers[1] / (1 - pow(numbers[2], k));
        const REAL root = sqrt(1 - pow(numbers[3], k));
        const int64_t start = geometry[3 * t], end = start + geometry[3 * t + 1];
        for (int64_t i = start; i < end; i++) {
            const REAL x = g[i - start] * unscale;
            m[i] += (x - m[i]) * rest1;
            v[i] = v[i] * beta2 + x * x * rest2;
            p[i] = p[i] * shrink - rate * (m[i] / (ROOT(v[i]) / root + eps));
        }
    }
}
#endif
