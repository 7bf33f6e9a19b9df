/* Attention within segments, forward and backward, for bf16 on CPUs with AVX512-BF16.

   Products multiply bf16 by bf16 and add up in fp32; scores, softmax and its gradient are fp32.
   Nothing larger than a block of queries x a segment exists: the backward pass computes the
   probabilities again from the log-sum-exp of each row (FlashAttention, arXiv 2205.14135), and the
   dropout mask again from a hash of its place.

   All products go through `multiply`. Its instruction takes pairs of bf16 that are adjacent along
   the summed index; a "pair matrix" holds them as uint32. Every (segment, head) writes to places of
   its own in a fixed order, so the result does not depend on the number of threads. */

#include "simd.h"

#ifdef __AVX512BF16__

#define QUERIES 32 /* rows of a block of scores */

typedef uint32_t pair;

const int supported = 1;

/* R x V vectors of the product in registers. R and V are constants where this is inlined. */
static inline __attribute__((always_inline)) void tile(const int R, const int V, int depth,
                                                       const pair *a, int a_stride, const pair *b,
                                                       int b_stride, float *c, int c_stride,
                                                       int add) {
  __m512 sum[4][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      sum[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + v * LANES) : _mm512_setzero_ps();
  for (int k = 0; k < depth; k++) {
    __m512bh row[4];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) row[v] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + v * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, row[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_ps(c + r * c_stride + v * LANES, sum[r][v]);
}

/* c [rows, columns] = a b, or += where `add`; a [rows, depth] and b [depth, columns] are pairs,
   columns a multiple of LANES. */
static void multiply(int rows, int columns, int depth, const pair *a, int a_stride, const pair *b,
                     int b_stride, float *c, int c_stride, int add) {
  for (int j = 0; j < columns;) {
    const int wide = columns - j >= 4 * LANES ? 4 : columns - j >= 2 * LANES ? 2 : 1;
    for (int i = 0; i < rows;) {
      const int tall = rows - i >= 4 ? 4 : 1;
      const pair *at = a + i * a_stride;
      float *to = c + i * c_stride + j;
#define TILE(R, V)               \
  if (tall == R && wide == V) tile(R, V, depth, at, a_stride, b + j, b_stride, to, c_stride, add)
      TILE(4, 4);
      TILE(4, 2);
      TILE(4, 1);
      TILE(1, 4);
      TILE(1, 2);
      TILE(1, 1);
      i += tall;
    }
    j += wide * LANES;
  }
}

/* x [n, d] -> pairs along d, transposed: [d / 2, padded], zero beyond n. */
static void pair_channels(const bf16 *x, int64_t stride, int n, int d, int padded, pair *pairs) {
  for (int c = 0; c < d / 2; c++)
    for (int j = n; j < padded; j++) pairs[c * padded + j] = 0;
  for (int j = 0; j < n; j++)
    for (int c = 0; c < d / 2; c++)
      memcpy(pairs + c * padded + j, x + j * stride + 2 * c, sizeof(pair));
}

/* x [n, d] -> pairs along tokens: [padded / 2, d], zero beyond n. */
static void pair_tokens(const bf16 *x, int64_t stride, int n, int d, int padded, pair *pairs) {
  for (int j = 0; j < padded; j += 2) {
    const bf16 *even = x + j * stride, *odd = even + stride;
    pair *to = pairs + j / 2 * d;
    for (int c = 0; c < d; c++)
      to[c] = (j < n ? even[c] : 0u) | (j + 1 < n ? (pair)odd[c] << 16 : 0u);
  }
}

/* x [n, d] -> pairs along tokens, transposed: [d, padded / 2], zero beyond n. */
static void pair_tokens_transposed(const bf16 *x, int64_t stride, int n, int d, int padded,
                                   pair *pairs) {
  for (int j = 0; j < padded; j += 2) {
    const bf16 *even = x + j * stride, *odd = even + stride;
    for (int c = 0; c < d; c++)
      pairs[c * (padded / 2) + j / 2] =
          (j < n ? even[c] : 0u) | (j + 1 < n ? (pair)odd[c] << 16 : 0u);
  }
}

/* Two rows of floats -> a row of pairs. */
static void pair_rows(const float *even, const float *odd, int n, pair *pairs) {
  for (int j = 0; j < n; j += LANES) {
    const words low = __builtin_convertvector(rounded(load(even + j)), words);
    const words high = __builtin_convertvector(rounded(load(odd + j)), words);
    store((float *)pairs + j, (vec)(low | high << 16));
  }
}

int attention_forward(const bf16 *query, const bf16 *key, const bf16 *value, int64_t stride,
                      const int32_t *bounds, int segments, int heads, int d, int longest,
                      float scale, double dropout_p, uint64_t seed, bf16 *out, float *lse,
                      int threads) {
  int failed = 0;
  const Dropout dropout = make_dropout(dropout_p, seed);
  const int widest = round_up(longest, LANES);
  const size_t size = sizeof(pair) * widest * d + (sizeof(float) + sizeof(bf16)) * QUERIES * widest
                      + sizeof(float) * QUERIES * (d + 1) + 64 * 8;
#pragma omp parallel num_threads(threads)
  {
    char *memory = aligned_alloc(64, round_up(size, 64));
    if (memory == NULL)
#pragma omp atomic write
      failed = 1;
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int segment = 0; segment < segments; segment++)
      for (int head = 0; head < heads; head++) {
        const int first = bounds[segment], n = bounds[segment + 1] - first;
        if (memory == NULL || n == 0) continue;
        Scratch scratch = {memory};
        const int padded = round_up(n, LANES);
        const int64_t at = first * stride + head * d, width = (int64_t)heads * d;
        pair *keys = take(&scratch, sizeof(pair) * padded * d / 2);
        pair *values = take(&scratch, sizeof(pair) * padded * d / 2);
        float *scores = take(&scratch, sizeof(float) * QUERIES * padded);
        bf16 *weights = take(&scratch, sizeof(bf16) * QUERIES * padded);
        float *sums = take(&scratch, sizeof(float) * QUERIES * d);
        float reciprocal[QUERIES];
        pair_channels(key + at, stride, n, d, padded, keys);
        pair_tokens(value + at, stride, n, d, padded, values);
        for (int i = 0; i < n; i += QUERIES) {
          const int rows = n - i < QUERIES ? n - i : QUERIES;
          multiply(rows, padded, d / 2, (const pair *)(query + at + i * stride), stride / 2, keys,
                   padded, scores, padded, 0);
          for (int r = 0; r < rows; r++) {
            float *restrict s = ALIGNED(scores + r * padded);
            for (int j = n; j < padded; j++) s[j] = LOWEST;
            vec maxima = (vec){} + LOWEST, sums_of_lanes = {};
            for (int j = 0; j < padded; j += LANES) maxima = larger(maxima, load(s + j));
            const float largest = largest_lane(maxima);
            const uint32_t row = row_hash(dropout, head, first + i + r);
            for (int j = 0; j < padded; j += LANES) {
              vec weight = exp_of_negative((load(s + j) - largest) * scale);
              sums_of_lanes += weight;
              if (dropout.dropped) weight *= keep(row, j, dropout);
              store_bf16(weights + r * padded + j, weight);
            }
            const float sum = sum_lanes(sums_of_lanes);
            reciprocal[r] = 1.0f / sum;
            if (lse != NULL)
              lse[(int64_t)(first + i + r) * heads + head] = largest * scale + logf(sum);
          }
          multiply(rows, d, padded / 2, (const pair *)weights, padded / 2, values, d, sums, d, 0);
          for (int r = 0; r < rows; r++) {
            bf16 *row = out + (first + i + r) * width + head * d;
            for (int c = 0; c < d; c += LANES)
              store_bf16(row + c, load(sums + r * d + c) * reciprocal[r]);
          }
        }
      }
    free(memory);
  }
  return failed;
}

int attention_backward(const bf16 *query, const bf16 *key, const bf16 *value, int64_t stride,
                       const int32_t *bounds, int segments, int heads, int d, int longest,
                       float scale, double dropout_p, uint64_t seed, const bf16 *out,
                       const float *lse, const bf16 *d_out, bf16 *d_query, bf16 *d_key,
                       bf16 *d_value, int threads) {
  int failed = 0;
  const Dropout dropout = make_dropout(dropout_p, seed);
  const int widest = round_up(longest, QUERIES);
  const size_t size = sizeof(pair) * widest * d / 2 * 5 + sizeof(float) * 2 * widest * d
                      + sizeof(float) * 2 * QUERIES * widest + sizeof(bf16) * QUERIES * widest
                      + sizeof(pair) * QUERIES * widest + sizeof(float) * QUERIES * d + 64 * 16;
#pragma omp parallel num_threads(threads)
  {
    char *memory = aligned_alloc(64, round_up(size, 64));
    if (memory == NULL)
#pragma omp atomic write
      failed = 1;
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int segment = 0; segment < segments; segment++)
      for (int head = 0; head < heads; head++) {
        const int first = bounds[segment], n = bounds[segment + 1] - first;
        if (memory == NULL || n == 0) continue;
        Scratch scratch = {memory};
        const int padded = round_up(n, LANES), all_rows = round_up(n, QUERIES);
        const int64_t at = first * stride + head * d, width = (int64_t)heads * d;
        const int64_t to = first * width + head * d;
        const size_t half = sizeof(pair) * padded * d / 2, half_rows = sizeof(pair) * all_rows * d / 2;
        pair *keys = take(&scratch, half), *values = take(&scratch, half);
        pair *key_rows = take(&scratch, half);
        pair *queries_t = take(&scratch, half_rows), *d_out_t = take(&scratch, half_rows);
        float *d_keys = take(&scratch, sizeof(float) * padded * d);
        float *d_values = take(&scratch, sizeof(float) * padded * d);
        float *p = take(&scratch, sizeof(float) * QUERIES * padded);
        float *g = take(&scratch, sizeof(float) * QUERIES * padded);
        bf16 *g_rows = take(&scratch, sizeof(bf16) * QUERIES * padded);
        pair *g_pairs = take(&scratch, sizeof(pair) * QUERIES / 2 * padded);
        pair *p_pairs = take(&scratch, sizeof(pair) * QUERIES / 2 * padded);
        float *sums = take(&scratch, sizeof(float) * QUERIES * d);
        pair_channels(key + at, stride, n, d, padded, keys);
        pair_channels(value + at, stride, n, d, padded, values);
        pair_tokens(key + at, stride, n, d, padded, key_rows);
        pair_tokens_transposed(query + at, stride, n, d, all_rows, queries_t);
        pair_tokens_transposed(d_out + to, width, n, d, all_rows, d_out_t);
        for (int i = 0; i < n; i += QUERIES) {
          const int rows = n - i < QUERIES ? n - i : QUERIES, even_rows = round_up(rows, 2);
          multiply(rows, padded, d / 2, (const pair *)(query + at + i * stride), stride / 2, keys,
                   padded, p, padded, 0);
          multiply(rows, padded, d / 2, (const pair *)(d_out + to + i * width), width / 2, values,
                   padded, g, padded, 0);
          for (int r = 0; r < rows; r++) {
            float *restrict pr = ALIGNED(p + r * padded), *restrict gr = ALIGNED(g + r * padded);
            const int64_t token = first + i + r;
            const bf16 *o = out + token * width + head * d, *d_o = d_out + token * width + head * d;
            const float normaliser = lse[token * heads + head];
            vec products = {};
            for (int c = 0; c < d; c += LANES) products += load_bf16(o + c) * load_bf16(d_o + c);
            const float delta = sum_lanes(products); /* sum_j weight_ij dweight_ij = out_i . d_out_i */
            for (int j = n; j < padded; j++) pr[j] = LOWEST;
            const uint32_t row = row_hash(dropout, head, (int)token);
            for (int j = 0; j < padded; j += LANES) {
              const vec x = load(pr + j) * scale - normaliser;
              const vec weight = exp_of_negative(-larger(-x, (vec){}));
              const vec kept = dropout.dropped ? keep(row, j, dropout) : (vec){} + 1.0f;
              const vec gradient = weight * (load(gr + j) * kept - delta);
              store(gr + j, gradient);
              store(pr + j, weight * kept);
              store_bf16(g_rows + r * padded + j, gradient);
            }
          }
          if (even_rows > rows) {
            memset(p + rows * padded, 0, sizeof(float) * padded);
            memset(g + rows * padded, 0, sizeof(float) * padded);
          }
          for (int r = 0; r < even_rows; r += 2) {
            pair_rows(p + r * padded, p + (r + 1) * padded, padded, p_pairs + r / 2 * padded);
            pair_rows(g + r * padded, g + (r + 1) * padded, padded, g_pairs + r / 2 * padded);
          }
          multiply(rows, d, padded / 2, (const pair *)g_rows, padded / 2, key_rows, d, sums, d, 0);
          for (int r = 0; r < rows; r++) {
            bf16 *row = d_query + to + (i + r) * width;
            for (int c = 0; c < d; c += LANES) store_bf16(row + c, load(sums + r * d + c) * scale);
          }
          multiply(d, padded, even_rows / 2, queries_t + i / 2, all_rows / 2, g_pairs, padded,
                   d_keys, padded, i > 0);
          multiply(d, padded, even_rows / 2, d_out_t + i / 2, all_rows / 2, p_pairs, padded,
                   d_values, padded, i > 0);
        }
        for (int j = 0; j < n; j++) {
          float *restrict k = sums, *restrict v = sums + d; /* QUERIES rows are free by now */
          for (int c = 0; c < d; c++) {
            k[c] = scale * d_keys[c * padded + j];
            v[c] = d_values[c * padded + j];
          }
          for (int c = 0; c < d; c += LANES) {
            store_bf16(d_key + to + j * width + c, load(k + c));
            store_bf16(d_value + to + j * width + c, load(v + c));
          }
        }
      }
    free(memory);
  }
  return failed;
}
#else
const int supported = 0;
#endif
