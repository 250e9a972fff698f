//! Sixteen floats at a time, on whatever the processor offers.
//!
//! An [`Isa`] is a proof that its instructions exist: only detection makes one. Code that is generic over it must be
//! inlined into [`Isa::run`], which is compiled for those instructions, hence `#[inline(always)]` all the way down.

#[cfg(target_arch = "x86_64")]
mod x86;

/// The width of all vectors. A wider register holds it whole, narrower ones in parts.
pub(crate) const LANES: usize = 16;

/// Which instructions compute.
#[derive(Clone, Copy, Debug)]
pub struct Path(pub(crate) Kind);

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
}

impl Path {
    /// Those that this processor has, slowest first; never empty.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut paths = vec![Self(Kind::Portable(Portable))];
        #[cfg(target_arch = "x86_64")]
        {
            paths.extend(x86::Avx2::detect().map(|isa| Self(Kind::Avx2(isa))));
            paths.extend(x86::Avx512::detect().map(|isa| Self(Kind::Avx512(isa))));
        }
        paths
    }

    /// The fastest that this processor has.
    #[must_use]
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Kind::Portable(Portable)))
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
        }
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Kind::Portable(isa) => isa.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(isa) => isa.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(isa) => isa.run(kernel),
        }
    }
}

/// A computation that is written once for all instruction sets.
pub(crate) trait Kernel {
    type Output;

    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// Operations on [`LANES`] floats.
pub(crate) trait Isa: Copy {
    type Vector: Copy;

    /// Whether sixteen vectors and their operands fit into registers; otherwise four do.
    const WIDE: bool;

    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, value: f32) -> Self::Vector;
    fn load(self, from: &[f32; LANES]) -> Self::Vector;
    fn store(self, vector: Self::Vector, to: &mut [f32; LANES]);
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once where the processor can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// 2ⁿ of each lane's lowest mantissa bits n, for -126 ≤ n ≤ 127: `(bits << 23) + (127 << 23)`.
    fn pow2(self, bits: Self::Vector) -> Self::Vector;
}

/// Plain Rust; the compiler makes SSE2 of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], op: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for lane in 0..LANES {
        out[lane] = op(a[lane], b[lane]);
    }
    out
}

impl Isa for Portable {
    type Vector = [f32; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Vector {
        *from
    }

    #[inline(always)]
    fn store(self, vector: Self::Vector, to: &mut [f32; LANES]) {
        *to = vector;
    }

    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        // not `f32::mul_add`, which is a library call where there is no such instruction
        let mut out = [0.0; LANES];
        for lane in 0..LANES {
            out[lane] = a[lane] * b[lane] + c[lane];
        }
        out
    }

    #[inline(always)]
    fn pow2(self, bits: Self::Vector) -> Self::Vector {
        bits.map(|bits| f32::from_bits((bits.to_bits() << 23).wrapping_add(127 << 23)))
    }
}
