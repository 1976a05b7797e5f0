// Attention within each segment of a packed row, causal or both ways, on AMX tiles, forward and backward.
//
// A unit of work is one segment and one key/value head with the query heads that share it. Queries go in blocks of up to
// 64 rows against 256 keys at a time (up to the diagonal), so that scores stay in the caches; the softmax runs along (Dao et
// al., arXiv 2205.14135).
#pragma once
#include "tiles.h"

struct Attention {
  const bf16 *q, *k, *v;  // [T, heads * hd], [T, kv * hd] twice, stride ld
  int64_t ld;
  const int64_t *starts;  // [segments + 1]
  int64_t segments, heads, kv, hd;
  float scale;
  int64_t window;  // a query sees itself and window - 1 keys before it; 0: all before it; -1: the whole segment
  bf16 *out;       // [T, heads * hd], stride ldo
  int64_t ldo;
  float *lse;  // [heads, T]
  int64_t rows;  // T
  const int64_t *holes;  // [T, 2] keys [from, to) of its segment that a query does not see though they are before it; or null
  bool causal() const { return window >= 0; }
};

struct AttentionGrad {
  const bf16 *dout;  // [T, heads * hd], stride lddo
  int64_t lddo;
  bf16 *dq, *dk, *dv;  // as q, k, v, stride ldd
  int64_t ldd;
};

static const int64_t QUERIES = 128, KEYS = 256;

// n rows of x (hd wide) to `to`, zero rows up to `padded`.
static inline void copy_rows(bf16 *to, const bf16 *x, int64_t ld, int64_t n, int64_t padded, int64_t hd) {
  for (int64_t i = 0; i < n; i++) memcpy(to + i * hd, x + i * ld, 2 * hd);
  memset(to + n * hd, 0, 2 * hd * (padded - n));
}

// Packed B operands of n (multiple of 32) rows x hd, contiguous: rows as columns (k = hd), or rows as k.
static inline void rows_across(bf16 *to, const bf16 *x, int64_t n, int64_t hd) {
  for (int64_t p = 0; p < n / 32; p++)
    for (int64_t b = 0; b < hd / 32; b++)
      for (int64_t t = 0; t < 2; t++)
        tile_across(to + ((p * (hd / 32) + b) * 2 + t) * TILE, x + (32 * p + 16 * t) * hd + 32 * b, hd);
}
static inline void rows_along(bf16 *to, const bf16 *x, int64_t n, int64_t hd) {  // [k block][column panel][2]
  for (int64_t b = 0; b < n / 32; b++)
    for (int64_t p = 0; p < hd / 32; p++)
      for (int64_t t = 0; t < 2; t++)
        tile_along(to + ((b * (hd / 32) + p) * 2 + t) * TILE, x + 32 * b * hd + 32 * p + 16 * t, hd);
}

// The end of the keys before `end` that any of the 32 queries from q on may see; what is behind it is not computed.
static inline int64_t reach(const Attention &a, int64_t q, int64_t end) { return a.causal() ? std::min(end, q + 32) : end; }

// s [n, KEYS] = x (n rows x hd, queries q0..) * packed keys [first, end)
static inline void scores(const Attention &a, float *s, const bf16 *x, int64_t q0, int64_t n, const bf16 *keys, int64_t first,
                          int64_t end) {
  const int64_t hd = a.hd;
  for (int64_t i = 0; i < n; i += 32)
    for (int64_t j = first; j < reach(a, q0 + i, end); j += 32) {
      zero_tiles();
      multiply(x + i * hd, hd, 32, keys + j / 32 * (hd / 32) * 2 * TILE, 2 * TILE, hd / 32);
      store_tiles(s + i * KEYS + j - first, KEYS);
    }
}

// Keys [first, end) that the queries [q0, q0 + n) may see, in blocks of 32.
static inline void span(const Attention &a, int64_t q0, int64_t n, int64_t length, int64_t &first, int64_t &end) {
  end = ((a.causal() ? std::min(q0 + n, length) : length) + 31) / 32 * 32;
  first = a.window > 0 ? std::max<int64_t>(0, q0 - a.window + 1) / 32 * 32 : 0;
}
static inline void seen(const Attention &a, int64_t q, int64_t length, int64_t &low, int64_t &high) {  // [low, high)
  low = a.window > 0 ? std::max<int64_t>(0, q - a.window + 1) : 0;
  high = a.causal() ? q + 1 : length;
}
struct Hole {  // of one query, counted from the first of the keys at hand
  int64_t from, to;
};
// The hole of row t of the pack, counted from the key j0 of its segment.
static inline Hole hole(const Attention &a, int64_t t, int64_t j0) {
  return a.holes ? Hole{a.holes[2 * t] - j0, a.holes[2 * t + 1] - j0} : Hole{0, 0};
}
static inline __mmask16 inside(int64_t j, int64_t low, int64_t high) {  // lanes of j..j+15 within [low, high)
  if (j >= low && j + 16 <= high) return 0xffff;
  int64_t a = std::min<int64_t>(16, std::max<int64_t>(0, low - j));
  int64_t b = std::min<int64_t>(16, std::max<int64_t>(0, high - j));
  return b > a ? __mmask16(((1u << b) - 1u) & ~((1u << a) - 1u)) : __mmask16(0);
}

static inline __mmask16 inside(int64_t j, int64_t low, int64_t high, Hole h) {
  return inside(j, low, high) & ~(h.to > h.from ? inside(j, h.from, h.to) : __mmask16(0));
}

// Zeros where a row of probabilities has none: [first, from) and [upto, end).
static inline void clear(bf16 *p, int64_t first, int64_t from, int64_t upto, int64_t end) {
  if (from > first) memset(p + first, 0, 2 * (from - first));
  if (end > upto) memset(p + upto, 0, 2 * (end - upto));
}

// The probabilities of the segment's query (`at`: its first row) over the keys [j0, j1), relative to the largest score so
// far. top (a power of two), total: of all keys so far. sum: its output so far, shrunk when a larger score comes, or null.
static inline void soften(const Attention &a, const float *s, bf16 *p, int64_t j0, int64_t j1, int64_t at, int64_t query,
                          int64_t length, float &top, float &total, float *sum) {
  int64_t low, high;
  seen(a, query, length, low, high);
  const Hole h = hole(a, at + query, j0);
  low = std::max(low, j0) - j0, high = std::min(high, j1) - j0;
  const int64_t from = std::min(low / 16 * 16, j1 - j0), upto = std::max(from, (high + 15) / 16 * 16);
  clear(p, 0, from, upto, j1 - j0);
  if (high <= low) return;
  __m512 best = _mm512_set1_ps(-INFINITY);
  for (int64_t j = from; j < upto; j += 16)
    best = _mm512_mask_max_ps(best, inside(j, low, high, h), best, _mm512_load_ps(s + j));
  const float scale = a.scale * LOG2_E, now = std::max(top, _mm512_reduce_max_ps(best) * scale);
  if (now == -INFINITY) return clear(p, from, from, from, upto);  // all of them are in the hole
  if (sum && now > top) {
    const float shrink = std::exp2(top - now);
    total *= shrink;
    for (int64_t d = 0; d < a.hd; d += 16)
      _mm512_store_ps(sum + d, _mm512_mul_ps(_mm512_load_ps(sum + d), _mm512_set1_ps(shrink)));
  }
  top = now;
  __m512 all = _mm512_setzero_ps();
  for (int64_t j = from; j < upto; j += 16) {
    __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(s + j), _mm512_set1_ps(scale), _mm512_set1_ps(now)));
    e = _mm512_maskz_mov_ps(inside(j, low, high, h), e);
    all = _mm512_add_ps(all, e);
    store16(p + j, e);
  }
  total += _mm512_reduce_add_ps(all);
}

static bool attend(const Attention &a, int threads) {  // false: no memory
  int64_t longest = 0;
  for (int64_t s = 0; s < a.segments; s++) longest = std::max(longest, a.starts[s + 1] - a.starts[s]);
  const int64_t padded = (longest + 31) / 32 * 32, hd = a.hd, group = a.heads / a.kv;
  const Rooms rooms(2 * (3 * padded * hd + QUERIES * hd) + 6 * QUERIES * KEYS + 4 * QUERIES * hd + 4096, threads);
  if (!rooms.all) return false;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
    Room room(rooms, omp_get_thread_num());
    bf16 *rows = room.take<bf16>(padded * hd), *kt = room.take<bf16>(padded * hd), *vt = room.take<bf16>(padded * hd);
    bf16 *q = room.take<bf16>(QUERIES * hd), *p = room.take<bf16>(QUERIES * KEYS);
    float *s = room.take<float>(QUERIES * KEYS), *sum = room.take<float>(QUERIES * hd);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.segments * a.kv; unit++) {
      int64_t seg = unit / a.kv, g = unit % a.kv, at = a.starts[seg], length = a.starts[seg + 1] - at;
      int64_t full = (length + 31) / 32 * 32;
      copy_rows(rows, a.k + at * a.ld + g * hd, a.ld, length, full, hd);
      rows_across(kt, rows, full, hd);
      copy_rows(rows, a.v + at * a.ld + g * hd, a.ld, length, full, hd);
      rows_along(vt, rows, full, hd);
      for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t q0 = 0; q0 < length; q0 += QUERIES) {
          int64_t n = std::min(QUERIES, length - q0), nb = (n + 31) / 32 * 32, first, end;
          span(a, q0, n, length, first, end);
          copy_rows(q, a.q + (at + q0) * a.ld + h * hd, a.ld, n, nb, hd);
          float top[QUERIES], total[QUERIES];
          for (int64_t i = 0; i < nb; i++) top[i] = -INFINITY, total[i] = 0;
          for (int64_t j0 = first; j0 < end; j0 += KEYS) {
            const int64_t j1 = std::min(j0 + KEYS, end);
            scores(a, s, q, q0, nb, kt, j0, j1);
            for (int64_t i = 0; i < nb; i++)
              if (const int64_t upto = reach(a, q0 + i / 32 * 32, j1); upto > j0)
                soften(a, s + i * KEYS, p + i * KEYS, j0, upto, at, std::min(q0 + i, length - 1), length, top[i],
                       total[i], j0 > first ? sum + i * hd : nullptr);
            for (int64_t i = 0; i < nb; i += 32)
              for (int64_t d = 0; d < hd && reach(a, q0 + i, j1) > j0; d += 32) {
                if (j0 == first) zero_tiles();
                else load_tiles(sum + i * hd + d, hd);
                multiply(p + i * KEYS, KEYS, 32, vt + (j0 / 32 * (hd / 32) + d / 32) * 2 * TILE, (hd / 32) * 2 * TILE,
                         (reach(a, q0 + i, j1) - j0) / 32);
                store_tiles(sum + i * hd + d, hd);
              }
          }
          for (int64_t i = 0; i < n; i++) {
            const __m512 f = _mm512_set1_ps(1.0f / total[i]);
            bf16 *o = a.out + (at + q0 + i) * a.ldo + h * hd;
            for (int64_t d = 0; d < hd; d += 16) store16(o + d, _mm512_mul_ps(_mm512_load_ps(sum + i * hd + d), f));
            if (a.lse) a.lse[h * a.rows + at + q0 + i] = (top[i] + std::log2(total[i])) * LN_2;
          }
        }
    }
  }
  return true;
}

// Of the queries q0 + i and q0 + i + 1 over the keys [j0, j1): P and dS in packed tiles with k = queries, and dS by rows.
// at: the segment's first row. lse: as a power of two.
static inline void slopes(const Attention &a, const float *s, const float *dp, int64_t at, int64_t i, int64_t q0, int64_t n,
                          int64_t nb, int64_t j0, int64_t j1, int64_t length, const float *lse, const float *delta, bf16 *ds,
                          bf16 *pp,
                          bf16 *dsp) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 scale = _mm512_set1_ps(a.scale * LOG2_E);
  int64_t low[2], high[2];
  Hole h[2] = {};
  for (int64_t r = 0; r < 2; r++) {
    seen(a, q0 + i + r, length, low[r], high[r]);
    if (i + r >= n) low[r] = high[r] = 0;  // a padding row sees nothing
    else h[r] = hole(a, at + q0 + i + r, j0);
    low[r] = std::max(low[r], j0) - j0, high[r] = std::max(std::min(high[r], j1) - j0, int64_t(0));
  }
  for (int64_t j = 0; j < j1 - j0; j += 16) {
    // B tiles with k = queries: [key panel of 32][query block of 32][2], row i/2 of the tile
    const int64_t tile = ((j / 32 * (nb / 32) + i / 32) * 2 + j / 16 % 2) * TILE + i % 32 / 2 * 32;
    const __mmask16 in[2] = {inside(j, low[0], high[0], h[0]), inside(j, low[1], high[1], h[1])};
    if (!(in[0] | in[1])) {
      _mm512_store_si512(pp + tile, _mm512_setzero_si512());
      _mm512_store_si512(dsp + tile, _mm512_setzero_si512());
      for (int64_t r = 0; r < 2; r++) memset(ds + (i + r) * KEYS + j, 0, 32);
      continue;
    }
    __m512 pr[2], dr[2];
    for (int64_t r = 0; r < 2; r++) {
      const int64_t place = (i + r) * KEYS + j;
      __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(s + place), scale, _mm512_set1_ps(lse[i + r])));
      pr[r] = _mm512_maskz_mov_ps(in[r], e);
      __m512 x = _mm512_sub_ps(_mm512_load_ps(dp + place), _mm512_set1_ps(delta[i + r]));
      dr[r] = _mm512_mul_ps(_mm512_mul_ps(pr[r], x), _mm512_set1_ps(a.scale));
      store16(ds + place, dr[r]);
    }
    _mm512_store_si512(pp + tile, _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(pr[1], pr[0])));
    _mm512_store_si512(dsp + tile, _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(dr[1], dr[0])));
  }
}

// With P = exp(scale q k^T - lse): dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)) * scale, dQ = dS K, dK = dS^T Q.
// dK and dV are summed transposed, [hd, keys], in float, over the query heads of the group.
static bool attend_backward(const Attention &a, const AttentionGrad &b, int threads) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.segments; s++) longest = std::max(longest, a.starts[s + 1] - a.starts[s]);
  const int64_t padded = (longest + 31) / 32 * 32, hd = a.hd, group = a.heads / a.kv;
  const Rooms rooms(
      2 * (4 * padded * hd + 4 * QUERIES * hd + 3 * QUERIES * KEYS) + 4 * (QUERIES * (2 * KEYS + hd) + 2 * hd * padded) + 8192,
      threads);
  if (!rooms.all) return false;
#pragma omp parallel num_threads(threads)
  {
    Tiles on;
    Room room(rooms, omp_get_thread_num());
    bf16 *rows = room.take<bf16>(padded * hd), *kt = room.take<bf16>(padded * hd);
    bf16 *vt = room.take<bf16>(padded * hd), *ks = room.take<bf16>(padded * hd);
    bf16 *q = room.take<bf16>(QUERIES * hd), *go = room.take<bf16>(QUERIES * hd);
    bf16 *q_turned = room.take<bf16>(QUERIES * hd), *go_turned = room.take<bf16>(QUERIES * hd);
    bf16 *ds = room.take<bf16>(QUERIES * KEYS);                                          // row-major
    bf16 *pp = room.take<bf16>(QUERIES * KEYS), *dsp = room.take<bf16>(QUERIES * KEYS);  // packed, k = queries
    float *s = room.take<float>(QUERIES * KEYS), *dp = room.take<float>(QUERIES * KEYS);
    float *dq = room.take<float>(QUERIES * hd);
    float *dkt = room.take<float>(hd * padded), *dvt = room.take<float>(hd * padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.segments * a.kv; unit++) {
      int64_t seg = unit / a.kv, g = unit % a.kv, at = a.starts[seg], length = a.starts[seg + 1] - at;
      int64_t full = (length + 31) / 32 * 32;
      copy_rows(rows, a.v + at * a.ld + g * hd, a.ld, length, full, hd);
      rows_across(vt, rows, full, hd);
      copy_rows(rows, a.k + at * a.ld + g * hd, a.ld, length, full, hd);
      rows_across(kt, rows, full, hd);
      rows_along(ks, rows, full, hd);
      memset(dkt, 0, 4 * hd * padded);
      memset(dvt, 0, 4 * hd * padded);
      for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t q0 = 0; q0 < length; q0 += QUERIES) {
          int64_t n = std::min(QUERIES, length - q0), nb = (n + 31) / 32 * 32, first, end;
          span(a, q0, n, length, first, end);
          copy_rows(q, a.q + (at + q0) * a.ld + h * hd, a.ld, n, nb, hd);
          copy_rows(go, b.dout + (at + q0) * b.lddo + h * hd, b.lddo, n, nb, hd);
          float lse[QUERIES], delta[QUERIES];
          for (int64_t i = 0; i < nb; i++) {
            const int64_t t = at + q0 + i;
            __m512 dot = _mm512_setzero_ps();
            for (int64_t d = 0; i < n && d < hd; d += 16)
              dot = _mm512_fmadd_ps(load16(a.out + t * a.ldo + h * hd + d), load16(go + i * hd + d), dot);
            delta[i] = _mm512_reduce_add_ps(dot);
            lse[i] = i < n ? a.lse[h * a.rows + t] * LOG2_E : 0.0f;
          }
          for (int64_t d = 0; d < hd; d += 16)
            for (int64_t i = 0; i < nb; i += 32) {
              tile_turned(q_turned + (d / 16 * (nb / 32) + i / 32) * TILE, q + i * hd + d, hd);
              tile_turned(go_turned + (d / 16 * (nb / 32) + i / 32) * TILE, go + i * hd + d, hd);
            }
          for (int64_t j0 = first; j0 < end; j0 += KEYS) {
            const int64_t j1 = std::min(j0 + KEYS, end);
            scores(a, s, q, q0, nb, kt, j0, j1);
            scores(a, dp, go, q0, nb, vt, j0, j1);
            for (int64_t i = 0; i < nb; i += 2)
              slopes(a, s, dp, at, i, q0, n, nb, j0, reach(a, q0 + i / 32 * 32, j1), length, lse, delta, ds, pp, dsp);
            for (int64_t i = 0; i < nb; i += 32)
              for (int64_t d = 0; d < hd && reach(a, q0 + i, j1) > j0; d += 32) {
                if (j0 == first) zero_tiles();
                else load_tiles(dq + i * hd + d, hd);
                multiply(ds + i * KEYS, KEYS, 32, ks + (j0 / 32 * (hd / 32) + d / 32) * 2 * TILE, (hd / 32) * 2 * TILE,
                         (reach(a, q0 + i, j1) - j0) / 32);
                store_tiles(dq + i * hd + d, hd);
              }
            for (int64_t d = 0; d < hd; d += 32)
              for (int64_t j = j0; j < j1; j += 32) {
                const int64_t from = a.causal() ? std::max<int64_t>(0, j - q0) / 32 : 0, many = nb / 32 - from;  // who sees them
                const int64_t panel = ((j - j0) / 32 * (nb / 32) + from) * 2 * TILE, left = (d / 16 * (nb / 32) + from) * TILE;
                load_tiles(dvt + d * padded + j, padded);
                multiply_packed(go_turned + left, nb / 32 * TILE, pp + panel, 2 * TILE, many);
                store_tiles(dvt + d * padded + j, padded);
                load_tiles(dkt + d * padded + j, padded);
                multiply_packed(q_turned + left, nb / 32 * TILE, dsp + panel, 2 * TILE, many);
                store_tiles(dkt + d * padded + j, padded);
              }
          }
          for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < hd; d += 16)
              store16(b.dq + (at + q0 + i) * b.ldd + h * hd + d, _mm512_load_ps(dq + i * hd + d));
        }
      for (int64_t d = 0; d < hd; d += 16)
        for (int64_t j = 0; j < length; j += 16)
          for (int64_t which = 0; which < 2; which++) {
            const float *from = (which ? dvt : dkt) + d * padded + j;
            bf16 *to = (which ? b.dv : b.dk) + (at + j) * b.ldd + g * hd + d;
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * padded);
            transpose_words(r);
            for (int64_t i = 0; i < std::min<int64_t>(16, length - j); i++) store16(to + i * b.ldd, _mm512_castsi512_ps(r[i]));
          }
    }
  }
  return true;
}
