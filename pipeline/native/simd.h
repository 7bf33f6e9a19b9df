/* What the kernels share. Loops are written so that the compiler vectorises them: adjacent
   elements, rows padded to LANES and aligned, reductions marked. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16 /* floats of the widest vector registers */
#define LOWEST -1e30f
#define ALIGNED(p) __builtin_assume_aligned(p, 64)

static inline int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

typedef uint16_t bf16;

/* LANES floats, in as many registers as the processor needs for them. */
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#define UNROLLED _Pragma("GCC unroll 16")

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vec load(const float *aligned) { return *(const vec *)aligned; }
static inline void store(float *aligned, vec x) { *(vec *)aligned = x; }

/* exp(x) for x <= 0 within 2 units in the last place. Below -80 it is 0: what is divided by a sum
   of such terms would leave the range of normal numbers, where processors are many times slower. */
static inline vec exp_of_negative(vec x) {
  const ints in_range = x >= -80.0f;
  const float to_round = 12582912.0f; /* adding 1.5 x 2^23 leaves no place for a fraction */
  const vec n = (x * 1.44269504088896341f + to_round) - to_round;
  const vec r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return (vec)((ints)(p * (vec)power) & in_range);
}

/* Lane k of the result combines all lanes of v[k]. Each step halves the number of vectors and the
   lanes that a vector still has of each: x's and y's in turn. */
#define ACROSS(name, combine)                                                                  \
  static inline vec name(vec v[LANES]) {                                                       \
    static const ints first[4] = {                                                             \
        {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},                              \
        {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},                            \
        {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},                            \
        {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}};                          \
    UNROLLED for (int step = 0, half = LANES / 2; half > 0; step++, half /= 2)                 \
      UNROLLED for (int i = 0; i < half; i++)                                                           \
        v[i] = combine(__builtin_shuffle(v[i], v[i + half], first[step]),                      \
                       __builtin_shuffle(v[i], v[i + half], first[step] + half));              \
    return v[0];                                                                               \
  }
static inline vec add(vec a, vec b) { return a + b; }
static inline vec larger(vec a, vec b) {
#ifdef __AVX512F__ /* gcc does not find the instruction by itself */
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  const ints first = a > b;
  return (vec)(((ints)a & first) | ((ints)b & ~first));
#endif
}
ACROSS(sum_each, add)
ACROSS(largest_each, larger)

/* bf16 at any address, rounded to nearest even. */
static inline vec load_bf16(const bf16 *from) {
  halves bits;
  memcpy(&bits, from, sizeof bits);
  return (vec)(__builtin_convertvector(bits, words) << 16);
}
static inline halves rounded(vec x) {
#ifdef __AVX512BF16__
  return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const words exact = (words)x;
  return __builtin_convertvector((exact + 0x7fff + (exact >> 16 & 1)) >> 16, halves);
#endif
}
static inline void store_bf16(bf16 *to, vec x) {
  const halves bits = rounded(x);
  memcpy(to, &bits, sizeof bits);
}
static inline vec load_unaligned(const float *from) {
  vec x;
  memcpy(&x, from, sizeof x);
  return x;
}
static inline void store_unaligned(float *to, vec x) { memcpy(to, &x, sizeof x); }

/* One number of all lanes. */
#define ONE(name, combine)                                                                     \
  static inline float name(vec x) {                                                            \
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};                 \
    UNROLLED for (int half = LANES / 2; half > 0; half /= 2)                                   \
      x = combine(x, __builtin_shuffle(x, lanes + half));                                      \
    return x[0];                                                                               \
  }
ONE(sum_lanes, add)
ONE(largest_lane, larger)

/* A 32-bit hash in which every bit of the argument counts (Wellons, "lowbias32"). */
#define HASH(x) x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16
static inline uint32_t hash(uint32_t x) {
  HASH(x);
  return x;
}

typedef struct {
  uint64_t seed;
  uint32_t dropped; /* of 2^32 */
  float kept_scale;
} Dropout;

static Dropout make_dropout(double p, uint64_t seed) {
  const Dropout dropout = {seed, (uint32_t)(p * 4294967296.0), (float)(1.0 / (1.0 - p))};
  return dropout;
}

/* The place of a row of scores; with the key's number it says what is dropped. */
static inline uint32_t row_hash(Dropout dropout, int head, int token) {
  const uint32_t place = hash((uint32_t)token + hash((uint32_t)head + (uint32_t)dropout.seed));
  return hash(place ^ (uint32_t)(dropout.seed >> 32));
}

/* What to multiply LANES elements of a row with, from `first` on: 0 or kept_scale. */
static inline vec keep(uint32_t row, int first, Dropout dropout) {
  static const words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  words x = row + 0x9e3779b9u * ((uint32_t)first + lane);
  HASH(x);
  const vec scale = (vec){} + dropout.kept_scale;
  return (vec)((ints)scale & (x >= dropout.dropped));
}

/* Scratch memory of one thread, handed out piece by piece, each piece aligned. */
typedef struct {
  char *next;
} Scratch;

static inline void *take(Scratch *scratch, size_t bytes) {
  void *piece = scratch->next;
  scratch->next += (bytes + 63) / 64 * 64;
  return piece;
}
