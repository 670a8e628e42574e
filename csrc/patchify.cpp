#include "patchify.h"

#include <array>

#include "memory.h"

namespace mmrm {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kParallelPixels = 1 << 14;  // below this, starting threads costs more than it saves

// Every value a channel's byte can become: exact, and without a conversion a pixel.
template <typename T>
using Table = std::array<std::array<T, 256>, kChannels>;

template <typename T>
Table<T> make_table(const PatchifyArgs<T>& args) {
  Table<T> table;
  for (int64_t c = 0; c < kChannels; ++c) {
    for (int value = 0; value < 256; ++value) {
      table[c][value] = convert<T>(compute_t<T>(value) * args.scale[c] + args.shift[c]);
    }
  }
  return table;
}

// One line of pixels of a patch, to each channel's plane.
template <typename T>
inline void patch_line(const uint8_t* pixels, const Table<T>& table, int64_t patch, int64_t plane, T* out) {
  for (int64_t x = 0; x < patch; ++x) {
    out[x] = table[0][pixels[kChannels * x]];
    out[plane + x] = table[1][pixels[kChannels * x + 1]];
    out[2 * plane + x] = table[2][pixels[kChannels * x + 2]];
  }
}

}  // namespace

template <typename T>
void patchify_cpu(const PatchifyArgs<T>& args, [[maybe_unused]] int num_threads) {
  const int64_t patch = args.patch, side = args.side, grid = side / patch, plane = patch * patch;
  const int64_t num_strips = args.num_tiles * grid;  // lines of patches
  const Table<T> table = make_table(args);
  use_huge_pages(args.rows, num_strips * patch * side * kChannels * int64_t(sizeof(T)));
#pragma omp parallel for num_threads(num_threads) if (num_strips * patch * side >= kParallelPixels)
  for (int64_t strip = 0; strip < num_strips; ++strip) {
    const uint8_t* pixels = args.tiles + strip * patch * side * kChannels;
    T* rows = args.rows + strip * grid * kChannels * plane;
    for (int64_t x = 0; x < grid; ++x) {
      for (int64_t y = 0; y < patch; ++y) {
        patch_line(pixels + (y * side + x * patch) * kChannels, table, patch, plane,
                   rows + x * kChannels * plane + y * patch);
      }
    }
  }
}

template void patchify_cpu(const PatchifyArgs<float>&, int);
template void patchify_cpu(const PatchifyArgs<double>&, int);
template void patchify_cpu(const PatchifyArgs<bf16_t>&, int);
template void patchify_cpu(const PatchifyArgs<fp16_t>&, int);

}  // namespace mmrm
