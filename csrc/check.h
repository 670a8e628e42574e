#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mmrm {

// Throws std::out_of_range where a value is outside low:high.
inline void check_range(const char* name, const int64_t* values, int64_t size, int64_t low, int64_t high) {
  for (int64_t i = 0; i < size; ++i) {
    if (values[i] >= low && values[i] < high) continue;
    throw std::out_of_range(std::string(name) + " " + std::to_string(values[i]) + " is outside " +
                            std::to_string(low) + ":" + std::to_string(high));
  }
}

}  // namespace mmrm
