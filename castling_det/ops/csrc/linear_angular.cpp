// Linear-angular attention and the local convolution in two passes over a packed projection, for inference on a CPU.
//
// The plain operations of castling_det.ops.linear_angular write each intermediate to memory; here a block of tokens stays in
// the caches from its norms to its output. Shapes as there: qkv (B, N, 3, H, K), kv (B, H, K, K), out (B, N, H, K).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 64;  // tokens: their keys, values and outputs of one head fit the first cache
constexpr float kEps = 1e-12f;  // castling_det.ops.EPS
constexpr float kPi = 3.14159265358979323846f;

// As many floats as the widest registers hold; the compiler splits it where registers are narrower.
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }

inline float dot(const float* a, const float* b, int64_t size) {
  Vec sum{};
  for (int64_t i = 0; i < size; i += kLanes) sum += load(a + i) * load(b + i);
  // By halves: one after the other, the additions would wait for each other.
  float parts[kLanes];
  store(parts, sum);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// castling_det.ops.numerics.length_of
inline float length_of(float norm, float eps) { return norm > eps ? norm : 1.0f; }

// Rows x (kVecs * kLanes) of c += a b, where a[row, step] lies at a[row * a_row + step * a_step].
template <int kRows, int kVecs>
inline void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
                 int64_t steps) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(c + r * c_row + v * kLanes);
  for (int64_t s = 0; s < steps; ++s) {
    Vec column[kVecs];
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + s * b_step + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(a[r * a_row + s * a_step]);
      for (int v = 0; v < kVecs; ++v) sum[r][v] += factor * column[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
}

template <int kVecs>
inline void columns(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c,
                    int64_t c_row, int64_t rows, int64_t steps) {
#ifdef __AVX512F__
  constexpr int kRows = 8;  // 16 of 32 registers hold sums
#else
  constexpr int kRows = 2;
#endif
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    tile<kRows, kVecs>(a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row, steps);
  for (; r < rows; ++r) tile<1, kVecs>(a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row, steps);
}

// c (rows, cols) += a b; cols is a multiple of kLanes.
inline void add_product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c,
                        int64_t c_row, int64_t rows, int64_t steps, int64_t cols) {
  int64_t col = 0;
  for (; col + 2 * kLanes <= cols; col += 2 * kLanes)
    columns<2>(a, a_row, a_step, b + col, b_step, c + col, c_row, rows, steps);
  for (; col < cols; col += kLanes) columns<1>(a, a_row, a_step, b + col, b_step, c + col, c_row, rows, steps);
}

struct Sizes {
  int64_t batch, tokens, heads, width, height, columns, kernel;
  int64_t dim() const { return heads * width; }
  int64_t row() const { return 3 * dim(); }
  int64_t prefix() const { return tokens - height * columns; }
  // Of one head: k^T v, then the sum of the keys, then that of the values.
  int64_t state() const { return width * (width + 2); }
};

// Adds the keys and values of tokens [begin, end) of an image to the states of all heads.
void gather(const Sizes& s, const float* image, int64_t begin, int64_t end, bool unit, float* states) {
  std::vector<float> scaled(kBlock * s.width);
  const float factor = 1.0f / (kPi * static_cast<float>(s.tokens));
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t h = 0; h < s.heads; ++h) {
      float* state = states + h * s.state();
      const float* keys = image + first * s.row() + s.dim() + h * s.width;
      const float* values = keys + s.dim();
      for (int64_t t = 0; t < count; ++t) {
        const float* key = keys + t * s.row();
        const Vec scale = splat(factor / length_of(std::sqrt(dot(key, key, s.width)), kEps));
        for (int64_t i = 0; i < s.width; i += kLanes) store(&scaled[t * s.width + i], load(key + i) * scale);
      }
      add_product(scaled.data(), 1, s.width, values, s.row(), state, s.width, s.width, count, s.width);
      if (unit) continue;
      float* key_sum = state + s.width * s.width;
      float* value_sum = key_sum + s.width;
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < s.width; i += kLanes) {
          store(key_sum + i, load(key_sum + i) + load(&scaled[t * s.width + i]));
          store(value_sum + i, load(value_sum + i) + load(values + t * s.row() + i));
        }
    }
  }
}

// Adds the k x k convolution of the values around one token to out, for the channels of one head.
inline void add_local(const Sizes& s, const float* image, const float* taps, int64_t token, int64_t h, float* out) {
  const int64_t place = token - s.prefix();
  if (place < 0) return;
  const int64_t y = place / s.columns, x = place % s.columns, half = s.kernel / 2;
  const float* values = image + s.prefix() * s.row() + 2 * s.dim() + h * s.width;
  for (int64_t i = 0; i < s.width; i += kLanes) {
    Vec sum = load(out + i);
    for (int64_t v = std::max<int64_t>(0, y - half); v <= std::min(s.height - 1, y + half); ++v)
      for (int64_t u = std::max<int64_t>(0, x - half); u <= std::min(s.columns - 1, x + half); ++u) {
        const int64_t tap = (v - y + half) * s.kernel + (u - x + half);
        sum += load(taps + tap * s.dim() + h * s.width + i) * load(values + (v * s.columns + u) * s.row() + i);
      }
    store(out + i, sum);
  }
}

// Writes the outputs of tokens [first, first + count) of an image.
void attend(const Sizes& s, const float* image, const float* states, const float* taps, int64_t first, int64_t count,
            bool unit, float* out) {
  const float per_token = 1.0f / static_cast<float>(s.tokens);
  float lengths[kBlock];
  for (int64_t h = 0; h < s.heads; ++h) {
    const float* state = states + h * s.state();
    const float* key_sum = state + s.width * s.width;
    const float* queries = image + first * s.row() + h * s.width;
    const float* values = queries + 2 * s.dim();
    float* totals = out + first * s.dim() + h * s.width;
    for (int64_t t = 0; t < count; ++t) {
      const float* query = queries + t * s.row();
      lengths[t] = length_of(std::sqrt(dot(query, query, s.width)), kEps);
      const float* constant = unit ? values + t * s.row() : key_sum + s.width;
      const Vec weight = splat(0.5f * per_token * lengths[t]);
      for (int64_t i = 0; i < s.width; i += kLanes) store(totals + t * s.dim() + i, load(constant + i) * weight);
    }
    add_product(queries, s.row(), 1, state, s.width, totals, s.dim(), count, s.width, s.width);
    for (int64_t t = 0; t < count; ++t) {
      float* total = totals + t * s.dim();
      const float divisor = unit ? length_of(std::sqrt(dot(total, total, s.width)), lengths[t] * kEps * per_token)
                                 : dot(queries + t * s.row(), key_sum, s.width) + 0.5f * lengths[t];
      const Vec factor = splat(1.0f / divisor);
      for (int64_t i = 0; i < s.width; i += kLanes) store(total + i, load(total + i) * factor);
      if (taps) add_local(s, image, taps, first + t, h, total);
    }
  }
}

std::vector<float> transposed(const at::Tensor& weight, int64_t taps) {
  const float* source = weight.const_data_ptr<float>();
  const int64_t dim = weight.size(0);
  std::vector<float> result(dim * taps);
  for (int64_t c = 0; c < dim; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) result[tap * dim + c] = source[c * taps + tap];
  return result;
}

at::Tensor linear_angular(const at::Tensor& qkv, const std::optional<at::Tensor>& weight, int64_t heads, int64_t height,
                          int64_t columns, bool unit) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.is_contiguous() && qkv.scalar_type() == at::kFloat,
              "qkv: expected a contiguous float32 (B, N, 3 * C)");
  Sizes s{qkv.size(0), qkv.size(1), heads, qkv.size(2) / (3 * heads), height, columns, 0};
  TORCH_CHECK(s.width % kLanes == 0 && qkv.size(2) == s.row() && s.prefix() >= 0,
              "qkv: expected channels of a head in multiples of ", kLanes, " and at least height * width tokens");
  std::vector<float> taps;
  if (weight.has_value()) {
    TORCH_CHECK(weight->dim() == 4 && weight->size(0) == s.dim() && weight->size(1) == 1 && weight->is_contiguous() &&
                    weight->scalar_type() == at::kFloat && weight->size(2) == weight->size(3) && weight->size(2) % 2,
                "weight: expected a contiguous float32 (C, 1, k, k), k odd");
    s.kernel = weight->size(2);
    taps = transposed(*weight, s.kernel * s.kernel);
  }
  const float* input = qkv.const_data_ptr<float>();
  at::Tensor out = at::empty({s.batch, s.tokens, s.dim()}, qkv.options());
  float* output = out.mutable_data_ptr<float>();

  // Each thread sums its own part of an image; the parts are added up in their order, so that a number of threads
  // decides the result to the last bit.
  const int64_t blocks = (s.tokens + kBlock - 1) / kBlock;
  const int64_t parts = std::clamp<int64_t>((at::get_num_threads() + s.batch - 1) / std::max<int64_t>(s.batch, 1), 1, blocks);
  const int64_t all_heads = s.heads * s.state();
  at::Tensor states = at::zeros({s.batch, parts, all_heads}, qkv.options());
  float* state = states.mutable_data_ptr<float>();
  at::parallel_for(0, s.batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts, per_part = (blocks + parts - 1) / parts * kBlock;
      const int64_t first = std::min(part * per_part, s.tokens);
      gather(s, input + item / parts * s.tokens * s.row(), first, std::min(first + per_part, s.tokens), unit,
             state + item * all_heads);
    }
  });
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < all_heads; i += kLanes) {
        float* sum = state + b * parts * all_heads + i;
        store(sum, load(sum) + load(sum + part * all_heads));
      }
  at::parallel_for(0, s.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * kBlock;
      attend(s, input + b * s.tokens * s.row(), state + b * parts * all_heads, taps.empty() ? nullptr : taps.data(), first,
             std::min(kBlock, s.tokens - first), unit, output + b * s.tokens * s.dim());
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(castling_det, m) {
  m.def("linear_angular(Tensor qkv, Tensor? weight, int num_heads, int height, int width, bool unit) -> Tensor");
}
TORCH_LIBRARY_IMPL(castling_det, CPU, m) { m.impl("linear_angular", &linear_angular); }
