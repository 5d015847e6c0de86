/* weights.c - the files that hold a model's tensors: which they are, and what they call a tensor. */
#include <stdio.h>

#include "files/json.h"
#include "files/model.h"

enum { MAX_INDEX = 64 << 20 }; /* bytes of model.safetensors.index.json */

/* ---- tensors ---- */

const pylora_tensor *pylora_files_find(const pylora_files *files, const char *name) {
  for (int64_t i = 0; i < files->files; i++) {
    const pylora_tensor *t = pylora_file_find(files->file[i], name);
    if (t) return t;
  }
  return NULL;
}

const pylora_tensor *pylora_model_tensor(const pylora_model *m, pylora_role role, int64_t layer,
                                         int64_t expert, const char *ending) {
  char name[PYLORA_NAME];
  const pylora_files *files = &m->files;
  if (!pylora_tensor_name(m->s.family, files->gguf, role, layer, expert, ending, name)) return NULL;
  const size_t skip = role == ROLE_HEAD ? 0 : files->bare;
  const pylora_tensor *t = pylora_files_find(files, name + skip);
  /* what older transformers call GPT-NeoX's head */
  return t || files->gguf || role != ROLE_HEAD ? t : pylora_files_find(files, "embed_out.weight");
}

/* Hugging Face's files of the base model alone leave out what the whole one is called. */
static size_t bare(const pylora_files *files, pylora_family family) {
  const char *path = pylora_layers_path(family);
  const size_t n = (size_t)(strchr(path, '.') - path) + 1;
  for (int64_t f = 0; f < files->files; f++)
    for (int64_t i = 0; i < files->file[f]->tensors; i++)
      if (strncmp(files->file[f]->tensor[i].name, path, n) == 0) return 0;
  return n;
}

/* ---- files ---- */

void pylora_files_close(pylora_files *files) {
  for (int64_t i = 0; i < files->files; i++) pylora_file_close(files->file[i]);
  free(files->file);
  *files = (pylora_files){NULL, 0, 0, 0};
}

static int add(pylora_files *files, const char *path, pylora_message *why) {
  pylora_file **more = realloc(files->file, (size_t)(files->files + 1) * sizeof *more);
  if (!more) return pylora_no_memory(why, path, sizeof *more);
  files->file = more;
  TRY(pylora_file_open(path, &more[files->files], why));
  files->files++;
  return PYLORA_OK;
}

/* The name of a shard: a safetensors file beside the index, not a path out of the directory. */
static int plain(const char *name) {
  const size_t n = strlen(name);
  return n > 12 && strcmp(name + n - 12, ".safetensors") == 0 && !strpbrk(name, "/\\:") &&
         name[0] != '.';
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Each name in the index is in its shard, and no shard has a tensor that the index does not put there. */
static int check_index(const pylora_files *files, const pylora_json *j,
                       const pylora_json_value *map, char **shard, const char *index,
                       pylora_message *why) {
  int64_t listed = 0, there = 0;
  JSON_EACH(item, j, map) {
    const pylora_file *file = NULL;
    for (int64_t i = 0; i < files->files && !file; i++)
      if (strcmp(shard[i], item->u.text) == 0) file = files->file[i];
    if (!pylora_file_find(file, item->key))
      return pylora_fail(why, PYLORA_E_FILE, "%.300s: tensor '%.200s' is not in %.100s, as it says",
                         index, item->key, item->u.text);
    listed++;
  }
  for (int64_t i = 0; i < files->files; i++) {
    there += files->file[i]->tensors;
    for (int64_t k = 0; k < files->file[i]->tensors; k++) {
      const pylora_json_value *in = pylora_json_member(j, map, files->file[i]->tensor[k].name);
      if (!in || strcmp(in->u.text, shard[i]) != 0)
        return pylora_fail(why, PYLORA_E_FILE, "%.300s: tensor '%.200s' is not listed for it in %s",
                           files->file[i]->name, files->file[i]->tensor[k].name,
                           "model.safetensors.index.json");
    }
  }
  return listed == there
             ? PYLORA_OK
             : pylora_fail(why, PYLORA_E_FILE, "%.300s: tensors are listed twice", index);
}

static int open_shards(const char *directory, const char *index, pylora_files *files,
                       pylora_message *why) {
  pylora_json j;
  int status = pylora_json_file(index, MAX_INDEX, &j, why);
  const pylora_json_value *map = status ? NULL : pylora_json_member(&j, j.value, "weight_map");
  if (!status && (!json_is(map, JSON_OBJECT) || !map->items))
    status =
        pylora_fail(why, PYLORA_E_FILE, "%.300s: weight_map is missing, empty or no object", index);
  char **shard = status ? NULL : pylora_take((size_t)map->items, sizeof *shard);
  size_t n = 0, unique = 0;
  if (!status && !shard) status = pylora_no_memory(why, index, (double)map->items * sizeof *shard);
  if (!status) JSON_EACH(item, &j, map) {
      if (!status && (item->type != JSON_TEXT || !plain(item->u.text)))
        status = pylora_fail(why, PYLORA_E_FILE,
                             "%.300s: tensor '%.200s' is not in a safetensors file of the same "
                             "directory",
                             index, item->key);
      if (!status) shard[n++] = (char *)(uintptr_t)item->u.text;
    }
  if (!status) {
    qsort(shard, n, sizeof *shard, by_text);
    for (size_t i = 0; i < n; i++)
      if (i == 0 || strcmp(shard[i], shard[unique - 1]) != 0) shard[unique++] = shard[i];
  }
  for (size_t i = 0; i < unique && !status; i++) {
    char *path = pylora_path(directory, shard[i]);
    status = path ? add(files, path, why) : pylora_no_memory(why, index, 0);
    free(path);
  }
  if (!status) status = check_index(files, &j, map, shard, index, why);
  free(shard);
  pylora_json_free(&j);
  return status;
}

static int open_directory(const char *directory, pylora_files *files, pylora_settings *s,
                          pylora_message *why) {
  char *config = pylora_path(directory, "config.json"),
       *one = pylora_path(directory, "model.safetensors"),
       *index = pylora_path(directory, "model.safetensors.index.json");
  int status = config && one && index ? PYLORA_OK : pylora_no_memory(why, directory, 0);
  if (!status) status = pylora_settings_hf(config, s, why);
  if (!status) {
    if (pylora_is_file(one) && pylora_is_file(index))
      status = pylora_fail(why, PYLORA_E_FILE,
                           "%.300s: there are both model.safetensors and its index of shards; "
                           "remove the one that is not meant",
                           directory);
    else if (pylora_is_file(index))
      status = open_shards(directory, index, files, why);
    else
      status = add(files, one, why);
  }
  for (int64_t i = 0; i < files->files && !status; i++)
    if (files->file[i]->gguf)
      status = pylora_fail(why, PYLORA_E_FILE, "%.300s: this is a GGUF file, not safetensors",
                           files->file[i]->name);
  free(config);
  free(one);
  free(index);
  return status;
}

/* ---- GGUF ---- */

/* A model in several files, NAME-00001-of-00003.gguf and so on, any of which may be named: the others are opened, too,
 * and each must be what its name says. */
static int open_parts(const char *path, int64_t count, pylora_files *files, pylora_message *why) {
  const size_t n = strlen(path), tail = sizeof "-00001-of-00003.gguf" - 1;
  char end[40];
  snprintf(end, sizeof end, "-of-%05lld.gguf", (long long)count);
  if (count > 10000 || n <= tail || strcmp(path + n - strlen(end), end) != 0 ||
      path[n - tail] != '-')
    return pylora_fail(
        why, PYLORA_E_FILE,
        "%.300s: this is one of %lld parts of a split model, so its name must end in "
        "-NNNNN%s for the others to be found; give it its name back",
        path, (long long)count, count > 10000 ? "" : end);
  char *part = malloc(n + 1);
  if (!part) return pylora_no_memory(why, path, (double)n);
  pylora_files_close(files);
  int64_t tensors = 0, all;
  int status = PYLORA_OK;
  for (int64_t i = 0; i < count && !status; i++) {
    memcpy(part, path, n + 1);
    char number[24];
    snprintf(number, sizeof number, "%05lld", (long long)i + 1);
    memcpy(part + n - tail + 1, number, 5);
    status = add(files, part, why);
    int64_t no = -1, said = -1;
    const pylora_file *file = status ? NULL : files->file[i];
    if (file) {
      pylora_file_whole(file, "split.no", &no);
      pylora_file_whole(file, "split.count", &said);
      if (!file->gguf || no != i || said != count)
        status = pylora_fail(
            why, PYLORA_E_FILE,
            "%.300s: its metadata say that it is part %lld of %lld, counted from 0, but "
            "its name says %lld of %lld",
            part, (long long)no, (long long)said, (long long)i, (long long)count);
    }
    for (int64_t k = 0; file && k < file->tensors && !status; k++, tensors++)
      if (pylora_files_find(files, file->tensor[k].name) != &file->tensor[k])
        status =
            pylora_fail(why, PYLORA_E_FILE, "%.300s: the tensor '%.200s' is in another part, too",
                        part, file->tensor[k].name);
  }
  free(part);
  if (!status && pylora_file_whole(files->file[0], "split.tensors.count", &all) && all != tensors)
    return pylora_fail(
        why, PYLORA_E_FILE,
        "%.300s: the model was split with %lld tensors, but its parts have %lld; they "
        "belong to different models",
        path, (long long)all, (long long)tensors);
  return status;
}

static int open_file(const char *path, pylora_files *files, pylora_settings *s,
                     pylora_message *why) {
  TRY(add(files, path, why));
  const pylora_file *file = files->file[0];
  if (!file->gguf)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: a safetensors file alone does not say what model it is; give the "
                       "directory that holds its config.json too",
                       path);
  const char *type;
  size_t n;
  int64_t count = 0;
  if (pylora_file_text(file, "general.type", &type, &n) && n == 7 &&
      memcmp(type, "adapter", 7) == 0)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: this is an adapter, not a model; open its base model and then this "
                       "with pylora_adapter_open",
                       path);
  pylora_file_whole(file, "split.count", &count);
  if (count > 1) TRY(open_parts(path, count, files, why));
  files->gguf = 1;
  return pylora_settings_gguf(files, s, why);
}

int pylora_files_open(const char *path, pylora_files *files, pylora_settings *s,
                      pylora_message *why) {
  *files = (pylora_files){NULL, 0, 0, 0};
  if (!pylora_is_directory(path)) return open_file(path, files, s, why);
  TRY(open_directory(path, files, s, why));
  files->bare = bare(files, s->family);
  return PYLORA_OK;
}
