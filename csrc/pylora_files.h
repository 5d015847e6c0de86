/* pylora_files.h - GGUF and safetensors files in C: open one, find a tensor, decode it or pack it.
 *
 * A file may come from a stranger: every count, length and offset is checked against the file's size before
 * anything is allocated or read, and a file that is damaged, cut off or not understood is refused with a status
 * and a sentence.  What is allocated here is in proportion to the file's header; tensors stay where they are, in
 * the mapped file, until they are asked for.  Files are little-endian, and so are the machines that this runs on.
 *
 * pylora_model.h, above this, makes a model and an adapter of such files.
 */
#ifndef PYLORA_FILES_H
#define PYLORA_FILES_H

#include "pylora.h"

#if defined(PYLORA_SHARED) && defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

/* A sentence of the caller's, for a person: what was wrong, in which file and tensor, what was expected.  UTF-8
 * without control characters, whatever the file holds; empty after a success.  Where a function takes one it may
 * be NULL; the status says the kind all the same. */
#define PYLORA_MESSAGE_BYTES 768
typedef struct pylora_message {
  char text[PYLORA_MESSAGE_BYTES];
} pylora_message;

#define PYLORA_MAX_DIMS 16
/* A tensor's place in an open file.  It lives as long as the file is open. */
typedef struct pylora_tensor {
  const char *name;
  const char *type; /* "F32", "BF16", "Q4_1", "I64", ... as the file's format spells it */
  int32_t kind;     /* the reader's own number for it */
  int32_t dims;
  int64_t shape[PYLORA_MAX_DIMS]; /* the slowest axis first, as in NumPy and PyTorch */
  const void *data;               /* of any alignment */
  int64_t bytes;
} pylora_tensor;

typedef struct pylora_file pylora_file;

/* Opens a GGUF (version 2 or 3) or safetensors file, told apart by its first bytes, and checks its header.  The
 * file is mapped, so it must not be changed while it is open.
 * PYLORA_E_FILE: missing, cut off, damaged; PYLORA_E_UNSUPPORTED: a version or type that is not read;
 * PYLORA_E_MEMORY. */
int pylora_file_open(const char *path, pylora_file **out, pylora_message *why);
/* The same of `size` bytes in memory, which must outlive the file; `name` stands for it in sentences. */
int pylora_file_open_memory(const char *name, const void *bytes, size_t size, pylora_file **out,
                            pylora_message *why);
void pylora_file_close(pylora_file *file); /* NULL: nothing */

/* Its tensors, in the order of the file; NULL past the end, or where there is none of that name. */
int64_t pylora_file_tensors(const pylora_file *file);
const pylora_tensor *pylora_file_tensor(const pylora_file *file, int64_t index);
const pylora_tensor *pylora_file_find(const pylora_file *file, const char *name);

/* Metadata by key.  1: found; 0: there is none, or it is of another type.  A text is not terminated by a zero.
 * A whole number is one of any of GGUF's integer types that int64_t holds; a real is any number. */
int pylora_file_text(const pylora_file *file, const char *key, const char **text, size_t *bytes);
int pylora_file_whole(const pylora_file *file, const char *key, int64_t *value);
int pylora_file_real(const pylora_file *file, const char *key, double *value);

/* Rows first .. first + rows - 1 of a tensor as float32 [rows, columns], its last axis being the columns and the
 * others together the rows: exact for F32, F16 and BF16, else what gguf-py decodes, bit for bit.
 * PYLORA_E_UNSUPPORTED for integers, F64 and formats that nobody decodes. */
int pylora_tensor_read(const pylora_tensor *tensor, int64_t first, int64_t rows, float *out,
                       pylora_message *why);

/* How pylora_tensor_pack stores a matrix that a model of this precision has: in PYLORA_Q8_0 and PYLORA_Q4_1 blocks of
 * a pylora_dtype stay what they are, others become Q8_0, which loses least of them, and numbers what it says. */
int pylora_tensor_dtype(const pylora_tensor *tensor, int precision);
/* A matrix [d,k] packed as `dtype` into `buffer`, of pylora_pack_bytes(dtype, d, k), 64-byte aligned.  `heads` > 0:
 * its rows are in llama.cpp's order for the interleaved rotation, in so many heads, and are put into Hugging Face's
 * order; 0: they stay.  Decoded and packed 32 rows at a time, on all threads. */
int pylora_tensor_pack(const pylora_tensor *tensor, int dtype, int64_t heads, void *buffer,
                       pylora_packed *out, pylora_message *why);

#ifdef __cplusplus
}
#endif
#if defined(PYLORA_SHARED) && defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
