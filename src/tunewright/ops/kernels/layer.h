// A Llama decoder layer with frozen weights and low-rank updates in one call, forward and backward: between the kernels
// nothing leaves the caches. The same steps as models/fast_llama.py, which computes everything else kernel by kernel.
#pragma once
#include "attention.h"
#include "lowrank.h"

struct Pack {  // what all layers share; rows: n tokens and what pads them to whole blocks
  int64_t rows, n, heads, kv, hd, window, segments;
  const int64_t *starts;
  const float *cosine, *sine;
  double eps;
  const int64_t *holes;  // see Attention
};
struct LayerWeights {
  Weight qkv, o, gate_up, down;
  const float *norm1, *norm2;
  const bf16 *bias;  // of qkv, or null
  const Weight *all() const { return &qkv; }
};
struct Kept {  // what the backward needs of the forward, one after the other in two pieces of memory
  bf16 *qkv, *attended, *mid, *gu, *u[4];
  bf16 *o, *down;  // what these add to the residual, where they have gains, else null
  float *rstd1, *rstd2, *lse;
  Kept(bf16 *room, float *small, const Pack &p, const LayerWeights &w) {
    auto take = [&](int64_t columns) { return (room += p.rows * columns) - p.rows * columns; };
    qkv = take(w.qkv.u->n), attended = take(w.o.u->k), mid = take(w.o.u->n), gu = take(w.gate_up.u->n);
    o = w.o.u->gain ? take(w.o.u->n) : nullptr, down = w.down.u->gain ? take(w.down.u->n) : nullptr;
    for (int i = 0; i < 4; i++) u[i] = take(w.all()[i].u->r);
    rstd1 = small, rstd2 = small + p.rows, lse = small + 2 * p.rows;
  }
};

static Attention attention(const Pack &p, const Kept &k, int64_t width) {
  bf16 *keys = k.qkv + p.heads * p.hd;
  return {k.qkv, keys, keys + p.kv * p.hd, width, p.starts, p.segments, p.heads, p.kv, p.hd, 1.0f / std::sqrt(float(p.hd)),
          p.window, k.attended, p.heads * p.hd, k.lse, p.rows, p.holes};
}
static void clear_rows(bf16 *x, const Pack &p, int64_t width) { memset(x + p.n * width, 0, 2 * (p.rows - p.n) * width); }

static void add_bias(bf16 *x, const bf16 *bias, float sign, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < width; i += 16)
      store16(x + t * width + i, _mm512_fmadd_ps(load16(bias + i), _mm512_set1_ps(sign), load16(x + t * width + i)));
}

// x [rows, d] -> out [rows, d]. own: memory for 2 d + f columns. False: no memory.
static bool layer_forward(const Pack &p, const LayerWeights &w, bf16 *x, bf16 *out, const Kept &k, bf16 *own, int threads) {
  const int64_t rows = p.rows, d = w.qkv.u->k, width = w.qkv.u->n;
  bf16 *xn = own, *xn2 = own + rows * d, *h = own + 2 * rows * d;
  rmsnorm(x, d, w.norm1, float(p.eps), xn, d, k.rstd1, rows, d, threads);
  if (!product(w.qkv, false, rows, xn, k.u[0], k.qkv, STORE, nullptr, nullptr, threads)) return false;
  if (w.bias) add_bias(k.qkv, w.bias, 1.0f, rows, width, threads);
  rope(k.qkv, width, p.cosine, p.sine, 1.0f, rows, p.heads + p.kv, p.hd, threads);
  clear_rows(k.attended, p, p.heads * p.hd);
  if (!attend(attention(p, k, width), threads)) return false;
  if (!product(w.o, false, rows, k.attended, k.u[1], k.mid, ADD, x, k.o, threads)) return false;
  rmsnorm(k.mid, d, w.norm2, float(p.eps), xn2, d, k.rstd2, rows, d, threads);
  return product(w.gate_up, false, rows, xn2, k.u[2], k.gu, SWIGLU, nullptr, h, threads) &&
         product(w.down, false, rows, h, k.u[3], out, ADD, k.mid, k.down, threads);
}

// dx: gradient of the output. to: where the input's goes, or null. found: of each product in turn da [r, k], the db, and
// where it has gains the sums [n] of before_gain().
// own: as in the forward. scratch: memory for 5 d + 2 f + width of qkv + all r columns.
static bool layer_backward(const Pack &p, const LayerWeights &w, bf16 *x, const Kept &k, bf16 *dx, bf16 *to, bf16 *own,
                           bf16 *scratch, float *found, int threads) {
  const int64_t rows = p.rows, d = w.qkv.u->k, width = w.qkv.u->n;
  auto take = [&](int64_t columns) { return (scratch += rows * columns) - rows * columns; };
  bf16 *xn = own, *xn2 = own + rows * d, *h = own + 2 * rows * d;
  bf16 *dgu = take(w.gate_up.u->n), *dn = take(d), *dmid = take(d), *dattended = take(w.o.u->k), *dqkv = take(width), *du[4];
  bf16 *dout = take(d);  // of o or down, before its gains
  for (int i = 0; i < 4; i++) du[i] = take(w.all()[i].u->r);
  float *at[4], *sums[4];
  for (int i = 0; i < 4; i++) {
    at[i] = found;
    const Updated &u = *w.all()[i].u;
    found += u.r * u.k;
    for (int64_t j = 0; j < u.count; j++) found += u.updates[j].n * u.updates[j].r;
    sums[i] = found;
    if (u.gain) found += u.n;
  }
  if (w.down.u->gain && !before_gain(w.down, rows, dx, k.down, dout, sums[3], threads)) return false;
  bf16 *dy = w.down.u->gain ? dout : dx;
  if (!product(w.down, true, rows, dy, du[3], dgu, SWIGLU_BACKWARD, k.gu, h, threads)) return false;
  if (!gradients(w.down, rows, h, k.u[3], dy, du[3], at[3], threads)) return false;
  if (w.gate_up.u->gain && !before_gain(w.gate_up, rows, dgu, k.gu, dgu, sums[2], threads)) return false;
  if (!product(w.gate_up, true, rows, dgu, du[2], dn, STORE, nullptr, nullptr, threads)) return false;
  rmsnorm(k.mid, d, w.norm2, float(p.eps), xn2, d, k.rstd2, rows, d, threads);
  if (!gradients(w.gate_up, rows, xn2, k.u[2], dgu, du[2], at[2], threads)) return false;
  rmsnorm_backward(dn, d, k.mid, d, w.norm2, k.rstd2, dx, d, dmid, d, (float *)nullptr, rows, d, threads);
  if (w.o.u->gain && !before_gain(w.o, rows, dmid, k.o, dout, sums[1], threads)) return false;
  dy = w.o.u->gain ? dout : dmid;
  if (!product(w.o, true, rows, dy, du[1], dattended, STORE, nullptr, nullptr, threads)) return false;
  if (!gradients(w.o, rows, k.attended, k.u[1], dy, du[1], at[1], threads)) return false;
  clear_rows(dqkv, p, width);
  bf16 *dkeys = dqkv + p.heads * p.hd;
  const AttentionGrad g{dattended, p.heads * p.hd, dqkv, dkeys, dkeys + p.kv * p.hd, width};
  if (!attend_backward(attention(p, k, width), g, threads)) return false;
  rope(dqkv, width, p.cosine, p.sine, -1.0f, rows, p.heads + p.kv, p.hd, threads);
  if (w.qkv.u->gain) {  // what the attention read becomes the product's own output again
    rope(k.qkv, width, p.cosine, p.sine, -1.0f, rows, p.heads + p.kv, p.hd, threads);
    if (w.bias) add_bias(k.qkv, w.bias, -1.0f, rows, width, threads);
    if (!before_gain(w.qkv, rows, dqkv, k.qkv, dqkv, sums[0], threads)) return false;
  }
  if (!product(w.qkv, true, rows, dqkv, du[0], to ? dn : nullptr, STORE, nullptr, nullptr, threads)) return false;
  if (to) rmsnorm_backward(dn, d, x, d, w.norm1, k.rstd1, dmid, d, to, d, (float *)nullptr, rows, d, threads);
  rmsnorm(x, d, w.norm1, float(p.eps), xn, d, k.rstd1, rows, d, threads);
  return gradients(w.qkv, rows, xn, k.u[0], dqkv, du[0], at[0], threads);
}
