// Matrix products on Intel AMX tiles: bfloat16 in, float32 accumulated.
//
// A tile is 16 rows of 64 bytes. C[16x16 float] += A[16 rows x 32 k] * B[32 k x 16 columns], where a row of B holds, for
// each column, the pair (k, k+1). Operands in packed order: per panel of 32 columns, per block of 32 k, two B tiles.
// All sizes are multiples of 32; callers pad with zeros.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "rows.h"

static constexpr int64_t TILE = 512;      // bf16 in a tile
static constexpr int64_t IN_L2 = 400000;  // bf16 of an operand that stay in the L2 cache beside the others

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; i++) bytes[i] = 64, rows[i] = 16;
  }
};

struct Tiles {  // tiles are on while one of these lives
  Tiles() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

static inline bool request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Memory for all threads, taken before they start: failing to get it inside a parallel region would end the process.
struct Rooms {
  int64_t each;
  char *all;
  Rooms(int64_t size, int threads)
      : each((size + 63) / 64 * 64), all((char *)aligned_alloc(64, each * threads)) {}
  ~Rooms() { free(all); }
};
struct Room {  // one thread's part of it, in 64-byte aligned pieces
  char *next;
  Room(const Rooms &rooms, int thread) : next(rooms.all + thread * rooms.each) {}
  template <class T>
  T *take(int64_t n) {
    T *p = (T *)next;
    next += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// ---- sixteen float at a time

static inline __m512 load16(const bf16 *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

static constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
static inline __m512 exp2_16(__m512 x) {  // 2^x for x below 128: 2^whole * polynomial, relative error below 1e-7
  const __m512 whole = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.3276460598e-3f);
  for (float c : {9.6755412435e-3f, 5.5507133087e-2f, 2.4022119726e-1f, 6.9314696704e-1f, 1.0000000717f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}
static inline __m512 exp16(__m512 x) { return exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))); }
static inline __m512 sigmoid16(__m512 x) {
  __m512 power = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)), _mm512_set1_ps(126.0f));
  __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_16(power));
  __m512 guess = _mm512_rcp14_ps(below);  // one step of Newton's method, cheaper than a division
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(2.0f)));
}

// ---- packing

static inline void transpose_words(__m512i r[16]) {  // 16 x 16 words of 32 bits, in place
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Two rows of 16 bf16 (16 each) -> their elements in turns: a0 b0 a1 b1 ...
static inline __m512i in_turns(const bf16 *a, const bf16 *b) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)a));
  __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)b));
  return _mm512_or_si512(x, _mm512_slli_epi32(y, 16));
}

// B tile from x[16 columns][32 k] (x given by rows of columns): the transpose by words.
static inline void tile_across(bf16 *to, const bf16 *x, int64_t ld) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(x + i * ld);
  transpose_words(r);
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
}
// B tile from x[32 k][16 columns].
static inline void tile_along(bf16 *to, const bf16 *x, int64_t ld) {
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, in_turns(x + 2 * i * ld, x + (2 * i + 1) * ld));
}
// A tile of the transpose: from x[32 k][16 rows].
static inline void tile_turned(bf16 *to, const bf16 *x, int64_t ld) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = in_turns(x + 2 * i * ld, x + (2 * i + 1) * ld);
  transpose_words(r);
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
}

// Pack src as the B operand. across: src is [columns, k]; else src is [k, columns].
// first: where its k blocks begin; blocks: k blocks in the whole operand.
static void pack(bf16 *to, const bf16 *src, int64_t ld, int64_t columns, int64_t k, bool across, int64_t first,
                 int64_t blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < columns / 32; p++)
    for (int64_t b = 0; b < k / 32; b++)
      for (int64_t t = 0; t < 2; t++) {
        bf16 *tile = to + ((p * blocks + first + b) * 2 + t) * TILE;
        int64_t n = 32 * p + 16 * t;
        if (across)
          tile_across(tile, src + n * ld + 32 * b, ld);
        else
          tile_along(tile, src + 32 * b * ld + n, ld);
      }
}

// ---- products

// C (tiles 0..3: 32 x 32) += A[32 rows x 32*blocks] * B panel. a: row-major with stride lda (in elements).
// Between k blocks B advances by b_next elements.
static inline void multiply_along(const bf16 *a, int64_t lda, const bf16 *b, int64_t b_next, int64_t blocks) {
  const bf16 *a1 = a + 16 * lda;
  for (int64_t k = 0; k < blocks; k++) {
    _tile_loadd(4, a + 32 * k, 2 * lda);
    _tile_loadd(6, b + k * b_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + k * b_next + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + 32 * k, 2 * lda);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
static inline void multiply(const bf16 *a, int64_t lda, const bf16 *b, int64_t blocks) {
  multiply_along(a, lda, b, 2 * TILE, blocks);
}
// The same with A in packed tiles: [row tile][k block], stride between row tiles `next` elements.
static inline void multiply_packed(const bf16 *a, int64_t next, const bf16 *b, int64_t b_stride, int64_t blocks) {
  for (int64_t k = 0; k < blocks; k++) {
    _tile_loadd(4, a + k * TILE, 64);
    _tile_loadd(6, b + k * b_stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + k * b_stride + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + next + k * TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
static inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
static inline void load_tiles(const float *c, int64_t ld) {
  _tile_loadd(0, c, 4 * ld);
  _tile_loadd(1, c + 16, 4 * ld);
  _tile_loadd(2, c + 16 * ld, 4 * ld);
  _tile_loadd(3, c + 16 * ld + 16, 4 * ld);
}
static inline void store_tiles(float *c, int64_t ld) {
  _tile_stored(0, c, 4 * ld);
  _tile_stored(1, c + 16, 4 * ld);
  _tile_stored(2, c + 16 * ld, 4 * ld);
  _tile_stored(3, c + 16 * ld + 16, 4 * ld);
}

// ---- linear layers: y = [x, u] * W, u = x * A kept in the columns after x

enum Epilogue { STORE, ADD, SWIGLU, SWIGLU_BACKWARD };

struct Linear {
  bf16 *x;  // [rows, k + r], stride ldx; columns k.. are written
  int64_t ldx, rows, k, r;
  const bf16 *down;  // packed [k -> r], null without LoRA
  const bf16 *wide;  // packed [k + r -> n]
  int64_t n;
  bf16 *y;  // [rows, n], stride ldy
  int64_t ldy;
  int epilogue;
  const bf16 *other;  // ADD: added to y. SWIGLU_BACKWARD: gu
  int64_t ldother;
  bf16 *h;  // SWIGLU and SWIGLU_BACKWARD: where silu(gate) * up goes
  int64_t ldh;
};

// Rows [from, to) of a finished block of 32 x 32 at (t, n).
template <int E>
static inline void finish(const Linear &l, const float *c, int64_t t, int64_t n, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i++) {
    __m512 a = _mm512_load_ps(c + 32 * i), b = _mm512_load_ps(c + 32 * i + 16);
    bf16 *y = l.y + (t + i) * l.ldy;
    const bf16 *o = l.other + (t + i) * l.ldother;
    if (E == ADD) {
      a = _mm512_add_ps(a, load16(o + n));
      b = _mm512_add_ps(b, load16(o + n + 16));
    }
    if (E == STORE || E == ADD) {
      store16(y + n, a);
      store16(y + n + 16, b);
    }
    // past the caches: gate and up are read again only in the backward
    if (E == SWIGLU) _mm512_stream_si512((__m512i *)(y + n), (__m512i)_mm512_cvtne2ps_pbh(b, a));
    if (E == SWIGLU) store16(l.h + (t + i) * l.ldh + n / 2, _mm512_mul_ps(_mm512_mul_ps(a, sigmoid16(a)), b));
    if (E == SWIGLU_BACKWARD)
      for (int64_t j = 0; j < 2; j++) {
        __m512 g = load16(o + 2 * n + 32 * j), u = load16(o + 2 * n + 32 * j + 16), s = sigmoid16(g), d = j ? b : a;
        __m512 silu = _mm512_mul_ps(g, s), slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
        store16(y + 2 * n + 32 * j, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        store16(y + 2 * n + 32 * j + 16, _mm512_mul_ps(d, silu));
        store16(l.h + (t + i) * l.ldh + n + 16 * j, _mm512_mul_ps(silu, u));
      }
  }
}

// Bring the lines that finish() will touch into the cache, to be written: a store that misses holds up everything else.
template <int E>
static inline void fetch(const Linear &l, int64_t t, int64_t n) {
  const bf16 *y = l.y + t * l.ldy + (E == SWIGLU_BACKWARD ? 2 * n : n);
  if (E != SWIGLU) __builtin_prefetch(y, 1);
  if (E == SWIGLU_BACKWARD) __builtin_prefetch(y + 32, 1);
  if (E == SWIGLU) __builtin_prefetch(l.h + t * l.ldh + n / 2, 1);
  if (E == SWIGLU_BACKWARD) {
    __builtin_prefetch(l.h + t * l.ldh + n, 1);
    __builtin_prefetch(l.other + t * l.ldother + 2 * n, 0);
    __builtin_prefetch(l.other + t * l.ldother + 2 * n + 32, 0);
  }
  if (E == ADD) __builtin_prefetch(l.other + t * l.ldother + n, 0);
}

// u of the rows [t, t + 32).
static inline void narrow(const Linear &l, int64_t t) {
  alignas(64) float c[1024];
  for (int64_t n = 0; n < l.r; n += 32) {
    zero_tiles();
    multiply(l.x + t * l.ldx, l.ldx, l.down + n / 32 * (l.k / 32) * 2 * TILE, l.k / 32);
    store_tiles(c, 32);
    for (int64_t i = 0; i < 32; i++) {
      store16(l.x + (t + i) * l.ldx + l.k + n, _mm512_load_ps(c + 32 * i));
      store16(l.x + (t + i) * l.ldx + l.k + n + 16, _mm512_load_ps(c + 32 * i + 16));
    }
  }
}

// u and y of the rows [m, end): while the tiles multiply a block, the vector units finish the block before it. A part of
// the weights that fits the L2 cache meets all rows before the next part.
template <int E>
static void wide(const Linear l, int64_t m, int64_t end) {
  alignas(64) float room[2][1024];
  const int64_t blocks = (l.k + l.r) / 32, share = (32 + blocks - 1) / blocks, panel = 2 * blocks * TILE;
  const int64_t parts = (l.n / 32 * panel + IN_L2 - 1) / IN_L2, across = (l.n / 32 + parts - 1) / parts * 32;
  int64_t before_t = -1, before_n = 0, turn = 0;
  for (int64_t n0 = 0; n0 < l.n; n0 += across)
    for (int64_t t = m; t < end; t += 32) {
      if (n0 == 0) narrow(l, t);
      const bf16 *coming = t + 32 >= end && n0 + across < l.n ? l.wide + across / 32 * panel : nullptr;
      for (int64_t n = n0; n < std::min(n0 + across, l.n); n += 32) {
        const bf16 *a = l.x + t * l.ldx, *a1 = a + 16 * l.ldx, *b = l.wide + n / 32 * panel;
        const float *before = room[1 - turn];
        int64_t done = before_t < 0 ? 32 : 0;
        zero_tiles();
        for (int64_t k = 0; k < blocks; k++) {
          _tile_loadd(4, a + 32 * k, 2 * l.ldx);
          _tile_loadd(6, b + 2 * k * TILE, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + (2 * k + 1) * TILE, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a1 + 32 * k, 2 * l.ldx);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
          if (coming)
            for (int64_t i = 0; i < 2 * TILE; i += 32)
              _mm_prefetch((const char *)(coming + n / 32 * panel + 2 * k * TILE + i), _MM_HINT_T1);
          for (int64_t i = k * share; i < std::min<int64_t>(32, (k + 1) * share); i++) fetch<E>(l, t + i, n);
          if (done < 32) {
            int64_t upto = std::min<int64_t>(32, done + share);
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

static void linear(const Linear &l, int threads) {
  static constexpr void (*WIDE[])(const Linear, int64_t, int64_t) = {wide<STORE>, wide<ADD>, wide<SWIGLU>,
                                                                     wide<SWIGLU_BACKWARD>};
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; part++) {
    Tiles on;
    const int64_t blocks = l.rows / 32, from = blocks * part / threads * 32, to = blocks * (part + 1) / threads * 32;
    if (l.n) WIDE[l.epilogue](l, from, to);
    else
      for (int64_t t = from; t < to; t += 32) narrow(l, t);
  }
}

// ---- g[r, n] (float) = p[rows, r]^T * q[rows, n]

struct Outer {
  const bf16 *p;
  int64_t ldp;
  const bf16 *q;
  int64_t ldq;
  float *g;
  int64_t rows, r, n;
  bf16 *turned;  // memory for rows * r
  bf16 *along;   // memory for rows * n; outer_panels() does without
};
static constexpr int64_t DEEP = 4;    // row blocks of q that a narrow g takes at a time
static constexpr int64_t HIGH = 128;  // rows of g that stay with their operand in the L2 cache

// B tiles of 32 columns of q, rows [32 * from, 32 * to).
static inline void pack_panel(bf16 *to, const Outer &o, int64_t j, int64_t from, int64_t end) {
  for (int64_t b = from; b < end; b++, to += 2 * TILE) {
    const bf16 *x = o.q + 32 * b * o.ldq + 32 * j;
    for (int64_t k = 0; k < 32; k++) __builtin_prefetch(x + k * o.ldq + 32);  // the next panel's
    tile_along(to, x, o.ldq);
    tile_along(to + TILE, x + 16, o.ldq);
  }
}
static inline void turn(const Outer &o, int64_t i) {  // A tiles of 16 columns of p
  for (int64_t b = 0; b < o.rows / 32; b++) tile_turned(o.turned + (i * (o.rows / 32) + b) * TILE, o.p + 32 * b * o.ldp + 16 * i, o.ldp);
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

// ---- low-rank updates of a product: y += scale * (x A^T) B^T for each of the layers that share its input

struct Update {  // one layer's. Ranks [r0, r0 + r) of the product are its own; its row i is the product's column(i).
  const float *a, *b;  // [r, k], [n, r]; null while it is off
  int64_t r0, r, n, first, spread;
  int64_t db;  // where the gradient of b begins
  double scale;
  int64_t column(int64_t i) const { return first + i / 16 * spread + i % 16; }
};
struct Updated {  // a product: k -> n with r ranks, and its packed operands that hold A and B
  const Update *updates;
  int64_t count, k, n, r;
  bf16 *down, *wide, *up, *wide_back;
};

static void pack_updates(const Updated &u, bf16 *room) {
  bf16 *a = room, *b = a + u.r * u.k;
  memset(room, 0, 2 * u.r * (u.k + u.n));
  for (int64_t w = 0; w < u.count; w++) {
    const Update &x = u.updates[w];
    if (!x.a) continue;
    for (int64_t j = 0; j < x.r * u.k; j++) store(a[x.r0 * u.k + j], x.a[j]);
    for (int64_t i = 0; i < x.n; i++)
      for (int64_t j = 0; j < x.r; j++) store(b[x.column(i) * u.r + x.r0 + j], float(x.scale) * x.b[i * x.r + j]);
  }
  const int64_t r = u.r / 32, k = u.k / 32, n = u.n / 32;
  pack(u.down, a, u.k, u.r, u.k, true, 0, k, 1);
  pack(u.wide, b, u.r, u.n, u.r, true, k, k + r, 1);
  pack(u.up, b, u.r, u.r, u.n, false, 0, n, 1);
  pack(u.wide_back, a, u.k, u.k, u.r, false, n, n + r, 1);
}
static bool pack_all_updates(const Updated *all, int64_t count, int threads) {  // false: no memory
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max(most, all[i].r * (all[i].k + all[i].n));
  const Rooms rooms(2 * most, threads);
  if (!rooms.all) return false;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) pack_updates(all[i], Room(rooms, omp_get_thread_num()).take<bf16>(most));
  return true;
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

// da [r, k] = du^T x, and of each layer db [n, r] = scale * dy^T u. x: [rows, k + r] with u behind, dy: [rows, n + r]
// with du behind.
static bool update_gradients(const Updated &u, bf16 *x, int64_t ldx, bf16 *dy, int64_t lddy, int64_t rows, float *da,
                             float *db, int threads) {  // false: no memory
  const Rooms rooms(4 * u.r * u.n + 4 * rows * u.r + 128, 1);
  if (!rooms.all) return false;
  Room room(rooms, 0);
  float *g = room.take<float>(u.r * u.n);
  bf16 *turned = room.take<bf16>(2 * rows * u.r);
  const Outer a{dy + u.n, lddy, x, ldx, da, rows, u.r, u.k, turned, nullptr};
  const Outer b{x + u.k, ldx, dy, lddy, g, rows, u.r, u.n, turned + rows * u.r, nullptr};
  const int64_t ka = u.k / 32, all = ka + u.n / 32;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < u.r / 8; i++) turn(i % 2 ? a : b, i / 2);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; part++) {
      const int64_t from = all * part / threads, to = all * (part + 1) / threads;
      outer_panels(a, std::min(from, ka), std::min(to, ka));
      outer_panels(b, std::max(from, ka) - ka, std::max(to, ka) - ka);
      for (int64_t w = 0; w < u.count; w++) spread_rows(u.updates[w], u, g, db, std::max(from, ka) - ka, std::max(to, ka) - ka);
    }
  }
  return true;
}
