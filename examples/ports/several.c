/* several.c - more than one adapter on a layer, all at once or one for each row: the statements X of
 * docs/spec.md. A row is a batch of its own here, which is slow and cannot be wrong. */
#include "port.h"

static pylora_mat row(pylora_mat a, int64_t i) {
  return (pylora_mat){a.p + i * a.ld, 1, a.cols, a.ld, NULL, NULL};
}

static void add(pylora_mat to, pylora_mat a) {
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < a.cols; j++) to.p[i * to.ld + j] += a.p[i * a.ld + j];
}

layer_out several(pylora_mat x, pylora_mat W, int n, const pylora_lora *loras, const int64_t *rows,
                  pylora_mat dy) {
  layer_out out = {.y = zeros(dy.rows, dy.cols), .dx = zeros(x.rows, x.cols)};
  const pylora_packed base = pack(W), none = pack(zeros(W.rows, W.cols));
  for (int a = 0; a < n; a++)
    out.dA[a] = zeros(loras[a].r, x.cols), out.dB[a] = zeros(dy.cols, loras[a].r);
  for (int64_t i = 0; i < x.rows; i++) {
    const pylora_mat xi = row(x, i), dyi = row(dy, i), dx = row(out.dx, i);
    add(row(out.y, i), lora_forward(xi, &base, NULL, NULL, NULL, NULL));
    lora_backward(dyi, NULL, NULL, &base, NULL, &dx, NULL, NULL);
    for (int a = 0; a < n; a++) {
      if (rows && rows[i] != a) continue;
      pylora_mat h;
      const pylora_mat dA = zeros(loras[a].r, x.cols), dB = zeros(dy.cols, loras[a].r);
      add(row(out.y, i), lora_forward(xi, &none, NULL, &loras[a], NULL, &h));
      lora_backward(dyi, &xi, &h, &none, &loras[a], &dx, &dA, &dB);
      add(out.dA[a], dA), add(out.dB[a], dB);
    }
  }
  return out;
}
