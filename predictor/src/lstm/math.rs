//! Exponential, sigmoid and hyperbolic tangent on vectors.
//!
//! eˣ = 2ⁿ · eʳ with n = round(x / ln 2), so that |r| ≤ ln 2 / 2 = 0.347, and eʳ by its Taylor series to the sixth
//! power: the first term left out is r⁷/5040 ≤ 1.2e-7, one unit in the last place. ln 2 is subtracted in two parts of
//! which the first has trailing zeros, so that n · ln 2 loses nothing (Cody and Waite 1980).
//!
//! | function | absolute error | for |
//! | --- | --- | --- |
//! | [`exp`] | ≤ 4e-7 of the result | -87 ≤ x ≤ 87; beyond, the result of the nearest bound |
//! | [`sigmoid`] | ≤ 2e-7 | every x |
//! | [`tanh`] | ≤ 4e-7 | every x |

use super::isa::Isa;

/// Adding and subtracting 1.5 · 2²³ rounds a float to the nearest integer and leaves it in the lowest mantissa bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 to 15 bits, and the rest.
const LN2_HIGH: f32 = 0.693_145_75;
const LN2_LOW: f32 = 1.428_606_8e-6;
/// 1/k! for k = 6, 5, … 0.
const SERIES: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

#[inline(always)]
pub(crate) fn exp<I: Isa>(isa: I, x: I::Vector) -> I::Vector {
    // within this, 2ⁿ is a normal number
    let x = isa.min(isa.max(x, isa.splat(-87.0)), isa.splat(87.0));
    let rounded = isa.mul_add(x, isa.splat(std::f32::consts::LOG2_E), isa.splat(ROUND));
    let n = isa.sub(rounded, isa.splat(ROUND));
    let r = isa.mul_add(n, isa.splat(-LN2_HIGH), x);
    let r = isa.mul_add(n, isa.splat(-LN2_LOW), r);
    let mut sum = isa.splat(SERIES[0]);
    for term in &SERIES[1..] {
        sum = isa.mul_add(sum, r, isa.splat(*term));
    }
    isa.mul(sum, isa.pow2(rounded))
}

#[inline(always)]
pub(crate) fn sigmoid<I: Isa>(isa: I, x: I::Vector) -> I::Vector {
    let one = isa.splat(1.0);
    isa.div(one, isa.add(one, exp(isa, isa.sub(isa.splat(0.0), x))))
}

#[inline(always)]
pub(crate) fn tanh<I: Isa>(isa: I, x: I::Vector) -> I::Vector {
    let one = isa.splat(1.0);
    let two = isa.splat(2.0);
    isa.sub(one, isa.div(two, isa.add(one, exp(isa, isa.mul(two, x)))))
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Kernel, LANES, Path};
    use super::*;

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        Sigmoid,
        Tanh,
    }

    struct Apply(Function, [f32; LANES]);

    impl Kernel for Apply {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> [f32; LANES] {
            let x = isa.load(&self.1);
            let y = match self.0 {
                Function::Exp => exp(isa, x),
                Function::Sigmoid => sigmoid(isa, x),
                Function::Tanh => tanh(isa, x),
            };
            let mut out = [0.0; LANES];
            isa.store(y, &mut out);
            out
        }
    }

    /// The largest `error(x, f(x))` on a fine grid of [-limit, limit].
    fn worst(path: Path, function: Function, limit: f32, error: impl Fn(f64, f64) -> f64) -> f64 {
        let count = 400_000;
        let at = |i: usize| limit * (2.0 * i as f32 / count as f32 - 1.0);
        let mut worst = 0.0f64;
        for start in (0..=count).step_by(LANES) {
            let x: [f32; LANES] = std::array::from_fn(|lane| at(start + lane).clamp(-limit, limit));
            let y = path.run(Apply(function, x));
            for (x, y) in x.iter().zip(y) {
                worst = worst.max(error(f64::from(*x), f64::from(y)));
            }
        }
        worst
    }

    #[test]
    fn functions_keep_their_error_bounds_on_every_path() {
        for path in Path::available() {
            let exp = worst(path, Function::Exp, 87.0, |x, y| (y / x.exp() - 1.0).abs());
            assert!(exp <= 4e-7, "{}: exp {exp:e}", path.name());
            for limit in [1.0, 12.0, 200.0] {
                let sigmoid = worst(path, Function::Sigmoid, limit, |x, y| (y - 1.0 / (1.0 + (-x).exp())).abs());
                assert!(sigmoid <= 2e-7, "{}: sigmoid {sigmoid:e}", path.name());
                let tanh = worst(path, Function::Tanh, limit, |x, y| (y - x.tanh()).abs());
                assert!(tanh <= 4e-7, "{}: tanh {tanh:e}", path.name());
            }
        }
    }

    #[test]
    fn the_largest_floats_saturate() {
        for path in Path::available() {
            for (x, sigmoid, tanh) in [(f32::MAX, 1.0, 1.0), (f32::MIN, 0.0, -1.0)] {
                let y = path.run(Apply(Function::Sigmoid, [x; LANES]))[0];
                assert!((y - sigmoid).abs() <= 2e-7, "{y}");
                assert_eq!(path.run(Apply(Function::Tanh, [x; LANES]))[0], tanh);
            }
        }
    }
}
