// Log-probabilities of targets over the whole vocabulary and their gradient, in one pass: attention whose keys and values
// are the rows of the LM head. Logits exist only for 256 rows by 256 tokens at a time.
#pragma once
#include "attention.h"

static const int64_t MOST_THREADS = 256, STEP = 256, WIDTH = 256;  // rows and tokens of the vocabulary at a time: what the L2 cache holds

struct Vocabulary {
  const bf16 *h;  // [rows, d], rows a multiple of 32
  int64_t rows, d;
  Weights head;  // [vocabulary, d], filled up with zeros to a multiple of 32 rows
  int64_t size;  // tokens in the vocabulary
  const int64_t *targets;
  float scale;
  float *logp, *correct, *entropy, *mean;  // [rows]; the last two may be null
  float *lse;                              // [rows] log of the sum of all exp(logit)
  bf16 *grad;                              // [rows, d] d logp / d h, null when not wanted
};

// What a part of the vocabulary says of one row. top, weighted and plain as in a softmax that runs along; at_target:
// the target's logit if it is in this part.
struct Part {
  float top = -INFINITY, total = 0, at_target = -INFINITY, weighted = 0, plain = 0;
};

// One row of logits over the tokens [j0, j0 + w): s becomes probabilities in p, relative to the largest so far.
static inline void enter(const Vocabulary &a, Part &part, const float *s, bf16 *p, int64_t w, int64_t real, float *sum) {
  const __m512 scale = _mm512_set1_ps(a.scale);
  __m512 best = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < w; j += 16)
    best = _mm512_mask_max_ps(best, inside(j, 0, real), best, _mm512_mul_ps(_mm512_load_ps(s + j), scale));
  const float now = std::max(part.top, _mm512_reduce_max_ps(best));
  if (sum && now > part.top) {
    const float shrink = std::exp(part.top - now);
    part.total *= shrink, part.weighted *= shrink;
    for (int64_t k = 0; a.grad && k < a.d; k += 16)
      _mm512_store_ps(sum + k, _mm512_mul_ps(_mm512_load_ps(sum + k), _mm512_set1_ps(shrink)));
  }
  part.top = now;
  __m512 t = _mm512_setzero_ps(), wt = t, pl = t;
  for (int64_t j = 0; j < w; j += 16) {
    const __mmask16 in = inside(j, 0, real);
    const __m512 z = _mm512_maskz_mul_ps(in, _mm512_load_ps(s + j), scale);
    const __m512 e = _mm512_maskz_mov_ps(in, exp16(_mm512_sub_ps(z, _mm512_set1_ps(now))));
    t = _mm512_add_ps(t, e);
    if (a.entropy) wt = _mm512_fmadd_ps(e, z, wt), pl = _mm512_add_ps(pl, z);
    store16(p + j, e);
  }
  part.total += _mm512_reduce_add_ps(t);
  if (a.entropy) part.weighted += _mm512_reduce_add_ps(wt), part.plain += _mm512_reduce_add_ps(pl);
}

// The rows [m, m + n) over the tokens [v0, v1). sum: [n, d], what the probabilities make of the head's rows.
static void part_of_vocabulary(const Vocabulary &a, int64_t m, int64_t n, int64_t v0, int64_t v1, Part *parts, float *sum,
                               float *s, bf16 *p, bf16 *tiles) {
  const int64_t d = a.d;
  for (int64_t j0 = v0; j0 < v1; j0 += WIDTH) {
    const int64_t w = std::min(WIDTH, v1 - j0), real = std::min(w, a.size - j0);
    const Weights head{a.head.rows + j0 / 16, a.head.ld};
    for (int64_t j = 0; j < w; j += 32) panel_across(tiles + j / 32 * (d / 32) * 2 * TILE, head, j / 32, d / 32);
    for (int64_t i = 0; i < n; i += 32)
      for (int64_t j = 0; j < w; j += 32) {
        zero_tiles();
        multiply(a.h + (m + i) * d, d, tiles + j / 32 * (d / 32) * 2 * TILE, d / 32);
        store_tiles(s + i * WIDTH + j, WIDTH);
      }
    for (int64_t i = 0; i < n; i++) {
      const int64_t y = a.targets[m + i] - j0;
      if (y >= 0 && y < real) parts[i].at_target = s[i * WIDTH + y] * a.scale;
      enter(a, parts[i], s + i * WIDTH, p + i * WIDTH, w, real, j0 > v0 ? sum + i * d : nullptr);
    }
    if (!a.grad) continue;
    panels_along(tiles, w / 32 * 2 * TILE, head, 0, d / 32, w / 32);
    for (int64_t i = 0; i < n; i += 32)
      for (int64_t k = 0; k < d; k += 32) {
        if (j0 == v0) zero_tiles();
        else load_tiles(sum + i * d + k, d);
        multiply(p + i * WIDTH, WIDTH, tiles + k / 32 * (w / 32) * 2 * TILE, w / 32);
        store_tiles(sum + i * d + k, d);
      }
  }
}

// Row m from its parts, `apart` from each other; sums likewise.
static inline void conclude(const Vocabulary &a, int64_t m, const Part *parts, const float *sums, int64_t count,
                            int64_t apart) {
  Part all;
  float share[MOST_THREADS];
  for (int64_t c = 0; c < count; c++) {
    all.top = std::max(all.top, parts[c * apart].top);
    all.at_target = std::max(all.at_target, parts[c * apart].at_target);
  }
  for (int64_t c = 0; c < count; c++) {
    const Part &part = parts[c * apart];
    share[c] = std::exp(part.top - all.top);
    all.total += share[c] * part.total, all.weighted += share[c] * part.weighted, all.plain += part.plain;
  }
  const float lse = all.top + std::log(all.total);
  a.logp[m] = all.at_target - lse;
  a.lse[m] = lse;
  a.correct[m] = all.at_target >= all.top ? 1.0f : 0.0f;
  if (a.entropy) a.entropy[m] = lse - all.weighted / all.total, a.mean[m] = all.plain / float(a.size) - lse;
  if (!a.grad) return;
  const bf16 *y = a.head.row(a.targets[m]);
  for (int64_t k = 0; k < a.d; k += 16) {
    __m512 x = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c++)
      x = _mm512_fmadd_ps(_mm512_load_ps(sums + c * apart * a.d + k), _mm512_set1_ps(share[c] / all.total), x);
    store16(a.grad + m * a.d + k, _mm512_mul_ps(_mm512_set1_ps(a.scale), _mm512_sub_ps(load16(y + k), x)));
  }
}

// Each thread takes a part of the vocabulary for all rows of a step, so each row of the head is read once a step.
static bool vocabulary(const Vocabulary &a, int threads) {  // false: no memory
  const int64_t chunks = (a.size + WIDTH - 1) / WIDTH, end = (a.size + 31) / 32 * 32, d = a.d;
  const int64_t count = std::min<int64_t>({threads, chunks, MOST_THREADS});
  const int64_t steps = (a.rows + STEP - 1) / STEP, step = (a.rows / 32 + steps - 1) / steps * 32;
  const Rooms rooms(4 * step * WIDTH + 2 * step * WIDTH + 2 * WIDTH * d + 256, int(count));
  const Rooms shared((4 * d + sizeof(Part)) * step * count + 128, 1);
  if (!rooms.all || !shared.all) return false;
  Room room(shared, 0);
  Part *parts = room.take<Part>(step * count);
  float *sums = room.take<float>(step * count * d);
  for (int64_t m = 0; m < a.rows; m += step) {
    const int64_t n = std::min(step, a.rows - m);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
      for (int64_t c = 0; c < count; c++) {
        Tiles on;
        Room own(rooms, int(c));
        float *s = own.take<float>(step * WIDTH);
        bf16 *p = own.take<bf16>(step * WIDTH), *tiles = own.take<bf16>(WIDTH * d);
        std::fill(parts + c * step, parts + c * step + n, Part());
        part_of_vocabulary(a, m, n, chunks * c / count * WIDTH, std::min(chunks * (c + 1) / count * WIDTH, end),
                           parts + c * step, sums + c * step * d, s, p, tiles);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; i++) conclude(a, m + i, parts + i, sums + i * d, count, step);
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
  const Rooms rooms(8 * step * wide + 4 * wide * d + 8192, threads);
  if (!rooms.all) return false;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; part++) {
    Tiles on;
    Room room(rooms, part);
    float *s = room.take<float>(step * wide), *dh = b.dh + part * a.rows * d;
    bf16 *g = room.take<bf16>(step * wide), *turned = room.take<bf16>(step * wide);
    bf16 *across = room.take<bf16>(wide * d), *along = room.take<bf16>(wide * d);
    int64_t chunks = (v + wide - 1) / wide;
    for (int64_t j0 = chunks * part / threads * wide; j0 < std::min(v, chunks * (part + 1) / threads * wide); j0 += wide) {
      int64_t w = std::min(wide, v - j0), real = std::min(w, a.size - j0);
      const Weights head{a.head.rows + j0 / 16, a.head.ld};
      for (int64_t j = 0; j < w; j += 32) panel_across(across + j / 32 * (d / 32) * 2 * TILE, head, j / 32, d / 32);
      panels_along(along, w / 32 * 2 * TILE, head, 0, d / 32, w / 32);
      for (int64_t m = 0; m < a.rows; m += step) {
        int64_t n = std::min(step, a.rows - m);
        for (int64_t j = 0; j < w; j += 32)
          for (int64_t i = 0; i < n; i += 32) {
            zero_tiles();
            multiply(a.h + (m + i) * d, d, across + j / 32 * (d / 32) * 2 * TILE, d / 32);
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
            multiply(g + i * wide, wide, along + k / 32 * (w / 32) * 2 * TILE, w / 32);
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
