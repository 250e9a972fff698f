//! The rate of multiply-adds that this core can do, by doing nothing else.

use std::arch::x86_64::{_mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps};
use std::arch::x86_64::{_mm512_cvtss_f32, _mm512_fmadd_ps, _mm512_set1_ps};
use std::hint::black_box;
use std::time::Instant;

/// Sums under way: more than latency times width of the cores so far, and no more than AVX2 has registers for.
const SUMS: usize = 12;
const TURNS: usize = 8192;

/// Single-precision multiply-adds per nanosecond, measured over some microseconds; 1 where there is no such instruction.
pub(crate) fn macs_per_ns() -> f64 {
    let start = Instant::now();
    let lanes = if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512F, as just asked.
        black_box(unsafe { wide(black_box(0.5)) });
        16
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has AVX2 and FMA, as just asked.
        black_box(unsafe { narrow(black_box(0.5)) });
        8
    } else {
        return 1.0;
    };
    (SUMS * lanes * TURNS) as f64 / start.elapsed().as_nanos() as f64
}

#[target_feature(enable = "avx512f")]
fn wide(factor: f32) -> f32 {
    let factor = _mm512_set1_ps(factor);
    let mut sums = [factor; SUMS];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    sums.map(|sum| _mm512_cvtss_f32(sum)).iter().sum()
}

#[target_feature(enable = "avx2,fma")]
fn narrow(factor: f32) -> f32 {
    let factor = _mm256_set1_ps(factor);
    let mut sums = [factor; SUMS];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, factor);
        }
    }
    sums.map(|sum| _mm256_cvtss_f32(sum)).iter().sum()
}
