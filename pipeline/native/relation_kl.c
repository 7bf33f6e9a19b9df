/* The relation loss and its gradient, a few queries at a time, for CPUs. See pipeline/relation_kl/native.py.

   Their scores stay in the first-level cache from the product to the gradient, so nothing of
   size n x n exists. Channels of a segment are laid out along its tokens, hence every inner loop
   runs over adjacent keys and the compiler vectorises it. Rows end in padding up to a multiple of
   LANES, whose scores are so low that their probability is nothing.

   Every (head, segment) writes to places of its own and sums in a fixed order: the result does not
   depend on the number of threads. */

#include "simd.h"

#define QUERIES 4  /* rows of scores at a time, so that what is read of the keys serves all */
#define CHANNELS 4 /* channels that one sweep over the keys takes in, to save loads and stores */

/* vectors [n, width], head's columns -> channels [depth][padded], zero beyond n and beyond d. */
static void lay_out(const float *vectors, int width, int d, int n, int padded, int depth,
                    float *channels) {
  memset(channels, 0, sizeof(float) * depth * padded);
  for (int j = 0; j < n; j++)
    for (int c = 0; c < d; c++) channels[c * padded + j] = vectors[(int64_t)j * width + c];
}

/* scores[r][j] = scale * sum_c query[c][r] keys[c][j] for QUERIES rows; LOWEST in the padding. */
static void score(const float *query, const float *keys, int depth, int n, int padded, float scale,
                  float *restrict scores) {
  float *restrict out = ALIGNED(scores);
  for (int c = 0; c < depth; c += CHANNELS) {
    float q[CHANNELS][QUERIES];
    for (int b = 0; b < CHANNELS; b++)
      for (int r = 0; r < QUERIES; r++) q[b][r] = scale * query[(c + b) * padded + r];
    const float *k0 = ALIGNED(keys + c * padded), *k1 = ALIGNED(k0 + padded);
    const float *k2 = ALIGNED(k1 + padded), *k3 = ALIGNED(k2 + padded);
    if (c == 0) memset(out, 0, sizeof(float) * QUERIES * padded);
    for (int r = 0; r < QUERIES; r++) {
      float *restrict row = ALIGNED(out + r * padded);
      const float q0 = q[0][r], q1 = q[1][r], q2 = q[2][r], q3 = q[3][r];
#pragma omp simd
      for (int j = 0; j < padded; j++)
        row[j] += q0 * k0[j] + q1 * k1[j] + (q2 * k2[j] + q3 * k3[j]);
    }
  }
  for (int r = 0; r < QUERIES; r++)
    for (int j = n; j < padded; j++) out[r * padded + j] = LOWEST;
}

/* Sets e[j] = exp(s[j] - max s) and returns log(sum exp s) with the reciprocal of sum e. */
static float exponentials(const float *scores, float *restrict exponentials, int padded,
                          float *reciprocal) {
  const float *restrict s = ALIGNED(scores);
  float *restrict e = ALIGNED(exponentials);
  float largest = LOWEST, sum = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int j = 0; j < padded; j++) largest = s[j] > largest ? s[j] : largest;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < padded; j++) {
    e[j] = exp_of_negative(s[j] - largest);
    sum += e[j];
  }
  *reciprocal = 1.0f / sum;
  return largest + logf(sum);
}

/* gradient_x[c][r] += sum_j g[r][j] y[c][j] and gradient_y[c][j] += sum_r g[r][j] x[c][r]. */
static void add_gradients(const float *restrict g, const float *x, const float *y, int depth,
                          int padded, float *gradient_x, float *gradient_y) {
  const float *restrict g0 = ALIGNED(g), *restrict g1 = ALIGNED(g + padded);
  const float *restrict g2 = ALIGNED(g + 2 * padded), *restrict g3 = ALIGNED(g + 3 * padded);
  for (int c = 0; c < depth; c++) {
    const float *restrict key = ALIGNED(y + c * padded);
    float *restrict of_keys = ALIGNED(gradient_y + c * padded);
    const float *query = x + c * padded;
    const float q0 = query[0], q1 = query[1], q2 = query[2], q3 = query[3];
    float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int j = 0; j < padded; j++) {
      sum0 += g0[j] * key[j];
      sum1 += g1[j] * key[j];
      sum2 += g2[j] * key[j];
      sum3 += g3[j] * key[j];
      of_keys[j] += g0[j] * q0 + g1[j] * q1 + (g2[j] * q2 + g3[j] * q3);
    }
    float *of_queries = gradient_x + c * padded;
    of_queries[0] += sum0;
    of_queries[1] += sum1;
    of_queries[2] += sum2;
    of_queries[3] += sum3;
  }
}

/* One head of one segment: adds to the gradients' channels, returns the sum of its rows' KL. */
static double segment_kl(const float *x, const float *y, const float *teacher_x,
                         const float *teacher_y, int depth, int teacher_depth, int n, int padded,
                         float scale, float teacher_scale, float *gradient_x, float *gradient_y,
                         float *rows) {
  float *scores = rows, *teacher_scores = scores + QUERIES * padded;
  float *gradients = teacher_scores + QUERIES * padded;
  float *restrict p = ALIGNED(gradients + QUERIES * padded);
  double total = 0.0;
  for (int i = 0; i < n; i += QUERIES) { /* vectors beyond n are zero */
    score(x + i, y, depth, n, padded, scale, scores);
    score(teacher_x + i, teacher_y, teacher_depth, n, padded, teacher_scale, teacher_scores);
    for (int r = 0; r < QUERIES; r++) {
      float *restrict s = ALIGNED(scores + r * padded);
      float *restrict t = ALIGNED(teacher_scores + r * padded);
      float *restrict g = ALIGNED(gradients + r * padded);
      if (i + r >= n) {
        memset(g, 0, sizeof(float) * padded);
        continue;
      }
      float of_student, of_teacher, kl = 0.0f;
      const float normaliser = exponentials(s, g, padded, &of_student);
      const float teacher_normaliser = exponentials(t, p, padded, &of_teacher);
#pragma omp simd reduction(+ : kl)
      for (int j = 0; j < padded; j++) {
        const float target = of_teacher * p[j];
        kl += target * ((t[j] - teacher_normaliser) - (s[j] - normaliser));
        g[j] = of_student * g[j] - target;
      }
      total += kl;
    }
    if (gradient_x != NULL)
      add_gradients(gradients, x + i, y, depth, padded, gradient_x + i, gradient_y);
  }
  return total;
}

static void lay_back(const float *channels, int padded, int d, int n, int width, float scale,
                     float *vectors) {
  for (int j = 0; j < n; j++)
    for (int c = 0; c < d; c++) vectors[(int64_t)j * width + c] = scale * channels[c * padded + j];
}

/* See pipeline/relation_kl/native.py. student, teacher and gradients are [T, heads * d]; the keys may be NULL where they
   are the queries; the gradients may be NULL. kl is [segments, heads]. Returns 0, or 1 where memory
   is short. */
int relation_kl(const float *student, const float *student_keys, const float *teacher,
                const float *teacher_keys, const int32_t *bounds, int segments, int heads,
                int student_d, int teacher_d, float gradient_scale, float *gradient,
                float *gradient_keys, double *kl, int threads) {
  int longest = 0, failed = 0;
  for (int i = 0; i < segments; i++)
    longest = bounds[i + 1] - bounds[i] > longest ? bounds[i + 1] - bounds[i] : longest;
  const int depth = round_up(student_d, CHANNELS), teacher_depth = round_up(teacher_d, CHANNELS);
  const size_t row = round_up(longest, LANES);
  const size_t size = sizeof(float) * row * (3 * QUERIES + 1 + 4 * depth + 2 * teacher_depth);
  const float scale = 1.0f / sqrtf(student_d), teacher_scale = 1.0f / sqrtf(teacher_d);
#pragma omp parallel num_threads(threads)
  {
    float *memory = aligned_alloc(64, (size + 63) / 64 * 64);
    if (memory == NULL)
#pragma omp atomic write
      failed = 1;
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int segment = 0; segment < segments; segment++)
      for (int head = 0; head < heads; head++) {
        const int n = bounds[segment + 1] - bounds[segment];
        if (memory == NULL || n == 0) continue;
        const int padded = round_up(n, LANES);
        const int student_width = heads * student_d, teacher_width = heads * teacher_d;
        const int64_t at = (int64_t)bounds[segment] * student_width + head * student_d;
        const int64_t teacher_at = (int64_t)bounds[segment] * teacher_width + head * teacher_d;
        float *x = memory, *y = x, *gx = x + depth * padded, *gy = gx;
        float *rest = gx + depth * padded;
        lay_out(student + at, student_width, student_d, n, padded, depth, x);
        if (student_keys != NULL) {
          y = rest, gy = y + depth * padded, rest = gy + depth * padded;
          lay_out(student_keys + at, student_width, student_d, n, padded, depth, y);
          memset(gy, 0, sizeof(float) * depth * padded);
        }
        memset(gx, 0, sizeof(float) * depth * padded);
        float *tx = rest, *ty = tx;
        rest = tx + teacher_depth * padded;
        lay_out(teacher + teacher_at, teacher_width, teacher_d, n, padded, teacher_depth, tx);
        if (teacher_keys != NULL) {
          ty = rest, rest = ty + teacher_depth * padded;
          lay_out(teacher_keys + teacher_at, teacher_width, teacher_d, n, padded, teacher_depth,
                  ty);
        }
        kl[segment * heads + head] =
            segment_kl(x, y, tx, ty, depth, teacher_depth, n, padded, scale, teacher_scale,
                       gradient == NULL ? NULL : gx, gy, rest);
        if (gradient != NULL)
          lay_back(gx, padded, student_d, n, student_width, scale * gradient_scale, gradient + at);
        if (gradient_keys != NULL)
          lay_back(gy, padded, student_d, n, student_width, scale * gradient_scale,
                   gradient_keys + at);
      }
    free(memory);
  }
  return failed;
}
