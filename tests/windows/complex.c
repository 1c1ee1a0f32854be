// C99's complex functions, which Wine's ucrtbase.dll lacks, and which numpy and torch import: prefix.py. By their
// textbook formulas, in double; long double is double on Windows. Its ABI passes and returns a pair of floats in a
// register, and a pair of doubles by its address, as these structures. The real functions are those of Wine's
// ucrtbase.dll.
typedef struct {
  float re, im;
} Single;
typedef struct {
  double re, im;
} Double;

double hypot(double, double), atan2(double, double), copysign(double, double);
double exp(double), log(double), sin(double), cos(double), tan(double), sinh(double), cosh(double), sqrt(double);

int _fltused = 0;  // of a C library, which is not linked
int DllMainCRTStartup(void) { return 1; }

static const double kHalfPi = 1.57079632679489661923, kLog10 = 2.30258509299404568402;

static int is_infinite(double x) { return x == x && x - x != 0; }
static double magnitude(double x) { return x < 0 ? -x : x; }
static Double make(double re, double im) {
  const Double z = {re, im};
  return z;
}
static Double times_i(Double z) { return make(-z.im, z.re); }
static Double over_i(Double z) { return make(z.im, -z.re); }
static Double add(Double a, Double b) { return make(a.re + b.re, a.im + b.im); }
static Double multiply(Double a, Double b) { return make(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re); }

static double abs_of(Double z) { return hypot(z.re, z.im); }
static double arg_of(Double z) { return atan2(z.im, z.re); }
static double re_of(Double z) { return z.re; }
static double im_of(Double z) { return z.im; }
static double norm_of(Double z) { return z.re * z.re + z.im * z.im; }
static Double conj_of(Double z) { return make(z.re, -z.im); }
static Double proj_of(Double z) {
  return is_infinite(z.re) || is_infinite(z.im) ? make(1.0 / 0.0, copysign(0, z.im)) : z;
}
static Double exp_of(Double z) {
  const double e = exp(z.re);
  return z.im == 0 ? make(e, z.im) : make(e * cos(z.im), e * sin(z.im));
}
static Double log_of(Double z) { return make(log(abs_of(z)), arg_of(z)); }
static Double log10_of(Double z) { return make(log(abs_of(z)) / kLog10, arg_of(z) / kLog10); }
static Double sqrt_of(Double z) {
  if (z.re == 0 && z.im == 0) return make(0, z.im);
  const double root = sqrt((abs_of(z) + magnitude(z.re)) / 2), other = z.im / (2 * root);
  if (z.re >= 0) return make(root, other);
  return make(magnitude(other), copysign(root, z.im));
}
static Double pow_of(Double a, Double b) {
  if (b.re == 0 && b.im == 0) return make(1, 0);
  if (a.re == 0 && a.im == 0) return make(0, 0);
  return exp_of(multiply(b, log_of(a)));
}
static Double sinh_of(Double z) {
  return z.im == 0 ? make(sinh(z.re), z.im) : make(sinh(z.re) * cos(z.im), cosh(z.re) * sin(z.im));
}
static Double cosh_of(Double z) { return make(cosh(z.re) * cos(z.im), sinh(z.re) * sin(z.im)); }
static Double tanh_of(Double z) {  // Kahan's
  if (z.re > 22 || z.re < -22) return make(copysign(1, z.re), 4 * sin(z.im) * cos(z.im) * exp(-2 * magnitude(z.re)));
  const double t = tan(z.im), beta = 1 + t * t, s = sinh(z.re), rho = sqrt(1 + s * s), d = 1 + beta * s * s;
  return is_infinite(t) ? make(rho / s, 1 / t) : make(beta * rho * s / d, t / d);
}
static Double sin_of(Double z) { return over_i(sinh_of(times_i(z))); }
static Double cos_of(Double z) { return cosh_of(times_i(z)); }
static Double tan_of(Double z) { return over_i(tanh_of(times_i(z))); }
static Double asinh_of(Double z) { return log_of(add(z, sqrt_of(add(multiply(z, z), make(1, 0))))); }
static Double acosh_of(Double z) {
  return log_of(add(z, multiply(sqrt_of(add(z, make(1, 0))), sqrt_of(add(z, make(-1, 0))))));
}
static Double atanh_of(Double z) {
  const Double a = log_of(add(make(1, 0), z)), b = log_of(make(1 - z.re, -z.im));
  return make((a.re - b.re) / 2, (a.im - b.im) / 2);
}
static Double asin_of(Double z) { return over_i(asinh_of(times_i(z))); }
static Double acos_of(Double z) {
  const Double a = asin_of(z);
  return make(kHalfPi - a.re, -a.im);
}
static Double atan_of(Double z) { return over_i(atanh_of(times_i(z))); }

static Double wide(Single z) { return make(z.re, z.im); }
static Single narrow(Double z) {
  const Single s = {(float)z.re, (float)z.im};
  return s;
}

// prefix.py exports each without "ours_".
#define REAL(name, of)                              \
  double ours_##name(Double z) { return of(z); }    \
  double ours_##name##l(Double z) { return of(z); } \
  float ours_##name##f(Single z) { return (float)of(wide(z)); }
#define COMPLEX(name, of)                           \
  Double ours_##name(Double z) { return of(z); }    \
  Double ours_##name##l(Double z) { return of(z); } \
  Single ours_##name##f(Single z) { return narrow(of(wide(z))); }
REAL(cabs, abs_of)
REAL(carg, arg_of)
REAL(creal, re_of)
REAL(cimag, im_of)
REAL(norm, norm_of)
COMPLEX(conj, conj_of)
COMPLEX(cproj, proj_of)
COMPLEX(cexp, exp_of)
COMPLEX(clog, log_of)
COMPLEX(clog10, log10_of)
COMPLEX(csqrt, sqrt_of)
COMPLEX(csin, sin_of)
COMPLEX(ccos, cos_of)
COMPLEX(ctan, tan_of)
COMPLEX(csinh, sinh_of)
COMPLEX(ccosh, cosh_of)
COMPLEX(ctanh, tanh_of)
COMPLEX(casin, asin_of)
COMPLEX(cacos, acos_of)
COMPLEX(catan, atan_of)
COMPLEX(casinh, asinh_of)
COMPLEX(cacosh, acosh_of)
COMPLEX(catanh, atanh_of)
Double ours_cpow(Double a, Double b) { return pow_of(a, b); }
Double ours_cpowl(Double a, Double b) { return pow_of(a, b); }
Single ours_cpowf(Single a, Single b) { return narrow(pow_of(wide(a), wide(b))); }
