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
#include "workspace.h"

namespace dil {

// The number of this thread among those that work on a call.
inline int64_t this_worker() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Bytes of the workers' own memory.
template <class Worker>
int64_t workers_size(const Call& call) {
  Workspace counted(nullptr, 0);
  Within within(counted);
  Worker worker(call);
  return call.threads * counted.taken;
}

// body(worker, i) for i from 0 to before count, in that order of starting. Raises bad_alloc if any did.
template <class Worker, class Body>
void deal_out(const Call& call, int64_t count, Body body) {
  std::vector<std::unique_ptr<Worker>> workers;
  for (int64_t i = 0; i < call.threads; ++i) workers.push_back(std::make_unique<Worker>(call));
  // An exception may not leave a parallel region.
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(call.threads))
  {
    Worker& worker = *workers[size_t(this_worker())];
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
