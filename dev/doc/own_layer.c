/* A layer of your own, Swish with a learned slope, and the test that its backward pass is the derivative of
   its forward pass. dev/doc/layers.md derives it and adds it to the model.

     mkdir -p build
     cc -O2 -std=gnu11 -Wall -Wextra -Wno-unknown-pragmas -o build/own_layer dev/doc/own_layer.c -lm
     build/own_layer

   Prints the largest relative error of the output and of each gradient, and exits with status 1 if one
   exceeds BOUND. It must also pass with -march=native and -fopenmp. For another layer, replace the functions
   of part 1, then inputs, formula and calls in part 2. */
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"

/* === 1. The layer ======================================================================================= */
/* Swish (Ramachandran, Zoph & Le 2017) with a slope β per channel; σ is the logistic function. */
static void swish_forward(float *out,                              /* (N,C) = inp · σ(β inp) */
                          const float *inp, const float *beta,     /* (N,C), (C) */
                          size_t N, size_t C) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c += LANES) {
            vf x = vload(inp + n * C + c, C - c), b = vload(beta + c, C - c);
            vstore(out + n * C + c, x / (1.0f + vexp(-b * x)), C - c);
        }
}

/* dinp may be dout. One thread sums a channel, in partial sums as in column_sums. */
static void swish_backward(float *dinp, float *dbeta,              /* (N,C), (C) */
                           const float *dout, const float *inp, const float *beta,
                           size_t N, size_t C, int add) {
    enum { ROWS = 64 };
#pragma omp parallel for
    for (size_t c = 0; c < C; c += LANES) {
        vf b = vload(beta + c, C - c), sum = {0};
        for (size_t first = 0; first < N; first += ROWS) {
            vf part = {0};
            for (size_t n = first; n < min(first + ROWS, N); n++) {
                vf x = vload(inp + n * C + c, C - c), d = vload(dout + n * C + c, C - c);
                vf e = vexp(-b * x), sigma = 1.0f / (1.0f + e);
                vf bend = x * sigma * (e * sigma);     /* e σ is 1 - σ, exact where σ is almost 1 */
                part += d * x * bend;
                vstore(dinp + n * C + c, d * (sigma + b * bend), C - c);
            }
            sum += part;
        }
        if (add) sum += vload(dbeta + c, C - c);
        vstore(dbeta + c, sum, C - c);
    }
}

/* === 2. Its test ======================================================================================== */
/* Awkward sizes: not multiples of a partial sum or of a vector. */
enum { ROWS = 67, CHANNELS = 37, COUNT = ROWS * CHANNELS };
static const double BOUND = 1e-6;         /* a few roundings of 6e-8; a wrong formula exceeds 1e-2 */
static double inp[COUNT], beta[CHANNELS], dout[COUNT];
static double out[COUNT], dinp[COUNT], dbeta[CHANNELS];     /* expected: from the formula alone, in double */

/* The forward pass in double. The loss Σ dout · out has the gradient dout with respect to out. */
static double loss(void) {
    double sum = 0;
    for (int i = 0; i < COUNT; i++) {
        out[i] = inp[i] / (1 + exp(-beta[i % CHANNELS] * inp[i]));
        sum += dout[i] * out[i];
    }
    return sum;
}

/* The derivative of the loss by a central difference: its error in double is about h² = 1e-8. */
static double slope(double *value) {
    const double h = 1e-4, saved = *value;
    *value = saved + h;
    const double more = loss();
    *value = saved - h;
    const double less = loss();
    *value = saved;
    return (more - less) / (2 * h);
}

/* Prints the largest error of n values relative to their root mean square. Returns 1 if it exceeds BOUND, or
   if the layer has overwritten the NaNs after the end. */
static int wrong(const char *name, const float *values, const double *expected, int n) {
    double squares = 0, worst = 0;
    for (int i = 0; i < n; i++) squares += expected[i] * expected[i];
    for (int i = 0; i < n; i++) {
        const double error = fabs(values[i] - expected[i]) / sqrt(squares / n);
        if (!(error <= worst)) worst = error;     /* NaN too */
    }
    int overwritten = 0;
    for (int i = n; i < n + LANES; i++) overwritten |= !isnan(values[i]);
    const int failed = !(worst <= BOUND) || overwritten;
    printf("%-22s %.1e  %s\n", name, worst, failed ? "NOT OK" : "ok");
    return failed;
}

static float inp_f[COUNT], beta_f[CHANNELS], dout_f[COUNT + LANES];
static float out_f[COUNT + LANES], dbeta_f[CHANNELS + LANES];

int main(void) {
    for (int i = 0; i < COUNT + LANES; i++) out_f[i] = dout_f[i] = NAN;
    for (int c = 0; c < CHANNELS + LANES; c++) dbeta_f[c] = NAN;
    for (int i = 0; i < COUNT; i++) {     /* doubles that are representable as float */
        inp[i] = inp_f[i] = (float)(12 * uniform_at(1, (uint64_t)i) - 6);
        dout[i] = dout_f[i] = (float)(2 * uniform_at(2, (uint64_t)i) - 1);
    }
    for (int c = 0; c < CHANNELS; c++) beta[c] = beta_f[c] = (float)(0.5 + 2 * uniform_at(3, (uint64_t)c));
    inp[0] = inp_f[0] = 300;              /* exp(300) exceeds a float */
    inp[1] = inp_f[1] = -300;
    for (int i = 0; i < COUNT; i++) dinp[i] = slope(inp + i);
    for (int c = 0; c < CHANNELS; c++) dbeta[c] = slope(beta + c);
    loss();                               /* restores out at inp */

    swish_forward(out_f, inp_f, beta_f, ROWS, CHANNELS);
    int failed = wrong("out", out_f, out, COUNT);
    swish_backward(out_f, dbeta_f, dout_f, inp_f, beta_f, ROWS, CHANNELS, 0);
    failed |= wrong("dinp", out_f, dinp, COUNT) | wrong("dbeta", dbeta_f, dbeta, CHANNELS);
    swish_backward(dout_f, dbeta_f, dout_f, inp_f, beta_f, ROWS, CHANNELS, 1);
    for (int c = 0; c < CHANNELS; c++) dbeta[c] *= 2;
    failed |= wrong("dinp in place of dout", dout_f, dinp, COUNT);
    failed |= wrong("dbeta accumulated", dbeta_f, dbeta, CHANNELS);
    return failed;
}
