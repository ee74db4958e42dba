// Sharing out numbered tasks over the caller's threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "../kernels.h"

namespace shampoo {

// Calls f(begin, end) on pieces of [0, tasks) of about `grain` tasks. Threads take the next piece
// when they are free, because a core that is shared with other work makes a fixed split wait for
// the slower one. Which thread does a piece must not matter to the result.
template <class F>
void for_each(const Parallel& parallel, int64_t tasks, int64_t grain, const F& f) {
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (tasks + grain - 1) / grain;
  const int64_t workers = std::min(parallel.workers, pieces);
  if (workers <= 1) {
    if (tasks > 0) f(int64_t{0}, tasks);
    return;
  }
  struct Shared {
    const F& f;
    int64_t tasks, grain;
    std::atomic<int64_t> next{0};
  } shared{f, tasks, grain};
  parallel.run(
      workers,
      [](void* context, int64_t) {
        Shared& s = *static_cast<Shared*>(context);
        for (;;) {
          const int64_t begin = s.next.fetch_add(s.grain, std::memory_order_relaxed);
          if (begin >= s.tasks) return;
          s.f(begin, std::min(begin + s.grain, s.tasks));
        }
      },
      &shared);
}

}  // namespace shampoo
