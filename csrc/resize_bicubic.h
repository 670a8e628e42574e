#pragma once

#include <cstdint>

namespace mmrm {

// The meaning is that of resize_bicubic_ref in mmrm_fast/ops/resize_bicubic.py.
struct ResizeBicubicArgs {
  const uint8_t* image;  // [H, W, 3]
  uint8_t* tiles;        // [columns * rows, S, S, 3]
  int64_t height, width, columns, rows, side;  // H, W, the grid, S
  bool vertical_first;
};

void resize_bicubic_cpu(const ResizeBicubicArgs& args);

}  // namespace mmrm
