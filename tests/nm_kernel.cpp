// Runs the N:M kernel against a sort, for builds with sanitizers (make sanitize). Every tensor is
// an allocation of its exact size, so that a read or a write beside it is found.

#include "../src/secateur/kernels/nm.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

std::mt19937 random_bits(0);

// Fields of a floating point format.
struct Fields {
  int exponent_bits, fraction_bits;

  int64_t top() const { return (int64_t{1} << exponent_bits) - 1; }
  int64_t one() const { return (int64_t{1} << fraction_bits); }

  double size(int64_t bits) const {
    const int64_t exponent = bits >> fraction_bits & top(), fraction = bits & (one() - 1);
    if (exponent == top()) return fraction ? NAN : INFINITY;
    const double digits = static_cast<double>(fraction) / static_cast<double>(one());
    const int bias = static_cast<int>(top() / 2);
    return exponent ? std::ldexp(1 + digits, static_cast<int>(exponent) - bias)
                    : std::ldexp(digits, 1 - bias);
  }

  // One of ten magnitudes around 1, so that many are equal; or 0, infinity, NaN. Of both signs.
  int64_t draw() const {
    const int64_t kind = random_bits() % 40, sign = random_bits() % 2;
    int64_t bits = (top() / 2) * one() + (kind % 10 - 4) * (one() / 4);
    if (kind < 10) bits = 0;
    if (kind == 10) bits = top() * one();
    if (kind == 11) bits = top() * one() + 1 + random_bits() % 3;
    const uint64_t sizes = (uint64_t{1} << (exponent_bits + fraction_bits)) - 1;
    return sign ? bits | static_cast<int64_t>(~sizes) : bits;
  }
};

struct Shape {
  int64_t outer, length, inner;
};

template <typename Bits>
std::vector<uint8_t> sorted_mask(const std::vector<Bits>& weight, Fields fields, Shape shape, int n,
                                 int m) {
  std::vector<uint8_t> mask(weight.size());
  for (int64_t o = 0; o < shape.outer; o++)
    for (int64_t g = 0; g < shape.length; g += m)
      for (int64_t c = 0; c < shape.inner; c++) {
        std::vector<std::pair<double, int64_t>> group;  // the largest first, with its place
        for (int64_t i = g; i < std::min(g + m, shape.length); i++) {
          const int64_t at = (o * shape.length + i) * shape.inner + c;
          const double size = fields.size(weight[at]);
          group.emplace_back(std::isnan(size) ? -2e300 : std::isinf(size) ? -1e300 : -size, at);
        }
        std::sort(group.begin(), group.end());
        for (size_t rank = 0; rank < group.size(); rank++)
          mask[group[rank].second] = rank < static_cast<size_t>(n);
      }
  return mask;
}

void require(bool holds, const char* what, Shape s, int n, int m) {
  if (holds) return;
  std::printf("%s differs: %d:%d of %ld x %ld x %ld\n", what, n, m, static_cast<long>(s.outer),
              static_cast<long>(s.length), static_cast<long>(s.inner));
  std::exit(1);
}

template <class F>
void check(int format, Fields fields, Shape shape, int n, int m, int threads) {
  using Bits = typename F::Bits;
  const int64_t count = shape.outer * shape.length * shape.inner;
  std::vector<Bits> weight(count), applied(count);
  std::vector<uint8_t> mask(count);
  for (Bits& bits : weight) bits = static_cast<Bits>(fields.draw());
  const auto expected = sorted_mask(weight, fields, shape, n, m);
  const auto call = [&](int operation, const void* from, void* to, float decay) {
    const int status = secateur_nm(operation, format, from, to, decay, shape.outer, shape.length,
                                   shape.inner, n, m, threads);
    require(status == OK, "status", shape, n, m);
  };
  call(MASK, weight.data(), mask.data(), 0);
  require(mask == expected, "mask", shape, n, m);
  call(APPLY, weight.data(), applied.data(), 0);
  for (int64_t at = 0; at < count; at++) {
    const bool zero = !expected[at] || fields.size(weight[at]) == 0;
    require(applied[at] == (zero ? Bits{0} : weight[at]), "weight", shape, n, m);
  }
  if (format != 0) return;
  std::vector<float> now(count), target(count);
  for (float& each : target) each = static_cast<float>(random_bits() % 100);
  std::memcpy(now.data(), weight.data(), count * sizeof(float));
  for (bool itself : {false, true}) {
    std::vector<float> got = itself ? now : target;
    const std::vector<float> before = got;
    call(DECAY, itself ? got.data() : now.data(), got.data(), -0.25F);
    for (int64_t at = 0; at < count; at++) {
      const float pulled = before[at] + -0.25F * now[at], want = expected[at] ? before[at] : pulled;
      require(std::isnan(want) ? std::isnan(got[at]) : want == got[at], "decay", shape, n, m);
    }
  }
  std::vector<float> kept = now, rest = target;
  std::vector<Bits> whole(count);
  for (int64_t at = 0; at < count; at++) {
    const float sum = now[at] + 0.75F * target[at];
    std::memcpy(&whole[at], &sum, sizeof sum);
  }
  const auto chosen = sorted_mask(whole, fields, shape, n, m);
  const int status = secateur_nm_part(kept.data(), rest.data(), mask.data(), 0.75F, shape.outer,
                                      shape.length, shape.inner, n, m, threads);
  require(status == OK, "status", shape, n, m);
  for (int64_t at = 0; at < count; at++) {
    const bool keeps = chosen[at] && fields.size(whole[at]) != 0;
    const float sum = now[at] + 0.75F * target[at], parts[] = {keeps ? sum : 0, keeps ? 0 : sum};
    require(mask[at] == keeps, "mask of parts", shape, n, m);
    for (int part = 0; part < 2; part++) {
      const float got = part ? rest[at] : kept[at];
      require(std::isnan(parts[part]) ? std::isnan(got) : parts[part] == got, "part", shape, n, m);
    }
  }
  const Task task{weight.data(), mask.data(), 0, shape.outer, shape.length, shape.inner, n, m};
  std::fill(mask.begin(), mask.end(), uint8_t{2});
  portable<MASK, Float>(task, 0, task.slabs());
  require(mask == expected, "portable mask", shape, n, m);
}

void check_all(Shape shape, int n, int m, int threads) {
  check<Float>(0, {8, 23}, shape, n, m, threads);
  check<Half>(1, {5, 10}, shape, n, m, threads);
  check<BFloat16>(2, {8, 7}, shape, n, m, threads);
  check<Double>(3, {11, 52}, shape, n, m, threads);
}

}  // namespace

int main() {
  for (int m = 2; m <= 16; m++)
    for (int n = 1; n < m; n++)
      for (int64_t inner : {1, 3, 9, 16})
        for (int64_t length : {m - 1, 9 * m, 8 * m + m / 2})
          check_all({2, length, inner}, n, m, 1);
  for (int m : {32, MAX_M})
    for (int64_t inner : {1, 10}) check_all({2, 5 * m + 3, inner}, m / 2, m, 1);
  for (int64_t inner : {1, 9}) check_all({129, 5003 / inner, inner}, 2, 4, 3);  // by threads
  const auto refused = [](int operation, int format, int64_t length, int n, int m, int threads) {
    const int status =
        secateur_nm(operation, format, nullptr, nullptr, 0, 1, length, 1, n, m, threads);
    require(status == BAD_ARGUMENT, "refusal", {1, length, 1}, n, m);
  };
  refused(3, 0, 8, 2, 4, 1);          // no such operation
  refused(APPLY, 4, 8, 2, 4, 1);      // no such format
  refused(DECAY, 1, 8, 2, 4, 1);      // not in float16
  refused(APPLY, 0, -8, 2, 4, 1);
  refused(APPLY, 0, 8, 0, 4, 1);
  refused(APPLY, 0, 8, 4, 4, 1);
  refused(APPLY, 0, 8, 2, MAX_M + 1, 1);
  refused(APPLY, 0, 8, 2, 4, 0);
  std::puts(has_avx2() ? "AVX2 and portable agree with a sort" : "portable agrees with a sort");
}
