// Phases of one computation, each a number of items that any thread takes. A phase is over when its items are done, not
// when all threads have arrived: a thread that gets no processor, because another process has it, holds nobody up.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"

namespace mllm {

class Phases {
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::vector<Phase> phases_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_{};
  std::mutex guard_{};

 public:
  explicit Phases(size_t most) : phases_(most) {}

  // One thread's way through the phases, which every thread goes in the same order.
  class Thread {
    Phases& all_;
    size_t at_ = 0;

   public:
    explicit Thread(Phases& all) : all_(all) {}

    // Calls work(from, to) for runs of `run` items of the next phase, and waits until all its items are done.
    template <typename Work>
    void operator()(int64_t items, int64_t run, const Work& work) {
      Phase& phase = all_.phases_[at_++];
      for (int64_t from; (from = phase.next.fetch_add(run, std::memory_order_relaxed)) < items;) {
        const int64_t to = std::min(from + run, items);
        try {
          if (!all_.failed_) work(from, to);
        } catch (...) {
          std::lock_guard<std::mutex> lock(all_.guard_);
          if (!all_.failed_.exchange(true)) all_.error_ = std::current_exception();
        }
        phase.done.fetch_add(to - from, std::memory_order_release);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < items; ++spins) {
        if (spins < SPINS)
          pause();
        else
          std::this_thread::yield();  // the other thread may be waiting for this processor
      }
    }
  };

  // Runs `work(thread, its way)` on each of the threads.
  template <typename Work>
  void run(int threads, const Work& work) {
    parallel(threads, [&](int index) {
      Thread way(*this);
      work(index, way);
    });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int SPINS = 2000;  // some 50 microseconds
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
};

}  // namespace mllm
