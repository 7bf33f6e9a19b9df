/* What the kernels share. Loops are written so that the compiler vectorises them: adjacent
   elements, rows padded to LANES and aligned, reductions marked. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16 /* floats of the widest vector registers */
#define LOWEST -1e30f
#define ALIGNED(p) __builtin_assume_aligned(p, 64)

static inline int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/* exp(x) for x <= 0 within 2 units in the last place. Below -80 it is 0: what is divided by a sum
   of such terms would leave the range of normal numbers, where processors are many times slower. */
static inline float exp_of_negative(float x) {
  const float n = rintf((x < -80.0f ? -80.0f : x) * 1.44269504088896341f);
  const float r = fmaf(n, -1.42860682030941723e-6f, fmaf(n, -0.693145751953125f, x));
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -80.0f ? 0.0f : p * power;
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
