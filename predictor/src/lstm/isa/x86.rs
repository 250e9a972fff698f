//! AVX2 with FMA, and AVX-512. The only unsafe code of the predictor: intrinsics, each behind a proof of detection.

use super::{Isa, Kernel, LANES};
use std::arch::x86_64::{
    __m256, __m512, _mm256_add_epi32, _mm256_add_ps, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_div_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_div_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

/// Exists only where the processor has AVX2 and FMA. Two registers make a vector.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Exists only where the processor has AVX-512F. One register is a vector.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    #[target_feature(enable = "avx2,fma")]
    fn compiled_for<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then_some(Self(()))
    }

    #[target_feature(enable = "avx512f")]
    fn compiled_for<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

/// Calls an intrinsic that is unsafe for one reason only: the processor must have it.
macro_rules! proven {
    ($intrinsic:ident$(::<$constant:literal>)?($($argument:expr),*)) => {
        // SAFETY: an `Avx2` or `Avx512` is made by detection alone and every caller is a method of one, so the processor
        // has the instruction. Nothing here takes a pointer.
        unsafe { $intrinsic$(::<$constant>)?($($argument),*) }
    };
}

/// The operations on two registers of which each does half.
macro_rules! both_halves {
    ($($name:ident($($operand:ident),+) = $intrinsic:ident;)+) => {$(
        #[inline(always)]
        fn $name(self, $($operand: Self::Vector),+) -> Self::Vector {
            [proven!($intrinsic($($operand[0]),+)), proven!($intrinsic($($operand[1]),+))]
        }
    )+};
}

macro_rules! whole {
    ($($name:ident($($operand:ident),+) = $intrinsic:ident;)+) => {$(
        #[inline(always)]
        fn $name(self, $($operand: Self::Vector),+) -> Self::Vector {
            proven!($intrinsic($($operand),+))
        }
    )+};
}

impl Isa for Avx2 {
    type Vector = [__m256; 2];

    const WIDE: bool = false;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the processor has AVX2 and FMA.
        unsafe { self.compiled_for(kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [proven!(_mm256_set1_ps(value)); 2]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Vector {
        let (low, high) = from.split_at(LANES / 2);
        // SAFETY: eight floats can be read, unaligned; `self` proves the instruction.
        let low = unsafe { _mm256_loadu_ps(low.as_ptr()) };
        // SAFETY: as above, the other eight.
        let high = unsafe { _mm256_loadu_ps(high.as_ptr()) };
        [low, high]
    }

    #[inline(always)]
    fn store(self, vector: Self::Vector, to: &mut [f32; LANES]) {
        let (low, high) = to.split_at_mut(LANES / 2);
        // SAFETY: eight floats can be written, unaligned; `self` proves the instruction.
        unsafe { _mm256_storeu_ps(low.as_mut_ptr(), vector[0]) };
        // SAFETY: as above, the other eight.
        unsafe { _mm256_storeu_ps(high.as_mut_ptr(), vector[1]) };
    }

    both_halves! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        min(a, b) = _mm256_min_ps;
        max(a, b) = _mm256_max_ps;
        mul_add(a, b, c) = _mm256_fmadd_ps;
    }

    #[inline(always)]
    fn pow2(self, bits: Self::Vector) -> Self::Vector {
        let half = |bits: __m256| {
            let exponent = proven!(_mm256_castps_si256(bits));
            let exponent = proven!(_mm256_slli_epi32::<23>(exponent));
            let bias = proven!(_mm256_set1_epi32(127 << 23));
            let exponent = proven!(_mm256_add_epi32(exponent, bias));
            proven!(_mm256_castsi256_ps(exponent))
        };
        [half(bits[0]), half(bits[1])]
    }
}

impl Isa for Avx512 {
    type Vector = __m512;

    const WIDE: bool = true;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the processor has AVX-512F.
        unsafe { self.compiled_for(kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        proven!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Vector {
        // SAFETY: sixteen floats can be read, unaligned; `self` proves the instruction.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, vector: Self::Vector, to: &mut [f32; LANES]) {
        // SAFETY: sixteen floats can be written, unaligned; `self` proves the instruction.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), vector) }
    }

    whole! {
        add(a, b) = _mm512_add_ps;
        sub(a, b) = _mm512_sub_ps;
        mul(a, b) = _mm512_mul_ps;
        div(a, b) = _mm512_div_ps;
        min(a, b) = _mm512_min_ps;
        max(a, b) = _mm512_max_ps;
        mul_add(a, b, c) = _mm512_fmadd_ps;
    }

    #[inline(always)]
    fn pow2(self, bits: Self::Vector) -> Self::Vector {
        let exponent = proven!(_mm512_castps_si512(bits));
        let exponent = proven!(_mm512_slli_epi32::<23>(exponent));
        let bias = proven!(_mm512_set1_epi32(127 << 23));
        let exponent = proven!(_mm512_add_epi32(exponent, bias));
        proven!(_mm512_castsi512_ps(exponent))
    }
}
