// Threads for one call: those of the OpenMP runtime that torch has loaded, if it can be found, else threads of
// our own. Torch's threads spin for a while after each of its operations; beside a second runtime, or beside
// fresh threads, two cores then look like three (measured: 10.4 ms in place of 7.8 for a kernel after a torch
// operation). Borrowing them also saves the start of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace mllm {

// GNU OpenMP's entry for a parallel region, which LLVM's and Intel's runtimes have too; null if none is loaded.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
inline ParallelRegion torch_parallel_region() {
#if defined(__unix__) || defined(__APPLE__)
  static const auto entry = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
#else
  return nullptr;
#endif
}

// Calls work(i) once for i = 0 .. n - 1, n <= `threads` as the runtime grants, each on a thread of its own; the
// first exception is rethrown. `own`: never borrow, and n = `threads`.
inline void parallel(int threads, const std::function<void(int)>& work, bool own = false) {
  struct Call {
    const std::function<void(int)>& work;
    std::atomic<int> next{0};
    std::exception_ptr error{};
    std::mutex guard{};

    static void run(void* self) {
      Call& call = *static_cast<Call*>(self);
      try {
        call.work(call.next++);
      } catch (...) {
        std::lock_guard<std::mutex> lock(call.guard);
        if (!call.error) call.error = std::current_exception();
      }
    }
  } call{work};
  if (threads > 1 && !own && torch_parallel_region()) {
    torch_parallel_region()(&Call::run, &call, threads, 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back(&Call::run, &call);
    } catch (const std::system_error&) {
      if (own) std::terminate();  // the others wait for all
    }
    Call::run(&call);
    for (auto& thread : others) thread.join();
  }
  if (call.error) std::rethrow_exception(call.error);
}

// A thread is worth waking for a few million flops.
inline int worthwhile_threads(int threads, double flops) {
  return static_cast<int>(std::clamp(flops / 3e6, 1.0, static_cast<double>(std::max(threads, 1))));
}

}  // namespace mllm
