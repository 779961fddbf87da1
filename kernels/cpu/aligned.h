// Arrays that begin on a cache line: a vector load that straddles two lines costs two.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace mllm {

template <typename T>
struct CacheAligned {
  using value_type = T;
  static constexpr std::align_val_t line{64};
  CacheAligned() = default;
  template <typename U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), line)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, line); }
  // vector(n) leaves its memory as it is: most scratch is written before it is read
  template <typename U>
  void construct(U*) {}
  template <typename U>
  void construct(U* p, const U& value) { *p = value; }
  template <typename U>
  bool operator==(const CacheAligned<U>&) const { return true; }
  template <typename U>
  bool operator!=(const CacheAligned<U>&) const { return false; }
};

using Floats = std::vector<float, CacheAligned<float>>;

}  // namespace mllm
