// Work that goes row by row (a row is a token), for float and bfloat16: RMSNorm, RoPE, SwiGLU. Plain C++, any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline void store(float &to, float x) { to = x; }
static inline void store(bf16 &to, float x) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// e^x by 2^n * polynomial, relative error below 2e-7; written so that compilers vectorise it.
static inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = std::nearbyintf(x * 1.44269504f);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t e = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &e, 4);
  return p * scale;
}
static inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }

// y = x / sqrt(mean(x^2) + eps) * w; keeps 1/sqrt(...) of each row.
template <class T>
void rmsnorm(const T *x, int64_t ldx, const float *w, float eps, T *y, int64_t ldy, float *rstd, int64_t rows, int64_t d,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    const T *a = x + t * ldx;
    T *o = y + t * ldy;
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < d; i++) s += to_float(a[i]) * to_float(a[i]);
    float r = 1.0f / std::sqrt(s / float(d) + eps);
    rstd[t] = r;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) store(o[i], to_float(a[i]) * r * w[i]);
  }
}

// dx = (dres) + rstd * (w*dy - xhat * mean(w*dy*xhat)), xhat = x * rstd. dres may be null; dx may be dres.
// dw (null, or [threads, d] zeroed): each thread's share of sum_t dy * xhat.
template <class T>
void rmsnorm_backward(const T *dy, int64_t lddy, const T *x, int64_t ldx, const float *w, const float *rstd, const T *dres,
                      int64_t ldres, T *dx, int64_t lddx, float *dw, int64_t rows, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; part++) {
    float *own = dw ? dw + part * d : nullptr;
    for (int64_t t = rows * part / threads; t < rows * (part + 1) / threads; t++) {
      const T *g = dy + t * lddy, *a = x + t * ldx;
      T *o = dx + t * lddx;
      float r = rstd[t], dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < d; i++) dot += to_float(g[i]) * w[i] * to_float(a[i]);
      float c = dot * r * r / float(d);
      if (own) {
#pragma omp simd
        for (int64_t i = 0; i < d; i++) own[i] += to_float(g[i]) * to_float(a[i]) * r;
      }
      if (dres) {
        const T *e = dres + t * ldres;
#pragma omp simd
        for (int64_t i = 0; i < d; i++)
          store(o[i], to_float(e[i]) + r * (to_float(g[i]) * w[i] - to_float(a[i]) * c));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < d; i++) store(o[i], r * (to_float(g[i]) * w[i] - to_float(a[i]) * c));
      }
    }
  }
}

// Rotate `heads` heads of width hd in place, halves convention: (a, b) -> (a c - b s, b c + a s); sign -1 rotates back.
// cosine, sine: [rows, hd/2] float.
template <class T>
void rope(T *x, int64_t ldx, const float *cosine, const float *sine, float sign, int64_t rows, int64_t heads,
          int64_t hd, int threads) {
  int64_t half = hd / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    const float *c = cosine + t * half, *s = sine + t * half;
    for (int64_t h = 0; h < heads; h++) {
      T *a = x + t * ldx + h * hd, *b = a + half;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        float u = to_float(a[i]), v = to_float(b[i]), si = sign * s[i];
        store(a[i], u * c[i] - v * si);
        store(b[i], v * c[i] + u * si);
      }
    }
  }
}

// gu: per 32 columns 16 of the gate, then 16 of up. h = silu(gate) * up, [rows, f].
template <class T>
void swiglu(const T *gu, int64_t ldgu, T *h, int64_t ldh, int64_t rows, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t j = 0; j < f; j += 16) {
      const T *g = gu + t * ldgu + 2 * j, *u = g + 16;
      T *o = h + t * ldh + j;
#pragma omp simd
      for (int i = 0; i < 16; i++) store(o[i], to_float(g[i]) * sigmoid_(to_float(g[i])) * to_float(u[i]));
    }
}

// dh [rows, f] -> dgu in the layout of gu; h is written again (the down projection's gradient needs it).
template <class T>
void swiglu_backward(const T *dh, int64_t lddh, const T *gu, int64_t ldgu, T *dgu, int64_t lddgu, T *h, int64_t ldh,
                     int64_t rows, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t j = 0; j < f; j += 16) {
      const T *g = gu + t * ldgu + 2 * j, *u = g + 16, *d = dh + t * lddh + j;
      T *dg = dgu + t * lddgu + 2 * j, *du = dg + 16, *o = h + t * ldh + j;
#pragma omp simd
      for (int i = 0; i < 16; i++) {
        float a = to_float(g[i]), b = to_float(u[i]), e = to_float(d[i]), s = sigmoid_(a), silu = a * s;
        store(du[i], e * silu);
        store(dg[i], e * b * (s + silu * (1.0f - s)));
        store(o[i], silu * b);
      }
    }
}
