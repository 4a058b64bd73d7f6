// attention's weights on the CPU, behind the forward that leaves each row's maximum and sum, against softmax in double.
#include "attention_problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

template <class T, class M>
void check_with_mask(const Case& c, int averaged, double (*draw_mask)()) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  if (turn++ % every) return;
  ++cases;
  const int64_t heads = c.batch * c.heads, kv = c.heads / c.group, results = heads / averaged;
  const Operand<T> query({c.batch, c.heads, c.L, c.D}, c.query, normal), key({c.batch, kv, c.S, c.D}, c.key, normal);
  const Operand<T> value({c.batch, kv, c.S, 1}, c.value, normal), output({c.batch, c.heads, c.L, 1}, {}, nullptr);
  const Operand<M> mask = mask_of<M>(c, draw_mask);
  Buffer<C> maximum(heads * c.L), sum(heads * c.L);
  Buffer<T> weights(results * c.L * c.S);
  for (int64_t i = 0; i < weights.size; ++i) weights.data[i] = from_double<T>(7);

  AttentionParams p = params_of(c, query, key, value, output, mask);
  p.maximum = maximum.data.get(), p.sum = sum.data.get();
  const auto complain = [&](const std::string& what) {
    if (++failures <= 20)
      std::printf("FAILED %s: dtype %d averaged %d %s\n", what.c_str(), static_cast<int>(p.dtype), averaged,
                  c.text().c_str());
  };
  Status status = attention_forward(p, nullptr, Memory(), nullptr);
  AttentionParams seeded = p;
  const int64_t on_device = static_cast<int64_t>(p.philox_seed);
  if (c.seed_on_device) seeded.philox_seed = 1;
  if (status.ok())
    status =
        attention_weights({seeded, averaged, weights.data.get()}, c.seed_on_device ? &on_device : nullptr, nullptr);
  if (!status.ok()) return complain(status.message);

  const double unit = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24, keep = c.dropout >= 1 ? 0 : 1 / (1 - c.dropout);
  std::vector<double> wanted(results * c.L * c.S), allowed(wanted.size());
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t l = 0; l < c.L; ++l) {
      std::vector<double> s(c.S), wrong(c.S), ones(c.S, 1), keeps(c.S, 1);
      double top = -INFINITY, total = 0, most = 0;
      for (int64_t k = 0; k < c.S; ++k) {
        double x = 0, size = 0;
        for (int64_t e = 0; e < c.D; ++e) {
          const double product = query.at(h, l, e) * key.at(h / c.group, k, e) * c.scale;
          x += product, size += std::fabs(product);
        }
        if (c.softcap != 0) x = c.softcap * std::tanh(x / c.softcap);
        const double added = c.mask != AttentionMask::None ? mask.at(h, l, k) : 0;
        x = masked_score<C>(x, added);
        if (k < l + c.first || k > l + c.last) x = -INFINITY;
        s[k] = x, top = std::max(top, x);
        const double rounded = swallows(added) || std::isinf(x) ? 0 : 8 * std::fabs(x) + std::fabs(added);
        wrong[k] = unit * (size * (2 + std::sqrt(1.0 * c.D)) + rounded + 16 * c.softcap + 16);
        most = std::max(most, wrong[k]);
      }
      for (int64_t k = 0; k < c.S; ++k) total += top > -INFINITY ? std::exp(s[k] - top) : 0;
      if (c.dropout > 0) cpu::baseline::drop<double>(p, {h, l}, 0, c.S, ones.data(), keeps.data());
      for (int64_t k = 0; k < c.S; ++k) {
        const int64_t at = (h / averaged * c.L + l) * c.S + k;
        const double P = total > 0 ? std::exp(s[k] - top) / total : c.nan_unseen ? NAN : 0;
        if (keeps[k] == 0) continue;
        const double x = P * keep / averaged;
        wanted[at] += x, allowed[at] += std::fabs(x) * (3 * wrong[k] + 3 * most + unit * (8 + averaged));
      }
    }
  const double rounding = sizeof(T) == 2 ? epsilon<T> : 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double x = to_double(weights.data[i]),
                 bound = allowed[i] + rounding * std::fabs(wanted[i]) + (sizeof(T) == 2 ? 0x1p-24 : 0x1p-120);
    if (std::isnan(wanted[i]) ? !std::isnan(x) : !(std::fabs(x - wanted[i]) <= bound))
      return complain(std::to_string(x) + " for " + std::to_string(wanted[i]) + " at " + std::to_string(i));
  }
}

template <class T>
void check(const Case& c, int averaged) {
  with_mask_type<T>(c, [&](auto element, auto draw) { check_with_mask<T, decltype(element)>(c, averaged, draw); });
}

template <class T>
void check_all(int count) {
  Case c;
  for (const int L : {0, 1, 63, 64, 65, 130})
    for (const int S : {0, 1, 63, 64, 65}) c.L = L, c.S = S, c.D = 9, c.last = L % 2 ? 0 : S - L, check<T>(c, 1);
  c.L = 5, c.S = 70, c.last = 40;
  for (const int D : {0, 1, 7, 8, 9, 16, 17, 33, 65, 129}) c.D = D, check<T>(c, 1);
  c.L = 7, with_hidden_rows(c, [](const Case& hidden) { check<T>(hidden, 1); });
  for (int i = 0; i < count; ++i) {
    Case r;
    r.batch = pick({1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 2, 5, 31, 64, 67, 129}), r.S = pick({0, 1, 3, 17, 64, 65, 131}), r.D = pick({1, 3, 8, 17, 64});
    random_rest(r), random_general(r);
    check<T>(r, chance(50) ? static_cast<int>(r.heads) : 1);
  }
}

}  // namespace

// attention_weights_test [every]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  check_all<float>(60), check_all<double>(40), check_all<Float16>(30), check_all<BFloat16>(30);
  for (const auto order : {host::Machine::Backward, host::Machine::Shuffled}) {
    host::machine.order = order;
    check_all<float>(5);
  }
  std::printf("attention weights: %d cases, %d failed\n", cases, failures);
  std::fflush(stdout);
  return failures != 0;
}
