/* check.c - holds the C port against every case of the golden vectors.
 *
 *   pylora vectors --out DIR && make -C examples/ports c VECTORS=DIR
 *
 * `check DIR outputs.json` writes what was computed to that file, for `pylora vectors --check FILE`. */
#include <stdio.h>
#include <string.h>

#include "vectors.h"

static const struct {
  const char *op;
  void (*run)(testcase *c);
} operations[] = {
    {"lora", lora_case},
    {"lora16", lora16_case},
    {"embedding", embedding_case},
    {"rows", rows_case},
    {"dora", dora_case},
    {"stacked", stacked_case},
    {"mixed", mixed_case},
    {"merge", merge_case},
    {"unmerge", unmerge_case},
    {"philox", philox_case},
    {"unit", unit_case},
    {"quantile", quantile_case},
    {"init", init_case},
    {"dropout", dropout_case},
    {"adamw", adamw_case},
    {"update", update_case},
    {"clip", clip_case},
    {"embed", embed_case},
    {"rms_norm", norm_case},
    {"rope", rope_case},
    {"rope_tables", tables_case},
    {"attention", attention_case},
    {"swiglu", swiglu_case},
    {"cross_entropy", loss_case},
    {"micro_batches", micro_batches_case},
    {"block", block_case},
    {"training", training_case},
    {"layer_norm", layer_norm_case},
    {"soft_cap", soft_cap_case},
    {"activation", activation_case},
    {"choose", choose_case},
};

static void run(testcase *c) {
  for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
    if (!strcmp(operations[i].op, c->op)) {
      operations[i].run(c);
      finish_case(c);
      return;
    }
  stop(c->op, "is an operation that this program does not know");
}

int main(int argc, char **argv) {
  testcase c;
  open_vectors(argc > 1 ? argv[1] : "vectors");
  if (argc > 2) write_to(argv[2]);
  while (next_case(&c)) run(&c), release();
  close_vectors();
  return report();
}
