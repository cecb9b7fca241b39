/* A layer of one's own: Swish with a learned slope, and the test that its backward pass is the derivative of
   its forward pass. dev/doc/layers.md goes from the calculus to this file, and from here into the model.

     mkdir -p build
     cc -O2 -std=gnu11 -Wall -Wextra -Wno-unknown-pragmas -o build/own_layer dev/doc/own_layer.c -lm
     build/own_layer

   It prints the largest relative error of the output and of each gradient, and exits 1 if one is over BOUND.
   Add -march=native for wider vectors, -fopenmp for threads: it must pass with them as well. What it refuses
   to be: a part of the model. It includes train_gpt2.c for vectors and random numbers. For a layer of your
   own, replace the two functions of part 1; then the inputs, the formula and the calls of part 2. */
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"

/* === 1. The layer ======================================================================================= */
/* Swish (Ramachandran, Zoph & Le 2017): out (N,C) = inp · σ(β inp), σ the logistic function, with a slope β
   for each channel: beta (C). */
static void swish_forward(float *out, const float *inp, const float *beta, size_t N, size_t C) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c += LANES) {
            vf x = vload(inp + n * C + c, C - c), b = vload(beta + c, C - c);
            vstore(out + n * C + c, x / (1.0f + vexp(-b * x)), C - c);
        }
}

/* With x = inp: dinp (N,C) = dout · (σ + β x σ (1 - σ)), in dout's place if one likes, and dbeta (C) = Σ dout
   · x² σ (1 - σ) over rows. 1 - σ is e^(-βx) σ, which keeps its digits where σ is almost 1. A channel is one
   thread's, so that the order of its sum is fixed; partial sums as in column_sums. */
static void swish_backward(float *dinp, float *dbeta, const float *dout, const float *inp, const float *beta,
                           size_t N, size_t C, int add) {
    enum { ROWS = 64 };
#pragma omp parallel for
    for (size_t c = 0; c < C; c += LANES) {
        vf b = vload(beta + c, C - c), sum = {0};
        for (size_t first = 0; first < N; first += ROWS) {
            vf part = {0};
            for (size_t n = first; n < min(first + ROWS, N); n++) {
                vf x = vload(inp + n * C + c, C - c), d = vload(dout + n * C + c, C - c);
                vf e = vexp(-b * x), sigma = 1.0f / (1.0f + e), bend = x * sigma * (e * sigma);
                part += d * x * bend;
                vstore(dinp + n * C + c, d * (sigma + b * bend), C - c);
            }
            sum += part;
        }
        vstore(dbeta + c, add ? vload(dbeta + c, C - c) + sum : sum, C - c);
    }
}

/* === 2. Its test ======================================================================================== */
/* Awkward sizes: rows for a whole partial sum and a rest, channels for whole vectors and a rest. */
enum { ROWS = 67, CHANNELS = 37, COUNT = ROWS * CHANNELS };
static const double BOUND = 1e-6;         /* some roundings of 6e-8; a wrong formula is off by 1e-2 or more */
static double inp[COUNT], beta[CHANNELS], dout[COUNT];
static double out[COUNT], dinp[COUNT], dbeta[CHANNELS];     /* theirs: from the formula alone, in double */

/* The formula of the forward pass, once more, without a thought of speed. Its loss is Σ dout · out: a loss
   whose gradient by out is dout, which is what a backward function is given. */
static double loss(void) {
    double sum = 0;
    for (int i = 0; i < COUNT; i++) {
        out[i] = inp[i] / (1 + exp(-beta[i % CHANNELS] * inp[i]));
        sum += dout[i] * out[i];
    }
    return sum;
}

/* The slope of the loss in one of its inputs, by a central difference. In double, h = 1e-4 leaves an error of
   about h² = 1e-8 from the curve and 1e-16 / h = 1e-12 from rounding; in float it would be 6e-8 / h = 6e-4. */
static double slope(double *value) {
    const double h = 1e-4, kept = *value;
    *value = kept + h;
    const double more = loss();
    *value = kept - h;
    const double less = loss();
    *value = kept;
    return (more - less) / (2 * h);
}

/* Prints the largest error of n values in relation to their root mean square; 1 if it is over BOUND or if the
   layer wrote past the end, where there are NaNs. */
static int wrong(const char *name, const float *ours, const double *theirs, int n) {
    double squares = 0, worst = 0;
    for (int i = 0; i < n; i++) squares += theirs[i] * theirs[i];
    for (int i = 0; i < n; i++) {
        const double error = fabs(ours[i] - theirs[i]) / sqrt(squares / n);
        worst = isnan(error) || error > worst ? error : worst;
    }
    int past = 0;
    for (int i = n; i < n + LANES; i++) past |= !isnan(ours[i]);
    printf("%-22s %.1e  %s\n", name, worst, worst <= BOUND && !past ? "ok" : "NOT OK");
    return !(worst <= BOUND) || past;
}

static float our_inp[COUNT], our_beta[CHANNELS], our_dout[COUNT + LANES];
static float ours[COUNT + LANES], our_dbeta[CHANNELS + LANES];

int main(void) {
    for (int i = 0; i < COUNT + LANES; i++) ours[i] = our_dout[i] = NAN;
    for (int c = 0; c < CHANNELS + LANES; c++) our_dbeta[c] = NAN;
    for (int i = 0; i < COUNT; i++) {     /* doubles that are floats, as that is what the layer gets */
        inp[i] = our_inp[i] = (float)(12 * uniform_at(1, (uint64_t)i) - 6);
        dout[i] = our_dout[i] = (float)(2 * uniform_at(2, (uint64_t)i) - 1);
    }
    for (int c = 0; c < CHANNELS; c++) beta[c] = our_beta[c] = (float)(0.5 + 2 * uniform_at(3, (uint64_t)c));
    inp[0] = our_inp[0] = 300, inp[1] = our_inp[1] = -300;     /* exp(300) is no float */
    for (int i = 0; i < COUNT; i++) dinp[i] = slope(inp + i);
    for (int c = 0; c < CHANNELS; c++) dbeta[c] = slope(beta + c);
    loss();                               /* for out at inp itself */

    swish_forward(ours, our_inp, our_beta, ROWS, CHANNELS);
    int failed = wrong("out", ours, out, COUNT);
    swish_backward(ours, our_dbeta, our_dout, our_inp, our_beta, ROWS, CHANNELS, 0);
    failed |= wrong("dinp", ours, dinp, COUNT) | wrong("dbeta", our_dbeta, dbeta, CHANNELS);
    swish_backward(our_dout, our_dbeta, our_dout, our_inp, our_beta, ROWS, CHANNELS, 1);
    for (int c = 0; c < CHANNELS; c++) dbeta[c] *= 2;
    failed |= wrong("dinp in dout's place", our_dout, dinp, COUNT);
    failed |= wrong("dbeta added to dbeta", our_dbeta, dbeta, CHANNELS);
    return failed;
}
