/* norm(residual + dropout(x)) and its gradients in bf16, each in one pass over the rows. See pipeline/residual_norm.py.

   The dropout mask is computed from a hash of its place, in both directions, so nothing is drawn or
   kept. Rows are taken in blocks whose number does not depend on the threads, and the sums over
   blocks are added in order: nor does the result. */

#include "simd.h"

#define ROWS 64 /* of a block */

int rows_of_a_block(void) { return ROWS; }

/* total[c] = residual[c] + dropout(x[c]), its mean, and 1 / its standard deviation. */
static inline void add_row(const bf16 *x, const bf16 *residual, int width, float eps,
                           Dropout dropout, uint32_t row, bf16 *total, float *mean, float *rstd) {
  vec sum = {}, squares = {};
  for (int c = 0; c < width; c += LANES) {
    vec value = load_bf16(x + c);
    if (dropout.dropped) value *= keep(row, c, dropout);
    store_bf16(total + c, value + load_bf16(residual + c));
    sum += load_bf16(total + c); /* what the backward pass will read */
  }
  *mean = sum_lanes(sum) / width;
  for (int c = 0; c < width; c += LANES) {
    const vec centred = load_bf16(total + c) - *mean;
    squares += centred * centred;
  }
  *rstd = 1.0f / sqrtf(sum_lanes(squares) / width + eps);
}

/* x, residual, total and out are [rows, width], width a multiple of LANES; mean and rstd [rows]. */
void residual_norm_forward(const bf16 *x, const bf16 *residual, const bf16 *weight,
                           const bf16 *bias, int rows, int width, float eps, double dropout_p,
                           uint64_t seed, bf16 *total, float *mean, float *rstd, bf16 *out,
                           int threads) {
  const Dropout dropout = make_dropout(dropout_p, seed);
#pragma omp parallel for num_threads(threads)
  for (int r = 0; r < rows; r++) {
    const int64_t at = (int64_t)r * width;
    add_row(x + at, residual + at, width, eps, dropout, row_hash(dropout, 0, r), total + at,
            mean + r, rstd + r);
    for (int c = 0; c < width; c += LANES) {
      const vec normal = (load_bf16(total + at + c) - mean[r]) * rstd[r];
      store_bf16(out + at + c, normal * load_bf16(weight + c) + load_bf16(bias + c));
    }
  }
}

/* sums is [2, blocks, width] of zeros: each block's gradients of weight and bias. */
void residual_norm_backward(const bf16 *total, const float *mean, const float *rstd,
                            const bf16 *weight, const bf16 *d_out, int rows, int width,
                            double dropout_p, uint64_t seed, bf16 *d_x, bf16 *d_residual,
                            float *sums, int threads) {
  const Dropout dropout = make_dropout(dropout_p, seed);
  const int blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads)
  for (int block = 0; block < blocks; block++) {
    float *d_weight = sums + (int64_t)block * width;
    float *d_bias = sums + (int64_t)(blocks + block) * width;
    for (int r = block * ROWS; r < rows && r < (block + 1) * ROWS; r++) {
      const int64_t at = (int64_t)r * width;
      const uint32_t row = row_hash(dropout, 0, r);
      vec sum = {}, product = {};
      for (int c = 0; c < width; c += LANES) {
        const vec normal = (load_bf16(total + at + c) - mean[r]) * rstd[r];
        const vec given = load_bf16(d_out + at + c), scaled = given * load_bf16(weight + c);
        store_unaligned(d_weight + c, load_unaligned(d_weight + c) + given * normal);
        store_unaligned(d_bias + c, load_unaligned(d_bias + c) + given);
        sum += scaled;
        product += scaled * normal;
      }
      const float of_mean = sum_lanes(sum) / width, of_variance = sum_lanes(product) / width;
      for (int c = 0; c < width; c += LANES) {
        const vec normal = (load_bf16(total + at + c) - mean[r]) * rstd[r];
        const vec scaled = load_bf16(d_out + at + c) * load_bf16(weight + c);
        vec gradient = (scaled - of_mean - normal * of_variance) * rstd[r];
        store_bf16(d_residual + at + c, gradient);
        if (dropout.dropped) gradient *= keep(row, c, dropout);
        store_bf16(d_x + at + c, gradient);
      }
    }
  }
}
