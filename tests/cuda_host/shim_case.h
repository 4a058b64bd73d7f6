// What the tests of the shim share: a kernel run as one block, and that a mistaken one ends the program.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace fastnn::cuda::shim {

inline int failures = 0;

inline void expect(bool condition, const char* what) {
  if (!condition) ++failures, std::printf("FAILED shim: %s\n", what);
}

inline void run(const std::function<void()>& kernel, int threads = 64, int shared_bytes = 4096) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  if (host::execute(nullptr, config, kernel) != cudaSuccess) std::abort();
}

// Whether the kernel ends the program with these words.
inline void dies(const char* words, const std::function<void()>& kernel, int threads = 64, int shared_bytes = 4096) {
  std::fflush(nullptr);
  int channel[2];
  if (pipe(channel)) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(channel[1], 2);
    run(kernel, threads, shared_bytes);
    _exit(0);
  }
  close(channel[1]);
  std::string said;
  char buffer[512];
  for (ssize_t count; (count = read(channel[0], buffer, sizeof buffer)) > 0;) said.append(buffer, count);
  close(channel[0]);
  int status = 0;
  waitpid(child, &status, 0);
  expect(status != 0 && said.find(words) != std::string::npos, words);
  if (status == 0 || said.find(words) == std::string::npos) std::printf("  it said: %s\n", said.c_str());
}

inline int thread() { return static_cast<int>(threadIdx.x); }

}  // namespace fastnn::cuda::shim
