// Linear layers with their low-rank updates: the weights' tiles are made where they are used.
#pragma once
#include "tiles.h"

// ---- low-rank updates of a product: y += scale * (x A^T) B^T for each of the layers that share its input

struct Update {  // one layer's. Ranks [r0, r0 + r) of the product are its own; its row i is the product's column(i).
  const float *a, *b;  // [r, k], [n, r]; null while it is off
  int64_t r0, r, n, first, spread;
  int64_t db;  // where the gradient of b begins
  double scale;
  int64_t column(int64_t i) const { return first + i / 16 * spread + i % 16; }
};
struct Updated {  // a product: k -> n with r ranks in all
  const Update *updates;
  int64_t count, k, n, r;
  int64_t blocks_in, blocks_out;  // whether its inputs, its outputs (and their gradients) lie in blocks
  const float *gain;  // [n] factors of the outputs, or null
};

// All updates of a product as rows of bf16: a [r, k], and b [n, r] with the scale in it. Called by all threads at once.
static void gather(const Updated &u, bf16 *a, bf16 *b) {
#pragma omp for schedule(static)
  for (int64_t j = 0; j < u.r; j++) memset(a + j * u.k, 0, 2 * u.k);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < u.n; i++) memset(b + i * u.r, 0, 2 * u.r);
  for (int64_t w = 0; w < u.count; w++) {
    const Update &x = u.updates[w];
    if (!x.a) continue;
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < x.r; j++)
      for (int64_t i = 0; i < u.k; i += 16) store16(a + (x.r0 + j) * u.k + i, _mm512_loadu_ps(x.a + j * u.k + i));
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < x.n; i++) {
      bf16 *to = b + x.column(i) * u.r + x.r0;
      int64_t j = 0;
      for (; j + 16 <= x.r; j += 16)
        store16(to + j, _mm512_mul_ps(_mm512_loadu_ps(x.b + i * x.r + j), _mm512_set1_ps(float(x.scale))));
      for (; j < x.r; j++) store(to[j], float(x.scale) * x.b[i * x.r + j]);
    }
  }
#pragma omp barrier
}

// ---- linear layers: y = [x, u] * W with u = x * A

enum Epilogue { STORE, ADD, SWIGLU, SWIGLU_BACKWARD, BIAS, GELU, GELU_BACKWARD };

struct Linear {
  Grid x;       // [rows, k]
  bf16 *u;      // [rows, r], written
  int64_t rows, k, r;
  Weights weights;  // n rows of k, or with `turned` k rows of n
  bool turned;
  const bf16 *down, *low;  // the updates packed: [k -> r] and [r -> n], panel by panel
  int64_t n;
  Grid y;  // [rows, n]; SWIGLU_BACKWARD: [rows, 2 n]
  int epilogue;
  Grid other;  // ADD, BIAS, GELU, and SWIGLU if it is not null: added to y. SWIGLU_BACKWARD: gu. GELU_BACKWARD: what GELU stored in y
  Grid h;  // SWIGLU, GELU and their backwards: where silu(gate) * up, gelu(y) goes. ADD: where y goes without `other`, or null
  const float *gain;  // [n] factors of y before anything is added, or null

  // Where line i of block b of a panel's weights lies.
  const bf16 *line(int64_t p, int64_t b, int64_t i) const {
    return turned ? weights.row(32 * b + i) + 32 * p : weights.row(32 * p + i) + 32 * b;
  }
  int64_t panel() const { return 2 * (k + r) / 32 * TILE; }
  void pack(bf16 *to, int64_t p, int64_t many) const {
    if (turned) panels_along(to, panel(), weights, p, many, k / 32);
    for (int64_t q = 0; q < many; q++, to += panel()) {
      if (!turned) panel_across(to, weights, p + q, k / 32);
      if (r) memcpy(to + 2 * (k / 32) * TILE, low + (p + q) * 2 * (r / 32) * TILE, 4 * (r / 32) * TILE);
    }
  }
};

// x * P(X < x) for a normal X, and the slope of it; P by Abramowitz and Stegun 7.1.26, off by less than 1e-7.
static inline __m512 gelu16(__m512 x, __m512 &slope) {
  const __m512 one = _mm512_set1_ps(1.0f), e = exp2_16(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2_E)));
  const __m512 below = _mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.3275911f * 0.70710678f), one);
  const __m512 guess = _mm512_rcp14_ps(below), t = _mm512_mul_ps(guess, _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(2.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(e, _mm512_set1_ps(0.5f)));
  const __m512 share = _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), one, tail);
  slope = _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.39894228f)), e, share);
  return _mm512_mul_ps(x, share);
}

// Rows [from, to) of a finished block of 32 x 32 at (t, n).
template <int E>
static inline void finish(const Linear &l, const float *c, int64_t t, int64_t n, int64_t from, int64_t to) {
  const int64_t wide = E == SWIGLU_BACKWARD ? 2 * n : n, half = n / 2 % 32;
  bf16 *y = l.y.at(t, wide), *h = E == SWIGLU ? l.h.at(t, n / 2 - half) + half : l.h.at(t, n);
  const bf16 *o = l.other.at(t, wide);
  const __m512 one = _mm512_set1_ps(1.0f), ga = l.gain ? _mm512_loadu_ps(l.gain + n) : one;
  const __m512 gb = l.gain ? _mm512_loadu_ps(l.gain + n + 16) : one;
  for (int64_t i = from; i < to; i++) {
    __m512 a = _mm512_mul_ps(_mm512_load_ps(c + 32 * i), ga), b = _mm512_mul_ps(_mm512_load_ps(c + 32 * i + 16), gb);
    if (E == ADD && l.h.p) {
      store16(h + i * l.h.ld, a);
      store16(h + i * l.h.ld + 16, b);
    }
    if (E == ADD || E == BIAS || E == GELU || (E == SWIGLU && l.other.p)) {
      a = _mm512_add_ps(a, load16(o + i * l.other.ld));
      b = _mm512_add_ps(b, load16(o + i * l.other.ld + 16));
    }
    if (E == GELU || E == GELU_BACKWARD) {
      __m512 slope_a, slope_b;
      store16(h + i * l.h.ld, gelu16(E == GELU ? a : load16(o + i * l.other.ld), slope_a));
      store16(h + i * l.h.ld + 16, gelu16(E == GELU ? b : load16(o + i * l.other.ld + 16), slope_b));
      if (E == GELU_BACKWARD) a = _mm512_mul_ps(a, slope_a), b = _mm512_mul_ps(b, slope_b);
    }
    if (E != SWIGLU && E != SWIGLU_BACKWARD) {
      store16(y + i * l.y.ld, a);
      store16(y + i * l.y.ld + 16, b);
    }
    // past the caches: gate and up are read again only in the backward
    if (E == SWIGLU) _mm512_stream_si512((__m512i *)(y + i * l.y.ld), (__m512i)_mm512_cvtne2ps_pbh(b, a));
    if (E == SWIGLU) store16(h + i * l.h.ld, _mm512_mul_ps(_mm512_mul_ps(a, sigmoid16(a)), b));
    if (E == SWIGLU_BACKWARD)
      for (int64_t j = 0; j < 2; j++) {
        const bf16 *gu = o + 32 * j * l.other.along + i * l.other.ld;
        bf16 *dgu = y + 32 * j * l.y.along + i * l.y.ld;
        __m512 g = load16(gu), u = load16(gu + 16), s = sigmoid16(g), d = j ? b : a;
        __m512 silu = _mm512_mul_ps(g, s), slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
        store16(dgu, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        store16(dgu + 16, _mm512_mul_ps(d, silu));
        store16(h + i * l.h.ld + 16 * j, _mm512_mul_ps(silu, u));
      }
  }
}

// Bring the lines that finish() will touch in row i into the cache, to be written: a store that misses holds up all else.
template <int E>
static inline void fetch(const Linear &l, int64_t t, int64_t n, int64_t i) {
  const int64_t wide = E == SWIGLU_BACKWARD ? 2 * n : n;
  const bf16 *y = l.y.at(t, wide) + i * l.y.ld, *o = l.other.at(t, wide) + i * l.other.ld;
  if (E != SWIGLU) __builtin_prefetch(y, 1);
  if (E == ADD && l.h.p) __builtin_prefetch(l.h.at(t, n) + i * l.h.ld, 1);
  if (E == SWIGLU) __builtin_prefetch(l.h.at(t, n / 2 / 32 * 32) + i * l.h.ld, 1);
  if (E == SWIGLU_BACKWARD || E == GELU || E == GELU_BACKWARD) __builtin_prefetch(l.h.at(t, n) + i * l.h.ld, 1);
  if (E == SWIGLU_BACKWARD) {
    __builtin_prefetch(y + 32 * l.y.along, 1);
    __builtin_prefetch(o + 32 * l.other.along, 0);
  }
  if (E == ADD || E == SWIGLU_BACKWARD || E == GELU_BACKWARD) __builtin_prefetch(o, 0);
}

// u of the rows [t, t + 32).
static inline void narrow(const Linear &l, int64_t t) {
  alignas(64) float c[1024];
  for (int64_t n = 0; n < l.r; n += 32) {
    zero_tiles();
    multiply(l.x.at(t, 0), l.x.ld, 32 * l.x.along, l.down + n / 32 * (l.k / 32) * 2 * TILE, 2 * TILE, l.k / 32);
    store_tiles(c, 32);
    for (int64_t i = 0; i < 32; i++) {
      store16(l.u + (t + i) * l.r + n, _mm512_load_ps(c + 32 * i));
      store16(l.u + (t + i) * l.r + n + 16, _mm512_load_ps(c + 32 * i + 16));
    }
  }
}

// Columns [from, to) of y for the rows [m, end): while the tiles multiply a block, the vector units finish the block
// before it. Weights are packed into `panels`, as many as fit the L2 cache, and meet all rows before the next ones.
template <int E>
static void wide(const Linear l, int64_t m, int64_t end, int64_t from, int64_t to, bf16 *panels, int64_t across) {
  alignas(64) float room[2][1024];
  const int64_t deep = l.k / 32, blocks = deep + l.r / 32, share = (32 + blocks - 1) / blocks, panel = l.panel();
  int64_t before_t = -1, before_n = 0, turn = 0;
  for (int64_t n0 = from; n0 < to; n0 += across) {
    const int64_t n1 = std::min(n0 + across, to);
    l.pack(panels, n0 / 32, (n1 - n0) / 32);
    for (int64_t t = m; t < end; t += 32)
      for (int64_t n = n0; n < n1; n += 32) {
        const bf16 *b = panels + (n - n0) / 32 * panel;
        const float *before = room[1 - turn];
        // the next panels' weights, fetched while the last rows are multiplied, in the order in which they will be packed
        const int64_t next = t + 32 >= end ? std::min(n1 + across, to) / 32 - n1 / 32 : 0;
        const bf16 *a = l.x.at(t, 0), *a1 = a + 16 * l.x.ld;
        int64_t done = before_t < 0 ? 32 : 0, ld = 2 * l.x.ld, step = 32 * l.x.along;
        zero_tiles();
        for (int64_t k = 0; k < blocks; k++, a += step, a1 += step) {
          if (k == deep) a = l.u + t * l.r, a1 = a + 16 * l.r, ld = 2 * l.r, step = 32;
          _tile_loadd(4, a, ld);
          _tile_loadd(6, b + 2 * k * TILE, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + (2 * k + 1) * TILE, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a1, ld);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
          if (const int64_t at = (n - n0) / 32 * deep + k; next && k < deep && at < next * deep) {
            const int64_t p = n1 / 32 + (l.turned ? at % next : at / deep), depth = l.turned ? at / next : at % deep;
            for (int64_t i = 0; i < 32; i++) _mm_prefetch((const char *)l.line(p, depth, i), _MM_HINT_T1);
          }
          for (int64_t i = k * share; i < std::min<int64_t>(32, (k + 1) * share); i++) fetch<E>(l, t, n, i);
          if (done < 32) {
            const int64_t upto = std::min<int64_t>(32, done + share);
            finish<E>(l, before, before_t, before_n, done, upto);
            done = upto;
          }
        }
        store_tiles(room[turn], 32);
        before_t = t, before_n = n, turn = 1 - turn;
      }
  }
  if (before_t >= 0) finish<E>(l, room[1 - turn], before_t, before_n, 0, 32);
}

// B tiles of x [columns, k] (across) or [k, columns] (along), panel by panel. Called by all threads at once.
static void pack_shared(bf16 *to, const bf16 *x, int64_t columns, int64_t k, bool across) {
  const int64_t ld = across ? k : columns;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < columns / 32 * (k / 32); i++)
    for (int64_t t = 0; t < 2; t++) {
      const int64_t n = i / (k / 32) * 32 + 16 * t, depth = i % (k / 32) * 32;
      if (across) tile_across(to + (2 * i + t) * TILE, x + n * ld + depth, ld);
      else tile_along(to + (2 * i + t) * TILE, x + depth * ld + n, ld);
    }
}

static bool linear(Linear l, const Updated &u, int threads) {  // false: no memory
  static constexpr void (*WIDE[])(const Linear, int64_t, int64_t, int64_t, int64_t, bf16 *, int64_t) = {
      wide<STORE>, wide<ADD>, wide<SWIGLU>, wide<SWIGLU_BACKWARD>, wide<BIAS>, wide<GELU>, wide<GELU_BACKWARD>};
  // threads share the columns, so that each packs weights of its own; many threads share the rows too
  const int64_t all = l.n / 32, blocks = l.rows / 32;
  int64_t columns = 1;
  while (threads % (2 * columns) == 0 && all >= 8 * columns) columns *= 2;
  const int64_t own = (all + columns - 1) / columns, parts = std::max<int64_t>(1, (own * l.panel() + IN_L2 - 1) / IN_L2);
  const int64_t across = (own + parts - 1) / parts * 32, high = threads / columns;
  const Rooms rooms(2 * across / 32 * l.panel(), threads), low(4 * l.r * (u.k + u.n) + 256, 1);
  if (!rooms.all || !low.all) return false;
  Room room(low, 0);
  bf16 *a = room.take<bf16>(l.r * u.k), *b = room.take<bf16>(l.r * u.n);
  bf16 *packed_a = room.take<bf16>(l.r * u.k), *packed_b = room.take<bf16>(l.r * u.n);
  l.down = l.turned ? packed_b : packed_a, l.low = l.turned ? packed_a : packed_b;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
    if (l.r) {
      gather(u, a, b);
      if (l.n || !l.turned) pack_shared(packed_a, a, l.turned ? u.k : l.r, l.turned ? l.r : u.k, !l.turned);
      if (l.n || l.turned) pack_shared(packed_b, b, l.turned ? l.r : u.n, l.turned ? u.n : l.r, !l.turned);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < blocks; t++) narrow(l, 32 * t);
    }
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; part++) {
      const int64_t c = part % columns, r = part / columns;
      WIDE[l.epilogue](l, blocks * r / high * 32, blocks * (r + 1) / high * 32, all * c / columns * 32,
                       all * (c + 1) / columns * 32, Room(rooms, part).take<bf16>(across / 32 * l.panel()), across);
    }
  }
  return true;
}

struct Weight {  // a product: its updates, and where each sixteen rows of its weights lie
  const Updated *u;
  const bf16 *const *rows;
};
// x [rows, k] -> y [rows, n], or with `turned` the other way; u [rows, r] is filled. y may be null: only u. BIAS, GELU and
// SWIGLU: other is one row.
static bool product(const Weight &w, bool turned, int64_t rows, bf16 *x, bf16 *u, bf16 *y, int epilogue, bf16 *other, bf16 *h,
                    int threads) {
  const Updated &p = *w.u;
  const int64_t k = turned ? p.n : p.k, n = turned ? p.k : p.n, wide = epilogue == SWIGLU_BACKWARD ? 2 * n : n;
  const bool swiglu = epilogue == SWIGLU || epilogue == SWIGLU_BACKWARD;
  Linear l{grid(x, k, turned ? p.blocks_out : p.blocks_in), u, rows, k, p.r, {w.rows, p.k}, turned, nullptr, nullptr,
           y ? n : 0, grid(y, wide, swiglu || (turned ? p.blocks_in : p.blocks_out)), epilogue,
           epilogue == BIAS || epilogue == GELU || epilogue == SWIGLU ? Grid{other, 0, 1, 0} : grid(other, wide, swiglu),
           grid(h, epilogue == SWIGLU ? n / 2 : n, swiglu), turned ? nullptr : p.gain};
  return linear(l, p, threads);
}
