// Entry points. Work is dealt out by spans; every span is computed by one thread, so results don't depend on their number.
#include <algorithm>

#include "amx_backward.h"
#include "amx_forward.h"
#include "forward.h"

namespace dil {

template <class Worker>
void forward_by(const Call& call) {
  std::vector<Span> spans = spans_of(call, rows_of_span(call, call.batch * call.kv_heads));
  // Later spans have more keys under a causal mask: they go first.
  std::reverse(spans.begin(), spans.end());
  deal_out<Worker>(call, int64_t(spans.size()), [&](Worker& worker, int64_t i) { worker.run(spans[size_t(i)]); });
}

template <class X>
void forward(const Call& call) {
#ifdef DILCOMPILE_TILES
  if (std::is_same_v<X, BFloat16> && query_factor(call) == 1 && has_tiles()) return forward_by<TileForward>(call);
#endif
  forward_by<Forward<X>>(call);
}

template <class X>
void backward(const Call& call) {
#ifdef DILCOMPILE_TILES
  if constexpr (std::is_same_v<X, BFloat16>)
    // A softcap's slope is not kept beside the bias there.
    if (query_factor(call) == 1 && (call.softcap == 0 || !call.bias.data) && has_tiles())
      return backward_by<X, TileBackward>(call);
#endif
  backward_by<X, Backward<X>>(call);
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
}
