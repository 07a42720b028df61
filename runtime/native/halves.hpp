// bf16 as torch rounds it: to nearest even, every NaN the same quiet one.

#pragma once

#include <cstdint>
#include <cstring>

namespace slidetune {

inline __attribute__((always_inline)) float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __attribute__((always_inline)) uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t nearest = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  return value == value ? nearest : uint16_t(0x7FC0);
}

}  // namespace slidetune
