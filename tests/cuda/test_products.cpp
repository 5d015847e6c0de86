/* The large products: both of them beside sums in double, in every type, into rows with gaps, on top of what is there;
 * more shapes than are remembered; and a cuBLASLt that is not there. */
#include "check_cuda.h"
#include "products.h"

/* Rows top down, as products take them. */
struct Rows {
  int dtype;
  int64_t rows, cols, ld;
  std::vector<char> memory;
  Rows(int type, int64_t m, int64_t n) : dtype(type), rows(m), cols(n), ld(n + pick({0, 3, 8})) {
    const size_t size = type == PYLORA_F32 ? 4 : 2;
    memory.resize((size_t)(m ? (m - 1) * ld + n : 0) * size);
    for (int64_t i = 0; i < (int64_t)(memory.size() / size); i++) put_value(type, at(), i, NAN);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) put_value(type, at(), i * ld + j, uniform());
  }
  void *at() { return memory.data(); }
  float get(int64_t i, int64_t j) { return value_of_bits(dtype, at(), i * ld + j); }
};

static void product_once(void) {
  const int dtype = any_type();
  const bool rows_of_W = below(2), add = below(2);
  const int64_t m = pick({1, 2, 17, 64}), n = pick({1, 5, 32}), terms = pick({1, 7, 64, 200});
  context = "product, type " + std::to_string(dtype) + (rows_of_W ? ", dy W" : ", x W'");
  Rows a(dtype, m, terms), W(dtype, rows_of_W ? terms : n, rows_of_W ? n : terms),
      out(PYLORA_F32, m, n);
  Rows before = out;
  std::vector<char> ws(products_workspace(device_0()) + 256);
  void *aligned = (void *)(((uintptr_t)ws.data() + 255) & ~(uintptr_t)255);
  const Product p = {dtype, rows_of_W,         add,   m, n, terms, a.at(), W.at(), a.ld,
                     W.ld,  (float *)out.at(), out.ld};
  OK(product(device_0(), NULL, p, aligned, products_workspace(device_0())));
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < out.ld && i * out.ld + j < (m - 1) * out.ld + n; j++) {
      if (j >= n) {
        EXPECT(isnan(out.get(i, j)), "a gap was written");
        continue;
      }
      double sum = add ? before.get(i, j) : 0, size = fabs(sum);
      for (int64_t t = 0; t < terms; t++) {
        const double e = (double)a.get(i, t) * (rows_of_W ? W.get(t, j) : W.get(j, t));
        sum += e, size += fabs(e);
      }
      EXPECT(fabs(out.get(i, j) - sum) <= ((double)terms + 2) * 0x1p-24 * size,
             "[%d,%d] is %g, not %g", (int)i, (int)j, (double)out.get(i, j), sum);
    }
}

static void many_shapes(void) {
  context = "many shapes";
  std::vector<char> ws(products_workspace(device_0()));
  const float a = 3, W = 4;
  for (int64_t ld = 1; ld < 5000; ld++) { /* of one row: any distance does */
    float out = 0;
    const Product p = {PYLORA_F32, false, false, 1, 1, 1, &a, &W, ld, 1, &out, 1};
    OK(product(device_0(), NULL, p, ws.data(), ws.size()));
    EXPECT(out == 12, "%g", (double)out);
  }
}

static void errors(void) {
  context = "errors";
  pylora_cuda *g = NULL;
  EXPECT_STATUS(PYLORA_E_DEVICE, pylora_cuda_open(0, "/nowhere/libcublasLt.so", &g));
  EXPECT(g == NULL && strstr(pylora_cuda_error(), "cuBLASLt"), "%s", pylora_cuda_error());
  EXPECT_STATUS(PYLORA_E_DEVICE, pylora_cuda_open(0, BUILD_DIR "/libcudart_emulated.so", &g));
  EXPECT(g == NULL && strstr(pylora_cuda_error(), "cublasLtCreate"), "%s", pylora_cuda_error());
  std::vector<char> ws(products_workspace(device_0()));
  float x = 1, out = 0;
  Product p = {PYLORA_F32, false, false, 1, 1, 1, &x, &x, 1, 1, &out, 1};
  EXPECT_STATUS(PYLORA_E_WORKSPACE, product(device_0(), NULL, p, ws.data(), ws.size() - 1));
  p.terms = (int64_t)INT32_MAX + 1;
  EXPECT_STATUS(PYLORA_E_SHAPE, product(device_0(), NULL, p, ws.data(), ws.size()));
  p.m = 0;
  OK(product(device_0(), NULL, p, ws.data(), ws.size()));
}

int main(void) {
  for (int i = 0; i < 80; i++) product_once();
  many_shapes();
  errors();
  return finish("test_products");
}
