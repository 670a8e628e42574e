#pragma once

// What trie attention multiplies: a node's rows, its keys and values, and who sees whom. Include where avx512.h may be.

#include "avx512.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "trie_attention.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace mmrm {

// A row is one query token under one query head. Rows are the lanes of vectors: scores are computed transposed, so that
// maxima and sums over keys are taken between vectors, never within one. All query heads of a key/value head make rows
// of one matrix, which reads keys and values once.
constexpr int kRowVectors = 3;
constexpr int64_t kRows = kRowVectors * kVector;  // of a block; times 8 left rows, 24 registers hold a product's sums
constexpr int64_t kKeys = 192;                    // of a block, a multiple of both kinds of left rows below
constexpr int64_t kPadKeys = 24;                  // what 8 and 6 left rows divide

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory that grows and is used again.
template <typename T>
class Scratch {
 public:
  T* get(int64_t size) {
    if (size > size_) {
      size_ = size;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(size * int64_t(sizeof(T)), 64))));
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// One node's rows under one key/value head.
template <typename T>
struct Node {
  const TrieAttention<T>& in;
  int64_t first, num_tokens, num_keys, group;
  const int64_t* keys;

  Node(const TrieAttention<T>& attention, int64_t node, int64_t kv_head) : in(attention), group(kv_head) {
    const TriePlanView& plan = in.plan;
    first = plan.cu_seqlens_q[node];
    num_tokens = plan.cu_seqlens_q[node + 1] - first;
    keys = plan.kv_index + plan.cu_seqlens_k[node];
    num_keys = plan.cu_seqlens_k[node + 1] - plan.cu_seqlens_k[node];
  }

  int64_t heads_per_group() const { return in.num_heads / in.num_kv_heads; }
  int64_t num_rows() const { return num_tokens * heads_per_group(); }
  int64_t token(int64_t row) const { return first + row / heads_per_group(); }
  int64_t head(int64_t row) const { return group * heads_per_group() + row % heads_per_group(); }
  template <typename U>
  U* at(const HeadRows<U>& x, int64_t row) const {
    return x.row(token(row), head(row));
  }
  // The row sees keys [first_key, end_key).
  int64_t end_key(int64_t row) const {
    return in.causal ? num_keys - num_tokens + row / heads_per_group() + 1 : num_keys;
  }
  int64_t first_key(int64_t row) const { return std::max<int64_t>(0, end_key(row) - in.window); }
  int64_t width() const { return round_up(in.head_size, kVector); }
  int64_t words() const { return width() / Word<T>::kValues; }
};

// The first `count` keys (or values), [round_up(count, kPadKeys), width], padded with zeros.
template <typename T>
void gather(const Node<T>& node, const HeadRows<const T>& x, int64_t count, T* out) {
  const int64_t size = node.in.head_size, width = node.width();
  std::memset(static_cast<void*>(out), 0, round_up(count, kPadKeys) * width * sizeof(T));
  for (int64_t j = 0; j < count; ++j) {
    std::memcpy(static_cast<void*>(out + j * width), x.row(node.keys[j], node.group), size * sizeof(T));
  }
}

// Rows [num_rows, width] as words of consecutive rows, [num_rows / kValues, width]; num_rows is a multiple of kValues.
inline const float* pair_rows(const float* rows, int64_t, int64_t, Scratch<float>&) { return rows; }
inline const bf16_t* pair_rows(const bf16_t* rows, int64_t num_rows, int64_t width, Scratch<bf16_t>& scratch) {
  bf16_t* out = scratch.get(num_rows * width);
  for (int64_t j = 0; j < num_rows; j += 2) {
    const bf16_t *a = rows + j * width, *b = a + width;
    for (int64_t e = 0; e < width; ++e) {
      out[j * width + 2 * e] = a[e];
      out[j * width + 2 * e + 1] = b[e];
    }
  }
  return out;
}

template <typename T>
const uint32_t* as_words(const T* values) {
  return reinterpret_cast<const uint32_t*>(values);
}

// `count` rows of x from `row` as words of consecutive values, [words, lanes]; lanes without a row are zero.
template <typename T>
void pack_lanes(const Node<T>& node, const HeadRows<const T>& x, int64_t row, int64_t count, int64_t lanes, T* out) {
  alignas(64) uint32_t words[256] = {};
  const int64_t num_words = node.words();
  if (count < lanes) std::memset(static_cast<void*>(out), 0, num_words * lanes * sizeof(uint32_t));
  for (int64_t lane = 0; lane < count; ++lane) {
    std::memcpy(words, node.at(x, row + lane), node.in.head_size * sizeof(T));
    char* column = reinterpret_cast<char*>(out) + lane * sizeof(uint32_t);
    for (int64_t w = 0; w < num_words; ++w) std::memcpy(column + w * lanes * sizeof(*words), words + w, sizeof(*words));
  }
}

// The same rows as they are, [lanes, width], padded with zeros.
template <typename T>
void copy_rows(const Node<T>& node, const HeadRows<const T>& x, int64_t row, int64_t count, int64_t lanes, T* out) {
  const int64_t size = node.in.head_size, width = node.width();
  if (count < lanes || size < width) std::memset(static_cast<void*>(out), 0, lanes * width * sizeof(T));
  for (int64_t lane = 0; lane < count; ++lane) {
    std::memcpy(static_cast<void*>(out + lane * width), node.at(x, row + lane), size * sizeof(T));
  }
}

// Column `lane` of in [size, lanes], times scale, to a row.
template <typename T>
void write_row(const float* in, int64_t lane, int64_t lanes, int64_t size, float scale, T* out) {
  for (int64_t e = 0; e < size; ++e) out[e] = convert<T>(in[e * lanes + lane] * scale);
}

// What a block of rows sees of its keys: no lane any outside of [first, end), all lanes those in [all_first, all_end).
struct Visible {
  int64_t first, all_first, all_end, end;
  __m512i firsts[kRowVectors], ends[kRowVectors];

  template <typename T>
  Visible(const Node<T>& node, int64_t row, int64_t count) {
    first = node.first_key(row) / kKeys * kKeys;  // the same blocks of keys for every row of a path
    all_first = node.first_key(row + count - 1);
    all_end = node.end_key(row);
    end = node.end_key(row + count - 1);
    alignas(64) int32_t lanes[2][kRows];
    for (int64_t lane = 0; lane < kRows; ++lane) {
      const int64_t own = row + std::min(lane, count - 1);
      lanes[0][lane] = int32_t(node.first_key(own));
      lanes[1][lane] = int32_t(node.end_key(own));
    }
    for (int n = 0; n < kRowVectors; ++n) {
      firsts[n] = _mm512_load_si512(lanes[0] + n * kVector);
      ends[n] = _mm512_load_si512(lanes[1] + n * kVector);
    }
  }

  __mmask16 lanes(int n, int64_t key) const {
    const __m512i keys = _mm512_set1_epi32(int(key));
    return _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(ends[n], keys), firsts[n], keys);
  }
};

// Sets scores of keys that a lane does not see to -infinity; scores are those of keys first_key, first_key + 1, ...
template <int NV>
MMRM_INLINE void mask(const Visible& visible, int64_t first_key, int64_t count, float* scores) {
  const auto mask_keys = [&](int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; ++key) {
      for (int n = 0; n < NV; ++n) {
        float* lanes = scores + (key - first_key) * NV * kVector + n * kVector;
        _mm512_mask_storeu_ps(lanes, _knot_mask16(visible.lanes(n, key)), _mm512_set1_ps(-INFINITY));
      }
    }
  };
  const int64_t all_end = std::max(visible.all_end, first_key), end = first_key + count;
  mask_keys(first_key, std::min({visible.all_first, all_end, end}));
  mask_keys(all_end, end);
}

// Calls f with the number of vectors that `count` rows fill, as a constant.
template <typename F>
MMRM_INLINE void with_vectors(int64_t count, F f) {
  if (count > 2 * kVector) return f(std::integral_constant<int, 3>{});
  if (count > kVector) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

}  // namespace mmrm

#pragma GCC pop_options
