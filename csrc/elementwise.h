// The formulas of one step of preconditioned nonlinear conjugate gradients, for one element: each equation once.
//
// Source: Adya et al., arXiv:1812.02886, Algorithms 1 and 2 and section 3.2.2. With the symbols of docs/algorithm.md:
//
//     y     = g - g_prev                                  s = alpha_prev * d
//     h_new = | h + y^2 / ys - (h s)^2 / shs |            ys = sum(y s),  shs = sum(s h s)
//     w     = g / (h + eps), which is -z                  rz = sum(g w), rz_mid = sum(g g_prev / (h_old + eps))
//     beta  = rz_new / rz  or  (rz_new - rz_mid) / rz     clamped to [0, beta_max]
//     d_new = beta d - w                                  p_new = p + alpha d_new
//
// Adam's diagonal (Kingma & Ba, arXiv:1412.6980, Algorithm 1) instead of the BFGS one, with decoupled weight decay
// (Loshchilov & Hutter, arXiv:1711.05101):
//
//     v     = beta2 v + (1 - beta2) g^2                   h = sqrt(v / (1 - beta2^k)),  k updates of v
//     p_new = (1 - alpha weight_decay) p + alpha d_new
//
// `T` is a float, a double or a SIMD vector of either. Every instruction set and every CUDA thread calls these
// functions, so an element's bits do not depend on what computed it. For that reason the project compiles with
// floating-point contraction off: an fma in one place and a multiply and an add in another would differ.
//
// No memory, and no branches on data except selections: those belong to the callers. The scalars (beta, the sums'
// decisions) are in decisions.h.
#pragma once
#define NLCG_ELEMENTWISE

#include "step_args.h"

namespace fastnlcg {

// |x|, and the root of x. The vector overloads are in lanes.h.
NLCG_HD float absolute(float x) { return __builtin_fabsf(x); }
NLCG_HD double absolute(double x) { return __builtin_fabs(x); }
NLCG_HD float square_root(float x) { return __builtin_sqrtf(x); }
NLCG_HD double square_root(double x) { return __builtin_sqrt(x); }

// The gradient times its factor: 1 over the scale of AMP's loss, as torch's GradScaler does it, and -1 if the loss is
// maximized, which is exact, as is the product of the two.
template <class T>
NLCG_HD T scaled_gradient(T g, T factor) {
  return g * factor;
}

// L2 weight decay pulls toward zero: the gradient the method sees.
template <class T>
NLCG_HD T decayed_gradient(T g, T weight_decay, T p) {
  // Ignores p if the decay is 0: 0 * inf is NaN, and an element without decay may share a vector with others that
  // decay.
  return weight_decay != T{} ? g + weight_decay * p : g;
}

// min(x, bound), and bound if x is NaN: an overflow inside the curvature update must not reach h.
template <class T>
NLCG_HD T at_most(T x, T bound) {
  return x < bound ? x : bound;
}

// y
template <class T>
NLCG_HD T gradient_change(T g, T g_prev) {
  return g - g_prev;
}

// The last step, s. Also the increment of p: the curvature pair (s, y) then describes the move that was really made.
template <class T>
NLCG_HD T scaled_direction(T alpha, T d) {
  return alpha * d;
}

// Diagonal BFGS (Algorithm 2; the absolute value is the authors' guard against a negative diagonal).
// rsqrt_ys = 1/sqrt(ys), rsqrt_shs = 1/sqrt(shs): squaring the quotient instead of dividing the square keeps
// |g| ~ 1e19 inside float32, and (h s)^2/shs, which is at most h, out of reach of overflow. `bound` (a quarter of the
// largest finite number) acts only if the formula itself would overflow; it keeps h finite.
template <class T>
NLCG_HD T bfgs_diagonal(T h, T y, T s, T rsqrt_ys, T rsqrt_shs, T bound) {
  const T y_scaled = y * rsqrt_ys;
  const T hs_scaled = h * (s * rsqrt_shs);
  return at_most(absolute(T(h + y_scaled * y_scaled - hs_scaled * hs_scaled)), bound);
}

// h before an update, scaled (Oren & Luenberger 1974).
template <class T>
NLCG_HD T scaled_diagonal(T scale, T h) {
  return scale * h;
}

// max(x, bound)
template <class T>
NLCG_HD T at_least(T x, T bound) {
  return x > bound ? x : bound;
}

// Adam's second moment, v. Infinite if g^2 overflows, which it does for |g| above 1.8e19 in float32.
template <class T>
NLCG_HD T second_moment(T v, T g, T beta2, T one_minus_beta2) {
  return beta2 * v + one_minus_beta2 * (g * g);
}

// Adam's diagonal, h. inv_sqrt_bias_correction = 1 / sqrt(1 - beta2^k)
template <class T>
NLCG_HD T adam_diagonal(T v, T inv_sqrt_bias_correction) {
  return square_root(v) * inv_sqrt_bias_correction;
}

// x, and NaN if `guard` is not finite. A sum of such x is NaN if the guard has overflowed; a sum of g / h alone would
// be 0 there and hide it.
template <class T>
NLCG_HD T nan_if_not_finite(T x, T guard) {
  return x + (guard - guard);
}

// w = -z: the preconditioned gradient (the paper's -s = -M^-1 r). The sums and the direction apply the sign, which
// costs nothing there; without a preconditioner w = g.
template <class T>
NLCG_HD T preconditioned_gradient(T g, T h, T eps) {
  return g / (h + eps);
}

// d_new = z + beta d
template <class T>
NLCG_HD T conjugate_direction(T w, T beta, T d) {
  return beta * d - w;
}

// x + c row, a term of a sum over curvature pairs
template <class T>
NLCG_HD T with_multiple(T x, T c, T row) {
  return x + c * row;
}

// Decoupled weight decay. decay_factor = 1 - alpha * weight_decay
template <class T>
NLCG_HD T decayed_parameter(T p, T decay_factor) {
  return p * decay_factor;
}

// p_new = p + s with the new s
template <class T>
NLCG_HD T moved(T p, T s) {
  return p + s;
}

// The factor h s of shs = sum((h s) s)
template <class T>
NLCG_HD T hessian_times(T h, T s) {
  return h * s;
}

}  // namespace fastnlcg
