// Every preconditioner: the list that the CPU, the kernels and Python's names are made from. To add one, write its
// passes in a header of its own, include it here, and add a line to NLCG_PRECONDITIONERS.
//
//     none   PlainDots         reads g                    rz                                            4 bytes
//            PlainMove         reads p, g, d              writes p, d, g_prev                          24
//     bfgs   CurvatureDot      reads g, d                 sum(g s), max |g|                             8
//            CurvatureAndDots  reads g, g_prev, d, h      writes h; rz, rz_mid, max |z|                20
//            CurvatureAndMove  reads p, g, d, h           writes p, d, g_prev; sum(g s), sum(s h s)    28
//     adam   AdamDots          reads g, v                 rz, rz_mid                                    8
//            AdamMove          reads p, g, d, v           writes p, d, v; sum(g g), sum(g d)           28
//
//     muon   MuonDots, MuonMove: for matrices see pass_muon.h, of other parameters as adam
//
// per float32 element; PlainDots and AdamDots also read g_prev if Polak-Ribiere needs rz_mid.
#pragma once

#include "clipping.h"
#include "pass_adam.h"
#include "pass_bfgs.h"
#include "pass_muon.h"
#include "pass_none.h"

namespace fastnlcg {

// Its name in Python, and its struct.
#define NLCG_PRECONDITIONERS(X) \
  X(none, Plain)                \
  X(bfgs, Bfgs)                 \
  X(adam, Adam)                 \
  X(muon, Muon)

enum class Preconditioner : std::int32_t {
#define NLCG_VALUE(name, type) name,
  NLCG_PRECONDITIONERS(NLCG_VALUE)
#undef NLCG_VALUE
};
constexpr const char* kPreconditionerNames[] = {
#define NLCG_NAME(name, type) #name,
    NLCG_PRECONDITIONERS(NLCG_NAME)
#undef NLCG_NAME
};

// A preconditioner: the passes of its step, the state arrays they need, and two of the passes as parts of fastnlcg.ops,
// with their scalars.
template <class P>
concept IsPreconditioner = requires(const Options& o, ElementBroadcast<float> broadcast) {
  typename P::Passes;
  { P::state_arrays(o) } -> std::same_as<unsigned>;
  { P::dots(o, true, broadcast) } -> Pass;             // forms rz, and, if true, rz_mid
  { P::move(o, 0.5, true, true, broadcast) } -> Pass;  // with beta; if true, writes g_prev; if true, moves p
};

// Whether segments may be matrices, which have no diagonal.
template <class P>
constexpr bool kTakesMatrices = requires { requires P::kMatrices; };

// Calls f with the struct.
template <class F>
decltype(auto) with_preconditioner(Preconditioner kind, F&& f) {
  switch (kind) {
#define NLCG_CASE(name, type)              \
  case Preconditioner::name:               \
    static_assert(IsPreconditioner<type>); \
    return f(type{});
    NLCG_PRECONDITIONERS(NLCG_CASE)
#undef NLCG_CASE
  }
  __builtin_unreachable();
}

// Calls f with a struct whose ::Passes are those of a step with these options.
template <class F>
decltype(auto) with_passes(const Options& o, F&& f) {
  return with_preconditioner(o.preconditioner, [&](auto preconditioner) {
    using P = decltype(preconditioner);
    return o.measure_norm ? f(Clipped<P>{}) : f(P{});
  });
}

}  // namespace fastnlcg
