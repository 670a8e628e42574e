#include "patchify.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"

namespace mmrm {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kWide = 16;               // values of a copy, no fewer than most patches have
constexpr int64_t kParallelPixels = 1 << 14;  // below this, starting threads costs more than it saves

// A line of pixels, normalised, each channel by itself: [3, side + kWide], the last values unset.
template <typename T>
MMRM_CLONES void normalise_line(const uint8_t* __restrict pixels, const compute_t<T>* scale, const compute_t<T>* shift,
                                int64_t side, uint8_t* __restrict bytes, T* __restrict line) {
  using A = compute_t<T>;
  for (int64_t x = 0; x < side; ++x) {
    bytes[x] = pixels[kChannels * x];
    bytes[side + x] = pixels[kChannels * x + 1];
    bytes[2 * side + x] = pixels[kChannels * x + 2];
  }
  for (int64_t c = 0; c < kChannels; ++c) {
    const A a = scale[c], b = shift[c];
    T* out = line + c * (side + kWide);
    for (int64_t x = 0; x < side; ++x) out[x] = convert<T>(A(bytes[c * side + x]) * a + b);
  }
}

// A patch's row [3, patch, patch] from the lines [patch, 3, stride] of its strip that begin with it. Copies of a fixed
// size are fast: they run on into what is written next, but for the end of the row.
template <typename T>
void copy_patch(const T* lines, int64_t stride, int64_t patch, T* row) {
  const int64_t last_wide = kChannels * patch * patch - (patch + kWide - 1) / kWide * kWide;  // that ends in the row
  int64_t place = 0;
  for (int64_t c = 0; c < kChannels; ++c) {
    const T* from = lines + c * stride;
    for (int64_t y = 0; y < patch; ++y, from += kChannels * stride, place += patch) {
      if (place > last_wide) {
        std::copy_n(from, patch, row + place);
        continue;
      }
      for (int64_t x = 0; x < patch; x += kWide) std::memcpy(row + place + x, from + x, kWide * sizeof(T));
    }
  }
}

}  // namespace

template <typename T>
void patchify_cpu(const PatchifyArgs<T>& args, [[maybe_unused]] int num_threads) {
  const int64_t patch = args.patch, side = args.side, grid = side / patch, stride = side + kWide;
  const int64_t num_strips = args.num_tiles * grid;  // lines of patches
  use_huge_pages(args.rows, num_strips * patch * side * kChannels * int64_t(sizeof(T)));
#pragma omp parallel num_threads(num_threads) if (num_strips * patch * side >= kParallelPixels)
  {
    std::vector<T> lines(patch * kChannels * stride);
    std::vector<uint8_t> bytes(kChannels * side);
#pragma omp for
    for (int64_t strip = 0; strip < num_strips; ++strip) {
      for (int64_t y = 0; y < patch; ++y) {
        const uint8_t* pixels = args.tiles + (strip * patch + y) * side * kChannels;
        normalise_line(pixels, args.scale, args.shift, side, bytes.data(), lines.data() + y * kChannels * stride);
      }
      for (int64_t x = 0; x < grid; ++x) {
        copy_patch(lines.data() + x * patch, stride, patch, args.rows + (strip * grid + x) * kChannels * patch * patch);
      }
    }
  }
}

template void patchify_cpu(const PatchifyArgs<float>&, int);
template void patchify_cpu(const PatchifyArgs<double>&, int);
template void patchify_cpu(const PatchifyArgs<bf16_t>&, int);
template void patchify_cpu(const PatchifyArgs<fp16_t>&, int);

}  // namespace mmrm
