// The ceiling for the benchmarks: multiply-adds that never leave the registers. Included like cpu_fma.h.

static double fma_rate(int threads) {
  constexpr int CHAINS = LANES == 16 ? 24 : 12;
  const long rounds = 20000000;
  std::atomic<int> waiting{threads};
  std::vector<double> seconds(threads);
  mllm::parallel(threads, [&](int t) {
    vec c[CHAINS];
    for (int i = 0; i < CHAINS; ++i) c[i] = splat(0.001f * i);
    const vec a = splat(0.999f), b = splat(0.001f);
    for (--waiting; waiting > 0;) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    for (long n = 0; n < rounds; ++n)
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS; ++i) c[i] = c[i] * a + b;
    seconds[t] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    float sum = 0;
    for (int i = 0; i < CHAINS; ++i) sum += c[i][0];
    volatile float keep = sum;  // the loop must not be optimised away
    (void)keep;
  }, /*own=*/true);  // all must run at once
  return 2.0 * LANES * CHAINS * rounds * threads / *std::max_element(seconds.begin(), seconds.end());
}
