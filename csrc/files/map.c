/* map.c - a file's bytes, mapped read-only: nothing is read before it is looked at. */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* madvise */
#endif
#include "files/files.h"

#include <errno.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

char *pylora_path(const char *directory, const char *name) {
  const size_t a = strlen(directory), b = strlen(name);
  char *path = malloc(a + b + 2);
  if (!path) return NULL;
  memcpy(path, directory, a);
  path[a] = '/';
  memcpy(path + a + 1, name, b + 1);
  return path;
}

#ifdef _WIN32

/* UTF-8, as everywhere else. */
static wchar_t *wide(const char *path) {
  const int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, NULL, 0);
  wchar_t *out = n > 0 ? malloc((size_t)n * sizeof *out) : NULL;
  if (out) MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, out, n);
  return out;
}

static DWORD attributes(const char *path) {
  wchar_t *w = wide(path);
  const DWORD found = w ? GetFileAttributesW(w) : INVALID_FILE_ATTRIBUTES;
  free(w);
  return found;
}

int pylora_is_directory(const char *path) {
  const DWORD a = attributes(path);
  return a != INVALID_FILE_ATTRIBUTES && (a & FILE_ATTRIBUTE_DIRECTORY) != 0;
}

int pylora_is_file(const char *path) {
  const DWORD a = attributes(path);
  return a != INVALID_FILE_ATTRIBUTES && (a & FILE_ATTRIBUTE_DIRECTORY) == 0;
}

int pylora_map_open(const char *path, pylora_map *out, pylora_message *why) {
  *out = (pylora_map){NULL, 0, NULL};
  if (!pylora_is_file(path))
    return pylora_fail(why, PYLORA_E_FILE, "%.400s: there is no such file", path);
  wchar_t *w = wide(path);
  HANDLE file = w ? CreateFileW(w, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING,
                                FILE_ATTRIBUTE_NORMAL, NULL)
                  : INVALID_HANDLE_VALUE;
  free(w);
  LARGE_INTEGER size = {0};
  if (file == INVALID_HANDLE_VALUE || !GetFileSizeEx(file, &size)) {
    if (file != INVALID_HANDLE_VALUE) CloseHandle(file);
    return pylora_fail(why, PYLORA_E_FILE, "%.400s: cannot be opened (Windows error %lu)", path,
                       (unsigned long)GetLastError());
  }
  if (size.QuadPart == 0 || (uint64_t)size.QuadPart > SIZE_MAX / 2) {
    CloseHandle(file);
    return pylora_fail(why, PYLORA_E_FILE, "%.400s: the file is %s", path,
                       size.QuadPart ? "larger than this program can map" : "empty");
  }
  HANDLE mapping = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
  CloseHandle(file);
  void *p = mapping ? MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0) : NULL;
  if (mapping) CloseHandle(mapping); /* the view keeps it */
  if (!p)
    return pylora_fail(why, PYLORA_E_FILE, "%.400s: cannot be mapped (Windows error %lu)", path,
                       (unsigned long)GetLastError());
  *out = (pylora_map){p, (size_t)size.QuadPart, p};
  return PYLORA_OK;
}

void pylora_map_close(pylora_map *map) {
  if (map->handle) UnmapViewOfFile(map->handle);
  *map = (pylora_map){NULL, 0, NULL};
}

void pylora_map_forget(const pylora_map *map, const void *p, size_t bytes) {
  (void)map, (void)p, (void)bytes;
}

#else

int pylora_is_directory(const char *path) {
  struct stat s;
  return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

int pylora_is_file(const char *path) {
  struct stat s;
  return stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

int pylora_map_open(const char *path, pylora_map *out, pylora_message *why) {
  *out = (pylora_map){NULL, 0, NULL};
  /* not to wait for a pipe's writer: what is no plain file is refused below */
  const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat s;
  if (file < 0 || fstat(file, &s) != 0) {
    const int error = errno;
    if (file >= 0) close(file);
    return error == ENOENT ? pylora_fail(why, PYLORA_E_FILE, "%.400s: there is no such file", path)
                           : pylora_fail(why, PYLORA_E_FILE, "%.400s: cannot be opened (%s)", path,
                                         strerror(error));
  }
  if (!S_ISREG(s.st_mode) || s.st_size == 0 || (uint64_t)s.st_size > SIZE_MAX / 2) {
    close(file);
    return pylora_fail(why, PYLORA_E_FILE, "%.400s: %s", path,
                       !S_ISREG(s.st_mode) ? "this is not a plain file"
                       : s.st_size         ? "the file is larger than this program can map"
                                           : "the file is empty");
  }
  void *p = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  const int error = errno;
  close(file);
  if (p == MAP_FAILED)
    return pylora_fail(why, PYLORA_E_FILE, "%.400s: cannot be mapped (%s)", path, strerror(error));
  *out = (pylora_map){p, (size_t)s.st_size, p};
  return PYLORA_OK;
}

void pylora_map_close(pylora_map *map) {
  if (map->handle) munmap(map->handle, map->size);
  *map = (pylora_map){NULL, 0, NULL};
}

void pylora_map_forget(const pylora_map *map, const void *p, size_t bytes) {
#if defined(MADV_DONTNEED)
  const long page = sysconf(_SC_PAGESIZE);
  if (!map || !map->handle || page <= 0) return;
  const size_t size = (size_t)page, at = (size_t)((const uint8_t *)p - map->bytes),
               begin = (at + size - 1) / size * size, end = (at + bytes) / size * size;
  if (end > begin) (void)madvise((char *)map->handle + begin, end - begin, MADV_DONTNEED);
#else
  (void)map, (void)p, (void)bytes;
#endif
}

#endif
