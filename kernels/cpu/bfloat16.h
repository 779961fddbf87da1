// bfloat16 to float32 and back.
#pragma once
#include <cstdint>

namespace mllm {

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t wide = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &wide, 4);
  return y;
}

inline uint16_t float_to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t b;
  __builtin_memcpy(&b, &x, 4);
  if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(b >> 16 | 0x40);
  return static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}

}  // namespace mllm
