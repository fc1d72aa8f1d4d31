// The conversions of number formats in numbers.h: all half-precision numbers, and all ties and their
// neighbours on the way back.
#include <stdio.h>

#include "draw.h"
#include "numbers.h"

namespace loki_test {
namespace {

int64_t checks = 0, failures = 0;

void expect(const char* what, double x, double got, double wanted) {
  ++checks;
  if (got == wanted ? signbit(got) == signbit(wanted) : isnan(got) && isnan(wanted)) return;
  if (++failures < 20) fprintf(stderr, "%s of %.17g is %.9g, should be %.9g\n", what, x, got, wanted);
}

void check_rounding(float x) {
  for (const int64_t dtype : {LOKI_F32, LOKI_BF16, LOKI_F16}) {
    char bits[4];
    loki::store_number(bits, dtype, 0, x);
    expect(dtype == LOKI_BF16  ? "bfloat16"
           : dtype == LOKI_F16 ? "float16"
                               : "float32",
           static_cast<double>(x), number(bits, dtype, 0), rounded(static_cast<double>(x), dtype));
  }
}

}  // namespace
}  // namespace loki_test

int main() {
  using namespace loki_test;
  for (const int64_t dtype : {LOKI_BF16, LOKI_F16}) {
    for (uint32_t i = 0; i < 0x10000; ++i) {
      const uint16_t halves[4] = {static_cast<uint16_t>(i), static_cast<uint16_t>(i + 1), 0, 0};
      const double x = number(halves, dtype, 0), y = number(halves, dtype, 1);
      expect("widened", x, static_cast<double>(loki::load_number(halves, dtype, 0)), x);
      check_rounding(single(x));
      if (!isfinite(x)) continue;
      // Half way to the next number, which beyond the largest is where it would be.
      const double last_unit = ldexp(format_of(dtype).most, -format_of(dtype).digits);
      const double middle = isfinite(y) ? 0.5 * x + 0.5 * y : x + copysign(0.5 * last_unit, x);
      const float tie = single(middle);
      check_rounding(tie);
      check_rounding(nextafterf(tie, INFINITY));
      check_rounding(nextafterf(tie, -INFINITY));
    }
  }
  printf("%lld conversions, %lld failures\n", static_cast<long long>(checks), static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
