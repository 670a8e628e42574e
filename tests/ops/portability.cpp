// Runs every C++ op on fixed data and prints a digest of its results' bits, one op and element type a line.

#include <cstdio>
#include <vector>

#include "pack_image_tokens.h"
#include "pair_loss.h"
#include "plan_trie.h"
#include "resize_bicubic.h"

namespace {

using namespace mmrm;

// In -2..2, the same on every machine.
template <typename T>
std::vector<T> numbers(int64_t size) {
  std::vector<T> values(size);
  uint32_t state = 1;
  for (T& value : values) {
    state = state * 1664525u + 1013904223u;
    value = convert<T>(compute_t<T>(int32_t(state)) / compute_t<T>(1 << 30));
  }
  return values;
}

struct Digest {
  uint64_t value = 14695981039346656037u;  // FNV-1a

  template <typename T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
  void print(const char* op, const char* type) const { std::printf("%s %s %016llx\n", op, type, (unsigned long long)value); }
};

template <typename T>
void pair_loss(const char* type) {
  constexpr int64_t P = 1000;
  const auto margin = numbers<T>(P), demand = numbers<T>(2 * P);
  const std::vector<T> proxy(margin.rbegin(), margin.rend());
  Digest digest;
  for (const PairLossMode mode : {PairLossMode::paper, PairLossMode::reference, PairLossMode::balanced}) {
    std::vector<T> sums(kNumPairLossSums), sfc(P), slope(P), proxy_slope(P);
    pair_loss_fwd_cpu<T>({margin.data(), proxy.data(), demand.data(), nullptr, P, mode, 0.1},
                         {sums.data(), sfc.data(), slope.data(), proxy_slope.data()}, 1);
    digest.add(sums), digest.add(sfc), digest.add(slope), digest.add(proxy_slope);
  }
  digest.print("pair_loss", type);
}

template <typename T>
void pack_image_tokens(const char* type) {
  constexpr int64_t V = 5, F = 3, D = 517, U = 4;
  const std::vector<int64_t> order{1, 4, 2, 0, 3, 5}, segment_ptr{0, 2, 3, 5, 6}, segments{-2, -1, 0, 4};
  const auto grad = numbers<T>(6 * D);
  std::vector<T> grad_embedding(V * D), grad_features(F * D);
  pack_image_tokens_bwd_cpu<T>({grad.data(), order.data(), segment_ptr.data(), segments.data(), grad_embedding.data(),
                                grad_features.data(), U, V, F, D},
                               6, 1);
  Digest digest;
  digest.add(grad_embedding), digest.add(grad_features);
  digest.print("pack_image_tokens", type);
}

void plan() {
  const std::vector<int64_t> keys{7, 8, 9, 1, 2, 7, 8, 9, 3, 7, 8}, cu_seqlens{0, 5, 9, 11};
  const TriePlan found = plan_trie(keys.data(), cu_seqlens.data(), 3, 2);
  Digest digest;
  digest.add(found.token_index), digest.add(found.kv_index), digest.add(found.last_index);
  digest.print("plan_trie", "int64");
}

void resize_bicubic() {
  constexpr int64_t H = 37, W = 29, S = 28;
  std::vector<uint8_t> image(H * W * 3), tiles(6 * S * S * 3);
  for (size_t i = 0; i < image.size(); ++i) image[i] = uint8_t(i * 37 % 251);
  Digest digest;
  for (const bool vertical_first : {false, true}) {
    resize_bicubic_cpu({image.data(), tiles.data(), H, W, 3, 2, S, vertical_first});
    digest.add(tiles);
    resize_bicubic_cpu({image.data(), tiles.data(), H, W, 1, 1, 11, vertical_first});
    digest.add(tiles);
  }
  digest.print("resize_bicubic", "uint8");
}

}  // namespace

int main() {
  pair_loss<float>("float32");  // float64's exponential is the C library's
  pack_image_tokens<float>("float32"), pack_image_tokens<double>("float64");
  pack_image_tokens<bf16_t>("bfloat16"), pack_image_tokens<fp16_t>("float16");
  plan();
  resize_bicubic();
}
