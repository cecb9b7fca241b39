/* The worked example and the exercises of dev/doc/layers.md, computed by the functions of train_gpt2.c.

     mkdir -p build
     cc -O2 -std=gnu11 -w -o build/examples dev/doc/examples.c -lm
     build/examples */
#define GPT2_NO_MAIN
#include "../../train_gpt2.c"

static void print(const char *name, const float *values, int n) {
    printf("%-18s", name);
    for (int i = 0; i < n; i++) {
        float value = values[i];
        if (fabsf(value) < 5e-5f) value = 0;     /* no "-0.0000" */
        printf(" %.4f", (double)value);
    }
    printf("\n");
}

/* One sequence of two tokens, one head of one channel: q = (1, 1), k = (0, ln 3), v = (1, 5). */
static void attention_example(void) {
    static float scratch[2 * QUERIES * 2], pack_a[PACK_A], pack_b[PACK_B];
    const Workspace ws = {1, pack_a, pack_b, scratch, 0};
    const float qkv[] = {1, 0, 1, 1, logf(3), 5}, dout[] = {0, 1};
    float out[2], dqkv[6];
    attention_forward(&ws, out, qkv, 1, 0, 2, 1, 1);
    attention_backward(&ws, dqkv, dout, qkv, 1, 2, 1, 1);
    print("attention out", out, 2);
    print("attention dq", (float[]){dqkv[0], dqkv[3]}, 2);
    print("attention dk", (float[]){dqkv[1], dqkv[4]}, 2);
    print("attention dv", (float[]){dqkv[2], dqkv[5]}, 2);
}

static void layernorm_exercise(void) {
    const float inp[] = {1, 3, 1, 3}, w[] = {1, 1, 1, 1}, b[4] = {0}, dout[] = {1, 0, 0, 0};
    float out[4], mean, rstd, dinp[4] = {0}, dw[4], db[4];
    layernorm_forward(out, &mean, &rstd, inp, w, b, 1, 4);
    layernorm_backward(dinp, dw, db, dout, inp, w, &mean, &rstd, 1, 4, 0);
    print("layer norm out", out, 4);
    print("layer norm dinp", dinp, 4);
    print("layer norm dw", dw, 4);
}

static void crossentropy_exercise(void) {
    float logits[] = {0, logf(2), logf(5)}, loss;
    crossentropy(&loss, logits, (int32_t[]){2}, 1, 3, 3, 1);
    print("cross-entropy", &loss, 1);
    print("dlogits", logits, 3);
}

static void gelu_exercise(void) {
    const float inp[] = {0, 10};
    float out[2], dx[] = {1, 1};
    gelu(out, dx, inp, 2);
    print("GELU'", dx, 2);
}

int main(void) {
    attention_example();
    layernorm_exercise();
    crossentropy_exercise();
    gelu_exercise();
    return 0;
}
