/* The selective scan of ../scan.py for float32 on a CPU, called through ctypes by ../compiled.py.

   All arrays are dense and row-major: u, delta, y and their gradients (b, l, d); decay, its product with log2(e) and
   its gradient (STATES, d); B and C (b, l, STATES); starts (b, chunks, STATES, d), the state before each chunk.

   A sequence is walked for TILE channels at a time, whose states stay in the cache of one core. Nothing depends on
   which thread takes which sequence: each writes places of its own, and sums over them are made in a fixed order.
   Arrays of the inner loops are local, of one length and aligned, so that the order of a sum never depends on where
   the caller's memory lies.

   Not for -ffast-math, which would cancel the rounding in `power_of_two` and forget about NaN. */

#include <stdint.h>
#include <string.h>

enum { STATES = 16, CHUNK = 16, TILE = 72 }; /* TILE: stage 1's channels; what waits for a chunk fits the L2 cache */

const int compiled_scan_version = 1; /* counted up with every change here; compiled.py takes no other */
const int compiled_scan_tile = TILE;

typedef float row[TILE] __attribute__((aligned(32)));

/* 2^x to a relative error of 1e-7: 0 below -127, infinite or NaN from 127.5, NaN for NaN. */
static inline float power_of_two(float x)
{
    x = x < -127.0f ? -127.0f : x;
    float shifted = x + 0x1.8p23f; /* the last bits hold x rounded to a whole number, in two's complement */
    float f = x - (shifted - 0x1.8p23f); /* -0.5 to 0.5 */
    float p = 1.535336188319500e-4f; /* Cephes, exp2f */
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = bits > 0x4b400080u ? 0x4b400080u : bits; /* 128 */
    bits = (bits << 23) + (127u << 23); /* the exponent of a float: 0 for -127, that of infinity for 128 */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static void load(float *tile, const float *from, int width)
{
    memcpy(tile, from, width * sizeof(float));
    memset(tile + width, 0, (TILE - width) * sizeof(float));
}

static void save(float *to, const float *tile, int width) { memcpy(to, tile, width * sizeof(float)); }

static int64_t tiles_of(int64_t d) { return (d + TILE - 1) / TILE; }
static int width_of(int64_t d, int64_t first) { return d - first < TILE ? (int)(d - first) : TILE; }

static void walk_tile(int64_t l, int64_t d, int width, const float *u, const float *delta, const float *log2_decay,
                      const float *B, const float *C, const float *D, float *y, float *starts)
{
    row decay[STATES], state[STATES] = {{0}}, skip;
    load(skip, D, width);
    for (int n = 0; n < STATES; n++)
        load(decay[n], log2_decay + n * d, width);
    for (int64_t t = 0; t < l; t++, u += d, delta += d, y += d, B += STATES, C += STATES) {
        if (t % CHUNK == 0)
            for (int n = 0; n < STATES; n++, starts += d)
                save(starts, state[n], width);
        row input, step, drive, sum;
        load(input, u, width);
        load(step, delta, width);
        for (int j = 0; j < TILE; j++) {
            drive[j] = step[j] * input[j];
            sum[j] = skip[j] * input[j];
        }
        for (int n = 0; n < STATES; n++)
            for (int j = 0; j < TILE; j++) {
                state[n][j] = power_of_two(step[j] * decay[n][j]) * state[n][j] + drive[j] * B[n];
                sum[j] += C[n] * state[n][j];
            }
        save(y, sum, width);
    }
}

void compiled_scan_walk(int threads, int64_t b, int64_t l, int64_t d, const float *u, const float *delta,
                        const float *log2_decay, const float *B, const float *C, const float *D, float *y,
                        float *starts)
{
    int64_t chunks = (l + CHUNK - 1) / CHUNK, tiles = tiles_of(d);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < b * tiles; item++) {
        int64_t r = item / tiles, first = item % tiles * TILE, at = r * l * d + first;
        walk_tile(l, d, width_of(d, first), u + at, delta + at, log2_decay + first, B + r * l * STATES,
                  C + r * l * STATES, D + first, y + at, starts + r * chunks * STATES * d + first);
    }
}

static void walk_tile_back(int64_t l, int64_t d, int width, const float *u, const float *delta, const float *decay_,
                           const float *log2_decay_, const float *B, const float *C, const float *D,
                           const float *starts, const float *grad_y, float *grad_u, float *grad_delta,
                           float *grad_decay_, float *grad_D, float *grad_B, float *grad_C)
{
    row gains[CHUNK][STATES], states[CHUNK + 1][STATES]; /* states[i + 1] is that after the chunk's token i */
    row decay[STATES], log2_decay[STATES], skip, grad_skip = {0};
    row carry[STATES] = {{0}}, grad_decay[STATES] = {{0}}; /* carry: dL/dh of the token before, from later ones */
    load(skip, D, width);
    for (int n = 0; n < STATES; n++) {
        load(decay[n], decay_ + n * d, width);
        load(log2_decay[n], log2_decay_ + n * d, width);
    }
    for (int64_t first = (l - 1) / CHUNK * CHUNK; first >= 0; first -= CHUNK) {
        int k = l - first < CHUNK ? (int)(l - first) : CHUNK;
        for (int n = 0; n < STATES; n++)
            load(states[0][n], starts + (first / CHUNK * STATES + n) * d, width);
        row input[CHUNK], step[CHUNK], drive[CHUNK];
        for (int i = 0; i < k; i++) {
            load(input[i], u + (first + i) * d, width);
            load(step[i], delta + (first + i) * d, width);
            for (int j = 0; j < TILE; j++)
                drive[i][j] = step[i][j] * input[i][j];
            for (int n = 0; n < STATES; n++) {
                float b = B[(first + i) * STATES + n];
                for (int j = 0; j < TILE; j++) {
                    gains[i][n][j] = power_of_two(step[i][j] * log2_decay[n][j]);
                    states[i + 1][n][j] = gains[i][n][j] * states[i][n][j] + drive[i][j] * b;
                }
            }
        }
        for (int i = k - 1; i >= 0; i--) {
            int64_t t = first + i;
            row grad, grad_drive = {0}, grad_step = {0};
            load(grad, grad_y + t * d, width);
            for (int n = 0; n < STATES; n++) {
                float b = B[t * STATES + n], c = C[t * STATES + n], sum_B = 0, sum_C = 0;
#pragma omp simd reduction(+ : sum_B, sum_C)
                for (int j = 0; j < TILE; j++) {
                    float grad_state = carry[n][j] + grad[j] * c;
                    sum_C += grad[j] * states[i + 1][n][j];
                    sum_B += drive[i][j] * grad_state;
                    grad_drive[j] += grad_state * b;
                    carry[n][j] = grad_state * gains[i][n][j];
                    float grad_exponent = carry[n][j] * states[i][n][j];
                    grad_step[j] += grad_exponent * decay[n][j];
                    grad_decay[n][j] += grad_exponent * step[i][j];
                }
                grad_B[t * STATES + n] = sum_B;
                grad_C[t * STATES + n] = sum_C;
            }
            for (int j = 0; j < TILE; j++) {
                grad_step[j] += grad_drive[j] * input[i][j];
                grad_drive[j] = grad_drive[j] * step[i][j] + skip[j] * grad[j];
                grad_skip[j] += grad[j] * input[i][j];
            }
            save(grad_delta + t * d, grad_step, width);
            save(grad_u + t * d, grad_drive, width);
        }
    }
    save(grad_D, grad_skip, width);
    for (int n = 0; n < STATES; n++)
        save(grad_decay_ + n * d, grad_decay[n], width);
}

/* Add up `count` arrays of `size` in the first of them, in their order. */
static void add_up(float *parts, int64_t count, int64_t size)
{
    for (int64_t part = 1; part < count; part++)
        for (int64_t i = 0; i < size; i++)
            parts[i] += parts[part * size + i];
}

/* Two kinds of gradients come in parts, whose sum is left in the first: that of decay, with that of D below it, for
   each sequence, (b, STATES + 1, d); those of B and of C for each tile, (tiles, b, l, STATES). */
void compiled_scan_walk_back(int threads, int64_t b, int64_t l, int64_t d, const float *u, const float *delta,
                             const float *decay, const float *log2_decay, const float *B, const float *C,
                             const float *D, const float *starts, const float *grad_y, float *grad_u,
                             float *grad_delta, float *grad_decay_D, float *grad_B, float *grad_C)
{
    int64_t chunks = (l + CHUNK - 1) / CHUNK, tiles = tiles_of(d);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < b * tiles; item++) {
        int64_t r = item / tiles, tile = item % tiles, first = tile * TILE, at = r * l * d + first;
        int64_t weights = r * l * STATES, parts = tile * b * l * STATES + weights;
        float *grad_decay = grad_decay_D + r * (STATES + 1) * d + first;
        walk_tile_back(l, d, width_of(d, first), u + at, delta + at, decay + first, log2_decay + first, B + weights,
                       C + weights, D + first, starts + r * chunks * STATES * d + first, grad_y + at, grad_u + at,
                       grad_delta + at, grad_decay, grad_decay + STATES * d, grad_B + parts, grad_C + parts);
    }
    add_up(grad_decay_D, b, (STATES + 1) * d);
    add_up(grad_B, tiles, b * l * STATES);
    add_up(grad_C, tiles, b * l * STATES);
}
