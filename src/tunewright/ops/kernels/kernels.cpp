// The functions that Python calls, by plain C names. They return 0, or 1 when there was no memory.
#include "rows.h"
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_TILES 1
#include "layer.h"
#include "vocabulary.h"
#else
#define HAS_TILES 0
#endif

#define BOTH(name, arguments, call) \
  extern "C" int name##_float32 arguments { \
    using T = float; \
    call; \
    return 0; \
  } \
  extern "C" int name##_bfloat16 arguments { \
    using T = bf16; \
    call; \
    return 0; \
  }
using P = void *;
using I = int64_t;

extern "C" int has_tiles() {
#if HAS_TILES
  return request_tiles();
#else
  return 0;
#endif
}

BOTH(rmsnorm, (P x, I ldx, P w, double eps, P y, I ldy, P rstd, I rows, I d, I threads),
     rmsnorm<T>((T *)x, ldx, (float *)w, float(eps), (T *)y, ldy, (float *)rstd, rows, d, int(threads)))
BOTH(rmsnorm_backward,
     (P dy, I lddy, P x, I ldx, P w, P rstd, P dres, I ldres, P dx, I lddx, P dw, I rows, I d, I threads),
     rmsnorm_backward<T>((T *)dy, lddy, (T *)x, ldx, (float *)w, (float *)rstd, (T *)dres, ldres, (T *)dx, lddx,
                         (float *)dw, rows, d, int(threads)))
BOTH(rope, (P x, I ldx, P cosine, P sine, double sign, I rows, I heads, I hd, I threads),
     rope<T>((T *)x, ldx, (float *)cosine, (float *)sine, float(sign), rows, heads, hd, int(threads)))
BOTH(swiglu, (P gu, I ldgu, P h, I ldh, I rows, I f, I threads),
     swiglu<T>((T *)gu, ldgu, (T *)h, ldh, rows, f, int(threads)))
BOTH(swiglu_backward, (P dh, I lddh, P gu, I ldgu, P dgu, I lddgu, P h, I ldh, I rows, I f, I threads),
     swiglu_backward<T>((T *)dh, lddh, (T *)gu, ldgu, (T *)dgu, lddgu, (T *)h, ldh, rows, f, int(threads)))
BOTH(column_sums, (P x, I ldx, P to, I rows, I n, I threads),
     column_sums<T>((T *)x, ldx, (float *)to, rows, n, int(threads)))

#if HAS_TILES
extern "C" int pack_tiles(P to, P src, I ld, I columns, I k, I across, I threads) {
  pack((bf16 *)to, (bf16 *)src, ld, columns, k, across != 0, int(threads));
  return 0;
}
extern "C" int linear_tiles(P updated, P weights, P x, P u, I rows, I turned, P y, I epilogue, P other, P h, I threads) {
  return !product({(Updated *)updated, (bf16 **)weights}, turned != 0, rows, (bf16 *)x, (bf16 *)u, (bf16 *)y, int(epilogue),
                  (bf16 *)other, (bf16 *)h, int(threads));
}
extern "C" int weight_gradient_tiles(P updated, I first, I spread, I n, P x, P dy, I rows, P g, P turned, P along, I threads) {
  const Updated &p = *(Updated *)updated;
  outer({grid((bf16 *)dy, p.n, p.blocks_out), grid((bf16 *)x, p.k, p.blocks_in), (float *)g, rows, n, p.k, (bf16 *)turned,
         (bf16 *)along, first, spread}, int(threads));
  return 0;
}
extern "C" int update_gradients_tiles(P updated, P x, P u, P dy, P du, I rows, P to, I threads) {
  return !gradients({(Updated *)updated, nullptr}, rows, (bf16 *)x, (bf16 *)u, (bf16 *)dy, (bf16 *)du, (float *)to, int(threads));
}
extern "C" int before_gain_tiles(P updated, P dy, P y, P dz, I rows, P sums, I threads) {
  return !before_gain({(Updated *)updated, nullptr}, rows, (bf16 *)dy, (bf16 *)y, (bf16 *)dz, (float *)sums, int(threads));
}
extern "C" int layer_forward_tiles(P pack, P weights, P x, P out, P room, P small, P own, I threads) {
  const Pack &p = *(Pack *)pack;
  const LayerWeights &w = *(LayerWeights *)weights;
  return !layer_forward(p, w, (bf16 *)x, (bf16 *)out, Kept((bf16 *)room, (float *)small, p, w), (bf16 *)own, int(threads));
}
extern "C" int layer_backward_tiles(P pack, P weights, P x, P room, P small, P dx, P to, P own, P scratch, P found, I threads) {
  const Pack &p = *(Pack *)pack;
  const LayerWeights &w = *(LayerWeights *)weights;
  return !layer_backward(p, w, (bf16 *)x, Kept((bf16 *)room, (float *)small, p, w), (bf16 *)dx, (bf16 *)to, (bf16 *)own,
                         (bf16 *)scratch, (float *)found, int(threads));
}
extern "C" int attention_tiles(P q, P k, P v, I ld, P starts, I segments, I heads, I kv, I hd, double scale, I window,
                                P out, I ldo, P lse, I rows, P holes, I threads) {
  Attention a{(bf16 *)q, (bf16 *)k, (bf16 *)v, ld, (int64_t *)starts, segments, heads, kv, hd, float(scale), window,
              (bf16 *)out, ldo, (float *)lse, rows, (int64_t *)holes};
  return !attend(a, int(threads));
}
extern "C" int attention_backward_tiles(P q, P k, P v, I ld, P starts, I segments, I heads, I kv, I hd, double scale,
                                         I window, P out, I ldo, P lse, I rows, P holes, P dout, I lddo, P dq, P dk, P dv, I ldd,
                                         I threads) {
  Attention a{(bf16 *)q, (bf16 *)k, (bf16 *)v, ld, (int64_t *)starts, segments, heads, kv, hd, float(scale), window,
              (bf16 *)out, ldo, (float *)lse, rows, (int64_t *)holes};
  AttentionGrad b{(bf16 *)dout, lddo, (bf16 *)dq, (bf16 *)dk, (bf16 *)dv, ldd};
  return !attend_backward(a, b, int(threads));
}
extern "C" int vocabulary_tiles(P h, I rows, I d, P head, I ld, I size, P targets, double scale, P logp, P correct,
                                 P entropy, P mean, P lse, P grad, I threads) {
  Vocabulary a{(bf16 *)h, rows, d, {(bf16 **)head, ld}, size, (int64_t *)targets, float(scale), (float *)logp,
               (float *)correct, (float *)entropy, (float *)mean, (float *)lse, (bf16 *)grad};
  return !vocabulary(a, int(threads));
}
extern "C" int vocabulary_backward_tiles(P h, I rows, I d, P head, I ld, I size, P targets, double scale, P lse, P factor,
                                          P h_along, P dh, P dw, I threads) {
  Vocabulary a{(bf16 *)h, rows, d, {(bf16 **)head, ld}, size, (int64_t *)targets, float(scale), nullptr, nullptr, nullptr,
               nullptr, (float *)lse, nullptr};
  return !vocabulary_backward(a, {(float *)factor, (bf16 *)h_along, (float *)dh, (float *)dw}, int(threads));
}
#endif
