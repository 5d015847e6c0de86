/* lora.c - LoRA embedded in a C program that has nothing but pylora.h, held against the vectors:
 * loads an adapter file, runs forward, one training step, merge and unmerge.
 *
 *   pylora vectors --out DIR && make -C examples/ports c VECTORS=DIR
 */
#include "vectors.h"

/* One tensor [rows, cols] of a safetensors file: its size is checked against the file (K-7). */
static float *tensor(const char *data, size_t size, const char *key, int64_t rows, int64_t cols) {
  uint64_t header;
  memcpy(&header, data, 8);
  char quoted[256], *end;
  snprintf(quoted, sizeof quoted, "\"base_model.model.%s.weight\":{\"dtype\":\"F32\"", key);
  const char *at = after(after(data + 8, quoted), "\"data_offsets\":[");
  const uint64_t from = strtoull(at, &end, 10), to = strtoull(end + 1, NULL, 10);
  if (header > size - 8 || from > to || to > size - 8 - header ||
      to - from != (uint64_t)(rows * cols) * sizeof(float))
    stop(key, "does not have the shape that the settings say");
  float *copy = malloc(to - from);
  memcpy(copy, data + 8 + header + from, to - from);
  return copy;
}

static void forward_backward(const char *name, const pylora_lora *l, array bias, pylora_mat *dA,
                             pylora_mat *dB) {
  const pylora_mat x = mat(input(name, "x")), W = mat(input(name, "W"));
  const pylora_mat dy = mat(input(name, "dy")), y = zeros(x.rows, W.rows), h = zeros(x.rows, l->r);
  const pylora_mat dx = zeros(x.rows, x.cols);
  const pylora_packed P = pack(W);
  if (pylora_lora_workspace(x.rows, W.rows, W.cols, l->r) > sizeof workspace) abort();
  must(pylora_lora_forward(&x, &P, bias.p, l, NULL, &y, &h, workspace, sizeof workspace));
  *dA = zeros(l->r, x.cols), *dB = zeros(W.rows, l->r);
  must(pylora_lora_backward(&dy, &x, &h, &P, l, &dx, 0, dA, dB, workspace, sizeof workspace));
  check(name, "h", h.p), check(name, "y", y.p), check(name, "dx", dx.p);
  check(name, "dA", dA->p), check(name, "dB", dB->p);
}

static void merge(const char *name, int dtype, const pylora_lora *l, int residue) {
  const array W = input(name, "W");
  void *merged = malloc(W.bytes), *back = malloc(W.bytes);
  int64_t *lossy = calloc((size_t)W.rows, sizeof *lossy), n = 0;
  must(pylora_merge(dtype, W.rows, W.cols, W.p, W.cols, l, merged, W.cols, lossy));
  for (int64_t i = 0; i < W.rows; i++) n += lossy[i];
  int64_t *position = calloc((size_t)n + 1, sizeof *position);
  uint32_t *bits = calloc((size_t)n + 1, sizeof *bits);
  must(pylora_merge_residue(dtype, W.rows, W.cols, W.p, W.cols, merged, W.cols, l, lossy, position,
                            bits));
  must(pylora_unmerge(dtype, W.rows, W.cols, merged, W.cols, l, n, position, bits, back, W.cols));
  check(name, "merged", merged);
  if (residue) check(name, "position", position), check(name, "bits", bits);
  if (memcmp(back, W.p, W.bytes)) stop(name, "unmerging is not exact");
}

/* An adapter file in use: load, forward, merge, unmerge, one training step. */
static void embed(void) {
  const char *settings = read_file("embed/adapter/adapter_config.json", NULL);
  size_t size;
  const char *data = read_file("embed/adapter/adapter_model.safetensors", &size);
  const array x = input("embed", "x"), W = input("embed", "W"), none = {0};
  const int64_t r = strtoll(after(settings, "\"r\": "), NULL, 10);
  const double alpha = strtod(after(settings, "\"lora_alpha\": "), NULL);
  const int rslora = !strncmp(after(settings, "\"use_rslora\": "), "true", 4);
  const char *path = "model.layers.0.self_attn.q_proj";
  char key_A[128], key_B[128];
  snprintf(key_A, sizeof key_A, "%s.lora_A", path),
      snprintf(key_B, sizeof key_B, "%s.lora_B", path);
  if (!data || size < 8) stop("adapter_model.safetensors", "is missing or cut off");
  float *A = tensor(data, size, key_A, r, x.cols), *B = tensor(data, size, key_B, W.rows, r);
  const double s = rslora ? alpha / sqrt((double)r) : alpha / (double)r; /* S-1 */
  const pylora_lora lora = {r, A, x.cols, B, r, (float)s, NULL};
  pylora_mat dA, dB, m, v;
  forward_backward("embed", &lora, none, &dA, &dB);
  merge("embed", PYLORA_F32, &lora, 0);
  const pylora_adamw o = {number("embed", "lr"), 0.9, 0.999, 1e-8, 0, 1, 1};
  m = zeros(r, x.cols), v = zeros(r, x.cols);
  must(pylora_adamw_step(r * x.cols, A, dA.p, m.p, v.p, &o));
  m = zeros(W.rows, r), v = zeros(W.rows, r);
  must(pylora_adamw_step(W.rows * r, B, dB.p, m.p, v.p, &o));
  check("embed", "new_A", A), check("embed", "new_B", B);
}

/* The dropout of a case, if it has one. */
static const pylora_drop *drop_of(const char *name, pylora_drop *d) {
  if (!strstr(name, "dropout")) return NULL;
  const uint64_t seed = word64(name, "seed"), stream = word64(name, "stream");
  *d = (pylora_drop){(float)number(name, "p"), seed, stream, (int64_t)number(name, "row0")};
  return d;
}

static void lora_case(const char *name) {
  const array A = input(name, "A"), B = input(name, "B");
  const double alpha = number(name, "alpha"), r = (double)A.rows;
  const int rslora = !strncmp(after(entry(name), "\"use_rslora\": "), "true", 4);
  pylora_drop d;
  pylora_lora lora = {A.rows, A.p, A.cols, B.p, B.cols, 0, drop_of(name, &d)};
  lora.s = (float)(alpha / (rslora ? sqrt(r) : r)); /* S-1 */
  pylora_mat dA, dB;
  forward_backward(name, &lora, input(name, "bias"), &dA, &dB);
}

static void merge_case(const char *name, int dtype) {
  const array A = input(name, "A"), B = input(name, "B");
  const float s = (float)number(name, "scale");
  const pylora_lora lora = {A.rows, A.p, A.cols, B.p, B.cols, s, NULL};
  merge(name, dtype, &lora, 1);
}

static void random_cases(void) {
  static const char *const names[] = {"philox-0", "philox-1", "philox-2"};
  uint32_t words[11];
  for (int i = 0; i < 3; i++) {
    const uint64_t seed = word64(names[i], "seed"), stream = word64(names[i], "stream");
    must(pylora_philox(seed, stream, (int64_t)word64(names[i], "first"), 11, words));
    check(names[i], "words", words);
  }
  pylora_drop d;
  const pylora_mat x = mat(input("dropout", "x")), y = zeros(x.rows, x.cols);
  must(pylora_dropout(&x, drop_of("dropout", &d), &y));
  check("dropout", "y", y.p);
}

static void adamw_case(void) {
  const char *c = "adamw";
  const array p = input(c, "param"), g = input(c, "grad"), m = input(c, "m"), v = input(c, "v");
  const pylora_adamw o = {number(c, "lr"),           number(c, "beta1"),
                          number(c, "beta2"),        number(c, "eps"),
                          number(c, "weight_decay"), number(c, "grad_scale"),
                          (int64_t)number(c, "step")};
  must(pylora_adamw_step(p.cols, p.p, g.p, m.p, v.p, &o));
  check(c, "new_param", p.p), check(c, "new_m", m.p), check(c, "new_v", v.p);
}

int main(int argc, char **argv) {
  open_vectors(argc, argv);
  embed();
  static const char *const names[] = {
      "plain",     "bias",      "rslora", "negative", "rank-above-sizes",
      "one-token", "no-tokens", "fresh",  "dropout"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    char name[64];
    snprintf(name, sizeof name, "lora-%s", names[i]);
    lora_case(name);
  }
  merge_case("merge-f32", PYLORA_F32);
  merge_case("merge-f16", PYLORA_F16);
  merge_case("merge-bf16", PYLORA_BF16);
  random_cases();
  adamw_case();
  return report();
}
