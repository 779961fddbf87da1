// Threads for one call. Plain std::thread: torch brings an OpenMP runtime of its own, and two runtimes
// whose idle threads spin make two cores look like four.
#pragma once
#include <algorithm>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace mllm {

// Calls work(thread index) on `threads` threads, the caller's among them; the first exception is rethrown.
inline void parallel(int threads, const std::function<void(int)>& work) {
  std::exception_ptr error;
  std::mutex guard;
  auto run = [&](int index) {
    try {
      work(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (auto& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

// A thread costs about 30 us to start: give each at least a few million flops.
inline int worthwhile_threads(int threads, double flops) {
  return static_cast<int>(std::clamp(flops / 8e6, 1.0, static_cast<double>(std::max(threads, 1))));
}

}  // namespace mllm
