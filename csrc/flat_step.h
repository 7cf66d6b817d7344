// The step and its parts over flat buffers, which are one segment and one group: the native side of fastnlcg.ops and
// fastnlcg.minimize.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "native_step.h"

namespace fastnlcg {

class FlatStep : public NativeStep {
 public:
  FlatStep(const std::string& state_dtype, const std::string& device, std::uintptr_t stream)
      : NativeStep(state_dtype, device, stream) {
    refuse_bfloat16_state("a flat step");
  }

  // The buffers of the calls below, which it holds. Null: absent; p or g must be given. `steps`: how often the diagonal
  // was updated.
  struct Buffers {
    BufferPtr p, g, grad_prev, direction, diagonal, origin;
    BufferPtr rows;  // of curvature pairs, each n elements
  };
  // `owned`: how many elements, from the start, this rank adds to sums, as in TensorTable::set_exchange; -1: all.
  void bind(const Buffers&, double steps, std::int64_t owned = -1);

  // A whole step. `scalars` has NLCG_SCALARS, alpha_prev and the updates of the diagonal, in this order, and is
  // written.
  bool step(const BufferPtr& scalars, double lr, double weight_decay, bool maximize, double loss, int threads);

  // Parts of a step.
  std::tuple<double, double, bool> update_curvature(double alpha_prev, int threads);  // ys, shs, whether h was written
  std::pair<double, double> preconditioned_dots(int threads);                         // rz, rz_mid
  void update_direction(double alpha, double weight_decay, double beta, int threads);

  // One pass of full-batch descent.
  std::vector<double> descend(const Descent&, int threads);

 private:
  void check_part() const;  // throws if a part cannot run
  void prepare_part(double alpha, double alpha_prev, double weight_decay, int threads);
  void prepare(double alpha, double alpha_prev, double weight_decay, int threads);

  Buffers buffers_;
  bool bound_ = false;
  double steps_ = 0, alpha_prev_ = 0;
};

// Divides each of the `count` matrices in `x`, which have `n` elements each, by its norm; zeros stay zeros. `sums`, of a
// GPU: normalize_doubles(...) of workspace.
void normalize(const BufferPtr& x, std::int64_t count, std::int64_t n, int threads, std::uintptr_t stream,
               const BufferPtr& sums);

}  // namespace fastnlcg
