// The bits of the CPU step, one line a case: what it ran, and a digest of every buffer and scalar after every step. No
// Python, so that any compiler and an emulated processor may run it. tests/test_bits.py compares with
// tests/fixtures/bits.txt, which gcc made on x86-64.
#include <cinttypes>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include "half.h"
#include "preconditioners.h"
#include "simd.h"
#include "step_cpu.h"

using namespace fastnlcg;

namespace {

#if defined(__x86_64__)
constexpr FloatMode kFlushing = 0x9fc0;  // denormals to zero, as results and as operands
#else
constexpr FloatMode kFlushing = 1u << 24;
#endif

struct Digest {  // FNV-1a
  std::uint64_t value = 14695981039346656037u;
  template <class T>
  void add(const T* data, std::size_t count) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < count * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
  void add(double x) { add(&x, 1); }
};

// The first `count` sums of a pass, and its largest element behind them. The mark of a point, which came later, is left out,
// so that the digests of the committed file stay; test_descent.py compares it with the reference.
void add_sums(Digest& digest, const double (&sums)[kMaxSums + 1], int count) {
  for (int j = 0; j < 4; ++j) digest.add(j < count ? sums[j] : 0.0);
}

struct Case {
  std::string name;
  DType dtype = DType::f32;
  Options options = {};
  bool packed = false;  // parameters back to back, so that blocks straddle them; else each begins at a block
  std::vector<std::int64_t> sizes = {1, 15, 16, 17, 33, 4095, 4097, 5000};
  float scale = 1.0f;  // of the start
  int threads = 1;
  bool flushing = false;  // the caller's mode; the step has its own
  bool descent = false;   // instead of steps: the passes of full batch, which 16 bits do not have, and the parts
  bool bfloat16_state = false;
};

// Numbers in (-1, 1) with 24 bits, exact in float.
float number(std::uint32_t i) { return static_cast<float>(static_cast<std::int32_t>(mixed(i)) >> 7) * 0x1p-24f; }

template <class E, class S, class T = S>
std::uint64_t run(const Case& c) {
  std::vector<Segment> segments;
  std::int64_t n = 0;
  std::vector<double> steps_of(c.sizes.size());
  double alpha_prev[2] = {};
  for (std::size_t k = 0; k < c.sizes.size(); ++k) {
    if (!c.packed) n = (n + kBlockElements - 1) / kBlockElements * kBlockElements;
    Segment segment = {};
    segment.offset = n;
    segment.n = c.sizes[k];
    segment.shard = {0, 0, 0, static_cast<std::uint32_t>(k)};
    if (k == 4) segment.shard = {7, 11, 22, 4};  // a shard of columns
    segment.group = static_cast<std::int32_t>(k % 2);
    segment.dtype = c.dtype;
    segment.steps = &steps_of[k];
    segments.push_back(segment);
    n += segment.n;
  }
  const bool bfgs = c.options.preconditioner == Preconditioner::bfgs;
  const auto size = static_cast<std::size_t>(n);
  std::vector<E> p(size), g(size);
  std::vector<T> grad_prev(size), d(size), diagonal(size);
  for (T& h : diagonal) assign(h, bfgs ? S{1} : S{0});
  for (std::size_t i = 0; i < size; ++i) {
    assign(p[i], static_cast<S>(c.scale * number(static_cast<std::uint32_t>(i))));
  }
  for (Segment& segment : segments) {
    segment.p = &p[static_cast<std::size_t>(segment.offset)];
    segment.g = &g[static_cast<std::size_t>(segment.offset)];
    segment.grad_prev = &grad_prev[static_cast<std::size_t>(segment.offset)];
    segment.direction = &d[static_cast<std::size_t>(segment.offset)];
    segment.diagonal = &diagonal[static_cast<std::size_t>(segment.offset)];
    segment.origin = segment.grad_prev;  // as when the digests were made: no pass uses both
  }
  std::vector<Group> groups = {{0.01, 0, 0, 1, &alpha_prev[0]}, {0.02, 0, 0.1, -1, &alpha_prev[1]}};
  Scalars scalars = {};
  each_scalar([&, at = reinterpret_cast<double*>(&scalars)](const char*, double start) mutable { *at++ = start; });
  std::vector<Bias> bias(segments.size());
  std::vector<double> partials(static_cast<std::size_t>(partials_needed(n)));
  Step step = {};
  step.segments = segments.data();
  step.n_segments = static_cast<std::int64_t>(segments.size());
  step.n = n;
  step.state_dtype = sizeof(S) == sizeof(double) ? DType::f64 : sizeof(T) == sizeof(S) ? DType::f32 : DType::bf16;
  step.groups = groups.data();
  step.n_groups = 2;
  step.options = c.options;
  step.scalars = &scalars;
  step.bias = bias.data();
  step.partials = partials.data();
  step.loss = std::nan("");
  step.threads = c.threads;
  step.owned = n;

  Digest digest;
  const FloatMode before = float_mode();
  const CpuKernels& kernels = cpu_kernels();
  for (int t = 0; t < 5; ++t) {
    for (std::size_t i = 0; i < size; ++i) {  // curvatures from 1 to 3, and noise; the second group climbs
      const auto j = static_cast<std::uint32_t>(i);
      const S noise = static_cast<S>(0.1f * c.scale * number(j ^ (0x51ed27u * static_cast<std::uint32_t>(t + 1))));
      assign(g[i], value_of(p[i]) * static_cast<S>(2.0f + number(j + 77)) + noise);
    }
    if (c.options.line_search) step.loss = t == 2 ? 4.0 : 3.0 - 0.01 * t;
    if (c.flushing) set_float_mode(kFlushing);
    double x[kMaxSums + 1] = {};
    if (!c.descent) {
      kernels.step(step);
    } else {
      if constexpr (sizeof(E) == sizeof(S)) {
        using Kind = Descent::Kind;
        const bool h = c.options.preconditioner == Preconditioner::bfgs;
        kernels.descend(step, {Kind::trial, 0.125, t % 2 == 0, h}, x);
        add_sums(digest, x, 0);
        kernels.descend(step, {Kind::slope, 0, false, h}, x);
        add_sums(digest, x, 2);
        kernels.descend(step, {Kind::curvature, 0.125, false, h, h && t > 1, 0.5, 1.5, 1.25}, x);
        add_sums(digest, x, 3);
        kernels.descend(step, {Kind::direction, 0, false, h, false, 1, 0, 0, t ? 0.4 : 0.0}, x);
        add_sums(digest, x, 2);
      }
      if (bfgs) kernels.update_curvature(step, &x[0], &x[1]);
      kernels.preconditioned_dots(step, &x[0], &x[1]);
      kernels.update_direction(step, 0.3);
      add_sums(digest, x, 2);
    }
    if (c.flushing) {
      if (float_mode() != kFlushing) return 0;
      set_float_mode(before);
    }
    kernels.state_norms(step, &x[0], &x[1], &x[2]);
    if (bfgs && !c.descent) kernels.last_move(step);
    digest.add(x, 3);
    digest.add(&scalars.step, offsetof(Scalars, rz_matrices) / sizeof(double));  // those of matrices came later
    digest.add(alpha_prev, 2);
    digest.add(steps_of.data(), steps_of.size());
    digest.add(p.data(), size);
    digest.add(grad_prev.data(), size);
    digest.add(d.data(), size);
    digest.add(diagonal.data(), size);
  }
  if (scalars.skipped_steps != 0 && !std::isfinite(c.options.skip_grad_norm)) return 1;
  return digest.value;
}

void report(const Case& c) {
  const std::uint64_t digest = c.bfloat16_state         ? run<float, float, BFloat16>(c)
                               : c.dtype == DType::f64  ? run<double, double>(c)
                               : c.dtype == DType::f32  ? run<float, float>(c)
                               : c.dtype == DType::bf16 ? run<BFloat16, float>(c)
                                                        : run<Float16, float>(c);
  std::printf("%016" PRIx64 " %s %s\n", digest, kDTypeNames[static_cast<int>(c.dtype)], c.name.c_str());
}

// Every half there is, to float and back, and floats between halves.
void report_halves() {
  Digest digest;
  for (std::uint32_t u = 0; u < 65536; ++u) {
    const auto bits = static_cast<std::uint16_t>(u);
    const float from_bf16 = value_of(BFloat16{bits}), from_f16 = value_of(Float16{bits});
    digest.add(&from_bf16, 1);
    digest.add(&from_f16, 1);
    BFloat16 bf16;
    Float16 f16;
    for (const std::uint32_t cut : {0u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
      const float between = bits_of<float>((u << 16) + cut);
      assign(bf16, between);
      assign(f16, between);
      digest.add(&bf16.bits, 1);
      digest.add(&f16.bits, 1);
      assign_rounded(bf16, between, {true, cut, {0, 0, 0, 0}}, static_cast<std::int64_t>(u));
      digest.add(&bf16.bits, 1);
    }
  }
  std::printf("%016" PRIx64 " bfloat16 and float16, to and from float\n", digest.value);
}

}  // namespace

int main() {
  report_halves();
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (const Preconditioner kind : {Preconditioner::none, Preconditioner::bfgs, Preconditioner::adam}) {
      Case of_kind;
      of_kind.dtype = dtype;
      of_kind.options.preconditioner = kind;
      const std::string name = kPreconditionerNames[static_cast<int>(kind)];
      for (const UpdateRule rule : {UpdateRule::fletcher_reeves, UpdateRule::polak_ribiere, UpdateRule::heavy_ball}) {
        for (const bool packed : {false, true}) {
          Case c = of_kind;
          c.options.update = rule;
          c.options.beta_max = rule == UpdateRule::heavy_ball ? 0.9 : 100.0;
          c.packed = packed;
          c.name = name + " " + kUpdateRuleNames[static_cast<int>(rule)] + (packed ? " packed" : "");
          report(c);
        }
      }
      const auto with = [&](const char* what, auto&& change) {
        Case c = of_kind;
        change(c);
        c.name = name + " " + what;
        report(c);
      };
      with("three threads", [](Case& c) {
        c.threads = 3;
        c.sizes = {100000, 17, 30001};
      });
      with("clipping", [](Case& c) {
        c.options.measure_norm = true;
        c.options.max_grad_norm = 20;
        c.packed = true;
      });
      with("skipped at a norm", [](Case& c) {
        c.options.measure_norm = true;
        c.options.skip_grad_norm = 137.9;
      });
      with("line search", [](Case& c) { c.options.line_search = true; });
      with("small numbers, under a caller that flushes them", [](Case& c) {
        c.scale = c.dtype == DType::f64 ? 0x1p-120f : c.dtype == DType::f16 ? 0x1p-14f : 0x1p-118f;
        c.flushing = true;
        c.packed = true;
      });
      const bool half = dtype == DType::bf16 || dtype == DType::f16;
      with(half ? "parts" : "descent and parts", [](Case& c) { c.descent = true; });
      if (dtype == DType::bf16) {
        for (const bool packed : {false, true}) {
          with(packed ? "stochastic rounding packed" : "stochastic rounding", [packed](Case& c) {
            c.options.stochastic_rounding = true;
            c.packed = packed;
          });
        }
      }
      if (dtype == DType::f32 && kind == Preconditioner::adam) {
        for (const bool packed : {false, true}) {
          with(packed ? "state in bfloat16 packed" : "state in bfloat16", [packed](Case& c) {
            c.options.update = UpdateRule::polak_ribiere;
            c.bfloat16_state = true;
            c.packed = packed;
          });
        }
        with("state in bfloat16 clipping, three threads", [](Case& c) {
          c.options.measure_norm = true;
          c.options.max_grad_norm = 20;
          c.bfloat16_state = true;
          c.threads = 3;
          c.sizes = {100000, 17, 30001};
        });
      }
      if (dtype == DType::f32) {
        with("stores around the cache", [](Case& c) { c.sizes = {(1 << 21) + 16}; });
      }
    }
  }
}
