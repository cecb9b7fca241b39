/* Fails each allocation, read, write and opening of a file that the library makes, one at a time.

     faults.py builds it, with AddressSanitizer and UBSan where a compiler has them, and runs:
     ./faults FOLDER alloc|short|read|write|open [once]      FOLDER: see make_files in faults.py
     ./faults FOLDER order                    what a checkpoint flushes and renames, in order
     ./faults FOLDER threads                  two models on two threads (for ThreadSanitizer)

   A scenario is a use of the library. It is repeated with the n-th call failing, n = 1, 2, 3, … until there
   is no n-th call; then, unless `once`, with all calls failing from the n-th on. A function may fail with one
   sentence, and must succeed when called again without a fault. In the end the results must be the bits of a
   run without faults, and no memory may be leaked; otherwise the status is 1. Defining the calls here
   intercepts them, which needs glibc. Build without OpenMP, whose library ends the process when there is no
   memory for a thread. */
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>

static void broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* --- Faults --------------------------------------------------------------------------------------------- */
enum { ALLOC, SHORT, READ, WRITE, OPEN, KINDS, NONE = KINDS };
static const char *const kinds[] = {"alloc", "short", "read", "write", "open"};
static _Thread_local int armed = NONE;    /* which kind of call fails */
static long calls, at;                    /* calls of that kind so far; the one that fails */
static int lasting;                       /* and all later ones */
static long fired, live;                  /* failures injected; allocations not freed */
static char trace[4096];                  /* of flushes and renames */

static int fails(int kind, int error) {
    if (kind != armed || ++calls < at || (calls > at && !lasting)) return 0;
    fired++;
    errno = error;
    return 1;
}

#ifndef SANITIZE_thread
#ifdef SANITIZE_address                   /* by faults.py: compilers announce sanitizers in different ways */
#define REAL(name) __interceptor_##name
#else
#define REAL(name) __libc_##name
#define __libc_aligned_alloc __libc_memalign
#endif
void *REAL(malloc)(size_t), *REAL(calloc)(size_t, size_t), *REAL(realloc)(void *, size_t);
void *REAL(aligned_alloc)(size_t, size_t), REAL(free)(void *);

void *malloc(size_t n) {
    if (fails(ALLOC, ENOMEM)) return NULL;
    void *p = REAL(malloc)(n);
    live += p != NULL;
    return p;
}
void *calloc(size_t n, size_t size) {
    if (fails(ALLOC, ENOMEM)) return NULL;
    void *p = REAL(calloc)(n, size);
    live += p != NULL;
    return p;
}
void *realloc(void *old, size_t n) {
    if (fails(ALLOC, ENOMEM)) return NULL;
    void *p = REAL(realloc)(old, n);
    live += p && !old;
    return p;
}
void *aligned_alloc(size_t unit, size_t n) {
    if (fails(ALLOC, ENOMEM)) return NULL;
    void *p = REAL(aligned_alloc)(unit, n);
    live += p != NULL;
    return p;
}
void free(void *p) {
    live -= p != NULL;
    REAL(free)(p);
}
void *mmap(void *p, size_t n, int access, int flags, int file, off_t from) {
    if (fails(ALLOC, ENOMEM)) return MAP_FAILED;
    p = (void *)syscall(SYS_mmap, p, n, access, flags, file, from);
    live += p != MAP_FAILED;
    return p;
}
int munmap(void *p, size_t n) {
    live--;
    return (int)syscall(SYS_munmap, p, n);
}

/* The intercepted function. */
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
size_t fread(void *out, size_t size, size_t n, FILE *f) {
    if (fails(SHORT, 0)) return NEXT(fread)(out, size, n / 2, f);
    if (!fails(READ, EIO)) return NEXT(fread)(out, size, n, f);
    f->_flags |= 0x20;                    /* of glibc: ferror is true */
    return 0;
}
int fseeko(FILE *f, off_t to, int whence) {
    if (fails(READ, EIO)) return -1;
    return NEXT(fseeko)(f, to, whence);
}
size_t fwrite(const void *data, size_t size, size_t n, FILE *f) {
    if (fails(WRITE, ENOSPC)) n /= 2;
    return NEXT(fwrite)(data, size, n, f);
}
int fflush(FILE *f) {
    if (fails(WRITE, ENOSPC)) return EOF;
    return NEXT(fflush)(f);
}
int fclose(FILE *f) {
    const int failed = fails(WRITE, ENOSPC);
    return NEXT(fclose)(f) || failed ? EOF : 0;
}
static void note(const char *what, const char *path) {
    const char *name = strrchr(path, '/');
    const size_t used = strlen(trace);
    snprintf(trace + used, sizeof trace - used, "%s%s %s", used ? ", " : "", what, name ? name + 1 : path);
}
int fsync(int file) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) > 0) note("flush", path);
    if (fails(WRITE, EIO)) return -1;
    return (int)syscall(SYS_fsync, file);
}
int rename(const char *from, const char *to) {
    note("rename", to);
    if (fails(WRITE, EIO)) return -1;
    return (int)syscall(SYS_renameat, -100, from, -100, to);
}
FILE *fopen(const char *path, const char *mode) {
    const int failed = *mode == 'w' ? fails(WRITE, ENOSPC) : fails(OPEN, EMFILE);
    if (failed) return NULL;
    return NEXT(fopen)(path, mode);
}
DIR *opendir(const char *path) {
    if (fails(OPEN, EMFILE)) return NULL;
    return NEXT(opendir)(path);
}
int stat(const char *path, struct stat *info) {
    if (fails(OPEN, EIO)) return -1;
    return NEXT(stat)(path, info);
}
#endif

/* --- Parts of scenarios --------------------------------------------------------------------------------- */
static const char *scenario = "";
static _Thread_local uint64_t digest;     /* of all results */
static void (*after_failure)(void);
static long failures;

static void broken(const char *format, ...) {
    va_list args;
    armed = NONE;
    va_start(args, format);
    fprintf(stderr, "%s, call %ld%s: ", scenario, at, lasting ? " and all later ones" : "");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    exit(1);
}

/* After the first failure of a function: it has a reason and a sentence. From now on nothing fails. */
static void failed_once(const char *what) {
    const int kind = armed;
    armed = NONE;
    if (!fired) broken("%s fails without a fault: %s", what, gpt2_error());
    if (kind == NONE) broken("%s fails after the fault: %s", what, gpt2_error());
    if (!strcmp(gpt2_error(), "stale") || strchr(gpt2_error(), '\n'))
        broken("%s fails without a sentence: %s", what, gpt2_error());
    failures++;
    gpt2_fail("stale");
    if (after_failure) after_failure();
}
#define TRY(failed)                                                                                          \
    do {                                                                                                     \
        if (failed) {                                                                                        \
            failed_once(#failed);                                                                            \
            if (failed) broken("%s fails again: %s", #failed, gpt2_error());                                 \
        }                                                                                                    \
    } while (0)

static void add(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ ((const unsigned char *)data)[i]) * 0x100000001B3u;
}
static void add_tensors(GPT2 *m, int kind) {
    const GPT2Config c = gpt2_config(m);
    const int before = armed;
    armed = NONE;                         /* reads, but is not tested here */
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const int64_t n = gpt2_tensor(&c, t, NULL, NULL);
        float *values = alloc_bytes((size_t)n * sizeof *values);
        if (!values || gpt2_get(m, t, kind, 0, n, values)) broken("cannot look: %s", gpt2_error());
        add(values, (size_t)n * sizeof *values);
        free(values);
    }
    armed = before;
}
static void add_file(const char *path) {
    const int before = armed;
    int c;
    armed = NONE;
    FILE *f = fopen(path, "rb");
    if (!f) broken("%s is not there", path);
    for (unsigned char byte; (c = getc(f)) != EOF; add(&byte, 1)) byte = (unsigned char)c;
    fclose(f);
    armed = before;
}

static const GPT2Config shape = {12, 61, 2, 2, 12};
static GPT2 *load(const char *path) {
    GPT2 *m;
    TRY(!(m = gpt2_load(path)));
    return m;
}
static GPT2Loader *open_loader(int shuffle) {
    GPT2Loader *l;
    TRY(!(l = gpt2_loader_open("train_*.bin", 2, 8, 61, shuffle, 1)));
    return l;
}
static void train(GPT2 *m, GPT2Loader *l, int steps) {
    for (int step = 0; step < steps; step++) {
        for (int micro = 0; micro < 2; micro++) {
            const int32_t *x;
            float loss;
            TRY(!(x = gpt2_loader_next(l)));
            TRY(gpt2_forward(m, x, x + 16, 2, 8, 0.5f, &loss));
            TRY(gpt2_backward(m));
            add(&loss, sizeof loss);
        }
        TRY(isnan(gpt2_grad_norm(m)));
        TRY(gpt2_update(m, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1));
    }
}

/* --- The scenarios -------------------------------------------------------------------------------------- */
static void create(void) {
    GPT2 *m;
    TRY(!(m = gpt2_create(&shape)));
    TRY(gpt2_init(m, 1));
    add_tensors(m, GPT2_PARAM);
    gpt2_free(m);
}
static void load_fp32(void) {
    GPT2 *m = load("model.bin");
    add_tensors(m, GPT2_PARAM);
    gpt2_free(m);
}
static void load_bf16(void) {
    GPT2 *m = load("bf16.bin");
    add_tensors(m, GPT2_PARAM);
    gpt2_free(m);
}
static void training(void) {
    GPT2 *m = load("model.bin");
    GPT2Loader *l = open_loader(1);
    train(m, l, 3);
    add_tensors(m, GPT2_PARAM);
    add_tensors(m, GPT2_MOMENT2);
    gpt2_loader_close(l);
    gpt2_free(m);
}
static void tensors_of_each_kind(void) {
    GPT2 *m = load("model.bin");
    float value = 1;
    for (int kind = GPT2_PARAM; kind <= GPT2_MOMENT2; kind++) {
        TRY(gpt2_set(m, 1, kind, 3, 1, &value));
        TRY(gpt2_get(m, 1, kind, 2, 1, &value));
        add_tensors(m, kind);
    }
    gpt2_free(m);
}
static void generation(void) {
    GPT2 *m = load("model.bin");
    int32_t tokens[20] = {1};
    uint64_t rng = 1;
    float logits[2 * 3 * 61];
    for (int n = 1; n < 20; n++) {
        TRY((tokens[n] = gpt2_next(m, tokens, n, 1, 9, 0.9f, NULL, &rng)) < 0);
        if (n % 7 == 0) TRY(gpt2_logits(m, tokens, 2, 3, 0, logits));
    }
    add(tokens, sizeof tokens), add(logits, sizeof logits), add(&rng, sizeof rng);
    gpt2_free(m);
}
static void evaluation(void) {
    GPT2 *m = load("model.bin");
    GPT2Loader *l = open_loader(0);
    float loss;
    TRY(gpt2_evaluate(m, l, 4, &loss));
    add(&loss, sizeof loss);
    gpt2_loader_close(l);
    gpt2_free(m);
}
static void hellaswag(void) {
    GPT2 *m = load("model.bin");
    int64_t right[2], n;
    TRY((right[0] = right[1] = 0, n = gpt2_hellaswag(m, "hellaswag.bin", 1, 9, right)) < 0);
    add(right, sizeof right), add(&n, sizeof n);
    gpt2_free(m);
}
static void tokenizer(void) {
    GPT2Tokenizer *t;
    TRY(!(t = gpt2_tokenizer_load("tokenizer.bin")));
    for (int i = 0; i < t->V; i++) add(t->bytes + t->at[i], 1u + t->bytes[t->at[i]]);
    gpt2_tokenizer_free(t);
}
static void saving(void) {
    GPT2 *m = load("model.bin");
    TRY(gpt2_save(m, "saved.bin", 3));
    TRY(gpt2_save(m, "saved.bin", 5));
    add_file("saved.bin");
    unlink("saved.bin");
    gpt2_free(m);
}

/* A failed checkpoint leaves the previous one complete, and no files of its own. */
static uint64_t first_digest;
static void add_checkpoint(int64_t step) {
    Path path;
    for (int which = MODEL_FILE; which <= DONE_FILE; which++) add_file(run_path(path, "run", which, step));
}
static void only_the_first_is_left(void) {
    const uint64_t before = digest;
    struct dirent *entry;
    digest = 1;
    add_checkpoint(1);
    if (digest != first_digest) broken("the checkpoint before is damaged");
    digest = before;
    if (gpt2_newest("run") != 1) broken("newest is %lld, expected 1", (long long)gpt2_newest("run"));
    DIR *d = opendir("run");
    while ((entry = readdir(d)))
        if (*entry->d_name != '.' && !strstr(entry->d_name, "_00000001")) broken("left: %s", entry->d_name);
    closedir(d);
}
static void checkpoint(void) {
    const int kind = armed;
    armed = NONE;
    mkdir("run", 0777);
    for (int step = 1; step <= 2; step++)
        for (int which = MODEL_FILE; which <= DONE_FILE; which++)
            unlink(run_path((Path){0}, "run", which, step));
    GPT2 *m = load("model.bin");
    GPT2Loader *l = open_loader(1);
    GPT2Progress progress = {.step = 1, .rng = 7, .seen = {1, 1}, .window = {{1}, {2}}};
    train(m, l, 1);
    TRY(gpt2_checkpoint("run", m, l, &progress, 1, 0, 0));
    train(m, l, 1);
    progress.step = 2;
    digest = 1;
    add_checkpoint(1);
    first_digest = digest;
    after_failure = only_the_first_is_left;
    *trace = 0;
    armed = kind;
    TRY(gpt2_checkpoint("run", m, l, &progress, 1, 0, 0));
    after_failure = NULL;
    add_checkpoint(2);
    gpt2_loader_close(l);
    gpt2_free(m);
}
static void restoring(void) {
    Path path;
    GPT2Progress progress;
    GPT2Data data;
    int64_t step;
    TRY((step = gpt2_newest("run")) < 0);
    TRY(gpt2_verify("run", 2, &data));
    GPT2 *m = load(run_path(path, "run", MODEL_FILE, 2));
    GPT2Loader *l = open_loader(1);
    TRY(gpt2_restore("run", 2, m, l, &progress));
    add(&step, sizeof step), add(&progress, sizeof progress), add(gpt2_updates(m), sizeof(int64_t));
    for (int kind = GPT2_PARAM; kind <= GPT2_MOMENT2; kind++) add_tensors(m, kind);
    train(m, l, 1);
    gpt2_loader_close(l);
    gpt2_free(m);
}
static void checking(void) {
    GPT2 *m = load("reference_model.bin");
    GPT2Diff rows[GPT2_DIFFS];
    int wrong;
    TRY((wrong = gpt2_check(m, "reference.bin", 1e-5, rows)) < 0);
    if (wrong) broken("%d rows are wrong", wrong);
    add(rows, sizeof rows);
    gpt2_free(m);
}

static const struct { const char *name; void (*run)(void); } scenarios[] = {
    {"create", create}, {"load fp32", load_fp32}, {"load bf16", load_bf16}, {"train", training},
    {"get and set", tensors_of_each_kind}, {"generate", generation}, {"evaluate", evaluation},
    {"hellaswag", hellaswag}, {"tokenizer", tokenizer}, {"save", saving}, {"checkpoint", checkpoint},
    {"restore", restoring}, {"check", checking},
};
enum { SCENARIOS = sizeof scenarios / sizeof *scenarios };

/* Runs a scenario with fault n; returns whether there was an n-th call. */
static int with_fault(int which, int kind, long n, uint64_t expected) {
    const long before = live;
    gpt2_fail("stale");
    digest = 1, calls = fired = 0, at = n, armed = kind;
    scenarios[which].run();
    armed = NONE;
    if (live != before) broken("%ld allocations more than before", live - before);
    if (expected && digest != expected) broken("not the results of a run without faults");
    return fired > 0;
}

static void fail_each(int which, int kind, int once) {
    long faults = 0;
    scenario = scenarios[which].name;
    with_fault(which, NONE, 0, 0);        /* what libraries allocate once */
    with_fault(which, NONE, 0, 0);
    const uint64_t expected = digest;
    failures = 0;
    for (lasting = 0; lasting < 2 - once; lasting++)
        for (long n = 1; with_fault(which, kind, n, expected); n++) faults++;
    lasting = 0;
    if (faults) printf("%s\t%s\t%ld\t%ld\n", kinds[kind], scenario, faults, failures);
    fflush(stdout);
}

/* --- Two models on two threads -------------------------------------------------------------------------- */
static void *alone(void *result) {
    digest = 1;
    GPT2 *m = gpt2_load("model.bin");
    GPT2Loader *l = m ? gpt2_loader_open("train_*.bin", 2, 8, 61, 1, 1) : NULL;
    if (!l) broken("%s", gpt2_error());
    train(m, l, 20);
    for (int kind = GPT2_PARAM; kind <= GPT2_MOMENT2; kind++) add_tensors(m, kind);
    if (!gpt2_load("none") && !strstr(gpt2_error(), "none")) broken("another thread's error");
    gpt2_loader_close(l);
    gpt2_free(m);
    *(uint64_t *)result = digest;
    return NULL;
}
static void two_threads(void) {
    uint64_t results[3];
    pthread_t threads[2];
    alone(results);
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, alone, results + 1 + i);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    if (results[1] != results[0] || results[2] != results[0]) broken("not the bits of a model alone");
    printf("threads\ttwo models\t2\t0\n");
}

int main(int argc, char **argv) {
    if (argc < 3 || chdir(argv[1])) return 2;
    if (!strcmp(argv[2], "threads")) {
        two_threads();
    } else if (!strcmp(argv[2], "order")) {
        scenario = "order";
        checkpoint();
        puts(trace);
    } else {
        int kind = 0;
        while (kind < KINDS && strcmp(kinds[kind], argv[2])) kind++;
        if (kind == KINDS) return 2;
        checkpoint();                     /* which the scenario "restore" reads */
        for (int i = 0; i < SCENARIOS; i++) fail_each(i, kind, argc > 3);
    }
    return 0;
}
