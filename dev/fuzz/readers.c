/* Coverage-guided fuzzing of every reader of files in train_gpt2.c: libFuzzer with ASan and UBSan.

     make fuzz                                  all readers, FUZZ_SECONDS=60 in all; needs clang
     build/fuzz/readers FILE                    repeats one input, such as a crash

   An input is the number of the reader, three bytes of options, and the content of the file. A reader must
   return within a second, without an invalid access, undefined arithmetic, a leak, or an allocation that the
   size of the file does not justify. The message about a rejected file must name it; an accepted file must be
   usable.

   Random bytes rarely have a magic number, or a size that matches the header: after a change the mutator
   mostly repairs these two. dev/fuzz/seeds.py writes the seeds. */

#define GPT2_NO_MAIN
#include "../../train_gpt2.c"
#include <fcntl.h>

enum { MODEL, STATE, SHARDS, TOKENIZER, CHOICE, REFERENCE, STRINGS, READERS };     /* as in seeds.py */
enum { PREFIX = 4, HEADER = 1024, STEP = 7 };
static const char *names[READERS] = {"model", "state", "shards", "tokenizer", "hellaswag", "reference",
                                     "strings"};
static const int32_t magics[READERS] = {MAGIC_MODEL, MAGIC_STATE, MAGIC_SHARD, MAGIC_TABLE, MAGIC_CHOICE,
                                        MAGIC_REFERENCE};
static const int32_t versions[READERS] = {3, 1, 1, 2, 1, 2};
static const GPT2Config shape = {8, 11, 1, 1, 2};     /* of the model for state, choices, reference */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

/* A short quarantine of freed memory, so that the memory measured is the memory in use. */
const char *__asan_default_options(void) { return "quarantine_size_mb=1:malloc_context_size=5"; }

static char folder[64], path[READERS][128];
static int file[READERS];
static GPT2 *model;
static GPT2Loader *loaders[2];             /* in order, and shuffled */
static unsigned long long executed[READERS], accepted[READERS];

static void require(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "readers: %s; the last message is: %s\n", what, gpt2_error());
    abort();
}

static int lowest_unused(void) {
    const int descriptor = dup(file[0]);
    close(descriptor);
    return descriptor;
}

static void finish(void) {
    for (int i = 0; i < READERS; i++) {
        if (executed[i])
            fprintf(stderr, "%-10s %llu executions, %llu accepted\n", names[i], executed[i], accepted[i]);
        unlink(path[i]);
    }
    char second[128];
    snprintf(second, sizeof second, "%s/shard_1.bin", folder);
    unlink(second);
    rmdir(folder);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *parent = "/dev/shm";
    if (access(parent, W_OK)) parent = "/tmp";
    snprintf(folder, sizeof folder, "%s/gpt2_fuzz_XXXXXX", parent);
    require(mkdtemp(folder) != NULL, "no folder for files");
    for (int i = 0; i < READERS; i++) {
        snprintf(path[i], sizeof path[i], "%s/%s.bin", folder, names[i]);
        if (i == SHARDS) snprintf(path[i], sizeof path[i], "%s/shard_0.bin", folder);
        if (i == STATE) snprintf(path[i], sizeof path[i], "%s/state_%08d_00000.bin", folder, STEP);
        file[i] = open(path[i], O_RDWR | O_CREAT, 0600);
        require(file[i] >= 0, "no file");
    }
    char second[128];
    int32_t header[256] = {MAGIC_SHARD, 1, 40};
    uint16_t tokens[40] = {1, 2, 3};
    snprintf(second, sizeof second, "%s/shard_1.bin", folder);
    FILE *out = fopen(second, "wb");
    require(out && fwrite(header, HEADER, 1, out), "no second shard");
    require(fwrite(tokens, sizeof tokens, 1, out), "no tokens in the second shard");
    fclose(out);
    model = gpt2_create(&shape);
    for (int i = 0; i < 2; i++) loaders[i] = gpt2_loader_open(second, 2, 3, shape.V, i, 9);
    require(model && loaders[0] && loaders[1] && !gpt2_init(model, 1), "no model and loaders");
    atexit(finish);
    return 0;
}

/* --- The readers ---------------------------------------------------------------------------------------- */
static int read_model(uint32_t option, const uint8_t *data, size_t size) {
    GPT2 *m = gpt2_load(path[MODEL]);
    if (!m) return 0;
    const GPT2Config c = gpt2_config(m);
    float values[256], sum = 0;
    for (int t = 0; t < GPT2_TENSORS; t++) {
        const int64_t n = gpt2_tensor(&c, t, NULL, NULL);
        for (int64_t i = 0; i < n; i += 256) {
            const int64_t count = (int64_t)min((size_t)(n - i), 256);
            require(!gpt2_get(m, t, GPT2_PARAM, i, count, values), "a tensor cannot be read");
            sum += values[count - 1];
        }
    }
    const int32_t tokens[4] = {0, c.V - 1, 0, c.V / 2}, T = (int32_t)min((size_t)c.max_T, 3);
    uint64_t mixed = option;
    for (size_t i = 0; i < size; i++) mixed = (mixed ^ data[i]) * 0x100000001B3u;     /* FNV */
    if (mixed >> 53 == 0) {               /* some train a step, which takes as long as a hundred loads */
        require(!gpt2_forward(m, tokens, tokens + 1, 1, T, 1, &values[0]), "a loaded model has no loss");
        require(!gpt2_backward(m), "a loaded model has no gradient");
        const int finite = isfinite(gpt2_grad_norm(m)), updated = !gpt2_update(m, 1, 0.9, 0.9, 1, 0, 1);
        require(updated == finite, "a loaded model takes no step, or a wrong one");
    }
    gpt2_free(m);
    return 1 + (sum > 0);
}

static int read_state(uint32_t option) {
    GPT2Progress progress = {0};
    GPT2Loader *loader = loaders[option & 1], *restored = NULL;
    gpt2_loader_reset(loader);
    if (option & 2) restored = loader;
    if (gpt2_restore(folder, STEP, model, restored, &progress)) return 0;
    for (int i = 0; i < 3; i++) {
        gpt2_zscore(&progress, 0, 1);
        gpt2_zscore(&progress, 1, 2);
        require(gpt2_loader_next(loader) != NULL, "a restored loader has no batch");
    }
    require(!gpt2_update(model, 0, 0.9, 0.9, 1, 0, 1), "a restored model takes no step");
    require(*gpt2_updates(model) > 0, "a model has a negative number of updates");
    return 1;
}

static int read_shards(uint32_t option) {
    static const int sizes[2] = {65536, 11};
    static const char *const files[2] = {"shard_0.bin", "shard_*.bin"};
    char pattern[128];
    const int B = 1 + (int)(option >> 8) % 4, T = 1 + (int)(option >> 16) % 8, V = sizes[option & 1];
    snprintf(pattern, sizeof pattern, "%s/%s", folder, files[option >> 1 & 1]);
    GPT2Loader *l = gpt2_loader_open(pattern, B, T, V, option & 4, option);
    if (!l) return 0;
    int took = 1;
    for (int i = 0; i < 5 && took; i++) {
        if (i == 4 && option & 8) require(!ftruncate(file[SHARDS], HEADER + 4), "a shard cannot be cut");
        const int32_t *x = gpt2_loader_next(l);
        for (int k = 0; x && k < 2 * B * T; k++) require(x[k] >= 0 && x[k] < V, "a token is not below V");
        took = x != NULL;
        if (i == 2) gpt2_loader_reset(l);
    }
    gpt2_loader_close(l);
    return took;
}

static int read_tokenizer(void) {
    GPT2Tokenizer *t = gpt2_tokenizer_load(path[TOKENIZER]);
    if (!t) return 0;
    unsigned sum = 0;
    for (int32_t i = 0; i < t->V; i++)
        for (int64_t k = 0; k < t->bytes[t->at[i]]; k++) sum += t->bytes[t->at[i] + 1 + k];
    require(sum < UINT32_MAX && t->end >= -1 && t->end < t->V, "the token that ends a text is none");
    gpt2_tokenizer_free(t);
    return 1;
}

static int read_choice(uint32_t option) {
    int64_t right[2] = {0};
    const int64_t first = option % 3, count = (option >> 8) % 8;
    const int64_t examples = gpt2_hellaswag(model, path[CHOICE], first, count, right);
    for (int k = 0; k < 2; k++) require(right[k] >= 0 && right[k] <= count, "a wrong count of right answers");
    require(examples >= -1, "a file has a negative number of examples");
    return examples >= 0;
}

static int read_reference(void) {
    GPT2Diff rows[GPT2_DIFFS];
    const int wrong = gpt2_check(model, path[REFERENCE], 1e-5, rows);
    for (int i = 0; i < GPT2_DIFFS && wrong >= 0; i++)
        require(*rows[i].name && rows[i].ok >> 1 == 0, "a row is not filled in");
    return wrong >= 0;
}

static int read_strings(const uint8_t *data, size_t size) {
    char *text = alloc_bytes(size);            /* of exact size, to detect reads beyond the end */
    GPT2Config c;
    int64_t step = 0, steps = 0;
    if (size > 2) {
        step = data[size - 1];
        steps = data[size - 2];
    }
    memcpy(text, data, size);
    const int is_model = !gpt2_descriptor(text, &c);
    const int is_schedule = gpt2_lr(text, step, steps, (int64_t)size, 1e-3f, 0.1f) >= -0.5f;
    if (is_model) require(!gpt2_config_check(&c) && gpt2_parameters(&c) > 0, "a model that cannot be");
    require(!(is_model && is_schedule), "a descriptor that is a schedule");
    free(text);
    return is_model || is_schedule;
}

static int read_file(int reader, uint32_t option, const uint8_t *data, size_t size) {
    switch (reader) {
        case MODEL: return read_model(option, data, size);
        case STATE: return read_state(option);
        case SHARDS: return read_shards(option);
        case TOKENIZER: return read_tokenizer();
        case CHOICE: return read_choice(option);
        case REFERENCE: return read_reference();
        default: return read_strings(data, size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t input_size) {
    if (input_size < PREFIX || input[0] >= READERS) return 0;
    const int reader = input[0], fd = file[reader], unused = lowest_unused();
    const uint32_t option = input[1] | (uint32_t)input[2] << 8 | (uint32_t)input[3] << 16;
    const uint8_t *data = input + PREFIX;
    const size_t size = input_size - PREFIX;
    require(pwrite(fd, data, size, 0) == (ssize_t)size && !ftruncate(fd, (off_t)size), "no input file");
    *error_text = 0;
    const int took = read_file(reader, option, data, size);
    if (!took) {
        require(*gpt2_error(), "no message");
        if (reader != STRINGS) {          /* strings are quoted as they are, which can contain line breaks */
            require(strstr(gpt2_error(), folder) != NULL, "a message does not name the file");
            require(!strchr(gpt2_error(), '\n'), "a message has several lines");
        }
    }
    require(lowest_unused() == unused, "a file was left open");
    executed[reader]++;
    accepted[reader] += took != 0;
    return 0;
}

/* --- The mutator ---------------------------------------------------------------------------------------- */
static uint64_t key, draws;
static uint64_t draw(uint64_t below) { return random_at(key, draws++) % below; }

/* A number that checks may miss: small, about a power of two, or any. */
static int64_t edge(int64_t now) {
    const int64_t power = (int64_t)1 << draw(63);
    switch (draw(8)) {
        case 0: return (int64_t)draw(5) - 2;
        case 1: return (int64_t)((uint64_t)now + draw(3) - 1);
        case 2: return power - 1;
        case 3: return -power;
        case 4: return power;
        case 5: return (int64_t)(random_at(key, draws++));
        default: return (int64_t)draw(24);
    }
}

/* The size of a file with this header, 0 if that does not follow from it. */
static int64_t whole_size(int reader, const int32_t *h) {
    const GPT2Config c = {h[2], h[3], h[4], h[5], h[6]};
    int64_t N = 0;
    if (h[2] > 0 && h[3] > 0 && h[2] < 64 && h[3] < 64) N = h[2] * h[3];
    const int64_t element = h[1] == 5 ? 2 : 4;
    if (reader == MODEL && !gpt2_config_check(&c)) return HEADER + element * tensors_size(&c);
    if (reader == STATE) return HEADER + (int64_t)sizeof(State) + 8 * tensors_size(&shape);
    if (reader == SHARDS && h[2] >= 0) return HEADER + 2LL * h[2];
    if (reader == REFERENCE && N) return HEADER + 4 * (N * (2 + shape.V) + 1 + tensors_size(&shape));
    return 0;
}

/* Changes one number in the body of a file; in a state mostly one around its windows. */
static void change_number(int reader, uint8_t *body, size_t size) {
    size_t width = 2;
    if (reader == STATE) width = 8;
    if (reader == REFERENCE) width = 4;
    const size_t last = sizeof(GPT2Progress) / 8 + draw(8), count = size / width;
    if (!count) return;
    size_t i = draw(count);
    if (reader == STATE && draw(4)) i = draw(2) ? draw(4) : last;
    if (i >= count) return;
    int64_t value = 0;
    memcpy(&value, body + i * width, width);
    value = edge(value);
    memcpy(body + i * width, &value, width);
}

/* Changes header h and the body of a file; returns the new size of the body. */
static size_t change_file(int reader, uint8_t *options, int32_t *h, uint8_t *body, size_t size, size_t most) {
    for (uint64_t times = 1 + draw(3); times > 0; times--)
        switch (draw(4)) {
            case 0: options[draw(3)] = (uint8_t)draw(256); break;
            case 1: {
                const uint64_t at = draw(8);
                h[at] = (int32_t)edge(h[at]);
                break;
            }
            case 2: change_number(reader, body, size); break;
            default: size = LLVMFuzzerMutate(body, size, most);
        }
    return size;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed) {
    const size_t least = PREFIX + HEADER;
    const int reader = size ? data[0] % READERS : 0;
    key = seed;
    draws = 0;
    if (reader != STRINGS && most > least && size < least && draw(8)) {
        memset(data + size, 0, least - size);
        data[0] = (uint8_t)reader;
        size = least;
    }
    if (reader == STRINGS || size < least || most < least || !draw(32)) {
        size = LLVMFuzzerMutate(data, size, most);
        if (size) data[0] = (uint8_t)reader;
        return size;
    }
    uint8_t *body = data + least;
    int32_t h[256];
    memcpy(h, data + PREFIX, HEADER);
    size = HEADER + change_file(reader, data + 1, h, body, size - least, most - least);
    if (draw(16)) {
        h[0] = magics[reader];
        h[1] = versions[reader];
        if (reader == MODEL && draw(2)) h[1] = 5;
        if (reader == STATE) memcpy(h + 2, &shape, sizeof shape);
    }
    memcpy(data + PREFIX, h, HEADER);
    const int64_t whole = whole_size(reader, h);
    if (draw(8) && whole > 0 && whole <= (int64_t)(most - PREFIX)) {
        if ((size_t)whole > size) memset(data + PREFIX + size, (int)draw(2), (size_t)whole - size);
        size = (size_t)whole;
    }
    return PREFIX + size;
}
