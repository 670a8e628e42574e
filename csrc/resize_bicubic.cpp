#include "resize_bicubic.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "numeric.h"

namespace mmrm {
namespace {

constexpr int64_t kChannels = 3;
constexpr int kLines = 16;                   // of a block of the image that is turned on its side
constexpr int kGroup = kLines * kChannels;   // bytes that are summed together
constexpr int kFractionBits = 22;            // of a weight: 8 bits of the pixel, a sign and a carry make 32

// Keys' cubic convolution with a = -1/2, zero from 2 on.
double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

// Along one axis, an output pixel is the sum of weights[k] times pixel first + k.
struct Taps {
  int64_t first, count;
  const int32_t* weights;
};

// The taps of every output pixel along one axis. All arithmetic in double and in this order: its rounding decides bits.
class Axis {
 public:
  Axis(int64_t size, int64_t out_size) : taps_(out_size) {
    const double scale = double(size) / double(out_size), stretch = std::max(scale, 1.0), support = 2.0 * stretch;
    const int64_t most = 2 * int64_t(std::ceil(support)) + 1;
    weights_.resize(most * out_size);
    std::vector<double> values(most);
    for (int64_t i = 0; i < out_size; ++i) {
      const double centre = (double(i) + 0.5) * scale;
      const int64_t first = std::max<int64_t>(int64_t(centre - support + 0.5), 0);
      const int64_t count = std::min(int64_t(centre + support + 0.5), size) - first;
      double total = 0.0;
      for (int64_t k = 0; k < count; ++k) {
        values[k] = cubic((double(first + k) - centre + 0.5) * (1.0 / stretch));
        total += values[k];
      }
      int32_t* weights = weights_.data() + i * most;
      for (int64_t k = 0; k < count; ++k) {
        const double weight = (total != 0.0 ? values[k] / total : values[k]) * (1 << kFractionBits);
        weights[k] = int32_t(weight < 0.0 ? weight - 0.5 : weight + 0.5);
      }
      taps_[i] = {first, count, weights};
    }
  }

  const Taps& operator[](int64_t i) const { return taps_[i]; }
  int64_t size() const { return int64_t(taps_.size()); }

 private:
  std::vector<Taps> taps_;
  std::vector<int32_t> weights_;
};

// out[size] = the weighted sum of `count` lines of bytes, rounded and clipped.
template <int size>
MMRM_INLINE void weighted_sum(const uint8_t* lines, int64_t stride, const Taps& taps, uint8_t* __restrict out) {
  int32_t sums[size];
  for (int i = 0; i < size; ++i) sums[i] = 1 << (kFractionBits - 1);
  lines += taps.first * stride;
  for (int64_t k = 0; k < taps.count; ++k, lines += stride) {
    const int32_t weight = taps.weights[k];
    for (int i = 0; i < size; ++i) sums[i] += weight * lines[i];
  }
  for (int i = 0; i < size; ++i) out[i] = uint8_t(std::clamp(sums[i] >> kFractionBits, 0, 255));
}

// Pixels of kLines lines, [W, 3, kLines], to [out W, 3, kLines].
MMRM_CLONES void resize_block(const uint8_t* block, const Axis& across, uint8_t* out) {
  for (int64_t x = 0; x < across.size(); ++x) weighted_sum<kGroup>(block, kGroup, across[x], out + x * kGroup);
}

// `size` bytes of an output line from as many of each of the lines; the last group may overlap the one before it.
MMRM_CLONES void resize_line(const uint8_t* lines, int64_t stride, const Taps& taps, int64_t size, uint8_t* out) {
  for (int64_t i = 0; i + kGroup <= size; i += kGroup) weighted_sum<kGroup>(lines + i, stride, taps, out + i);
  if (size >= kGroup) return weighted_sum<kGroup>(lines + size - kGroup, stride, taps, out + size - kGroup);
  for (int64_t i = 0; i < size; ++i) weighted_sum<1>(lines + i, stride, taps, out + i);
}

// A square of kLines x kLines bytes on its side: four perfect shuffles turn the index (row, column) by four bits.
MMRM_INLINE void transpose(const uint8_t* __restrict in, uint8_t* __restrict out) {
  constexpr int kHalf = kLines * kLines / 2;
  uint8_t turned[2 * kHalf];
  for (int i = 0; i < kHalf; ++i) turned[2 * i] = in[i], turned[2 * i + 1] = in[kHalf + i];
  for (int i = 0; i < kHalf; ++i) out[2 * i] = turned[i], out[2 * i + 1] = turned[kHalf + i];
  for (int i = 0; i < kHalf; ++i) turned[2 * i] = out[i], turned[2 * i + 1] = out[kHalf + i];
  for (int i = 0; i < kHalf; ++i) out[2 * i] = turned[i], out[2 * i + 1] = turned[kHalf + i];
}

// Lines of `size` bytes to a block [size, kLines]; the last line stands in for those that are missing.
MMRM_CLONES void load_block(const uint8_t* lines, int64_t num_lines, int64_t size, uint8_t* block) {
  uint8_t square[kLines * kLines] = {};
  for (int64_t i = 0; i < size; i += kLines) {
    for (int64_t line = 0; line < kLines; ++line) {
      const uint8_t* from = lines + std::min(line, num_lines - 1) * size + i;
      if (i + kLines <= size) {
        std::memcpy(square + line * kLines, from, kLines);
      } else {
        std::memcpy(square + line * kLines, from, size - i);
      }
    }
    transpose(square, block + i * kLines);
  }
}

// A block [size, kLines] to lines of `size` bytes, a multiple of kLines.
MMRM_CLONES void store_block(const uint8_t* block, int64_t num_lines, int64_t size, uint8_t* lines) {
  uint8_t square[kLines * kLines];
  for (int64_t i = 0; i < size; i += kLines) {
    transpose(block + i * kLines, square);
    for (int64_t line = 0; line < num_lines; ++line) {
      std::memcpy(lines + line * size + i, square + line * kLines, kLines);
    }
  }
}

int64_t whole_squares(int64_t size) { return (size + kLines - 1) / kLines * kLines; }

// Memory that nothing sets to zero first.
std::unique_ptr<uint8_t[]> bytes(int64_t size) { return std::unique_ptr<uint8_t[]>(new uint8_t[size]); }

// Every line to the axis's pixels, [num_lines, stride], where the stride is a multiple of kLines.
void resize_lines(const uint8_t* lines, int64_t num_lines, int64_t size, const Axis& across, int64_t stride,
                  uint8_t* out) {
  const auto block = bytes(whole_squares(size) * kLines), out_block = bytes(stride * kLines);
  for (int64_t y = 0; y < num_lines; y += kLines) {
    const int64_t count = std::min<int64_t>(kLines, num_lines - y);
    load_block(lines + y * size, count, size, block.get());
    resize_block(block.get(), across, out_block.get());
    store_block(out_block.get(), count, stride, out + y * stride);
  }
}

}  // namespace

void resize_bicubic_cpu(const ResizeBicubicArgs& args) {
  const Axis across(args.width, args.columns * args.side), down(args.height, args.rows * args.side);
  const int64_t size = args.width * kChannels, piece = args.side * kChannels;  // bytes of a line, of one of a tile
  const int64_t stride = whole_squares(args.columns * piece);
  const auto lines = bytes((args.vertical_first ? down.size() : args.height) * stride);
  if (args.vertical_first) {
    const auto between = bytes(down.size() * size);
    for (int64_t y = 0; y < down.size(); ++y) resize_line(args.image, size, down[y], size, between.get() + y * size);
    resize_lines(between.get(), down.size(), size, across, stride, lines.get());
  } else {
    resize_lines(args.image, args.height, size, across, stride, lines.get());
  }
  for (int64_t y = 0; y < down.size(); ++y) {
    for (int64_t column = 0; column < args.columns; ++column) {
      uint8_t* out = args.tiles + ((y / args.side * args.columns + column) * args.side + y % args.side) * piece;
      if (args.vertical_first) {
        std::memcpy(out, lines.get() + y * stride + column * piece, piece);
      } else {
        resize_line(lines.get() + column * piece, stride, down[y], piece, out);
      }
    }
  }
}

}  // namespace mmrm
