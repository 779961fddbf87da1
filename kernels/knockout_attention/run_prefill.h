// The threads of a prefill: each takes task after task, with the views of the task's sequence at hand.
#pragma once
#include <atomic>
#include <memory>

#include "../cpu/parallel.h"
#include "problem.h"

namespace mllm {

// `enter(thread)` makes what a thread holds while it runs.
template <typename Kernel, typename Enter>
void run_prefill(const AttentionProblem& p, int64_t block, int64_t chunk, Enter enter) {
  const int64_t blocks = (p.rows + block - 1) / block;
  const std::vector<AttentionTask> tasks = attention_tasks(p, blocks);
  std::vector<Sight> sights;
  std::vector<Views> views;
  sights.reserve(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) views.emplace_back(sights.emplace_back(p, b), p.rows, block, chunk);
  std::atomic<size_t> next{0};
  parallel(worthwhile_threads(p.threads, 2.0 * p.batch * p.heads * p.rows * p.keys * p.width), [&](int thread) {
    const auto held = enter(thread);
    (void)held;
    std::unique_ptr<Kernel> kernel;
    int64_t batch = -1;
    for (size_t i; (i = next++) < tasks.size();) {
      if (tasks[i].batch != batch) {
        batch = tasks[i].batch;
        kernel = std::make_unique<Kernel>(p, sights[batch], views[batch]);
      }
      kernel->run(tasks[i]);
    }
  });
}

}  // namespace mllm
