// Work dealt out to threads, each with a worker of its own.
#pragma once
#include <atomic>
#include <memory>
#include <new>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "call.h"

namespace dil {

// body(worker, i) for i from 0 to before count, in that order of starting. Raises bad_alloc if any did.
template <class Worker, class Body>
void deal_out(const Call& call, int64_t count, Body body) {
  std::vector<std::unique_ptr<Worker>> workers;
  for (int64_t i = 0; i < call.threads; ++i) workers.push_back(std::make_unique<Worker>(call));
  // An exception may not leave a parallel region.
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(call.threads))
  {
#if defined(_OPENMP)
    Worker& worker = *workers[size_t(omp_get_thread_num())];
#else
    Worker& worker = *workers[0];
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      if (failed) continue;
      try {
        body(worker, i);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    }
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace dil
