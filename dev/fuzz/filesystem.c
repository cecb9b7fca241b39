/* A file system that lacks a feature: fails one kind of call on the files of a folder.

     cc -shared -fPIC -o filesystem.so dev/fuzz/filesystem.c -ldl
     LD_PRELOAD=./filesystem.so FAILING_CALL=flock FAILING_ERRNO=95 FAILING_FOLDER=$PWD/run ./train_gpt2 ...

   FAILING_CALL is flock, mmap, ftruncate, fsync (of files) or fsyncdir (of folders); FAILING_AFTER=N lets N
   calls succeed first. dev/test/test_systems.py fails each with each errno that means that the file system
   cannot do it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int fails(const char *call, int file) {
    const char *failing = getenv("FAILING_CALL"), *folder = getenv("FAILING_FOLDER");
    const char *error = getenv("FAILING_ERRNO"), *after = getenv("FAILING_AFTER");
    static int calls;
    char link[64], path[4096] = "";
    if (!failing || !folder || !error || strcmp(failing, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) < 0 || strncmp(path, folder, strlen(folder))) return 0;
    if (after && calls++ < atoi(after)) return 0;
    errno = atoi(error);
    return 1;
}

int flock(int file, int operation) { return fails("flock", file) ? -1 : NEXT(flock)(file, operation); }

int fsync(int file) {
    struct stat info;
    const int is_folder = !fstat(file, &info) && S_ISDIR(info.st_mode);
    return fails(is_folder ? "fsyncdir" : "fsync", file) ? -1 : NEXT(fsync)(file);
}

int ftruncate(int file, off_t size) { return fails("ftruncate", file) ? -1 : NEXT(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) {
    return fails("ftruncate", file) ? -1 : NEXT(ftruncate64)(file, size);
}

void *mmap(void *at, size_t size, int access, int flags, int file, off_t from) {
    if (file >= 0 && fails("mmap", file)) return MAP_FAILED;
    return NEXT(mmap)(at, size, access, flags, file, from);
}
void *mmap64(void *at, size_t size, int access, int flags, int file, off64_t from) {
    if (file >= 0 && fails("mmap", file)) return MAP_FAILED;
    return NEXT(mmap64)(at, size, access, flags, file, from);
}
