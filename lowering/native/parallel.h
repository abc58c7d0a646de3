// Work dealt out to threads, each with a worker of its own.
#pragma once
#include <algorithm>
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

// How much of a call is done at once: its workers, and the tasks whose sums are held.
struct Arrangement {
  int64_t workers, tasks;
};

// What a call holds at once, in bytes. How it is cut into tasks, and the order in which their sums are added, depends on none of
// this, so that every arrangement gives the same bits.
struct Demand {
  int64_t worker, task;    // of each worker, and of each task that is open
  int64_t threads, tasks;  // the most of both
  int64_t parts = 1;       // so many tasks in a row are added up

  int64_t size(const Arrangement& of) const { return kLine + of.workers * worker + of.tasks * task; }

  Arrangement most() const { return with(tasks); }

  // The largest that takes at most so many bytes, or the least that there is.
  Arrangement fitting(int64_t bytes) const {
    int64_t open = tasks, least = parts > 1 ? 2 : 1;
    while (open > least && size(with(open)) > bytes) open -= open > parts ? parts : 1;
    Arrangement found = with(open);
    while (found.workers > 1 && size(found) > bytes) --found.workers;
    return found;
  }

  // Bytes of the largest that takes at most this share of what the fastest takes, or of the least.
  int64_t size_of(double share) const {
    return size(fitting(kLine + int64_t(share * double(size(most()) - kLine))));
  }

 private:
  // Of parts that are not all open one holds the sum of those before. Tasks that hold nothing may all be open.
  Arrangement with(int64_t open) const {
    return {std::clamp<int64_t>(open < parts ? open - 1 : open, 1, threads), task == 0 ? tasks : open};
  }
};

// As the call's workspace has room for.
inline Arrangement arranged(const Call& call, const Demand& demand) {
  return call.workspace ? demand.fitting(call.workspace_size) : demand.most();
}

template <class Worker>
class Workers {
 public:
  // One, which says how large they are.
  explicit Workers(const Call& call) : call_(call) {
    int64_t before = workspace->taken;
    grow(1);
    size_ = workspace->taken - before;
  }

  // Bytes of one worker's own memory.
  int64_t size() const { return size_; }

  void grow(int64_t count) {
    while (int64_t(workers_.size()) < count) workers_.push_back(std::make_unique<Worker>(call_));
  }

  // body(worker, i) for i from 0 to before count, in that order of starting. Raises bad_alloc if any did.
  template <class Body>
  void deal_out(int64_t count, Body body) {
    // An exception may not leave a parallel region.
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(workers_.size()))
    {
      Worker& worker = *workers_[size_t(this_worker())];
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

 private:
  const Call& call_;
  int64_t size_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Bytes of one worker's own memory, where no call is to be computed.
template <class Worker>
int64_t worker_size(const Call& call) {
  Workspace counted(nullptr, 0);
  Within within(counted);
  return Workers<Worker>(call).size();
}

}  // namespace dil
