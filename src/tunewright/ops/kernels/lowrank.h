// Products over all tokens, p^T q: gradients of weights and of low-rank updates.
#pragma once
#include "linear.h"

// ---- g[r, n] (float) = p[rows, r]^T * q[rows, n]

struct Outer {
  Grid p, q;
  float *g;
  int64_t rows, r, n;
  bf16 *turned;  // memory for rows * r
  bf16 *along;   // memory for rows * n; outer_panels() does without
  int64_t first = 0, spread = 16;  // p's first column, and from one sixteen of them to the next: r are taken
};
static constexpr int64_t DEEP = 4;    // row blocks of q that a narrow g takes at a time
static constexpr int64_t HIGH = 128;  // rows of g that stay with their operand in the L2 cache

// B tiles of 32 columns of q, rows [32 * from, 32 * to).
static inline void pack_panel(bf16 *to, const Outer &o, int64_t j, int64_t from, int64_t end) {
  for (int64_t b = from; b < end; b++, to += 2 * TILE) {
    const bf16 *x = o.q.at(32 * b, 32 * j);
    for (int64_t k = 0; k < 32; k++) __builtin_prefetch(x + k * o.q.ld + 32 * o.q.along);  // the next panel's
    tile_along(to, x, o.q.ld);
    tile_along(to + TILE, x + 16, o.q.ld);
  }
}
static inline void turn(const Outer &o, int64_t i) {  // A tiles of 16 columns of p
  const int64_t c = o.first + i * o.spread;
  for (int64_t b = 0; b < o.rows / 32; b++)
    tile_turned(o.turned + (i * (o.rows / 32) + b) * TILE, o.p.at(32 * b, c / 32 * 32) + c % 32, o.p.ld);
}
// One panel of g, rows [i0, i1), over the row blocks [from, end) whose B tiles are in `along`.
static inline void add_panel(const Outer &o, const bf16 *along, int64_t j, int64_t i0, int64_t i1, int64_t from, int64_t end) {
  const int64_t blocks = o.rows / 32;
  for (int64_t i = i0; i < i1; i += 32) {
    float *c = o.g + i * o.n + 32 * j;
    if (from == 0) zero_tiles();
    else load_tiles(c, o.n);
    multiply_packed(o.turned + (i / 16 * blocks + from) * TILE, blocks * TILE, along, 2 * TILE, end - from);
    store_tiles(c, o.n);
  }
}

// Panels [j0, j1) of a narrow g: q is read once, some rows of all columns at a time, so that memory is read along.
static inline void outer_panels(const Outer &o, int64_t j0, int64_t j1) {
  const int64_t blocks = o.rows / 32;
  alignas(64) bf16 along[2 * DEEP * TILE];
  for (int64_t b = 0; b < blocks; b += DEEP)
    for (int64_t j = j0; j < j1; j++) {
      const int64_t end = std::min(b + DEEP, blocks);
      pack_panel(along, o, j, b, end);
      add_panel(o, along, j, 0, o.r, b, end);
    }
}

static void outer(const Outer &o, int threads) {
  const int64_t blocks = o.rows / 32, parts = (o.r + HIGH - 1) / HIGH, panels = o.n / 32;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < o.r / 16; i++) turn(o, i);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < panels; j++) pack_panel(o.along + 2 * j * blocks * TILE, o, j, 0, blocks);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * panels; task++) {
      const int64_t i = task / panels * HIGH, j = task % panels;
      add_panel(o, o.along + 2 * j * blocks * TILE, j, i, std::min(i + HIGH, o.r), 0, blocks);
    }
  }
}

// A layer's db from its columns of g in the panels [j0, j1).
static inline void spread_rows(const Update &x, const Updated &u, const float *g, float *db, int64_t j0, int64_t j1) {
  for (int64_t c = 32 * j0; c < 32 * j1; c += 16) {
    const int64_t i0 = (c - x.first) / x.spread * 16;
    if (!x.a || c < x.first || (c - x.first) % x.spread || i0 >= x.n) continue;
    const float *from = g + x.r0 * u.n + c;
    for (int64_t i = i0; i < std::min(i0 + 16, x.n); i++)
      for (int64_t j = 0; j < x.r; j++) db[x.db + i * x.r + j] = float(x.scale) * from[j * u.n + i - i0];
  }
}

// da [r, k] = du^T x, and of each layer db [n, r] = scale * dy^T u. u, du: [rows, r].
static bool update_gradients(const Updated &w, Grid x, bf16 *u, Grid dy, bf16 *du, int64_t rows, float *da, float *db,
                             int threads) {  // false: no memory
  const Rooms rooms(4 * w.r * w.n + 4 * rows * w.r + 128, 1);
  if (!rooms.all) return false;
  Room room(rooms, 0);
  float *g = room.take<float>(w.r * w.n);
  bf16 *turned = room.take<bf16>(2 * rows * w.r);
  const Outer a{grid(du, w.r, false), x, da, rows, w.r, w.k, turned, nullptr};
  const Outer b{grid(u, w.r, false), dy, g, rows, w.r, w.n, turned + rows * w.r, nullptr};
  const int64_t ka = w.k / 32, all = ka + w.n / 32;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < w.r / 8; i++) turn(i % 2 ? a : b, i / 2);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; part++) {
      const int64_t from = all * part / threads, to = all * (part + 1) / threads;
      outer_panels(a, std::min(from, ka), std::min(to, ka));
      outer_panels(b, std::max(from, ka) - ka, std::max(to, ka) - ka);
      for (int64_t i = 0; i < w.count; i++) spread_rows(w.updates[i], w, g, db, std::max(from, ka) - ka, std::max(to, ka) - ka);
    }
  }
  return true;
}
// The same for a product's weights. to: da [r, k], behind it the db.
static bool gradients(const Weight &w, int64_t rows, bf16 *x, bf16 *u, bf16 *dy, bf16 *du, float *to, int threads) {
  const Updated &p = *w.u;
  return !p.r || update_gradients(p, grid(x, p.k, p.blocks_in), u, grid(dy, p.n, p.blocks_out), du, rows, to, to + p.r * p.k, threads);
}

// Through the gains of y = gain * z: dz = gain * dy, which may be dy itself, and sums [n] = sum over the rows of dy * y.
static bool before_gain(const Updated &w, Grid dy, Grid y, Grid dz, int64_t rows, float *sums, int threads) {  // false: no memory
  const Rooms rooms(4 * w.n, threads);
  if (!rooms.all) return false;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; part++) {
      float *own = Room(rooms, part).take<float>(w.n);
      memset(own, 0, 4 * w.n);
      for (int64_t t = rows / 32 * part / threads * 32; t < rows / 32 * (part + 1) / threads * 32; t += 32)
        for (int64_t n = 0; n < w.n; n += 32)
          for (int64_t c = 0; c < 32; c += 16) {
            const bf16 *a = dy.at(t, n) + c, *b = y.at(t, n) + c;
            bf16 *to = dz.at(t, n) + c;
            const __m512 gain = _mm512_loadu_ps(w.gain + n + c);
            __m512 sum = _mm512_load_ps(own + n + c);
            for (int64_t i = 0; i < 32; i++, a += dy.ld, b += y.ld, to += dz.ld) {
              const __m512 d = load16(a);
              sum = _mm512_fmadd_ps(d, load16(b), sum);
              store16(to, _mm512_mul_ps(d, gain));
            }
            _mm512_store_ps(own + n + c, sum);
          }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < w.n; n += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int part = 0; part < threads; part++) sum = _mm512_add_ps(sum, _mm512_load_ps(Room(rooms, part).take<float>(w.n) + n));
      _mm512_storeu_ps(sums + n, sum);
    }
  }
  return true;
}
// The same for a product's outputs.
static bool before_gain(const Weight &w, int64_t rows, bf16 *dy, bf16 *y, bf16 *dz, float *sums, int threads) {
  const Updated &p = *w.u;
  auto laid = [&](bf16 *x) { return grid(x, p.n, p.blocks_out); };
  return before_gain(p, laid(dy), laid(y), laid(dz), rows, sums, threads);
}
