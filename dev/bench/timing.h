// What the C benchmarks share: train_gpt2.c itself, to call its internal functions, and a median.
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n) {      // sorts them
    qsort(values, n, sizeof *values, compare_doubles);
    return values[n / 2];
}
