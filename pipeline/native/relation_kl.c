/* The relation loss and its gradient, a few queries at a time, for CPUs. See pipeline/relation_kl/native.py.

   Their scores stay in the first-level cache from the product to the gradient, so nothing of
   size n x n exists. Channels of a segment are laid out along its tokens, hence every inner loop
   runs over vectors of adjacent keys. Rows end in padding up to a multiple of
   LANES, whose scores are so low that their probability is nothing.

   Every (head, segment) writes to places of its own and sums in a fixed order: the result does not
   depend on the number of threads. */

#include "simd.h"

#define QUERIES 4  /* rows of scores at a time, so that what is read of the keys serves all */
#define CHANNELS 4 /* of the gradient at a time: with QUERIES as many sums as there are LANES */

/* vectors [n, width], head's columns -> channels [depth][padded], zero beyond n and beyond d. */
static void lay_out(const float *vectors, int width, int d, int n, int padded, int depth,
                    float *channels) {
  memset(channels, 0, sizeof(float) * depth * padded);
  for (int j = 0; j < n; j++)
    for (int c = 0; c < d; c++) channels[c * padded + j] = vectors[(int64_t)j * width + c];
}

/* scores[r][j] = scale * sum_c query[c][r] keys[c][j] + absent[j] for QUERIES rows.
   Sets `largest` to what is largest in each lane. */
static inline void score(const float *query, const float *keys, const float *absent, int depth,
                         int padded, float scale, float *scores, vec largest[QUERIES]) {
  vec maxima[QUERIES];
  UNROLLED for (int r = 0; r < QUERIES; r++) maxima[r] = (vec){} + LOWEST;
  for (int j = 0; j < padded; j += LANES) {
    vec sum[QUERIES] = {}, odd[QUERIES] = {}; /* two sums: additions that need not wait */
    for (int c = 0; c < depth; c += 2) {
      const float *at = keys + c * padded + j, *q = query + c * padded;
      const vec key = load(at), next = load(at + padded);
      UNROLLED for (int r = 0; r < QUERIES; r++) sum[r] += key * q[r];
      UNROLLED for (int r = 0; r < QUERIES; r++) odd[r] += next * q[padded + r];
    }
    const vec lowest = load(absent + j);
    UNROLLED for (int r = 0; r < QUERIES; r++) {
      sum[r] = (sum[r] + odd[r]) * scale + lowest;
      store(scores + r * padded + j, sum[r]);
      maxima[r] = larger(maxima[r], sum[r]);
    }
  }
  UNROLLED for (int r = 0; r < QUERIES; r++) largest[r] = maxima[r];
}

/* gradient_x[c][r] += sum_j g[r][j] y[c][j] and gradient_y[c][j] += sum_r g[r][j] x[c][r]. */
static inline void add_gradients(const float *g, const float *x, const float *y, int depth,
                                 int padded, float *gradient_x, float *gradient_y) {
  for (int c = 0; c < depth; c += CHANNELS) {
    vec of_queries[CHANNELS * QUERIES] = {};
    for (int j = 0; j < padded; j += LANES) {
      vec row[QUERIES];
      UNROLLED for (int r = 0; r < QUERIES; r++) row[r] = load(g + r * padded + j);
      UNROLLED for (int b = 0; b < CHANNELS; b++) {
        const float *query = x + (c + b) * padded;
        float *of_keys = gradient_y + (c + b) * padded + j;
        const vec key = load(y + (c + b) * padded + j);
        vec sum = load(of_keys);
        UNROLLED for (int r = 0; r < QUERIES; r++) {
          of_queries[b * QUERIES + r] += row[r] * key;
          sum += row[r] * query[r];
        }
        store(of_keys, sum);
      }
    }
    const vec sums = sum_each(of_queries);
    for (int b = 0; b < CHANNELS; b++)
      for (int r = 0; r < QUERIES; r++) gradient_x[(c + b) * padded + r] += sums[b * QUERIES + r];
  }
}

/* One head of one segment: adds to the gradients' channels, returns the sum of its rows' KL. */
static double segment_kl(const float *x, const float *y, const float *teacher_x,
                         const float *teacher_y, int depth, int teacher_depth, int n, int padded,
                         float scale, float teacher_scale, float *gradient_x, float *gradient_y,
                         float *rows) {
  float *scores = rows, *targets = scores + QUERIES * padded, *absent = targets + QUERIES * padded;
  for (int j = 0; j < padded; j++) absent[j] = j < n ? 0.0f : LOWEST;
  double total = 0.0;
  /* Queries beyond n are zero: both their distributions are uniform, so they add nothing. */
  for (int i = 0; i < n; i += QUERIES) {
    vec largest[LANES] = {};
    score(x + i, y, absent, depth, padded, scale, scores, largest);
    score(teacher_x + i, teacher_y, absent, teacher_depth, padded, teacher_scale, targets,
          largest + QUERIES);
    const vec maxima = largest_each(largest);

    /* With a = s - max s and b = t - max t: KL = sum e^b (b - a) / sum e^b - log sum e^b + log sum e^a. */
    vec sums[LANES] = {};
    for (int r = 0; r < QUERIES; r++) {
      vec student_sum = {}, teacher_sum = {}, product = {};
      for (int j = 0; j < padded; j += LANES) {
        float *s = scores + r * padded + j, *t = targets + r * padded + j;
        const vec a = load(s) - maxima[r], b = load(t) - maxima[QUERIES + r];
        const vec of_student = exp_of_negative(a), of_teacher = exp_of_negative(b);
        store(s, of_student);
        store(t, of_teacher);
        student_sum += of_student;
        teacher_sum += of_teacher;
        product += of_teacher * (b - a);
      }
      sums[r] = student_sum, sums[QUERIES + r] = teacher_sum, sums[2 * QUERIES + r] = product;
    }
    const vec sum = sum_each(sums);
    for (int r = 0; r < QUERIES; r++) {
      const float of_student = sum[r], of_teacher = sum[QUERIES + r];
      total += sum[2 * QUERIES + r] / of_teacher + logf(of_student / of_teacher);
      if (gradient_x == NULL) continue;
      const float student_share = 1.0f / of_student, teacher_share = 1.0f / of_teacher;
      for (int j = 0; j < padded; j += LANES) {
        float *g = scores + r * padded + j;
        store(g, load(g) * student_share - load(targets + r * padded + j) * teacher_share);
      }
    }
    if (gradient_x != NULL)
      add_gradients(scores, x + i, y, depth, padded, gradient_x + i, gradient_y);
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
  const size_t size = sizeof(float) * row * (2 * QUERIES + 1 + 4 * depth + 2 * teacher_depth);
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
