// Log-probabilities of targets over the whole vocabulary and their gradient, in one pass: attention whose keys and values
// are the rows of the LM head. Logits exist only for 256 rows by 256 tokens at a time.
#pragma once
#include "attention.h"

static const int64_t STEP = 256, WIDTH = 256;  // rows and tokens of the vocabulary at a time: what the L2 cache holds

struct Vocabulary {
  const bf16 *h;  // [rows, d], rows a multiple of 32
  int64_t rows, d;
  const bf16 *across, *along;  // the head packed [d -> v] and [v -> d], v padded to a multiple of 32
  const bf16 *head;            // [vocabulary, d] as it is
  int64_t size;                // tokens in the vocabulary
  const int64_t *targets;
  float scale;
  float *logp, *correct, *entropy, *mean;  // [rows]; the last two may be null
  float *lse;                              // [rows] log of the sum of all exp(logit)
  bf16 *grad;                              // [rows, d] d logp / d h, null when not wanted
};

static bool vocabulary(const Vocabulary &a, int threads) {  // false: no memory
  const int64_t v = (a.size + 31) / 32 * 32, d = a.d, wide = WIDTH;
  // equal shares of rows, at most STEP: each share reads the whole head
  const int64_t turns = (a.rows + STEP * threads - 1) / (STEP * threads) * threads;
  const int64_t step = (a.rows / 32 + turns - 1) / turns * 32;
  const Rooms rooms(4 * step * (wide + d) + 2 * step * wide + 8192, threads);
  if (!rooms.all) return false;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
    Room room(rooms, omp_get_thread_num());
    float *s = room.take<float>(step * wide), *sum = room.take<float>(step * d);
    bf16 *p = room.take<bf16>(step * wide);
#pragma omp for schedule(dynamic, 1)
    for (int64_t m = 0; m < a.rows; m += step) {
      int64_t n = std::min(step, a.rows - m);
      float top[STEP], total[STEP], at_target[STEP], weighted[STEP], plain[STEP];
      for (int64_t i = 0; i < n; i++) top[i] = -INFINITY, total[i] = at_target[i] = weighted[i] = plain[i] = 0;
      if (a.grad) memset(sum, 0, 4 * n * d);
      for (int64_t j0 = 0; j0 < v; j0 += wide) {
        int64_t w = std::min(wide, v - j0), real = std::min(w, a.size - j0);
        for (int64_t j = 0; j < w; j += 32)
          for (int64_t i = 0; i < n; i += 32) {
            zero_tiles();
            multiply(a.h + (m + i) * d, d, a.across + (j0 + j) / 32 * (d / 32) * 2 * TILE, d / 32);
            store_tiles(s + i * wide + j, wide);
          }
        for (int64_t i = 0; i < n; i++) {
          float *row = s + i * wide;
          __m512 scale = _mm512_set1_ps(a.scale), best = _mm512_set1_ps(-INFINITY);
          for (int64_t j = 0; j < w; j += 16)
            best = _mm512_mask_max_ps(best, inside(j, 0, real), best, _mm512_mul_ps(_mm512_load_ps(row + j), scale));
          float now = std::max(top[i], _mm512_reduce_max_ps(best)), shrink = std::exp(top[i] - now);
          if (shrink != 1.0f && j0) {
            total[i] *= shrink, weighted[i] *= shrink;
            if (a.grad)
              for (int64_t k = 0; k < d; k += 16)
                _mm512_store_ps(sum + i * d + k, _mm512_mul_ps(_mm512_load_ps(sum + i * d + k), _mm512_set1_ps(shrink)));
          }
          top[i] = now;
          __m512 t = _mm512_setzero_ps(), wt = t, pl = t;
          for (int64_t j = 0; j < w; j += 16) {
            __mmask16 in = inside(j, 0, real);
            __m512 z = _mm512_maskz_mul_ps(in, _mm512_load_ps(row + j), scale);
            __m512 e = _mm512_maskz_mov_ps(in, exp16(_mm512_sub_ps(z, _mm512_set1_ps(now))));
            t = _mm512_add_ps(t, e);
            if (a.entropy) wt = _mm512_fmadd_ps(e, z, wt), pl = _mm512_add_ps(pl, z);
            store16(p + i * wide + j, e);
          }
          total[i] += _mm512_reduce_add_ps(t);
          if (a.entropy) weighted[i] += _mm512_reduce_add_ps(wt), plain[i] += _mm512_reduce_add_ps(pl);
          int64_t y = a.targets[m + i] - j0;
          if (y >= 0 && y < real) at_target[i] = row[y] * a.scale;
        }
        if (a.grad)
          for (int64_t k = 0; k < d; k += 32)
            for (int64_t i = 0; i < n; i += 32) {
              load_tiles(sum + i * d + k, d);
              multiply(p + i * wide, wide, a.along + (k / 32 * (v / 32) + j0 / 32) * 2 * TILE, w / 32);
              store_tiles(sum + i * d + k, d);
            }
      }
      for (int64_t i = 0; i < n; i++) {
        float lse = top[i] + std::log(total[i]), inverse = 1.0f / total[i];
        a.logp[m + i] = at_target[i] - lse;
        a.lse[m + i] = lse;
        a.correct[m + i] = at_target[i] >= top[i] ? 1.0f : 0.0f;
        if (a.entropy) a.entropy[m + i] = lse - weighted[i] * inverse, a.mean[m + i] = plain[i] / float(a.size) - lse;
        if (a.grad) {
          const bf16 *y = a.head + a.targets[m + i] * d;
          for (int64_t k = 0; k < d; k += 16) {
            __m512 x = _mm512_mul_ps(_mm512_load_ps(sum + i * d + k), _mm512_set1_ps(inverse));
            store16(a.grad + (m + i) * d + k, _mm512_mul_ps(_mm512_set1_ps(a.scale), _mm512_sub_ps(load16(y + k), x)));
          }
        }
      }
    }
  }
  return true;
}

struct VocabularyGrad {
  const float *factor;    // [rows] incoming gradient of each row's logp
  const bf16 *h_along;    // h packed with k = rows
  float *dh, *dw;         // [threads, rows, d] and [v, d], zeroed
};

// For a head that is trained: G = factor * (onehot - softmax), dh = scale * G W, dw = scale * G^T h. Each thread has its
// own tokens of the vocabulary, so its own rows of dw.
static bool vocabulary_backward(const Vocabulary &a, const VocabularyGrad &b, int threads) {
  const int64_t step = 128, wide = 512, v = (a.size + 31) / 32 * 32, d = a.d, blocks = a.rows / 32;
  const Rooms rooms(4 * step * wide + 4 * step * wide + 8192, threads);
  if (!rooms.all) return false;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; part++) {
    Tiles on;
    Room room(rooms, part);
    float *s = room.take<float>(step * wide), *dh = b.dh + part * a.rows * d;
    bf16 *g = room.take<bf16>(step * wide), *turned = room.take<bf16>(step * wide);
    int64_t chunks = (v + wide - 1) / wide;
    for (int64_t j0 = chunks * part / threads * wide; j0 < std::min(v, chunks * (part + 1) / threads * wide); j0 += wide) {
      int64_t w = std::min(wide, v - j0), real = std::min(w, a.size - j0);
      for (int64_t m = 0; m < a.rows; m += step) {
        int64_t n = std::min(step, a.rows - m);
        for (int64_t j = 0; j < w; j += 32)
          for (int64_t i = 0; i < n; i += 32) {
            zero_tiles();
            multiply(a.h + (m + i) * d, d, a.across + (j0 + j) / 32 * (d / 32) * 2 * TILE, d / 32);
            store_tiles(s + i * wide + j, wide);
          }
        for (int64_t i = 0; i < n; i++) {
          int64_t y = a.targets[m + i] - j0;
          float f = b.factor[m + i] * a.scale;
          for (int64_t j = 0; j < w; j += 16) {
            __m512 z = _mm512_fmsub_ps(_mm512_load_ps(s + i * wide + j), _mm512_set1_ps(a.scale), _mm512_set1_ps(a.lse[m + i]));
            __m512 x = _mm512_mul_ps(exp16(z), _mm512_set1_ps(-f));
            if (y >= j && y < j + 16) x = _mm512_mask_add_ps(x, __mmask16(1u << (y - j)), x, _mm512_set1_ps(f));
            store16(g + i * wide + j, _mm512_maskz_mov_ps(inside(j, 0, real), x));
          }
        }
        for (int64_t k = 0; k < d; k += 32)
          for (int64_t i = 0; i < n; i += 32) {
            load_tiles(dh + (m + i) * d + k, d);
            multiply(g + i * wide, wide, a.along + (k / 32 * (v / 32) + j0 / 32) * 2 * TILE, w / 32);
            store_tiles(dh + (m + i) * d + k, d);
          }
        for (int64_t j = 0; j < w; j += 16)
          for (int64_t i = 0; i < n; i += 32) tile_turned(turned + (j / 16 * (n / 32) + i / 32) * TILE, g + i * wide + j, wide);
        for (int64_t j = 0; j < w; j += 32)
          for (int64_t k = 0; k < d; k += 32) {
            float *c = b.dw + (j0 + j) * d + k;
            load_tiles(c, d);
            multiply_packed(turned + j / 16 * (n / 32) * TILE, n / 32 * TILE,
                            b.h_along + (k / 32 * blocks + m / 32) * 2 * TILE, 2 * TILE, n / 32);
            store_tiles(c, d);
          }
      }
    }
  }
  return true;
}
