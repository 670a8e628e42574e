#include "pack_image_tokens.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"
#include "memory.h"

namespace mmrm {
namespace {

constexpr int64_t kParallelBytes = 1 << 18;  // below this, starting threads costs more than it saves
constexpr int64_t kBlockRows = 16;           // gradient rows that one thread takes at a time
constexpr int64_t kColumns = 512;            // of a sum that stays in the first-level cache

void check_increasing(const char* name, const int64_t* values, int64_t size, int64_t step) {
  for (int64_t i = 1; i < size; ++i) {
    if (values[i] < values[i - 1] + step) throw std::out_of_range(std::string(name) + " does not increase");
  }
}

// Row of the table, or of the features, that a source names.
template <typename T>
T* source_row(T* embedding, T* features, int64_t source, int64_t width) {
  return source >= 0 ? embedding + source * width : features + (-1 - source) * width;
}

// Columns [first, last) of the sum of a segment's gradients, in index order.
template <typename T>
MMRM_CLONES void sum_columns(const PackImageTokensBwd<T>& args, int64_t segment, int64_t first, int64_t last, T* out) {
  using Sum = compute_t<T>;
  Sum sums[kColumns] = {};
  const int64_t count = last - first;
  for (int64_t i = args.segment_ptr[segment]; i < args.segment_ptr[segment + 1]; ++i) {
    const T* grad = args.grad + args.order[i] * args.width + first;
    for (int64_t k = 0; k < count; ++k) sums[k] += convert<Sum>(grad[k]);
  }
  for (int64_t k = 0; k < count; ++k) out[first + k] = convert<T>(sums[k]);
}

template <typename T>
void write_row(const PackImageTokensBwd<T>& args, int64_t segment, T* out) {
  const int64_t begin = args.segment_ptr[segment], count = args.segment_ptr[segment + 1] - begin;
  if (count == 1) {  // as nearly every feature's
    std::copy_n(args.grad + args.order[begin] * args.width, args.width, out);
    return;
  }
  for (int64_t column = 0; column < args.width; column += kColumns) {
    sum_columns(args, segment, column, std::min(column + kColumns, args.width), out);
  }
}

// Gradients of sources [first, last): the sum of each one's segment, zeros where nothing reads it.
template <typename T>
void write_rows(const PackImageTokensBwd<T>& args, int64_t first, int64_t last) {
  const int64_t* sources = args.segment_source;
  int64_t segment = std::lower_bound(sources, sources + args.num_segments, first) - sources;
  for (int64_t source = first; source < last; ++source) {
    T* out = source_row(args.grad_embedding, args.grad_features, source, args.width);
    if (segment < args.num_segments && sources[segment] == source) {
      write_row(args, segment++, out);
    } else {
      std::fill_n(out, args.width, T{});
    }
  }
}

}  // namespace

template <typename Bits>
void pack_image_tokens_fwd_cpu(const PackImageTokensFwd<Bits>& args, int64_t num_embeddings, int64_t num_features,
                               [[maybe_unused]] int num_threads) {
  check_range("source", args.source, args.num_tokens, -num_features, num_embeddings);
  const int64_t bytes = args.num_tokens * args.width * int64_t(sizeof(Bits));
  use_huge_pages(args.out, bytes);
#pragma omp parallel for num_threads(num_threads) if (bytes >= kParallelBytes)
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    const Bits* row = source_row(args.embedding, args.features, args.source[token], args.width);
    std::copy_n(row, args.width, args.out + token * args.width);
  }
}

template <typename T>
void pack_image_tokens_bwd_cpu(const PackImageTokensBwd<T>& args, int64_t num_tokens,
                               [[maybe_unused]] int num_threads) {
  check_range("order", args.order, num_tokens, 0, num_tokens);
  check_range("segment_ptr", args.segment_ptr, args.num_segments + 1, 0, num_tokens + 1);
  check_increasing("segment_ptr", args.segment_ptr, args.num_segments + 1, 0);
  check_increasing("segment_source", args.segment_source, args.num_segments, 1);
  const int64_t first = -args.num_features, num_rows = args.num_embeddings + args.num_features;
  const int64_t num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  const int64_t row_bytes = args.width * int64_t(sizeof(T));
  use_huge_pages(args.grad_embedding, args.num_embeddings * row_bytes);
  use_huge_pages(args.grad_features, args.num_features * row_bytes);
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads) if ((num_rows + num_tokens) * row_bytes >= kParallelBytes)
  for (int64_t block = 0; block < num_blocks; ++block) {
    write_rows(args, first + block * kBlockRows, first + std::min((block + 1) * kBlockRows, num_rows));
  }
}

template void pack_image_tokens_fwd_cpu(const PackImageTokensFwd<uint16_t>&, int64_t, int64_t, int);
template void pack_image_tokens_fwd_cpu(const PackImageTokensFwd<uint32_t>&, int64_t, int64_t, int);
template void pack_image_tokens_fwd_cpu(const PackImageTokensFwd<uint64_t>&, int64_t, int64_t, int);
template void pack_image_tokens_bwd_cpu(const PackImageTokensBwd<float>&, int64_t, int);
template void pack_image_tokens_bwd_cpu(const PackImageTokensBwd<double>&, int64_t, int);
template void pack_image_tokens_bwd_cpu(const PackImageTokensBwd<bf16_t>&, int64_t, int);
template void pack_image_tokens_bwd_cpu(const PackImageTokensBwd<fp16_t>&, int64_t, int);

}  // namespace mmrm
