// Entry points. Work is dealt out by spans; every span is computed by one thread, so results don't depend on their number.
#include <algorithm>

#include "amx_backward.h"
#include "amx_forward.h"
#include "forward.h"

namespace dil {

// A span holds nothing.
inline Demand forward_demand(const Call& call, int64_t worker) { return {worker, 0, call.threads, call.threads}; }

template <class Worker>
void forward_by(const Call& call) {
  std::vector<Span> spans = spans_of(call, rows_of_span(call, call.batch * call.kv_heads));
  // Later spans have more keys under a causal mask: they go first.
  std::reverse(spans.begin(), spans.end());
  Workers<Worker> workers(call);
  workers.grow(arranged(call, forward_demand(call, workers.size())).workers);
  workers.deal_out(int64_t(spans.size()), [&](Worker& worker, int64_t i) { worker.run(spans[size_t(i)]); });
}

template <class Worker>
struct Named {
  typedef Worker Type;
};

// body(Named<the class that computes a forward>).
template <class X, class Body>
auto with_forward(const Call& call, Body body) {
#ifdef DILCOMPILE_TILES
  if (std::is_same_v<X, BFloat16> && query_factor(call) == 1 && has_tiles()) return body(Named<TileForward>());
#endif
  return body(Named<Forward<X>>());
}

template <class X, class Body>
auto with_backward(const Call& call, Body body) {
#ifdef DILCOMPILE_TILES
  if constexpr (std::is_same_v<X, BFloat16>)
    // A softcap's slope is not kept beside the bias there.
    if (query_factor(call) == 1 && (call.softcap == 0 || !call.bias.data) && has_tiles())
      return body(Named<TileBackward>());
#endif
  return body(Named<Backward<X>>());
}

template <class X>
void forward(const Call& call) {
  Workspace given(call.workspace, call.workspace_size);
  Within within(given);
  with_forward<X>(call, [&](auto worker) { forward_by<typename decltype(worker)::Type>(call); });
}

template <class X>
void backward(const Call& call) {
  Workspace given(call.workspace, call.workspace_size);
  Within within(given);
  with_backward<X>(call, [&](auto worker) { HeadsBackward<X, typename decltype(worker)::Type>(call).run(); });
}

template <class X>
Demand demand_of(const Call& call, bool backward) {
  if (!backward)
    return with_forward<X>(call, [&](auto worker) {
      return forward_demand(call, worker_size<typename decltype(worker)::Type>(call));
    });
  return with_backward<X>(call, [&](auto worker) {
    return backward_demand<X>(call, worker_size<typename decltype(worker)::Type>(call));
  });
}

}  // namespace dil

// DILCOMPILE_ELEMENT is the operands' dtype: float, double, dil::BFloat16 or dil::Half; one library each.
// 0: done; 2: no memory.
template <class Run>
int guarded(Run run) {
  try {
    run();
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

extern "C" {
int dilcompile_forward(const dil::Call* call) {
  return guarded([&] { dil::forward<DILCOMPILE_ELEMENT>(*call); });
}
int dilcompile_backward(const dil::Call* call) {
  return guarded([&] { dil::backward<DILCOMPILE_ELEMENT>(*call); });
}
// Bytes of the largest arrangement that takes at most a share (1 to 0) of what the fastest takes, or of the least that there is; 0
// where even one worker finds no memory.
int64_t dilcompile_workspace(const dil::Call* call, int64_t backward, double share) {
  int64_t found = 0;
  guarded([&] { found = dil::demand_of<DILCOMPILE_ELEMENT>(*call, backward != 0).size_of(share); });
  return found;
}
}
