// Work that goes row by row (a row is a token), for float and bfloat16: RMSNorm, RoPE, SwiGLU. Plain C++, any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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

// ---- sixteen numbers at a time, in the vectors of the compiler: it has instructions for them or makes do

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Signed __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
static constexpr int64_t LANES = 16;

static inline Floats all(float x) { return x - Floats{}; }
static inline Floats get(const float *p) {
  Floats f;
  memcpy(&f, p, sizeof f);
  return f;
}
static inline void put(float *p, Floats f) { memcpy(p, &f, sizeof f); }
#ifdef __AVX512BF16__  // what the compiler makes of the portable form below takes twice as long
static inline Floats get(const bf16 *p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
static inline void put(bf16 *p, Floats f) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)f)); }
#else
static inline Floats get(const bf16 *p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}
static inline void put(bf16 *p, Floats f) {
  Words u = (Words)f, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, bad = (Words)(f != f);
  Halves h = __builtin_convertvector((rounded & ~bad) | (0x7fc0u & bad), Halves);
  memcpy(p, &h, sizeof h);
}
#endif
// The same for the first n of them; the rest are zero, or stay as they are.
template <class T>
static inline Floats get(const T *p, int64_t n) {
  if (__builtin_expect(n >= LANES, 1)) return get(p);
  Floats f{};
  for (int64_t i = 0; i < n; i++) f[i] = to_float(p[i]);
  return f;
}
template <class T>
static inline void put(T *p, Floats f, int64_t n) {
  if (__builtin_expect(n >= LANES, 1)) return put(p, f);
  for (int64_t i = 0; i < n; i++) store(p[i], f[i]);
}
static inline float sum_of(Floats f) {
  float s = 0;
  for (int64_t i = 0; i < LANES; i++) s += f[i];
  return s;
}

// e^x by 2^n * polynomial, relative error below 2e-7.
static inline Floats exp_(Floats x) {
  const Floats low = all(-87.0f), high = all(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
  Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)((__builtin_convertvector(n, Signed) + 127) << 23);
}
static inline Floats sigmoid_(Floats x) { return 1.0f / (1.0f + exp_(-x)); }

// y = x / sqrt(mean(x^2) + eps) * w; keeps 1/sqrt(...) of each row.
template <class T>
void rmsnorm(const T *x, int64_t ldx, const float *w, float eps, T *y, int64_t ldy, float *rstd, int64_t rows, int64_t d,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    const T *a = x + t * ldx;
    T *o = y + t * ldy;
    Floats s{};
    for (int64_t i = 0; i < d; i += LANES) {
      Floats v = get(a + i, d - i);
      s += v * v;
    }
    float r = 1.0f / std::sqrt(sum_of(s) / float(d) + eps);
    rstd[t] = r;
    for (int64_t i = 0; i < d; i += LANES) put(o + i, get(a + i, d - i) * r * get(w + i, d - i), d - i);
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
      const T *g = dy + t * lddy, *a = x + t * ldx, *e = dres ? dres + t * ldres : nullptr;
      T *o = dx + t * lddx;
      const float r = rstd[t];
      Floats dot{};
      for (int64_t i = 0; i < d; i += LANES) dot += get(g + i, d - i) * get(w + i, d - i) * get(a + i, d - i);
      const float c = sum_of(dot) * r * r / float(d);
      for (int64_t i = 0; own && i < d; i += LANES)
        put(own + i, get(own + i, d - i) + get(g + i, d - i) * get(a + i, d - i) * r, d - i);
      for (int64_t i = 0; i < d; i += LANES) {
        Floats v = r * (get(g + i, d - i) * get(w + i, d - i) - get(a + i, d - i) * c);
        put(o + i, e ? v + get(e + i, d - i) : v, d - i);
      }
    }
  }
}

// Rotate `heads` heads of width hd in place, halves convention: (a, b) -> (a c - b s, b c + a s); sign -1 rotates back.
// cosine, sine: [rows, hd/2] float.
template <class T>
void rope(T *x, int64_t ldx, const float *cosine, const float *sine, float sign, int64_t rows, int64_t heads,
          int64_t hd, int threads) {
  const int64_t half = hd / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t h = 0; h < heads; h++) {
      T *a = x + t * ldx + h * hd, *b = a + half;
      for (int64_t i = 0; i < half; i += LANES) {
        const int64_t n = half - i;
        Floats u = get(a + i, n), v = get(b + i, n);
        Floats c = get(cosine + t * half + i, n), s = sign * get(sine + t * half + i, n);
        put(a + i, u * c - v * s, n);
        put(b + i, v * c + u * s, n);
      }
    }
}

// gu: per 32 columns 16 of the gate, then 16 of up. h = silu(gate) * up, [rows, f].
template <class T>
void swiglu(const T *gu, int64_t ldgu, T *h, int64_t ldh, int64_t rows, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t j = 0; j < f; j += LANES) {
      const T *from = gu + t * ldgu + 2 * j;
      Floats g = get(from), u = get(from + LANES);
      put(h + t * ldh + j, g * sigmoid_(g) * u);
    }
}

// dh [rows, f] -> dgu in the layout of gu; h is written again (the down projection's gradient needs it).
template <class T>
void swiglu_backward(const T *dh, int64_t lddh, const T *gu, int64_t ldgu, T *dgu, int64_t lddgu, T *h, int64_t ldh,
                     int64_t rows, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t j = 0; j < f; j += LANES) {
      const T *from = gu + t * ldgu + 2 * j;
      T *to = dgu + t * lddgu + 2 * j;
      Floats g = get(from), u = get(from + LANES), e = get(dh + t * lddh + j), s = sigmoid_(g), silu = g * s;
      put(to + LANES, e * silu);
      put(to, e * u * (s + silu * (1.0f - s)));
      put(h + t * ldh + j, silu * u);
    }
}

// to[i] = sum over rows of x[t, i]
template <class T>
void column_sums(const T *x, int64_t ldx, float *to, int64_t rows, int64_t n, int threads) {
  const int64_t wide = 8 * LANES, parts = (n + wide - 1) / wide;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = part * wide;
    Floats s[8] = {};
    for (int64_t t = 0; t < rows; t++)
      for (int64_t j = 0; j < 8; j++)
        if (const int64_t i = first + j * LANES; i < n) s[j] += get(x + t * ldx + i, n - i);
    for (int64_t j = 0; j < 8; j++)
      if (const int64_t i = first + j * LANES; i < n) put(to + i, s[j], n - i);
  }
}
