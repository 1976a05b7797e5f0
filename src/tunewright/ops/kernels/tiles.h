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
static void pack(bf16 *to, const bf16 *src, int64_t ld, int64_t columns, int64_t k, bool across, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < columns / 32; p++)
    for (int64_t b = 0; b < k / 32; b++)
      for (int64_t t = 0; t < 2; t++) {
        bf16 *tile = to + ((p * (k / 32) + b) * 2 + t) * TILE;
        int64_t n = 32 * p + 16 * t;
        if (across) tile_across(tile, src + n * ld + 32 * b, ld);
        else tile_along(tile, src + 32 * b * ld + n, ld);
      }
}

// Rows of weights wherever they lie: sixteen at a time, each of the same stride. Their tiles are made when they are used.
struct Weights {
  const bf16 *const *rows;
  int64_t ld;
  const bf16 *row(int64_t i) const { return rows[i / 16] + i % 16 * ld; }
};
// B tiles of 32 columns, rows [32 p, 32 p + 32) as columns, their elements as k.
static inline void panel_across(bf16 *to, const Weights &w, int64_t p, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t t = 0; t < 2; t++, to += TILE) {
      const bf16 *x = w.rows[2 * p + t] + 32 * b;
      for (int64_t i = 0; i < 16; i++) __builtin_prefetch(x + i * w.ld + 96);
      tile_across(to, x, w.ld);
    }
}
// The same for `many` panels from p on: elements [32 p, 32 p + 32) of the rows as columns, the rows as k. A row's elements
// of all panels are read together: memory is slow to jump.
static inline void panels_along(bf16 *to, int64_t panel, const Weights &w, int64_t p, int64_t many, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < 16; i++) {
      const bf16 *x = w.rows[2 * b + i / 8] + i % 8 * 2 * w.ld + 32 * p;
      for (int64_t q = 0; q < many; q++, x += 32) {
        bf16 *at = to + q * panel + 2 * b * TILE + 32 * i;
        _mm512_store_si512(at, in_turns(x, x + w.ld));
        _mm512_store_si512(at + TILE, in_turns(x + 16, x + 16 + w.ld));
      }
    }
}

// A matrix as its blocks of 32 x 32: by rows, or with each block in one piece, so that whoever takes a block reads along.
struct Grid {
  bf16 *p;
  int64_t down, along, ld;  // from a row or a column to the next block's (by one of it), from a block's row to its next
  bf16 *at(int64_t t, int64_t c) const { return p + t * down + c * along; }  // t, c: multiples of 32
};
static inline Grid grid(bf16 *p, int64_t width, bool blocks) {
  return blocks ? Grid{p, width, 32, 32} : Grid{p, width, 1, width};
}

// ---- products

// C (tiles 0..3: 32 x 32) += A[32 rows x 32*blocks] * B panel. a: rows of stride lda (in elements).
// From one k block to the next A advances by a_next elements, B by b_next.
static inline void multiply(const bf16 *a, int64_t lda, int64_t a_next, const bf16 *b, int64_t b_next, int64_t blocks) {
  const bf16 *a1 = a + 16 * lda;
  for (int64_t k = 0; k < blocks; k++) {
    _tile_loadd(4, a + k * a_next, 2 * lda);
    _tile_loadd(6, b + k * b_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + k * b_next + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + k * a_next, 2 * lda);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
static inline void multiply(const bf16 *a, int64_t lda, const bf16 *b, int64_t blocks) {
  multiply(a, lda, 32, b, 2 * TILE, blocks);
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
